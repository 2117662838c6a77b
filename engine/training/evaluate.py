"""Evaluation on labelled rows: metrics and their intervals, over all rows, by month and by slice.

Intervals come from a reproducible bootstrap over blocks of rows: local days, unless `evaluate.block` says otherwise. A metric
that cannot be computed has a reason and never raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.config import plugins
from engine.config.sections.training import EvaluateConfig
from engine.data.calendar import months_of
from engine.errors import UserError, nearest
from engine.training.classes import TargetMeaning
from engine.training.curves import Curves, binary_curves, by_prediction
from engine.training.decision import Decision
from engine.training.loss import Loss
from engine.training.metrics import Metric, Rows
from engine.training.resampling import FEWEST_BLOCKS, Spread, numbered_blocks, poisson_counts

Array = NDArray[Any]
CLASS_FIGURES = ("rows", "precision", "recall", "f1")
SLICE_VALUES = 50  # most frequent values of a slice that are listed


@dataclass(frozen=True)
class Scored:
    """Labelled rows: target [n] (0 or 1, class index, or value), scores [n] or [n, classes], days int[n] (local, since
    1970-01-01), blocks [n] (labels that rise with time; see engine.training.blocks), weight float[n] (None: 1 each).
    """

    target: Array
    scores: Array
    days: Array
    blocks: Array
    weight: Array | None = None

    def take(self, rows: Array) -> Scored:
        """The chosen rows."""
        weight = None if self.weight is None else self.weight[rows]
        return Scored(self.target[rows], self.scores[rows], self.days[rows], self.blocks[rows], weight)


def watched_metric(loss: Loss, wanted: str | None, where: str = "train.metric") -> str:
    """The metric of a loss, or the one in the config key `where`; raises UserError when the loss does not have it."""
    known = loss.metrics
    name = plugins.split(wanted)[0] if wanted else loss.metric
    if name not in known:
        raise UserError(f"{where} must be one that train.loss={loss.name} has, found {name!r}.{nearest(name, known)}")
    return name


# ------------------------------------------------------------------------------------------------------- points


def point_metrics(
    target: Array,
    scores: Array,
    loss: Loss,
    *,
    ece_bins: int = 15,
    weight: Array | None = None,
    threshold: float | None = None,
) -> dict[str, float]:
    """Metrics of all rows with a finite target together; NaN where one cannot be computed.

    Shape: target [n] (0 or 1, class index, or value), scores [n] or [n, k], weight [n] (None: 1 each). A row
    of weight 0 counts as one that is not there.
    """
    rows = counted(target, scores, weight, loss, ece_bins, threshold)
    known_metrics = loss.metrics_at(threshold)
    if not len(rows.target) or not np.isfinite(rows.scores).all():
        return dict.fromkeys(known_metrics, float("nan"))
    return {name: metric.point(rows) for name, metric in known_metrics.items()}


def counted(
    target: Array,
    scores: Array,
    weight: Array | None,
    loss: Loss,
    ece_bins: int = 15,
    threshold: float | None = None,
) -> Rows:
    """The rows that a metric counts: those with a finite target and a weight above 0, in float64."""
    used = counts(target, weight)
    return Rows(
        target[used].astype(np.float64),
        scores[used].astype(np.float64),
        loss.levels,
        ece_bins,
        None if weight is None else weight[used].astype(np.float64),
        threshold,
        loss.power,
        loss.interval,
    )


def counts(target: Array, weight: Array | None) -> Array:
    """bool[n]: whether a metric counts the row."""
    known = np.isfinite(target)
    return known if weight is None else known & (weight > 0)


def why_undefined(metric: Metric, target: Array, scores: Array) -> str:
    """The reason why a metric of these rows (all with a target) cannot be computed."""
    if not len(target):
        return "there are no rows"
    broken = int((~np.isfinite(scores)).sum())
    return f"{broken} scores are not finite" if broken else metric.undefined.format(n=len(target))


# ---------------------------------------------------------------------------------------------------- intervals


def intervals(
    rows: Scored,
    values: Mapping[str, float],
    loss: Loss,
    config: EvaluateConfig,
    *,
    threshold: float | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Interval (low, high) of each metric in `values` that has one; empty without resamples, or with too few blocks."""
    used = counts(rows.target, rows.weight)
    place, blocks = numbered_blocks(rows.blocks[used])
    if not config.bootstrap or blocks < FEWEST_BLOCKS:
        return {}
    known = counted(rows.target, rows.scores, rows.weight, loss, config.ece_bins, threshold)
    times = poisson_counts(blocks, config.bootstrap, seed)
    found = {}
    for name, metric in loss.metrics_at(threshold).items():
        if not np.isfinite(values[name]):
            continue
        sums = metric.in_blocks(known, place, blocks)
        spread = Spread.of(sums.drawn(times), sums.without_each(), config.confidence)
        if spread is not None:
            low, high = max(values[name] - spread.below, 0.0), values[name] + spread.above
            found[name] = low, min(high, metric.most)
    return found


# --------------------------------------------------------------------------------------------------- everything


Row = dict[str, Any]  # of a table: its label (`value`, `class`), counts, and the figures by their names


class Blocks(TypedDict):
    """What the intervals draw whole (`evaluate.block`), and how many there are."""

    of: str
    number: int


class SplitDetails(Curves, total=False):
    """A split in evaluation.json; what the task or the rows do not have is absent."""

    loss: str
    rows: int
    unknown_target: int
    confidence: float
    not_computable: dict[str, str]
    intervals: dict[str, list[float]]
    blocks: Blocks
    decision: Decision
    by_prediction: list[dict[str, float]]
    classes: list[Row]
    by_month: list[Row]
    slices: dict[str, list[Row]]
    score: TargetMeaning
    baselines: dict[str, dict[str, float]]
    unknown_targets: dict[str, int]
    importance: Mapping[str, Any]
    members: list[Row]


def evaluate_scores(
    rows: Scored,
    loss: Loss,
    config: EvaluateConfig,
    slices: Mapping[str, Array],
    *,
    classes: Sequence[str] = (),
    threshold: float | None = None,
) -> tuple[dict[str, float], SplitDetails]:
    """(flat metrics, details for a report) of scored rows; a target that is not finite counts as unknown.

    Shape: slices name -> [n] values, classes: their names. Flat: each metric, `<metric>_low` and `<metric>_high`, `rows`,
    `positive_rate`, with a threshold `true_positives` and the like; of a number `r2`, `mape` and `decile/<k>/mean_error`; of
    several classes `class/<name>/precision` and the like. Details are JSON.
    """
    known = np.isfinite(rows.target)  # a class unseen in training has no index
    details: SplitDetails = {"loss": loss.name, "rows": int(known.sum()), "unknown_target": int((~known).sum())}
    known = counts(rows.target, rows.weight)
    rows = rows.take(known)
    slices = {name: values[known] for name, values in slices.items()}
    target, scores = rows.target.astype(np.float64), rows.scores.astype(np.float64)
    metrics = point_metrics(target, scores, loss, ece_bins=config.ece_bins, weight=rows.weight, threshold=threshold)
    details["confidence"] = config.confidence
    details["not_computable"] = {
        name: why_undefined(loss.metrics_at(threshold)[name], target, scores)
        for name, value in metrics.items()
        if not np.isfinite(value)
    }
    bounds = intervals(rows, metrics, loss, config, threshold=threshold)
    details["intervals"] = {name: list(pair) for name, pair in bounds.items()}
    details["blocks"] = {"of": config.block, "number": len(np.unique(rows.blocks))}
    flat = dict(metrics)
    for name, (low, high) in bounds.items():
        flat |= {f"{name}_low": low, f"{name}_high": high}
    flat["rows"] = float(details["rows"])
    if loss.task == "binary" and len(target):
        flat["positive_rate"] = mean(target, rows.weight)
    if loss.task == "binary" and len(target) and np.isfinite(scores).all():
        details |= binary_curves(target, scores, rows.weight, config, threshold)
        flat |= details.get("confusion", {})
    if loss.number:
        values = loss.centre(scores)
        flat |= _relative(target, values, rows.weight, details["not_computable"])
        if len(target) and np.isfinite(values).all():
            details["by_prediction"] = by_prediction(target, values, rows.weight)
            flat |= {f"decile/{k}/mean_error": row["mean_error"] for k, row in enumerate(details["by_prediction"], 1)}
    if loss.task == "multiclass" and len(target):
        details["classes"] = class_table(target.astype(np.int64), scores, classes, rows.weight)
        flat |= {
            f"class/{row['class']}/{name}": float(row[name])
            for row in details["classes"]
            for name in CLASS_FIGURES
            if row[name] is not None
        }

    def part(label: str, mask: Array) -> Row:
        return _part(label, rows.take(mask), loss, config, threshold)

    details["by_month"] = [part(month, mask) for month, mask in months_of(rows.days)]
    details["slices"] = {
        name: [part(value, mask) for value, mask in _values(values)] for name, values in slices.items()
    }
    return flat, details


def mean(values: Array, weight: Array | None) -> float:
    """The mean of [n], in float64."""
    if weight is None:
        return float(values.mean(dtype=np.float64))
    return float((values * weight).sum(dtype=np.float64) / weight.sum(dtype=np.float64))


def _relative(target: Array, scores: Array, weight: Array | None, reasons: dict[str, str]) -> dict[str, float]:
    """R2 (share of the variance explained) and MAPE (mean of |error| / |target|); NaN, with a reason, where there is none."""
    found = {"r2": float("nan"), "mape": float("nan")}
    weights = np.ones(len(target)) if weight is None else weight.astype(np.float64)
    error = target - scores
    spread = float((weights * np.square(target - mean(target, weight))).sum()) if len(target) else 0.0
    if spread > 0:
        found["r2"] = 1.0 - float((weights * np.square(error)).sum()) / spread
    else:
        reasons["r2"] = f"all {len(target)} rows have the same target" if len(target) else "there are no rows"
    zero = int((target == 0).sum())
    if len(target) and not zero:
        found["mape"] = mean(np.abs(error / target), weight)
    else:
        reasons["mape"] = f"the target is 0 in {zero} rows" if zero else "there are no rows"
    return found


def class_table(target: Array, scores: Array, classes: Sequence[str], weight: Array | None = None) -> list[Row]:
    """One entry a class, in order: rows, predicted (rows in which its score is the highest), precision, recall, f1 (of weights).

    None where the denominator is 0: no row of the class (recall), none predicted (precision).
    """
    chosen, count = scores.argmax(axis=1), scores.shape[1]
    rows, predicted = np.bincount(target, minlength=count), np.bincount(chosen, minlength=count)
    weights = np.ones(len(target)) if weight is None else weight.astype(np.float64)
    actual, claimed = np.bincount(target, weights, count), np.bincount(chosen, weights, count)
    right = np.bincount(target, weights * (chosen == target), count)
    names = list(classes) or [str(index) for index in range(count)]
    return [
        {
            "class": names[index],
            "rows": int(rows[index]),
            "predicted": int(predicted[index]),
            "precision": float(right[index] / claimed[index]) if predicted[index] else None,
            "recall": float(right[index] / actual[index]) if rows[index] else None,
            "f1": float(2 * right[index] / (actual[index] + claimed[index]))
            if rows[index] + predicted[index]
            else None,
        }
        for index in range(count)
    ]


def _part(label: str, rows: Scored, loss: Loss, config: EvaluateConfig, threshold: float | None) -> Row:
    """One row of a breakdown: the metrics of some rows, None where one cannot be computed."""
    metrics = point_metrics(
        rows.target, rows.scores, loss, ece_bins=config.ece_bins, weight=rows.weight, threshold=threshold
    )
    row: Row = {"value": label, "rows": len(rows.target)}
    if loss.task == "binary":
        row["positive_rate"] = mean(rows.target, rows.weight)
    row |= {name: value if np.isfinite(value) else None for name, value in metrics.items()}
    bounds = intervals(rows, metrics, loss, config, threshold=threshold)
    row["intervals"] = {name: list(pair) for name, pair in bounds.items()}
    return row


def _values(values: Array) -> list[tuple[str, Array]]:
    """(value, mask) of the most frequent values, by falling frequency and then by name."""
    texts = np.asarray(values).astype(str)
    names, inverse, counts = np.unique(texts, return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))[:SLICE_VALUES]
    return [(str(names[k]), inverse == k) for k in order]
