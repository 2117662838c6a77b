"""Writes the result of a backtest as a text table and as `report.html`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from markupsafe import Markup

from engine.config.nested import Tree
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


class PeriodRow(TypedDict, total=False):
    """A period under a policy: what it decided before it, and how its model did in it, with an interval."""

    period: str
    retrained: bool
    promoted: bool
    verdict: str
    reason: str
    challenger: str | None
    train_rows: float | None
    judged: dict[str, Any] | None
    refused_metric: float | None
    model: str
    metric: float | None
    low: float | None
    high: float | None
    rows: int
    alarm: bool | None
    causes: list[str]
    seconds: float


class PolicyResult(TypedDict):
    """A policy over all periods; the last four compare it with `never` and `every`."""

    name: str
    triggers: list[str]
    window: str
    retrains: int
    promotions: int
    seconds: float
    periods: list[PeriodRow]
    mean_metric: NotRequired[float | None]
    gain_over_never: NotRequired[float | None]
    regret_to_every: NotRequired[float | None]
    share_of_gain: NotRequired[float | None]


class BacktestRecord(TypedDict):
    """backtest.json; `first_model` has its run and its split."""

    format: int
    name: str
    metric: str
    period: str
    dataset: str
    first_model: Tree
    retrain: Tree
    seconds: float
    policies: list[PolicyResult]


def write_report(run: Run, record: BacktestRecord) -> Path:
    """Write report.html into the run's directory and return its path."""
    body = [
        html.tiles(_tiles(record)),
        html.section(
            "Quality against cost",
            html.table(COLUMNS, policy_rows(record)),
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


def text_table(record: BacktestRecord) -> str:
    """The comparison as text."""
    return terminal.table(COLUMNS, [[_text(cell) for cell in row] for row in policy_rows(record)])


def _text(cell: Any) -> str:
    return decimals(cell) if isinstance(cell, float) else html.format_number(cell)


def _name(record: BacktestRecord) -> str:
    return find_metric(record["metric"]).label


def policy_rows(record: BacktestRecord) -> list[list[Any]]:
    """The figures of COLUMNS of each policy."""
    return [
        [
            item["name"],
            item.get("mean_metric"),
            item.get("gain_over_never"),
            item.get("share_of_gain"),
            item.get("regret_to_every"),
            item["retrains"],
            item["promotions"],
            round(item["seconds"]),
        ]
        for item in record["policies"]
    ]


def _tiles(record: BacktestRecord) -> list[html.Tile]:
    found = []
    for item in record["policies"]:
        share = item["share_of_gain"]
        note = f"{item['retrains']} retrains, {item['promotions']} promotions"
        if share is not None and item["name"] not in ("never", "every"):
            note += f", {100 * share:.0f} % of the gain of every"
        found.append(html.Tile(item["name"], html.format_number(item["mean_metric"]), note))
    return found


def _chart(record: BacktestRecord) -> Markup:
    series = []
    for place, item in enumerate(record["policies"]):
        rows = item["periods"]
        band = ([row["low"] for row in rows], [row["high"] for row in rows]) if place == 0 else (None, None)
        series.append(html.Series(item["name"], _places(rows), [row["metric"] for row in rows], *band))
    return html.line_chart(series, y_label=_name(record), x_ticks=_ticks(record))


def _gains(record: BacktestRecord) -> Markup:
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


def _places(rows: list[PeriodRow]) -> list[float]:
    return [float(place) for place in range(len(rows))]


def _ticks(record: BacktestRecord) -> dict[float, str]:
    rows = record["policies"][0]["periods"]
    step = max(1, len(rows) // 9)
    return {float(place): row["period"] for place, row in enumerate(rows) if place % step == 0}


def _refused(record: BacktestRecord) -> Iterator[list[Any]]:
    sign = find_metric(record["metric"]).sign
    for item in record["policies"]:
        for row in item["periods"]:
            if row.get("verdict") != "kept" or "refused_metric" not in row:
                continue
            judged, would = row["judged"], "?"
            if row["metric"] is not None and row["refused_metric"] is not None:
                difference = sign * (row["refused_metric"] - row["metric"])
                would = f"{'hurt' if difference < 0 else 'helped'} by {decimals(abs(difference))}"
            figures = [
                *((judged["champion"], judged["challenger"]) if judged else (None, None)),
                row["metric"],
                row["refused_metric"],
            ]
            yield [item["name"], row["period"], *figures, would, row["reason"]]


def _policy(item: PolicyResult, record: BacktestRecord) -> Markup:
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
