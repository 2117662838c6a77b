"""Windows views against a twin that reads their rules aloud: by known time, over side tables, under conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.features
from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig, ViewConfig, aggregate_of
from engine.errors import UserError
from engine.features import compute, own_rows
from engine.features.compute import raw_features
from engine.features.past import past_events
from tests import naive
from tests.features.test_compute import DATA, H, configs, instant_column, micros
from tests.features.test_kinds import TABLE, dataset_of, leaking, weather
from tests.features.test_store import (
    built,
    config_of,
    days_of,
    everything,
    features_computed,
    from_scratch,
    months_of_visits,
)
from tests.tiny import overrides, write_tiny

LEAD = H
WIDTHS = {"2h": 2 * H, "1d": 24 * H}
NAMES = ["count", "sum", "mean", "std", "min", "max", "first", "last", "recency", "distinct", "recency_3"]
NAMES += ["quantile_50", "quantile_95"]
NAMES += ["ewm_mean", "ewm_sum_6h", "ewm_mean_6h", "ewm_mean_30min"]
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 60),  # half hours: ties
        st.one_of(st.none(), st.integers(-6, 60)),  # known so many half hours later; never
        st.sampled_from(["a", "b", None]),
        st.sampled_from([None, 0.0, -0.0, 1.5, -2.25, 1e9, math.inf, -math.inf, math.nan]),
        st.sampled_from([None, 0.0, 1.0, 7.0]),
    ),
    max_size=25,
)


def events_of(rows: list[Any]) -> pa.Table:
    at = [row[0] * H // 2 for row in rows]
    known = [None if row[1] is None else t + row[1] * H // 2 for t, row in zip(at, rows, strict=True)]
    table = pa.table(
        {
            "id": pa.array(range(len(rows)), pa.int64()),
            "at": instant_column(at),
            "known": instant_column(known),
            "who": pa.array([row[2] for row in rows], pa.string()),
            "value": pa.array([row[3] for row in rows], pa.float64()),
            "plan": pa.array([row[4] for row in rows], pa.float64()),
        }
    )
    return table.sort_by([("at", "ascending"), ("id", "ascending")])


def plain(table: pa.Table) -> list[dict[str, Any]]:
    times = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
    return [{**row, **{name: micros(row[name]) for name in times}} for row in table.to_pylist()]


def same(found: float | None, expected: float) -> bool:
    """Equal; a null is NaN, and a mean or a deviation is rounded elsewhere in the twin."""
    here = math.nan if found is None else found
    return (
        (math.isnan(here) and math.isnan(expected)) or here == expected or math.isclose(here, expected, rel_tol=1e-12)
    )


def check(events: pa.Table, view: dict[str, Any], expected: Callable[[dict[str, Any], int], dict[str, float]]) -> None:
    """The features of each row are those of the twin: row, decision -> features."""
    data, features = configs(views={"v": view}, direct={}, calendar={})
    found = raw_features(data, features, events, events, {}, threads=2).to_pylist()
    for row, here in zip(plain(events), found, strict=True):
        for name, value in expected(row, row["at"] - LEAD).items():
            assert same(here[f"v_{name}"], value), (name, row, here[f"v_{name}"], value)


# ------------------------------------------------------------------------------------------------------ known time


@settings(max_examples=40)
@given(EVENTS)
def test_windows_by_known_time_equal_the_slow_twin(rows: list[Any]) -> None:
    events = events_of(rows)
    past = plain(events)

    def expected(row: dict[str, Any], decision: int) -> dict[str, float]:
        found = {}
        mine = [(e["at"], e["known"], k, e["value"]) for k, e in enumerate(past) if e["who"] == row["who"] is not None]
        for window, width in WIDTHS.items():
            counted = naive.counted(mine, decision, width, by="known")
            found |= {
                f"value_{name}_{window}": naive.aggregate(aggregate_of(name), counted, decision, width)
                for name in NAMES
            }
            whole = naive.counted([(a, a, k, 0.0) for a, _, k, _ in mine], decision, width, by="known")
            found[f"count_{window}"] = float(len(whole))  # a row is known as a row when it happens
        return found

    view = {
        "entity": ["who"],
        "windows": list(WIDTHS),
        "aggregates": {"value": NAMES, "rows": ["count"]},
        "by": "known",
    }
    check(events, view, expected)


def visits_known_late(rows: int = 900, seed: int = 0) -> pa.Table:
    """Visits of four months, of which every seventh is paid up to two months later."""
    table = months_of_visits(rows, seed)
    paid = table["paid_at"].cast(pa.int64()).to_numpy(zero_copy_only=False)
    late = np.arange(rows) % 7 == 0
    paid = paid + late * np.random.default_rng(seed).integers(0, 60 * 24, rows) * float(H)
    column = pa.array(paid, pa.float64(), mask=np.isnan(paid)).cast(pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    return table.set_column(table.schema.get_field_index("paid_at"), "paid_at", column)


BY_KNOWN = ("features.views.shop.by=known", "features.views.shop.windows=[2d,20d]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path, 10)
    (folder / "visits.parquet").unlink()
    return folder


def test_windows_by_known_time_equal_polars(folder: Path) -> None:
    """The whole way through the store, whose row groups say which earlier rows became known within a window."""
    events = visits_known_late()
    pq.write_table(events, folder / "visits-0.parquet")
    found = everything(built(config_of(folder, *BY_KNOWN)))
    rows = (
        pl.from_arrow(events)
        .sort("at", "visit")
        .with_row_index("row")
        .with_columns(t=pl.col("at") - pl.duration(hours=1))
    )
    known = rows.filter(pl.col("amount").is_not_null() & pl.col("paid_at").is_not_null())
    known = known.select("shop", "amount", known_at=pl.max_horizontal("at", "paid_at"))
    for window, days in (("2d", 2), ("20d", 20)):
        pairs = rows.select("row", "shop", "t").join(known, on="shop").filter(
            pl.col("known_at").is_between(pl.col("t") - pl.duration(days=days), pl.col("t"), closed="left")
        )  # fmt: skip
        means = rows.select("row").join(pairs.group_by("row").agg(pl.col("amount").mean()), on="row", how="left")
        expected = means.sort("row")["amount"].to_numpy()
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(
            found[f"shop_amount_mean_{window}"].to_numpy(zero_copy_only=False), expected, rtol=1e-12
        )


@pytest.mark.slow
def test_an_append_and_a_late_row_give_the_windows_by_known_time_of_a_full_build(folder: Path, tmp_path: Path) -> None:
    """The late row is of January and becomes known in March: February stays, April's windows see it."""
    table = visits_known_late()
    late = table.slice(100, 1)
    place = table.schema.get_field_index("paid_at")
    march = pa.array([micros(table["at"][700].as_py())], pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.concat_tables([table.slice(0, 100), table.slice(101, 700)]), folder / "visits-0.parquet")
    built(config_of(folder, *BY_KNOWN))
    pq.write_table(table.slice(801), folder / "visits-1.parquet")
    built(config_of(folder, *BY_KNOWN))
    pq.write_table(late.set_column(place, "paid_at", march), folder / "visits-2.parquet")
    found, fresh = built(config_of(folder, *BY_KNOWN)), from_scratch(folder, tmp_path, *BY_KNOWN)
    assert everything(found).equals(everything(fresh)) and found.digest == fresh.digest
    assert not everything(found).equals(everything(from_scratch(folder, tmp_path, BY_KNOWN[1])))


@pytest.mark.parametrize("rows", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_window_by_known_time_sees_its_future(folder: Path, rows: int) -> None:
    pq.write_table(visits_known_late(), folder / "visits-0.parquet")
    config = config_of(folder, *BY_KNOWN)
    assert leaking(config, rows) == set()
    dataset, view = dataset_of(config), config.features.views["shop"]
    decision = micros(dataset.read(["at"], (800, 801))["at"][0].as_py())
    read = past_events(dataset, config.data, [view], np.array([decision]), ["at", "paid_at"])
    length = 20 * 24 * H
    everything_ = plain(dataset.read(["at", "paid_at"]))
    needed = [
        row for row in everything_ if row["at"] < decision and max(row["at"], row["paid_at"] or 0) >= decision - length
    ]
    assert any(row["at"] < decision - length for row in needed)
    there = plain(read)
    assert all(row in there for row in needed)


def test_a_view_of_earlier_versions_keeps_its_plan_and_its_recipe() -> None:
    view = {"entity": ["shop"], "windows": ["1d"], "aggregates": {"rows": ["count"]}}
    saved = schema.plain(schema.build(ViewConfig, view))
    assert "by" not in saved and schema.build(ViewConfig, saved).by == "event"
    assert schema.plain(schema.build(ViewConfig, {**view, "by": "known"}))["by"] == "known"


# --------------------------------------------------------------------------------- side tables, own rows, conditions

TABLE_ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]),
        st.integers(0, 60),
        st.one_of(st.none(), st.integers(-6, 60)),
        st.sampled_from([None, 0.0, -1.5, 4.0, math.inf, math.nan]),
        st.integers(0, 4),  # the event that it belongs to
        st.sampled_from([None, True, False]),
    ),
    max_size=25,
)
PAYMENTS = {
    "columns": {
        "payer": {"type": "string", "role": "entity", "known_at": "prior"},
        "paid": {"type": "timestamp", "role": "event_time", "known_at": "paid"},
        "booked": {"type": "timestamp", "role": "time"},
        "sum": {"type": "float64", "role": "numeric", "known_at": "booked"},
        "of": {"type": "int64", "role": "ignore", "known_at": "prior"},
        "card": {"type": "bool", "role": "ignore", "known_at": "booked + 1h"},
    }
}


def payments_of(rows: list[Any]) -> pa.Table:
    paid = [row[1] * H // 2 for row in rows]
    booked = [None if row[2] is None else t + row[2] * H // 2 for t, row in zip(paid, rows, strict=True)]
    return pa.table(
        {
            "payer": pa.array([row[0] for row in rows], pa.string()),
            "paid": instant_column(paid),
            "booked": instant_column(booked),
            "sum": pa.array([row[3] for row in rows], pa.float64()),
            "of": pa.array([row[4] for row in rows], pa.int64()),
            "card": pa.array([row[5] for row in rows], pa.bool_()),
        }
    )


@settings(max_examples=30)
@given(EVENTS, TABLE_ROWS, st.sampled_from(["event", "known"]), st.booleans(), st.sampled_from([1, 4_000_000]))
def test_windows_over_a_side_table_equal_the_slow_twin(
    rows: list[Any], side: list[Any], by: str, exclude: bool, copies: int
) -> None:
    events, table = events_of(rows), payments_of(side)
    data = {**DATA, "tables": {"payments": PAYMENTS}}
    view = {
        "entity": ["who"],
        "table": "payments",
        "on": ["payer"],
        "by": by,
        "windows": list(WIDTHS),
        "exclude": {"id": "of"} if exclude else {},
        "aggregates": {"sum": NAMES, "carded": {"of": "sum", "where": "card", "aggregates": NAMES}, "rows": ["count"]},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_rows, "COPIES", copies)
        found = raw_features(*configs_of(data, view), events, events, {"payments": table}, threads=2).to_pylist()
    past = plain(table)
    for row, here in zip(plain(events), found, strict=True):
        decision = row["at"] - LEAD
        mine = [
            (p, k)
            for k, p in enumerate(past)
            if p["payer"] == row["who"] is not None and not (exclude and p["of"] == row["id"])
        ]
        of_sum = [(p["paid"], p["booked"], k, p["sum"]) for p, k in mine]
        carded = [(p["paid"], p["booked"] and p["booked"] + H, k, p["sum"]) for p, k in mine if p["card"]]
        whole = [(p["paid"], p["paid"], k, 0.0) for p, k in mine]
        for window, width in WIDTHS.items():
            for prefix, lines, names in (("sum_", of_sum, NAMES), ("carded_", carded, NAMES), ("", whole, ["count"])):
                counted = naive.counted(lines, decision, width, by)
                for name in names:
                    value = here[f"v_{prefix}{name}_{window}"]
                    assert same(value, naive.aggregate(aggregate_of(name), counted, decision, width)), (
                        prefix,
                        name,
                        window,
                        row,
                    )


def configs_of(data: dict[str, Any], view: dict[str, Any]) -> tuple[DataConfig, FeaturesConfig]:
    features = {"as_of": "at - 1h", "views": {"v": view}}
    return schema.build(DataConfig, data), schema.build(FeaturesConfig, features)


REPORTS = (
    *TABLE,
    "features.views.reports={entity: [shop], table: weather, windows: [1d, 20d], by: known, where: 'temp > 5', "
    "aggregates: {temp: [mean, max, quantile_95, ewm_mean_6h], warm: {of: rows, where: 'temp > 10', aggregates: [count]}}}",
    "features.views.big={entity: [shop], windows: [2d], exclude: {visit: visit}, "
    "aggregates: {amount: [sum, recency_3, quantile_50], "
    "sold: {of: amount, where: 'bought AND size > 0', aggregates: [sum, count, ewm_sum_6h]}}}",
)
DERIVE = "features.views.big.derive={share: sold_sum_2d / amount_sum_2d, sales: {sql: sold_count_2d + 0, type: int64}}"


def test_windows_over_a_side_table_equal_polars_the_whole_way(folder: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    pq.write_table(weather(900), folder / "weather.parquet")
    found = everything(built(config_of(folder, *REPORTS)))
    rows = pl.from_arrow(months_of_visits()).sort("at", "visit").with_row_index("row")
    rows = rows.with_columns(t=pl.col("at") - pl.duration(hours=1))
    side = pl.from_arrow(weather(900)).drop_nulls("temp").filter(pl.col("temp") > 5)
    side = side.select(
        "shop", "temp", known_at=pl.max_horizontal("seen", "published"), published="published"
    ).drop_nulls()
    pairs = rows.select("row", "shop", "t").join(side, on="shop").filter(
        pl.col("known_at").is_between(pl.col("t") - pl.duration(days=20), pl.col("t"), closed="left")
    )  # fmt: skip
    wanted = pairs.group_by("row").agg(
        mean=pl.col("temp").mean(), high=pl.col("temp").quantile(0.95, "linear"), warm=(pl.col("temp") > 10).sum()
    )
    wanted = rows.select("row").join(wanted, on="row", how="left").sort("row")
    assert wanted["mean"].is_not_null().sum() > 50
    floats = {name: found[name].to_numpy(zero_copy_only=False) for name in found.column_names if name.startswith("rep")}
    np.testing.assert_allclose(floats["reports_temp_mean_20d"], wanted["mean"].to_numpy(), rtol=1e-12)
    np.testing.assert_allclose(floats["reports_temp_quantile_95_20d"], wanted["high"].to_numpy(), rtol=1e-12)
    np.testing.assert_array_equal(floats["reports_warm_count_20d"], wanted["warm"].fill_null(0).to_numpy())
    known = rows.filter(pl.col("amount").is_not_null() & pl.col("bought") & (pl.col("size") > 0))
    known = known.select("shop", "amount", "at", known_at=pl.max_horizontal("at", "paid_at"))
    pairs = rows.select("row", "shop", "t").join(known, on="shop").filter(
        (pl.col("known_at") < pl.col("t")) & (pl.col("at") >= pl.col("t") - pl.duration(days=2))
    )  # fmt: skip
    sums = rows.select("row").join(pairs.group_by("row").agg(pl.col("amount").sum()), on="row", how="left").sort("row")
    np.testing.assert_allclose(
        found["big_sold_sum_2d"].to_numpy(zero_copy_only=False), sums["amount"].to_numpy(), rtol=1e-12
    )


@pytest.mark.parametrize("rows", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_no_window_over_a_side_table_or_under_a_condition_sees_its_future(folder: Path, rows: int) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    pq.write_table(weather(900), folder / "weather.parquet")
    assert leaking(config_of(folder, *REPORTS, DERIVE), rows) == set()


def test_the_trial_finds_a_condition_that_is_believed_to_be_known_with_the_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(visits_known_late(300), folder / "visits-0.parquet")
    sold = "{of: rows, where: bought, aggregates: [count]}"
    word = f"features.views.big={{entity: [shop], windows: [20d], aggregates: {{sold: {sold}}}}}"
    monkeypatch.setattr(compute, "knowing", lambda *_: [])
    assert "big_sold_count_20d" in leaking(config_of(folder, word), 20)


def test_rows_added_late_to_events_and_to_the_table_end_at_the_full_build(folder: Path, tmp_path: Path) -> None:
    """Some reports are published two months later."""
    table, side = months_of_visits(), weather(900).sort_by("seen")
    months = pa.array(np.where(np.arange(900) % 9 == 0, 60 * 24 * H, 0), pa.duration("us"))
    place = side.schema.get_field_index("published")
    side = side.set_column(place, "published", pc.add(side["published"], months))
    late = pa.array(np.arange(900) % 10 == 3)
    early = pc.invert(late)
    pq.write_table(table.filter(early), folder / "visits-0.parquet")
    pq.write_table(side.filter(early), folder / "weather-0.parquet")
    words = (*REPORTS, DERIVE)
    built(config_of(folder, *words))
    pq.write_table(table.filter(late), folder / "visits-1.parquet")
    built(config_of(folder, *words))
    pq.write_table(side.filter(late), folder / "weather-1.parquet")
    found, fresh = built(config_of(folder, *words)), from_scratch(folder, tmp_path, *words)
    assert everything(found).equals(everything(fresh)) and found.digest == fresh.digest


@pytest.mark.parametrize(
    "change",
    [
        "features.views.reports.aggregates.warm.where='temp > 14'",
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                "~features.views.big.exclude",
                "features.views.reports.by=event",
                "features.views.reports.where='temp > 6'",
                "data.tables.weather.columns.temp.known_at='published + 3h'",
                "features.as_of='at + 1h'",
            )
        ),
    ],
)
def test_another_rule_over_past_rows_is_another_view(folder: Path, tmp_path: Path, change: str) -> None:
    """With a decision after the event, a row would count itself but for `exclude`."""
    pq.write_table(months_of_visits(300), folder / "visits-0.parquet")
    pq.write_table(weather(300), folder / "weather.parquet")
    words = (*REPORTS, "features.as_of='at + 2d'")
    before, after = built(config_of(folder, *words)), built(config_of(folder, *words, change))
    fresh = from_scratch(folder, tmp_path, *words, change)
    assert everything(after).equals(everything(fresh)) and not everything(after).equals(everything(before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("features.views.reports.table=wether", r"reports.table names 'wether'.*weather"),
        (
            "features.views.reports.aggregates={tmp: [mean]}",
            r"'tmp', which is not in data.tables.weather.columns.*temp",
        ),
        ("features.views.reports.on=[temp]", r"matches 'shop' \(string\) with 'temp' of data.tables.weather.columns"),
        ("features.views.reports.where='tmp > 1'", r"reports.where names 'tmp'.*temp"),
        ("features.views.reports.where=''", r"reports.where must be one SQL expression, found ''"),
        (
            "features.views.big.aggregates.sold.where=' '",
            r"big.aggregates.sold.where must be one SQL expression, found ' '",
        ),
        ("features.views.reports.where='temp > 5) OR (temp < 0'", r"reports.where must be one SQL expression"),
        ("features.views.reports.where='avg(temp) > 1'", r"one row at a time, found the aggregate 'avg'"),
        ("features.views.reports.where='published > seen'", r"'published', which must say when"),
        ("features.views.big.exclude={visit: shop}", r"big.exclude matches 'visit' \(int64\) with 'shop'"),
        (
            "features.views.big.aggregates.sold={of: amount, were: bought, aggregates: [sum]}",
            r"unknown.*sold.were.*where",
        ),
        ("features.views.big.kind=expression", r"expression"),
        ("features.views.big.aggregates={amount: [recency_0]}", r"amount: 'recency_0' is no aggregate.*recency_3"),
        ("data.tables.weather.static=true", r"static: true"),
        ("features.views.weather.where='temp > 5'", r"where is for views of kind windows, found kind asof"),
        ("features.views.weather.exclude={visit: seen}", r"exclude is for views of kind windows"),
        ("features.views.big.exclude={amount: amount}", r"big.exclude: 'amount' is known at `paid_at`"),
        ("features.views.big.where='AMOUNT > 1'", r"where names 'AMOUNT'.*amount"),
        (
            "features.views.big={entity: [shop], windows: [2d], aggregates: {amount: [sum], Amount: {of: size, "
            "aggregates: [sum]}}, derive: {twice: 2 * amount_sum_2d}}",
            r"'amount_sum_2d' and 'Amount_sum_2d', which differ in case only.*rename an entry",
        ),
    ],
)
def test_a_view_over_past_rows_that_cannot_be_is_refused(folder: Path, change: str, message: str) -> None:
    pq.write_table(months_of_visits(20), folder / "visits-0.parquet")
    pq.write_table(weather(20), folder / "weather.parquet")
    with pytest.raises(UserError, match=message):
        built(config_of(folder, *REPORTS, "features.views.weather.max_age=null", change))


@pytest.mark.parametrize(
    ("entry", "aggregate", "message"),
    [
        ("amount", "quantile_100", r"amount: 'quantile_100' is no aggregate.*quantile_95"),
        ("amount", "quantile", r"amount: 'quantile' is no aggregate"),
        ("amount", "ewm_mean_0h", r"amount: 'ewm_mean_0h' is no aggregate"),
        ("amount", "max_3", r"amount: 'max_3' is no aggregate"),
        ("rows", "ewm_sum_6h", r"rows must be count or recency"),
    ],
)
def test_an_aggregate_that_cannot_be_is_refused(entry: str, aggregate: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schema.build(ViewConfig, {"entity": ["shop"], "windows": ["2d"], "aggregates": {entry: [aggregate]}})


def test_history_and_latest_give_the_stored_values_and_show_names_them(folder: Path, cli: Callable[..., Any]) -> None:
    """History of the dataset's own rows leaves out their own rows by key; entities without rows have none to leave out."""
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    pq.write_table(weather(900), folder / "weather.parquet")
    words = (*REPORTS, DERIVE, "features.as_of='at + 1d'")
    config = config_of(folder, *words)
    table = built(config)
    rows = table.dataset.read(["visit", "shop", "at"])
    asked = rows.append_column("time", pc.add(rows["at"], pa.scalar(24 * H, pa.duration("us"))))
    views = ["reports", "big"]
    found = engine.features.history(asked, views, config=config, dataset=table.dataset)
    stored = everything(table)
    names = [name for view in views for name in table.views[view].columns]
    assert found.select(names).combine_chunks().equals(stored.select(names))
    without = engine.features.history(asked.drop_columns("visit"), views, config=config, dataset=table.dataset)
    assert not without.select(names).equals(found.select(names))
    at = micros(asked["time"][800].as_py())
    newest = engine.features.latest("big", config, table.dataset, at, {"shop": "shop-1"})
    probe = pa.table({"shop": ["shop-1"], "time": pa.array([at], pa.timestamp("us", "UTC"))})
    alone = engine.features.history(probe, "big", config=config, dataset=table.dataset)
    big = table.views["big"].columns
    assert newest.select(big).to_pylist() == alone.select(big).to_pylist() != [dict.fromkeys(big)]
    for view, made_of in (
        ("big", "visit, amount, paid_at, bought, size"),
        ("reports", "weather.temp, weather.published"),
    ):
        shown = cli("features", "show", view, *overrides(folder, *words), "--config-dir", str(folder / "conf")).out
        columns = table.views[view].columns
        assert made_of in shown
        assert [line.split()[0] for line in shown.splitlines() if line.startswith(f"{view}_")] == list(columns)


# --------------------------------------------------------------------------------------------------------- derived


@settings(max_examples=20)
@given(EVENTS)
def test_a_derived_feature_equals_the_slow_twin(rows: list[Any]) -> None:
    events = events_of(rows)
    past = plain(events)

    def expected(row: dict[str, Any], decision: int) -> dict[str, float]:
        mine = [(e["at"], e["known"], k, e["value"]) for k, e in enumerate(past) if e["who"] == row["who"] is not None]
        sums = [naive.aggregate("sum", naive.counted(mine, decision, WIDTHS[w]), decision, WIDTHS[w]) for w in WIDTHS]
        known = not any(math.isnan(x) or math.isinf(x) for x in sums)
        ratio = sums[0] / sums[1] if known and sums[1] else math.nan
        return {
            "ratio": ratio if math.isfinite(ratio) else math.nan,
            "change": sums[0] - sums[1] if known else math.nan,
        }

    view = {"entity": ["who"], "windows": list(WIDTHS), "aggregates": {"value": ["sum"]}}
    check(
        events,
        {**view, "derive": {"ratio": "value_sum_2h / value_sum_1d", "change": "value_sum_2h - value_sum_1d"}},
        expected,
    )


def test_a_derived_feature_is_computed_with_what_it_needs_and_appended_as_a_full_build(
    folder: Path, tmp_path: Path
) -> None:
    table = months_of_visits()
    pq.write_table(weather(900), folder / "weather.parquet")
    pq.write_table(table.slice(0, 700), folder / "visits-0.parquet")
    built(config_of(folder, *REPORTS))
    with features_computed() as asked:
        found = everything(built(config_of(folder, *REPORTS, DERIVE)))
    assert asked == {"big_amount_sum_2d", "big_sold_sum_2d", "big_sold_count_2d", "big_share", "big_sales"}
    share = pc.divide(found["big_sold_sum_2d"], found["big_amount_sum_2d"])
    assert found["big_share"].equals(pc.if_else(pc.is_finite(share), share, None)) and share.null_count < 600
    assert found["big_sales"].type == pa.int64()
    pq.write_table(table.slice(700), folder / "visits-1.parquet")
    grown, fresh = built(config_of(folder, *REPORTS, DERIVE)), from_scratch(folder, tmp_path, *REPORTS, DERIVE)
    assert everything(grown).equals(everything(fresh)) and grown.digest == fresh.digest
    whole = "features.views.big.derive={share: {sql: 'round(sold_sum_2d / (sold_count_2d - 1))', type: int64}}"
    found = everything(built(config_of(folder, *REPORTS, whole)))
    mean = pc.divide(found["big_sold_sum_2d"], pc.subtract(found["big_sold_count_2d"], 1))
    finite = pc.fill_null(pc.is_finite(mean), False)
    assert found["big_share"].type == pa.int64() and found["big_share"].is_valid().equals(finite)
    assert pc.any(pc.is_inf(mean)).as_py() and pc.any(finite).as_py()
    other = DERIVE.replace("sold_sum_2d /", "sold_count_2d /")
    assert not everything(built(config_of(folder, *REPORTS, other))).equals(everything(grown))


@pytest.mark.parametrize(
    "sql",
    [
        "sold_sum_3d / amount_sum_2d",
        *(pytest.param(sql, marks=pytest.mark.slow) for sql in ("1", "sum(sold_sum_2d)", "big_sold_sum_2d")),
    ],
)
def test_a_derived_feature_of_what_is_not_there_is_refused(folder: Path, sql: str) -> None:
    pq.write_table(months_of_visits(20), folder / "visits-0.parquet")
    pq.write_table(weather(20), folder / "weather.parquet")
    with pytest.raises(UserError, match=r"big\.derive\.share must"):
        built(config_of(folder, *REPORTS, f"features.views.big.derive={{share: '{sql}'}}"))


# ------------------------------------------------------------------------------------------- keys, late decisions, reuse


@settings(max_examples=20)
@given(EVENTS)
def test_a_key_that_is_known_later_than_its_row_counts_from_then_on(rows: list[Any]) -> None:
    """Who carries a parcel is known when it arrives: until then it counts for nobody."""
    events = events_of(rows)
    events = events.append_column("carrier", events["who"])
    columns = {**DATA["columns"], "carrier": {"type": "string", "role": "ignore", "known_at": "known"}}
    for by in ("event", "known"):
        view = {
            "entity": ["who"],
            "on": ["carrier"],
            "by": by,
            "windows": ["1d"],
            "aggregates": {"rows": ["count"], "plan": ["sum"]},
        }
        found = raw_features(*configs_of({**DATA, "columns": columns}, view), events, events, {}).to_pylist()
        past = plain(events)
        for row, here in zip(past, found, strict=True):
            mine = [(p["at"], p["known"], k, p) for k, p in enumerate(past) if p["who"] == row["who"] is not None]
            whole = naive.counted([(*line[:3], 0.0) for line in mine], row["at"] - LEAD, 24 * H, by)
            sums = naive.counted([(*line[:3], line[3]["plan"]) for line in mine], row["at"] - LEAD, 24 * H, by)
            assert here["v_count_1d"] == len(whole)
            assert same(here["v_plan_sum_1d"], naive.aggregate("sum", sums, row["at"] - LEAD, 24 * H))


def test_a_key_of_past_events_must_say_when_it_becomes_known(folder: Path) -> None:
    words = ("+data.columns.carrier={type: string, role: ignore}", "features.views.shop.on=[carrier]")
    with pytest.raises(UserError, match=r"shop.on: column 'carrier' must say when it becomes known"):
        config_of(folder, *words)


def test_a_decision_long_after_the_event_counts_each_row_once(folder: Path) -> None:
    """Rows that became known within a window are read from row groups before it; the rows to describe lie there too."""
    pq.write_table(visits_known_late(), folder / "visits-0.parquet")
    config = config_of(folder, *BY_KNOWN[:1], "features.views.shop.windows=[2d]", "features.as_of='at + 15d'")
    found, rows = everything(built(config)), plain(dataset_of(config).read(["shop", "at", "paid_at", "amount"]))
    counts = []
    for row, mean in zip(rows, found["shop_amount_mean_2d"].to_pylist(), strict=True):
        decision = row["at"] + 15 * 24 * H
        lines = [
            (p["at"], p["paid_at"], k, p["amount"]) for k, p in enumerate(rows) if p["shop"] == row["shop"] is not None
        ]
        counted = naive.counted(lines, decision, 2 * 24 * H, "known")
        assert same(mean, naive.aggregate("mean", counted, decision, 2 * 24 * H))
        counts.append(len(counted))
    assert sum(count > 0 for count in counts) > 50


def test_an_append_computes_the_new_days_of_windows_over_a_side_table_by_known_time(
    folder: Path, tmp_path: Path
) -> None:
    table = months_of_visits()
    pq.write_table(weather(900), folder / "weather.parquet")
    pq.write_table(table.slice(0, 850), folder / "visits-0.parquet")
    built(config_of(folder, *REPORTS))
    pq.write_table(table.slice(850), folder / "visits-1.parquet")
    found, fresh = built(config_of(folder, *REPORTS)), from_scratch(folder, tmp_path, *REPORTS)
    assert everything(found).equals(everything(fresh))
    assert 0 < days_of(found, "reports") <= 10 < days_of(fresh, "reports")


def test_a_row_of_a_table_is_looked_up_once_its_key_is_known(folder: Path) -> None:
    """The place of a report is known two days after it, and another rule for that is another view."""
    pq.write_table(months_of_visits(400), folder / "visits-0.parquet")
    pq.write_table(weather(900), folder / "weather.parquet")
    words = (*TABLE, "features.views.weather.max_age=9d")
    late = "data.tables.weather.columns.shop={type: string, known_at: 'seen + %s'}"
    for delay in (2, 4):
        table = built(config_of(folder, *words, late % f"{delay}d"))
        found, rows = everything(table)["weather_temp"].to_pylist(), plain(table.dataset.read(["shop", "at"]))
        reports = plain(table.dataset.table("weather"))
        values = []
        for row in rows:
            decision = row["at"] - LEAD
            known = [
                (p["seen"], max(p["published"], p["seen"] + delay * 24 * H), k)
                for k, p in enumerate(reports)
                if p["shop"] == row["shop"] is not None and p["published"] is not None
            ]
            known = [line for line in known if line[1] < decision and line[0] >= decision - 9 * 24 * H]
            values.append(reports[max(known)[2]]["temp"] if known else None)
        assert found == values and sum(value is not None for value in values) > 50
