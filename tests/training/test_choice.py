"""model=auto: a stated table, resolved before anything is fitted, recorded, and kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from engine.config import schema
from engine.config.compose import compose
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime.run import Run
from engine.training import choice
from engine.training.choice import choose, rules
from tests.tiny import overrides, write_tiny

CONF = Path(__file__).parents[2] / "conf" / "model"
FAST = ("model=auto", "train.epochs=1", "evaluate.bootstrap=0", "features.windows=off", "model.trees.rounds=3")


def kind(config: Any, rows: int = 1000, features: int = 10) -> str:
    return next(kind for holds, kind, _ in rules(config, rows, features) if holds)


@pytest.fixture
def without_lightgbm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_trees_are_chosen_where_they_can_be_grown(config: Callable[..., Any]) -> None:
    pytest.importorskip("lightgbm")
    for loss in ("binary", "multiclass", "squared", "poisson"):
        assert kind(config(train__loss=loss)) == "lightgbm"
    for keys in (
        {"train__loss": "quantiles"},
        {"train__loss": "ordinal"},
        {"train__sampling": "balanced"},
        {"train__order": "windowed"},
    ):
        assert kind(config(**keys)) == "tabm"


@pytest.mark.usefixtures("without_lightgbm")
def test_networks_are_chosen_by_rows_and_features(config: Callable[..., Any]) -> None:
    assert kind(config(), 200_000, 10) == "tabm" and kind(config(), 200_001, 10) == "mlp"
    assert kind(config(), 10, 200_000) == "tabm"


@pytest.mark.usefixtures("without_lightgbm")
def test_a_chosen_tabm_is_that_of_its_own_file_and_keeps_what_was_asked(new_run: Callable[..., Run]) -> None:
    plain = compose(["model=auto"]).config
    run = new_run(plain)
    found = choose(plain, run, 1000, 10).model
    assert found == compose(["model=tabm"]).config.model
    run.finish({})
    own = compose(["model=auto", "model.hidden=[32]", "model.members=4"]).config
    run = new_run(own)
    assert (choose(own, run, 1000, 10).model.hidden, choose(own, run, 1000, 10).model.members) == ((32,), 4)
    run.finish({})
    stated = yaml.safe_load((CONF / "tabm.yaml").read_text())
    assert {
        "kind": "tabm",
        **{name: list(v) if isinstance(v, tuple) else v for name, v in choice.TABM.items()},
    } == stated


def test_another_kind_is_left_alone(config: Callable[..., Any], new_run: Callable[..., Run]) -> None:
    settings = config()
    run = new_run(settings)
    assert choose(settings, run, 10, 1) is settings and "chosen_model" not in run.record
    run.finish({})


def test_the_choice_is_said_recorded_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_run: Callable[..., Run]
) -> None:
    pytest.importorskip("lightgbm")
    folder = write_tiny(tmp_path, 400)
    run = engine.run("train", *overrides(folder, *FAST), config_dir=str(folder / "conf"))
    assert run.record["chosen_model"] == {"kind": "lightgbm"}
    assert run.record["config"]["model"]["kind"] == "auto", "the config is kept as it was asked"
    assert "model lightgbm by rule for" in (run.directory / "run.log").read_text()
    assert (
        "lightgbm, learning rate 0.05, at most leaves 31 (chosen by rule)"
        in (run.directory / "report.html").read_text()
    )
    monkeypatch.setattr(choice, "rules", lambda *_: iter([(True, "linear", "another rule")]))
    again = new_run(compose(overrides(folder, *FAST), str(folder / "conf")).config)
    again.note(chosen_model=run.record["chosen_model"])
    config = schema.build(type(compose([]).config), again.record["config"])
    assert choose(config, again, 10, 1).model.kind == "lightgbm"
    again.finish({})


@pytest.mark.slow
def test_a_rerun_and_a_continuation_keep_the_choice_where_the_rule_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path, 400)
    with monkeypatch.context() as earlier:
        earlier.setattr(choice, "rules", lambda *_: iter([(True, "linear", "an earlier rule")]))
        run = engine.run("train", *overrides(folder, *FAST), config_dir=str(folder / "conf"))
    found = reproduce_run(run.directory, Options(code="current", store=folder / "store"))
    assert found["first_difference"] is None and found["promise"] == "equal bits"
    more = engine.run(
        "train", *overrides(folder, *FAST, f"train.start_from={run.directory}"), config_dir=str(folder / "conf")
    )
    assert more.record["chosen_model"] == run.record["chosen_model"] == {"kind": "linear"}
