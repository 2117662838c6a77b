"""The report of a protocol: each fold beside the folds by chance, their means and spreads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from engine.runtime import storage
from engine.runtime.reports import html
from engine.runtime.run import Run

MEANING = {
    "forward": "Each model is tested on the period after its training: what to expect in use.",
    "grouped": "No group is in two parts: what to expect of groups that the model has not seen.",
    "random": "Rows are divided by chance, whatever belongs together and whatever comes later.",
}


def write_report(run: Run, record: Mapping[str, Any]) -> Path:
    """Write report.html into the run's directory and return its path."""
    metric = record["metric"]
    first = record["protocols"][0]
    items = [html.Tile(f"Test {metric}", html.format_number(first["mean"]), f"{first['kind']}, mean of its folds")]
    if record["promised"] is not None:
        tone = "warn" if record["promised"] > 2 * (first["over_folds"] or 0.0) else "plain"
        note = "how much better random folds look"
        items.append(html.Tile("Promised by chance", html.format_number(record["promised"]), note, tone))
    items.append(html.Tile("Trainings", str(sum(len(item["trials"]) for item in record["protocols"])), ""))
    rows = [
        (item["kind"], item["mean"], item["over_folds"], item["over_seeds"], MEANING[item["kind"]])
        for item in record["protocols"]
    ]
    heads = ("protocol", f"test {metric}", "deviation over folds", "over seeds", "meaning")
    body = [html.tiles(items), html.section("Means", html.table(heads, rows))]
    body += [
        html.section(item["kind"].capitalize(), _chart(item, metric), _trials(item, metric))
        for item in record["protocols"]
    ]
    path = run.path("report.html")
    storage.write_bytes(path, html.page(f"Protocol {record['name']}", str(run.directory), body).encode())
    return path


def _chart(item: Mapping[str, Any], metric: str) -> Markup:
    labels = [f"{one['fold']}, seed {one['seed']}" for one in item["trials"]]
    values = [one["test"] for one in item["trials"]]
    return html.card(f"Test {metric} of each training", html.interval_chart(labels, values, reference=item["mean"]))


def _trials(item: Mapping[str, Any], metric: str) -> Markup:
    rows = [
        (one["fold"], one["seed"], one["train_rows"], one["test_rows"], one["valid"], one["test"])
        for one in item["trials"]
    ]
    heads = ("fold", "seed", "training rows", "test rows", f"valid {metric}", f"test {metric}")
    return html.folded("All trainings", html.table(heads, rows))
