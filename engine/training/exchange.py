"""Gradient exchange: adds the gradients of the logical shards in one fixed tree, within a process or between workers.

The tree folds i + (i + ceil(n / 2)) until one row is left. With strided shards (worker w owns w, w + W, w + 2W, ...)
and V = W * 2^k shards the first k levels stay inside a worker, so each worker sends one row; otherwise it sends one
per shard. Either way each addition has the same two operands, so the sum has the same bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from engine.training.threads import Team

STATS = 8  # float64 behind every gradient row
LOSS, WEIGHT, BAD, ROWS, STREAM, STOP = range(6)  # STREAM holds the bits of a uint64
STATS_FLOATS = 2 * STATS


class Exchange(Protocol):
    """The network operations of the loop. Every call is collective."""

    rank: int
    world: int

    def gather(self, block: Tensor) -> Tensor:
        """[m, w] of every worker, as [world, m, w] in rank order."""

    def sum(self, block: Tensor) -> Tensor:
        """Sum over workers, in any order."""

    def first(self, values: Sequence[float]) -> list[float]:
        """The values of rank 0."""


class Alone:
    """The exchange of one worker: nothing is sent."""

    rank, world = 0, 1

    def gather(self, block: Tensor) -> Tensor:
        """[1, m, w]."""
        return block[None]

    def sum(self, block: Tensor) -> Tensor:
        """The block."""
        return block

    def first(self, values: Sequence[float]) -> list[float]:
        """The values."""
        return list(values)


class Group:
    """The workers of torch.distributed's default process group: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        # The old name warns from torch 2.13 on, the new one is missing before.
        self._all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

    def gather(self, block: Tensor) -> Tensor:
        """[m, w] of every worker, as [world, m, w] in rank order."""
        out = torch.empty((self.world * block.shape[0], *block.shape[1:]), dtype=block.dtype)
        self._all_gather(out, block.contiguous())
        return out.view(self.world, *block.shape)

    def sum(self, block: Tensor) -> Tensor:
        """Sum over workers, in any order."""
        distributed.all_reduce(block)
        return block

    def first(self, values: Sequence[float]) -> list[float]:
        """The values of rank 0."""
        block = torch.tensor(list(values), dtype=torch.float64)
        distributed.broadcast(block, 0)
        return [float(value) for value in block]


def owned(shards: int, rank: int, world: int) -> list[int]:
    """The shards of a worker."""
    return list(range(rank, shards, world))


def slots(shards: int, world: int) -> int:
    """Number of rows that a worker allocates: the same on every worker."""
    return -(-shards // world)


def folds_locally(shards: int, world: int) -> bool:
    """Whether the tree's lower levels stay inside a worker."""
    each = shards // world
    return shards % world == 0 and each & (each - 1) == 0


def add_up(rows: Tensor, shards: int, exchange: Exchange, team: Team) -> tuple[Tensor, NDArray[np.float64]]:
    """(gradient [P], statistics [STATS]) over all shards, from this worker's `rows` [slots, P + STATS_FLOATS].

    `rows` is overwritten.
    """
    if exchange.world == 1:
        return _result(_fold(list(rows[:shards]), team))
    if folds_locally(shards, exchange.world):
        _fold(list(rows), team)
        gathered = exchange.gather(rows[:1])
        return _result(_fold(list(gathered[:, 0]), team))
    gathered = exchange.gather(rows)
    ordered = [gathered[shard % exchange.world, shard // exchange.world] for shard in range(shards)]
    gradient, sums = _result(_fold(ordered, team))
    sums[STOP] += sum(
        float(_statistics(row)[STOP]) for row in gathered[shards:, 0]
    )  # workers without shards may ask too
    return gradient, sums


def all_reduce(rows: Tensor, shards: int, exchange: Exchange, team: Team) -> tuple[Tensor, NDArray[np.float64]]:
    """`add_up` by a plain all-reduce: one row is sent for any number of shards, and bits depend on the number of workers."""
    mine = len(owned(shards, exchange.rank, exchange.world))
    if mine == 0:
        rows[0, :-STATS_FLOATS].zero_()  # no shard writes it, and it holds the sum of the last step
    own = _fold(list(rows[: max(mine, 1)]), team)
    statistics = exchange.gather(own[None, -STATS_FLOATS:].clone())[:, 0]
    gradient = exchange.sum(own[:-STATS_FLOATS].contiguous())
    return gradient, _fold_statistics([_statistics(row) for row in statistics])


def _result(row: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    return row[:-STATS_FLOATS], _statistics(row)


def _statistics(row: Tensor) -> NDArray[np.float64]:
    return row[-STATS_FLOATS:].numpy().view(np.float64)


def _fold(rows: list[Tensor], team: Team) -> Tensor:
    """Fold the tree into the first row. Columns are independent, so threads share them out in ranges."""
    width = rows[0].shape[0] - STATS_FLOATS
    parts = team.threads if width >= 1 << 14 else 1
    edges = [width * part // parts // 64 * 64 for part in range(parts)] + [width]

    def fold_range(part: int) -> None:
        columns = [row[edges[part] : edges[part + 1]] for row in rows]
        while len(columns) > 1:
            half = -(-len(columns) // 2)
            for low, high in zip(columns, columns[half:], strict=False):
                low.add_(high)
            columns = columns[:half]

    team.run(fold_range, parts)
    _statistics(rows[0])[:] = _fold_statistics([_statistics(row) for row in rows])
    return rows[0]


def _fold_statistics(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    stream = np.array([row[STREAM] for row in rows]).view(np.uint64).sum(dtype=np.uint64)
    values = [row.copy() for row in rows]
    for row in values:
        row[STREAM] = 0.0
    while len(values) > 1:
        half = -(-len(values) // 2)
        values = [low + high for low, high in zip(values, values[half:], strict=False)] + values[
            len(values) - half : half
        ]
    values[0][STREAM] = np.array([stream], np.uint64).view(np.float64)[0]
    return values[0]
