from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.sort import group_offsets, grouped, grouped_columns, radix_order, sort_by_entity_time, sort_keys
from tests import naive
from tests.kernels.cases import NAT, examples, layouts

CODES = st.one_of(st.integers(-1, 4), st.sampled_from([2**53 + 1, 2**63 - 1, NAT, -5]))


@examples(100)
@given(st.lists(st.tuples(CODES, CODES), max_size=20))
def test_order_is_that_of_lexsort_and_of_the_slow_twin(rows):
    entity, time = (np.array([r[k] for r in rows], np.int64) for k in (0, 1))
    found = sort_by_entity_time(entity, time)
    np.testing.assert_array_equal(found, naive.sort_by_entity_time(entity, time))
    np.testing.assert_array_equal(found, np.lexsort((time, entity)))


def test_layouts_and_larger_inputs():
    rng = np.random.default_rng(2)
    entity, time = rng.integers(0, 40, 900), rng.integers(-(2**40), 2**40, 900)
    expected = np.lexsort((time, entity))
    for e, t in zip(layouts(entity), layouts(time), strict=True):
        np.testing.assert_array_equal(sort_by_entity_time(e, t), expected)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("refine", [False, True])
def test_counting_sort_is_the_same_on_any_number_of_threads(threads, refine):
    rng = np.random.default_rng(4)
    codes = rng.integers(3, 8, 500)
    order = rng.permutation(500) if refine else None
    found, starts = grouped(codes, 3, 5, threads, order)
    rows = np.arange(500) if order is None else order
    np.testing.assert_array_equal(found, rows[np.argsort(codes[rows], kind="stable")])
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(codes), np.arange(3, 9)))


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


def test_offsets_delimit_groups():
    np.testing.assert_array_equal(group_offsets([0, 0, 2], 4), [0, 2, 2, 3, 3])
    np.testing.assert_array_equal(group_offsets([], 2), [0, 0, 0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: group_offsets([1, 0], 2), ValueError, "must ascend"),
        (lambda: group_offsets([0, 5], 2), ValueError, r"\[0, 2\), found 0 .. 5"),
        (lambda: group_offsets([], -1), ValueError, "found -1"),
        (lambda: sort_by_entity_time([0], [0.5]), TypeError, "time must hold integers"),
        (lambda: sort_by_entity_time([0], [0, 1]), ValueError, "time must have 1 entries, found 2"),
        (lambda: sort_by_entity_time(np.array([2**63], np.uint64), [0]), TypeError, "fit int64, found dtype uint64"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


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
