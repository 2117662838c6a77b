"""Audits: another worker or thread computes one shard of a step again, and must come to the same bits.

A probe before training looks at a few rows once; an audit notices what shows later, or on another machine only.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.training.buffers import Buffers
from engine.training.examples import aligned_empty
from engine.training.exchange import STATS_FLOATS
from engine.training.flat import FlatWeights
from engine.training.shards import ShardTask, ShardWorkspace
from engine.training.stepper import TrainingJob


class Audit:
    """Audits of a run; `done` counts those of this attempt."""

    def __init__(self, job: TrainingJob, weights: FlatWeights, task: ShardTask, buffers: Buffers) -> None:
        self._job, self._task, self._buffers = job, task, buffers
        row = aligned_empty((weights.size + buffers.size + STATS_FLOATS,), np.float32)
        self._row = torch.from_numpy(row).zero_()
        self._space = ShardWorkspace(weights, job.train, job.schedule.shard_rows, self._row)
        self.done = 0

    def run(self, step: int, rows: Tensor) -> None:
        """Audit one shard of a step whose `rows` [slots, ...] are computed and not yet added. Collective.

        Raises UserError, on all workers, where the bits differ.
        """
        exchange, schedule = self._job.exchange, self._job.schedule
        shard = step // schedule.config.audit_every % schedule.shards
        owner, auditor = shard % exchange.world, (shard + 1) % exchange.world
        found = torch.zeros(1, 2, dtype=torch.int64)
        if exchange.rank == owner:
            found[0, 0] = _digest(rows[shard // exchange.world])
        if exchange.rank == auditor:
            self._compute(step, shard)
            found[0, 1] = _digest(self._row)
        digests = exchange.gather(found)[:, 0]
        self.done += 1
        if digests[owner, 0] != digests[auditor, 1]:
            where = f"worker {auditor}" if exchange.world > 1 else "another thread"
            raise UserError(
                f"a shard must have the same gradient whoever computes it, but shard {shard} of step {step} has another one on "
                f"{where}: the model keeps something between calls, depends on the process, or a machine computes wrongly. "
                "train.audit_every=0 trains without audits, and without equal weights"
            )

    def _compute(self, step: int, shard: int) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            torch.set_num_threads(1)
            try:
                self._task.run(self._space, step, shard)
            except BaseException as error:  # raised by the caller
                errors.append(error)

        self._buffers.restore([self._space.module])
        thread = threading.Thread(target=work, name="audit")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]


def _digest(row: Tensor) -> int:
    digest = hashlib.blake2b(row.numpy().view(np.uint8).data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
