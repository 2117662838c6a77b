"""The space of a sweep: configs from suggestions of a sampler, and the checks before anything runs."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

from engine.config import compose, schema
from engine.config.nested import Tree
from engine.config.sections.sweep import SpaceConfig, SweepConfig
from engine.config.tree import Config
from engine.errors import UserError

SECTIONS = ("model", "train", "features", "evaluate", "split")  # what a sweep may search in


def optuna() -> Any:
    """Optuna, imported where a sweep runs. Raises UserError without it."""
    try:
        library = importlib.import_module("optuna")
    except ImportError:
        raise UserError("a sweep needs Optuna, which was not found: pip install 'tabular-engine[sweep]'") from None
    library.logging.set_verbosity(library.logging.WARNING)
    return library


def check_space(config: Config) -> None:
    """Raise UserError for an empty space, an unknown key, a value that the tree refuses, and a condition on no key of it."""
    sweep = config.sweep
    if not sweep.space:
        raise UserError("sweep.space must name at least one key to search, found none: add +sweep=default")
    names = list(sweep.space)
    for place, (name, space) in enumerate(sweep.space.items()):
        where = f"sweep.space.{name}"
        if name == "train.seed":
            raise UserError(
                f"{where} must not be searched: the best configs are trained with several seeds (sweep.seeds)"
            )
        if name.split(".")[0] not in SECTIONS or not compose.is_known(name):
            raise UserError(f"{where} must be a key of {', '.join(SECTIONS)}.{compose.nearest_key(name)}")
        for condition in space.when:
            if condition in names[place:]:
                raise UserError(
                    f"{where}.when must name keys before it, found {condition!r}, which is chosen later: move it up"
                )
            if condition not in sweep.space and not compose.is_known(condition):
                raise UserError(
                    f"{where}.when must name keys of the config, found {condition!r}.{compose.nearest_key(condition)}"
                )
        for value in _ends(space):
            try:
                with_values(config, {name: value})
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    if sweep.sampler == "grid" and any(space.kind != "choice" or space.when for space in sweep.space.values()):
        raise UserError("sweep.sampler=grid needs choices without conditions, found other keys in sweep.space")


def _ends(space: SpaceConfig) -> tuple[Any, ...]:
    """Every choice, or both ends of a range."""
    return tuple(getattr(space, space.kind))


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values of some dotted keys, checked as a whole. Raises UserError."""
    plain: Tree = copy.deepcopy(schema.plain(config))
    put(plain, values)
    return schema.build(Config, plain)


def put(tree: Tree, values: Mapping[str, Any]) -> None:
    """Set values at dotted keys of nested dicts."""
    for name, value in values.items():
        *parents, last = name.split(".")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value


def suggested(trial: Any, space: Mapping[str, SpaceConfig], config: Config) -> dict[str, Any]:
    """Values of the keys for a trial of Optuna, in the order of the space; keys whose conditions do not hold are left out."""
    found: dict[str, Any] = {}
    for name, item in space.items():
        if all(_holds(condition, wanted, found, config) for condition, wanted in item.when.items()):
            found[name] = _suggest(trial, name, item)
    return found


def _holds(name: str, wanted: Any, found: Mapping[str, Any], config: Config) -> bool:
    value = found[name] if name in found else _value(config, name)
    return value in wanted if isinstance(wanted, (list, tuple)) else value == wanted


def _value(config: Config, name: str) -> Any:
    node: Any = schema.plain(config)
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _suggest(trial: Any, name: str, space: SpaceConfig) -> Any:
    if space.kind == "choice":
        return json.loads(trial.suggest_categorical(name, _texts(space)))
    low, high = getattr(space, space.kind)
    if space.kind == "int":
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=space.kind == "log")


def _texts(space: SpaceConfig) -> list[str]:
    """The choices as JSON: a sampler takes single values, and a choice may be a list."""
    return [json.dumps(schema.plain(value)) for value in space.choice]


def sampler_of(sweep: SweepConfig) -> Any:
    """The seeded sampler of Optuna."""
    samplers = optuna().samplers
    if sweep.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=sweep.seed)
    return (samplers.TPESampler if sweep.sampler == "tpe" else samplers.RandomSampler)(seed=sweep.seed)


def grid(sweep: SweepConfig) -> list[dict[str, str]]:
    """Every config of a grid once, as choices in JSON, in an order that follows from the seed."""
    names, texts = list(sweep.space), [_texts(space) for space in sweep.space.values()]
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*texts)]
    random.Random(sweep.seed).shuffle(every)
    return every
