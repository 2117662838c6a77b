"""Aggregates over trailing windows per entity, from the rows known at the decision time only.

A source row e of the entity counts for a probe decided at T under window w when

    known_at(e) < T   and   event_time(e) >= T - w

so it is active in (known_at, event_time + w]: added in known_at order, dropped in event_time order, one sweep for all windows
and aggregates. Sums are exact integers (`kernels.exact`), so a result depends on the rows in the window alone: not on the order
of tied rows, other entities, threads, or where the sweep began. When known_at rises with event_time within each entity the
active rows are contiguous and the sweep is simpler (`_ordered`, the fast path); the numbers are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

import kernels
from kernels import check
from kernels.exact import (
    FIXED,
    FIXED_FORM,
    WHOLE_FORM,
    WIDE,
    WIDE_FORM,
    WORDS,
    add,
    add_fixed,
    add_wide,
    any_wide,
    is_wide,
    moments_fixed,
    moments_whole,
    moments_wide,
    whole_bound,
)
from kernels.jit import check_threads, njit, run_ranges, split
from kernels.sort import ascending, bounds, dense_codes, grouped_columns, radix_order, radix_rows

AGGREGATES = {name: code for code, name in enumerate(kernels.AGGREGATES)}
_COUNT, _SUM, _MEAN, _STD, _MIN, _MAX, _LAST, _FIRST, _RECENCY, _DISTINCT, _EWM_SUM, _EWM_MEAN, _QUANTILE = range(13)
_CODES = {**AGGREGATES, "quantile": _QUANTILE}  # which has no default parameter
# Places in `_Plan.needs`; the first three are also the rows of the stacks, heads and trees.
_AT_MIN, _AT_MAX, _AT_FIRST, _AT_LATEST, _AT_DISTINCT, _AT_EARLIER, _AT_QUANTILE = range(7)
_WITHOUT_VALUES = ("count", "recency")
WITH_PARAMETER = ("recency", "ewm_sum", "ewm_mean", "quantile")
Aggregate = str | tuple[str, int]  # with its parameter
_NAT = check.NAT
_TASKS_PER_THREAD = 8
_PARALLEL_ROWS = 1 << 17


# --------------------------------------------------------------------------- small parts of the sweep
@njit(inline=True, allocates=False)
def _minus(t: Any, width: Any) -> Any:
    """t - width, or the smallest instant if that is later."""
    return t - width if t >= _NAT + 1 + width else np.int64(_NAT + 1)


@njit(inline=True, allocates=False)
def _seconds(t: Any, event: Any) -> Any:
    """t - event in seconds, from microseconds, without overflow."""
    if t >= event:
        return np.float64(np.uint64(t) - np.uint64(event)) / 1e6
    return -(np.float64(np.uint64(event) - np.uint64(t)) / 1e6)


@njit(allocates=False)
def _raise_max(trees: Any, which: Any, i: Any, value: Any) -> None:
    """Raise position i of a Fenwick tree of prefix maxima (1-based) to at least `value`."""
    while i < trees.shape[1]:
        if trees[which, i] >= value:
            return
        trees[which, i] = value
        i += i & -i


@njit(allocates=False)
def _prefix_max(trees: Any, which: Any, i: Any) -> Any:
    best = -np.inf
    while i > 0:
        best = max(best, trees[which, i])
        i -= i & -i
    return best


@njit(allocates=False)
def _count_at(tree: Any, i: Any, step: Any) -> None:
    while i < len(tree):
        tree[i] += step
        i += i & -i


@njit(allocates=False)
def _prefix_count(tree: Any, i: Any) -> Any:
    total = np.int64(0)
    while i > 0:
        total += np.int64(tree[i])
        i -= i & -i
    return total


@njit(allocates=False)
def _nth(tree: Any, n: Any) -> Any:
    """The least position up to which a Fenwick tree of counts (1-based) holds `n` or more; len(tree) if it holds fewer."""
    at, step = np.int64(0), np.int64(1)
    while step * 2 < len(tree):
        step *= 2
    while step > 0:
        if at + step < len(tree) and tree[at + step] < n:
            at += step
            n -= np.int64(tree[at])
        step >>= 1
    return at + 1


@njit
def _ranks(value: Any) -> Any:
    """(each row's place among the values in ascending order, from 1; the values in that order)."""
    order = np.argsort(value)
    places = np.empty(len(value), np.int64)
    for k in range(len(order)):
        places[order[k]] = k + 1
    return places, value[order]


@njit(allocates=False)
def _quantile(tree: Any, ascending: Any, n: Any, percent: Any) -> Any:
    """Quantile of the `n` values whose places a Fenwick tree counts, linear between neighbours, as numpy's default.

    Type 7 of Hyndman and Fan (1996). Written so that it neither overflows nor leaves the interval between the neighbours.
    """
    through = (n - 1) * percent
    low = ascending[_nth(tree, through // 100 + 1) - 1]
    part = np.float64(through % 100) / 100.0
    if part == 0.0:
        return low
    high = ascending[_nth(tree, through // 100 + 2) - 1]
    between = (1.0 - part) * low + part * high
    if between < low or low == high:
        return low
    return high if between > high else between


@njit(allocates=False)
def _mark_last(value: Any, at: Any, base: Any, keys: Any, places: Any, tree: Any) -> None:
    """Move the value's mark in `tree` (a Fenwick tree, 1-based from the end) to position `at` if that is later.

    keys, places: an open-addressing hash table from the value's bits to the position of its mark, -1 when free.
    """
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


@njit(allocates=False)
def _decayed(data: Any, rows: Any, when: Any, scratch: Any, stat: Any) -> None:
    """stat[EWM_SUM], stat[EWM_MEAN] over rows [rows[0], rows[1]) known before t: exact sums of rounded terms.

    when = (t, half-life in seconds); scratch: accumulators fixed[4] (terms, zero, weights, zero), wide[2] and words.
    """
    event, known, value = data
    fixed, wide, words = scratch
    t, half_life = when
    fixed[:] = np.uint64(0)
    outside = False
    for r in range(rows[0], rows[1]):
        if known[r] < t:
            weight = np.exp2(-(max(_seconds(t, event[r]), 0.0) / half_life))
            bits = np.float64(value[r] * weight).view(np.int64)
            outside = outside or is_wide(bits)
            add_fixed(fixed, 2, np.float64(weight).view(np.int64), False)
            add_fixed(fixed, 0, bits, False)
    moments_fixed(fixed[2:], 1, np.int64(1), False, words, stat, _EWM_SUM)
    total_weight = stat[_EWM_SUM]
    if outside:
        wide[:] = 0
        for r in range(rows[0], rows[1]):
            if known[r] < t and np.isfinite(value[r]):
                weight = np.exp2(-(max(_seconds(t, event[r]), 0.0) / half_life))
                add_wide(wide, 0, np.float64(value[r] * weight).view(np.int64), False)
        moments_wide(wide, 1, (fixed[0, 8], fixed[0, 9], np.int64(1), False), words, stat, _EWM_SUM)
    else:
        moments_fixed(fixed, 1, np.int64(1), False, words, stat, _EWM_SUM)
    stat[_EWM_MEAN] = stat[_EWM_SUM] / total_weight


# --------------------------------------------------------------------------- the sweep
@njit(inline=True, allocates=False)
def _common(data: Any, sums: Any, at: Any, plan: Any, stat: Any) -> None:
    """Aggregates that both sweeps compute in the same way. at = (window, n > 0, its first row, the latest row, t)."""
    event, _, value = data
    fixed, wide, words, _ = sums
    w, n, _, latest, t = at
    form, needs = plan[2], plan[3]
    stat[_COUNT] = np.float64(n)
    if form[2] == WIDE_FORM:
        state = (fixed[0, 8] - fixed[w + 1, 8], fixed[0, 9] - fixed[w + 1, 9], n, form[1])
        moments_wide(wide, w + 1, state, words, stat, _SUM)
    elif form[0] and form[2] == WHOLE_FORM:
        moments_whole(fixed, w + 1, n, form[1], stat, _SUM)
    elif form[0]:
        moments_fixed(fixed, w + 1, n, form[1], words, stat, _SUM)
    if needs[_AT_LATEST]:
        stat[_LAST], stat[_RECENCY] = value[latest], _seconds(t, event[latest])


@njit(allocates=False)
def _put(data: Any, sums: Any, at: Any, plan: Any, rest: Any, stat: Any, out: Any) -> None:
    """out[c] = aggregate c of a window that is not empty; `at` as in `_common`.

    rest = (earlier, where earlier[c] = position of a row before the last; the trees and the values of `_quantile`).
    Exponential aggregates of one half-life that follow each other are computed once.
    """
    w, n, first, latest, t = at
    earlier, counts, ascending = rest
    half_life = 0.0
    for c in range(len(plan[1])):
        code, parameter = plan[1][c], plan[4][c]
        if code == _QUANTILE:
            out[c] = _quantile(counts[w], ascending, n, parameter)
        elif code >= _EWM_SUM:
            wanted = parameter / 1e6 if parameter > 0 else plan[0][w] / 2e6
            if wanted != half_life:
                half_life = wanted
                _decayed(data, (first, latest + 1), (t, half_life), sums[3], stat)
            out[c] = stat[code]
        elif code == _RECENCY and parameter > 1:
            out[c] = _seconds(t, data[0][earlier[c]]) if earlier[c] >= first else np.nan
        else:
            out[c] = stat[code]


@njit(allocates=False)
def _put_none(columns: Any, out: Any) -> None:
    """out[c] = aggregate c of a window without rows."""
    for c in range(len(columns)):
        out[c] = 0.0 if columns[c] == _COUNT else np.nan


@njit(allocates=False)
def _ordered(data: Any, probes: Any, plan: Any, sums: Any, scratch: Any, out: Any) -> None:  # noqa: C901, PLR0915
    """One entity whose known_at rises with event_time: the rows of a window are the contiguous left[w]:right.

    Probes ascend in time, so `right` and left[w] only advance. Accumulator 0 holds rows [0, right), accumulator w + 1 rows
    [0, left[w]); their difference is the window, because exact sums can be subtracted.
    The stack for max keeps, with ascending positions, the rows of [0, right) that no later row equals or exceeds (min: or falls
    below). The maximum of left[w]:right is the first entry at a position >= left[w]; heads[_AT_MAX, w] is its index.
    """
    event, known, value = data
    times, rows = probes
    windows, columns, form, needs, parameters = plan
    fixed, wide, _, _ = sums
    stat, left, earlier, heads, stack_at, stack_value, marks, keys, places, ranked = scratch
    ranks, ascending, counts = ranked
    right, stop = np.int64(0), len(event)
    high_top, low_top = np.int64(0), np.int64(0)
    left[:], heads[:], marks[:], places[:], counts[:] = 0, 0, 0.0, -1, 0.0
    for p in range(len(times)):
        t = times[p]
        # Lowest height of each stack since the last probe. Entries from there on are new, and a head above it was popped. The
        # entries below it are older than that head, so already out of the window: the head falls back to this height exactly.
        high_low, low_low = high_top, low_top
        while right < stop and known[right] < t:
            v = value[right]
            add(fixed, wide, 0, np.float64(v).view(np.int64), form)
            if needs[_AT_MAX]:
                while high_top > 0 and stack_value[_AT_MAX, high_top - 1] <= v:
                    high_top -= 1
                high_low = min(high_low, high_top)
                stack_at[_AT_MAX, high_top], stack_value[_AT_MAX, high_top] = right, v
                high_top += 1
            if needs[_AT_MIN]:
                while low_top > 0 and stack_value[_AT_MIN, low_top - 1] >= v:
                    low_top -= 1
                low_low = min(low_low, low_top)
                stack_at[_AT_MIN, low_top], stack_value[_AT_MIN, low_top] = right, v
                low_top += 1
            if needs[_AT_DISTINCT]:
                _mark_last(v, right, stop, keys, places, marks)
            if needs[_AT_QUANTILE]:
                for w in range(len(windows)):
                    _count_at(counts[w], ranks[right], np.float64(1.0))
            right += 1
        for w in range(len(windows)):
            limit = _minus(t, windows[w])
            d = left[w]
            while d < right and event[d] < limit:
                add(fixed, wide, w + 1, np.float64(value[d]).view(np.int64), form)
                if needs[_AT_QUANTILE]:
                    _count_at(counts[w], ranks[d], np.float64(-1.0))
                d += 1
            left[w] = d
            heads[_AT_MIN, w], heads[_AT_MAX, w] = min(heads[_AT_MIN, w], low_low), min(heads[_AT_MAX, w], high_low)
            if d == right:
                _put_none(columns, out[rows[p], w])
                continue
            at = (w, right - d, d, right - 1, t)
            _common(data, sums, at, plan, stat)
            if needs[_AT_MAX]:
                h = heads[_AT_MAX, w]
                while stack_at[_AT_MAX, h] < d:
                    h += 1
                heads[_AT_MAX, w] = h
                stat[_MAX] = stack_value[_AT_MAX, h]
            if needs[_AT_MIN]:
                h = heads[_AT_MIN, w]
                while stack_at[_AT_MIN, h] < d:
                    h += 1
                heads[_AT_MIN, w] = h
                stat[_MIN] = stack_value[_AT_MIN, h]
            if needs[_AT_FIRST]:
                stat[_FIRST] = value[d]
            if needs[_AT_DISTINCT]:
                stat[_DISTINCT] = np.float64(_prefix_count(marks, stop - d))
            if needs[_AT_EARLIER]:
                for c in range(len(columns)):
                    earlier[c] = right - parameters[c]
            _put(data, sums, at, plan, (earlier, counts, ascending), stat, out[rows[p], w])


@njit(allocates=False)
def _general(data: Any, by_known: Any, probes: Any, plan: Any, sums: Any, scratch: Any, out: Any) -> None:  # noqa: C901, PLR0915
    """One entity in any order of known_at: rows enter in `by_known` order and leave in event_time order.

    Accumulator 0 holds the rows known before t. Accumulator w + 1 holds those of them before left[w], the first position within
    window w (dropped[w] counts them), so that the difference is the window. A row goes there when left[w] passes it, or, when
    it becomes known only later, as it enters: in either case once.
    Fenwick trees are indexed from the end, so that a prefix is the rows at positions >= left[w], and need no removal. They keep
    maxima: of values, negated values (min) and negated positions (first).
    """
    event, known, value = data
    times, rows = probes
    windows, columns, form, needs, parameters = plan
    fixed, wide, _, _ = sums
    stat, left, earlier, dropped, trees, known_rows, marks, keys, places, ranked = scratch
    ranks, ascending, counts = ranked
    right, stop = np.int64(0), len(event)
    latest, added = np.int64(-1), np.int64(0)
    left[:], dropped[:], trees[:], known_rows[:], marks[:], places[:], counts[:] = 0, 0, -np.inf, 0.0, 0.0, -1, 0.0
    for p in range(len(times)):
        t = times[p]
        while right < len(by_known) and known[by_known[right]] < t:
            r = by_known[right]
            v = value[r]
            bits = np.float64(v).view(np.int64)
            right += 1
            added += 1
            latest = max(latest, r)  # in every window that is not empty, since no known row is later
            add(fixed, wide, 0, bits, form)
            if needs[_AT_MIN]:
                _raise_max(trees, _AT_MIN, stop - r, -v)
            if needs[_AT_MAX]:
                _raise_max(trees, _AT_MAX, stop - r, v)
            if needs[_AT_FIRST]:
                _raise_max(trees, _AT_FIRST, stop - r, -np.float64(r))
            if needs[_AT_DISTINCT]:
                _mark_last(v, r, stop, keys, places, marks)
            if needs[_AT_EARLIER]:
                _count_at(known_rows, stop - r, np.float64(1.0))
            for w in range(len(windows)):
                if r < left[w]:
                    dropped[w] += 1
                    add(fixed, wide, w + 1, bits, form)
                elif needs[_AT_QUANTILE]:
                    _count_at(counts[w], ranks[r], np.float64(1.0))
        if needs[_AT_EARLIER]:
            for c in range(len(columns)):
                earlier[c] = stop - _nth(known_rows, parameters[c]) if columns[c] == _RECENCY else -1
        for w in range(len(windows)):
            limit = _minus(t, windows[w])
            d = left[w]
            while d < stop and event[d] < limit:
                if known[d] < t:
                    dropped[w] += 1
                    add(fixed, wide, w + 1, np.float64(value[d]).view(np.int64), form)
                    if needs[_AT_QUANTILE]:
                        _count_at(counts[w], ranks[d], np.float64(-1.0))
                d += 1
            left[w] = d
            if added == dropped[w]:
                _put_none(columns, out[rows[p], w])
                continue
            at = (w, added - dropped[w], d, latest, t)
            _common(data, sums, at, plan, stat)
            if needs[_AT_MIN]:
                stat[_MIN] = -_prefix_max(trees, _AT_MIN, stop - d)
            if needs[_AT_MAX]:
                stat[_MAX] = _prefix_max(trees, _AT_MAX, stop - d)
            if needs[_AT_FIRST]:
                stat[_FIRST] = value[np.int64(-_prefix_max(trees, _AT_FIRST, stop - d))]
            if needs[_AT_DISTINCT]:
                stat[_DISTINCT] = np.float64(_prefix_count(marks, stop - d))
            _put(data, sums, at, plan, (earlier, counts, ascending), stat, out[rows[p], w])


@njit(allocates=False)
def _blank(rows: Any, columns: Any, out: Any) -> None:
    """Write the results of probes without a source row."""
    for row in rows:
        for w in range(out.shape[1]):
            _put_none(columns, out[row, w])


@njit(allocates=False)
def _first_of(times: Any, low: Any, high: Any, limit: Any) -> Any:
    """First position in the ascending times[low:high) with a time >= limit."""
    while low < high:
        middle = (low + high) >> 1
        if times[middle] < limit:
            low = middle + 1
        else:
            high = middle
    return low


@njit(allocates=False)
def _power_of_two(least: Any) -> Any:
    size = 16
    while size < least:
        size *= 2
    return size


@njit
def _sweep(source: Any, probes: Any, plan: Any, span: Any, out: Any) -> None:
    """Compute the probes at sorted positions span[0]:span[1]; see `_Source`, `_Probes` and `_Plan` for the tuples."""
    starts, event, known, value, by_known = source
    probe_starts, probe_time, probe_order = probes
    windows, columns, form, needs, _ = plan
    count = len(windows)
    widest = windows.max()
    sums = (
        np.empty((count + 1, FIXED), np.uint64),
        np.empty((count + 1 if form[2] == WIDE_FORM else 0, WIDE), np.int64),
        np.empty(WORDS, np.uint64),
        (np.empty((4, FIXED), np.uint64), np.empty((2, WIDE), np.int64), np.empty(WORDS, np.uint64)),
    )
    stat, left, earlier, counts, heads = (
        np.empty(_EWM_SUM + 3),
        np.empty(count, np.int64),
        np.empty(len(columns), np.int64),
        np.empty(count, np.int64),
        np.empty((2, count), np.int64),
    )
    p = span[0]
    g = _first_of(probe_starts, 0, len(probe_starts), p + 1) - 1
    while p < span[1]:
        while probe_starts[g + 1] <= p:
            g += 1
        last = min(probe_starts[g + 1], span[1])
        rows, times = probe_order[p:last], probe_time[p:last]
        p = last
        skipped = _first_of(times, 0, len(times), _NAT + 1) if g + 1 < len(starts) else len(times)
        _blank(rows[:skipped], columns, out)
        if skipped == len(times):
            continue
        rows, times = rows[skipped:], times[skipped:]
        end = starts[g + 1]
        begin = _first_of(event, starts[g], end, _minus(times[0], widest))
        data = (event[begin:end], known[begin:end], value[begin:end])
        n = end - begin
        sums[0][:] = np.uint64(0)
        sums[1][:] = 0
        marks = np.empty(n + 1 if needs[_AT_DISTINCT] else 0)
        keys = np.empty(_power_of_two(2 * n) if needs[_AT_DISTINCT] else 0, np.int64)
        places = np.empty(len(keys), np.int64)
        ranks, ascending = _ranks(data[2] if needs[_AT_QUANTILE] else value[:0])
        ranked = (ranks, ascending, np.empty((count, n + 1 if needs[_AT_QUANTILE] else 0)))
        if len(by_known) == 0:
            stack = n if needs[_AT_MIN] or needs[_AT_MAX] else 0
            stack_at, stack_value = np.empty((2, stack), np.int64), np.empty((2, stack))
            scratch = (stat, left, earlier, heads, stack_at, stack_value, marks, keys, places, ranked)
            _ordered(data, (times, rows), plan, sums, scratch, out)
        else:
            entering = by_known[starts[g] : starts[g + 1]] - begin
            trees = np.empty((3, n + 1 if needs[_AT_MIN] or needs[_AT_MAX] or needs[_AT_FIRST] else 0))
            known_rows = np.empty(n + 1 if needs[_AT_EARLIER] else 0)
            more = (stat, left, earlier, counts, trees, known_rows, marks, keys, places, ranked)
            _general(data, entering[entering >= 0], (times, rows), plan, sums, more, out)


# --------------------------------------------------------------------------- preparation
class _Source(NamedTuple):
    """Source rows sorted by (group, event_time, known_at, row)."""

    starts: NDArray[np.int64]  # where each group starts; one more for the end
    event: NDArray[np.int64]
    known: NDArray[np.int64]
    value: NDArray[np.float64]  # -0.0 is 0.0; zeros without values
    by_known: NDArray[np.int64]  # positions sorted by (group, known_at); empty when that is the order of the rows


class _Probes(NamedTuple):
    """Probes sorted by (group, time). The source's groups come first; the last group holds probes of unknown entities."""

    starts: NDArray[np.int64]
    time: NDArray[np.int64]
    order: NDArray[np.int64]  # their rows in the output


class _Plan(NamedTuple):
    """What to compute."""

    windows: NDArray[np.int64]
    columns: NDArray[np.int64]  # aggregate codes
    form: tuple[bool, bool, int]  # any of sum, mean, std; std; how sums are held (`kernels.exact`)
    needs: tuple[bool, ...]  # min, max, first, last or recency, distinct, rows before the last, quantile
    parameters: NDArray[np.int64]  # of each aggregate: half-life in microseconds, row from the last, per cent; 0 = none


@njit(allocates=False)
def _count_usable(entity: Any, event: Any, known: Any, value: Any) -> Any:
    count = np.int64(0)
    for i in range(len(entity)):
        usable = (entity[i] >= 0) & (event[i] != _NAT) & (known[i] != _NAT)
        if len(value):
            usable = usable & (value[i] == value[i])
        count += np.int64(usable)
    return count


@njit(allocates=False)
def _falls(known: Any, starts: Any, first: Any, last: Any) -> Any:
    """Whether known_at decreases anywhere within one of the groups [first, last)."""
    for g in range(first, last):
        for k in range(starts[g] + 1, starts[g + 1]):
            if known[k] < known[k - 1]:
                return True
    return False


@njit
def _order_ties(starts: Any, first: Any, last: Any, event: Any, known: Any, order: Any, value: Any) -> None:
    """Sort rows of equal event_time by (known_at, row) in place; on entry they are in row order."""
    for g in range(first, last):
        low = starts[g]
        while low < starts[g + 1]:
            high = low + 1
            while high < starts[g + 1] and event[high] == event[low]:
                high += 1
            falls = False
            for k in range(low + 1, high):
                falls = falls or known[k] < known[k - 1]
            if falls:
                tied = known[low:high].copy(), order[low:high].copy(), value[low:high].copy()
                at = radix_rows(tied[0], np.arange(high - low))
                for k in range(high - low):
                    known[low + k], order[low + k], value[low + k] = tied[0][at[k]], tied[1][at[k]], tied[2][at[k]]
            low = high


@njit
def _order_by_known(starts: Any, first: Any, last: Any, known: Any, out: Any) -> None:
    """out[starts[g] : starts[g + 1]] = positions of group g in stable order of known_at."""
    for g in range(first, last):
        low, high = starts[g], starts[g + 1]
        found = radix_rows(known[low:high], np.arange(high - low))
        for k in range(high - low):
            out[low + k] = low + found[k]


def _over_groups(work: Any, starts: NDArray[np.int64], threads: int) -> list[Any]:
    """work(first, last) over ranges of groups with about the same number of rows."""
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], 8 * threads + 1).astype(np.int64))
    edges = [0, *np.minimum(cuts[1:-1], len(starts) - 1).tolist(), len(starts) - 1]
    return run_ranges(work, [(a, b) for a, b in itertools.pairwise(edges) if b > a], threads)


def _codes(entity: NDArray[np.int64], probe: NDArray[np.int64], threads: int) -> tuple[Any, Any, int, int]:
    """(source codes, probe codes, smallest, span): codes in [smallest, smallest + span); other probes get smallest + span."""
    codes, distinct, low, span = dense_codes(entity, threads)
    if len(distinct):
        at = np.minimum(np.searchsorted(distinct, probe), span - 1)
        probe = np.where(distinct[at] == probe, at, span)
    elif len(probe):
        least, most = bounds(probe, threads)
        if least < low or most > low + span:
            probe = np.where((probe < low) | (probe >= low + span), low + span, probe)
    return codes, probe, low, span


def _sorted_groups(
    codes: NDArray[np.int64],
    keys: Sequence[NDArray[np.int64]],
    groups: tuple[int, int],
    threads: int,
    columns: Sequence[NDArray[Any]] = (),
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[Any]]]:
    """(stable order by code and then by keys, starts of the codes, the columns in that order).

    The least significant key comes first; groups = (smallest code, number of codes spanned).
    """
    order = None
    for key in keys:
        if order is not None or not ascending(key, threads):
            order = radix_order(key, order)
    return grouped_columns(codes, *groups, threads, order, columns)


def _prepare(
    probe: tuple[NDArray[np.int64], NDArray[np.int64]],
    source: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    values: NDArray[np.float64],
    threads: int,
) -> tuple[_Source, _Probes]:
    entity, event, known = source
    same, mirrored = known is event, probe[0] is entity and probe[1] is event
    counts = run_ranges(
        lambda a, b: _count_usable(entity[a:b], event[a:b], known[a:b], values[a:b]),
        split(len(entity), threads),
        threads,
    )
    if sum(counts) < len(entity):
        rows = (entity >= 0) & (event != _NAT) & (known != _NAT)
        if len(values):
            rows &= ~np.isnan(values)
            values = values[rows]
        entity, event, known = entity[rows], event[rows], known[rows]
        mirrored = False
        known = event if same else known
    codes, probe_codes, low, span = _codes(entity, probe[0], threads)
    values = values + 0.0 if len(values) else np.zeros(len(entity))
    columns: list[NDArray[Any]] = [event, values] if same else [event, values, known]
    order, starts, (event, values, *late) = _sorted_groups(codes, [event], (low, span), threads, columns)
    by_known = np.empty(0, np.int64)
    if late:
        _over_groups(lambda a, b: _order_ties(starts, a, b, event, late[0], order, values), starts, threads)
        if any(_over_groups(lambda a, b: _falls(late[0], starts, a, b), starts, threads)):
            by_known = np.empty(len(order), np.int64)
            _over_groups(lambda a, b: _order_by_known(starts, a, b, late[0], by_known), starts, threads)
    ready = _Source(starts, event, late[0] if late else event, values, by_known)
    if mirrored:
        return ready, _Probes(starts, event, order)
    probe_order, probe_starts, (times,) = _sorted_groups(probe_codes, [probe[1]], (low, span + 1), threads, [probe[1]])
    return ready, _Probes(probe_starts, times, probe_order)


def _check_plan(
    windows: Sequence[int], aggregates: Sequence[Aggregate], with_values: bool
) -> tuple[NDArray[np.int64], list[str], list[int]]:
    widths = check.integers("windows", list(windows))
    pairs = [(item, 0) if isinstance(item, str) else item for item in aggregates]
    names, parameters = [name for name, _ in pairs], [parameter for _, parameter in pairs]
    if len(widths) == 0 or widths.min() < 1:
        raise ValueError(f"windows must be one or more positive numbers of microseconds, found {list(windows)}")
    unknown = [name for name in names if name not in _CODES]
    if unknown or not names:
        raise ValueError(f"aggregates must be among {', '.join(_CODES)}, found {unknown or names}")
    needing = [name for name in names if name not in _WITHOUT_VALUES]
    if not with_values and needing:
        raise ValueError(f"without values only {', '.join(_WITHOUT_VALUES)} are available, found {needing}")
    wrong = [pair for pair in pairs if pair[1] < 0 or (pair[1] and pair[0] not in WITH_PARAMETER)]
    if wrong:
        raise ValueError(f"only {', '.join(WITH_PARAMETER)} take a parameter, 1 or more, found {wrong}")
    wrong = [pair for pair in pairs if pair[0] == "quantile" and not 1 <= pair[1] <= 99]
    if wrong:
        raise ValueError(f"a quantile must have 1 to 99 per cent as its parameter, found {wrong}")
    return widths, names, parameters


def trailing(
    probe_entity: ArrayLike,
    probe_time: ArrayLike,
    source_entity: ArrayLike,
    event_time: ArrayLike,
    known_at: ArrayLike,
    values: ArrayLike | None,
    windows: Sequence[int],
    aggregates: Sequence[Aggregate],
    threads: int = 1,
) -> NDArray[np.float64]:
    """Aggregates, per probe and window, of the source rows in the window.

    Shape: probe_* int64[n]; source_entity, event_time, known_at int64[m]; values float64[m] or None -> float64[n, windows,
    aggregates]. Times and windows in microseconds. A row counts when known_at < T and event_time >= T - w (module docstring).
    NaN is a null value: such a row does not count at all. Without values only count and recency are available.
    NaT (smallest int64) known_at is never known; NaT event_time or entity < 0 never counts; a probe with NaT or entity < 0
    has no rows. Inputs need not be sorted. -0.0 counts as 0.0.

    count     rows                                     first     value of the least (event_time, known_at, row position)
    sum       correctly rounded (math.fsum)            last      value of the greatest
    mean      sum / count                              recency   seconds from the latest event_time to T
    std       ddof = 1; NaN below two rows             distinct  number of distinct values, exact
    min, max  infinities included                      ewm_sum   sum of value * 2 ** (-age / half-life), half-life = w / 2,
                                                       ewm_mean  age = max(T - event_time, 0); the latter / sum of weights
    ("recency", k)  seconds from the k-th latest row   ("ewm_sum", h), ("ewm_mean", h)  with a half-life of h microseconds
    by (event_time, known_at, row position) to T   ("quantile", p)  of p per cent, 1 to 99, linear between the
                                                   neighbouring values (numpy's default; type 7 of Hyndman and Fan)
    Without rows count is 0 and the rest NaN. With an infinite value sum and mean are that infinity (NaN with both signs), std
    is NaN; a quantile between a number and an infinity is that infinity, between both infinities NaN.
    Cost: linear in rows and windows; times log for distinct and quantiles, and for min, max, first and a k-th latest row when
    known_at is not in event order; ewm_* take time proportional to the rows in each window. Quantiles need 8 bytes per row of
    the current entity and window, and 24 more per row, in each thread.
    distinct is exact for any number of values and needs 40 to 72 bytes per row of the current entity in each thread. A sketch
    would not be cheaper: HyperLogLog keeps maxima, which cannot be undone when rows leave; the sliding variant (Chabchoub and
    Hebrail, 2010) can, but reads a thousand registers per probe and window and is 3 % off; this reads log2(rows) marks.
    Raises ValueError for shapes that disagree, unknown aggregates, windows < 1 or threads < 1; TypeError for wrong types.
    """
    groups = check.integers("probe_entity", probe_entity)
    times = check.integers("probe_time", probe_time, len(groups))
    entity = check.integers("source_entity", source_entity)
    event = check.integers("event_time", event_time, len(entity))
    if source_entity is probe_entity:
        entity = groups
    if event_time is probe_time:
        event = times
    known = event if known_at is event_time else check.integers("known_at", known_at, len(entity))
    numbers = None if values is None else check.floats("values", values, len(entity))
    widths, names, parameters = _check_plan(windows, aggregates, numbers is not None)
    check_threads(threads)
    out = np.empty((len(groups), len(widths), len(names)))
    few = (
        1 if len(groups) + len(entity) < _PARALLEL_ROWS else threads
    )  # starting threads costs more than a pass over so few
    plan = _plan(widths, names, parameters, numbers, few)
    source, probes = _prepare((groups, times), (entity, event, known), np.empty(0) if numbers is None else numbers, few)

    def part(a: int, b: int) -> None:
        _sweep(tuple(source), tuple(probes), tuple(plan), (a, b), out)

    run_ranges(part, split(len(groups), 1 if threads == 1 else threads * _TASKS_PER_THREAD), threads)
    return out


def _plan(
    widths: NDArray[np.int64],
    names: Sequence[str],
    parameters: Sequence[int],
    numbers: NDArray[np.float64] | None,
    threads: int,
) -> _Plan:
    asked = set(names)
    sums = bool(asked & {"sum", "mean", "std"})
    return _Plan(
        widths,
        np.array([_CODES[name] for name in names], np.int64),
        (sums, "std" in asked, _form(numbers, threads) if sums and numbers is not None else FIXED_FORM),
        (
            "min" in asked,
            "max" in asked,
            "first" in asked,
            bool(asked & {"last", "recency"}),
            "distinct" in asked,
            any(name == "recency" and parameter > 1 for name, parameter in zip(names, parameters, strict=True)),
            "quantile" in asked,
        ),
        np.array(parameters, np.int64),
    )


def _form(numbers: NDArray[np.float64], threads: int) -> int:
    """The cheapest accumulator form that is exact for the sums of these numbers and of their squares."""
    parts = split(len(numbers), threads)
    sizes = run_ranges(lambda a, b: float(whole_bound(numbers[a:b])), parts, threads)
    if min(sizes, default=0.0) >= 0.0 and len(numbers) * max(sizes, default=0.0) ** 2 < 2.0**62:
        return WHOLE_FORM
    return WIDE_FORM if any(run_ranges(lambda a, b: any_wide(numbers[a:b]), parts, threads)) else FIXED_FORM
