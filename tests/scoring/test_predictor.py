"""One predictor for a row, for many, by name, whatever stands beside; and how long it takes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import engine
from engine.errors import UserError
from engine.scoring.predictor import Predictor, load
from tests.scoring.conftest import ROWS, Shop
from tests.tiny import visits


@pytest.fixture(scope="module")
def predictor(shop: Shop) -> Predictor:
    return load(shop.model, threads=1)


@pytest.fixture(scope="module")
def events() -> pa.Table:
    return visits(ROWS).sort_by("at").slice(0, 500)


def test_columns_are_taken_by_name_an_extra_one_is_ignored_a_missing_one_named(
    predictor: Predictor, events: pa.Table
) -> None:
    expected = predictor.predict(events)
    reordered = events.select(events.column_names[::-1]).append_column("extra", pa.array(range(500)))
    assert predictor.predict(reordered).equals(expected)
    with pytest.raises(UserError, match="'size'"):
        predictor.predict(events.drop_columns(["size"]))


def test_scores_come_in_the_kind_of_table_that_came_in(predictor: Predictor, events: pa.Table) -> None:
    expected = predictor.predict(events)
    frame = events.to_pandas().set_axis(np.arange(500) * 2)
    found = predictor.predict(frame, history=pl.from_arrow(events))
    pd.testing.assert_frame_equal(found, expected.to_pandas().set_axis(frame.index))
    assert predictor.predict(pl.from_arrow(events)).equals(pl.from_arrow(expected))


def test_a_predictor_and_a_run_are_shown_in_a_line(shop: Shop, predictor: Predictor) -> None:
    shown = repr(predictor)
    assert (
        shown.startswith("<Predictor of 'bought' (binary) from ")
        and predictor.digest[:12] in shown
        and len(shown) < 300
    )


def test_scores_come_in_the_order_of_the_rows_with_their_ids(predictor: Predictor, events: pa.Table) -> None:
    order = np.random.default_rng(3).permutation(events.num_rows)
    there, here = predictor.predict(events), predictor.predict(events.take(pa.array(order)))
    assert here.equals(there.take(pa.array(order)))


def test_a_rows_bits_do_not_depend_on_its_neighbours_or_threads(
    shop: Shop, predictor: Predictor, events: pa.Table
) -> None:
    whole = predictor.predict(events)["score"].to_pylist()
    for rows in (1, 7, 333):
        part = predictor.predict(events.slice(0, rows), history=events)
        assert part["score"].to_pylist() == whole[:rows]
    assert load(shop.model, threads=2).predict(events)["score"].to_pylist() == whole


def test_unseen_null_and_known_categories_have_codes_of_their_own(predictor: Predictor) -> None:
    codes = predictor.bundle.encoder.categorical_[0].codes(pa.array(["shop-1", "shop-99", None, "shop-2"]))
    assert codes[1:3].tolist() == [1, 0] and codes[0] >= 3 and codes[3] >= 3 and codes[0] != codes[3]


def in_place_of(events: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, values in columns.items():
        events = events.set_column(events.column_names.index(name), name, values)
    return events


def with_data(predictor: Predictor, **changes: Any) -> Predictor:
    data = dataclasses.replace(predictor.bundle.data, **changes)
    return dataclasses.replace(predictor, bundle=dataclasses.replace(predictor.bundle, data=data))


def test_columns_of_other_types_are_read_as_ingest_reads_them(predictor: Predictor, events: pa.Table) -> None:
    texts = {name: events[name].cast(pa.large_string()) for name in ("visit", "bought", "size")}
    other = in_place_of(events, **texts, shop=events["shop"].dictionary_encode(), at=events["at"].cast("timestamp[ms]"))
    assert predictor.predict(other).equals(predictor.predict(events))
    assert predictor.predict(events, history=other).equals(predictor.predict(events))


def test_a_time_without_an_offset_is_local_to_the_datas_zone(predictor: Predictor, events: pa.Table) -> None:
    abroad = with_data(predictor, time_zone="America/New_York")
    local = pc.local_timestamp(events["at"].cast(pa.timestamp("us", "America/New_York")))
    found = abroad.predict(in_place_of(events, at=local))
    assert found.equals(abroad.predict(events))
    assert not found.equals(predictor.predict(in_place_of(events, at=local))), "the hour of the day decides"


def test_ids_of_large_text_are_the_ids_that_scoring_writes(predictor: Predictor, events: pa.Table) -> None:
    columns = {**predictor.bundle.data.columns}
    columns["visit"] = dataclasses.replace(columns["visit"], type="string")
    some = in_place_of(events.slice(0, 2), visit=pa.array(["a|b", "c"], pa.large_string()))
    assert with_data(predictor, columns=columns).predict(some)["row_id"].to_pylist() == ["a\\|b", "c"]


def test_a_value_of_another_kind_is_an_error_that_names_column_row_and_value(
    predictor: Predictor, events: pa.Table
) -> None:
    texts = events["size"].cast(pa.string()).to_pylist()
    texts[3] = "large"
    with pytest.raises(UserError, match=r"events: column 'size' must be float64, found 'large' in row 3"):
        predictor.predict(in_place_of(events, size=pa.array(texts)))
    with pytest.raises(UserError, match=r"history: column 'shop' must be string, found int64"):
        predictor.predict(events, history=in_place_of(events, shop=pa.array(range(events.num_rows))))
    columns = {**predictor.bundle.data.columns}
    columns["size"] = dataclasses.replace(columns["size"], sensitive=True)
    with pytest.raises(UserError, match="found a sensitive value in row 3"):
        with_data(predictor, columns=columns).predict(in_place_of(events, size=pa.array(texts)))


def test_no_rows_give_no_scores(predictor: Predictor, events: pa.Table) -> None:
    assert predictor.predict(events.slice(0, 0)).num_rows == 0


def latencies(shop: Shop, rows: int, calls: int) -> tuple[float, float]:
    """p50 and p99 in milliseconds of predict on so many rows."""
    predictor = engine.load(shop.model)
    events = pa.concat_tables([visits(ROWS)] * 2).slice(0, rows)
    times = []
    for _ in range(calls + 3):
        began = time.perf_counter()
        predictor.predict(events)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.percentile(times[3:], 50)), float(np.percentile(times[3:], 99))


def test_latency_is_measured_and_printed(shop: Shop, capfd: pytest.CaptureFixture[str]) -> None:
    for rows, calls in ((1, 50), (100, 50), (10_000, 10)):
        p50, p99 = latencies(shop, rows, calls)
        with capfd.disabled():
            print(f"\npredict({rows:,} rows): p50 {p50:.2f} ms, p99 {p99:.2f} ms", end="")  # noqa: T201
        assert p50 < 2000
