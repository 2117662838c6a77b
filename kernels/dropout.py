"""Dropout masks: functions of (seed, step, layer, row id, column), the same on any worker or device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.hashing import GOLDEN, combine64, mix64, seed_u64
from kernels.jit import njit


@njit
def _mask(rows: Any, key: Any, limit: Any, kept: Any, out: Any) -> None:
    width = out.shape[1]
    words = (width + 3) // 4
    hashed = np.empty(words, np.uint64)
    lanes = hashed.view(np.uint16)
    zero = np.float32(0.0)
    for i in range(len(rows)):
        row_key = combine64(key, np.uint64(rows[i]))
        for j in range(words):
            hashed[j] = mix64(row_key + np.uint64(j) * GOLDEN)
        for j in range(width):
            out[i, j] = kept if np.int32(lanes[j]) >= limit else zero


@njit
def _key(seed: Any, step: Any, layer: Any) -> Any:
    return combine64(combine64(seed, step), layer)


def dropout_mask(
    rows: ArrayLike, width: int, seed: int, step: int, layer: int, p: float, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Fill `out` with 0 (probability p) or 1 / (1 - p), each entry keyed by (seed, step, layer, row id, column).

    Shape: rows int64[b] (ids, not positions), out float32[b, width] -> out. One SplitMix64 word serves four columns, so p is
    rounded to a multiple of 2**-16. Raises ValueError unless 0 <= p < 1 and seed, step, layer are in [0, 2**64).
    """
    ids = check.integers("rows", rows)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), found {p}")
    if width < 0:
        raise ValueError(f"width must not be negative, found {width}")
    check.output("out", out, (len(ids), width), np.float32)
    key = np.uint64(_key(seed_u64("seed", seed), seed_u64("step", step), seed_u64("layer", layer)))  # boxed as int
    _mask(ids, key, np.int32(min(round(p * 65536), 65535)), np.float32(1.0 / (1.0 - p)), out)
    return out
