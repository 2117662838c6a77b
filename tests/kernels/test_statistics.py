from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from kernels import statistics
from kernels.profile import bins_of, column_counts, profile, profile_plan
from kernels.statistics import (
    chi_square,
    chi_square_tail,
    js_distance,
    ks_p_value,
    ks_profiles,
    psi,
    scale_of,
    wasserstein_profiles,
)
from tests import naive
from tests.kernels.cases import examples

COUNTS = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 9), st.just(2**53))), max_size=8)


@pytest.mark.parametrize(("floor", "expected"), [(1e-3, 0.466), (1e-4, 0.701), (1e-6, 1.162)])
def test_e1_psi_is_finite_with_a_stated_floor(floor, expected):
    found = psi([10] * 10, [0, *[10] * 9], floor)
    assert round(found.value, 3) == expected and found.details["floor"] == floor
    assert psi([3, 0, 5], [3, 0, 5]).value == 0.0
    assert statistics.PSI_FLOOR == 1e-4


def test_e2_what_cannot_be_computed_says_why():
    found = ks_profiles([1, 2, 0], [0, 0, 0])
    assert found.value is None and found.reason == "not computable, because current has no values"
    assert "reference and current have no values" in ks_profiles([0, 0], [0, 0]).reason
    assert "reference has no values" in psi([0, 0], [1, 2]).reason
    constant = np.full(10, 5.0)
    plan = profile_plan([bins_of(constant, 10).edges])
    counts = [column_counts(profile(c[:, None], plan), plan, 0) for c in (constant, constant + 1)]
    assert psi(*counts).value > 9 and js_distance(*counts).value == 1.0 and ks_profiles(*counts).value == 1.0


def test_e3_categories_are_compared_over_the_union():
    found = chi_square({"a": 50, "b": 50}, {"a": 45, "b": 45, "c": 10})
    assert round(found.value, 3) == 10.526 and found.details["dof"] == 2 and round(found.p, 5) == 0.00518
    assert found.details["new"] == ["c"] and found.details["vanished"] == []
    other = chi_square({"a": 4, "gone": 2}, {"a": 6, "gone": 0})
    assert other.details["vanished"] == ["gone"] and other.details["low_expected"] == 2


def test_e4_sample_sizes_are_allowed_for():
    found = chi_square({"a": 100, "b": 400}, {"a": 50, "b": 200})
    assert found.value == 0.0 and found.p == 1.0


def test_e5_the_distance_is_in_bits():
    assert js_distance([1, 1, 0, 0], [0, 0, 1, 1]).value == 1.0
    assert js_distance([1, 2, 3], [2, 4, 6]).value == 0.0


def test_e7_one_far_value_costs_nothing():
    reference, current = np.zeros(1000), np.append(np.zeros(999), 9e9)
    edges = bins_of(reference, 256).edges
    plan = profile_plan([edges])
    a, b = (profile(x[:, None], plan) for x in (reference, current))
    parts = [(column_counts(p, plan, 0), p.sums[0][2] / 2**1084, p.sums[0][3] / 2**1084) for p in (a, b)]
    assert wasserstein_profiles(*parts, edges).value == 9e6
    x = np.arange(10.0)
    assert math.isclose(scale_of(x), np.std(x, ddof=1), rel_tol=1e-15)
    assert scale_of(np.full(3, -5.0)) == 5.0 and scale_of(np.zeros(3)) == 1.0


@examples(100)
@given(COUNTS)
def test_distances_of_shares_are_bounded_symmetric_and_agree_with_the_slow_twin_and_scipy(pairs):
    p, q = (np.array([c[k] for c in pairs], np.int64) for k in (0, 1))
    for statistic in (js_distance, psi):
        found, mirrored = statistic(p, q), statistic(q, p)
        assert found.value == mirrored.value
        if p.sum() == 0 or q.sum() == 0:
            assert found.value is None and "no values" in found.reason
            continue
        assert 0 <= found.value and (statistic is psi or found.value <= 1)
        assert statistic(p, p).value == 0
    if p.sum() and q.sum():
        for floor in (1e-4, 0.2):
            expected = naive.psi(p.tolist(), q.tolist(), floor)
            np.testing.assert_allclose(psi(p, q, floor).value, expected, rtol=1e-12, atol=1e-14)
            held = [np.maximum(side / side.sum(), floor) for side in (p, q)]
            both = scipy.special.rel_entr(*held) + scipy.special.rel_entr(*held[::-1])
            np.testing.assert_allclose(psi(p, q, floor).value, np.sum(both), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            js_distance(p, q).value ** 2, naive.js_divergence(p.tolist(), q.tolist()), atol=1e-15
        )
        theirs = scipy.spatial.distance.jensenshannon(p / p.sum(), q / q.sum(), base=2)
        np.testing.assert_allclose(js_distance(p, q).value, np.nan_to_num(theirs), atol=1e-7)


@examples(60)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_profiles_bound_what_binning_leaves_open(a, b):
    edges = bins_of(a, 4).edges
    plan = profile_plan([edges])
    profiles = [profile(np.array(x)[:, None], plan) for x in (a, b)]
    counts = [column_counts(p, plan, 0) for p in profiles]
    found, true = ks_profiles(*counts), naive.ks(a, b)
    assert found.low - 1e-12 <= true <= found.high + 1e-12
    parts = [(c, p.sums[0][2] / 2**1084, p.sums[0][3] / 2**1084) for c, p in zip(counts, profiles, strict=True)]
    area, width = wasserstein_profiles(*parts, edges), max([*np.diff(edges), 1e-9])
    assert abs(area.value - naive.wasserstein(a, b)) <= 2 * width


@examples(60)
@given(*[st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any)] * 2)
def test_wasserstein_of_profiles_is_the_area_between_the_interpolated_distribution_functions(a, b):
    edges = np.array([-2.0, 0.0, 0.5, 4.0])
    a[0], a[-1], b[0], b[-1] = 0, 0, 0, 0  # what lies outside has an area of its own
    if not any(a) or not any(b):
        return
    grid = np.linspace(-2, 4, 6001)
    curves = [np.interp(grid, edges, np.cumsum(side[:-1]) / sum(side)) for side in (a, b)]
    area = np.trapezoid(np.abs(curves[0] - curves[1]), grid)
    found = wasserstein_profiles((a, 0, 0), (b, 0, 0), edges, scale=2.0)
    np.testing.assert_allclose(found.value, area / 2, atol=2e-6)
    low = max(abs(curves[0][[0, 2000, 2500, 6000]] - curves[1][[0, 2000, 2500, 6000]]))
    np.testing.assert_allclose(ks_profiles(a, b).value, low, atol=1e-15)


@examples(60)
@given(st.lists(st.tuples(*[st.one_of(st.integers(0, 60), st.just(2**53))] * 2), max_size=6))
def test_chi_square_equals_the_slow_twin_and_agrees_with_scipy(pairs):
    table = np.array(pairs, np.int64).reshape(-1, 2).T
    sides = [dict(enumerate(row.tolist())) for row in table]
    found = chi_square(*sides)
    used = table[:, table.sum(axis=0) > 0]
    if used.size == 0 or np.any(used.sum(axis=1) == 0):
        assert found.value is None and "no values" in found.reason
        return
    np.testing.assert_allclose(found.value, naive.chi_square(*sides), rtol=1e-12, atol=1e-12)
    theirs = scipy.stats.chi2_contingency(used, correction=False)
    np.testing.assert_allclose((found.value, found.p), (theirs.statistic, theirs.pvalue), rtol=1e-9, atol=1e-12)
    assert found.details["dof"] == theirs.dof


@pytest.mark.parametrize("x", [0.0, 1e-3, 1.0, 5.0, 40.0, 300.0])
@pytest.mark.parametrize("dof", [1, 2, 9, 100])
def test_tails(x, dof):
    np.testing.assert_allclose(chi_square_tail(x, dof), scipy.stats.chi2.sf(x, dof), rtol=1e-9)
    assert chi_square_tail(x, 0) == 1.0
    d = x / 300
    np.testing.assert_allclose(ks_p_value(d, 400, 900), scipy.stats.kstwo.sf(d, round(400 * 900 / 1300)), atol=2e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: psi([1], [1, 2]), "current must have 1 entries, found 2"),
        (lambda: psi([1], [1], floor=0.0), r"floor must be in \(0, 1\), found 0.0"),
        (lambda: psi([-1], [1]), "not be negative, found -1"),
        (lambda: chi_square({"a": -1}, {}), "not be negative, found -1"),
        (lambda: wasserstein_profiles(([1], 0, 0), ([1], 0, 0), [0.0, 1.0]), r"must be \[3\].* found 1"),
    ],
)
def test_misuse_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
