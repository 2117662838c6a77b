"""Multivariate drift: columns that moved against each other, which single columns cannot show. Uses samples of encoded rows.

PCA reconstruction error (components fitted on the reference sample), and a domain classifier: how well a ridge discriminant
on squares and products of the leading components separates current from reference rows (AUC 0.5: not at all), on rows
that it was not fitted on. Reference windows of the same length give the usual range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from engine.runtime.records import Number
from kernels.metrics import roc_auc

KEPT_VARIANCE = 0.9
COMPONENTS = 12  # leading components whose products the classifier sees
RIDGE = 1e-3
FEWEST_ROWS = 100
MOST_ROWS = 5_000
WINDOWS = 8  # most reference windows for the usual range


@dataclass(frozen=True)
class Space:
    """Standardised encoded rows of the reference in principal components; categories as their reference frequency."""

    names: tuple[str, ...]
    frequencies: dict[str, np.ndarray]
    center: np.ndarray
    scale: np.ndarray
    axes: np.ndarray  # [F, F], rows are components by falling variance
    variances: np.ndarray
    kept: int

    def standardised(self, table: pa.Table) -> np.ndarray:
        """float64[n, F] of rows with the sample's columns."""
        return np.asarray((_matrix(table, self.names, self.frequencies) - self.center) / self.scale)

    def errors(self, rows: np.ndarray) -> np.ndarray:
        """float64[n]: squared distance of standardised rows from their projection on the kept components."""
        inside = rows @ self.axes[: self.kept].T
        return np.asarray((rows * rows).sum(axis=1) - (inside * inside).sum(axis=1)).clip(0.0)

    def products(self, rows: np.ndarray) -> np.ndarray:
        """float64[n, P]: whitened leading components, their squares and products."""
        count = min(COMPONENTS, int((self.variances > 1e-9).sum()))
        white = rows @ self.axes[:count].T / np.sqrt(self.variances[:count])
        white = np.clip(white, -5.0, 5.0)  # a few outliers must not decide alone
        left, right = np.triu_indices(count)
        return np.concatenate([white, white[:, left] * white[:, right]], axis=1)


def _matrix(table: pa.Table, names: tuple[str, ...], frequencies: dict[str, np.ndarray]) -> np.ndarray:
    columns = []
    for name in names:
        values = np.asarray(table[name])
        if name in frequencies:
            codes = np.clip(values.astype(np.int64), 0, len(frequencies[name]) - 1)
            values = frequencies[name][codes]
        columns.append(values.astype(np.float64))
    return np.stack(columns, axis=1) if columns else np.zeros((table.num_rows, 0))


def fit_space(sample: pa.Table) -> Space:
    """The space of a reference sample (columns `numeric:*` and `category:*`)."""
    names = tuple(name for name in sample.column_names if name.startswith(("numeric:", "category:")))
    frequencies = {}
    for name in names:
        if name.startswith("category:"):
            counts = np.bincount(np.asarray(sample[name]), minlength=1).astype(np.float64)
            frequencies[name] = np.log1p(counts / max(sample.num_rows, 1) * 1000.0)
    rows = _matrix(sample, names, frequencies)
    center, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    standard = (rows - center) / scale
    variances, vectors = np.linalg.eigh(standard.T @ standard / max(len(rows), 1))
    variances, axes = variances[::-1].clip(0.0), vectors[:, ::-1].T
    total = np.cumsum(variances) / max(variances.sum(), 1e-300)
    kept = min(int(np.searchsorted(total, KEPT_VARIANCE)) + 1, len(variances))
    return Space(names, frequencies, center, scale, axes, variances, kept)


def domain_auc(space: Space, reference: np.ndarray, current: np.ndarray) -> float:
    """Two-fold held-out AUC of separating current from reference rows (standardised); 0.5 and below: alike."""
    a, b = space.products(_limited(reference)), space.products(_limited(current))
    x = np.concatenate([a, b])
    y = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    fold = np.concatenate([np.arange(len(a)) % 2, np.arange(len(b)) % 2])
    scores = np.empty(len(x))
    for k in (0, 1):
        weights = _discriminant(x[fold != k], y[fold != k])
        scores[fold == k] = x[fold == k] @ weights
    return float(np.mean([roc_auc(y[fold == k], scores[fold == k]) for k in (0, 1)]))


def _limited(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // MOST_ROWS)] if len(rows) else rows


def _discriminant(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge regression of the centred classes, each class weighing the same (Fisher's discriminant with shrinkage)."""
    weight = np.where(y > 0, 0.5 / max((y > 0).sum(), 1), 0.5 / max((y == 0).sum(), 1))
    center = weight @ x
    z = x - center
    covariance = (z * weight[:, None]).T @ z
    ridge = RIDGE * max(float(np.trace(covariance)) / max(len(covariance), 1), 1e-12)
    target = (z * weight[:, None]).T @ np.where(y > 0, 1.0, -1.0)
    return np.asarray(np.linalg.solve(covariance + ridge * np.eye(len(covariance)), target))


class Together(TypedDict):
    """A figure of all columns together, or the reason why there is none, with those of the reference's own windows."""

    value: Number
    reason: NotRequired[str]
    windows: NotRequired[list[Number]]
    usual: NotRequired[list[Number] | None]
    beyond: NotRequired[bool | None]
    components: NotRequired[int]


def compare_samples(sample: pa.Table, current: pa.Table | None, length: int) -> dict[str, Together]:
    """PCA error and domain AUC of a current sample, with the range of the reference's own windows."""
    reason = _reason(sample, current)
    if reason is not None or current is None:
        return {name: {"value": None, "reason": f"not computable, because {reason}"} for name in ("pca", "domain_auc")}
    space = fit_space(sample)
    rows, now = space.standardised(sample), space.standardised(current)
    scale = max(float(space.errors(rows).mean()), 1e-12)
    found: dict[str, Together] = {
        "pca": {"value": float(space.errors(now).mean()) / scale, "windows": []},
        "domain_auc": {"value": domain_auc(space, rows, now), "windows": []},
    }
    for inside in sample_windows(np.asarray(sample["day"].cast(pa.int32())), length):
        found["pca"]["windows"].append(float(space.errors(rows[inside]).mean()) / scale)
        found["domain_auc"]["windows"].append(domain_auc(space, rows[~inside], rows[inside]))
    for item in found.values():
        windows = item["windows"]
        item["usual"] = [min(windows), max(windows)] if windows else None
        item["beyond"] = item["value"] > max(windows) if windows else None
    found["pca"]["components"] = space.kept
    return found


def _reason(sample: pa.Table, current: pa.Table | None) -> str | None:
    if current is None:
        return "a stored profile holds counts and no rows"
    for name, table in (("reference", sample), ("current", current)):
        if table.num_rows < FEWEST_ROWS:
            return f"the {name} sample has {table.num_rows} rows, fewer than {FEWEST_ROWS}"
    if not any(name.startswith(("numeric:", "category:")) for name in sample.column_names):
        return "the sample has no columns"
    return None


def sample_windows(days: np.ndarray, length: int) -> list[np.ndarray]:
    """bool[n] of up to WINDOWS separate windows of the sample's days, evenly spaced, with enough rows inside and outside."""
    starts = days.min() + np.unique((days - days.min()) // length) * length  # those that hold rows
    starts = starts[starts <= days.max() - length + 1]
    starts = (
        starts[np.unique(np.linspace(0, len(starts) - 1, min(len(starts), WINDOWS)).astype(int))]
        if len(starts)
        else starts
    )
    found = [(days >= start) & (days < start + length) for start in starts]
    return [inside for inside in found if inside.sum() >= FEWEST_ROWS and (~inside).sum() >= FEWEST_ROWS]
