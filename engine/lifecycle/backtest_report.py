"""Writes the result of a backtest as a text table and as `report.html`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from engine.runtime import storage, terminal
from engine.runtime.registry import short
from engine.runtime.reports import html
from engine.runtime.run import Run
from engine.training.metrics import decimals, find_metric

COLUMNS = (
    "policy",
    "mean",
    "gain over never",
    "share of gain of every",
    "regret to every",
    "retrains",
    "promotions",
    "s",
)


def write_report(run: Run, record: dict[str, Any]) -> Path:
    """Write report.html into the run's directory and return its path."""
    body = [
        html.tiles(_tiles(record)),
        html.section(
            "Quality against cost",
            html.table(COLUMNS, [_row(item) for item in record["policies"]]),
            note="Mean over the periods with equal weights. The share is empty where retraining every period gains nothing. "
            "Seconds of training are what a policy would cost alone: a model that two policies share is counted for both. "
            "Scores and monitored windows are counted for the policy that needed them first.",
        ),
        html.row(
            html.card(
                f"{_name(record)} by period", _chart(record), note="The band is the interval of the first policy."
            ),
            html.card("Difference from never", _gains(record), note="Above zero is better than the first model."),
        ),
        html.section(
            "Challengers that the gate refused",
            html.table(
                (
                    "policy",
                    "period",
                    "judged: champion",
                    "judged: challenger",
                    "period: champion",
                    "period, if promoted",
                    "would have",
                    "why",
                ),
                list(_refused(record)),
                empty="none was refused",
            ),
            note="Each refused challenger was measured on the period that it would have served.",
        ),
    ]
    body += [_policy(item, record) for item in record["policies"]]
    first = record["first_model"]
    body.append(
        html.section(
            "Configuration",
            html.facts(
                {
                    "first model": first["run"],
                    "trained on": " to ".join(first["split"]["train"]),
                    "labels known by": first["split"]["known_by"],
                    "dataset": record["dataset"],
                    "took": f"{record['seconds']:.0f} s",
                }
            ),
        )
    )
    subtitle = (
        f"{len(record['policies'])} policies over {len(record['policies'][0]['periods'])} periods of {record['name']}"
    )
    path = run.path("report.html")
    storage.write_text(
        path, html.page(f"Backtest of {record['name']}", subtitle, body, f"Run directory {run.directory}")
    )
    return path


def text_table(record: dict[str, Any]) -> str:
    """The comparison as text."""
    return terminal.table(COLUMNS, [[_text(cell) for cell in _row(item)] for item in record["policies"]])


def _text(cell: Any) -> str:
    return decimals(cell) if isinstance(cell, float) else html.format_number(cell)


def _name(record: dict[str, Any]) -> str:
    return find_metric(record["metric"]).label


def _row(item: dict[str, Any]) -> list[Any]:
    return [
        item["name"],
        item["mean_metric"],
        item["gain_over_never"],
        item["share_of_gain"],
        item["regret_to_every"],
        item["retrains"],
        item["promotions"],
        round(item["seconds"]),
    ]


def _tiles(record: dict[str, Any]) -> list[html.Tile]:
    found = []
    for item in record["policies"]:
        share = item["share_of_gain"]
        note = f"{item['retrains']} retrains, {item['promotions']} promotions"
        if share is not None and item["name"] not in ("never", "every"):
            note += f", {100 * share:.0f} % of the gain of every"
        found.append(html.Tile(item["name"], html.format_number(item["mean_metric"]), note))
    return found


def _chart(record: dict[str, Any]) -> Markup:
    series = []
    for place, item in enumerate(record["policies"]):
        rows = item["periods"]
        low, high = ([row[name] for row in rows] if place == 0 else None for name in ("low", "high"))
        series.append(html.Series(item["name"], _places(rows), [row["metric"] for row in rows], low, high))
    return html.line_chart(series, y_label=_name(record), x_ticks=_ticks(record))


def _gains(record: dict[str, Any]) -> Markup:
    base = next((item for item in record["policies"] if item["name"] == "never"), record["policies"][0])
    sign = find_metric(record["metric"]).sign
    series = []
    for item in record["policies"]:
        gains = [
            None if row["metric"] is None or other["metric"] is None else sign * (row["metric"] - other["metric"])
            for row, other in zip(item["periods"], base["periods"], strict=True)
        ]
        series.append(html.Series(item["name"], _places(item["periods"]), gains))
    return html.line_chart(series, y_label="better by", x_ticks=_ticks(record))


def _places(rows: list[dict[str, Any]]) -> list[float]:
    return [float(place) for place in range(len(rows))]


def _ticks(record: dict[str, Any]) -> dict[float, str]:
    rows = record["policies"][0]["periods"]
    step = max(1, len(rows) // 9)
    return {float(place): row["period"] for place, row in enumerate(rows) if place % step == 0}


def _refused(record: dict[str, Any]) -> Iterator[list[Any]]:
    sign = find_metric(record["metric"]).sign
    for item in record["policies"]:
        for row in item["periods"]:
            if row.get("verdict") != "kept" or "refused_metric" not in row:
                continue
            judged, would = row["judged"] or {}, "?"
            if row["metric"] is not None and row["refused_metric"] is not None:
                difference = sign * (row["refused_metric"] - row["metric"])
                would = f"{'hurt' if difference < 0 else 'helped'} by {decimals(abs(difference))}"
            figures = [judged.get("champion"), judged.get("challenger"), row["metric"], row["refused_metric"]]
            yield [item["name"], row["period"], *figures, would, row["reason"]]


def _policy(item: dict[str, Any], record: dict[str, Any]) -> Markup:
    rows = [
        [
            row["period"],
            row["metric"],
            short(row["model"]),
            "promoted" if row["promoted"] else "kept" if row["retrained"] else "",
            {True: "alarm", False: "quiet", None: "not computable"}[row["alarm"]],
            row["rows"],
            f"{row['seconds']:.1f}",
            row["reason"],
        ]
        for row in item["periods"]
    ]
    title = f"Policy {item['name']}"
    triggers = ", ".join(item["triggers"]) or "nothing"
    return html.section(
        title,
        html.table(
            ("period", _name(record), "model", "retrain before it", "drift in it", "labelled rows", "s", "reason"), rows
        ),
        note=f"Retrains on: {triggers}. Window: {item['window']}.",
    )
