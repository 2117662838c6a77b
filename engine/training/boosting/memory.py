"""Memory that growing trees takes beside the rows themselves, computed before it is taken.

The figures are 1 to 2.3 times the peaks of resident memory that were measured at 100,000 and 400,000 rows of 10 to 200 columns.
"""

from __future__ import annotations

import numpy as np

from engine.config.sections.training import ModelConfig, TreesConfig
from engine.errors import UserError
from engine.runtime import environment
from engine.training.boosting.grower import Rows
from engine.training.examples import Examples

PART_BYTES = 2**24  # of the rows that XGBoost is given at once
SORTED_BYTES = 2**28  # of the columns that are sorted at once for its cuts
LINE = 16  # numbers that the processor reads at once
MOST_NODES = 1024  # whose histograms count: larger trees may have them all, but mostly do not


def columns_at_once(rows: int) -> int:
    """Columns of numbers that are sorted at once."""
    return max(1, min(LINE, SORTED_BYTES // max(4 * rows, 1)))


def rows_at_once(columns: int) -> int:
    """Rows of a part that XGBoost is given."""
    return max(1024, PART_BYTES // max(4 * columns, 1))


def needed(settings: TreesConfig, kind: str, rows: int, columns: int, outputs: int, workers: int = 1) -> int:
    """Bytes that a worker needs to bin its rows (every `workers`-th), for the gradients of all of them, and for histograms."""
    nodes = min(2 * (settings.leaves or 2**settings.depth), MOST_NODES)
    rounds = rows * (64 + 72 * outputs) + 16 * (settings.bins + 1) * columns * nodes
    if (
        kind == "lightgbm"
    ):  # a copy (4 bytes a number), the sample of all rows in float64 with its places (12), bins (2)
        return 18 * rows * columns + rounds
    parts = 2 * 4 * min(rows, rows_at_once(columns)) * columns
    return rows * columns // workers + 4 * rows * columns_at_once(rows) + parts + rounds


def check_memory(config: ModelConfig, train: Examples, rows: Rows, workers: int, local_workers: int) -> None:
    """Raise UserError where the trees need more memory than this machine has; rows mapped from a file take none."""
    kind, settings = config.kind, config.trees
    n, columns = len(train), rows.numeric.shape[1] + rows.codes.shape[1]
    held = 0 if isinstance(train.numeric.base, np.memmap) else train.nbytes
    each = needed(settings, kind, n, columns, rows.outputs, workers)
    there = environment.memory_bytes()
    if held + each * local_workers <= there:
        return
    other = needed(settings, "xgboost", n, columns, rows.outputs)
    advice = f"model=xgboost needs {other:,}; or use" if kind == "lightgbm" and held + other <= there else "Use"
    raise UserError(
        f"model={kind} needs {each:,} bytes of memory{f' in each of {local_workers} workers' if local_workers > 1 else ''} for "
        f"{n:,} rows of {columns:,} encoded columns, beside {held:,} for the rows; this machine has {there:,}. {advice} fewer "
        "rows or columns, or a larger machine"
    )
