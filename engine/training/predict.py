"""Prediction: raw outputs of a model for any number of rows, in tiles of one shape.

Matrix kernels choose their path by shape, and paths round differently. So every tile is padded to `tile_rows`, is in
an aligned buffer and runs on one thread. So a row's bits do not depend on its neighbours, the number of rows or of
threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.errors import UserError
from engine.training.examples import aligned_empty
from engine.training.model import Network
from engine.training.threads import Team

TILE_ROWS = 1024  # activations of a 256-wide layer fit in a core's cache
DEVICE_TILE_ROWS = 32_768  # of a tile on a GPU, which small tiles leave idle


class _Tile(threading.local):
    """One thread's input buffers."""

    def __init__(self, rows: int, width: int, columns: int) -> None:
        self.numeric = aligned_empty((rows, width), np.float32)
        self.codes = aligned_empty((rows, columns), np.int32)
        self.tensors = torch.from_numpy(self.numeric), torch.from_numpy(self.codes)


class Evaluators:
    """Modules in evaluation mode over the same weights, one for each thread that computes at the same time."""

    def __init__(self, network: Network, tensors: Mapping[str, Tensor], precision: str) -> None:
        """`tensors`: the trained parameters by name, in the types and on the device that the precision computes with."""
        self.network, self._precision = network, precision
        self.arithmetic = network.arithmetic(precision)
        self._tensors = tensors
        self._idle: list[nn.Module] = []
        self._differentiated: list[nn.Module] = []  # apart: what a module keeps from inference mode has no gradients

    @classmethod
    def of(cls, network: Network, precision: str, device: torch.device | str = "cpu") -> Evaluators:
        """Over a copy of the network's present weights, in 64-byte aligned memory."""
        low = network.arithmetic(precision).low
        copies = {
            name: tensor.detach().to(device, torch.bfloat16 if name in low else torch.float32, copy=True)
            for name, tensor in network.trained.items()
        }
        return cls(network, copies, precision)

    def module(self) -> nn.Module:
        """A module of one's own."""
        return self.network.bound(self._tensors, self._precision).eval()

    def __call__(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Raw outputs float32[n, ...] of blocks on the device of the weights."""
        try:
            module = self._idle.pop()  # one step under the interpreter lock
        except IndexError:
            module = self.module()
        with torch.inference_mode(), self.arithmetic.applied(numeric.device.type):
            found = module(numeric, codes).float()
        self._idle.append(module)
        return found

    def gradients(self, numeric: Tensor, codes: Tensor, share: Tensor) -> Tensor:
        """float32[n, F]: gradients by the numbers of each row's sum of raw outputs times its share float32[n, outputs].

        Of several members the mean of their outputs. Raises UserError for a module that has no gradients.
        """
        try:
            module = self._differentiated.pop()
        except IndexError:
            module = self.module()
        with torch.inference_mode(False), torch.enable_grad(), self.arithmetic.applied(numeric.device.type):
            given = numeric.requires_grad_()
            found = module(given, codes).float()
            outputs = found.mean(1) if found.dim() == 3 else found
            try:
                (gradient,) = torch.autograd.grad(outputs, given, share, allow_unused=True)
            except RuntimeError as error:
                said = str(error).splitlines()[0]
                raise UserError(
                    f"the model gives no reasons, because it has no gradients by its numbers: {said}"
                ) from None
        self._differentiated.append(module)
        return torch.zeros_like(numeric) if gradient is None else gradient

    def logits(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        tile_rows: int = TILE_ROWS,
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float32]:
        """float32[n, outputs], or [n, members, outputs], by the present weights: logits, or values in the target's unit.

        Shape: numeric float32[n, F], codes int32[n, K]. `team`: a running thread team to use.
        """
        if team is None:
            with Team(threads) as own:
                return self.logits(numeric, codes, tile_rows, threads, own)
        out = np.empty((len(numeric), *self.network.output_shape), np.float32)
        tile = _Tile(tile_rows, numeric.shape[1], codes.shape[1])

        def run(index: int) -> None:
            start, stop = index * tile_rows, min((index + 1) * tile_rows, len(numeric))
            count = stop - start
            for buffer, source in ((tile.numeric, numeric), (tile.codes, codes)):
                buffer[:count] = source[start:stop]
                buffer[count:] = 0
            out[start:stop] = self(*tile.tensors).numpy()[:count]

        team.run(run, -(-len(numeric) // tile_rows))
        return out
