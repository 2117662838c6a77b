"""The report of a run opens offline and shows what was measured, computable or not."""

from __future__ import annotations

import numpy as np

from engine.config.sections.training import EvaluateConfig
from engine.training.evaluate import Scored, evaluate_scores
from engine.training.losses import LOSSES
from engine.training.report import Measured, write_report


def report(run, config, target, scores, loss="binary", history=()):
    rng = np.random.default_rng(0)
    days = np.sort(rng.integers(15_765, 15_845, len(target)))
    slices = {"carrier": rng.choice(["AA", "<b>UA"], len(target))}
    rows = Scored(target, scores, days, days)
    flat, details = evaluate_scores(rows, LOSSES[loss], EvaluateConfig(bootstrap=20), slices)
    path = write_report(
        run,
        histories={"": history} if history else {},
        measured=[Measured("", LOSSES[loss], {"test": details}, flat)],
        data_summary={
            "dataset": "d",
            "digest": "f00d",
            "rows": 7,
            "splits": {"train": {"period": ["a", "b"], "known_by": "c", "rows": 3, "unlabelled": 1}},
            "features": {"numeric": 2, "categorical": 1, "raw": 3},
        },
        quarantine={"a.csv: delay is null (quarantine)": 12},
        config=config,
        metrics={f"test/{name}": value for name, value in flat.items()},
    )
    return path.read_text()


def test_a_trained_model_is_reported(problem, config, fitted, new_run):
    settings = config(train__log_every=1)
    data = problem(300)
    result, run = fitted(settings, data, data)
    rng = np.random.default_rng(1)
    text = report(run, settings, data.target, rng.random(300).astype(np.float32), history=result.history)
    for words in (
        "ROC AUC",
        "Calibration",
        "Precision and recall",
        "ROC AUC by month",
        "ROC AUC by carrier",
        "Quarantine",
    ):
        assert words in text
    assert "a.csv" in text and "&lt;b&gt;UA" in text and "<b>UA" not in text and "http" not in text


def test_what_cannot_be_computed_is_reported_with_its_reason(config, new_run):
    settings = config()
    text = report(new_run(settings), settings, np.ones(20, np.float32), np.full(20, 0.5, np.float32))
    assert "all 20 rows have the same target" in text


def test_regression_and_no_rows_are_reported(config, new_run):
    settings = config(train__loss="huber")
    rng = np.random.default_rng(0)
    assert "Mean absolute error" in report(
        new_run(settings), settings, rng.normal(size=50), rng.normal(size=50), "huber"
    )
    assert "there are no rows" in report(new_run(settings), settings, np.zeros(0), np.zeros(0), "huber")
