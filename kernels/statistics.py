"""Distances between a reference and current rows, from their profiles.

Every function returns a `Statistic`: a finite value, or the reason why there is none. Bad data never raises and never
gives NaN or infinity, so one broken column does not stop the others; only misuse (shapes that cannot be compared) raises
ValueError. p-values are reported but decide nothing: with enough rows every difference is significant. The functions on
arrays (`psi_of`, `js_of`, `gaps`, `wasserstein_of`) serve many windows at once: NaN where a side is empty, no checks.

    psi             sum (p - q) ln(p / q), each share clipped to `floor`, without renormalising (Siddiqi, Credit Risk
                    Scorecards, 2006)
    js_distance     square root of the Jensen-Shannon divergence in bits, in [0, 1] (Lin, IEEE Trans. Inf. Theory 37, 1991)
    ks              largest difference of the distribution functions; p by the limit law (Stephens, JRSS B 32, 1970)
    wasserstein     area between the distribution functions, in the column's unit; `normalised` divides by the reference's scale
    chi_square      Pearson's test of homogeneity over the union of levels, without correction
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check, exact

PSI_FLOOR = 1e-4
LOW_EXPECTED = 5.0
BINNED = "counted in bins, so that the distance of the values lies between low and high"
TIES = "p is that of values without ties, and too large where values are tied"


@dataclass(frozen=True)
class Statistic:
    """One statistic: `value`, or None and the `reason`. Where binning leaves the exact value open, `low` and `high` bound it."""

    name: str
    value: float | None
    reason: str | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None
    approximate: str | None = None  # how the value or its p differs from that of the unbinned values
    details: Mapping[str, Any] = field(default_factory=dict)


def _not(name: str, reason: str, **details: Any) -> Statistic:
    return Statistic(name, None, f"not computable, because {reason}", details=details)


def _found(name: str, value: float, **more: Any) -> Statistic:
    """A value, unless arithmetic left the range of a double."""
    if not math.isfinite(value):
        return _not(name, f"the result is beyond the range of a double ({value})")
    return Statistic(name, float(value), **more)


# --------------------------------------------------------------------------- shares of bins or categories
def _pair(reference: ArrayLike, current: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    a = check.integers("reference", reference)
    b = check.integers("current", current, len(a))
    if np.any(a < 0) or np.any(b < 0):
        raise ValueError(f"counts must not be negative, found {min(a.min(), b.min())}")
    return a, b


def _empty_side(name: str, reference: int, current: int) -> Statistic | None:
    sides = [side for side, n in (("reference", reference), ("current", current)) if n == 0]
    return _not(name, f"{' and '.join(sides)} ha{'s' if len(sides) == 1 else 've'} no values") if sides else None


def _shares(
    name: str, reference: ArrayLike, current: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | Statistic:
    a, b = _pair(reference, current)
    n, m = int(a.sum()), int(b.sum())
    return _empty_side(name, n, m) or (a / n, b / m)


def psi(reference: ArrayLike, current: ArrayLike, floor: float = PSI_FLOOR) -> Statistic:
    """Population stability index of two arrays of counts over the same bins (open outer bins included); nats.

    Shape: int64[b], int64[b]. Identical shares give exactly 0. `details["floor"]` records the floor.
    """
    if not 0 < floor < 1:
        raise ValueError(f"floor must be in (0, 1), found {floor}")
    shares = _shares("psi", reference, current)
    if isinstance(shares, Statistic):
        return shares
    return _found("psi", float(psi_of(*shares, floor)), details={"floor": floor})


def psi_of(p: NDArray[np.float64], q: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """PSI [...] of shares [..., bins]."""
    low, high = np.maximum(p, floor), np.maximum(q, floor)
    return np.asarray(((low - high) * (np.log(low) - np.log(high))).sum(axis=-1))


def js_distance(reference: ArrayLike, current: ArrayLike) -> Statistic:
    """Jensen-Shannon distance, base 2, of two arrays of counts over the same bins: 0 for equal shares, 1 for disjoint ones."""
    shares = _shares("js_distance", reference, current)
    if isinstance(shares, Statistic):
        return shares
    return _found("js_distance", float(js_of(*shares)))


def js_of(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon distance [...], base 2, of shares [..., bins]."""
    middle = (p + q) / 2

    def bits(share: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(share > 0, share * np.log2(share / middle), 0.0).sum(axis=-1))

    found = np.sqrt(np.clip((bits(p) + bits(q)) / 2, 0.0, 1.0))
    return np.where(np.isnan(p[..., 0]) | np.isnan(q[..., 0]), np.nan, found)


# --------------------------------------------------------------------------- chi-square
def chi_square(reference: Mapping[Any, int], current: Mapping[Any, int]) -> Statistic:
    """Pearson's chi-square over the union of levels, from level -> count. Sample sizes may differ; no correction.

    details: dof, levels, new (only in current), vanished (only in reference), low_expected (cells expected below 5).
    """
    counts = [{k: int(v) for k, v in side.items()} for side in (reference, current)]
    for side in counts:
        if min(side.values(), default=0) < 0:
            raise ValueError(f"counts must not be negative, found {min(side.values())}")
    present = [{k for k, v in side.items() if v} for side in counts]
    levels = [k for k in dict.fromkeys([*counts[0], *counts[1]]) if k in present[0] or k in present[1]]
    details: dict[str, Any] = {
        "levels": len(levels),
        "new": [k for k in levels if k not in present[0]],
        "vanished": [k for k in levels if k not in present[1]],
    }
    table = np.array([[side.get(k, 0) for k in levels] for side in counts], float).reshape(2, -1)
    sizes = table.sum(axis=1)
    empty = _empty_side("chi_square", int(sizes[0]), int(sizes[1]))
    if empty:
        return _not("chi_square", str(empty.reason).removeprefix("not computable, because "), **details)
    expected = np.outer(sizes, table.sum(axis=0)) / sizes.sum()
    details |= {"dof": len(levels) - 1, "low_expected": int(np.sum(expected < LOW_EXPECTED))}
    value = exact.total(((table - expected) ** 2 / expected).ravel())
    return _found("chi_square", value, p=chi_square_tail(value, len(levels) - 1), details=details)


def chi_square_tail(x: float, dof: int) -> float:
    """P(chi-square with `dof` degrees of freedom > x); 1 for dof = 0."""
    from scipy import special  # takes tenths of a second to import, and few commands need p

    return float(special.chdtrc(dof, x)) if dof > 0 and x > 0 else 1.0


# --------------------------------------------------------------------------- profiles
def ks_p_value(distance: float, n: int, m: int) -> float:
    """P(a larger distance | same distribution) by Kolmogorov's limit law with Stephens' correction.

    Accurate for n m / (n + m) >= 4.
    """
    from scipy import special

    root = math.sqrt(n / (n + m) * m)
    return float(special.kolmogorov((root + 0.12 + 0.11 / root) * distance))


def scale_of(reference: NDArray[np.float64]) -> float:
    """The divisor that normalises a distance: the reference's standard deviation, |mean| if that is 0, 1 if both are."""
    _, _, mean, std = exact.moments(reference)
    return next((s for s in (std, abs(mean)) if math.isfinite(s) and s > 0), 1.0)


def _check_profile(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> None:
    if len(counts) != len(edges) + 1:
        raise ValueError(
            f"counts must be [{len(edges) + 1}] (below, bins, above) for {len(edges)} edges, found {len(counts)}"
        )


def ks_profiles(reference: ArrayLike, current: ArrayLike) -> Statistic:
    """Kolmogorov-Smirnov distance from counts (below, bins, above) on the same edges.

    The value is the largest difference at an edge; the true distance is in [low, high]. It is exact when each bin holds one
    value.
    """
    a, b = _pair(reference, current)
    n, m = int(a.sum()), int(b.sum())
    empty = _empty_side("ks", n, m)
    if empty:
        return empty
    upper_a, upper_b = [int(v) for v in np.cumsum(a)], [int(v) for v in np.cumsum(b)]
    lower_a, lower_b = [0, *upper_a[:-1]], [0, *upper_b[:-1]]
    low = float(np.abs(gaps(a, b)).max())
    high = max(
        max(ua * m - lb * n, ub * n - la * m)
        for la, ua, lb, ub in zip(lower_a, upper_a, lower_b, upper_b, strict=True)
        if ua > la or ub > lb
    ) / (n * m)
    return _found("ks", low, p=ks_p_value(low, n, m), low=low, high=max(low, high), approximate=f"{BINNED}; {TIES}")


def gaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Difference [..., bins] of two distribution functions at the upper end of each bin, from counts [..., bins]."""
    upper_a, upper_b = (np.cumsum(side, axis=-1) / side.sum(axis=-1, keepdims=True) for side in (a, b))
    return np.asarray(upper_a - upper_b)


def areas(gap: NDArray[np.float64], edges: NDArray[np.float64], points: ArrayLike | None = None) -> NDArray[np.float64]:
    """Area between two distribution functions in each bin, from their difference at the edges.

    Shape: gap [..., bins + 1], edges [bins + 1], points [bins] or None -> [..., bins]. Within a bin the difference is linear,
    or a step at the bin's point if it has one.
    """
    left, right, width = gap[..., :-1], gap[..., 1:], np.diff(edges)
    both = np.abs(left) + np.abs(right)
    crossed = np.divide(left * left + right * right, 2.0 * both, out=np.zeros_like(both), where=both > 0)
    found = np.where(left * right < 0, crossed, np.abs(left + right) / 2.0) * width
    if points is None:
        return np.asarray(found)
    at = np.asarray(points, float)
    stepped = np.abs(left) * (at - edges[:-1]) + np.abs(right) * (edges[1:] - at)
    return np.where(np.isnan(at), found, stepped)


def wasserstein_profiles(
    reference: tuple[ArrayLike, float, float],
    current: tuple[ArrayLike, float, float],
    edges: ArrayLike,
    scale: float = 1.0,
    points: ArrayLike | None = None,
) -> Statistic:
    """Wasserstein-1 distance from profiles: (counts below, bins, above; exact sum of the values below; of those above).

    Values in a bin are assumed to be uniform, or all equal to `points` float64[bins] where that is not NaN. Outside the edges
    the area is exact when only one side has values there, and the difference of means (a lower bound) when both do. Divided by
    `scale`. Memory does not depend on the values' range.
    """
    limits = np.asarray(edges, float)
    a, b = _pair(reference[0], current[0])
    _check_profile(a, limits)
    n, m = int(a.sum()), int(b.sum())
    empty = _empty_side("wasserstein", n, m)
    if empty:
        return empty
    sums = [np.array(side[1:], np.float64) for side in (reference, current)]
    with np.errstate(over="ignore", invalid="ignore"):  # edges near the largest double: reported as the reason below
        far = excess(a, sums[0], limits) - excess(b, sums[1], limits)
        value = float(wasserstein_of(a, sums[0], b, sums[1], limits, points))
    if not np.all(np.isfinite(far)):
        return _not("wasserstein", "the sum of values outside the edges is beyond the range of a double")
    return _found("wasserstein", value / scale, details={"scale": scale})


def excess(counts: NDArray[Any], far: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 2]: mean distance per row below the first and above the last edge; `far` [..., 2] sums the values outside."""
    outer = counts[..., [0, -1]]
    return np.asarray((far - outer * edges[[0, -1]]) / counts.sum(axis=-1, keepdims=True))


def wasserstein_of(
    a: NDArray[Any],
    far_a: NDArray[np.float64],
    b: NDArray[Any],
    far_b: NDArray[np.float64],
    edges: NDArray[np.float64],
    points: ArrayLike | None,
) -> NDArray[np.float64]:
    """Wasserstein-1 distance [...] in the values' unit from counts [..., bins] (below, bins, above) and sums [..., 2] of the
    values below and above.
    """
    inside = areas(gaps(a, b)[..., :-1], edges, points).sum(axis=-1)
    return np.asarray(inside + np.abs(excess(a, far_a, edges) - excess(b, far_b, edges)).sum(axis=-1))
