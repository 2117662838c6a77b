"""Staging: reads one source file into checked, typed rows, in memory or as an Arrow file that later ingests reuse.

A staged file is committed by its `.json`, written last; after a kill an ingest continues with the files without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from engine.config import schema as config_schema
from engine.config.sections.data import FORMATS, DataConfig, SourceConfig
from engine.data import column_checks, failures, order, rules
from engine.data.arrow_types import schema_of
from engine.data.bounds import USUAL, Bounds
from engine.data.columns import FILE, Chunk, Finding, MissingColumnError, Notes
from engine.data.dataset import FileReport
from engine.data.files import SourceFile, Torn, event_source, skip_advice
from engine.data.quarantine import NO_RECORDS, Place, PolicyError, Tally, apply, record_lost_rows
from engine.data.readers import advice, arrow_files, lake_tables
from engine.data.readers.formats import READERS
from engine.errors import UserError
from engine.runtime import digest, records, seal, storage
from engine.runtime.on_ray import pool

FORMAT = 6


@dataclasses.dataclass
class Staged:
    """The kept rows of one file, its notes, and the accounting of its rows."""

    file: SourceFile
    tally: Tally
    notes: Notes
    refused: str | None = None
    tables: list[pa.Table] = dataclasses.field(default_factory=list)
    path: Path | None = None
    reused: bool = False
    bytes: int = 0  # of the kept rows in memory

    def read(self) -> Iterator[pa.Table]:
        """The kept rows in file order."""
        if self.path is None:
            yield from self.tables
            return
        yield from order.read_ipc(self.path)

    def report(self) -> FileReport:
        """Plain form for a manifest."""
        return {
            "file": self.file.shown, "source": self.file.source, "digest": self.file.digest, "refused": self.refused,
            **self.tally.as_json(), **cast(Notes, dict(sorted(self.notes.items()))),
        }  # fmt: skip


def stage(
    file: SourceFile,
    data: DataConfig,
    threads: int,
    folder: Path | None,
    advance: Callable[[int], None],
    keep: bool = True,
    room: int = 0,
    bounds: Bounds = USUAL,
) -> Staged:
    """Read, type and check one file. Raises UserError if a policy is `fail`.

    Rows are kept in memory if they take less than `room` bytes or `folder` is None, else in `folder` (`keep` False:
    nowhere). `bounds` limits the memory of rows. `sources.<name>.refused` decides about a file that cannot be read.
    """
    source = _way(file.source, data).source
    if folder is not None and (found := load(file, data, folder)) is not None:
        advance(found.tally.rows)
        return found
    staged = Staged(file, Tally(f"source {file.source}"), {})
    held = _Held(file, data, folder, room)
    with contextlib.ExitStack() as undo:
        undo.callback(held.abandon)
        try:
            for chunk in _chunks(file, source, data, threads, staged.notes, bounds):
                table = _kept(chunk, staged, data, source)
                advance(len(chunk.numbers) + len(chunk.lost))
                if keep:
                    held.add(table)
        except PolicyError as error:
            if file.format != "csv":
                raise
            raise PolicyError(f"{error}.{advice.advice(file, source, data.time_zone)}".removesuffix(".")) from None
        except Refused as error:
            if source.refused == "fail":
                if isinstance(error.__cause__, MissingColumnError):
                    raise error.__cause__ from None
                raise UserError(f"{error}{error.ways_on}") from error.__cause__
            return Staged(file, Tally(f"source {file.source}"), {}, refused=str(error))
        if file.format not in lake_tables.LIBRARIES:  # the files of a snapshot never change
            digest.check_unchanged(file.path, file.digest)
        staged.tally.check()
        staged.tables, staged.path, staged.bytes = held.tables, held.commit(), held.total
        undo.pop_all()
    if staged.path:
        _save(staged, data, folder)  # type: ignore[arg-type]
    return staged


class Refused(Exception):
    """A file cannot be read; `ways_on`: what to do, if the message does not have it."""

    ways_on = ""


def _chunks(
    file: SourceFile, source: SourceConfig, data: DataConfig, threads: int, notes: Notes, bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of a file. Raises Refused if the file does not have the schema or the library cannot read it."""
    try:
        yield from READERS[file.format](file, source, data.time_zone, threads, notes, bounds)
    except UserError as error:
        if pool.is_hopeless(error):
            raise
        missing = error if isinstance(error, MissingColumnError) else None
        refused = Refused(str(error) if file.shown in str(error) else f"{file.shown}: {error}")
        if isinstance(error, Torn):
            refused.ways_on = f"; replace the file{skip_advice(file)}"
        raise refused from missing
    except Exception as error:
        if not failures.from_library(error) or pool.is_hopeless(error):
            raise
        title = FORMATS[file.format].title
        if not file.size and file.format in ("parquet", "arrow"):
            reason = f"{file.shown} is empty: it must hold the header and the footer of {title}{skip_advice(file)}"
            raise Refused(reason) from None
        column, part = arrow_files.damaged_part(file, source, bounds) if file.format == "parquet" else ("", "")
        where = f" in column {column!r}, {part}" if column else ""
        sensitive = [name for name, item in source.columns.items() if item.sensitive]
        reason = failures.reason_without_values(error, sensitive)
        refused = Refused(f"{file.shown} cannot be read as {title}{where}: {reason}")
        without = f"; or declare the data without column {column!r}" if column else ""
        refused.ways_on = f"; replace the file{without}{skip_advice(file)}"
        raise refused from None if sensitive else error


def _source(name: str, data: DataConfig) -> SourceConfig:
    """A source whose columns are also sensitive if a column of the same name in events or side tables is."""
    said = {
        column
        for columns in (data.columns, *(table.columns for table in data.tables.values()))
        for column, item in columns.items()
        if item.sensitive
    }
    source = data.sources[name]
    columns = {
        column: dataclasses.replace(item, sensitive=item.sensitive or column in said)
        for column, item in source.columns.items()
    }
    return dataclasses.replace(source, columns=columns)


def _kept(chunk: Chunk, staged: Staged, data: DataConfig, source: SourceConfig) -> pa.Table:
    """The chunk's rows after the policies of the source and, if no query follows, of the event columns."""
    shown, tally = staged.file.shown, staged.tally
    sensitive = any(column.sensitive for column in source.columns.values())
    record_lost_rows(
        chunk.lost, tally, shown, source.csv.ragged, sensitive, f"data.sources.{staged.file.source}.csv.ragged"
    )
    findings, table, numbers = list(chunk.findings), chunk.table, chunk.numbers
    findings += checks_of_events(table, data, staged.file.source, findings)
    findings = [chunk.shown(finding) for finding in findings]

    def locate(positions: np.ndarray) -> list[Place]:
        return [{"file": shown, "row": int(numbers[place])} for place in positions]

    return apply(table, findings, tally, locate)[0]


def checks_of_events(table: pa.Table, data: DataConfig, source: str, known: list[Finding]) -> list[Finding]:
    """Findings of the event table's rules on rows of its only source, where file and row are known; empty if a query follows."""
    if data.query is not None or source != event_source(data):
        return []
    there = set(table.column_names)
    columns = {name: column for name, column in data.columns.items() if name in there}
    findings = column_checks.find(table, columns, data.time_zone, known)
    return findings + rules.find(table, data.rules, [*known, *findings], data.sensitive)


# -------------------------------------------------------------------------------------------------- staged files


def _name(file: SourceFile, data: DataConfig) -> str:
    asked: list[Any] = [_way(file.source, data).digest, file.format, file.identity]
    if any(column.path == FILE for column in data.sources[file.source].columns.values()):
        asked.append(file.path.name)
    if file.format in lake_tables.LIBRARIES:
        asked.append(file.shown)  # the snapshot, which is recorded
    return digest.of_json(asked)[:32]


@dataclasses.dataclass(frozen=True)
class _Way:
    """How the files of a source are staged, and the digest of these settings; computed once for all files."""

    data: DataConfig
    source: SourceConfig
    digest: str


_ways: dict[str, _Way] = {}


def _way(name: str, data: DataConfig) -> _Way:
    way = _ways.get(name)
    if way is None or way.data is not data:
        source = _source(name, data)
        plain = config_schema.plain(source)
        plain.pop("path", None)
        asked: list[Any] = [FORMAT, name, plain, data.time_zone]
        if data.query is None:
            whole = config_schema.plain(data)
            asked += [whole["columns"], whole["rules"]]
        way = _ways[name] = _Way(data, source, digest.of_json(asked))
    return way


def names(files: list[SourceFile], data: DataConfig) -> set[str]:
    """Names that the staged forms of these files have."""
    return {_name(file, data) for file in files}


class Record(TypedDict):
    """The record of a staged file beside its rows."""

    rows: records.Count
    kept: records.Count
    quarantined: records.Count
    counts: list[list[Any]]
    notes: Notes
    bytes: records.Count  # of the kept rows in memory
    files: dict[str, seal.FileRecord]
    check: records.Digest


def _save(staged: Staged, data: DataConfig, folder: Path) -> None:
    tally, stem = staged.tally, folder / _name(staged.file, data)
    beside = [stem.with_name(f"{stem.name}.arrow")]
    if (found := tally.table()).num_rows:
        beside.append(stem.with_name(f"{stem.name}.quarantine"))
        storage.write_parquet(beside[1], found)
    counts = [[*key, count] for key, count in sorted(tally.counts.items())]
    record = {
        "rows": tally.rows, "kept": tally.kept, "quarantined": tally.quarantined, "counts": counts,
        "notes": staged.notes, "bytes": staged.bytes, "files": {path.name: seal.record_of(path) for path in beside},
    }  # fmt: skip
    # Not synced: a file that is lost or truncated by a crash of the machine fails its check and is staged again.
    storage.write_json(stem.with_name(f"{stem.name}.json"), seal.checked(record), synced=False)


def damaged(record: Path) -> list[Path]:
    """The damaged files among a staged record and the files that it names."""
    try:
        return _damaged(record, seal.read_checked(record, Record))
    except UserError:
        return [record]


def _damaged(record: Path, saved: Record) -> list[Path]:
    files = saved["files"]
    return [record.parent / name for name, entry in files.items() if not seal.is_whole(record.parent / name, entry)]


def load(file: SourceFile, data: DataConfig, folder: Path) -> Staged | None:
    """The file as staged by an earlier ingest with the same schema; None if it was not, or if it is damaged."""
    name = _name(file, data)
    record, path = folder / f"{name}.json", folder / f"{name}.arrow"
    evidence = f"{name}.quarantine"
    try:
        saved = seal.read_checked(record, Record)
        if path.name not in saved["files"] or _damaged(record, saved):
            return None
        records = storage.read_parquet(folder / evidence) if evidence in saved["files"] else NO_RECORDS
    except (OSError, ValueError, pa.ArrowException):
        return None
    tally = Tally(f"source {file.source}", saved["rows"], saved["kept"], saved["quarantined"])
    tally.counts = Counter({(column, reason, policy): count for column, reason, policy, count in saved["counts"]})
    if records.num_rows:
        shown = pa.array([file.shown] * records.num_rows, pa.string())  # the same bytes may have had another name
        tally.tables = [records.set_column(records.column_names.index("file"), "file", shown)]
    return Staged(file, tally, saved["notes"], path=path, reused=True, bytes=saved["bytes"])


class _Held:
    """The rows of a file: in memory as long as they take less than `room` bytes or `folder` is None, else in an Arrow file."""

    def __init__(self, file: SourceFile, data: DataConfig, folder: Path | None, room: int) -> None:
        self.tables: list[pa.Table] = []
        self._file, self._data, self._folder, self._room = file, data, folder, room
        self._bytes = self.total = 0
        self._writer: _Writer | None = None
        self._make_way()

    def add(self, table: pa.Table) -> None:
        if table.num_rows:
            self.tables.append(table)
            self._bytes += table.nbytes
            self.total += table.nbytes
            self._make_way()

    def _make_way(self) -> None:
        if self._folder is None or self._bytes < self._room:
            return
        if self._writer is None:
            columns = self._data.sources[self._file.source].columns
            schema = schema_of({name: column.type for name, column in columns.items()})
            self._writer = _Writer(self._folder / _name(self._file, self._data), schema)
        while self.tables:
            self._writer.write(self.tables.pop(0))

    def commit(self) -> Path | None:
        return self._writer.commit() if self._writer else None

    def abandon(self) -> None:
        if self._writer:
            self._writer.abandon()


class _Writer:
    """An Arrow file under a temporary name; `commit` gives it its own."""

    def __init__(self, stem: Path, schema: pa.Schema) -> None:
        self._target = stem.with_name(f"{stem.name}.arrow")
        # Two files of equal content are staged under one name, perhaps at the same time.
        self._temporary = stem.with_name(f".{stem.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._schema = schema
        with storage.disk_errors(stem):
            storage.make_folder(stem.parent)
            self._sink = pa.OSFile(str(self._temporary), "wb")
            try:
                self._writer = pa.ipc.new_file(self._sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
            except BaseException:
                self.abandon()
                raise

    def write(self, table: pa.Table) -> None:
        with storage.disk_errors(self._target):
            self._writer.write_table(table)

    def commit(self) -> Path:
        with storage.disk_errors(self._target):
            self._writer.close()
            self._sink.close()
            self._temporary.replace(self._target)
        return self._target

    def abandon(self) -> None:
        try:
            self._sink.close()
        except (OSError, pa.ArrowException):
            pass
        self._temporary.unlink(missing_ok=True)
