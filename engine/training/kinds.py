"""Kinds of networks: built in, a class of a plug-in file (`plugins: [models.py]`, `model.kind: MyNet`), or one that an installed
package offers in the entry point group `engine.models`.

A class is any `torch.nn.Module` with `__init__(self, shape, fitted, **settings)` and `forward(numeric, codes)`. `shape` has
`numeric` (how many), `cardinalities` and `outputs`; `fitted` holds the arrays of its `fit(numeric, codes, target, settings)`, a
static method that may be absent. Settings are those of `model.settings`, named and typed as the constructor has them.
"""

from __future__ import annotations

import collections.abc
import inspect
import traceback
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engine.config import plugins
from engine.config.nested import Tree
from engine.config.plugins import installed
from engine.config.sections.training import MODEL_GROUP, ModelConfig
from engine.errors import UserError, nearest
from engine.training.embeddings import NONE
from engine.training.networks import (
    Fitted,
    Linear,
    LinearSettings,
    Mlp,
    MlpSettings,
    Shape,
    TabM,
    TabMSettings,
    WideAndDeep,
)

# Class, and what its settings must be in a record. They are the keys of ModelConfig of the same names.
BUILT_IN: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "mlp": (Mlp, MlpSettings),
    "linear": (Linear, LinearSettings),
    "tabm": (TabM, TabMSettings),
    "wide_and_deep": (WideAndDeep, MlpSettings),
}
Array = NDArray[Any]
NUMBERS = "biuf"  # kinds of dtype that a fitted array may have


def network_class(kind: str) -> type[nn.Module]:
    """The class of a kind. Raises UserError where there is none, or it is no torch module."""
    if kind in BUILT_IN:
        return BUILT_IN[kind][0]
    name, digest = plugins.split(kind)
    if digest is not None:
        found = plugins.load(kind)
    elif name in installed(MODEL_GROUP):
        found = installed(MODEL_GROUP)[name].load()
    else:
        raise UserError(
            f"model.kind must be one of {', '.join(BUILT_IN)}, a class of a file of `plugins`, or the name of an installed model "
            f"(entry point group {MODEL_GROUP}), found {name!r}.{nearest(name, [*BUILT_IN, *installed(MODEL_GROUP)])}"
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"model.kind={name} must be a class derived from torch.nn.Module, found {type(found).__name__}")
    return found


def package_of(kind: str) -> str | None:
    """`package==version` of the installed package that a kind is from; None for built-in ones and files of plug-ins."""
    entry = None if kind in BUILT_IN or plugins.split(kind)[1] else installed(MODEL_GROUP).get(kind)
    return f"{entry.dist.name}=={entry.dist.version}" if entry is not None and entry.dist else None


def settings_of(config: ModelConfig) -> Tree:
    """The settings that the constructor is called with. Raises UserError for one that it does not take, or lacks."""
    if config.kind in BUILT_IN:
        if config.settings:
            raise UserError(
                f"model.settings is for models of plug-ins: model.kind={config.kind} reads the keys of model"
            )
        known: Any = BUILT_IN[config.kind][1]
        names = known.__required_keys__ if config.embeddings == NONE else known.__annotations__
        return {name: _plain(getattr(config, name)) for name in known.__annotations__ if name in names}
    check_settings(config.kind, config.settings)
    return dict(config.settings)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the constructor of a kind takes these settings."""
    made, name = network_class(kind), plugins.split(kind)[0]
    parameters = dict(list(inspect.signature(made.__init__).parameters.items())[1:])
    if not {"shape", "fitted"} <= parameters.keys() and not _takes_any(parameters):
        raise UserError(
            f"model.kind={name} must have a constructor __init__(self, shape, fitted, ...), found "
            f"{name}{inspect.signature(made)}"
        )
    known = {key: item for key, item in parameters.items() if key not in ("shape", "fitted") and _is_named(item)}
    for key in settings:
        if key not in known and not _takes_any(parameters):
            raise UserError(f"model.settings.{key} is no setting of {name}.{nearest(key, known)}")
    for key, item in known.items():
        if key not in settings and item.default is item.empty:
            raise UserError(f"model.settings.{key} must be given: {name} has no default for it")
    try:
        hints = typing.get_type_hints(made.__init__)
    except Exception:  # annotations may name what is only there for a type checker
        hints = {}
    for key, value in settings.items():
        if key in hints and not _fits(hints[key], value):
            shown = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else hints[key]
            raise UserError(f"model.settings.{key} must be {shown} for {name}, found {value!r}")


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _is_named(item: inspect.Parameter) -> bool:
    return item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a plain value is of an annotation's type; of a type that is no plain one every value is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if hint is type(None):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if (origin or hint) in (list, tuple, collections.abc.Sequence):
        items = [hint for hint in inner if hint is not Ellipsis]
        return isinstance(value, (list, tuple)) and (not items or all(_fits(items[0], item) for item in value))
    if (origin or hint) in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    return True


def make(kind: str, shape: Shape, fitted: Fitted, settings: Tree) -> nn.Module:
    """A new module of a kind, its weights drawn from torch's default generator.

    Raises UserError where the constructor of a plug-in raises an error.
    """
    own: Shape = {**shape, "cardinalities": list(shape["cardinalities"])}
    if kind in BUILT_IN:
        return BUILT_IN[kind][0](own, fitted, **settings)
    arrays = {name: array.copy() for name, array in fitted.items()}  # torch.from_numpy shares memory: modules must not
    try:
        return network_class(kind)(shape=own, fitted=arrays, **settings)  # type: ignore[call-arg]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.kind={plugins.split(kind)[0]} could not be built: {raised(error)}") from error


def raised(error: BaseException) -> str:
    """An error with the file and line that raised it, of a plug-in where it passed through one."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith("<")] or frames[-1:]
    place = f" ({inside[-1].filename.strip('<>')}, line {inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {error}{place}"


def fit_arrays(
    kind: str, settings: Tree, numeric: NDArray[np.float32], codes: NDArray[np.int32], target: Array
) -> dict[str, Array]:
    """What the class learns from training rows before it is built: the result of its `fit`, empty without one.

    Raises UserError where that is no mapping of names to arrays of finite numbers, or raises an error.
    """
    fit = getattr(network_class(kind), "fit", None)
    if fit is None:
        return {}
    name, views = plugins.split(kind)[0], [array.view() for array in (numeric, codes, target)]
    for view in views:
        view.flags.writeable = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # of torch.from_numpy
            found = fit(*views, dict(settings))
    except Exception as error:
        raise UserError(f"{name}.fit must give arrays: {raised(error)}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{name}.fit must give a dict of arrays by name, found {type(found).__name__}")
    arrays = {}
    for key, value in found.items():
        array = np.ascontiguousarray(value)
        if not isinstance(key, str) or array.dtype.kind not in NUMBERS or not np.isfinite(array).all():
            raise UserError(f"{name}.fit must give arrays of finite numbers by name, found {key!r}: {array.dtype}")
        arrays[key] = array
    return arrays
