"""The challenger's gate: compares challenger and champion on the same rows and decides between them.

`evidence` compares a challenger with the champion by a paired bootstrap over blocks of rows (days, unless `evaluate.block` says
otherwise): one set of counts for both models, so that the noise of the days cancels in the difference (Efron & Tibshirani, An
introduction to the bootstrap, 1993, ch. 16). `verdict` reads figures only, so a saved decision gives the same verdict again.
Figures are JSON: one that cannot be computed is None with a reason, and never wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.sections.lifecycle import GateConfig
from engine.lifecycle.looks import Looks, fewest_days
from engine.training.evaluate import counted, counts, mean, point_metrics, watched_metric
from engine.training.loss import Loss
from engine.training.metrics import Metric, decimals
from engine.training.resampling import FEWEST_BLOCKS, BlockSums, Spread, add_up, numbered_blocks, poisson_counts

Array = NDArray[Any]
PROMOTE, KEEP = "promote", "keep"
SLICE_VALUES = 50  # most frequent values of a slice that are checked
ECE_BINS = 15
BUSINESS = "cost"
SEED_LUCK = 0.01  # of what a model is better than chance: models that differ in their seed alone gain less, for weeks


@dataclass(frozen=True)
class Judged:
    """Rows that both models scored.

    Shape: target [n] (0 or 1, class index, or value; finite), champion and challenger [n] or [n, classes], slices
    name -> text [n], days int[n] (local, since 1970-01-01), blocks [n] (labels; see engine.training.blocks), weight float[n]
    (None: 1 each).
    """

    target: Array
    champion: Array
    challenger: Array
    slices: Mapping[str, Array]
    days: Array
    blocks: Array
    weight: Array | None = None

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.target)

    def take(self, rows: Array) -> Judged:
        """The chosen rows, without slices."""
        weight = None if self.weight is None else self.weight[rows]
        sides = self.champion[rows], self.challenger[rows]
        return Judged(self.target[rows], *sides, {}, self.days[rows], self.blocks[rows], weight)


def judged_metric(loss: Loss, gate: GateConfig) -> str:
    """Name of the metric to beat. Raises UserError when the loss does not have it."""
    return watched_metric(loss, gate.metric, "retrain.gate.metric")


def evidence(
    judged: Judged,
    loss: Loss,
    gate: GateConfig,
    *,
    seed: int = 0,
    stand_ins: bool = True,
    looks: Looks | None = None,
) -> dict[str, Any]:
    """All figures for the verdict: metric, business cost, slices, calibration, and what this and the earlier looks at
    challengers of this champion have shown together.

    With `stand_ins` a slice whose metric cannot be computed is checked by its log loss.
    """
    metric = judged_metric(loss, gate)
    known = loss.metrics
    stand_in = next((name for name, item in known.items() if stand_ins and item.stand_in and name != metric), None)
    judged = _counted(judged)

    def compared(rows: Judged, name: str) -> dict[str, Any]:
        return _compare(rows, name, loss, gate, seed)

    found: dict[str, Any] = {
        "rows": judged.rows,
        "days": len(np.unique(judged.days)),
        "metric": {"name": metric, **compared(judged, metric)},
        "slices": [],
    }
    if found["metric"]["low"] is not None:
        if gate.min_gain is None:
            found["metric"]["least_gain"] = SEED_LUCK * _above_chance(
                judged, loss, known[metric], found["metric"]["champion"]
            )
        days, gains = _daily_gains(judged, metric, loss)
        found["looks"] = (looks or Looks()).after(days, gains - least_gain(found["metric"], gate)).plain()
        found["metric"]["day_deviation"] = float(gains.std(ddof=1))
    if loss.task == "binary":
        found[BUSINESS] = _costs(judged, gate, seed)
        found["calibration"] = compared(judged, "ece")
    for name, values in judged.slices.items():
        for value, mask in _values(values, gate.min_slice_rows):
            rows = judged.take(mask)
            part = compared(rows, metric)
            if stand_in and part["high"] is None:  # a slice of one class still has a log loss
                part = {**compared(rows, stand_in), "metric": stand_in}
            found["slices"].append({"slice": name, "value": value, "rows": rows.rows, **part})
    _adjust([part for part in found["slices"] if part.get("chance") is not None])
    return found


def _above_chance(judged: Judged, loss: Loss, metric: Metric, value: float) -> float:
    """What a model is better than one that gives every row the shares of the classes; for a loss, the whole of it."""
    if not metric.higher_is_better:
        return max(value, 0.0)
    if loss.number:
        return max(value - metric.chance, 0.0)
    weight = np.ones(len(judged.target)) if judged.weight is None else judged.weight
    several = judged.champion.ndim == 2
    shares = (
        np.bincount(judged.target.astype(np.int64), weight, judged.champion.shape[1] if several else 2) / weight.sum()
    )
    same = np.tile(shares, (len(judged.target), 1)) if several else np.full(len(judged.target), shares[1])
    chance = metric.point(counted(judged.target, same, judged.weight, loss, ECE_BINS))
    return max(value - (chance if np.isfinite(chance) else metric.chance), 0.0)


def least_gain(found: Mapping[str, Any], gate: GateConfig) -> float:
    """The gain that a challenger must show, from the figures of the metric; decisions of before had `retrain.gate.min_gain`."""
    return float(found.get("least_gain", gate.min_gain or 0.0))


def _counted(judged: Judged) -> Judged:
    """Without rows of weight 0."""
    used = counts(judged.target, judged.weight)
    if used.all():
        return judged
    slices = {name: values[used] for name, values in judged.slices.items()}
    return replace(judged.take(used), slices=slices)


def _adjust(parts: Sequence[dict[str, Any]]) -> None:
    """Set `adjusted`, the probability that chance alone makes one of all slices look as bad (Holm, Scandinavian Journal of
    Statistics, 1979).
    """
    worst = 0.0
    for place, part in enumerate(sorted(parts, key=lambda part: part["chance"])):
        worst = part["adjusted"] = max(worst, min(1.0, (len(parts) - place) * part["chance"]))


def verdict(found: Mapping[str, Any], gate: GateConfig) -> tuple[str, list[str]]:
    """(`promote` or `keep`, reasons) from the evidence alone; all reasons to keep are listed."""
    against = [*_against_metric(found, gate), *_against_looks(found, gate), *_against_cost(found, gate)]
    against += [*_against_slices(found, gate), *_against_calibration(found, gate)]
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
    least = least_gain(metric, gate)
    if not metric["low"] > least:
        worse = "worse" if metric["high"] < 0 else "not shown to be better"
        text = f"{name} {_moved(metric)}: the challenger is {worse}, the gain must be above {least:.2g}"
        return [text + _days_needed(metric, found, gate)]
    return []


def _against_looks(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    """Each look at a challenger is another chance to be wrong: the bets on the days of all of them must have paid."""
    if "looks" not in found or not found["metric"]["low"] > least_gain(found["metric"], gate):
        return []
    wealth, wanted = found["looks"]["wealth"], 1 / chance_of(gate)
    if wealth >= wanted:
        return []
    return [
        f"judgement {found['looks']['number']} against this champion: bets on the days of all of them have paid {wealth:.3g} "
        f"times the stake, and must pay {wanted:.3g} times, so that chance promotes a challenger that is not better at most once "
        f"in {wanted:.3g} champions{_days_needed(found['metric'], found, gate)}"
    ]


def chance_of(gate: GateConfig) -> float:
    """How often a challenger that is not better may be promoted: a one-sided test of the interval's confidence."""
    return (1 - gate.confidence) / 2


def _days_needed(metric: Mapping[str, Any], found: Mapping[str, Any], gate: GateConfig) -> str:
    """How long a judgement would show this gain: bets on a mean m of days of deviation s grow by m^2 / (2 s^2) a day."""
    gain, deviation = metric["gain"] - least_gain(metric, gate), metric.get("day_deviation")
    if deviation is None or gain <= 0:
        return ""
    days = math.ceil(2 * math.log(1 / chance_of(gate)) * (deviation / gain) ** 2)
    days = max(days, fewest_days(1 / chance_of(gate)))
    if days <= found["days"]:
        return ""
    return f"; {found['days']} days were judged, and a gain of this size shows in about {days:,} (retrain.judge_length)"


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
        if part["high"] is not None and part["gain"] < -gate.max_slice_loss and _beyond_chance(part, gate)
    ]


def _beyond_chance(part: Mapping[str, Any], gate: GateConfig) -> bool:
    """Whether a slice loses more than chance gives one of all slices; decisions of before format 5 took each by itself."""
    return bool(part["adjusted"] < chance_of(gate) if "adjusted" in part else part["high"] < 0)


def _against_calibration(found: Mapping[str, Any], gate: GateConfig) -> list[str]:
    errors = found.get("calibration")
    if errors is None:
        return []
    if errors["champion"] is None or errors["challenger"] is None:
        return ["the calibration error cannot be computed"]
    rise = errors["challenger"] - errors["champion"]
    if (
        rise > gate.max_ece_rise and not (errors.get("high") or -1.0) > 0
    ):  # `high` of the gain: chance could be all of it
        return [
            f"calibration error {errors['champion']:.4f} -> {errors['challenger']:.4f} rises by more than {gate.max_ece_rise:g}"
        ]
    return []


# ------------------------------------------------------------------------------------------------------ figures


def _compare(judged: Judged, name: str, loss: Loss, gate: GateConfig, seed: int) -> dict[str, Any]:
    """Both models' metric and the gain (positive is better) with its interval, and the `chance` of a gain as low if there
    were none.
    """
    metric = loss.metrics[name]
    sides = (judged.champion, judged.challenger)
    points = [_finite(point_metrics(judged.target, scores, loss, weight=judged.weight)[name]) for scores in sides]
    row: dict[str, Any] = {"champion": points[0], "challenger": points[1], "gain": None, "low": None, "high": None}
    if points[0] is None or points[1] is None:
        return {**row, "reason": _reason(judged)}
    row["gain"] = metric.sign * (points[1] - points[0])
    place, blocks = numbered_blocks(judged.blocks)
    if blocks < FEWEST_BLOCKS:
        return {**row, "reason": _too_short(judged, blocks)}
    old, new = _in_blocks(judged, name, loss, place, blocks)
    times = poisson_counts(blocks, gate.bootstrap, seed)
    drawn, each = new.drawn(times) - old.drawn(times), new.without_each() - old.without_each()
    spread = Spread.of(metric.sign * drawn, metric.sign * each, gate.confidence)
    if spread is None:
        return {**row, "reason": "many resamples lack a class"}
    row |= {"low": row["gain"] - spread.below, "high": row["gain"] + spread.above}
    return {**row, "chance": spread.chance_below(row["gain"])}


def _too_short(judged: Judged, blocks: int) -> str:
    return (
        f"the judged rows lie in {len(np.unique(judged.days))} days, {blocks} blocks of evaluate.block, and an interval needs at "
        f"least {FEWEST_BLOCKS}: raise retrain.judge_length"
    )


def _in_blocks(judged: Judged, name: str, loss: Loss, place: Array, blocks: int) -> tuple[BlockSums, BlockSums]:
    """The metric's sums of each block, of champion and challenger."""
    metric = loss.metrics[name]
    rows = [
        counted(judged.target, scores, judged.weight, loss, ECE_BINS) for scores in (judged.champion, judged.challenger)
    ]
    return metric.in_blocks(rows[0], place, blocks), metric.in_blocks(rows[1], place, blocks)


def _daily_gains(judged: Judged, name: str, loss: Loss) -> tuple[Array, Array]:
    """(days ascending, gain of each): the jackknife's pseudo-values, n * all - (n - 1) * all but the day (Efron & Tibshirani, ch.
    11). Their mean is the gain of all rows, also for a metric that is no mean of days.
    """
    days, place = np.unique(judged.days, return_inverse=True)
    old, new = _in_blocks(judged, name, loss, place, len(days))
    sign, n = loss.metrics[name].sign, len(days)
    gains = sign * (n * (new.whole() - old.whole()) - (n - 1) * (new.without_each() - old.without_each()))
    good = np.isfinite(gains)
    return days[good], gains[good]


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
    sides = {"champion": mean(old, judged.weight), "challenger": mean(new, judged.weight)}
    row |= {**sides, "rise": mean(new - old, judged.weight)}
    place, blocks = numbered_blocks(judged.blocks)
    weight = np.ones(judged.rows) if judged.weight is None else judged.weight
    sums = BlockSums(add_up(place, blocks, ((new - old) * weight, weight)), lambda added: added[:, 0] / added[:, 1])
    spread = Spread.of(sums.drawn(poisson_counts(blocks, gate.bootstrap, seed)), sums.without_each(), gate.confidence)
    if spread is None:
        return {**row, "reason": _too_short(judged, blocks)}
    return {**row, "low": row["rise"] - spread.below, "high": row["rise"] + spread.above}


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
