"""Marks: what this machine's store has seen before and so may be used again, one small file a digest.

`<store>/<folder>/<digest>.json` checks itself; a damaged one counts as none, and is written again by the next run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from engine.errors import UserError
from engine.runtime import records, seal, storage

FORMAT = 2
CHECKED = 2  # a mark checks itself and holds its digest from this format on


class MarkRecord(TypedDict):
    """One mark."""

    format: records.Count
    digest: NotRequired[records.Digest]


def put(store: Path, folder: str, digest: str, **facts: Any) -> None:
    """Mark a digest (hex SHA-256), with facts for those who read the file."""
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
    """Raise UserError unless a file is a mark as it was written, under its own name."""
    found = seal.read_checked(path, MarkRecord, CHECKED)
    if found.get("digest", path.stem) != path.stem:
        raise records.Damaged(f"{path} is damaged: it is the mark of {found['digest']}")


def _path(store: Path, folder: str, digest: str) -> Path:
    return storage.inside(store, folder, f"{digest}.json")
