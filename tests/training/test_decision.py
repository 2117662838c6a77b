"""Thresholds against scikit-learn and a search over all of them; how a decision is kept, and refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from engine.config import schema
from engine.config.sections.training import EvaluateConfig
from engine.errors import UserError
from engine.training.curves import binary_curves, by_prediction
from engine.training.decision import best_f1, decide, fit_decision, least_cost
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS, Rows

rows = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.5, 1.0, 3.0])),
    min_size=2,
    max_size=30,
).filter(lambda found: len({target for target, _, _ in found}) == 2)


def arrays(found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target, scores, weight = (np.array(column, np.float64) for column in zip(*found, strict=True))
    return target, scores, weight


@settings(max_examples=200, deadline=None)
@given(rows)
def test_f1_of_the_threshold_is_the_largest_that_scikit_learn_finds(found) -> None:
    target, scores, weight = arrays(found)
    reached = {
        level: f1_score(target, scores >= level, sample_weight=weight, zero_division=0.0) for level in np.unique(scores)
    }
    best = best_f1(target, scores, weight)
    assert reached[best] == pytest.approx(max(reached.values()), abs=1e-12)
    assert best == max(level for level, value in reached.items() if value >= max(reached.values()) - 1e-12)


@settings(max_examples=200, deadline=None)
@given(rows, st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.0, 1.0, 7.0]))
def test_no_threshold_costs_less(found, false_positive: float, false_negative: float) -> None:
    target, scores, weight = arrays(found)

    def cost(level: float) -> float:
        wrong = np.where(scores >= level, (target == 0) * false_positive, (target == 1) * false_negative)
        return float((wrong * weight).sum())

    threshold = least_cost(target, scores, weight, false_positive, false_negative)
    assert cost(threshold) == min(cost(level) for level in [*np.unique(scores), 1.5])
    assert 0 <= threshold < 2


@settings(max_examples=50, deadline=None)
@given(rows)
def test_a_row_of_weight_three_is_the_row_three_times(found) -> None:
    target, scores, _ = arrays(found)
    times = np.where(np.arange(len(target)) % 2, 3, 1)
    thrice = np.repeat(target, times), np.repeat(scores, times), np.ones(times.sum())
    weighted = target, scores, times.astype(np.float64)
    assert best_f1(*weighted) == best_f1(*thrice)
    assert least_cost(*weighted, 1.0, 2.0) == least_cost(*thrice, 1.0, 2.0)


def test_what_there_is_to_decide_depends_on_the_task_and_the_config() -> None:
    target, scores = np.array([0.0, 1, 1, np.nan]), np.array([0.1, 0.4, 0.3, 0.9], np.float32)
    of = EvaluateConfig
    assert fit_decision(of(), LOSSES["binary"], target, scores, None) == {
        "rule": "f1",
        "threshold": float(np.float32(0.3)),
    }
    assert fit_decision(of(threshold=0.7), LOSSES["binary"], target, scores, None) == {
        "rule": "chosen",
        "threshold": 0.7,
    }
    assert fit_decision(of(threshold="none"), LOSSES["binary"], target, scores, None) is None
    assert fit_decision(of(), LOSSES["binary"], np.ones(4), scores, None) is None
    assert fit_decision(of(), LOSSES["binary"], target, scores, np.array([0.0, 1, 1, 1])) is None
    assert fit_decision(of(), LOSSES["squared"], target, scores, None) is None
    assert fit_decision(of(), LOSSES["multiclass"], target, np.stack([scores, scores], 1), None) == {"rule": "highest"}


def test_a_decision_is_made_in_float64_and_of_equal_scores_takes_the_first_class() -> None:
    below = np.array([0.7], np.float32)  # the nearest float32 is below 0.7
    assert decide({"rule": "chosen", "threshold": 0.7}, below).tolist() == [0]
    assert decide({"rule": "chosen", "threshold": float(below[0])}, below).tolist() == [1]
    assert decide({"rule": "highest"}, np.array([[0.2, 0.4, 0.4], [0.6, 0.2, 0.2]])).tolist() == [1, 0]


@pytest.mark.parametrize("value", [-0.1, 1.5, "best"])
def test_a_threshold_is_a_share_or_a_rule(value) -> None:
    with pytest.raises(UserError, match=r"threshold: must be a number from 0 to 1, or one of f1, cost, none"):
        schema.build(EvaluateConfig, {"threshold": value}, "evaluate")


# ------------------------------------------------------------------------------------------------- what is measured


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from([0.0, 0.25, 0.6]))
def test_metrics_of_decisions_are_scikit_learns_with_weights(found, threshold: float) -> None:
    target, scores, weight = arrays(found)
    of = Rows(target, scores, weight=weight, threshold=threshold)
    for name, foreign in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        ours = LOSSES["binary"].metrics_at(threshold)[name].point(of)
        theirs = foreign(target, scores >= threshold, sample_weight=weight, zero_division=np.nan)
        assert ours == pytest.approx(theirs, rel=1e-12, nan_ok=True), name
    assert "precision" not in LOSSES["binary"].metrics


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.5, 1.0, 3.0])), min_size=1))
def test_macro_metrics_are_scikit_learns_with_weights(found) -> None:
    target, chosen, weight = arrays(found)
    scores = np.eye(4)[chosen.astype(int)]
    of = Rows(target, scores, weight=weight)
    for name, foreign in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        theirs = foreign(target, chosen, sample_weight=weight, average="macro", zero_division=0)
        assert METRICS["multiclass"][f"macro_{name}"].point(of) == pytest.approx(theirs, rel=1e-12), name


def test_lift_is_the_share_of_positives_at_the_top_over_that_of_all() -> None:
    lift = METRICS["binary"]["lift_10"].point
    scores = np.arange(100) / 100
    target = (scores >= 0.95).astype(np.float64)  # 5 positives, all among the top 10
    assert lift(Rows(target, scores)) == pytest.approx(10.0)
    assert lift(Rows(target[::-1].copy(), scores)) == 0.0
    assert lift(Rows(target, np.full(100, 0.5))) == pytest.approx(1.0)  # equal scores: in proportion
    half = np.where(np.arange(100) % 2, 3.0, 1.0)
    thrice = Rows(np.repeat(target, half.astype(int)), np.repeat(scores, half.astype(int)))
    assert lift(Rows(target, scores, weight=half)) == pytest.approx(lift(thrice))


@settings(max_examples=50, deadline=None)
@given(rows, st.sampled_from([0.0, 0.25, 0.6]))
def test_curves_of_decisions_agree_with_their_definitions(found, threshold: float) -> None:
    target, scores, weight = arrays(found)
    config = EvaluateConfig(false_positive=2.0, false_negative=3.0)
    details = binary_curves(target, scores, weight, config, threshold)
    counts, taken = details["confusion"], scores >= threshold
    assert sum(counts.values()) == pytest.approx(weight.sum())
    assert counts["false_positives"] == pytest.approx((weight * taken * (target == 0)).sum())
    for level, cost in zip(details["costs"]["x"], details["costs"]["y"], strict=True):
        wrong = np.where(scores >= level, (target == 0) * 2.0, (target == 1) * 3.0)
        assert cost == pytest.approx((wrong * weight).sum() / weight.sum())
    assert details["gains"]["x"][-1] == pytest.approx(1.0) and details["gains"]["y"][-1] == pytest.approx(1.0)


def test_numbers_are_grouped_by_their_prediction() -> None:
    scores = np.repeat(np.arange(20.0), 5)
    groups = by_prediction(scores + 1, scores, np.full(100, 2.0))
    assert len(groups) == 10 and sum(row["rows"] for row in groups) == 100
    assert all(
        row["mean_error"] == pytest.approx(-1.0) and row["absolute_error"] == pytest.approx(1.0) for row in groups
    )
    assert [row["score"] for row in groups] == sorted(row["score"] for row in groups)
    assert len(by_prediction(np.arange(5.0), np.zeros(5), None)) == 1
