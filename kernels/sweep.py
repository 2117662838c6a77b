"""The sweep of `kernels.windows` over sorted rows: one pass in time serves all windows and aggregates of an entity.

When known_at rises with event_time within each entity the active rows are contiguous and the sweep is simpler (`_ordered`, the
fast path); the numbers are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import kernels
from kernels import check
from kernels.exact import (
    FIXED,
    WHOLE_FORM,
    WIDE,
    WIDE_FORM,
    WORDS,
    add,
    add_fixed,
    add_wide,
    is_wide,
    moments_fixed,
    moments_whole,
    moments_wide,
)
from kernels.jit import njit, prefetch_row

_COUNT, _SUM, _MEAN, _STD, _MIN, _MAX, _LAST, _FIRST, _RECENCY, _DISTINCT, _EWM_SUM, _EWM_MEAN, _QUANTILE = range(13)
CODES = {name: code for code, name in enumerate((*kernels.AGGREGATES, "quantile"))}
# Places in `Plan.needs`; the first three are also the rows of the stacks, heads and trees.
_AT_MIN, _AT_MAX, _AT_FIRST, _AT_LATEST, _AT_DISTINCT, _AT_EARLIER, _AT_QUANTILE = range(7)
_NAT = check.NAT
_AHEAD = 16  # probes: the memory of their results is asked for this long before, since it is scattered


class Source(NamedTuple):
    """Source rows sorted by (group, event_time, known_at, row)."""

    starts: NDArray[np.int64]  # where each group starts; one more for the end
    event: NDArray[np.int64]
    known: NDArray[np.int64]
    value: NDArray[np.float64]  # -0.0 is 0.0; zeros without values
    by_known: NDArray[np.int64]  # positions sorted by (group, known_at); empty when that is the order of the rows


class Probes(NamedTuple):
    """Probes sorted by (group, time). The source's groups come first; the last group holds probes of unknown entities."""

    starts: NDArray[np.int64]
    time: NDArray[np.int64]
    order: NDArray[np.int64]  # their rows in the output


class Plan(NamedTuple):
    """What to compute."""

    windows: NDArray[np.int64]
    columns: NDArray[np.int64]  # aggregate codes
    form: tuple[bool, bool, int]  # any of sum, mean, std; std; how sums are held (`kernels.exact`)
    needs: tuple[bool, ...]  # min, max, first, last or recency, distinct, rows before the last, quantile
    parameters: NDArray[np.int64]  # of each aggregate: half-life in microseconds, row from the last, per cent; 0 = none


# --------------------------------------------------------------------------- small parts of the sweep
@njit(inline=True, allocates=False)
def minus(t: Any, width: Any) -> Any:
    """t - width, or the smallest instant if that is later."""
    return t - width if t >= _NAT + 1 + width else np.int64(_NAT + 1)


@njit(inline=True, allocates=False)
def seconds(t: Any, event: Any) -> Any:
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
            weight = np.exp2(-(max(seconds(t, event[r]), 0.0) / half_life))
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
                weight = np.exp2(-(max(seconds(t, event[r]), 0.0) / half_life))
                add_wide(wide, 0, np.float64(value[r] * weight).view(np.int64), False)
        moments_wide(wide, 1, (fixed[0, 8], fixed[0, 9], np.int64(1), False), words, stat, _EWM_SUM)
    else:
        moments_fixed(fixed, 1, np.int64(1), False, words, stat, _EWM_SUM)
    stat[_EWM_MEAN] = stat[_EWM_SUM] / total_weight


# --------------------------------------------------------------------------- the sweep
@njit(inline=True, allocates=False)
def _copy(source: Any, target: Any) -> None:
    for w in range(source.shape[0]):
        for c in range(source.shape[1]):
            target[w, c] = source[w, c]


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
        stat[_LAST], stat[_RECENCY] = value[latest], seconds(t, event[latest])


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
            out[c] = seconds(t, data[0][earlier[c]]) if earlier[c] >= first else np.nan
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
        if p + _AHEAD < len(rows):
            prefetch_row(out, rows[p + _AHEAD])
        t = times[p]
        if p > 0 and t == times[p - 1]:
            _copy(out[rows[p - 1]], out[rows[p]])
            continue
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
            limit = minus(t, windows[w])
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
        if p + _AHEAD < len(rows):
            prefetch_row(out, rows[p + _AHEAD])
        t = times[p]
        if p > 0 and t == times[p - 1]:
            _copy(out[rows[p - 1]], out[rows[p]])
            continue
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
            limit = minus(t, windows[w])
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
def first_of(times: Any, low: Any, high: Any, limit: Any) -> Any:
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
def sweep(source: Any, probes: Any, plan: Any, span: Any, out: Any) -> None:
    """Compute the probes at sorted positions span[0]:span[1]; see `Source`, `Probes` and `Plan` for the tuples."""
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
    g = first_of(probe_starts, 0, len(probe_starts), p + 1) - 1
    while p < span[1]:
        while probe_starts[g + 1] <= p:
            g += 1
        last = min(probe_starts[g + 1], span[1])
        rows, times = probe_order[p : min(last + _AHEAD, len(probe_order))], probe_time[p:last]
        p = last
        skipped = first_of(times, 0, len(times), _NAT + 1) if g + 1 < len(starts) else len(times)
        _blank(rows[:skipped], columns, out)
        if skipped == len(times):
            continue
        rows, times = rows[skipped:], times[skipped:]
        end = starts[g + 1]
        begin = first_of(event, starts[g], end, minus(times[0], widest))
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
