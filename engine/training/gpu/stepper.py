"""The GPU stepper: the order, masks, checkpoints, epochs and early stopping of the CPU, with other arithmetic.

Steps are launched in chunks without waiting (`step`); the figures of each are read once a chunk. Promised: the same rows at
the same steps as on the CPU (`row_stream` of an epoch is equal), the same masks, a resumed run that takes the same steps, and
losses equal within rounding. Not promised: the CPU's bits, or the same bits for another number of GPUs.

`device="cpu"` runs the same step eagerly, for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from engine.training.device import Placement, describe_device, prepare_backend
from engine.training.flat import FlatWeights
from engine.training.gpu.graphs import Runner, make_runner, run_chunk
from engine.training.gpu.inputs import Chunk, Resident, Rows, SideLane, Source, StepPlan, Streamed, prepare_chunk
from engine.training.gpu.step import BAD, LOSS, NAMED, NORM, WEIGHT, GpuStep
from engine.training.optimizers import make_optimizer
from engine.training.predict import DEVICE_TILE_ROWS, Evaluators
from engine.training.stepper import StepFigures, StepsTaken, TrainingJob
from kernels import cuda as twins


class GpuStepper:
    """A chunk of steps a call, up to the next pause of the schedule; the next chunk is prepared while one computes.

    `runner` is graph or eager (see `graphs`), or a function that makes one; `resident` overrides the memory rule.
    """

    def __init__(
        self,
        job: TrainingJob,
        device: str = "cuda",
        runner: str | Callable[[GpuStep], Runner] = "graph",
        resident: bool | None = None,
    ) -> None:
        prepare_backend()
        exchange = job.exchange
        if exchange.world > 1 and job.model.traits.buffers:
            raise UserError(
                f"model {job.model.kind} changes buffers in training ({', '.join(job.model.traits.buffers[:3])}), which "
                "several GPUs would change in different ways: train it on one GPU or on CPUs"
            )
        self._job, self._device = job, torch.device(device)
        self.identity = {"device": self._device.type}
        job.model.module.to(self._device)
        with self._device:  # tensors are created on it
            self.weights = FlatWeights(job.model, job.precision, job.config.train.decay)
            self.optimizer = make_optimizer(self.weights, job.config.train)
        self._evaluators = Evaluators(job.model, self.weights.named(), job.precision)
        self._staged: tuple[int, Chunk] | None = None  # the next chunk, and its first step
        self._lane = SideLane(self._device)
        self._plan = StepPlan(job.schedule, exchange.rank, exchange.world)
        rows = Rows.of(job.train, job.objectives)
        placement = Placement.choose(rows.nbytes, self._device)
        resident = placement.resident if resident is None else resident
        # An Mlp without codes and embeddings reads its numbers in bf16 only.
        plain = job.model.kind == "mlp" and "embeddings" not in job.model.settings
        low = any(self.weights.low) and plain and not job.model.shape["cardinalities"]
        kind = torch.bfloat16 if low else torch.float32
        source: Source = (
            Resident(rows, self._plan, self._device, kind)
            if resident
            else Streamed(rows, self._plan, self._device, kind, job.team.threads)
        )
        reduce = self._sum_over_workers if exchange.world > 1 else None
        self._step = GpuStep(self.weights, self.optimizer, source, self._plan, job.objectives, reduce=reduce)
        self._runner, name = self._make_runner(runner)
        if exchange.rank == 0:
            self._note(placement, resident, name)

    def _sum_over_workers(self, gradient: Tensor) -> None:
        """One collective for the whole gradient and the sums behind it: NCCL between GPUs."""
        total = self._job.exchange.sum(gradient)
        if total is not gradient:
            gradient.copy_(total)

    def _make_runner(self, wanted: str | Callable[[GpuStep], Runner]) -> tuple[Runner, str]:
        if callable(wanted):
            return wanted(self._step), "given"
        runner, name, reason = make_runner(self._step, wanted)
        if reason:
            self._job.run.warn(f"the step could not be captured in a CUDA graph and runs eagerly ({reason})")
        return runner, name

    def _note(self, placement: Placement, resident: bool, runner: str) -> None:
        run = self._job.run
        facts = describe_device(self._device.type)
        facts |= {
            "runner": runner,
            "rows": "resident" if resident else "streamed",
            "fused_masks": self._step.fused_masks,
        }
        run.note(device_facts=facts)
        run.log(f"training on {facts['name']} ({runner}); {placement.described()}")
        if self._device.type == "cuda" and twins.fault():
            run.log(f"order and masks are computed by torch, not by kernels of their own ({twins.fault()})")

    def run(self, step: int) -> StepsTaken:
        """Take a chunk of steps and read their figures."""
        began = time.perf_counter()
        chunk = self._prepare(step)
        prepared = time.perf_counter()
        self._lane.hand_over(chunk)
        run_chunk(self._step, self._runner, chunk)
        following = step + chunk.steps
        self._staged = (following, self._prepare(following)) if following < self._job.schedule.steps else None
        records = self._step.records[: chunk.steps].tolist()
        seen = self._seen(chunk.steps)
        done = time.perf_counter()
        rows_before = self._job.schedule.rows_before
        figures = [
            StepFigures(
                loss=record[LOSS],
                weight=record[WEIGHT],
                norm=record[NORM],
                rows=rows_before(step + place + 1) - rows_before(step + place),
                stream=seen[place] % 2**64,
                bad=int(record[BAD]),
                bad_rows=[int(record[NAMED])] if record[NAMED] >= 0 else [],
            )
            for place, record in enumerate(records)
        ]
        asked = self._job.exchange.gather(torch.tensor([[float(self._job.stop.requested())]]))
        return StepsTaken(figures, prepared - began, done - prepared, 0.0, bool(asked.sum() > 0))

    def _prepare(self, step: int) -> Chunk:
        """The chunk that begins at a step: the staged one, or a new one."""
        if self._staged is not None and self._staged[0] == step:
            return self._staged[1]
        steps = min(self._plan.chunk, self._job.schedule.next_pause(step) - step)
        with self._lane:
            return prepare_chunk(self._plan, self._job.order, step, steps, self._job.model.mask_calls, self._device)

    def _seen(self, steps: int) -> list[int]:
        """The stream hash of each step, of all workers together."""
        mine = self._step.seen[:steps].cpu()
        hashes: list[int] = self._job.exchange.gather(mine[None]).sum(dim=(0, 1)).tolist()
        return hashes

    def logits(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[n, outputs], a tile at a time on the device."""
        return device_logits(self._evaluators, numeric, codes, self._device)

    def finish(self) -> dict[str, float]:
        """Copy the weights to host memory; returns the peak of device memory."""
        self._job.model.module.cpu()
        if self._device.type != "cuda":
            return {}
        return {"train/device_memory_bytes": float(torch.cuda.max_memory_allocated(self._device))}


def device_logits(
    evaluators: Evaluators,
    numeric: NDArray[np.float32],
    codes: NDArray[np.int32],
    device: torch.device,
    tile_rows: int = DEVICE_TILE_ROWS,
) -> NDArray[np.float32]:
    """`Evaluators.logits` with weights on a device: tiles of one shape, one copy back at the end."""
    tile_rows = min(tile_rows, max(len(numeric), 1))
    out = torch.empty((-(-len(numeric) // tile_rows) * tile_rows, *evaluators.network.output_shape), device=device)
    block = torch.zeros((tile_rows, numeric.shape[1]), device=device)
    keys = torch.zeros((tile_rows, codes.shape[1]), dtype=torch.int32, device=device)
    for start in range(0, len(numeric), tile_rows):
        count = min(tile_rows, len(numeric) - start)
        for buffer, source in ((block, numeric), (keys, codes)):
            buffer[:count].copy_(torch.from_numpy(source[start : start + count]))
            buffer[count:] = 0
        out[start : start + tile_rows] = evaluators(block, keys)
    logits: NDArray[np.float32] = out[: len(numeric)].cpu().numpy()
    return logits
