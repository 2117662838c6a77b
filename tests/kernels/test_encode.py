from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.preprocessing import KBinsDiscretizer, QuantileTransformer, StandardScaler

from kernels.encode import (
    KINDS,
    NumericColumn,
    encode_numeric,
    inverse_normal,
    numeric_plan,
    quantiles_of,
)
from tests import naive
from tests.kernels.cases import NUMBERS, examples, layouts, same_bytes


def one(values, kind, **column):
    """float32[n, width] of one column."""
    plan = numeric_plan([NumericColumn(kind, **column)])
    return encode_numeric(np.reshape(values, (-1, 1)), plan, np.empty((len(values), plan.width), np.float32))


EDGES = st.lists(st.sampled_from([-1e300, -5.0, 0.0, 0.0, 0.1, 1.0, 1e300]), min_size=2, max_size=6).map(sorted)


@examples(120)
@given(st.lists(NUMBERS, min_size=1, max_size=8), EDGES)
def test_ranks_and_bins_equal_the_slow_twin_and_are_always_finite(values, edges):
    x = np.array(values)
    uniform, normal = (one(x, kind, edges=edges)[:, 0] for kind in ("uniform", "normal"))
    bins, plain = one(x, "ple", edges=edges), one(x, "standardise", center=1.0, scale=1e-300)
    clipped = np.clip(x, -3.4028235e38, 3.4028235e38)
    for i, v in enumerate(clipped):
        rank = 0.0 if v != v else naive.rank(v, edges)
        np.testing.assert_allclose(uniform[i], rank, rtol=1e-6, atol=1e-30)
        constant = v != v or edges[0] == edges[-1]
        np.testing.assert_allclose(normal[i], 0 if constant else norm.ppf(min(max(rank, 1e-7), 1 - 1e-7)), atol=1e-6)
        np.testing.assert_allclose(
            bins[i], [0.0] * (len(edges) - 1) if v != v else naive.ple(v, edges), rtol=1e-6, atol=1e-30
        )
    assert np.all(np.isfinite(np.concatenate([uniform, normal, bins.ravel(), plain.ravel()])))


def test_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    train, x = rng.standard_normal((300, 1)).round(1), rng.standard_normal((200, 1)).round(1)
    quantiles = quantiles_of(train[:, 0], 50)
    np.testing.assert_allclose(quantiles, np.quantile(train, np.linspace(0, 1, 51)), atol=1e-15)
    for name in ("uniform", "normal"):
        theirs = QuantileTransformer(n_quantiles=51, output_distribution=name).fit(train).transform(x)
        np.testing.assert_allclose(one(x, name, edges=quantiles), theirs, atol=1e-6)
    scaler = StandardScaler().fit(train)
    ours = one(x, "standardise", center=scaler.mean_[0], scale=scaler.scale_[0])
    np.testing.assert_allclose(ours, scaler.transform(x), rtol=1e-6)
    edges = np.array([-4.0, -1.0, 0.0, 1.0, 4.0])
    bins = KBinsDiscretizer(4, encode="ordinal", strategy="uniform").fit(edges[:, None])
    bins.bin_edges_ = np.array([edges], dtype=object)
    inside = x[np.isin(x, edges, invert=True)]
    np.testing.assert_array_equal(
        (one(inside, "ple", edges=edges) > 0).sum(axis=1) - 1, bins.transform(inside[:, None])[:, 0]
    )


@pytest.mark.parametrize("p", [1e-12, 1e-7, 0.02, 0.075, 0.3, 0.5, 0.6, 0.925, 0.99, 1 - 1e-7])
def test_inverse_normal_is_accurate(p):
    np.testing.assert_allclose(inverse_normal(p), norm.ppf(p), rtol=2e-15, atol=1e-17)


COLUMNS = [
    NumericColumn("standardise", center=1.0, scale=2.0, fill=-9.0, indicator=True),
    NumericColumn("uniform", edges=(0.0, 1.0, 3.0)),
    NumericColumn("normal", edges=(0.0, 1.0, 3.0), indicator=True),
    NumericColumn("ple", edges=(0.0, 1.0, 3.0), fill=0.5, indicator=True),
    NumericColumn("standardise", center=5.0, scale=0.0),
]


def test_all_columns_in_one_block():
    plan = numeric_plan(COLUMNS)
    assert plan.width == 2 + 1 + 2 + 3 + 1
    found = encode_numeric([[3.0, 2.0, 1.0, 2.0, 5.0], [np.nan] * 5], plan, np.empty((2, 9), np.float32))
    np.testing.assert_allclose(found[0], [1, 0, 0.75, 0, 0, 1, 0.5, 0, 0], atol=1e-7)
    np.testing.assert_array_equal(found[1], np.float32([-9, 1, 0, 0, 1, 0.5, 0.5, 1, 0]))


def test_infinities_are_clipped_and_a_constant_column_is_zero():
    column = NumericColumn("standardise", center=1.0, scale=2.0, low=-3.0, high=5.0)
    found = encode_numeric([[np.inf], [-np.inf], [9.0]], numeric_plan([column]), np.empty((3, 1), np.float32))
    np.testing.assert_array_equal(found[:, 0], [2, -2, 2])
    for kind in KINDS:
        column = NumericColumn(kind, center=7.0, scale=0.0, edges=(7.0, 7.0))
        found = encode_numeric([[7.0], [8.0], [np.nan]], numeric_plan([column]), np.empty((3, 1), np.float32))
        np.testing.assert_array_equal(found, 0)


def test_threads_and_layouts_do_not_matter_and_input_stays():
    values = np.random.default_rng(1).standard_normal((60, 5))
    values[::7] = np.nan
    before, plan = values.copy(), numeric_plan(COLUMNS)
    blank = lambda: np.empty((60, plan.width), np.float32)  # noqa: E731
    results = [encode_numeric(values, plan, blank(), threads=t) for t in (1, 2, 4)]
    results += [encode_numeric(v, plan, blank()) for v in (*layouts(values), np.asfortranarray(values))]
    assert same_bytes(results)
    np.testing.assert_array_equal(values, before)


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NumericColumn("log"), ValueError, "one of standardise, uniform, normal, ple, found 'log'"),
        (lambda: NumericColumn(low=2.0, high=1.0), ValueError, "found 2.0 and 1.0"),
        (lambda: NumericColumn(scale=-1.0), ValueError, "found 0.0 and -1.0"),
        (lambda: NumericColumn(fill=np.nan), ValueError, "fill must be finite, found nan"),
        (lambda: NumericColumn("ple", edges=(1.0, 0.0)), ValueError, "ascending numbers for ple"),
        (lambda: NumericColumn("normal", edges=(1.0,)), ValueError, "at least two"),
        (
            lambda: encode_numeric([[1.0, 2.0]], numeric_plan(COLUMNS), np.empty((1, 9), np.float32)),
            ValueError,
            r"\[n, 5\]",
        ),
        (
            lambda: encode_numeric([["a"] * 5], numeric_plan(COLUMNS), np.empty((1, 9), np.float32)),
            TypeError,
            "numbers",
        ),
        (lambda: quantiles_of([1.0], 0), ValueError, "count must be at least 1, found 0"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
