from __future__ import annotations

import math

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import AGGREGATES, folds, jit, windows
from kernels.exact import FIXED_FORM, WHOLE_FORM, WIDE_FORM
from kernels.sweep import CODES
from kernels.windows import trailing
from tests import naive
from tests.kernels.cases import DAY, HOUR, NAT, NUMBERS, ORDINARY, examples, layouts, over_all_exponents, same_bytes

PARAMETERS = [("recency", 1), ("recency", 3), ("ewm_mean", 2), ("ewm_sum", 7), ("recency", 2), ("ewm_mean", 7)]
PARAMETERS += [("quantile", 50), ("quantile", 95), ("quantile", 7)]
NAMES = [*AGGREGATES, *PARAMETERS]
ROUNDED = ("mean", "std", "ewm_sum", "ewm_mean", "quantile")  # the twin rounds these elsewhere
TIMES = st.one_of(st.integers(0, 30), st.just(NAT))


@pytest.fixture(autouse=True, scope="module")
def _threads_for_few_rows_too():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "_PARALLEL_ROWS", 0)
        yield


@st.composite
def tables(draw, numbers=NUMBERS, ordered=False):
    """(probe entity, probe time, source entity, event, known, values): small numbers, so that ties abound."""
    m, n = draw(st.integers(0, 14)), draw(st.integers(0, 8))
    scale = draw(st.sampled_from([1, 10**15]))
    column = lambda element, size: draw(st.lists(element, min_size=size, max_size=size))  # noqa: E731
    entity = np.array(column(st.integers(-1, 2), m), np.int64)
    event = np.array(column(TIMES, m), np.int64)
    known = event.copy() if ordered else np.array(column(TIMES, m), np.int64)
    probe = np.array(column(st.integers(-1, 3), n), np.int64)
    time = np.array(column(TIMES, n), np.int64)
    values = np.array(column(numbers, m), np.float64)
    return np.where(probe < 0, -1, probe * scale), time, np.where(entity < 0, -1, entity * scale), event, known, values


def check_against_twin(table, widths=(3, 10, 2**62)):
    probe, time, entity, event, known, values = table
    found = trailing(probe, time, entity, event, known, values, widths, NAMES)
    expected = naive.trailing((probe, time), (entity, event, known), values, widths, NAMES)
    for c, name in enumerate(NAMES):
        if name in ROUNDED or name[0] in ROUNDED:
            np.testing.assert_allclose(found[..., c], expected[..., c], rtol=1e-12, atol=5e-324, err_msg=name)
        else:
            np.testing.assert_array_equal(found[..., c], expected[..., c], err_msg=name)
    return found


@examples(60)
@given(tables(), st.lists(st.booleans(), min_size=14, max_size=14), st.booleans())
def test_rows_sorted_once_give_every_aggregate_its_bits(table, chosen, mirrored):
    probe, time, entity, event, known, values = table
    if mirrored:
        probe = entity
        time = np.where(event == NAT, NAT, event - 1)
    counts = np.array(chosen[: len(entity)], np.bool_)
    once = windows.Sorted(probe, time, entity, event)
    for source in (event, known):
        rows = once.known(source)
        found = [rows.aggregates(values, [3, 10], NAMES), rows.aggregates(None, [5], ["count"], counts)]
        found += [rows.aggregates(values, [3, 10], NAMES, counts), rows.aggregates(values, [3, 10], NAMES, threads=2)]
        chosen_only = np.where(counts, entity, -1)
        whole = trailing(probe, time, entity.copy(), event, source.copy(), values, [3, 10], NAMES)
        some = trailing(probe, time, chosen_only, event, source, values, [3, 10], NAMES)
        assert same_bytes([found[0], whole]) and same_bytes([found[3], whole]) and same_bytes([found[2], some])
        assert same_bytes([found[1], trailing(probe, time, chosen_only, event, source, None, [5], ["count"])])


def finite_sums(values):
    """The twin's mean divides an overflowed sum; keep such inputs out of the comparison, not out of the kernel."""
    return np.where(np.abs(values) > 1e301, 1e301, values) if np.all(np.isfinite(values[~np.isnan(values)])) else values


@examples(120)
@given(tables())
def test_equals_the_slow_twin_on_any_input(table):
    *rest, values = table
    check_against_twin((*rest, finite_sums(np.where(np.abs(values) == 1.7e308, 1e300, values))))


@examples(80)
@given(tables(ordered=True))
def test_equals_the_slow_twin_when_rows_are_known_at_once(table):
    *rest, values = table
    check_against_twin((*rest, np.where(np.abs(values) == 1.7e308, 1e300, values)))


WHOLE = st.one_of(st.integers(-3, 3), st.sampled_from([0, 2**28, -(2**28), 2**27 + 1, 99_999_989])).map(float)


@examples(120)
@given(tables(numbers=st.one_of(WHOLE, st.just(math.nan))), st.booleans())
def test_whole_numbers_give_the_bits_of_any_other_form(table, ordered):
    probe, time, entity, event, known, values = table
    known = event if ordered else known
    forms = []
    for form in (FIXED_FORM, WHOLE_FORM, WIDE_FORM):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(windows, "_form", lambda *_, form=form: form)
            forms.append(trailing(probe, time, entity, event, known, values, [3, 10, 2**62], NAMES))
    assert same_bytes(forms)
    check_against_twin((probe, time, entity, event, known, values))


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([1.0, -5.0, 0.0, math.nan], WHOLE_FORM),
        ([], WHOLE_FORM),
        ([2.0**29] * 15, WHOLE_FORM),
        ([2.0**29] * 16, FIXED_FORM),  # squares of 2**62 in all
        ([2.0**32], FIXED_FORM),
        ([0.5], FIXED_FORM),
        ([1.0, math.inf], FIXED_FORM),
        ([1.0, 1e-300], WIDE_FORM),
    ],
)
def test_the_form_is_the_cheapest_that_holds_the_numbers(values, form):
    assert windows._form(np.array(values), 1) == form


@examples(60)
@given(tables(), st.randoms(use_true_random=False))
def test_bits_do_not_depend_on_threads_layout_other_entities_or_row_order(table, random):
    probe, time, entity, event, known, values = table
    widths = [4, 2**62]
    plain = trailing(probe, time, entity, event, known, values, widths, NAMES)
    others = [trailing(probe, time, entity, event, known, values, widths, NAMES, threads=t) for t in (2, 4)]
    if len(values):
        for e, k, v in zip(layouts(event), layouts(known), layouts(values), strict=True):
            others.append(trailing(probe, time, entity, e, k, v, widths, NAMES))
    assert same_bytes([plain, *others])
    alone = entity == 0  # the other entities hold other magnitudes
    mine = probe == 0
    some = trailing(probe[mine], time[mine], entity[alone], event[alone], known[alone], values[alone], widths, NAMES)
    assert same_bytes([plain[mine], some])
    order = list(range(len(values)))
    random.shuffle(order)
    free = [name for name in NAMES if name not in ("first", "last")]  # those two name the row position in their rule
    shuffled = trailing(probe, time, entity[order], event[order], known[order], values[order], widths, free)
    assert same_bytes([trailing(probe, time, entity, event, known, values, widths, free), shuffled])


@examples(60)
@given(tables(), st.integers(0, 30))
def test_bits_do_not_depend_on_where_the_sweep_began(table, start):
    """Probes from `start` on, given only the history that their windows reach."""
    probe, time, entity, event, known, values = table
    widths = [5]
    late = time >= start
    needed = event >= start - max(widths)
    whole = trailing(probe, time, entity, event, known, values, widths, NAMES)[late]
    part = trailing(
        probe[late], time[late], entity[needed], event[needed], known[needed], values[needed], widths, NAMES, threads=2
    )
    assert same_bytes([whole, part])


@pytest.mark.parametrize("lag", [0, 1])
def test_one_entity_with_half_of_the_rows_is_split_between_threads_without_a_trace(lag):
    rng = np.random.default_rng(5)
    n = 60 if jit.DISABLED else 600
    entity = np.where(rng.random(n) < 0.5, 0, rng.integers(0, 9, n))
    event = np.sort(rng.integers(0, 200, n))
    known = event + lag * rng.integers(0, 40, n)
    values = rng.standard_normal(n) * 10.0 ** rng.integers(-20, 20, n)
    names = [name for name in NAMES if not name[0].startswith("ewm") and not str(name).startswith("ewm")]
    results = [trailing(entity, event, entity, event, known, values, [7, 60], names, threads=t) for t in (1, 2, 4)]
    assert same_bytes(results)


@pytest.mark.parametrize("tied", [2, 300])
def test_rows_of_one_event_time_come_in_the_order_they_became_known(tied):
    event, known, values = np.full(tied, 5), 10 + np.arange(tied)[::-1], np.arange(tied, dtype=float)
    entity, times = np.zeros(tied, np.int64), [12, 10 + tied]
    found = trailing([0, 0], times, entity, event, known, values, [10**9], ["count", "first", "last"])
    np.testing.assert_array_equal(found[:, 0], [[2, tied - 1, tied - 2], [tied, tied - 1, 0]])


def test_without_values_rows_count_as_rows():
    entity, event = np.zeros(4, int), np.array([0, 1, 2, 3])
    found = trailing(entity, event, entity, event, event, None, [2_000_000], ["count", "recency"])
    np.testing.assert_array_equal(found[:, 0, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(found[:, 0, 1], [np.nan, 1e-6, 1e-6, 1e-6])


def test_a_null_instant_is_never_known_although_it_is_the_smallest_integer():
    event = np.array(["2020-01-01", "NaT", "2020-01-01"], "datetime64[us]")
    known = np.array(["NaT", "2020-01-01", "2020-01-02"], "datetime64[us]")
    probe = np.array(["2020-01-03", "NaT"], "datetime64[us]")
    found = trailing([0, 0], probe, [0, 0, 0], event, known, [1.0, 2.0, 4.0], [10 * DAY], ["count", "sum"])
    np.testing.assert_array_equal(found[:, 0], [[1, 4], [0, np.nan]])


def test_instants_near_the_ends_of_int64_do_not_wrap():
    top = 2**63 - 1
    event = np.array([NAT + 1, 0, top - 1])
    found = trailing([0, 0], [NAT + 2, top], [0, 0, 0], event, event, [1.0, 2.0, 4.0], [5, top], ["sum", "recency"])
    np.testing.assert_array_equal(found[:, :, 0], [[1, 1], [4, 6]])
    np.testing.assert_allclose(found[:, :, 1], [[1e-6, 1e-6], [1e-6, 1e-6]])


# ------------------------------------------------------------------ field reports
def own_rows(times, values, window, names, min_count=1):
    """Rows as their own probes, strictly earlier ones counting: sum over [t - w, t)."""
    entity = np.zeros(len(times), np.int64)
    return trailing(entity, times, entity, times, times, values, [window], names)[:, 0]


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 0, 1]])
def test_b3_rows_of_one_instant_do_not_see_each_other(order):
    times, values = np.array([0, 0, HOUR])[order], np.array([0.0, 1.0, 2.0])[order]
    found = own_rows(times, values, 4 * HOUR, ["sum"])[:, 0]
    np.testing.assert_array_equal(found, np.array([np.nan, np.nan, 1.0])[order])


def test_b4_a_window_is_a_fixed_length_over_the_change_of_clocks():
    local = pd.date_range("2021-11-05", "2021-11-10", freq="D", tz="US/Central")
    times = local.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)
    found = own_rows(times, np.ones(6), DAY, ["sum"])[:, 0]
    np.testing.assert_array_equal(found, [np.nan, 1, 1, np.nan, 1, 1])


def test_b5_one_huge_value_leaves_no_trace():
    x = np.array([9.54e8, 0.6225, np.nan, 0, 1.14, 0, 0])
    found = own_rows(np.arange(7) * HOUR, x, 5 * HOUR, ["std"])[-1, 0]  # of rows 1 .. 5
    assert math.isclose(found, np.nanstd([0.6225, 0, 1.14, 0], ddof=1), rel_tol=1e-15)
    assert math.isclose(found, 0.55091, rel_tol=1e-4)
    zeros = np.array([1000.0] + [0.0] * 30)
    std = own_rows(np.arange(31) * HOUR, zeros, 10 * HOUR, ["std"])[:, 0]
    assert np.all(std[11:] == 0.0) and not np.any(std < 0)


def test_a_sweep_over_the_span_of_exponents_leaves_no_trace_of_what_dropped_out():
    values = over_all_exponents(1)[:: 32 if jit.DISABLED else 8]
    found = own_rows(np.arange(len(values)), values, 3, ["sum", "std"])
    for i in range(2, len(values)):
        rows = values[max(i - 3, 0) : i].tolist()
        assert found[i, 0] == naive.exact_sum(rows)
        np.testing.assert_allclose(found[i, 1], naive.exact_std(rows), rtol=8e-16, atol=5e-324)


@pytest.mark.parametrize("offset", [0.0, 1e8, 1e9, -1e12])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_std_keeps_its_digits_at_any_offset(offset, spread):
    x = np.random.default_rng(1).standard_normal(60) * spread + offset
    found = own_rows(np.arange(61), np.append(x, 0.0), 10**6, ["std", "mean", "sum"])[-1]
    assert math.isclose(found[0], naive.exact_std(list(x)), rel_tol=4e-16)
    assert found[2] == math.fsum(x)


# ------------------------------------------------------------------ foreign oracles
def foreign(n=400, entities=5, seed=3):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, 40 * 24, n)) * HOUR
    return rng.integers(0, entities, n), times, rng.standard_normal(n)


def test_agrees_with_pandas_rolling():
    entity, times, values = foreign()
    names = ["count", "sum", "mean", "std", "min", "max"]
    found = trailing(entity, times, entity, times, times, values, [7 * DAY], names)[:, 0]
    frame = pd.DataFrame({"g": entity, "v": values}, index=pd.DatetimeIndex(times.view("datetime64[us]")))
    for g, group in frame.groupby("g"):
        rolling = group["v"].rolling(f"{7 * 24}h", closed="left")  # [t - w, t)
        for c, name in enumerate(names):
            expected = getattr(rolling, name)().to_numpy()
            expected = np.nan_to_num(expected) if name == "count" else expected
            np.testing.assert_allclose(found[entity == g, c], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_agrees_with_polars_rolling():
    entity, times, values = foreign()
    names = ["count", "mean", "std", "max", "first", "last", "distinct"]
    found = trailing(entity, times, entity, times, times, values, [3 * DAY], names)[:, 0]
    frame = pl.DataFrame({"g": entity, "t": times.view("datetime64[us]"), "v": values, "i": np.arange(len(values))})
    v = pl.col("v")
    expressions = [pl.len().alias("count"), v.mean().alias("mean"), v.std().alias("std"), v.max().alias("max")]
    expressions += [v.first().alias("first"), v.last().alias("last"), v.n_unique().alias("distinct")]
    rolled = frame.rolling("t", period="3d", group_by="g", closed="left").agg(
        pl.col("i").max().alias("unused"), *expressions
    )
    by_row = frame.sort("g", "t", maintain_order=True)
    for c, name in enumerate(names):
        mine = found[by_row["i"].to_numpy(), c]
        theirs = rolled.sort("g", "t", maintain_order=True)[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        mine = np.nan_to_num(mine) if name == "distinct" else mine  # of no rows polars counts 0 distinct values
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, err_msg=name)


def test_decayed_mean_agrees_with_pandas_ewm():
    """All rows lie in the window; just after a row pandas' mean is ours, for its weights differ by a common factor."""
    _, times, values = foreign(60)
    times = times + np.arange(60)
    window = times[-1] - times[0] + DAY
    found = trailing([0] * 60, times + 1, [0] * 60, times, times, values, [window], ["ewm_mean", "ewm_sum"])[:, 0]
    half_life = pd.Timedelta(int(window) // 2, "us")
    theirs = pd.Series(values).ewm(halflife=half_life, times=pd.Series(times.view("datetime64[us]"))).mean()
    np.testing.assert_allclose(found[:, 0], theirs, rtol=1e-9)
    weights = 0.5 ** ((times[-1] + 1 - times) / (window / 2))
    np.testing.assert_allclose(found[-1, 1], weights @ values, rtol=1e-9)


def test_recency_agrees_with_pandas_merge_asof():
    entity, times, values = foreign()
    found = trailing(entity, times, entity, times, times, values, [2 * DAY], ["recency"])[:, 0, 0]
    rows = pd.DataFrame({"t": times.view("datetime64[us]"), "g": entity})
    before = rows.assign(last=rows["t"])
    joined = pd.merge_asof(rows, before, on="t", by="g", tolerance=pd.Timedelta("2D"), allow_exact_matches=False)
    np.testing.assert_array_equal(found, (joined["t"] - joined["last"]).dt.total_seconds())


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"windows": [0]}, ValueError, r"windows must be .* found \[0\]"),
        ({"windows": []}, ValueError, "windows must be"),
        ({"aggregates": ["median"]}, ValueError, r"among count, sum.*found \['median'\]"),
        ({"aggregates": []}, ValueError, "aggregates must be"),
        ({"values": None}, ValueError, r"without values only count, recency are available, found \['mean'\]"),
        ({"values": [1.0]}, ValueError, "values must have 2 entries, found 1"),
        ({"event_time": [0.0, 1.0]}, TypeError, "event_time must hold integers.* found dtype float64"),
        ({"probe_time": [[0]]}, ValueError, r"probe_time must have one dimension, found shape \(1, 1\)"),
        ({"threads": 0}, ValueError, "threads must be .* found 0"),
        ({"values": ["a", "b"]}, TypeError, "values must hold numbers"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "probe_entity": [0],
        "probe_time": [0],
        "source_entity": [0, 0],
        "event_time": [0, 1],
        "known_at": [0, 1],
        "values": [1.0, 2.0],
        "windows": [1],
        "aggregates": ["mean"],
    }
    with pytest.raises(error, match=words):
        trailing(**(arguments | change))


def test_each_aggregate_has_its_own_code():
    assert sorted(CODES.values()) == list(range(len(AGGREGATES) + 1))


@examples(30)
@given(st.lists(ORDINARY, min_size=1, max_size=12), st.integers(1, 6))
def test_distinct_counts_values_not_rows(values, window):
    x = np.array(values)
    found = own_rows(np.arange(len(x)), x, window, ["distinct", "count"])
    for i in range(len(x)):
        inside = x[max(0, i - window) : i]
        inside = inside[~np.isnan(inside)] + 0.0
        assert found[i, 1] == len(inside)
        assert found[i, 0] == len(set(inside)) or (len(inside) == 0 and np.isnan(found[i, 0]))


@pytest.mark.parametrize("lag", [0, 40])
def test_earlier_rows_and_half_lives_equal_polars(lag):
    rng = np.random.default_rng(3)
    n = 60 if jit.DISABLED else 200
    entity, event, values = rng.integers(0, 4, n), np.sort(rng.integers(0, 100, n)), rng.standard_normal(n)
    known = event + rng.integers(0, lag + 1, n)
    names = [("recency", 3), ("ewm_sum", 4), ("ewm_mean", 20)]
    found = trailing(entity, event, entity, event, known, values, [50], names)[:, 0]
    rows = pl.DataFrame({"entity": entity, "event": event, "known": known, "value": values}).with_row_index("row")
    pairs = rows.select("entity", probe="row", t="event").join(rows, on="entity").sort("event", "known", "row")
    pairs = pairs.filter((pl.col("known") < pl.col("t")) & (pl.col("event") >= pl.col("t") - 50))
    weight = [(0.5 ** ((pl.col("t") - pl.col("event")) / h)) for h in (4, 20)]
    wanted = pairs.group_by("probe", maintain_order=True).agg(
        recency=(pl.col("t").first() - pl.col("event").get(-3, null_on_oob=True)) / 1e6,
        total=(weight[0] * pl.col("value")).sum(),
        mean=(weight[1] * pl.col("value")).sum() / weight[1].sum(),
    )
    wanted = rows.select(probe="row").join(wanted, on="probe", how="left").sort("probe").drop("probe")
    assert np.isfinite(found).all(axis=1).sum() > n / 3
    np.testing.assert_allclose(found, wanted.cast(pl.Float64).fill_null(np.nan).to_numpy(), rtol=1e-9)


@examples(40)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), ORDINARY), max_size=14), st.booleans())
def test_quantiles_of_one_entity_equal_the_slow_twin_at_every_instant(rows, ordered):
    """Most windows hold some rows and have dropped others."""
    event, lag, values = (np.array([row[k] for row in rows], (int, int, float)[k]) for k in range(3))
    known = event if ordered else event + lag
    probes, source = (np.zeros(20, int), np.arange(20)), (np.zeros(len(rows), int), event, known)
    names = [("quantile", q) for q in (7, 50, 95)]
    found = trailing(*probes, *source, values, [2, 5, 9], names)
    expected = naive.trailing(probes, source, values, [2, 5, 9], names)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lag", [0, 40])
def test_quantiles_equal_polars_and_numpy(lag):
    rng = np.random.default_rng(4)
    n = 80 if jit.DISABLED else 500
    entity, event, values = rng.integers(0, 4, n), np.sort(rng.integers(0, 100, n)), rng.standard_normal(n).round(1)
    known = event + rng.integers(0, lag + 1, n)
    per_cent = [1, 25, 50, 90, 95, 99]
    found = trailing(entity, event, entity, event, known, values, [15, 50], [("quantile", q) for q in per_cent])
    rows = pl.DataFrame({"entity": entity, "event": event, "known": known, "value": values}).with_row_index("row")
    for w, window in enumerate((15, 50)):
        pairs = rows.select("entity", probe="row", t="event").join(rows, on="entity")
        pairs = pairs.filter((pl.col("known") < pl.col("t")) & (pl.col("event") >= pl.col("t") - window))
        asked = [pl.col("value").quantile(q / 100, "linear").alias(str(q)) for q in per_cent]
        theirs = rows.select(probe="row").join(pairs.group_by("probe").agg(*asked), on="probe", how="left")
        theirs = theirs.sort("probe").drop("probe").fill_null(np.nan).to_numpy()
        assert np.isfinite(theirs).all(axis=1).sum() > n / 3
        np.testing.assert_allclose(found[:, w], theirs, rtol=1e-12, atol=1e-15)
        last = np.flatnonzero(np.isfinite(found[:, w, 0]))[-1]
        inside = (entity == entity[last]) & (known < event[last]) & (event >= event[last] - window)
        np.testing.assert_allclose(found[last, w], np.quantile(values[inside], np.array(per_cent) / 100), rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([-math.inf, 5.0], [-math.inf] * 2),
        ([5.0, math.inf], [math.inf] * 2),
        ([-math.inf, math.inf], [math.nan] * 2),
        ([math.inf, math.inf], [math.inf] * 2),
        ([-1.7e308, 1.7e308], [0.0, 1.53e308]),  # whose difference overflows
        ([0.1, 0.1], [0.1] * 2),
    ],
)
def test_quantiles_next_to_infinities_and_of_equal_values(values, wanted):
    found = trailing([0], [5], [0, 0], [1, 2], [1, 2], values, [9], [("quantile", 50), ("quantile", 95)])[0, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-15)


@pytest.mark.parametrize("aggregate", [("quantile", 100), ("quantile", 0), "quantile"])
def test_a_quantile_has_its_per_cent(aggregate):
    with pytest.raises(ValueError, match=r"a quantile must have 1 to 99 per cent as its parameter"):
        trailing([0], [5], [0], [1], [1], [1.0], [9], [aggregate])


@pytest.mark.parametrize("aggregate", [("max", 3), ("recency", -1), ("ewm_sum", -5)])
def test_a_parameter_that_an_aggregate_does_not_take_is_refused(aggregate):
    with pytest.raises(ValueError, match=r"only recency, ewm_sum, ewm_mean, quantile take a parameter, 1 or more"):
        trailing([0], [5], [0], [1], [1], [1.0], [9], [aggregate])


# ------------------------------------------------------------------------------------------------- aggregates of a caller


def _fading(state, value, age):  # depends on the order of the rows
    state[0] = state[0] * 0.5 + value
    state[1] += age


PAIR = folds.Fold("fading", start=(1.0, 0.0), add=_fading, result=lambda state: state[0] - state[1])
SLOW = folds.Fold("slow", lambda values, ages: float(values[0] * 3 + values[-1] - ages.sum() + len(ages)))


@examples(25)
@given(tables(numbers=st.one_of(ORDINARY, st.just(math.nan), st.just(-0.0))), st.randoms(use_true_random=False))
def test_aggregates_of_a_caller_equal_the_slow_twin_whatever_the_order_of_the_rows(table, random):
    probe, time, entity, event, known, values = table
    asked, widths = [PAIR, "sum", SLOW, ("recency", 2)], [3, 10, 2**62]
    found = trailing(*table, widths, asked)
    expected = naive.trailing((probe, time), (entity, event, known), values, widths, asked)
    np.testing.assert_array_equal(found[:, :, [0, 2, 3]], expected[:, :, [0, 2, 3]])
    at = np.array(random.sample(range(len(entity)), len(entity)), np.int64)
    others = trailing(probe, time, entity[at], event[at], known[at], values[at], widths, [PAIR, SLOW], threads=2)
    assert same_bytes([np.ascontiguousarray(found[:, :, [0, 2]]), others])


@pytest.mark.parametrize("fold", [PAIR, SLOW])
def test_rows_of_one_time_are_folded_in_order_of_value(fold):
    table = np.array([4, 4, 4, 2]), np.array([9, 5, 5, 5]), np.array([0.5, 1.0, 2.0, 8.0])
    found = []
    for at in ([0, 1, 2, 3], [2, 3, 1, 0], [1, 0, 3, 2]):
        event, known, values = (column[at] for column in table)
        found.append(trailing([0, 0], [12, 7], np.zeros(4, int), event, known, values, [20], [fold]))
        expected = naive.trailing(
            (np.array([0, 0]), np.array([12, 7])), (np.zeros(4, int), event, known), values, [20], [fold]
        )
        np.testing.assert_array_equal(found[-1], expected)
    assert same_bytes(found)


def _outside(state, value, _age):
    state[1] = value


def _words(state, value, _age):
    state[0] = str(value)


@pytest.mark.parametrize(
    ("fold", "reason"),
    [
        (folds.Fold("f", lambda _values, _ages: 1 / 0), "raised ZeroDivisionError: division by zero"),
        (folds.Fold("f", lambda values, _ages: values), "must give a number, found ndarray"),
        (folds.Fold("f", start=(0.0,), add=_outside, result=lambda state: state[0]), "raised IndexError"),
        pytest.param(
            folds.Fold("f", start=(0.0,), add=_words, result=lambda state: state[0]),
            "must be compilable by Numba",
            marks=pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled"),
        ),
    ],
)
def test_a_callers_aggregate_that_fails_is_named_with_the_values(fold, reason):
    with pytest.raises(folds.FoldError, match=reason) as caught:
        trailing([0], [9], [0, 0], [1, 2], [1, 2], [5.0, 7.0], [10], [fold])
    assert caught.value.name == "f"
    if "compilable" not in reason:
        assert caught.value.values.tolist() == [5.0, 7.0]
    with pytest.raises(ValueError, match=r"only count, recency are available, found \['f'\]"):
        trailing([0], [9], [0], [1], [1], None, [10], [fold])
