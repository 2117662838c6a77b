"""Output of predictions: files, and a manifest that lists the files that count.

Files are named by content and the manifest is written last, so a reader who follows it sees the earlier output or the
later one, never a mixture. Other files are deleted afterwards. Until all files exist they have names
that no `*.parquet` matches, so a reader who only lists the folder sees no part of an unfinished output either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import shutil
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.config.sections.scoring import ScoreConfig
from engine.data.arrow_types import parse_type
from engine.errors import UserError
from engine.runtime import digest, records, seal, storage
from engine.scoring.units import SetAside
from engine.training.classes import ScoreMeaning

FORMAT = 2
CHECKED = 2  # the manifest checks itself from this format on
MANIFEST = "_manifest.json"  # readers of whole folders pass over names that begin with _
STAGED, WAITING = "_staged", ".part"  # folder and suffix of files that are not published yet
# Files that this module writes, in the folder itself or in a folder `column=value`, and leftovers of a killed process.
OURS = re.compile(r"([^/=]+=[^/]*/)?(part-\d{5,}-[0-9a-f]{8}\.parquet|\.(part-\S+|_manifest\.json)\.[0-9a-f]{8}\.tmp)")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
ROW_GROUP = 131_072
PARTITION_ROW_GROUP = 16_384  # every open folder keeps this many rows in memory
MOST_PARTITIONS = 900
LONGEST_NAME = 255  # of a folder, on the usual file systems


# ----------------------------------------------------------------------------------------------------------- places


class FileEntry(TypedDict):
    """A file of predictions; `value` is that of its folder."""

    name: str
    rows: NotRequired[records.Count]
    bytes: NotRequired[records.Count]
    sha256: records.Digest
    value: NotRequired[str | None]


class Partition(TypedDict):
    """The partition column, and its type."""

    column: str
    type: str


class ReasonsRecord(TypedDict):
    """How many reasons a row has, and what their contributions add up to, in words."""

    count: records.Count
    margin: str


class ManifestRecord(TypedDict):
    """_manifest.json of an output."""

    format: Annotated[int, records.Format(FORMAT)]
    complete: bool
    rows: NotRequired[records.Count]
    model: NotRequired[str]
    score: NotRequired[ScoreMeaning]
    score_type: NotRequired[str]
    scores: NotRequired[str]
    reasons: NotRequired[ReasonsRecord]
    set_aside: NotRequired[list[SetAside]]
    partition: Partition | None
    files: list[FileEntry]
    check: NotRequired[records.Digest]


@dataclass(frozen=True)
class Place:
    """A folder of an object store or of a local disk. Names are relative, with / between folders."""

    root: str
    filesystem: Any = None  # None = local

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to `name`; it is whole or absent there."""
        if self.filesystem is None:
            storage.link(source, storage.inside(Path(self.root), *name.split("/")))
            return
        with (
            self._errors(),
            self.filesystem.open_output_stream(f"{self.root}/{name}") as stream,
            open(source, "rb") as file,
        ):
            while block := file.read(digest.CHUNK):
                stream.write(block)

    def put_text(self, name: str, text: str) -> None:
        """Write a small text."""
        if self.filesystem is None:
            storage.write_text(storage.inside(Path(self.root), name), text)
            return
        with self._errors(), self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(text.encode())

    def read(self, name: str) -> bytes | None:
        """Bytes of a file; None when there is none."""
        if self.filesystem is None:
            path = storage.inside(Path(self.root), *name.split("/"))
            return path.read_bytes() if path.is_file() else None
        with self._errors():
            if self.filesystem.get_file_info(f"{self.root}/{name}").type == pafs.FileType.NotFound:
                return None
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return bytes(stream.read())

    def names(self) -> list[str]:
        """Every file below the folder."""
        if self.filesystem is None:
            root = Path(self.root)
            return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
        selector = pafs.FileSelector(self.root, recursive=True, allow_not_found=True)
        with self._errors():
            infos = self.filesystem.get_file_info(selector)
        return [posixpath.relpath(info.path, self.root) for info in infos if info.type == pafs.FileType.File]

    def remove(self, name: str) -> None:
        """Delete a file."""
        if self.filesystem is None:
            path = Path(self.root, name)
            path.unlink(missing_ok=True)
            while path.parent != Path(self.root) and not any(path.parent.iterdir()):
                path = path.parent
                path.rmdir()
            return
        with self._errors():
            self.filesystem.delete_file(f"{self.root}/{name}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process publishes in this folder. An object store has no locks: there `publish` detects it.

        Unpublished leftovers of a killed process are deleted first.
        """
        if self.filesystem is not None:
            yield
            return
        descriptor = self._locked()  # of the folder itself: a lock leaves no file there
        try:
            self.discard_staged()
            shutil.rmtree(self._aside, ignore_errors=True)
            if (before := read_manifest(self)) is not None and not before["complete"]:
                self.remove(MANIFEST)
            yield
        finally:
            os.close(descriptor)

    def _locked(self) -> int:
        """Descriptor of the locked folder; another process may have replaced the folder meanwhile."""
        while True:
            storage.make_folder(Path(self.root))
            descriptor = os.open(self.root, os.O_RDONLY)
            with contextlib.suppress(UserError):  # a network file system may have no locks
                storage.lock(descriptor, Path(self.root))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.root)):
                    return descriptor
            os.close(descriptor)

    @property
    def _aside(self) -> Path:
        """The folder in which a whole output is prepared, beside its final place."""
        return Path(self.root).with_name(f".{Path(self.root).name}.tmp")

    def stage(self, source: Path, name: str) -> None:
        """Copy a local file to the output, where no reader finds it before `reveal` gives it its `name`."""
        self.put(source, staged(name))

    def reveal(self, names: Iterable[str], manifest: str, earlier: Iterable[str] = ()) -> None:
        """Give staged files their names, then write the manifest.

        In one step where a local folder holds only `earlier` output, which is deleted; else file by file, by renames (an
        object store copies them itself).
        """
        names = list(names)
        if self.filesystem is None and self._at_once(names, manifest, {*earlier, MANIFEST}):
            return
        for name in names:
            self._rename(staged(name), name)
        self.put_text(MANIFEST, manifest)

    def _at_once(self, names: list[str], manifest: str, earlier: set[str]) -> bool:
        """Replace the existing folder by one with the whole output; False where that is not possible."""
        root, aside = Path(self.root), self._aside
        there = {name for name in self.names() if not name.startswith(f"{STAGED}/")}
        if not names or not there <= earlier:
            return False
        try:
            os.replace(root / STAGED, aside)
        except OSError:  # a mounted disk, or the folder above cannot be written
            return False
        for name in names:
            os.replace(aside / f"{name}{WAITING}", aside / name)
        storage.write_text(aside / MANIFEST, manifest)
        shutil.copymode(root, aside)
        if storage.exchange(aside, root):
            shutil.rmtree(aside, ignore_errors=True)  # what was there before
            storage.sync(root.parent)
            return True
        for name in names:
            os.replace(aside / name, aside / f"{name}{WAITING}")
        os.replace(aside, root / STAGED)
        return False

    def _rename(self, old: str, new: str) -> None:
        if self.filesystem is None:
            target = storage.inside(Path(self.root), *new.split("/"))
            storage.make_folder(target.parent)
            os.replace(Path(self.root, old), target)
            storage.sync(target.parent)
            return
        with self._errors():
            self.filesystem.copy_file(f"{self.root}/{old}", f"{self.root}/{new}")

    def discard_staged(self) -> None:
        """Delete files that are or were waiting to be published."""
        if self.filesystem is None:
            shutil.rmtree(Path(self.root, STAGED), ignore_errors=True)
            return
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.root}/{STAGED}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """An error of the object store as one that names the place."""
        try:
            yield
        except OSError as error:
            raise UserError(f"s3://{self.root} cannot be written or read: {str(error).splitlines()[0]}") from error


def place_of(target: str | None, directory: Path, endpoint: str | None = None, region: str | None = None) -> Place:
    """The place of a run's predictions (`score.output`). Raises UserError for an address that is not s3://."""
    if target is None:
        return Place(str(directory / "predictions"))
    if target.startswith("s3://"):
        key = target.removeprefix("s3://").rstrip("/")
        if any(part in ("", "..", ".") for part in key.split("/")):
            raise UserError(
                f"score.output must be s3://bucket/prefix without empty or climbing parts, found {target!r}"
            )
        return Place(key, storage.object_store(endpoint, region))
    if "://" in target:
        raise UserError(f"score.output must be a folder or s3://bucket/prefix, found {target!r}")
    return Place(str(Path(target).expanduser().resolve()))  # a link stays one when its folder is replaced


# --------------------------------------------------------------------------------------------------------- manifest


def staged(name: str) -> str:
    """Where a file of the output waits to be published."""
    return f"{STAGED}/{name}{WAITING}"


def publish(place: Place, manifest: ManifestRecord) -> None:
    """Give the staged files their names and write the manifest, then delete what it does not name of an earlier output.

    Files of an incomplete output keep their waiting names: only readers of the manifest find them.
    Raises UserError when files of the manifest are missing: another run has published to the same place at the same time.
    """
    before = read_manifest(place)
    names = [entry["name"] for entry in manifest["files"]]
    if not manifest["complete"]:
        manifest = {**manifest, "files": [{**entry, "name": staged(entry["name"])} for entry in manifest["files"]]}
        names = []
    # Only files of an earlier manifest or leftovers of this module: the folder may hold the user's files, and folders
    # that are other outputs.
    stale = {entry["name"] for entry in before["files"]} if before else set()
    place.reveal(names, json.dumps(seal.checked(manifest), indent=1, ensure_ascii=False) + "\n", stale)
    if manifest["complete"]:
        place.discard_staged()
    kept = {entry["name"] for entry in manifest["files"]}
    names = place.names()
    others = {posixpath.dirname(name) for name in names if "/" in name and posixpath.basename(name) == MANIFEST}
    for name in names:
        ours = (
            name in stale
            or name.startswith(f"{STAGED}/")
            or (OURS.fullmatch(name) and posixpath.dirname(name) not in others)
        )
        if ours and name not in kept:
            place.remove(name)
    if gone := kept.difference(names):
        raise UserError(
            f"{place.root} must be the output of one run at a time, but another one has replaced {min(gone)} meanwhile: "
            "run the command again"
        )


def read_manifest(place: Place) -> ManifestRecord | None:
    """The manifest of a place, or None before the first output."""
    text = place.read(MANIFEST)
    if text is None:
        return None
    where = f"{place.root}/{MANIFEST}"
    found = records.parse(text.decode("utf-8", "replace"), ManifestRecord, where)
    if "check" in found or found["format"] >= CHECKED:  # older manifests have no check
        seal.verify(found, where)
    return found


def read_predictions(place: Place) -> pa.Table:
    """All rows that the manifest names, in its order; every file is checked against its digest.

    The partition column is the last one, in its declared type. Raises UserError.
    """
    manifest = read_manifest(place)
    if manifest is None:
        raise UserError(
            f"{place.root} must hold {MANIFEST}, which is missing: the run that writes there has not finished"
        )
    if not manifest["files"]:
        raise records.Damaged(f"{place.root}/{MANIFEST} must name at least one file, found none: score again")
    tables = []
    for entry in manifest["files"]:
        found = place.read(entry["name"])
        if found is None or hashlib.sha256(found).hexdigest() != entry["sha256"]:
            raise UserError(f"{place.root}/{entry['name']} is not the file that the manifest names: score again")
        table = pq.read_table(pa.BufferReader(found), page_checksum_verification=True)
        if (partition := manifest["partition"]) is not None and "value" in entry:
            column = pa.array([entry["value"]], pa.string()).cast(parse_type(partition["type"]))
            table = table.append_column(partition["column"], pa.repeat(column[0], table.num_rows))
        tables.append(table)
    return pa.concat_tables(tables)


# ------------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Layout:
    """The layout of output files: rows per file (0 = a part is a file) and the partition column."""

    file_rows: int = 0
    partition: str | None = None
    level: int = 1

    @property
    def as_parts(self) -> bool:
        """Whether the workers' parts are the files."""
        return not self.file_rows and self.partition is None


def layout_of(config: ScoreConfig, rows: int, part_bytes: int) -> Layout:
    """The layout from the config; `file_size` is converted to rows by the size of the parts."""
    file_rows = config.file_rows
    if config.file_size is not None and rows:
        file_rows = max(1, round(config.file_size.bytes * rows / max(part_bytes, 1)))
    return Layout(file_rows, config.partition, config.compression_level)


def write_files(place: Place, parts: Mapping[Path, str], layout: Layout, scratch: Path) -> list[FileEntry]:
    """Bring the rows of the parts (path -> its SHA-256, just checked), in order, to the output, where they wait for
    `publish`; returns the manifest's entries. Memory stays bounded.
    """
    if layout.as_parts:
        return [
            _put(place, "", index, path, pq.read_metadata(path).num_rows, sha256)
            for index, (path, sha256) in enumerate(parts.items())
        ]
    writers: dict[str | None, _Roller] = {}
    for path in parts:
        table = storage.read_parquet(path)
        for value, rows in _by_partition(table, layout.partition):
            if value not in writers:
                _check_folder(layout.partition, value, rows)
                if len(writers) == MOST_PARTITIONS:
                    raise UserError(
                        f"score.partition={layout.partition} must have at most {MOST_PARTITIONS} values, found more: "
                        "use a coarser column"
                    )
                folder = "" if layout.partition is None else partition_folder(layout.partition, value)
                writers[value] = _Roller(place, folder, layout, scratch / f"{len(writers)}{WAITING}")
            writers[value].add(rows)
    ordered = sorted(writers.items(), key=lambda item: (item[1].folder, item[0] or ""))
    entries = [(value, entry) for value, writer in ordered for entry in writer.close()]
    return [entry if layout.partition is None else {**entry, "value": value} for value, entry in entries]


def _by_partition(table: pa.Table, column: str | None) -> Iterator[tuple[str | None, pa.Table]]:
    """(value as text, its rows in order without that column); all rows where there is no partition column."""
    if column is None:
        yield None, table
        return
    texts = table[column].cast(pa.string())
    for value in pc.unique(texts).to_pylist():
        mask = pc.is_null(texts) if value is None else pc.equal(texts, value)
        yield value, table.filter(pc.fill_null(mask, False)).drop_columns([column])


def _check_folder(column: str | None, value: str | None, rows: pa.Table) -> None:
    """Raise UserError, with the first such row, for a value that cannot be in a folder's name."""
    if column is None or value is None:
        return
    first, folder = rows["row_id"][0].as_py(), partition_folder(column, value)
    if value == HIVE_NULL:
        raise UserError(
            f"score.partition={column} must not hold the text {HIVE_NULL!r}, which readers take for null, "
            f"found in row {first}: use another column"
        )
    if len(folder) > LONGEST_NAME:
        raise UserError(
            f"score.partition={column} must have values whose folder's name has at most {LONGEST_NAME} characters, "
            f"found {folder[:60]}... with {len(folder)} in row {first}: use another column"
        )


def has_text(kind: str) -> bool:
    """Whether Arrow writes values of a type as text and reads them back without loss."""
    arrow = parse_type(kind)
    without = pa.types.is_nested(arrow) or pa.types.is_binary(arrow)
    return not (without or pa.types.is_time(arrow) or pa.types.is_duration(arrow))


def partition_folder(column: str, value: str | None) -> str:
    """`column=value`; every character but letters, digits and _.-~ is written as %XX, so that no value leaves the folder.

    Null has Hive's name for it; the empty text is a folder `column=`, which readers distinguish from null.
    """
    text = HIVE_NULL if value is None else urllib.parse.quote(value, safe="")
    return f"{urllib.parse.quote(column, safe='')}={text}"


@dataclass
class _Roller:
    """Writes rows of one folder to files of `file_rows` rows, in row groups of a fixed size: bytes depend on rows only."""

    place: Place
    folder: str
    layout: Layout
    scratch: Path
    _entries: list[FileEntry] = field(default_factory=list)
    _waiting: list[pa.Table] = field(default_factory=list)
    _writer: pq.ParquetWriter | None = None
    _written: int = 0

    def add(self, table: pa.Table) -> None:
        """Add rows; whole row groups are written at once."""
        self._waiting.append(table)
        while sum(piece.num_rows for piece in self._waiting) >= self._room():
            self._write_group(self._room())

    def _room(self) -> int:
        """Rows of the next row group."""
        group = ROW_GROUP if self.layout.partition is None else PARTITION_ROW_GROUP
        return min(group, self.layout.file_rows - self._written) if self.layout.file_rows else group

    def _write_group(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting).unify_dictionaries()
        group, rest = table.slice(0, rows).combine_chunks(), table.slice(rows)
        self._waiting = [rest] if rest.num_rows else []
        with storage.disk_errors(self.scratch):
            if self._writer is None:
                storage.make_folder(self.scratch.parent)
                self._writer = pq.ParquetWriter(
                    self.scratch,
                    table.schema,
                    compression="zstd",
                    compression_level=self.layout.level,
                    write_page_checksum=True,
                    use_dictionary=[item.name for item in table.schema if item.name != "row_id"],
                )
            self._writer.write_table(group)
        self._written += group.num_rows
        if self.layout.file_rows and self._written == self.layout.file_rows:
            self._finish()

    def _finish(self) -> None:
        if self._writer is not None:
            with storage.disk_errors(self.scratch):
                self._writer.close()
            sha256 = digest.of_file(self.scratch)
            self._entries.append(_put(self.place, self.folder, len(self._entries), self.scratch, self._written, sha256))
            self.scratch.unlink()
            self._writer, self._written = None, 0

    def close(self) -> list[FileEntry]:
        """Write the remaining rows; return the entries of all files."""
        left = sum(piece.num_rows for piece in self._waiting)
        if left:
            self._write_group(left)
        self._finish()
        return self._entries


def _put(place: Place, folder: str, index: int, path: Path, rows: int, sha256: str) -> FileEntry:
    name = f"part-{index:05d}-{sha256[:8]}.parquet"
    name = f"{folder}/{name}" if folder else name
    place.stage(path, name)
    return {"name": name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256}
