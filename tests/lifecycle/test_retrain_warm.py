"""A warm start: a challenger that goes on from the champion's encoding and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import engine
from engine import __main__ as shell
from engine.errors import UserError
from engine.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("warm"), rows=1500)


@pytest.fixture(scope="module")
def first(folder: Path) -> Run:
    done = train(folder, "split.train=[2020-01-01,2020-01-10]", "split.valid=[2020-01-10,2020-01-14]")
    assert shell.main(["registry", "promote", "tiny", str(done.directory), f"paths.runs={folder / 'runs'}"]) == 0
    return done


def train(folder: Path, *more: str) -> Run:
    return engine.run("train", *tiny.overrides(folder, "train.epochs=1", *more), config_dir=str(folder / "conf"))


def weights(run: Run) -> np.ndarray:
    found = safetensors.numpy.load_file(run.directory / "model" / "model.safetensors")
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def test_training_goes_on_from_the_weights_of_the_other_model(folder: Path, first: Run) -> None:
    still = ("train.lr=1e-12", "train.weight_decay=0")
    warm = train(folder, "train.start_from=tiny@champion", *still)
    cold = train(folder, *still)
    assert np.abs(weights(warm) - weights(first)).max() < 1e-6
    assert np.abs(weights(cold)).shape != weights(first).shape or np.abs(weights(cold) - weights(first)).max() > 0.01
    assert warm.record["chain"]["fitted"] == first.record["chain"]["fitted"]
    assert warm.metrics["train/rows"] > first.metrics["train/rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.hidden=[8]", "same architecture"),
        ("features.direct.shop=false", "same features, found a difference in shop"),
    ],
)
def test_another_model_cannot_be_gone_on_from(folder: Path, first: Run, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(folder, "train.start_from=tiny@champion", change)


def test_a_challenger_may_start_from_the_champion(folder: Path, first: Run) -> None:
    words = tiny.overrides(
        folder, "retrain.now=2020-01-29", "retrain.triggers=[always]", "retrain.start=champion", "retrain.judge_length=8d",
        "retrain.valid_length=2d", "retrain.gate.min_rows=100", "retrain.gate.bootstrap=40", "train.epochs=1",
        "split.train=[]", "split.valid=[]", "split.test=[]",
    )  # fmt: skip
    done = engine.run("retrain", *words, config_dir=str(folder / "conf"))
    decision = json.loads((done.directory / "decision.json").read_text())
    record = Run.read(Path(decision["challenger_run"]))
    assert decision["champion"] in record["config"]["train"]["start_from"]
    assert record["chain"]["fitted"] == first.record["chain"]["fitted"]
