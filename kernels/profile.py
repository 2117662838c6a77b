"""Profiles: the distribution of each column of a block as integer counts on given edges, so that merging is addition.

Per numeric column, on ascending edges e[0] < ... < e[B] (from the reference, see `bins_of`): rows below e[0], in each bin
[e[b], e[b + 1]) (the last one closed), above e[B], missing (NaN), -inf and +inf; least and greatest finite value; and moments as
exact integers: a value inside the edges is q = floor((x - e[0]) * 2**31 / (e[B] - e[0]) + 1/2), and q and q**2 are summed
without rounding; values outside are summed exactly. Any split of the rows, in any order, on any number of threads, merges to
the same bytes.

Per categorical column: rows of each code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.exact import WIDE, add_wide, wide_integer
from kernels.jit import njit, run_ranges, split

_BLOCK = 256
_SCALE = 2.0**31
_CELL_BITS = np.uint64(21)  # quanta of a cell
_CELLS = 2**10  # equal cells between the first and the last edge: a value's cell leaves a few bins to choose from
_MOST_STEPS = 4  # edges in one cell; a column with more of them in a cell uses binary search
FEW_VALUES = 2  # times the requested bins: up to so many distinct values have a bin each
NOISE = 2.0**-21  # relative to a value: the rounding of float32 (2**-24) and of a few operations, with a margin
_NARROWEST = 1e-290  # edges closer than this have no representable quantum
MISSING, NEGATIVE_INFINITE, POSITIVE_INFINITE = -3, -2, -1  # the last three counts of a row of Profile.counts


class ProfilePlan(NamedTuple):
    """Edges of k columns, padded with +inf to one power of two; see `profile_plan`."""

    edges: NDArray[np.float64]  # [k, 2**s]
    bins: NDArray[np.int64]  # [k], B of each column
    ranges: NDArray[np.float64]  # [k, 2]: e[0] / 2 and 2**31 / (e[B] / 2 - e[0] / 2)
    starts: NDArray[np.int32]  # [k, cells + 2]: edges in the cells before
    steps: NDArray[np.int64]  # [k]: most edges in one cell, or -1 when a search is faster


class Profile(NamedTuple):
    """counts[k]: below, B bins, above, zeros to the common width, then missing, -inf, +inf.

    sums[k]: sum of q, sum of q**2, exact sums of the values below and above the edges in units of 2**-1084 (Python integers).
    """

    counts: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    sums: list[tuple[int, int, int, int]]


class Bins(NamedTuple):
    """Bins of one column, fixed by a reference; see `bins_of`."""

    edges: NDArray[np.float64]  # [B + 1], ascending, each between two values of the reference or beyond its ends
    points: NDArray[np.float64]  # [B]: the single value of a bin, NaN where it covers a range of values


def bins_of(values: ArrayLike, bins: int) -> Bins:
    """Bins of about equal shares whose edges are between the finite values, so that rounding noise moves no row.

    With at most FEW_VALUES * bins distinct values, each has its own bin. With more, a value as frequent as a whole bin has
    one, and the rest is cut into parts of about 1 / bins of the rows. Distinct values that differ only by rounding noise
    count as one. The outer edges exceed the least and greatest value by no more than such noise.
    Raises ValueError without a finite value.
    """
    numbers = check.floats("values", values)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    finite = np.sort(numbers[np.isfinite(numbers)]) + 0.0
    if len(finite) == 0:
        raise ValueError(f"values must hold a finite number, found none among {len(numbers)}")
    with np.errstate(over="ignore"):  # a difference beyond the largest double is infinite, which compares correctly
        low, high, rows = _distinct(finite)
        few = len(low) <= FEW_VALUES * bins
        cuts = np.arange(1, len(low)) if few else _cuts(rows, bins)
        first, last = _ends(float(finite[0]), float(finite[-1]), few)
        inner = low[cuts] * 0.5 + high[cuts - 1] * 0.5
        inner = np.where(inner > high[cuts - 1], inner, low[cuts])  # neighbouring doubles have nothing between them
    cuts, inner = cuts[inner < last], inner[inner < last]
    starts = np.concatenate([[0], cuts])
    alone = np.diff(np.append(starts, len(low))) == 1
    middle = finite[
        np.cumsum(rows)[starts] - rows[starts] + (rows[starts] - 1) // 2
    ]  # the median of values that count as one
    return Bins(np.concatenate([[first], inner, [last]]), np.where(alone, middle, np.nan))


def _distinct(finite: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """(least, greatest, rows) of each distinct value of ascending numbers, with its rounding noise."""
    value, rows = np.unique(finite, return_counts=True)
    if np.array_equal(value, np.floor(value)):
        return value, value, rows  # whole numbers have no rounding noise
    spread = finite[int(0.95 * (len(finite) - 1))] - finite[int(0.05 * len(finite))]
    spread = spread if spread > 0 else value[-1] - value[0]
    noise = np.maximum(8 * np.spacing(np.abs(value)), NOISE / 2 * np.minimum(np.abs(value), spread))
    apart = np.diff(value) > noise[1:]
    group = np.concatenate([[0], np.cumsum(apart)])
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    stops = np.append(starts[1:], len(value)) - 1
    crowded = (
        value[stops] - value[starts] > 8 * noise[stops]
    )  # a chain of distinct values, too long to be noise around one
    apart |= crowded[group[1:]]
    starts = np.flatnonzero(np.append(True, apart))
    stops = np.append(starts[1:], len(value)) - 1
    return value[starts], value[stops], np.add.reduceat(rows, starts)


def _ends(least: float, most: float, few: bool) -> tuple[float, float]:
    """The outer edges: below the least and above the greatest value by the rounding noise of the larger magnitude.

    With many values far from zero the noise is taken from the spread instead, because the Wasserstein distance uses the
    width of the outer bins (with few values it uses the values).
    """
    size = max(abs(least), abs(most)) or 1.0
    near = size if few else min(size, most * 0.5 - least * 0.5)
    noise = max(NOISE * near, 0.0 if few else 8 * float(np.spacing(size)), _NARROWEST)
    first, last = min(least - noise, np.nextafter(least, -np.inf)), max(most + noise, np.nextafter(most, np.inf))
    top = float(np.finfo(float).max)
    return max(first, -top), min(last, top)


def _cuts(rows: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Indices of the values that begin a bin, without the first: frequent values alone, the rest in equal parts."""
    share = rows.sum() / bins
    heavy = np.flatnonzero(rows >= share)
    bounds = np.unique(np.concatenate([[0], heavy, heavy + 1, [len(rows)]]))
    before = np.concatenate([[0], np.cumsum(rows)])
    found = [bounds]
    for low, high in itertools.pairwise(bounds.tolist()):
        inside = before[high] - before[low]
        parts = max(1, round(inside / share))
        wanted = before[low] + inside * np.arange(1, parts) / parts
        at = np.searchsorted(before, wanted)
        nearer = wanted - before[at - 1] <= before[at] - wanted
        found.append(np.clip(at - nearer, low, high))
    return np.unique(np.concatenate(found))[1:-1]


def profile_plan(edges: Sequence[ArrayLike]) -> ProfilePlan:
    """Pack the edges of each column. Raises ValueError unless each has two or more finite, strictly ascending numbers."""
    rows = [np.asarray(e, float) for e in edges]
    for k, row in enumerate(rows):
        if row.ndim != 1 or len(row) < 2 or not np.all(np.isfinite(row)) or np.any(row[1:] <= row[:-1]):
            raise ValueError(f"edges of column {k} must be two or more finite ascending numbers, found {row.tolist()}")
    widest = max((len(row) for row in rows), default=1)
    padded = np.full((len(rows), 1 << (widest).bit_length()), np.inf)
    ranges = np.empty((len(rows), 2))
    for k, row in enumerate(rows):
        padded[k, : len(row)] = row
        span = row[-1] * 0.5 - row[0] * 0.5  # halves: the whole may exceed the largest double
        ranges[k] = row[0] * 0.5, _SCALE / max(span, _SCALE / float(np.finfo(float).max))
    bins = np.array([len(row) - 1 for row in rows], np.int64)
    starts, steps = np.zeros((len(rows), _CELLS + 2), np.int32), np.empty(len(rows), np.int64)
    for k, row in enumerate(rows):
        starts[k] = np.searchsorted(_cells_of(np.ascontiguousarray(row), ranges[k]), np.arange(_CELLS + 2))
        most = int(np.diff(starts[k]).max())
        steps[k] = most if most <= _MOST_STEPS else -1
    return ProfilePlan(padded, bins, ranges, starts, steps)


@njit(inline=True)
def _quantum(value: Any, span: Any) -> Any:
    """Position of a value inside the edges, from 0 to 2**31; monotonic in the value."""
    return np.uint64(np.int64((value * 0.5 - span[0]) * span[1] + 0.5))


@njit
def _cells_of(values: Any, span: Any) -> Any:
    out = np.empty(len(values), np.int64)
    for j in range(len(values)):
        out[j] = np.int64(_quantum(values[j], span) >> _CELL_BITS)
    return out


@njit
def _positions_by_cell(x: Any, edges: Any, bins: Any, span: Any, starts: Any, steps: Any, at: Any) -> None:
    """`_positions` of the values inside the edges (any number for others): the edges before the cell, then a few steps."""
    first, last = edges[0], edges[bins]
    for j in range(len(x)):
        value = x[j] if first <= x[j] <= last else first
        b = np.uint64(starts[_quantum(value, span) >> _CELL_BITS])
        for _ in range(steps):
            b += np.uint64(edges[b] <= value)  # without a branch; the edge after the last one is infinite
        at[j] = np.int64(b)


@njit
def _positions(x: Any, edges: Any, at: Any) -> None:
    """at[j] = number of edges <= x[j], without a branch; len(edges) is a power of two and more than there are edges."""
    at[:] = 0
    step = len(edges) >> 1
    while step > 0:
        for j in range(len(x)):
            at[j] += step if edges[at[j] + step - 1] <= x[j] else 0
        step >>= 1


@njit
def _count_others(x: Any, edges: Any, bins: Any, counts: Any, low: Any, high: Any, far: Any) -> Any:
    """Count the values outside the edges; returns the least and greatest finite value, these included."""
    first, last = edges[0], edges[bins]
    width = len(counts)
    for j in range(len(x)):
        value = x[j]
        if first <= value <= last:
            continue
        if value != value:
            counts[width + MISSING] += 1
        elif value == np.inf:
            counts[width + POSITIVE_INFINITE] += 1
        elif value == -np.inf:
            counts[width + NEGATIVE_INFINITE] += 1
        else:
            side = 0 if value < first else 1
            counts[0 if side == 0 else bins + 1] += 1
            add_wide(far, side, np.float64(value).view(np.int64), False)
            low, high = min(low, value), max(high, value)
    return low, high


@njit
def _profile_column(x: Any, at: Any, plan: Any, counts: Any, extremes: Any, sums: Any, far: Any) -> None:
    """Add one block of one column. sums: uint64[3] = sum of q, sum of q**2 as low and high word; far: [2, WIDE]."""
    edges, bins, span, starts, steps = plan
    if steps < 0:
        _positions(x, edges, at)
    else:
        _positions_by_cell(x, edges, bins, span, starts, steps, at)
    first, last = edges[0], edges[bins]
    low, high = extremes[0], extremes[1]
    total, squares, top = sums[0], sums[1], sums[2]
    others = 0
    for j in range(len(x)):
        value = x[j]
        if first <= value <= last:
            counts[np.uint64(min(at[j], bins))] += 1  # e[B] itself belongs to the last bin
            q = _quantum(value, span)
            total += q
            q *= q
            squares += q
            top += np.uint64(squares < q)
            low, high = min(low, value), max(high, value)
        else:
            others += 1
    if others:
        low, high = _count_others(x, edges, bins, counts, low, high, far)
    extremes[0], extremes[1] = low, high
    sums[0], sums[1], sums[2] = total, squares, top


@njit
def _profile(block: Any, plan: Any, counts: Any, extremes: Any, sums: Any, far: Any) -> None:
    edges, bins, ranges, starts, steps = plan
    x, at = np.empty(_BLOCK), np.empty(_BLOCK, np.int64)
    for start in range(0, block.shape[0], _BLOCK):
        rows = min(_BLOCK, block.shape[0] - start)
        for k in range(block.shape[1]):
            for j in range(rows):
                x[j] = block[start + j, k] + 0.0
            column = (edges[k], bins[k], ranges[k], starts[k], steps[k])
            _profile_column(x[:rows], at[:rows], column, counts[k], extremes[k], sums[k], far[k])


def empty_profile(plan: ProfilePlan) -> Profile:
    """The profile of no rows."""
    k = len(plan.bins)
    width = int(plan.bins.max(initial=0)) + 5
    return Profile(np.zeros((k, width), np.int64), np.full(k, np.inf), np.full(k, -np.inf), [(0, 0, 0, 0)] * k)


def profile(block: ArrayLike, plan: ProfilePlan, threads: int = 1) -> Profile:
    """Profile of the rows of `block` on the edges of `plan`.

    Shape: block[n, k] float32 or float64 (others are converted), any strides. Raises TypeError for other than numbers,
    ValueError for another number of columns than the plan's.
    """
    rows = np.asarray(block)
    if rows.dtype.kind not in "iubf":
        raise TypeError(f"block must hold numbers, found dtype {rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] != len(plan.bins):
        raise ValueError(f"block must be [n, {len(plan.bins)}], found shape {rows.shape}")
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float64)

    def part(a: int, b: int) -> Profile:
        empty = empty_profile(plan)
        extremes = np.stack([empty.low, empty.high], axis=1)
        sums, far = np.zeros((len(plan.bins), 3), np.uint64), np.zeros((len(plan.bins), 2, WIDE), np.int64)
        _profile(rows[a:b], tuple(plan), empty.counts, extremes, sums, far)
        whole = [
            (int(s[0]), int(s[1]) + (int(s[2]) << 64), wide_integer(f[0]), wide_integer(f[1]))
            for s, f in zip(sums, far, strict=True)
        ]
        return Profile(empty.counts, extremes[:, 0].copy(), extremes[:, 1].copy(), whole)

    merged = empty_profile(plan)
    for piece in run_ranges(part, split(len(rows), threads), threads):
        merged = merge(merged, piece)
    return merged


def merge(a: Profile, b: Profile) -> Profile:
    """Profile of the rows of both (made on the same plan). Raises ValueError when their shapes differ."""
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"profiles must be on the same edges, found shapes {a.counts.shape} and {b.counts.shape}")
    sums = [(p[0] + q[0], p[1] + q[1], p[2] + q[2], p[3] + q[3]) for p, q in zip(a.sums, b.sums, strict=True)]
    return Profile(a.counts + b.counts, np.minimum(a.low, b.low), np.maximum(a.high, b.high), sums)


def column_counts(result: Profile, plan: ProfilePlan, column: int) -> NDArray[np.int64]:
    """int64[B + 2]: below, bins, above of one column."""
    return result.counts[column, : plan.bins[column] + 2]


# --------------------------------------------------------------------------- categories
@njit
def _count_categories(codes: Any, sizes: Any, counts: Any) -> Any:
    for i in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            code = codes[i, k]
            if code < 0 or code >= sizes[k]:
                return i * codes.shape[1] + k
            counts[k, code] += 1
    return -1


def category_counts(codes: ArrayLike, sizes: ArrayLike, threads: int = 1) -> NDArray[np.int64]:
    """Rows of each code per column.

    Shape: codes integer[n, k] in [0, sizes[k]), sizes int64[k] -> int64[k, largest size]. Merging is addition.
    Raises ValueError for another shape or a code outside.
    """
    block = np.asarray(codes)
    limits = check.integers("sizes", sizes)
    if block.dtype.kind not in "iu" or block.ndim != 2 or block.shape[1] != len(limits):
        raise ValueError(f"codes must be integers [n, {len(limits)}], found {block.dtype} of shape {block.shape}")

    def part(a: int, b: int) -> NDArray[np.int64]:
        counts = np.zeros((len(limits), int(limits.max(initial=0))), np.int64)
        bad = _count_categories(block[a:b], limits, counts)
        if bad >= 0:
            i, k = a + bad // len(limits), bad % len(limits)
            raise ValueError(f"codes must be in [0, {limits[k]}) in column {k}, found {block[i, k]} in row {i}")
        return counts

    pieces = run_ranges(part, split(len(block), threads), threads)
    return np.sum(pieces, axis=0) if pieces else np.zeros((len(limits), int(limits.max(initial=0))), np.int64)
