"""A folder's seal: the size and SHA-256 of each of its files, written last and compared before a file is used.

`seal.json` has a checksum of its content (`check`), so that a change of any byte is noticed. Hashing a file costs about as
much as reading it from the page cache, and is done once per process while the file does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from engine.errors import UserError
from engine.runtime import digest, records, storage

T = TypeVar("T", bound=Mapping[str, Any])
NAME = "seal.json"
FORMAT = 1


class FileRecord(TypedDict):
    """One sealed file."""

    bytes: records.Count
    sha256: records.Digest


class SealRecord(TypedDict):
    """seal.json."""

    format: Annotated[int, records.Format(FORMAT)]
    files: dict[str, FileRecord]
    check: records.Digest


@dataclass(frozen=True)
class Seal:
    """Sizes and digests of a folder's files when it was finished."""

    files: Mapping[str, FileRecord]

    def check(self, folder: Path, name: str, remedy: str) -> Path:
        """The path of a file, after a check against the seal. Raises Damaged with the remedy."""
        path = storage.inside(folder, *Path(name).parts)
        if not path.is_file():
            raise records.Damaged(f"{path} is damaged (it must exist, found nothing). {remedy}")
        if not self.holds(folder, name):
            raise records.Damaged(
                f"{path} is damaged (its digest differs from that of the file that was written). {remedy}"
            )
        return path

    def holds(self, folder: Path, name: str) -> bool:
        """Whether a file exists with its sealed size and digest."""
        entry = self.files.get(name)
        return entry is not None and is_whole(folder / name, entry)

    def damaged(self, folder: Path) -> Iterator[str]:
        """Names of the files that differ from the seal."""
        return (name for name in self.files if not self.holds(folder, name))


def is_whole(path: Path, entry: FileRecord) -> bool:
    """Whether a file has its recorded size and SHA-256."""
    try:
        return path.stat().st_size == entry["bytes"] and digest.of_file(path) == entry["sha256"]
    except OSError:
        return False


def record_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it is now."""
    return {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}


def checked(body: T) -> T:
    """A record with the digest of its other keys as `check`."""
    return {**body, "check": digest.of_json(body)}  # type: ignore[dict-item, return-value]


def read_checked(path: Path, shape: type[T], since: int = 0) -> T:
    """A record that was written with `checked`, without its `check`. Raises Damaged if a byte of it has changed.

    Records of formats before `since` have no `check` and are returned without a comparison.
    """
    record = records.read(path, shape)
    if "check" not in record and record.get("format", since) < since:
        return record
    return verify(record, str(path))


def verify(record: T, where: str) -> T:
    """A record without its `check`, which must be the digest of the rest. Raises Damaged."""
    body = {name: value for name, value in record.items() if name != "check"}
    if record.get("check") != digest.of_json(body):
        raise records.Damaged(f"{where} is damaged: its digest is not that of its content")
    return body  # type: ignore[return-value]


def write(
    folder: Path, known: Mapping[str, FileRecord] | None = None, leave_out: Sequence[str] = (), synced: bool = True
) -> Seal:
    """Seal all files below a folder except hidden ones and those whose first part is in `leave_out`.

    `known`: files whose record is already computed. If not `synced`, the caller syncs the folder.
    """
    files: dict[str, FileRecord] = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        parts = path.relative_to(folder).parts
        hidden = parts[0] in leave_out or any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and name != NAME and name not in files:
            files[name] = record_of(path)
    storage.write_json(folder / NAME, checked({"format": FORMAT, "files": dict(sorted(files.items()))}), synced)
    return Seal(files)


def read(folder: Path) -> Seal:
    """The seal of a folder. Raises UserError if there is none, Damaged if it was changed."""
    if not (folder / NAME).exists():
        raise UserError(f"{folder} has no {NAME}: it was written by an older engine, or writing was interrupted")
    return Seal(read_checked(folder / NAME, SealRecord)["files"])


def sealed(folder: Path, name: str, remedy: str) -> Path:
    """The path of a file, after a check against the folder's seal if it has one.

    Raises Damaged with the remedy, UserError for a name or a link that leads out of the folder.
    """
    if not (folder / NAME).exists():
        return storage.inside(folder, *Path(name).parts)
    return read(folder).check(folder, name, remedy)
