"""A dataset in the store: Parquet parts in dataset order, side tables, and a manifest with the digests of their values."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from engine.config.nested import Tree
from engine.data.arrow_types import schema_of
from engine.data.columns import Notes
from engine.data.quarantine import TallyRecord
from engine.errors import UserError, nearest
from engine.runtime import digest, records, seal, storage
from engine.runtime.seal import Seal

FORMAT = 1
PART_ROWS = 262_144
ROW_GROUP = 65_536
MANIFEST = "manifest.json"
LATEST = "latest.json"
REMEDY = "Run `ingest` again"
TypeText = Annotated[str, records.Matching(r"[^\x00-\x1f]{1,200}", "the name of a type")]


class ColumnEntry(TypedDict):
    """A column of the event table, or of a side table (without a digest)."""

    name: str
    type: TypeText
    role: str
    known_at: str | None
    digest: NotRequired[records.Digest]


class PartEntry(TypedDict):
    """A file of the event table: rows [start, start + rows), instants of its first and last row, digests of its columns."""

    file: str
    start: records.Count
    rows: records.Count
    digest: records.Digest
    first_time: records.Instant
    last_time: records.Instant
    columns: dict[str, records.Digest]


class TableEntry(TypedDict):
    """A side table."""

    file: str
    rows: records.Count
    digest: records.Digest
    static: bool
    columns: list[ColumnEntry]


class FileReport(TallyRecord, Notes):
    """The report of a source file: its rows, and why it was refused."""

    file: str
    source: str
    digest: str
    refused: str | None


class Accounting(TypedDict):
    """in = kept + quarantined for every file and step; refused files are listed too, without rows."""

    rows_in: records.Count
    kept: records.Count
    quarantined: records.Count
    refused_files: records.Count
    files: list[FileReport]
    results: dict[str, TallyRecord]


class DatasetRecord(TypedDict):
    """manifest.json of a dataset; `spec` is the data config as composed."""

    format: Annotated[int, records.Format(FORMAT, FORMAT, REMEDY)]
    name: str
    recipe: records.Digest
    digest: records.Digest
    rows: records.Count
    event_time: str
    ids: list[str]
    time_zone: str
    columns: list[ColumnEntry]
    parts: list[PartEntry]
    tables: dict[str, TableEntry]
    accounting: Accounting
    null_counts: dict[str, records.Count]
    spec: Tree


class Latest(TypedDict):
    """latest.json: the dataset that was ingested last under a name."""

    recipe: str
    entry: str
    digest: records.Digest


@dataclasses.dataclass(frozen=True)
class Part:
    """One Parquet file of a dataset."""

    file: str
    start: int
    rows: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An ingested dataset. Rows are in order of (event time, id columns)."""

    directory: Path
    manifest: DatasetRecord
    seal: Seal

    @property
    def name(self) -> str:
        """Name in the store."""
        return str(self.manifest["name"])

    @property
    def rows(self) -> int:
        """Number of events."""
        return int(self.manifest["rows"])

    @property
    def recipe(self) -> str:
        """Digest of the files and settings from which the dataset was made."""
        return str(self.manifest["recipe"])

    @property
    def digest(self) -> str:
        """Digest of the values of the event table and the side tables."""
        return str(self.manifest["digest"])

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Columns of the event table."""
        return schema_of({name: item["type"] for name, item in self._columns.items()})

    @property
    def event_time(self) -> str:
        """The event time column."""
        return str(self.manifest["event_time"])

    @property
    def parts(self) -> list[Part]:
        """The files of the event table in dataset order."""
        return [Part(item["file"], item["start"], item["rows"], item["digest"]) for item in self.manifest["parts"]]

    def column_digest(self, name: str) -> str:
        """Digest of one column's values. Raises UserError for an unknown column."""
        return str(self._column(name)["digest"])

    @functools.cached_property
    def _columns(self) -> dict[str, ColumnEntry]:
        return {item["name"]: item for item in self.manifest["columns"]}

    def _column(self, name: str) -> ColumnEntry:
        if name not in self._columns:
            raise UserError(f"{name!r} is not a column of dataset {self.name}.{nearest(name, self._columns)}")
        return self._columns[name]

    # ---------------------------------------------------------------------------------------------- reading

    def path(self, file: str) -> Path:
        """The path of a file of the dataset, after a check that it is what ingest wrote. Raises records.Damaged."""
        return self.seal.check(self.directory, file, REMEDY)

    def read(self, columns: list[str] | None = None, rows: tuple[int, int] | None = None) -> pa.Table:
        """Rows [start, stop) of the named columns, in dataset order; only the parts and columns needed are read."""
        batches = list(self.batches(columns, rows, PART_ROWS))
        return pa.Table.from_batches(batches, self._schema(columns))

    def take(self, columns: list[str], rows: np.ndarray) -> pa.Table:
        """The rows of these numbers, int64[n] ascending, of the named columns."""
        if not len(rows):
            return self.read(columns, (0, 0))
        first = int(rows[0])
        return taken(self.read(columns, (first, int(rows[-1]) + 1)), rows - first)

    def batches(
        self, columns: list[str] | None = None, rows: tuple[int, int] | None = None, batch_rows: int = 131_072
    ) -> Iterator[pa.RecordBatch]:
        """The same as record batches of at most `batch_rows` rows."""
        schema = self._schema(columns)
        start, stop = rows if rows is not None else (0, self.rows)
        if not 0 <= start <= stop <= self.rows:
            raise UserError(f"rows must be within [0, {self.rows}], found [{start}, {stop})")
        for part in self.parts:
            low, high = max(start, part.start), min(stop, part.start + part.rows)
            if low < high:
                yield from self._part_batches(part, schema, low - part.start, high - part.start, batch_rows)

    def _schema(self, columns: list[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        for name in columns:
            self._column(name)
        return pa.schema([self.schema.field(name) for name in columns])

    def _part_batches(
        self, part: Part, schema: pa.Schema, low: int, high: int, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        if not schema.names:
            for at in range(low, high, batch_rows):
                count = min(batch_rows, high - at)
                yield pa.RecordBatch.from_struct_array(pa.array([{}] * count, pa.struct([])))
            return
        path = self.path(part.file)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                stops = np.cumsum([file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)])
                first, last = (int(place) for place in np.searchsorted(stops, [low, high - 1], "right"))
                table = file.read_row_groups(list(range(first, last + 1)), columns=schema.names, use_threads=True)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}). Run `ingest` again") from None
        table = table.select(schema.names).cast(schema).slice(low - (int(stops[first - 1]) if first else 0), high - low)
        yield from table.combine_chunks().to_batches(max_chunksize=batch_rows)

    def row_range(self, start_us: int, stop_us: int) -> tuple[int, int]:
        """Rows with event time in [start_us, stop_us), microseconds UTC: a contiguous range, since rows are in time order."""
        return self._first_at(start_us), self._first_at(stop_us)

    def groups_reaching(self, column: str, instant: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows before row `stop` outside which no value of a time column is at or after `instant`: row groups, by
        their statistics.
        """
        for part in self.parts:
            if part.start >= stop:
                return
            with pq.ParquetFile(self.path(part.file)) as file:
                metadata, at = file.metadata, part.start
            place = metadata.schema.names.index(column)
            for group in range(metadata.num_row_groups):
                low, at = at, at + metadata.row_group(group).num_rows
                facts = metadata.row_group(group).column(place).statistics
                if low < stop and not _all_before(facts, instant):
                    yield low, min(at, stop)

    def _first_at(self, instant: int) -> int:
        """Number of rows whose event time is before `instant`."""
        parts = self.manifest["parts"]
        place = bisect.bisect_left([item["last_time"] for item in parts], instant)
        if place == len(parts):
            return self.rows
        part = parts[place]
        if instant <= part["first_time"]:
            return int(part["start"])
        times = self.read([self.event_time], (part["start"], part["start"] + part["rows"])).column(0)
        return int(part["start"]) + int(np.searchsorted(np.asarray(times.cast(pa.int64())), instant, "left"))

    # ---------------------------------------------------------------------------------------------- side tables

    @property
    def tables(self) -> list[str]:
        """Names of the side tables."""
        return list(self.manifest["tables"])

    def table(self, name: str) -> pa.Table:
        """A side table. Raises UserError for an unknown one."""
        entry = self._table(name)
        schema = schema_of({item["name"]: item["type"] for item in entry["columns"]})
        path = self.path(entry["file"])
        try:
            return storage.read_parquet(path).select(schema.names).cast(schema)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}). Run `ingest` again") from None

    def table_digest(self, name: str) -> str:
        """Digest of a side table's values."""
        return str(self._table(name)["digest"])

    def _table(self, name: str) -> TableEntry:
        if name not in self.manifest["tables"]:
            raise UserError(f"{name!r} is not a table of dataset {self.name}.{nearest(name, self.manifest['tables'])}")
        return self.manifest["tables"][name]


def taken(table: pa.Table, places: np.ndarray) -> pa.Table:
    """The rows at places int64[n], each different and rising."""
    return table if len(places) == table.num_rows else table.take(pa.array(places))


def _all_before(facts: Any, instant: int) -> bool:
    """Whether the statistics of a row group say that each value of a time column is before an instant, or null."""
    if facts is None or not facts.has_min_max:
        return bool(facts is not None and facts.has_null_count and facts.num_values == 0)
    return bool(facts.max_raw < instant)


def open_dataset(directory: Path | str) -> Dataset:
    """The dataset in a folder of the store. Raises UserError if there is none, or if it has another format."""
    directory = Path(directory)
    found = seal.read(directory)
    manifest = records.read(found.check(directory, MANIFEST, REMEDY), DatasetRecord)
    return Dataset(directory, manifest, found)


def newest_dataset(folder: Path) -> Dataset | None:
    """The dataset of a name's folder that was ingested last; None without any. Raises UserError for a damaged one."""
    path = folder / LATEST
    return open_dataset(storage.inside(folder, seal.read_checked(path, Latest)["entry"])) if path.exists() else None


def stored_datasets(folder: Path) -> list[Dataset]:
    """The datasets of one name, by folder."""
    found = sorted(folder.glob(f"*/{MANIFEST}"))
    return [open_dataset(path.parent) for path in found if not path.parent.name.startswith(".")]


def find_dataset(folder: Path, wanted: str, where: str) -> Dataset:
    """The one dataset of a folder whose recipe or digest begins with `wanted`. Raises UserError naming the key `where`."""
    found = stored_datasets(folder)
    matching = [item for item in found if item.recipe.startswith(wanted) or item.digest.startswith(wanted)]
    if len({item.digest for item in matching}) != 1:  # recipes with the same content are interchangeable
        known = ", ".join(item.digest[:16] for item in found) or "none"
        raise UserError(
            f"{where} must name one dataset in {folder} by recipe or digest, "
            f"found {len(matching)} for {wanted!r}. Known: {known}"
        )
    return matching[0]


def row_ids(table: pa.Table, id_columns: list[str]) -> pa.Array:
    r"""One text per row made of the id columns: joined by |, with \\ before a | or \\ of a value; instants as ISO UTC.

    Table[n] -> string[n]; a null is written \\N, so that no two different ids give one text.
    """
    parts = [_id_text(table.column(name)) for name in id_columns]
    joined = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, "|")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _id_text(column: pa.ChunkedArray) -> Any:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_timestamp(column.type):
        text = _iso(column)
    elif pa.types.is_string(column.type):
        text = pc.replace_substring(pc.replace_substring(column, "\\", "\\\\"), "|", "\\|")
    else:
        text = column.cast(pa.string())
    return pc.fill_null(text, "\\N")


def _iso(column: pa.ChunkedArray) -> Any:
    # Value by value, so that the text of a row does not depend on the rows beside it.
    seconds = pc.floor_temporal(column, unit="second").cast(pa.timestamp("s", tz="UTC"))
    text = seconds.cast(pa.string())
    fractional = pc.not_equal(seconds.cast(column.type), column)
    if pc.any(fractional).as_py():
        text = pc.if_else(fractional, column.cast(pa.timestamp("us", tz="UTC")).cast(pa.string()), text)
    return pc.replace_substring(text, " ", "T")


def digest_of(rows: int, columns: list[tuple[str, str]], tables: dict[str, str]) -> str:
    """Content digest of a dataset: rows, (column, digest) in order, and the digests of its side tables."""
    return digest.of_json([FORMAT, rows, columns, sorted(tables.items())])
