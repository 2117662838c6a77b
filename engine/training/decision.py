"""The class that a model decides for: of several the one with the highest score, of two the positive one from a threshold up.

The threshold is chosen in the config or fitted on validation rows, and is kept in `model.json`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import EvaluateConfig
from engine.runtime.records import Within
from engine.training.loss import Loss

COLUMN = "decision"  # of every output of `score`


class Decision(TypedDict):
    """How scores become classes: `highest` of several; of two `f1` and `cost` (fitted) or `chosen`, with a threshold."""

    rule: Literal["highest", "f1", "cost", "chosen"]
    threshold: NotRequired[Annotated[float, Within(0, 2)]]


def fit_decision(
    config: EvaluateConfig, loss: Loss, target: NDArray, scores: NDArray, weight: NDArray | None
) -> Decision | None:
    """The rule of a model from its validation rows: target [n], scores [n] or [n, classes], weight [n] (None: 1 each).

    None where there is nothing to decide: for a number, for `evaluate.threshold=none`, and for `f1` or `cost` without rows of
    both classes.
    """
    if loss.number or config.threshold == "none":
        return None
    if loss.task == "multiclass":
        return {"rule": "highest"}
    if not isinstance(config.threshold, str):
        return {"rule": "chosen", "threshold": float(config.threshold)}
    used = np.isfinite(target) & np.isfinite(scores)
    if weight is not None:
        used &= weight > 0
    target, scores = target[used], scores[used].astype(np.float64)
    if not len(target) or target.min() == target.max():
        return None
    times = np.ones(len(target)) if weight is None else weight[used].astype(np.float64)
    if config.threshold == "f1":
        return {"rule": "f1", "threshold": best_f1(target, scores, times)}
    return {
        "rule": "cost",
        "threshold": least_cost(target, scores, times, config.false_positive, config.false_negative),
    }


def decide(decision: Decision, scores: NDArray) -> NDArray[np.int64]:
    """int64[n]: the class of each row, from scores [n] (1 = positive) or [n, classes]; of equal scores the first class."""
    if scores.ndim == 2:
        return np.asarray(scores.argmax(axis=1))
    return (scores.astype(np.float64) >= decision["threshold"]).astype(np.int64)


def best_f1(target: NDArray, scores: NDArray, weight: NDArray) -> float:
    """The score from which rows are positive so that F1 = 2 TP / (2 TP + FP + FN) is largest; of several the highest."""
    levels, true, false = at_levels(target, scores, weight)
    return float(levels[np.argmax(2 * true / (true + false + true[-1]))])


def least_cost(
    target: NDArray, scores: NDArray, weight: NDArray, false_positive: float, false_negative: float
) -> float:
    """The score from which rows are positive so that errors cost least; of several the highest, above all scores at most."""
    levels, true, false = at_levels(target, scores, weight)
    costs = false_positive * false + false_negative * (true[-1] - true)
    none = false_negative * true[-1]  # of a threshold above all scores
    return float(np.nextafter(levels[0], 2.0)) if none <= costs.min() else float(levels[np.argmin(costs)])


def at_levels(target: NDArray, scores: NDArray, weight: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Distinct scores [m], falling, with the weight of positive and of negative rows from each of them up."""
    order = np.argsort(-scores, kind="stable")
    ranked, positive, weight = scores[order], target[order] == 1, weight[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    return ranked[last], np.cumsum(weight * positive)[last], np.cumsum(weight * ~positive)[last]
