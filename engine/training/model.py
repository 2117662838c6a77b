"""Networks: a torch module with what builds it again, and its description in JSON.

A module is called as `module(numeric, codes)`. Every thread has a module of its own, built by the same constructor under the
same seed, whose weights are the memory of the others'; so nothing that a module keeps is shared, and ties, hooks and closures are
as the constructor made them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from engine.config.nested import Tree
from engine.config.sections.training import ModelConfig
from engine.errors import UserError
from engine.runtime import digest, records
from engine.runtime.records import Within
from engine.training import kinds
from engine.training.arithmetic import ROWS, Arithmetic
from engine.training.networks import WIDEST, Fitted, Shape, Width
from engine.training.operations import multiply_adds
from engine.training.randomness import AllKept, drawn_from
from engine.training.target import PLAIN, TargetScale

FORMAT = 1
MOST_TENSORS = 2**16
MOST_OTHERS = 16  # tensors of a built-in model beside those of its codes and hidden layers
_BUILDING = threading.Lock()  # the generator that constructors draw from is the process's


class ScaleRecord(TypedDict):
    """The scale of a target beside the main one, as `target_center` and the like."""

    center: float
    scale: float
    type: Literal["float32", "float64"]


class ArchitectureRecord(TypedDict):
    """The architecture of a model, without weights; `settings` are those of its kind, `fitted` is the digest of its fitted
    arrays, `package` the installed package (name==version) that its class is from.
    """

    format: Annotated[int, records.Format(FORMAT)]
    kind: str
    numeric_width: Annotated[int, Within(0, WIDEST)]
    cardinalities: list[Annotated[int, Within(1, 2**31)]]
    outputs: Width
    settings: Tree
    target_center: float
    target_scale: float
    target_type: NotRequired[Literal["float32", "float64"]]
    other_targets: NotRequired[list[ScaleRecord]]
    fitted: NotRequired[records.Digest]
    package: NotRequired[str]


@dataclass(frozen=True)
class Traits:
    """What a network's modules do in training: whether a row's output depends on other rows, and the buffers that change."""

    couples: bool = False
    buffers: tuple[str, ...] = ()


@dataclass
class Network:
    """A module, and what another like it is built from: kind, shape, settings, fitted arrays and seed; the scale of its target,
    and those of `others`.
    """

    kind: str
    shape: Shape
    settings: Tree
    module: nn.Module
    fitted: Fitted = field(default_factory=dict)
    seed: int = 0
    target: TargetScale = PLAIN
    others: Sequence[TargetScale] = ()
    traits: Traits = Traits()
    _arithmetic: dict[str, Arithmetic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module.eval()  # it holds the weights, and is trained by way of others

    @property
    def targets(self) -> tuple[TargetScale, ...]:
        """The scale of every target, that of the main one first."""
        return (self.target, *self.others)

    @property
    def outputs(self) -> int:
        """Raw outputs of a row."""
        return self.shape["outputs"]

    @property
    def widest(self) -> int:
        """The most numbers that a built-in model makes of a row between two layers."""
        settings, wide = self.settings, max(parameter.shape[-1] for parameter in self.parameters())
        embedded = 2 * int(settings["bins"]) * self.shape["numeric"] if "bins" in settings else 0
        return max(embedded, wide * int(settings.get("members", 1)))

    @functools.cached_property
    def output_shape(self) -> tuple[int, ...]:
        """(outputs,), or (members, outputs), of a row, found by trial."""
        module = self.build().eval()
        with torch.no_grad():
            found = module(*self._trial_rows())
        return tuple(found.shape[1:])

    def _trial_rows(self) -> tuple[Tensor, Tensor]:
        shape = self.shape
        columns = torch.zeros(ROWS, len(shape["cardinalities"]), dtype=torch.int32)
        return torch.zeros(ROWS, shape["numeric"]), columns

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name, tied ones once."""
        return {name: tensor for name, tensor in self.module.named_parameters() if tensor.requires_grad}

    def spared(self, decay: str) -> set[str]:
        """Names of trained parameters that weight decay leaves as they are, by the rule of `train.decay`."""
        if decay == "all" or (decay == "auto" and self.kind in kinds.BUILT_IN):
            return set()
        norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding, nn.EmbeddingBag)
        named = getattr(self.module, "no_weight_decay", set)  # a method, as in the models of timm
        inside = {id(item) for part in self.module.modules() if isinstance(part, norms) for item in part.parameters()}
        return set(named()) | {name for name, item in self.trained.items() if item.dim() < 2 or id(item) in inside}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the module."""
        return self.module.parameters()

    @property
    def untrained(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers by name."""
        return {name: tensor.detach() for name, tensor in _state(self.module) if not tensor.requires_grad}

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
        mine = self.untrained
        with torch.no_grad():
            for name, tensor in _state(module):
                if isinstance(tensor, nn.Parameter) and name in mine:
                    tensor.data = mine[name]  # large tables may be frozen: they are not copied
                elif name in mine:
                    tensor.copy_(mine[name])
        return module

    def bound(self, tensors: Mapping[str, Tensor], precision: str, own_buffers: bool = False) -> nn.Module:
        """A new module whose trained parameters are `tensors`, on their device, prepared for the precision.

        Its buffers are the network's, where they are on that device, or its own copies.
        """
        module = self.arithmetic(precision).prepared(self.build())
        device = next(iter(tensors.values())).device
        for name, parameter in module.named_parameters():
            if name in tensors:
                parameter.data = tensors[name]
        module = module.to(device)
        for name, part in () if own_buffers else module.named_modules():
            mine = self.module.get_submodule(name)._buffers
            part._buffers.update(
                {key: item for key, item in mine.items() if item is not None and item.device == device}
            )
        return module

    @functools.cached_property
    def mask_calls(self) -> int:
        """Dropout masks of a forward pass in training, found by trial."""
        masks, module = AllKept(), self.build().train()
        with drawn_from(masks), torch.no_grad():
            module(*self._trial_rows())
        return masks.calls

    @functools.cached_property
    def work(self) -> float:
        """Multiply-adds of a row in a forward pass of training, found by trial; infinite for a module that raises."""
        try:
            with torch.no_grad():
                return multiply_adds(self.build().train(), *self._trial_rows())
        except Exception:  # of anyone's code; the probe will say what is wrong with it
            return math.inf

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
    with _BUILDING, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kinds.make(kind, shape, fitted, settings)


def build_model(
    config: ModelConfig,
    numeric_width: int,
    cardinalities: Sequence[int],
    outputs: int,
    seed: int,
    fitted: Fitted | None = None,
) -> Network:
    """A new model; equal arguments give equal weights. No global random state is read or changed.

    `fitted`: what `kinds.fit_arrays` has learned. Raises UserError when there is no feature, and for settings that the kind
    does not take.
    """
    if numeric_width == 0 and not cardinalities:
        raise UserError("a model must have at least one feature, found none: set features")
    shape: Shape = {"numeric": numeric_width, "cardinalities": list(cardinalities), "outputs": outputs}
    settings, arrays = kinds.settings_of(config), dict(fitted or {})
    module = construct(config.kind, shape, settings, arrays, seed)
    kept = {} if config.kind in kinds.BUILT_IN else arrays  # built-in models have theirs in buffers
    return Network(config.kind, shape, settings, module, kept, seed)


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
    if network.others:
        found["other_targets"] = [
            {"center": item.center, "scale": item.scale, "type": "float64" if item.kind == "float64" else "float32"}
            for item in network.others
        ]
    if network.fitted:
        found["fitted"] = fitted_digest(network.fitted)
    if (package := kinds.package_of(network.kind)) is not None:
        found["package"] = package
    return found


def scales_in(description: ArchitectureRecord) -> tuple[TargetScale, ...]:
    """The scale of each target that `architecture` described, that of the main one first."""
    main = TargetScale(
        description["target_center"], description["target_scale"], description.get("target_type", "float32")
    )
    others = description.get("other_targets", [])
    return (main, *(TargetScale(item["center"], item["scale"], item["type"]) for item in others))


def fitted_digest(fitted: Fitted) -> str:
    """Digest of arrays by name, with their types and shapes."""
    return digest.of_json(
        {name: [array.dtype.str, list(array.shape), digest.of_bytes(array.tobytes())] for name, array in fitted.items()}
    )


def declared(description: ArchitectureRecord, where: str = "architecture", fitted: Fitted | None = None) -> Network:
    """The model that `architecture` described. A built-in one is on torch's meta device: its tensors have shapes and take no
    memory. Another one is built, which runs its code, with the arrays `fitted`, and has weights of its constructor.

    Raises UserError for an unknown kind and code that may not run here, Damaged where the description is of another shape or
    beyond the limits.
    """
    records.conform(description, ArchitectureRecord, where)
    kind, settings = description["kind"], dict(description["settings"])
    shape: Shape = {
        "numeric": description["numeric_width"],
        "cardinalities": description["cardinalities"],
        "outputs": description["outputs"],
    }
    target, *others = scales_in(description)
    if kind not in kinds.BUILT_IN:
        arrays = dict(fitted or {})
        if description.get("fitted", "") != (fitted_digest(arrays) if arrays else ""):
            raise records.Damaged(f"{where}: fitted must be the digest of the arrays that come with it")
        kinds.check_settings(kind, settings)
        return Network(kind, shape, settings, construct(kind, shape, settings, arrays, 0), arrays, 0, target, others)
    known = kinds.BUILT_IN[kind][1]
    records.conform(settings, known, f"{where}: settings")
    settings = {name: settings[name] for name in known.__annotations__ if name in settings}
    tensors = 2 * len(shape["cardinalities"]) + 2 * len(settings.get("hidden", ())) + MOST_OTHERS
    if tensors > MOST_TENSORS:
        raise records.Damaged(f"{where} must have at most {MOST_TENSORS:,} tensors, found {tensors:,}")
    with torch.device("meta"):
        module = construct(kind, shape, settings, {}, 0)
    return Network(kind, shape, settings, module, target=target, others=others)


def give_memory(module: nn.Module) -> None:
    """Give the tensors of a module on torch's meta device memory of this process, with any content.

    `Module.to_empty` does this too, but in its way torch imports sympy, which takes a third of a second.
    """
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def from_architecture(
    description: ArchitectureRecord, most: int = 2**32, where: str = "architecture", fitted: Fitted | None = None
) -> Network:
    """The model that `architecture` described; a built-in one has zero weights until a state is loaded.

    Raises Damaged for one of more than `most` weights, before any memory is taken.
    """
    network = declared(description, where, fitted)
    if network.kind not in kinds.BUILT_IN:
        return network
    found = sum(parameter.numel() for parameter in network.parameters())
    if found > most:
        raise records.Damaged(f"{where} must describe at most {most:,} weights, found {found:,}")
    give_memory(network.module)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network
