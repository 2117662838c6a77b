"""`engine data gc`: find and remove datasets of the store that no run uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from engine.config.tree import Config
from engine.data.dataset import LATEST, MANIFEST
from engine.errors import UserError
from engine.runtime import records, storage, terminal
from engine.runtime.run import facts_of_runs

KEEP_RECENT = 24 * 3600  # seconds: a starting run may be about to use a recent dataset
INGEST = "an ingest is at work here"


class Named(TypedDict):
    """The keys of run.json that are read here. A damaged one stops the clean-up, since its run may use any dataset."""

    chain: NotRequired[dict[str, str]]
    outputs: NotRequired[dict[str, str]]
    used: NotRequired[dict[str, str]]


class Content(TypedDict):
    """The keys of a dataset's manifest that are read here."""

    digest: NotRequired[str]


class Latest(TypedDict):
    """latest.json of a name."""

    entry: str


def gc(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`data gc [--delete] [--json]`: list datasets with the reason to keep each; remove the others. Raises UserError."""
    if words:
        raise UserError(f"data gc takes options only, found {words[0]!r}")
    delete = "--delete" in options
    root = storage.inside(Path(config.paths.store), "datasets")
    if delete:
        storage.purge(root)
    used = users(config)
    rows: list[dict[str, object]] = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir() and path.name[0] != "."):
        with _lock(folder) as free:
            for directory in sorted(path for path in folder.iterdir() if path.is_dir() and _may_go(path)):
                size = storage.bytes_of([directory])
                reason = kept(directory, used) or (None if free else INGEST)
                if delete and reason is None:
                    storage.remove(directory, root)
                told = {"dataset": folder.name, "entry": directory.name, "bytes": size, "kept": reason}
                rows.append({**told, "directory": str(directory)})
    terminal.collected(rows, "datasets", delete, "--json" in options, f"no datasets in {root}")
    return 0


def users(config: Config) -> dict[str, list[str]]:
    """Digest -> runs that made or took the dataset, those that backtests keep in the store among them."""
    found: dict[str, list[str]] = {}
    for directory, record in facts_of_runs(config, Named):
        named = [record.get("chain", {}).get("dataset"), record.get("outputs", {}).get("dataset")]
        for digest in {*named, *record.get("used", {}).values()} - {None}:
            found.setdefault(str(digest), []).append("/".join(directory.parts[-3:]))
    return found


def kept(directory: Path, used: dict[str, list[str]]) -> str | None:
    """Why a dataset stays; None where it may go."""
    manifest, latest = directory / MANIFEST, directory.parent / LATEST
    if latest.exists() and records.read(latest, Latest)["entry"] == directory.name:
        return "the newest of its name"
    digest = records.read(manifest, Content).get("digest", "") if manifest.exists() else ""
    if digest in used:
        more = f" and {len(used[digest]) - 1} more" if len(used[digest]) > 1 else ""
        return f"named by {used[digest][-1]}{more}"
    if time.time() - directory.stat().st_mtime < KEEP_RECENT:
        return "younger than a day"
    return None


def _may_go(path: Path) -> bool:
    """Datasets, and what a killed ingest has left half-written; not the copies of files that the next ingest reads."""
    return path.name[0] != "." or path.name.endswith(".tmp")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """The lock of the name's ingests; False where one is at work."""
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        yield storage.lock(file, folder, wait=False)
