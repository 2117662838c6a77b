"""Row order and dropout masks of the CPU kernels in torch's 64-bit integers, on any device.

The same numbers as `kernels.order.permutation` and `kernels.dropout.dropout_mask`: torch has no unsigned 64-bit arithmetic, but a
signed product wraps to the same bits, and a logical shift is an arithmetic one whose upper bits are masked away.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from kernels import order

GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
_A, _B = GOLDEN, 0xD6E8FEB86659FD93  # of the Feistel round
_FIRST = 0xE220A8397B1DCDAF  # splitmix64(0)
_ROUNDS = 6
_WORD = 2**64
_LOWEST = -(2**63)


def signed(x: int) -> int:
    """The signed number with the low 64 bits of x."""
    x %= _WORD
    return x - _WORD if x >= _WORD // 2 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """`kernels.hashing.mix64` of int64 bits."""
    z = (x ^ _shift(x, 30)) * signed(_M1)
    z = (z ^ _shift(z, 27)) * signed(_M2)
    return z ^ _shift(z, 31)


def splitmix64(x: Tensor) -> Tensor:
    """`kernels.hashing.splitmix64` of int64 bits."""
    return mix64(x + signed(GOLDEN))


def combine64(a: Tensor, b: Tensor) -> Tensor:
    """`kernels.hashing.combine64` of int64 bits."""
    return mix64(mix64(a + signed(GOLDEN)) ^ (b * signed(_M1) + signed(GOLDEN)))


@functools.lru_cache(maxsize=64)
def _keys(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    return tuple(map(int, order._keys(np.uint64(seed), np.uint64(epoch), np.uint64(n))))


def permutation_keys(n: int, seed: int, epoch: int) -> Tensor:
    """int64[6] bits of the keys of the rounds."""
    return torch.tensor([signed(key) for key in _keys(seed, epoch, n)])


def _round(half: Tensor, key: int) -> Tensor:
    z = (half ^ signed(key)) * signed(_A)
    z = (z ^ _shift(z, 32)) * signed(_B)
    return z ^ _shift(z, 32)


def _feistel(x: Tensor, keys: tuple[int, ...], bits: int) -> Tensor:
    right_bits = bits // 2
    left_bits = bits - right_bits
    right_mask, left_mask = (1 << right_bits) - 1, (1 << left_bits) - 1
    right, left = x & right_mask, x >> right_bits
    for r in range(0, _ROUNDS, 2):
        left = left ^ (_round(right, keys[r]) & left_mask)
        right = right ^ (_round(left, keys[r + 1]) & right_mask)
    return (left << right_bits) | right


def permutation(start: int, stop: int, n: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """int64[stop - start] rows at positions [start, stop) of the order of n rows keyed by (seed, epoch).

    Waits for the device once a walk, some five times a call: call it for many steps at once. Raises ValueError unless
    0 <= start <= stop <= n < 2**62.
    """
    if not 0 <= start <= stop <= n < 2**62:
        raise ValueError(f"0 <= start <= stop <= n < 2**62 must hold, found start={start} stop={stop} n={n}")
    keys = _keys(seed, epoch, n)
    if n <= order.SMALL:
        hashes = splitmix64(torch.arange(n, device=device)).bitwise_xor_(signed(keys[0]))
        # Unsigned order is signed order with the top bit turned over.
        return torch.argsort(splitmix64(hashes) ^ _LOWEST, stable=True)[start:stop]
    bits = (n - 1).bit_length()
    found = _feistel(torch.arange(start, stop, device=device), keys, bits)
    while True:
        outside = torch.nonzero(found >= n)[:, 0]
        if not len(outside):
            return found
        found[outside] = _feistel(found[outside], keys, bits)


def lane_steps(width: int, device: torch.device | str = "cpu") -> Tensor:
    """int64[width / 4, rounded up] what tells apart the words of a row's mask: multiples of GOLDEN."""
    return torch.arange((width + 3) // 4, device=device) * signed(GOLDEN)


def dropout_mask(
    rows: Tensor,
    width: int,
    key: Tensor | int,
    p: float,
    kind: torch.dtype = torch.float32,
    steps: Tensor | None = None,
    kept: float | None = None,
) -> Tensor:
    """[b, width] of 0 (probability p) or `kept` (None: 1 / (1 - p)) for row ids int64[b] and the layer's key at this step.

    No value leaves the device, so that a CUDA graph may hold it: `key` may be a tensor that changes between replays.
    `steps` are the `lane_steps` of width, made before. Code under torch.compile must be given them: Inductor folds their
    computation into an index of 32 bits, which their constant does not fit.
    """
    limit = min(round(p * 65536), 65535)
    key_tensor = key if isinstance(key, Tensor) else torch.tensor(key, device=rows.device)
    row_keys = combine64(key_tensor, rows)
    if steps is None:
        steps = lane_steps(width, rows.device)
    # Four lanes of 16 bits a word, lowest first; as signed numbers they compare with their top bit turned over.
    lanes = mix64(row_keys[:, None] + steps).view(torch.int16)[:, :width]
    value = 1.0 / (1.0 - p) if kept is None else kept
    return ((lanes ^ -32768) >= limit - 32768) * torch.full((), value, dtype=torch.float32, device=rows.device).to(kind)


def stream_hash(ids: Tensor, start: int | Tensor, counted: Tensor | None = None) -> Tensor:
    """int64 bits of the sum of hashes of (row, position) that the loop records: ids int64[b] at start, start + 1, ...

    `counted` bool[b] leaves out padding.
    """
    positions = torch.arange(len(ids), device=ids.device) + start
    hashed = splitmix64((ids ^ (positions << 24)) ^ signed(_FIRST))
    return hashed.sum() if counted is None else (hashed * counted).sum()
