"""What the steps of training minimise: a loss for each target, over raw outputs of its own. One target is a tuple of one.

A row counts for a target by its weight: that of the row, times those of its class and of the target, and 0 where the target is
missing. The mean loss of a step is the sum of weight * loss over rows and targets by the sum of these weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config.sections.training import TrainConfig
from engine.training import members
from engine.training.examples import Examples
from engine.training.loss import Loss
from engine.training.losses import check_targets, class_weights, loss_of, target_scale
from engine.training.target import TargetScale, Values, of_target


@dataclass(frozen=True)
class Objective:
    """The loss of one target: the raw outputs that it reads, the scale of the target, its weight beside other targets,
    `balance` float32[classes] of its classes (None: 1 each), and a valid `filler` for rows where the target is missing.
    """

    loss: Loss
    at: slice
    scale: TargetScale
    weight: float = 1.0
    balance: NDArray[np.float32] | None = None
    filler: float = 0.0


def places(outputs: Sequence[int]) -> tuple[slice, ...]:
    """Where the raw outputs of each target are among those of a row."""
    ends = np.cumsum([0, *outputs]).tolist()
    return tuple(slice(low, high) for low, high in itertools.pairwise(ends))


def check_all(config: TrainConfig, train: Examples, outputs: Sequence[int]) -> None:
    """Raise UserError with the first row whose target is invalid for its loss."""
    for k, (name, view) in enumerate(zip(("", *config.targets), config.by_target, strict=True)):
        part = train.labels(k)
        with of_target(name):
            check_targets(part.target, part.rows, loss_of(view), outputs[k])


def scales_of(config: TrainConfig, train: Examples) -> list[TargetScale]:
    """The scale of each target of the training rows."""
    losses = [loss_of(view) for view in config.by_target]
    parts = [train.labels(k) for k in range(len(losses))]
    return [target_scale(part.target, loss, part.weight) for part, loss in zip(parts, losses, strict=True)]


def objectives_of(
    config: TrainConfig, train: Examples, outputs: Sequence[int], scales: Sequence[TargetScale]
) -> tuple[Objective, ...]:
    """The objectives of a config on its training rows; `outputs` and `scales` of each target."""
    found = []
    for k, view in enumerate(config.by_target):
        loss, part = loss_of(view), train.labels(k)
        balance = class_weights(part.target, view, outputs[k], part.weight)
        filler = float(part.target[0]) if loss.number else 0.0
        found.append(Objective(loss, places(outputs)[k], scales[k], config.target_weights[k], balance, filler))
    return tuple(found)


def label_inputs(
    objectives: Sequence[Objective], target: Values, weight: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(targets as the losses read them, weights), float32 of the shape of `target`: [n], or [n, targets] where it is NaN where
    a row has none. `weight` [n] or [n, targets]; None: 1 each.
    """
    weight = np.ones(len(target), np.float32) if weight is None else weight
    if len(objectives) == 1:
        return _inputs(objectives[0], target, weight)
    found = []
    for k, item in enumerate(objectives):
        known = ~np.isnan(target[:, k])
        own = weight if weight.ndim == 1 else weight[:, k]
        times = np.where(known, np.float32(item.weight), np.float32(0))
        found.append(_inputs(item, np.where(known, target[:, k], item.filler), own * times))
    return np.stack([item[0] for item in found], axis=1), np.stack([item[1] for item in found], axis=1)


def _inputs(
    item: Objective, target: Values, weight: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`label_inputs` of one target [n] that every row has."""
    if item.balance is not None:
        weight = weight * item.balance[target.astype(np.int64)]
    return item.scale.standardised(target), weight


def row_losses(objectives: Sequence[Objective], logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Losses of rows, of the shape of `target`: [n] or [n, targets], from raw outputs [n, outputs] or [n, members, outputs].

    A row of weight 0 for one of several targets has no gradient there, whatever its outputs.
    """
    if len(objectives) == 1:
        return members.row_losses(objectives[0].loss, logits, target)
    found = []
    for k, item in enumerate(objectives):
        known = weight[:, k] > 0
        mine = logits[..., item.at]
        mine = torch.where(known.view(-1, *[1] * (mine.dim() - 1)), mine, 0.0)  # 0 * infinity would be a gradient
        found.append(torch.where(known, members.row_losses(item.loss, mine, target[:, k].contiguous()), 0.0))
    return torch.stack(found, dim=1)


def bad_rows(losses: Tensor) -> Tensor:
    """bool[n]: rows with a loss that is not finite, from losses [n] or [n, targets]."""
    wrong = ~torch.isfinite(losses)
    return wrong if wrong.dim() == 1 else wrong.any(1)
