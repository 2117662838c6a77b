"""Windows views against a twin that reads their rules aloud: by known time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.features import ViewConfig
from engine.features.compute import raw_features
from engine.features.past import past_events
from tests import naive
from tests.features.test_compute import H, configs, instant_column, micros
from tests.features.test_kinds import dataset_of, leaking
from tests.features.test_store import built, config_of, everything, from_scratch, months_of_visits
from tests.tiny import write_tiny

LEAD = H
WIDTHS = {"2h": 2 * H, "1d": 24 * H}
NAMES = ["count", "sum", "mean", "std", "min", "max", "first", "last", "recency", "distinct"]
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
            found |= {f"value_{name}_{window}": naive.aggregate(name, counted, decision, width) for name in NAMES}
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


def test_no_window_by_known_time_sees_its_future(folder: Path) -> None:
    pq.write_table(visits_known_late(), folder / "visits-0.parquet")
    config = config_of(folder, *BY_KNOWN)
    assert leaking(config, 200) == set()
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
