"""Flat weights: all parameters in one buffer, so that a step has one gradient to exchange, one norm, one optimizer call."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.training.model import Network

LANE = 32  # elements; every parameter starts on a multiple of 64 bytes, in float32 and in bf16
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class FlatWeights:
    """The trained parameters of a network as views of one float32 buffer, with a bf16 copy of those that the precision keeps
    in bf16. The buffer lies on torch's default device.
    """

    def __init__(self, network: Network, precision: str, decay: str = "auto") -> None:
        """`decay`: what weight decay shrinks, as `train.decay` has it; those parameters lie first, up to `decayed`."""
        self.network, self.precision = network, precision
        self.arithmetic = network.arithmetic(precision)
        spared = network.spared(decay)
        parameters = dict(sorted(network.trained.items(), key=lambda item: item[0] in spared))
        self.names = list(parameters)
        self.shapes = [parameter.shape for parameter in parameters.values()]
        self.low = [name in self.arithmetic.low for name in self.names]
        self.offsets = [0]
        for shape in self.shapes:
            self.offsets.append(self.offsets[-1] + -(-shape.numel() // LANE) * LANE)
        self.size = self.offsets[-1]
        self.decayed = self.offsets[sum(name not in spared for name in self.names)]
        self.values = torch.zeros(self.size)
        self._low_values = torch.zeros(self.size if any(self.low) else 0, dtype=torch.bfloat16)
        for parameter, view in zip(parameters.values(), self.views(self.values), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.refresh()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a flat buffer, in its shape."""
        return [
            flat[start : start + shape.numel()].view(shape)
            for start, shape in zip(self.offsets[:-1], self.shapes, strict=True)
        ]

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint: `weights` and `buffer:<name>`, frozen parameters among them."""
        return {"weights": self.values, **{f"buffer:{name}": item for name, item in self.network.untrained.items()}}

    def best(self) -> dict[str, Tensor]:
        """A copy of the present weights and of the buffers that training changes, as `best_weights` and `best_buffer:<name>`."""
        kept = {"weights", *(f"buffer:{name}" for name in self.network.traits.buffers)}
        return {f"best_{name}": tensor.clone() for name, tensor in self.state().items() if name in kept}

    def load(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy the values of a `state`, or of `best` with the prefix `best_`; of the latter it may lack any."""
        for name, tensor in self.state().items():
            if not prefix or prefix + name in tensors:
                tensor.copy_(tensors[prefix + name])
        self.refresh()

    def refresh(self) -> None:
        """Update the bf16 copy."""
        for low, source, target in zip(self.low, self.views(self.values), self._low_views(), strict=True):
            if low:
                target.copy_(source)

    def _low_views(self) -> list[Tensor]:
        return self.views(self._low_values) if any(self.low) else self.views(self.values)

    def tensors(self) -> list[Tensor]:
        """Fresh tensors over the shared memory, each in the type that the precision computes with."""
        pairs = zip(self.low, self.views(self.values), self._low_views(), strict=True)
        return [(lower if low else full).detach() for low, full, lower in pairs]

    def named(self) -> dict[str, Tensor]:
        """`tensors` by name."""
        return dict(zip(self.names, self.tensors(), strict=True))

    def module(self, own_buffers: bool = True) -> tuple[nn.Module, list[nn.Parameter]]:
        """A module in training mode over the shared memory, and its trained parameters: one for each shard, so that threads
        share no autograd node.
        """
        module = self.network.bound(self.named(), self.precision, own_buffers).train()
        parameters = dict(module.named_parameters())
        return module, [parameters[name] for name in self.names]


class AdamW:
    """AdamW on one flat buffer: torch's fused kernel, called below `torch.optim` (whose constructor imports
    torch._dynamo, one second). Loshchilov, Hutter: Decoupled Weight Decay Regularization, ICLR 2019.
    """

    def __init__(self, size: int, weight_decay: float, decayed: int | None = None) -> None:
        """`decayed`: how many of the numbers, from the first on, weight decay shrinks; None: all."""
        last = size if decayed is None else decayed
        parts = ((slice(0, last), weight_decay), (slice(last, size), 0.0))
        self._parts = [(part, shrink) for part, shrink in parts if part.stop > part.start]
        self.exp_avg = torch.zeros(size)
        self.exp_avg_sq = torch.zeros(size)
        self.count = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint: moments [size] and the number of updates."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "count": self.count}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of a `state` into this one's memory."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """One update in place; none where `skip`, a number in the memory of the weights, is 1."""
        self.count.add_(1.0 if skip is None else 1.0 - skip)
        for part, shrink in self._parts:
            torch._fused_adamw_(
                [values[part]],
                [gradient[part]],
                [self.exp_avg[part]],
                [self.exp_avg_sq[part]],
                [],
                [self.count],
                lr=lr,
                beta1=BETA1,
                beta2=BETA2,
                weight_decay=shrink,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )


def scale_and_clip(gradient: Tensor, scale: float, limit: float) -> float:
    """Multiply by `scale`, then clip the norm to `limit` (0 = no clipping), in place and in one pass; returns the norm
    before.
    """
    norm = scale * float(torch.linalg.vector_norm(gradient))
    factor = scale * (limit / norm if 0 < limit < norm else 1.0)
    if math.isfinite(factor) and factor != 1.0:
        gradient.mul_(factor)
    return norm


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up over `warmup` of all steps, then half a cosine down to zero. Steps count from 0."""
    ramp = round(warmup * total)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(total - ramp, 1)))
