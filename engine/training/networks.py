"""The built-in networks: plain torch modules, made from a shape and settings like those of a plug-in.

Their weights are drawn in the order of the code below from torch's default generator, and their names are those of the files
that hold them: both are fixed for ever.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.runtime.records import Within
from engine.training.embeddings import NONE, PLE, bins_of, embedding_of

WIDEST = 2**20  # columns, units of a layer, outputs
MOST_BINS, MOST_MEMBERS = 2**12, 2**10
Width = Annotated[int, Within(1, WIDEST)]
Fitted = Mapping[str, NDArray[Any]]


class Shape(TypedDict):
    """What a network is made for: numbers and cardinalities of the codes of a row, and raw outputs."""

    numeric: int
    cardinalities: list[int]
    outputs: int


class NumberSettings(TypedDict, total=False):
    """How numbers are embedded; absent where they are not, as in models before there was a choice."""

    embeddings: Literal["none", "ple", "periodic"]
    bins: Annotated[int, Within(1, MOST_BINS)]
    embedding_width: Annotated[int, Within(1, MOST_BINS)]


class MlpSettings(NumberSettings):
    """The settings of an Mlp, and of its wide and deep relative."""

    hidden: list[Width]
    dropout: Annotated[float, Within(0, 1)]
    embedding_max: Width


class TabMSettings(MlpSettings):
    """The settings of a TabM."""

    members: Annotated[int, Within(1, MOST_MEMBERS)]


class LinearSettings(TypedDict):
    """The settings of a linear model: none."""


class Inputs(nn.Module):
    """What the first layer of a network reads: numbers, embedded or as they are, and embeddings of the codes."""

    def __init__(
        self,
        shape: Shape,
        fitted: Fitted,
        embedding_max: int,
        embeddings: str = NONE,
        bins: int = 48,
        embedding_width: int = 16,
    ) -> None:
        super().__init__()
        sizes, columns = shape["cardinalities"], shape["numeric"]
        widths = [embedding_width_of(size, embedding_max) for size in sizes]
        self.embeddings = nn.ParameterList(_table(*pair) for pair in zip(sizes, widths, strict=True))
        self.numbers = embedding_of(embeddings, columns, fitted, bins, embedding_width)
        each = 1 if self.numbers is None else embedding_width
        self.chunks = [*([each] * columns), *widths]  # the width of each feature

    @staticmethod
    def fit(
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],  # noqa: ARG004
        target: NDArray[Any],  # noqa: ARG004
        settings: Mapping[str, Any],
    ) -> dict[str, NDArray[np.float32]]:
        """The bins of piecewise-linear embeddings, from training rows float32[n, F]; nothing for others."""
        return bins_of(numeric, settings["bins"]) if settings.get("embeddings") == PLE else {}

    def read(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, sum of chunks].

        No `forward`: bf16 leaves the layer that is called last in float32, which the callers' output layers are by themselves.
        """
        parts = [F.embedding(codes[:, k], table) for k, table in enumerate(self.embeddings)]
        if self.numbers is not None:
            numeric = self.numbers.embed(numeric).flatten(1)
        return torch.cat([numeric, *parts], dim=1) if parts else numeric


class Mlp(Inputs):
    """A multilayer perceptron: embeddings and numbers, hidden layers of linear, ReLU and dropout, a linear output."""

    def __init__(
        self,
        shape: Shape,
        fitted: Fitted,
        hidden: Sequence[int] = (256, 256, 256),
        dropout: float = 0.1,
        embedding_max: int = 32,
        **numbers: Any,
    ) -> None:
        super().__init__(shape, fitted, embedding_max, **numbers)
        self.dropout = dropout
        layers = [_layer(b, a) for a, b in itertools.pairwise([sum(self.chunks), *hidden, shape["outputs"]])]
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)

    def no_weight_decay(self) -> set[str]:
        """The embeddings."""
        return {f"embeddings.{k}" for k in range(len(self.embeddings))}

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, outputs]."""
        x = self.read(numeric, codes)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for layer in hidden:
            x = F.dropout(F.relu(F.linear(x, *layer), inplace=True), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight, bias)


class TabM(Inputs):
    """TabM-mini (Gorishniy et al., TabM, 2024): members share all hidden layers, and differ by a scale of each input and by their
    output layers. As in the package `tabm`, but codes are embedded, not one-hot: wide categories would be multiplied by members.
    """

    def __init__(
        self,
        shape: Shape,
        fitted: Fitted,
        hidden: Sequence[int] = (512, 512),
        dropout: float = 0.1,
        embedding_max: int = 32,
        members: int = 32,
        **numbers: Any,
    ) -> None:
        super().__init__(shape, fitted, embedding_max, **numbers)
        self.dropout = dropout
        self.scales = nn.Parameter(_scales(members, self.chunks, self.numbers is not None))
        layers = [_layer(b, a) for a, b in itertools.pairwise([sum(self.chunks), *hidden])]
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)
        last, outputs = [sum(self.chunks), *hidden][-1], shape["outputs"]
        self.weight, self.bias = (
            nn.Parameter(_uniform(size, last)) for size in ((members, last, outputs), (members, 1, outputs))
        )

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, members, outputs]."""
        x = self.read(numeric, codes)[:, None] * self.scales
        for layer in zip(self.weights, self.biases, strict=True):
            x = F.dropout(F.relu(F.linear(x, *layer), inplace=True), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return torch.baddbmm(self.bias, x.float().transpose(0, 1), self.weight).transpose(0, 1)


class WideAndDeep(nn.Module):
    """The sum of a linear model and an Mlp (Cheng et al., Wide & deep learning, 2016), without crossed categories."""

    fit = Inputs.fit

    def __init__(self, shape: Shape, fitted: Fitted, **settings: Any) -> None:
        super().__init__()
        self.wide, self.deep = Linear(shape, fitted), Mlp(shape, fitted, **settings)

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, outputs]."""
        return self.wide.forward(numeric, codes) + self.deep.forward(numeric, codes)


class Linear(nn.Module):
    """A weight per number and per category: logistic, softmax or linear regression."""

    def __init__(self, shape: Shape, fitted: Fitted) -> None:  # noqa: ARG002
        super().__init__()
        self.embeddings = nn.ParameterList(_table(size, shape["outputs"]) for size in shape["cardinalities"])
        weight, bias = _layer(shape["outputs"], shape["numeric"])
        self.weights, self.biases = nn.ParameterList([weight]), nn.ParameterList([bias])

    def no_weight_decay(self) -> set[str]:
        """The weights of categories."""
        return {f"embeddings.{k}" for k in range(len(self.embeddings))}

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, outputs]."""
        with torch.autocast(numeric.device.type, enabled=False):
            x = F.linear(numeric.float(), self.weights[0], self.biases[0])
            for k, table in enumerate(self.embeddings):
                x = x + F.embedding(codes[:, k], table)
            return x


def embedding_width_of(cardinality: int, widest: int) -> int:
    """1.6 * cardinality ** 0.56, at most `widest` (rule of the fastai tabular models)."""
    return int(max(1, min(widest, round(1.6 * cardinality**0.56))))


def _table(size: int, width: int) -> Tensor:
    """[size, width] of N(0, 0.1)."""
    table = torch.empty(size, width)
    return table if table.is_meta else table.normal_(0.0, 0.1)  # where nothing is to draw, torch imports its compiler


def _layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias [outputs] as torch's own linear layers."""
    return _uniform((outputs, inputs), inputs), _uniform((outputs,), inputs)


def _uniform(size: tuple[int, ...], inputs: int) -> Tensor:
    """U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound, drawn = 1.0 / math.sqrt(max(inputs, 1)), torch.empty(size)
    return drawn if drawn.is_meta else drawn.uniform_(-bound, bound)


def _scales(members: int, chunks: Sequence[int], embedded: bool) -> Tensor:
    """[members, sum of chunks]: one number for a feature and a member, N(0, 1) where numbers are embedded, else -1 or 1."""
    drawn = torch.empty(members, len(chunks))
    if drawn.is_meta:
        return torch.empty(members, sum(chunks))
    drawn = drawn.normal_() if embedded else drawn.bernoulli_(0.5).mul_(2.0).sub_(1.0)
    return drawn.repeat_interleave(torch.tensor(chunks), dim=1)
