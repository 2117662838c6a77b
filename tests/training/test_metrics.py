"""A metric that is added to the table, once, is measured, drawn, watched and judged everywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import api
from engine.config.sections.lifecycle import GateConfig, RetrainConfig
from engine.config.sections.training import EvaluateConfig
from engine.errors import UserError
from engine.lifecycle import backtest, backtest_report
from engine.lifecycle.challenger_gate import Judged, evidence, verdict
from engine.lifecycle.compare import compare_runs, read_side
from engine.lifecycle.retrain_rules import Champion, Facts, Observation, trigger
from engine.monitoring.performance import Judge, Outcomes, measure
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS, Metric, Rows, find_metric, mean_of
from tests.tiny import overrides, write_tiny


def hits(rows: Rows) -> np.ndarray:
    return ((rows.scores > 0.5) == rows.target).astype(np.float64)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """The share of right decisions at one half, in the table of binary metrics."""
    metric = Metric("hit_rate", "Right at one half", "binary", True, *mean_of(hits))
    monkeypatch.setitem(METRICS["binary"], metric.name, metric)
    return metric


def outcomes(rows: int, seed: int, skill: float = 1.0) -> Outcomes:
    rng = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-rng.normal(size=rows)))
    target = (rng.random(rows) < np.where(rng.random(rows) < skill, scores, 1 - scores)).astype(float)
    return Outcomes(np.arange(rows) // 100, target, scores, {})


def test_training_evaluation_report_and_comparison_have_it(toy: Metric, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 1200)
    words = overrides(folder, "train.metric=hit_rate", "train.epochs=3")
    run = api.run("train", *words, config_dir=str(folder / "conf"))
    for split in ("valid", "test"):
        low, value, high = (run.metrics[f"{split}/hit_rate{end}"] for end in ("_low", "", "_high"))
        assert 0.3 < low < value < high < 1
    assert {"baseline/test/linear/hit_rate", "baseline/test/constant/hit_rate"} <= set(run.metrics)
    watched = [
        line["valid/hit_rate"]
        for line in map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
        if "valid/hit_rate" in line
    ]
    assert run.metrics["train/best_epoch"] == int(np.argmax(watched))
    page = (run.directory / "report.html").read_text()
    assert "Right at one half, test" in page and "Right at one half of the validation rows by epoch" in page
    compared = {row["metric"]: row for row in compare_runs([read_side(run.directory)] * 2)["metrics"]}
    assert compared["test/hit_rate"]["values"] == [run.metrics["test/hit_rate"]] * 2


def test_the_gate_between_models_judges_it(toy: Metric) -> None:
    rows = outcomes(2000, 0)
    gate = GateConfig(metric=toy.name, bootstrap=50, min_rows=100, max_ece_rise=1.0, max_cost_rise=9.0)
    found = evidence(
        Judged(rows.target, 1 - rows.scores, rows.scores, {}, rows.days, rows.days), LOSSES["binary"], gate
    )
    assert found["metric"]["name"] == "hit_rate" and found["metric"]["low"] > 0
    answer, reasons = verdict(found, gate)
    assert answer == "promote" and reasons[0].startswith("hit_rate 0.")
    with pytest.raises(UserError, match=r"retrain.gate.metric must be one .* found 'hit_rate'"):
        evidence(Judged(rows.target, rows.scores, rows.scores, {}, rows.days, rows.days), LOSSES["squared"], gate)


def test_monitoring_measures_it_against_a_band_and_retraining_by_its_direction(toy: Metric) -> None:
    judge = Judge(LOSSES["binary"], EvaluateConfig(bootstrap=20), 0.05, 0.05, 0.5, 7, 7, 0)
    item = measure(outcomes(3000, 1), outcomes(700, 2, skill=0.0), judge)["metrics"]["hit_rate"]
    assert item["interval"][0] < item["value"] < item["interval"][1]
    assert item["beyond"] and item["worse_by"] > 0.2 and item["band"][0] < item["reference"] < item["band"][1]


@pytest.mark.parametrize("higher", [True, False])
def test_backtests_and_the_rule_of_retraining_take_its_direction_and_label(
    toy: Metric, monkeypatch: pytest.MonkeyPatch, higher: bool
) -> None:
    metric = dataclasses.replace(toy, higher_is_better=higher)
    monkeypatch.setitem(METRICS["binary"], toy.name, metric)
    lost, sign = (0.6, 1) if higher else (0.8, -1)
    seen = Observation(0, 1, "m", metric=lost, metric_name=toy.name)
    policy = RetrainConfig(triggers=("performance",), performance_drop=0.05)
    facts = Facts(2, Champion("m", 0, 0.7), (seen,), (), 500)
    assert trigger(facts, policy).fired == ("performance",)
    better = dataclasses.replace(seen, metric=1.4 - lost)
    assert not trigger(dataclasses.replace(facts, observations=(better,)), policy).fired
    with pytest.raises(UserError, match=r"a metric must be one of roc_auc, .*, found 'luck'"):
        trigger(dataclasses.replace(facts, observations=(dataclasses.replace(seen, metric_name="luck"),)), policy)
    known: dict[str, Any] = {"retrains": 0, "promotions": 0, "seconds": 1.0, "triggers": [], "window": "expanding"}
    policies = [{"name": name, **known, "periods": [period(value)]} for name, value in (("never", 0.6), ("every", 0.7))]
    backtest.compare(policies, toy.name)
    assert policies[1]["gain_over_never"] == pytest.approx(sign * 0.1)
    record = {"metric": toy.name, "policies": policies, "period": "month", "seconds": 1.0}
    assert backtest_report._name(record) == "Right at one half"
    policies[0]["periods"][0] |= {"verdict": "kept", "refused_metric": 0.9, "judged": None, "reason": "x"}
    ((*_, would, _),) = backtest_report._refused(record)
    assert would == ("helped by 0.3000" if higher else "hurt by 0.3000")


def period(metric: float) -> dict[str, Any]:
    return {"period": "2020-01", "metric": metric, "low": None, "high": None}


def test_names_labels_and_directions_are_one_to_a_name() -> None:
    for task, metrics in METRICS.items():
        for name, metric in metrics.items():
            twin = find_metric(name)
            assert (metric.name, metric.task) == (name, task)
            assert (metric.label, metric.higher_is_better) == (twin.label, twin.higher_is_better)
