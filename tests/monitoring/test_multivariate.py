"""What single columns cannot show: columns that moved against each other."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine.monitoring.multivariate import compare_samples, sample_windows


def sample(rows: int, seed: int, correlation: float = 0.9, shift: float = 0.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    a = rng.normal(shift, 1, rows)
    b = correlation * a + np.sqrt(1 - correlation**2) * rng.normal(0, 1, rows)
    days = np.sort(rng.integers(0, 60, rows)).astype(np.int32)
    return pa.table({
        "day": pa.array(days).cast(pa.date32()),
        "numeric:a": a,
        "numeric:b": b,
        "category:k": rng.integers(0, 4, rows).astype(np.int32),
    })  # fmt: skip


def test_the_same_population_is_as_usual() -> None:
    found = compare_samples(sample(6000, 0), sample(1000, 1), 7)
    assert found["domain_auc"]["value"] == pytest.approx(0.5, abs=0.06)
    assert found["pca"]["value"] == pytest.approx(1.0, abs=0.2)


def test_decorrelated_columns_are_told_apart_though_each_is_unchanged() -> None:
    found = compare_samples(sample(6000, 0), sample(1500, 1, correlation=0.0), 7)
    assert found["domain_auc"]["beyond"] and found["domain_auc"]["value"] > 0.65
    assert found["pca"]["beyond"] and found["pca"]["value"] > 2


def test_shifted_rows_are_told_apart() -> None:
    assert compare_samples(sample(6000, 0), sample(1000, 1, shift=1.0), 7)["domain_auc"]["value"] > 0.7


def test_constant_columns_and_unknown_codes_do_not_break_it() -> None:
    table = sample(3000, 0)
    flat = table.set_column(1, "numeric:a", pa.array(np.full(3000, 7.0)))
    odd = flat.slice(0, 500).set_column(3, "category:k", pa.array(np.full(500, 99, np.int32)))
    for item in compare_samples(flat, odd, 7).values():
        assert np.isfinite(item["value"])


def test_too_few_rows_or_none_say_why() -> None:
    for found in (compare_samples(sample(6000, 0), None, 7), compare_samples(sample(6000, 0), sample(20, 1), 7)):
        for item in found.values():
            assert item["value"] is None and item["reason"].startswith("not computable, because")


def test_reference_windows_are_separate_and_have_rows() -> None:
    days = np.repeat(np.arange(60), 50)
    windows = sample_windows(days, 10)
    assert len(windows) == 6
    assert np.sum(windows, axis=0).max() == 1
