"""As-of join: for each probe (entity, T) the latest source row of that entity that was known at T.

One rule for any order of the rows: among the rows of the entity with known_at < T (<= T when inclusive) the greatest
(event_time, known_at, row position) is chosen, and rejected when it is older than `max_age`. Source rows are ordered by
(entity, known_at) and carry a running maximum: the row to choose once they are known. A probe then costs one cursor step
when the probes of an entity come in time order and a binary search when they do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.jit import check_threads, njit, run_ranges, split
from kernels.sort import ascending, dense_codes, grouped_columns, radix_order

_NAT = check.NAT


@njit
def _usable(entity: Any, event: Any, known: Any, rows: Any) -> Any:
    """Fill `rows` with the rows that can be chosen at all; returns their number."""
    count = 0
    for i in range(len(entity)):
        if entity[i] >= 0 and event[i] != _NAT and known[i] != _NAT:
            rows[count] = i
            count += 1
    return count


@njit
def _running_best(starts: Any, first: Any, last: Any, order: Any, known: Any, event: Any, out: Any) -> None:
    """Of groups [first, last), in order of known_at: out[k] = (known_at, chosen row, its event time) once row k is known."""
    for g in range(first, last):
        best = starts[g]
        for k in range(starts[g], starts[g + 1]):
            if event[k] >= event[best]:  # known_at and position never fall along this order
                best = k
            out[k, 0], out[k, 1], out[k, 2] = known[k], order[best], event[best]


@njit
def _search(best: Any, low: Any, high: Any, limit: Any) -> Any:
    """First position in [low, high) with known_at >= limit."""
    while low < high:
        middle = (low + high) >> 1
        if best[middle, 0] < limit:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def _advance(best: Any, at: Any, stop: Any, limit: Any) -> Any:
    """`_search` in [at, stop) when the answer is probably near `at`."""
    steps = 0
    while at < stop and best[at, 0] < limit:
        at += 1
        steps += 1
        if steps == 16:
            return _search(best, at, stop, limit)
    return at


@njit
def _probe(groups: Any, times: Any, slots: Any, offsets: Any, best: Any, rule: Any, out: Any) -> None:
    """rule = (max_age or -1, 1 when inclusive, code of the first group); slots: the codes of the groups, empty when dense."""
    max_age, inclusive, low = rule
    most = np.int64(np.iinfo(np.int64).max)
    cursor = offsets[:-1].copy()
    # A row per group, so that a probe reads one cache line: until when its answer is valid, the answer (row, event time), and
    # the time of its last probe.
    states = np.empty((len(cursor), 4), np.int64)
    for g in range(len(cursor)):
        states[g, 0] = best[offsets[g], 0] if offsets[g] < offsets[g + 1] else most
        states[g, 1], states[g, 2], states[g, 3] = -1, 0, _NAT
    for i in range(len(groups)):
        g, t = groups[i], times[i]
        out[i] = -1
        if len(slots):
            g = np.searchsorted(slots, g)
            if g == len(slots) or slots[g] != groups[i]:
                continue
        else:
            if g < low or g - low >= len(cursor):
                continue
            g -= low
        if t == _NAT:
            continue
        state = states[g]
        limit = t + inclusive if t < most else t
        back = t < state[3]
        if back or state[0] < limit or t == most:
            start, stop = offsets[g], offsets[g + 1]
            if back:
                at = _search(best, start, cursor[g], limit)
            elif inclusive == 1 and t == most:
                at = stop
            else:
                at = _advance(best, cursor[g], stop, limit)
            cursor[g] = at
            state[0] = best[at, 0] if at < stop else most
            state[1] = best[at - 1, 1] if at > start else -1
            state[2] = best[at - 1, 2] if at > start else 0
        state[3] = t
        if state[1] >= 0:
            event = state[2]
            if max_age < 0 or event >= t or np.uint64(t) - np.uint64(event) <= np.uint64(max_age):  # no overflow
                out[i] = state[1]


def asof(
    probe_entity: ArrayLike,
    probe_time: ArrayLike,
    source_entity: ArrayLike,
    event_time: ArrayLike,
    known_at: ArrayLike,
    max_age: int | None,
    inclusive: bool = False,
    threads: int = 1,
) -> NDArray[np.int64]:
    """Index of the chosen source row for each probe, -1 where there is none.

    Shape: probe_* int64[n], the three source arrays int64[m] -> int64[n]. Times and `max_age` are in the same unit, usually
    microseconds. A row older than T - max_age is rejected (exactly max_age old is kept), never replaced by another. NaT
    (smallest int64) or an entity below 0, on either side, matches nothing. Neither side needs to be sorted.
    Raises ValueError for shapes that disagree, a negative max_age or threads < 1; TypeError for other than integers.
    """
    groups = check.integers("probe_entity", probe_entity)
    times = check.integers("probe_time", probe_time, len(groups))
    entity = check.integers("source_entity", source_entity)
    event = check.integers("event_time", event_time, len(entity))
    known = check.integers("known_at", known_at, len(entity))
    if max_age is not None and max_age < 0:
        raise ValueError(f"max_age must not be negative, found {max_age}")
    check_threads(threads)
    out = np.empty(len(groups), np.int64)
    best, slots, offsets, low = _index(entity, event, known, threads)
    rule = (np.int64(-1 if max_age is None else max_age), np.int64(inclusive), np.int64(low))

    def part(a: int, b: int) -> None:
        _probe(groups[a:b], times[a:b], slots, offsets, best, rule, out[a:b])

    run_ranges(part, split(len(groups), 1 if threads == 1 else 4 * threads), threads)
    return out


def _index(
    entity: NDArray[np.int64], event: NDArray[np.int64], known: NDArray[np.int64], threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """(running best [m', 3] of the usable source rows, group codes (empty when dense), offsets per group, first code)."""
    rows = np.empty(len(entity), np.int64)
    rows = rows[: _usable(entity, event, known, rows)]
    whole = len(rows) == len(entity)
    if not whole:
        entity, event, known = entity[rows], event[rows], known[rows]
    best = np.empty((len(entity), 3), np.int64)
    entity, slots, low, span = dense_codes(entity, threads)
    order = None if ascending(known, threads) else radix_order(known)
    order, starts, (known, event) = grouped_columns(entity, low, span, threads, order, [known, event])
    run_ranges(lambda a, b: _running_best(starts, a, b, order, known, event, best), split(span, 8 * threads), threads)
    if not whole:
        best[:, 1] = rows[best[:, 1]]
    return best, slots, starts, low
