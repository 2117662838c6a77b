"""Finds columns whose values follow the time, so that every later value is outside the reference.

A count over all of the history rises with its age, a month number with the calendar, a row number with the rows. Compared
with a fixed reference they would alarm in every window and raise the lines of all other columns. Their values are left out
of lines, alarms and causes, with the reason; their missing rates are judged as usual.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.config import feature_names, units
from engine.config.sections.features import FeaturesConfig, aggregate_of, is_built_in
from engine.monitoring.reference import Reference
from engine.monitoring.statistics import NUMERIC, Counts

DAY = units.MICROSECONDS["d"]
CYCLE_DAYS = {"weekday": 7, "day": 31, "week": 365, "day_of_year": 365, "month": 365}
GROWING = ("count", "sum", "distinct", "ewm_sum", "max", "min", "recency")  # of a trailing window that is still filling
FILLING = 0.25  # largest share of the reference in which a window may still be filling
STRETCHES = 8  # consecutive parts of the reference; by chance they are in order once in 20,160
FEWEST_ROWS = 30  # of each stretch
APART = 0.95  # KS distance of the first and the last: a season overlaps more, a counter does not overlap


def rising(features: FeaturesConfig, reference: Reference) -> dict[str, str]:
    """Column -> the reason why its values follow the time."""
    columns = {item.name for item in reference.columns}
    found = {**dict(_calendar(features, reference)), **dict(_filling(features, reference))}
    found = {name: reason for name, reason in found.items() if name in columns}
    for item in reference.columns:
        if item.kind == NUMERIC and item.name not in found:
            way = _in_order(reference.counts[item.name], reference.rows)
            if way:
                found[item.name] = f"it {way} with time all through the reference, so that later values are outside it"
    return found


def _calendar(features: FeaturesConfig, reference: Reference) -> Iterator[tuple[str, str]]:
    span = int(reference.covered.sum())  # a row of another century adds a day
    for name, calendar in features.calendar.items():
        for feature, part in feature_names.calendar_features(name, calendar):
            cycle = CYCLE_DAYS.get(part, 0)
            if span < cycle:
                yield feature, f"{part} has a cycle of {cycle} days, of which the reference has {span}"


def _filling(features: FeaturesConfig, reference: Reference) -> Iterator[tuple[str, str]]:
    known = reference.history
    room = FILLING * int(reference.covered.sum())
    for name, view in features.active_views.items():
        if view.kind != "windows" or known is None:
            continue
        for entry, asked in view.asked.items():
            for window in view.windows:
                for aggregate in asked.aggregates:
                    if _grows(aggregate) and window.microseconds > (known + room) * DAY:
                        yield (
                            feature_names.window_name(name, entry, aggregate, window),
                            f"its window of {window} reaches back beyond the first event, {known} days before the reference: "
                            "it grows with the age of the data",
                        )


def _grows(aggregate: str) -> bool:
    """Whether an aggregate may grow with its window; of a user's own nothing is known."""
    return not is_built_in(aggregate) or aggregate_of(aggregate)[0] in GROWING


def _in_order(counts: Counts, rows: np.ndarray) -> str:
    """`rises` or `falls` where the stretches of the reference are in order and the last is separate from the first."""
    busy = np.flatnonzero(rows > 0)
    if len(busy) < STRETCHES:
        return ""
    parts = np.array([counts.values[days].sum(axis=0) for days in np.array_split(busy, STRETCHES)])
    total = parts.sum(axis=1, keepdims=True)
    if total.min() < FEWEST_ROWS:
        return ""
    below = np.cumsum(parts / total, axis=1)
    steps = np.diff(below.sum(axis=1))  # the lower the values, the larger
    if np.abs(below[0] - below[-1]).max() < APART or not (np.all(steps < 0) or np.all(steps > 0)):
        return ""
    return "rises" if steps[0] < 0 else "falls"
