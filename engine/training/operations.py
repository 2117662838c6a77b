"""The operations of a module, observed as they reach their kernels, and how much a forward pass multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.training.randomness import AllKept, drawn_from

aten = torch.ops.aten


class Observer(TorchDispatchMode):
    """Sees each operation of its thread within `with`: `seen(operation, arguments, keywords, result)`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; to skip its compiler, torch would import it, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen(func, args, kwargs or {}, out)
        return out

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Called after each operation."""
        raise NotImplementedError


# Multiply-adds of an operation by its result and first arguments.
COUNTED: dict[Any, Callable[..., int]] = {
    aten.mm.default: lambda out, left, *_: out.numel() * left.shape[-1],
    aten.bmm.default: lambda out, left, *_: out.numel() * left.shape[-1],
    aten.addmm.default: lambda out, _, left, *__: out.numel() * left.shape[-1],
    aten.baddbmm.default: lambda out, _, left, *__: out.numel() * left.shape[-1],
    aten.convolution.default: lambda out, _, kernel, *__: out.numel() * kernel[0].numel(),
    # an LSTM on the CPU: steps [time, batch, width]
    aten.mkldnn_rnn_layer.default: lambda _, steps, *weights: (
        steps.shape[0] * steps.shape[1] * (weights[0].numel() + weights[1].numel())
    ),
}


class _Count(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG002
        """See Observer."""
        if func in COUNTED:
            self.total += COUNTED[func](out, *args)


def multiply_adds(module: nn.Module, numeric: Tensor, codes: Tensor) -> float:
    """Multiply-adds a row, in matrix products, convolutions and cells of a forward pass; at least one for each parameter.

    What torch has for this (torch.utils.flop_counter) imports its compiler, and misses an LSTM on the CPU.
    """
    with drawn_from(AllKept()), _Count() as count:
        module(numeric, codes)
    return max(count.total / len(numeric), float(sum(item.numel() for item in module.parameters())))
