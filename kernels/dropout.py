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
    zero = kept - kept  # of its type
    for i in range(len(rows)):
        row_key = combine64(key, np.uint64(rows[i]))
        for j in range(words):
            hashed[j] = mix64(row_key + np.uint64(j) * GOLDEN)
        for j in range(width):
            out[i, j] = kept if np.int32(lanes[j]) >= limit else zero


@njit
def _key(seed: Any, step: Any, layer: Any, part: Any) -> Any:
    key = combine64(combine64(seed, step), layer)
    return combine64(key, part) if part else key


def dropout_mask(
    rows: ArrayLike,
    width: int,
    seed: int,
    step: int,
    layer: int,
    p: float,
    out: NDArray[Any],
    *,
    kept: float | None = None,
    part: int = 0,
) -> NDArray[Any]:
    """Fill `out` with 0 (probability p) or `kept` (None: 1 / (1 - p)), each entry keyed by (seed, step, layer, row id, column),
    and by `part` where that is not 0.

    Shape: rows int64[b] (ids, not positions), out float32[b, width], or int16 for the bits of bf16 -> out. One SplitMix64 word
    serves four columns, so p is rounded to a multiple of 2**-16. Raises ValueError unless 0 <= p < 1 and seed, step, layer,
    part are in [0, 2**64).
    """
    ids = check.integers("rows", rows)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), found {p}")
    if width < 0:
        raise ValueError(f"width must not be negative, found {width}")
    low = getattr(out, "dtype", None) == np.int16
    check.output("out", out, (len(ids), width), np.int16 if low else np.float32)
    seeds = (seed_u64("seed", seed), seed_u64("step", step), seed_u64("layer", layer), seed_u64("part", part))
    key = np.uint64(_key(*seeds))  # boxed as int
    value = np.float32(1.0 / (1.0 - p) if kept is None else kept)
    _mask(ids, key, np.int32(min(round(p * 65536), 65535)), bf16_bits(value) if low else value, out)
    return out


def bf16_bits(value: np.float32) -> np.int16:
    """The bits of the bf16 nearest to a finite float32; of two equally near the even one."""
    bits = int(np.asarray(value, np.float32).view(np.uint32))
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).view(np.int16)
