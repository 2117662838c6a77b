"""Losses and metrics of a user's file or package: the bytes of the engine's own, every command, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import engine
from engine import __main__ as shell
from engine.config import plugins
from engine.config.compose import compose
from engine.config.plugins import Plugin
from engine.config.sections.training import EvaluateConfig, TrainConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime.run import Run, plan_digest
from engine.scoring.read import predictions
from engine.training.bundle import read_bundle
from engine.training.evaluate import Scored, intervals, point_metrics
from engine.training.losses import LOSSES, _named, derivatives, loss_of, loss_record, recorded_loss
from engine.training.metrics import find_metric
from engine.training.user_losses import user_loss, user_metric
from tests.tiny import overrides, write_tiny
from tests.training.conftest import weights_of

CODE = '''import numpy as np
import torch


def plain(outputs, target):
    return (outputs[:, 0] - target).square()


plain.task = "regression"
plain.metric = "rmse"


class Surprise:
    """Cross-entropy of class 1 with a margin, watched by the share of right decisions."""

    task = "binary"
    metric = "right"

    def row_losses(self, outputs, target):
        return torch.nn.functional.softplus((1 - 2 * target) * outputs[:, 0])

    def scores(self, outputs):
        return 1 / (1 + np.exp(-outputs[:, 0]))


class Normal:
    """Mean and spread of a normal distribution."""

    task, outputs = "regression", 2

    def row_losses(self, outputs, target):
        return outputs[:, 1] + (target - outputs[:, 0]).square() * torch.exp(-2 * outputs[:, 1]) / 2

    def scores(self, outputs):
        return outputs[:, 0]


def right(target, scores, weight):
    return float(np.average((scores > 0.5) == (target == 1), weights=weight))


right.higher_is_better = True
right.label = "Right decisions"


def away(target, scores, weight):
    return np.average(np.abs(target - scores), weights=weight)


away.higher_is_better = False


class apart:
    """As `away`, from sums of rows."""

    higher_is_better = False

    def columns(self, target, scores):
        return np.stack([np.abs(target - scores), np.ones(len(target))], axis=1)

    def value(self, sums):
        return sums[:, 0] / sums[:, 1]
'''


def held(code: str = CODE) -> Callable[[str], str]:
    """`name` -> `name@digest` of code that this process may run."""
    plugin = Plugin("losses.py", code.encode())
    plugins.add([plugin])
    return lambda name: f"{name}@{plugin.digest}"


def test_a_loss_of_the_user_trains_to_the_bytes_of_the_engines_own(problem, config, fitted) -> None:
    data = problem(300, task="regression")
    ours, _ = fitted(config(train__loss="squared"), data, data)
    theirs, _ = fitted(config(train__loss=held()("plain")), data, data)
    assert weights_of(ours.model) == weights_of(theirs.model)
    assert ours.history == theirs.history


def test_a_regression_may_have_several_outputs(problem, config, fitted) -> None:
    data = problem(2000, task="regression")
    settings = config(
        train__loss=held()("Normal"), train__epochs=8, train__batch_size=256, train__metric=held()("away")
    )
    assert loss_of(settings.train).outputs(0) == 2
    result, _ = fitted(settings, data, data, outputs=[2])
    best = result.history[result.best_epoch]
    assert best["valid_away"] == pytest.approx(best["valid_mae"], rel=1e-12) and best["valid_away"] < 30


def test_a_metric_of_the_user_has_the_intervals_of_the_engines_own() -> None:
    rng = np.random.default_rng(0)
    target, scores, days, weight = (
        rng.normal(size=600),
        rng.normal(size=600),
        np.arange(600) // 20,
        rng.uniform(0.1, 2, 600),
    )
    for name in ("away", "apart"):
        loss = loss_of(TrainConfig(loss="squared", metric=held()(name)))
        values = point_metrics(target, scores, loss, weight=weight)
        found = intervals(Scored(target, scores, days, days, weight), values, loss, EvaluateConfig(bootstrap=100))
        assert values[name] == pytest.approx(values["mae"], rel=1e-12)
        assert found[name] == pytest.approx(found["mae"], rel=1e-9)
    assert find_metric("away").higher_is_better is False and find_metric("away").label == "away"


class Package(NamedTuple):
    """An entry point of a package."""

    value: str
    dist: Any
    made: Any

    def load(self) -> Any:
        return self.made


def test_a_package_offers_losses_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {}
    exec(CODE, space)
    offers = {
        "engine.losses": {
            "installed_loss": Package("pkg:Surprise", SimpleNamespace(name="pkg", version="1.2"), space["plain"])
        },
        "engine.metrics": {"installed_metric": Package("pkg:right", None, space["away"])},
    }
    monkeypatch.setattr(plugins, "installed", lambda group: offers.get(group, {}))
    loss = user_loss("installed_loss")
    assert loss.task == "regression" and loss.metric == "rmse"
    config = TrainConfig(loss="installed_loss", metric="installed_metric")
    version = plugins.version_of("installed_loss", "engine.losses")
    assert version.startswith("pkg==1.2:pkg:Surprise:") and plugins.version_of("other", "engine.losses") is None
    assert loss_record(config) == {
        "loss": "installed_loss", "quantile": 0.5, "metric": "installed_metric", "loss_version": version,
    }  # fmt: skip
    plans = {plan_digest("train", Config(train=config))}
    offers["engine.losses"]["installed_loss"] = offers["engine.losses"]["installed_loss"]._replace(value="csv:Surprise")
    assert plan_digest("train", Config(train=config)) not in plans
    assert "installed_metric" in recorded_loss(loss_record(config)).metrics
    _named.cache_clear()


@pytest.mark.parametrize(("code", "message"), [
    ("def mine(o, t): return (o[:, 0] - t).square()", "must have a task, one of binary, multiclass, regression, found None"),
    ("class mine:\n    task = 'regression'", r"must have row_losses\(outputs, target\)"),
    ("def mine(o, t): return (o[:, 0] - t).square().mean()", r"must give the loss of each row, .* \[6\], found .* shape \[\]"),
    ("def mine(o, t): return 1", "must give the loss of each row, a tensor of shape .6., found int"),
    ("def mine(o, t): return t * 1.0", "must compute the loss from the outputs in torch: it has no gradient"),
    ("def mine(o, t): return (o[:, 0] - o[:, 0].mean() - t).square()", "the same loss whichever rows are beside it"),
    ("import torch\ndef mine(o, t): return (o[:, 0] - t + torch.rand(len(t))).square()", "beside it, and each time"),
    ("def mine(o, t): return (o[:, 0] - t).sqrt()", "must be finite, with finite gradients"),
    ("def mine(o, t): return o[:, 7]", "raised IndexError"),
    ("def mine(o, t): return (o[:, 0] - t).square()\nmine.metric = 'roc_auc'", "metric must be one that regression has"),
    ("class mine:\n    task, outputs = 'binary', 2\n    def row_losses(self, o, t): return o[:, 0] * t", "must be a whole"),
    ("class mine:\n    task, outputs = 'regression', 2\n    def row_losses(self, o, t): return o[:, 0] * t", "must have scores"),
    ("class mine:\n    task = 'regression'\n    row_losses = lambda self, o, t: o[:, 0] * t\n    scores = lambda self, o: o",
     r"scores\(outputs\) must give numbers of shape \[6\], found float64 of shape \[6, 1\]"),
    ("class mine:\n    task = 'regression'\n    row_losses = lambda self, o, t: o[:, 0] * t\n"
     "    scores = lambda self, o: o[:, 0] - o.mean()", "the same scores whichever rows are beside it"),
    ("class mine:\n    def __init__(self, a): pass", "raised TypeError"),
])  # fmt: skip
def test_a_loss_that_cannot_be_used_is_refused_by_name_before_it_trains(code: str, message: str) -> None:
    if "task" not in code and "must have a task" not in message and "__init__" not in code:
        code += "\nmine.task = 'regression'"
    with pytest.raises(UserError, match=f"train.loss=mine.*{message}"):
        user_loss(held(code)("mine"))


@pytest.mark.parametrize(("code", "message"), [
    ("def mine(target, scores, weight): return 1.0", "an attribute higher_is_better, true or false, found None"),
    ("mine = 3", "must be a function"),
    ("def mine(target, scores): return 1.0\nmine.higher_is_better = True", "raised TypeError"),
    ("def mine(target, scores, weight): return 'good'\nmine.higher_is_better = True", "must give a number, found str"),
    ("class mine:\n    higher_is_better = True\n    columns = lambda self, t, s: t\n    value = lambda self, sums: sums[:, 0]",
     r"columns\(target, scores\) must give numbers of shape \[3, k\], found float64 of shape \[3\]"),
    ("class mine:\n    higher_is_better = True\n    columns = lambda self, t, s: t[:, None]\n    value = lambda self, sums: sums",
     r"value\(sums\) must give numbers of shape \[1\] for sums of shape \[1, 1\], found float64 of shape \[1, 1\]"),
    ("class mine:\n    higher_is_better = True\n    columns = lambda self, t, s: t[:, None]\n"
     "    value = lambda self, sums: sums[:, 0] / sums.sum()", r"value\(sums\) must give each row of sums \[m, k\]"),
    ("class mine:\n    higher_is_better = True\n    columns = lambda self, t, s: t[:, None]\n"
     "    value = lambda self, sums: sums[:, 0] * 0 + sums.mean()", r"value\(sums\) must give each row of sums \[m, k\]"),
])  # fmt: skip
def test_a_metric_that_cannot_be_used_is_refused_by_name(code: str, message: str) -> None:
    with pytest.raises(UserError, match=f"train.metric=mine.*{message}"):
        loss = loss_of(TrainConfig(loss="squared", metric=held(code)("mine")))
        point_metrics(np.arange(3.0), np.zeros(3), loss)


def test_two_versions_of_a_metric_have_one_direction() -> None:
    code = "def twice(target, scores, weight): return 1.0\ntwice.higher_is_better = {}\n"
    assert user_metric(held(code.format(True))("twice"), "regression").higher_is_better
    assert user_metric(held(code.format(True) + "\n")("twice"), "regression").higher_is_better
    with pytest.raises(UserError, match=r"train.metric=twice must have one direction.*is True: .*rename one"):
        user_metric(held(code.format(False))("twice"), "regression")


def test_names_of_the_engine_are_not_taken_and_unknown_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.loss=binary must not have the name of one of the engine"):
        user_loss(held("binary = 1")("binary"))
    with pytest.raises(UserError, match=r"train.metric=rmse must not have the name of one of the engine"):
        user_metric(held("rmse = 1")("rmse"), "regression")
    (tmp_path / "losses.py").write_text(CODE)
    with pytest.raises(
        UserError, match=r"train.loss must be one of binary, .*, found 'Suprise'. Did you mean 'Surprise'"
    ):
        compose(["plugins=[losses.py]", "train.loss=Suprise"], str(tmp_path))
    with pytest.raises(
        UserError, match=r"train.loss must be one of binary, .*, found 'poison'. Did you mean 'poisson'"
    ):
        compose(["train.loss=poison"])
    with pytest.raises(UserError, match=r"train.metric must be one that train.loss=binary has, found 'rihgt'"):
        engine.run(
            "train", *overrides(write_tiny(tmp_path, 300), "train.metric=rihgt"), config_dir=str(tmp_path / "conf")
        )


def test_gradients_and_hessians_of_rows_are_the_known_ones() -> None:
    rng = np.random.default_rng(1)
    raw, wide, target, kinds = (
        rng.normal(size=(50, 1)),
        rng.normal(size=(50, 3)),
        rng.gamma(2, 1, 50),
        rng.integers(0, 3, 50),
    )
    p = 1 / (1 + np.exp(-raw))
    for name, goal, first, second in (
        ("binary", kinds > 0, p[:, 0] - (kinds > 0), (p * (1 - p))[:, 0]),
        ("squared", target, 2 * (raw[:, 0] - target), np.full(50, 2.0)),
        ("poisson", target, np.exp(raw[:, 0]) - target, np.exp(raw[:, 0])),
        ("gamma", target, 1 - target * np.exp(-raw[:, 0]), target * np.exp(-raw[:, 0])),
        ("quantile", target, np.where(target > raw[:, 0], -0.5, 0.5), np.zeros(50)),
    ):
        found = derivatives(LOSSES[name], raw, np.asarray(goal, float))
        np.testing.assert_allclose(found[0][:, 0], first, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found[1][:, 0], second, atol=1e-12, err_msg=name)
    shares = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    found = derivatives(LOSSES["multiclass"], wide, kinds.astype(float))
    np.testing.assert_allclose(found[0], shares - np.eye(3)[kinds], atol=1e-12)
    np.testing.assert_allclose(found[1], shares * (1 - shares), atol=1e-12)


# --------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = write_tiny(tmp_path_factory.mktemp("losses"), 900)
    (folder / "conf" / "losses.py").write_text(CODE)
    return folder, engine.run("train", *words(folder), config_dir=str(folder / "conf"))


def words(folder: Path, *more: str) -> list[str]:
    return overrides(folder, "plugins=[losses.py]", "train.loss=Surprise", "train.epochs=2", *more)


def test_the_code_is_part_of_plan_run_and_model(shop, tmp_path: Path) -> None:
    _, trained = shop
    digest = Plugin("losses.py", CODE.encode()).digest
    record = json.loads((trained.directory / "model/model.json").read_text())
    assert record["loss"] == f"Surprise@{digest}" == trained.record["config"]["train"]["loss"]
    assert (trained.directory / "model/code/losses.py").read_text() == CODE
    assert 0 <= trained.metrics["test/right_low"] < trained.metrics["test/right"] <= 1
    assert "Right decisions of the validation rows by epoch" in (trained.directory / "report.html").read_text()
    plans = set()
    for text in (CODE, CODE + "\n"):
        (tmp_path / "losses.py").write_text(text)
        plans.add(plan_digest("train", compose(["plugins=[losses.py]", "train.loss=Surprise"], str(tmp_path)).config))
    assert len(plans) == 2


def test_a_model_with_it_is_scored_evaluated_monitored_and_judged(shop) -> None:
    folder, trained = shop
    conf, model = str(folder / "conf"), str(trained.directory)
    scored = engine.run("score", *words(folder, f"score.model={model}"), config_dir=conf)
    assert 0 < np.asarray(predictions(scored)["score"]).mean() < 1
    again = engine.run("evaluate", *words(folder, f"evaluate.model={model}"), config_dir=conf)
    assert again.metrics["test/right"] == trained.metrics["test/right"]
    window = ["monitor.window=[2020-01-26,2020-01-30]", f"monitor.model={model}", "monitor.resamples=60"]
    assert shell.main(["monitor", "--config-dir", conf, *words(folder), *window]) in (0, 2)
    record = json.loads((max((folder / "runs/monitor/tiny").iterdir()) / "drift.json").read_text())
    assert record["performance"]["watched"] == "right" and record["performance"]["metrics"]["right"]["band"]
    assert record["estimated"]["metrics"]["right"]["value"] > 0.4


def test_reading_a_bundle_runs_none_of_its_code(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    user_loss.cache_clear()
    monkeypatch.setattr(plugins, "load", lambda _: pytest.fail("the code ran"))
    assert read_bundle(shop[1].directory / "model").model["loss"].startswith("Surprise@")


@pytest.mark.slow
def test_a_run_with_it_reproduces(shop) -> None:
    folder, trained = shop
    options = Options(code="current", store=folder / "store")
    assert reproduce_run(trained.directory, options)["first_difference"] is None
