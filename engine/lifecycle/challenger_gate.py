"""The challenger's gate: compares challenger and champion on the same rows and decides between them.

`evidence` compares a challenger with the champion by a paired Poisson bootstrap: one set of row weights for both models, so
that the noise of the rows cancels in the difference (Efron & Tibshirani, An introduction to the bootstrap, 1993,
ch. 16). `verdict` reads figures only, so a saved decision gives the same verdict again.
Figures are JSON: one that cannot be computed is None with a reason, and never wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.lifecycle import GateConfig
from engine.training.evaluate import percentiles, point_metrics, watched_metric
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS, Rows, decimals, poisson_weights, resample

Array = NDArray[Any]
PROMOTE, KEEP = "promote", "keep"
SLICE_VALUES = 50  # most frequent values of a slice that are checked
ECE_BINS = 15
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
    """All figures for the verdict: metric, business cost, slices, calibration.

    With `stand_ins` a slice whose metric cannot be computed is checked by its log loss.
    """
    metric = judged_metric(loss, gate)
    known = METRICS[LOSSES[loss].task]
    stand_in = next((name for name, item in known.items() if stand_ins and item.stand_in and name != metric), None)
    found: dict[str, Any] = {
        "rows": judged.rows,
        "metric": {"name": metric, **_compare(judged, metric, loss, gate, seed, quantile)},
        "slices": [],
    }
    if LOSSES[loss].task == "binary":
        found[BUSINESS] = _costs(judged, gate, seed)
        found["calibration"] = {
            side: _finite(point_metrics(judged.target, scores, loss, ece_bins=ECE_BINS)["ece"])
            for side, scores in (("champion", judged.champion), ("challenger", judged.challenger))
        }
    for name, values in judged.slices.items():
        for value, mask in _values(values, gate.min_slice_rows):
            rows = Judged(judged.target[mask], judged.champion[mask], judged.challenger[mask], {})
            part = _compare(rows, metric, loss, gate, seed, quantile)
            if stand_in and part["high"] is None:  # a slice of one class still has a log loss
                instead = _compare(rows, stand_in, loss, gate, seed, quantile)
                part = {**instead, "metric": stand_in}
            found["slices"].append({"slice": name, "value": value, "rows": rows.rows, **part})
    return found


def verdict(found: Mapping[str, Any], gate: GateConfig) -> tuple[str, list[str]]:
    """(`promote` or `keep`, reasons) from the evidence alone; all reasons to keep are listed."""
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
        return [f"{name} {_moved(metric)}: the challenger is {worse}, the gain must be above {gate.min_gain:g}"]
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


def _compare(judged: Judged, name: str, loss: str, gate: GateConfig, seed: int, quantile: float) -> dict[str, Any]:
    """Both models' metric and the gain (positive is better) with its interval."""
    metric = METRICS[LOSSES[loss].task][name]
    sides = (judged.champion, judged.challenger)
    points = [_finite(point_metrics(judged.target, scores, loss, quantile=quantile)[name]) for scores in sides]
    row: dict[str, Any] = {"champion": points[0], "challenger": points[1], "gain": None, "low": None, "high": None}
    if points[0] is None or points[1] is None:
        return {**row, "reason": _reason(judged)}
    old, new = (
        resample(
            Rows(judged.target.astype(np.float64), scores.astype(np.float64), quantile, ECE_BINS),
            [metric],
            poisson_weights(judged.rows, gate.bootstrap, seed),
        )[name]
        for scores in sides
    )
    gains = metric.sign * (new - old)
    row["gain"] = metric.sign * (points[1] - points[0])
    if np.isfinite(gains).sum() < gate.bootstrap / 2:
        return {**row, "reason": "most resamples lack a class"}
    row["low"], row["high"] = percentiles(gains, gate.confidence)
    return row


def _costs(judged: Judged, gate: GateConfig, seed: int) -> dict[str, Any]:
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
    weights = poisson_weights(judged.rows, gate.bootstrap, seed)
    rises = np.concatenate([(block * (new - old)).sum(axis=1) / block.sum(axis=1) for block in weights])
    low, high = percentiles(rises, gate.confidence)
    row |= {"champion": float(old.mean()), "challenger": float(new.mean()), "rise": float((new - old).mean())}
    return {**row, "low": low, "high": high}


def row_costs(target: Array, scores: Array, threshold: float, gate: GateConfig) -> Array:
    """float64[n]: cost of each row when scores of at least `threshold` are acted on."""
    acted = scores >= threshold
    return np.where(
        target == 1,
        np.where(acted, 0.0, gate.cost_false_negative),
        np.where(acted, gate.cost_false_positive, 0.0),
    )


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
