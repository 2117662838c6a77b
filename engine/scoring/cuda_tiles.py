"""Scoring on a GPU: tiles of one shape, each slot with its own page-locked buffers, stream and captured forward pass.

While one slot computes, rows are copied in for the next and results out of the last. Buffers are allocated once. Every
tile has the same shape (the last is padded), so a row's bits do not depend on its neighbours. Without a GPU the same code
runs on the CPU, tile by tile, and is tested so.

Where Numba's kernels run, raw numbers are copied to the device once, and are encoded, scored and counted there
(`DeviceRows`). The CPU still does: texts of categories and their codes, counts of categories and predictions, and the
encoding of a model with a column of kind `normal`, whose logarithm differs in the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.training.device import prepare_backend
from engine.training.gpu.graphs import CudaGraphs
from engine.training.gpu.inputs import kernels_run, numba_stream
from engine.training.model import Network
from engine.training.predict import DEVICE_TILE_ROWS, Evaluators
from kernels import cuda as twins
from kernels.encode import NumericPlan
from kernels.profile import Profile, ProfilePlan

SLOTS = 3  # one copying in, one computing, one copying out


class Slot:
    """Buffers, stream and forward pass of one tile in progress."""

    def __init__(
        self, model: Network, evaluators: Evaluators, tile_rows: int, device: torch.device, graphs: Any
    ) -> None:
        on_gpu = device.type == "cuda"
        shapes = ((tile_rows, model.shape["numeric"]), (tile_rows, len(model.shape["cardinalities"])))
        kinds = (torch.float32, torch.int32)
        self.host = [torch.zeros(s, dtype=k, pin_memory=on_gpu) for s, k in zip(shapes, kinds, strict=True)]
        self.block = [torch.zeros(s, dtype=k, device=device) for s, k in zip(shapes, kinds, strict=True)]
        self.out = torch.zeros((tile_rows, *model.output_shape), device=device)
        self.host_out = torch.zeros((tile_rows, *model.output_shape), pin_memory=on_gpu)
        self.span = (0, 0)  # rows that it holds; empty when it is free
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.done = torch.cuda.Event() if on_gpu else None
        self.graph: Any = None

        module = evaluators.module()

        def forward() -> None:
            with evaluators.arithmetic.applied(device.type):
                self.out.copy_(module(*self.block))

        self.forward: Callable[[], None] = forward
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # which fills the buffers with zeros
        if graphs is not None:
            with torch.no_grad():
                graphs.warm_up(forward, self.stream)
                self.graph = graphs.capture(forward, None, self.stream)

    def send(self, numeric: NDArray[np.float32], codes: NDArray[np.int32], start: int, stop: int) -> None:
        """Copy rows [start, stop) in, compute, copy the results out; returns at once on a GPU."""
        count = stop - start
        for buffer, source in zip(self.host, (numeric, codes), strict=True):
            view = buffer.numpy()
            view[:count] = source[start:stop]
            view[count:] = 0
        self.span = (start, stop)
        if self.stream is None:
            self._launch()
            return
        with torch.cuda.stream(self.stream):
            self._launch()
            assert self.done is not None
            self.done.record()

    def _launch(self) -> None:
        for target, source in zip(self.block, self.host, strict=True):
            target.copy_(source, non_blocking=True)
        self.compute()
        self.host_out.copy_(self.out, non_blocking=True)

    def compute(self) -> None:
        """The forward pass over the device buffers."""
        if self.graph is not None:
            self.graph.replay()
        else:
            with torch.no_grad():
                self.forward()

    def collect(self, out: NDArray[np.float32]) -> None:
        """Wait for the results of the rows it holds, if any, and store them."""
        start, stop = self.span
        if stop > start:
            if self.done is not None:
                self.done.synchronize()
            out[start:stop] = self.host_out.numpy()[: stop - start]
        self.span = (0, 0)


class DeviceRows:
    """Raw numbers of rows on the device, with their encoded blocks and outputs in host memory."""

    def __init__(
        self, scorer: DeviceScorer, raw: Tensor, numeric: NDArray[np.float32], logits: NDArray[np.float32]
    ) -> None:
        self._scorer, self._raw, self.numeric, self.logits = scorer, raw, numeric, logits

    def count(self, plan: ProfilePlan, good: NDArray[np.bool_]) -> Profile:
        """The profile of the raw numbers of `good` rows, bool[n], counted on the device; equal to that of the CPU."""
        with self._scorer.lock:
            kept = self._raw if good.all() else self._raw[torch.from_numpy(good).to(self._raw.device)]
            profiler = twins.Profiler(plan, np.float64)
            profiler.add(kept, self._scorer.stream())
            self._scorer.wait()
            return profiler.result()


class DeviceScorer:
    """`logits(numeric, codes)` on a device; threads may share one and wait for each other."""

    def __init__(
        self,
        model: Network,
        precision: str,
        device: str = "cuda",
        tile_rows: int = DEVICE_TILE_ROWS,
        slots: int = SLOTS,
        graphs: Any = None,
        plan: NumericPlan | None = None,
        kernels: bool | None = None,
    ) -> None:
        """Graphs are captured on a GPU where that works (`graphs` replaces them in a test); `reason` says why not.

        `plan`: how raw numbers are encoded; `encodes` says whether that is done on the device, where `kernels` run (None:
        where they do on a GPU).
        """
        prepare_backend()
        self.model, self.tile_rows, self.device = model, tile_rows, torch.device(device)
        self._evaluators = Evaluators.of(model, precision, self.device)
        self.lock = threading.Lock()
        self.reason = ""
        if kernels is None:
            kernels = self.device.type == "cuda" and kernels_run()
        self._encoder, self.on_cpu = None, ""  # why rows are encoded and counted on the CPU
        if plan is not None and not kernels:
            self.on_cpu = twins.fault()
        elif plan is not None and not twins.encodes_as_cpu(plan):
            self.on_cpu = "features.encode.numeric=quantile ends in a logarithm, whose last bit differs on a GPU"
        elif plan is not None:
            self._encoder = twins.NumericEncoder(plan)
        if graphs is None and self.device.type == "cuda":
            graphs = CudaGraphs()
        try:
            self.slots = self._make(slots, graphs)
        except Exception as error:
            # If the driver or a library fails, the same pass runs without a graph.
            self.reason = f"{type(error).__name__}: {error}"
            self.slots = self._make(slots, None)

    def _make(self, count: int, graphs: Any) -> list[Slot]:
        # Each slot's graph has its own memory, because slots run concurrently.
        return [Slot(self.model, self._evaluators, self.tile_rows, self.device, graphs) for _ in range(count)]

    def logits(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[n, outputs] of encoded blocks float32[n, F] and int32[n, K] in host memory."""
        out = np.empty((len(numeric), *self.model.output_shape), np.float32)
        with self.lock:
            for index, start in enumerate(range(0, len(numeric), self.tile_rows)):
                slot = self.slots[index % len(self.slots)]
                slot.collect(out)
                slot.send(numeric, codes, start, min(start + self.tile_rows, len(numeric)))
            for slot in self.slots:
                slot.collect(out)
        return out

    @property
    def encodes(self) -> bool:
        """Whether rows are encoded and counted on the device."""
        return self._encoder is not None

    def stream(self) -> Any:
        """The stream that kernels are launched on."""
        return numba_stream() if self.device.type == "cuda" else 0

    def wait(self) -> None:
        """Wait until the device has finished the kernels that this thread launched."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def rows(self, values: NDArray[np.float64], codes: NDArray[np.int32]) -> DeviceRows:
        """Encode and score raw numbers float64[n, k] and codes int32[n, K]; only where it `encodes`."""
        assert self._encoder is not None
        count, tiles = len(values), -(-len(values) // self.tile_rows)
        with self.lock, torch.no_grad():
            raw = torch.from_numpy(values).to(self.device)
            numeric = torch.zeros((tiles * self.tile_rows, self.model.shape["numeric"]), device=self.device)
            keys = torch.zeros((len(numeric), codes.shape[1]), dtype=torch.int32, device=self.device)
            out = torch.empty((len(numeric), *self.model.output_shape), device=self.device)
            keys[:count].copy_(torch.from_numpy(codes))
            self._encoder.encode(raw, numeric[:count], self.stream())
            self.resident_logits(numeric, keys, out)
            return DeviceRows(self, raw, numeric[:count].cpu().numpy(), out[:count].cpu().numpy())

    def resident_logits(self, numeric: Tensor, codes: Tensor, out: Tensor) -> None:
        """Raw outputs of blocks on the device, whole tiles only, into `out` [n, outputs]; returns without waiting."""
        assert len(numeric) % self.tile_rows == 0, "blocks on the device are cut into whole tiles"
        slot = self.slots[0]
        for start in range(0, len(numeric), self.tile_rows):
            stop = start + self.tile_rows
            slot.block[0].copy_(numeric[start:stop])
            slot.block[1].copy_(codes[start:stop])
            slot.compute()
            out[start:stop].copy_(slot.out)
        if slot.stream is not None:
            slot.stream.wait_stream(torch.cuda.current_stream())  # the buffers are in use until then
