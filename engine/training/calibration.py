"""Calibration of probabilities: one temperature that the raw outputs are divided by, fitted on validation rows.

Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, ICML 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ScoresAt = Callable[[float], Array]
WIDEST = 20.0  # the temperature is between a 20th and 20
NEAR = 0.01  # of the logarithm of a temperature to that of its limit, where the limit was in the way
TINY = float(np.finfo(float).eps)


def fit_temperature(scores_at: ScoresAt, target: Array, weight: Array | None) -> float | None:
    """The temperature whose scores [n] or [n, classes] have the least log loss, for target [n] (class index) and weight [n]
    (None: 1 each).

    Six digits, so that it is the same on hardware whose sums differ in their last bits. None without rows of two classes.
    """
    from scipy.optimize import minimize_scalar  # half a second of imports, for models with a temperature only

    used = np.isfinite(target)
    if weight is not None:
        used &= weight > 0
    classes = target[used].astype(np.int64)
    times = None if weight is None else weight[used].astype(np.float64)
    if len(np.unique(classes)) < 2:
        return None

    def log_loss(power: float) -> float:
        scores = scores_at(float(np.exp(power)))[used].astype(np.float64)
        taken = (
            np.where(classes == 1, scores, 1.0 - scores)
            if scores.ndim == 1
            else scores[np.arange(len(classes)), classes]
        )
        return float(np.average(-np.log(np.maximum(taken, TINY)), weights=times))

    limit = float(np.log(WIDEST))
    found = minimize_scalar(log_loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-9})
    return float(f"{np.exp(found.x):.6g}")


def check_temperature(temperature: float) -> str | None:
    """A sentence where the temperature is at its limit; else None."""
    if abs(np.log(temperature)) < np.log(WIDEST) - NEAR:
        return None
    why = (
        "scores say next to nothing about validation rows: look at the training, and whether their classes mean the same"
        if temperature > 1
        else "scores tell all validation rows apart: look for a feature that knows the target, or take more of them"
    )
    return f"temperature {temperature:.4g} is at its limit (1/{WIDEST:g} to {WIDEST:g}), probabilities are not calibrated: {why}"
