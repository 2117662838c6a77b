"""Keys of `split`, `model`, `train` and `evaluate`."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

from engine.config import schema, units
from engine.config.schema import key, later_key
from engine.config.units import Share
from engine.errors import UserError

# The task of each loss. `engine.training.loss_table` has the losses, `engine.training.metrics` the metrics.
TASKS = {
    "binary": "binary",
    "multiclass": "multiclass",
    "squared": "regression",
    "huber": "regression",
    "quantile": "regression",
    "poisson": "regression",
    "gamma": "regression",
    "tweedie": "regression",
    "focal": "binary",
    "multiclass_focal": "multiclass",
    "quantiles": "quantiles",
    "ordinal": "multiclass",
}
LOSS_GROUP, METRIC_GROUP = "engine.losses", "engine.metrics"  # entry points of installed packages
OPTIMIZERS = ("adamw", "sgd", "lion", "muon")  # engine/training/optimizers.py has them
SCHEDULES = ("cosine", "linear", "constant", "one_cycle")  # engine/training/schedule.py has them
SMOOTHED = ("binary", "multiclass")  # losses that read label_smoothing
BOOSTERS = ("lightgbm", "xgboost")  # engine/training/boosting/ has what grows their trees
AUTO = units.AUTO
# engine/training/kinds.py has the classes of networks, engine/training/choice.py what auto means.
BLEND = "blend"  # engine/training/blend.py
MOST_MEMBERS = 256  # of a blend, or seeds of a model
MODELS = (AUTO, "mlp", "linear", "tabm", "wide_and_deep", *BOOSTERS, BLEND)
MODEL_GROUP = "engine.models"  # entry points of installed packages that offer others
ANY = "any"
TARGET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
RESERVED = ("baseline", "labels", "test", "time", "train", "valid")  # figures of the main target begin with them


# Parts of split.by where none is given.
USUAL_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "hash": {"train": ("0%", "80%"), "valid": ("80%", "90%"), "test": ("90%", "100%")},
    "column": {"train": ("train",), "valid": ("valid",), "test": ("test",)},
}


def _check_known_by(text: str) -> None:
    if text not in (AUTO, ANY):
        try:
            units.instant(text, "UTC")
        except UserError as error:
            raise UserError(f"{AUTO}, {ANY}, or {error}") from None


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Periods of the event time, each [from, to], from included and to excluded, in data.time_zone; or parts (`by`)."""

    by: str = later_key(
        "time",
        "what cuts the rows. time: periods of the event time. hash: shares of a hash of the ids, or of data.group, as in [0%, "
        "80%]; a row's part never changes when rows are added. column: values of split.column, as in [train]",
        choices=("time", "hash", "column"),
    )
    column: str | None = later_key(None, "column that names the part of each row, for split.by=column")
    turn: Share = later_key(
        Share("0%"),
        "share by which the parts of split.by=hash are moved on, round the circle: other rows are then tested",
    )
    train: tuple[str, ...] = key((), "rows that weights and encodings are fitted on")
    valid: tuple[str, ...] = key((), "rows for early stopping and calibration")
    test: tuple[str, ...] = key((), "rows for the evaluation only")
    known_by: str | None = key(
        AUTO,
        "when a row's target must be known for use in training or validation: auto = when the next period begins, or an "
        "instant; any (or null) = whenever, so that labels from the future may be in it",
        parse=_check_known_by,
    )
    ripening: str = key(
        "wait",
        "what is done about rows too young for their label to be known at that time: wait moves the period back by the age at "
        "which 95 % of labels have arrived; weight weights rows by the inverse probability that their label was known; none "
        "keeps the fast labels as they are",
        choices=("wait", "weight", "none"),
    )
    snapshot: str | None = key(
        None,
        "train on this dataset of the store (its recipe or digest, or their first digits) instead of the current sources",
    )

    def __post_init__(self) -> None:
        if (self.by == "column") != (self.column is not None):
            raise UserError(
                f"column must be given for by=column, and only then, found by={self.by}, column={self.column}"
            )
        if self.by != "hash" and self.turn.fraction:
            raise UserError(f"turn={self.turn} is for by=hash, found by={self.by}")
        if self.by == "time":
            return
        if self.known_by not in (AUTO, ANY, None):
            raise UserError(
                f"known_by={self.known_by} is for by=time, where periods follow each other, found by={self.by}"
            )
        if not (self.train or self.valid or self.test):
            for name, part in USUAL_PARTS[self.by].items():
                object.__setattr__(self, name, part)


@dataclass(frozen=True, kw_only=True)
class TreesConfig:
    """Boosted trees (model=lightgbm, model=xgboost)."""

    learning_rate: float = key(0.05, "share of a tree's step that is taken", gt=0, le=1)
    rounds: int = key(1000, "most rounds; a round grows one tree, or one for each class", ge=1, le=100_000)
    patience: int = key(50, "rounds without a better validation metric before stopping; 0 = never", ge=0)
    leaves: int = key(31, "most leaves of a tree, grown best first; 0 = as many as depth allows", ge=0, le=32_768)
    depth: int = key(0, "most levels of splits; 0 = as many as leaves allow", ge=0, le=15)
    row_fraction: float = key(1.0, "share of the rows of a round, by a hash of row and round", gt=0, le=1)
    column_fraction: float = key(1.0, "share of the encoded columns that a tree may split on", gt=0, le=1)
    l1: float = key(0.0, "penalty on the size of leaf values", ge=0)
    l2: float = key(0.0, "penalty on the square of leaf values", ge=0)
    min_child: float = key(1e-3, "least sum of the hessian in a leaf (for squared loss: of weights)", ge=0)
    min_rows: int = key(20, "least rows in a leaf, as LightGBM estimates them; XGBoost has no such limit", ge=0)
    bins: int = key(255, "most bins of a number", ge=2, le=255)
    monotone: dict[str, int] = key(
        factory=dict, help="features with which the score may only rise (1) or only fall (-1): size: 1"
    )
    params: dict[str, bool | int | float | str] = key(
        factory=dict, help="other parameters of the library, under its own names"
    )

    def __post_init__(self) -> None:
        if not (self.leaves or self.depth):
            raise UserError("leaves or depth must be above 0, or trees grow without limit, found 0 for both")
        if self.leaves == 1:
            raise UserError("leaves must be 0, or at least 2 so that a tree can split, found 1")
        for name, sign in self.monotone.items():
            if sign not in (-1, 1):
                raise UserError(f"monotone.{name} must be 1 or -1, found {sign}")


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Members of a blend (model=blend), weighted by their loss on the validation rows: finished models, or new ones."""

    bundles: tuple[str, ...] = key((), "finished models: runs or name@version, of the same features, periods and loss")
    models: dict[str, dict[str, Any]] = key(
        factory=dict,
        help="models that this run trains, by names of your own: the keys of `model` in which each differs from it, as in "
        "{trees: {kind: lightgbm}, net: {kind: mlp}}",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    kind: str = key(
        "mlp",
        f"architecture: {', '.join(MODELS)} (auto = chosen by a rule, docs/training.md), a class of a file of `plugins`, or a "
        f"model that an installed package offers in the entry point group {MODEL_GROUP}",
    )
    hidden: tuple[int, ...] = key((256, 256, 256), "widths of the hidden layers", ge=1)
    dropout: float = key(0.1, "share of activations dropped in training", ge=0, lt=1)
    embedding_max: int = key(32, "widest categorical embedding", ge=1)
    embeddings: str = later_key(
        "none",
        "what numbers become before the first layer: none = they are read as they are, ple = piecewise-linear embeddings with "
        "bins between quantiles of the training rows, periodic = sines and cosines of learned frequencies",
        choices=("none", "ple", "periodic"),
    )
    bins: int = later_key(48, "bins of a number's ple embedding, or its frequencies of periodic", ge=1, le=4096)
    embedding_width: int = later_key(16, "width of a number's embedding", ge=1, le=4096)
    members: int = later_key(32, "networks of a tabm, which share its hidden layers", ge=1, le=1024)
    trees: TreesConfig = later_key(factory=TreesConfig, help="boosted trees, for kind lightgbm and xgboost")
    settings: dict[str, Any] = later_key(factory=dict, help="what the constructor of a plug-in's model takes, by name")
    blend: BlendConfig = later_key(factory=BlendConfig, help="members of a blend, for kind blend")

    def __post_init__(self) -> None:
        if self.kind != BLEND:
            return
        if bool(self.blend.bundles) == bool(self.blend.models):
            raise UserError(
                "blend.bundles must name finished models, or blend.models say which to train, one of the two, found "
                + ("both" if self.blend.models else "neither")
            )
        names = self.blend.bundles or tuple(self.blended)
        if not 2 <= len(set(names)) == len(names) <= MOST_MEMBERS:
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            found = f"{twice[0]} {names.count(twice[0])} times" if twice else f"{len(names)}"
            found += f": {names[0]}" if len(names) == 1 else ""
            raise UserError(f"blend must have 2 to {MOST_MEMBERS} different members, found {found}")

    @property
    def blended(self) -> dict[str, ModelConfig]:
        """The models that a blend trains, by name. Raises UserError."""
        mine = {name: value for name, value in schema.plain(self).items() if name not in ("kind", "blend")}
        found = {}
        for name, keys in self.blend.models.items():
            if keys.get("kind") in (None, AUTO, BLEND):
                raise UserError(
                    f"blend.models.{name}.kind must be a kind of model by itself, found {keys.get('kind')!r}"
                )
            found[name] = schema.build(ModelConfig, {**mine, **keys}, f"model.blend.models.{name}")
        return found


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A target that a network learns beside that of the data. The settings of its loss are those of `train`."""

    column: str = key(help="column that is learnt, which may be missing in a row; its known_at says when it is ripe")
    loss: str = key(help="what is minimised, as train.loss")
    weight: float = key(1.0, "weight of its loss beside that of the data's target, which has 1", gt=0)
    metric: str | None = key(None, "metric that its baselines and importance are in; null = that of the loss")
    positive: str | None = key(None, "positive value of a target with two values, as data.positive")
    class_weight: str = key("none", "weight of its classes in the loss", choices=("none", "balanced"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained."""

    seed: int = key(0, "seed of the row order, initial weights and dropout", ge=0)
    seeds: tuple[int, ...] | int = later_key(
        1,
        "how many models are trained (n: with seeds from n * seed on), or the seed of each ([3, 14]); the model is their mean",
        ge=0,
    )
    loss: str = key(
        "binary",
        f"what is minimised: {', '.join(TASKS)}, the name of a loss in a file of `plugins`, or one that an installed package "
        f"offers in the entry point group {LOSS_GROUP}",
    )
    targets: dict[str, TargetConfig] = later_key(
        factory=dict,
        help="further targets by name, each with a head of the network, a loss, metrics and score columns; the data's target is "
        "the one that training watches, and that gate, monitor and retrain judge",
    )
    quantile: float = key(0.5, "level of the quantile loss", gt=0, lt=1)
    quantiles: tuple[float, ...] = later_key(
        (0.1, 0.5, 0.9), "rising levels of the quantiles loss; scores are columns score_q10, score_q50, ...", gt=0, lt=1
    )
    tweedie_power: float = later_key(
        1.5, "power p of the tweedie loss: the variance of a target grows as its mean ** p", gt=1, lt=2
    )
    focal_gamma: float = later_key(
        2.0,
        "how much less the losses focal and multiclass_focal count rows that are right already; 0 = binary, multiclass",
        ge=0,
    )
    label_smoothing: float = later_key(
        0.0, "share of a target spread evenly over all classes, for the losses binary and multiclass", ge=0, lt=1
    )
    huber_delta: float = key(1.0, "where the Huber loss becomes linear, in standard deviations of the target", gt=0)
    max_classes: int = key(
        100, "most classes of loss=multiclass; a target with more values is usually a number, for another loss", ge=2
    )
    class_weight: str = key("none", "weight of the classes in the loss", choices=("none", "balanced"))
    sampling: str = key(
        "each",
        "an epoch uses each row once, or draws as many with replacement so that classes are equally frequent",
        choices=("each", "balanced"),
    )
    epochs: int | str = key(
        AUTO,
        "passes over the training rows; auto = 10, or as many as needed for 1,000 steps, at most 100",
        parse=units.count(1),
    )
    batch_size: int | str = key(
        AUTO,
        "rows of one optimizer step; auto = a 200th of the training rows, down to a power of two, from 32 to 4096",
        parse=units.count(1),
    )
    shards: int | str = key(
        AUTO,
        "logical shards of a batch, each computed by one thread, so that weights do not depend on threads and workers; "
        "auto = 8, or fewer for a small model: a shard has 140 million multiply-adds, where the batch has",
        parse=units.count(1),
    )
    lr: float = key(0.001, "peak learning rate", gt=0)
    optimizer: str = later_key(
        "adamw",
        "rule of an update; muon: orthogonal updates of hidden matrices, adamw for all else",
        choices=OPTIMIZERS,
    )
    momentum: float = later_key(0.9, "momentum of sgd and muon (usual for muon: 0.95)", ge=0, lt=1)
    weight_decay: float = key(0.01, "weight decay of the optimizer", ge=0)
    decay: str = later_key(
        "auto",
        "what weight decay shrinks: all parameters, or matrices only (not what has one dimension, nor norms and embeddings, nor "
        "what the model's no_weight_decay() names); auto = all of mlp and linear, the matrices of others",
        choices=("auto", "all", "matrices"),
    )
    schedule: str = later_key(
        "cosine",
        "learning rate after warm-up: half a cosine or a line down to 0, or constant; one_cycle rises and falls by half cosines",
        choices=SCHEDULES,
    )
    warmup: float = key(0.05, "share of all steps in which the learning rate rises", ge=0, lt=1)
    ema: float = later_key(
        0.0,
        "decay of a moving average of the weights, as 0.999, which is evaluated, saved and becomes the model; 0 = none",
        ge=0,
        lt=1,
    )
    clip: float = key(1.0, "largest gradient norm; 0 = no clipping", ge=0)
    patience: int | str = key(
        AUTO,
        "epochs without a better validation metric before stopping, 0 = never; auto = a fifth of the epochs, at least 3",
        parse=units.count(0),
    )
    metric: str | None = key(
        None,
        "validation metric to watch, of the engine, of a file of `plugins` or of a package (entry point group "
        f"{METRIC_GROUP}); null = that of the loss, as roc_auc of binary",
    )
    precision: str = key("auto", "arithmetic of the forward pass", choices=("auto", "fp32", "bf16"))
    reduction: str = key("exact", "how gradients are summed", choices=("exact", "ddp"))
    order: str = key("full", "shuffle over all rows or within windows of rows", choices=("full", "windowed"))
    window_rows: int = key(1_000_000, "rows of one window where order=windowed", ge=1)
    on_bad_loss: str = key("stop", "when a loss is NaN or infinite", choices=("stop", "skip"))
    checkpoint_every: int = key(0, "steps between checkpoints; 0 = at epoch ends only", ge=0)
    keep_checkpoints: int = key(2, "newest checkpoints kept", ge=1)
    resume: str = key("auto", "auto continues the newest unfinished run of this plan; never; or a run directory")
    audit_every: int = later_key(
        500,
        "steps between audits, in which another worker or thread computes one shard of the batch again and must come to the same "
        "bits; 0 = none",
        ge=0,
    )
    pause_after: int = later_key(
        0, "epochs after which training pauses, to be continued by the same command with another value; 0 = never", ge=0
    )
    log_every: int = key(50, "steps between lines of metrics.jsonl", ge=1)
    device: str = key("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    start_from: str | None = key(
        None, "model whose encoding and weights training continues from: a run or name@version; null = from scratch"
    )

    @property
    def by_target(self) -> tuple[TrainConfig, ...]:
        """The section as that of each target alone, that of the data first."""
        if not self.targets:
            return (self,)
        alone = replace(self, targets={})
        return (alone, *(alone._of_target(item) for item in self.targets.values()))

    def _of_target(self, target: TargetConfig) -> TrainConfig:
        smoothing = self.label_smoothing if target.loss in SMOOTHED else 0.0
        own = replace(self, loss=target.loss, metric=target.metric, label_smoothing=smoothing)
        return replace(own, class_weight=target.class_weight)

    @property
    def target_weights(self) -> tuple[float, ...]:
        """The weight of each target's loss."""
        return (1.0, *(item.weight for item in self.targets.values()))

    def __post_init__(self) -> None:
        for name in self.targets:
            if not TARGET_NAME.fullmatch(name) or name in RESERVED:
                raise UserError(
                    f"targets.{name}: a name must be letters, digits and underscores, and none of {', '.join(RESERVED)}"
                )
        if self.targets and self.sampling == "balanced":
            raise UserError(
                "sampling=balanced draws rows by the classes of one target, found train.targets: take class_weight"
            )
        if isinstance(self.batch_size, int) and isinstance(self.shards, int) and self.batch_size < self.shards:
            raise UserError(f"batch_size must be at least shards={self.shards}, found {self.batch_size}")
        if not 1 <= len(set(self.every_seed)) == len(self.every_seed) <= MOST_MEMBERS:
            found = self.seeds if isinstance(self.seeds, int) else list(self.seeds)
            raise UserError(
                f"seeds must be a number, 1 to {MOST_MEMBERS}, or a list of so many, each seed once, as in [3, 14], found {found}"
            )
        if not self.quantiles or any(a >= b for a, b in itertools.pairwise(self.quantiles)):
            raise UserError(f"quantiles must be rising levels, as in [0.1, 0.5, 0.9], found {list(self.quantiles)}")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise UserError(f"label_smoothing needs loss={' or '.join(SMOOTHED)}, found loss={self.loss}")
        for name, wrong in (
            ("loss", TASKS.get(self.loss, "binary") not in ("binary", "multiclass")),
            ("class_weight", self.class_weight == "balanced"),
            ("order", self.order == "windowed"),
        ):
            if wrong and self.sampling == "balanced":
                raise UserError(
                    f"sampling=balanced needs a loss over classes, class_weight=none (classes would count twice) and "
                    f"order=full, found {name}={getattr(self, name)}"
                )

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seeds of the models that are trained."""
        if not isinstance(self.seeds, int):
            return self.seeds
        first = self.seed * self.seeds  # models of another `seed` have no member in common with these
        return tuple(range(first, first + self.seeds))


THRESHOLDS = ("f1", "cost", "none")


def _check_threshold(value: Any) -> None:
    if value not in THRESHOLDS if isinstance(value, str) else not 0 <= value <= 1:
        raise UserError(f"must be a number from 0 to 1, or one of {', '.join(THRESHOLDS)}, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on labelled rows."""

    model: str = key("", "run directory or name@alias to evaluate (command `evaluate`)")
    slices: tuple[str, ...] = key((), "columns by which metrics are broken down")
    bootstrap: int = key(200, "resamples of blocks behind the intervals; 0 = none", ge=0)
    confidence: float = key(0.95, "coverage of the intervals", gt=0, lt=1)
    ece_bins: int = key(15, "bins of the calibration error", ge=2)
    block: str = later_key(
        "1d",
        "rows drawn together for intervals: whole local days (1d, 7d), a column whose values do not depend on each other "
        "(patient), days within each of them (patient/7d), or row = every row by itself",
    )
    weighted: bool = key(
        True, "metrics, intervals, early stopping, monitoring and the gate count a row by its weight column"
    )
    threshold: float | str = key(
        "f1",
        "score from which a row is positive: a number from 0 to 1, f1 or cost (the best on validation rows), or none",
        parse=_check_threshold,
    )
    importance: int = later_key(
        5,
        "shuffles of each column and each view on the validation rows, for what the watched metric loses without it; 0 = none",
        ge=0,
    )
    calibration: str = later_key(
        "none",
        "temperature = outputs of a model of classes are divided by the number that gives the least log loss on validation rows",
        choices=("none", "temperature"),
    )
    interval: float | None = later_key(
        None,
        "share of future rows that the columns `lower` and `upper` of a predicted number are to hold (0.9), by the errors on "
        "validation rows; null = no such columns",
        gt=0,
        lt=1,
    )
    false_positive: float = key(1.0, "cost of a negative row taken as positive, for threshold=cost", ge=0)
    false_negative: float = key(1.0, "cost of a positive row taken as negative, for threshold=cost", ge=0)

    def __post_init__(self) -> None:
        if self.block_days is not None and self.block_days < 1:
            raise UserError(f"block must be whole days (1d, 7d), found {self.block!r}")

    @property
    def block_column(self) -> str | None:
        """The column in `block`."""
        name, slash, _ = self.block.rpartition("/")
        return name if slash else None if self.block == "row" or _is_span(self.block) else self.block

    @property
    def block_days(self) -> int | None:
        """The days in `block`: 0 where they are not whole."""
        text = self.block.rpartition("/")[2]
        if self.block == "row" or not ("/" in self.block or _is_span(text)):
            return None
        days, rest = divmod(units.Span(text).microseconds, units.MICROSECONDS["d"])
        return 0 if rest else days


def _is_span(text: str) -> bool:
    try:
        units.Span(text)
    except UserError:
        return False
    return True
