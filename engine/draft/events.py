"""The event table as drafted, in memory: rows of the sources after the query, and figures of each column."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.data import query
from engine.data.arrow_types import TIMESTAMP
from engine.draft.sources import Source
from engine.errors import UserError
from engine.features.instants import NEVER, instants

MOST_ROWS = 400_000  # rows that are looked at; of more, every k-th
# Numbers that stand for "no value" where they lie far from all others.
_SENTINELS = (-99, -999, -9999, -99999, -999999, 999, 9999, 99999, 999999, 9999999)
_OFTEN = 5
EARLIEST, LATEST = 1900, 9000  # years; what lies beyond is no date


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is counted of a column; `low` and `high` are None for text."""

    name: str
    type: pa.DataType
    rows: int
    filled: int
    distinct: int
    low: Any
    high: Any
    length: float  # mean length of text, in characters
    words: float = 0.0  # mean number of words of text
    width: int = 0  # the most frequent length of lists, and the share of lists that have it
    same_width: float = 0.0

    @property
    def shown(self) -> str:
        """Its range or number of values, for a comment."""
        if pa.types.is_nested(self.type):
            return f"lists of {self.width}" if self.same_width == 1 else f"lists, {self.same_width:.1%} of {self.width}"
        if pa.types.is_boolean(self.type) or self.low is None:
            return f"{self.distinct:,} values"
        return f"{_plain(self.low)} to {_plain(self.high)}"


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(source: Source, zone: str) -> tuple[pa.Table, int]:
    """(rows of the source's files, all or every k-th, in their order; the number of all rows). Raises UserError."""
    parts: list[pa.Table] = []
    step, seen, kept = 1, 0, 0
    for table in source.tables(zone):
        parts.append(_every(table, step, seen))
        seen += table.num_rows
        kept += parts[-1].num_rows
        while kept > MOST_ROWS:
            step *= 2
            whole = pa.concat_tables(parts)
            parts = [whole.take(pa.array(np.arange(0, whole.num_rows, 2)))]
            kept = parts[0].num_rows
    if not seen:
        raise UserError(f"{source.config.path} must hold at least one row, found none")
    return pa.concat_tables(parts).combine_chunks(), seen


def _every(table: pa.Table, step: int, seen: int) -> pa.Table:
    """Rows whose number, counted from `seen`, is a multiple of `step`."""
    if step == 1:
        return table
    return table.take(pa.array(np.arange(-seen % step, table.num_rows, step)))


def select(tables: dict[str, pa.Table], sql: str, where: str) -> pa.Table:
    """The rows of one SELECT over the tables, as ingest would give them; instants in UTC. Raises UserError."""
    with query.connect() as connection:
        query.register(connection, tables)
        found = pa.concat_tables(query.run(connection, sql, where)).combine_chunks()
    kinds = [
        pa.field(field.name, TIMESTAMP if pa.types.is_timestamp(field.type) else field.type) for field in found.schema
    ]
    return found.cast(pa.schema(kinds))


def figures_of(table: pa.Table) -> dict[str, Figures]:
    """Figures of each column."""
    return {name: _figures(name, table[name]) for name in table.column_names}


def _figures(name: str, values: pa.ChunkedArray) -> Figures:
    kind, low, high, length, words = values.type, None, None, 0.0, 0.0
    filled = len(values) - values.null_count
    if pa.types.is_nested(kind):
        return _lists(name, values)
    text = pa.types.is_string(kind) or pa.types.is_binary(kind)
    if filled and not text and not pa.types.is_boolean(kind):
        ends = pc.min_max(values).as_py()
        low, high = ends["min"], ends["max"]
    if filled and text:
        length = pc.mean(pc.binary_length(values)).as_py()
        words = pc.mean(pc.count_substring_regex(values, r"\S+")).as_py() if pa.types.is_string(kind) else 0.0
    return Figures(
        name, kind, len(values), filled, pc.count_distinct(values, mode="only_valid").as_py(), low, high, length, words
    )


def _lists(name: str, values: pa.ChunkedArray) -> Figures:
    """Figures of a column of lists, of which all may differ."""
    filled = len(values) - values.null_count
    if not filled or not pa.types.is_list(values.type):
        return Figures(name, values.type, len(values), filled, filled, None, None, 0.0)
    lengths = pc.value_counts(pc.list_value_length(values.drop_null()).combine_chunks()).to_pylist()
    most = max(lengths, key=lambda item: item["counts"])
    shares = {"width": most["values"], "same_width": most["counts"] / filled}
    return Figures(name, values.type, len(values), filled, filled, None, None, 0.0, **shares)


def seconds_of(values: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64[n], seconds since 1970; NaN for null."""
    found = instants(values)
    return np.where(found == NEVER, np.nan, found / 1e6)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A value that stands for null in a column: how it is shown, its rows, and the column without it in SQL."""

    value: str
    rows: int
    sql: str


def stand_ins(table: pa.Table, figures: dict[str, Figures]) -> dict[str, StandIn]:
    """Columns in which a value stands for null: a number that is the lowest or highest, often, and far from the rest, or a day in
    a year that is none (9999, 1900).
    """
    found = {}
    for name, column in figures.items():
        values = table[name].drop_null()
        if column.distinct < 3:
            continue
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            ends = ((column.low, pc.greater), (column.high, pc.less))
            for end, others in ends:
                if end in _SENTINELS and (count := _far(values, end, others)):
                    found[name] = StandIn(f"{end:g}", count, f"nullif({quoted(name)}, {end:g})")
        elif pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            years = pc.year(values)
            count = pc.sum(pc.or_(pc.greater_equal(years, LATEST), pc.less_equal(years, EARLIEST))).as_py()
            if count >= _OFTEN:
                sql = f"CASE WHEN year({quoted(name)}) > {EARLIEST} AND year({quoted(name)}) < {LATEST} THEN {quoted(name)} END"
                found[name] = StandIn(f"a year from {LATEST} or to {EARLIEST}", count, sql)
    return found


def _far(values: pa.ChunkedArray, end: float, others: Any) -> int:
    """The rows of a value at an end of the others, where it is far from these; else 0."""
    rest = values.filter(others(values, end))
    inner = pc.min_max(rest).as_py()
    count = len(values) - len(rest)
    far = inner["min"] >= 0 if end < 0 else inner["max"] > 0 and 3 * inner["max"] <= end
    return count if far and count >= max(_OFTEN, 0.001 * len(values)) else 0


def quoted(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'
