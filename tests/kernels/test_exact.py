from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernels import exact
from tests import naive
from tests.kernels.cases import NUMBERS, examples, over_all_exponents


@examples(150)
@given(st.lists(NUMBERS, max_size=12))
def test_moments_are_those_of_exact_arithmetic(values):
    kept = [v for v in values if v == v]
    count, total, mean, std = exact.moments(np.array(values, float))
    assert count == len(kept)
    if not kept:
        assert math.isnan(total) and math.isnan(mean) and math.isnan(std)
        return
    try:
        expected = naive.exact_sum(kept)
    except OverflowError:
        assert math.isinf(total)
        return
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_allclose(mean, expected / len(kept), rtol=4e-16, atol=5e-324)
    np.testing.assert_allclose(std, naive.exact_std(kept), rtol=8e-16, atol=5e-324)


@examples(60)
@given(
    st.lists(st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-11), min_size=1, max_size=10),
    st.integers(0, 5),
)
def test_the_two_forms_give_the_same_bits(values, junk):
    """Rows in accumulator 0 and not in 1, with `junk` in both."""
    noise = [9.5e13] * junk
    fixed, wide = np.zeros((2, exact.FIXED), np.uint64), np.zeros((2, exact.WIDE), np.int64)
    for which, rows in ((0, noise + values), (1, noise)):
        for v in rows:
            bits = np.float64(v).view(np.int64)
            exact.add_fixed(fixed, which, bits, True)
            exact.add_wide(wide, which, bits, True)
    words, a, b = np.zeros(exact.WORDS, np.uint64), np.empty(3), np.empty(3)
    n, zero = np.int64(len(values)), np.uint64(0)
    assert not exact.any_wide(np.array(values))
    exact.moments_fixed(fixed, 1, n, True, words, a, 0)
    exact.moments_wide(wide, 1, (zero, zero, n, True), words, b, 0)
    assert a.tobytes() == b.tobytes()
    assert a[0] == math.fsum(values)


@pytest.mark.parametrize("edge", [2.0**-40, 2.0**52])
@pytest.mark.parametrize("side", [-1, 0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_are_exact_on_either_side_of_the_fixed_forms_range(edge, side, sign):
    value = sign * (edge if side == 0 else math.nextafter(edge, math.inf * side))
    assert bool(exact.is_wide(np.float64(value).view(np.int64))) == (not 2.0**-40 <= abs(value) < 2.0**52)
    for rows in ([value], [value, value, 0.0], [value, -value, 1.5 * value]):
        _, total, _, std = exact.moments(rows)
        assert total == math.fsum(rows)
        np.testing.assert_allclose(std, naive.exact_std(rows), rtol=8e-16)


SPARSE = st.builds(
    lambda fraction, exponent, sign: sign * math.ldexp(fraction, exponent),
    st.sampled_from([1.0, 1.0 + 2.0**-52, 1.5, 2.0 - 2.0**-52]),
    st.integers(-40, 51),
    st.sampled_from([-1, 1]),
)


@examples(300)
@given(st.lists(SPARSE, min_size=2, max_size=6))
@example([2.0**40, 2.0**-30])
def test_the_fixed_form_is_exact_over_all_its_exponents(rows):
    """Few bits far apart: borrows and carries run through words of zeros."""
    array = np.array(rows)
    assert not exact.any_wide(array)
    _, total, mean, std = exact.moments(array)
    assert total == math.fsum(rows)
    np.testing.assert_allclose(mean, total / len(rows), rtol=4e-16)
    np.testing.assert_allclose(std, naive.exact_std(rows), rtol=8e-16)


def test_wide_integer_is_the_sum_itself():
    acc = np.zeros((1, exact.WIDE), np.int64)
    for v in (1e300, -1e300, 5e-324, 0.5):
        exact.add_wide(acc, 0, np.float64(v).view(np.int64), False)
    assert exact.wide_integer(acc[0]) == (1 << 1083) + (1 << 10)


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_exact_over_denormals_and_every_exponent(seed):
    values = over_all_exponents(seed)
    denormals = values[np.abs(values) < 2.0**-1022]
    for rows in (values, values[:7], denormals, denormals[:2], values[np.abs(values) < 1.0]):
        count, total, mean, std = exact.moments(rows)
        assert count == len(rows) and total == math.fsum(rows) == naive.exact_sum(rows.tolist())
        np.testing.assert_allclose(mean, total / len(rows), rtol=4e-16, atol=5e-324)
        np.testing.assert_allclose(std, naive.exact_std(rows.tolist()), rtol=8e-16, atol=5e-324)
        groups = np.arange(len(rows)) % 3
        parts = exact.group_sums(rows, groups, 4)
        assert [Fraction(p, 2**1084) for p in parts] == [
            sum(map(Fraction, rows[groups == g]), Fraction()) for g in range(4)
        ]
        assert exact.nearest_double(sum(parts)) == total


def test_a_sum_beyond_the_doubles_is_infinite_and_what_is_not_finite_has_none():
    twice = exact.group_sums(np.full(2, 1.7e308), np.zeros(2, np.int64), 1)[0]
    assert twice == 2 * int(1.7e308) << 1084
    assert exact.nearest_double(twice) == math.inf and exact.nearest_double(-twice) == -math.inf
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f"must be finite, found {wrong} at 1"):
            exact.group_sums(np.array([1.0, wrong]), np.zeros(2, np.int64), 1)


def test_a_million_ones_are_a_million():  # numba#3681
    n = 1_000_000 if not exact.njit.__globals__["DISABLED"] else 1000
    assert exact.total(np.ones(n)) == n


@pytest.mark.parametrize(
    ("values", "expected"), [(np.full(100, 16000, np.int16), 16000.0), ([2**62, 2**62, 5], (2**63 + 5) / 3)]
)
def test_narrow_and_wide_integers_do_not_wrap(values, expected):  # numba#931
    assert exact.moments(np.asarray(values))[2] == expected


def test_text_is_refused():
    with pytest.raises(TypeError, match="values must hold numbers"):
        exact.moments(["a"])


@pytest.mark.parametrize("scale", [1e-11, 1e-9, 1e-3, 1.0, 1e7, 1e13])
def test_carries_run_through_every_word_when_a_sum_crosses_zero(scale):
    values = np.array([-1.0, 2.0, -3.0, 2.5, -0.4, 0.1]) * scale
    for n in range(1, 7):
        assert exact.moments(values[:n])[1] == math.fsum(values[:n])
        np.testing.assert_allclose(exact.moments(values[:n])[3], naive.exact_std(list(values[:n])), rtol=8e-16)
