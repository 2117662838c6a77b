"""The table of metrics: name, task, direction, value of each, and its values under resampled blocks of rows.

Training, evaluation, the gate between models, monitoring, backtests, reports and the checks of `train.metric` and
`retrain.gate.metric` read METRICS: a metric added there is computed, drawn and judged everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.training.intervals import IntervalRecord, bounds_of
from engine.training.resampling import BlockSums, add_up
from kernels import metrics as kernels

Array = NDArray[Any]
TINY = float(np.finfo(float).eps)  # lower bound of a probability
RANKS = (
    512  # groups of equal scores in the block sums of a ranking metric; more would not change the spread of its values
)


@dataclass(frozen=True)
class Rows:
    """Rows of one metric value: target float64[n] (0 or 1, class index, or value; finite), scores float64[n] or
    [n, classes] or [n, levels], weight float64[n] (None: 1 each; not all 0), threshold: the score from which a row is taken as
    positive. `levels` of quantiles, rising, the `power` of a Tweedie distribution and the `interval`: those of the loss.
    """

    target: Array
    scores: Array
    levels: tuple[float, ...] = (0.5,)
    ece_bins: int = 15
    weight: Array | None = None
    threshold: float | None = None
    power: float = 1.5
    interval: IntervalRecord | None = None

    @cached_property
    def inside(self) -> Array:
        """float64[n]: 1 for a target within the interval of its score."""
        assert self.interval is not None
        lower, upper = bounds_of(self.interval, self.scores)
        return ((lower <= self.target) & (self.target <= upper)).astype(np.float64)

    @cached_property
    def error(self) -> Array:
        """float64[n]: target - score; of several quantiles the one nearest to the median."""
        return np.asarray(self.target - centre(self.scores, self.levels))

    @cached_property
    def taken(self) -> Array:
        """float64[n]: the predicted probability of the true class."""
        if self.scores.ndim == 1:
            return np.where(self.target == 1, self.scores, 1.0 - self.scores)
        return np.asarray(self.scores[np.arange(len(self.target)), self.target.astype(np.int64)])

    @cached_property
    def groups(self) -> Array:
        """int64[n]: rows of a binary task in up to RANKS groups of rising scores, with as many different scores in each."""
        edges = np.unique(self.scores)
        edges = edges[np.arange(min(RANKS, len(edges))) * len(edges) // min(RANKS, max(len(edges), 1))]
        return np.searchsorted(edges, self.scores, side="right") - 1

    def mean(self, values: Array) -> float:
        """The mean of float64[n]."""
        if self.weight is None:
            return float(values.mean())
        return float((values * self.weight).sum() / self.weight.sum())

    def of_class(self, index: int) -> Rows:
        """The rows with one class against the rest."""
        return replace(self, target=(self.target == index).astype(np.float64), scores=self.scores[:, index])


def centre(scores: Array, levels: tuple[float, ...]) -> Array:
    """[n]: the score of a number, or of its quantiles [n, levels] the one nearest to the median."""
    return scores if scores.ndim == 1 else scores[:, int(np.argmin(np.abs(np.asarray(levels) - 0.5)))]


InBlocks = Callable[[Rows, Array, int], BlockSums]  # of rows, the block int64[n] of each, and the number of blocks


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    `point` gives its value of rows, NaN where it has none (`undefined` says why, of `n` rows); `in_blocks` its sums of
    blocks. `chance`: the value of a model without information; `most`: the largest value. `stand_in`: judged where a ranking
    metric has no value.
    """

    name: str
    label: str
    task: str
    higher_is_better: bool
    point: Callable[[Rows], float]
    in_blocks: InBlocks
    chance: float = 0.0
    most: float = math.inf
    stand_in: bool = False
    undefined: str = "it is not finite"

    @property
    def sign(self) -> float:
        """1, or -1 where lower is better: a difference times it is a gain."""
        return 1.0 if self.higher_is_better else -1.0


def _weights(rows: Rows) -> Array:
    return np.ones(len(rows.target)) if rows.weight is None else rows.weight


def mean_of(
    values_of: Callable[[Rows], Array], after: Callable[[Array], Array] = np.asarray
) -> tuple[Callable[[Rows], float], InBlocks]:
    """`point` and `in_blocks` of the mean of a value that each row has; of `after` of that mean where it is given."""

    def in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
        weight = _weights(rows)
        sums = add_up(place, blocks, (values_of(rows) * weight, weight))
        return BlockSums(sums, lambda added: after(added[:, 0] / added[:, 1]))

    return lambda rows: float(after(np.asarray(rows.mean(values_of(rows))))), in_blocks


def ratio_of(
    columns_of: Callable[[Rows], Iterable[Array]], value: Callable[[Array], Array]
) -> tuple[Callable[[Rows], float], InBlocks]:
    """`point` and `in_blocks` of a metric that is `value` [m] of weighted sums [m, k] of k columns [n]."""

    def in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
        weight = _weights(rows)
        return BlockSums(add_up(place, blocks, [column * weight for column in columns_of(rows)]), value)

    return lambda rows: in_blocks(rows, np.zeros(len(rows.target), np.int64), 1).whole(), in_blocks


def _of_ranks(values: Callable[[Array, Array], Array]) -> InBlocks:
    """From values [m] of (positives, negatives)[m, groups], weights by falling score."""

    def in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
        width = int(rows.groups.max(initial=0)) + 1
        column = (rows.target == 1) * width + (width - 1 - rows.groups)
        sums = np.bincount(place * (2 * width) + column, _weights(rows), blocks * 2 * width)
        return BlockSums(sums.reshape(blocks, -1), lambda added: values(added[:, width:], added[:, :width]))

    return in_blocks


def _areas(positive: Array, negative: Array) -> Array:
    """Areas under the ROC curve; ties count a half."""
    above = np.cumsum(positive, axis=1)
    return np.asarray((negative * (above - positive / 2)).sum(axis=1) / (above[:, -1] * negative.sum(axis=1)))


def _precisions(positive: Array, negative: Array) -> Array:
    true, false = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    return np.asarray((positive * true / np.maximum(true + false, 1e-300)).sum(axis=1) / true[:, -1])


def _lifts(positive: Array, negative: Array) -> Array:
    """Share of positives among the LIFTED share of rows with the highest scores, over that of all; ties in proportion."""
    rows, found = np.cumsum(positive + negative, axis=1), np.cumsum(positive, axis=1)
    rows, found = (np.pad(sums, ((0, 0), (1, 0))) for sums in (rows, found))
    wanted = LIFTED * rows[:, -1]
    above = np.array([np.interp(most, *sums) for most, *sums in zip(wanted, rows, found, strict=True)])
    return np.asarray(above / (LIFTED * found[:, -1]))


def _lift(rows: Rows) -> float:
    levels, place = np.unique(-rows.scores, return_inverse=True)
    sums = add_up(place, len(levels), [_weights(rows) * (rows.target == label) for label in (1, 0)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(_lifts(sums[None, :, 0], sums[None, :, 1])[0])


# ------------------------------------------------------------------------------------------------------- decisions


def _decided(rows: Rows) -> tuple[Array, Array, Array]:
    """Positive rows taken as positive, rows taken as positive, positive rows: 0 or 1 each."""
    taken, positive = rows.scores >= rows.threshold, rows.target == 1
    return taken & positive, taken, positive


def _confusion(rows: Rows) -> list[Array]:
    """Of each class: rows of it that are taken as it, rows taken as it, rows of it."""
    chosen, classes = rows.scores.argmax(axis=1), range(rows.scores.shape[1])
    right = chosen == rows.target
    return [
        *(right & (chosen == k) for k in classes),
        *(chosen == k for k in classes),
        *(rows.target == k for k in classes),
    ]


def _macro(value: Callable[[Array, Array, Array], Array]) -> Callable[[Array], Array]:
    """The mean over the classes that occur or are taken, 0 for one with no value, as scikit-learn's `macro`."""

    def mean(sums: Array) -> Array:
        right, taken, there = np.split(sums, 3, axis=1)
        known = (taken + there) > 0
        found = np.where(known, np.nan_to_num(value(right, taken, there)), 0.0)
        return np.asarray(found.sum(axis=1) / known.sum(axis=1))

    return mean


def _calibration_in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
    bins, weight = rows.ece_bins, _weights(rows)
    edges = np.linspace(0.0, 1.0, bins + 1)
    cell = place * bins + np.minimum(np.searchsorted(edges, rows.scores, side="right") - 1, bins - 1)
    gaps = np.bincount(cell, weight * (rows.target - rows.scores), blocks * bins).reshape(blocks, bins)
    sums = np.concatenate([gaps, add_up(place, blocks, [weight])], axis=1)
    return BlockSums(sums, lambda added: np.abs(added[:, :-1]).sum(axis=1) / added[:, -1])


# ------------------------------------------------------------------------------------------------- several classes


def _class_rows(rows: Rows) -> list[Rows]:
    """One class against the rest, for each class that occurs beside others."""
    found = [rows.of_class(index) for index in range(rows.scores.shape[1])]
    return [part for part in found if part.target.any() and not part.target.all()]


def _macro_auc(rows: Rows) -> float:
    areas = [kernels.roc_auc(part.target, part.scores, part.weight) for part in _class_rows(rows)]
    return float(np.mean(areas)) if areas else float("nan")


def _macro_in_blocks(rows: Rows, place: Array, blocks: int) -> BlockSums:
    parts = [_of_ranks(_areas)(part, place, blocks) for part in _class_rows(rows)]
    cuts = np.cumsum([part.sums.shape[1] for part in parts])[:-1]

    def values(added: Array) -> Array:
        pieces = np.split(added, cuts, axis=1)
        return np.asarray(np.mean([part.values(piece) for part, piece in zip(parts, pieces, strict=True)], axis=0))

    return BlockSums(np.concatenate([part.sums for part in parts], axis=1), values)


def _hits(rows: Rows) -> Array:
    return (rows.scores.argmax(axis=1) == rows.target).astype(np.float64)


# ------------------------------------------------------------------------------------------------------- the table


def _binary_losses(rows: Rows) -> Array:
    return -np.log(np.clip(rows.taken, TINY, 1.0))


def _class_losses(rows: Rows) -> Array:
    return -np.log(np.maximum(rows.taken, TINY))


def _pinball_losses(rows: Rows) -> Array:
    level = rows.levels[0]
    return np.maximum(level * rows.error, (level - 1) * rows.error)


def _mean_pinball_losses(rows: Rows) -> Array:
    """float64[n]: the mean of the levels."""
    levels, error = np.asarray(rows.levels), rows.target[:, None] - rows.scores
    return np.asarray(np.maximum(levels * error, (levels - 1) * error).mean(axis=1))


def _outside(rows: Rows) -> list[Array]:
    """Rows between the lowest and the highest quantile, and the share of rows that these levels promise there."""
    inside = (rows.scores[:, 0] <= rows.target) & (rows.target <= rows.scores[:, -1])
    return [inside.astype(np.float64), np.full(len(inside), rows.levels[-1] - rows.levels[0]), np.ones(len(inside))]


def _deviances(power: float, target: Array, scores: Array) -> Array:
    """float64[n]: deviance of a Tweedie distribution of variance mean ** power; 1 is Poisson's, 2 Gamma's. NaN where there is
    none. Jorgensen: Exponential dispersion models, Journal of the Royal Statistical Society B, 1987.
    """
    with np.errstate(all="ignore"):
        if power == 1:
            found = np.where(target > 0, target * np.log(target / scores), 0.0) - target + scores
        elif power == 2:
            found = np.log(scores / target) + target / scores - 1
        else:
            a, b = 1 - power, 2 - power
            found = target**b / (a * b) - target * scores**a / a + scores**b / b
        return np.where((scores > 0) & (target >= 0), 2 * found, np.nan)


def _ordered(rows: Rows) -> list[Array]:
    """Columns of Cohen's kappa with quadratic weights: of classes in order, c taken and k true, 1, c, k, c^2 + k^2, (c - k)^2."""
    chosen = rows.scores.argmax(axis=1).astype(np.float64)
    squares = np.square(chosen) + np.square(rows.target)
    return [np.ones(len(chosen)), chosen, rows.target, squares, np.square(chosen - rows.target)]


def _kappa(sums: Array) -> Array:
    """1 - disagreement over that of independent classes (Cohen: Weighted kappa, Psychological Bulletin, 1968)."""
    rows, chosen, there, squares, apart = sums.T
    return np.asarray(1 - apart / (squares - 2 * chosen * there / rows))


LIFTED = 0.1  # share of the rows
ONE_CLASS = "all {n} rows have the same target"
TABLE = (
    Metric(
        "roc_auc",
        "ROC AUC",
        "binary",
        True,
        lambda rows: kernels.roc_auc(rows.target, rows.scores, rows.weight),
        _of_ranks(_areas),
        chance=0.5,
        most=1.0,
        undefined=ONE_CLASS,
    ),
    Metric(
        "average_precision",
        "Average precision",
        "binary",
        True,
        lambda rows: kernels.average_precision(rows.target, rows.scores, rows.weight),
        _of_ranks(_precisions),
        most=1.0,
        undefined="there are no positive rows",
    ),
    Metric(
        "log_loss",
        "Log loss",
        "binary",
        False,
        lambda rows: kernels.log_loss(rows.target, rows.scores, rows.weight),
        mean_of(_binary_losses)[1],
        stand_in=True,
    ),
    Metric(
        "brier",
        "Brier score",
        "binary",
        False,
        lambda rows: kernels.brier(rows.target, rows.scores, rows.weight),
        mean_of(lambda rows: np.square(rows.scores - rows.target))[1],
    ),
    Metric(
        "ece",
        "Calibration error",
        "binary",
        False,
        lambda rows: kernels.ece(rows.target, rows.scores, rows.weight, bins=rows.ece_bins),
        _calibration_in_blocks,
        stand_in=True,
    ),
    Metric(
        "lift_10",
        "Lift of the top 10 %",
        "binary",
        True,
        _lift,
        _of_ranks(_lifts),
        chance=1.0,
        undefined="there are no positive rows",
    ),
    Metric("accuracy", "Accuracy", "multiclass", True, *mean_of(_hits), most=1.0),
    Metric("log_loss", "Log loss", "multiclass", False, *mean_of(_class_losses), stand_in=True),
    Metric(
        "macro_auc",
        "Macro ROC AUC",
        "multiclass",
        True,
        _macro_auc,
        _macro_in_blocks,
        chance=0.5,
        most=1.0,
        undefined=ONE_CLASS,
    ),
    Metric(
        "macro_precision",
        "Macro precision",
        "multiclass",
        True,
        *ratio_of(_confusion, _macro(lambda right, taken, _: right / taken)),
        most=1.0,
    ),
    Metric(
        "macro_recall",
        "Macro recall",
        "multiclass",
        True,
        *ratio_of(_confusion, _macro(lambda right, _, there: right / there)),
        most=1.0,
    ),
    Metric(
        "macro_f1",
        "Macro F1",
        "multiclass",
        True,
        *ratio_of(_confusion, _macro(lambda right, taken, there: 2 * right / (taken + there))),
        most=1.0,
    ),
    Metric("mae", "Mean absolute error", "regression", False, *mean_of(lambda rows: np.abs(rows.error))),
    Metric(
        "rmse",
        "Root mean squared error",
        "regression",
        False,
        *mean_of(lambda rows: np.square(rows.error), np.sqrt),
    ),
    Metric(
        "pinball",
        "Pinball loss",
        "regression",
        False,
        lambda rows: kernels.pinball(rows.target, rows.scores, rows.levels[0], rows.weight),
        mean_of(_pinball_losses)[1],
    ),
    Metric("pinball", "Pinball loss", "quantiles", False, *mean_of(_mean_pinball_losses)),
    Metric("mae", "Mean absolute error", "quantiles", False, *mean_of(lambda rows: np.abs(rows.error))),
    Metric(
        "coverage_error",
        "Coverage error",
        "quantiles",
        False,
        *ratio_of(_outside, lambda sums: np.abs(sums[:, 0] - sums[:, 1]) / sums[:, 2]),
        most=1.0,
    ),
)
METRICS: dict[str, dict[str, Metric]] = {}  # task -> name -> metric
for _metric in TABLE:
    METRICS.setdefault(_metric.task, {})[_metric.name] = _metric
OF_USERS: dict[str, Metric] = {}  # those that this process has loaded, see user_losses
NOT_POSITIVE = "a score is not above 0, or a target is out of range"
# Of the losses that name them, beside those of the task.
OF_LOSSES = {
    metric.name: metric
    for metric in (
        *(
            Metric(
                f"{name.lower()}_deviance",
                f"{name} deviance",
                "regression",
                False,
                *mean_of(lambda rows, power=power: _deviances(power or rows.power, rows.target, rows.scores)),  # type: ignore[misc]
                undefined=NOT_POSITIVE,
            )
            for name, power in (("Poisson", 1), ("Gamma", 2), ("Tweedie", 0))
        ),
        Metric(
            "quadratic_kappa",
            "Quadratic kappa",
            "multiclass",
            True,
            *ratio_of(_ordered, _kappa),
            most=1.0,
            undefined="all {n} rows have the same class and are taken as it",
        ),
        Metric(
            "class_distance",
            "Mean distance of classes",
            "multiclass",
            False,
            *mean_of(lambda rows: np.abs(rows.scores.argmax(axis=1) - rows.target)),
        ),
    )
}
# Of a model with intervals: how far the share of targets within them is from the promised one.
WITH_INTERVAL = {
    "interval_error": Metric(
        "interval_error",
        "Interval coverage error",
        "regression",
        False,
        lambda rows: abs(rows.mean(rows.inside) - rows.interval["level"]),  # type: ignore[index]
        lambda rows, place, blocks: BlockSums(
            add_up(place, blocks, (rows.inside * _weights(rows), _weights(rows))),
            lambda sums: np.abs(sums[:, 0] / sums[:, 1] - rows.interval["level"]),  # type: ignore[index]
        ),
        most=1.0,
    )
}
# Of a binary model with a threshold: two models may have different ones, so no metric of these chooses a model.
DECIDED = {
    metric.name: metric
    for metric in (
        Metric(
            "precision",
            "Precision",
            "binary",
            True,
            *ratio_of(_decided, lambda sums: sums[:, 0] / sums[:, 1]),
            most=1.0,
            undefined="no row is taken as positive",
        ),
        Metric(
            "recall",
            "Recall",
            "binary",
            True,
            *ratio_of(_decided, lambda sums: sums[:, 0] / sums[:, 2]),
            most=1.0,
            undefined="there are no positive rows",
        ),
        Metric(
            "f1",
            "F1",
            "binary",
            True,
            *ratio_of(_decided, lambda sums: 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2])),
            most=1.0,
            undefined="no row is positive or taken as positive",
        ),
    )
}


BUILT_IN = frozenset([*(name for found in METRICS.values() for name in found), *OF_LOSSES, *DECIDED])


def find_metric(name: str) -> Metric:
    """The metric of a name, of any task: label and direction are the same in all. Raises UserError for another name."""
    known = {name: metric for found in (*METRICS.values(), OF_LOSSES, OF_USERS) for name, metric in found.items()}
    if name not in known:
        raise UserError(f"a metric must be one of {', '.join(known)}, found {name[:80]!r}")
    return known[name]


def decimals(value: float, sign: str = "") -> str:
    """A metric as text: four decimals, or four digits where these would be zeros; `sign` may be `+`."""
    return f"{value:{sign}.4g}" if 0 < abs(value) < 5e-5 else f"{value:{sign}.4f}"
