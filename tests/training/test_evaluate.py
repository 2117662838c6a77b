"""Metrics against scikit-learn, intervals that cover, breakdowns that add up, reasons where nothing can be computed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.config.sections.training import EvaluateConfig
from engine.errors import UserError
from engine.training.evaluate import Scored, evaluate_scores, intervals, point_metrics, watched_metric
from engine.training.losses import LOSSES, recorded_loss
from engine.training.metrics import METRICS, Rows
from engine.training.resampling import numbered_blocks

CONFIG = EvaluateConfig(bootstrap=100)
MARCH_2013 = 15_765  # days since 1970-01-01


def on_days(target, scores, days=None, weight=None) -> Scored:
    """Scored rows; all of one day unless `days` says otherwise."""
    days = np.full(len(target), MARCH_2013) if days is None else days
    return Scored(np.asarray(target), np.asarray(scores), days, days, weight)


@pytest.fixture
def scored():
    """(target, scores, days, slices) of 3,000 rows over three months."""
    rng = np.random.default_rng(0)
    target = (rng.random(3000) < 0.3).astype(np.float32)
    scores = np.round(np.clip(0.2 + 0.25 * target + rng.normal(0, 0.2, 3000), 0.001, 0.999), 2)
    days = np.sort(rng.integers(MARCH_2013 - 2, MARCH_2013 + 80, 3000))
    return target, scores.astype(np.float32), days, {"carrier": rng.choice(["AA", "B6", "UA"], 3000)}


def test_binary_metrics_equal_those_of_scikit_learn(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    target, scores, *_ = scored
    ours = point_metrics(target, scores, LOSSES["binary"])
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
    ours = point_metrics(target, scores, LOSSES["multiclass"])
    wide = scores.astype(np.float64) / scores.astype(np.float64).sum(axis=1, keepdims=True)
    assert ours["accuracy"] == metrics.accuracy_score(target, wide.argmax(axis=1))
    assert ours["log_loss"] == pytest.approx(metrics.log_loss(target, wide), rel=1e-6)
    assert ours["macro_auc"] == pytest.approx(metrics.roc_auc_score(target, wide, multi_class="ovr"), rel=1e-6)


def test_regression_metrics_by_hand():
    ours = point_metrics(
        np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 1.0]), recorded_loss({"loss": "quantile", "quantile": 0.9})
    )
    assert ours["mae"] == pytest.approx(4 / 3) and ours["rmse"] == pytest.approx(np.sqrt(10 / 3))
    assert ours["pinball"] == pytest.approx((0.1 * 1 + 0.9 * 3) / 3)


def test_block_sums_added_up_are_the_metric_itself(scored):
    target, scores, days, _ = scored
    numbers = np.random.default_rng(2)
    kinds, shares = numbers.integers(0, 3, 3000), numbers.dirichlet(np.ones(3), 3000).round(2)
    place, blocks = numbered_blocks(days)
    for loss, truth, found in (("binary", target, scores), ("multiclass", kinds, shares), ("squared", target, scores)):
        weight = numbers.integers(0, 4, 3000) / 2
        rows = Rows(truth.astype(float), found.astype(float), weight=weight, threshold=0.3)
        for metric in LOSSES[loss].metrics_at(0.3 if loss == "binary" else None).values():
            assert metric.in_blocks(rows, place, blocks).whole() == pytest.approx(metric.point(rows), rel=1e-9), (
                metric.name
            )


def test_a_metric_under_counts_of_blocks_is_that_of_repeated_blocks(scored):
    target, scores, days, _ = scored
    place, blocks = numbered_blocks(days)
    counts = np.random.default_rng(5).poisson(1.0, (3, blocks))
    rows = Rows(target.astype(float), scores.astype(float), threshold=0.3)
    for metric in LOSSES["binary"].metrics_at(0.3).values():
        sums = metric.in_blocks(rows, place, blocks)
        drawn = sums.drawn(counts.astype(float))
        for place_of, times in zip(drawn, counts, strict=True):
            repeated = np.repeat(np.arange(3000), times[place])
            expected = point_metrics(target[repeated], scores[repeated], LOSSES["binary"], threshold=0.3)[metric.name]
            assert place_of == pytest.approx(expected, rel=1e-9), metric.name
        kept = place != 7
        expected = point_metrics(target[kept], scores[kept], LOSSES["binary"], threshold=0.3)[metric.name]
        assert sums.without_each()[7] == pytest.approx(expected, rel=1e-9), metric.name


def test_groups_of_scores_hardly_change_the_spread_of_a_ranking_metric():
    rng = np.random.default_rng(6)
    target = (rng.random(20_000) < 0.3).astype(float)
    rows = Rows(target, rng.normal(size=20_000) + target)  # 20,000 scores in 512 groups
    place, blocks = numbered_blocks(np.arange(20_000) // 500)
    for name in ("roc_auc", "average_precision"):
        metric = METRICS["binary"][name]
        left = metric.in_blocks(rows, place, blocks).without_each()
        exact = [metric.point(Rows(rows.target[place != b], rows.scores[place != b])) for b in range(blocks)]
        assert np.std(left) == pytest.approx(np.std(exact), rel=0.02), name


def days_of_moods(seed: int, days: int, correlation: float, rows: int = 40) -> Scored:
    """Rows of days whose scores are lifted, or not, by a mood that lasts: an autoregression."""
    rng = np.random.default_rng(seed)
    mood = np.zeros(days + 30)
    for day in range(1, days + 30):
        mood[day] = correlation * mood[day - 1] + np.sqrt(1 - correlation**2) * rng.normal()
    error = np.repeat(mood[30:], rows) + rng.normal(size=days * rows)
    return on_days(np.zeros(days * rows), error, np.repeat(np.arange(days), rows))


@pytest.mark.parametrize(("days", "correlation"), [(14, 0.0), (28, 0.3), (60, 0.5), (28, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say_on_days_that_are_alike(days, correlation):
    """The mean square error of moods of variance 1 and noise of variance 1 is 2; of moods alike for days on end, too."""
    config, held, by_rows = EvaluateConfig(bootstrap=200, confidence=0.9), 0, 0
    for seed in range(300):
        rows = days_of_moods(seed, days, correlation)
        error = np.abs(rows.scores)
        truth = np.sqrt(2) * np.sqrt(2 / np.pi)  # the mean of |a normal of variance 2|
        low, high = intervals(
            rows, {**dict.fromkeys(METRICS["regression"], np.nan), "mae": error.mean()}, LOSSES["squared"], config
        )["mae"]
        held += low <= truth <= high
        spread = 1.645 * error.std() / np.sqrt(len(error))
        by_rows += abs(error.mean() - truth) <= spread
    assert 0.85 <= held / 300 <= 0.96, held / 300
    assert by_rows / 300 < 0.7, "else rows would have done"


def test_intervals_repeat_and_do_not_depend_on_the_order_of_rows(scored):
    target, scores, days, _ = scored
    values = point_metrics(target, scores, LOSSES["binary"])
    order = np.random.default_rng(0).permutation(3000)
    first = intervals(on_days(target, scores, days), values, LOSSES["binary"], CONFIG)
    again = intervals(on_days(target[order], scores[order], days[order]), values, LOSSES["binary"], CONFIG)
    assert set(first) == set(METRICS["binary"])
    for name, bounds in first.items():
        assert bounds == pytest.approx(again[name], rel=1e-12) and bounds[0] < values[name] < bounds[1]


def test_fewer_than_five_days_give_no_interval_and_rows_by_themselves_do(scored):
    target, scores, *_ = scored
    few = on_days(target, scores, np.arange(3000) // 1000)
    assert not evaluate_scores(few, LOSSES["binary"], CONFIG, {})[1]["intervals"]
    rows = Scored(target, scores, few.days, np.arange(3000))
    assert set(evaluate_scores(rows, LOSSES["binary"], CONFIG, {})[1]["intervals"]) == set(METRICS["binary"])


def test_breakdowns_cover_every_row_by_month(scored):
    target, scores, days, slices = scored
    flat, details = evaluate_scores(on_days(target, scores, days), LOSSES["binary"], CONFIG, slices)
    assert sum(part["rows"] for part in details["by_month"]) == flat["rows"] == 3000
    assert [part["value"] for part in details["by_month"]] == ["2013-02", "2013-03", "2013-04", "2013-05"]
    carriers = details["slices"]["carrier"]
    assert sum(part["rows"] for part in carriers) == 3000
    some = carriers[0]
    mask = slices["carrier"] == some["value"]
    assert some["roc_auc"] == point_metrics(target[mask], scores[mask], LOSSES["binary"])["roc_auc"]
    json.dumps(details, allow_nan=False)


def test_what_cannot_be_computed_says_why():
    empty = evaluate_scores(on_days(np.zeros(0), np.zeros(0)), LOSSES["binary"], CONFIG, {"a": np.zeros(0, object)})
    assert empty[0]["rows"] == 0 and "no rows" in empty[1]["not_computable"]["roc_auc"]
    flat, details = evaluate_scores(on_days(np.ones(5), np.full(5, 0.5)), LOSSES["binary"], CONFIG, {})
    assert np.isnan(flat["roc_auc"]) and "same target" in details["not_computable"]["roc_auc"]
    assert flat["log_loss"] == pytest.approx(np.log(2))
    flat, details = evaluate_scores(on_days([0.0, 1], [0.5, np.nan]), LOSSES["binary"], CONFIG, {})
    assert "not finite" in details["not_computable"]["brier"]


def test_rows_of_a_class_that_training_never_saw_are_counted_apart():
    rows = on_days([0.0, 1, np.nan, 1], [0.2, 0.7, 0.5, 0.9])
    flat, details = evaluate_scores(rows, LOSSES["binary"], CONFIG, {"s": np.array(list("abca"))})
    assert flat["rows"] == 3 and details["unknown_target"] == 1 and flat["roc_auc"] == 1.0


def test_a_metric_that_the_loss_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"found 'roc_acu'.*roc_auc"):
        watched_metric(LOSSES["binary"], "roc_acu")


def flat_of(target, scores, loss, **more):
    return evaluate_scores(on_days(target, scores), LOSSES[loss], CONFIG, {}, **more)


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
