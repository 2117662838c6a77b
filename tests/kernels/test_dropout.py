from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.dropout import dropout_mask
from tests import naive
from tests.kernels.cases import examples


def mask(rows, width=256, seed=1, step=2, layer=3, p=0.1):
    return dropout_mask(rows, width, seed, step, layer, p, np.empty((len(rows), width), np.float32))


def test_values_and_rate():
    found = mask(np.arange(512))
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.9)}
    zeros = np.mean(found == 0)
    assert abs(zeros - 0.1) < 4 * np.sqrt(0.09 / found.size)
    for axis in (0, 1):  # no column and no row is special
        rates = np.mean(found == 0, axis=axis)
        assert abs(np.std(rates) / np.sqrt(0.09 / found.shape[axis]) - 1) < 0.25


def test_a_row_has_its_mask_whoever_computes_it():
    rows = np.array([5, 10**12, 7, -3])
    whole = mask(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(mask([row])[0], whole[i])


@examples(40)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.integers(0, 9),
    st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    st.sampled_from([0.0, 1e-5, 0.1, 0.5, 0.99999, 1 - 1e-9]),
)
def test_equals_the_slow_twin(rows, width, key, p):
    found = mask(np.array(rows, np.int64), width, *key, p)
    kept = np.float32(1 / (1 - p))
    assert found.tolist() == [[0 if naive.dropped(r, c, *key, p) else kept for c in range(width)] for r in rows]


@pytest.mark.parametrize("column", range(5))
def test_an_entry_is_dropped_from_its_own_share_on(column):
    share = naive.lane(7, column, 1, 2, 3) / 65536
    assert mask(np.array([7]), 5, p=share)[0, column] > 0 and mask(np.array([7]), 5, p=share + 2**-16)[0, column] == 0


@pytest.mark.parametrize("change", [{"seed": 9}, {"step": 9}, {"layer": 9}])
def test_every_key_counts(change):
    rows = np.arange(64)
    assert 0.1 < np.mean(mask(rows) != mask(rows, **change)) < 0.26  # 2 p (1 - p) = 0.18


@pytest.mark.parametrize("width", [0, 1, 3, 4, 5, 255])
def test_any_width_is_a_prefix(width):
    np.testing.assert_array_equal(mask(np.arange(20), width=width), mask(np.arange(20))[:, :width])


def test_no_dropout_is_all_ones():
    assert np.all(mask(np.arange(8), p=0.0) == 1)


def test_masks_are_fixed_for_ever():
    assert np.flatnonzero(mask(np.arange(2), width=32, p=0.3) == 0).tolist() == FIXED


FIXED = [0, 1, 3, 10, 12, 14, 16, 17, 20, 24, 31, 32, 34, 37, 40, 41, 47, 48, 51, 52, 53, 54, 55]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"p": 1.0}, ValueError, "p must be in .* found 1.0"),
        ({"p": -0.1}, ValueError, "found -0.1"),
        ({"seed": -1}, ValueError, "seed must be in .* found -1"),
        ({"width": -1}, ValueError, "width must not be negative, found -1"),
        ({"out": np.empty((1, 3), np.float32)}, ValueError, r"shape \(1, 2\), found \(1, 3\)"),
        ({"out": np.empty((1, 2))}, TypeError, "found float64"),
        ({"rows": [0.5]}, TypeError, "rows must hold integers"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = dict(rows=[0], width=2, seed=0, step=0, layer=0, p=0.5, out=np.empty((1, 2), np.float32))
    with pytest.raises(error, match=words):
        dropout_mask(**(arguments | change))
