"""The arithmetic of a module: float32, or bf16 by torch's autocast with its output layer in float32.

Weights that a forward pass reads only through autocast's cast are held in bf16: the same bits, without a cast a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.training.operations import Observer
from engine.training.randomness import AllKept, drawn_from

ROWS = 4  # of the trial that looks at what a module reads


@dataclass(frozen=True)
class Arithmetic:
    """How the module of a network is computed: `low` names its parameters held in bf16, `output` its last layer."""

    precision: str
    low: frozenset[str] = frozenset()
    output: str | None = None

    @classmethod
    def of(cls, precision: str, build: Callable[[], nn.Module], width: int, columns: int) -> Arithmetic:
        """Found by trial on modules that `build` makes, for `width` numbers and `columns` codes a row."""
        if precision != "bf16":
            return cls(precision)
        numeric, codes = torch.zeros(ROWS, width), torch.zeros(ROWS, columns, dtype=torch.int32)
        modules = [build(), build().train(), build().eval()]
        with drawn_from(AllKept()), torch.no_grad():
            trial = cls(precision, frozenset(), _last_layer(modules[0], numeric, codes))
            found = [trial._read_low(module, numeric, codes) for module in modules[1:]]
        return cls(precision, frozenset(found[0] & found[1]), trial.output)

    def _read_low(self, module: nn.Module, numeric: Tensor, codes: Tensor) -> set[str]:
        with _Uses(dict(self.prepared(module).named_parameters())) as uses, self.applied("cpu"):
            module(numeric, codes)
        return uses.low - uses.full

    def applied(self, device: str) -> AbstractContextManager[Any]:
        """In which the module is called, on a device of this type."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module with its output layer in float32: scores rounded to 8 bits would tie."""
        if self.output is not None:
            layer = module.get_submodule(self.output)
            layer.forward = _in_float32(layer.forward)  # type: ignore[method-assign]
        return module


def _in_float32(inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*given: Any) -> Any:
        with torch.autocast(given[0].device.type, enabled=False):
            return inner(*[item.float() if _is_float(item) else item for item in given])

    return forward


def _is_float(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _last_layer(module: nn.Module, numeric: Tensor, codes: Tensor) -> str | None:
    """The name of the submodule without parts, but with weights, that is called last; None where there is none."""
    called: list[str] = []
    for name, part in module.named_modules():
        if name and not list(part.children()) and any(True for _ in part.parameters(recurse=False)):
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    module(numeric, codes)
    return called[-1] if called else None


class _Uses(Observer):
    """Names of parameters that operations read through a cast to bf16 (`low`) and otherwise (`full`)."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.low: set[str] = set()
        self.full: set[str] = set()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._views: dict[int, tuple[str, Tensor]] = {}  # kept alive, so that an id stays that of its tensor

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """See Observer."""
        for given in tree_leaves((args, kwargs)):
            name = self._names.get(id(given)) or self._views.get(id(given), (None,))[0]
            if name is None:
                continue
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
                self.low.add(name)
            elif func.is_view:
                self._views |= {id(view): (name, view) for view in tree_leaves(out) if isinstance(view, Tensor)}
            else:
                self.full.add(name)
