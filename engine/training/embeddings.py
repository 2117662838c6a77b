"""Embeddings of numbers: each number becomes a vector before the first layer of a network.

Both are those of `rtdl_num_embeddings` (Gorishniy et al., On embeddings for numerical features in tabular deep learning, 2022;
version B of Gorishniy et al., TabM, 2024), to which the tests compare them. Here all sizes follow from the settings, so that a
model is described, and its size limited, before its tensors have memory; and a scoring machine needs no other package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NONE, PLE, PERIODIC = "none", "ple", "periodic"
MOST_ROWS = 2**18  # that quantiles are taken of
FREQUENCY_SCALE = 0.01  # standard deviation of the first frequencies, cut at three
UNBOUNDED = float(np.finfo(np.float32).max)


def bins_of(numeric: NDArray[np.float32], bins: int) -> dict[str, NDArray[np.float32]]:
    """Arrays of PiecewiseLinear from training rows float32[n, F]: `slope` and `offset` float32[F, bins], `least` float32[F].

    Edges are the quantiles of at most MOST_ROWS evenly spaced rows, equal ones once. The first bins of a column come first,
    its last one last, and zeros lie between where it has fewer.
    """
    rows, columns = numeric.shape
    sample = numeric[np.linspace(0, rows - 1, min(rows, MOST_ROWS)).astype(np.int64)] if rows else numeric
    slope, offset = np.zeros((2, columns, bins), np.float32)
    least = np.zeros(columns, np.float32)
    levels = np.linspace(0.0, 1.0, bins + 1)
    for column in range(columns if rows else 0):
        edges = np.unique(np.quantile(sample[:, column].astype(np.float64), levels).astype(np.float32))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            steep = np.float32(1.0) / np.diff(edges)
            shift = -edges[:-1] * steep
        kept = np.isfinite(steep) & np.isfinite(shift)
        steep, shift = steep[kept], shift[kept]
        if not len(steep):
            continue
        for target, values in ((slope, steep), (offset, shift)):
            target[column, : len(values) - 1], target[column, -1] = values[:-1], values[-1]
        if len(steep) == 1:
            least[column] = -UNBOUNDED  # a single bin is scaling to its two ends, beyond them too
    return {"slope": slope, "offset": offset, "least": least}


class PiecewiseLinear(nn.Module):
    """A linear embedding plus one of how far the number has come in each bin, which starts at zero."""

    slope: Tensor
    offset: Tensor
    least: Tensor

    def __init__(self, columns: int, fitted: Mapping[str, NDArray[Any]], bins: int, width: int) -> None:
        """`fitted`: the arrays of `bins_of`; where it is empty the bins are zeros until a state is loaded."""
        super().__init__()
        for name, shape in (("slope", (columns, bins)), ("offset", (columns, bins)), ("least", (columns,))):
            self.register_buffer(name, torch.tensor(fitted[name]) if name in fitted else torch.zeros(shape))
        self.weight, self.bias = (nn.Parameter(_uniform((columns, width), 1.0 / math.sqrt(width))) for _ in range(2))
        self.steps = nn.Parameter(torch.zeros(columns, bins, width))

    def embed(self, x: Tensor) -> Tensor:
        """Shape: float32[n, F] -> [n, F, width]."""
        come = torch.addcmul(self.offset, self.slope, x[..., None])
        if come.shape[-1] > 1:
            first, middle = come[..., :1].clamp_max(1.0), come[..., 1:-1].clamp(0.0, 1.0)
            come = torch.cat([first, middle, torch.maximum(come[..., -1:], self.least[:, None])], dim=-1)
        steps = torch.bmm(come.transpose(0, 1), self.steps).transpose(0, 1)
        return torch.addcmul(self.bias, self.weight, x[..., None]) + steps


class Periodic(nn.Module):
    """Sines and cosines of learned frequencies of a number, a linear layer of its own for each number, and ReLU."""

    def __init__(self, columns: int, frequencies: int, width: int) -> None:
        super().__init__()
        first = torch.empty(columns, frequencies)
        if not first.is_meta:
            nn.init.trunc_normal_(first, 0.0, FREQUENCY_SCALE, -3 * FREQUENCY_SCALE, 3 * FREQUENCY_SCALE)
        self.frequencies = nn.Parameter(first)
        bound = 1.0 / math.sqrt(2 * frequencies)
        self.weight = nn.Parameter(_uniform((columns, 2 * frequencies, width), bound))
        self.bias = nn.Parameter(_uniform((columns, width), bound))

    def embed(self, x: Tensor) -> Tensor:
        """Shape: float32[n, F] -> [n, F, width]."""
        turns = 2 * math.pi * self.frequencies * x[..., None]
        waves = torch.cat([torch.cos(turns), torch.sin(turns)], dim=-1)
        return torch.relu(torch.bmm(waves.transpose(0, 1), self.weight).transpose(0, 1) + self.bias)


def embedding_of(
    how: str, columns: int, fitted: Mapping[str, NDArray[Any]], bins: int, width: int
) -> PiecewiseLinear | Periodic | None:
    """The embedding of a setting: none, ple or periodic; None also where there is no number. `bins`: those, or frequencies."""
    if how == NONE or not columns:
        return None
    return PiecewiseLinear(columns, fitted, bins, width) if how == PLE else Periodic(columns, bins, width)


def _uniform(shape: tuple[int, ...], bound: float) -> Tensor:
    drawn = torch.empty(shape)
    return drawn if drawn.is_meta else drawn.uniform_(-bound, bound)
