"""Ripening: the age by which labels have arrived, and the weights of those that have, against twins and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from engine.config import units
from engine.features.instants import NEVER
from engine.training import ripening
from engine.training.ripening import arrival_curve, label_horizon, ripe_weights

D = units.MICROSECONDS["d"]

# -------------------------------------------------------------------------------------------------------- the horizon


def test_the_horizon_of_complete_labels_is_their_quantile() -> None:
    event = np.zeros(1000, np.int64)
    known = np.arange(1, 1001) * D
    assert label_horizon(event, known, 2000 * D) == pytest.approx(950 * D, rel=0.01)  # the last 1 % is not firm


def test_labels_that_have_not_arrived_do_not_make_labels_look_quick() -> None:
    rng = np.random.default_rng(0)
    event = np.sort(rng.integers(0, 365, 20_000)) * D
    delay = rng.integers(20, 121, 20_000) * D
    now = 365 * D
    found = label_horizon(event, event + delay, now)
    arrived = event + delay <= now
    naive = np.quantile(delay[arrived & (event > now - 150 * D)], 0.95)
    assert abs(found - np.quantile(delay, 0.95)) < 2 * D
    assert naive < np.quantile(delay, 0.95) - 5 * D  # the test can tell


def test_rows_that_never_get_a_label_do_not_lengthen_the_horizon() -> None:
    event = np.arange(2000, dtype=np.int64) * D // 10
    known = event + 3 * D
    known[::3] = NEVER
    assert label_horizon(event, known, 200 * D) == 3 * D
    assert label_horizon(event, np.full(2000, NEVER), 200 * D) == 0


def test_the_horizon_is_where_the_kaplan_meier_curve_of_scipy_crosses() -> None:
    rng = np.random.default_rng(3)
    event = np.sort(rng.integers(0, 300 * D, 3000))
    known = event + rng.gamma(2, 20, 3000).astype(np.int64) * D
    now = 300 * D
    seen = known <= now
    delays = stats.CensoredData(uncensored=(known - event)[seen], right=(now - event)[~seen])
    curve = stats.ecdf(delays).cdf
    at_risk = np.array([np.count_nonzero(np.where(seen, known - event, now - event) >= q) for q in curve.quantiles])
    firm = curve.probabilities[at_risk >= 0.01 * 3000]
    assert label_horizon(event, known, now) == curve.quantiles[np.searchsorted(firm, 0.95 * firm[-1])]


def test_what_comes_after_now_changes_neither_the_horizon_nor_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ripening, "SAMPLE", 1000)  # the sample must not move either
    rng = np.random.default_rng(4)
    event = np.sort(rng.integers(0, 300 * D, 5000))
    known = event + rng.gamma(2, 20, 5000).astype(np.int64) * D
    group, now = rng.integers(0, 2, 5000), 200 * D
    past = event < now
    cut = np.where(known <= now, known, NEVER)[past]
    assert label_horizon(event, known, now) == label_horizon(event[past], cut, now) > 0
    whole = ripe_weights(event, known, group, now)
    assert np.array_equal(whole[past], ripe_weights(event[past], cut, group[past], now)) and whole.max() > 1.5


# -------------------------------------------------------------------------------------------------------- the weights


def naive_curve(delay: np.ndarray, age: np.ndarray, at: int) -> float:
    """Lagakos, Barraj & De Gruttola (1988), a product over the delays after `at`."""
    chance = 1.0
    for time in sorted({int(value) for value in delay if value > at}):
        at_risk = sum(1 for d, a in zip(delay, age, strict=True) if d <= time <= a)
        if at_risk >= max(ripening.AT_RISK * len(delay), 1):
            chance *= 1 - sum(1 for d in delay if d == time) / at_risk
    return chance


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=40))
def test_the_curve_is_that_of_its_formula(pairs: list[tuple[int, int]]) -> None:
    delay = np.array([min(pair) for pair in pairs])
    age = np.array([max(pair) for pair in pairs])
    at = np.arange(-1, 15)
    expected = [naive_curve(delay, age, int(value)) for value in at]
    assert arrival_curve(delay, age, at) == pytest.approx(expected, abs=1e-12)


def test_where_every_row_is_old_the_curve_is_the_share_that_has_arrived() -> None:
    delay = np.random.default_rng(0).integers(0, 50, 2000)
    at = np.arange(0, 49)
    expected = stats.ecdf(delay).cdf.evaluate(at)
    assert arrival_curve(delay, np.full(2000, 100), at) == pytest.approx(expected)


def test_the_curve_finds_the_delays_behind_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 gamma delays over 200 days, of which the young rows show the fast ones only."""
    monkeypatch.setattr(ripening, "SAMPLE", 15_000)
    rng = np.random.default_rng(1)
    age, delay = rng.uniform(0, 200, 20_000), rng.gamma(2.0, 20.0, 20_000)
    seen = delay <= age
    at = np.array([10.0, 25.0, 50.0, 100.0, 150.0])
    truth = stats.gamma(2.0, scale=20.0).cdf(at)
    found = arrival_curve(delay[seen], age[seen], at)
    assert np.abs(found - truth).max() < 0.02
    assert np.abs(np.array([np.mean(delay[seen] <= value) for value in at]) - truth).max() > 0.05  # the test can tell


@pytest.mark.parametrize("fast", [0, 1])
def test_weighted_rows_have_the_share_of_positives_of_all_rows(fast: int) -> None:
    rng = np.random.default_rng(2)
    event = np.sort(rng.integers(0, 120 * D, 20_000))
    positive = (rng.random(20_000) < 0.25).astype(np.int64)
    delay = np.where(positive == fast, rng.gamma(2.0, 1.0, 20_000), rng.gamma(2.0, 15.0, 20_000))
    known, now = event + (delay * D).astype(np.int64), 120 * D
    ripe = known <= now
    weight = ripe_weights(event, known, positive, now)
    assert weight.dtype == np.float32 and (weight[~ripe] == 1).all() and weight.max() <= ripening.LARGEST_WEIGHT
    assert abs(np.average(positive[ripe], weights=weight[ripe]) - 0.25) < 0.02
    assert abs(positive[ripe].mean() - 0.25) > 0.04  # the bias that the weights undo


def test_a_small_group_takes_the_curve_of_all_rows_and_labels_that_are_there_at_once_weigh_one() -> None:
    rng = np.random.default_rng(5)
    event = np.sort(rng.integers(0, 100 * D, 3000))
    known, group = event + rng.integers(0, 60, 3000) * D, np.zeros(3000, np.int64)
    rare = group.copy()
    rare[::100] = 1
    alone = ripe_weights(event, known, group, 100 * D)
    assert np.array_equal(ripe_weights(event, known, rare, 100 * D)[rare == 1], alone[rare == 1])
    assert (ripe_weights(event, event, group, 100 * D) == 1).all()
    assert (ripe_weights(event, np.full(3000, NEVER), group, 100 * D) == 1).all()


# ------------------------------------------------------------------------------------------------------- the simulation


def gap(rule: str, decides: str, seed: int, slowness: float) -> float:
    """Calibration error, on labels of later rows, of a logistic regression trained at day 90 with the rows that the rule keeps,
    beyond that of the one that has every label. Positives are slow, or rows whose x is large, which are positive more often.
    """
    rng = np.random.default_rng(seed)
    event = np.sort(rng.integers(0, 120 * D, 24_000))
    x = rng.standard_normal(len(event))
    positive = (rng.random(len(event)) < 1 / (1 + np.exp(1.5 - x))).astype(np.int64)
    slow = positive == 1 if decides == "class" else x > 0
    known = event + (rng.gamma(2.0, np.where(slow, slowness, 1.0)) * D).astype(np.int64)
    now, later = 90 * D, event >= 90 * D
    cut = now - label_horizon(event, known, now) if rule == "wait" else now
    rows = (event < now) if rule == "all" else (event < cut) & (known <= now)
    weight = ripe_weights(event, known, positive, now) if rule == "weight" else np.ones(len(event))

    with threadpool_limits(1):
        model = LogisticRegression(C=1e6).fit(x[rows, None], positive[rows], weight[rows])
        score = model.predict_proba(x[later, None])[:, 1]
    bins = np.argsort(np.argsort(score)) * 10 // len(score)
    sums = [np.bincount(bins, values) for values in (score, positive[later])]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(score))
    return error if rule == "all" else error - gap("all", decides, seed, slowness)


def test_waiting_and_weights_bring_back_the_rate_of_slow_positives() -> None:
    gaps = {rule: np.mean([gap(rule, "class", seed, 10.0) for seed in range(4)]) for rule in ("none", "weight", "wait")}
    assert gaps["none"] > 0.015  # what both undo
    assert max(abs(gaps["weight"]), abs(gaps["wait"])) < 0.005


def test_where_a_feature_decides_the_delay_weights_do_harm_and_waiting_does_none() -> None:
    gaps = {
        rule: np.mean([gap(rule, "feature", seed, 20.0) for seed in range(4)]) for rule in ("none", "weight", "wait")
    }
    assert max(abs(gaps["none"]), abs(gaps["wait"])) < 0.005
    assert gaps["weight"] > 0.015
