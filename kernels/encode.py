"""Numeric columns into model input: one float32 block.

Numeric transforms, per column
    standardise   (x - center) / scale; 0 when scale is 0
    uniform       rank in [0, 1] among the given quantiles, piecewise linear; a value equal to several quantiles gets the middle
    normal        the same rank through the inverse normal distribution (Wichura, AS 241, Applied Statistics 37, 1988), rank kept
                  within [1e-7, 1 - 1e-7]
    ple           piecewise-linear encoding over T bins (Gorishniy et al., On embeddings for numerical features, NeurIPS 2022,
                  equation 1), every component kept within [0, 1]
A missing value (NaN) gives `fill` in each of its columns and 1 in the indicator column where there is one. Values are clipped
to [low, high] first, so infinities become those. A constant column (scale 0; all quantiles or all edges equal) gives 0.
Inputs are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.jit import njit, run_ranges, split

KINDS = {"standardise": 0, "uniform": 1, "normal": 2, "ple": 3}
_STANDARDISE, _UNIFORM, _NORMAL, _PLE = range(4)
_TAIL = 1e-7
_LIMIT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class NumericColumn:
    """How one numeric column is encoded. `edges` are the quantiles (uniform, normal) or bin edges (ple), ascending."""

    kind: str = "standardise"
    center: float = 0.0
    scale: float = 1.0
    edges: Sequence[float] = ()
    low: float = -_LIMIT
    high: float = _LIMIT
    fill: float = 0.0
    indicator: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, found {self.kind!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"low <= high must hold and both be finite, found {self.low} and {self.high}")
        if not (math.isfinite(self.center) and math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"center and scale must be finite and scale >= 0, found {self.center} and {self.scale}")
        if not math.isfinite(self.fill):
            raise ValueError(f"fill must be finite, found {self.fill}")
        edges = np.asarray(self.edges, float)
        if self.kind == "standardise":
            return
        if edges.ndim != 1 or len(edges) < 2 or not np.all(np.isfinite(edges)) or np.any(edges[1:] < edges[:-1]):
            raise ValueError(f"edges must be at least two finite ascending numbers for {self.kind}, found {self.edges}")

    @property
    def width(self) -> int:
        """Columns it writes: T for ple, 1 otherwise, and one more for the indicator."""
        return (len(self.edges) - 1 if self.kind == "ple" else 1) + int(self.indicator)


class NumericPlan(NamedTuple):
    """Columns packed for the loop. integers[k]: kind, first output column, edge start, edge stop, indicator column or -1."""

    integers: NDArray[np.int64]
    numbers: NDArray[np.float64]  # [k]: center, scale, low, high, fill
    edges: NDArray[np.float64]
    width: int


def numeric_plan(columns: Sequence[NumericColumn]) -> NumericPlan:
    """Pack `columns`; their outputs come in this order, each indicator right after its column."""
    integers: list[list[int]] = []
    numbers: list[list[float]] = []
    edges: list[float] = []
    at = 0
    for column in columns:
        own = [float(e) for e in column.edges] if column.kind != "standardise" else []
        last = at + column.width - 1
        integers.append([KINDS[column.kind], at, len(edges), len(edges) + len(own), last if column.indicator else -1])
        numbers.append([column.center, column.scale, column.low, column.high, column.fill])
        edges += own
        at += column.width
    return NumericPlan(
        np.array(integers, np.int64).reshape(-1, 5), np.array(numbers, float).reshape(-1, 5), np.array(edges, float), at
    )


# Coefficients of AS 241, highest power first: numerator and denominator for |p - 0.5| <= 0.425, for r <= 5 and beyond.
_CENTRAL = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


@njit(inline=True)
def _polynomials(r: Any, coefficients: Any) -> Any:
    """Numerator and denominator at r, by Horner's rule."""
    top, low = 0.0, 0.0
    for coefficient in coefficients[0]:
        top = top * r + coefficient
    for coefficient in coefficients[1]:
        low = low * r + coefficient
    return top, low


@njit
def inverse_normal(p: Any) -> Any:
    """Quantile of the standard normal distribution, 0 < p < 1 (AS 241, PPND16: about 1e-16 relative)."""
    q = p - 0.5
    if abs(q) <= 0.425:
        top, low = _polynomials(0.180625 - q * q, _CENTRAL)
        return q * top / low
    r = math.sqrt(-math.log(p if q < 0 else 1.0 - p))
    top, low = _polynomials(r - 1.6, _MIDDLE) if r <= 5.0 else _polynomials(r - 5.0, _FAR)
    return -top / low if q < 0 else top / low


@njit
def _rank(x: Any, edges: Any) -> Any:
    """Rank of x in [0, 1] among ascending quantiles; a value equal to several quantiles gets the middle of them."""
    last = len(edges) - 1
    if edges[0] == edges[last]:
        return -1.0
    left, right = np.searchsorted(edges, x), np.searchsorted(edges, x, side="right")
    if left == right:  # strictly between two quantiles, or outside
        if left == 0:
            return 0.0
        if left > last:
            return 1.0
        low, high = edges[left - 1], edges[left]
        part = (x * 0.5 - low * 0.5) / (high * 0.5 - low * 0.5)  # halves: the span may exceed the largest double
        return (left - 1 + part) / last
    return 0.5 * (left + right - 1) / last


@njit
def _encode_cell(x: Any, integers: Any, numbers: Any, edges: Any, out: Any) -> None:
    kind, at, first, stop, indicator = integers[0], integers[1], integers[2], integers[3], integers[4]
    missing = x != x
    if indicator >= 0:
        out[indicator] = np.float32(1.0 if missing else 0.0)
    width = stop - first - 1 if kind == _PLE else 1
    if missing:
        for j in range(width):
            out[at + j] = np.float32(numbers[4])
        return
    x = min(max(x, numbers[2]), numbers[3])
    if kind == _STANDARDISE:
        y = (x - numbers[0]) / numbers[1] if numbers[1] > 0.0 else 0.0
        out[at] = np.float32(min(max(y, -_LIMIT), _LIMIT))
    elif kind == _PLE:
        flat = edges[first] == edges[stop - 1]
        for j in range(width):
            low, high = edges[first + j], edges[first + j + 1]
            if flat or x <= low:
                out[at + j] = np.float32(0.0)
            elif x >= high:
                out[at + j] = np.float32(1.0)
            else:
                out[at + j] = np.float32((x * 0.5 - low * 0.5) / (high * 0.5 - low * 0.5))
    else:
        rank = _rank(x, edges[first:stop])
        if rank < 0.0:
            rank = 0.0
        elif kind == _NORMAL:
            rank = inverse_normal(min(max(rank, _TAIL), 1.0 - _TAIL))
        out[at] = np.float32(rank)


@njit
def _encode_numeric(values: Any, integers: Any, numbers: Any, edges: Any, out: Any) -> None:
    for i in range(values.shape[0]):
        for k in range(values.shape[1]):
            _encode_cell(values[i, k], integers[k], numbers[k], edges, out[i])


def encode_numeric(
    values: ArrayLike, plan: NumericPlan, out: NDArray[np.float32], threads: int = 1
) -> NDArray[np.float32]:
    """Encode every column of `values` into `out` by `plan` (see `numeric_plan`); returns `out`.

    Shape: values float64[n, k], NaN missing; out float32[n, plan.width], C-contiguous. Every number written is finite.
    Raises TypeError for other types, ValueError for shapes that disagree.
    """
    block = np.asarray(values)
    if block.dtype.kind not in "iubf":
        raise TypeError(f"values must hold numbers, found dtype {block.dtype}")
    if block.ndim != 2 or block.shape[1] != len(plan.integers):
        raise ValueError(f"values must be [n, {len(plan.integers)}], found shape {block.shape}")
    block = block.astype(np.float64, copy=False)
    check.output("out", out, (len(block), plan.width), np.float32)

    def part(a: int, b: int) -> None:
        _encode_numeric(block[a:b], plan.integers, plan.numbers, plan.edges, out[a:b])

    run_ranges(part, split(len(block), threads), threads)
    return out


def quantiles_of(values: ArrayLike, count: int) -> NDArray[np.float64]:
    """count + 1 quantiles (0, 1/count, ..., 1; linear interpolation) of the finite values; empty when there are none."""
    numbers = check.floats("values", values)
    if count < 1:
        raise ValueError(f"count must be at least 1, found {count}")
    finite = np.sort(numbers[np.isfinite(numbers)])
    if len(finite) == 0:
        return finite
    at = np.linspace(0.0, len(finite) - 1.0, count + 1)
    below = at.astype(np.int64)
    above = np.minimum(below + 1, len(finite) - 1)
    part = at - below
    return np.maximum.accumulate(finite[below] * (1.0 - part) + finite[above] * part)
