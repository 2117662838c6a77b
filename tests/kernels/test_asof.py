from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.asof import asof
from tests import naive
from tests.kernels.cases import HOUR, NAT, examples, layouts, same_bytes

TIMES = st.one_of(st.integers(0, 12), st.sampled_from([NAT, NAT + 1, 2**63 - 1]))


@examples(200)
@given(
    st.lists(st.tuples(st.integers(-1, 3), TIMES), max_size=8),
    st.lists(st.tuples(st.integers(-1, 2), TIMES, TIMES), max_size=12),
    st.sampled_from([None, 0, 3, 2**63 - 1]),
    st.booleans(),
    st.sampled_from([1, 10**15]),
)
def test_equals_the_slow_twin(probes, rows, max_age, inclusive, scale):
    probe, time = (np.array([p[k] for p in probes], np.int64) for k in (0, 1))
    entity, event, known = (np.array([r[k] for r in rows], np.int64) for k in (0, 1, 2))
    probe, entity = np.where(probe < 0, -1, probe * scale), np.where(entity < 0, -1, entity * scale)
    expected = naive.asof(probe, time, (entity, event, known), max_age, inclusive)
    found = [asof(probe, time, entity, event, known, max_age, inclusive, threads=t) for t in (1, 2, 4)]
    np.testing.assert_array_equal(found[0], expected)
    assert same_bytes(found)


def test_agrees_with_pandas_merge_asof_in_any_layout():
    rng = np.random.default_rng(7)
    n, m = 500, 200
    time, event = np.sort(rng.integers(0, 10**6, n)), np.sort(rng.permutation(10**6)[:m])
    probe, entity = rng.integers(0, 5, n), rng.integers(0, 5, m)
    right = pd.DataFrame({"t": event, "g": entity, "row": np.arange(m)})
    left = pd.DataFrame({"t": time, "g": probe})
    for inclusive in (False, True):
        joined = pd.merge_asof(left, right, on="t", by="g", tolerance=50_000, allow_exact_matches=inclusive)
        expected = joined["row"].fillna(-1).to_numpy(np.int64)
        for t, e in zip(layouts(time), layouts(event), strict=True):
            np.testing.assert_array_equal(asof(probe, t, entity, e, e, 50_000, inclusive), expected)
        order = rng.permutation(n)
        np.testing.assert_array_equal(
            asof(probe[order], time[order], entity, event, event, 50_000, inclusive), expected[order]
        )


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("max_age", [None, 0, 30])
def test_agrees_with_polars_join_asof(inclusive, max_age):
    rng = np.random.default_rng(11)
    n, m = 2000, 600
    time, event = (
        np.sort(rng.integers(0, 1000, n)),
        np.sort(rng.permutation(1000)[:m]),
    )  # ages of exactly 0 and 30 occur
    probe, entity = rng.integers(0, 9, n), rng.integers(0, 7, m)
    left = pl.DataFrame({"g": probe, "t": time}).set_sorted("t")
    right = pl.DataFrame({"g": entity, "t": event, "row": np.arange(m)}).set_sorted("t")
    options = {"allow_exact_matches": inclusive, "tolerance": max_age, "check_sortedness": False}
    expected = left.join_asof(right, on="t", by="g", **options)["row"].fill_null(-1).to_numpy()
    assert (expected >= 0).any() or (max_age == 0 and not inclusive)
    for t in (1, 2):
        np.testing.assert_array_equal(asof(probe, time, entity, event, event, max_age, inclusive, threads=t), expected)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_b1_the_order_of_the_right_side_does_not_matter(order):
    event = np.array(["2023-06-01", "2022-06-01"], "datetime64[us]")[order]
    value = np.array([1, 3])[order]
    chosen = asof([0], np.array(["2023-01-01"], "datetime64[us]"), [0, 0], event, event, None)
    assert value[chosen[0]] == 3


def test_b2_a_row_written_after_the_decision_is_not_used():
    event, created = np.array([9, 9.5]) * HOUR, np.array([9, 11]) * HOUR
    event, created = event.astype(np.int64), created.astype(np.int64)
    assert asof([0], [10 * HOUR], [0, 0], event, created, None)[0] == 0  # as known
    assert asof([0], [10 * HOUR], [0, 0], event, event, None)[0] == 1  # as happened


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_age": -1}, ValueError, "max_age must not be negative, found -1"),
        ({"known_at": [0, 1]}, ValueError, "known_at must have 1 entries, found 2"),
        ({"probe_time": [0.5]}, TypeError, "probe_time must hold integers"),
        ({"threads": 0}, ValueError, "threads must be .* found 0"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = dict(probe_entity=[0], probe_time=[1], source_entity=[0], event_time=[0], known_at=[0], max_age=None)
    with pytest.raises(error, match=words):
        asof(**(arguments | change))


def test_of_one_event_time_the_row_known_last_is_chosen_and_then_the_last_row():
    event, known = np.array([5, 5, 5, 4]), np.array([6, 7, 7, 8])
    assert asof([0, 0], [9, 7], [0] * 4, event, known, None).tolist() == [2, 0]
