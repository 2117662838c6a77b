"""Conformal intervals hold the share that they promise on days not seen; a temperature is the one with the least log loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from engine.training.calibration import check_temperature, fit_temperature
from engine.training.intervals import bounds_of, fit_interval
from engine.training.losses import LOSSES, cooled, to_scores
from engine.training.target import PLAIN


def days_of(random: np.random.Generator, days: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(target, score, day) of rows whose errors have a part of the day, and grow with the score."""
    score = random.uniform(1, 10, days * rows)
    day = np.repeat(np.arange(days), rows)
    shift = random.normal(0, 1.0, days)[day]
    return score + score * (0.3 * random.normal(0, 1, len(score)) + 0.3 * shift), score, day


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_a_stated_share_of_the_rows_of_new_days_is_inside(level: float) -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(150):
        target, score, day = days_of(random, 60, 20)
        seen = day < 40
        interval = fit_interval(level, target[seen], score[seen], day[seen], None)
        lower, upper = bounds_of(interval, score[~seen])
        shares.append(np.mean((lower <= target[~seen]) & (target[~seen] <= upper)))
    error = np.std(shares) / np.sqrt(len(shares))
    assert level - 3 * error <= np.mean(shares) <= level + 0.06


def test_intervals_are_wider_where_errors_are_larger() -> None:
    target, score, day = days_of(np.random.default_rng(1), 80, 50)
    lower, upper = bounds_of(fit_interval(0.9, target, score, day, None), np.array([2.0, 9.0]))
    assert (upper - lower)[1] > 2 * (upper - lower)[0]


def test_the_scale_is_that_of_isotonic_regression() -> None:
    target, score, day = days_of(np.random.default_rng(2), 60, 30)
    interval = fit_interval(0.9, target, score, day, None)
    fitted = day % 2 == 0
    peer = IsotonicRegression().fit(score[fitted], np.abs(target - score)[fitted])
    assert np.allclose(
        interval["scales"], np.maximum(peer.predict(interval["scores"]), min(interval["scales"])), rtol=1e-9
    )


def test_too_few_days_for_a_promise_give_no_interval() -> None:
    target, score, day = days_of(np.random.default_rng(3), 8, 50)
    assert fit_interval(0.9, target, score, day, None) is None
    assert fit_interval(0.8, target, score, day, None) is not None


def test_quantiles_are_moved_apart_or_together() -> None:
    random = np.random.default_rng(4)
    day = np.repeat(np.arange(50), 40)
    target = random.normal(0, 1, len(day))
    narrow, wide = np.tile([-0.2, 0.0, 0.2], (len(day), 1)), np.tile([-9.0, 0.0, 9.0], (len(day), 1))
    lower, upper = bounds_of(fit_interval(0.8, target, narrow, day, None), narrow)
    assert 0.78 < np.mean((lower <= target) & (target <= upper)) < 0.88
    assert fit_interval(0.8, target, wide, day, None)["width"] == 0.0


def test_a_row_of_weight_three_is_the_row_three_times_and_one_without_a_target_is_not_there() -> None:
    target, score, day = days_of(np.random.default_rng(5), 40, 10)
    weight = np.where(np.arange(len(target)) % 3, 1.0, 3.0)
    times = weight.astype(int)
    weighted = fit_interval(0.8, target, score, day, weight)
    repeated = fit_interval(0.8, *(np.repeat(values, times) for values in (target, score, day)), None)
    assert weighted["width"] == pytest.approx(repeated["width"], rel=0.05)
    more = [np.append(values, extra) for values, extra in ((target, np.nan), (score, 3.0), (day, 99), (weight, 1.0))]
    assert fit_interval(0.8, more[0], more[1], more[2], more[3]) == weighted


def test_bounds_of_a_row_do_not_depend_on_other_rows() -> None:
    target, score, day = days_of(np.random.default_rng(6), 60, 30)
    interval = fit_interval(0.9, target, score, day, None)
    together = np.stack(bounds_of(interval, score.astype(np.float32)))
    alone = np.concatenate(
        [np.stack(bounds_of(interval, score[k : k + 1].astype(np.float32))) for k in range(len(score))], axis=1
    )
    assert together.tobytes() == alone.tobytes()


def scores_at(loss: str, logits: np.ndarray) -> Any:
    return lambda temperature: to_scores(cooled(LOSSES[loss], temperature), logits, PLAIN, exact=True)


def test_the_temperature_is_that_of_a_logistic_regression_on_the_output() -> None:
    random = np.random.default_rng(7)
    truth = random.normal(0, 1.5, 4000)
    target = (random.random(4000) < expit(truth)).astype(float)
    logits = (3 * truth)[:, None].astype(np.float32)
    found = fit_temperature(scores_at("binary", logits), target, None)
    peer = LogisticRegression(fit_intercept=False, C=1e12, tol=1e-10).fit(logits.astype(np.float64), target)
    assert found == pytest.approx(1 / peer.coef_[0, 0], rel=1e-3)
    assert 2.5 < found < 3.5


def test_members_have_one_temperature_for_the_mean_of_their_probabilities() -> None:
    random = np.random.default_rng(9)
    logits = random.normal(0, 2, (3000, 3, 1)).astype(np.float32)
    means = expit(logits[:, :, 0] / 1.7).mean(axis=1)
    target = (random.random(3000) < means).astype(float)
    assert fit_temperature(scores_at("binary", logits), target, None) == pytest.approx(1.7, rel=0.15)


def test_several_classes_have_one_temperature_and_one_class_has_none() -> None:
    random = np.random.default_rng(8)
    truth = random.normal(0, 1, (6000, 3))
    chances = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)
    target = (random.random((6000, 1)) > chances.cumsum(axis=1)).sum(axis=1).astype(float)
    found = fit_temperature(scores_at("multiclass", (0.5 * truth).astype(np.float32)), target, np.ones(6000))
    assert found == pytest.approx(0.5, abs=0.05)
    assert fit_temperature(scores_at("binary", truth[:, :1].astype(np.float32)), np.ones(6000), None) is None


def test_a_temperature_at_its_limit_is_warned_about() -> None:
    target = np.arange(200) % 2
    for logits, said in (
        (target * 2.0 - 1, "tell all validation rows apart"),
        (50 - target * 100.0, "next to nothing"),
    ):
        found = fit_temperature(scores_at("binary", logits.astype(np.float32)[:, None]), target, None)
        assert found is not None and said in (check_temperature(found) or "")
    assert check_temperature(1.7) is None and check_temperature(15) is None
