"""Rows of far centuries: work goes by rows, never by the days between them, and the ordinary rows come out as without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine.config import schema, units
from engine.config.compose import compose
from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.features import encode
from engine.features.table import ensure_table
from engine.lifecycle import backtest
from engine.monitoring import multivariate, reference
from engine.runtime.run import Run
from kernels import encode as kernel
from tests.tiny import overrides, visits, write_tiny

YEARS = ("0000-03-01", "0001-01-01", "1970-01-01", "9999-12-31T23:59:59")
DAY = 86_400_000_000


def instants(*texts: str) -> np.ndarray:
    return np.array(texts, "datetime64[us]").astype(np.int64)


def with_centuries(table: pa.Table) -> pa.Table:
    """The visits, and one of a shop of its own in each of YEARS and at the start of the year 10000."""
    at = np.append(instants(*YEARS), 253_402_300_800_000_000)
    far = {
        "visit": pa.array(range(len(at))),
        "shop": pa.array(["shop-far"] * len(at)),
        "at": pa.array(at).cast(table.schema.field("at").type),
        "paid_at": pa.array(at + 3_600_000_000).cast(table.schema.field("at").type),
        "size": pa.array([1e300, -1e300, 5e-324, -0.0, None]),
        "amount": pa.array([1.7976931348623157e308, -1.7976931348623157e308, 0.0, 1e160, None]),
        "bought": pa.array([True, False, True, False, None]),
    }
    return pa.concat_tables([table, pa.table(far, table.schema)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path, 1200)
    pq.write_table(with_centuries(visits(1200)), folder / "visits.parquet")
    return folder


def features_of(folder: Path, *more: str) -> tuple[pa.Table, int]:
    """(raw features by visit, parts of the view)"""
    config: Config = compose(overrides(folder, *more), str(folder / "conf")).config
    run = Run.create("features", config, {})
    dataset = ensure_dataset(config, run)
    table = ensure_table(config, run, dataset)
    rows = table.read((0, dataset.rows)).append_column("visit", dataset.read(["visit"])["visit"])
    return rows, len(table.views["shop"].manifest["parts"])


def test_features_of_ordinary_rows_are_those_without_the_far_ones_and_a_view_has_a_part_a_month_with_rows(
    folder: Path, tmp_path: Path
) -> None:
    far, parts = features_of(folder)
    assert parts == 1 + 5
    plain, _ = features_of(write_tiny(tmp_path / "plain", 1200))
    ordinary = far.filter(pc.greater(far["visit"], 100))
    assert ordinary.sort_by("visit").equals(plain.sort_by("visit"))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_every_step_takes_rows_of_far_centuries_in_its_stride(folder: Path, zone: str) -> None:
    def step(name: str, *more: str) -> Run:
        return engine.run(name, *overrides(folder, f"data.time_zone={zone}", *more), config_dir=str(folder / "conf"))

    trained = step("train", "split.train=['0001-06-01','2020-01-21']", "split.test=['2020-01-26','9999-12-31']")
    model = np.concatenate([weights.ravel() for weights in weights_of(trained.directory)])
    assert np.isfinite(model).all()
    assert {name for name, value in trained.metrics.items() if not np.isfinite(value)} == set()
    scored = step("score", f"score.model={trained.directory}")
    assert scored.metrics["score/rows"] == 1205
    watched = step("monitor", f"monitor.model={trained.directory}", f"monitor.run={scored.directory}")
    assert (watched.directory / "report.html").exists()


def weights_of(directory: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return [
        value for value in load_file(directory / "model" / "model.safetensors").values() if value.dtype == np.float32
    ]


def test_a_reference_has_a_place_for_days_with_rows_and_for_short_gaps_between_them_only() -> None:
    days = np.array([-719_000, 0, 3, 19_000, 19_001, 2_900_000])
    found = reference._consecutive(days)
    assert set(days) <= set(found.tolist()) and len(found) < 6 + 3 * (reference.LONGEST_GAP + 1)
    assert found[found <= 3][-4:].tolist() == [0, 1, 2, 3] and (np.diff(found) > 0).all()
    dense = np.array([10, 11, 15])
    assert reference._consecutive(dense).tolist() == [10, 11, 12, 13, 14, 15]


def test_windows_of_a_sample_lie_where_its_rows_are() -> None:
    days = np.repeat(np.concatenate([np.arange(100), [5_000_000]]), 20)
    dense = np.repeat(np.arange(100), 20)
    found, alone = (multivariate.sample_windows(given, 7) for given in (days, dense))
    assert len(found) >= len(alone) - 1 > 5 and {inside.sum() for inside in found} == {7 * 20}


def test_a_backtest_has_the_periods_that_hold_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    event = np.sort(np.append(instants("2013-01-05", "2013-01-20", "2013-03-31T23:00"), instants("9999-12-31")))

    def periods(length: str) -> list[backtest.Period]:
        config = schema.build(Config, {"name": "t", "backtest": {"start": "2013-01-01", "period": length}})
        return backtest.make_periods(SimpleNamespace(config=config, event=event))  # type: ignore[arg-type]

    names = [period.name for period in periods("month")]
    assert names == ["2013-01", "2013-03", "9999-12"]
    weekly = periods("7d")
    assert len(weekly) == 4
    for period, first in zip(weekly, event, strict=True):
        assert (period.start - units.instant("2013-01-01", "UTC")) % (7 * DAY) == 0
        assert period.start <= first < period.stop


@pytest.mark.parametrize("how", ["standardise", "quantile", "ple"])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, 3.0, 1.7976931348623157e308, -1.7976931348623157e308],
        [1.7976931348623157e308, 1.7976931348623157e308, -1.7976931348623157e308],
        [1.0, 2.0, 1e300],
        [5e-324, 0.0, -0.0, 1e-310],
        [1e308, 1.5e308, 1.7e308],
    ],
)
def test_encoded_values_are_finite_whatever_the_column_holds(how: str, values: list[float]) -> None:
    column = pa.table({"v": pa.array([*values, None])})
    config = schema.build(encode.EncodeConfig, {"numeric": how, "bins": 4})
    fitted = encode.Encoder.fit([encode.Feature("v", encode.NUMERIC, "direct")], lambda _: column, config)
    unseen = pa.table({"v": pa.array([*values, None, float("inf"), float("-inf"), 1e308, -1e308, 0.0])})
    with np.errstate(over="raise", invalid="raise"):
        numeric, _ = fitted.transform(unseen)
    assert np.isfinite(numeric).all() and np.ptp(numeric, axis=0).max() > 0
    assert np.isfinite(kernel.numeric_plan([item.for_kernel(10.0) for item in fitted.numeric_]).numbers).all()


def test_a_column_whose_scale_a_far_value_sets_is_named_and_the_advice_helps() -> None:
    def warnings_of(values: list[float], **settings: str) -> list[str]:
        said: list[str] = []
        config = schema.build(encode.EncodeConfig, settings)
        table = pa.table({"amount": values})
        encode.Encoder.fit([encode.Feature("amount", encode.NUMERIC, "direct")], lambda _: table, config, said.append)
        return said

    ordinary = np.random.default_rng(0).lognormal(0, 3, 1000).tolist()
    assert warnings_of(ordinary) == []
    (said,) = warnings_of([*ordinary, 1e300])
    assert "'amount'" in said and "1e+300" in said and "quantile" in said
    assert warnings_of([*ordinary, 1e300], numeric="quantile") == []
