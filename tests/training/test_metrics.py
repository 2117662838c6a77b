"""A metric that is added to the table, once, is measured, drawn, watched and judged everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine import api
from engine.config.sections.lifecycle import GateConfig
from engine.config.sections.training import EvaluateConfig
from engine.errors import UserError
from engine.lifecycle.challenger_gate import Judged, evidence, verdict
from engine.lifecycle.compare import compare_runs, read_side
from engine.monitoring.performance import Judge, Outcomes, measure
from engine.training.metrics import METRICS, Metric, Rows, find_metric, mean_of
from tests.tiny import overrides, write_tiny


def hits(rows: Rows) -> np.ndarray:
    return ((rows.scores > 0.5) == rows.target).astype(np.float64)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """The share of right decisions at one half, in the table of binary metrics."""
    metric = Metric(
        "hit_rate", "Right at one half", "binary", True, lambda rows: float(hits(rows).mean()), mean_of(hits)
    )
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
    found = evidence(Judged(rows.target, 1 - rows.scores, rows.scores, {}), "binary", gate)
    assert found["metric"]["name"] == "hit_rate" and found["metric"]["low"] > 0
    answer, reasons = verdict(found, gate)
    assert answer == "promote" and reasons[0].startswith("hit_rate 0.")
    with pytest.raises(UserError, match=r"retrain.gate.metric must be one .* found 'hit_rate'"):
        evidence(Judged(rows.target, rows.scores, rows.scores, {}), "squared", gate)


def test_monitoring_measures_it_against_a_band_and_retraining_by_its_direction(toy: Metric) -> None:
    judge = Judge("binary", EvaluateConfig(bootstrap=20), 0.5, 0.05, 0.05, 0.5, 7, 7, 0)
    item = measure(outcomes(3000, 1), outcomes(700, 2, skill=0.0), judge)["metrics"]["hit_rate"]
    assert item["interval"][0] < item["value"] < item["interval"][1]
    assert item["beyond"] and item["worse_by"] > 0.2 and item["band"][0] < item["reference"] < item["band"][1]


def test_names_labels_and_directions_are_one_to_a_name() -> None:
    for task, metrics in METRICS.items():
        for name, metric in metrics.items():
            twin = find_metric(name)
            assert (metric.name, metric.task) == (name, task)
            assert (metric.label, metric.higher_is_better) == (twin.label, twin.higher_is_better)
