"""Conformal intervals of a number: bounds that hold a stated share of future rows, whatever the model.

Whole blocks of validation rows (days) are what is exchangeable, not single rows: Dunn, Wasserman, Ramdas: Distribution-free
prediction sets for two-layer hierarchical models, JASA 2023 (pooled distribution, with one block more that is not covered).
The width grows with the score as errors do: isotonic regression on every second block, the line on the others (Lei et al.:
Distribution-free predictive inference for regression, JASA 2018). Quantiles are moved apart instead (Romano, Patterson,
Candès: Conformalized quantile regression, NeurIPS 2019).
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.runtime.records import Within

Array = NDArray[Any]
LOWER, UPPER = "lower", "upper"  # columns of an output
KNOTS = 33
LEAST_SCALE = 1e-3  # of the median scale: no interval is a point
Finite = Annotated[float, Within(-1e300, 1e300)]


class IntervalRecord(TypedDict):
    """The intervals in model.json: the share of rows that they hold, their half width, and the scale of it by score
    (`scores`, `scales`; between them on a line, one each for a constant).
    """

    level: Annotated[float, Within(0, 1)]
    width: Annotated[float, Within(0, 1e300)]
    scores: list[Finite]
    scales: list[Annotated[float, Within(0, 1e300)]]


def bounds_of(interval: IntervalRecord, scores: Array) -> tuple[Array, Array]:
    """(lower, upper) float64[n] of scores [n], or of quantiles [n, levels]; a row's bounds do not depend on others."""
    wide = scores.astype(np.float64)
    if wide.ndim == 2:
        return wide[:, 0] - interval["width"], wide[:, -1] + interval["width"]
    half = interval["width"] * _scale(interval["scores"], interval["scales"], wide)
    return wide - half, wide + half


def fit_interval(
    level: float, target: Array, scores: Array, blocks: Array, weight: Array | None
) -> IntervalRecord | None:
    """The intervals of validation rows: target [n], scores [n] or [n, levels], blocks [n], weight [n] (None: 1 each).

    None where there are too few blocks for the level: of B blocks a share of B / (B + 1) at most can be promised.
    """
    used = np.isfinite(target) & np.isfinite(scores.reshape(len(target), -1)).all(axis=1)
    if weight is not None:
        used &= weight > 0
    target, scores, blocks = target[used].astype(np.float64), scores[used].astype(np.float64), blocks[used]
    times = np.ones(len(target)) if weight is None else weight[used].astype(np.float64)
    place = np.unique(blocks, return_inverse=True)[1]
    if not len(target) or not _enough(level, int(place.max()) + 1):
        return None
    if scores.ndim == 2:
        outside = np.maximum(scores[:, 0] - target, target - scores[:, -1])
        width = _pooled(outside, place, times, level)
        return None if width is None else {"level": level, "width": max(width, 0.0), "scores": [0.0], "scales": [1.0]}
    errors = np.abs(target - scores)
    knots, scales = [0.0], [1.0]
    judging = np.ones(len(target), bool)
    if _enough(level, (int(place.max()) + 1) // 2) and errors.any():
        judging = place % 2 == 1
        knots, scales = _scales(scores[~judging], errors[~judging], times[~judging])
    ratio = errors[judging] / _scale(knots, scales, scores[judging])
    found = _pooled(ratio, np.unique(place[judging], return_inverse=True)[1], times[judging], level)
    return None if found is None else {"level": level, "width": found, "scores": knots, "scales": scales}


def _enough(level: float, blocks: int) -> bool:
    return blocks / (blocks + 1) >= level


def _pooled(values: Array, place: Array, weight: Array, level: float) -> float | None:
    """The least value with a share of `level` at or below it, where each block has one share, and one block is not covered."""
    sums = np.bincount(place, weight)
    shares = weight / sums[place] / (len(sums) + 1)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(shares[order]) >= level - 1e-12
    return float(values[order][np.argmax(reached)]) if reached.any() else None


def _scales(scores: Array, errors: Array, weight: Array) -> tuple[list[float], list[float]]:
    """Knots (scores, scales) of a rising scale: isotonic regression of errors on scores, read at quantiles of the scores."""
    from scipy.optimize import isotonic_regression  # half a second of imports, for models with intervals only

    order = np.argsort(scores, kind="stable")
    fitted = isotonic_regression(errors[order], weights=weight[order]).x
    places = np.unique(np.linspace(0, len(order) - 1, KNOTS).round().astype(int))
    knots, first = np.unique(scores[order][places], return_index=True)
    scales = fitted[places][first]
    least = max(LEAST_SCALE * float(np.median(fitted)), float(np.finfo(float).tiny), 1e-12 * float(errors.max()))
    return knots.tolist(), np.maximum(scales, least).tolist()


def _scale(knots: list[float], scales: list[float], scores: Array) -> Array:
    return np.interp(scores, knots, scales)
