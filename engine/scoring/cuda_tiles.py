"""Scores on a GPU: tiles of one shape, each slot with its own page-locked buffers, stream and captured forward pass.

While one slot computes, the next one's rows are copied in and the last one's results out. Buffers are allocated once. Every
tile has the same shape (the last is padded), so a row's bits do not depend on its neighbours. Without a GPU the same code
runs on the CPU, tile by tile: that is how the suite tests it.
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
from engine.training.model import Network
from engine.training.predict import DEVICE_TILE_ROWS, inference_weights

SLOTS = 3  # one copying in, one computing, one copying out


class Slot:
    """Buffers, stream and forward pass of one tile under way."""

    def __init__(
        self, model: Network, weights: list[Tensor], tile_rows: int, device: torch.device, graphs: Any
    ) -> None:
        on_gpu = device.type == "cuda"
        shapes = ((tile_rows, model.numeric_width), (tile_rows, len(model.cardinalities)))
        kinds = (torch.float32, torch.int32)
        self.host = [torch.zeros(s, dtype=k, pin_memory=on_gpu) for s, k in zip(shapes, kinds, strict=True)]
        self.block = [torch.zeros(s, dtype=k, device=device) for s, k in zip(shapes, kinds, strict=True)]
        self.out = torch.zeros((tile_rows, model.outputs), device=device)
        self.host_out = torch.zeros((tile_rows, model.outputs), pin_memory=on_gpu)
        self.span = (0, 0)  # rows that it holds; empty when it is free
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.done = torch.cuda.Event() if on_gpu else None
        self.graph: Any = None

        def forward() -> None:
            self.out.copy_(model.apply_weights(weights, self.block[0], self.block[1], None))

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
        """The forward pass over what the device buffers hold."""
        if self.graph is not None:
            self.graph.replay()
        else:
            with torch.no_grad():
                self.forward()

    def collect(self, out: NDArray[np.float32]) -> None:
        """Wait for the results of the rows it holds, if any, and put them in their place."""
        start, stop = self.span
        if stop > start:
            if self.done is not None:
                self.done.synchronize()
            out[start:stop] = self.host_out.numpy()[: stop - start]
        self.span = (0, 0)


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
    ) -> None:
        """Graphs are captured on a GPU where that works (`graphs` stands in for them in a test); `reason` says why not."""
        prepare_backend()
        self.model, self.tile_rows, self.device = model, tile_rows, torch.device(device)
        self._weights = [weight.to(self.device) for weight in inference_weights(model, precision)]
        self._lock = threading.Lock()
        self.reason = ""
        if graphs is None and self.device.type == "cuda":
            graphs = CudaGraphs()
        try:
            self.slots = self._make(slots, graphs)
        except Exception as error:
            # Whatever the driver or a library says, the same pass runs without a graph.
            self.reason = f"{type(error).__name__}: {error}"
            self.slots = self._make(slots, None)

    def _make(self, count: int, graphs: Any) -> list[Slot]:
        # Each slot's graph has memory of its own: slots run at once.
        return [Slot(self.model, self._weights, self.tile_rows, self.device, graphs) for _ in range(count)]

    def logits(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32[n, outputs] of encoded blocks float32[n, F] and int32[n, K] in host memory."""
        out = np.empty((len(numeric), self.model.outputs), np.float32)
        with self._lock:
            for index, start in enumerate(range(0, len(numeric), self.tile_rows)):
                slot = self.slots[index % len(self.slots)]
                slot.collect(out)
                slot.send(numeric, codes, start, min(start + self.tile_rows, len(numeric)))
            for slot in self.slots:
                slot.collect(out)
        return out

    def resident_logits(self, numeric: Tensor, codes: Tensor, out: Tensor) -> None:
        """Raw outputs of blocks that lie on the device, whole tiles only, into `out` [n, outputs]; waits for nothing."""
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
