"""The GPU step, fixed work on fixed memory: gather, forward, backward, clip, update, sums of metrics.

Whatever differs between steps (rows, mask keys, learning rate, rows that count) is in tables on the device, and a cursor on the
device points to the next line. So a step is the same launches on the same addresses, without a value coming back: a CUDA
graph can hold all of it. Tables are filled for a chunk of steps at a time, and losses are read once a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.training.flat import FlatWeights
from engine.training.gpu.inputs import Chunk, Source, StepPlan, kernels_run
from engine.training.gpu.masks import TableMasks
from engine.training.gpu.order import stream_hash
from engine.training.objectives import Objective, bad_rows, row_losses
from engine.training.optimizers import Optimizer
from engine.training.randomness import backward_begins, drawn_from

TAIL = 32  # floats behind the flat gradient: loss, weight, bad rows; they are reduced in the same collective
LOSS, WEIGHT, BAD, NORM, NAMED, SKIPPED = range(6)  # columns of the records


class GpuStep:
    """Weights, optimizer and tables on one device, and the step over them.

    `reduce(gradient)` adds the flat gradient and its tail over the workers in place, in one collective; None for one worker.
    """

    def __init__(
        self,
        flat: FlatWeights,
        optimizer: Optimizer,
        source: Source,
        plan: StepPlan,
        objectives: tuple[Objective, ...],
        *,
        reduce: Callable[[Tensor], None] | None = None,
        fused_masks: bool | None = None,
    ) -> None:
        self.flat, self.optimizer, self.source, self.plan = flat, optimizer, source, plan
        self._objectives = objectives
        self.device = flat.values.device
        self._reduce = reduce
        self.module, self._leaves = flat.module(own_buffers=False)
        held = dict(self.module.named_buffers())
        self._buffers = [held[name] for name in flat.network.traits.buffers]
        self._before = [buffer.clone() for buffer in self._buffers]
        pairs = zip(flat.low, flat.tensors(), flat.views(flat.values), strict=True)
        low = [(copy, full) for is_low, copy, full in pairs if is_low]
        self._low, self._full = [pair[0] for pair in low], [pair[1] for pair in low]
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.halt = torch.zeros((), device=self.device)
        self.records = torch.zeros((plan.chunk, 6), dtype=torch.float64, device=self.device)
        self.seen = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._counts = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._starts = torch.zeros(plan.chunk, dtype=torch.int64, device=self.device)
        self._rates = torch.zeros(plan.chunk, device=self.device)
        self._keys = torch.zeros((plan.chunk, max(flat.network.mask_calls, 1)), dtype=torch.int64, device=self.device)
        self._places = torch.arange(plan.local, device=self.device)
        self._gradient = torch.zeros(flat.size + TAIL, device=self.device)
        self._views = flat.views(self._gradient[: flat.size])
        on_gpu = self.device.type == "cuda"
        self.fused_masks = (on_gpu and kernels_run()) if fused_masks is None else fused_masks
        self._steps: dict[int, Tensor] = {}  # of the words of a mask, by its width

    def reset(self) -> None:
        """Reset after a failed capture: the plain step, at the first line of the tables."""
        self.halt.zero_()
        self.cursor.zero_()
        self.fused_masks = False

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
        weight = weight * counted.view(-1, *[1] * (weight.dim() - 1))
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            kept.copy_(buffer)
        masks = TableMasks(ids, self._keys, self.cursor, self._steps, self.plan.rank, self.fused_masks)
        with drawn_from(masks):
            with self.flat.arithmetic.applied(self.device.type):
                logits = self.module(numeric, codes)
            losses = row_losses(self._objectives, logits, target, weight)
            total = (losses * weight).sum()
            backward_begins()
            gradients = torch.autograd.grad(total / self.plan.schedule.batch, self._leaves, allow_unused=True)
        with torch.no_grad():
            self._update(gradients, losses.detach(), total.detach(), weight, ids, counted)

    def _update(
        self,
        gradients: Sequence[Tensor | None],
        losses: Tensor,
        total: Tensor,
        weight: Tensor,
        ids: Tensor,
        counted: Tensor,
    ) -> None:
        size, config = self.flat.size, self.plan.schedule.config
        self._gradient.zero_()  # the gaps between parameters must not keep the NaN of a skipped step
        pairs = [(view, found) for view, found in zip(self._views, gradients, strict=True) if found is not None]
        torch._foreach_copy_([view for view, _ in pairs], [found for _, found in pairs])
        wrong = bad_rows(losses) & counted
        # A row of weight zero with an infinite loss makes the sum NaN although it is not counted as wrong.
        bad = torch.maximum(wrong.sum(), (~torch.isfinite(total)).to(torch.int64))
        self._gradient[size : size + 3] = torch.stack([total, weight.sum(), bad.to(torch.float32)])
        if self._reduce is not None:
            self._reduce(self._gradient)
        loss, weights, bad = self._gradient[size], self._gradient[size + 1], self._gradient[size + 2]
        scale = torch.where(weights > 0, self.plan.schedule.batch / weights, 0.0)
        gradient = self._gradient[:size]
        norm = scale * torch.linalg.vector_norm(gradient)
        factor = scale * (torch.clamp(config.clip / norm, max=1.0) if config.clip > 0 else 1.0)
        gradient.mul_(factor)
        broken = ((bad > 0) | ~torch.isfinite(norm)).to(torch.float32)
        skip = torch.maximum(torch.maximum(broken, self.halt), (weights <= 0).to(torch.float32))
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            buffer.copy_(torch.where(skip > 0, kept, buffer))
        self.optimizer.step(self.flat.values, gradient, self._rates.index_select(0, self.cursor)[0], skip)
        if self._low:
            torch._foreach_copy_(self._low, self._full)
        named = torch.where(wrong, ids, -1).max().to(torch.float64)
        line = torch.stack([loss.double(), weights.double(), bad.double(), norm.double(), named, skip.double()])
        self.records.index_copy_(0, self.cursor, line[None])
        hashed = stream_hash(ids, self._starts.index_select(0, self.cursor), counted)
        self.seen.index_copy_(0, self.cursor, hashed[None])
        if config.on_bad_loss == "stop":
            self.halt.copy_(torch.maximum(self.halt, broken))
        self.cursor.add_(1)
