"""The slow twin of aggregates of a user's own: one row's windows found by comparing every past row, and computed by Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from engine.config.feature_names import window_name
from engine.config.references import past_columns
from engine.config.sections.data import DataConfig
from engine.config.sections.features import AggregateConfig, FeaturesConfig, ViewConfig, is_built_in
from engine.features import aggregates, compute, instants
from engine.features.spec import knowing, past_time
from kernels.folds import in_order


def by_hand(
    data: DataConfig, features: FeaturesConfig, probe: pa.Table, events: pa.Table, tables: Mapping[str, pa.Table]
) -> Iterator[tuple[str, float, float]]:
    """(feature, its number or NaN, how far another may be from it relatively) of one row, for each aggregate of a user's own.

    `probe` is that row, `tables` are by view. Compiled code may round otherwise than Python, so it may be a little apart.
    """
    decision = int(instants.moment_times(probe, features.decision)[0])
    for name, view in features.active_views.items():
        past = tables[name] if view.table else events
        for entry, asked in view.asked.items() if view.kind == "windows" else ():
            own = [item for item in asked.aggregates if not is_built_in(item)]
            if not own:
                continue
            rows, times = _counted(name, view, asked, data, (probe, past), decision)
            values = compute.as_floats(past[asked.of])[rows] + 0.0
            known = ~np.isnan(values)
            values, times = values[known], times[known]
            for item in own:
                fold = aggregates.user_aggregate(item, f"features.views.{name}.aggregates.{entry}")
                for window in view.windows:
                    seen = times >= decision - window.microseconds
                    ages = (decision - times[seen]) / 1e6
                    number = fold.plainly(*in_order(values[seen], ages)) if seen.any() else np.nan
                    apart = aggregates.CLOSE if fold.function is None else 0.0
                    yield window_name(name, entry, item, str(window)), number, apart


def _counted(
    name: str,
    view: ViewConfig,
    asked: AggregateConfig,
    data: DataConfig,
    tables: tuple[pa.Table, pa.Table],
    decision: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The past rows that are known before the decision and count, and the times that place them in windows."""
    probe, past = tables
    columns = past_columns(view, data)
    mine, theirs = compute.entity_codes(probe, view.entity, past, view.keys)
    events = instants.instants(past[past_time(view, data)])
    known = compute.known_with(past, events, compute.moments_of(columns, knowing(view, asked, data)))
    counts = (theirs == mine[0]) & (theirs >= 0) & (events != instants.NEVER) & (known != instants.NEVER)
    counts &= known < decision
    if asked.where is not None:
        counts &= compute.conditions_of(name, view, columns, past)[asked.where]
    if view.exclude:
        key, keys = compute.entity_codes(probe, tuple(view.exclude), past, tuple(view.exclude.values()))
        counts &= (keys != key[0]) | (keys < 0)
    rows = np.flatnonzero(counts)
    return rows, (events if view.by == "event" else known)[rows]
