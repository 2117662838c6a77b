"""The whole life of models with members: seeds of a model, a blend that one run trains, a blend of finished models."""

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
from engine.runtime.registry import Registry, root_of
from engine.scoring.predictor import load
from engine.scoring.read import predictions
from engine.training.blend import Blend
from tests import tiny
from tests.lifecycle.test_backtest import WORDS as BACKTEST
from tests.lifecycle.test_retrain import RETRAIN

EARLY = (
    "split.train=[2020-01-01,2020-01-06]",
    "split.valid=[2020-01-06,2020-01-09]",
    "split.test=[2020-01-09,2020-01-12]",
)
SEEDS = ("train.seeds=2", "train.epochs=1")
TREES = ("model.trees.rounds=8", "model.trees.leaves=5")
MODELS = "model.blend.models={trees: {kind: lightgbm, trees: {rounds: 8, leaves: 5}}, net: {kind: linear}}"
WINDOW = "score.between=[2020-01-26,2020-01-31]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("blended"), rows=3000)


def run(folder: Path, command: str, *words: str) -> Any:
    return engine.run(command, *tiny.overrides(folder, *words), config_dir=str(folder / "conf"))


@pytest.fixture(scope="module")
def seeds(folder: Path) -> Any:
    return run(folder, "train", *EARLY, *SEEDS)


@pytest.fixture(scope="module")
def trees(folder: Path) -> Path:
    return Path(run(folder, "train", *EARLY, "model=lightgbm", *TREES).directory)


@pytest.fixture(scope="module")
def net(folder: Path) -> Path:
    return Path(run(folder, "train", *EARLY, "model=linear", "evaluate.calibration=temperature").directory)


@pytest.fixture(scope="module")
def blend(folder: Path, trees: Path, net: Path) -> Any:
    return run(folder, "train", *EARLY, "model=blend", f"model.blend.bundles=[{trees},{net}]")


def test_seeds_become_one_model_whose_members_are_measured_and_shown(folder: Path, seeds: Any) -> None:
    metrics, model = seeds.metrics, load(seeds.directory)
    each = [metrics[f"members/seed_{seed}/test/roc_auc"] for seed in (0, 1)]
    assert metrics["members_mean/test/roc_auc"] == pytest.approx(np.mean(each))
    assert metrics["members_sd/test/roc_auc"] == pytest.approx(np.std(each, ddof=1)) and each[0] != each[1]
    assert metrics["test/log_loss"] <= metrics["members_mean/test/log_loss"]
    assert isinstance(model.model, Blend) and model.model.shares == (0.5, 0.5)
    report = (seeds.directory / "report.html").read_text()
    assert "weighted mean of its members" in report and "seed_1" in report and "by member" in report
    scored = run(folder, "score", f"score.model={seeds.directory}", WINDOW, "score.unit_rows=1024")
    table = predictions(scored.directory, store=str(folder / "store"))
    assert table.num_rows > 300 and len(np.unique(table["score"].to_numpy())) > 100
    small = run(folder, "score", f"score.model={seeds.directory}", WINDOW, "resources.threads=1")
    assert small.record["chain"]["scores"] == scored.record["chain"]["scores"]


@pytest.mark.slow
def test_a_row_alone_has_the_bits_of_a_batch(folder: Path, blend: Any) -> None:
    events, model = tiny.visits(300), engine.load(blend.directory)
    whole = np.asarray(model.predict(events)["score"])
    for rows in (slice(0, 1), slice(17, 40)):
        part = model.predict(events.slice(rows.start, rows.stop - rows.start), history=events)
        assert np.asarray(part["score"]).tobytes() == whole[rows].tobytes()


@pytest.mark.slow
def test_finished_models_are_weighed_into_one_with_their_own_temperatures(
    folder: Path, blend: Any, trees: Path, net: Path
) -> None:
    found = load(blend.directory).model
    assert isinstance(found, Blend) and sum(found.shares) == 1
    losses = [engine.load(path) for path in (trees, net)]
    singles = [json.loads((path / "metrics.json").read_text())["valid/log_loss"] for path in (trees, net)]
    assert blend.metrics["valid/log_loss"] <= min(singles) + 1e-9
    assert {key for key in blend.record["used"] if "blend" in key} == {f"model.blend.bundles[{k}]" for k in (0, 1)}
    assert set(blend.record["used"].values()) == {item.digest for item in losses}
    temperatures = [member.record.get("temperature") for member in found.members]
    assert temperatures[0] is None and (len(found.members) == 1 or temperatures[1] is not None)
    measured = [blend.metrics[f"members/lightgbm_{losses[0].digest[:6]}/valid/log_loss"]]
    measured.append(blend.metrics[f"members/linear_{losses[1].digest[:6]}/valid/log_loss"])
    assert measured == pytest.approx(singles)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("split.train=[2020-01-01,2020-01-05]", "model=lightgbm"), "must read the same encoded rows"),
        (("features.direct.size=false",), "features.direct.*was trained with|features.*but the model was trained"),
        (("train.loss=focal",), "must have the loss of train"),
        (("train.seeds=2",), "must be a model by itself, found a blend"),
        (
            ("train.targets.amt.column=amount", "train.targets.amt.loss=squared"),
            "has targets bought, amt; a member has one",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(folder: Path, trees: Path, words: tuple[str, ...], said: str) -> None:
    other = run(folder, "train", *EARLY, "train.epochs=1", *TREES, *words).directory
    with pytest.raises(UserError, match=said):
        run(folder, "train", *EARLY, "model=blend", f"model.blend.bundles=[{trees},{other}]")


@pytest.mark.slow
def test_a_copied_model_without_the_record_of_its_rows_is_refused(
    folder: Path, trees: Path, net: Path, tmp_path: Path
) -> None:
    shutil.copytree(net / "model", tmp_path / "copy" / "model")
    with pytest.raises(UserError, match=r"must have the record of the rows that it was trained on.*not a copy"):
        run(folder, "train", *EARLY, "model=blend", f"model.blend.bundles=[{trees},{tmp_path / 'copy' / 'model'}]")


@pytest.mark.slow
def test_members_of_a_split_by_hash_have_the_parts_of_the_run(folder: Path) -> None:
    hashed = (
        "split.by=hash",
        "split.train=[0%,80%]",
        "split.valid=[80%,90%]",
        "split.test=[90%,100%]",
        "train.epochs=1",
    )
    each = [run(folder, "train", *hashed, f"model={kind}", *TREES).directory for kind in ("linear", "lightgbm")]
    words = (*hashed, "model=blend", f"model.blend.bundles=[{each[0]},{each[1]}]")
    assert run(folder, "train", *words).metrics["test/roc_auc"] > 0.5
    with pytest.raises(UserError, match=r"split.turn=20% split.train=\[0%, 80%\], found split.by=hash split.turn=0%"):
        run(folder, "train", *words, "split.turn=20%")
    with pytest.raises(UserError, match=r"split.by=time.*found split.by=hash"):
        run(folder, "train", *EARLY, *words[4:])


@pytest.mark.slow
def test_what_cannot_be_is_refused_by_name(folder: Path, trees: Path, net: Path, seeds: Any) -> None:
    both = f"model.blend.bundles=[{trees},{net}]"
    soon = ("split.train=[2020-01-01,2020-01-04]", "split.valid=[2020-01-05,2020-01-09]")
    for words, said in (
        (
            (*EARLY, *soon, both),
            r"the rows of this run, split.by=time split.train=\[2020-01-01, 2020-01-04\], found",
        ),
        ((*EARLY, both, "train.seeds=2"), "train.seeds must be 1 with finished models"),
        ((*EARLY, MODELS, f"train.start_from={trees}"), "train.start_from continues one model, found model=blend"),
        ((*EARLY, MODELS, "split.valid=[]"), "split.valid must say by which rows"),
        ((*EARLY, MODELS, "train.pause_after=1"), "train.pause_after pauses one model"),
    ):
        with pytest.raises(UserError, match=said):
            run(folder, "train", "model=blend", *words)
    with pytest.raises(UserError, match="found a model with members"):
        run(folder, "train", *EARLY, f"train.start_from={seeds.directory}")
    for command, more in (("retrain", RETRAIN), ("backtest", BACKTEST)):
        with pytest.raises(UserError, match=r"model\.blend\.bundles are finished models"):
            run(folder, command, *more, "model=blend", both)
    space = "sweep.space={train.lr: {log: [0.001, 0.1]}}"
    with pytest.raises(UserError, match=r"train\.seeds must be a number where.*write train.seeds=2"):
        run(folder, "sweep", "train.seeds=[4,9]", space)
    with pytest.raises(UserError, match=r"sweep\.rungs pause trials of one model"):
        run(folder, "sweep", "train.seeds=2", "sweep.rungs=[1]", space)


@pytest.mark.slow
def test_a_champion_with_members_is_scored_watched_challenged_and_reproduced(
    folder: Path, blend: Any, trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"paths.runs={tmp_path / 'runs'}"
    assert shell.main(["registry", "promote", "tiny", str(blend.directory), runs]) == 0
    scored = run(folder, "score", "score.model=tiny@champion", f"score.shadow={trees}", WINDOW, runs)
    table = predictions(scored.directory, store=str(folder / "store"))
    assert not np.array_equal(table["score"].to_numpy(), table["shadow_score"].to_numpy())
    explained = run(folder, "score", "score.model=tiny@champion", WINDOW, "score.reasons=2", runs)
    assert explained.record["chain"]["scores"] == scored.record["chain"]["scores"]
    assert "reason_2" in predictions(explained.directory, store=str(folder / "store")).column_names
    written = run(folder, "score", "score.model=tiny@champion", WINDOW, f"score.output={tmp_path / 'scores.csv'}", runs)
    assert (tmp_path / "scores.csv").read_text().count("\n") == table.num_rows + 1 and written.record["chain"]["scores"]
    watched = run(folder, "monitor", "monitor.model=tiny@champion", f"monitor.run={scored.directory}", runs)
    assert (watched.directory / "drift.json").exists()
    decided = run(folder, "retrain", *RETRAIN, "model=blend", MODELS, runs)
    decision = json.loads((decided.directory / "decision.json").read_text())
    assert decision["verdict"] and decision["challenger"] and decision["evidence"]
    challenger = Registry(root_of(tmp_path / "runs"), "tiny").find(decision["challenger"]).model
    assert isinstance(load(challenger).model, Blend)
    capsys.readouterr()
    for directory in (blend.directory, decision["challenger_run"], scored.directory):
        assert shell.main(["reproduce", str(directory), "--code", "current", "--json", runs]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["first_difference"] is None, found


@pytest.mark.slow
def test_a_challenger_cannot_start_from_a_champion_with_members(folder: Path, seeds: Any, tmp_path: Path) -> None:
    runs = f"paths.runs={tmp_path / 'runs'}"
    assert shell.main(["registry", "promote", "tiny", str(seeds.directory), runs]) == 0
    with pytest.raises(UserError, match="found a model with members"):
        run(folder, "retrain", *RETRAIN, "retrain.start=champion", runs)


@pytest.mark.slow
def test_a_backtest_replays_policies_of_seeds(folder: Path) -> None:
    done = run(folder, "backtest", *BACKTEST, *SEEDS, "resources.threads=1")
    policies = {item["name"]: item for item in json.loads((done.directory / "backtest.json").read_text())["policies"]}
    assert len(policies) > 1 and any(item["retrains"] for item in policies.values())


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_member_that_it_was_in(folder: Path, tmp_path: Path) -> None:
    words = (
        "train.seeds=3",
        "train.epochs=30",
        "train.patience=0",
        "train.checkpoint_every=5",
        f"paths.runs={tmp_path / 'runs'}",
    )
    config = ["--config-dir", str(folder / "conf"), *tiny.overrides(folder, *words)]
    started = subprocess.Popen(
        [sys.executable, "-m", "engine", "train", *config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    there = "runs/train/tiny/*/checkpoints/seed_1/checkpoints/step-*/manifest.json"
    while not list(tmp_path.glob(there)) and time.monotonic() < end:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    resumed, whole = run(folder, "train", *words), run(folder, "train", *words, "train.resume=never")
    assert resumed.metrics["resumed_from_step"] > 0 and resumed.directory != whole.directory
    assert resumed.record["chain"] == whole.record["chain"]


@pytest.mark.slow
def test_members_are_the_same_on_a_cluster(folder: Path) -> None:
    models = MODELS.replace("linear}", "mlp, hidden: [8]}, x: {kind: xgboost, trees: {rounds: 6}}")
    words = ("model=blend", models, "train.epochs=1")
    here = run(folder, "train", *words)
    there = folder / "on_ray"
    config = ["--config-dir", str(folder / "conf"), *tiny.overrides(folder, *words), f"paths.runs={there}"]
    command = [sys.executable, "-m", "engine", "train", *config, "cluster=ray", "cluster.workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (directory,) = there.glob("train/tiny/*")
    assert json.loads((directory / "run.json").read_text())["chain"] == here.record["chain"]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert any("net/train/loss" in line for line in lines) and any("x/train/loss" in line for line in lines)
