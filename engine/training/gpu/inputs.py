"""Inputs of GPU steps: rows on the device or streamed to it, and tables of everything that differs between steps.

Rows, mask keys, learning rates and rows that count are prepared for a chunk of steps at a time, while earlier steps run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.training.examples import Examples
from engine.training.gpu.order import combine64, permutation, permutation_keys
from engine.training.objectives import Objective, label_inputs
from engine.training.order import RowOrder
from engine.training.schedule import Schedule
from kernels import cuda as twins
from kernels.gather import gather_rows
from kernels.jit import run_ranges, split

SLOTS = 2  # input buffers of streamed rows
CHUNK_ROWS = 1 << 23  # positions of one chunk: 64 MB
THREAD_BYTES = 1 << 20  # of rows gathered by one more thread


@dataclass(frozen=True)
class Rows:
    """Packed rows on the host, with targets and weights in the form that the loss needs.

    numeric float32[n, F], codes int32[n, K], target float32[n] (standardised for regression) or [n, targets], weight float32 of
    the same shape (class weights multiplied in), ids int64[n].
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]
    target: NDArray[np.float32]
    weight: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def of(cls, data: Examples, objectives: Sequence[Objective]) -> Rows:
        """From examples; the arithmetic is that of the CPU step, in float32."""
        return cls(data.numeric, data.codes, *label_inputs(objectives, data.target, data.weight), data.rows)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """In the order in which a step takes them."""
        return self.numeric, self.codes, self.target, self.weight, self.ids

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class Chunk:
    """The inputs of consecutive steps, before they are written to the tables."""

    steps: int
    positions: Tensor  # int64[steps, local]: on the device, or on the host for streamed rows
    counts: Tensor  # int64[steps]: rows of this worker that count; the rest repeats the first one
    rates: Tensor  # float32[steps]
    keys: Tensor  # int64[steps, layers]
    starts: Tensor  # int64[steps]: position of the worker's first row in the epoch


@dataclass(frozen=True)
class StepPlan:
    """Shapes and settings of a run's steps on one worker."""

    schedule: Schedule
    rank: int = 0
    world: int = 1

    @property
    def chunk(self) -> int:
        """Most steps between two readings."""
        schedule = self.schedule
        return max(1, min(schedule.config.log_every, CHUNK_ROWS // schedule.batch, schedule.epoch_steps))

    @property
    def local(self) -> int:
        """Rows of a step on this worker, padding included."""
        return -(-self.schedule.batch // self.world)

    def counts(self, first: int, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows that count, position of the first one) of steps [first, first + steps) of an epoch."""
        begin = np.arange(first, first + steps, dtype=np.int64) * self.schedule.batch
        end = np.minimum(begin + self.schedule.batch, self.schedule.rows)
        start = np.minimum(begin + self.rank * self.local, end)
        return np.minimum(start + self.local, end) - start, start


def prepare_chunk(plan: StepPlan, order: RowOrder, step: int, steps: int, layers: int, device: torch.device) -> Chunk:
    """The chunk of global steps [step, step + steps), which are in one epoch; positions of `full` are computed on `device`."""
    schedule = plan.schedule
    epoch, inner = divmod(step, schedule.epoch_steps)
    begin, end = schedule.positions(step)[0], schedule.positions(step + steps - 1)[1]
    if order.rule == "full" and device.type == "cuda" and kernels_run():
        found = torch.empty(end - begin, dtype=torch.int64, device=device)
        keys = permutation_keys(order.n, order.key, epoch).to(device)
        twins.permutation(begin, end, order.n, order.key, epoch, found, numba_stream(), keys.view(torch.uint64))
    elif order.rule == "full":
        found = permutation(begin, end, order.n, order.key, epoch, device)
    else:
        found = torch.from_numpy(order.positions(epoch, begin, end)).to(device)
    counts, starts = plan.counts(inner, steps)
    whole = torch.zeros(steps * plan.local * plan.world, dtype=torch.int64, device=device).view(steps, -1)
    flat = torch.cat([found, found[-1:].expand(steps * schedule.batch - len(found))]).view(steps, schedule.batch)
    whole[:, : schedule.batch] = flat
    local = whole[:, plan.rank * plan.local : (plan.rank + 1) * plan.local].clone()
    first = local[:, :1]
    counted = torch.from_numpy(counts).to(device)
    local = torch.where(torch.arange(plan.local, device=device) < counted[:, None], local, first)
    seed = torch.tensor(schedule.config.seed)
    keys = combine64(combine64(seed, torch.arange(step, step + steps)[:, None]), torch.arange(max(layers, 1))[None])
    return Chunk(
        steps,
        local,
        counted,
        torch.tensor([schedule.rate(at) for at in range(step, step + steps)], dtype=torch.float32).to(device),
        keys.to(device),
        torch.from_numpy(starts).to(device),
    )


class SideLane:
    """`with lane:` work that need not wait for the running steps; on a CPU it has no effect."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._inside: Any = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._inside = torch.cuda.stream(self._stream)
            self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._inside.__exit__(*error)

    def hand_over(self, chunk: Chunk) -> None:
        """Let the current stream use a chunk that was made inside."""
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in (chunk.positions, chunk.counts, chunk.rates, chunk.keys, chunk.starts):
                tensor.record_stream(current)


def kernels_run() -> bool:
    """Whether Numba compiles and launches kernels here; its simulator does not count, for it cannot read torch's memory."""
    return not twins.simulated() and not twins.fault()


def numba_stream() -> Any:
    """Torch's current stream, as Numba names it."""
    pointer = torch.cuda.current_stream().cuda_stream
    return twins.require_cuda().external_stream(pointer) if pointer else 0


class Source(Protocol):
    """Where a step's rows come from."""

    slots: int

    def load(self, chunk: Chunk) -> None:
        """Take the rows of the next steps."""

    def before(self, place: int) -> int:
        """Start the transfer of the rows of the chunk's step `place`; returns their slot."""

    def tensors(self, cursor: Tensor, slot: int) -> tuple[Tensor, ...]:
        """(numeric, codes, target, weight, ids) of the step at the cursor; part of the step."""

    def after(self, place: int) -> None:
        """The step `place` was launched."""


class Resident:
    """Rows on the device: a step gathers its rows itself."""

    slots = 1

    def __init__(self, rows: Rows, plan: StepPlan, device: torch.device, numeric: torch.dtype) -> None:
        """`numeric` is the type of the first product: bf16 there loses nothing that the product would keep."""
        blocks = [torch.from_numpy(array).to(device) for array in rows.arrays]
        blocks[0] = blocks[0].to(numeric)
        self._blocks = blocks
        self._positions = torch.zeros((plan.chunk, plan.local), dtype=torch.int64, device=device)

    def load(self, chunk: Chunk) -> None:
        """Take the positions of the next steps."""
        self._positions[: chunk.steps].copy_(chunk.positions)

    def before(self, place: int) -> int:  # noqa: ARG002
        """Nothing to do."""
        return 0

    def tensors(self, cursor: Tensor, slot: int) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Gathered by the positions at the cursor."""
        index = self._positions.index_select(0, cursor)[0]
        return tuple(block.index_select(0, index) for block in self._blocks)

    def after(self, place: int) -> None:
        """Nothing to do."""


class Streamed:
    """Rows in host memory, gathered by the CPU into page-locked buffers (allocated once) and copied on a separate stream."""

    slots = SLOTS

    def __init__(self, rows: Rows, plan: StepPlan, device: torch.device, numeric: torch.dtype, threads: int) -> None:
        self._rows, self._threads, self._on_gpu = rows, threads, device.type == "cuda"
        shapes = [(plan.local, *array.shape[1:]) for array in rows.arrays]
        kinds = [torch.from_numpy(array[:0]).dtype for array in rows.arrays]
        self._pinned = [
            [torch.zeros(shape, dtype=kind, pin_memory=self._on_gpu) for shape, kind in zip(shapes, kinds, strict=True)]
            for _ in range(SLOTS)
        ]
        self._device = [[torch.zeros(b.shape, dtype=b.dtype, device=device) for b in slot] for slot in self._pinned]
        self._numeric = numeric
        self._index = np.empty((0, plan.local), np.int64)
        self._ready = self._steps = 0
        if self._on_gpu:
            self._stream = torch.cuda.Stream()
            self._copied = [torch.cuda.Event() for _ in range(SLOTS)]
            self._used = [torch.cuda.Event() for _ in range(SLOTS)]

    def load(self, chunk: Chunk) -> None:
        """Take the positions of the next steps, and start the transfer of the first rows."""
        self._index, self._steps = chunk.positions.cpu().numpy(), chunk.steps
        self._ready = 0
        self._send(0)

    def before(self, place: int) -> int:
        """Let the step wait for its copy."""
        assert place < self._ready, "rows of a step are sent before it runs"
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._copied[place % SLOTS])
        return place % SLOTS

    def tensors(self, cursor: Tensor, slot: int) -> tuple[Tensor, ...]:  # noqa: ARG002
        """The slot's rows."""
        numeric, *rest = self._device[slot]
        return (numeric.to(self._numeric), *rest)

    def after(self, place: int) -> None:
        """Gather and send the next step's rows while this one computes."""
        if self._on_gpu:
            self._used[place % SLOTS].record()
        if place + 1 < self._steps:
            self._send(place + 1)

    def _send(self, place: int) -> None:
        slot = place % SLOTS
        if self._on_gpu:
            self._copied[slot].synchronize()  # the last copy out of these buffers is done
        index = self._index[place]
        columns = [
            (source.reshape(len(source), -1), target.numpy().reshape(len(target), -1))
            for target, source in zip(self._pinned[slot], self._rows.arrays, strict=True)
            if source.size
        ]

        def gather(start: int, stop: int) -> None:
            for source, out in columns:
                gather_rows(source, index[start:stop], out[start:stop])

        # One start of threads for all arrays, and none for a few kilobytes: starting them costs as much as a megabyte's copy.
        parts = min(self._threads, max(1, sum(out.nbytes for _, out in columns) // THREAD_BYTES))
        run_ranges(gather, split(len(index), parts), parts)
        if self._on_gpu:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._used[slot])
                for target, source_tensor in zip(self._device[slot], self._pinned[slot], strict=True):
                    target.copy_(source_tensor, non_blocking=True)
                self._copied[slot].record()
        else:
            for target, source_tensor in zip(self._device[slot], self._pinned[slot], strict=True):
                target.copy_(source_tensor)
        self._ready = place + 1
