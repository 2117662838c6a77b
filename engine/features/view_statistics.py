"""Statistics of a stored view for the catalog: nulls, moments, the age of its data, and drift since the month before.

Drift is the population stability index (kernels.statistics.psi) of the newest month of event time (UTC) against the month before:
over ten bins of equal shares of that month for numbers (a value with a tenth of the rows has its own), over its most frequent
values for the rest; nulls are left out, and have a column of their own.
"""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.dataset import Dataset, open_dataset
from engine.errors import UserError
from engine.features.compute import as_floats
from engine.features.instants import instants
from engine.features.store import StoredView
from engine.runtime import storage
from kernels.statistics import psi

BINS = 10
LEVELS = 50  # values of a category that are told apart
SAMPLE_ROWS = 65_536  # of a month, in SLICES: a share is right within 0.2 %
SLICES = 4
Rows = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Age:
    """The newest event of a view's dataset, when the view was computed, and the rows of the newest two months."""

    newest_event: str
    computed: str
    month: str
    month_rows: Rows
    before: str
    before_rows: Rows


def age_of(stored: StoredView, store: Path) -> Age | None:
    """The age of a view's data; None where its dataset is no longer in the store, or has no rows. Raises UserError."""
    named = stored.manifest["dataset"]
    try:
        dataset = open_dataset(storage.inside(store, "datasets", named["name"], named["recipe"][:16]))
    except UserError:
        return None
    if not dataset.rows:
        return None
    newest = int(instants(dataset.read([dataset.event_time], rows=(dataset.rows - 1, dataset.rows))[0])[0])
    month = np.datetime64(newest, "us").astype("datetime64[M]")
    computed = datetime.datetime.fromtimestamp(stored.directory.stat().st_mtime, datetime.UTC)
    return Age(
        f"{np.datetime64(newest, 'us').astype('datetime64[s]')}Z",
        f"{computed:%Y-%m-%dT%H:%M:%SZ}",
        str(month),
        _rows(dataset, month),
        str(month - 1),
        _rows(dataset, month - 1),
    )


def _rows(dataset: Dataset, month: np.datetime64) -> Rows:
    start, stop = (int(edge.astype("datetime64[us]").astype(np.int64)) for edge in (month, month + 1))
    return dataset.row_range(start, stop)


def statistics(stored: StoredView, age: Age | None) -> list[dict[str, Any]]:
    """Per feature: share of nulls, in all and in the newest month, drift, mean and standard deviation, smallest and largest."""
    months = monthly(stored, age)
    rows = []
    for name in stored.columns:
        column = stored.read([name])[name]
        facts: dict[str, Any] = {"feature": name, "type": str(column.type), "nulls": _percent(column), **months[name]}
        numeric = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        bounds = pc.min_max(column).as_py() if numeric else {"min": None, "max": None}
        moments = (
            {"mean": pc.mean(column).as_py(), "std": pc.stddev(column).as_py()}
            if numeric
            else {"mean": None, "std": None}
        )
        facts |= {key: _rounded(value) for key, value in {**moments, **bounds}.items()}
        rows.append(facts)
    return rows


def summary(stored: StoredView | None, age: Age | None) -> dict[str, Any]:
    """The view in a line: its newest event, the largest share of nulls of the newest month, and the feature that drifts most."""
    months = monthly(stored, age) if stored else {}
    nulls = [float(facts["month_nulls"].rstrip("%")) for facts in months.values() if facts["month_nulls"]]
    drifts = [(facts["drift"], name) for name, facts in months.items() if facts["drift"] is not None]
    return {
        "newest_event": age.newest_event if age else "",
        "most_nulls": f"{max(nulls)}%" if nulls else "",
        "drift": max(drifts)[0] if drifts else None,
        "drift_of": max(drifts)[1] if drifts else "",
    }


def monthly(stored: StoredView, age: Age | None) -> dict[str, dict[str, Any]]:
    """Feature -> the share of nulls in the newest month, and drift; None and an empty text where a month has no rows."""
    nothing: dict[str, Any] = {"month_nulls": "", "drift": None}
    if age is None:
        return dict.fromkeys(stored.columns, nothing)
    now, before = (_sample(stored, rows) for rows in (age.month_rows, age.before_rows))
    return {
        name: {
            "month_nulls": _percent(now[name]) if len(now[name]) else "",
            "drift": _rounded(drift(before[name].drop_null(), now[name].drop_null())),
        }
        for name in stored.columns
    }


def drift(before: pa.ChunkedArray, now: pa.ChunkedArray) -> float | None:
    """PSI of two columns of one type without nulls; None where one of them has no values."""
    if pa.types.is_floating(before.type) or pa.types.is_integer(before.type) or pa.types.is_decimal(before.type):
        values = [as_floats(side) for side in (before, now)]
        values = [side[~np.isnan(side)] for side in values]
        if not len(values[0]):
            return None
        inner = np.unique(np.quantile(values[0], np.arange(1, BINS) / BINS, method="lower"))
        often = [edge for edge in inner if np.mean(values[0] == edge) >= 1 / BINS]
        inner = np.unique([*inner, *np.nextafter(often, np.inf)])  # a frequent value has a bin of its own
        old, new = (np.bincount(np.searchsorted(inner, side, "right"), minlength=len(inner) + 1) for side in values)
        return psi(old, new).value
    sides = [Counter(side.cast(pa.string()).to_pylist()) for side in (before, now)]
    levels = [level for level, _ in sides[0].most_common(LEVELS)]
    known = [[side[level] for level in levels] for side in sides]
    old, new = (np.array([*found, side.total() - sum(found)]) for found, side in zip(known, sides, strict=True))
    return psi(old, new).value


def _sample(stored: StoredView, rows: Rows) -> pa.Table:
    """At most SAMPLE_ROWS of a range, in slices spread over it."""
    start, stop = rows
    if stop - start <= SAMPLE_ROWS:
        return stored.read(rows=rows)
    length = SAMPLE_ROWS // SLICES
    places = np.linspace(start, stop - length, SLICES).astype(np.int64).tolist()
    return pa.concat_tables([stored.read(rows=(place, place + length)) for place in places])


def _percent(column: pa.ChunkedArray) -> str:
    return f"{100 * column.null_count / max(len(column), 1):.1f}%"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
