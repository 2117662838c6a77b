"""Prediction: raw outputs of a model for any number of rows, in tiles of one shape.

Matrix kernels choose their path by shape, and paths round differently. So every tile is padded to `tile_rows`, is in
an aligned buffer and runs on one thread. So a row's bits do not depend on its neighbours, the number of rows or of
threads.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.training.examples import aligned_empty
from engine.training.model import Network
from engine.training.threads import Team

TILE_ROWS = 1024  # activations of a 256-wide layer fit in a core's cache
DEVICE_TILE_ROWS = 32_768  # of a tile on a GPU, which small tiles leave idle


def inference_weights(model: Network, precision: str) -> list[Tensor]:
    """The parameters in the types that the precision computes with, in 64-byte aligned memory."""
    pairs = zip(model.parameters(), model.low_precision, strict=True)
    return [
        parameter.detach().to(torch.bfloat16 if low and precision == "bf16" else torch.float32, copy=True)
        for parameter, low in pairs
    ]


class _Tile(threading.local):
    """One thread's input buffers."""

    def __init__(self, rows: int, width: int, columns: int) -> None:
        self.numeric = aligned_empty((rows, width), np.float32)
        self.codes = aligned_empty((rows, columns), np.int32)
        self.tensors = torch.from_numpy(self.numeric), torch.from_numpy(self.codes)


def predict_logits(
    model: Network,
    numeric: NDArray[np.float32],
    codes: NDArray[np.int32],
    precision: str,
    tile_rows: int = TILE_ROWS,
    threads: int = 1,
    team: Team | None = None,
) -> NDArray[np.float32]:
    """float32[n, outputs] from numeric float32[n, F] and codes int32[n, K]: logits, or values in the target's unit.

    `team`: a running thread team to use.
    """
    if team is None:
        with Team(threads) as own:
            return predict_logits(model, numeric, codes, precision, tile_rows, threads, own)
    weights = inference_weights(model, precision)
    out = np.empty((len(numeric), model.outputs), np.float32)
    tile = _Tile(tile_rows, numeric.shape[1], codes.shape[1])

    def run(index: int) -> None:
        start, stop = index * tile_rows, min((index + 1) * tile_rows, len(numeric))
        count = stop - start
        for buffer, source in ((tile.numeric, numeric), (tile.codes, codes)):
            buffer[:count] = source[start:stop]
            buffer[count:] = 0
        with torch.inference_mode():
            logits = model.apply_weights(weights, *tile.tensors, None).float().numpy()
        out[start:stop] = logits[:count]

    team.run(run, -(-len(numeric) // tile_rows))
    return out
