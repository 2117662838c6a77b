"""The weight of each row: how much it counts in the loss, in metrics, in the gate and in monitoring."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.config.tree import Config
from engine.errors import UserError
from engine.features.compute import as_floats


def weight_column(config: Config) -> str | None:
    """The column by which an evaluation weighs its rows; None without one, and with evaluate.weighted=false."""
    return config.data.weight if config.evaluate.weighted else None


def row_weights(values: pa.ChunkedArray, rows: np.ndarray, column: str, used: np.ndarray | None = None) -> np.ndarray:
    """float32[n] weights. Raises UserError naming the first of the `used` rows (None: all) whose weight is missing, infinite or
    negative; the others get 0 instead. `rows`: the dataset row of each.
    """
    with np.errstate(over="ignore"):  # beyond float32 it is infinite, and refused
        weight = as_floats(values).astype(np.float32)
    good = np.isfinite(weight) & (weight >= 0)
    wrong = ~good if used is None else ~good & used
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(
            f"data.columns.{column} has role weight and must be finite and at least 0 in labelled rows, found "
            f"{weight[at]:g} in dataset row {rows[at]}. To set such rows aside at ingest, give the column min: 0, "
            "nullable: false and on_violation: quarantine"
        )
    return np.where(good, weight, np.float32(0))
