"""Stable orders of (entity, time): counting sort by entity code, radix sort of instants; linear in the number of rows.

Both sorts move row positions only. Rows that are already ordered by time, as data sets here are, skip the radix passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.jit import clz64, njit, run_ranges, split

_BITS = 11
_BUCKETS = 1 << _BITS
_INSERTION_ROWS = 256  # up to here insertion sort is faster than counting 2,048 buckets


@njit
def _ascending(values: Any) -> Any:
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            return False
    return True


@njit
def _bounds(values: Any) -> Any:
    """Smallest and largest of a non-empty array."""
    low = high = values[0]
    for i in range(1, len(values)):
        low = min(low, values[i])
        high = max(high, values[i])
    return low, high


@njit
def radix_rows(values: Any, order: Any) -> Any:
    """Stable order by int64 values, refining `order`, a permutation that is used as scratch.

    Radix sort, least significant digit first; insertion sort for few rows.
    """
    if len(values) <= _INSERTION_ROWS:
        for k in range(1, len(order)):
            row, at = order[k], k
            while at > 0 and values[order[at - 1]] > values[row]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = row
        return order
    low, high = _bounds(values)
    base = np.uint64(low)
    passes = (64 - clz64(np.uint64(high) - base) + _BITS - 1) // _BITS
    count, spare = np.empty(_BUCKETS + 1, np.int64), np.empty(len(values), np.int64)
    for p in range(passes):
        shift = np.uint64(p * _BITS)
        mask = np.uint64(_BUCKETS - 1)
        count[:] = 0
        for i in range(len(values)):
            count[np.int64(((np.uint64(values[i]) - base) >> shift) & mask) + 1] += 1
        if count.max() == len(values):  # every row has the same digit
            continue
        for b in range(1, _BUCKETS + 1):
            count[b] += count[b - 1]
        for i in range(len(order)):
            row = order[i]
            digit = np.int64(((np.uint64(values[row]) - base) >> shift) & mask)
            spare[count[digit]] = row
            count[digit] += 1
        order, spare = spare, order
    return order


def radix_order(values: NDArray[np.int64], order: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Stable ascending order of int64[n], refining `order` (row positions, default 0..n-1; not changed)."""
    rows = np.arange(len(values), dtype=np.int64) if order is None else order.copy()
    result: NDArray[np.int64] = radix_rows(values, rows)
    return result


@njit
def _sort_keys(keys: Any, spare: Any) -> Any:
    """Ascending radix sort of uint64; digits that all keys share are skipped. Returns the buffer with the result."""
    digits = 6
    count = np.zeros((digits, _BUCKETS + 1), np.int64)
    mask = np.uint64(_BUCKETS - 1)
    for i in range(len(keys)):
        key = keys[i]
        for d in range(digits):
            count[d, np.int64((key >> np.uint64(d * _BITS)) & mask) + 1] += 1
    for d in range(digits):
        row = count[d]
        if row.max() == len(keys):
            continue
        for b in range(1, _BUCKETS + 1):
            row[b] += row[b - 1]
        shift = np.uint64(d * _BITS)
        for i in range(len(keys)):
            key = keys[i]
            digit = np.int64((key >> shift) & mask)
            spare[row[digit]] = key
            row[digit] += 1
        keys, spare = spare, keys
    return keys


def sort_keys(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[n] in ascending order; `keys` may be used as scratch."""
    result: NDArray[np.uint64] = _sort_keys(keys, np.empty_like(keys))
    return result


def _dense_range(codes: NDArray[np.int64], threads: int = 1) -> tuple[int, int] | None:
    """(smallest code, number of codes spanned) when a counting sort over the span is cheap, else None."""
    if len(codes) == 0:
        return 0, 0
    low, high = bounds(codes, threads)
    span = high - low + 1
    return (low, span) if span <= 4 * len(codes) + 65536 else None


def dense_codes(codes: NDArray[np.int64], threads: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """(codes to sort by counting, distinct, smallest, number spanned).

    Codes with a small span are unchanged and `distinct` is empty; sparse codes become ranks among `distinct`.
    """
    dense = _dense_range(codes, threads)
    if dense is not None:
        return codes, np.empty(0, np.int64), *dense
    distinct = np.unique(codes)
    return np.searchsorted(distinct, codes), distinct, 0, len(distinct)


@njit
def _count(codes: Any, low: Any, counts: Any) -> None:
    for i in range(len(codes)):
        counts[codes[i] - low] += 1


@njit
def _starts(counts: Any, offsets: Any) -> None:
    """Turn counts[part, code] into the position from which the part writes rows of the code; offsets[code]: the code's start."""
    total = np.int64(0)
    for g in range(counts.shape[1]):
        offsets[g] = total
        for part in range(counts.shape[0]):
            here = counts[part, g]
            counts[part, g] = total
            total += here
    offsets[counts.shape[1]] = total


@njit
def _scatter(codes: Any, low: Any, first: Any, cursor: Any, out: Any, columns: Any, moved: Any) -> None:
    """Move rows first, first + 1, ... and their values in up to three columns to the positions of their codes."""
    a, b, c = columns
    a_out, b_out, c_out = moved
    for i in range(len(codes)):
        g = np.uint64(codes[i] - low)
        at = np.uint64(cursor[g])
        cursor[g] += 1
        out[at] = first + i
        if len(a):
            a_out[at] = a[first + i]
        if len(b):
            b_out[at] = b[first + i]
        if len(c):
            c_out[at] = c[first + i]


@njit
def _count_rows(codes: Any, rows: Any, low: Any, counts: Any) -> None:
    for i in range(len(rows)):
        counts[codes[rows[i]] - low] += 1


@njit
def _scatter_rows(codes: Any, rows: Any, low: Any, cursor: Any, out: Any) -> None:
    for i in range(len(rows)):
        g = codes[rows[i]] - low
        out[cursor[g]] = rows[i]
        cursor[g] += 1


def grouped_columns(
    codes: NDArray[np.int64],
    low: int,
    span: int,
    threads: int,
    order: NDArray[np.int64] | None,
    columns: Sequence[NDArray[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[Any]]]:
    """(stable order of rows by code, start of each code [span + 1], columns in that order) for codes in [low, low + span).

    A counting sort. Refines `order` (row positions, default 0, 1, 2, ...). Up to three columns [n] of 8-byte types.
    Without `order` the columns are moved while they are read, one write stream per code, which saves the cache misses of a
    gather by the finished order.
    """
    ranges = split(len(codes), min(threads, max(1, len(codes) // (4 * max(span, 1)))))
    counts = np.zeros((len(ranges), span), np.int64)
    offsets, out = np.zeros(span + 1, np.int64), np.empty(len(codes), np.int64)
    at = {bounds: counts[part] for part, bounds in enumerate(ranges)}
    if order is None:
        moved = [np.empty(len(codes), np.int64) for _ in columns]
        nothing = [np.empty(0, np.int64)] * (3 - len(columns))
        sources = (*(column.view(np.int64) for column in columns), *nothing)
        run_ranges(lambda a, b: _count(codes[a:b], low, at[a, b]), ranges, threads)
        _starts(counts, offsets)
        targets = (*moved, *nothing)
        run_ranges(lambda a, b: _scatter(codes[a:b], low, a, at[a, b], out, sources, targets), ranges, threads)
        return out, offsets, [array.view(column.dtype) for array, column in zip(moved, columns, strict=True)]
    run_ranges(lambda a, b: _count_rows(codes, order[a:b], low, at[a, b]), ranges, threads)
    _starts(counts, offsets)
    run_ranges(lambda a, b: _scatter_rows(codes, order[a:b], low, at[a, b], out), ranges, threads)
    return out, offsets, [column[out] for column in columns]


def ascending(values: NDArray[np.int64], threads: int = 1) -> bool:
    """Whether int64[n] never falls."""
    parts = split(len(values), threads)
    return all(run_ranges(lambda a, b: bool(_ascending(values[max(a - 1, 0) : b])), parts, threads))


def bounds(values: NDArray[np.int64], threads: int = 1) -> tuple[int, int]:
    """(smallest, largest) of a non-empty int64[n]."""
    parts = run_ranges(lambda a, b: _bounds(values[a:b]), split(len(values), threads), threads)
    return min(int(low) for low, _ in parts), max(int(high) for _, high in parts)
