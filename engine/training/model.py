"""Networks: a torch module with what builds it again, and its description in JSON.

A module is called as `module(numeric, codes)`. Every thread has a module of its own, built by the same constructor under the
same seed, whose weights are the memory of the others'; so nothing that a module keeps is shared, and ties, hooks and closures are
as the constructor made them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from engine.config.nested import Tree
from engine.config.sections.training import ModelConfig
from engine.errors import UserError, nearest
from engine.runtime import records
from engine.runtime.records import Within
from engine.training.arithmetic import ROWS, Arithmetic
from engine.training.networks import WIDEST, Fitted, Linear, LinearSettings, Mlp, MlpSettings, Shape, Width
from engine.training.randomness import AllKept, drawn_from
from engine.training.target import PLAIN, TargetScale

FORMAT = 1
MOST_TENSORS = 2**16
_BUILDING = threading.Lock()  # the generator that constructors draw from is the process's


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


# MODELS in engine/config/sections/training.py has the same names. The settings are the keys of ModelConfig that a class takes.
MODELS: dict[str, tuple[type[nn.Module], type[Any]]] = {"mlp": (Mlp, MlpSettings), "linear": (Linear, LinearSettings)}


@dataclass
class Network:
    """A module, and what another like it is built from: kind, shape, settings, fitted arrays and seed."""

    kind: str
    shape: Shape
    settings: Tree
    module: nn.Module
    fitted: Fitted = field(default_factory=dict)
    seed: int = 0
    target: TargetScale = PLAIN
    _arithmetic: dict[str, Arithmetic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module.eval()  # it holds the weights, and is trained by way of others

    @property
    def outputs(self) -> int:
        """Raw outputs of a row."""
        return self.shape["outputs"]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name, tied ones once."""
        return {name: tensor for name, tensor in self.module.named_parameters() if tensor.requires_grad}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the module."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, tied parameters once, also the buffers that the module would not save."""
        return dict(_state(self.module))

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of a `state_dict` of the same names and shapes."""
        with torch.no_grad():
            for name, tensor in _state(self.module):
                tensor.copy_(tensors[name])

    def build(self) -> nn.Module:
        """A new module, with the network's frozen parameters and buffers, for `bind` to give weights to."""
        module = construct(self.kind, self.shape, self.settings, self.fitted, self.seed)
        mine = self.state_dict()
        with torch.no_grad():
            for name, tensor in _state(module):
                if not tensor.requires_grad:
                    tensor.copy_(mine[name])
        return module

    def bound(self, tensors: Mapping[str, Tensor], precision: str) -> nn.Module:
        """A new module whose trained parameters are `tensors`, on their device, prepared for the precision."""
        module = self.arithmetic(precision).prepared(self.build())
        device = next(iter(tensors.values())).device
        for name, parameter in module.named_parameters():
            if name in tensors:
                parameter.data = tensors[name]
        return module.to(device)

    @functools.cached_property
    def mask_calls(self) -> int:
        """Dropout masks of a forward pass in training, found by trial."""
        masks, module = AllKept(), self.build().train()
        numeric = torch.zeros(ROWS, self.shape["numeric"])
        with drawn_from(masks), torch.no_grad():
            module(numeric, torch.zeros(ROWS, len(self.shape["cardinalities"]), dtype=torch.int32))
        return masks.calls

    def arithmetic(self, precision: str) -> Arithmetic:
        """How its modules are computed."""
        if precision not in self._arithmetic:
            shape = self.shape
            found = Arithmetic.of(precision, self.build, shape["numeric"], len(shape["cardinalities"]))
            self._arithmetic[precision] = found
        return self._arithmetic[precision]


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def construct(kind: str, shape: Shape, settings: Tree, fitted: Fitted, seed: int) -> nn.Module:
    """A new module of a kind; equal arguments give equal weights. Torch's generator is as before."""
    make = MODELS[kind][0]
    own: Shape = {**shape, "cardinalities": list(shape["cardinalities"])}
    with _BUILDING, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make(own, fitted, **settings)


def build_model(
    config: ModelConfig, numeric_width: int, cardinalities: Sequence[int], outputs: int, seed: int
) -> Network:
    """A new model; equal arguments give equal weights. No global random state is read or changed.

    Raises UserError when there is no feature.
    """
    if numeric_width == 0 and not cardinalities:
        raise UserError("a model must have at least one feature, found none: set features")
    shape: Shape = {"numeric": numeric_width, "cardinalities": list(cardinalities), "outputs": outputs}
    settings = {name: _plain(getattr(config, name)) for name in MODELS[config.kind][1].__annotations__}
    return Network(config.kind, shape, settings, construct(config.kind, shape, settings, {}, seed), seed=seed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def architecture(network: Network) -> ArchitectureRecord:
    """JSON from which `from_architecture` builds the same model, without weights."""
    found: ArchitectureRecord = {
        "format": FORMAT,
        "kind": network.kind,
        "numeric_width": network.shape["numeric"],
        "cardinalities": network.shape["cardinalities"],
        "outputs": network.shape["outputs"],
        "settings": network.settings,
        "target_center": network.target.center,
        "target_scale": network.target.scale,
    }
    if network.target.kind == "float64":
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
    known = MODELS[kind][1]
    records.conform(given, known, f"{where}: settings")
    settings = {name: given[name] for name in known.__annotations__}
    cardinalities = description["cardinalities"]
    tensors = len(cardinalities) + 2 * len(settings.get("hidden", ())) + 2
    if tensors > MOST_TENSORS:
        raise records.Damaged(f"{where} must have at most {MOST_TENSORS:,} tensors, found {tensors:,}")
    shape: Shape = {
        "numeric": description["numeric_width"],
        "cardinalities": cardinalities,
        "outputs": description["outputs"],
    }
    with torch.device("meta"):
        module = construct(kind, shape, settings, {}, 0)
    kind_of_target = description.get("target_type", "float32")
    target = TargetScale(description["target_center"], description["target_scale"], kind_of_target)
    return Network(kind, shape, settings, module, target=target)


def from_architecture(description: ArchitectureRecord, most: int = 2**32, where: str = "architecture") -> Network:
    """The model that `architecture` described, with zero weights until a state is loaded.

    Raises Damaged for one of more than `most` weights, before any memory is taken.
    """
    network = declared(description, where)
    found = sum(parameter.numel() for parameter in network.parameters())
    if found > most:
        raise records.Damaged(f"{where} must describe at most {most:,} weights, found {found:,}")
    network.module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network
