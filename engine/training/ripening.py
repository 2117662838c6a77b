"""How labels ripen: the age by which they have arrived, and how likely a label was known at a row's age.

Everything is estimated at an instant `now`, from rows before it and from labels that were known by then.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from engine.config.tree import Config
from engine.config.units import MICROSECONDS, Moment
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features.instants import NEVER, instants, known_times
from engine.features.spec import known_anchor

ARRIVED = 0.95  # share of the labels that will ever arrive
RIPE = f"by when {100 * ARRIVED:.0f} % of labels arrive"
AT_RISK = 0.01  # a curve ends where fewer than this share of the rows are at risk
SAMPLE = 1 << 20  # rows that a curve is estimated from: its error is below .001
LARGEST_WEIGHT = 20.0  # one label among so few known ones would decide alone
FEWEST_LABELS = 200  # of a group that has a curve of its own


def label_times(
    config: Config, dataset: Dataset, rows: tuple[int, int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(event, known) int64[n]: when each row happened and when its target becomes known; NEVER for a row without one. Of a table
    without time, the places of rows, and a target is known if it is there.

    Raises UserError where the target's known_at is not declared.
    """
    target = config.data.target or ""
    column = config.data.columns[target]
    if not config.data.timed:
        column = dataclasses.replace(column, known_at=Moment("prior"))
    if column.known_at is None:
        raise UserError(f"data.columns.{target}.known_at must say when the target becomes known, but it is not set")
    facts = dataset.read(list(dict.fromkeys([config.data.event_time, target, *known_anchor(column)])), rows)
    event = instants(facts[config.data.event_time])
    known = known_times(facts, column)
    labelled = np.asarray(facts[target].combine_chunks().is_valid())
    return event, np.where(labelled, known, NEVER)


def label_horizon(event: np.ndarray, known: np.ndarray, now: int, share: float = ARRIVED) -> int:
    """Age in microseconds by which `share` of the labels that arrive at all have arrived, from what is known at `now`.

    Kaplan-Meier over label delays (Kaplan & Meier, 1958): a row without a label yet is censored at its present age, so
    that the newest rows, of which only the fast labels are known, do not make labels look fast.
    Shape: event ascending, known int64[n] microseconds UTC, known is NEVER where there is no label. 0 without any label.
    """
    event, known = _before(event, known, now)
    observed = (known != NEVER) & (known <= now)
    if not observed.any():
        return 0
    age = np.where(observed, np.maximum(known - event, 0), now - event)
    order = np.lexsort((~observed, age))  # at equal ages labels come before censored rows
    age, observed = age[order], observed[order]
    at_risk = len(age) - np.arange(len(age))
    arrived = 1.0 - np.cumprod(1.0 - observed / at_risk)
    firm = max(1, int(np.count_nonzero(at_risk >= AT_RISK * len(age))))
    return int(age[np.searchsorted(arrived[:firm], share * arrived[firm - 1])])


def ripe_weights(event: np.ndarray, known: np.ndarray, group: np.ndarray, now: int) -> NDArray[np.float32]:
    """float32[n]: the inverse probability that a label of the row's group is known at the row's age; 1 for a row without
    a label at `now`.

    Each group has a curve of its own: where positives ripen slowly, the young rows whose label is known are mostly
    negatives, and no weight by age alone would put that right. A group of fewer than FEWEST_LABELS labels has the curve of
    all rows. A weight is at most LARGEST_WEIGHT.
    Shape: event ascending, known int64[n] microseconds UTC, group int64[n].
    """
    ripe = (event < now) & (known != NEVER) & (known <= now)
    weight = np.ones(len(event), np.float32)
    age = now - event
    delay = np.maximum(known - event, 0)
    for value in np.unique(group[ripe]):
        mine = ripe & (group == value)
        source = mine if np.count_nonzero(mine) >= FEWEST_LABELS else ripe
        chance = arrival_curve(delay[source], age[source], age[mine])
        weight[mine] = 1.0 / np.maximum(chance, 1.0 / LARGEST_WEIGHT)
    return weight


def arrival_curve(delay: np.ndarray, age: np.ndarray, at: np.ndarray) -> NDArray[np.float64]:
    """float64[m]: the probability that a label has arrived by each age `at`, as a share of those that arrive by the greatest
    age at which enough rows are at risk.

    Product-limit estimate in reverse time of delays that are seen only where they are at most the row's age (Lagakos, Barraj &
    De Gruttola, Biometrika 75, 1988): F(t) = product over delays u > t of 1 - (labels with delay u) / (labels with delay <= u
    <= age). Unlike Kaplan-Meier it reads labelled rows alone, so that it can be taken for rows of one class.
    Shape: delay, age int64[n] of rows whose label is known, delay <= age.
    """
    step = -(-len(delay) // SAMPLE)
    delay, age = np.sort(delay[::step]), np.sort(age[::step])
    times, arrived = np.unique(delay, return_counts=True)
    at_risk = np.searchsorted(delay, times, "right") - np.searchsorted(age, times, "left")
    firm = at_risk >= max(AT_RISK * len(delay), 1.0)
    factors = np.where(firm, 1.0 - arrived / np.maximum(at_risk, 1), 1.0)
    later = np.concatenate([np.cumprod(factors[::-1])[::-1], [1.0]])  # [k]: product over times[k:]
    return np.asarray(later[np.searchsorted(times, at, "right")])


def _before(event: np.ndarray, known: np.ndarray, now: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced rows before an instant, the same ones whatever comes after it."""
    count = int(np.searchsorted(event, now, "left"))
    step = max(1, -(-count // SAMPLE))
    return event[:count:step], known[:count:step]


def days(length: int) -> str:
    """A length of time in microseconds, in days, as text."""
    return f"{length / MICROSECONDS['d']:.1f} days"
