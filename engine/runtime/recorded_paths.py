"""Paths of a recorded run: its store and dataset. Paths in a record are relative to the folder of its command."""

from __future__ import annotations

import contextlib
from pathlib import Path

from engine.errors import UserError
from engine.runtime import records
from engine.runtime.run import RunRecord


def recorded_path(record: RunRecord, path: str) -> Path:
    """A path of the record, absolute."""
    return Path(str(record.get("folder") or ".")) / Path(path).expanduser()


def store_of(record: RunRecord) -> Path:
    """The store that the run used."""
    return recorded_path(record, str((record.get("config") or {}).get("paths", {}).get("store", "store")))


def dataset_folder(record: RunRecord) -> Path | None:
    """The run's dataset in its store, found by content digest; None if it was removed."""
    config = record.get("config") or {}
    name = config.get("data", {}).get("name") or config.get("name")
    wanted = (record.get("chain") or {}).get("dataset")
    for path in sorted((store_of(record) / "datasets" / str(name)).glob("*/manifest.json")) if wanted else []:
        with contextlib.suppress(UserError):
            if records.read(path, dict).get("digest") == wanted:
                return path.parent
    return None
