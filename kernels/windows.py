"""Trailing windows per entity as of a decision time: what was known, and nothing else.

A source row e of the entity counts for a probe decided at T under window w when

    known_at(e) < T   and   event_time(e) >= T - w

so it is active in (known_at, event_time + w]: added in known_at order, dropped in event_time order, one sweep for all windows
and aggregates. Sums are exact integers (`kernels.exact`), hence a result is a function of the rows in the window alone: not of
the order of tied rows, of other entities, of threads, or of where the sweep began. When known_at rises with event_time within
each entity the active rows are contiguous and the sweep is simpler (the fast path); the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.exact import (
    FIXED,
    WIDE,
    add_fixed,
    add_wide,
    any_wide,
    is_wide,
    moments_fixed,
    moments_wide,
)
from kernels.jit import check_threads, njit, run_ranges, split
from kernels.sort import _bounds, dense_range, radix_order, sort_by_entity_time

AGGREGATES = {
    name: code
    for code, name in enumerate(
        "count sum mean std min max last first recency distinct ewm_sum ewm_mean".split()  # codes are used below
    )
}
_COUNT, _SUM, _MEAN, _STD, _MIN, _MAX, _LAST, _FIRST, _RECENCY, _DISTINCT, _EWM_SUM, _EWM_MEAN = range(12)
_WITHOUT_VALUES = ("count", "recency")
_NAT = check.NAT
_TASKS_PER_THREAD = 8


# --------------------------------------------------------------------------- small parts of the sweep
@njit(inline=True)
def _minus(t: Any, width: Any) -> Any:
    """t - width, not below the smallest instant."""
    return t - width if t >= _NAT + 1 + width else np.int64(_NAT + 1)


@njit
def _first_at(event: Any, low: Any, high: Any, limit: Any) -> Any:
    """First position in [low, high) with event >= limit."""
    while low < high:
        middle = (low + high) >> 1
        if event[middle] < limit:
            low = middle + 1
        else:
            high = middle
    return low


@njit(inline=True)
def _seconds(t: Any, event: Any) -> Any:
    """t - event in seconds, from microseconds, without overflow."""
    if t >= event:
        return np.float64(np.uint64(t) - np.uint64(event)) / 1e6
    return -(np.float64(np.uint64(event) - np.uint64(t)) / 1e6)


@njit
def _raise_max(tree: Any, i: Any, value: Any) -> None:
    """Fenwick tree of prefix maxima (1-based): position i holds at least `value`."""
    while i < len(tree):
        if tree[i] >= value:
            return
        tree[i] = value
        i += i & -i


@njit
def _prefix_max(tree: Any, i: Any) -> Any:
    best = -np.inf
    while i > 0:
        best = max(best, tree[i])
        i -= i & -i
    return best


@njit
def _count_at(tree: Any, i: Any, step: Any) -> None:
    while i < len(tree):
        tree[i] += step
        i += i & -i


@njit
def _prefix_count(tree: Any, i: Any) -> Any:
    total = np.int64(0)
    while i > 0:
        total += np.int64(tree[i])
        i -= i & -i
    return total


@njit
def _mark_last(value: Any, at: Any, base: Any, keys: Any, places: Any, tree: Any) -> None:
    """Keep in `tree` (1-based from the end) a mark at the last added position of each distinct value."""
    bits = np.float64(value).view(np.int64)
    mask = np.int64(len(keys) - 1)
    h = np.uint64(bits) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64(h >> np.uint64(32)) & mask
    while places[slot] >= 0 and keys[slot] != bits:
        slot = (slot + 1) & mask
    known = places[slot]
    if known >= at:
        return
    if known >= 0:
        _count_at(tree, base - known, np.float64(-1.0))
    keys[slot], places[slot] = bits, at
    _count_at(tree, base - at, np.float64(1.0))


@njit
def _decayed(source: Any, rows: Any, t: Any, half_life: Any, stat: Any) -> None:
    """stat[EWM_SUM], stat[EWM_MEAN] over source rows [rows[0], rows[1]) known before t, by exact sums of rounded terms."""
    event, known, value = source
    terms, weights = np.zeros(FIXED, np.uint64), np.zeros(FIXED, np.uint64)
    nothing, words, out = np.zeros(FIXED, np.uint64), np.empty(12, np.uint64), np.empty(3)
    outside = False
    for r in range(rows[0], rows[1]):
        if known[r] < t:
            weight = np.exp2(-(max(_seconds(t, event[r]), 0.0) / half_life))
            bits = np.float64(value[r] * weight).view(np.int64)
            outside = outside or is_wide(bits)
            add_fixed(weights, np.float64(weight).view(np.int64), False)
            add_fixed(terms, bits, False)
    moments_fixed(weights, nothing, np.int64(1), False, words, out)
    total_weight = out[0]
    if outside:
        wide, empty, infinite = np.zeros(WIDE, np.int64), np.zeros(WIDE, np.int64), terms[8:10]
        for r in range(rows[0], rows[1]):
            if known[r] < t and np.isfinite(value[r]):
                weight = np.exp2(-(max(_seconds(t, event[r]), 0.0) / half_life))
                add_wide(wide, np.float64(value[r] * weight).view(np.int64))
        moments_wide(wide, empty, infinite, np.int64(1), False, out)
    else:
        moments_fixed(terms, nothing, np.int64(1), False, words, out)
    stat[_EWM_SUM] = out[0]
    stat[_EWM_MEAN] = out[0] / total_weight


@njit
def _empty(stat: Any) -> None:
    stat[:] = np.nan
    stat[_COUNT] = 0.0


# --------------------------------------------------------------------------- the sweep
@njit
def _add(fixed: Any, wide: Any, bits: Any, moments: Any) -> None:
    """Add one row to the accumulators that this call uses. moments = (any, squares, wide form)."""
    if not moments[0]:
        return
    if moments[2]:
        if (bits >> 52) & 0x7FF == 0x7FF:
            add_fixed(fixed, bits, False)
        else:
            add_wide(wide, bits)
    else:
        add_fixed(fixed, bits, moments[1])


@njit
def _moments(fixed: Any, wide: Any, w: Any, n: Any, moments: Any, words: Any, stat: Any) -> None:
    """stat[SUM:STD + 1] of what is in accumulator 0 but not in accumulator w + 1."""
    if not moments[0]:
        return
    if moments[2]:
        infinite = fixed[0, 8:10] - fixed[w + 1, 8:10]
        moments_wide(wide[0], wide[w + 1], infinite, n, moments[1], stat[_SUM : _STD + 1])
    else:
        moments_fixed(fixed[0], fixed[w + 1], n, moments[1], words, stat[_SUM : _STD + 1])


@njit
def _sweep(source: Any, groups: Any, probes: Any, plan: Any, bounds: Any, out: Any) -> None:  # noqa: C901, PLR0912, PLR0915
    """Answer the probes at sorted positions bounds[0]:bounds[1]; see `_Source`, `_Probes` and `_Plan` for the tuples."""
    event, known, value, by_known = source
    probe_group, probe_time, probe_row = probes
    windows, columns, moments, needs = plan
    need_min, need_max, need_first, need_distinct, need_ewm = needs
    ordered = len(by_known) == 0
    count = len(windows)
    widest = windows.max()
    fixed = np.zeros((count + 1, FIXED), np.uint64)
    wide = np.zeros((count + 1 if moments[2] else 1, WIDE if moments[2] else 1), np.int64)
    words, stat = np.zeros(12, np.uint64), np.empty(12)
    left, dropped = np.zeros(count, np.int64), np.zeros(count, np.int64)
    high_head, low_head = np.zeros(count, np.int64), np.zeros(count, np.int64)
    longest = _longest(groups, probes, bounds)
    stack = longest if ordered else 0
    high_at, high_value = np.empty(stack if need_max else 0, np.int64), np.empty(stack if need_max else 0)
    low_at, low_value = np.empty(stack if need_min else 0, np.int64), np.empty(stack if need_min else 0)
    trees = 0 if ordered else longest + 1
    max_tree = np.empty(trees if need_max else 0)
    min_tree = np.empty(trees if need_min else 0)
    first_tree = np.empty(trees if need_first else 0)
    mark_tree = np.empty(longest + 1 if need_distinct else 0)
    slots = 16
    while slots < 2 * longest:
        slots *= 2
    keys, places = np.empty(slots if need_distinct else 0, np.int64), np.empty(slots if need_distinct else 0, np.int64)
    p = bounds[0]
    while p < bounds[1]:
        g = probe_group[p]
        stop_p = p
        while stop_p < bounds[1] and probe_group[stop_p] == g:
            stop_p += 1
        if g < 0:
            _empty(stat)
            for q in range(p, stop_p):
                _write(stat, columns, count, out[probe_row[q]])
            p = stop_p
            continue
        start, stop = groups[g], groups[g + 1]
        while p < stop_p and probe_time[p] == _NAT:
            _empty(stat)
            _write(stat, columns, count, out[probe_row[p]])
            p += 1
        if p == stop_p:
            continue
        begin = _first_at(event, start, stop, _minus(probe_time[p], widest))
        rows = stop - begin
        fixed[:] = np.uint64(0)
        wide[:] = 0
        left[:], dropped[:], high_head[:], low_head[:] = begin, 0, 0, 0
        high_top, low_top = np.int64(0), np.int64(0)
        max_tree[: rows + 1], min_tree[: rows + 1], first_tree[: rows + 1] = -np.inf, -np.inf, -np.inf
        mark_tree[: rows + 1] = 0.0
        if need_distinct:
            used = 16
            while used < 2 * rows:
                used *= 2
            places[:used] = -1
        else:
            used = 0
        right = begin if ordered else start  # next row to become known: a position in event order, or in by_known
        latest, added = np.int64(-1), np.int64(0)
        while p < stop_p:
            t = probe_time[p]
            high_low, low_low = high_top, low_top
            while right < stop:
                r = right if ordered else by_known[right]
                if known[r] >= t:
                    break
                right += 1
                if r < begin:
                    continue
                added += 1
                latest = max(latest, r)
                v = value[r]
                bits = np.float64(v).view(np.int64)
                _add(fixed[0], wide[0], bits, moments)
                if ordered:
                    if need_max:
                        while high_top > 0 and high_value[high_top - 1] <= v:
                            high_top -= 1
                        high_low = min(high_low, high_top)
                        high_at[high_top], high_value[high_top] = r, v
                        high_top += 1
                    if need_min:
                        while low_top > 0 and low_value[low_top - 1] >= v:
                            low_top -= 1
                        low_low = min(low_low, low_top)
                        low_at[low_top], low_value[low_top] = r, v
                        low_top += 1
                else:
                    if need_max:
                        _raise_max(max_tree[: rows + 1], stop - r, v)
                    if need_min:
                        _raise_max(min_tree[: rows + 1], stop - r, -v)
                    if need_first:
                        _raise_max(first_tree[: rows + 1], stop - r, -np.float64(r))
                    for w in range(count):
                        if r < left[w]:
                            dropped[w] += 1
                            _add(fixed[w + 1], wide[w + 1 if moments[2] else 0], bits, moments)
                if need_distinct:
                    _mark_last(v, r, stop, keys[:used], places[:used], mark_tree[: rows + 1])
            for w in range(count):
                limit = _minus(t, windows[w])
                d = left[w]
                while d < stop and event[d] < limit:
                    if known[d] < t:
                        dropped[w] += 1
                        _add(fixed[w + 1], wide[w + 1 if moments[2] else 0], np.float64(value[d]).view(np.int64), moments)
                    elif ordered:
                        break
                    d += 1
                left[w] = d
                n = added - dropped[w]
                if need_max:
                    high_head[w] = min(high_head[w], high_low)
                if need_min:
                    low_head[w] = min(low_head[w], low_low)
                if n == 0:
                    _empty(stat)
                else:
                    stat[_COUNT] = np.float64(n)
                    _moments(fixed, wide, w, n, moments, words, stat)
                    stat[_LAST] = value[latest]
                    stat[_RECENCY] = _seconds(t, event[latest])
                    stat[_FIRST] = value[d] if ordered else value[0]
                    if ordered:
                        if need_max:
                            h = high_head[w]
                            while high_at[h] < d:
                                h += 1
                            high_head[w] = h
                            stat[_MAX] = high_value[h]
                        if need_min:
                            h = low_head[w]
                            while low_at[h] < d:
                                h += 1
                            low_head[w] = h
                            stat[_MIN] = low_value[h]
                    else:
                        if need_max:
                            stat[_MAX] = _prefix_max(max_tree, stop - d)
                        if need_min:
                            stat[_MIN] = -_prefix_max(min_tree, stop - d)
                        if need_first:
                            stat[_FIRST] = value[np.int64(-_prefix_max(first_tree, stop - d))]
                    if need_distinct:
                        stat[_DISTINCT] = np.float64(_prefix_count(mark_tree, stop - d))
                    if need_ewm:
                        _decayed((event, known, value), (d, latest + 1), t, windows[w] / 2e6, stat)
                for c in range(len(columns)):
                    out[probe_row[p], w, c] = stat[columns[c]]
            p += 1


@njit
def _write(stat: Any, columns: Any, count: Any, out: Any) -> None:
    for w in range(count):
        for c in range(len(columns)):
            out[w, c] = stat[columns[c]]


@njit
def _longest(groups: Any, probes: Any, bounds: Any) -> Any:
    """Most source rows that any entity of these probes has."""
    most = np.int64(0)
    for p in range(bounds[0], bounds[1]):
        g = probes[0][p]
        if g >= 0:
            most = max(most, groups[g + 1] - groups[g])
    return most


# --------------------------------------------------------------------------- preparation
class _Source(NamedTuple):
    """Source rows in (entity, event_time, known_at, row) order."""

    event: NDArray[np.int64]
    known: NDArray[np.int64]
    value: NDArray[np.float64]
    by_known: NDArray[np.int64]  # their positions in (entity, known_at) order; empty when that is the same order


class _Probes(NamedTuple):
    """Probes in (group, time) order; group -1 where the source has no such entity."""

    group: NDArray[np.int64]
    time: NDArray[np.int64]
    row: NDArray[np.int64]


class _Plan(NamedTuple):
    windows: NDArray[np.int64]
    columns: NDArray[np.int64]  # aggregate codes
    moments: tuple[bool, bool, bool]  # any of sum, mean, std; std; wide form
    needs: tuple[bool, bool, bool, bool, bool]  # min, max, first, distinct, ewm


@njit
def _usable(entity: Any, event: Any, known: Any, value: Any, rows: Any) -> Any:
    count = 0
    for i in range(len(entity)):
        if entity[i] >= 0 and event[i] != _NAT and known[i] != _NAT and (len(value) == 0 or value[i] == value[i]):
            rows[count] = i
            count += 1
    return count


@njit
def _rises(entity: Any, known: Any, order: Any) -> Any:
    """Whether known_at never falls within an entity along `order`."""
    for k in range(1, len(order)):
        if known[order[k]] < known[order[k - 1]] and entity[order[k]] == entity[order[k - 1]]:
            return False
    return True


@njit
def _take(values: Any, order: Any, out: Any) -> None:
    for k in range(len(order)):
        out[k] = values[order[k]]


@njit
def _take_values(values: Any, order: Any, out: Any) -> None:
    for k in range(len(order)):
        out[k] = values[order[k]] + 0.0  # -0.0 becomes 0.0


def _taken(values: NDArray[Any], order: NDArray[np.int64], threads: int) -> NDArray[Any]:
    out = np.empty(len(order), values.dtype)
    kernel = _take_values if values.dtype == np.float64 else _take

    def part(a: int, b: int) -> None:
        kernel(values, order[a:b], out[a:b])

    run_ranges(part, split(len(order), threads), threads)
    return out


def _prepare_source(
    entity: NDArray[np.int64],
    event: NDArray[np.int64],
    known: NDArray[np.int64],
    values: NDArray[np.float64] | None,
    threads: int,
) -> tuple[_Source, NDArray[np.int64]]:
    """The source in sweep order, and the entity code of each of its rows."""
    rows = np.empty(len(entity), np.int64)
    nothing = np.empty(0)
    rows = rows[: _usable(entity, event, known, nothing if values is None else values, rows)]
    if len(rows) < len(entity):
        entity, event, known = entity[rows], event[rows], known[rows]
        values = None if values is None else values[rows]
    order = sort_by_entity_time(entity, event)
    ordered = known is event or _rises(entity, known, order)
    if not ordered:  # ties of event_time by known_at
        by_known = radix_order(known)
        order = by_known[sort_by_entity_time(entity[by_known], event[by_known])]
    codes = _taken(entity, order, threads)
    event_sorted = _taken(event, order, threads)
    known_sorted = event_sorted if known is event else _taken(known, order, threads)
    value = np.zeros(len(order)) if values is None else _taken(values, order, threads)
    positions = np.empty(0, np.int64) if ordered else sort_by_entity_time(codes, known_sorted)
    return _Source(event_sorted, known_sorted, value, positions), codes


def _prepare_probes(
    entity: NDArray[np.int64], time: NDArray[np.int64], codes: NDArray[np.int64], threads: int
) -> tuple[_Probes, NDArray[np.int64]]:
    """The probes in sweep order and the start of each group in the source, whose ascending codes are given."""
    order = sort_by_entity_time(entity, time)
    groups = _taken(entity, order, threads)
    dense = dense_range(codes)
    if len(codes) == 0:
        groups = np.full(len(groups), -1, np.int64)
        offsets = np.zeros(1, np.int64)
    elif dense is not None:
        low, span = dense
        groups = np.where((groups >= low) & (groups < low + span), groups - low, -1)
        offsets = np.searchsorted(codes, np.arange(low, low + span + 1)).astype(np.int64)
    else:
        unique = codes[np.concatenate([[True], codes[1:] != codes[:-1]])]
        at = np.minimum(np.searchsorted(unique, groups), len(unique) - 1)
        groups = np.where(unique[at] == groups, at, -1)
        offsets = np.append(np.searchsorted(codes, unique), len(codes)).astype(np.int64)
    return _Probes(groups, _taken(time, order, threads), order), offsets


def _check_plan(windows: Sequence[int], aggregates: Sequence[str], with_values: bool) -> tuple[NDArray[np.int64], list[str]]:
    widths = check.integers("windows", list(windows))
    names = list(aggregates)
    if len(widths) == 0 or widths.min() < 1:
        raise ValueError(f"windows must be one or more positive numbers of microseconds, found {list(windows)}")
    unknown = [name for name in names if name not in AGGREGATES]
    if unknown or not names:
        raise ValueError(f"aggregates must be among {', '.join(AGGREGATES)}, found {unknown or names}")
    needing = [name for name in names if name not in _WITHOUT_VALUES]
    if not with_values and needing:
        raise ValueError(f"without values only {', '.join(_WITHOUT_VALUES)} exist, found {needing}")
    return widths, names


def trailing(  # noqa: PLR0913 - two tables and what to compute
    probe_entity: ArrayLike,
    probe_time: ArrayLike,
    source_entity: ArrayLike,
    event_time: ArrayLike,
    known_at: ArrayLike,
    values: ArrayLike | None,
    windows: Sequence[int],
    aggregates: Sequence[str],
    threads: int = 1,
) -> NDArray[np.float64]:
    """Aggregates of the source rows that count for each probe, per window.

    Shape: probe_* int64[n]; source_entity, event_time, known_at int64[m]; values float64[m] or None -> float64[n, windows,
    aggregates]. Times and windows in microseconds. A row counts when known_at < T and event_time >= T - w (module docstring).
    NaN is a null value: such a row does not count at all. Without values, rows count as rows (count, recency only).
    NaT (smallest int64) known_at is never known; NaT event_time or entity < 0 never counts; a probe with NaT or entity < 0
    has no rows. No input needs an order. -0.0 counts as 0.0.

    count     rows                                     first     value of the least (event_time, known_at, row position)
    sum       correctly rounded (math.fsum)            last      value of the greatest
    mean      sum / count                              recency   seconds from the latest event_time to T
    std       ddof = 1; NaN below two rows             distinct  number of distinct values, exact
    min, max  infinities included                      ewm_sum   sum of value * 2 ** (-age / half-life), half-life = w / 2,
                                                       ewm_mean  age = max(T - event_time, 0); the latter / sum of weights
    Without rows count is 0 and the rest NaN. With an infinite value sum and mean are that infinity (NaN for both), std NaN.
    Cost: linear in rows and windows; times log for min, max, first when known_at is not in event order and for distinct;
    ewm_* take time proportional to the rows in each window.
    Raises ValueError for shapes that disagree, unknown aggregates, windows < 1 or threads < 1; TypeError for wrong types.
    """
    groups = check.integers("probe_entity", probe_entity)
    times = check.integers("probe_time", probe_time, len(groups))
    entity = check.integers("source_entity", source_entity)
    event = check.integers("event_time", event_time, len(entity))
    known = event if known_at is event_time else check.integers("known_at", known_at, len(entity))
    numbers = None if values is None else check.floats("values", values, len(entity))
    widths, names = _check_plan(windows, aggregates, numbers is not None)
    check_threads(threads)
    out = np.empty((len(groups), len(widths), len(names)))
    if len(groups) == 0:
        return out
    source, codes = _prepare_source(entity, event, known, numbers, threads)
    probes, offsets = _prepare_probes(groups, times, codes, threads)
    asked = set(names)
    moments = bool(asked & {"sum", "mean", "std"})
    plan = _Plan(
        widths,
        np.array([AGGREGATES[name] for name in names], np.int64),
        (moments, "std" in asked, moments and bool(any_wide(source.value.view(np.int64)))),
        ("min" in asked, "max" in asked, "first" in asked, "distinct" in asked, bool(asked & {"ewm_sum", "ewm_mean"})),
    )

    def part(a: int, b: int) -> None:
        _sweep(tuple(source), offsets, tuple(probes), tuple(plan), (a, b), out)

    parts = 1 if threads == 1 else threads * _TASKS_PER_THREAD
    run_ranges(part, split(len(groups), parts), threads)
    return out
