"""The backtest: the past as it would have been known then, several policies over shared work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.config import schema, units
from engine.config.sections.lifecycle import PolicyConfig, RetrainConfig
from engine.errors import UserError
from engine.lifecycle import backtest
from engine.runtime.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

WORDS = (
    "backtest.start=2020-01-11",
    "backtest.stop=2020-01-31",
    "backtest.period=5d",
    "retrain.judge_length=5d",
    "retrain.gate.confidence=0.6",  # five days are few
    "retrain.valid_length=2d",
    "retrain.gate.min_rows=100",
    "retrain.gate.bootstrap=40",
    "retrain.gate.min_slice_rows=100",
    "monitor.multivariate=false",
    "monitor.resamples=50",
    "split.train=[]",
    "split.valid=[]",
    "split.test=[]",
    "train.epochs=3",
    "retrain.cool_down=0s",
    "retrain.gate.max_ece_rise=0.5",
    "retrain.gate.max_cost_rise=0.5",
)


def run(folder: Path, *more: str) -> Run:
    return engine.run("backtest", *tiny.overrides(folder, *WORDS, *more), config_dir=str(folder / "conf"))


def result(done: Run) -> dict[str, Any]:
    found = json.loads((done.directory / "backtest.json").read_text())
    return {item["name"]: item for item in found["policies"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny(tmp_path_factory.mktemp("backtest"), rows=3000)


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    return run(folder)


def test_the_four_policies_are_replayed_period_by_period(done: Run) -> None:
    found = result(done)
    assert list(found) == ["never", "every", "drift", "performance"]
    for item in found.values():
        assert [row["period"] for row in item["periods"]] == ["2020-01-11", "2020-01-16", "2020-01-21", "2020-01-26"]
        for row in item["periods"]:
            assert {"period", "metric", "model", "retrained", "reason"} <= row.keys()
            assert 0.4 < row["metric"] < 1
    assert found["never"]["retrains"] == 0
    assert len({row["model"] for row in found["never"]["periods"]}) == 1
    assert [row["retrained"] for row in found["every"]["periods"]] == [False, True, True, True]
    for name in ("drift", "performance"):
        assert found[name]["retrains"] <= found["every"]["retrains"]
    assert found["never"]["gain_over_never"] == 0
    assert found["every"]["regret_to_every"] == 0


def test_a_period_is_served_by_the_champion_of_its_beginning(done: Run) -> None:
    for name, item in result(done).items():
        serving = item["periods"][0]["model"]
        for row in item["periods"][1:]:
            path = done.directory / "policies" / name / row["period"] / "decision.json"
            decision = json.loads(path.read_text())
            assert decision["champion" if decision["verdict"] != "promoted" else "challenger"] == row["model"]
            assert (row["model"] != serving) == row["promoted"]
            serving = row["model"]


def test_a_policy_pays_for_its_trainings_whoever_ran_them(folder: Path, done: Run) -> None:
    again = run(folder, "backtest.resume=never")  # trains nothing
    asked = 0
    for directory, found in ((done.directory, result(done)), (again.directory, result(again))):
        for name, item in found.items():
            for row in item["periods"][1:]:
                decision = json.loads((directory / "policies" / name / row["period"] / "decision.json").read_text())
                if decision["challenger"] is None:
                    continue
                asked += 1
                training = json.loads((Path(decision["challenger_run"]) / "run.json").read_text())
                assert row["seconds"] > training["seconds"] > 0
    assert asked > 2 * 3  # more than `every` alone


def test_a_decision_knows_nothing_of_its_future(done: Run) -> None:
    for path in done.directory.glob("policies/*/*/decision.json"):
        decision = json.loads(path.read_text())
        now = units.instant(path.parent.name, "UTC")
        assert decision["facts"]["now"] == now
        assert all(item["stop"] <= now for item in decision["facts"]["observations"])
        assert decision["periods"]["stop"] <= now
        if decision["challenger"] is not None:
            split = json.loads((Path(decision["challenger_run"]) / "run.json").read_text())["config"]["split"]
            assert units.instant(split["known_by"], "UTC") == now
            assert units.instant(split["valid"][1], "UTC") <= decision["periods"]["judge"] < now


def test_policies_and_a_second_backtest_share_trainings(folder: Path, done: Run) -> None:
    runs = folder / "store" / "backtest" / "train" / "tiny"
    trained = {path.parent.name for path in runs.glob("*/DONE")}
    assert len(trained) == 4  # the first model and one a boundary, whichever policies asked
    monitored = len(list((folder / "store" / "backtest" / "monitor").glob("*.json")))
    again = run(folder, "backtest.resume=never")
    assert {path.parent.name for path in runs.glob("*/DONE")} == trained
    assert len(list((folder / "store" / "backtest" / "monitor").glob("*.json"))) == monitored
    for name, item in result(again).items():
        assert [row["metric"] for row in item["periods"]] == [row["metric"] for row in result(done)[name]["periods"]]


def test_the_report_shows_every_policy_and_every_refusal(done: Run) -> None:
    text = (done.directory / "report.html").read_text()
    refused = [row for item in result(done).values() for row in item["periods"] if row.get("verdict") == "kept"]
    for word in ("never", "every", "drift", "performance", "Challengers that the gate refused"):
        assert word in text
    assert text.count("hurt by") + text.count("helped by") == len(refused)
    assert all("refused_metric" in row for row in refused)
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_policy_differs_from_retrain_only_where_it_says() -> None:
    base = schema.build(RetrainConfig, {"cool_down": "3d", "budget": 4})
    policy = schema.build(PolicyConfig, {"triggers": ["drift"], "window": "sliding", "window_length": "30d"})
    found = backtest.policy_config(base, policy)
    assert (found.triggers, found.window, found.window_length) == (("drift",), "sliding", "30d")
    assert (found.cool_down, found.budget) == ("3d", 4)


def test_months_follow_the_local_calendar() -> None:
    zone = "America/New_York"
    start = units.instant("2013-10", zone)
    assert backtest.next_month(start, zone) == units.instant("2013-11", zone)
    assert backtest.next_month(units.instant("2013-11", zone), zone) == units.instant("2013-12", zone)
    assert backtest.next_month(units.instant("2013-12", zone), zone) == units.instant("2014-01", zone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("backtest.start=2021-01-01", "backtest.stop=null"), "must be before the end of the data"),
        (("backtest.start=null",), "backtest.start must be the start"),
        (("backtest.start=soon",), "backtest.start: an instant must be .*, found 'soon'"),
        (("backtest.start=2020-01-31T05:00",), "backtest.stop must be after backtest.start"),
        (("backtest.period=moon",), "a span must be a number"),
    ],
)
def test_a_backtest_without_periods_is_refused(folder: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, *more)


def test_a_backtest_that_was_interrupted_goes_on_in_its_directory(
    folder: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("backtest.policies.drift.budget=9",)  # another plan than the fixture's, with the same outcome
    with monkeypatch.context() as patched:
        patched.setattr(backtest, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, *words)
    again = run(folder, *words)
    assert again.resumed
    for name, item in result(again).items():
        assert [row["model"] for row in item["periods"]] == [row["model"] for row in result(done)[name]["periods"]]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.ray
def test_trainings_in_parallel_on_ray_give_the_same_backtest(
    done: Run, tmp_path: Path, process: Callable[..., Any]
) -> None:
    other = tiny.write_tiny(tmp_path / "ray", rows=3000)
    ray = ("cluster=ray", "cluster.workers=2", "cluster.threads=1", "--config-dir", str(other / "conf"))
    ended = process("backtest", *tiny.overrides(other, *WORDS, *ray), timeout=600)
    assert ended.code == 0, ended.err
    assert "a training in advance failed" not in ended.err
    assert ended.err.count("was trained on the same rows") >= 3
    record = json.loads((ended.directory / "backtest.json").read_text())
    columns = ("period", "metric", "model", "retrained", "promoted")
    for item in record["policies"]:
        mine = result(done)[item["name"]]["periods"]
        assert [[row[key] for key in columns] for row in item["periods"]] == [
            [row[key] for key in columns] for row in mine
        ]
