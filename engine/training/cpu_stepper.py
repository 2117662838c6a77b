"""The CPU stepper: shards of a batch run on the threads of every worker, gradients are added in a fixed tree, one update."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import UserError
from engine.runtime import environment
from engine.training.audit import Audit
from engine.training.buffers import Buffers
from engine.training.examples import aligned_empty
from engine.training.exchange import (
    BAD,
    LOSS,
    ROWS,
    STATS_FLOATS,
    STOP,
    STREAM,
    WEIGHT,
    add_up,
    all_reduce,
    owned,
    slots,
)
from engine.training.flat import FlatWeights, scale_and_clip
from engine.training.optimizers import make_optimizer
from engine.training.predict import Evaluators
from engine.training.randomness import moved, state
from engine.training.shards import ShardTask, ShardWorkspace
from engine.training.stepper import StepFigures, StepsTaken, TrainingJob

REDUCTIONS = {"exact": add_up, "ddp": all_reduce}


class CpuStepper:
    """Takes one step per call. Raises UserError for a job that needs a GPU or more memory than the machine has."""

    def __init__(self, job: TrainingJob) -> None:
        settings, exchange = job.config.train, job.exchange
        if settings.device == "cuda":
            raise UserError(
                "train.device must be auto or cpu where a run is recorded to train on the CPU, found 'cuda'"
            )
        _check_memory(job)
        self.identity: dict[str, str] = {}
        self._job = job
        self.weights = FlatWeights(job.model, job.precision, settings.decay)
        self._evaluators = Evaluators(job.model, self.weights.named(), job.precision)
        self.optimizer = make_optimizer(self.weights, settings)
        schedule = job.schedule
        self._buffers = Buffers(job.model)
        self._task = ShardTask(job.model, job.train, job.order, schedule, job.objectives, self._buffers)
        self._shards = owned(schedule.shards, exchange.rank, exchange.world)
        width = self.weights.size + self._buffers.size + STATS_FLOATS
        # A shard's gradient, buffers and statistics each.
        self._rows = torch.from_numpy(
            aligned_empty((slots(schedule.shards, exchange.world), width), np.float32)
        ).zero_()
        self._spaces = [
            ShardWorkspace(self.weights, job.train, schedule.shard_rows, self._rows[place])
            for place in range(len(self._shards))
        ]
        self._modules = [space.module for space in self._spaces]
        self._audit = None
        if 0 < settings.audit_every <= schedule.steps:
            self._audit = Audit(job, self.weights, self._task, self._buffers)

    def run(self, step: int) -> StepsTaken:
        """Take one step."""
        job, spaces, settings = self._job, self._spaces, self._job.config.train
        began, drawn = time.perf_counter(), state()
        self._buffers.restore(self._modules)
        job.team.run(lambda place: self._task.run(spaces[place], step, self._shards[place]), len(spaces))
        moved(drawn)
        if self._audit is not None and (step + 1) % settings.audit_every == 0:
            self._audit.run(step, self._rows)
        shards_done = time.perf_counter()
        self._rows[0, -STATS_FLOATS:].numpy().view(np.float64)[STOP] = float(job.stop.requested())
        total, sums = REDUCTIONS[settings.reduction](self._rows, job.schedule.shards, job.exchange, job.team)
        gradient, summed = total[: self.weights.size], total[self.weights.size :]
        added = time.perf_counter()
        norm = scale_and_clip(gradient, job.schedule.batch / sums[WEIGHT] if sums[WEIGHT] > 0 else 0.0, settings.clip)
        if not sums[BAD] and math.isfinite(norm) and sums[WEIGHT] > 0:
            self.optimizer.step(self.weights.values, gradient, job.schedule.rate(step))
            self.weights.refresh()
            used = sum(self._task.used(step, shard) for shard in range(job.schedule.shards))
            self._buffers.combine(summed, used, self._modules[0] if job.exchange.rank == 0 else None, job.exchange)
        figures = StepFigures(
            loss=float(sums[LOSS]),
            weight=float(sums[WEIGHT]),
            norm=norm,
            rows=int(sums[ROWS]),
            stream=int(sums[STREAM : STREAM + 1].view(np.uint64)[0]),
            bad=int(sums[BAD]),
            bad_rows=[int(row) for space in spaces for row in space.bad_rows],
        )
        waited = sum(space.input_seconds for space in spaces) / max(min(job.team.threads, len(spaces)), 1)
        computed = shards_done - began - waited + time.perf_counter() - added
        return StepsTaken([figures], waited, computed, added - shards_done, bool(sums[STOP] > 0))

    def logits(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[n, outputs], a tile at a time on the team's threads."""
        return self._evaluators.logits(numeric, codes, team=self._job.team)

    def finish(self) -> dict[str, float]:
        """The number of audits; the weights are in host memory."""
        return {"train/audits": float(self._audit.done if self._audit is not None else 0)}


def _check_memory(job: TrainingJob) -> None:
    if job.config.train.order == "full" and job.train.nbytes > environment.memory_bytes():
        raise UserError(
            f"train.order=full reads rows all over the training block, which must fit in memory "
            f"({environment.memory_bytes():,} bytes), found {job.train.nbytes:,}. Use train.order=windowed"
        )
