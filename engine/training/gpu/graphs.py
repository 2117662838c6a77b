"""Launches GPU steps: one by one (`eager`), or from a CUDA graph per input slot (`graph`). Both run the same function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from engine.training.gpu.inputs import Chunk
from engine.training.gpu.step import GpuStep

Runner = Callable[[int], None]  # runs one step over an input slot
WARM_UP = 3  # steps that run before a capture, so that libraries allocate what they need


class CudaGraphs:
    """The device operations of `Graphed`; tests replace them."""

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
            # thread_local: NCCL's watchdog and other threads may continue their own work meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    call()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            # A failed capture cannot be ended: torch reports that instead of the cause and leaves the capture's stream current;
            # its allocator, which assumes that the capture continues, keeps memory shared by streams for ever.
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise cause or error from None
        return graph


class Graphed:
    """Captured once for each slot, then replayed. Warm-up and capture leave weights and optimizer as they were."""

    def __init__(self, step: GpuStep, device: Any = None) -> None:
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


def make_runner(step: GpuStep, wanted: str) -> tuple[Runner, str, str]:
    """(runner, its name, why it is not the requested one, or ""). A capture that fails leaves the eager step."""
    if step.device.type != "cuda" or wanted == "eager":
        return step.run, "eager", ""
    try:
        return Graphed(step), "graph", ""
    except Exception as error:
        # If the driver or a library fails, the same step runs without a graph.
        step.reset()
        return step.run, "eager", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run_chunk(step: GpuStep, runner: Runner, chunk: Chunk) -> None:
    """Launch all steps of a chunk without waiting."""
    step.load(chunk)
    for place in range(chunk.steps):
        slot = step.source.before(place)
        runner(slot)
        step.source.after(place)
