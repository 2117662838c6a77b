"""Flat weights: all parameters in one buffer, so that a step has one gradient to exchange, one norm, one optimizer call."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.training.model import Network

LANE = 32  # elements; every parameter starts on a multiple of 64 bytes, in float32 and in bf16


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

    def matrices(self) -> dict[str, tuple[int, torch.Size]]:
        """(offset, shape) of the hidden matrices by name: those of two dimensions that are no part of a norm or an embedding, but
        for the last of the module, which makes the outputs.
        """
        spared = self.network.spared("matrices")
        found = [name for name, item in self.network.trained.items() if item.ndim == 2 and name not in spared][:-1]
        places = zip(self.names, self.offsets[:-1], self.shapes, strict=True)
        return {name: (offset, shape) for name, offset, shape in places if name in found}

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


def scale_and_clip(gradient: Tensor, scale: float, limit: float) -> float:
    """Multiply by `scale`, then clip the norm to `limit` (0 = no clipping), in place and in one pass; returns the norm
    before.
    """
    norm = scale * float(torch.linalg.vector_norm(gradient))
    factor = scale * (limit / norm if 0 < limit < norm else 1.0)
    if math.isfinite(factor) and factor != 1.0:
        gradient.mul_(factor)
    return norm
