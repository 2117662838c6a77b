"""The files of a source: paths, globs, folders, hive partitions, files of packages, object stores.

The result is local paths or byte streams; a compressed file is decompressed as a stream.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import fnmatch
import gzip
import importlib.util
import io
import lzma
import os
import re
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from engine.config import schema
from engine.config.sections.data import FORMATS, DataConfig, SourceConfig
from engine.errors import UserError, nearest
from engine.runtime import digest, seal, storage
from engine.runtime.remote import address

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
HIDDEN = (".", "_")
# Errors of the libraries for a damaged, truncated or encrypted archive, or an unknown compression method.
BROKEN = (EOFError, OSError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
COMPRESSIONS = (".gz", ".zst", ".zip", ".bz2", ".xz", ".lz4")
SUFFIXES = {suffix: name for name, form in FORMATS.items() for suffix in form.suffixes}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source: its path, its name in messages, its digest and its partition values."""

    source: str
    path: Path
    shown: str
    format: str
    digest: str
    size: int
    partitions: dict[str, str | None]

    @property
    def identity(self) -> list[Any]:
        """The file's part of a recipe: its content and its partition values, not its name."""
        return [self.digest, sorted(self.partitions.items())]


def event_source(data: DataConfig) -> str:
    """The source that is the event table if there is no query. Raises UserError if that is ambiguous."""
    if data.name in data.sources:
        return data.name
    rest = [name for name in data.sources if name not in data.tables]
    if len(rest) != 1:
        raise UserError(f"data.query must select the events from the sources {', '.join(data.sources)}")
    return rest[0]


def source_files(name: str, source: SourceConfig, data: DataConfig, cache: Path) -> list[SourceFile]:
    """The files of a source in canonical order (by content, then name). Raises UserError if there are none.

    `cache` is a folder for copies of remote objects.
    """
    if (place := address(source.path, data.path)).startswith("s3://"):
        found = _fetch(dataclasses.replace(source, path=place), cache)
    else:
        found = [(path, str(path), _partitions(path) if source.hive else {}) for path in _local(name, source, data)]
    files = []
    for path, shown, partitions in found:
        with_errors = _stat(name, path)
        files.append(
            SourceFile(
                name, path, shown, _format(name, source, path), digest.of_file(path), with_errors.st_size, partitions
            )
        )
    return sorted(files, key=lambda file: (file.identity, file.shown))


def _stat(name: str, path: Path) -> os.stat_result:
    try:
        status = path.stat()
        with open(path, "rb"):
            return status
    except OSError as error:
        raise UserError(f"data.sources.{name}: {path} cannot be read: {error.strerror}") from None


def resolve(path: str, root: str) -> Path:
    """The local path of `pkg://package/path/in/it`, or of a path relative to `root`. Raises UserError."""
    path = address(path, root)
    if path.startswith("pkg://"):
        package, _, inner = path.removeprefix("pkg://").partition("/")
        try:
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{path} names package {package!r}, which is not installed: pip install {package}")
        return storage.inside(Path(next(iter(spec.submodule_search_locations))), *PurePosixPath(inner).parts)
    if "://" in path:
        raise UserError(f"a source path must be a path, pkg:// or s3://, found {path!r}")
    return Path(root).expanduser() / Path(path).expanduser()


def _local(name: str, source: SourceConfig, data: DataConfig) -> list[Path]:
    """The files of a local source: a file, those below a folder, or those that match a pattern."""
    target = resolve(source.path, data.path)
    if target.is_file():
        return [target]
    fixed, pattern = _cut_pattern(address(source.path, data.path))
    if target.is_dir():
        fixed, pattern = source.path, ["**"]
    elif not pattern:
        hint = "" if data.path else " Relative paths start at data.path, which is not set."
        raise UserError(f"data.sources.{name}: {target} must exist, found nothing.{_neighbour(target)}{hint}")
    folder = resolve(fixed, data.path)
    try:
        found = _below(folder, pattern) if folder.is_dir() else ()
        files = [path for path in found if path.is_file() or not path.exists()]  # a link to nothing is an error later
    except OSError as error:
        raise UserError(f"data.sources.{name}: {error.filename} cannot be read: {error.strerror}") from None
    if files:
        return files
    if target.is_dir():
        raise UserError(f"data.sources.{name}: folder {target} must hold files, found none")
    raise UserError(
        f"data.sources.{name}: {target} must match files, found none. "
        f"Check data.path and data.sources.{name}.path ({source.path})"
    )


def _neighbour(target: Path) -> str:
    if not target.parent.is_dir():
        return ""
    names = [path.name for path in target.parent.iterdir()][:1000]
    hint = nearest(target.name, names)
    return hint if "Did you mean" in hint else ""


def _cut_pattern(path: str) -> tuple[str, list[str]]:
    """(folder, parts of the pattern below it) of a path; no parts if it has no glob characters."""
    found = re.search(r"[*?[]", path)
    start = path.rfind("/", 0, found.start()) + 1 if found else len(path)
    return path[:start], [part for part in path[start:].split("/") if part]


def _matches(parts: Sequence[str], pattern: Sequence[str], partly: bool = False) -> bool:
    """Whether a path matches a glob, part by part (`partly`: or may match with more parts); `**` is any number of folders.

    Names with `.` or `_` in front (unfinished output of Spark, marks such as _SUCCESS) only match a part with it in front.
    """
    if not parts:
        return partly or all(part == "**" for part in pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        below = not parts[0].startswith(HIDDEN) and _matches(parts[1:], pattern, partly)
        return below or _matches(parts, pattern[1:], partly)
    named = pattern[0].startswith(HIDDEN) or not parts[0].startswith(HIDDEN)
    return named and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:], partly)


def _below(folder: Path, pattern: list[str]) -> Iterator[Path]:
    """Files that match. Links to folders are followed, except in cycles. Raises OSError."""

    def raise_(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=raise_, followlinks=True):
        parts = Path(here).relative_to(folder).parts
        folders[:] = [
            name for name in folders if _matches([*parts, name], pattern, True) and not _is_circle(Path(here), name)
        ]
        yield from (Path(here, name) for name in names if _matches([*parts, name], pattern))


def _is_circle(folder: Path, name: str) -> bool:
    """Whether a folder is a link to one of the folders above it."""
    path = folder / name
    return path.is_symlink() and any(above.resolve().is_relative_to(path.resolve()) for above in path.parents)


def _partitions(path: PurePath) -> dict[str, str | None]:
    """key=value folders above the file, values as text."""
    found: dict[str, str | None] = {}
    for part in path.parts[:-1]:
        key, equals, value = part.partition("=")
        if equals:
            text = urllib.parse.unquote(value)
            found[urllib.parse.unquote(key)] = None if text == HIVE_NULL else text
    return found


def _format(name: str, source: SourceConfig, path: Path) -> str:
    if source.format != "auto":
        return source.format
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if suffixes and suffixes[-1] in SUFFIXES:
        return SUFFIXES[suffixes[-1]]
    word = f"data.sources.{name}.format={likely_format(path)}"
    raise UserError(f"{path}: the format cannot be told from the name; by its first bytes, set {word}")


def likely_format(path: Path) -> str:
    """The format of a file by its first bytes."""
    with open_bytes(path) as stream:
        head = stream.read(8)
    if head.startswith((b"PAR1", b"ARROW1")):
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    return "jsonl" if head.lstrip().startswith(b"{") else "csv"


# -------------------------------------------------------------------------------------------------- object stores


def _fetch(source: SourceConfig, cache: Path) -> list[tuple[Path, str, dict[str, str | None]]]:
    """Copies of the objects under an s3:// path, one folder per object version."""
    bucket_key = source.path.removeprefix("s3://").rstrip("/")
    if ".." in PurePosixPath(bucket_key).parts:
        raise UserError(f"an s3:// path must not contain .., found {source.path!r}")
    filesystem = storage.object_store(source.endpoint, source.region)
    try:
        infos = _objects(filesystem, bucket_key)
        return [_copy(filesystem, info, source, cache) for info in infos]
    except OSError as error:
        raise UserError(f"{source.path} cannot be read: {str(error).splitlines()[0]}") from None


def _objects(filesystem: Any, bucket_key: str) -> list[Any]:
    info = filesystem.get_file_info(bucket_key)
    if info.type == pafs.FileType.File:
        return [info]
    folder, pattern = _cut_pattern(bucket_key)
    if info.type == pafs.FileType.Directory or not pattern:
        folder, pattern = bucket_key, ["**"]
    folder = folder.rstrip("/")
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    files = [
        item
        for item in infos
        if item.type == pafs.FileType.File and _matches(PurePosixPath(item.path).relative_to(folder).parts, pattern)
    ]
    if not files:
        raise UserError(f"s3://{bucket_key} must hold objects, found none")
    return sorted(files, key=lambda item: item.path)


def _copy(filesystem: Any, info: Any, source: SourceConfig, cache: Path) -> tuple[Path, str, dict[str, str | None]]:
    version = digest.of_json([source.endpoint, info.path, info.size, str(info.mtime_ns)])[:16]
    target = cache / version / PurePosixPath(info.path).name
    if not _is_whole(target):
        with storage.atomic_path(target) as temporary, open(temporary, "wb") as file:
            with filesystem.open_input_stream(info.path) as stream:
                while block := stream.read(digest.CHUNK):
                    file.write(block)
        seal.write(target.parent)
    partitions = _partitions(PurePosixPath(info.path)) if source.hive else {}
    return target, f"s3://{info.path}", partitions


def _is_whole(copy: Path) -> bool:
    try:
        return seal.read(copy.parent).holds(copy.parent, copy.name)
    except UserError:  # missing or damaged: it is fetched again
        return False


# ------------------------------------------------------------------------------------------------------- streams


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.suffix.lower() in COMPRESSIONS


class Torn(UserError):
    """An archive that cannot be unpacked."""


@contextlib.contextmanager
def unpacking(shown: str) -> Iterator[None]:
    """Turn errors of the libraries for a broken archive into a Torn with the name `shown`."""
    try:
        yield
    except UserError:
        raise
    except BROKEN as error:
        raise Torn(f"{shown} cannot be unpacked: {error}") from None


def open_bytes(path: Path) -> BinaryIO:
    """Uncompressed bytes of a file as a stream; a .zip must hold exactly one file. Raises UserError."""
    with unpacking(str(path)):
        return _open(path, path.suffix.lower())


def unpacked(path: Path, memory: int) -> pa.BufferReader:
    """A compressed file, decompressed in memory. Raises UserError if it does not fit into half of `memory`."""
    with unpacking(str(path)), open_bytes(path) as stream:
        whole = stream.read(memory // 2 + 1)
    if len(whole) > memory // 2:
        raise UserError(
            f"{path} must be unpacked in memory, but holds more than {memory // 2:,} bytes, half of resources.memory: "
            "unpack the file, which can then be read piece by piece, or allow more memory"
        )
    return pa.BufferReader(whole)


def _open(path: Path, suffix: str) -> BinaryIO:
    if suffix == ".zip":
        archive = zipfile.ZipFile(path)
        members = [
            item for item in archive.infolist() if not item.is_dir() and not item.filename.startswith("__MACOSX/")
        ]
        if len(members) != 1:
            raise Torn(f"{path} must hold exactly one file, found {len(members)}: {[m.filename for m in members[:5]]}")
        return archive.open(members[0])  # type: ignore[return-value]
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if suffix in (".zst", ".lz4"):
        codec = "zstd" if suffix == ".zst" else "lz4"
        return pa.CompressedInputStream(pa.OSFile(str(path)), codec)  # type: ignore[return-value]
    return open(path, "rb")


def likely_encoding(data: bytes) -> str:
    """The likely encoding of a text from its first bytes: by its mark, its zero bytes, or a trial of decoding."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return name
    if len(data) > 1 and 0 in data[:2]:
        return "utf-16-be" if data[0] == 0 else "utf-16-le"
    for name in ("utf-8", "cp1252"):
        try:
            codecs.getincrementaldecoder(name)().decode(data)  # a letter may be cut at the end
            return name
        except UnicodeDecodeError:
            pass
    return "latin-1"


_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_advice(file: SourceFile) -> str:
    """The encoding that a file's text seems to have, as a word of a command line."""
    with open_bytes(file.path) as stream:
        return schema.word(f"data.sources.{file.source}.csv.encoding", likely_encoding(stream.read(1 << 16)))


SKIP = "; to leave such files out, set data.sources.{}.refused=skip"


def skip_advice(file: SourceFile) -> str:
    """How to go on without files that cannot be read."""
    return SKIP.format(file.source)


def refuse_utf16(head: bytes, file: SourceFile) -> None:
    """Raises UserError where a text that is to be UTF-8 begins as UTF-16 does."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{file.shown} is UTF-16 text: set {encoding_advice(file)}")
    if b"\0" in head[:2]:
        raise UserError(f"{file.shown} seems to be UTF-16 text without a mark: set {encoding_advice(file)}")


def recode(stream: BinaryIO, encoding: str, file: SourceFile) -> BinaryIO:
    """The stream as UTF-8; a byte sequence that is not valid in `encoding` is a UserError with its position."""
    return io.BufferedReader(_Recoder(stream, encoding, file), 1 << 20)  # type: ignore[arg-type]


class _Recoder(io.RawIOBase):
    """Reads text in one encoding, gives its UTF-8 bytes."""

    def __init__(self, stream: BinaryIO, encoding: str, file: SourceFile) -> None:
        try:
            self._decoder = codecs.getincrementaldecoder(encoding)()
        except LookupError:
            raise UserError(
                f"unknown text encoding {encoding!r}; known are utf-8, utf-16, latin-1, cp1252, ...: set {encoding_advice(file)}"
            ) from None
        self._stream, self._encoding, self._file = stream, encoding, file
        self._position, self._pending = 0, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._stream.read(1 << 20)
            try:
                self._pending = self._decoder.decode(block, final=not block).encode("utf-8")
            except UnicodeError as error:  # utf-16 without a mark is no UnicodeDecodeError
                found = str(error)
                if isinstance(error, UnicodeDecodeError):
                    place = self._position + error.start
                    found = f"found byte 0x{error.object[error.start]:02x} near byte {place}"
                raise UserError(
                    f"{self._file.shown} must be {self._encoding} text, {found}: set {encoding_advice(self._file)}"
                ) from None
            self._position += len(block)
            if not block:
                break
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
