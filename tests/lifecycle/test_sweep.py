"""The sweep: the same trials, cuts and best config whatever finishes first and however often it is killed."""

from __future__ import annotations

import json
import os
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
from engine.__main__ import main
from engine.config import compose, override_values
from engine.errors import UserError
from engine.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

from tests.runtime.test_stalls import tree

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "train.lr": {"log": [0.001, 0.1]},
    "model.hidden": {"choice": [[4], [8, 8]]},
    "model.dropout": {"uniform": [0.0, 0.4], "when": {"model.hidden": [[8, 8]]}},
}
WORDS = ("sweep.trials=4", "sweep.round=2", "sweep.best=2", "sweep.seeds=2", "evaluate.bootstrap=0")


def words(folder: Path, *more: str, space: dict[str, Any] = SPACE) -> list[str]:
    (folder / "conf" / "sweep").mkdir(exist_ok=True)
    (folder / "conf" / "sweep" / "mine.yaml").write_text(json.dumps({"space": space}))
    return [*tiny.overrides(folder, "+sweep=mine", *WORDS, *more)]


def run(folder: Path, *more: str, space: dict[str, Any] = SPACE) -> Run:
    return engine.run("sweep", *words(folder, *more, space=space), config_dir=str(folder / "conf"))


def record(done: Run | Path) -> dict[str, Any]:
    directory = done if isinstance(done, Path) else done.directory
    return json.loads((directory / "sweep.json").read_text())


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same each time: not seconds, and not where runs are."""
    trials = [
        {name: item for name, item in trial.items() if name not in ("run", "seconds")} for trial in found["trials"]
    ]
    seeds = [{name: item for name, item in entry.items() if name != "runs"} for entry in found["seeds"]]
    best = {name: item for name, item in found["best"].items() if name != "run"}
    return {"trials": trials, "seeds": seeds, "best": best, "importance": found["importance"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("sweep"), rows=600)


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    return run(folder)


def test_trials_are_recorded_in_order_with_their_values_and_figures(done: Run) -> None:
    found = record(done)
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2, 3]
    for trial in found["trials"]:
        assert trial["state"] == "done"
        assert 0.001 <= trial["values"]["train.lr"] <= 0.1
        assert ("model.dropout" in trial["values"]) == (trial["values"]["model.hidden"] == [8, 8])
        metrics = json.loads((Path(trial["run"]) / "metrics.json").read_text())
        assert metrics["valid/roc_auc"] == trial["value"]
        saved = json.loads((Path(trial["run"]) / "run.json").read_text())["config"]
        assert saved["train"]["lr"] == trial["values"]["train.lr"]
        assert saved["model"]["hidden"] == trial["values"]["model.hidden"]


def test_the_best_is_chosen_by_new_seeds_and_says_by_how_much_the_search_was_too_good(done: Run) -> None:
    found = record(done)
    default, *others = found["seeds"]
    assert default["number"] is None and len(others) == 2
    ranked = sorted(found["trials"], key=lambda trial: -trial["value"])
    assert [item["number"] for item in others] == [trial["number"] for trial in ranked[:2]]
    best = max(others, key=lambda item: sum(item["valid"]))
    assert found["best"]["number"] == best["number"]
    assert found["best"]["test"] == pytest.approx(sum(best["test"]) / 2)
    searched = next(trial["value"] for trial in found["trials"] if trial["number"] == best["number"])
    assert found["best"]["too_good_by"] == pytest.approx(searched - sum(best["valid"]) / 2)
    seeds = [json.loads((Path(place) / "run.json").read_text())["config"]["train"]["seed"] for place in best["runs"]]
    assert seeds == [1, 2]


def test_the_best_config_is_a_file_and_the_report_has_every_trial(done: Run) -> None:
    text = (done.directory / "best.yaml").read_text()
    assert f"lr: {record(done)['best']['values']['train.lr']}" in text
    page = (done.directory / "report.html").read_text()
    assert "Values and what came of them" in page and page.count("<svg") >= 2


def test_a_second_sweep_finds_every_training_of_the_first(folder: Path, done: Run) -> None:
    before = len(list((folder / "runs" / "train" / "tiny").glob("*")))
    again = run(folder)
    assert lasting(record(again)) == lasting(record(done))
    assert len(list((folder / "runs" / "train" / "tiny").glob("*"))) == before


def test_a_rung_cuts_the_same_trials_and_a_cut_trial_can_be_continued(folder: Path) -> None:
    more = ("sweep.rungs=[1]", "sweep.keep=0.5", "train.epochs=3")
    found = record(run(folder, *more))
    states = [trial["state"] for trial in found["trials"]]
    rows = {trial["state"]: trial["rows"] for trial in found["trials"]}
    assert rows["done"] == 3 * rows["cut"] > 0
    assert states.count("cut") == 2 and states.count("done") == 2
    for first in (0, 2):
        pair = found["trials"][first : first + 2]
        kept, cut = sorted(pair, key=lambda trial: -trial["rungs"][0])
        assert (kept["state"], cut["state"]) == ("done", "cut")
        assert cut["value"] == cut["rungs"][0]
        history = json.loads((Path(cut["run"]) / "run.json").read_text())
        assert history["status"] == "interrupted"
    again = record(run(folder, *more))
    assert lasting(again) == lasting(found), "trials that are finished by now have at the rung what they had"
    cut = next(trial for trial in found["trials"] if trial["state"] == "cut")
    changed = [f"{name}={json.dumps(value)}" for name, value in cut["values"].items()]
    overrides = [word for word in words(folder, *more) if not word.startswith(("sweep.", "+sweep"))]
    continued = engine.run("train", *overrides, *changed, f"train.resume={cut['run']}", config_dir=str(folder / "conf"))
    assert str(continued.directory) == cut["run"]
    assert continued.metrics["valid/roc_auc"] is not None


def test_a_trial_that_fails_is_recorded_with_its_cause_and_the_sweep_goes_on(folder: Path) -> None:
    space = {"train.batch_size": {"choice": [128, 8]}, "train.shards": {"choice": [8, 16]}}
    found = record(run(folder, "sweep.sampler=grid", "sweep.seed=1", space=space))
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert len(found["trials"]) == 4 and len(failed) == 1
    assert len({json.dumps(trial["values"]) for trial in found["trials"]}) == 4
    assert "batch_size must be at least shards=16, found 8" in failed[0]["cause"]


def test_no_round_begins_once_the_rows_are_used_up(folder: Path, done: Run) -> None:
    first = record(done)["trials"]
    metrics = json.loads((Path(first[0]["run"]) / "metrics.json").read_text())
    assert first[0]["rows"] == metrics["train/rows"] * metrics["train/epochs"] > 0
    used = first[0]["rows"] + first[1]["rows"]
    assert len(record(run(folder, f"sweep.rows={used}"))["trials"]) == 2
    assert len(record(run(folder, "sweep.seconds=0.000001"))["trials"]) == 2


def test_compare_takes_a_sweep_and_its_best_becomes_the_challenger_by_one_command(
    done: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"]
    assert main(["compare", str(done.directory), "--json", *paths]) == 0
    compared = json.loads(capsys.readouterr().out)
    found = record(done)
    assert [item["directory"] for item in compared["runs"]] == [entry["runs"][0] for entry in found["seeds"]]
    assert len(compared["config"]["train.lr"]) == 3
    assert main(["registry", "promote", "swept", found["seeds"][0]["runs"][0], *paths]) == 0
    assert main(["registry", "challenge", "swept", str(done.directory), *paths]) == 0
    assert main(["registry", "challenge", "swept", str(done.directory), *paths]) == 0
    assert "is the challenger already" in capsys.readouterr().out
    assert main(["registry", "show", "swept@challenger", *paths]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == found["best"]["run"]


def test_compare_says_that_the_search_found_nothing_better(
    done: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done.directory, copy := tmp_path / "sweep")
    found = record(done)
    found["seeds"] = [found["seeds"][0], {**found["seeds"][0], "number": 1}]
    (copy / "sweep.json").write_text(json.dumps(found))
    assert main(["compare", str(copy), f"paths.runs={folder / 'runs'}"]) == 0
    assert "found nothing better than the config" in capsys.readouterr().out
    assert main(["compare", str(copy), "--json", f"paths.runs={folder / 'runs'}"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 3}, "trials must be a list"),
        ({"best": {"number": 1, "values": {}, "run": 7}}, "best: run must be text"),
        ({"format": 2}, "format must be 1"),
    ],
)
def test_a_damaged_sweep_is_a_sentence(
    change: dict[str, Any], message: str, done: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(done.directory, tmp_path / "sweep")
    (copy / "seal.json").unlink()
    (copy / "sweep.json").write_text(json.dumps({**record(done), **change}))
    assert main(["compare", str(copy), f"paths.runs={tmp_path}"]) == 1
    assert message in capsys.readouterr().err


def test_words_with_several_values_are_the_space_of_a_sweep(folder: Path) -> None:
    words = ("train.lr=tag(log,interval(0.001,0.1))", "model.hidden=choice([4],[8,8])", "model.dropout=interval(0,0.4)")
    composed = compose.compose(
        override_values.searched([*tiny.overrides(folder, *words), "train.epochs=range(1,3)"]), str(folder / "conf")
    )
    space = composed.config.sweep.space
    assert space["train.lr"].log == (0.001, 0.1) and space["model.hidden"].choice == ([4], [8, 8])
    assert space["model.dropout"].uniform == (0, 0.4) and space["train.epochs"].choice == (1, 2)
    with pytest.raises(UserError, match="`engine sweep --multirun` searches"):
        override_values.combinations(["train.lr=interval(0,1)"])


def test_a_word_replaces_the_values_of_a_file(folder: Path) -> None:
    given = override_values.searched(words(folder, "train.lr=0.01,0.02", "model.hidden=int(interval(1,4))"))
    space = compose.compose(given, str(folder / "conf")).config.sweep.space
    assert space["train.lr"].kind == "choice" and space["train.lr"].choice == (0.01, 0.02)
    assert space["model.hidden"].int == (1, 4)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space must name at least one key"),
        ({"train.lrr": {"log": [0.1, 1]}}, "sweep.space.train.lrr must be a key of"),
        ({"train.lr": {"log": [0.0, 1]}}, "log must begin above 0"),
        ({"train.lr": {"log": [0.1, 0.01]}}, "log must be two numbers, the lower one first"),
        ({"train.lr": {"choice": []}}, "must have one of log, uniform, int, choice with values, found none"),
        ({"train.lr": {"choice": [0.1, -1.0]}}, "sweep.space.train.lr: train.lr must be greater than 0, found -1.0"),
        ({"train.lr": {"uniform": [0.1, 1], "log": [0.1, 1]}}, "found log and uniform"),
        ({"cluster.workers": {"int": [1, 2]}}, "sweep.space.cluster.workers must be a key of model"),
        (
            {"train.lr": {"log": [0.1, 1], "when": {"model.kin": "mlp"}}},
            "when must name keys of the config, found 'model.kin'",
        ),
        (
            {"train.lr": {"log": [0.1, 1], "when": {"model.kind": "mlp"}}, "model.kind": {"choice": ["mlp", "linear"]}},
            "when must name keys before it, found 'model.kind'",
        ),
        ({"train.seed": {"int": [1, 2]}}, "sweep.space.train.seed must not be searched"),
    ],
)
def test_a_bad_space_is_one_error_before_anything_runs(space: dict[str, Any], message: str, folder: Path) -> None:
    before = set((folder / "runs").rglob("run.json"))
    with pytest.raises(UserError) as raised:
        run(folder, space=space)
    assert message in str(raised.value)
    assert set((folder / "runs").rglob("run.json")) == before


def test_a_pause_leaves_the_weights_as_they_would_have_been(folder: Path) -> None:
    config_dir = str(folder / "conf")
    plain = engine.run("train", *tiny.overrides(folder, "train.seed=9"), config_dir=config_dir)
    with pytest.raises(KeyboardInterrupt, match="paused after epoch 1"):
        engine.run(
            "train",
            *tiny.overrides(folder, "train.seed=9", "train.pause_after=1", "train.resume=never"),
            config_dir=config_dir,
        )
    continued = engine.run("train", *tiny.overrides(folder, "train.seed=9"), config_dir=config_dir)
    assert continued.directory != plain.directory
    assert continued.record["chain"]["weights"] == plain.record["chain"]["weights"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "engine", "sweep", *words(folder, *more), "--config-dir", str(folder / "conf")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_killed_sweeps_come_to_the_same_result(done: Run, tmp_path: Path) -> None:
    folder = tiny.write_tiny(tmp_path, rows=600)
    for seconds in (2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0):
        process = start(folder)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, err = start(folder).communicate()
    assert lasting(record(folder / out.splitlines()[-1])) == lasting(record(done)), err


@pytest.mark.slow
def test_sweeps_whose_workers_are_killed_come_to_the_same_result(done: Run, tmp_path: Path) -> None:
    folder, killed, random = tiny.write_tiny(tmp_path, rows=600), 0, np.random.default_rng(0)
    process = start(folder, "cluster=ray", "sweep.parallel=2", "cluster.retries=20")
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until and killed < 10:
        time.sleep(float(random.uniform(0.3, 2.0)))
        actors = [pid for pid, kind in tree(process.pid).items() if kind == "actor"]
        for pid in actors[:1]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
    out, err = process.communicate()
    assert killed >= 3, err
    assert lasting(record(folder / out.splitlines()[-1])) == lasting(record(done)), err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_sweeps_on_ray_come_to_the_same_result(parallel: int, done: Run, tmp_path: Path) -> None:
    folder = tiny.write_tiny(tmp_path, rows=600)
    out, err = start(folder, "cluster=ray", f"sweep.parallel={parallel}").communicate()
    assert lasting(record(folder / out.splitlines()[-1])) == lasting(record(done)), err
