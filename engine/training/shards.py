"""Logical shards of a batch: gathers a shard's rows, runs the model forward and backward on one thread, stores the gradient.

Every shard of a run has one shape; a short last batch is filled up with rows of weight zero, unless rows depend on each other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.training.buffers import Buffers
from engine.training.examples import Examples, aligned_empty
from engine.training.exchange import BAD, LOSS, ROWS, STATS_FLOATS, STREAM, WEIGHT
from engine.training.flat import FlatWeights
from engine.training.model import Network
from engine.training.objectives import Objective, bad_rows, label_inputs, row_losses
from engine.training.order import RowOrder
from engine.training.randomness import ShardMasks, backward_begins, drawn_from
from engine.training.schedule import Schedule
from kernels.gather import gather_rows
from kernels.hashing import hash_u64


class ShardWorkspace:
    """Buffers of one shard and its module over the shared weights."""

    def __init__(self, flat: FlatWeights, data: Examples, rows: int, gradient: torch.Tensor) -> None:
        self.numeric = aligned_empty((rows, data.numeric.shape[1]), np.float32)
        self.codes = aligned_empty((rows, data.codes.shape[1]), np.int32)
        self.target = aligned_empty((rows, *data.target.shape[1:]), np.float32)
        self.weight = aligned_empty(self.target.shape, np.float32)
        self.module, self.leaves = flat.module()
        self.arithmetic = flat.arithmetic
        self.masks: dict[int, torch.Tensor] = {}
        self.gradient = gradient[:-STATS_FLOATS]  # and what is summed of buffers
        self.gradient_views = flat.views(self.gradient[: flat.size])
        self.buffers = self.gradient[flat.size :]
        self.statistics = gradient[-STATS_FLOATS:].numpy().view(np.float64)
        self.tensors = tuple(torch.from_numpy(array) for array in (self.numeric, self.codes, self.target, self.weight))
        self.input_seconds = 0.0  # of its last step
        self.bad_rows: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class ShardTask:
    """State shared by all shards of a run."""

    network: Network
    data: Examples
    order: RowOrder
    schedule: Schedule
    objectives: tuple[Objective, ...]
    buffers: Buffers | None = None

    def used(self, step: int, shard: int) -> bool:
        """Whether a shard has rows to train on: two, where rows depend on each other."""
        start, stop = self.schedule.shard_positions(step, shard)
        return stop - start > int(self.network.traits.couples)

    def run(self, space: ShardWorkspace, step: int, shard: int) -> None:
        """Gradient of sum(weight * loss) / batch and its statistics for one shard of global step `step` (from 0)."""
        space.statistics[:] = 0.0
        space.bad_rows = space.bad_rows[:0]
        space.input_seconds = 0.0
        began = time.perf_counter()
        ids, start, stop = self.fill(space, step, shard)
        if start == stop:
            space.gradient.zero_()
            return
        space.input_seconds = time.perf_counter() - began
        if self.used(step, shard):
            shown = ids[: stop - start] if self.network.traits.couples else ids
            with drawn_from(ShardMasks(shown, self.schedule.config.seed, step, shard, space.masks)):
                self._differentiate(space, ids, stop - start)
            if self.buffers is not None:
                self.buffers.store(space.module, space.buffers)
        else:
            space.gradient.zero_()
        space.statistics[ROWS] = stop - start
        # A sum of hashes of (row, position): equal for the same rows at the same places, whichever worker computed which part.
        keys = ids[: stop - start] ^ (np.arange(start, stop) << 24)
        space.statistics[STREAM : STREAM + 1].view(np.uint64)[:] = hash_u64(keys).sum()

    def fill(self, space: ShardWorkspace, step: int, shard: int) -> tuple[NDArray[np.int64], int, int]:
        """Gather a shard's rows into its buffers.

        Returns (dataset rows int64[shard rows], positions start and stop in the epoch's order); nothing is written when
        start == stop. Places beyond the last row repeat the first one, with weight zero.
        """
        start, stop = self.schedule.shard_positions(step, shard)
        count = stop - start
        if count == 0:
            return np.empty(0, np.int64), start, stop
        index = np.empty(len(space.target), np.int64)
        index[:count] = self.order.positions(step // self.schedule.epoch_steps, start, stop)
        index[count:] = index[0]
        if space.numeric.shape[1]:
            gather_rows(self.data.numeric, index, space.numeric)
        if space.codes.shape[1]:
            gather_rows(self.data.codes, index, space.codes)
        weight = None if self.data.weight is None else self.data.weight[index]
        space.target[:], space.weight[:] = label_inputs(self.objectives, self.data.target[index], weight)
        space.weight[count:] = 0.0
        return self.data.rows[index], start, stop

    def _differentiate(self, space: ShardWorkspace, ids: NDArray[np.int64], count: int) -> None:
        # A row that is there twice would count in what rows share.
        numeric, codes, target, weight = [
            item[:count] if self.network.traits.couples else item for item in space.tensors
        ]
        with space.arithmetic.applied("cpu"):
            logits = space.module(numeric, codes)
        losses = row_losses(self.objectives, logits, target, weight)
        weighted = losses * weight
        backward_begins()
        gradients = torch.autograd.grad(weighted.sum() / self.schedule.batch, space.leaves, allow_unused=True)
        for view, gradient in zip(space.gradient_views, gradients, strict=True):
            view.copy_(gradient) if gradient is not None else view.zero_()
        space.statistics[LOSS] = float(weighted.detach().sum(dtype=torch.float64))
        space.statistics[WEIGHT] = float(weight.sum(dtype=torch.float64))
        if not np.isfinite(space.statistics[LOSS]):
            bad = bad_rows(losses.detach()).numpy()[:count]
            space.bad_rows = ids[:count][bad]
            space.statistics[BAD] = max(int(bad.sum()), 1)
