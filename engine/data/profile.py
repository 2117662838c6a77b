"""The profile of a dataset: exact counts and ranges per column, and a histogram from an evenly spaced sample of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.config import units
from engine.data.columns import TEXT_LIMIT
from engine.runtime import records

BINS = 20
TOP = 20
SAMPLE_ROWS = 100_000


class Counts(TypedDict):
    """Nulls, NaNs, smallest and largest value of a column."""

    nulls: int
    nan: int
    min: Any
    max: Any


def counts(table: pa.Table, written: pq.FileMetaData | None = None) -> dict[str, Counts]:
    """The counts of each column.

    `written`: metadata of the table's Parquet file, whose writer has already compared texts, which is slow.
    """
    found = {}
    for field in table.schema:
        column = table.column(field.name)
        if pa.types.is_float16(field.type):
            column = column.cast(pa.float32())  # Arrow cannot order float16 and durations
        elif pa.types.is_duration(field.type):
            column = column.cast(pa.int64())
        elif pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
            column = column.cast(pa.int32() if field.type.bit_width == 32 else pa.int64())  # Python's end in 9999
        entry: Counts = {"nulls": column.null_count, "nan": 0, "min": None, "max": None}
        if pa.types.is_floating(field.type):
            entry["nan"] = int(pc.sum(pc.is_nan(column)).as_py() or 0)
        if not pa.types.is_nested(field.type) and not pa.types.is_null(field.type) and column.null_count < len(column):
            known = _text_bounds(written, field.name) if written and pa.types.is_string(field.type) else None
            entry["min"], entry["max"] = known or _bounds(column)
        found[field.name] = entry
    return found


def _bounds(column: pa.ChunkedArray) -> tuple[Any, Any]:
    found = pc.min_max(column)
    return found["min"].as_py(), found["max"].as_py()


def _text_bounds(written: pq.FileMetaData, name: str) -> tuple[str, str] | None:
    """Smallest and largest text of a column from its row groups' statistics; None without them (very long text)."""
    paths = [written.schema.column(place).path for place in range(len(written.schema))]
    if paths.count(name) != 1:
        return None
    chunks = [written.row_group(place).column(paths.index(name)) for place in range(written.num_row_groups)]
    found = [chunk.statistics for chunk in chunks if not (chunk.statistics and chunk.statistics.num_values == 0)]
    if not all(item is not None and item.has_min_max for item in found):
        return None
    return min(item.min for item in found), max(item.max for item in found)


class Histogram(TypedDict):
    """Rows of a sample between edges."""

    edges: list[float]
    counts: list[records.Count]


class Spread(TypedDict, total=False):
    """Figures of the values in a sample of one column: of numbers, or of what can be counted."""

    mean: float | None
    std: float | None
    histogram: Histogram | None
    distinct_in_sample: records.Count
    top: list[tuple[Any, records.Count]]


class ColumnProfile(Spread):
    """Figures of one column; without values if it is sensitive."""

    nulls: records.Count
    null_rate: float
    nan: records.Count
    min: NotRequired[Any]
    max: NotRequired[Any]


class ProfileRecord(TypedDict):
    """profile.json of a dataset."""

    rows: records.Count
    sample_rows: records.Count
    columns: dict[str, ColumnProfile]


def merge(parts: list[dict[str, Counts]]) -> dict[str, Counts]:
    """The sum of the counts of several parts."""
    merged: dict[str, Counts] = {}
    for part in parts:
        for name, entry in part.items():
            total = merged.setdefault(name, {"nulls": 0, "nan": 0, "min": None, "max": None})
            total["nulls"] += entry["nulls"]
            total["nan"] += entry["nan"]
            total["min"] = _chosen(min, total["min"], entry["min"])
            total["max"] = _chosen(max, total["max"], entry["max"])
    return merged


def _chosen(choose: Callable[[list[Any]], Any], *values: Any) -> Any:
    known = [value for value in values if value is not None and value == value]
    return choose(known) if known else None


def profile(rows: int, merged: dict[str, Counts], sample: pa.Table, sensitive: set[str]) -> ProfileRecord:
    """profile.json: what `engine data show` prints. Values of sensitive columns are left out."""
    columns: dict[str, ColumnProfile] = {}
    for field in sample.schema:
        entry = merged.get(field.name, {"nulls": 0, "nan": 0, "min": None, "max": None})
        shown: ColumnProfile = {
            "nulls": entry["nulls"],
            "null_rate": entry["nulls"] / rows if rows else 0.0,
            "nan": entry["nan"],
        }
        if field.name not in sensitive:
            shown["min"] = _plain(_moment(entry["min"], field.type))
            shown["max"] = _plain(_moment(entry["max"], field.type))
            shown |= _spread(sample.column(field.name))
        columns[field.name] = shown
    return {"rows": rows, "sample_rows": sample.num_rows, "columns": columns}


def _spread(column: pa.ChunkedArray) -> Spread:
    kind = column.type
    numeric = (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_timestamp(kind)
    )
    if numeric:
        return _histogram(column)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind):
        return {}
    found = pc.value_counts(
        (column.cast(pa.int32()) if pa.types.is_date(kind) else column).drop_null().combine_chunks()
    )
    pairs = sorted(
        ((_plain(_moment(item["values"], kind)), item["counts"]) for item in found.to_pylist()),
        key=lambda pair: (-pair[1], str(pair[0])),
    )
    return {"distinct_in_sample": len(pairs), "top": pairs[:TOP]}


def _histogram(column: pa.ChunkedArray) -> Spread:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values = np.asarray(column.drop_null().cast(pa.float64(), safe=False).combine_chunks())
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "std": None, "histogram": None}
    low, high = float(values.min()), float(values.max())
    scaled, unit = _scaled(values)
    with np.errstate(over="ignore", invalid="ignore"):
        edges = np.linspace(low / unit, high / unit, BINS + 1) * unit
    if not np.all(np.isfinite(edges)) or np.any(edges[1:] <= edges[:-1]):
        edges = np.array([low, high])  # values are equal, or too close for edges between them
    edges[[0, -1]] = low, high
    heights = np.histogram(scaled, edges / unit)[0] if high > low else [len(values)]
    std = float(scaled.std()) * unit
    return {
        "mean": float(scaled.mean()) * unit,
        "std": std if math.isfinite(std) else None,
        "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in heights]},
    }


def _scaled(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(values in units of a power of two, that unit), so that their squares and sums do not overflow."""
    largest = float(np.abs(values).max())
    if largest == 0 or 2.0**-300 < largest < 2.0**300:
        return values, 1.0
    unit = 2.0 ** max(math.frexp(largest)[1] - 1, -1000)
    return values / unit, unit


def _moment(value: Any, kind: pa.DataType) -> Any:
    """The ISO text of an instant or a date that was counted as a number."""
    if value is not None and pa.types.is_timestamp(kind):
        return units.format_instant(value)
    return str(np.datetime64(value, "D")) if value is not None and pa.types.is_date(kind) else value


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= TEXT_LIMIT else f"{value[:TEXT_LIMIT]}... ({len(value):,} characters)"
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
