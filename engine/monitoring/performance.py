"""How good the model is: measured once labels are known, estimated before, against what the reference shows.

The reference is the validation period's labelled rows kept in the bundle. Bands come from windows put together from
blocks of its days, with as many labels as the current window has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.names import RENAME
from engine.config.tree import BusinessConfig, EvaluateConfig
from engine.errors import UserError
from engine.monitoring import expression
from engine.monitoring.statistics import ColumnSpec
from engine.training.evaluate import HIGHER_IS_BETTER, intervals, point_metrics
from engine.training.losses import LOSSES

CHANCE = {"roc_auc": 0.5, "macro_auc": 0.5}  # what a model that knows nothing gets
RESAMPLES = 200
MOST_ROWS = 20_000  # rows of a resampled window; more would narrow a band that days already make wider
FEWEST_LABELS = 30


@dataclass(frozen=True)
class Outcomes:
    """Scored rows: local day int[n], target float64[n] (NaN: not known yet), scores [n] or [n, classes], columns."""

    days: np.ndarray
    target: np.ndarray
    scores: np.ndarray
    columns: Mapping[str, np.ndarray]

    @property
    def known(self) -> np.ndarray:
        """bool[n]: rows with a label."""
        return np.isfinite(self.target)

    def take(self, rows: np.ndarray) -> Outcomes:
        """Some of the rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Outcomes(self.days[rows], self.target[rows], self.scores[rows], columns)


def read_outcomes(table: pa.Table) -> Outcomes:
    """The outcomes of reference_outcomes.parquet."""
    names = [name for name in table.column_names if name.startswith("score")]
    scores = np.stack([np.asarray(table[name]) for name in names], axis=1)
    target = table["target"].combine_chunks().to_numpy(zero_copy_only=False)
    days = np.asarray(table["day"].cast(pa.int32()))
    return Outcomes(days, target.astype(np.float64), scores[:, 0] if names == ["score"] else scores, {})


@dataclass(frozen=True)
class Judge:
    """What a loss of quality is measured with and when it is one."""

    loss: str
    evaluate: EvaluateConfig
    quantile: float
    alpha: float
    floor: float
    min_labelled: float
    length: int
    block: int
    seed: int

    @property
    def watched(self) -> str:
        """The metric that alarms."""
        return LOSSES[self.loss].metric

    def metrics(self, rows: Outcomes) -> dict[str, float]:
        """All metrics of labelled rows."""
        return point_metrics(
            rows.target, rows.scores, self.loss, ece_bins=self.evaluate.ece_bins, quantile=self.quantile
        )


def resampled(reference: Outcomes, judge: Judge, rows: int) -> list[np.ndarray]:
    """Row numbers of windows put together from blocks of the reference's days, each of at most `rows` rows."""
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


def measure(reference: Outcomes | None, current: Outcomes, judge: Judge) -> dict[str, Any]:
    """Metrics of the window's labelled rows with intervals, the reference's band, and whether it is an alarm."""
    known = current.take(np.flatnonzero(current.known))
    rows, labelled = len(current.target), len(known.target)
    share = labelled / rows if rows else 0.0
    record: dict[str, Any] = {"rows": rows, "labelled": labelled, "share_labelled": share, "watched": judge.watched}
    if labelled < FEWEST_LABELS:
        return record | {"reason": f"not computable, because {labelled} labels are known, fewer than {FEWEST_LABELS}"}
    values = judge.metrics(known)
    bounds = intervals(known.target, known.scores, judge.loss, judge.evaluate, quantile=judge.quantile)
    base, bands = reference_bands(reference, judge, labelled)
    record["metrics"] = {}
    for name, value in values.items():
        if not np.isfinite(value):
            record["metrics"][name] = {"value": None, "reason": "not computable, because rows of one class only"}
            continue
        item: dict[str, Any] = {"value": value, "interval": list(bounds[name]) if name in bounds else None}
        if name in bands:
            higher = HIGHER_IS_BETTER[name]
            item |= {"reference": base[name], "band": bands[name], "worse_by": worse_by(value, base[name], name)}
            item["beyond"] = value < bands[name][0] if higher else value > bands[name][1]
        record["metrics"][name] = item
    record["enough_labels"] = share >= judge.min_labelled
    watched = record["metrics"].get(judge.watched, {})
    large = watched.get("worse_by", 0.0) >= judge.floor
    record["alarm"] = bool(record["enough_labels"] and watched.get("beyond", False) and large)
    if reference is None:
        record["reason"] = "no band, because the model was trained without a labelled validation period"
    return record


def reference_bands(
    reference: Outcomes | None, judge: Judge, labelled: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(metrics of the whole reference, [low, high] of each over resampled windows with as many labels)."""
    if reference is None or not len(reference.target):
        return {}, {}
    base = judge.metrics(reference)
    found: dict[str, list[float]] = {}
    for rows in resampled(reference, judge, labelled):
        for name, value in judge.metrics(reference.take(rows)).items():
            found.setdefault(name, []).append(value)
    bands = {}
    for name, values in found.items():
        good = np.array(values)[np.isfinite(values)]
        if len(good) and np.isfinite(base[name]):
            bands[name] = [float(np.quantile(good, judge.alpha)), float(np.quantile(good, 1 - judge.alpha))]
    return base, bands


def worse_by(value: float, reference: float, name: str) -> float:
    """Relative loss of quality; for a rank metric of what it has above chance. Negative: better."""
    if HIGHER_IS_BETTER[name]:
        room = reference - CHANCE.get(name, 0.0)
        return (reference - value) / room if room > 0 else 0.0
    return (value - reference) / reference if reference > 0 else 0.0


# ------------------------------------------------------------------------------------------------------- estimated


def estimate(reference: Outcomes | None, column: ColumnSpec, counts: np.ndarray, loss: str) -> dict[str, Any]:
    """Metrics expected before labels are known, if the score still means what it meant on the reference.

    By bins of the score (confidence-based, as NannyML's CBPE and DLE): the share of positives, or the loss, of each bin
    of the reference, weighted by the window's rows in it. `counts` float64[bins] (below, bins, above). It cannot see a
    change of what a score means.
    """
    task = LOSSES[loss].task
    if task == "multiclass":
        return {"reason": "not computable, because confidence-based estimates serve binary and regression models"}
    if reference is None or not counts.sum() or column.edges is None:
        return {"reason": "not computable, because there are no labelled reference rows or no predictions"}
    scores, target = reference.scores.astype(np.float64), reference.target
    bins = np.searchsorted(column.edges, scores, side="right")
    bins = np.where(scores == column.edges[-1], len(column.edges) - 1, bins)
    rows = np.bincount(bins, minlength=column.width).astype(np.float64)
    metrics = {}
    for name, of in _by_bins(task, scores, target, bins, rows).items():
        metrics[name] = {"value": of(counts), "reference": of(rows)}
    whole = point_metrics(target, scores, loss)
    for name, item in metrics.items():
        # The difference that binning makes is the same on both sides, so only the change is taken from bins.
        item["value"] = whole[name] + item["value"] - item["reference"]
        item["reference"] = whole[name]
    return {"metrics": metrics, "method": "by bins of the score"}


def _by_bins(
    task: str, scores: np.ndarray, target: np.ndarray, bins: np.ndarray, rows: np.ndarray
) -> dict[str, Callable[[np.ndarray], float]]:
    """Metric -> function of rows per bin."""

    def mean_of(values: np.ndarray) -> np.ndarray:
        total = np.bincount(bins, values, minlength=len(rows))
        return np.divide(total, rows, out=np.full(len(rows), values.mean()), where=rows > 0)

    def expected(values: np.ndarray) -> Callable[[np.ndarray], float]:
        by_bin = mean_of(values)
        return lambda counts: float((by_bin * counts).sum() / counts.sum())

    if task == "regression":
        square = expected((target - scores) ** 2)
        return {"mae": expected(np.abs(target - scores)), "rmse": lambda counts: float(np.sqrt(square(counts)))}
    positive = mean_of(target)
    clipped = np.clip(np.where(target == 1, scores, 1 - scores), 1e-12, 1.0)

    def area(counts: np.ndarray) -> float:
        true, false = counts * positive, counts * (1 - positive)
        above = true.sum() - np.cumsum(true)
        both = float(true.sum() * false.sum())
        return float((false * (above + true / 2)).sum() / both) if both > 0 else float("nan")

    return {"roc_auc": area, "log_loss": expected(-np.log(clipped)), "brier": expected((target - scores) ** 2)}


# -------------------------------------------------------------------------------------------------------- business


def business(
    metrics: Mapping[str, BusinessConfig], reference: Outcomes | None, current: Outcomes | None, judge: Judge
) -> dict[str, dict[str, Any]]:
    """Each business metric of the window, against the band of the reference where it has the columns."""
    found = {}
    for name, config in metrics.items():
        found[name] = _business(config, reference, current, judge) | {
            "expression": config.expression,
            "better": config.better,
        }
    return found


def _business(
    config: BusinessConfig, reference: Outcomes | None, current: Outcomes | None, judge: Judge
) -> dict[str, Any]:
    if current is None:
        return {"value": None, "reason": "not computable, because the rows of the window are not at hand"}
    value = expression.evaluate(config.expression, _values(current))
    if not np.isfinite(value):
        return {"value": None, "reason": "not computable, because its arithmetic has no answer on these rows"}
    record: dict[str, Any] = {"value": value}
    lacking = expression.names_in(config.expression) - set(_values(reference)) if reference is not None else set()
    if reference is None or lacking:
        why = (
            f"the reference does not hold {', '.join(sorted(lacking))}" if lacking else "there is no labelled reference"
        )
        return record | {"reason": f"no band, because {why}"}
    whole = expression.evaluate(config.expression, _values(reference))
    draws = np.array(
        [
            expression.evaluate(config.expression, _values(reference.take(rows)))
            for rows in resampled(reference, judge, len(current.target))
        ]
    )
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not np.isfinite(whole):
        return record | {"reason": "no band, because its arithmetic has no answer on the reference"}
    low, high = float(np.quantile(draws, judge.alpha)), float(np.quantile(draws, 1 - judge.alpha))
    lower = config.better == "lower"
    change = (value - whole) / abs(whole) if whole else 0.0
    worse = change if lower else -change
    beyond = value > high if lower else value < low
    record |= {"reference": whole, "band": [low, high], "worse_by": worse, "beyond": bool(beyond)}
    return record | {"alarm": bool(beyond and worse >= judge.floor)}


def _values(rows: Outcomes) -> dict[str, np.ndarray]:
    scores = (
        {"score": rows.scores}
        if rows.scores.ndim == 1
        else {f"score_{index}": rows.scores[:, index] for index in range(rows.scores.shape[1])}
    )
    return {
        **rows.columns,
        **{name: values.astype(np.float64) for name, values in scores.items()},
        "label": rows.target,
    }


def check_expressions(
    metrics: Mapping[str, BusinessConfig], columns: Mapping[str, object], classes: int, target: str | None = None
) -> list[str]:
    """Columns of the dataset that the expressions read. A column called `label` is the target or must be called otherwise.

    Raises UserError for anything else, before data is read.
    """
    own = {"label"} | ({"score"} if not classes else {f"score_{index}" for index in range(classes)})
    needed: dict[str, None] = {}
    for name, config in metrics.items():
        for used in sorted(expression.names_in(config.expression)):
            if used in own and used in columns and (used, target) != ("label", "label"):
                raise UserError(
                    f"monitor.business.{name} reads {used!r}, which is the model's and a column of the data too. "
                    + RENAME.format(used)
                )
            if used in columns and used not in own:
                needed[used] = None
            elif used not in own:
                known = ", ".join(sorted({*own, *columns}))
                raise UserError(f"monitor.business.{name} reads {used!r}, which must be one of {known}")
    return list(needed)
