"""Models: pure functions of (weights, numeric, codes, dropout masks), wrapped as torch modules.

The training loop calls `apply` with its own leaf tensors, so that shards on several threads share the memory of the
weights but no autograd node. The arithmetic follows the weights' type: hidden weights in bf16 give bf16 products. No
BatchNorm: a row's result never depends on its neighbours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.nested import Tree
from engine.config.sections.training import ModelConfig
from engine.errors import UserError, nearest
from engine.runtime import records
from engine.runtime.records import Within
from engine.training.target import PLAIN, TargetScale

FORMAT = 1
WIDEST = 2**20  # columns, units of a layer, outputs
MOST_TENSORS = 2**16
Width = Annotated[int, Within(1, WIDEST)]


class MlpSettings(TypedDict):
    """The settings of an Mlp besides widths."""

    hidden: list[Width]
    dropout: Annotated[float, Within(0, 1)]
    embedding_max: Width


class LinearSettings(TypedDict):
    """The settings of a linear model: none."""


class ArchitectureRecord(TypedDict):
    """The architecture of a model, without weights; `settings` are those of its kind."""

    format: Annotated[int, records.Format(FORMAT)]
    kind: str
    numeric_width: Annotated[int, Within(0, WIDEST)]
    cardinalities: list[Annotated[int, Within(1, 2**31)]]
    outputs: Width
    settings: Tree
    target_center: float
    target_scale: float
    target_type: NotRequired[Literal["float32", "float64"]]


class Network(nn.Module):
    """Base of the models: an embedding per code column, and the scale of a regression target."""

    kind = ""
    shape: type[Any] = LinearSettings  # of `settings` in a record

    def __init__(self, numeric_width: int, cardinalities: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.numeric_width, self.cardinalities, self.outputs = numeric_width, list(cardinalities), outputs
        self.target = PLAIN

    def forward(self, numeric: Tensor, codes: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Shape: numeric float32[n, F], codes int32[n, K], masks one [n, width] a hidden layer -> float32[n,
        outputs].
        """
        return self.apply_weights(list(self.parameters()), numeric, codes, masks)

    def apply_weights(
        self, weights: Sequence[Tensor], numeric: Tensor, codes: Tensor, masks: Sequence[Tensor] | None
    ) -> Tensor:
        """`forward` with other weights, in the order of `parameters()`."""
        raise NotImplementedError

    @property
    def mask_widths(self) -> list[int]:
        """Widths of the layers that dropout acts on."""
        return []

    @property
    def dropout(self) -> float:
        """Share of activations dropped in training."""
        return 0.0

    @property
    def low_precision(self) -> list[bool]:
        """Per parameter, whether the bf16 mode keeps it in bf16. Embeddings and the output layer stay in float32: many
        rows add to one embedding, and scores rounded to 8 bits would tie.
        """
        return [False for _ in self.parameters()]

    def settings(self) -> Tree:
        """What the constructor takes beside widths."""
        return {}


class Mlp(Network):
    """A multilayer perceptron: embeddings and numbers, hidden layers of linear, ReLU and dropout, a linear output."""

    kind = "mlp"
    shape = MlpSettings

    def __init__(
        self,
        numeric_width: int,
        cardinalities: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int],
        dropout: float,
        embedding_max: int,
    ) -> None:
        super().__init__(numeric_width, cardinalities, outputs)
        self.hidden, self.embedding_max, self._dropout = list(hidden), embedding_max, dropout
        widths = [embedding_width(cardinality, embedding_max) for cardinality in cardinalities]
        self.embeddings = nn.ParameterList(
            torch.empty(size, width) for size, width in zip(cardinalities, widths, strict=True)
        )
        edges = [numeric_width + sum(widths), *hidden, outputs]
        self.weights = nn.ParameterList(torch.empty(b, a) for a, b in itertools.pairwise(edges))
        self.biases = nn.ParameterList(torch.empty(b) for b in edges[1:])

    def apply_weights(
        self, weights: Sequence[Tensor], numeric: Tensor, codes: Tensor, masks: Sequence[Tensor] | None
    ) -> Tensor:
        """`forward` with other weights, in the order of `parameters()`."""
        tables = len(self.embeddings)
        layers = len(self.weights)
        parts = [F.embedding(codes[:, k], weights[k]) for k in range(tables)]
        x = torch.cat([numeric, *parts], dim=1) if parts else numeric
        for layer in range(layers):
            weight, bias = weights[tables + layer], weights[tables + layers + layer]
            x = F.linear(x.to(weight.dtype), weight, bias)
            if layer < layers - 1:
                x = F.relu(x, inplace=True)
                if masks is not None:
                    x = x * masks[layer].to(x.dtype)
        return x

    @property
    def mask_widths(self) -> list[int]:
        """Widths of the layers that dropout acts on."""
        return self.hidden if self._dropout > 0 else []

    @property
    def dropout(self) -> float:
        """Share of activations dropped in training."""
        return self._dropout

    @property
    def low_precision(self) -> list[bool]:
        """Hidden weights and biases."""
        hidden = [True] * len(self.hidden) + [False]
        return [False] * len(self.embeddings) + hidden + hidden

    def settings(self) -> Tree:
        """What the constructor takes beside widths."""
        return {"hidden": self.hidden, "dropout": self._dropout, "embedding_max": self.embedding_max}


class Linear(Network):
    """A weight per number and per category: logistic, softmax or linear regression."""

    kind = "linear"

    def __init__(self, numeric_width: int, cardinalities: Sequence[int], outputs: int) -> None:
        super().__init__(numeric_width, cardinalities, outputs)
        self.embeddings = nn.ParameterList(torch.empty(size, outputs) for size in cardinalities)
        self.weights = nn.ParameterList([torch.empty(outputs, numeric_width)])
        self.biases = nn.ParameterList([torch.empty(outputs)])

    def apply_weights(
        self,
        weights: Sequence[Tensor],
        numeric: Tensor,
        codes: Tensor,
        masks: Sequence[Tensor] | None,  # noqa: ARG002
    ) -> Tensor:
        """`forward` with other weights, in the order of `parameters()`."""
        x = F.linear(numeric, weights[-2], weights[-1])
        for k in range(len(self.embeddings)):
            x = x + F.embedding(codes[:, k], weights[k])
        return x


# MODELS in engine/config/sections/training.py has the same names; `shape` of a class names the keys of ModelConfig that it takes.
MODELS: dict[str, type[Network]] = {"mlp": Mlp, "linear": Linear}


def embedding_width(cardinality: int, widest: int) -> int:
    """1.6 * cardinality ** 0.56, at most `widest` (rule of the fastai tabular models)."""
    return int(max(1, min(widest, round(1.6 * cardinality**0.56))))


def build_model(
    config: ModelConfig, numeric_width: int, cardinalities: Sequence[int], outputs: int, seed: int
) -> Network:
    """A new model; equal arguments give equal weights. No global random state is read or changed.

    Raises UserError when there is no feature.
    """
    if numeric_width == 0 and not cardinalities:
        raise UserError("a model must have at least one feature, found none: set features")
    settings = {name: getattr(config, name) for name in MODELS[config.kind].shape.__annotations__}
    model = MODELS[config.kind](numeric_width, cardinalities, outputs, **settings)
    _initialise(model, seed)
    return model


def _initialise(model: Network, seed: int) -> None:
    """Linear layers U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch's own; embeddings N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in model.embeddings:  # type: ignore[union-attr]
            table.normal_(0.0, 0.1, generator=generator)
        for weight, bias in zip(model.weights, model.biases, strict=True):  # type: ignore[arg-type]
            bound = 1.0 / math.sqrt(max(weight.shape[1], 1))
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)


def architecture(model: Network) -> ArchitectureRecord:
    """JSON from which `from_architecture` builds the same model, without weights."""
    found: ArchitectureRecord = {
        "format": FORMAT,
        "kind": model.kind,
        "numeric_width": model.numeric_width,
        "cardinalities": model.cardinalities,
        "outputs": model.outputs,
        "settings": model.settings(),
        "target_center": model.target.center,
        "target_scale": model.target.scale,
    }
    if model.target.kind == "float64":
        found["target_type"] = "float64"
    return found


def declared(description: ArchitectureRecord, where: str = "architecture") -> Network:
    """The model that `architecture` described, on torch's meta device: its tensors have shapes and take no memory.

    Raises UserError for an unknown kind, Damaged where the description is of another shape or beyond the limits.
    """
    records.conform(description, ArchitectureRecord, where)
    kind, given = description["kind"], description["settings"]
    if kind not in MODELS:
        raise UserError(f"model.kind must be a known model, found {kind!r}.{nearest(kind, MODELS)}")
    shape = MODELS[kind].shape
    records.conform(given, shape, f"{where}: settings")
    settings = {name: given[name] for name in shape.__annotations__}
    cardinalities = description["cardinalities"]
    tensors = len(cardinalities) + 2 * len(settings.get("hidden", ())) + 2
    if tensors > MOST_TENSORS:
        raise records.Damaged(f"{where} must have at most {MOST_TENSORS:,} tensors, found {tensors:,}")
    with torch.device("meta"):
        model = MODELS[kind](description["numeric_width"], cardinalities, description["outputs"], **settings)
    kind_of_target = description.get("target_type", "float32")
    model.target = TargetScale(description["target_center"], description["target_scale"], kind_of_target)
    return model


def from_architecture(description: ArchitectureRecord, most: int = 2**32, where: str = "architecture") -> Network:
    """The model that `architecture` described, with zero weights until a state is loaded.

    Raises Damaged for one of more than `most` weights, before any memory is taken.
    """
    model = declared(description, where)
    found = sum(parameter.numel() for parameter in model.parameters())
    if found > most:
        raise records.Damaged(f"{where} must describe at most {most:,} weights, found {found:,}")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
