"""The row order of an epoch as a keyed permutation, evaluated at any index, with no stored index array.

A Feistel network on the smallest power of two that holds n, with cycle walking (Black, Rogaway: Ciphers with arbitrary finite
domains, CT-RSA 2002) needs constant memory. For n <= 4096, where a network of so few bits does not mix well, keyed hashes
are sorted. Trade-off: an index costs some nanoseconds of arithmetic instead of a random read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.hashing import GOLDEN, combine64, splitmix64
from kernels.jit import njit, run_ranges, split

SMALL = 4096
_ROUNDS = 6
_CHUNK = 4096  # positions per pass: they stay in the L1 cache
_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xD6E8FEB86659FD93)
_S32, _ONE = np.uint64(32), np.uint64(1)


@njit(inline=True)
def _round(half: Any, key: Any) -> Any:
    z = (half ^ key) * _A
    z = (z ^ (z >> _S32)) * _B
    return z ^ (z >> _S32)


@njit(inline=True)
def _feistel(x: Any, keys: Any, left_bits: Any, left_mask: Any, right_mask: Any) -> Any:
    right = x & right_mask
    left = x >> left_bits
    for r in range(0, _ROUNDS, 2):
        left ^= _round(right, keys[r]) & left_mask
        right ^= _round(left, keys[r + 1]) & right_mask
    return (left << left_bits) | right


@njit
def _walk(start: Any, n: Any, keys: Any, right_bits: Any, left_bits: Any, out: Any) -> None:
    """out = the order at positions start, start + 1, ... Up to half of the numbers are outside [0, n) after the first pass; the
    network is applied to all of them again until each is inside, a pass at a time, so that the inner loops have no branch.
    """
    shift = np.uint64(right_bits)
    right_mask = (_ONE << np.uint64(right_bits)) - _ONE
    left_mask = (_ONE << np.uint64(left_bits)) - _ONE
    strays = np.empty(_CHUNK, np.int64)
    for begin in range(0, len(out), _CHUNK):
        part = out[begin : begin + _CHUNK]
        for i in range(len(part)):  # without a branch, so that it vectorises
            part[i] = np.int64(_feistel(np.uint64(start + begin + i), keys, shift, left_mask, right_mask))
        count = np.int64(0)
        for i in range(len(part)):
            strays[count] = i
            count += np.int64(part[i] >= n)
        while count > 0:
            left = np.int64(0)
            for j in range(count):
                i = strays[j]
                part[i] = np.int64(_feistel(np.uint64(part[i]), keys, shift, left_mask, right_mask))
                strays[left] = i
                left += np.int64(part[i] >= n)
            count = left


@njit
def _keys(seed: Any, epoch: Any, n: Any) -> Any:
    key = combine64(combine64(seed, epoch), n)
    keys = np.empty(_ROUNDS, np.uint64)
    for r in range(_ROUNDS):
        key += GOLDEN
        keys[r] = splitmix64(key)
    return keys


@njit
def _hashes(n: Any, key: Any) -> Any:
    out = np.empty(n, np.uint64)
    for i in range(n):
        out[i] = splitmix64(key ^ splitmix64(np.uint64(i)))
    return out


def permutation(start: int, stop: int, n: int, seed: int, epoch: int, threads: int = 1) -> NDArray[np.int64]:
    """Rows at positions [start, stop) of the order of n rows keyed by (seed, epoch).

    Shape: -> int64[stop - start], values in [0, n). Concatenated ranges give the same numbers as one call.
    Memory O(stop - start). Raises ValueError unless 0 <= start <= stop <= n < 2**62, 0 <= seed < 2**63, 0 <= epoch < 2**63.
    """
    start, stop, n, seed, epoch = (int(v) for v in (start, stop, n, seed, epoch))
    if not 0 <= start <= stop <= n < 2**62:
        raise ValueError(f"0 <= start <= stop <= n < 2**62 must hold, found start={start} stop={stop} n={n}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} must be in [0, 2**63), found {value}")
    keys = _keys(np.uint64(seed), np.uint64(epoch), np.uint64(n))
    if n <= SMALL:
        return np.argsort(_hashes(n, keys[0]), kind="stable")[start:stop].astype(np.int64, copy=False)
    bits = (n - 1).bit_length()
    out = np.empty(stop - start, np.int64)

    def part(a: int, b: int) -> None:
        _walk(start + a, n, keys, bits // 2, bits - bits // 2, out[a:b])

    run_ranges(part, split(len(out), threads if len(out) >= 1 << 16 else 1), threads)
    return out
