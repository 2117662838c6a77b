"""Which code of a recorded run may run again here.

A run directory can come from anywhere, and to run its code again is to run what it brings. So each run leaves the digest of
its engine in the store (`store/code/<digest>.json`): code that this store has recorded runs again without a word. Other
code needs `trust=<digest>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtime import storage

FOLDER = "code"
FORMAT = 1


def record(store: Path, code: Mapping[str, Any]) -> None:
    """Keep the digest of the engine that runs now (`environment.code()`) in the store."""
    path = _place(store, code["engine_digest"])
    if not path.exists():
        facts = {"format": FORMAT, "engine_version": code["engine_version"], "engine_git": code["engine_git"]}
        storage.write_json(path, facts)


def is_recorded(store: Path, digest: str) -> bool:
    """Whether an engine of this digest (hex SHA-256) has made a run with this store."""
    return _place(store, digest).is_file()


def check(store: Path, digest: str, trusted: str | None, what: str) -> None:
    """Refuse code that this store has not recorded and that `trusted` does not name; `what` describes it.

    Raises UserError.
    """
    if trusted != digest and not is_recorded(store, digest):
        raise UserError(
            f"code must have run with the store {store} before it runs again, found code that it does not know:\n{what}\n"
            f"Read that code. To run it, add trust={digest}"
        )


def _place(store: Path, digest: str) -> Path:
    return storage.inside(store, FOLDER, f"{digest}.json")
