"""64-bit hashing that gives the same number in every process and on every platform.

`mix64` is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014;
constants of https://prng.di.unimi.it/splitmix64.c). Not cryptographic: do not use it against an adversary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.jit import njit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S8, _S3 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(8), np.uint64(3)


@njit(inline=True)
def mix64(x: Any) -> Any:
    """Bijective mix of one uint64 (inline in other compiled code)."""
    z = (x ^ (x >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@njit(inline=True)
def splitmix64(x: Any) -> Any:
    """First output of SplitMix64 from state x (uint64 -> uint64; inline in other compiled code)."""
    return mix64(x + GOLDEN)


@njit
def combine64(a: Any, b: Any) -> Any:
    """Hash of the ordered pair (a, b) of uint64."""
    return mix64(mix64(a + GOLDEN) ^ (b * _M1 + GOLDEN))


@njit
def _hash_u64(values: Any, seed: Any, out: Any) -> None:
    key = splitmix64(seed)
    for i in range(len(values)):
        out[i] = splitmix64(values[i] ^ key)


@njit(inline=True)
def hash_slice(data: Any, start: Any, stop: Any, key: Any) -> Any:
    """Hash of the bytes data[start:stop] under key = splitmix64(seed): one number of `hash_bytes` (inline)."""
    h = mix64(key ^ np.uint64(stop - start))
    p = start
    while p + 8 <= stop:
        word = np.uint64(0)
        for k in range(8):
            word |= np.uint64(data[p + k]) << (np.uint64(k) << _S3)
        h = mix64((h ^ word) + GOLDEN)
        p += 8
    if p < stop:
        word = np.uint64(0)
        for k in range(stop - p):
            word |= np.uint64(data[p + k]) << (np.uint64(k) << _S3)
        h = mix64((h ^ word) + GOLDEN)
    return splitmix64(h)


@njit
def _hash_bytes(data: Any, offsets: Any, seed: Any, out: Any) -> None:
    key = splitmix64(seed)
    for i in range(len(offsets) - 1):
        out[i] = hash_slice(data, offsets[i], offsets[i + 1], key)


def seed_u64(name: str, seed: int) -> np.uint64:
    """A seed as uint64; raises ValueError unless 0 <= seed < 2**64."""
    if not 0 <= int(seed) < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64), found {seed}")
    return np.uint64(int(seed))


def hash_u64(array: ArrayLike, seed: int = 0) -> NDArray[np.uint64]:
    """Hash each integer of `array` (any integer type, sign-extended to 64 bits) under `seed`.

    Shape: array[n] -> uint64[n]. Raises TypeError for other than integers, ValueError for a wrong shape or seed.
    """
    values = np.asarray(array)
    if values.dtype.kind in "mM":
        values = values.view(np.int64)
    if values.dtype.kind not in "iub":
        raise TypeError(f"array must hold integers, found dtype {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"array must have one dimension, found shape {values.shape}")
    if values.dtype.kind == "i":
        values = values.astype(np.int64, copy=False).view(np.uint64)
    out = np.empty(len(values), np.uint64)
    _hash_u64(np.ascontiguousarray(values.astype(np.uint64, copy=False)), seed_u64("seed", seed), out)
    return out


def hash_bytes(data: NDArray[np.uint8], offsets: ArrayLike, seed: int = 0) -> NDArray[np.uint64]:
    """Hash each byte string data[offsets[i]:offsets[i+1]] under `seed` (the buffers of an Arrow string array).

    Shape: data uint8[bytes], offsets int64[n + 1] -> uint64[n]. Raises ValueError when offsets decrease or are outside data.
    """
    raw = np.asarray(data)
    if raw.dtype != np.uint8 or raw.ndim != 1:
        raise TypeError(f"data must be uint8[bytes], found {raw.dtype}{list(raw.shape)}")
    edges = np.ascontiguousarray(offsets, dtype=np.int64)
    if edges.ndim != 1 or len(edges) < 1:
        raise ValueError(f"offsets must be int64[n + 1], found shape {edges.shape}")
    if edges[0] < 0 or edges[-1] > len(raw) or np.any(edges[1:] < edges[:-1]):
        raise ValueError(f"offsets must rise within [0, {len(raw)}], found {edges[0]} .. {edges[-1]}")
    out = np.empty(len(edges) - 1, np.uint64)
    _hash_bytes(np.ascontiguousarray(raw), edges, seed_u64("seed", seed), out)
    return out
