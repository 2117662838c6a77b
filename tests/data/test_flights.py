"""The flights dataset: what one row is, when it is known, and the counts that the year 2013 has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engine.config import units
from engine.config.compose import compose
from engine.config.tree import Config
from engine.data.dataset import Dataset, open_dataset, row_ids
from engine.data.make_dataset import ensure_dataset
from engine.data.show import show
from engine.runtime.run import Run

MINUTE = 60_000_000


def flights_config(folder: Path, *more: str) -> tuple[Config, dict]:
    found = compose(
        ["+data=flights", "name=flights", f"paths.store={folder / 'store'}", f"paths.runs={folder / 'runs'}", *more]
    )
    return found.config, found.saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flights")


@pytest.fixture(scope="module")
def flights(folder: Path) -> Dataset:
    config, saved = flights_config(folder, "resources.threads=2")
    return ensure_dataset(config, Run.create("ingest", config, saved))


@pytest.fixture(scope="module")
def table(flights: Dataset) -> pa.Table:
    return flights.read()


def micros(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.int64()).fill_null(0).combine_chunks())


def test_every_scheduled_flight_is_a_row_with_an_id_of_its_own(flights: Dataset, table: pa.Table) -> None:
    assert flights.rows == table.num_rows == 336_776
    ids = row_ids(table, flights.manifest["ids"])
    assert len(pc.unique(ids)) == 336_776
    assert ids[0].as_py() == "2013-01-01T10:00:00Z|UA|1545"


def test_rows_are_in_order_of_event_time_and_ids(table: pa.Table) -> None:
    order = pc.sort_indices(
        table, sort_keys=[(name, "ascending") for name in ("scheduled", "time_hour", "carrier", "flight")]
    )
    assert np.array_equal(np.asarray(order), np.arange(table.num_rows))


@pytest.mark.parametrize(("zone", "rows"), [("America/New_York", 28_243), ("UTC", 28_231)])
def test_june_depends_on_the_zone(flights: Dataset, table: pa.Table, zone: str, rows: int) -> None:
    start, stop = units.between(["2013-06-01", "2013-07-01"], zone)
    first, last = flights.row_range(start, stop)
    assert last - first == rows
    times = micros(table.column("scheduled"))
    assert last - first == int(((times >= start) & (times < stop)).sum())
    assert flights.read(["flight"], (first, last)).num_rows == rows


def test_arrivals_are_instants_that_fit_their_air_time_and_their_delay(table: pa.Table) -> None:
    arrived = np.asarray(pc.is_valid(table.column("arrived")).combine_chunks())
    assert arrived.sum() == 327_346
    beyond = (micros(table.column("arrived")) - micros(table.column("departed"))) / MINUTE - micros(
        table.column("air_time")
    )
    assert (beyond[arrived].min(), beyond[arrived].max()) == (5, 235)
    late = (micros(table.column("arrived")) - micros(table.column("scheduled_arrival"))) / MINUTE - micros(
        table.column("arr_delay")
    )
    assert not late[arrived].any()


def test_labels_are_missing_where_no_arrival_is(table: pa.Table) -> None:
    assert table.column("late").null_count == 9_430
    right = pc.greater(table.column("arr_delay"), 15)
    assert table.column("late").equals(right)
    cancelled = pc.is_null(table.column("departed"))
    assert pc.sum(cancelled).as_py() == 8_255
    assert not pc.any(pc.and_(pc.is_null(table.column("tailnum")), pc.invert(cancelled))).as_py()


def test_the_tables_beside_the_flights(flights: Dataset) -> None:
    assert {name: flights.table(name).num_rows for name in flights.tables} == {
        "weather": 26_115,
        "airports": 1_458,
        "airlines": 16,
        "planes": 3_322,
    }
    weather = flights.table("weather")
    assert weather.schema.field("observed").type == pa.timestamp("us", tz="UTC")
    assert weather.column("observed").to_pylist() == sorted(weather.column("observed").to_pylist())


@pytest.mark.parametrize("threads", [1, 4])
def test_the_digest_does_not_depend_on_threads(flights: Dataset, tmp_path: Path, threads: int) -> None:
    config, saved = flights_config(tmp_path, f"resources.threads={threads}")
    again = ensure_dataset(config, Run.create("ingest", config, saved))
    assert (again.digest, again.recipe) == (flights.digest, flights.recipe)


def test_a_run_records_inputs_and_content(folder: Path, flights: Dataset) -> None:
    config, saved = flights_config(folder)
    run = Run.create("features", config, saved)
    assert ensure_dataset(config, run).directory == flights.directory
    assert list(run.record["chain"]) == ["inputs", "dataset"] and run.record["chain"]["dataset"] == flights.digest
    assert len(run.record["inputs"]) == 5


def test_columns_and_row_ranges_are_read_alone(flights: Dataset, table: pa.Table) -> None:
    some = flights.read(["carrier", "late"], (262_100, 262_200))
    assert some.equals(table.select(["carrier", "late"]).slice(262_100, 100).cast(some.schema))
    batches = list(flights.batches(["flight"], (10, 200_010), 70_000))
    assert [batch.num_rows for batch in batches] == [70_000, 70_000, 60_000] or sum(
        b.num_rows for b in batches
    ) == 200_000
    assert max(batch.num_rows for batch in batches) <= 70_000


def test_a_page_for_a_person(folder: Path, flights: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = flights_config(folder)
    assert show(config, ["flights"], {}) == 0
    page = capsys.readouterr().out
    for part in ("336,776 rows", flights.digest, "late", "2.80%", "weather: 26,115 rows"):
        assert part in page


def test_a_damaged_dataset_says_so(flights: Dataset, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(flights.directory, copy)
    (copy / "part-00001.parquet").unlink()
    from engine.errors import UserError

    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged \(it must exist"):
        open_dataset(copy).read(["flight"])
