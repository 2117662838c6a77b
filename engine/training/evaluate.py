"""Evaluation on labelled rows: metrics and their intervals, over all rows, by month and by slice.

Intervals are percentiles of a reproducible bootstrap over rows. A metric that cannot be computed has a reason and never
raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.training import EvaluateConfig
from engine.data.calendar import local_months
from engine.errors import UserError, nearest
from engine.training.classes import ScoreMeaning
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS, Metric, Rows, poisson_weights, resample
from kernels import metrics as kernels

Array = NDArray[Any]
CURVE_POINTS = 200
LARGEST_BOOTSTRAP = 2_000_000  # rows; with more rows an interval is too narrow to matter
CLASS_FIGURES = ("rows", "precision", "recall", "f1")
SLICE_VALUES = 50  # most frequent values of a slice that are listed


def watched_metric(loss: str, wanted: str | None, where: str = "train.metric") -> str:
    """The metric of a loss, or the one in the config key `where`; raises UserError when its task does not have it."""
    known = METRICS[LOSSES[loss].task]
    name = wanted or LOSSES[loss].metric
    if name not in known:
        raise UserError(f"{where} must be one that train.loss={loss} has, found {name!r}.{nearest(name, known)}")
    return name


# ------------------------------------------------------------------------------------------------------- points


def point_metrics(
    target: Array, scores: Array, loss: str, *, ece_bins: int = 15, quantile: float = 0.5
) -> dict[str, float]:
    """Metrics of all rows with a finite target together; NaN where one cannot be computed.

    Shape: target [n] (0 or 1, class index, or value), scores [n] or [n, classes].
    """
    known = np.isfinite(target)
    target, scores = target[known].astype(np.float64), scores[known].astype(np.float64)
    known_metrics = METRICS[LOSSES[loss].task]
    if not len(target) or not np.isfinite(scores).all():
        return dict.fromkeys(known_metrics, float("nan"))
    rows = Rows(target, scores, quantile, ece_bins)
    return {name: metric.point(rows) for name, metric in known_metrics.items()}


def why_undefined(metric: Metric, target: Array, scores: Array) -> str:
    """The reason why a metric of these rows (all with a target) cannot be computed."""
    if not len(target):
        return "there are no rows"
    broken = int((~np.isfinite(scores)).sum())
    return f"{broken} scores are not finite" if broken else metric.undefined.format(n=len(target))


# ---------------------------------------------------------------------------------------------------- intervals


def intervals(
    target: Array, scores: Array, loss: str, config: EvaluateConfig, *, quantile: float = 0.5, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap interval (low, high) per metric; empty without resamples, rows, or both classes."""
    n = len(target)
    if not config.bootstrap or n < 2 or n > LARGEST_BOOTSTRAP or not np.isfinite(scores).all():
        return {}
    target, scores = target.astype(np.float64), scores.astype(np.float64)
    task = LOSSES[loss].task
    if task == "binary" and target.min() == target.max():
        return {}
    quick = [metric for metric in METRICS[task].values() if metric.quick]
    rows = Rows(target, scores, quantile, config.ece_bins)
    found = resample(rows, quick, poisson_weights(n, config.bootstrap, seed))
    return {name: percentiles(values, config.confidence) for name, values in found.items()}


def percentiles(values: Array, confidence: float) -> tuple[float, float]:
    """The interval (low, high) that holds a share of the finite values; NaN without any."""
    good = values[np.isfinite(values)]
    if not len(good):
        return float("nan"), float("nan")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(good, [tail, 100 - tail])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------- everything


Row = dict[str, Any]  # of a table: its label (`value`, `class`), counts, and the figures by their names


class SplitDetails(TypedDict, total=False):
    """A split in evaluation.json; what the task or the rows do not have is absent."""

    loss: str
    rows: int
    unknown_target: int
    confidence: float
    not_computable: dict[str, str]
    intervals: dict[str, list[float]]
    calibration: dict[str, list[float]]
    histogram: dict[str, list[float]]
    roc: dict[str, list[float]]
    pr: dict[str, list[float]]
    classes: list[Row]
    by_month: list[Row]
    slices: dict[str, list[Row]]
    score: ScoreMeaning
    baselines: dict[str, dict[str, float]]
    unknown_targets: dict[str, int]


def evaluate_scores(
    target: Array,
    scores: Array,
    loss: str,
    config: EvaluateConfig,
    time_us: Array,
    time_zone: str,
    slices: Mapping[str, Array],
    *,
    quantile: float = 0.5,
    classes: Sequence[str] = (),
) -> tuple[dict[str, float], SplitDetails]:
    """(flat metrics, details for a report) of scored rows.

    Shape: target [n], scores [n] or [n, classes], time_us int64[n] (microseconds UTC; months are read in `time_zone`),
    slices name -> [n] values, classes: their names. Flat: each metric, `<metric>_low` and `<metric>_high`, `rows`,
    `positive_rate`; of a number `r2` and `mape`; of several classes `class/<name>/precision` and the like. Details are JSON.
    """
    known = np.isfinite(target)  # a class unseen in training has no index
    details: SplitDetails = {"loss": loss, "rows": int(known.sum()), "unknown_target": int((~known).sum())}
    target, scores, time_us = target[known], scores[known], time_us[known]
    slices = {name: values[known] for name, values in slices.items()}
    metrics = point_metrics(target, scores, loss, ece_bins=config.ece_bins, quantile=quantile)
    details["confidence"] = config.confidence
    details["not_computable"] = {
        name: why_undefined(METRICS[LOSSES[loss].task][name], target, scores)
        for name, value in metrics.items()
        if not np.isfinite(value)
    }
    bounds = intervals(target, scores, loss, config, quantile=quantile)
    details["intervals"] = {name: list(pair) for name, pair in bounds.items()}
    flat = dict(metrics)
    for name, (low, high) in bounds.items():
        flat |= {f"{name}_low": low, f"{name}_high": high}
    flat["rows"] = float(len(target))
    if LOSSES[loss].task == "binary" and len(target):
        flat["positive_rate"] = float(target.mean(dtype=np.float64))
    if LOSSES[loss].task == "binary" and len(target) and np.isfinite(scores).all():
        details |= _binary_details(target.astype(np.float64), scores.astype(np.float64), config)
    if LOSSES[loss].task == "regression":
        flat |= _relative(target.astype(np.float64), scores.astype(np.float64), details["not_computable"])
    if LOSSES[loss].task == "multiclass" and len(target):
        details["classes"] = class_table(target.astype(np.int64), scores, classes)
        flat |= {
            f"class/{row['class']}/{name}": float(row[name])
            for row in details["classes"]
            for name in CLASS_FIGURES
            if row[name] is not None
        }

    def part(label: str, mask: Array) -> Row:
        return _part(label, target[mask], scores[mask], loss, config, quantile)

    details["by_month"] = [part(month, mask) for month, mask in local_months(time_us, time_zone)]
    details["slices"] = {
        name: [part(value, mask) for value, mask in _values(values)] for name, values in slices.items()
    }
    return flat, details


def _relative(target: Array, scores: Array, reasons: dict[str, str]) -> dict[str, float]:
    """R2 (share of the variance explained) and MAPE (mean of |error| / |target|); NaN, with a reason, where there is none."""
    found = {"r2": float("nan"), "mape": float("nan")}
    error = target - scores
    spread = float(np.square(target - target.mean()).sum()) if len(target) else 0.0
    if spread > 0:
        found["r2"] = 1.0 - float(np.square(error).sum()) / spread
    else:
        reasons["r2"] = f"all {len(target)} rows have the same target" if len(target) else "there are no rows"
    zero = int((target == 0).sum())
    if len(target) and not zero:
        found["mape"] = float(np.abs(error / target).mean())
    else:
        reasons["mape"] = f"the target is 0 in {zero} rows" if zero else "there are no rows"
    return found


def class_table(target: Array, scores: Array, classes: Sequence[str]) -> list[Row]:
    """One entry a class, in order: rows, predicted (rows in which its score is the highest), precision, recall, f1.

    None where the denominator is 0: no row of the class (recall), none predicted (precision).
    """
    chosen, count = scores.argmax(axis=1), scores.shape[1]
    rows, predicted = np.bincount(target, minlength=count), np.bincount(chosen, minlength=count)
    right = np.bincount(target[chosen == target], minlength=count)
    names = list(classes) or [str(index) for index in range(count)]
    return [
        {
            "class": names[index],
            "rows": int(rows[index]),
            "predicted": int(predicted[index]),
            "precision": float(right[index] / predicted[index]) if predicted[index] else None,
            "recall": float(right[index] / rows[index]) if rows[index] else None,
            "f1": float(2 * right[index] / (rows[index] + predicted[index]))
            if rows[index] + predicted[index]
            else None,
        }
        for index in range(count)
    ]


def _part(label: str, target: Array, scores: Array, loss: str, config: EvaluateConfig, quantile: float) -> Row:
    """One row of a breakdown: the metrics of some rows, None where one cannot be computed."""
    metrics = point_metrics(target, scores, loss, ece_bins=config.ece_bins, quantile=quantile)
    row: Row = {"value": label, "rows": len(target)}
    if LOSSES[loss].task == "binary":
        row["positive_rate"] = float(target.mean())
    row |= {name: value if np.isfinite(value) else None for name, value in metrics.items()}
    bounds = intervals(target, scores, loss, config, quantile=quantile)
    row["intervals"] = {name: list(pair) for name, pair in bounds.items() if np.isfinite(pair).all()}
    return row


def _values(values: Array) -> list[tuple[str, Array]]:
    """(value, mask) of the most frequent values, by falling frequency and then by name."""
    texts = np.asarray(values).astype(str)
    names, inverse, counts = np.unique(texts, return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))[:SLICE_VALUES]
    return [(str(names[k]), inverse == k) for k in order]


def _binary_details(target: Array, scores: Array, config: EvaluateConfig) -> SplitDetails:
    table = kernels.reliability(target, scores, bins=config.ece_bins)
    used = table.weight > 0
    edges = np.linspace(0, 1, 41)
    details: SplitDetails = {
        "calibration": {
            "score": table.score[used].tolist(),
            "positive": table.positive[used].tolist(),
            "rows": table.weight[used].tolist(),
        },
        "histogram": {
            "edges": edges.tolist(),
            "negative": np.histogram(scores[target == 0], edges)[0].tolist(),
            "positive": np.histogram(scores[target == 1], edges)[0].tolist(),
        },
    }
    if target.min() < target.max():
        details["roc"] = _thin(*kernels.roc_curve(target, scores))
        details["pr"] = _thin(*kernels.precision_recall_curve(target, scores))
    return details


def _thin(x: Array, y: Array) -> dict[str, list[float]]:
    """At most CURVE_POINTS points, spread evenly along x, first and last kept."""
    wanted = np.linspace(x[0], x[-1], CURVE_POINTS)
    places = np.unique(np.concatenate([[0], np.minimum(np.searchsorted(x, wanted), len(x) - 1), [len(x) - 1]]))
    return {"x": x[places].tolist(), "y": y[places].tolist()}
