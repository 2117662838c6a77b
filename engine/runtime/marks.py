"""Marks: digests of code and remote places that were used with this store before, and so may be used again.

A mark is a file `<store>/<folder>/<digest>.json` with its own checksum; a damaged one is ignored, and rewritten by the next run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from engine.errors import UserError
from engine.runtime import records, seal, storage

FORMAT = 2
CHECKED = 2  # from this format on a mark has a checksum and its digest


class MarkRecord(TypedDict):
    """One mark."""

    format: records.Count
    digest: NotRequired[records.Digest]


def put(store: Path, folder: str, digest: str, **facts: Any) -> None:
    """Mark a digest (hex SHA-256), with facts for readers of the file."""
    if not has(store, folder, digest):
        storage.write_json(_path(store, folder, digest), seal.checked({"format": FORMAT, "digest": digest, **facts}))


def has(store: Path, folder: str, digest: str) -> bool:
    """Whether a digest is marked."""
    path = _path(store, folder, digest)
    try:
        check(path)
    except UserError:
        return False
    return True


def check(path: Path) -> None:
    """Raise UserError unless a file is an undamaged mark under its own name."""
    found = seal.read_checked(path, MarkRecord, CHECKED)
    if found.get("digest", path.stem) != path.stem:
        raise records.Damaged(f"{path} is damaged: it is the mark of {found['digest']}")


def _path(store: Path, folder: str, digest: str) -> Path:
    return storage.inside(store, folder, f"{digest}.json")
