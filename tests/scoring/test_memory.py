"""Memory of scoring does not grow with the rows (field report D7)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import engine
from tests.conftest import ROOT
from tests.scoring.conftest import Shop
from tests.tiny import visits

ROWS = 1_200_000


@pytest.mark.slow
def test_peak_memory_is_flat_as_the_input_grows_eightfold(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(visits(ROWS), tmp_path / "in" / "visits.parquet")
    place = (f"data.path={tmp_path / 'in'}", f"paths.store={tmp_path / 'store'}")
    words = [*shop.words(*place, runs=tmp_path / "runs"), "score.unit_rows=32768"]
    prepare = [word for word in words if not word.startswith("score.")]
    for command in ("ingest", "features"):
        engine.run(command, *prepare, config_dir=shop.conf)

    def peak(*more: str) -> tuple[float, float]:
        """(rows, peak resident bytes) of scoring in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "engine", "score", *words, *more, f"--config-dir={shop.conf}"],
            capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text())
        return metrics["score/rows"], metrics["score/peak_memory_bytes"]

    few, before = peak("score.between=[2020-01-01,2020-01-04T18:00]")
    all_rows, after = peak()
    assert all_rows == ROWS and 7 * few < all_rows
    assert after < 1.1 * before, f"{before / 1e6:.0f} MB for {few:,.0f} rows, {after / 1e6:.0f} MB for {all_rows:,.0f}"
