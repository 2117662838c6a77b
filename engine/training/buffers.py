"""Buffers that training changes, such as the running statistics of batch normalisation.

Every shard's module begins a step with the network's values. After it the network has, of numbers with a fraction, the mean over
the shards, summed in the tree that sums their gradients; of others those of the first shard. A skipped step changes none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.training.exchange import Exchange
from engine.training.model import Network


class Buffers:
    """The changing buffers of a network and of the modules of a worker's shards; `size` float32 numbers a shard are summed."""

    def __init__(self, network: Network) -> None:
        held = dict(network.module.named_buffers())
        self._values = {name: held[name] for name in network.traits.buffers}
        self._floats = [name for name, tensor in self._values.items() if tensor.is_floating_point()]
        self._others = [name for name in self._values if name not in self._floats]
        self.size = sum(self._values[name].numel() for name in self._floats)

    def store(self, module: nn.Module, into: Tensor) -> None:
        """Write what is summed of a shard's module to float32[size]."""
        if self.size:
            held = dict(module.named_buffers())
            torch.cat([held[name].reshape(-1) for name in self._floats], out=into)

    def combine(self, total: Tensor, shards: int, first: nn.Module | None, exchange: Exchange) -> None:
        """Take the sum float32[size] over `shards` shards and the other buffers of `first`, the module of shard 0, which one
        worker has. Collective.
        """
        if self.size and shards:
            ends = torch.split(total / shards, [self._values[name].numel() for name in self._floats])
            for name, part in zip(self._floats, ends, strict=True):
                self._values[name].copy_(part.view_as(self._values[name]))
        if self._others:
            held = self._values if first is None else dict(first.named_buffers())
            block = torch.cat([held[name].reshape(-1).to(torch.int64) for name in self._others])
            parts = torch.split(exchange.gather(block[None])[0, 0], [self._values[n].numel() for n in self._others])
            for name, part in zip(self._others, parts, strict=True):
                self._values[name].copy_(part.view_as(self._values[name]))

    def restore(self, modules: Sequence[nn.Module]) -> None:
        """Give modules the network's values."""
        for module in modules if self._values else ():
            held = dict(module.named_buffers())
            for name, value in self._values.items():
                held[name].copy_(value)
