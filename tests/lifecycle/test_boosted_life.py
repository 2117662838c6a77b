"""The whole life with boosted trees as champion or challenger: the same commands, records and promises as with a network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine import __main__ as shell
from engine.errors import UserError
from engine.runtime import seal
from engine.scoring.predictor import load
from engine.scoring.read import predictions
from engine.training import bundle
from engine.training.trees import Trees
from tests import tiny
from tests.lifecycle.test_backtest import WORDS as BACKTEST
from tests.lifecycle.test_retrain import RETRAIN

TREES = ("model.trees.rounds=15", "model.trees.leaves=7")
EARLY = ("split.train=[2020-01-01,2020-01-06]", "split.valid=[2020-01-06,2020-01-09]", "split.test=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("boosted"), rows=3000)


def run(folder: Path, command: str, *words: str) -> Any:
    return engine.run(command, *tiny.overrides(folder, *words), config_dir=str(folder / "conf"))


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    """A trained run of each kind."""
    found = {kind: run(folder, "train", f"model={kind}", *TREES, *EARLY).directory for kind in ("lightgbm", "xgboost")}
    return found | {"mlp": run(folder, "train", *EARLY).directory}


@pytest.mark.parametrize("kind", ["lightgbm", "xgboost"])
def test_a_run_says_what_grew_and_what_it_used(models: dict[str, Path], kind: str) -> None:
    metrics = json.loads((models[kind] / "metrics.json").read_text())
    record = json.loads((models[kind] / "run.json").read_text())
    shares = json.loads((models[kind] / "importance.json").read_text())
    assert metrics["valid/roc_auc"] > 0.6 and metrics["train/trees"] > 3
    assert sum(shares.values()) == pytest.approx(1.0) and list(shares.values()) == sorted(shares.values(), reverse=True)
    assert {"shop", "size"} < set(shares)
    assert any(name.startswith(kind) for name in record["environment"]["packages"])
    assert "loss@10" in record["chain"] and record["chain"]["weights"]
    report = (models[kind] / "report.html").read_text()
    assert "Share of the gain of all splits" in report and f"{kind}, learning rate 0.05, at most leaves 7" in report


@pytest.mark.parametrize("kind", ["lightgbm", "xgboost"])
def test_scoring_needs_no_library(
    folder: Path, models: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    found = run(
        folder, "score", f"score.model={models[kind]}", "score.between=[2020-01-26,2020-01-28]", "score.unit_rows=1024"
    )
    table = predictions(found.directory, store=str(folder / "store"))
    small = run(
        folder, "score", f"score.model={models[kind]}", "score.between=[2020-01-26,2020-01-28]", "resources.threads=1"
    )
    assert table.num_rows > 100 and len(np.unique(table["score"].to_numpy())) > 20
    assert small.record["chain"]["scores"] == found.record["chain"]["scores"]


@pytest.mark.parametrize(("champion", "challenger"), [("lightgbm", "mlp"), ("mlp", "xgboost")])
def test_a_champion_of_one_kind_is_scored_in_the_shadow_of_another_watched_and_challenged(
    folder: Path, models: dict[str, Path], champion: str, challenger: str, tmp_path: Path
) -> None:
    runs = f"paths.runs={tmp_path / 'runs'}"
    assert shell.main(["registry", "promote", "tiny", str(models[champion]), runs]) == 0
    scored = run(
        folder,
        "score",
        "score.model=tiny@champion",
        f"score.shadow={models[challenger]}",
        "score.between=[2020-01-26,2020-01-31]",
        runs,
    )
    table = predictions(scored.directory, store=str(folder / "store"))
    assert {"score", "shadow_score"} < set(table.column_names)
    assert not np.array_equal(table["score"].to_numpy(), table["shadow_score"].to_numpy())
    watched = run(folder, "monitor", "monitor.model=tiny@champion", f"monitor.run={scored.directory}", runs)
    assert (watched.directory / "drift.json").exists()
    decided = run(folder, "retrain", *RETRAIN, f"model={challenger}", *TREES, runs)
    decision = json.loads((decided.directory / "decision.json").read_text())
    assert decision["verdict"] and decision.get("challenger")


@pytest.mark.slow
def test_a_run_is_reproduced_link_by_link(
    folder: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("lightgbm", "xgboost"):
        assert shell.main(["reproduce", str(models[kind]), "--code", "current", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["first_difference"] is None, found
    assert folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lightgbm", "xgboost"])
def test_a_killed_command_goes_on_and_gives_the_same_trees(folder: Path, kind: str, tmp_path: Path) -> None:
    words = [
        f"model={kind}",
        "model.trees.rounds=150",
        "resources.threads=1",
        "model.trees.patience=0",
        "model.trees.row_fraction=0.7",
        *EARLY,
    ]
    words += ["train.checkpoint_every=10", f"paths.runs={tmp_path / 'runs'}"]
    command = [
        sys.executable,
        "-m",
        "engine",
        "train",
        "--config-dir",
        str(folder / "conf"),
        *tiny.overrides(folder, *words),
    ]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("runs/train/tiny/*/checkpoints/step-*/manifest.json")) and time.monotonic() < end:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    resumed = run(folder, "train", *words)
    whole = run(folder, "train", *words, "train.resume=never")
    metrics = json.loads((resumed.directory / "metrics.json").read_text())
    assert 10 <= metrics["resumed_from_step"] < 150 and resumed.directory != whole.directory
    assert resumed.record["chain"] == whole.record["chain"]


@pytest.mark.slow
def test_a_backtest_replays_policies_of_trees(folder: Path) -> None:
    done = run(folder, "backtest", *BACKTEST, "model=lightgbm", *TREES, "resources.threads=1")
    policies = {item["name"]: item for item in json.loads((done.directory / "backtest.json").read_text())["policies"]}
    assert len(policies) > 1 and any(item["retrains"] for item in policies.values())


def test_start_from_adds_trees_to_the_champion(folder: Path, models: dict[str, Path]) -> None:
    longer = run(folder, "train", "model=lightgbm", *TREES, *EARLY, f"train.start_from={models['lightgbm']}")
    first, more = (load(directory).model for directory in (models["lightgbm"], longer.directory))
    assert isinstance(first, Trees) and isinstance(more, Trees)
    before = len(first.forest.root) - 1
    assert len(more.forest.root) - 1 > before and more.first(before).weights() == first.weights()
    for kind, other in (("mlp", "lightgbm"), ("lightgbm", "mlp")):
        with pytest.raises(UserError, match="needs a model of the same kind"):
            run(folder, "train", f"model={kind}", *TREES, *EARLY, f"train.start_from={models[other]}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"trees": 10**7, "nodes": 5}, "settings: trees must be a number from 0 to 262,144, found 10000000"),
        ({"trees": 3, "nodes": 10**7}, "settings: nodes must be a number from 0 to 4,194,304, found 10000000"),
        ({"trees": 3, "nodes": 4_000_000}, r"must have shape \[4000000\]"),
        ({}, "settings must have 'trees', found nothing"),
    ],
)
def test_a_bundle_that_lies_about_its_trees_is_refused(
    models: dict[str, Path], tmp_path: Path, value: Any, said: str
) -> None:
    copy = Path(shutil.copytree(models["lightgbm"] / "model", tmp_path / "model"))
    described = json.loads((copy / "model.json").read_text())
    described["architecture"]["settings"] = value
    (copy / "model.json").write_text(json.dumps(described))
    manifest = json.loads((copy / bundle.MANIFEST).read_text())
    manifest["files"]["model.json"] = seal.record_of(copy / "model.json")
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest))
    bundle.seal(copy)
    with pytest.raises(UserError, match=said):
        load(copy)
