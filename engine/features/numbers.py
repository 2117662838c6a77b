"""Fitted encoding of one numeric feature: centre and scale, or quantiles, of its training values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from engine.config.sections.features import EncodeConfig
from engine.runtime.records import Within
from kernels import encode as kernel

KNOTS = 257
LARGEST = float(np.finfo(np.float64).max)
WIDEST = 0.99 * LARGEST
CRUSHED = 1e-6  # with half of the rows within so few deviations, their differences are noise to a model


@dataclass(frozen=True)
class NumericColumn:
    """State of one numeric feature: `center_` and `scale_` of finite training values, knots of quantile and PLE bins."""

    name: str
    kind: Literal["standardise", "quantile", "ple"]
    center_: float
    scale_: Annotated[float, Within(0)]
    low_: float
    high_: float
    missing_: bool
    knots_: tuple[float, ...] = ()

    def for_kernel(self, clip: float) -> kernel.NumericColumn:
        """The kernel's form; a value beyond `clip` deviations, or beyond the knots, counts as that bound."""
        if self.kind == "standardise":
            reach = min(clip * self.scale_, WIDEST)  # both ends and the distances between them are finite too
            return kernel.NumericColumn(
                center=self.center_,
                scale=self.scale_,
                low=max(self.center_ - reach, -LARGEST),
                high=min(self.center_ + reach, LARGEST),
                indicator=self.missing_,
            )
        kind = "normal" if self.kind == "quantile" else "ple"
        return kernel.NumericColumn(
            kind, edges=self.knots_, low=self.knots_[0], high=self.knots_[-1], indicator=self.missing_
        )

    def outputs(self) -> list[str]:
        """Names of the columns it writes."""
        bins = (
            [f"{self.name}_bin{index}" for index in range(len(self.knots_) - 1)] if self.kind == "ple" else [self.name]
        )
        return [*bins, f"{self.name}_missing"] if self.missing_ else bins


def fit_number(
    name: str, values: np.ndarray, config: EncodeConfig, warn: Callable[[str], None], shown: bool
) -> NumericColumn:
    """The state of values float64[n], NaN missing. `warn` gets a sentence where outliers set the scale; `shown`: with values."""
    finite = np.sort(values[np.isfinite(values)])
    missing = bool(np.isnan(values).any()) and config.missing_indicator
    if not len(finite):
        return NumericColumn(name, "standardise", 0.0, 0.0, 0.0, 0.0, missing)
    # Scaled before squaring, so that values near the largest float do not overflow.
    largest = max(abs(float(finite[0])), abs(float(finite[-1])), 1e-300)
    # Sorted first, so that the sums do not depend on the order of rows.
    center = float(np.sum(finite / largest)) / len(finite) * largest
    # Where a difference may exceed the largest float, values are divided before they are subtracted.
    away = (finite - center) / largest if largest < WIDEST / 2 else finite / largest - center / largest
    scale = largest * math.sqrt(float(np.sum(away**2)) / len(finite))
    constant = finite[0] == finite[-1]
    knots: tuple[float, ...] = ()
    if config.numeric != "standardise" and not constant:
        inner = np.clip(finite, -WIDEST / 2, WIDEST / 2) if largest > WIDEST / 2 else finite
        quantiles = kernel.quantiles_of(inner, KNOTS - 1 if config.numeric == "quantile" else config.bins)
        # Equal edges make empty bins and are dropped; equal quantiles are the weight of a repeated value and stay.
        knots = tuple(float(x) for x in (quantiles if config.numeric == "quantile" else np.unique(quantiles)))
    kind = config.numeric if len(knots) > 1 else "standardise"
    if kind == "standardise" and not constant:
        _warn_of_crushed(name, finite, min(scale, LARGEST), warn, shown)
    return NumericColumn(
        name,
        kind,  # type: ignore[arg-type]  # the config has checked it
        center,
        0.0 if constant else min(scale, LARGEST),
        float(finite[0]),
        float(finite[-1]),
        missing,
        knots,
    )


def _warn_of_crushed(name: str, finite: np.ndarray, scale: float, warn: Callable[[str], None], shown: bool) -> None:
    """Warn where outliers set the scale; `finite` is sorted."""
    low, high = (float(finite[len(finite) * quarter // 4]) for quarter in (1, 3))
    if low < high and high / scale - low / scale < CRUSHED:
        far = max(float(finite[0]), float(finite[-1]), key=abs)
        said = f"outliers as far as {far:g}" if shown else "outliers"
        warn(
            f"feature {name!r}: {said} set its scale, so that half of the training rows are within "
            f"{high / scale - low / scale:.1g} deviations and look alike to the model. "
            "Give the column a min or max in data.columns, or set features.encode.numeric=quantile"
        )
