"""Writes `report.html` of a monitoring run: verdict, likely causes, columns over windows, distributions, quality, calibration.

It contains no time and no place of writing: the same record and history give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from engine.monitoring.alarm_lines import LINE, NAMES
from engine.monitoring.column_findings import ColumnRecord, Pair
from engine.monitoring.drift import Drift
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.history import METRIC, Row
from engine.monitoring.performance import UNJUDGED, MetricRecord
from engine.monitoring.sudden_record import SUDDEN
from engine.runtime import storage
from engine.runtime.reports import html

SHOWN_CAUSES, SHOWN_COLUMNS, SHOWN_DISTRIBUTIONS = 8, 25, 6
SHOWN_WINDOWS, SHOWN_REFERENCE = 10, 4
BAR_ROWS = 10
MOST_TICKS = 6
SHOWN_INCIDENTS, SHOWN_DAYS = 20, 31
NO_BREAK = "\N{NON-BREAKING HYPHEN}"  # so that a heading breaks before `ref`, not within its date
BEYOND = {True: "beyond", False: "as usual", None: "the reference has too few windows to judge"}
TOGETHER = {
    "pca": "PCA reconstruction error, relative to the reference",
    "domain_auc": "ROC AUC of separating the window's rows from the reference's",
}


def write_report(path: Path, name: str, record: DriftRecord, history: pa.Table, drift: Drift) -> None:
    """Write the report of one record."""
    start, stop = (text[:16].replace("T", " ").removesuffix(" 00:00") for text in record["window"])
    subtitle = f"{start} to {stop}, {record['rows']:,} rows against the reference of model {record['model'][:12]}"
    # A window is shown as of its own time: windows monitored later must not push it out of view.
    rows = [row for row in history.to_pylist() if row["source"] == "reference" or row["from"] <= record["window"][0]]
    body = [
        _verdict(record),
        _sudden(record),
        _causes(record),
        _heat_map(record, rows),
        _distributions(record, drift.pairs),
        _quality(record, rows),
        _calibration(record),
        _all_columns(record),
    ]
    storage.write_text(
        path, html.page(f"{record['verdict'].capitalize()}: {name}", subtitle, [part for part in body if part])
    )


# ------------------------------------------------------------------------------------------------- verdict, causes


def _verdict(record: DriftRecord) -> Markup:
    tone = {"alarm": "bad", "quiet": "good"}.get(record["verdict"], "warn")
    columns = [item for item in record["columns"] if item["status"] == "alarm"]
    blind = [item for item in record["columns"] if item["status"] == "not computable"]
    tiles = [
        html.Tile("Verdict", record["verdict"], " and ".join(item["kind"] for item in record["alarms"]), tone),
        html.Tile("Columns that alarm", f"{len(columns)} of {len(record['columns'])}", "", tone),
        _quality_tile(record),
        _false_alarm_tile(record),
    ]
    if blind:
        names = ", ".join(item["name"] for item in blind[:3]) + (", ..." if len(blind) > 3 else "")
        tiles.append(html.Tile("Not computable", str(len(blind)), names, "warn"))
    parts = [html.tiles(tiles), html.paragraph(record["headline"])]
    parts += [html.paragraph(f"Noted, no alarm: {item['text']}", quiet=True) for item in record["noted"]]
    return Markup("").join(parts)


def _quality_tile(record: DriftRecord) -> html.Tile:
    performance = record["performance"]
    status = performance.get("status")
    judged = [*performance.get("alarming", ()), *performance.get("judged", ())]
    if judged:
        item = performance["metrics"][judged[0]]
        note = f"{performance['share_labelled']:.0%} of labels known"
        note += f"; band {html.format_number(item['band'][0])} to {html.format_number(item['band'][1])}"
        if judged[0] != performance["watched"]:
            note += f"; {performance['watched']} not computable"
        return html.Tile(judged[0], html.format_number(item["value"]), note, "bad" if performance["alarm"] else "plain")
    if status == UNJUDGED:
        return html.Tile("Quality", status, performance["reason"], "warn")
    for name, expected in record["estimated"].get("metrics", {}).items():
        return html.Tile(f"{name}, estimated", html.format_number(expected["value"]), "no labels yet")
    return html.Tile("Performance", "–", performance.get("reason", ""))


def _false_alarm_tile(record: DriftRecord) -> html.Tile:
    if record["rule"]["name"] == SUDDEN:
        found, title, what = record["sudden"], "Alarms, realised", "days so far"
        target, alarms, windows = found["alpha_a_day"], found["alarms"], found["looks"]
    else:
        found, title, what = record["calibration"], "False alarms, realised", "held-out windows"
        target, alarms, windows = found["alpha"], found["held_out"]["alarms"], found["held_out"]["windows"]
    realised = "–" if found["realised"] is None else f"{found['realised']:.1%}"
    note = f"target {target:.2%}; {alarms} of {windows} {what}"
    return html.Tile(title, realised, note, "plain" if found["enough"] else "warn")


def _sudden(record: DriftRecord) -> Markup:
    sudden = record["sudden"]
    if not sudden:
        return Markup("")
    incidents = [
        (
            item["opened"],
            item["closed"] or "",
            item["end"],
            item["flagged_days"],
            ", ".join(item["columns"]) + (f" and {item['more_columns']} more" if item["more_columns"] else ""),
        )
        for item in reversed(sudden["incidents"][-SHOWN_INCIDENTS:])
    ]
    days = [
        (item["day"], *(item[of][scale] for scale in ("day", "week") for of in ("scores", "lines")), item["flagged"])
        for item in sudden["days"][-SHOWN_DAYS:]
    ]
    facts = {
        "Rule that decides": f"{record['rule']['name']}: {record['rule']['why']}",
        "Target and realised": sudden["words"],
        "A change is the new usual": f"after {sudden['anchor_days']} flagged days, or from a day in monitor.acknowledge on",
    }
    parts = [html.card("How a sudden change is judged", html.facts(facts))]
    if incidents:
        columns = ("Opened", "Closed", "State", "Days beyond the line", "Columns")
        parts.append(html.card("Incidents, newest first", html.table(columns, incidents)))
    heads = ("Day", "Score of the day", "its line", "Score of the week", "its line", "Beyond")
    parts.append(html.card("Days of this window", html.table(heads, days)))
    return html.section("Sudden changes", *parts)


def _causes(record: DriftRecord) -> Markup:
    causes = [item for item in record["attribution"] if item["notable"]][:SHOWN_CAUSES]
    if not causes:
        return Markup("")
    most = max((item["weight"] for item in causes), default=0.0) or 1.0
    rows = [
        (
            item["column"],
            html.bar(item["weight"] / most, html.format_number(item["weight"], 3)),
            item["text"].removeprefix(f"{item['column']}: "),
        )
        for item in causes
    ]
    return html.section(
        "Likely causes",
        html.table(("Column", "Importance × shift", "What moved"), rows),
        note="Ranked by the importance of a column to the model times how far it moved beyond what is typical of it.",
    )


# ---------------------------------------------------------------------------------------------------- over windows


def _heat_map(record: DriftRecord, rows: Sequence[Row]) -> Markup:
    scored = [row for row in rows if row["kind"] not in (METRIC, "business")]
    every = list(dict.fromkeys((row["source"], row["from"], row["to"]) for row in scored))
    now = [window for window in every if window[0] == "current"][-SHOWN_WINDOWS:]
    before = [window for window in every if window[0] == "reference"]
    windows = before[-max(SHOWN_REFERENCE, SHOWN_WINDOWS - len(now)) :] + now
    windows = windows[-SHOWN_WINDOWS:]
    cells = {(row["column"], (row["source"], row["from"], row["to"])): row for row in scored}
    order = sorted(record["columns"], key=lambda item: (-(item["score"] or 0.0), item["name"]))
    names = [item["name"] for item in order[:SHOWN_COLUMNS]]

    def share(name: str, window: tuple[str, str, str]) -> float | None:
        row = cells.get((name, window))
        if row is None or row["score"] is None or not row["line"]:
            return None
        return max(float(row["score"]) / float(row["line"]), 0.0)

    values = [[share(name, window) for window in windows] for name in names]
    labels = [
        f"{window[1][:10].replace('-', NO_BREAK)}{'' if window[0] == 'current' else ' ref'}" for window in windows
    ]
    note = (
        "Largest normalised statistic of each column, divided by the alarm line of its window: above 1 it is beyond the line. "
        "`ref` marks windows of the reference itself; windows are named by their first day. An empty cell was not computable."
    )
    if len(order) > len(names):
        note += f" The {len(names)} of {len(order)} columns that moved most are shown; `Every column` below lists all."
    return html.section(
        "Columns over windows", html.heat_map(names, labels, values, limits=(0.0, 2.0), text=_one), note=note
    )


def _one(value: float) -> str:
    return f"{value:.1f}"


def _distributions(record: DriftRecord, pairs: Mapping[str, Pair]) -> Markup:
    chosen = [item["column"] for item in record["attribution"] if item["notable"]]
    chosen += [
        item["name"] for item in record["columns"] if item["kind"] == "prediction" and item["name"] not in chosen
    ]
    chosen += [item["column"] for item in record["attribution"] if item["column"] not in chosen]
    by_name = {item["name"]: item for item in record["columns"]}
    cards = []
    for name in [name for name in chosen if name in pairs][:SHOWN_DISTRIBUTIONS]:
        pair, item = pairs[name], by_name[name]
        drawn = _levels(item, pair) if pair.column.edges is None else _distribution_function(pair)
        cards.append(html.card(name, drawn, note=_missing_note(item)))
    return html.section("Distributions, reference against window", html.row(*cards)) if cards else Markup("")


def _distribution_function(pair: Pair) -> Markup:
    assert pair.column.edges is not None
    edges = [float(edge) for edge in pair.column.edges]
    series = []
    for name, side, style in (("reference", pair.reference, "dashed"), ("window", pair.current, "solid")):
        bins = pair.bins(side)
        if bins.sum():
            shares = np.cumsum(bins)[:-1] / bins.sum()
            series.append(html.Series(name, edges, [float(value) for value in shares], style=style))
    return html.line_chart(series, x_label=pair.column.name, y_label="share at or below", y_range=(0.0, 1.0))


def _levels(item: ColumnRecord, pair: Pair) -> Markup:
    moves = item["moved"][:BAR_ROWS]
    most = max((max(part["reference"], part["current"]) for part in moves), default=1.0) or 1.0
    rows = [
        (
            part["label"],
            html.bar(part["reference"] / most, f"{part['reference']:.1%}"),
            html.bar(part["current"] / most, f"{part['current']:.1%}"),
        )
        for part in moves
    ]
    drawn = html.table(("Moved most", "reference", "window"), rows, empty="no category moved")
    new = item["new"]["named"]
    if new:
        listed = ", ".join(f"{label} ({rows:,})" for label, rows in list(new.items())[:BAR_ROWS])
        drawn += html.paragraph(f"New: {listed}", quiet=True)
    if item["vanished"]["categories"]:
        share = item["vanished"]["share_of_reference"]
        drawn += html.paragraph(
            f"Vanished: {item['vanished']['categories']} of {pair.column.width - 2} categories, {share:.1%} of the reference",
            quiet=True,
        )
    return drawn


def _missing_note(item: ColumnRecord) -> str:
    shares = item["missing"]
    texts = ["–" if shares[side] is None else f"{shares[side]:.1%}" for side in ("reference", "current")]
    return f"Missing: {texts[0]} in the reference, {texts[1]} in the window."


# --------------------------------------------------------------------------------------------------------- quality


def _quality(record: DriftRecord, rows: Sequence[Row]) -> Markup:
    cards = []
    tracked = [row for row in rows if row["kind"] in (METRIC, "business")]
    for kind, name in dict.fromkeys((row["kind"], row["column"]) for row in tracked):
        own = [row for row in tracked if (row["kind"], row["column"]) == (kind, name)]
        if any(row["value"] is not None or row["estimated"] is not None for row in own):
            cards.append(html.card(name, _metric_chart(own)))
    table = _metric_table(record)
    if not cards and not table:
        return html.section("Performance", html.paragraph(record["performance"].get("reason", "nothing measured")))
    performance = record["performance"]
    note = performance.get("reason", "")
    if "share_labelled" in performance:
        known = f"{performance['labelled']:,} of {performance['rows']:,} labels known"
        note = f"{known} ({performance['share_labelled']:.0%}). {note}"
    return html.section("Performance", table, html.row(*cards), note=note)


def _metric_chart(rows: Sequence[Row]) -> Markup:
    places = [float(index) for index in range(len(rows))]
    step = -(-len(rows) // MOST_TICKS)
    ticks = {float(index): row["from"][:10] for index, row in enumerate(rows) if index % step == 0}
    low, high = [row["band_low"] for row in rows], [row["band_high"] for row in rows]
    values = [row["value"] for row in rows]
    series = [html.Series("measured, with the reference's band", places, values, low=low, high=high)]
    if any(row["estimated"] is not None for row in rows):
        series.append(
            html.Series("estimated before labels", places, [row["estimated"] for row in rows], style="dashed")
        )
    return html.line_chart(series, x_ticks=ticks, x_range=(-0.5, len(rows) - 0.5))


def _metric_table(record: DriftRecord) -> Markup:
    rows = []
    measured, estimated = record["performance"].get("metrics", {}), record["estimated"].get("metrics", {})
    absent: MetricRecord = {"value": None}
    for name in dict.fromkeys([*measured, *estimated]):
        item, expected = measured.get(name, absent), estimated.get(name, absent)
        row = (name, item["value"], _pair(item.get("interval")), item.get("reference", expected.get("reference")))
        rows.append((*row, _pair(item.get("band")), expected["value"], expected.get("error")))
    for name, item in record["performance"].get("labels", {}).items():
        rows.append(
            (f"{name} of the labels", item["value"], "", item.get("reference"), _pair(item.get("band")), None, None)
        )
    for target, other in record.get("targets", {}).items():
        for name, item in other.get("metrics", {}).items():
            known = (f"{target}: {name}", item["value"], _pair(item.get("interval")), item.get("reference"))
            rows.append((*known, _pair(item.get("band")), None, None))
    for name, item in record["business"].items():
        text = item["expression"] if item["value"] is not None else item["reason"]
        usual = item.get("reference"), _pair(item.get("band"))
        rows.append((f"{name}: {text}", item["value"], "", *usual, item.get("estimated"), None))
    if not rows:
        return Markup("")
    columns = ("Metric", "window", "interval", "reference", "band", "estimated", "estimate − measured")
    return html.table(columns, rows)


def _pair(bounds: Sequence[float] | None) -> str:
    return "" if not bounds else f"{html.format_number(bounds[0])} to {html.format_number(bounds[1])}"


# ----------------------------------------------------------------------------------------------------- calibration


def _calibration(record: DriftRecord) -> Markup:
    calibration = record["calibration"]
    now = max((item["score"] for item in record["columns"] if item["score"] is not None), default=None)
    scores = np.array(calibration["window_scores"])
    parts = []
    if len(scores):
        top = max(float(scores.max()), LINE) * 1.1
        edges = [float(edge) for edge in np.linspace(min(float(scores.min()), 0.0), top, 31)]
        counts = {"windows of the reference": [float(n) for n in np.histogram(scores, edges)[0]]}
        parts.append(
            html.card(
                "Largest normalised statistic of each window",
                html.histogram(
                    edges, counts, x_label="in units of its line: above 1 is beyond the line", y_label="windows"
                ),
            )
        )
    facts = {
        "This window, in units of its line": "–" if now is None else html.format_number(now),
        "Lines, in spreads above what is typical": ", ".join(
            f"{at:.3g} of {family}" for family, at in calibration["lines"].items()
        ),
        "Target false-alarm rate": f"{calibration['alpha']:.1%} per window, for both lines and all columns together",
        "Realised": calibration["words"].split("; ")[1].removeprefix("realised "),
        "95 % interval of the realised rate": _pair(calibration["realised_interval"]) or "–",
        "Windows": calibration["words"].rsplit("; ", 1)[1],
        "Effect floors": ", ".join(f"{name} {value:g}" for name, value in calibration["floors"].items()),
        "Season": calibration["season"],
    }
    parts.append(html.card("How the lines were set", html.facts(facts)))
    return html.section("Calibration", html.row(*parts), _multivariate(record))


def _multivariate(record: DriftRecord) -> Markup:
    rows: list[tuple[object, ...]] = []
    for name, item in record["multivariate"].items():
        if item["value"] is None:
            rows.append((TOGETHER[name], item["reason"], "", ""))
        else:
            rows.append((TOGETHER[name], item["value"], _pair(item["usual"]), BEYOND[item["beyond"]]))
    for name, value in record["operational"].items():
        if isinstance(value, (int, float)) and "/" not in name:
            rows.append((name, value, "", ""))
    if not rows:
        return Markup("")
    return html.table(("Columns together, and figures of the run", "value", "usual in the reference", ""), rows)


def _all_columns(record: DriftRecord) -> Markup:
    rows = []
    for item in sorted(record["columns"], key=lambda item: (-(item["score"] or -1e9), item["name"])):
        values = [item["statistics"].get(name, {}).get("value") for name in NAMES]
        missing = item.get("missing", {}).get("current")
        found = item["status"] if "reason" not in item else item["reason"]
        rows.append((item["name"], item["kind"], found, item["score"], *values, missing))
    columns = ("Column", "kind", "status", "score", *NAMES, "missing share")
    return html.section("Every column", html.table(columns, rows))
