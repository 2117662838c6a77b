"""Estimated quality against closed forms, scikit-learn, and the labels that come later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from engine.config.sections.monitoring import BusinessConfig
from engine.monitoring import performance
from engine.monitoring.business import business
from engine.monitoring.estimate import (
    Meaning,
    Unlabelled,
    drawn_labels,
    error_bound,
    estimate,
    expected,
    expected_target,
    learned,
    meaning_of_scores,
    past_errors,
    rolling_origins,
)
from engine.monitoring.history import METRIC, errors_of
from engine.monitoring.performance import WAITING, Outcomes, PerformanceRecord, measure
from engine.monitoring.statistics import ColumnSpec
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS, Metric, Rows, find_metric
from tests.monitoring.test_performance import judge
from tests.monitoring.test_performance import outcomes as some_outcomes

EDGES = np.linspace(0, 1, 21)
SCORE = ColumnSpec("prediction", "prediction", EDGES, 0.3, ("below", *map(str, range(20)), "above"))


def outcomes(rows: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(target, scores) of a model whose scores are too sure of themselves; `shift` moves the scores, not their meaning."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(shift, 1.0, rows)
    target = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float64)
    return target, 1 / (1 + np.exp(-2 * logit))


def unlabelled(scores: np.ndarray, **facts: object) -> Rows:
    return Rows(np.full(len(scores), np.nan), scores, **facts)


def expected_of(metrics: Mapping[str, Metric], meaning: Meaning | None, rows: Rows) -> dict[str, float]:
    """What `expected` gives by the meaning of the scores."""
    assert meaning is not None
    return expected(metrics, meaning(rows.scores), rows)


def test_the_meaning_of_a_score_is_scikit_learns_isotonic_regression() -> None:
    target, scores = outcomes(3_000, 1)
    meaning = meaning_of_scores("binary", target, scores)
    assert meaning is not None
    asked = np.linspace(-0.1, 1.1, 500)
    foreign = IsotonicRegression(out_of_bounds="clip").fit(scores, target)
    np.testing.assert_allclose(meaning(asked).chance[:, 1], foreign.predict(asked), atol=1e-12)
    np.testing.assert_allclose(expected_target(meaning(asked)), foreign.predict(asked), atol=1e-12)


def test_a_label_counts_as_often_as_its_weight_says() -> None:
    target, scores = outcomes(400, 2)
    times = np.where(np.arange(400) % 3 == 0, 3, 1)
    weighted = meaning_of_scores("binary", target, scores, times.astype(np.float64))
    thrice = meaning_of_scores("binary", np.repeat(target, times), np.repeat(scores, times))
    assert weighted is not None and thrice is not None
    np.testing.assert_allclose(weighted(scores).chance, thrice(scores).chance, atol=1e-12)


def test_expected_metrics_are_their_closed_forms() -> None:
    target, scores = outcomes(2_000, 3)
    meaning = meaning_of_scores("binary", target, scores)
    assert meaning is not None
    chance = meaning(scores).chance[:, 1]
    found = expected_of(METRICS["binary"], meaning, unlabelled(scores))
    assert found["brier"] == pytest.approx((chance * (1 - scores) ** 2 + (1 - chance) * scores**2).mean(), rel=1e-12)
    losses = chance * np.log(scores) + (1 - chance) * np.log1p(-scores)
    assert found["log_loss"] == pytest.approx(-losses.mean(), rel=1e-9)
    both = np.r_[np.ones(2_000), np.zeros(2_000)]
    foreign = roc_auc_score(both, np.r_[scores, scores], sample_weight=np.r_[chance, 1 - chance])
    assert found["roc_auc"] == pytest.approx(foreign, rel=1e-12)


def test_scores_that_move_are_followed_and_uncalibrated_scores_do_not_mislead() -> None:
    meaning = meaning_of_scores("binary", *outcomes(20_000, 4))
    assert meaning is not None
    target, scores = outcomes(20_000, 5, shift=1.0)
    found = expected_of(METRICS["binary"], meaning, unlabelled(scores))
    for name, metric in METRICS["binary"].items():
        assert found[name] == pytest.approx(metric.point(Rows(target, scores)), abs=0.03), name


def test_of_several_classes_each_has_its_own_meaning_and_they_add_up_to_one() -> None:
    rng = np.random.default_rng(6)
    true = rng.dirichlet([4.0, 3.0, 3.0], 20_000)
    scores = true**1.5 / (true**1.5).sum(axis=1, keepdims=True)
    target = (rng.random((20_000, 1)) > np.cumsum(true, axis=1)).sum(axis=1).astype(np.float64)
    meaning = meaning_of_scores("multiclass", target[:10_000], scores[:10_000])
    assert meaning is not None
    later = scores[10_000:]
    np.testing.assert_allclose(meaning(later).chance.sum(axis=1), 1.0)
    found = expected_of(METRICS["multiclass"], meaning, unlabelled(later))
    for name, metric in METRICS["multiclass"].items():
        assert found[name] == pytest.approx(metric.point(Rows(target[10_000:], later)), abs=0.02), name


def test_errors_of_a_number_are_those_of_similar_scores() -> None:
    rng = np.random.default_rng(7)
    scores = rng.uniform(0, 10, 40_000)
    target = scores + rng.normal(0, 0.1 + scores / 5)  # larger predictions err more
    meaning = meaning_of_scores("regression", target[:20_000], scores[:20_000])
    assert meaning is not None
    high = scores[20_000:] > 7
    found = expected_of(METRICS["regression"], meaning, unlabelled(scores[20_000:][high]))
    for name, metric in METRICS["regression"].items():
        real = metric.point(Rows(target[20_000:][high], scores[20_000:][high]))
        assert found[name] == pytest.approx(real, rel=0.06), name
    np.testing.assert_allclose(expected_target(meaning(scores[:100])), scores[:100], atol=0.4)


def test_a_row_that_weighs_three_counts_three_times() -> None:
    meaning = meaning_of_scores("binary", *outcomes(2_000, 8))
    assert meaning is not None
    scores = outcomes(300, 9)[1]
    times = np.where(np.arange(300) % 2, 3, 1)
    weighted = expected_of(METRICS["binary"], meaning, unlabelled(scores, weight=times.astype(np.float64)))
    thrice = expected_of(METRICS["binary"], meaning, unlabelled(np.repeat(scores, times)))
    assert weighted == pytest.approx(thrice, rel=1e-12)


def test_too_few_labels_mean_nothing() -> None:
    assert meaning_of_scores("binary", *outcomes(199, 1)) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.integers(1, 20))
def test_a_window_is_estimated_from_earlier_days_only(days: list[int], length: int) -> None:
    found = np.array(days)
    last = -1
    for before, inside in rolling_origins(found, length):
        if len(inside):
            assert found[inside].min() > last and np.ptp(found[inside]) < length
            last = int(found[inside].max())
        if len(before) and len(inside):
            assert found[before].max() < found[inside].min()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.05, 0.1, 0.5]),
)
def test_the_bound_of_errors_is_the_conformal_quantile(errors: list[float], alpha: float) -> None:
    bound, kept = error_bound(errors, alpha)
    sizes = sorted(abs(error) for error in errors)
    enough = [size for k, size in enumerate(sizes, 1) if k >= (len(sizes) + 1) * (1 - alpha) - 1e-9]
    assert kept == bool(enough)
    assert bound == (enough[0] if enough else sizes[-1])
    assert kept == (len(errors) >= math.ceil(1 / alpha - 1e-9) - 1)


def test_the_target_of_the_rows_is_not_read() -> None:
    target, scores = outcomes(1_000, 10)
    meaning = meaning_of_scores("binary", target, scores)
    assert meaning is not None
    rows = unlabelled(scores)
    known = dataclasses.replace(rows, target=target)
    assert expected_of(METRICS["binary"], meaning, rows) == expected_of(METRICS["binary"], meaning, known)


# ------------------------------------------------------------------------------------------------------------ windows


def of_profile(rows: Outcomes, past: Outcomes) -> Unlabelled:
    counts = np.zeros(SCORE.width)
    counts[1:-1] = np.histogram(rows.scores, EDGES)[0]
    return Unlabelled.of_counts(SCORE, counts, past)


@pytest.mark.parametrize("rows_known", [True, False])
def test_a_window_is_estimated_from_its_rows_or_from_its_profile_alone(rows_known: bool) -> None:
    past, current = some_outcomes(30, 1000), some_outcomes(7, 3000, seed=3, shift=0.8)
    rows = Unlabelled(current.scores) if rows_known else of_profile(current, past)
    found = estimate(past, None, rows, judge(), {})["metrics"]
    truth = measure(past, current, judge())["metrics"]
    for name, tolerance in (("roc_auc", 0.012), ("log_loss", 0.02), ("brier", 0.01)):
        assert found[name]["value"] == pytest.approx(truth[name]["value"], abs=tolerance), name
    assert abs(found["log_loss"]["value"] - found["log_loss"]["reference"]) > 0.02  # it did move


def test_a_number_is_estimated_by_the_error_at_each_score() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 20_000)
    target = scores + rng.normal(0, 0.1 + scores)
    past = Outcomes(np.repeat(np.arange(20), 1000), target, scores, {})
    high = scores > 0.5
    rows = of_profile(past.take(np.flatnonzero(high)), past)
    found = estimate(past, None, rows, judge(loss=LOSSES["squared"]), {})["metrics"]["mae"]
    assert found["value"] == pytest.approx(np.abs(target - scores)[high].mean(), rel=0.05)


def test_what_cannot_be_estimated_says_why() -> None:
    few, rows = some_outcomes(3, 10), Unlabelled(np.full(5, 0.5))
    assert "no labelled reference" in estimate(None, None, rows, judge(), {})["reason"]
    assert "no predictions" in estimate(few, None, None, judge(), {})["reason"]
    assert "fewer than 200 labels" in estimate(few, None, rows, judge(), {})["reason"]


def test_recent_labels_say_what_scores_mean_now() -> None:
    past, recent = some_outcomes(30, 500), some_outcomes(28, 500, seed=4, skill=0.4)
    current = some_outcomes(7, 2000, seed=5, skill=0.4)
    rows = Unlabelled(current.scores)
    truth = find_metric("roc_auc").point(Rows(current.target, current.scores))
    known = estimate(past, recent, rows, judge(), {})
    assert known["metrics"]["roc_auc"]["value"] == pytest.approx(truth, abs=0.02)
    assert "recent days" in known["method"]
    assert estimate(past, None, rows, judge(), {})["metrics"]["roc_auc"]["value"] > truth + 0.1
    unripe = dataclasses.replace(recent, target=np.full(len(recent.target), np.nan))
    assert "reference" in estimate(past, unripe, rows, judge(), {})["method"]


def test_a_loss_alarms_only_where_past_errors_are_enough_for_the_rate_and_small() -> None:
    past = some_outcomes(60, 300)
    rng = np.random.default_rng(6)
    unsure = Unlabelled(rng.uniform(0.4, 0.6, 2_000))  # scores that separate nothing
    few = estimate(past, None, unsure, judge(), {})
    item = few["metrics"]["roc_auc"]
    assert item["past_errors"] == len(past_errors(past, judge())["roc_auc"]) == 7
    assert item["beyond"] and not item["promised"] and few["alarming"] == []
    many = estimate(past, None, unsure, judge(earlier_errors={"roc_auc": [0.01] * 20}), {})
    assert many["metrics"]["roc_auc"]["promised"] and many["alarming"] == ["roc_auc"]
    wide = estimate(past, None, unsure, judge(earlier_errors={"roc_auc": [0.5] * 20}), {})
    assert wide["metrics"]["roc_auc"]["promised"] and wide["alarming"] == []
    calm = Unlabelled(some_outcomes(7, 300, seed=8).scores)
    assert estimate(past, None, calm, judge(earlier_errors={"roc_auc": [0.01] * 20}), {})["alarming"] == []


def test_the_error_of_an_estimate_is_said_once_labels_are_known() -> None:
    past, current = some_outcomes(30, 500), some_outcomes(7, 500, seed=2)
    measured = measure(past, current, judge())["metrics"]
    item = estimate(past, None, Unlabelled(current.scores), judge(), measured)["metrics"]["roc_auc"]
    assert item["error"] == item["value"] - measured["roc_auc"]["value"]


def test_a_business_metric_is_estimated_until_its_labels_come() -> None:
    past, current = some_outcomes(30, 500), some_outcomes(7, 2_000, seed=9, known=0.3)
    labels, whole = drawn_labels(learned(past, None, judge()), current, judge()), some_outcomes(7, 2_000, seed=9)
    for expression in (
        "sum(fare * label) / count(*)",
        "5 * count_if(score > 0.5 AND label = 0) / count(*)",
        "sum(score * label) / sum(label)",
    ):
        config = {"bought": BusinessConfig(expression=expression)}
        found = business(config, past, current, judge(), labels)["bought"]
        assert found["status"] == "waiting"
        assert found["estimated"] == pytest.approx(business(config, past, whole, judge())["bought"]["value"], rel=0.03)
        assert "estimated" not in business(config, past, current, judge())["bought"]


def test_drawn_labels_are_as_frequent_as_they_are_possible() -> None:
    past, current = some_outcomes(30, 500), some_outcomes(7, 2_000, seed=9, known=0.0)
    drawn = drawn_labels(learned(past, None, judge()), current, judge())
    meaning = meaning_of_scores("binary", past.target, past.scores)
    assert np.abs(drawn.mean(axis=0) - expected_target(meaning(current.scores))).max() <= 1 / len(drawn)
    assert abs(drawn[0].mean() - drawn[7].mean()) < 0.03, "each draw is a set of labels that is possible"

    def three(rows: Outcomes) -> Outcomes:
        classes = np.floor(rows.target * 2)  # 0 and 2 of three
        scores = np.stack([1 - rows.scores, np.zeros(len(classes)), rows.scores], axis=1)
        return dataclasses.replace(rows, target=classes, scores=scores)

    of_three = judge(loss=LOSSES["multiclass"], classes=("a", "b", "c"))
    several = drawn_labels(learned(three(past), None, of_three), three(current), of_three)
    assert np.unique(several).tolist() == [0.0, 2.0] and several.mean() == pytest.approx(2 * drawn.mean(), rel=0.02)


def test_windows_are_resampled_once_for_figures_that_are_measured_and_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    past, current, counted = some_outcomes(30, 500), some_outcomes(7, 2_000, seed=9), []
    plain = measure(past, current, judge()), estimate(past, None, Unlabelled(current.scores), judge(), {})
    original = performance.reference_bands
    monkeypatch.setattr(performance, "reference_bands", lambda *given: counted.append(given[2]) or original(*given))
    bands, meaning = performance.bands_of(past, judge()), learned(past, None, judge())
    assert measure(past, current, judge(), bands) == plain[0]
    assert estimate(past, None, Unlabelled(current.scores), judge(), {}, bands, meaning) == plain[1]
    assert counted == [len(current.target)]
    assert bands(10**6) == bands(10**7) and len(counted) == 2, "larger windows are of equally many rows"


def test_the_scale_of_weights_changes_no_estimate_and_rows_of_weight_0_are_not_there() -> None:
    def figures(record: PerformanceRecord) -> list[float]:
        item = record["metrics"]["roc_auc"]
        return [item["value"], item["reference"], *item["band"], record["labels"]["positive_rate"]["value"]]

    past, current = some_outcomes(30, 300), some_outcomes(7, 300, seed=2)
    plain = estimate(past, None, Unlabelled(current.scores), judge(), {})
    small = estimate(past, None, Unlabelled(current.scores, np.full(len(current.scores), 2.0**-12)), judge(), {})
    assert figures(small) == pytest.approx(figures(plain))
    twice = Unlabelled(np.tile(current.scores, 2), np.repeat([1.0, 0.0], len(current.scores)))
    assert figures(estimate(past, None, twice, judge(), {})) == pytest.approx(figures(plain))
    nothing = estimate(past, None, Unlabelled(current.scores, np.zeros(len(current.scores))), judge(), {})
    assert "no predictions" in nothing["reason"]
    weightless = dataclasses.replace(past, weight=np.where(np.arange(len(past.target)) < 50, 1.0, 0.0))
    fallen_back = estimate(past, weightless, Unlabelled(current.scores), judge(), {})
    assert fallen_back["metrics"] == plain["metrics"] and "9,000 labels of the reference" in fallen_back["method"]


def test_past_errors_are_of_separate_windows_that_ended_before_with_enough_labels() -> None:
    def row(first: int, days: int, error: float, status: str = "quiet") -> dict[str, object]:
        period = {"from": f"2020-01-{first:02}T00:00:00+00:00", "to": f"2020-01-{first + days:02}T00:00:00+00:00"}
        return {**period, "kind": METRIC, "column": "brier", "status": status, "value": 0.1, "estimated": 0.1 + error}

    rows = [row(15, 7, 0.5), row(8, 7, 0.25), row(1, 7, 0.125), row(4, 7, 8.0), row(1, 3, 9.0)]
    rows.append({**row(1, 7, 7.0, WAITING), "column": "ece"})
    start = "2020-01-15T00:00:00+00:00"
    found = errors_of(rows, 7, start)
    assert {name: [round(error, 9) for error in errors] for name, errors in found.items()} == {"brier": [0.125, 0.25]}
