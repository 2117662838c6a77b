"""The table of metrics: name, task, direction, value and bootstrap of each.

Training, evaluation, the gate between models, monitoring, backtests, reports and the checks of `train.metric` and
`retrain.gate.metric` read METRICS: a metric added there is computed, drawn and judged everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from kernels import metrics as kernels

Array = NDArray[Any]
TINY = float(np.finfo(float).eps)  # lower bound of a probability
BOOTSTRAP_CELLS = 1 << 17  # resamples x rows in memory at once: they fit in a core's cache

# Poisson(1) counts by a 16-bit uniform number: ten times faster than numpy's, probabilities rounded to 2**-16.
_CUMULATED = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])
_POISSON = np.searchsorted(_CUMULATED, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float64)


@dataclass(frozen=True)
class Rows:
    """Rows of one metric value: target float64[n] (0 or 1, class index, or value; finite), scores float64[n] or
    [n, classes].
    """

    target: Array
    scores: Array
    quantile: float = 0.5
    ece_bins: int = 15

    @cached_property
    def error(self) -> Array:
        """float64[n]: target - score."""
        return np.asarray(self.target - self.scores)

    @cached_property
    def taken(self) -> Array:
        """float64[n]: the predicted probability of the true class."""
        if self.scores.ndim == 1:
            return np.where(self.target == 1, self.scores, 1.0 - self.scores)
        return np.asarray(self.scores[np.arange(len(self.target)), self.target.astype(np.int64)])

    @cached_property
    def ranking(self) -> _Ranking:
        """Rows of a binary task in the order of their scores."""
        return _Ranking.of(self.target, self.scores)

    def of_class(self, index: int) -> Rows:
        """The rows with one class against the rest."""
        return Rows((self.target == index).astype(np.float64), self.scores[:, index])


@dataclass(frozen=True)
class _Ranking:
    """Rows of a binary task by falling score, with the last place of each run of equal scores."""

    order: Array
    positive: Array
    last: Array

    @classmethod
    def of(cls, target: Array, scores: Array) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        return cls(order, target[order] == 1, last)


@dataclass(frozen=True)
class Draws:
    """Rows under some resamples: how often each row was drawn, float64[resamples, n]."""

    rows: Rows
    weight: Array

    def mean(self, values: Array) -> Array:
        """float64[resamples] of float64[n]."""
        # Not a matrix product: BLAS adds in an order that depends on its threads.
        return np.asarray((self.weight * values).sum(axis=1) / self.weight.sum(axis=1))

    @cached_property
    def above(self) -> tuple[Array, Array]:
        """(true, false)[resamples, distinct scores]: weight down to each distinct score."""
        ranking = self.rows.ranking
        ranked = self.weight[:, ranking.order]
        true = np.cumsum(ranked * ranking.positive, axis=1)[:, ranking.last]
        return true, np.cumsum(ranked, axis=1)[:, ranking.last] - true


Resampled = Callable[[Rows], Callable[[Draws], Array]]  # the first call computes what all draws share


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    `point` gives its value of rows, NaN where it has none (`undefined` says why, of `n` rows); `resampled` its values
    [resamples] of draws. `quick`: all resamples in one pass, so that every month and slice has an interval; the gate
    may be slower. `chance`: the value of a model without information. `stand_in`: judged where a ranking metric has no value.
    """

    name: str
    label: str
    task: str
    higher_is_better: bool
    point: Callable[[Rows], float]
    resampled: Resampled
    quick: bool = True
    chance: float = 0.0
    stand_in: bool = False
    undefined: str = "it is not finite"

    @property
    def sign(self) -> float:
        """1, or -1 where lower is better: a difference times it is a gain."""
        return 1.0 if self.higher_is_better else -1.0


# ------------------------------------------------------------------------------------------------------ bootstrap


def poisson_weights(rows: int, resamples: int, seed: int = 0) -> Iterator[Array]:
    """Blocks float64[some resamples, rows] of Poisson(1) counts, a function of (seed, rows, resamples): a bootstrap over rows
    that needs no list of them (Chamandy et al.: Estimating uncertainty for massive data streams, 2012).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, rows]))
    block = max(1, BOOTSTRAP_CELLS // max(rows, 1))
    for start in range(0, resamples, block):
        yield _POISSON[generator.integers(0, 1 << 16, (min(block, resamples - start), rows), np.uint16)]


def resample(rows: Rows, metrics: Iterable[Metric], weights: Iterable[Array]) -> dict[str, Array]:
    """float64[resamples] of each metric by name; `weights` are blocks [some resamples, n]."""
    measures = {metric.name: metric.resampled(rows) for metric in metrics}
    found: dict[str, list[Array]] = {name: [] for name in measures}
    with np.errstate(invalid="ignore", divide="ignore"):
        for weight in weights:
            draws = Draws(rows, weight)
            for name, measure in measures.items():
                found[name].append(measure(draws))
    return {name: np.concatenate(values) for name, values in found.items() if values}


def mean_of(values_of: Callable[[Rows], Array]) -> Resampled:
    """The mean of a value that each row has."""

    def prepare(rows: Rows) -> Callable[[Draws], Array]:
        values = values_of(rows)
        return lambda draws: draws.mean(values)

    return prepare


def _root_mean_square(rows: Rows) -> Callable[[Draws], Array]:
    squares = np.square(rows.error)
    return lambda draws: np.sqrt(draws.mean(squares))


def _one_by_one(point: Callable[[Rows, Array], float]) -> Resampled:
    return lambda rows: lambda draws: np.array([point(rows, weight) for weight in draws.weight])


def _before(totals: Array) -> Array:
    return np.pad(totals[:, :-1], ((0, 0), (1, 0)))


def _areas(draws: Draws) -> Array:
    """Areas under the ROC curve; ties count a half."""
    true, false = draws.above
    area = ((false - _before(false)) * (true + _before(true))).sum(axis=1) * 0.5
    return np.asarray(area / (true[:, -1] * false[:, -1]))


def _precisions(draws: Draws) -> Array:
    true, false = draws.above
    precision = true / np.maximum(true + false, 1e-300)
    return np.asarray(((true - _before(true)) * precision).sum(axis=1) / true[:, -1])


# ------------------------------------------------------------------------------------------------- several classes


def _class_rows(rows: Rows) -> list[Rows]:
    """One class against the rest, for each class that occurs beside others."""
    found = [rows.of_class(index) for index in range(rows.scores.shape[1])]
    return [part for part in found if part.target.any() and not part.target.all()]


def _macro_auc(rows: Rows) -> float:
    areas = [kernels.roc_auc(part.target, part.scores) for part in _class_rows(rows)]
    return float(np.mean(areas)) if areas else float("nan")


def _macro_areas(rows: Rows) -> Callable[[Draws], Array]:
    parts = _class_rows(rows)
    return lambda draws: np.asarray(np.mean([_areas(Draws(part, draws.weight)) for part in parts], axis=0))


def _hits(rows: Rows) -> Array:
    return (rows.scores.argmax(axis=1) == rows.target).astype(np.float64)


# ------------------------------------------------------------------------------------------------------- the table


def _binary_losses(rows: Rows) -> Array:
    return -np.log(np.clip(rows.taken, TINY, 1.0))


def _class_losses(rows: Rows) -> Array:
    return -np.log(np.maximum(rows.taken, TINY))


def _pinball_losses(rows: Rows) -> Array:
    return np.maximum(rows.quantile * rows.error, (rows.quantile - 1) * rows.error)


ONE_CLASS = "all {n} rows have the same target"
TABLE = (
    Metric(
        "roc_auc",
        "ROC AUC",
        "binary",
        True,
        lambda rows: kernels.roc_auc(rows.target, rows.scores),
        lambda _: _areas,
        chance=0.5,
        undefined=ONE_CLASS,
    ),
    Metric(
        "average_precision",
        "Average precision",
        "binary",
        True,
        lambda rows: kernels.average_precision(rows.target, rows.scores),
        lambda _: _precisions,
        undefined="there are no positive rows",
    ),
    Metric(
        "log_loss",
        "Log loss",
        "binary",
        False,
        lambda rows: kernels.log_loss(rows.target, rows.scores),
        mean_of(_binary_losses),
        stand_in=True,
    ),
    Metric(
        "brier",
        "Brier score",
        "binary",
        False,
        lambda rows: kernels.brier(rows.target, rows.scores),
        mean_of(lambda rows: np.square(rows.scores - rows.target)),
    ),
    Metric(
        "ece",
        "Calibration error",
        "binary",
        False,
        lambda rows: kernels.ece(rows.target, rows.scores, bins=rows.ece_bins),
        _one_by_one(lambda rows, weight: kernels.ece(rows.target, rows.scores, weight, bins=rows.ece_bins)),
        quick=False,
        stand_in=True,
    ),
    Metric("accuracy", "Accuracy", "multiclass", True, lambda rows: float(_hits(rows).mean()), mean_of(_hits)),
    Metric(
        "log_loss",
        "Log loss",
        "multiclass",
        False,
        lambda rows: float(_class_losses(rows).mean()),
        mean_of(_class_losses),
        stand_in=True,
    ),
    Metric(
        "macro_auc",
        "Macro ROC AUC",
        "multiclass",
        True,
        _macro_auc,
        _macro_areas,
        quick=False,
        chance=0.5,
        undefined=ONE_CLASS,
    ),
    Metric(
        "mae",
        "Mean absolute error",
        "regression",
        False,
        lambda rows: float(np.abs(rows.error).mean()),
        mean_of(lambda rows: np.abs(rows.error)),
    ),
    Metric(
        "rmse",
        "Root mean squared error",
        "regression",
        False,
        lambda rows: float(np.sqrt(np.square(rows.error).mean())),
        _root_mean_square,
    ),
    Metric(
        "pinball",
        "Pinball loss",
        "regression",
        False,
        lambda rows: kernels.pinball(rows.target, rows.scores, rows.quantile),
        mean_of(_pinball_losses),
    ),
)
METRICS: dict[str, dict[str, Metric]] = {}  # task -> name -> metric
for _metric in TABLE:
    METRICS.setdefault(_metric.task, {})[_metric.name] = _metric


def find_metric(name: str) -> Metric:
    """The metric of a name, of any task: label and direction are the same in all. Raises UserError for another name."""
    known = {name: metric for found in METRICS.values() for name, metric in found.items()}
    if name not in known:
        raise UserError(f"a metric must be one of {', '.join(known)}, found {name[:80]!r}")
    return known[name]


def decimals(value: float, sign: str = "") -> str:
    """A metric as text: four decimals, or four digits where these would be zeros; `sign` may be `+`."""
    return f"{value:{sign}.4g}" if 0 < abs(value) < 5e-5 else f"{value:{sign}.4f}"
