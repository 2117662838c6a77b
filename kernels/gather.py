"""Rows of a row-major block into a given buffer: how batches are made from a packed data set."""

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
    """out[i] = block[index[i]], bounds checked before anything is written; returns `out`.

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
        raise IndexError(f"index must lie in [0, {len(block)}), found {rows[bad]} at position {bad}")

    def part(a: int, b: int) -> None:
        _gather(block, rows[a:b], out[a:b])

    run_ranges(part, split(len(rows), threads), threads)
    return out
