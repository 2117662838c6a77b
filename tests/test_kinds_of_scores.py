"""Losses whose scores are of another kind than a probability or a mean, through every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import __main__ as shell
from engine.config.sections.lifecycle import GateConfig
from engine.lifecycle.challenger_gate import Judged, evidence
from engine.runtime.run import Run
from engine.scoring.read import predictions
from engine.training.losses import recorded_loss
from tests.tiny import DATA, overrides, visits, write_tiny

MORE = ("features.views.shop.aggregates={rows: [count]}", "train.epochs=2", "monitor.resamples=60")


def shop(folder: Path, kind: str, values: np.ndarray | None = None) -> Path:
    """The tiny experiment with the amount as its target, of a type, perhaps with other values."""
    write_tiny(folder, 2500)
    text = DATA.replace("role: target, known_at: paid_at", "known_at: paid_at")
    text = text.replace("amount: {type: float64, role: numeric", f"amount: {{type: {kind}, role: target")
    (folder / "conf/data/tiny.yaml").write_text(text.replace("amount: float64", f"amount: {kind}"))
    table = visits(2500)
    amount = table["amount"].to_numpy()
    kept = np.digitize(amount, [2.0, 5.0, 12.0, 20.0]) if kind.startswith("int") else amount
    column = pa.array(kept, pa.int64() if kind.startswith("int") else pa.float64(), mask=np.isnan(amount))
    pq.write_table(table.set_column(table.column_names.index("amount"), "amount", column), folder / "visits.parquet")
    return folder


def through(folder: Path, loss: str, *more: str) -> tuple[Run, Run, dict[str, object]]:
    """(training run, scoring run, drift.json of a monitored week)."""
    conf, words = str(folder / "conf"), overrides(folder, *MORE)
    trained = engine.run("train", *words, f"train.loss={loss}", *more, config_dir=conf)
    model = str(trained.directory)
    scored = engine.run("score", *words, f"score.model={model}", config_dir=conf)
    window = ["monitor.window=[2020-01-26,2020-01-30]", f"monitor.model={model}"]
    assert shell.main(["monitor", "--config-dir", conf, *words, *window]) in (0, 2)
    record = max((folder / "runs/monitor/tiny").iterdir()) / "drift.json"
    again = engine.run("evaluate", *words, f"evaluate.model={model}", config_dir=conf)
    for name, value in again.metrics.items():
        if name.startswith("test/"):
            assert value == trained.metrics[name], name
    return trained, scored, json.loads(record.read_text())


def test_quantiles_have_a_column_each_and_are_measured_monitored_and_judged(tmp_path: Path) -> None:
    folder = shop(tmp_path, "float64")
    trained, scored, drift = through(folder, "quantiles", "train.quantiles=[0.1,0.5,0.9]")
    table = predictions(scored.directory)
    names = ["score_q10", "score_q50", "score_q90"]
    scores = np.stack([table[name] for name in names], axis=1)
    assert (np.diff(scores, axis=1) > 0).all() and scores[:, 1].std() > 0
    for name in ("pinball", "mae", "coverage_error", "r2", "decile/1/mean_error"):
        assert np.isfinite(trained.metrics[f"test/{name}"]), name
    assert trained.metrics["baseline/test/constant/pinball"] > 0
    measured = drift["performance"]["metrics"]  # type: ignore[index]
    assert (
        measured["pinball"]["band"][0] < measured["pinball"]["band"][1]
        and "target_mean" in drift["performance"]["labels"]
    )  # type: ignore[index]
    assert drift["estimated"]["metrics"]["pinball"]["error"] is not None  # type: ignore[index]
    assert {f"prediction_{name[6:]}" for name in names} <= {item["name"] for item in drift["columns"]}  # type: ignore[index]
    assert engine.load(trained.directory).meaning == {"target": "amount", "quantiles": [0.1, 0.5, 0.9]}
    page = (trained.directory / "report.html").read_text()
    assert "Coverage error" in page and "Pinball loss of the validation rows by epoch" in page
    loss = recorded_loss(json.loads((trained.directory / "model/model.json").read_text()))
    days = np.arange(len(scores)) // 100
    target = scores[:, 1] + np.random.default_rng(0).normal(0, 3, len(scores))
    gate = GateConfig(bootstrap=50, min_rows=100)
    found = evidence(Judged(target, scores + 4, scores, {}, days, days), loss, gate)["metric"]
    assert found["name"] == "pinball" and found["low"] > 0


@pytest.mark.slow
def test_ordered_classes_have_the_order_of_their_numbers(tmp_path: Path) -> None:
    trained, scored, drift = through(shop(tmp_path, "int64"), "ordinal")
    assert json.loads((trained.directory / "model/model.json").read_text())["classes"] == ["0", "1", "2", "3", "4"]
    table = predictions(scored.directory)
    total = sum(np.asarray(table[f"score_{k}"], np.float64) for k in range(5))
    assert np.abs(total - 1).max() < 1e-5 and set(table["decision"].to_pylist()) <= {"0", "1", "2", "3", "4"}
    assert trained.metrics["test/quadratic_kappa"] > 0.2 and trained.metrics["test/quadratic_kappa_low"] > 0
    assert drift["performance"]["watched"] == "quadratic_kappa"  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["poisson", "gamma", "tweedie"])
def test_a_log_link_is_kept_through_scoring_and_monitoring(tmp_path: Path, loss: str) -> None:
    _, scored, drift = through(shop(tmp_path, "float64"), loss, "train.tweedie_power=1.7")
    scores = np.asarray(predictions(scored.directory)["score"])
    assert (scores > 0).all() and 0.5 < scores.mean() / 15 < 2
    assert drift["performance"]["watched"] == f"{loss}_deviance"  # type: ignore[index]


def test_the_order_of_texts_must_be_said(tmp_path: Path, cli) -> None:
    folder = write_tiny(tmp_path, 900)
    data = folder / "conf/data/tiny.yaml"
    text = data.read_text().replace("bought: {type: bool, role: target", "bought: {type: string, role: target")
    data.write_text(text.replace("bought: bool", "bought: string"))
    table = visits(900)
    place = table.column_names.index("bought")
    pq.write_table(table.set_column(place, "bought", table["bought"].cast(pa.string())), folder / "visits.parquet")
    words = overrides(folder, "train.loss=ordinal", "train.epochs=1", "~features.views.shop.aggregates.bought")
    refused = cli("train", "--config-dir", str(folder / "conf"), *words)
    assert refused.code == 1, refused.err
    assert (
        "needs the order of the classes of the target 'bought' in split.train: list them all, lowest first, in"
        in refused.err
    )
    assert "data.columns.bought.values, which lacks 'false', 'true'" in refused.err
    taken = cli("train", "--config-dir", str(folder / "conf"), *words, "data.columns.bought.values=[true,false]")
    assert taken.code == 0, taken.err
    model = next((folder / "runs/train/tiny").glob("*/model/model.json"))
    assert json.loads(model.read_text())["classes"] == ["true", "false"]
