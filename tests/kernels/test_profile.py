from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import jit
from kernels.exact import nearest_double
from kernels.profile import (
    Profile,
    ProfilePlan,
    bins_of,
    category_counts,
    column_counts,
    empty_profile,
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


def mean_std(result: Profile, plan: ProfilePlan, column: int) -> tuple[float, float]:
    """(mean of the finite values, sample std of those inside the edges) that the sums of a profile hold."""
    counts = column_counts(result, plan, column)
    inside, finite = int(counts[1:-1].sum()), int(counts.sum())
    total, squares, below, above = result.sums[column]
    first, scale = 2.0 * plan.ranges[column, 0], 0.5 * plan.ranges[column, 1]
    if finite == 0:
        return np.nan, np.nan
    mean = (first * inside + total / scale + nearest_double(below + above)) / finite
    spread = inside * squares - total * total
    return mean, (spread / (inside * (inside - 1))) ** 0.5 / scale if inside > 1 else np.nan


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
    edges = [bins_of(rng.standard_normal(200), bins).edges for bins in (5, 256, 33)]
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


POOLS = {  # values of a column, least to greatest
    "flag": [0.0, 1.0],
    "rating": [1.0, 2.0, 3.0, 4.0, 5.0],
    "count": [0.0, 1.0, 2.0, 7.0, 300.0],
    "cents": [-0.5, 0.0, 0.1, 0.25, 9.99],
    "rates": [0.001, 0.3333, 1 / 3, 1.0, 1e6 / 7],
    "large": [1.6e9, 1.6e9 + 1e3, 1.7e9],
}


def counted(values, found):
    plan = profile_plan([found.edges])
    return column_counts(profile(np.asarray(values, float)[:, None], plan), plan, 0)


@examples(200)
@given(st.lists(NUMBERS, min_size=1, max_size=30).filter(lambda v: any(np.isfinite(v))), st.integers(1, 6))
def test_edges_lie_between_the_values_and_hold_all_of_them(values, bins):
    found = bins_of(values, bins)
    finite = np.unique(np.array(values)[np.isfinite(values)])
    profile_plan([found.edges])  # finite and ascending
    assert len(found.points) == len(found.edges) - 1
    assert found.edges[0] <= finite[0] and finite[-1] <= found.edges[-1]
    for edge in found.edges[1:-1]:
        before, after = finite[finite < edge].max(), finite[finite >= edge].min()
        assert before < edge <= after and (edge < after or np.nextafter(before, np.inf) == after)
    if len(finite) <= 2 * bins and np.array_equal(finite, np.floor(finite)) and abs(finite).max() < 2**53:
        assert found.points.tolist() == finite.tolist()


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@examples(20)
@given(st.data())
def test_few_values_have_a_bin_each_which_rounding_noise_does_not_leave(pool, data):
    many = st.lists(st.sampled_from(pool), min_size=1, max_size=40)
    reference, current = np.array([*pool, *data.draw(many)]), np.array(data.draw(many))
    found = bins_of(reference, 20)
    assert found.points.tolist() == pool
    expected = [0, *(int((current == value).sum()) for value in pool), 0]
    step = float(np.diff(pool).min())
    for noisy in (current, current * (1 + 1e-7), current * (1 - 1e-7), current + 1e-7 * step, current - 1e-7 * step):
        assert counted(noisy, found).tolist() == expected
    assert counted(current.astype(np.float32), found).tolist() == expected
    beyond = 1e-6 * pool[-1]
    assert counted([pool[0] - beyond, pool[-1] + beyond], found)[[0, -1]].tolist() == [1, 1]


@pytest.mark.parametrize("spike", [0.0, 9.99, -3.0])
def test_a_frequent_value_of_a_continuous_column_has_a_bin_of_its_own(spike):
    rng = np.random.default_rng(0)
    n = 4_000 if jit.DISABLED else 20_000
    values = rng.normal(0, 10, n)
    values[: 6 * n // 10] = spike
    found = bins_of(rng.permutation(values), 20)
    at = int(np.flatnonzero(found.points == spike)[0])
    counts = counted(values, found)
    assert counts[at + 1] == 6 * n // 10
    others = np.delete(counts[1:-1], at)
    assert 7 <= len(others) <= 9 and others.min() > n / 40  # eight bins hold 40 % of the rows, a twentieth each
    assert found.edges[at] < spike < found.edges[at + 1]
    for noisy in (values * (1 + 1e-7), values * (1 - 1e-7), values.astype(np.float32)):
        assert np.abs(counted(noisy, found) - counts).max() <= 2


def test_many_values_far_from_zero_keep_outer_edges_near_them():
    values = 1e9 + np.random.default_rng(0).normal(0, 1, 5000)
    edges = bins_of(values, 20).edges
    assert values.min() - 1e-4 < edges[0] < values.min() and values.max() < edges[-1] < values.max() + 1e-4


def test_values_that_differ_by_rounding_alone_are_one_value():
    found = bins_of([0.1 + 0.2, 0.3, 0.3, 0.6, np.float32(0.3), np.float32(0.6)], 20)
    assert found.points.tolist() == [0.3, 0.6]
    noise = 1 / 3 + np.arange(-500, 500) * np.spacing(1 / 3) / 300
    assert len(bins_of(noise, 20).points) == 1
    near = 1000 + np.random.default_rng(0).normal(0, 1e-2, 5000)  # close together, and no noise
    assert len(bins_of(near, 20).points) == 20
    for size in (2.0**52, 2.0**53, 2.0**62):
        values = [size, np.nextafter(size, np.inf)]
        assert bins_of(values, 20).points.tolist() == values


def test_many_values_are_cut_into_equal_parts():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(1000)
    for bins in (7, 10, 255):
        found = bins_of(values, bins)
        counts = counted(values, found)[1:-1]
        assert len(counts) == bins and abs(counts - 1000 / bins).max() <= 1
        assert found.points.tolist() == pytest.approx([np.nan] * bins, nan_ok=True)


def test_a_constant_has_one_bin():
    for value in (5.0, 0.0, -1e300, 1e-280, 1.7e308):
        found = bins_of([value, value, np.nan, np.inf], 8)
        assert found.points.tolist() == [value]
        assert counted([value, value * (1 + 1e-7), value * (1 - 1e-7), -value or 1.0], found)[1] == 3
    assert bins_of([np.finfo(float).max] * 2, 3).points.tolist() == [np.finfo(float).max]


def test_values_outside_are_summed_exactly():
    plan = profile_plan([[0.0, 1.0]])
    found = profile(np.array([[1e300], [2.0], [-3.0], [0.5]]), plan)
    assert found.sums[0][2] == -3 << 1084 and found.sums[0][3] == (int(1e300) + 2) << 1084
    assert mean_std(profile(np.array([[2.0], [4.0]]), plan), plan, 0)[0] == 3.0


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
        (lambda: bins_of([np.nan], 3), ValueError, "found none among 1"),
        (lambda: bins_of([1.0], 0), ValueError, "bins must be at least 1, found 0"),
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
