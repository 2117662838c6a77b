"""Metrics against scikit-learn, intervals that cover, breakdowns that add up, reasons where nothing can be computed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.config.sections.training import EvaluateConfig
from engine.errors import UserError
from engine.training.evaluate import evaluate_scores, intervals, point_metrics, watched_metric
from engine.training.metrics import METRICS, Rows, resample

CONFIG = EvaluateConfig(bootstrap=100)
NO_TIME = np.zeros(0, np.int64)


@pytest.fixture
def scored():
    """(target, scores, time, slices) of 3,000 rows over three months."""
    rng = np.random.default_rng(0)
    target = (rng.random(3000) < 0.3).astype(np.float32)
    scores = np.round(np.clip(0.2 + 0.25 * target + rng.normal(0, 0.2, 3000), 0.001, 0.999), 2)
    time = rng.integers(1_362_000_000_000_000, 1_369_000_000_000_000, 3000)
    return target, scores.astype(np.float32), time, {"carrier": rng.choice(["AA", "B6", "UA"], 3000)}


def test_binary_metrics_equal_those_of_scikit_learn(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    target, scores, *_ = scored
    ours = point_metrics(target, scores, "binary")
    wide = scores.astype(np.float64)
    assert ours["roc_auc"] == pytest.approx(metrics.roc_auc_score(target, wide), rel=1e-12)
    assert ours["average_precision"] == pytest.approx(metrics.average_precision_score(target, wide), rel=1e-12)
    assert ours["log_loss"] == pytest.approx(metrics.log_loss(target, wide), rel=1e-9)
    assert ours["brier"] == pytest.approx(metrics.brier_score_loss(target, wide), rel=1e-9)


def test_multiclass_metrics_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    scores = rng.dirichlet([1, 2, 3], 500).astype(np.float32)
    target = rng.integers(0, 3, 500).astype(np.float32)
    ours = point_metrics(target, scores, "multiclass")
    wide = scores.astype(np.float64) / scores.astype(np.float64).sum(axis=1, keepdims=True)
    assert ours["accuracy"] == metrics.accuracy_score(target, wide.argmax(axis=1))
    assert ours["log_loss"] == pytest.approx(metrics.log_loss(target, wide), rel=1e-6)
    assert ours["macro_auc"] == pytest.approx(metrics.roc_auc_score(target, wide, multi_class="ovr"), rel=1e-6)


def test_regression_metrics_by_hand():
    ours = point_metrics(np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 1.0]), "quantile", quantile=0.9)
    assert ours["mae"] == pytest.approx(4 / 3) and ours["rmse"] == pytest.approx(np.sqrt(10 / 3))
    assert ours["pinball"] == pytest.approx((0.1 * 1 + 0.9 * 3) / 3)


def test_resampling_without_weights_changed_is_the_metric_itself(scored):
    """The bootstrap's own formulas, fed weight one, against the exact kernels."""
    target, scores, *_ = scored
    point = point_metrics(target, scores, "binary")
    rows = Rows(target.astype(float), scores.astype(float))
    found = resample(rows, METRICS["binary"].values(), [np.ones((1, len(target)))])
    for name in point:
        assert found[name][0] == pytest.approx(point[name], rel=1e-9)


def test_intervals_repeat_and_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        target = (np.arange(400) % 2).astype(np.float64)
        scores = 1 / (1 + np.exp(-(target + rng.normal(size=400))))  # AUC of two unit normals one apart: Phi(1/sqrt(2))
        low, high = intervals(target, scores, "binary", CONFIG)["roc_auc"]
        assert (low, high) == intervals(target, scores, "binary", CONFIG)["roc_auc"]
        covered += low <= 0.7602499 <= high
    assert 52 <= covered <= 60


def test_breakdowns_cover_every_row_in_local_months(scored):
    target, scores, time, slices = scored
    flat, details = evaluate_scores(target, scores, "binary", CONFIG, time, "America/New_York", slices)
    assert sum(part["rows"] for part in details["by_month"]) == flat["rows"] == 3000
    assert [part["value"] for part in details["by_month"]] == ["2013-02", "2013-03", "2013-04", "2013-05"]
    carriers = details["slices"]["carrier"]
    assert sum(part["rows"] for part in carriers) == 3000
    some = carriers[0]
    mask = slices["carrier"] == some["value"]
    assert some["roc_auc"] == point_metrics(target[mask], scores[mask], "binary")["roc_auc"]
    json.dumps(details, allow_nan=False)


def test_a_month_is_read_in_the_zone():
    # 2013-06-01 02:00 UTC is still May in New York.
    time = np.array([1_370_052_000_000_000] * 4)
    target, scores = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.1, 0.4, 0.5, 0.9])
    months = [
        evaluate_scores(target, scores, "binary", CONFIG, time, zone, {})[1]["by_month"][0]["value"]
        for zone in ("UTC", "America/New_York")
    ]
    assert months == ["2013-06", "2013-05"]


def test_what_cannot_be_computed_says_why():
    empty = evaluate_scores(np.zeros(0), np.zeros(0), "binary", CONFIG, NO_TIME, "UTC", {"a": np.zeros(0, object)})
    assert empty[0]["rows"] == 0 and "no rows" in empty[1]["not_computable"]["roc_auc"]
    time = np.zeros(5, np.int64)
    flat, details = evaluate_scores(np.ones(5), np.full(5, 0.5), "binary", CONFIG, time, "UTC", {})
    assert np.isnan(flat["roc_auc"]) and "same target" in details["not_computable"]["roc_auc"]
    assert flat["log_loss"] == pytest.approx(np.log(2))
    flat, details = evaluate_scores(np.array([0.0, 1]), np.array([0.5, np.nan]), "binary", CONFIG, time[:2], "UTC", {})
    assert "not finite" in details["not_computable"]["brier"]


def test_rows_of_a_class_that_training_never_saw_are_counted_apart():
    target, scores, time = np.array([0.0, 1, np.nan, 1]), np.array([0.2, 0.7, 0.5, 0.9]), np.zeros(4, np.int64)
    flat, details = evaluate_scores(target, scores, "binary", CONFIG, time, "UTC", {"s": np.array(list("abca"))})
    assert flat["rows"] == 3 and details["unknown_target"] == 1 and flat["roc_auc"] == 1.0


def test_a_metric_that_the_loss_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"found 'roc_acu'.*roc_auc"):
        watched_metric("binary", "roc_acu")


def flat_of(target, scores, loss, **more):
    n = len(target)
    return evaluate_scores(target, scores, loss, CONFIG, np.full(n, 1_362_000_000_000_000), "UTC", {}, **more)


def test_r2_and_mape_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    target = rng.normal(50, 10, 400)
    scores = target + rng.normal(0, 5, 400)
    flat, _ = flat_of(target, scores, "huber")
    assert flat["r2"] == pytest.approx(metrics.r2_score(target, scores), rel=1e-9)
    assert flat["mape"] == pytest.approx(metrics.mean_absolute_percentage_error(target, scores), rel=1e-9)


def test_r2_and_mape_say_why_there_is_none():
    flat, details = flat_of(np.array([0.0, 2.0, 0.0]), np.ones(3), "squared")
    assert flat["r2"] < 1 and np.isnan(flat["mape"])
    assert details["not_computable"] == {"mape": "the target is 0 in 2 rows"}
    flat, details = flat_of(np.full(3, 2.0), np.ones(3), "squared")
    assert np.isnan(flat["r2"]) and flat["mape"] == 0.5
    assert details["not_computable"] == {"r2": "all 3 rows have the same target"}


def test_the_figures_of_each_class_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    target = rng.integers(0, 3, 500).astype(np.float32)
    scores = rng.dirichlet([1, 2, 3], 500) + 0.3 * np.eye(3)[target.astype(int)]
    flat, details = flat_of(target, scores, "multiclass", classes=("a/b", "c", "d_low"))
    expected = metrics.precision_recall_fscore_support(target, scores.argmax(axis=1))
    for index, name in enumerate(("a/b", "c", "d_low")):
        row = details["classes"][index]
        assert (row["class"], row["rows"]) == (name, expected[3][index])
        for place, figure in enumerate(("precision", "recall", "f1")):
            assert row[figure] == pytest.approx(expected[place][index]) == flat[f"class/{name}/{figure}"]


def test_a_class_without_rows_or_without_predictions_has_no_figure_there():
    scores = np.array([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    flat, details = flat_of(np.array([0.0, 0.0, 0.0]), scores, "multiclass", classes=("a", "b", "c"))
    a, b, c = details["classes"]
    assert (a["precision"], a["recall"]) == (1.0, pytest.approx(2 / 3))
    assert (b["precision"], b["recall"], b["f1"]) == (0.0, None, 0.0) and (c["precision"], c["recall"], c["f1"]) == (
        None,
    ) * 3
    assert "class/c/f1" not in flat and flat["class/c/rows"] == 0
