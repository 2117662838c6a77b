"""Rows that a GPU encodes, scores and counts have the blocks and the profile of the CPU, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.runtime.run import Run
from engine.scoring.cuda_tiles import DeviceScorer
from engine.scoring.predictor import load
from kernels import cuda
from kernels.encode import NumericColumn, numeric_plan
from tests.scoring.conftest import Shop, rows_of

SCRIPT = Path(__file__).with_name("simulated_rows.py")


def test_in_the_simulator_scores_and_profile_are_those_of_the_cpu(shop: Shop, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(shop.folder), str(shop.model), str(tmp_path)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["blocks", "run"]


def test_a_model_whose_encoding_ends_in_a_logarithm_is_encoded_on_the_cpu(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "NumericEncoder", lambda plan: plan)
    model = load(shop.model).model.network
    plain, normal = (numeric_plan([NumericColumn(kind, edges=(0.0, 1.0))]) for kind in ("ple", "normal"))
    assert DeviceScorer(model, "fp32", "cpu", plan=plain, kernels=True).encodes
    found = DeviceScorer(model, "fp32", "cpu", plan=normal, kernels=True)
    assert not found.encodes and "features.encode.numeric=quantile" in found.on_cpu


def test_without_kernels_rows_are_encoded_on_the_cpu_and_the_reason_is_kept(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "fault", lambda: "CudaMissing: none")
    found = load(shop.model, device="cpu")
    scorer = DeviceScorer(found.model.network, "fp32", "cpu", plan=found.bundle.encoder.plan)
    assert not scorer.encodes and scorer.on_cpu == "CudaMissing: none"


@pytest.mark.gpu
def test_on_a_card_a_run_has_the_profile_and_the_inputs_of_the_cpu(
    shop: Shop, unbroken: Run, score: Callable[..., Run]
) -> None:
    assert not cuda.fault()
    run = score("score.columns=[shop,size]", "cluster.gpus_per_worker=1")
    found, want = (json.loads((one.directory / "profile.json").read_text()) for one in (run, unbroken))
    for part in ("format", "spec", "rows", "numeric", "categorical"):
        assert found[part] == want[part], part
    # Scores differ in their last bits, so the counts of predictions are those of the run's own scores.
    scores = np.asarray(rows_of(run)["score"])
    np.testing.assert_allclose(scores, np.asarray(rows_of(unbroken)["score"]), rtol=1e-4, atol=1e-4)
    inputs = [
        {(unit["start"], unit["stop"]): unit["input"] for unit in map(json.loads, map(Path.read_text, records(one)))}
        for one in (run, unbroken)
    ]
    assert inputs[0] == inputs[1]


def records(run: Run) -> list[Path]:
    return sorted((run.directory / "parts").glob("*.json"))
