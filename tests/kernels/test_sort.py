from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.sort import grouped_columns, radix_order, sort_keys
from tests.kernels.cases import NAT, examples


@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("values", [(NAT, 2**63 - 1), (-3, 3), (7, 7), (2**53, 2**53 + 5000)])
def test_few_rows_and_many_are_ordered_alike(rows, values):
    rng = np.random.default_rng(1)
    keys, before = rng.integers(*values, rows, endpoint=True), rng.permutation(rows)
    np.testing.assert_array_equal(radix_order(keys), np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(radix_order(keys, before), before[np.argsort(keys[before], kind="stable")])


@examples(50)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_keys_ascend(keys):
    array = np.array(keys, np.uint64)
    np.testing.assert_array_equal(sort_keys(array.copy()), np.sort(array))


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("given", [False, True])
def test_columns_move_with_the_rows_they_belong_to(threads, given):
    rng = np.random.default_rng(2)
    codes, whole, real = rng.integers(-3, 4, 500), rng.integers(0, 99, 500), rng.standard_normal(500)
    order = rng.permutation(500) if given else None
    at, offsets, (moved, moved_real) = grouped_columns(codes, -3, 7, threads, order, [whole, real])
    rows = np.arange(500) if order is None else order
    np.testing.assert_array_equal(at, rows[np.argsort(codes[rows], kind="stable")])
    np.testing.assert_array_equal(offsets, np.searchsorted(np.sort(codes), np.arange(-3, 5)))
    np.testing.assert_array_equal(moved, whole[at])
    np.testing.assert_array_equal(moved_real, real[at])
