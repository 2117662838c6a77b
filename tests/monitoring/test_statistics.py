"""The statistics over many windows are those of the kernels, and the field reports' cases come out right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.monitoring.statistics import ColumnSpec, Counts, statistics
from kernels import statistics as kernels

EDGES = np.array([0.0, 1.0, 2.0, 4.0])
COLUMN = ColumnSpec("x", "numeric", EDGES, 1.0, ("below", "a", "b", "c", "above"))
NAMES = ("psi", "js", "ks", "wasserstein", "missing", "outside", "unseen")


def counts(values: list[list[float]], missing: list[float] | None = None, far: list | None = None) -> Counts:
    rows = len(values)
    return Counts(
        np.array(values, float),
        np.array(missing or [0] * rows, float),
        np.zeros((rows, 2)),
        np.array(far or [[0.0, 0.0]] * rows, float),
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.lists(st.integers(0, 50), min_size=5, max_size=5))
def test_windows_agree_with_the_kernels(a: list[int], b: list[int]) -> None:
    far = [[-1.0 * row[0] - 0.5 * row[0], 5.0 * row[-1]] for row in (a, b)]
    found = statistics(COLUMN, counts([a], far=[far[0]]), counts([b], far=[far[1]]), NAMES, 1e-4)
    expected = {
        "psi": kernels.psi(a, b, 1e-4),
        "js": kernels.js_distance(a, b),
        "ks": kernels.ks_profiles(a, b),
        "wasserstein": kernels.wasserstein_profiles((a, *far[0]), (b, *far[1]), EDGES),
    }
    for name, item in expected.items():
        if item.value is None:
            assert np.isnan(found[name][0]), name
        else:
            assert found[name][0] == pytest.approx(item.value, rel=1e-9, abs=1e-12), name


def test_many_windows_are_each_compared_with_their_own_reference() -> None:
    a = counts([[0, 5, 5, 0, 0], [0, 1, 2, 3, 0]])
    b = counts([[0, 5, 5, 0, 0], [0, 3, 2, 1, 0]])
    found = statistics(COLUMN, a, b, NAMES, 1e-4)
    assert found["psi"][0] == 0 and found["ks"][0] == 0
    assert found["ks"][1] == pytest.approx(1 / 3)


def test_an_empty_bin_gives_a_finite_psi_by_the_stated_floor() -> None:  # probatus#115
    column = ColumnSpec("x", "categorical", None, 1.0, tuple("abcdefghij"))
    reference, current = counts([[10] * 10]), counts([[0] + [1] * 9])
    for floor, value in ((1e-3, 0.466), (1e-4, 0.701), (1e-6, 1.162)):
        found = statistics(column, reference, current, ("psi",), floor)["psi"][0]
        assert found == pytest.approx(value, abs=5e-4)
        emptied, others = (0.1 - floor) * np.log(0.1 / floor), 9 * (1 / 9 - 0.1) * np.log(10 / 9)
        assert found == pytest.approx(emptied + others, rel=1e-12)  # not renormalised


def test_disjoint_halves_are_at_distance_one() -> None:  # evidently#494
    column = ColumnSpec("x", "categorical", None, 1.0, tuple("abcd"))
    a, b = counts([[1, 1, 0, 0]]), counts([[0, 0, 1, 1]])
    assert statistics(column, a, b, ("js",), 1e-4)["js"][0] == 1.0
    assert statistics(column, b, a, ("js",), 1e-4)["js"][0] == 1.0
    assert statistics(column, a, a, ("js",), 1e-4)["js"][0] == 0.0


def test_one_far_value_costs_no_memory_and_gives_the_exact_area() -> None:  # NannyML#393
    edges = np.array([0.0, 1e-290])
    column = ColumnSpec("x", "numeric", edges, 1.0, ("below", "in", "above"))
    reference = counts([[0, 1000, 0]])
    current = counts([[0, 999, 1]], far=[[0.0, 9e9]])
    assert statistics(column, reference, current, ("wasserstein",), 1e-4)["wasserstein"][0] == 9e6


def test_infinite_values_leave_the_other_statistics_computable() -> None:
    a = counts([[0, 5, 5, 0, 0]])
    b = Counts(np.array([[0, 5, 4, 0, 0.0]]), np.zeros(1), np.array([[0.0, 1.0]]), np.zeros((1, 2)))
    found = statistics(COLUMN, a, b, NAMES, 1e-4)
    assert np.isnan(found["wasserstein"][0])
    assert found["outside"][0] == pytest.approx(0.1)
    assert found["ks"][0] == pytest.approx(0.1)


def test_thinning_keeps_expected_shares_and_depends_on_its_seed_only() -> None:
    whole = counts([[100, 400, 300, 200, 0]] * 300, missing=[50] * 300)
    one, two = (whole.thinned(np.full(300, 0.1), np.random.Generator(np.random.Philox(3))) for _ in range(2))
    assert np.array_equal(one.values, two.values)
    assert one.values.mean(axis=0) == pytest.approx([10, 40, 30, 20, 0], rel=0.1)
    assert one.missing.mean() == pytest.approx(5, rel=0.15)
    assert np.array_equal(whole.thinned(np.ones(300), np.random.default_rng(0)).values, whole.values)
