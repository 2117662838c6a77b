"""Conditional codes: the bin of a value among the values of rows that are alike in other columns.

A tree of DEPTH levels over other columns puts a row into one of its leaves; each leaf has edges of its own. So a column that
no longer follows the others moves to the outer bins, even where its own distribution stays as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.jit import njit, run_ranges, split

DEPTH = 3
NODES, LEAVES = 2**DEPTH - 1, 2**DEPTH


class ConditionalPlan(NamedTuple):
    """k conditional columns of a block; the inner nodes of each tree level by level from the root."""

    value: NDArray[np.int64]  # [k], the block's column whose values are counted
    columns: NDArray[np.int64]  # [k, NODES], the block's column that a node looks at; -1: all rows go left
    cuts: NDArray[np.float64]  # [k, NODES]: values above go right, others and NaN left
    edges: NDArray[np.float64]  # [k, LEAVES, bins - 1], ascending, +inf where a leaf has fewer


@njit
def _codes(block: Any, value: Any, columns: Any, cuts: Any, edges: Any, out: Any) -> None:
    inner, bins = columns.shape[1], edges.shape[2] + 1
    for i in range(block.shape[0]):
        for k in range(len(value)):
            x = block[i, value[k]]
            if np.isnan(x):
                out[i, k] = 0
                continue
            at = 0
            while at < inner:
                column = columns[k, at]
                above = column >= 0 and block[i, column] > cuts[k, at]
                at = 2 * at + (2 if above else 1)
            code = 1
            while code < bins and x > edges[k, at - inner, code - 1]:
                code += 1
            out[i, k] = code


def conditional_codes(block: ArrayLike, plan: ConditionalPlan, threads: int = 1) -> NDArray[np.int32]:
    """int32[n, k]: 0 where the value is NaN, else 1 and the number of its leaf's edges below it.

    Shape: block float64[n, columns]. Raises ValueError where it lacks a column of the plan.
    """
    rows = np.asarray(block, np.float64)
    needed = int(max(plan.value.max(initial=-1), plan.columns.max(initial=-1))) + 1
    if rows.ndim != 2 or rows.shape[1] < needed:
        raise ValueError(f"block must have the shape [n, {needed} or more], found {rows.shape}")
    out = np.empty((len(rows), len(plan.value)), np.int32)

    def part(a: int, b: int) -> None:
        _codes(rows[a:b], *plan, out[a:b])

    run_ranges(part, split(len(rows), threads), threads)
    return out
