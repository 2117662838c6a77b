"""What a report draws of scored rows: curves of a binary model, its decisions and their costs, and numbers by prediction."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import EvaluateConfig
from engine.training.decision import at_levels
from kernels import metrics as kernels

Array = NDArray[Any]
CURVE_POINTS = 200
DECILES = 10


class Curves(TypedDict, total=False):
    """What is drawn of a binary model: `x` and `y`, or lists by name; `confusion`, weights of rows."""

    calibration: dict[str, list[float]]
    histogram: dict[str, list[float]]
    roc: dict[str, list[float]]
    pr: dict[str, list[float]]
    gains: dict[str, list[float]]
    costs: dict[str, list[float]]
    confusion: dict[str, float]


def binary_curves(
    target: Array, scores: Array, weight: Array | None, config: EvaluateConfig, threshold: float | None
) -> Curves:
    """Calibration, scores by class, ROC, precision and recall, gains, cost by threshold, and the confusion at `threshold`.

    Shape: target float64[n] (0 or 1), scores float64[n], weight [n] (None: 1 each).
    """
    table = kernels.reliability(target, scores, weight, bins=config.ece_bins)
    used = table.weight > 0
    edges = np.linspace(0, 1, 41)

    def histogram(rows: Array) -> list[float]:
        weights = None if weight is None else weight[rows]
        return list(np.histogram(scores[rows], edges, weights=weights)[0].tolist())

    details: Curves = {
        "calibration": {
            "score": table.score[used].tolist(),
            "positive": table.positive[used].tolist(),
            "rows": table.weight[used].tolist(),
        },
        "histogram": {
            "edges": edges.tolist(),
            "negative": histogram(target == 0),
            "positive": histogram(target == 1),
        },
    }
    times = np.ones(len(target)) if weight is None else weight.astype(np.float64)
    if threshold is not None:
        details["confusion"] = confusion(target == 1, scores >= threshold, times)
    if target.min() < target.max():
        details["roc"] = _curve(*kernels.roc_curve(target, scores, weight))
        details["pr"] = _curve(*kernels.precision_recall_curve(target, scores, weight))
        levels, true, false = at_levels(target, scores, times)
        rows = (true + false) / times.sum()
        details["gains"] = _curve(np.append(0.0, rows), np.append(0.0, true / true[-1]))
        costs = config.false_positive * false + config.false_negative * (true[-1] - true)
        details["costs"] = _curve(levels[::-1], costs[::-1] / times.sum())
    return details


def confusion(positive: Array, taken: Array, weight: Array) -> dict[str, float]:
    """The weight of rows by what they are and what they are taken as, from bool[n], bool[n] and float64[n]."""
    pairs = {
        "true_positives": positive & taken,
        "false_positives": ~positive & taken,
        "false_negatives": positive & ~taken,
        "true_negatives": ~positive & ~taken,
    }
    return {name: float(weight[rows].sum()) for name, rows in pairs.items()}


def by_prediction(target: Array, scores: Array, weight: Array | None) -> list[dict[str, float]]:
    """Rows of a number in DECILES groups of rising score, equal scores together: rows, means of score and target, error.

    Shape: target float64[n], scores float64[n], weight [n] (None: 1 each). `mean_error` is score - target.
    """
    times = np.ones(len(target)) if weight is None else weight.astype(np.float64)
    cuts = np.arange(1, DECILES) / DECILES
    edges = np.unique(np.quantile(scores, cuts, weights=times, method="inverted_cdf"))
    place = np.searchsorted(edges, scores, side="right")
    found = []
    for group in np.unique(place):
        rows = place == group
        share = times[rows] / times[rows].sum()
        error = scores[rows] - target[rows]
        figures = {"score": scores[rows], "target": target[rows], "mean_error": error, "absolute_error": np.abs(error)}
        found.append(
            {"rows": float(rows.sum()), **{name: float((share * value).sum()) for name, value in figures.items()}}
        )
    return found


def _curve(x: Array, y: Array) -> dict[str, list[float]]:
    """At most CURVE_POINTS points, spread evenly along x, first and last kept."""
    wanted = np.linspace(x[0], x[-1], CURVE_POINTS)
    places = np.unique(np.concatenate([[0], np.minimum(np.searchsorted(x, wanted), len(x) - 1), [len(x) - 1]]))
    return {"x": x[places].tolist(), "y": y[places].tolist()}
