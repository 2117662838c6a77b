"""Monitoring history (monitor/history.parquet): a row per window and column, for the reference's and all monitored windows."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from engine.errors import UserError
from engine.monitoring.alarm_lines import (
    LINE,
    NAMES,
    CalibrationPlan,
    Line,
    contiguous,
    judge,
    real_windows,
    window_statistics,
)
from engine.monitoring.column_findings import LEFT_OUT
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.performance import WAITING, MetricRecord
from engine.monitoring.reference import Reference, day_text
from engine.runtime import storage
from engine.runtime.run import Run, as_written

FILE = ("monitor", "history.parquet")
REFERENCE_WINDOWS = 36
METRIC = "metric"
Row = dict[str, Any]  # of SCHEMA
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # reference or current
        ("from", pa.string()),
        ("to", pa.string()),
        ("model", pa.string()),
        ("column", pa.string()),
        ("kind", pa.string()),  # numeric, categorical, prediction, volume, metric, business
        ("status", pa.string()),
        ("score", pa.float64()),  # largest normalised statistic, in units of its line
        ("line", pa.float64()),  # of the score
        *((name, pa.float64()) for name in NAMES),
        ("missing_share", pa.float64()),
        ("rows", pa.int64()),
        ("value", pa.float64()),  # of a metric, with its reference band
        ("band_low", pa.float64()),
        ("band_high", pa.float64()),
        ("estimated", pa.float64()),
    ]
)
KEY = ("source", "from", "to", "kind", "column")  # a business metric may have the name of a column


def reference_rows(
    reference: Reference, line: Line, plan: CalibrationPlan, floors: Mapping[str, float], model: str
) -> list[Row]:
    """The newest separate windows of the reference, each against the rest of it."""
    covered = reference.covered
    weights = contiguous(covered, plan.length, plan.length)[-REFERENCE_WINDOWS:]
    if len(weights) < 2:
        return []
    windows = real_windows(reference, weights)
    found = window_statistics(reference, windows, covered, plan)
    _, alarm = judge(line, found, floors)
    scores = line.normalised(found)
    counts = reference.windows(weights, windows.scored)
    rows = []
    columns = [*((item.name, item.kind) for item in reference.columns), (reference.rows_column, "volume")]
    for at in range(len(weights)):
        first = int(np.flatnonzero(weights[at])[0])
        period = [day_text(int(reference.days[first]) + shift) for shift in (0, plan.length)]
        for index, (name, kind) in enumerate(columns):
            own = scores[index, :, at]
            computable = np.isfinite(own).any()
            calm = LEFT_OUT if name in reference.rising else "quiet" if computable else "not computable"
            status = "alarm" if alarm[index, :, at].any() else calm
            row: Row = {"source": "reference", "from": period[0], "to": period[1], "model": model}
            row |= {"column": name, "kind": kind, "status": status, "line": LINE}
            row["score"] = float(np.nanmax(own)) if computable else None
            row |= {statistic: storage.finite(found[index, k, at]) for k, statistic in enumerate(NAMES)}
            if name in counts:
                total = float(counts[name].rows[at])
                row["missing_share"] = float(counts[name].missing[at]) / total if total else None
                row["rows"] = int(total)
            else:
                row["rows"] = int(weights[at] @ reference.rows)
            rows.append(row)
    return rows


def current_rows(record: DriftRecord) -> list[Row]:
    """The rows of the window that a drift record describes."""
    start, stop = record["window"]
    base: Row = {"source": "current", "from": start, "to": stop, "model": record["model"]}
    rows = []
    for item in record["columns"]:
        row = {**base, "column": item["name"], "kind": item["kind"], "status": item["status"], "line": LINE}
        row |= {"score": item["score"], "rows": item["rows"]["current"]}
        row["missing_share"] = item.get("missing", {}).get("current")
        row |= {name: item["statistics"].get(name, {}).get("value") for name in NAMES}
        rows.append(row)
    estimated = record["estimated"].get("metrics", {})
    measured = record["performance"].get("metrics", {})
    for name in dict.fromkeys([*measured, *estimated]):
        expected = estimated[name]["value"] if name in estimated else None
        row = base | _metric_row(name, METRIC, measured.get(name), expected)
        rows.append(row if record["performance"].get("enough_labels", True) else row | {"status": WAITING})
    rows += [base | _metric_row(name, "business", item, None) for name, item in record["business"].items()]
    return rows


def _metric_row(name: str, kind: str, item: MetricRecord | None, estimated: float | None) -> Row:
    item = item or {"value": None}
    low, high = item.get("band") or (None, None)
    known = "beyond" if item.get("beyond") else "quiet" if item.get("band") else "no band"
    status = "not computable" if item["value"] is None else known
    row: Row = {"column": name, "kind": kind, "status": status, "value": item["value"], "estimated": estimated}
    return row | {"band_low": low, "band_high": high}


def earlier_rows(run: Run, model: str) -> list[Row]:
    """The monitored windows in the history of the newest finished monitoring run of the same name and model."""
    table = newest_file(run, model, FILE, SCHEMA)
    return [row for row in table.to_pylist() if row["source"] == "current"] if table is not None else []


def newest_file(run: Run, model: str, file: tuple[str, ...], schema: pa.Schema) -> pa.Table | None:
    """A table, with a column `model`, of the newest finished monitoring run of the same name and model that has it.

    One that cannot be read is left out with a warning.
    """
    for done in sorted(run.directory.parent.glob("*-*/DONE"), reverse=True):
        path = done.parent.joinpath(*file)
        if done.parent == run.directory or not path.exists():
            continue
        try:
            table = storage.read_parquet(as_written(done.parent, "/".join(file), refuse=True))
            table = table.select(schema.names).cast(schema)
        except (UserError, OSError, KeyError, ValueError, pa.ArrowException) as error:
            run.warn(f"left out: {path} is not a table of monitoring ({str(error).splitlines()[0]})")
            continue
        if table["model"][:1].to_pylist() == [model]:
            return table
    return None


def errors_of(earlier: Iterable[Row], length: int, start: str) -> dict[str, list[float]]:
    """Expected less measured of each metric in separate monitored windows of `length` days that end by `start`, an instant as in
    `drift.json`, and of whose labels enough were known.
    """
    found: dict[str, list[float]] = {}
    until: dict[str, str] = {}
    for row in sorted(earlier, key=lambda row: row["from"]):
        if row["to"] > start or row["status"] == WAITING or row["from"] < until.get(row["column"], ""):
            continue
        days = (datetime.date.fromisoformat(row["to"][:10]) - datetime.date.fromisoformat(row["from"][:10])).days
        if row["kind"] == METRIC and days == length and None not in (row["estimated"], row["value"]):
            found.setdefault(row["column"], []).append(row["estimated"] - row["value"])
            until[row["column"]] = row["to"]
    return found


def history_table(rows: Iterable[Row]) -> pa.Table:
    """One row per window and column (a later row replaces an earlier one), by time."""
    kept = {tuple(row[name] for name in KEY): row for row in rows}
    ordered = sorted(kept.values(), key=lambda row: (row["source"] != "reference", row["from"], row["to"]))
    return pa.Table.from_pylist([dict(row) for row in ordered], schema=SCHEMA)
