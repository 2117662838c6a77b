"""Iceberg and Delta tables through their own libraries (extras): one snapshot, whose id is recorded and digested.

A table can come from anywhere. Its metadata names classes, properties of a file access and places: none of that is followed.
Files are opened by this module alone (`_file_io`, `_own`), and only those inside the table's folder.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.config.sections.data import SourceConfig
from engine.data import failures
from engine.data.bounds import Bounds, cut
from engine.data.columns import Chunk, Notes, match
from engine.data.files import SourceFile
from engine.data.readers.arrow_files import chunks, column_names
from engine.errors import UserError
from engine.runtime import digest

LIBRARIES = {"iceberg": "pyiceberg", "delta": "deltalake"}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def table_file(name: str, source: SourceConfig, path: Path) -> SourceFile:
    """A table at its snapshot as the one file of a source. Raises UserError for a missing library, table or snapshot."""
    if source.snapshot and not re.fullmatch("[0-9]{1,19}", source.snapshot):
        wanted = "the id of an Iceberg snapshot" if source.format == "iceberg" else "a version of the Delta table"
        raise UserError(f"data.sources.{name}.snapshot must be {wanted}, a whole number, found {source.snapshot!r}")
    with failures.explained(f"data.sources.{name}: {path} cannot be read as {source.format} table"):
        if source.format == "delta":
            snapshot, parts = _delta_parts(path, _delta(path, source.snapshot))
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


def _own(root: Path, name: str) -> Path:
    """The file of the table at `root` that its metadata calls `name`: a path or file:// address of a file inside `root`.

    Raises UserError, without touching the place, for any other: the metadata could name every file and server there is.
    """
    path = name.removeprefix("file:") if name.startswith("file:/") else name
    path = "/" + path.lstrip("/") if path.startswith("///") else path
    if _ADDRESS.match(path) or path.startswith("//") or "\0" in path:
        found = f"{name!r}, an address"
    else:
        place = (root / path).resolve()
        if place.is_relative_to(root.resolve()):
            return place
        found = f"{name!r}, which leads to {place}"
    raise UserError(
        f"the files of a table must lie inside its folder {root}, found {found}. Where the table is yours, write its rows to "
        "Parquet files with the tool that made it, and read these"
    )


def _delta(path: Path, snapshot: str | None) -> Any:
    library = _library("delta", "deltalake")
    _check_log(path)
    return library.DeltaTable(str(path.absolute()), version=int(snapshot) if snapshot else None)


def _check_log(path: Path) -> None:
    """Raise UserError for a log that leads out of the table: by a link, or by its checkpoint parts and deletion vectors."""
    for file in sorted((path / "_delta_log").rglob("*")):
        _own(path, str(file.absolute()))
        for action in _actions(file) if file.is_file() else ():
            sidecar = urllib.parse.unquote(_text(action, "sidecar", "path"))
            if "/" in sidecar:
                _own(path / "_delta_log" / "_sidecars", sidecar)
            vector = _text(action, "add", "deletionVector", "pathOrInlineDv")
            kind = _text(action, "add", "deletionVector", "storageType")
            if kind != "i":  # u: a folder of the table, then 20 letters that stand for the file's number; p: a path
                _own(path, urllib.parse.unquote(vector if kind == "p" else vector[:-20]))


def _text(action: Any, *names: str) -> str:
    for name in names:
        action = action.get(name) if isinstance(action, dict) else None
    return action if isinstance(action, str) else ""


def _actions(file: Path) -> Iterator[Any]:
    """What a file of the log says of sidecars and deletion vectors; a line that is no JSON is for the library to refuse."""
    if file.suffix == ".json":
        with open(file, "rb") as lines:
            for line in lines:
                if b"deletionVector" in line or b"sidecar" in line:
                    with contextlib.suppress(ValueError, RecursionError):
                        yield json.loads(line)
    elif ".checkpoint." in file.name:
        schema = pq.read_schema(file)
        add = schema.field("add").type if "add" in schema.names else None
        columns = ["sidecar"] if "sidecar" in schema.names else []
        if add is not None and pa.types.is_struct(add) and add.get_field_index("deletionVector") >= 0:
            columns.append("add.deletionVector")
        if columns:
            yield from pq.ParquetFile(file).read(columns=columns).to_pylist()  # `read_table` would lose the names above


def _delta_parts(path: Path, table: Any) -> tuple[str, list[Any]]:
    """(version, [file, size]) of the data files. Files are never rewritten: name and size tell the content.

    Except where the table has reader features: its log may delete rows of a file and rename its columns.
    """
    actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes"])
    for name in actions["path"].to_pylist():
        _own(path, urllib.parse.unquote(name))
    parts = [list(row.values()) for row in actions.to_pylist()]
    if _has_features(table):
        parts.append(["schema", 0, table.schema().to_json()])
        for item in pa.table(table.deletion_vectors()).to_pylist():
            kept = bytes(item["selection_vector"])
            parts.append([PurePosixPath(item["filepath"]).name, 0, digest.of_json(kept.hex())])
    return str(table.version()), parts


def _has_features(table: Any) -> bool:
    """Whether the log changes the content of data files: deletion vectors, column mapping and the like."""
    return table.protocol().min_reader_version > 1


def _iceberg(path: Path, snapshot: str | None) -> tuple[Any, int | None]:
    """(table, snapshot id): `path` is a metadata.json, or a table folder whose newest metadata is taken.

    `StaticTable.from_metadata` would load the class that the metadata's `py-io-impl` names, with its `s3.endpoint` and so on.
    """
    metadata, root = path, path if path.is_dir() else path.absolute().parent.parent
    if path.is_dir():
        found = sorted((path / "metadata").glob("*.metadata.json"), key=_metadata_order)
        if not found:
            raise UserError(f"{path} must be an Iceberg table with metadata/*.metadata.json, found none")
        metadata = found[-1]
    library, access = _library("iceberg", "pyiceberg.table"), _file_io(root)
    place = str(metadata.absolute())
    content = importlib.import_module("pyiceberg.serializers").FromInputFile.table_metadata(access.new_input(place))
    catalog = importlib.import_module("pyiceberg.catalog.noop").NoopCatalog("static-table")
    table = library.StaticTable(("static-table", place), content, place, access, catalog)
    if snapshot:
        return table, int(snapshot)
    current = table.current_snapshot()
    return table, current.snapshot_id if current else None


def _file_io(root: Path) -> Any:
    """The only file access of an Iceberg table: it opens files inside `root` for reading only."""
    library = importlib.import_module("pyiceberg.io")
    arrow = importlib.import_module("pyiceberg.io.pyarrow")

    class OwnFiles(library.FileIO):  # type: ignore[misc,name-defined]
        """Reads files inside the table's folder; ignores properties."""

        def new_input(self, location: str) -> Any:
            return arrow.PyArrowFile(location, str(_own(root, location)), pafs.LocalFileSystem())

        def new_output(self, location: str) -> Any:
            raise UserError(f"a table is only read, found {location!r} to be written")

        def delete(self, location: Any) -> None:
            raise UserError(f"a table is only read, found {location!r} to be deleted")

    return OwnFiles()


def _metadata_order(path: Path) -> tuple[int, str]:
    digits = path.name.removeprefix("v").split("-")[0].split(".")[0]
    return int(digits) if digits.isdecimal() else -1, path.name


def _iceberg_parts(table: Any, snapshot: int | None) -> tuple[str, list[Any]]:
    tasks = list(table.scan(snapshot_id=snapshot).plan_files())
    for item in (file for task in tasks for file in (task.file, *task.delete_files)):
        table.io.new_input(item.file_path)  # refused before any row is read
    parts = [
        [task.file.file_path, task.file.file_size_in_bytes, sorted(item.file_path for item in task.delete_files)]
        for task in tasks
    ]
    return str(snapshot), parts


def read(
    file: SourceFile, source: SourceConfig, zone: str, _threads: int, notes: Notes, bounds: Bounds
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
