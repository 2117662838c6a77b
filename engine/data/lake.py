"""Iceberg and Delta tables through their own libraries (extras): one snapshot, whose id is recorded and digested."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from engine.config.tree import SourceConfig
from engine.data import failures
from engine.data.bounds import Bounds, cut
from engine.data.columns import Chunk, match
from engine.data.files import SourceFile
from engine.data.read_arrow import chunks, column_names
from engine.errors import UserError
from engine.runtime import digest

LIBRARIES = {"iceberg": "pyiceberg", "delta": "deltalake"}


def table_file(name: str, source: SourceConfig, path: Path) -> SourceFile:
    """A table at its snapshot as the one file of a source. Raises UserError for a missing library, table or snapshot."""
    with failures.told_as(f"data.sources.{name}: {path} cannot be read as {source.format} table"):
        if source.format == "delta":
            snapshot, parts = _delta_parts(_delta(path, source.snapshot))
        else:
            snapshot, parts = _iceberg_parts(*_iceberg(path, source.snapshot))
    content = digest.of_json([source.format, sorted(parts)])
    size = sum(part[1] for part in parts)
    return SourceFile(name, path, f"{path}@{snapshot}", source.format, content, size, {})


def _library(kind: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"format {kind} needs the package {LIBRARIES[kind]}: pip install {LIBRARIES[kind]}") from None


def _delta(path: Path, snapshot: str | None) -> Any:
    return _library("delta", "deltalake").DeltaTable(str(path), version=int(snapshot) if snapshot else None)


def _delta_parts(table: Any) -> tuple[str, list[Any]]:
    """(version, [file, size]) of the data files. Files are never rewritten: name and size tell the content.

    Except where the table has reader features: its log may delete rows of a file and rename its columns.
    """
    actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes"])
    parts = [list(row.values()) for row in actions.to_pylist()]
    if _has_features(table):
        parts.append(["schema", 0, table.schema().to_json()])
        for item in pa.table(table.deletion_vectors()).to_pylist():
            kept = bytes(item["selection_vector"])
            parts.append([PurePosixPath(item["filepath"]).name, 0, digest.of_json(kept.hex())])
    return str(table.version()), parts


def _has_features(table: Any) -> bool:
    """Whether the log changes what the data files hold: deletion vectors, column mapping and the like."""
    return table.protocol().min_reader_version > 1


def _iceberg(path: Path, snapshot: str | None) -> tuple[Any, int | None]:
    """(table, snapshot id): `path` is a metadata.json, or a table folder whose newest metadata is taken."""
    metadata = path
    if path.is_dir():
        found = sorted((path / "metadata").glob("*.metadata.json"), key=_metadata_order)
        if not found:
            raise UserError(f"{path} must be an Iceberg table with metadata/*.metadata.json, found none")
        metadata = found[-1]
    table = _library("iceberg", "pyiceberg.table").StaticTable.from_metadata(str(metadata))
    if snapshot:
        return table, int(snapshot)
    current = table.current_snapshot()
    return table, current.snapshot_id if current else None


def _metadata_order(path: Path) -> tuple[int, str]:
    digits = path.name.removeprefix("v").split("-")[0].split(".")[0]
    return int(digits) if digits.isdecimal() else -1, path.name


def _iceberg_parts(table: Any, snapshot: int | None) -> tuple[str, list[Any]]:
    tasks = table.scan(snapshot_id=snapshot).plan_files()
    parts = [
        [task.file.file_path, task.file.file_size_in_bytes, sorted(item.file_path for item in task.delete_files)]
        for task in tasks
    ]
    return str(snapshot), parts


def read(
    file: SourceFile, source: SourceConfig, zone: str, _threads: int, notes: dict[str, Any], bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of the rows of the snapshot, deletes applied by the library."""
    snapshot = file.shown.rsplit("@", 1)[1]
    notes["snapshot"] = snapshot
    batches = _delta_batches(file.path, snapshot) if file.format == "delta" else _iceberg_batches(file.path, snapshot)
    first = next(batches, None)
    if first is None:
        return
    names = column_names(first.schema, source)
    matched = match(names, source, file)
    notes.update(matched.notes)
    yield from chunks(cut(_chain(first, batches), bounds), matched, names, file, source, zone, notes)


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _delta_batches(path: Path, snapshot: str) -> Iterator[pa.RecordBatch]:
    table = _delta(path, snapshot)
    if not _has_features(table):
        # Few rows at once, and few batches ahead: a data set tells nothing of how long its values are.
        yield from table.to_pyarrow_dataset().to_batches(batch_size=1 << 13, batch_readahead=1, fragment_readahead=1)
        return
    # pyarrow's reader refuses such tables, the library's own engine reads them; in one partition its order is the files'.
    settings = {
        "datafusion.execution.target_partitions": "1",
        "datafusion.execution.parquet.schema_force_view_types": "false",
    }
    engine = _library("delta", "deltalake").QueryBuilder(settings).register("rows", table)
    for batch in engine.execute('SELECT * FROM "rows"'):
        yield pa.record_batch(batch)


def _iceberg_batches(path: Path, snapshot: str) -> Iterator[pa.RecordBatch]:
    if snapshot == "None":
        return
    table, number = _iceberg(path, snapshot)
    yield from table.scan(snapshot_id=number).to_arrow_batch_reader()
