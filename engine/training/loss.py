"""A loss as one object: what is minimised, what an output of the model means, and which targets and metrics belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.training.intervals import IntervalRecord
from engine.training.metrics import DECIDED, METRICS, OF_LOSSES, WITH_INTERVAL, Metric, centre

Array = NDArray[Any]
Task = Literal["binary", "multiclass", "regression", "quantiles"]


@dataclass(frozen=True)
class LossSettings:
    """The keys of `train` that losses read."""

    quantile: float = 0.5
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    huber_delta: float = 1.0
    tweedie_power: float = 1.5
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Targets:
    """The targets that a loss takes: `must` be, in words, and bool[n] of finite targets [n]."""

    must: str = "finite (float32 ends at 3.4e38)"
    good: Callable[[Array], Array] = np.isfinite


@dataclass(frozen=True)
class Loss:
    """One loss with its settings.

    `row_losses`: float32[n] from raw outputs float32[n, outputs] and targets float32[n], in torch, so that autograd gives
    gradients. `link`: scores float64 [n] or [n, k] from raw outputs float64[n, outputs], row by row; None: the output
    itself. `metric`: the one watched by default; `more` names metrics beside those of the task. `unit` of a number: outputs are
    in standard deviations around its mean, or in multiples of its mean. `constant`: the level of the quantile that is
    the best constant; None: the mean. `ordered`: classes have an order. `raw`: outputs of a row of a
    regression. `own`: metrics of the user's. `levels` of quantiles, `power` of a Tweedie
    distribution, `interval` of a finished model.
    """

    name: str
    task: Task
    metric: str
    row_losses: Callable[[Tensor, Tensor], Tensor]
    link: Callable[[Array], Array] | None = None
    more: tuple[str, ...] = ()
    targets: Targets = Targets()
    unit: Literal["deviation", "mean"] = "deviation"
    constant: float | None = None
    ordered: bool = False
    raw: int = 1
    own: tuple[Metric, ...] = ()
    levels: tuple[float, ...] = (0.5,)
    power: float = 1.5
    interval: IntervalRecord | None = None

    @property
    def number(self) -> bool:
        """Whether the target is a number, and not a class."""
        return self.task in ("regression", "quantiles")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of its scores, by name."""
        return {
            **METRICS[self.task],
            **{name: OF_LOSSES[name] for name in self.more},
            **{item.name: item for item in self.own},
        }

    def metrics_at(self, threshold: float | None) -> Mapping[str, Metric]:
        """`metrics`, with those of decisions where there is a threshold, and of intervals where the model has them."""
        more = {**({} if threshold is None else DECIDED), **({} if self.interval is None else WITH_INTERVAL)}
        return {**self.metrics, **more} if more else self.metrics

    def outputs(self, classes: int) -> int:
        """Raw outputs of a row, for a number of classes."""
        if self.task == "quantiles":
            return len(self.levels)
        return self.raw if self.task != "multiclass" else classes - 1 if self.ordered else classes

    def classes(self, outputs: int) -> int:
        """The number of classes of a model with so many raw outputs."""
        return (outputs + 1 if self.ordered else outputs) if self.task == "multiclass" else 2

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Names of the scores of a row where it has several: the classes, or the levels as `q10`, `q50`; empty for one."""
        if self.task == "multiclass":
            return tuple(classes)
        return tuple(f"q{100 * level:.6g}" for level in self.levels) if self.task == "quantiles" else ()

    def centre(self, scores: Array) -> Array:
        """[n]: the score of a number; of its quantiles [n, levels] the one nearest to the median."""
        return centre(scores, self.levels) if self.number else scores
