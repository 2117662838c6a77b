"""The built-in networks: plain torch modules, made from a shape and settings like those of a plug-in.

Their weights are drawn in the order of the code below from torch's default generator, and their names are those of the files
that hold them: both are fixed for ever.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.runtime.records import Within

WIDEST = 2**20  # columns, units of a layer, outputs
Width = Annotated[int, Within(1, WIDEST)]
Fitted = Mapping[str, NDArray[Any]]


class Shape(TypedDict):
    """What a network is made for: numbers and cardinalities of the codes of a row, and raw outputs."""

    numeric: int
    cardinalities: list[int]
    outputs: int


class MlpSettings(TypedDict):
    """The settings of an Mlp."""

    hidden: list[Width]
    dropout: Annotated[float, Within(0, 1)]
    embedding_max: Width


class LinearSettings(TypedDict):
    """The settings of a linear model: none."""


class Mlp(nn.Module):
    """A multilayer perceptron: embeddings and numbers, hidden layers of linear, ReLU and dropout, a linear output."""

    def __init__(
        self,
        shape: Shape,
        fitted: Fitted,  # noqa: ARG002
        hidden: Sequence[int] = (256, 256, 256),
        dropout: float = 0.1,
        embedding_max: int = 32,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        sizes = shape["cardinalities"]
        widths = [embedding_width(size, embedding_max) for size in sizes]
        self.embeddings = nn.ParameterList(_table(*pair) for pair in zip(sizes, widths, strict=True))
        edges = [shape["numeric"] + sum(widths), *hidden, shape["outputs"]]
        layers = [_layer(b, a) for a, b in itertools.pairwise(edges)]
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)

    def no_weight_decay(self) -> set[str]:
        """The embeddings."""
        return {f"embeddings.{k}" for k in range(len(self.embeddings))}

    def forward(self, numeric: Tensor, codes: Tensor) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K] -> float32[n, outputs]."""
        parts = [F.embedding(codes[:, k], table) for k, table in enumerate(self.embeddings)]
        x = torch.cat([numeric, *parts], dim=1) if parts else numeric
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for layer in hidden:
            x = F.dropout(F.relu(F.linear(x, *layer), inplace=True), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight, bias)


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


def embedding_width(cardinality: int, widest: int) -> int:
    """1.6 * cardinality ** 0.56, at most `widest` (rule of the fastai tabular models)."""
    return int(max(1, min(widest, round(1.6 * cardinality**0.56))))


def _table(size: int, width: int) -> Tensor:
    """[size, width] of N(0, 0.1)."""
    table = torch.empty(size, width)
    return table if table.is_meta else table.normal_(0.0, 0.1)  # where nothing is to draw, torch imports its compiler


def _layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias [outputs] of U(-1/sqrt(inputs), 1/sqrt(inputs)), as torch's own linear layers."""
    bound = 1.0 / math.sqrt(max(inputs, 1))
    weight, bias = torch.empty(outputs, inputs), torch.empty(outputs)
    return (weight, bias) if weight.is_meta else (weight.uniform_(-bound, bound), bias.uniform_(-bound, bound))
