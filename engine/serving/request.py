"""Rows of a request: JSON or an Arrow stream, read and checked as ingest reads and checks them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.sections.data import PLACE, Column, DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.data import column_checks
from engine.data.arrow_types import parse_type
from engine.data.places import with_places
from engine.errors import UserError, nearest
from engine.features.required_columns import demanded
from engine.runtime import records

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"


class Malformed(UserError):
    """A request that is answered 422: the field and the row that are wrong."""

    def __init__(self, message: str, field: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.field, self.row = field, row


@dataclass(frozen=True)
class Fields:
    """The columns that a request gives: `wanted` of every row, and `known`, all that it may give."""

    wanted: Mapping[str, Column]
    known: Mapping[str, Column]
    zone: str

    @classmethod
    def of_rows(cls, data: DataConfig, features: FeaturesConfig) -> Fields:
        """Those of rows to be scored: what is known at the decision and needed."""
        names = [name for name in demanded(data, features) if name != PLACE]
        return cls({name: data.columns[name] for name in names}, data.columns, data.time_zone)

    @classmethod
    def of_events(cls, data: DataConfig, read: Sequence[str]) -> Fields:
        """Those of past events: identity and time, and the columns that windows read, which may be absent."""
        names = [*data.ids, *data.shown_time]
        wanted = {name: data.columns[name] for name in dict.fromkeys(names)}
        optional = {name: data.columns[name] for name in read if name not in wanted}
        return cls(wanted, {**data.columns, **wanted, **optional}, data.time_zone)


@dataclass(frozen=True)
class Given:
    """Rows in their declared types, and for each the reason for which ingest would quarantine it, or None."""

    rows: pa.Table
    refused: list[str | None]


def read_rows(body: bytes, kind: str, fields: Fields, data: DataConfig, most: int) -> Given:
    """The rows of a body. Raises Malformed."""
    table = _of_arrow(body, most) if kind == ARROW else _of_json(body, fields, most)
    if table.num_rows > most:
        raise Malformed(f"a request must have at most {most:,} rows (serve.rows), found {table.num_rows:,}")
    for name in table.column_names:
        if name not in fields.known or name == PLACE:
            raise Malformed(f"field {name!r} is not known.{nearest(name, fields.wanted)}", name)
    for name in fields.wanted:
        if name not in table.column_names:
            raise Malformed(f"field {name!r} must be given, found {', '.join(table.column_names) or 'nothing'}", name)
    columns = {name: fields.known[name] for name in table.column_names}
    typed = pa.table({name: _typed(table, name, column, fields.zone) for name, column in columns.items()})
    refused: list[str | None] = [None] * typed.num_rows
    for finding in column_checks.find(typed, {name: columns[name] for name in fields.wanted}, fields.zone):
        for row in finding.positions if finding.policy != "warn" else ():
            refused[int(row)] = refused[int(row)] or f"{finding.column}: {finding.reason}"
    return Given(with_places(typed, data), refused)


def _typed(table: pa.Table, name: str, column: Column, zone: str) -> pa.ChunkedArray:
    """A column in its declared type. Raises Malformed naming its first value that has none."""
    values = table[name]
    try:
        typed, findings = column_checks.conform(table.select([name]), {name: column}, zone, "the request")
    except UserError:
        row = next((place for place in range(len(values)) if values[place].is_valid), 0)
        raise Malformed(f"field {name!r} must be {column.type} in row {row}, found {values.type}", name, row) from None
    for finding in findings:
        row = int(finding.positions[0])
        raise Malformed(f"field {name!r} must be {column.type} in row {row}: {finding.reason}", name, row)
    return typed[name]


def _of_arrow(body: bytes, most: int) -> pa.Table:
    try:
        batches, rows = [], 0
        with pa.ipc.open_stream(body) as stream:
            for batch in stream:
                batch.validate(full=True)
                rows += batch.num_rows
                if rows > most:
                    raise Malformed(f"a request must have at most {most:,} rows (serve.rows), found more")
                batches.append(batch)
            names = stream.schema.names
            if len(set(names)) != len(names):
                raise Malformed("each field must be given once")
            return pa.Table.from_batches(batches, stream.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Malformed(f"the body must be an Arrow IPC stream: {str(error).splitlines()[0]}") from None


def _of_json(body: bytes, fields: Fields, most: int) -> pa.Table:
    value = records.parse(_text(body), Any, "the body")  # type: ignore[arg-type]
    rows = value.get("rows") if isinstance(value, dict) and set(value) == {"rows"} else value
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows or len(rows) > most:
        found = f"a list of {len(rows):,}" if isinstance(rows, list) else type(rows).__name__
        raise Malformed(
            f'the body must be a row, or {{"rows": [...]}} of 1 to {most:,} rows (serve.rows), found {found}'
        )
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Malformed(
                f"row {place} must be an object with a field for each column, found {type(row).__name__}", None, place
            )
        if lacking := next((name for name in fields.wanted if name not in row), None):
            raise Malformed(
                f"field {lacking!r} must be given in row {place}; it may be null where the data allow it",
                lacking,
                place,
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column(name, [row.get(name) for row in rows], fields) for name in names})


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"the body must be JSON in UTF-8: {error.reason} at byte {error.start}") from None


def _column(name: str, values: list[Any], fields: Fields) -> pa.Array:
    try:
        found = pa.array(values)
    except OverflowError:
        raise Malformed(f"field {name!r} must have whole numbers of 64 bits", name) from None
    except (pa.ArrowException, TypeError, ValueError):
        if all(isinstance(value, int) or value is None for value in values):
            raise Malformed(f"field {name!r} must have whole numbers of 64 bits", name) from None
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise Malformed(f"field {name!r} must have values of one kind, found {', '.join(kinds)}", name) from None
    if pa.types.is_null(found.type) and name in fields.known:
        return pa.nulls(len(values), parse_type(fields.known[name].type))
    return found


def as_json(value: Any) -> bytes:
    """JSON bytes; not a number is null."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def numbers(column: pa.Array) -> list[Any]:
    """Values of an output column for JSON: floats whose nearest float32 are the scores, bit by bit; no finite number is null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values = column.to_pylist()
    if pa.types.is_floating(column.type):
        finite = np.isfinite(column.to_numpy(zero_copy_only=False))
        return [value if good else None for value, good in zip(values, finite, strict=True)]
    return values
