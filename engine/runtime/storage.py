"""Files and folders: atomic writes and removal, locks, permissions, disk errors, and paths that stay below their root."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import urllib.parse
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.config import nested
from engine.config.sections.runtime import is_address
from engine.errors import UserError
from engine.runtime import terminal


def inside(root: Path, *parts: str) -> Path:
    """`root/parts...`, which must resolve (symbolic links too) to a place inside `root`. Opens nothing.

    Raises UserError.
    """
    for part in parts:
        if not part or "\0" in part or Path(part).is_absolute() or ".." in Path(part).parts:
            raise UserError(f"a path must stay inside {root}, found {part!r}")
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"a path must stay inside {root}, found {path} which leads to {path.resolve()}")
    return path


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist. Raises UserError if that is impossible."""
    if is_address(str(path)):
        raise UserError(
            f"{path} must be a path of a file system, found an address: only `score.output` may be s3://. Write to a folder "
            "and copy from there"
        )
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL):
                raise
            raise UserError(
                f"{path} must be a folder that can be created: {error.strerror} ({error.filename}). "
                "Choose another place with paths.runs or paths.store"
            ) from None


PRIVATE = 0o077  # umask that removes all permissions of the group and of others


@contextlib.contextmanager
def kept_from_others(mode: str, sensitive: Collection[str]) -> Iterator[None]:
    """Files created in the block, by this process and its children, are private if `paths.mode` requires it."""
    before = umask()
    try:
        keep_from_others(mode, sensitive)
        yield
    finally:
        os.umask(before)


def keep_from_others(mode: str, sensitive: Collection[str]) -> None:
    """The same from now on, for a process that learns only from a model that columns are sensitive."""
    if mode == "private" or (mode == "auto" and sensitive):
        os.umask(os.umask(PRIVATE) | PRIVATE)


def umask() -> int:
    """The umask of the process."""
    found = os.umask(PRIVATE)
    os.umask(found)
    return found


def is_private() -> bool:
    """Whether new files are private to the user."""
    return umask() & PRIVATE == PRIVATE


def is_closed(directory: Path) -> bool:
    """Whether a folder exists and is private to the user."""
    return directory.is_dir() and not directory.stat().st_mode & PRIVATE


def take_from_others(directory: Path) -> None:
    """Make a folder and all files below it private to the user."""
    for path in (directory, *directory.rglob("*")):
        with contextlib.suppress(OSError):  # it was removed, or it belongs to another user
            if not path.is_symlink() and path.stat().st_mode & PRIVATE:
                path.chmod(path.stat().st_mode & ~PRIVATE)


@contextlib.contextmanager
def atomic_path(path: Path, synced: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success it is synced (if `synced`) and renamed, else removed."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            if synced:
                sync(temporary)
            os.replace(temporary, path)
            if synced:
                sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on success it is renamed to `path` unless that exists already.

    It is locked while it is written: leftovers of killed processes, which are not locked, are removed first.
    """
    make_folder(path.parent)
    for leftover in path.parent.glob(".*.tmp"):
        with _abandoned(leftover) as gone:
            if gone:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary, lock = _locked_folder(path)
    try:
        with disk_errors(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_dir() or file.stat().st_nlink == 1:  # a hard link was synced under its first name
                    sync(file)
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.exists():
                    raise
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def temporary_name(path: Path) -> Path:
    """A unique hidden name beside `path` that contains the machine's id."""
    return path.with_name(f".{path.name}.{_machine()}-{uuid.uuid4().hex[:8]}.tmp")


@functools.cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder beside `path`, and the descriptor that holds its lock."""
    while True:
        temporary = temporary_name(path)
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # removed as abandoned before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks, or as above
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether a folder has a temporary name of this machine and no process holds its lock, so that its writer has died."""
    with _abandoned(path) as gone:
        return gone


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """The same, with the lock held during the block, so that no process writes to the folder."""
    descriptor = _lock_left_alone(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_left_alone(path: Path) -> int | None:
    if not re.search(rf"^\..*\.{_machine()}-[0-9a-f]{{8}}\.tmp$", path.name):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


REMOVED = ".removed-"


def remove(directory: Path, root: Path) -> None:
    """Remove a folder below `root` so that a kill at any point leaves it complete or gone: it is first renamed to a hidden
    folder in `root`, which readers ignore and the next `purge(root)` removes.
    """
    aside = root / f"{REMOVED}{uuid.uuid4().hex[:8]}"
    with disk_errors(directory):
        os.rename(directory, aside)
        for folder in (directory.parent, root):
            sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def purge(root: Path) -> None:
    """Remove leftovers of a killed `remove`."""
    for leftover in root.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Files or folders by the time of their last change; those that another process removes meanwhile are left out."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def bytes_of(directories: Iterable[Path]) -> int:
    """Bytes on disk of all files below some folders; a file with several hard links counts once."""
    files = [path.lstat() for directory in directories for path in directory.rglob("*") if path.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
BROKEN = (errno.EIO, errno.ENXIO, errno.ESTALE, errno.EFBIG, errno.ENOTSUP)
UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # errors of a file system without such a call
_unsynced: set[int] = set()  # devices with a warning so far
_ARROW = re.compile(r"\[[Ee]rrno (\d+)\]")  # some Arrow errors have their number in the text only


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a disk or file system (full, denied, broken, too large) into a UserError that names the file of the
    error, or `path`.
    """
    try:
        yield
    except OSError as error:
        found = _ARROW.search(str(error))
        number = error.errno or (int(found[1]) if found else 0)
        named = str(error.filename or "")
        place = path if not named or named.endswith(".tmp") else named
        if number in FULL or "No space left" in str(error):
            raise UserError(
                f"the disk that holds {place} is full; free some space and run the command again"
            ) from error
        if number in DENIED:
            raise UserError(f"{place} cannot be written: {os.strerror(number)}") from error
        if number in BROKEN:
            raise UserError(
                f"{place} cannot be read or written: {os.strerror(number)} ({errno.errorcode[number]}). Check the disk and "
                "its file system, or choose another place, and run the command again"
            ) from error
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to disk. On a file system that cannot sync a folder there is a warning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            terminal.err(
                f"warning: {path} cannot be synced ({error.strerror}): a power cut may lose what was just written\n"
            )
    finally:
        os.close(descriptor)


def lock(file: IO[str] | int, path: Path, wait: bool = True) -> bool:
    """Lock an open file or folder until it is closed; False if another process holds the lock and `wait` is false.

    Raises UserError if the file system of `path` has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        raise UserError(
            f"{path} must be on a file system with locks (flock), so that two processes never write at once, but locking "
            f"failed: {os.strerror(error.errno)}. Mount it with locks, or choose another place with paths.runs or paths.store"
        ) from error
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; False if the system cannot. An empty `second` is only replaced."""
    if not any(second.iterdir()):
        os.replace(first, second)
        return True
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux only
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def link(source: Path | str, path: Path | str, synced: bool = True) -> None:
    """Make `path` a hard link to `source`, or a copy if that is impossible; replaces `path` atomically."""
    with atomic_path(Path(path), synced) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(source, temporary)


def finite(value: Any, digits: int | None = None) -> Any:
    """A value ready for JSON: NumPy's as Python's, None for a number that JSON does not have (NaN, infinity), floats to
    `digits` significant digits.
    """

    def leaf(_: str, item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return finite(item.tolist(), digits)
        item = item.item() if isinstance(item, np.generic) else item
        if not isinstance(item, float):
            return item
        return None if not math.isfinite(item) else float(f"{item:.{digits}g}") if digits else item

    return nested.mapped(value, leaf)


def write_text(path: Path, text: str, synced: bool = True) -> None:
    """Write a text file atomically; if not `synced`, a crash of the machine may lose or truncate it."""
    with atomic_path(path, synced) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, synced: bool = True) -> None:
    """Write JSON atomically, keys in the given order. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", synced)


def write_parquet(path: Path, table: pa.Table, synced: bool = True, **options: Any) -> None:
    """Write one Parquet file atomically (zstd, page checksums); if not `synced`, the caller syncs it."""
    settings = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True, **options}
    # Opened here, because a file that Arrow opens itself stays open when the disk is full.
    with atomic_path(path, synced) as temporary, pa.OSFile(str(temporary), "wb") as file:
        pq.write_table(table, file, **settings)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, page checksums verified."""
    return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)


def object_store(endpoint: str | None = None, region: str | None = None) -> Any:
    """pyarrow's file system of an s3:// service; credentials come from the usual chain, never from a config."""
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    if region:
        options["region"] = region
    if endpoint:
        address = urllib.parse.urlsplit(endpoint)
        options.update(scheme=address.scheme or "https", endpoint_override=address.netloc or address.path)
    return pafs.S3FileSystem(**options)
