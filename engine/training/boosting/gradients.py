"""Losses of boosting: where it starts, gradients and hessians of each row, and the loss of each row; all in float64.

Vectors are padded to a multiple of the vector width: a row's bits do not depend on its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config.sections.training import TrainConfig
from engine.errors import UserError
from engine.training.loss import Loss
from engine.training.losses import PAD, derivatives
from kernels.hashing import hash_u64

Array = NDArray[Any]
LEAST_HESSIAN = 1e-6  # of a row of classes: rows that are certain still weigh something
BITS = 20  # of the largest gradient: sums of 2**33 rows are exact in float64, and float32 holds each number


@dataclass(frozen=True)
class Labels:
    """Rows to fit: y float64[n] (0 or 1, class, or value in the loss's unit) and weight float64[n], with that of the class."""

    y: Array
    weight: Array
    loss: Loss
    settings: TrainConfig
    outputs: int


def _sigmoid(margin: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(margin, -700.0, 700.0))))


def _shares(margin: Array) -> Array:
    powers = np.exp(margin - margin.max(axis=1, keepdims=True))
    total = powers[:, 0].copy()
    for column in range(1, powers.shape[1]):
        total += powers[:, column]
    return np.asarray(powers / total[:, None])


def _binary(margin: Array, labels: Labels) -> tuple[Array, Array]:
    p = _sigmoid(margin)
    return p - labels.y[:, None], np.maximum(p * (1.0 - p), LEAST_HESSIAN)


def _multiclass(margin: Array, labels: Labels) -> tuple[Array, Array]:
    """The hessian has Friedman's factor K / (K - 1) (Greedy function approximation, Annals of Statistics 2001)."""
    p, classes = _shares(margin), labels.outputs
    hit = labels.y[:, None] == np.arange(classes)
    return p - hit, np.maximum(p * (1.0 - p), LEAST_HESSIAN) * (classes / (classes - 1))


def _squared(margin: Array, labels: Labels) -> tuple[Array, Array]:
    return margin - labels.y[:, None], np.ones_like(margin)


def _huber(margin: Array, labels: Labels) -> tuple[Array, Array]:
    delta = labels.settings.huber_delta
    return np.clip(margin - labels.y[:, None], -delta, delta), np.ones_like(margin)


def _quantile(margin: Array, labels: Labels) -> tuple[Array, Array]:
    q = labels.settings.quantile
    return np.where(margin < labels.y[:, None], -q, 1.0 - q), np.ones_like(margin)


def _of_torch(margin: Array, labels: Labels) -> tuple[Array, Array]:
    """First and second derivative of any loss by autograd; of several outputs the diagonal."""
    first, second = derivatives(labels.loss, margin, labels.y)
    # where a loss is not convex, its slope still leads down
    return first, np.maximum(np.abs(second), LEAST_HESSIAN)


CLOSED: dict[str, Callable[[Array, Labels], tuple[Array, Array]]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "squared": _squared,
    "huber": _huber,
    "quantile": _quantile,
}


def fits_trees(loss: Loss) -> bool:
    """Whether the outputs of a loss are one, or one a class."""
    return loss.task != "quantiles" and not loss.ordered


def check_loss(loss: Loss, kind: str) -> None:
    """Raise UserError for a loss that trees do not take."""
    if not fits_trees(loss):
        raise UserError(
            f"model={kind} must have a loss with one output, or one for each class, found train.loss={loss.name}: use "
            "train.loss=quantile or multiclass, or a network"
        )


def _padded(margin: Array, labels: Labels) -> tuple[Array, Labels]:
    n = len(margin)
    wide = -(-n // PAD) * PAD
    if wide == n:
        return margin.astype(np.float64), labels
    y, weight, m = np.zeros(wide), np.zeros(wide), np.zeros((wide, margin.shape[1]))
    # rows that fill up repeat the last one: its target is one that the loss takes
    y[:n], weight[:n], m[:n] = labels.y, labels.weight, margin
    y[n:], m[n:] = labels.y[-1:], margin[-1:]
    return m, replace(labels, y=y, weight=weight)


def gradients(margin: Array, labels: Labels, used: Array | None = None) -> tuple[Array, Array]:
    """(gradient, hessian) float32[n, outputs] on a grid; margin [n, outputs]; rows that are not `used`, bool[n], have 0.

    Multiples of 2**-BITS of the power of two above the largest: with that many bits their float64 sums are exact in any order.
    """
    n = len(margin)
    m, wide = _padded(margin, labels)
    weight = wide.weight[:, None]
    if used is not None:
        weight = weight * np.concatenate([used, np.zeros(len(m) - n, bool)])[:, None]
    smoothed = labels.settings.label_smoothing > 0 and not labels.loss.number
    g, h = (_of_torch if smoothed else CLOSED.get(labels.loss.name, _of_torch))(m, wide)
    return on_grid((g * weight)[:n]), on_grid((h * weight)[:n], least=1)


def on_grid(values: Array, least: int = 0) -> NDArray[np.float32]:
    """float32 multiples of the grid nearest to the values; those above 0 are at least `least` multiples."""
    top = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(top):
        raise UserError("gradients must be finite: a target or a weight of a row is too large for the loss")
    if top == 0.0:
        return np.zeros(values.shape, np.float32)
    step = 2.0 ** (np.ceil(np.log2(top)) - BITS)
    counts = np.rint(values / step)
    if least:
        counts = np.where(values > 0, np.maximum(counts, least), counts)
    return np.asarray(counts * step, np.float32)


def row_losses(margin: Array, labels: Labels) -> NDArray[np.float64]:
    """float64[n]: the loss of each row, without its weight."""
    m, wide = _padded(margin, labels)
    found = labels.loss.row_losses(torch.from_numpy(m), torch.from_numpy(wide.y))
    return np.asarray(found.numpy()[: len(margin)])


def start(labels: Labels) -> NDArray[np.float64]:
    """float64[outputs]: the best constant margin; for a loss without a formula, one near it."""
    y, weight, loss = labels.y, labels.weight, labels.loss
    total = max(float(weight.sum()), np.finfo(np.float64).tiny)
    if loss.task == "binary":
        share = np.clip(float((weight * y).sum()) / total, 1e-12, 1 - 1e-12)
        return np.array([np.log(share / (1.0 - share))])
    if loss.task == "multiclass":
        shares = np.bincount(y.astype(np.int64), weight, labels.outputs) / total
        return np.log(np.clip(shares, 1e-12, None))
    if loss.constant is not None:
        return np.array([weighted_quantile(y, weight, loss.constant)])
    mean = float((weight * y).sum()) / total
    return np.array([np.log(max(mean, 1e-12)) if loss.unit == "mean" else mean])


def weighted_quantile(values: Array, weight: Array, level: float) -> float:
    """The smallest value up to which the weights are at least `level` of all; 0 without weight."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    if not len(total) or total[-1] <= 0:
        return 0.0
    return float(values[order][min(np.searchsorted(total, level * total[-1]), len(values) - 1)])


def drawn(rows: NDArray[np.int64], fraction: float, seed: int, round_: int) -> Array | None:
    """bool[n]: the rows of a round's sample, by a hash of the dataset row; None for all."""
    if fraction >= 1:
        return None
    return hash_u64(rows, (seed * 1_000_003 + round_) % 2**64) < np.uint64(int(fraction * 2.0**64))


def seed_of(seed: int, round_: int) -> int:
    """The seed that a library is given for a round: 0 to 2**31 - 1."""
    return int(hash_u64(np.array([round_]), seed)[0] >> np.uint64(33))
