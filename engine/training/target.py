"""Scaling of a regression target: standardised for training, and undone for raw outputs.

A target is float32 where rounding changes it by at most ROUNDING of its standard deviation. Else (seconds since 1970 that
differ by a few seconds, 1e-40) target and scores are float64.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

ROUNDING = 1e-4  # of the standard deviation: how far a type may move a target
NARROW = 1e-5  # standard deviation / |mean| below which a target is warned about
WHOLE = 2.0**53  # beyond, float64 does not hold every whole number

Values = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class TargetScale:
    """Centre and scale of the training rows' target (for most losses mean and standard deviation), and the type (`float32` or
    `float64`) of target and scores.
    """

    center: float = 0.0
    scale: float = 1.0
    kind: str = "float32"

    @classmethod
    def of(cls, target: Values, weight: NDArray[np.float32] | None = None) -> TargetScale:
        """Of the finite values of a target [n], which count by their weight [n]; the scale is 1 where all are the same. The type
        is that of the array.
        """
        used = np.isfinite(target) if weight is None else np.isfinite(target) & (weight > 0)
        wide = target[used].astype(np.float64)
        if not len(wide):
            return cls(kind=target.dtype.name)
        weights = np.ones(len(wide)) if weight is None else weight[used].astype(np.float64)
        with np.errstate(over="ignore"):  # numbers near the end of float64
            center = float((weights * wide).sum() / weights.sum())
            spread = float(np.sqrt((weights * np.square(wide - center)).sum() / weights.sum()))
        return cls(center, spread if spread > 0 else 1.0, target.dtype.name)

    @classmethod
    def of_mean(cls, target: Values, weight: NDArray[np.float32] | None = None) -> TargetScale:
        """Without a centre; the scale is the mean of a target that is not negative, 1 where that is 0."""
        found = cls.of(target, weight)
        return cls(0.0, found.center if found.center > 0 else 1.0, found.kind)

    def fits(self, kind: str) -> bool:
        """Whether rounding to a type moves values near the centre by at most ROUNDING of the scale."""
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the type: infinite, which does not fit
            step = float(np.spacing(np.dtype(kind).type(abs(self.center) + self.scale)))
        return step / 2 <= ROUNDING * self.scale

    @property
    def fitting(self) -> str:
        """The smaller of the two types that fits."""
        return "float32" if self.fits("float32") else "float64"

    def standardised(self, target: Values) -> NDArray[np.float32]:
        """float32[n]: (target - center) / scale, computed in the target's type."""
        kind = np.dtype(self.kind).type
        found = (target.astype(kind, copy=False) - kind(self.center)) / kind(self.scale)
        return found.astype(np.float32, copy=False)

    def in_unit(self, raw: NDArray[np.float32]) -> Values:
        """center + scale * raw [n] or [n, k] in the target's type; the scores of a model of classes are left alone."""
        if (self.center, self.scale) == (0.0, 1.0):
            return raw
        kind = np.dtype(self.kind).type
        return np.asarray(raw.astype(kind, copy=False) * kind(self.scale) + kind(self.center))


PLAIN = TargetScale()


def check_spread(target: Values, name: str) -> str | None:
    """A warning about a training target that varies little beside its size, or None.

    Raises UserError where even float64 loses its variation.
    """
    found = TargetScale.of(target.astype(np.float64))
    constant = bool(len(target)) and bool((target == target[0]).all())
    what = f"a standard deviation of {found.scale:.3g} around {found.center:.12g} in split.train"
    remedy = f"Take its difference from a fixed value in data.query, as in {name} - {found.center:.12g}"
    lost = abs(found.center) >= WHOLE if constant else not found.fits("float64")
    if lost and np.isfinite(found.scale):  # values beyond the range are refused elsewhere
        raise UserError(
            f"the target {name!r} must vary by far more than the steps of float64, found {'one value' if constant else what}, "
            f"where these are {np.spacing(abs(found.center)):.3g}. {remedy}"
        )
    if constant or found.scale >= NARROW * abs(found.center):
        return None
    return f"the target {name!r} has {what}: scores are float64, and 32 bits would lose them. {remedy}"


OWN_KEYS = re.compile(r"\b(?:train\.(?=(?:loss|metric|class_weight)\b)|data\.(?=positive\b))")


@contextlib.contextmanager
def of_target(name: str) -> Iterator[None]:
    """Errors in it name the keys of the further target `name`, whose config is read as that of a model of one target; empty: of
    the data's own, as they are.
    """
    try:
        yield
    except UserError as error:
        if not name:
            raise
        own = OWN_KEYS.sub(f"train.targets.{name}.", str(error))
        raise UserError(own if own != str(error) else f"train.targets.{name}: {own}") from error
