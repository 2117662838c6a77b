"""Retraining end to end: who serves afterwards, whatever happens on the way."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine import __main__ as shell
from engine.config import schema
from engine.config.sections.lifecycle import GateConfig
from engine.errors import UserError
from engine.lifecycle import decide
from engine.lifecycle.challenger import Workshop
from engine.lifecycle.challenger_gate import verdict
from engine.runtime.registry import Registry, resolve
from engine.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["engine.lifecycle.retrain", "engine.api"])
WEAK = (
    "split.train=[2020-01-01,2020-01-03]",
    "split.valid=[2020-01-03,2020-01-05]",
    "split.test=[]",
    "train.lr=0.0001",
)
RETRAIN = (
    "retrain.now=2020-01-29",
    "retrain.triggers=[always]",
    "retrain.cool_down=0s",
    "retrain.judge_length=8d",
    "retrain.gate.confidence=0.6",  # eight days are few
    "retrain.valid_length=2d",
    "retrain.gate.min_rows=200",
    "retrain.gate.min_slice_rows=100",
    "retrain.gate.bootstrap=60",
    "retrain.gate.max_ece_rise=0.2",
    "retrain.gate.max_cost_rise=0.5",
    "train.epochs=3",
    "split.train=[]",
    "split.valid=[]",
    "split.test=[]",
)


def words(folder: Path, *more: str) -> list[str]:
    return tiny.overrides(folder, *more)


def run(command: str, folder: Path, *more: str) -> Run:
    return engine.run(command, *words(folder, *more), config_dir=str(folder / "conf"))


def registry(folder: Path) -> Registry:
    return Registry(folder / "runs" / "registry", "tiny")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, features and a weak first champion."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("retrain"), rows=4000)
    first = run("train", folder, *WEAK)
    assert shell.main(["registry", "promote", "tiny", str(first.directory), f"paths.runs={folder / 'runs'}"]) == 0
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def decision_of(done: Run) -> dict[str, Any]:
    return dict(json.loads((done.directory / "decision.json").read_text()))


# ------------------------------------------------------------------------------------------------------ verdicts


def test_a_better_challenger_is_promoted_serves_and_is_rolled_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = registry(folder).state().champion
    done = run("retrain", folder, *RETRAIN)
    decision = decision_of(done)
    assert decision["verdict"] == "promoted"
    assert decision["evidence"]["metric"]["low"] > 0
    new = registry(folder).state().champion
    assert new == decision["challenger"] != old
    between = "score.between=[2020-01-29,2020-01-31]"
    served = run("score", folder, "score.model=tiny@champion", between)
    assert served.record["model"] == new
    paths = f"paths.runs={folder / 'runs'}"
    assert shell.main(["registry", "rollback", "tiny", paths, "registry.why=an incident", "registry.who=ann"]) == 0
    assert registry(folder).state().champion == old
    assert run("score", folder, "score.model=tiny@champion", between).record["model"] == old
    last = registry(folder).state().moves[-1]
    assert (last["action"], last["who"], last["why"]) == ("rollback", "ann", "an incident")
    capsys.readouterr()
    assert shell.main(["registry", "show", "tiny", paths]) == 0
    shown = capsys.readouterr().out
    assert "an incident" in shown
    assert done.directory.name in shown
    assert shell.main(["registry", "list", "--json", paths]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["champion"], row["versions"]) for row in listed] == [("tiny", old, 2)]
    assert shell.main(["registry", "show", f"tiny@{new[:10]}", paths]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == new
    assert shell.main(["registry", "diff", "tiny", "champion", new[:10], paths]) == 2
    assert "split.train" in capsys.readouterr().out


def test_a_worse_challenger_is_kept_out_with_both_scores_in_the_history(folder: Path) -> None:
    run("retrain", folder, *RETRAIN)
    champion = registry(folder).state().champion
    done = run(
        "retrain",
        folder,
        *RETRAIN,
        "retrain.now=2020-01-30",
        "retrain.judge_length=6d",
        "train.lr=0.000001",
        "train.epochs=1",
    )
    decision = decision_of(done)
    assert decision["verdict"] == "kept"
    assert "must be above" in decision["reasons"][0]
    assert (decision["looks"]["number"], decision["evidence"]["looks"]["number"]) == (0, 1), "a new champion"
    assert decide.looks_of(registry(folder).state(), champion, "next").plain() == decision["evidence"]["looks"]
    assert registry(folder).state().champion == champion
    ending = registry(folder).state().moves[-1]
    assert ending["decision"]["scores"] == {
        side: decision["evidence"]["metric"][side] for side in ("champion", "challenger")
    }


@pytest.mark.parametrize(
    ("more", "verdict", "reason"),
    [
        (("retrain.triggers=[drift]",), "quiet", "alarm in 0 of the 1"),
        (
            ("retrain.triggers=[age]", "retrain.max_age=5d", "retrain.gate.min_rows=100000"),
            "held",
            "mature rows are new",
        ),
        (
            ("retrain.now=2020-01-05",),
            "held",
            "no labelled row is new since the champion was trained: it saw rows until",
        ),
        (
            ("retrain.maturity=400d",),
            "held",
            "a row counts when it is 400.0 days old, retrain.maturity=400d: the first",
        ),
    ],
)
def test_not_to_retrain_is_an_ordinary_verdict(folder: Path, more: tuple[str, ...], verdict: str, reason: str) -> None:
    decision = decision_of(run("retrain", folder, *RETRAIN, *more))
    assert decision["verdict"] == verdict
    assert reason in "; ".join(decision["reasons"])
    assert decision["challenger"] is None
    assert len(registry(folder).state().moves) == 1


def test_repeated_alarms_within_the_cool_down_train_once(folder: Path) -> None:
    cool = (*RETRAIN, "retrain.cool_down=7d")
    assert decision_of(run("retrain", folder, *cool))["challenger"] is not None
    again = decision_of(run("retrain", folder, *cool, "retrain.now=2020-01-30"))
    assert (again["verdict"], again["challenger"]) == ("held", None)
    assert "cool_down" in again["reasons"][0]


def test_a_replay_gives_the_same_verdict_and_notices_a_change(folder: Path) -> None:
    done = run("retrain", folder, *RETRAIN)
    path = done.directory / "decision.json"
    command = ["retrain", "--replay", str(path), f"paths.runs={folder / 'runs'}"]
    moves = len(registry(folder).state().moves)
    assert shell.main(command) == 0
    assert len(registry(folder).state().moves) == moves
    saved = json.loads(path.read_text())
    saved["verdict"] = "kept"
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"decision\.json is damaged"):
        decide_again(path, folder)
    path.with_name("seal.json").unlink()  # as an older engine wrote it, the decision is compared with its evidence
    with pytest.raises(UserError, match="verdict was 'kept', is now 'promoted'"):
        decide_again(path, folder)
    saved["verdict"] = "promoted"
    saved["policy"]["gate"]["min_gain"] = 0.9
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="verdict was 'promoted', is now 'kept'"):
        decide_again(path, folder)
    saved["policy"]["gate"]["min_gain"] = None
    saved["format"], metric = 3, saved["evidence"]["metric"]  # whose intervals came from other draws
    metric["low"] *= 1.1
    saved["reasons"] = verdict(saved["evidence"], schema.build(GateConfig, saved["policy"]["gate"]))[1]
    path.write_text(json.dumps(saved))
    decide_again(path, folder)
    metric["champion"] += 0.1
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="evidence was"):
        decide_again(path, folder)
    judged = path.with_name("judged.parquet")
    judged.write_bytes((folder / "visits.parquet").read_bytes())
    with pytest.raises(UserError, match="found others"):
        decide_again(path, folder)


def decide_again(path: Path, folder: Path) -> Run:
    return engine.run("retrain", f"retrain.replay={path}", f"paths.runs={folder / 'runs'}")


def test_without_a_champion_retrain_says_how_to_make_one(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "registry")
    with pytest.raises(UserError, match="registry promote tiny RUN"):
        run("retrain", folder, *RETRAIN)


def test_the_newest_monitoring_record_is_what_retrain_decides_on(folder: Path) -> None:
    watch = ("monitor.model=tiny@champion", "monitor.multivariate=false", "monitor.resamples=50")
    run("monitor", folder, *watch, "monitor.window=[2020-01-12,2020-01-19]")
    newest = run("monitor", folder, *watch, "monitor.window=[2020-01-19,2020-01-26]")
    record = json.loads((newest.directory / "drift.json").read_text())
    words = [word for word in RETRAIN if not word.startswith(("retrain.now", "retrain.triggers"))]
    decision = decision_of(run("retrain", folder, *words, "retrain.triggers=[drift,performance]"))
    assert decision["now"].startswith("2020-01-26T00:00")
    assert decision["monitor"] == str(newest.directory / "drift.json")
    first, last = decision["facts"]["observations"]
    assert (first["stop"], last["model"]) == (last["start"], record["model"])
    assert last["metric"] == pytest.approx(record["performance"]["metrics"]["roc_auc"]["value"])
    assert last["alarm"] == any(item["kind"] == "drift" for item in [*record["alarms"], *record["noted"]])
    dropped = decision["facts"]["champion"]["metric"] - last["metric"] > 0.01
    assert (decision["verdict"] == "quiet") == (not last["alarm"] and not dropped)


def test_the_champion_is_held_to_its_own_figure_of_the_judged_metric(folder: Path) -> None:
    """A model promoted by its area is not measured against that when the gate watches the log loss."""
    facts = registry(folder).find("champion").facts
    assert facts["metric"]["name"] == "roc_auc"
    quiet = ("retrain.triggers=[drift]", "retrain.gate.metric=log_loss")
    first = decision_of(run("retrain", folder, *RETRAIN, *quiet))
    assert first["facts"]["champion"]["metric"] == facts["metrics"]["valid/log_loss"]
    judged = decision_of(run("retrain", folder, *RETRAIN))  # promotes by roc_auc
    measured = registry(folder).find("champion").facts["metrics"]
    figures = {
        name: decide.champion_of(registry(folder), registry(folder).state(), name)[1].metric
        for name in ("roc_auc", "log_loss")
    }
    assert figures == {"roc_auc": judged["evidence"]["metric"]["challenger"], "log_loss": measured["valid/log_loss"]}
    with pytest.raises(UserError, match=r"retrain\.gate\.metric must be"):
        run("retrain", folder, *RETRAIN, "retrain.gate.metric=mae")


# -------------------------------------------------------------------------------------------------- field report K1


def test_of_two_retrains_that_answer_the_same_alarm_at_once_one_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins between this one's look at the history and its own beginning."""
    real, once = Registry.move, []

    def overtaken(self: Registry, action: str, to: str | None, **options: Any) -> dict[str, Any]:
        if not once:
            once.append(action)
            begin = {**options, "decision": {**options["decision"], "id": "another"}}
            real(self, action, to, **begin)
        return real(self, action, to, **options)

    monkeypatch.setattr(Registry, "move", overtaken)
    decision = decision_of(run("retrain", folder, *RETRAIN, "retrain.cool_down=7d"))
    assert (decision["verdict"], decision["challenger"]) == ("held", None)
    assert "retrain.cool_down=7d" in decision["reasons"][0]
    assert [move["action"] for move in registry(folder).state().moves] == ["promote", "note"]
    assert len(list(folder.glob("runs/train/tiny/*/DONE"))) == 1


def test_scores_that_are_not_finite_keep_the_champion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = registry(folder).state().champion
    real = Workshop.scores

    def broken(self: Workshop, predictor: Any, rows: tuple[int, int]) -> Any:
        scores = real(self, predictor, rows)
        return scores if predictor.digest == old else np.full_like(scores, np.nan)

    monkeypatch.setattr(Workshop, "scores", broken)
    decision = decision_of(run("retrain", folder, *RETRAIN))
    assert decision["verdict"] == "kept"
    assert "undefined metric never wins" in decision["reasons"][0]
    assert decision["evidence"]["metric"]["challenger"] is None
    assert registry(folder).state().champion == old


def test_an_artefact_replaced_after_it_was_scored_is_not_promoted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = registry(folder).state().champion
    real = decide._carry_out

    def swapped(setting: Any, decision: Any, champion: Any, challenger: Any) -> Any:
        (challenger.model / "model.safetensors").write_bytes(b"another model")
        return real(setting, decision, champion, challenger)

    monkeypatch.setattr(decide, "_carry_out", swapped)
    with pytest.raises(UserError, match="it was replaced"):
        run("retrain", folder, *RETRAIN)
    assert registry(folder).state().champion == old


def _meet_at_the_end(folder: str, seed: int, barrier: Any) -> None:
    real, waited = decide._carry_out, []

    def together(*arguments: Any) -> Any:
        if not waited:
            waited.append(True)
            barrier.wait(120)
        return real(*arguments)

    decide._carry_out = together
    run("retrain", Path(folder), *RETRAIN, f"train.seed={seed}")


def test_of_two_retrains_that_end_together_the_second_is_judged_against_the_first(folder: Path) -> None:
    barrier = SERVER.Barrier(2)
    processes = [SERVER.Process(target=_meet_at_the_end, args=(str(folder), seed, barrier)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    state = registry(folder).state()
    endings = [move for move in state.moves if (move["decision"] or {}).get("kind") == "end"]
    assert len(endings) == 2
    winner, second = (move["decision"]["record"] for move in endings)
    assert winner["verdict"] == "promoted"
    assert second["champion"] == winner["challenger"]  # judged anew, against the one that was quicker
    last = second["challenger"] if second["verdict"] == "promoted" else winner["challenger"]
    assert state.champion == last
    verdicts = sorted(
        json.loads(path.read_text())["verdict"] for path in folder.glob("runs/retrain/tiny/*/decision.json")
    )
    assert verdicts == sorted([winner["verdict"], second["verdict"]])


# ---------------------------------------------------------------------------------------------------------- kills


def _killed(folder: str, target: str, call: int, after: bool) -> None:
    """Retrain, killed before or after the n-th call of a function."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real: Callable[..., Any] = getattr(owner, name)
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        mine = count == call
        if mine and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(*arguments, **options)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, counted)
    run("retrain", Path(folder), *RETRAIN)


MOVE = "engine.runtime.registry:Registry.move"
KILLS = [
    ("engine.lifecycle.trainings:train", 1, False),
    ("engine.training.train:write_model", 1, False),
    ("engine.lifecycle.trainings:train", 1, True),
    (MOVE, 1, False),
    (MOVE, 1, True),
    ("engine.runtime.registry:Registry.register", 1, True),
    (MOVE, 2, True),
    (MOVE, 3, False),
    (MOVE, 3, True),
]


@pytest.mark.parametrize(("target", "call", "after"), KILLS)
def test_a_kill_anywhere_leaves_one_champion_and_a_rerun_completes(
    folder: Path, target: str, call: int, after: bool
) -> None:
    old = registry(folder).state().champion
    process = SERVER.Process(target=_killed, args=(str(folder), target, call, after))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    champion = registry(folder).state().champion
    assert (champion != old) == ((target, call, after) == (MOVE, 3, True))
    assert resolve("tiny@champion", folder / "runs") is not None  # whole: every file is checked
    done = run("retrain", folder, *RETRAIN)
    state = registry(folder).state()
    assert done.resumed
    assert decision_of(done)["verdict"] == "promoted"
    assert state.champion == decision_of(done)["challenger"]
    assert [move["action"] for move in state.moves] == ["promote", "note", "challenge", "promote"]
    assert len(list(folder.glob("runs/train/tiny/*/DONE"))) == 2  # the first model and one challenger
    assert decide.replay(done.directory / "decision.json")[1] == []
