"""Quality expected before labels are known, from scores and from what such scores have meant so far.

A row of unknown label counts as its possible outcomes, weighted by their probability given the score: so every metric of the
table that takes weights has an estimate. The probabilities come from labelled rows: isotonic regression of the label on the
score, class by class (CBPE, Kivimäki et al.: Performance Estimation in Binary Classification Using Calibrated Confidence,
arXiv 2505.05295, 2025), and for a number the errors of rows with a similar score. A change of the relation of score and
label cannot be detected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.monitoring.performance import (
    SHARE,
    BandsOf,
    Judge,
    MetricRecord,
    Outcomes,
    PerformanceRecord,
    bands_of,
    worse_by,
)
from engine.monitoring.statistics import ColumnSpec
from engine.training.metrics import Metric, Rows

Array = NDArray[Any]
ERROR_GROUPS, ERRORS = 20, 20  # groups of similar scores, and quantiles of the errors of each
DRAWS = 20  # of the label of a row
FEWEST = 200  # labelled rows that say what a score means


@dataclass(frozen=True)
class Possible:
    """Possible outcomes of n rows, k each: target float64[n, k] and probability float64[n, k]."""

    target: Array
    chance: Array


Meaning = Callable[[Array], Possible]  # of scores float64[n] or [n, classes]


def meaning_of_scores(task: str, target: Array, scores: Array, weight: Array | None = None) -> Meaning | None:
    """The possible outcomes of a score by labelled rows: target float64[n], scores float64[n] or [n, classes], weight [n].

    None with fewer than FEWEST rows.
    """
    if len(target) < FEWEST:
        return None
    if task == "regression":
        return _errors(target, scores, weight)
    columns = scores[:, None] if task == "binary" else scores
    wanted = [1] if task == "binary" else list(range(scores.shape[1]))
    curves = [_isotonic(columns[:, k], target == label, weight) for k, label in enumerate(wanted)]

    def classes(found: Array) -> Possible:
        found = found[:, None] if found.ndim == 1 else found
        chance = np.stack([np.interp(found[:, k], *curve) for k, curve in enumerate(curves)], axis=1)
        if task == "binary":
            chance = np.concatenate([1 - chance, chance], axis=1)
        else:
            chance = chance / np.maximum(chance.sum(axis=1, keepdims=True), 1e-12)
        return Possible(np.broadcast_to(np.arange(chance.shape[1], dtype=np.float64), chance.shape), chance)

    return classes


def _isotonic(scores: Array, hits: Array, weight: Array | None) -> tuple[Array, Array]:
    """(distinct scores, share of hits): the rising curve with the least squared error (pool adjacent violators)."""
    from scipy.optimize import isotonic_regression  # takes tenths of a second to import

    levels, place = np.unique(scores, return_inverse=True)
    times = np.bincount(place, weight)
    share = np.bincount(place, hits if weight is None else hits * weight) / np.maximum(times, 1e-300)
    known = times > 0
    return levels[known], np.asarray(isotonic_regression(share[known], weights=times[known]).x)


def _errors(target: Array, scores: Array, weight: Array | None) -> Meaning:
    edges = np.unique(_quantiles(scores, np.arange(1, ERROR_GROUPS) / ERROR_GROUPS, weight))
    edges = edges[edges < scores.max()]
    place, error = np.searchsorted(edges, scores), target - scores
    middles = (np.arange(ERRORS) + 0.5) / ERRORS
    # No group is empty: each has its edge, the last the highest score.
    groups = [np.flatnonzero(place == k) for k in range(len(edges) + 1)]
    quantiles = np.stack(
        [_quantiles(error[rows], middles, None if weight is None else weight[rows]) for rows in groups]
    )

    def numbers(found: Array) -> Possible:
        rows = quantiles[np.searchsorted(edges, found)]
        return Possible(found[:, None] + rows, np.full(rows.shape, 1 / ERRORS))

    return numbers


def _quantiles(values: Array, levels: Array, weight: Array | None) -> Array:
    """Values that a share of the weight does not exceed: a row of weight 3 is the row three times."""
    weight = np.ones(len(values)) if weight is None else weight
    return np.asarray(np.quantile(values, levels, weights=weight, method="inverted_cdf"))


def expected(metrics: Mapping[str, Metric], possible: Possible, rows: Rows) -> dict[str, float]:
    """Each metric of rows whose target is not known; `rows.target` is not read. NaN where it cannot be computed."""
    outcomes = possible.target.shape[1]
    weight = possible.chance if rows.weight is None else possible.chance * rows.weight[:, None]
    used = np.flatnonzero(weight.ravel() > 0)
    unfolded = Rows(
        possible.target.ravel()[used],
        np.repeat(rows.scores, outcomes, axis=0)[used],
        levels=rows.levels,
        ece_bins=rows.ece_bins,
        weight=weight.ravel()[used],
        threshold=rows.threshold,
        power=rows.power,
        interval=rows.interval,
    )
    return {name: metric.point(unfolded) for name, metric in metrics.items()}


def expected_target(possible: Possible) -> Array:
    """float64[n]: the expected target of each row (the probability of the positive class, of two)."""
    return np.asarray((possible.target * possible.chance).sum(axis=1))


# ---------------------------------------------------------------------------------------------------------- a window


@dataclass(frozen=True)
class Unlabelled:
    """Scores float64[n] or [n, classes] of rows whose labels are not read, how much each counts (None: 1), and how many rows
    of the window they are (None: n).
    """

    scores: Array
    weight: Array | None = None
    rows: int | None = None

    @property
    def number(self) -> int:
        """How many rows of the window these are."""
        return len(self.scores) if self.rows is None else self.rows

    @property
    def counted(self) -> Unlabelled:
        """The rows with a weight above 0."""
        if self.weight is None or (self.weight > 0).all():
            return self
        used = self.weight > 0
        return Unlabelled(self.scores[used], self.weight[used], self.rows)

    @classmethod
    def of_counts(cls, column: ColumnSpec, counts: Array, past: Outcomes) -> Unlabelled:
        """One row a bin of a profile, float64[bins] (below, between the edges, above), with the mean score that it had."""
        assert column.edges is not None
        scores = past.scores.astype(np.float64)
        place = np.clip(np.searchsorted(column.edges, scores, side="right"), 0, len(counts) - 1)
        there = np.bincount(place, minlength=len(counts))
        edges = np.concatenate([column.edges[:1], (column.edges[1:] + column.edges[:-1]) / 2, column.edges[-1:]])
        means = np.where(there > 0, np.bincount(place, scores, len(counts)) / np.maximum(there, 1), edges)
        used = counts > 0
        return cls(means[used], counts[used], int(counts.sum()))


def estimate(
    past: Outcomes | None,
    recent: Outcomes | None,
    rows: Unlabelled | None,
    judge: Judge,
    measured: Mapping[str, MetricRecord],
    bands: BandsOf | None = None,
    meaning: Meaning | None = None,
) -> PerformanceRecord:
    """Each metric of a window expected from its scores, with a band from past errors, or the reason why there is none.

    What scores mean is learned from `recent` labelled rows where there are enough, else from `past`, the reference. Past errors
    are those of separate windows of the reference, each estimated from the days before it, and those of earlier monitored
    windows. `measured`: the metrics of the window as far as labels are known. `bands` and `meaning` are worked out here
    unless they are given. A metric is `beyond` where even the end of its
    band that is in its favour is outside of the reference's band, and alarms where past errors are `promised` to suffice for
    alpha and the loss is not below the floor. `alarming` are those that are watched.
    """
    rows = None if rows is None else rows.counted
    if past is None or rows is None or not len(rows.scores):
        return {"reason": "not computable, because there are no labelled reference rows or no predictions"}
    labelled = _learned_from(past, recent)
    meaning = meaning or _meaning(labelled, judge)
    if meaning is None:
        return {"reason": f"not computable, because fewer than {FEWEST} labels say what a score means"}
    base, limits = (bands or bands_of(past, judge))(rows.number)
    possible = meaning(rows.scores.astype(np.float64))
    errors = past_errors(past, judge)
    metrics: dict[str, MetricRecord] = {}
    for name, value in _expected(possible, rows, judge).items():
        if not math.isfinite(value):
            continue
        item = metrics[name] = {"value": value}
        if name in base:
            item["reference"] = base[name]
        real = measured[name]["value"] if name in measured else None
        item["error"] = None if real is None else value - real
        known = [*errors.get(name, ()), *judge.earlier_errors.get(name, ())]
        if known and name in limits:
            item.update(_against(value, limits[name], base[name], known, judge, judge.metrics_of_task[name]))
    source = f"{len(labelled.counted.target):,} labels of {'recent days' if labelled is recent else 'the reference'}"
    watched = [judge.watched] if judge.watched in metrics else [n for n in metrics if judge.metrics_of_task[n].stand_in]
    alarming = [name for name in watched if metrics[name].get("alarm")]
    method = "errors of similar scores" if judge.loss.number else "isotonic regression"
    labels = _labels(possible, rows, judge)
    return {"metrics": metrics, "alarming": alarming, "method": f"{method} on {source}", "labels": labels}


def drawn_labels(meaning: Meaning | None, rows: Outcomes | None, judge: Judge) -> Array | None:
    """float64[DRAWS, n]: targets drawn from the possible ones of each row, its draws spread evenly; None without any."""
    if meaning is None or rows is None or not len(rows.scores):
        return None
    possible = meaning(rows.scores.astype(np.float64))
    first = np.random.Generator(np.random.Philox(judge.seed)).random(len(rows.scores))
    until = np.cumsum(possible.chance, axis=1)
    found = np.empty((DRAWS, len(first)))
    for at in range(DRAWS):
        level = (first + at / DRAWS) % 1 * until[:, -1]
        outcome = (level[:, None] >= until[:, :-1]).sum(axis=1)
        found[at] = possible.target[np.arange(len(first)), outcome]
    return found


def learned(past: Outcomes | None, recent: Outcomes | None, judge: Judge) -> Meaning | None:
    """What scores mean by `recent` labelled rows where there are enough, else by `past`, the reference; None without either."""
    return None if past is None else _meaning(_learned_from(past, recent), judge)


def _learned_from(past: Outcomes, recent: Outcomes | None) -> Outcomes:
    return recent if recent is not None and len(recent.counted.target) >= FEWEST else past


def _meaning(rows: Outcomes, judge: Judge) -> Meaning | None:
    known, loss = rows.counted, judge.loss
    task = "regression" if loss.number else loss.task
    meaning = meaning_of_scores(task, known.target, loss.centre(known.scores.astype(np.float64)), known.weight)
    return None if meaning is None else lambda scores: meaning(loss.centre(scores))


def _expected(possible: Possible, rows: Unlabelled, judge: Judge) -> dict[str, float]:
    scores = rows.scores.astype(np.float64)
    asked = Rows(
        np.empty(0),
        scores,
        judge.loss.levels,
        judge.evaluate.ece_bins,
        weight=rows.weight,
        threshold=judge.threshold,
        power=judge.loss.power,
        interval=judge.loss.interval,
    )
    return expected(judge.metrics_of_task, possible, asked)


def _labels(possible: Possible, rows: Unlabelled, judge: Judge) -> dict[str, MetricRecord]:
    """The expected share of positives, of each class, or mean target."""
    if judge.loss.task == "multiclass":
        shares = np.average(possible.chance, axis=0, weights=rows.weight)
        return {f"{SHARE}{name}": {"value": float(share)} for name, share in zip(judge.classes, shares, strict=True)}
    name = "positive_rate" if judge.loss.task == "binary" else "target_mean"
    mean = np.average(expected_target(possible), weights=rows.weight)
    return {name: {"value": float(mean)}}


def _against(
    value: float, band: Sequence[float], reference: float, errors: Sequence[float], judge: Judge, metric: Metric
) -> MetricRecord:
    bound, promised = error_bound(errors, judge.alpha)
    best = value + metric.sign * bound  # as good as past errors allow
    beyond = best < band[0] if metric.higher_is_better else best > band[1]
    worse = worse_by(best, reference, metric)
    return {
        "value": value,
        "band": [value - bound, value + bound],
        "past_errors": len(errors),
        "promised": promised,
        "beyond": bool(beyond),
        "worse_by": worse,
        "alarm": bool(beyond and promised and worse >= judge.floor),
    }


def past_errors(past: Outcomes, judge: Judge) -> dict[str, list[float]]:
    """Expected less measured of each metric in windows of the reference, each estimated from the days before it."""
    found: dict[str, list[float]] = {}
    for before, inside in rolling_origins(past.days, judge.length):
        meaning = _meaning(past.take(before), judge) if len(inside) else None
        if meaning is None:
            continue
        window = past.take(inside).counted
        real = judge.metrics(window)
        possible = meaning(window.scores.astype(np.float64))
        for name, value in _expected(possible, Unlabelled(window.scores, window.weight), judge).items():
            if math.isfinite(value) and math.isfinite(real[name]):
                found.setdefault(name, []).append(value - real[name])
    return found


# ------------------------------------------------------------------------------------------------------- past errors


def rolling_origins(days: Array, length: int) -> Iterator[tuple[Array, Array]]:
    """(rows before a window, rows of it) for separate windows of `length` days that have as many days before them."""
    first, last = int(days.min()), int(days.max())
    for start in range(first + length, last - length + 2, length):
        yield np.flatnonzero(days < start), np.flatnonzero((days >= start) & (days < start + length))


def error_bound(errors: Sequence[float], alpha: float) -> tuple[float, bool]:
    """(the size that a share 1 - alpha of errors does not exceed, whether their number can promise that).

    The quantile of split conformal prediction: of n errors the ceil((n + 1) (1 - alpha))-th by size, or the largest.
    """
    sizes = np.sort(np.abs(np.asarray(errors, np.float64)))
    place = math.ceil((len(sizes) + 1) * (1 - alpha))
    return float(sizes[min(place, len(sizes)) - 1]), place <= len(sizes)
