"""The catalog says how old a view is, how much of it is null, and how its newest month differs from the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from engine.config.tree import Config
from engine.features import view_statistics
from engine.features.table import FeatureTable
from tests.features.test_store import built, config_of, everything, months_of_visits
from tests.tiny import overrides, write_tiny

VIEW = "features.views.deal={kind: expression, expressions: {x: size, s: {sql: shop, type: string}}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four months of visits; in the newest, sizes are larger by one, a third of them are null, and one shop is new."""
    folder = write_tiny(tmp_path_factory.mktemp("months"), 10)
    (folder / "visits.parquet").unlink()
    table = months_of_visits(4000)
    month = pc.strftime(table["at"], "%Y-%m")
    newest = pc.equal(month, pc.max(pc.unique(month)))
    third = pa.array(np.arange(table.num_rows) % 3 == 0)
    size = pc.if_else(newest, pc.add(table["size"], 1.0), table["size"])
    size = pc.if_else(pc.and_(newest, third), pa.scalar(None, pa.float64()), size)
    shop = pc.if_else(pc.and_(newest, pc.equal(table["shop"], "shop-3")), "shop-new", table["shop"])
    for name, column in (("size", size), ("shop", shop)):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, folder / "visits-0.parquet")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return config_of(folder, VIEW)


@pytest.fixture(scope="module")
def table(config: Config) -> FeatureTable:
    return built(config)


def naive_psi(before: list[Any], now: list[Any], floor: float = 1e-4) -> float:
    """PSI by its formula over levels, the floor of kernels.statistics."""
    total = 0.0
    for level in {*before, *now}:
        p, q = (max(side.count(level) / len(side), floor) for side in (before, now))
        total += (p - q) * np.log(p / q)
    return total


def halves(table: FeatureTable, name: str) -> tuple[list[Any], list[Any]]:
    """The feature's values of the month before the newest and of the newest, nulls left out."""
    months = pc.strftime(table.dataset.read(["at"])["at"], "%Y-%m").to_pylist()
    newest, before = sorted(set(months))[-1], sorted(set(months))[-2]
    values = everything(table)[name].to_pylist()
    pairs = [(month, value) for month, value in zip(months, values, strict=True) if value is not None]
    return [v for m, v in pairs if m == before], [v for m, v in pairs if m == newest]


def test_nulls_and_drift_are_those_of_the_formula(config: Config, table: FeatureTable) -> None:
    stored = table.views["deal"]
    age = view_statistics.age_of(stored, Path(config.paths.store))
    assert age is not None and age.newest_event.startswith(age.month)
    figures = {row["feature"]: row for row in view_statistics.statistics(stored, age)}
    rows = age.month_rows[1] - age.month_rows[0]
    assert age.month_rows[1] == table.dataset.rows and age.before_rows[1] == age.month_rows[0]
    before, now = halves(table, "deal_s")
    assert figures["deal_s"]["drift"] == pytest.approx(naive_psi(before, now), rel=1e-5) and "shop-new" in now
    before, now = halves(table, "deal_x")
    assert float(figures["deal_x"]["month_nulls"].rstrip("%")) == round(100 * (1 - len(now) / rows), 1) > 30
    edges = np.quantile(before, np.arange(1, 10) / 10)
    binned = [np.searchsorted(edges, side, "right").tolist() for side in (before, now)]
    assert figures["deal_x"]["drift"] == pytest.approx(naive_psi(*binned), rel=0.1) and figures["deal_x"]["drift"] > 0.5
    assert figures["deal_s"]["mean"] is None and figures["deal_x"]["mean"] is not None


def test_equal_months_do_not_drift_and_empty_ones_have_no_figure() -> None:
    values = pa.chunked_array([np.random.default_rng(0).normal(size=1000)])
    assert view_statistics.drift(values, values) == 0
    assert view_statistics.drift(values.slice(0, 0), values) is None
    assert view_statistics.drift(values, values.slice(0, 0)) is None
    texts = pa.chunked_array([["a", "b", "b"]])
    assert view_statistics.drift(texts, texts) == 0 and view_statistics.drift(texts, texts.slice(0, 0)) is None
    infinite = pa.chunked_array([[float("inf"), float("-inf"), 1.0, float("nan")]])
    assert view_statistics.drift(infinite, infinite) == 0


@pytest.mark.parametrize("value", [-1.0, 0.5, 5.0])
def test_a_frequent_value_that_gives_way_is_drift(value: float) -> None:
    """A constant, and a count that is mostly 0: quantiles alone have no edge between these and another value."""
    moved = pa.chunked_array([np.full(1000, value)])
    constant = pa.chunked_array([np.zeros(1000)])
    sparse = pa.chunked_array([np.r_[np.zeros(960), np.arange(1.0, 41)]])
    for before in (constant, sparse):
        found = view_statistics.drift(before, moved)
        assert found is not None and found > 1
        assert view_statistics.drift(before, before) == 0


def test_a_sample_of_a_long_month_is_spread_over_it(
    config: Config, table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = table.views["deal"]
    age = view_statistics.age_of(stored, Path(config.paths.store))
    assert age is not None
    exact = view_statistics.monthly(stored, age)["deal_x"]["drift"]
    monkeypatch.setattr(view_statistics, "SAMPLE_ROWS", 400)
    sample = view_statistics._sample(stored, age.month_rows)
    assert sample.num_rows == 400 and sample.slice(300).equals(
        stored.read(rows=(age.month_rows[1] - 100, age.month_rows[1]))
    )
    assert view_statistics.monthly(stored, age)["deal_x"]["drift"] == pytest.approx(exact, rel=0.5)


def test_the_commands_show_them(cli: Callable[..., Any], folder: Path, table: FeatureTable) -> None:
    words = [*overrides(folder, VIEW), "--config-dir", str(folder / "conf")]
    listed = {row["view"]: row for row in json.loads(cli("features", "list", "--json", *words).out)}
    assert listed["deal"]["drift_of"] == "deal_s" and listed["deal"]["drift"] > 0.5
    assert float(listed["deal"]["most_nulls"].rstrip("%")) > 30 and listed["deal"]["newest_event"] > "2020-04"
    text = cli("features", "list", *words).out
    assert "drift_of" in text and "deal_s" in text
    text = cli("features", "show", "deal", *words).out
    assert "newest event 2020-" in text and "; drift: its PSI against 2020-" in text and "month_nulls" in text
    shown = json.loads(cli("features", "show", "deal", "--json", *words).out)
    assert shown["freshness"]["month"] == max(month for month in ("2020-04", shown["freshness"]["before"]))
    shutil.move(folder / "store" / "datasets", folder / "aside")
    try:
        gone = json.loads(cli("features", "show", "deal", "--json", *words).out)
        assert gone["freshness"] is None and gone["statistics"][0]["drift"] is None
        assert cli("features", "list", *words).code == 0
    finally:
        shutil.move(folder / "aside", folder / "store" / "datasets")


def test_a_view_that_was_never_computed_is_listed(cli: Callable[..., Any], tmp_path: Path) -> None:
    write_tiny(tmp_path, 50)
    words = [*overrides(tmp_path, VIEW), "--config-dir", str(tmp_path / "conf")]
    assert {row["drift"] for row in json.loads(cli("features", "list", "--json", *words).out)} == {None}
    assert "not computed yet" in cli("features", "show", "deal", *words).out
