"""Drift statistics of many windows at once, computed from counts; the alarm lines are calibrated with them.

The arithmetic is that of kernels.statistics. NaN means not computable; nothing here raises on data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.features.conditional import BINS
from engine.features.numeric_spec import NumericSpec
from engine.features.profile import Profile, ProfileSpec, category_label, outside_sum
from kernels import profile as kernel
from kernels import statistics as kernels

NUMERIC, CATEGORICAL, PREDICTION = "numeric", "categorical", "prediction"
CONDITIONAL = "conditional"  # looked at for sudden changes only
_NUMBERS = ("psi", "ks", "wasserstein", "missing", "outside")
HAS = {
    NUMERIC: _NUMBERS,
    PREDICTION: _NUMBERS,
    CATEGORICAL: ("psi", "missing", "unseen"),
    "volume": ("volume",),
}  # by kind
MEANING = {
    "psi": "population stability index over the bins of the reference (nats); values outside the training range "
    "count in the outermost bin, new categories not at all: `outside` and `unseen` count them",
    "ks": "largest difference of the distribution functions at the edges of the bins: approximate, low and high bound it",
    "wasserstein": "area between the distribution functions, in standard deviations of the reference",
    "js": "Jensen-Shannon distance, base 2",
    "missing": "change of the share of missing rows",
    "outside": "change of the share of values outside the training range, infinities included",
    "unseen": "change of the share of rows in categories unseen in training",
    "volume": "log of rows against the reference's rows per day",
}


@dataclass(frozen=True)
class ColumnSpec:
    """One monitored column: kind, edges (None for a category), scale of distances, labels of its bins.

    `points`: the one value of each bin inside the edges, NaN where it holds a range (None: all of them do).
    """

    name: str
    kind: str
    edges: np.ndarray | None
    scale: float
    labels: tuple[str, ...]
    points: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Number of bins of Counts.values."""
        return len(self.labels)


@dataclass(frozen=True)
class Counts:
    """Counts of one column in W windows.

    values float64[W, bins] (numeric: below, bins, above; category: unseen, rare, known ...); missing, negative and
    positive infinities float64[W]; far float64[W, 2]: sums of the values below and above the edges (NaN: too large).
    """

    values: np.ndarray
    missing: np.ndarray
    infinite: np.ndarray  # [W, 2]
    far: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """float64[W]: rows, missing ones included."""
        return np.asarray(self.values.sum(axis=1) + self.missing + self.infinite.sum(axis=1))

    def stacked(self) -> np.ndarray:
        """float64[W, bins + 5]: values, missing, infinities, far."""
        return np.concatenate([self.values, self.missing[:, None], self.infinite, self.far], axis=1)

    def take(self, windows: np.ndarray) -> Counts:
        """The chosen windows."""
        return Counts(self.values[windows], self.missing[windows], self.infinite[windows], self.far[windows])

    @classmethod
    def unstacked(cls, block: np.ndarray) -> Counts:
        """The inverse of `stacked`."""
        return cls(block[:, :-5], block[:, -5], block[:, -4:-2], block[:, -2:])

    def thinned(self, keep: np.ndarray, rng: np.random.Generator) -> Counts:
        """A random share `keep` [W] of the rows of each window."""
        share = np.clip(keep, 0.0, 1.0)

        def draw(counts: np.ndarray) -> np.ndarray:
            chance = share.reshape(-1, *[1] * (counts.ndim - 1))
            return rng.binomial(np.rint(counts).astype(np.int64), chance).astype(np.float64)

        values = draw(self.values)
        outer = self.values[:, [0, -1]]
        far = self.far * np.divide(values[:, [0, -1]], outer, out=np.zeros_like(outer), where=outer > 0)
        return Counts(values, draw(self.missing), draw(self.infinite), far)


def column_specs(spec: ProfileSpec) -> list[ColumnSpec]:
    """The monitored columns of a profile specification: numeric, categorical, predictions; no two have one name."""
    found = [_numeric(item, NUMERIC) for item in spec.numeric]
    for vocabulary in spec.categorical:
        named = vocabulary.name not in spec.unnamed
        labels = tuple(category_label(vocabulary, code, named) for code in range(1, vocabulary.size))
        found.append(ColumnSpec(vocabulary.name, CATEGORICAL, None, 1.0, labels))
    found += [_numeric(item, PREDICTION) for item in spec.predictions]
    return [replace(column, name=name) for column, name in zip(found, spec.columns, strict=True)]


def conditional_specs(spec: ProfileSpec) -> list[ColumnSpec]:
    """The conditional columns: bins are the quantiles of a value among rows that are alike in other columns."""
    labels = tuple(f"part {number} of {BINS}" for number in range(1, BINS + 1))
    return [ColumnSpec(item.name, CONDITIONAL, None, 1.0, labels) for item in spec.conditional]


def _numeric(item: NumericSpec, kind: str) -> ColumnSpec:
    edges = np.array(item.edges)
    texts = [f"{edge:.4g}" for edge in edges]
    inside = [
        f"{low} to {high}" if point is None else f"{point:.6g}"
        for (low, high), point in zip(itertools.pairwise(texts), item.points, strict=True)
    ]
    labels = (f"below {texts[0]}", *inside, f"above {texts[-1]}")
    return ColumnSpec(item.name, kind, edges, item.scale, labels, np.array(item.points, np.float64))


def profile_counts(profile: Profile) -> dict[str, Counts]:
    """The counts of a profile by column, as one window."""
    spec = profile.spec
    found = _numeric_counts(spec.numeric, profile.numeric)
    for index, vocabulary in enumerate(spec.categorical):
        row = profile.categories[index].astype(np.float64)
        found.append(Counts(row[None, 1 : vocabulary.size], row[:1], np.zeros((1, 2)), np.zeros((1, 2))))
    found += _numeric_counts(spec.predictions, profile.predictions)
    return dict(zip(spec.columns, found, strict=True))


def _numeric_counts(columns: Sequence[NumericSpec], counts: kernel.Profile) -> list[Counts]:
    found = []
    for index, item in enumerate(columns):
        row = counts.counts[index].astype(np.float64)
        far = [outside_sum(total) for total in counts.sums[index][2:]]
        found.append(
            Counts(
                row[None, : item.bins + 2],
                row[[kernel.MISSING]],
                row[None, [kernel.NEGATIVE_INFINITE, kernel.POSITIVE_INFINITE]],
                np.array([[np.nan if total is None else total for total in far]]),
            )
        )
    return found


def statistics(
    column: ColumnSpec, reference: Counts, current: Counts, names: tuple[str, ...], floor: float
) -> dict[str, np.ndarray]:
    """Each named statistic that the column's kind has: float64[W], NaN where it is not computable."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        p, q = shares(reference), shares(current)
        found: dict[str, np.ndarray] = {}
        if "psi" in names:
            base, now = (normalised(psi_bins(column, bin_rows(side))) for side in (reference, current))
            found["psi"] = kernels.psi_of(base, now, floor)
        if "js" in names:
            found["js"] = kernels.js_of(p, q)
        if "missing" in names:
            found["missing"] = np.abs(current.missing / current.rows - reference.missing / reference.rows)
        if column.edges is None:
            if "unseen" in names:
                found["unseen"] = np.abs(q[:, 0] - p[:, 0])
            return found
        if "ks" in names:
            found["ks"] = np.abs(kernels.gaps(ranked(reference), ranked(current))).max(axis=1)
        if "wasserstein" in names:
            distance = kernels.wasserstein_of(
                reference.values, reference.far, current.values, current.far, column.edges, column.points
            )
            infinite = reference.infinite.any(axis=1) | current.infinite.any(axis=1)
            found["wasserstein"] = np.where(infinite, np.nan, distance) / column.scale
        if "outside" in names:
            found["outside"] = np.abs((q[:, 0] + q[:, -1]) - (p[:, 0] + p[:, -1]))
        return found


def bin_rows(counts: Counts) -> np.ndarray:
    """float64[W, bins]: rows of each bin, infinities in the outer ones."""
    if not counts.infinite.any():
        return counts.values
    values = counts.values.copy()
    values[:, 0] += counts.infinite[:, 0]
    values[:, -1] += counts.infinite[:, 1]
    return values


def ranked(counts: Counts) -> np.ndarray:
    """float64[W, bins + 2]: rows of each bin, infinities beyond the outer ones."""
    return np.concatenate([counts.infinite[:, :1], counts.values, counts.infinite[:, 1:]], axis=1)


def shares(counts: Counts) -> np.ndarray:
    """float64[W, bins]: shares of the values that are not missing."""
    return normalised(bin_rows(counts))


def normalised(values: np.ndarray) -> np.ndarray:
    """float64[W, bins]: shares of each row of counts; NaN where it is empty."""
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def psi_bins(column: ColumnSpec, values: np.ndarray) -> np.ndarray:
    """The bins of [..., column.width] that PSI compares: values that the reference never had count in one statistic only.

    `outside` and `unseen` count values outside the training range and categories unseen in training. In PSI their
    bin would be empty on one side, and its floor would count the same rows again. So a number outside the range belongs to
    the outermost bin, and a row of a new category to none.
    """
    if column.edges is None:
        return values[..., 1:]
    inner = values[..., 1:-1].copy()
    inner[..., 0] += values[..., 0]
    inner[..., -1] += values[..., -1]
    return inner
