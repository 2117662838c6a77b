"""The leak trial: take rows, hide everything known after their decision, compute again, and compare bytes.

Three trials in turn: what was unknown is altered, is deleted, or is there twice. A feature that changes has seen its future.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units
from engine.config.tree import Column, DataConfig, FeaturesConfig
from engine.data.dataset import Dataset
from engine.features import compute, moments
from engine.features.parts import view_length
from engine.features.spec import event_inputs

TRIALS = ("altered", "deleted", "repeated")
BEYOND = 2 * units.MICROSECONDS["d"]  # of events after the decision that a trial hides


@dataclass(frozen=True)
class Leak:
    """A feature that changed when what it must not know was changed."""

    row: int
    trial: str
    feature: str
    before: str
    after: str


def audit(
    data: DataConfig, features: FeaturesConfig, dataset: Dataset, rows: int, seed: int = 0, threads: int = 1
) -> list[Leak]:
    """Leaks found in `rows` rows drawn by `seed`; empty when no feature of any view saw its future."""
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(dataset.rows, min(rows, dataset.rows), replace=False)).tolist()
    columns = list(dict.fromkeys([data.event_time, *event_inputs(data, features)]))
    tables = {view.table: dataset.table(view.table) for view in features.active_views.values() if view.table}
    leaks: list[Leak] = []
    for turn, row in enumerate(chosen):
        probe = dataset.read(columns, rows=(row, row + 1))
        decision = int(moments.moment_times(probe, features.as_of or "")[0])
        if decision == moments.NEVER:
            continue
        events = dataset.read(columns, rows=dataset.row_range(decision - _longest(features), decision + BEYOND))
        trial = TRIALS[turn % len(TRIALS)]
        before = compute.raw_features(data, features, probe, events, tables, threads)
        hidden = change(events, data.columns, data.event_time, decision, trial, draw)
        after = compute.raw_features(data, features, probe, hidden, hide_tables(data, tables, decision), threads)
        leaks += [
            Leak(row, trial, name, str(before[name][0]), str(after[name][0]))
            for name in before.column_names
            if not before[name].equals(after[name])
        ]
    return leaks


def _longest(features: FeaturesConfig) -> int:
    lengths = [view_length(view) or 0 for view in features.active_views.values() if view.kind == "windows"]
    return max(lengths, default=0)


def change(
    table: pa.Table,
    columns: Mapping[str, Column],
    event_time: str,
    decision: int,
    trial: str,
    draw: np.random.Generator,
) -> pa.Table:
    """The table as it might be, for all that is known before `decision`: values not known yet are altered, and rows of events
    at or after it deleted or repeated.
    """
    changed = {name: table[name] for name in table.column_names}
    for name in table.column_names:
        column = columns[name]
        if column.known_at in (None, "prior") or name == event_time:
            continue
        known = moments.known_times(table, column)
        unknown = (known == moments.NEVER) | (known >= decision)
        changed[name] = _altered(table[name], unknown, decision, draw)
    found = pa.table(changed)
    later = pa.array(moments.instants(table[event_time]) >= decision)
    if trial == "deleted":
        return found.filter(pc.invert(later))
    return pa.concat_tables([found.filter(later), found]) if trial == "repeated" else found


def _altered(column: pa.ChunkedArray, unknown: np.ndarray, decision: int, draw: np.random.Generator) -> pa.Array:
    kind, rows = column.type, len(column)
    if pa.types.is_timestamp(kind):
        # Still at or after the decision, or never: what says when a value is known must not make it known.
        moved = pa.array(decision + draw.integers(0, 10**12, rows), mask=draw.random(rows) < 0.3).cast(
            pa.timestamp("us", tz="UTC")
        )
        replacement = moved.cast(kind)
    elif pa.types.is_boolean(kind):
        replacement = pa.array(draw.random(rows) < 0.5)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        replacement = pa.array(draw.integers(0, 100, rows)).cast(kind)
    else:
        replacement = pa.nulls(rows, kind)
    return pc.if_else(pa.array(unknown), replacement, column)


def hide_tables(data: DataConfig, tables: Mapping[str, pa.Table], decision: int) -> dict[str, pa.Table]:
    """Side tables without the rows of which nothing is known before `decision`, and without the values that are not."""
    found = {}
    for name, table in tables.items():
        spec = data.tables[name]
        if spec.static:
            found[name] = table
            continue
        time = next(key for key, item in spec.columns.items() if item.role == "event_time")
        early = moments.instants(table[time]) < decision
        kept = table.filter(pa.array(early))
        values = {}
        for key in kept.column_names:
            column = spec.columns[key]
            unknown = np.zeros(kept.num_rows, bool)
            if column.known_at not in (None, "prior") and column.role not in ("id", "event_time", "time"):
                known = moments.known_times(kept, column)
                unknown = (known == moments.NEVER) | (known >= decision)
            values[key] = pc.if_else(pa.array(unknown), pa.scalar(None, kept.schema.field(key).type), kept[key])
        found[name] = pa.table(values)
    return found
