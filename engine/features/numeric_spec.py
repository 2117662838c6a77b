"""How one numeric column is cut into bins for profiles: fitted once with the model, kept in profile_spec.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from kernels import profile as kernel
from kernels.statistics import scale_of

FIT_ROWS = 65_536  # edges are quantiles: this many rows put each within 0.2 % of its share


class NumericSpecRecord(TypedDict):
    """One numeric column of profile_spec.json; `points` from format 2 on."""

    name: str
    edges: list[float]
    scale: float
    points: NotRequired[list[float | None]]


@dataclass(frozen=True)
class NumericSpec:
    """One numeric column: ascending edges, and the scale that normalises distances (kernels.statistics.scale_of).

    `points`: the one value that each bin was made for, None for a range of values (kernels.profile.bins_of).
    """

    name: str
    edges: tuple[float, ...]
    scale: float
    points: tuple[float | None, ...]

    @property
    def bins(self) -> int:
        """Bins inside the edges."""
        return len(self.edges) - 1

    def to_json(self, format_: int) -> NumericSpecRecord:
        """As in a record of that format."""
        state: NumericSpecRecord = {"name": self.name, "edges": list(self.edges), "scale": self.scale}
        return {**state, "points": list(self.points)} if format_ > 1 else state

    @classmethod
    def of(cls, state: NumericSpecRecord) -> NumericSpec:
        """From a record."""
        edges = tuple(map(float, state["edges"]))
        return cls(state["name"], edges, state["scale"], tuple(state.get("points", (None,) * (len(edges) - 1))))


def fit_numeric(name: str, values: np.ndarray, bins: int) -> NumericSpec:
    """Bins and scale of one column, from (at most FIT_ROWS, evenly spaced) values [n]."""
    values = values[:: -(-len(values) // FIT_ROWS)] if len(values) else values
    finite = np.sort(np.asarray(values[np.isfinite(values)], np.float64))
    if not len(finite):  # no value: no statistic can be computed
        return NumericSpec(name, (0.0, 1.0), 1.0, (None,))
    found = kernel.bins_of(finite, bins)
    points = tuple(None if np.isnan(point) else float(point) for point in found.points)
    return NumericSpec(name, tuple(float(edge) for edge in found.edges), float(scale_of(finite)), points)
