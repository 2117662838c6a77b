"""The `ingest` step: raw files to a dataset in the store, whether or not it is there."""

from __future__ import annotations

import time

from engine.config.tree import Config
from engine.data.ingest_plan import make_plan
from engine.data.make_dataset import make_anew
from engine.runtime.run import Run


def ingest(config: Config, run: Run) -> dict[str, float]:
    """Make the dataset of `config.data`, whether or not the store has it. Returns what was counted and measured."""
    began = time.monotonic()
    plan = make_plan(config, run)
    dataset, staged = make_anew(plan, run)
    seconds = time.monotonic() - began
    totals = dataset.manifest["accounting"]
    return {
        "ingest/rows": float(dataset.rows),
        "ingest/rows_in": float(totals["rows_in"]),
        "ingest/quarantined": float(totals["quarantined"]),
        "ingest/refused_files": float(totals["refused_files"]),
        "ingest/files": float(len(plan.files)),
        "ingest/files_reused": float(sum(item.reused for item in staged)),
        "ingest/seconds": seconds,
        "ingest/rows_per_second": dataset.rows / max(seconds, 1e-9),
    }
