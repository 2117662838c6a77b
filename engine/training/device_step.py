"""One training step as fixed work on fixed memory: gather, forward, backward, clip, AdamW, sums of metrics.

Whatever differs between steps (rows, mask keys, learning rate, rows that count) lies in tables on the device, and a cursor on the
device says which line is next. So a step is the same launches on the same addresses, without a value coming back: a CUDA
graph can hold all of it. Tables are filled for a chunk of steps at a time, and losses are read once a chunk.

Three runners execute the same function: `eager` on any device, `graph` (CUDA graphs, one for each input slot), and `compile`
(forward and backward through torch.compile, inside a graph). Nothing here depends on which.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config.tree import TrainConfig
from engine.training.device_order import combine64, dropout_mask, lane_steps, permutation, permutation_keys, stream_hash
from engine.training.examples import Examples
from engine.training.flat import BETA1, BETA2, EPSILON, AdamW, FlatWeights
from engine.training.losses import LOSSES
from engine.training.model import Network
from engine.training.order import RowOrder
from kernels import cuda as twins
from kernels.gather import gather_rows
from kernels.jit import run_ranges, split

SLOTS = 2  # input buffers of streamed rows
THREAD_BYTES = 1 << 20  # of rows gathered by one more thread
TAIL = 32  # floats behind the flat gradient: loss, weight, bad rows; they travel in the same collective
LOSS, WEIGHT, BAD, NORM, NAMED, SEEN = range(6)  # columns of the records
WARM_UP = 3  # steps that run before a capture, so that libraries allocate what they need


@dataclass(frozen=True)
class Rows:
    """Packed rows on the host with targets and weights as the loss takes them.

    numeric float32[n, F], codes int32[n, K], target float32[n] (standardised for regression), weight float32[n] (class weights
    multiplied in), ids int64[n].
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]
    target: NDArray[np.float32]
    weight: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def of(cls, data: Examples, class_weights: NDArray[np.float32] | None, center: float, scale: float) -> Rows:
        """From examples; the arithmetic is that of the CPU loop, in float32."""
        weight = np.ones(len(data), np.float32) if data.weight is None else data.weight
        if class_weights is not None:
            weight = weight * class_weights[data.target.astype(np.int64)]
        target = (data.target - np.float32(center)) / np.float32(scale)
        return cls(data.numeric, data.codes, target, weight, data.rows)

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
    """What some steps in a row need, before it is put into the tables."""

    steps: int
    positions: Tensor  # int64[steps, local]: on the device, or on the host for streamed rows
    counts: Tensor  # int64[steps]: rows of this worker that count; the rest repeats the first one
    rates: Tensor  # float32[steps]
    keys: Tensor  # int64[steps, layers]
    starts: Tensor  # int64[steps]: position of the worker's first row in the epoch


@dataclass(frozen=True)
class Plan:
    """Shapes and settings of a run's steps on one worker."""

    rows: int  # of the training block
    batch: int  # of all workers together
    steps: int  # of an epoch
    chunk: int  # most steps between two readings
    config: TrainConfig
    rank: int = 0
    world: int = 1

    @property
    def local(self) -> int:
        """Rows of a step on this worker, padding included."""
        return -(-self.batch // self.world)

    def counts(self, first: int, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows that count, position of the first one) of steps [first, first + steps) of an epoch."""
        begin = np.arange(first, first + steps, dtype=np.int64) * self.batch
        end = np.minimum(begin + self.batch, self.rows)
        start = np.minimum(begin + self.rank * self.local, end)
        return np.minimum(start + self.local, end) - start, start


def prepare_chunk(
    plan: Plan, order: RowOrder, step: int, steps: int, rates: Sequence[float], layers: int, device: torch.device
) -> Chunk:
    """The chunk of global steps [step, step + steps), which lie in one epoch; positions of `full` are computed on `device`."""
    epoch, inner = divmod(step, plan.steps)
    begin, end = inner * plan.batch, min((inner + steps) * plan.batch, plan.rows)
    if order.rule == "full" and device.type == "cuda" and twins_work():
        found = torch.empty(end - begin, dtype=torch.int64, device=device)
        keys = permutation_keys(order.n, order.key, epoch).to(device)
        twins.permutation(begin, end, order.n, order.key, epoch, found, _numba_stream(), keys.view(torch.uint64))
    elif order.rule == "full":
        found = permutation(begin, end, order.n, order.key, epoch, device)
    else:
        found = torch.from_numpy(order.positions(epoch, begin, end)).to(device)
    counts, starts = plan.counts(inner, steps)
    whole = torch.zeros(steps * plan.local * plan.world, dtype=torch.int64, device=device).view(steps, -1)
    flat = torch.cat([found, found[-1:].expand(steps * plan.batch - len(found))]).view(steps, plan.batch)
    whole[:, : plan.batch] = flat
    local = whole[:, plan.rank * plan.local : (plan.rank + 1) * plan.local].clone()
    first = local[:, :1]
    counted = torch.from_numpy(counts).to(device)
    local = torch.where(torch.arange(plan.local, device=device) < counted[:, None], local, first)
    seed = torch.tensor(plan.config.seed)
    keys = combine64(combine64(seed, torch.arange(step, step + steps)[:, None]), torch.arange(max(layers, 1))[None])
    return Chunk(
        steps,
        local,
        counted,
        torch.tensor(rates, dtype=torch.float32).to(device),
        keys.to(device),
        torch.from_numpy(starts).to(device),
    )


class SideLane:
    """`with lane:` work that need not wait for the steps in flight; on a CPU it is no lane at all."""

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


def twins_work() -> bool:
    """Whether Numba compiles and launches kernels here; its simulator does not count, for it cannot read torch's memory."""
    return not twins.simulated() and not twins.fault()


def _numba_stream() -> Any:
    """Torch's current stream, as Numba names it."""
    pointer = torch.cuda.current_stream().cuda_stream
    return twins.require_cuda().external_stream(pointer) if pointer else 0


# ------------------------------------------------------------------------------------------------------------ inputs


class Source(Protocol):
    """Where a step's rows come from."""

    slots: int

    def load(self, chunk: Chunk) -> None:
        """Take the rows of the next steps."""

    def before(self, place: int) -> int:
        """Have the rows of the chunk's step `place` under way; returns the slot that holds them."""

    def tensors(self, cursor: Tensor, slot: int) -> tuple[Tensor, ...]:
        """(numeric, codes, target, weight, ids) of the step at the cursor; part of the step."""

    def after(self, place: int) -> None:
        """The step `place` was launched."""


class Resident:
    """Rows that lie on the device: a step gathers its own."""

    slots = 1

    def __init__(self, rows: Rows, plan: Plan, device: torch.device, numeric: torch.dtype) -> None:
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
    """Rows in host memory, gathered by the CPU into page-locked buffers (allocated once) and copied by a stream of their own."""

    slots = SLOTS

    def __init__(self, rows: Rows, plan: Plan, device: torch.device, numeric: torch.dtype, threads: int) -> None:
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
        """Take the positions of the next steps, and have the first rows under way."""
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
        """What was copied into the slot."""
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


# ------------------------------------------------------------------------------------------------------------ the step


class DeviceStep:
    """Weights, optimizer and tables on one device, and the step over them.

    `reduce(gradient)` adds the flat gradient and its tail over the workers in place, in one collective; None for one worker.
    """

    def __init__(
        self,
        model: Network,
        flat: FlatWeights,
        optimizer: AdamW,
        source: Source,
        plan: Plan,
        *,
        reduce: Callable[[Tensor], None] | None = None,
        fused_masks: bool | None = None,
    ) -> None:
        self.model, self.flat, self.optimizer, self.source, self.plan = model, flat, optimizer, source, plan
        self.device = flat.values.device
        self._reduce = reduce
        self._leaves = flat.leaves()
        pairs = zip(flat.low, flat.tensors(), flat.views(flat.values), strict=True)
        low = [(copy, full) for is_low, copy, full in pairs if is_low]
        self._low, self._full = [pair[0] for pair in low], [pair[1] for pair in low]
        self.kind = torch.bfloat16 if low else torch.float32
        layers = len(model.mask_widths)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.halt = torch.zeros((), device=self.device)
        self.records = torch.zeros((plan.chunk, 6), dtype=torch.float64, device=self.device)
        self.seen = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._counts = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._starts = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._rates = torch.zeros(plan.chunk, device=self.device)
        self._keys = torch.zeros((plan.chunk, max(layers, 1)), dtype=torch.int64, device=self.device)
        self._places = torch.arange(plan.local, device=self.device)
        self._gradient = torch.zeros(flat.size + TAIL, device=self.device)
        self._views = flat.views(self._gradient[: flat.size])
        on_gpu = self.device.type == "cuda"
        self.fused_masks = (on_gpu and twins_work()) if fused_masks is None else fused_masks
        self._masks = [torch.zeros((plan.local, w), dtype=self.kind, device=self.device) for w in model.mask_widths]
        self._steps = [lane_steps(w, self.device) for w in model.mask_widths]
        self._objective: Callable[..., tuple[Tensor, Tensor]] = self._weighted_loss

    def compile(self) -> None:
        """Put forward and backward through torch.compile; masks are then part of its fused loops."""
        self.fused_masks = False
        self._objective = torch.compile(self._weighted_loss, dynamic=False)

    def load(self, chunk: Chunk) -> None:
        """Fill the tables for the next `chunk.steps` steps."""
        n = chunk.steps
        self.source.load(chunk)
        self._counts[:n].copy_(chunk.counts)
        self._starts[:n].copy_(chunk.starts)
        self._rates[:n].copy_(chunk.rates)
        self._keys[:n].copy_(chunk.keys)
        self.cursor.zero_()

    def run(self, slot: int = 0) -> None:
        """One step: launches only, the same ones every time."""
        numeric, codes, target, weight, ids = self.source.tensors(self.cursor, slot)
        counted = self._places < self._counts.index_select(0, self.cursor)
        weight = weight * counted
        keys = self._keys.index_select(0, self.cursor)[0]
        masks = self._fused(ids) if self.fused_masks and self._masks else None
        total, losses = self._objective(self._leaves, numeric, codes, target, weight, ids, keys, masks)
        gradients = torch.autograd.grad(total / self.plan.batch, self._leaves)
        with torch.no_grad():
            self._update(gradients, losses.detach(), total.detach(), weight, ids, counted)

    def _weighted_loss(
        self,
        leaves: Sequence[Tensor],
        numeric: Tensor,
        codes: Tensor,
        target: Tensor,
        weight: Tensor,
        ids: Tensor,
        keys: Tensor,
        masks: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """(sum of weight * loss, loss of each row)."""
        if masks is None and self.model.mask_widths:
            p = self.model.dropout
            masks = [
                dropout_mask(ids, width, keys[layer], p, self.kind, self._steps[layer])
                for layer, width in enumerate(self.model.mask_widths)
            ]
        logits = self.model.apply_weights(leaves, numeric, codes, masks)
        losses = LOSSES[self.plan.config.loss].row_losses(logits, target, self.plan.config)
        return (losses * weight).sum(), losses

    def _fused(self, ids: Tensor) -> list[Tensor]:
        """The masks by one kernel a layer, into buffers of their own."""
        words = torch.int16 if self.kind == torch.bfloat16 else torch.int32
        kept = torch.tensor(1.0 / (1.0 - self.model.dropout), dtype=torch.float32).to(self.kind).view(words).item()
        stream = _numba_stream() if self.device.type == "cuda" else 0
        for layer, mask in enumerate(self._masks):
            twins.dropout_mask(
                ids, self._keys, self.cursor, layer, self.model.dropout, int(kept), mask.view(words), stream
            )
        return self._masks

    def _update(
        self,
        gradients: Sequence[Tensor],
        losses: Tensor,
        total: Tensor,
        weight: Tensor,
        ids: Tensor,
        counted: Tensor,
    ) -> None:
        size, config = self.flat.size, self.plan.config
        self._gradient.zero_()  # the gaps between parameters must not keep the NaN of a skipped step
        torch._foreach_copy_(self._views, list(gradients))
        wrong = ~torch.isfinite(losses) & counted
        # A row of weight zero with an infinite loss makes the sum NaN although it is not counted as wrong.
        bad = torch.maximum(wrong.sum(), (~torch.isfinite(total)).to(torch.int64))
        self._gradient[size : size + 3] = torch.stack([total, weight.sum(), bad.to(torch.float32)])
        if self._reduce is not None:
            self._reduce(self._gradient)
        loss, weights, bad = self._gradient[size], self._gradient[size + 1], self._gradient[size + 2]
        scale = torch.where(weights > 0, self.plan.batch / weights, 0.0)
        gradient = self._gradient[:size]
        norm = scale * torch.linalg.vector_norm(gradient)
        factor = scale * (torch.clamp(config.clip / norm, max=1.0) if config.clip > 0 else 1.0)
        gradient.mul_(factor)
        broken = ((bad > 0) | ~torch.isfinite(norm)).to(torch.float32)
        skip = torch.maximum(torch.maximum(broken, self.halt), (weights <= 0).to(torch.float32))
        self._adamw(gradient, skip)
        named = torch.where(wrong, ids, -1).max().to(torch.float64)
        line = torch.stack([loss.double(), weights.double(), bad.double(), norm.double(), named, skip.double()])
        self.records.index_copy_(0, self.cursor, line[None])
        hashed = self._stream_hash(ids, counted)
        self.seen.index_copy_(0, self.cursor, hashed[None])
        if config.on_bad_loss == "stop":
            self.halt.copy_(torch.maximum(self.halt, broken))
        self.cursor.add_(1)

    def _stream_hash(self, ids: Tensor, counted: Tensor) -> Tensor:
        return stream_hash(ids, self._starts.index_select(0, self.cursor), counted)

    def _adamw(self, gradient: Tensor, skip: Tensor) -> None:
        """One update of the fp32 master weights, then of their bf16 copies; none where `skip` is 1."""
        self.optimizer.count.add_(1.0 - skip)
        torch._fused_adamw_(
            [self.flat.values],
            [gradient],
            [self.optimizer.exp_avg],
            [self.optimizer.exp_avg_sq],
            [],
            [self.optimizer.count],
            lr=self._rates.index_select(0, self.cursor)[0],
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=self.optimizer.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        if self._low:
            torch._foreach_copy_(self._low, self._full)


# ------------------------------------------------------------------------------------------------------------ runners


class Eager:
    """Launch by launch."""

    name = "eager"

    def __init__(self, step: DeviceStep) -> None:
        self._step = step

    def __call__(self, slot: int) -> None:
        """Run one step."""
        self._step.run(slot)


class CudaGraphs:
    """What `Graphed` asks of a device; a test has one of its own."""

    def warm_up(self, call: Callable[[], None], stream: Any = None) -> None:
        """Run on a side stream, as a capture needs it."""
        side = stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, call: Callable[[], None], earlier: Any = None, stream: Any = None) -> Any:
        """The captured work. It shares memory with an `earlier` capture, where the two never run at once.

        Captures that do run at once need a `stream` each: cuBLAS keeps its workspace by stream.
        """
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = earlier.pool() if earlier is not None else torch.cuda.graph_pool_handle()
        cause: Exception | None = None
        try:
            # thread_local: NCCL's watchdog and other threads may go on with their own work meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    call()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            # A capture that broke cannot be ended: torch says so in place of the cause, leaves the capture's stream current,
            # and its allocator, which believes that a capture goes on, keeps memory that streams have shared for ever.
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise cause or error from None
        return graph


class Graphed:
    """Captured once for each slot, then replayed. Warm-up and capture leave weights and optimizer as they were."""

    name = "graph"

    def __init__(self, step: DeviceStep, device: Any = None) -> None:
        device = device or CudaGraphs()
        self._graphs: list[Any] = []
        # Halted steps update nothing.
        step.halt.fill_(1.0)
        for slot in range(step.source.slots):
            step.cursor.zero_()

            def call(slot: int = slot) -> None:
                step.cursor.zero_()
                step.run(slot)

            device.warm_up(call)
            step.cursor.zero_()
            self._graphs.append(
                device.capture(lambda slot=slot: step.run(slot), self._graphs[0] if self._graphs else None)
            )
        step.cursor.zero_()
        step.halt.zero_()

    def __call__(self, slot: int) -> None:
        """Run one step."""
        self._graphs[slot].replay()


def make_runner(step: DeviceStep, wanted: str) -> tuple[Eager | Graphed, str]:
    """(runner, why it is not the one that was wanted, or nothing). A capture that fails leaves the eager step."""
    if step.device.type != "cuda" or wanted == "eager":
        return Eager(step), ""
    try:
        with warnings.catch_warnings():
            if wanted == "compile":
                # Its own modules use what torch deprecates, and it would rather have TF32, which is off on purpose.
                warnings.simplefilter("ignore")
                step.compile()
            return Graphed(step), ""
    except Exception as error:
        # Whatever the driver or a library says, the same step runs without a graph.
        step.halt.zero_()
        step.cursor.zero_()
        step.fused_masks = False
        step._objective = step._weighted_loss
        return Eager(step), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run_chunk(step: DeviceStep, runner: Callable[[int], None], chunk: Chunk) -> None:
    """Launch all steps of a chunk; nothing is waited for."""
    step.load(chunk)
    for place in range(chunk.steps):
        slot = step.source.before(place)
        runner(slot)
        step.source.after(place)
