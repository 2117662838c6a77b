"""The config tree: all sections, and the checks between them.

Defaults are defined here and in `sections` only; `conf/` has choices and experiments as differences from them.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from engine.config import units
from engine.config.references import check_features
from engine.config.schema import key, section
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.sections.lifecycle import BacktestConfig, RegistryConfig, RetrainConfig
from engine.config.sections.monitoring import MonitorConfig
from engine.config.sections.runtime import ClusterConfig, PathsConfig, ResourcesConfig, TrackingConfig
from engine.config.sections.scoring import ScoreConfig
from engine.config.sections.training import EvaluateConfig, ModelConfig, SplitConfig, TrainConfig
from engine.errors import UserError, nearest

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
    cluster: ClusterConfig = section(ClusterConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    paths: PathsConfig = section(PathsConfig)
    resources: ResourcesConfig = section(ResourcesConfig)
    trust: str | None = key(
        None, "digest of foreign code or remote paths that may be used here (the error message gives it)"
    )

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"name must be letters, digits, dot, dash or underscore, found {self.name!r}")
        if self.data.columns:
            check_features(self.data, self.features)
            for period in ("train", "valid", "test"):
                bounds = getattr(self.split, period)
                if bounds:
                    _located(f"split.{period}", units.between, bounds, self.data.time_zone)
            _check_split(self.split, self.data.time_zone)
            partition = [self.score.partition] if self.score.partition else []
            for column in (*self.evaluate.slices, *self.score.columns, *partition):
                if column not in self.data.columns:
                    raise UserError(f"{column!r} is not in data.columns.{nearest(column, self.data.columns)}")
        for where, text in (("split.known_by", self.split.known_by), ("retrain.now", self.retrain.now)):
            if text is not None:
                _located(where, units.instant, text, self.data.time_zone)
        if self.score.between:
            _located("score.between", units.between, self.score.between, self.data.time_zone)
        if self.monitor.window:
            _located("monitor.window", units.window, self.monitor.window, self.data.time_zone)


def _located(where: str, check: object, *arguments: object) -> None:
    try:
        check(*arguments)  # type: ignore[operator]
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _check_split(split: SplitConfig, zone: str) -> None:
    names = [name for name in ("train", "valid", "test") if getattr(split, name)]
    for earlier, later in itertools.pairwise(names):
        stop, start = units.between(getattr(split, earlier), zone)[1], units.between(getattr(split, later), zone)[0]
        if start < stop:
            raise UserError(
                f"split.{later} must start after the end of split.{earlier} ({getattr(split, earlier)[1]}), "
                f"found {getattr(split, later)[0]}"
            )


# Keys that do not affect results; the plan digest leaves them out.
IMMATERIAL = (
    "cluster", "tracking", "paths", "resources", "trust", "train.resume", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_every", "score.resume", "score.unit_rows", "score.tries", "score.features",
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
