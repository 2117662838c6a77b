"""The taxi months: what changes from file to file, and how many rows each rule concerns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engine.config.compose import compose
from engine.data.dataset import Dataset
from engine.data.make_dataset import ensure_dataset
from engine.runtime import storage
from tests.data.helpers import run_of


@pytest.fixture(scope="module")
def months() -> Path:
    import os

    folder = (
        Path(os.environ.get("ENGINE_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "taxi"
    )
    if not folder.is_dir():
        pytest.skip("the taxi months are not here")
    return folder


def taxi(months: Path, folder: Path, *more: str, name: str = "taxi") -> Dataset:
    given = compose(
        [
            f"+data={name}",
            f"data.path={months}",
            f"paths.store={folder / 'store'}",
            f"paths.runs={folder / 'runs'}",
            *more,
        ]
    ).config
    return ensure_dataset(given, run_of(given))


@pytest.fixture(scope="module")
def trips(months: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return taxi(months, tmp_path_factory.mktemp("taxi"))


def test_every_row_of_the_36_months_is_accounted_for(trips: Dataset) -> None:
    accounts = trips.manifest["accounting"]
    assert (len(accounts["files"]), accounts["rows_in"], accounts["refused_files"]) == (36, 360_000, 0)
    assert all(item["rows"] == item["kept"] == 10_000 for item in accounts["files"])
    assert accounts["results"]["events"]["rows"] == 360_000
    assert trips.rows == 360_000 - 10 - 136


def test_each_rule_concerns_the_rows_that_it_should(trips: Dataset) -> None:
    found = {
        (item["column"], item["policy"]): item["count"]
        for item in trips.manifest["accounting"]["results"]["events"]["violations"]
    }
    assert found == {
        ("within_month_of_file", "quarantine"): 10,
        ("dropoff_after_pickup", "quarantine"): 136,
        ("duration", "null"): 738,
        ("log_duration", "null"): 738,
        ("fare_amount", "null"): 833,
        ("trip_distance", "null"): 14,
    }
    rows = storage.read_parquet(trips.directory / "quarantine" / "quarantine.parquet")
    assert pc.sum(pc.equal(rows.column("column"), "within_month_of_file")).as_py() == 10
    assert pc.all(pc.is_valid(rows.column("row_id"))).as_py()


def test_columns_keep_their_type_through_three_years(trips: Dataset) -> None:
    table = trips.read(["pickup", "congestion_surcharge", "passenger_count", "vendor_id", "total_amount"])
    year = pc.year(pc.local_timestamp(table.column("pickup").cast(pa.timestamp("us", "America/New_York"))))
    in_2018 = table.filter(pc.equal(year, 2018))
    assert in_2018.num_rows > 119_000 and in_2018.column("congestion_surcharge").null_count == in_2018.num_rows
    assert table.schema.field("congestion_surcharge").type == pa.float64()
    assert (
        table.schema.field("passenger_count").type == pa.int64() and table.column("passenger_count").null_count == 8_111
    )
    assert set(pc.unique(table.column("vendor_id")).to_pylist()) == {0, 1, 2, 4}


def test_crlf_months_are_read_like_the_others(trips: Dataset, months: Path) -> None:
    assert b"\r\n" in (months / "yellow_tripdata_sample_2019-01.csv").read_bytes()
    table = trips.read(["file_month", "congestion_surcharge"])
    january = table.filter(pc.equal(table.column("file_month"), "2019-01"))
    assert january.num_rows >= 9_990 and january.column("congestion_surcharge").null_count < january.num_rows


def test_another_question_over_the_same_trips_has_another_recipe_and_equal_values(
    trips: Dataset, months: Path, tmp_path: Path
) -> None:
    card = taxi(months, tmp_path, name="taxi_card")
    assert card.digest == trips.digest and card.recipe != trips.recipe
    roles = {item["name"]: item["role"] for item in card.manifest["columns"]}
    assert (roles["card"], roles["duration"]) == ("target", "numeric")
