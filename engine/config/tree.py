"""The config tree: all sections, and the checks between them.

Defaults are defined here and in `sections` only; `conf/` has choices and experiments as differences from them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine.config import plugins, timeless, units
from engine.config.references import check_features
from engine.config.schema import key, later_key, section
from engine.config.sections.data import DataConfig, check_single
from engine.config.sections.features import FeaturesConfig
from engine.config.sections.lifecycle import BacktestConfig, RegistryConfig, RetrainConfig
from engine.config.sections.monitoring import MonitorConfig
from engine.config.sections.protocol import ProtocolConfig
from engine.config.sections.runtime import ClusterConfig, PathsConfig, ResourcesConfig, TrackingConfig
from engine.config.sections.scoring import ScoreConfig
from engine.config.sections.serving import ServeConfig
from engine.config.sections.sweep import SweepConfig
from engine.config.sections.training import (
    ANY,
    AUTO,
    BLEND,
    BOOSTERS,
    EvaluateConfig,
    ModelConfig,
    SplitConfig,
    TrainConfig,
)
from engine.errors import UserError, nearest

SPLITS = ("train", "valid", "test")
Parsed = TypeVar("Parsed")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole config."""

    name: str = key("unnamed", "name of the experiment: runs go to runs/<command>/<name>/")
    data: DataConfig = section(DataConfig)
    split: SplitConfig = section(SplitConfig)
    features: FeaturesConfig = section(FeaturesConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    score: ScoreConfig = section(ScoreConfig)
    monitor: MonitorConfig = section(MonitorConfig)
    registry: RegistryConfig = section(RegistryConfig)
    retrain: RetrainConfig = section(RetrainConfig)
    backtest: BacktestConfig = section(BacktestConfig)
    sweep: SweepConfig = later_key(factory=SweepConfig)
    protocol: ProtocolConfig = later_key(factory=ProtocolConfig)
    serve: ServeConfig = later_key(factory=ServeConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    paths: PathsConfig = section(PathsConfig)
    resources: ResourcesConfig = section(ResourcesConfig)
    plugins: tuple[str, ...] = later_key(
        (),
        "Python files with functions of your own, relative to --config-dir; resolved with the SHA-256 of each",
        parse=plugins.check_file,
    )
    trust: str | None = key(
        None, "digest of foreign code or remote paths that may be used here (the error message gives it)"
    )

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"name must be letters, digits, dot, dash or underscore, found {self.name!r}")
        if not self.data.timed:
            object.__setattr__(self, "features", timeless.features_of(self.features))
            timeless.check(self)
        if self.data.columns:
            check_features(self.data, self.features)
            self._check_named()
            self._check_targets()
        self._check_times()
        if self.model.kind in BOOSTERS and self.model.trees.monotone and self.train.loss == "quantile":
            raise UserError(
                "model.trees.monotone cannot be kept with train.loss=quantile, whose leaves become quantiles after the splits: "
                "leave out one of them"
            )

    @functools.cached_property
    def by_target(self) -> tuple[Config, ...]:
        """The config as that of each target alone, the data's target first."""
        if not self.train.targets:
            return (self,)
        main, *others = self.train.by_target
        pairs = zip(self.train.targets.values(), others, strict=True)
        views = [
            replace(self, data=self.data.with_target(item.column, item.positive), train=own) for item, own in pairs
        ]
        return (replace(self, train=main), *views)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The name of each target, as in `by_target`."""
        return (self.data.target or "", *self.train.targets)

    @property
    def several(self) -> bool:
        """Whether the model has members: seeds, or the models of a blend."""
        return self.model.kind == BLEND or len(self.train.every_seed) > 1

    @functools.cached_property
    def periods(self) -> dict[str, tuple[int, int]]:
        """Every period that is set, by its key: from included, to excluded, in microseconds UTC; for split.by=hash the places."""
        parts = {f"split.{name}": getattr(self.split, name) or None for name in SPLITS}
        asked = {"score.between": self.score.between or None, "monitor.window": self.monitor.window or None}
        found = self._parsed(units.window, asked)
        if self.split.by == "time":
            return self._parsed(units.window, parts) | found
        return (self._parsed(timeless.places_of, parts) if self.split.by == "hash" else {}) | found

    @functools.cached_property
    def instants(self) -> dict[str, int]:
        """Every instant that is set, by its key, in microseconds UTC."""
        known_by = None if self.split.known_by in (AUTO, ANY) else self.split.known_by
        written = {"split.known_by": known_by, "retrain.now": self.retrain.now}
        written |= {"backtest.start": self.backtest.start, "backtest.stop": self.backtest.stop}
        return self._parsed(units.instant, written)

    def _parsed(self, parse: Callable[[Any, str], Parsed], written: dict[str, Any]) -> dict[str, Parsed]:
        found = {}
        for where, text in written.items():
            try:
                if text is not None:
                    found[where] = parse(text, self.data.time_zone)
            except (UserError, ValueError) as error:
                raise UserError(f"{where}: {error}") from None
        return found

    def _check_named(self) -> None:
        """Raise UserError for a column that keys name and that is not there, or is a list where rows need one value."""
        single = [("evaluate.slices", column) for column in self.evaluate.slices]
        single += [
            ("evaluate.block", self.evaluate.block_column or ""),
            ("score.partition", self.score.partition or ""),
        ]
        single += [("split.column", self.split.column or "")]
        for where, column in (*single, *(("", column) for column in self.score.columns)):
            if column and column not in self.data.columns:
                raise UserError(f"{column!r} is not in data.columns.{nearest(column, self.data.columns)}")
            if column and where:
                check_single(self.data.columns[column], column, where)

    def _check_targets(self) -> None:
        for name, item in self.train.targets.items():
            where = f"train.targets.{name}"
            if item.column not in self.data.columns:
                known = nearest(item.column, self.data.columns)
                raise UserError(f"{where}.column names {item.column!r}, which is not in data.columns.{known}")
            if item.column == self.data.target:
                raise UserError(
                    f"{where}.column must be another column than the data's target, {item.column!r}, which is learnt anyway"
                )
            column = self.data.columns[item.column]
            check_single(column, item.column, f"{where}.column")
            if column.identifies or column.role in ("event_time", "entity", "weight"):
                raise UserError(
                    f"{where}.column must be a column that is learnt, found {item.column!r}, which tells rows apart"
                )
        if self.data.target in self.train.targets:
            raise UserError(
                f"train.targets.{self.data.target} has the name of the data's target, which is learnt anyway: take another name"
            )

    def _check_times(self) -> None:
        names = [name for name in SPLITS if f"split.{name}" in self.periods]
        for earlier, later in itertools.pairwise(names):
            if self.periods[f"split.{later}"][0] < self.periods[f"split.{earlier}"][1]:
                raise UserError(
                    f"split.{later} must start after the end of split.{earlier} ({getattr(self.split, earlier)[1]}), "
                    f"found {getattr(self.split, later)[0]}"
                )
        start, stop = (self.instants.get(f"backtest.{name}") for name in ("start", "stop"))
        if start is not None and stop is not None and stop <= start:
            raise UserError(
                f"backtest.stop must be after backtest.start ({self.backtest.start}), found {self.backtest.stop}"
            )


# Keys that do not affect results; the plan digest leaves them out.
IMMATERIAL = (
    "cluster", "tracking", "paths", "resources", "trust", "train.resume", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_every", "train.pause_after", "train.audit_every", "sweep.parallel", "score.resume", "score.unit_rows",
    "score.tries", "score.features",
)  # fmt: skip


def without(values: dict[str, object], dotted: tuple[str, ...]) -> dict[str, object]:
    """A copy of nested dicts without the dotted keys."""
    copy = {name: without(item, ()) if isinstance(item, dict) else item for name, item in values.items()}
    for path in dotted:
        *parents, last = path.split(".")
        node: object = copy
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    return copy
