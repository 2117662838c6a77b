"""The `features` step: every view of a config computed anew and stored."""

from __future__ import annotations

import time

from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.features.spec import event_inputs
from engine.features.table import ensure_table
from engine.runtime.run import Run


def features(config: Config, run: Run) -> dict[str, float]:
    """Recompute every view and store it."""
    began = time.monotonic()
    dataset = ensure_dataset(config, run)
    table = ensure_table(config, run, dataset, anew=True)
    seconds = time.monotonic() - began
    run.log(f"{len(table.features)} features of {dataset.rows:,} rows from {len(table.views)} views")
    return {
        "features/rows": float(dataset.rows),
        "features/columns": float(len(table.features)),
        "features/views": float(len(table.views)),
        "features/event_columns": float(len(event_inputs(config.data, config.features))),
        "features/seconds": seconds,
        "features/rows_per_second": dataset.rows / max(seconds, 1e-9),
    }
