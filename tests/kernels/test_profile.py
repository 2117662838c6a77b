from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.profile import (
    Profile,
    category_counts,
    column_counts,
    edges_of,
    empty_profile,
    mean_std,
    merge,
    profile,
    profile_plan,
)
from tests import naive
from tests.kernels.cases import NUMBERS, ORDINARY, examples, layouts

EDGES = st.lists(
    st.one_of(st.sampled_from([-1e300, -7.0, 0.0, 5e-324, 0.1, 1.0, 2.5, 1e300]), st.floats(-10, 10)),
    min_size=2,
    max_size=9,
    unique=True,
).map(sorted)


def same(a: Profile, b: Profile) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a[:3], b[:3], strict=True)) and a.sums == b.sums


@examples(120)
@given(st.lists(NUMBERS, max_size=14), EDGES, st.integers(0, 14), st.randoms(use_true_random=False))
def test_counts_equal_the_slow_twin_and_any_split_merges_to_the_same(values, edges, cut, random):
    block, plan = np.array(values).reshape(-1, 1), profile_plan([edges])
    found = profile(block, plan)
    expected = naive.profile_column(values, edges)
    assert column_counts(found, plan, 0).tolist() == expected[:-3] and found.counts[0, -3:].tolist() == expected[-3:]
    finite = [v for v in values if np.isfinite(v)]
    assert (found.low[0], found.high[0]) == (min(finite, default=np.inf), max(finite, default=-np.inf))
    shuffled = list(values)
    random.shuffle(shuffled)
    other = np.array(shuffled).reshape(-1, 1)
    assert same(found, merge(profile(other[cut:], plan, threads=2), profile(other[:cut], plan)))
    assert same(found, merge(found, empty_profile(plan)))


@examples(120)
@given(st.lists(NUMBERS, max_size=14), EDGES)
def test_looking_up_a_bin_and_searching_it_are_the_same(values, edges):
    near = [np.nextafter(e, side) for e in edges for side in (-np.inf, np.inf)]
    block, plan = np.array([*values, *edges, *near]).reshape(-1, 1), profile_plan([edges])
    steps = np.diff(plan.starts[0]).max()
    assert plan.steps[0] in (steps, -1)
    assert same(
        profile(block, plan._replace(steps=np.array([steps]))), profile(block, plan._replace(steps=np.array([-1])))
    )


def test_edges_close_together_are_searched_by_halving():
    crowded = [0.0, *np.linspace(5.0, 5.001, 20), 1000.0]
    plan = profile_plan([crowded, [0.0, 1.0, 2.0]])
    assert plan.steps[0] == -1 and plan.steps[1] == 1
    values = np.random.default_rng(0).uniform(4.9999, 5.0011, 5000)
    found = column_counts(profile(np.stack([values, values], 1), plan), plan, 0)
    np.testing.assert_array_equal(found[1:-1], np.histogram(values, crowded)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_columns_threads_and_layouts(dtype):
    rng = np.random.default_rng(0)
    block = rng.standard_normal((700, 3)).astype(dtype)
    edges = [edges_of(rng.standard_normal(200), bins) for bins in (5, 256, 33)]
    plan = profile_plan(edges)
    found = profile(block, plan)
    for k in range(3):
        counts = column_counts(found, plan, k)
        np.testing.assert_array_equal(counts[1:-1], np.histogram(block[:, k].astype(float), edges[k])[0])
        inside = block[(block[:, k] >= edges[k][0]) & (block[:, k] <= edges[k][-1]), k].astype(float)
        mean, std = mean_std(found, plan, k)
        np.testing.assert_allclose((mean, std), (block[:, k].astype(float).mean(), inside.std(ddof=1)), atol=1e-8)
    assert all(same(found, profile(block, plan, threads=t)) for t in (2, 4))
    assert all(same(found, profile(b, plan)) for b in (*layouts(block), np.asfortranarray(block)))


@examples(100)
@given(st.lists(st.one_of(ORDINARY, st.floats(-12, 12)), max_size=14), EDGES.filter(lambda e: e[-1] - e[0] < 1e3))
def test_moments_are_those_of_exact_arithmetic_to_half_a_quantum(values, edges):
    plan = profile_plan([edges])
    mean, std = mean_std(profile(np.array(values).reshape(-1, 1), plan), plan, 0)
    exact_mean, variance, inside = naive.profile_moments(values, edges)
    quantum = (edges[-1] - edges[0]) / 2**32
    if not any(np.isfinite(values)):
        assert np.isnan(mean) and np.isnan(std)
        return
    assert abs(mean - float(exact_mean)) <= quantum + 1e-12 * abs(float(exact_mean)) + 1e-300
    if inside > 1:
        assert abs(std - float(variance) ** 0.5) <= 2 * quantum + 1e-12 * std
    else:
        assert np.isnan(std)


@pytest.mark.parametrize(("rows", "bins"), [(1, 3), (2, 5), (10, 3), (1000, 7), (1000, 255)])
def test_edges_are_the_nearest_quantiles_of_numpy(rows, bins):
    values = np.random.default_rng(rows).standard_normal(rows)
    expected = np.unique(np.quantile(values, np.arange(bins + 1) / bins, method="nearest"))
    if rows > 1:
        np.testing.assert_array_equal(edges_of(values, bins), expected)
    else:
        np.testing.assert_array_equal(edges_of(values, bins), [values[0], np.nextafter(values[0], np.inf)])


def test_values_outside_are_summed_exactly():
    plan = profile_plan([[0.0, 1.0]])
    found = profile(np.array([[1e300], [2.0], [-3.0], [0.5]]), plan)
    assert found.sums[0][2] == -3 << 1084 and found.sums[0][3] == (int(1e300) + 2) << 1084
    assert mean_std(profile(np.array([[2.0], [4.0]]), plan), plan, 0)[0] == 3.0


def test_edges_are_values_and_a_constant_has_a_bin_of_its_own():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(1000)
    edges = edges_of(values, 10)
    assert np.isin(edges, values).all() and edges[0] == values.min() and edges[-1] == values.max()
    counts = np.histogram(values, edges)[0]
    assert counts.min() >= 99 and counts.max() <= 101
    constant = edges_of([5.0, 5.0, np.nan, np.inf], 8)
    plan = profile_plan([constant])
    assert column_counts(profile([[5.0], [5.0], [6.0]], plan), plan, 0).tolist() == [0, 2, 1]


def test_nan_is_counted_whatever_the_compiler_may_assume():  # numba#9383
    plan = profile_plan([[0.0, 3.0]])
    assert profile(np.array([[np.nan], [1], [2], [np.nan]]), plan).counts[0, -3] == 2


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_categories(threads):
    codes = np.random.default_rng(0).integers(0, 3, (50, 2)).astype(np.int32)
    found = category_counts(codes, [3, 5], threads=threads)
    np.testing.assert_array_equal(found, [np.bincount(codes[:, k], minlength=5) for k in (0, 1)])
    assert category_counts(np.empty((0, 2), np.int32), [3, 5]).tolist() == [[0] * 5] * 2


PLAN = profile_plan([[0.0, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: profile_plan([[1.0, 1.0]]), ValueError, r"column 0 must be .* found \[1.0, 1.0\]"),
        (lambda: profile_plan([[1.0]]), ValueError, "two or more"),
        (lambda: profile_plan([[0.0, np.inf]]), ValueError, "finite"),
        (lambda: edges_of([np.nan], 3), ValueError, "found none among 1"),
        (lambda: edges_of([1.0], 0), ValueError, "bins must be at least 1, found 0"),
        (lambda: profile([[1.0]], PLAN), ValueError, r"block must be \[n, 2\], found shape \(1, 1\)"),
        (lambda: profile([["a", "b"]], PLAN), TypeError, "block must hold numbers"),
        (lambda: merge(empty_profile(PLAN), empty_profile(profile_plan([[0.0, 1.0]]))), ValueError, "same edges"),
        (lambda: category_counts([[0], [3]], [3]), ValueError, r"\[0, 3\) in column 0, found 3 in row 1"),
        (lambda: category_counts([[0.5]], [3]), ValueError, "codes must be integers"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
