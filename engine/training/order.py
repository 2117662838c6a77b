"""Row order of training: the rows of a step, as a function of (training rows and targets, seed, epoch, position) alone: what the
dataset holds beside the rows that are trained on, such as later ones, does not change it.

full      one keyed permutation of all rows.
windowed  windows of consecutive rows in keyed order, each with its own keyed permutation: a block larger than memory is
          then read window by window. Mixing is weaker: rows of one window stay neighbours in time.
balanced  each position draws a class, all with the same chance, and then one of its rows, by a keyed hash. Rows are drawn
          with replacement: those of a rare class often, some of a frequent one not at all in an epoch. Dropout masks
          are keyed by row, so a row that comes twice in one step has one mask there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import TrainConfig
from engine.runtime import digest
from engine.training.examples import Examples
from kernels.hashing import hash_u64
from kernels.order import permutation

FORMAT = 2
SAMPLED = 1 << 20  # positions of the first epoch that the order link digests


def order_key(train: Examples, seed: int) -> int:
    """The 63-bit key of a run's row order, from the dataset rows that are trained on and their targets."""
    hasher = hashlib.sha256(f"order {seed} {len(train)} ".encode())
    for array in (train.rows, train.target):
        hasher.update(np.ascontiguousarray(array).data)
    return int.from_bytes(hasher.digest()[:8], "little") >> 1


@dataclass(frozen=True)
class RowOrder:
    """Row order of n rows under one rule and key."""

    n: int
    key: int
    rule: str = "full"
    window_rows: int = 1_000_000
    classes: tuple[NDArray[np.int64], ...] = ()  # rows of each class, for the rule `balanced`

    @classmethod
    def of(cls, train: Examples, config: TrainConfig) -> RowOrder:
        """The order from the config; the target holds classes where they are balanced."""
        balanced, target = config.sampling == "balanced", train.target
        return cls(
            len(target),
            order_key(train, config.seed),
            "balanced" if balanced else config.order,
            config.window_rows,
            tuple(np.flatnonzero(target == value) for value in np.unique(target)) if balanced else (),
        )

    def positions(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Rows at positions [start, stop) of the epoch: int64[stop - start], each value in [0, n)."""
        if self.rule == "full":
            return permutation(start, stop, self.n, self.key, epoch)
        return (self._balanced if self.rule == "balanced" else self._windowed)(epoch, start, stop)

    def _balanced(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        key = int(hash_u64(np.array([epoch]), self.key)[0])
        drawn = hash_u64(np.arange(start, stop), key)
        low, half = np.uint64(2**32 - 1), np.uint64(32)
        # A 32-bit fraction times a count is below the count; the upper half of a hash draws the class, the lower its row.
        taken = (drawn >> half) * np.uint64(len(self.classes)) >> half
        out = np.empty(stop - start, np.int64)
        for number, rows in enumerate(self.classes):
            here = taken == number
            out[here] = rows[(drawn[here] & low) * np.uint64(len(rows)) >> half]
        return out

    def _windowed(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        size = min(self.window_rows, self.n)
        count = -(-self.n // size)
        order = permutation(0, count, count, self.key, epoch)
        lengths = np.where(order == count - 1, self.n - (count - 1) * size, size)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        pieces = []
        for place in range(int(np.searchsorted(edges, start, "right")) - 1, count):
            first, last = int(edges[place]), int(edges[place + 1])
            if first >= stop:
                break
            window = int(order[place])
            inside = permutation(
                max(start - first, 0), min(stop, last) - first, last - first, self.key ^ (window + 1), epoch
            )
            pieces.append(inside + window * size)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def digest(self, rows: NDArray[np.int64], seed: int) -> str:
        """Digest of the rule and of the dataset rows at the first 2**20 positions of the first epoch."""
        hasher = hashlib.sha256()
        limit = min(self.n, SAMPLED)
        for at in range(0, limit, 1 << 17):
            hasher.update(rows[self.positions(0, at, min(at + (1 << 17), limit))].tobytes())
        window = self.window_rows if self.rule == "windowed" else None
        return digest.of_json([FORMAT, self.rule, window, self.n, seed, hasher.hexdigest()])
