"""Losses: their formulas, default metrics, target checks, class weights, and the conversion of outputs to scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.config.sections.training import TASKS, TrainConfig
from engine.errors import UserError
from engine.training.target import PLAIN, TargetScale, Values

RowLoss = Callable[[Tensor, Tensor, TrainConfig], Tensor]
PAD = 64  # rows; a vectorised tail may round differently from the body, so there is no tail


def _binary(logits: Tensor, target: Tensor, _config: TrainConfig) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")


def _multiclass(logits: Tensor, target: Tensor, _config: TrainConfig) -> Tensor:
    return F.cross_entropy(logits, target.long(), reduction="none")


def _squared(logits: Tensor, target: Tensor, _config: TrainConfig) -> Tensor:
    return (logits[:, 0] - target).square()


def _huber(logits: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    return F.huber_loss(logits[:, 0], target, reduction="none", delta=config.huber_delta)


def _quantile(logits: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    """Pinball loss (Koenker, Bassett: Regression Quantiles, Econometrica 1978)."""
    error = target - logits[:, 0]
    return torch.maximum(config.quantile * error, (config.quantile - 1.0) * error)


@dataclass(frozen=True)
class Loss:
    """One loss: loss of each row float32[n] from logits [n, outputs] and targets [n], the metric watched by default, and the
    task.
    """

    row_losses: RowLoss
    metric: str
    task: str


_WATCHED: dict[str, tuple[RowLoss, str]] = {
    "binary": (_binary, "roc_auc"),
    "multiclass": (_multiclass, "accuracy"),
    "squared": (_squared, "rmse"),
    "huber": (_huber, "mae"),
    "quantile": (_quantile, "pinball"),
}
LOSSES = {name: Loss(*_WATCHED[name], task) for name, task in TASKS.items()}


def check_targets(target: Values, rows: NDArray[np.int64], loss: str, outputs: int) -> None:
    """Raise UserError with the first row whose target is invalid for the loss."""
    if not len(target):
        raise UserError("there must be at least one row with a target to train on, found none: check split.train")
    task = LOSSES[loss].task
    with np.errstate(over="ignore"):
        good = np.isfinite(target.astype(np.float32, copy=False))
    must = "finite (float32 ends at 3.4e38)" if task == "regression" else "finite"
    if task == "binary":
        good, must = good & ((target == 0) | (target == 1)), "0 or 1"
    elif task == "multiclass":
        good, must = (
            good & (target >= 0) & (target < outputs) & (target == np.floor(target)),
            f"a class 0 to {outputs - 1}",
        )
    if not good.all():
        at = int(np.argmin(good))
        raise UserError(
            f"the target must be {must} for train.loss={loss}, found {target[at]} in dataset row {rows[at]}"
        )


def class_weights(
    target: Values, config: TrainConfig, outputs: int, weight: NDArray[np.float32] | None = None
) -> NDArray[np.float32] | None:
    """float32[classes] = n / (classes * count) for `balanced` (1 for a class that does not occur), else None; rows of target [n]
    count by their weight [n].
    """
    task = LOSSES[config.loss].task
    if config.class_weight == "none" or task == "regression":
        return None
    classes = max(outputs, 2)
    counts = np.bincount(target.astype(np.int64), weight, classes)
    weights = counts.sum() / (classes * np.where(counts > 0, counts, 1))
    return np.asarray(np.where(counts > 0, weights, 1.0), np.float32)


def target_scale(target: Values, loss: str, weight: NDArray[np.float32] | None = None) -> TargetScale:
    """The scale that standardises the target of the training rows; none for classes."""
    return TargetScale.of(target, weight) if LOSSES[loss].task == "regression" else PLAIN


def to_scores(loss: str, logits: NDArray[np.float32], target: TargetScale) -> Values:
    """Scores from raw outputs float32[n, outputs]: float32 [n] probability of class 1 or [n, classes], or [n] values in the
    target's unit and type.

    A row's bits do not depend on the others: arithmetic is in float64, on rows padded to a multiple of the vector
    width.
    """
    task = LOSSES[loss].task
    if task == "regression":
        return target.in_unit(np.ascontiguousarray(logits[:, 0]))
    n = len(logits)
    wide = np.zeros((-(-n // PAD) * PAD, logits.shape[1]))
    wide[:n] = logits
    if task == "binary":
        return np.asarray((1.0 / (1.0 + np.exp(-np.clip(wide[:, 0], -700.0, 700.0))))[:n], np.float32)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    total = powers[:, 0].copy()
    for column in range(1, powers.shape[1]):
        total += powers[:, column]
    return np.asarray((powers / total[:, None])[:n], np.float32)
