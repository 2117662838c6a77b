"""The statistics over many windows are those of the kernels, and the field reports' cases come out right."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.features.numeric_spec import fit_numeric
from engine.features.profile import Profile, ProfileSpec
from engine.monitoring.statistics import ColumnSpec, Counts, column_specs, profile_counts, statistics
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
        "psi": kernels.psi(*([side[0] + side[1], side[2], side[3] + side[4]] for side in (a, b)), 1e-4),
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
    column = ColumnSpec("x", "categorical", None, 1.0, ("(unseen)", *"abcdefghij"))
    reference, current = counts([[0] + [10] * 10]), counts([[0, 0] + [1] * 9])
    for floor, value in ((1e-3, 0.466), (1e-4, 0.701), (1e-6, 1.162)):
        found = statistics(column, reference, current, ("psi",), floor)["psi"][0]
        assert found == pytest.approx(value, abs=5e-4)
        emptied, others = (0.1 - floor) * np.log(0.1 / floor), 9 * (1 / 9 - 0.1) * np.log(10 / 9)
        assert found == pytest.approx(emptied + others, rel=1e-12)  # not renormalised


def raw_counts(spec: ProfileSpec, values: np.ndarray) -> Counts:
    return profile_counts(Profile.count(spec, pa.table({"x": values})))["x"]


def compared(reference: np.ndarray, current: np.ndarray) -> tuple[ColumnSpec, dict[str, float]]:
    """(column, statistics) of two samples of one numeric column, by way of their counts."""
    spec = ProfileSpec((fit_numeric("x", reference, 20),), (), ())
    (column,) = column_specs(spec)
    found = statistics(column, raw_counts(spec, reference), raw_counts(spec, current), NAMES, 1e-4)
    return column, {name: float(value[0]) for name, value in found.items()}


POOLS = [[0.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [-2.5, 0.0, 0.1, 7.0, 300.0], [float(n) for n in range(40)]]


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.sampled_from(POOLS), st.data())
def test_statistics_of_counts_are_those_of_the_values_at_both_ends(pool: list[float], data: st.DataObject) -> None:
    some = st.lists(st.sampled_from(pool), min_size=1, max_size=60)
    far = st.lists(st.sampled_from([pool[0] - 5, pool[0] - 1e6, pool[-1] + 5, pool[-1] + 1e6]), max_size=20)
    reference = np.array([*data.draw(some), pool[0], pool[-1]])
    current = np.array([*data.draw(some), *data.draw(far)])
    column, found = compared(reference, current)
    within = np.clip(current, pool[0], pool[-1])  # open outer bins
    levels = np.unique(reference)
    nearest = levels[((levels[1:] + levels[:-1]) / 2 <= within[:, None]).sum(axis=1)]
    assert found["psi"] == pytest.approx(
        kernels.psi(*([int((side == v).sum()) for v in levels] for side in (reference, nearest)), 1e-4).value, abs=1e-12
    )
    assert found["outside"] == pytest.approx(np.mean((current < pool[0]) | (current > pool[-1])))
    if set(current) - {pool[0] - 5, pool[0] - 1e6, pool[-1] + 5, pool[-1] + 1e6} <= set(levels):
        assert found["ks"] == pytest.approx(scipy.stats.ks_2samp(reference, current).statistic)
        area = scipy.stats.wasserstein_distance(reference, current)
        one_sided = not ((current < pool[0]).any() and (current > pool[-1]).any())
        if one_sided:
            assert found["wasserstein"] == pytest.approx(area / column.scale, rel=1e-6, abs=1e-9)


def test_a_flag_that_turns_round_and_one_with_rounding_noise() -> None:
    flag = np.repeat([0, 1], [900, 100])
    for turned in (1 - flag, 1.0 - flag, (1 - flag).astype(np.float32), flag == 0):
        _, found = compared(flag, turned)
        assert found["ks"] == pytest.approx(0.8) and found["wasserstein"] == pytest.approx(0.8 / flag.std(ddof=1))
        assert found["psi"] == pytest.approx(2 * 0.8 * np.log(9))
        assert found["outside"] == 0
    for near in (flag + 1e-7, flag * (1 + 1e-7), flag - 1e-7):
        assert set(compared(flag, near)[1].values()) == {0.0}


def test_values_beyond_the_training_range_are_counted_once() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(0, 1, 50_000)
    current = np.where(rng.random(50_000) < 0.2, 1.5, rng.uniform(0, 1, 50_000))
    _, found = compared(reference, current)
    assert found["outside"] == pytest.approx(0.2, abs=0.01)
    top = 0.05 + 0.95 * 0.2  # the top bin holds its own share of the rest, and what lies above
    assert found["psi"] == pytest.approx((top - 0.05) * np.log(top / 0.05), abs=0.08)
    unseen = ColumnSpec("c", "categorical", None, 1.0, ("(unseen)", "a", "b"))
    now = statistics(unseen, counts([[0, 50, 50]]), counts([[20, 40, 40]]), NAMES, 1e-4)
    assert now["psi"][0] == 0 and now["unseen"][0] == pytest.approx(0.2)


@pytest.mark.parametrize("far", [1e160, -1e160, 1.7976931348623157e308, -1.7976931348623157e308, 5e-324])
def test_values_at_the_ends_of_a_double_break_no_statistic(far: float) -> None:
    values = np.random.default_rng(0).normal(0, 1, 500)
    for reference, current in ((values, np.append(values, far)), (np.append(values, [far, -far]), values)):
        _, found = compared(reference, current)
        assert {"psi", "ks", "outside"} <= {name for name, value in found.items() if np.isfinite(value)}
        assert found["psi"] < 0.1 and found["ks"] < 0.05


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
    endless = Counts(np.zeros((1, 5)), np.zeros(1), np.array([[0.0, 9.0]]), np.zeros((1, 2)))
    above = counts([[0, 0, 0, 0, 9]], far=[[0.0, 50.0]])
    assert statistics(COLUMN, endless, above, NAMES, 1e-4)["ks"][0] == 1.0  # infinities rank


def test_thinning_keeps_expected_shares_and_depends_on_its_seed_only() -> None:
    whole = counts([[100, 400, 300, 200, 0]] * 300, missing=[50] * 300)
    one, two = (whole.thinned(np.full(300, 0.1), np.random.Generator(np.random.Philox(3))) for _ in range(2))
    assert np.array_equal(one.values, two.values)
    assert one.values.mean(axis=0) == pytest.approx([10, 40, 30, 20, 0], rel=0.1)
    assert one.missing.mean() == pytest.approx(5, rel=0.15)
    assert np.array_equal(whole.thinned(np.ones(300), np.random.default_rng(0)).values, whole.values)
