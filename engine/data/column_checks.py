"""The rules of a dataset's columns: null, bounds, allowed values, foreign keys; each finding with its policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import schema as config_schema
from engine.config import units
from engine.config.sections.data import Column
from engine.data.arrow_types import alike, as_keys, as_lists, list_items, parse_type, type_name
from engine.data.columns import Finding, as_text, shown_values
from engine.data.parse import Parsed, Reading, UnrelatedError, to_type
from engine.errors import UserError


def schema(columns: Mapping[str, Column]) -> pa.Schema:
    """Arrow schema of declared columns. Raises UserError naming the column whose type is unknown."""
    fields = []
    for name, column in columns.items():
        try:
            fields.append(pa.field(name, parse_type(column.type)))
        except UserError as error:
            raise UserError(f"data.columns.{name}.type: {error}") from None
    return pa.schema(fields)


def conform(
    table: pa.Table, columns: Mapping[str, Column], zone: str, where: str, key: str = "data.columns"
) -> tuple[pa.Table, list[Finding]]:
    """The declared columns in declared order and type; values that cannot be kept exactly are findings. `key` is where the
    config declares them.

    Raises UserError for a column that is missing or of an unrelated type.
    """
    arrays, findings = [], []
    times = Counter(table.column_names)
    for name, column in columns.items():
        if times[name] != 1:
            found = "twice" if times[name] else f"only {', '.join(table.column_names)}"
            raise UserError(f"{where} must give column {name!r} once, found {found}")
        values = table.column(name)
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
        kind = parse_type(column.type)
        try:
            # Text that has been read once is known to be UTF-8.
            read = kind == pa.string() and values.type == kind
            parsed = Parsed(values, np.zeros(0, np.int64)) if read else to_type(values, kind, Reading(zone=zone))
        except UnrelatedError as error:
            raise UserError(f"{where}: column {name!r} {error}{error.advice(config_schema.at(key, name))}") from None
        except UserError as error:
            raise UserError(f"{where}: column {name!r} {error}") from None
        if len(parsed.bad):
            shown = shown_values(values, parsed, column.sensitive)
            findings.append(
                Finding(
                    name,
                    parsed.bad,
                    parsed.reason,
                    _row_policy(column),
                    shown,
                    config_schema.at(key, name) + ".on_violation",
                )
            )
        arrays.append(parsed.values)
    return pa.Table.from_arrays(arrays, names=list(columns)), findings


def declared(what: str, table: pa.Table, columns: Mapping[str, Column], zone: str) -> pa.Table:
    """A table given from Python with its declared columns in their declared types, read as ingest reads them.

    Raises UserError naming the first value that its type cannot hold.
    """
    for at, field in enumerate(table.schema):
        if field.name not in columns or field.type.equals(kind := parse_type(columns[field.name].type)):
            continue
        values = table.column(at).combine_chunks()
        try:
            parsed = to_type(values, kind, Reading(zone))
        except UnrelatedError as error:
            raise UserError(f"{what}: column {field.name!r} {error}: give it that type") from None
        except UserError as error:
            raise UserError(f"{what}: column {field.name!r} {error}") from None
        if len(parsed.bad):
            row = int(parsed.bad[0])
            value = "a sensitive value" if columns[field.name].sensitive else repr(as_text(values[row]))
            raise UserError(
                f"{what}: column {field.name!r} must be {columns[field.name].type}, found {value} in row {row}, which "
                f"{parsed.reason}: mend it or leave the row out"
            )
        table = table.set_column(at, field.name, parsed.values)
    return table


def find(
    table: pa.Table,
    columns: Mapping[str, Column],
    zone: str,
    skip: list[Finding] | None = None,
    key: str = "data.columns",
) -> list[Finding]:
    """Rows that break the row-local rules of their columns. Positions in `skip` are known already and not named twice."""
    known: dict[str, np.ndarray] = {}
    for finding in skip or []:
        known[finding.column] = np.union1d(known.get(finding.column, np.zeros(0, np.int64)), finding.positions)
    findings = []
    for name, column in columns.items():
        values = table.column(name)
        for reason, broken in _broken(values, column, zone):
            positions = np.flatnonzero(
                np.asarray(broken.combine_chunks() if isinstance(broken, pa.ChunkedArray) else broken)
            )
            if name in known:
                positions = np.setdiff1d(positions, known[name])
            if len(positions):
                policy = _row_policy(column) if reason == NULL else column.on_violation
                shown = _shown(values, positions, column)
                findings.append(
                    Finding(name, positions, reason, policy, shown, config_schema.at(key, name) + ".on_violation")
                )
    return findings


NULL = "must not be null"


def _row_policy(column: Column) -> str:
    """A key that is missing cannot be set to null or let through."""
    keyed = column.identifies or column.role == "event_time" or not column.nullable
    return "quarantine" if keyed and column.on_violation in ("null", "warn") else column.on_violation


def _broken(values: Any, column: Column, zone: str) -> list[tuple[str, Any]]:
    """(reason, boolean mask) of the rules that some value breaks."""
    found = []
    if (not column.nullable or column.identifies or column.role == "event_time") and values.null_count:
        found.append((NULL, pc.is_null(values)))
    if column.role in ITEM_RULES:
        found += ITEM_RULES[column.role](values, column.width)
    if column.min is not None:
        least = bound(column.min, values.type, zone, math.ceil)
        found.append((f"must be at least {column.min}", pc.invert(pc.greater_equal(values, least))))
    if column.max is not None:
        most = bound(column.max, values.type, zone, math.floor)
        found.append((f"must be at most {column.max}", pc.invert(pc.less_equal(values, most))))
    if column.values:
        unknown = pc.and_(pc.invert(pc.is_in(values, allowed(column, values.type, zone))), pc.is_valid(values))
        found.append(
            (f"must be one of {', '.join(column.values[:10])}{', ...' if len(column.values) > 10 else ''}", unknown)
        )
    masks = [(reason, pc.fill_null(mask, False)) for reason, mask in found]
    return [(reason, mask) for reason, mask in masks if pc.any(mask).as_py()]


def _of_vector(values: Any, width: int | None) -> list[tuple[str, Any]]:
    wrong = pc.not_equal(pc.list_value_length(values), width)
    return [(f"must have {width} numbers", wrong), ("must hold finite numbers", _has_item(values, _not_finite))]


def _of_set(values: Any, _: int | None) -> list[tuple[str, Any]]:
    return [("must hold no null", _has_item(values, pc.is_null))]


def _not_finite(items: Any) -> Any:
    return pc.invert(pc.fill_null(pc.is_finite(items.cast(pa.float64())), False))


def _has_item(values: Any, is_wrong: Callable[[Any], Any]) -> pa.Array:
    """bool[n]: the lists that hold an item of which `is_wrong` is true."""
    rows, items = list_items(as_lists(values))
    mask = np.zeros(len(values), bool)
    mask[rows[np.asarray(is_wrong(items))]] = True
    return pa.array(mask)


ITEM_RULES = {"vector": _of_vector, "set": _of_set}


def allowed(column: Column, kind: pa.DataType, zone: str) -> pa.Array:
    """The allowed values of the config as values of the column's type. Raises UserError for one that is none."""
    texts = pa.array(list(column.values), pa.string())
    parsed = Parsed(texts, np.zeros(0, np.int64)) if pa.types.is_string(kind) else to_type(texts, kind, Reading(zone))
    for place in parsed.bad:
        raise UserError(f"values of a {type_name(kind)} column must be of that type, found {column.values[place]!r}")
    return parsed.values


def bound(value: float | str, kind: pa.DataType, zone: str, whole: Callable[[Decimal], int] = math.floor) -> pa.Scalar:
    """A bound of the config as a value of the column's type; of integers the next one that `whole` (floor, ceil) gives.

    Raises UserError when it is none.
    """
    try:
        if pa.types.is_timestamp(kind):
            return pa.scalar(units.instant(str(value), zone), pa.int64()).cast(kind)
        if pa.types.is_date(kind) or pa.types.is_string(kind):
            return pa.scalar(str(value)).cast(kind)
        if pa.types.is_decimal(kind) or pa.types.is_integer(kind):  # by the digits that are written, not by a float
            whole_float = isinstance(value, float) and value.is_integer()
            number = Decimal(value) if whole_float else Decimal(str(value))
            return pa.scalar(f"{number:f}").cast(kind) if pa.types.is_decimal(kind) else pa.scalar(whole(number), kind)
        return pa.scalar(float(value), kind)
    except (pa.ArrowException, ValueError, OverflowError, ArithmeticError):
        raise UserError(f"a bound of a {kind} column must be of that type, found {value!r}") from None


def _shown(values: Any, positions: np.ndarray, column: Column) -> list[str | None]:
    if column.sensitive:
        return [None] * len(positions)
    return [as_text(values[int(place)]) for place in positions]


def find_orphans(table: pa.Table, columns: Mapping[str, Column], tables: Mapping[str, pa.Table]) -> list[Finding]:
    """Rows whose foreign key has no match. Null is no key."""
    findings = []
    for name, column in columns.items():
        if column.references is None:
            continue
        keys = referenced(column.references, name, tables)
        found = table.column(name)
        if not alike(keys.type, found.type):
            word = config_schema.word(f"{config_schema.at('data.columns', name)}.type", type_name(keys.type))
            raise UserError(
                f"data.columns.{name} must have the type of {column.references}, {type_name(keys.type)}, found {column.type}: "
                f"set {word}"
            )
        known = pc.is_in(found, as_keys(keys.combine_chunks(), found.type))
        mask = pc.and_(pc.invert(known), pc.is_valid(table.column(name)))
        positions = np.flatnonzero(np.asarray(mask.combine_chunks()))
        if len(positions):
            reason = f"must stand in {column.references}"
            shown = _shown(table.column(name), positions, column)
            key = config_schema.at("data.columns", name) + ".on_violation"
            findings.append(Finding(name, positions, reason, column.on_violation, shown, key))
    return findings


def referenced(reference: str, name: str, tables: Mapping[str, pa.Table]) -> pa.ChunkedArray:
    """The column that a foreign key names. Raises UserError when there is none."""
    table, _, key = reference.partition(".")
    if table not in tables or key not in tables[table].column_names:
        raise UserError(f"data.columns.{name}.references must be table.column of data.tables, found {reference!r}")
    return tables[table].column(key)
