"""The leak audit: draw rows, hide everything that became known after their decision, recompute and compare bytes.

In three trials the unknown values are altered, deleted or repeated. A feature that changes has used its future. Aggregates of a
user's own are also computed by hand (`aggregate_twin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units
from engine.config.sections.data import Column, DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.data.arrow_types import same_value
from engine.data.dataset import Dataset
from engine.features import aggregate_twin, compute, instants
from engine.features.past import past_events
from engine.features.spec import event_inputs, known_anchor, past_time, windows_of

BY_HAND = "by hand"
TRIALS = ("altered", "deleted", "repeated")
BEYOND = 2 * units.MICROSECONDS["d"]  # a trial hides events up to this long after the decision


@dataclass(frozen=True)
class Leak:
    """A feature that changed when values that it must not use were changed, or is another when it is computed by hand."""

    row: int
    trial: str
    feature: str
    before: str
    after: str


def audit(
    data: DataConfig, features: FeaturesConfig, dataset: Dataset, rows: int, seed: int = 0, threads: int = 1
) -> list[Leak]:
    """Leaks found in `rows` rows drawn by `seed`; empty when no feature of any view uses its future."""
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(dataset.rows, min(rows, dataset.rows), replace=False)).tolist()
    anchor = features.decision.column
    inputs = [data.event_time, anchor, *event_inputs(data, features)]
    columns = list(dict.fromkeys([*inputs, *(time for name in inputs for time in known_anchor(data.columns[name]))]))
    tables = {name: dataset.table(view.table) for name, view in features.active_views.items() if view.table}
    leaks: list[Leak] = []
    for turn, row in enumerate(chosen):
        probe = dataset.read(columns, rows=(row, row + 1))
        decision = int(instants.moment_times(probe, features.decision)[0])
        if decision == instants.NEVER:
            continue
        events = past_events(dataset, data, windows_of(features), np.array([decision, decision + BEYOND]), columns)
        trial = TRIALS[turn % len(TRIALS)]
        before = describe(data, features, probe, events, tables, threads)
        # The row's own values may be known at the very decision; those of others count only when known before it.
        tampered = change(probe, data.columns, anchor, decision + 1, "altered", draw)
        hidden = change(events, data.columns, data.event_time, decision, trial, draw)
        beside = hide_tables(data, features, tables, decision, trial, draw)
        after = describe(data, features, tampered, hidden, beside, threads)
        leaks += [
            Leak(row, trial, name, str(value), str(after[name]))
            for name, value in before.items()
            if not same_value(value, after[name])
        ]
        for name, number, apart in aggregate_twin.by_hand(data, features, probe, events, tables):
            found = before[name].as_py()
            if not np.isclose(np.nan if found is None else found, number, rtol=apart, atol=0, equal_nan=True):
                leaks.append(Leak(row, BY_HAND, name, str(found), str(number)))
    return leaks


def describe(
    data: DataConfig,
    features: FeaturesConfig,
    probe: pa.Table,
    events: pa.Table,
    tables: Mapping[str, pa.Table],
    threads: int,
) -> dict[str, pa.Scalar]:
    """The features of one row; `tables` by name of the view that looks into them.

    An expression or a function also gets the events: its result for a row must not depend on other rows.
    """
    found = compute.direct_features(data, features, probe)
    company = pa.concat_tables([probe, events])
    for name, view in features.active_views.items():
        rows = company if view.kind in ("expression", "function") else probe
        seen = {view.table: tables[name]} if view.table else {}
        found.update(compute.view_features(name, view, data, features, rows, events, seen, threads))
    return {name: column[0] for name, column in found.items()}


def change(
    table: pa.Table,
    columns: Mapping[str, Column],
    event_time: str,
    decision: int,
    trial: str,
    draw: np.random.Generator,
) -> pa.Table:
    """The table with its future changed: values not known before `decision` are altered, and events at or after it are
    deleted or repeated.
    """
    changed = {name: table[name] for name in table.column_names}
    for name in table.column_names:
        column = columns[name]
        if column.known_at in (None, "prior") or name == event_time:
            continue
        known = instants.known_times(table, column)
        unknown = (known == instants.NEVER) | (known >= decision)
        changed[name] = _altered(table[name], unknown, decision, draw)
    found = pa.table(changed)
    later = pa.array(instants.instants(table[event_time]) >= decision)
    if trial == "deleted":
        return found.filter(pc.invert(later))
    return pa.concat_tables([found.filter(later), found]) if trial == "repeated" else found


def _altered(column: pa.ChunkedArray, unknown: np.ndarray, decision: int, draw: np.random.Generator) -> pa.Array:
    kind, rows = column.type, len(column)
    if pa.types.is_timestamp(kind):
        # Still at or after the decision, or null: the altered time must not make the value known.
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


def hide_tables(
    data: DataConfig,
    features: FeaturesConfig,
    tables: Mapping[str, pa.Table],
    decision: int,
    trial: str,
    draw: np.random.Generator,
) -> dict[str, pa.Table]:
    """The side tables by view, with the values that the view must not know at `decision` changed."""
    found = dict(tables)
    for name, view in features.active_views.items():
        spec = data.tables[view.table] if view.table else None
        if spec is None or spec.static:
            continue
        # A value known exactly at the decision is not the future of an inclusive view; instants are whole microseconds.
        bound = decision + view.inclusive
        found[name] = change(tables[name], spec.columns, past_time(view, data), bound, trial, draw)
    return found
