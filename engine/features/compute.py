"""Computes raw features from rows: training, scoring and the gate share this one code path.

A function here takes `probes` (rows to describe, with their decision time), `history` (past rows of the event table)
and side tables; it reads no store and no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import plugins
from engine.config.references import past_columns
from engine.config.sections.data import Column, DataConfig
from engine.config.sections.features import (
    PARTS,
    ROWS,
    AggregateConfig,
    CalendarConfig,
    FeaturesConfig,
    ViewConfig,
)
from engine.config.units import Moment
from engine.data.arrow_types import alike, as_keys, type_name
from engine.data.expressions import evaluate, expression_columns
from engine.errors import UserError
from engine.features import aggregates as aggregates_
from engine.features import calls, instants, own_rows
from engine.features.spec import (
    calendar_columns,
    hides_past,
    knowing,
    late_keys,
    past_inputs,
    past_time,
    view_columns,
    view_inputs,
)
from kernels.asof import asof
from kernels.folds import FoldError
from kernels.gather import columns_of
from kernels.hashing import hash_bytes, hash_u64
from kernels.windows import Known, Sorted

POOL_ROWS = 10_000  # for fewer rows, starting threads takes longer than computing the windows


def raw_features(
    data: DataConfig,
    features: FeaturesConfig,
    probes: pa.Table,
    history: pa.Table,
    tables: Mapping[str, pa.Table],
    threads: int = 1,
) -> pa.Table:
    """All raw features of `probes`, one row each in the same order; numbers are float64 with null for missing."""
    return features_with(data, features, probes, lambda _: (history, tables), threads)


def features_with(
    data: DataConfig,
    features: FeaturesConfig,
    probes: pa.Table,
    past_of: Callable[[ViewConfig], tuple[pa.Table, Mapping[str, pa.Table]]],
    threads: int = 1,
) -> pa.Table:
    """Raw features as of `raw_features`; `past_of` gives the past events and the side tables that a view reads."""
    found = direct_features(data, features, probes)
    for name, view in features.active_views.items():
        history, tables = past_of(view)
        found.update(view_features(name, view, data, features, probes, history, tables, threads))
    return pa.table(found) if found else pa.table({"": pa.nulls(probes.num_rows)}).select([])


def direct_features(data: DataConfig, features: FeaturesConfig, probes: pa.Table) -> dict[str, pa.Array]:
    """Direct columns unchanged, and parts of time columns."""
    found = {name: _combined(probes[name]) for name in features.direct_columns}
    for name, calendar in features.calendar.items():
        found.update(calendar_features(name, calendar, data, probes))
    return found


def calendar_features(name: str, calendar: CalendarConfig, data: DataConfig, probes: pa.Table) -> dict[str, pa.Array]:
    """Parts of a time column, read in the calendar's zone: hour 0-23, weekday 0 = Monday, day and month from 1."""
    local = _combined(probes[calendar.column]).cast(pa.timestamp("us", tz=calendar.zone or data.time_zone))
    columns: list[pa.Array] = []
    for part in calendar.parts:
        value = _calendar_part(local, part)
        if calendar.cyclic:
            angle = pc.multiply(value.cast(pa.float64()), 2 * np.pi / PARTS[part])
            columns += [pc.sin(angle), pc.cos(angle)]
        else:
            columns.append(value)
    return dict(zip((feature.name for feature in calendar_columns(name, calendar)), columns, strict=True))


def _calendar_part(local: pa.Array, part: str) -> pa.Array:
    if part == "minute_of_day":
        return pc.add(pc.multiply(pc.hour(local), 60), pc.minute(local))
    functions = {
        "hour": pc.hour,
        "weekday": pc.day_of_week,
        "day": pc.day,
        "day_of_year": pc.day_of_year,
        "week": pc.iso_week,
        "month": pc.month,
    }
    return functions[part](local)


def view_features(
    name: str,
    view: ViewConfig,
    data: DataConfig,
    features: FeaturesConfig,
    probes: pa.Table,
    history: pa.Table,
    tables: Mapping[str, pa.Table],
    threads: int = 1,
) -> dict[str, pa.Array]:
    """The features of one view by name."""
    if view.kind in ("expression", "function"):
        return _row_features(name, view, data, features, probes)
    decisions = instants.moment_times(probes, features.decision)
    if view.kind == "asof":
        return _asof_features(name, view, data, decisions, probes, tables[view.table or ""], threads)
    past = history if view.table is None else tables[view.table]
    return _window_features(name, view, data, decisions, probes, past, threads)


def _row_features(
    name: str, view: ViewConfig, data: DataConfig, features: FeaturesConfig, probes: pa.Table
) -> dict[str, pa.Array]:
    where = f"features.views.{name}"
    rows = probes.select(view_inputs(view, data, features.decision.column))
    sensitive = [column for column in rows.column_names if data.columns[column].sensitive]
    if view.kind == "expression":
        wanted = {key: (item.sql, item.type) for key, item in view.expressions.items()}
        table = evaluate(wanted, rows, where, sensitive)
    else:
        table = calls.outputs(view, rows, where, sensitive)
    names = [feature.name for feature in view_columns(name, view, data)]
    return dict(zip(names, (_combined(column) for column in table.columns), strict=True))


def _window_features(
    name: str,
    view: ViewConfig,
    data: DataConfig,
    decisions: np.ndarray,
    probes: pa.Table,
    past: pa.Table,
    threads: int,
) -> dict[str, pa.Array]:
    probe_codes, past_codes = entity_codes(probes, view.entity, past, view.keys)
    own = entity_codes(probes, tuple(view.exclude), past, tuple(view.exclude.values())) if view.exclude else None
    columns = past_columns(view, data)
    events = instants.instants(past[past_time(view, data)])
    windows = [window.microseconds for window in view.windows]
    holds = conditions_of(name, view, columns, past)
    by_event = Sorted(probe_codes, decisions, past_codes, events, threads) if view.by == "event" else None

    def rows_of(moments: tuple[Moment, ...]) -> tuple[np.ndarray, Known]:
        known = known_with(past, events, moments)
        return known, (by_event or Sorted(probe_codes, decisions, past_codes, known, inner)).known(known)

    def of_entry(item: tuple[str, AggregateConfig]) -> list[pa.Array]:
        entry, asked = item
        where = f"features.views.{name}.aggregates.{entry}"
        aggregates = [aggregates_.computed(text, where) for text in asked.aggregates]
        values = None if asked.of == ROWS else as_floats(past[asked.of])
        counts = None if asked.where is None else holds[asked.where]
        known, rows = in_order[moments_of(columns, knowing(view, asked, data))]
        try:
            block = rows.aggregates(values, windows, aggregates, counts, inner)
            if own is not None:
                codes = past_codes if counts is None else np.where(counts, past_codes, -1)
                source = codes, known if by_event is None else events, known
                own_rows.leave_out(block, (probe_codes, decisions), source, own, values, windows, aggregates, inner)
        except FoldError as error:
            full = next(text for text in asked.aggregates if plugins.split(text)[0] == error.name)
            raise aggregates_.failed(where, full, error, hides_past(asked, columns)) from error
        return _float_columns(block.reshape(len(block), len(windows) * len(asked.aggregates)), inner)

    # Columns run in parallel: one column's single-threaded work, mostly sorting, overlaps with another column's sweep.
    outer = min(threads, len(view.aggregates)) if probes.num_rows + past.num_rows > POOL_ROWS else 1
    inner = -(-threads // outer)
    # Columns that are known at the same moments share the order of their rows.
    needed = list(dict.fromkeys(moments_of(columns, knowing(view, asked, data)) for asked in view.asked.values()))
    with ThreadPoolExecutor(outer, thread_name_prefix="columns") if outer > 1 else nullcontext() as pool:
        each = map if pool is None else pool.map
        in_order = dict(zip(needed, each(rows_of, needed), strict=True))
        found = list(each(of_entry, view.asked.items()))
    called = (feature.name for feature in view_columns(name, view, data))
    features = dict(zip(called, itertools.chain.from_iterable(found), strict=False))
    secret = [column for column in past_inputs(view, data) if columns[column].sensitive]
    return features | _derived(name, view, features, secret)


def moments_of(columns: Mapping[str, Column], names: Sequence[str]) -> tuple[Moment, ...]:
    """When the named columns are known, of those that may be known later than their row."""
    moments = (columns[name].known_at for name in names)  # an id without it is known with its row
    return tuple(dict.fromkeys(moment for moment in moments if moment is not None and moment != "prior"))


def known_with(past: pa.Table, known: np.ndarray, moments: Sequence[Moment]) -> np.ndarray:
    """int64[n]: when each past row counts, from `known` on, once all the moments have passed; NEVER where one never does."""
    for moment in moments:
        known = instants.known_as_past(past, known, instants.moment_times(past, moment))
    return known


def _derived(
    name: str, view: ViewConfig, features: Mapping[str, pa.Array], sensitive: list[str]
) -> dict[str, pa.Array]:
    """The features that are computed from aggregates; one that is no finite number is null."""
    if not view.derive:
        return {}
    rows = pa.table({feature.removeprefix(f"{name}_"): column for feature, column in features.items()})
    wanted = {
        key: (_finite(item.sql) if item.type.startswith("int") else item.sql, item.type)
        for key, item in view.derive.items()
    }
    found = {}
    for key, column in zip(
        wanted, evaluate(wanted, rows, f"features.views.{name}.derive", sensitive).columns, strict=True
    ):
        values = _combined(column)
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_finite(values), values, None)
        found[f"{name}_{key}"] = values
    return found


def _finite(sql: str) -> str:
    """SQL of an expression that is null where its number is not finite: no whole number can hold that."""
    return f"CASE WHEN isfinite(CAST(({sql}) AS DOUBLE)) THEN ({sql}) END"


def conditions_of(name: str, view: ViewConfig, columns: Mapping[str, Column], past: pa.Table) -> dict[str, np.ndarray]:
    """SQL condition -> bool[n]: past rows where it is true."""
    if not view.conditions:
        return {}
    wanted = {f"{place}": (sql, "bool") for place, sql in enumerate(view.conditions)}
    read = sorted({column for sql in view.conditions for column in expression_columns(sql)})
    sensitive = [column for column in read if columns[column].sensitive]
    rows = past.select(read or past.column_names[:1])  # a table without columns has no rows
    table = evaluate(wanted, rows, f"features.views.{name}: where", sensitive)
    holds = [np.asarray(pc.fill_null(column.combine_chunks(), False)) for column in table.columns]
    return dict(zip(view.conditions, holds, strict=True))


def _float_columns(block: np.ndarray, threads: int) -> list[pa.Array]:
    """The columns of float64[n, k] as Arrow arrays; NaN is null."""
    values, valid, nulls = columns_of(block, threads)
    buffers = [[pa.py_buffer(valid[k]) if nulls[k] else None, pa.py_buffer(values[k])] for k in range(block.shape[1])]
    return [
        pa.Array.from_buffers(pa.float64(), len(block), pair, int(missing))
        for pair, missing in zip(buffers, nulls, strict=True)
    ]


def _asof_features(
    name: str,
    view: ViewConfig,
    data: DataConfig,
    decisions: np.ndarray,
    probes: pa.Table,
    table: pa.Table,
    threads: int,
) -> dict[str, pa.Array]:
    spec = data.tables[view.table or ""]
    probe_codes, table_codes = entity_codes(probes, view.entity, table, view.keys)
    if spec.static:
        _check_unique(view, table, table_codes)
        events = np.full(table.num_rows, instants.ALWAYS)
        decisions = np.full(len(decisions), instants.ALWAYS + 1)
    else:
        events = instants.instants(table[past_time(view, data)])
    max_age = None if view.max_age is None or spec.static else view.max_age.microseconds
    chosen: dict[str | None, pa.Array] = {}
    columns = []
    for column in view.columns:
        rule = "prior" if spec.static else spec.columns[column].known_at
        if rule not in chosen:
            known = events
            if not spec.static:
                known = instants.known_as_past(table, events, instants.known_times(table, spec.columns[column]))
                known = known_with(table, known, moments_of(spec.columns, late_keys(view, data)))
            rows = asof(
                probe_codes, decisions, table_codes, events, known, max_age, inclusive=view.inclusive, threads=threads
            )
            chosen[rule] = pa.array(rows, mask=rows < 0)
        columns.append(_combined(table[column]).take(chosen[rule]))
    return dict(zip((feature.name for feature in view_columns(name, view, data)), columns, strict=True))


def _check_unique(view: ViewConfig, table: pa.Table, codes: np.ndarray) -> None:
    known = codes[codes >= 0]
    values, counts = np.unique(known, return_counts=True)
    if (counts > 1).any():
        row = int(np.flatnonzero(codes == values[counts > 1][0])[1])
        key = {column: table[column][row].as_py() for column in view.keys}
        raise UserError(f"static table {view.table!r} must have one row per key, found {key} again in row {row}")


def entity_codes(
    left: pa.Table, left_columns: tuple[str, ...], right: pa.Table, right_columns: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """int64 codes of the combined key columns of two tables: equal keys get equal codes, a key with a null gets -1.

    Raises UserError for columns whose types cannot be compared.
    """
    if left is right and left_columns == right_columns:  # rows that describe themselves: encoded once
        codes, _ = entity_codes(left, left_columns, right.slice(0, 0), right_columns)
        return codes, codes
    rows = left.num_rows
    codes = np.zeros(rows + right.num_rows, np.int64)
    missing = np.zeros(len(codes), bool)
    for left_column, right_column in zip(left_columns, right_columns, strict=True):
        kinds = left[left_column].type, right[right_column].type
        if not alike(*kinds):
            raise UserError(
                f"columns that are joined must be of one type, found {left_column!r} {type_name(kinds[0])} and "
                f"{right_column!r} {type_name(kinds[1])}: declare the same type for both"
            )
        part, size = _codes_of(left[left_column], right[right_column])
        missing |= part < 0
        codes = codes * size + part
        if codes.size and codes.max(initial=0) >= 2**31:
            codes = np.unique(codes, return_inverse=True)[1]
    if left_columns and codes.size and codes.max(initial=0) > 2 * len(codes):
        codes = np.unique(codes, return_inverse=True)[1]
    codes = np.where(missing, -1, codes).astype(np.int64)
    return np.ascontiguousarray(codes[:rows]), np.ascontiguousarray(codes[rows:])


def entity_hash(table: pa.Table, columns: tuple[str, ...]) -> np.ndarray:
    """uint64[n] hash of the key columns by the text of their values: the same in every process. Nulls hash alike."""
    found = np.zeros(table.num_rows, np.uint64)
    for column in columns:
        keys = _combined(table[column])
        texts = pc.fill_null(as_keys(keys, keys.type).cast(pa.large_string()), "\0")
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
        found = hash_u64(found ^ hash_bytes(data, offsets))
    return found


def _codes_of(left: pa.ChunkedArray, right: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    left, right = _combined(left), _combined(right)
    kind = right.type if pa.types.is_null(left.type) else left.type
    left, right = as_keys(left, kind), as_keys(right, kind)
    encoded = pa.concat_arrays([left, right]).dictionary_encode()
    codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64)
    return codes, max(len(encoded.dictionary), 1)


def as_floats(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """float64[n] of a numeric or boolean column; null becomes NaN. An int64 beyond 2**53 is rounded, because windows
    compute in float64.
    """
    column = _combined(column)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if not pa.types.is_float64(column.type):
        column = column.cast(pa.float64(), safe=False)
    return column.to_numpy(zero_copy_only=False)


def _combined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
