"""Rows of a row-major block copied into a buffer (the batches of a packed data set), and a block split into columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.jit import njit, run_ranges, split

GATHERED = (np.float32, np.int32, np.float64, np.int64, np.uint8)


@njit
def _outside(index: Any, n: Any) -> Any:
    """Position of the first index outside [0, n), or -1."""
    bad = np.int64(0)
    for i in range(len(index)):
        bad |= index[i] | (n - 1 - index[i])
    if bad >= 0:
        return -1
    for i in range(len(index)):
        if index[i] < 0 or index[i] >= n:
            return i
    return -1


@njit
def _gather(block: Any, index: Any, out: Any) -> None:
    width = block.shape[1]
    for i in range(len(index)):
        row = index[i]
        for j in range(width):
            out[i, j] = block[row, j]


def gather_rows(block: NDArray[Any], index: ArrayLike, out: NDArray[Any], threads: int = 1) -> NDArray[Any]:
    """out[i] = block[index[i]]; bounds are checked before the first write. Returns `out`.

    Shape: block[n, w] C-contiguous of float32, int32, float64, int64 or uint8; index int64[m]; out[m, w] of block's type.
    Raises TypeError for other types, ValueError for shapes that disagree, IndexError for an index outside [0, n).
    """
    if not isinstance(block, np.ndarray) or block.dtype.type not in GATHERED:
        names = ", ".join(np.dtype(t).name for t in GATHERED)
        raise TypeError(
            f"block must be an array of one of {names}, found {getattr(block, 'dtype', type(block).__name__)}"
        )
    if block.ndim != 2:
        raise ValueError(f"block must be [n, w], found shape {block.shape}")
    rows = check.integers("index", index)
    check.output("out", out, (len(rows), block.shape[1]), block.dtype)
    bad = _outside(rows, len(block))
    if bad >= 0:
        raise IndexError(f"index must be in [0, {len(block)}), found {rows[bad]} at position {bad}")

    def part(a: int, b: int) -> None:
        _gather(block, rows[a:b], out[a:b])

    run_ranges(part, split(len(rows), threads), threads)
    return out


@njit
def _columns(block: Any, first: Any, values: Any, valid: Any, nulls: Any) -> None:
    """Split rows first, first + 1, ...; `first` is a multiple of 8, so that no two ranges write the same byte of `valid`."""
    n, width = block.shape
    for start in range(0, n, 64):
        stop = min(start + 64, n)
        for k in range(width):
            for byte in range(start, stop, 8):
                bits = np.uint8(0)
                for i in range(byte, min(byte + 8, stop)):
                    value = block[i, k]
                    values[k, first + i] = value
                    bits |= np.uint8(value == value) << np.uint8(i - byte)
                    nulls[k] += np.int64(value != value)
                valid[k, (first + byte) >> 3] = bits


def columns_of(
    block: NDArray[np.float64], threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int64]]:
    """The columns of a row-major block, with Arrow validity bitmaps for NaN (bit i of byte j: row 8 j + i).

    Shape: block float64[n, k] C-contiguous -> values float64[k, n], valid uint8[k, ceil(n / 8)], nulls int64[k].
    Raises TypeError for another type, ValueError for another layout.
    """
    if not isinstance(block, np.ndarray) or block.dtype != np.float64:
        raise TypeError(f"block must be an array of float64, found {getattr(block, 'dtype', type(block).__name__)}")
    if block.ndim != 2 or not block.flags.c_contiguous:
        raise ValueError(f"block must be [n, k] and C-contiguous, found shape {block.shape}")
    n, width = block.shape
    values, valid = np.empty((width, n)), np.empty((width, -(-n // 8)), np.uint8)

    def part(a: int, b: int) -> NDArray[np.int64]:
        nulls = np.zeros(width, np.int64)
        _columns(block[64 * a : 64 * b], 64 * a, values, valid, nulls)
        return nulls

    parts = run_ranges(part, split(-(-n // 64), threads), threads)
    return values, valid, np.sum(parts, axis=0, dtype=np.int64) if parts else np.zeros(width, np.int64)
