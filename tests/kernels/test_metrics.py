from __future__ import annotations

import functools
import itertools
import math
import operator

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from kernels import jit, metrics
from tests import naive
from tests.kernels.cases import NUMBERS, examples, layouts, same_bytes

ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(st.sampled_from([0.0, -0.0, 0.5, 1.0]), st.floats(0, 1)), st.integers(0, 4)),
    max_size=14,
)
BINARY = (metrics.roc_auc, metrics.average_precision, metrics.log_loss, metrics.brier, metrics.ece)


@examples(120)
@given(ROWS, st.randoms(use_true_random=False))
def test_ranking_equals_the_slow_twin_in_any_row_order(rows, random):
    y, score, weight = (np.array([r[k] for r in rows], float) for k in (0, 1, 2))
    ones = np.ones(len(y))
    for w, given_weight in ((ones, None), (weight / 4, weight / 4)):
        np.testing.assert_allclose(metrics.roc_auc(y, score, given_weight), naive.roc_auc(y, score, w), atol=1e-14)
        expected = naive.average_precision(y, score, w)
        np.testing.assert_allclose(metrics.average_precision(y, score, given_weight), expected, atol=1e-14)
    order = list(range(len(y)))
    random.shuffle(order)
    for metric in BINARY:
        for w in (None, weight / 7):
            first, second = metric(y, score, w), metric(y[order], score[order], None if w is None else w[order])
            assert first == second or (math.isnan(first) and math.isnan(second))


EDGE = st.sampled_from([0.0, -0.0, 0.1, 0.5, 0.7, 1.0, 5e-324, 2.0**-52, 1 - 2.0**-53])
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, 1e-290, 1e300]), st.floats(0, 9))
PREDICTED = st.lists(st.tuples(st.integers(0, 1), st.one_of(EDGE, st.floats(0, 1)), WEIGHTS), max_size=14)
FINITE = NUMBERS.filter(lambda v: abs(v) <= 1e300)  # beyond, a difference may be infinite


def underflow(weight):
    """How far a weighted mean may be off because each weight * loss is rounded to a double: 2**-1074 a row below 2**-1022."""
    total = math.fsum(weight)
    rounding = len(weight) * 5e-324
    return rounding + rounding / total if total else 0.0


@examples(200)
@given(PREDICTED, st.integers(1, 11), st.booleans())
def test_losses_and_calibration_equal_the_slow_twin(rows, bins, weighted):
    y, score, weight = (np.array([r[k] for r in rows], float) for k in (0, 1, 2))
    given_weight, weight = (weight, weight) if weighted else (None, np.ones(len(y)))
    near = dict(rtol=1e-13, atol=1e-15 + underflow(weight))
    np.testing.assert_allclose(metrics.log_loss(y, score, given_weight), naive.log_loss(y, score, weight), **near)
    np.testing.assert_allclose(metrics.brier(y, score, given_weight), naive.brier(y, score, weight), **near)
    expected = naive.ece(y, score, weight, np.linspace(0, 1, bins + 1).tolist())
    np.testing.assert_allclose(metrics.ece(y, score, given_weight, bins), expected, **near)


@examples(150)
@given(st.lists(st.tuples(FINITE, FINITE, st.floats(0, 9)), max_size=12), st.sampled_from([0.01, 0.5, 0.9]))
@example([(0.0, 4.7201114429876665e-152, 1.1125369292536007e-308)], 0.01)
def test_pinball_equals_the_slow_twin(rows, quantile):
    y, score, weight = (np.array([r[k] for r in rows], float) for k in (0, 1, 2))
    for given_weight, w in ((None, np.ones(len(y))), (weight, weight)):
        expected = naive.pinball(y, score, quantile, w)
        near = dict(rtol=1e-13, atol=underflow(w))
        np.testing.assert_allclose(metrics.pinball(y, score, quantile, given_weight), expected, **near)


SUMS = {
    metrics.log_loss_sum: metrics.log_loss,
    metrics.brier_sum: metrics.brier,
    lambda *rows: metrics.pinball_sum(rows[0], rows[1], 0.3, rows[2]): lambda *rows: metrics.pinball(
        rows[0], rows[1], 0.3, rows[2]
    ),
}


@examples(80)
@given(PREDICTED, st.lists(st.integers(0, 14), max_size=3), st.booleans())
def test_sums_of_any_split_give_the_bits_of_the_whole(rows, cuts, weighted):
    y, score, weight = (np.array([r[k] for r in rows], float) for k in (0, 1, 2))
    edges = [0, *sorted(min(cut, len(y)) for cut in cuts), len(y)]
    parts = [(y[a:b], score[a:b], weight[a:b] if weighted else None) for a, b in itertools.pairwise(edges)]
    whole = (y, score, weight if weighted else None)
    for sums, metric in SUMS.items():
        assert same_bytes([sum((sums(*part) for part in parts), metrics.LossSum()).mean(), metric(*whole)])
    tables = [metrics.reliability_sum(*part, bins=4) for part in parts]
    merged = functools.reduce(operator.add, tables)
    assert same_bytes([merged.ece(), metrics.ece(*whole, bins=4)])
    assert all(same_bytes(pair) for pair in zip(merged.table(), metrics.reliability(*whole, bins=4), strict=True))


def sample(seed, n=300):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, n), rng.random(n).round(2), rng.random(n)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_scikit_learn(seed, weighted):
    y, score, w = sample(seed)
    w = w if weighted else None
    pairs = [
        (metrics.roc_auc, sklearn.metrics.roc_auc_score),
        (metrics.average_precision, sklearn.metrics.average_precision_score),
        (metrics.log_loss, sklearn.metrics.log_loss),
        (metrics.brier, sklearn.metrics.brier_score_loss),
    ]
    for ours, theirs in pairs:
        assert math.isclose(ours(y, score, w), theirs(y, score, sample_weight=w), rel_tol=1e-12)
    ours = metrics.pinball(y, score, 0.3, w)
    assert math.isclose(ours, sklearn.metrics.mean_pinball_loss(y, score, alpha=0.3, sample_weight=w), rel_tol=1e-12)
    fpr, tpr, _ = sklearn.metrics.roc_curve(y, score, sample_weight=w, drop_intermediate=False)
    curve = metrics.roc_curve(y, score, w)
    np.testing.assert_allclose(curve.x, fpr, atol=1e-12)
    np.testing.assert_allclose(curve.y, tpr, atol=1e-12)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(y, score, sample_weight=w)
    curve = metrics.precision_recall_curve(y, score, w)
    np.testing.assert_allclose(curve.x[::-1], recall[:-1], atol=1e-12)
    np.testing.assert_allclose(curve.y[::-1], precision[:-1], atol=1e-12)


def test_reliability_agrees_with_scikit_learn_and_gives_ece():
    y, score, _ = sample(5)
    score = score * 0.98 + 0.005  # on no bin edge
    table = metrics.reliability(y, score, bins=7)
    positive, mean = calibration_curve(y, score, n_bins=7)
    np.testing.assert_allclose(table.positive, positive, atol=1e-12)
    np.testing.assert_allclose(table.score, mean, atol=1e-12)
    expected = np.sum(table.weight * np.abs(positive - mean)) / len(y)
    assert math.isclose(metrics.ece(y, score, bins=7), expected, rel_tol=1e-12)


@pytest.mark.parametrize("scores", ["few", "one", "many", "infinite"])
def test_parts_between_pivots_add_up_to_the_whole(scores, monkeypatch):
    """Small enough to see the slow twin, cut up as millions of rows are."""
    rng = np.random.default_rng(5)
    n = 100 if jit.DISABLED else 400
    y = rng.integers(0, 2, n)
    score = {"few": rng.integers(0, 3, n) / 3, "one": np.zeros(n), "many": rng.standard_normal(n)}.get(
        scores, rng.choice([-np.inf, -1.0, 2.0, np.inf], n)
    )
    whole = metrics.roc_auc(y, score, threads=4)
    monkeypatch.setattr(metrics, "_PARALLEL_ROWS", 0)
    assert all(metrics.roc_auc(y, score, threads=t) == whole for t in (1, 2, 3, 4, 8))
    np.testing.assert_allclose(whole, naive.roc_auc(y, score, np.ones(n)), atol=1e-14)


def test_threads_and_layouts_do_not_change_a_bit():
    y, score, w = sample(9)
    expected = metrics.roc_auc(y, score)
    assert all(metrics.roc_auc(y, score, threads=t) == expected for t in (2, 4))
    for a, b, c in zip(layouts(y), layouts(score), layouts(w), strict=True):
        assert metrics.roc_auc(a, b) == expected
        assert metrics.average_precision(a, b, c) == metrics.average_precision(y, score, w)


def test_infinite_scores_rank():
    assert metrics.roc_auc([0, 1, 0, 1], [-np.inf, np.inf, 0.0, 0.0]) == 0.875


def test_undefined_is_nan():
    for metric in BINARY:
        assert math.isnan(metric([], []))
        assert math.isnan(metric([0, 1], [0.5, 0.6], [0.0, 0.0]))
    assert math.isnan(metrics.roc_auc([1, 1], [0.1, 0.2])) and math.isnan(metrics.average_precision([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.pinball([], [], 0.5))
    assert metrics.log_loss([1], [0.0]) == -math.log(2.0**-52)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.roc_auc([2], [0.5]), ValueError, "found y=2.0 score=0.5 at 0"),
        (lambda: metrics.roc_auc([0, 1], [0.5, np.nan]), ValueError, "score=nan at 1"),
        (lambda: metrics.roc_auc([0], [0.5, 0.6]), ValueError, "y must have 2 entries"),
        (lambda: metrics.roc_auc([0], [0.5], [-1.0]), ValueError, "not negative, found -1.0"),
        (lambda: metrics.roc_auc([0], [0.5], [np.nan]), ValueError, "weight must be finite"),
        (lambda: metrics.roc_auc([0], [0.5], [1.0, 2.0]), ValueError, "weight must have 1 entries, found 2"),
        (lambda: metrics.log_loss([0], [1.5]), ValueError, r"in \[0, 1\], found 1.5"),
        (lambda: metrics.brier([0], [-0.5]), ValueError, "found -0.5"),
        (lambda: metrics.ece([0], [0.5], bins=0), ValueError, "bins must be at least 1, found 0"),
        (lambda: metrics.log_loss([0], [0.99], [1e308]), ValueError, "must be finite, found inf at 0"),
        (
            lambda: metrics.reliability_sum([0], [0.5]) + metrics.reliability_sum([0], [0.5], bins=3),
            ValueError,
            "found 3",
        ),
        (lambda: metrics.pinball([0], [1.0], 1.0), ValueError, r"quantile must be in \(0, 1\), found 1.0"),
        (lambda: metrics.pinball([np.inf], [1.0], 0.5), ValueError, "must be finite, found a difference of inf"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
