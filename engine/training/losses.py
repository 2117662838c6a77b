"""Losses in use: the loss that a config or a model names, its checks of targets, class weights, and the scores of outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import plugins
from engine.config.sections.training import LOSS_GROUP, METRIC_GROUP, TrainConfig
from engine.errors import UserError
from engine.runtime.records import Within
from engine.training.intervals import IntervalRecord
from engine.training.loss import Loss, LossSettings
from engine.training.loss_table import TABLE
from engine.training.target import PLAIN, TargetScale, Values
from engine.training.user_losses import user_loss, user_metric

PAD = 64  # rows; a vectorised tail may round differently from the body, so there is no tail
LOSSES = {name: make(LossSettings()) for name, make in TABLE.items()}  # with the default settings
Level = Annotated[float, Within(0, 1)]
Temperature = Annotated[float, Within(0.01, 100)]  # that raw outputs are divided by


class LossRecord(TypedDict):
    """A loss in model.json or a decision: its name, the settings that scores and metrics need, and a metric of the user's."""

    loss: str
    quantile: NotRequired[Level]
    quantiles: NotRequired[list[Level]]
    tweedie_power: NotRequired[Annotated[float, Within(1, 2)]]
    temperature: NotRequired[Temperature]
    interval: NotRequired[IntervalRecord]
    metric: NotRequired[str | None]
    loss_version: NotRequired[str]


def loss_of(config: TrainConfig) -> Loss:
    """The loss of a config, of its main target where there are several. Raises UserError where there is none of its name."""
    names = [field.name for field in dataclasses.fields(LossSettings)]
    return _named(config.loss, LossSettings(**{name: getattr(config, name) for name in names}), config.metric)


def recorded_loss(record: Mapping[str, Any]) -> Loss:
    """The loss of a LossRecord; records older than a setting have its default. Raises UserError."""
    defaults = LossSettings()
    settings = LossSettings(
        quantile=float(record.get("quantile", defaults.quantile)),
        quantiles=tuple(record.get("quantiles", defaults.quantiles)),
        tweedie_power=float(record.get("tweedie_power", defaults.tweedie_power)),
    )
    loss = _named(record["loss"], settings, record.get("metric"))
    loss = cooled(loss, record.get("temperature"))
    return dataclasses.replace(loss, interval=record["interval"]) if "interval" in record else loss


def cooled(loss: Loss, temperature: float | None) -> Loss:
    """The loss with raw outputs divided by a temperature, where there is one and the loss has a link."""
    if temperature is None or loss.link is None:
        return loss
    return dataclasses.replace(loss, link=functools.partial(_cooled, loss.link, float(temperature)))


def _cooled(link: Callable[[NDArray], NDArray], temperature: float, outputs: NDArray) -> NDArray:
    return link(outputs / temperature)


def loss_record(config: TrainConfig) -> LossRecord:
    """The record of a config's loss, with the settings that it reads."""
    found: LossRecord = {"loss": config.loss, "quantile": config.quantile}
    if config.loss == "quantiles":
        found["quantiles"] = list(config.quantiles)
    if config.loss == "tweedie":
        found["tweedie_power"] = config.tweedie_power
    if any(metric.name == plugins.split(config.metric or "")[0] for metric in loss_of(config).own):
        found["metric"] = config.metric
    if config.loss not in TABLE:
        found["loss_version"] = plugins.version_of(config.loss, LOSS_GROUP) or config.loss
    return found


@functools.cache
def _named(name: str, settings: LossSettings, metric: str | None) -> Loss:
    loss = TABLE[name](settings) if name in TABLE else user_loss(name)
    if metric is not None and (plugins.split(metric)[1] or metric in plugins.installed(METRIC_GROUP)):
        loss = dataclasses.replace(loss, own=(*loss.own, user_metric(metric, loss.task)))
    # The pinball metric of every loss of a number is that of the level in the config.
    return dataclasses.replace(loss, levels=(settings.quantile,)) if loss.task == "regression" else loss


def check_targets(target: Values, rows: NDArray[np.int64], loss: Loss, outputs: int) -> None:
    """Raise UserError with the first row whose target is invalid for the loss."""
    if not len(target):
        raise UserError("there must be at least one row with a target to train on, found none: check split.train")
    with np.errstate(over="ignore"):
        good = np.isfinite(target.astype(np.float32, copy=False))
    must = loss.targets.must
    if loss.task == "multiclass":
        classes = loss.classes(outputs)
        good &= (target >= 0) & (target < classes) & (target == np.floor(target))
        must = f"a class 0 to {classes - 1}"
    else:
        good &= loss.targets.good(target)
    if not good.all():
        at = int(np.argmin(good))
        raise UserError(
            f"the target must be {must} for train.loss={loss.name}, found {target[at]} in dataset row {rows[at]}"
        )


def class_weights(
    target: Values, config: TrainConfig, outputs: int, weight: NDArray[np.float32] | None = None
) -> NDArray[np.float32] | None:
    """float32[classes] = n / (classes * count) for `balanced` (1 for a class that does not occur), else None; rows of target [n]
    count by their weight [n].
    """
    loss = loss_of(config)
    if config.class_weight == "none" or loss.number:
        return None
    classes = loss.classes(outputs)
    counts = np.bincount(target.astype(np.int64), weight, classes)
    weights = counts.sum() / (classes * np.where(counts > 0, counts, 1))
    return np.asarray(np.where(counts > 0, weights, 1.0), np.float32)


def target_scale(target: Values, loss: Loss, weight: NDArray[np.float32] | None = None) -> TargetScale:
    """The scale of the training rows' target in which a loss reads it: standardised, or in multiples of its mean; none for
    classes.
    """
    if not loss.number:
        return PLAIN
    return TargetScale.of_mean(target, weight) if loss.unit == "mean" else TargetScale.of(target, weight)


def derivatives(loss: Loss, outputs: NDArray[Any], target: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gradient and diagonal of the hessian, float64[n, outputs] each, of the loss of every row, by autograd in float64.

    Shape: outputs [n, outputs] raw, target [n] in the unit that the loss trains on (`target_scale`). Without weights.
    """
    wide = torch.from_numpy(np.asarray(outputs, np.float64)).requires_grad_()
    losses = loss.row_losses(wide, torch.from_numpy(np.asarray(target, np.float64)))
    (first,) = torch.autograd.grad(losses.sum(), wide, create_graph=True)
    second = torch.zeros_like(wide)
    for column in range(
        wide.shape[1] if first.requires_grad else 0
    ):  # a piecewise linear loss has no second derivative
        (found,) = torch.autograd.grad(first[:, column].sum(), wide, retain_graph=True)
        second[:, column] = found[:, column]
    return first.detach().numpy(), second.detach().numpy()


def to_scores(loss: Loss, logits: NDArray[np.float32], target: TargetScale, exact: bool = False) -> Values:
    """Scores from raw outputs float32[n, outputs]: float32 [n] probability of class 1 or [n, classes], or values [n] or
    [n, levels] in the target's unit and type.

    A row's bits do not depend on the others: arithmetic is in float64, on rows padded to a multiple of the vector
    width. Of raw outputs [n, members, outputs] the scores are the mean of the members'. `exact`: of a loss with a link they are
    not rounded, and float64.
    """
    if logits.ndim == 3:
        each = [to_scores(loss, logits[:, member], target, exact) for member in range(logits.shape[1])]
        total = each[0].astype(np.float64)
        for scores in each[1:]:
            total += scores
        mean: NDArray[np.float64] = total / len(each)
        return mean if each[0].dtype == np.float64 else mean.astype(np.float32)
    if loss.link is None:
        return target.in_unit(np.ascontiguousarray(logits[:, 0]))
    n = len(logits)
    wide = np.zeros((-(-n // PAD) * PAD, logits.shape[1]))
    wide[:n] = logits
    with np.errstate(over="ignore"):  # a number beyond float32 is infinite
        return target.in_unit(np.asarray(loss.link(wide)[:n], np.float64 if exact else np.float32))
