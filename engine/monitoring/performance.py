"""Model performance against the reference, measured where labels are known.

The reference is the validation period's labelled rows kept in the bundle. Bands come from windows resampled
from blocks of its days, with as many labels as the current window has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from engine.config.sections.training import EvaluateConfig
from engine.runtime.records import Number
from engine.training.evaluate import Scored, counts, intervals, mean, point_metrics, why_undefined
from engine.training.loss import Loss
from engine.training.metrics import Metric

QUIET, ALARM, WAITING, UNJUDGED, UNASKED = "quiet", "alarm", "waiting", "cannot be judged", "not asked"
SHARE = "share of "  # before the name of a class
RESAMPLES = 200
MOST_ROWS = 20_000  # rows of a resampled window; more would hardly narrow a band whose width comes from the days
FEWEST_LABELS = 30
Bands = tuple[dict[str, float], dict[str, list[float]]]  # (usual value, [low, high]) of each figure
BandsOf = Callable[[int], Bands]  # of a number of labels


@dataclass(frozen=True)
class Outcomes:
    """Scored rows: local day int[n], target float64[n] (NaN: not known yet), scores [n] or [n, classes or levels],
    columns.

    `unknown` rows have a label unseen in training: they count as rows without a label. `weight` float[n]: how much each
    counts (None: 1). `blocks` [n]: what intervals draw whole (None: the days).
    """

    days: np.ndarray
    target: np.ndarray
    scores: np.ndarray
    columns: Mapping[str, np.ndarray]
    unknown: int = 0
    weight: np.ndarray | None = None
    blocks: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """bool[n]: rows with a label."""
        return np.isfinite(self.target)

    @property
    def counted(self) -> Outcomes:
        """The rows with a label and a weight above 0."""
        return self.take(np.flatnonzero(counts(self.target, self.weight)))

    def take(self, rows: np.ndarray) -> Outcomes:
        """The chosen rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        weight, blocks = (None if values is None else values[rows] for values in (self.weight, self.blocks))
        return Outcomes(self.days[rows], self.target[rows], self.scores[rows], columns, weight=weight, blocks=blocks)


def read_outcomes(table: pa.Table) -> Outcomes:
    """The outcomes of reference_outcomes.parquet."""
    names = [name for name in table.column_names if name.startswith("score")]
    scores = np.stack([np.asarray(table[name]) for name in names], axis=1)
    target = table["target"].combine_chunks().to_numpy(zero_copy_only=False)
    days = np.asarray(table["day"].cast(pa.int32()))
    weight = np.asarray(table["weight"]) if "weight" in table.column_names else None
    scores = scores[:, 0] if names == ["score"] else scores
    return Outcomes(days, target.astype(np.float64), scores, {}, weight=weight)


@dataclass(frozen=True)
class Judge:
    """The metrics of a model, and the loss of quality that is an alarm."""

    loss: Loss
    evaluate: EvaluateConfig
    alpha: float
    floor: float
    min_labelled: float
    length: int
    block: int
    seed: int
    classes: tuple[str, ...] = ()  # of the target
    threshold: float | None = None  # of a binary model that decides
    earlier_errors: Mapping[str, Sequence[float]] = field(
        default_factory=dict
    )  # of estimates of earlier windows, by metric

    @property
    def watched(self) -> str:
        """The metric that alarms."""
        return self.loss.metric

    def metrics(self, rows: Outcomes) -> dict[str, float]:
        """All metrics of labelled rows."""
        return point_metrics(
            rows.target,
            rows.scores,
            self.loss,
            ece_bins=self.evaluate.ece_bins,
            weight=rows.weight,
            threshold=self.threshold,
        )

    @property
    def metrics_of_task(self) -> Mapping[str, Metric]:
        """Those of `metrics`, by name."""
        return self.loss.metrics_at(self.threshold)

    def labels(self, rows: Outcomes) -> dict[str, float]:
        """Facts of the labels alone: share of positives, of each class, or the mean target."""
        task, target = self.loss.task, rows.target
        if task == "multiclass":
            return {f"{SHARE}{name}": mean(target == k, rows.weight) for k, name in enumerate(self.classes)}
        return {"positive_rate" if task == "binary" else "target_mean": mean(target, rows.weight)}


def resampled(reference: Outcomes, judge: Judge, rows: int) -> list[np.ndarray]:
    """Row numbers of windows resampled from blocks of the reference's days, each of at most `rows` rows."""
    rng = np.random.Generator(np.random.Philox(judge.seed))
    order = np.argsort(reference.days, kind="stable")
    days = np.unique(reference.days)
    bounds = np.searchsorted(reference.days[order], np.append(days, days[-1] + 1))
    block = max(1, min(judge.block, judge.length, len(days)))
    count = -(-judge.length // block)
    limit = min(rows, MOST_ROWS)
    found = []
    for starts in rng.integers(0, len(days) - block + 1, (RESAMPLES, count)):
        chosen = (starts[:, None] + np.arange(block)).ravel()[: judge.length]
        picked = np.concatenate([order[bounds[k] : bounds[k + 1]] for k in chosen])
        if len(picked) > limit:
            picked = rng.choice(picked, limit, replace=False)
        if len(picked):
            found.append(picked)
    return found


# -------------------------------------------------------------------------------------------------------- measured


class MetricRecord(TypedDict):
    """A metric, a fact of the labels, or a business metric: value or reason, and the band of the reference."""

    value: float | None
    reason: NotRequired[str]
    status: NotRequired[str]
    interval: NotRequired[list[Number] | None]
    reference: NotRequired[Number]
    band: NotRequired[list[Number]]
    beyond: NotRequired[bool]
    worse_by: NotRequired[Number]
    alarm: NotRequired[bool]
    error: NotRequired[Number | None]
    estimated: NotRequired[Number | None]
    past_errors: NotRequired[int]
    promised: NotRequired[bool]
    expression: NotRequired[str]
    better: NotRequired[str]


class PerformanceRecord(TypedDict, total=False):
    """What labelled rows say, or are expected to say (by the `method`); empty where nothing was asked."""

    status: str
    reason: str
    rows: int
    labelled: int
    share_labelled: Number
    watched: str
    enough_labels: bool
    judged: list[str]
    alarm: bool
    rows_of_unknown_target: int
    metrics: dict[str, MetricRecord]
    labels: dict[str, MetricRecord]
    labels_moved: list[str]
    alarming: list[str]
    method: str


def measure(
    reference: Outcomes | None, current: Outcomes, judge: Judge, bands: BandsOf | None = None
) -> PerformanceRecord:
    """Metrics of the window's labelled rows with intervals, the reference's band (`bands_of` it), and what follows from them.

    `status`: quiet, alarm, waiting (too few of the labels are known), or cannot be judged, with the `reason`. `judged`: the
    watched metric, or its replacement where it cannot be computed.
    """
    rows, labelled = len(current.target), int(current.known.sum())
    known = current.counted
    share = labelled / rows if rows else 0.0
    record: PerformanceRecord = {"rows": rows, "labelled": labelled, "share_labelled": share, "watched": judge.watched}
    record["enough_labels"] = bool(rows) and share >= judge.min_labelled
    record |= {"status": UNJUDGED if record["enough_labels"] else WAITING, "judged": [], "alarm": False}
    if current.unknown:
        record["rows_of_unknown_target"] = current.unknown
    if len(known.target) < FEWEST_LABELS:
        which = (
            f"{labelled} labels are known"
            if labelled < FEWEST_LABELS
            else f"{len(known.target)} rows have a weight above 0"
        )
        return record | {"reason": f"not computable, because {which}, fewer than {FEWEST_LABELS}"}
    figures = _figures(known, bands or bands_of(reference, judge), judge)
    record["metrics"] = {name: item for name, item in figures.items() if name in judge.metrics_of_task}
    record["labels"] = {name: item for name, item in figures.items() if name not in judge.metrics_of_task}
    record["labels_moved"] = [name for name, item in record["labels"].items() if _moved(item, judge)]
    record["judged"], reason = _judged(record["metrics"], reference, judge)
    if reason:
        record["reason"] = reason
    if record["enough_labels"] and record["judged"]:
        record["alarming"] = [
            name
            for name in record["judged"]
            if (item := record["metrics"][name])["beyond"] and item["worse_by"] >= judge.floor
        ]
        record["alarm"] = bool(record["alarming"])
        record["status"] = ALARM if record["alarm"] else QUIET
    return record


def _figures(known: Outcomes, bands_for: BandsOf, judge: Judge) -> dict[str, MetricRecord]:
    """Each metric and each fact of the labels: value or reason, interval, reference, band, and whether it is beyond."""
    metrics = judge.metrics(known)
    values = {**metrics, **judge.labels(known)}
    blocks = known.days if known.blocks is None else known.blocks
    scored = Scored(known.target, known.scores, known.days, blocks, known.weight)
    bounds = intervals(scored, metrics, judge.loss, judge.evaluate, threshold=judge.threshold)
    base, bands = bands_for(len(known.target))
    found: dict[str, MetricRecord] = {}
    for name, value in values.items():
        if not np.isfinite(value):
            why = why_undefined(judge.metrics_of_task[name], known.target, known.scores)
            found[name] = {"value": None, "reason": f"not computable, because {why}"}
            continue
        item = found[name] = {"value": value, "interval": list(bounds[name]) if name in bounds else None}
        if name not in bands:
            continue
        low, high = bands[name]
        item |= {"reference": base[name], "band": bands[name]}
        metric = judge.metrics_of_task.get(name)  # None: a fact of the labels, which has no better side
        falls, rises = metric is None or metric.higher_is_better, metric is None or not metric.higher_is_better
        item["beyond"] = bool((value < low and falls) or (value > high and rises))
        if metric is not None:
            item["worse_by"] = worse_by(value, base[name], metric)
    return found


def _judged(
    metrics: Mapping[str, MetricRecord], reference: Outcomes | None, judge: Judge
) -> tuple[list[str], str | None]:
    """(metrics that are judged by a band: the watched one or its replacements; the reason for replacements)."""
    usable = [name for name, item in metrics.items() if "band" in item]
    if judge.watched in usable:
        return [judge.watched], None
    if reference is None:
        return [], "no band, because the model was trained without a labelled validation period"
    why = metrics[judge.watched].get("reason") or "not computable on the reference"
    found = [name for name, metric in judge.metrics_of_task.items() if metric.stand_in and name in usable]
    return found, f"{judge.watched} is {why}" + (f"; {' and '.join(found)} are judged instead" if found else "")


def _moved(item: MetricRecord, judge: Judge) -> bool:
    """Whether labels differ from the reference's by more than its windows do, and by a relevant share."""
    return bool(item.get("beyond") and abs(item["value"] - item["reference"]) >= judge.floor * abs(item["reference"]))


def bands_of(reference: Outcomes | None, judge: Judge) -> BandsOf:
    """`reference_bands` by the number of labels, worked out once for those of one number."""
    counted = None if reference is None else reference.counted

    @functools.cache
    def found(labelled: int) -> Bands:
        return reference_bands(counted, judge, labelled)

    return lambda labelled: found(min(labelled, MOST_ROWS))


def reference_bands(reference: Outcomes | None, judge: Judge, labelled: int) -> Bands:
    """(median, [low, high]) of each figure over resampled windows of the reference with as many labels.

    The median of windows of the same length, and not the figure of the whole: rows of one day are more alike than those of a
    month, and a day's ROC AUC is lower for that alone.
    """
    if reference is None or not len(reference.target):
        return {}, {}
    found: dict[str, list[float]] = {}
    for rows in resampled(reference, judge, labelled):
        window = reference.take(rows)
        for name, value in {**judge.metrics(window), **judge.labels(window)}.items():
            found.setdefault(name, []).append(value)
    base, bands = {}, {}
    for name, values in found.items():
        good = np.array(values)[np.isfinite(values)]
        if len(good):
            base[name] = float(np.median(good))
            bands[name] = [float(np.quantile(good, judge.alpha)), float(np.quantile(good, 1 - judge.alpha))]
    return base, bands


def worse_by(value: float, reference: float, metric: Metric) -> float:
    """Relative loss of quality; for a rank metric, relative to its gain over chance. Negative: better. Infinite where
    the reference has nothing to lose: its loss is 0, or it is not better than chance.
    """
    if metric.higher_is_better:
        return relative(reference - value, reference - metric.chance)
    return relative(value - reference, reference)


def relative(loss: float, whole: float) -> float:
    """A loss as a share of the whole; infinite where there is nothing to lose."""
    return loss / whole if whole > 0 else float(np.copysign(np.inf, loss)) if loss else 0.0
