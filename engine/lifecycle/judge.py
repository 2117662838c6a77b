"""The gate between two models: what is measured on the same rows, and the verdict that follows from it.

`evidence` compares a challenger with the champion by a paired Poisson bootstrap: one set of row weights for both models, so
that what the rows have in common drops out of the difference (Efron & Tibshirani, An introduction to the bootstrap, 1993,
ch. 16; Poisson weights as in Chamandy et al., 2012). `verdict` reads figures only, so a saved decision gives the same again.
Figures are JSON: one that cannot be computed is None with a reason, and never wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.tree import GateConfig
from engine.training.evaluate import HIGHER_IS_BETTER, METRICS, STAND_INS, decimals, point_metrics, watched_metric
from engine.training.losses import LOSSES
from kernels import metrics as kernels

Array = NDArray[Any]
PROMOTE, KEEP = "promote", "keep"
SLICE_VALUES = 50  # most frequent values of a slice that are guarded
ECE_BINS = 15
BLOCK_CELLS = 8_000_000  # counts of the bootstrap in memory at once
BUSINESS = "cost"


@dataclass(frozen=True)
class Judged:
    """Rows that both models scored.

    Shape: target [n] (0 or 1, class index, or value; finite), champion and challenger [n] or [n, classes], slices
    name -> text [n].
    """

    target: Array
    champion: Array
    challenger: Array
    slices: Mapping[str, Array]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.target)


def judged_metric(loss: str, gate: GateConfig) -> str:
    """Name of the metric to beat. Raises UserError when the loss's task does not have it."""
    return watched_metric(loss, gate.metric, "retrain.gate.metric")


def evidence(
    judged: Judged, loss: str, gate: GateConfig, *, quantile: float = 0.5, seed: int = 0, stand_ins: bool = True
) -> dict[str, Any]:
    """Every figure that the verdict needs: metric, business cost, slices, calibration.

    With `stand_ins` a slice of which the metric cannot be computed is guarded by its log loss.
    """
    metric = judged_metric(loss, gate)
    stand_in = next((name for name in STAND_INS if name in METRICS[LOSSES[loss].task] and name != metric), None)
    stand_in = stand_in if stand_ins else None
    weights = Weights(judged.rows, gate.bootstrap, seed)
    found: dict[str, Any] = {
        "rows": judged.rows,
        "metric": {"name": metric, **_compare(judged, metric, loss, gate, weights, quantile)},
        "slices": [],
    }
    if LOSSES[loss].task == "binary":
        found[BUSINESS] = _costs(judged, gate, weights)
        found["calibration"] = {
            side: _finite(point_metrics(judged.target, scores, loss, ece_bins=ECE_BINS)["ece"])
            for side, scores in (("champion", judged.champion), ("challenger", judged.challenger))
        }
    for name, values in judged.slices.items():
        for value, mask in _values(values, gate.min_slice_rows):
            rows = Judged(judged.target[mask], judged.champion[mask], judged.challenger[mask], {})
            part = _compare(rows, metric, loss, gate, Weights(rows.rows, gate.bootstrap, seed), quantile)
            if stand_in and part["high"] is None:  # a slice of one class still has its losses
                instead = _compare(rows, stand_in, loss, gate, Weights(rows.rows, gate.bootstrap, seed), quantile)
                part = {**instead, "metric": stand_in}
            found["slices"].append({"slice": name, "value": value, "rows": rows.rows, **part})
    return found


def verdict(found: Mapping[str, Any], gate: GateConfig) -> tuple[str, list[str]]:
    """(`promote` or `keep`, reasons) from the evidence alone; every reason to keep is given."""
    against = [*_against_metric(found, gate), *_against_cost(found, gate), *_against_slices(found, gate)]
    against += _against_calibration(found, gate)
    if against:
        return KEEP, against
    metric = found["metric"]
    return PROMOTE, [f"{metric['name']} {_moved(metric)} on {found['rows']:,} rows that neither model saw"]


def _moved(metric: Mapping[str, Any]) -> str:
    gain, low, high = (decimals(metric[name], "+") for name in ("gain", "low", "high"))
    return f"{decimals(metric['champion'])} -> {decimals(metric['challenger'])}: gain {gain} [{low}, {high}]"


def _against_metric(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    metric = found["metric"]
    name = metric["name"]
    if found["rows"] < gate.min_rows:
        return [f"only {found['rows']:,} judged rows have a label, fewer than retrain.gate.min_rows={gate.min_rows:,}"]
    if metric["challenger"] is None:
        return [f"{name} of the challenger cannot be computed ({metric['reason']}): an undefined metric never wins"]
    if metric["champion"] is None:
        return [f"{name} of the champion cannot be computed ({metric['reason']}): nothing can be shown to be better"]
    if metric["low"] is None:
        return [f"the gain in {name} has no interval ({metric['reason']}): nothing can be shown to be better"]
    if not metric["low"] > gate.min_gain:
        worse = "worse" if metric["high"] < 0 else "not shown to be better"
        return [f"{name} {_moved(metric)}: the challenger is {worse}, the gain must lie above {gate.min_gain:g}"]
    return []


def _against_cost(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    cost = found.get(BUSINESS)
    if cost is None:
        return []
    if cost["high"] is None:
        return [f"the business cost cannot be compared ({cost['reason']})"]
    limit = gate.max_cost_rise * cost["champion"]
    if cost["rise"] > limit and cost["low"] > limit:
        return [
            f"business cost a row {cost['champion']:.4f} -> {cost['challenger']:.4f}: rise {cost['rise']:+.4f} "
            f"[{cost['low']:+.4f}, {cost['high']:+.4f}] is beyond {limit:g}"
        ]
    return []


def _against_slices(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    return [
        f"slice {part['slice']}={part['value']} ({part['rows']:,} rows) loses {decimals(-part['gain'])} of "
        f"{part.get('metric', found['metric']['name'])} "
        f"[{decimals(part['low'], '+')}, {decimals(part['high'], '+')}], more than {gate.max_slice_loss:g} and beyond chance"
        for part in found["slices"]
        if part["high"] is not None and part["gain"] < -gate.max_slice_loss and part["high"] < 0
    ]


def _against_calibration(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    errors = found.get("calibration")
    if errors is None:
        return []
    if errors["champion"] is None or errors["challenger"] is None:
        return ["the calibration error cannot be computed"]
    if errors["challenger"] - errors["champion"] > gate.max_ece_rise:
        return [
            f"calibration error {errors['champion']:.4f} -> {errors['challenger']:.4f} rises by more than {gate.max_ece_rise:g}"
        ]
    return []


# ------------------------------------------------------------------------------------------------------ figures


def _compare(
    judged: Judged, metric: str, loss: str, gate: GateConfig, weights: Weights, quantile: float
) -> dict[str, Any]:
    """Both models' metric and the gain (positive is better) with its interval."""
    points = [
        _finite(point_metrics(judged.target, scores, loss, quantile=quantile)[metric])
        for scores in (judged.champion, judged.challenger)
    ]
    row: dict[str, Any] = {"champion": points[0], "challenger": points[1], "gain": None, "low": None, "high": None}
    if points[0] is None or points[1] is None:
        return {**row, "reason": _reason(judged)}
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    old, new = (
        resampled(metric, judged.target, scores, weights, quantile) for scores in (judged.champion, judged.challenger)
    )
    gains = sign * (new - old)
    gains = gains[np.isfinite(gains)]
    row["gain"] = sign * (points[1] - points[0])
    if len(gains) < weights.resamples / 2:
        return {**row, "reason": "most resamples lack a class"}
    row["low"], row["high"] = _interval(gains, gate.confidence)
    return row


def _costs(judged: Judged, gate: GateConfig, weights: Weights) -> dict[str, Any]:
    """Cost a row of acting above the threshold that these costs make best for calibrated scores (Elkan, 2001)."""
    total = gate.cost_false_positive + gate.cost_false_negative
    threshold = gate.cost_false_positive / total if total else 0.5
    row: dict[str, Any] = {
        "threshold": threshold,
        "champion": None,
        "challenger": None,
        "rise": None,
        "low": None,
        "high": None,
    }
    if not judged.rows or not (np.isfinite(judged.champion).all() and np.isfinite(judged.challenger).all()):
        return {**row, "reason": _reason(judged)}
    old, new = (row_costs(judged.target, scores, threshold, gate) for scores in (judged.champion, judged.challenger))
    rises = np.concatenate([(block * (new - old)).sum(axis=1) / block.sum(axis=1) for block in weights])
    low, high = _interval(rises, gate.confidence)
    row |= {"champion": float(old.mean()), "challenger": float(new.mean()), "rise": float((new - old).mean())}
    return {**row, "low": low, "high": high}


def row_costs(target: Array, scores: Array, threshold: float, gate: GateConfig) -> Array:
    """float64[n]: what each row costs when one acts on scores of at least `threshold`."""
    acted = scores >= threshold
    return np.where(
        target == 1,
        np.where(acted, 0.0, gate.cost_false_negative),
        np.where(acted, gate.cost_false_positive, 0.0),
    )


@dataclass(frozen=True)
class Weights:
    """Poisson(1) counts of rows, a function of (seed, rows) alone; made anew each time, so that they need not fit in memory."""

    rows: int
    resamples: int
    seed: int
    cells: int = BLOCK_CELLS

    def __iter__(self) -> Iterator[Array]:
        """Blocks float32[some resamples, rows]; how they are cut changes no count."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.rows]))
        step = max(1, self.cells // max(1, self.rows))
        for low in range(0, self.resamples, step):
            yield generator.poisson(1.0, (min(step, self.resamples - low), self.rows)).astype(np.float32)


def _interval(values: Array, confidence: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _reason(judged: Judged) -> str:
    if not judged.rows:
        return "there are no judged rows"
    for side, scores in (("champion", judged.champion), ("challenger", judged.challenger)):
        broken = int((~np.isfinite(scores)).sum())
        if broken:
            return f"{broken} scores of the {side} are not finite"
    return (
        f"all {judged.rows:,} rows have the same target" if len(np.unique(judged.target)) == 1 else "it is not finite"
    )


def _values(values: Array, min_rows: int) -> list[tuple[str, Array]]:
    names, inverse, counts = np.unique(np.asarray(values).astype(str), return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))[:SLICE_VALUES]
    return [(str(names[place]), inverse == place) for place in order if counts[place] >= min_rows]


# ---------------------------------------------------------------------------------- a metric under many row weights


def _weighted_auc(target: Array, scores: Array, weights: Array) -> Array:
    """Area under the ROC curve per resample; ties count a half. Rows are sorted once for all resamples."""
    order = np.argsort(scores, kind="stable")
    positive = target[order] == 1
    ranked = scores[order]
    group = np.cumsum(np.append(False, ranked[1:] != ranked[:-1]))  # number of the run of equal scores of each row
    found = np.empty(len(weights))
    for place, weight in enumerate(weights):
        ordered = weight[order].astype(np.float64)
        true = np.bincount(group, ordered * positive)
        false = np.bincount(group, ordered * ~positive)
        below = np.cumsum(false) - false
        total = true.sum() * false.sum()
        found[place] = (true * (below + false / 2)).sum() / total if total else np.nan
    return found


def _weighted_precision(target: Array, scores: Array, weights: Array) -> Array:
    return np.array([kernels.average_precision(target, scores, weight) for weight in weights])


def _weighted_ece(target: Array, scores: Array, weights: Array) -> Array:
    return np.array([kernels.ece(target, scores, weight, bins=ECE_BINS) for weight in weights])


def _weighted_macro(target: Array, scores: Array, weights: Array) -> Array:
    areas = [
        _weighted_auc((target == index).astype(float), scores[:, index], weights)
        for index in range(scores.shape[1])
        if (target == index).any()
    ]
    return np.asarray(np.mean(areas, axis=0))


def _mean(rows: Array, weights: Array) -> Array:
    total = (weights * rows.astype(np.float64)).sum(axis=1)
    return np.asarray(total / weights.sum(axis=1, dtype=np.float64))


def _log_loss(target: Array, scores: Array) -> Array:
    tiny = np.finfo(np.float64).eps
    rows = np.arange(len(target))
    taken = scores[rows, target.astype(int)] if scores.ndim == 2 else np.where(target == 1, scores, 1 - scores)
    return np.asarray(-np.log(np.clip(taken.astype(np.float64), tiny, 1.0)))


def _pinball(target: Array, scores: Array, quantile: float) -> Array:
    error = target - scores
    return np.maximum(quantile * error, (quantile - 1) * error)


def resampled(metric: str, target: Array, scores: Array, weights: Iterable[Array], quantile: float = 0.5) -> Array:
    """float64[resamples]: a metric of all rows under each line of the blocks of weights float32[some resamples, n]."""
    if metric == "pinball":
        errors = _pinball(target, scores, quantile)
        return np.concatenate([_mean(errors, block) for block in weights])
    return np.concatenate([RESAMPLED[metric](target, scores, block) for block in weights])


# (target, scores, weights [resamples, n]) -> [resamples]
RESAMPLED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "roc_auc": _weighted_auc,
    "average_precision": _weighted_precision,
    "ece": _weighted_ece,
    "macro_auc": _weighted_macro,
    "log_loss": lambda y, s, w: _mean(_log_loss(y, s), w),
    "brier": lambda y, s, w: _mean(np.square(s.astype(float) - y), w),
    "accuracy": lambda y, s, w: _mean(s.argmax(axis=1) == y, w),
    "mae": lambda y, s, w: _mean(np.abs(y - s), w),
    "rmse": lambda y, s, w: np.sqrt(_mean(np.square(y - s), w)),
}
assert {*RESAMPLED, "pinball"} == {name for names in METRICS.values() for name in names}
