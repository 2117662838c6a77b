"""The names in a config that are of code: of the engine, of a plug-in file, or of an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.config import plugins
from engine.config.sections.features import (
    AGGREGATE_GROUP,
    AGGREGATES_HINT,
    FUNCTION_GROUP,
    AggregateConfig,
    is_built_in,
)
from engine.config.sections.training import (
    LOSS_GROUP,
    METRIC_GROUP,
    MODEL_GROUP,
    MODELS,
    TASKS,
    TargetConfig,
    TrainConfig,
)
from engine.config.tree import Config


class CodeName(NamedTuple):
    """A name, where it is in the config, and where it may come from."""

    path: tuple[str | int, ...]
    name: str
    group: str  # of entry points
    built_in: bool
    known: tuple[str, ...] = ()  # names of the engine, for a hint
    checked: bool = True  # whether a name that nothing offers is refused here

    @property
    def where(self) -> str:
        """The dotted path; without the place in a list."""
        return ".".join(part for part in self.path if isinstance(part, str))


def of_config(config: Config) -> Iterator[CodeName]:
    """Every name of code in a config."""
    for view, asked in config.features.views.items():
        path = ("features", "views", view)
        if asked.function:
            yield CodeName((*path, "function"), asked.function, FUNCTION_GROUP, built_in=False, checked=False)
        for entry, item in asked.aggregates.items():
            nested = isinstance(item, AggregateConfig)
            place = (*path, "aggregates", entry, *(("aggregates",) if nested else ()))
            for at, name in enumerate(item.aggregates if isinstance(item, AggregateConfig) else item):
                yield CodeName((*place, at), name, AGGREGATE_GROUP, is_built_in(name), AGGREGATES_HINT)
    kind = config.model.kind
    yield CodeName(("model", "kind"), kind, MODEL_GROUP, kind in MODELS, MODELS)
    for name, model in config.model.blended.items():
        yield CodeName(
            ("model", "blend", "models", name, "kind"), model.kind, MODEL_GROUP, model.kind in MODELS, MODELS
        )
    yield from _of_target(("train",), config.train)
    for name, target in config.train.targets.items():
        yield from _of_target(("train", "targets", name), target)


def _of_target(path: tuple[str, ...], target: TrainConfig | TargetConfig) -> Iterator[CodeName]:
    yield CodeName((*path, "loss"), target.loss, LOSS_GROUP, target.loss in TASKS, tuple(TASKS))
    if target.metric is not None:
        # The names of the engine's metrics are in a later room: one that nothing offers is refused there.
        yield CodeName((*path, "metric"), target.metric, METRIC_GROUP, built_in=False, checked=False)


def installed_versions(config: Config) -> dict[str, str]:
    """Path -> version of the installed code that a config names; that of plug-in files is in their names."""
    found = {}
    for item in of_config(config):
        if not item.built_in and plugins.split(item.name)[1] is None:
            version = plugins.version_of(item.name, item.group)
            if version is not None:
                found[".".join(map(str, item.path))] = version
    return found
