"""The losses by name: formulas in torch, and the link from raw outputs to scores.

A new loss of the engine is one function here and its name in TASKS of engine/config/sections/training.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training.loss import Array, Loss, LossSettings, Targets

LEAST_GAP = 1e-12  # between two thresholds of ordered classes
STEEPEST = 700.0  # exp of it is finite


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(-x)) of float64."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -STEEPEST, STEEPEST))))


def softmax(wide: Array) -> Array:
    """Probabilities float64[n, classes] of logits; a row's sum is added in one order."""
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    total = powers[:, 0].copy()
    for column in range(1, powers.shape[1]):
        total += powers[:, column]
    return np.asarray(powers / total[:, None])


# ------------------------------------------------------------------------------------------------------------ classes


def _binary_link(wide: Array) -> Array:
    return sigmoid(wide[:, 0])


CLASS_OF_TWO = Targets("0 or 1", lambda target: (target == 0) | (target == 1))


def binary(settings: LossSettings) -> Loss:
    """Cross-entropy of a logistic output. Label smoothing e: targets e / 2 and 1 - e / 2."""
    smoothing = settings.label_smoothing

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        if smoothing:
            target = target * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs[:, 0], target, reduction="none")

    return Loss("binary", "binary", "roc_auc", rows, _binary_link, targets=CLASS_OF_TWO)


def focal(settings: LossSettings) -> Loss:
    """(1 - p) ** gamma times the cross-entropy, where p is the probability of the true class.

    Lin et al.: Focal loss for dense object detection, ICCV 2017, equation 4.
    """
    gamma = settings.focal_gamma

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        right = torch.where(target > 0.5, outputs[:, 0], -outputs[:, 0])  # logit of the true class
        return torch.exp(gamma * F.logsigmoid(-right)) * F.softplus(-right)

    return Loss("focal", "binary", "roc_auc", rows, _binary_link, targets=CLASS_OF_TWO)


def multiclass(settings: LossSettings) -> Loss:
    """Cross-entropy of a softmax; label smoothing as Szegedy et al.: Rethinking the Inception architecture, CVPR 2016."""
    smoothing = settings.label_smoothing

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target.long(), reduction="none", label_smoothing=smoothing)

    return Loss("multiclass", "multiclass", "accuracy", rows, softmax)


def multiclass_focal(settings: LossSettings) -> Loss:
    """(1 - p) ** gamma times the cross-entropy of a softmax, where p is the probability of the true class, as `focal`."""
    gamma = settings.focal_gamma

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        kind = target.long()[:, None]
        total = outputs.logsumexp(1)
        right = outputs.gather(1, kind)[:, 0] - total  # log p
        others = outputs.scatter(1, kind, -math.inf).logsumexp(1)  # so that log(1 - p) is exact where p is near 1
        return -torch.exp(gamma * (others - total)) * right

    return Loss("multiclass_focal", "multiclass", "accuracy", rows, softmax)


def ordinal(_settings: LossSettings) -> Loss:
    """Classes in order by cumulative logits, P(class <= k) = sigmoid(threshold k).

    The first output is the lowest threshold, the others are gaps between neighbours by softplus, so that no probability is
    negative. Thresholds may depend on the row; where only the first does it is the proportional odds model of McCullagh:
    Regression models for ordinal data, Journal of the Royal Statistical Society B, 1980. Outputs of 0 mean equal shares.
    """

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        n, last = len(outputs), outputs.shape[1]
        places = [math.log(k / (last + 1 - k)) for k in range(1, last + 1)]
        gaps = _gaps(outputs, places)
        low = torch.cat([outputs[:, :1] + places[0], gaps], dim=1).cumsum(1)  # thresholds [n, classes - 1]
        kind = target.long().clamp(0, last)[:, None]
        upper = low.gather(1, kind.clamp(max=last - 1))[:, 0]
        lower = low.gather(1, (kind - 1).clamp(min=0))[:, 0]
        first, end = kind[:, 0] == 0, kind[:, 0] == last
        # log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), s the sigmoid; ends lack one of the three.
        gap = gaps.gather(1, (kind - 1).clamp(0, max(last - 2, 0)))[:, 0] if last > 1 else torch.ones_like(upper)
        inside = torch.log(-torch.expm1(-gap))
        nothing = torch.zeros(n, dtype=outputs.dtype, device=outputs.device)
        found = torch.where(end, nothing, F.logsigmoid(upper)) + torch.where(first, nothing, F.logsigmoid(-lower))
        return -(found + torch.where(first | end, nothing, inside))

    def link(wide: Array) -> Array:
        last = wide.shape[1]
        places = [math.log(k / (last + 1 - k)) for k in range(1, last + 1)]
        below = sigmoid(_rising(wide, places))
        found = np.empty((len(wide), last + 1))
        found[:, 0], found[:, last] = below[:, 0], 1 - below[:, -1]
        for k in range(1, last):
            found[:, k] = below[:, k] - below[:, k - 1]
        return found

    more = ("quadratic_kappa", "class_distance")
    return Loss("ordinal", "multiclass", "quadratic_kappa", rows, link, more, ordered=True)


def _shift(gap: float) -> float:
    """The x whose softplus is the gap."""
    return math.log(math.expm1(gap))


def _gaps(outputs: Tensor, places: list[float]) -> Tensor:
    """[n, k - 1]: positive gaps between neighbours; outputs of 0 give those of the rising `places` [k]."""
    shifted = [
        outputs[:, k : k + 1] + _shift(places[k] - places[k - 1]) for k in range(1, len(places))
    ]  # not a tensor of shifts: a CUDA graph cannot copy one from the host
    return F.softplus(torch.cat(shifted, dim=1)).clamp_min(LEAST_GAP) if shifted else outputs[:, :0]


def _rising(wide: Array, places: list[float]) -> Array:
    """float64[n, k]: the first output plus the cumulative `_gaps`."""
    found = np.empty_like(wide)
    found[:, 0] = wide[:, 0] + places[0]
    for k in range(1, len(places)):
        shifted = wide[:, k] + _shift(places[k] - places[k - 1])
        gap = np.maximum(shifted, 0) + np.log1p(np.exp(-np.abs(shifted)))
        found[:, k] = found[:, k - 1] + np.maximum(gap, LEAST_GAP)
    return found


# ------------------------------------------------------------------------------------------------------------ numbers


def squared(_settings: LossSettings) -> Loss:
    """Squared error."""

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs[:, 0] - target).square()

    return Loss("squared", "regression", "rmse", rows)


def huber(settings: LossSettings) -> Loss:
    """Huber: Robust estimation of a location parameter, Annals of Mathematical Statistics, 1964."""
    delta = settings.huber_delta

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(outputs[:, 0], target, reduction="none", delta=delta)

    return Loss("huber", "regression", "mae", rows, constant=0.5)


def quantile(settings: LossSettings) -> Loss:
    """Pinball loss of one level (Koenker, Bassett: Regression quantiles, Econometrica, 1978)."""
    level = settings.quantile

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        error = target - outputs[:, 0]
        return torch.maximum(level * error, (level - 1.0) * error)

    return Loss("quantile", "regression", "pinball", rows, constant=level)


def quantiles(settings: LossSettings) -> Loss:
    """Mean pinball loss of several levels that cannot cross: the lowest, plus cumulative gaps by softplus.

    As the quantile functions of Park et al.: Learning quantile functions without quantile crossing for distribution-free time
    series forecasting, AISTATS 2022. Outputs of 0 are the quantiles of a normal distribution.
    """
    levels = settings.quantiles
    places = [float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64))) for level in levels]

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        found = torch.cat([outputs[:, :1] + places[0], _gaps(outputs, places)], dim=1).cumsum(1)
        parts = []
        for k, level in enumerate(levels):
            error = target - found[:, k]
            parts.append(torch.maximum(level * error, (level - 1.0) * error))
        return torch.stack(parts, dim=1).mean(1)

    return Loss("quantiles", "quantiles", "pinball", rows, lambda wide: _rising(wide, places), levels=levels)


def _exponential(wide: Array) -> Array:
    return np.asarray(np.exp(np.minimum(wide[:, 0], STEEPEST)))


COUNTS = Targets("finite and 0 or more", lambda target: target >= 0)


def poisson(_settings: LossSettings) -> Loss:
    """Half the Poisson deviance less what depends on the target alone, m - y log m, with a log link, m = exp(output).

    McCullagh, Nelder: Generalized linear models, 1989. Target and mean are in multiples of the training rows' mean target.
    """

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        return torch.exp(outputs[:, 0]) - target * outputs[:, 0]

    more = ("poisson_deviance",)
    return Loss("poisson", "regression", more[0], rows, _exponential, more, COUNTS, "mean")


def gamma(_settings: LossSettings) -> Loss:
    """Half the Gamma deviance less what depends on the target alone, y / m + log m, with a log link."""

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        return target * torch.exp(-outputs[:, 0]) + outputs[:, 0]

    more, targets = ("gamma_deviance",), Targets("finite and above 0", lambda target: target > 0)
    return Loss("gamma", "regression", more[0], rows, _exponential, more, targets, "mean")


def tweedie(settings: LossSettings) -> Loss:
    """Half the Tweedie deviance of power p in (1, 2) less what depends on the target alone, with a log link:
    m ** (2 - p) / (2 - p) - y * m ** (1 - p) / (1 - p).

    Jorgensen: Exponential dispersion models, Journal of the Royal Statistical Society B, 1987.
    """
    power = settings.tweedie_power

    def rows(outputs: Tensor, target: Tensor) -> Tensor:
        a, b = 1.0 - power, 2.0 - power
        return torch.exp(b * outputs[:, 0]) / b - target * torch.exp(a * outputs[:, 0]) / a

    more = ("tweedie_deviance",)
    return Loss("tweedie", "regression", more[0], rows, _exponential, more, COUNTS, "mean", power=power)


TABLE: dict[str, Callable[[LossSettings], Loss]] = {
    make.__name__: make
    for make in (
        binary,
        multiclass,
        squared,
        huber,
        quantile,
        poisson,
        gamma,
        tweedie,
        focal,
        quantiles,
        ordinal,
        multiclass_focal,
    )
}
