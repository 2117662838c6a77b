"""Source files over the workers of a Ray cluster: a worker stages whole files in the store, where the driver finds them.

A staged file depends on the file and the schema alone, so it does not matter who made it. Rows travel in files only.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config.tree import Config, DataConfig
from engine.data import stage
from engine.data.files import SourceFile
from engine.data.policy import Tally
from engine.data.stage import Staged
from engine.errors import UserError
from engine.runtime import cluster, digest, pool, storage


def stage_files(config: Config, files: list[SourceFile], folder: Path, advance: Callable[[int], None]) -> list[Staged]:
    """The files, staged in `folder` by `cluster.workers` Ray actors, in the given order.

    Raises UserError where a policy says so, where a node does not see the same files, and where workers keep dying.
    """
    replies: dict[int, dict[str, Any]] = {}
    marks = folder.with_name(f".tries.{uuid.uuid4().hex[:8]}.tmp")
    storage.make_folder(marks)
    storage.make_folder(folder)
    try:
        with cluster.session(config) as session:
            cluster.check_shared(session, [folder])
            actors = pool.Actors(
                config.cluster.workers,
                cpus=1 if session.local else max(1, config.cluster.threads),
                patience=cluster.timeout_seconds(config),
            )
            make = functools.partial(_worker, config.data, folder.absolute())
            items = [_plain(place, file) for place, file in enumerate(files)]
            for outcome in pool.run_actors(make, items, actors, config.cluster.retries + 1, marks.absolute()):
                file = files[outcome.item["place"]]
                if outcome.result is None:
                    raise UserError(f"{file.shown} could not be read in {outcome.tries} tries: {outcome.cause}")
                if outcome.result["error"]:
                    raise UserError(outcome.result["error"])
                replies[outcome.item["place"]] = outcome.result
                advance(outcome.result["rows"])
    finally:
        shutil.rmtree(marks, ignore_errors=True)
    return [_collect(file, config.data, folder, replies[place]["refused"]) for place, file in enumerate(files)]


def _plain(place: int, file: SourceFile) -> dict[str, Any]:
    """The file as JSON values; workers do not share the driver's current folder."""
    return {"place": place, "file": {**dataclasses.asdict(file), "path": str(file.path.absolute())}}


def _collect(file: SourceFile, data: DataConfig, folder: Path, refused: str | None) -> Staged:
    if refused is not None:
        return Staged(file, Tally(f"source {file.source}"), {}, refused=refused)
    found = stage.load(file, data, folder)
    if found is None:
        raise UserError(f"{folder} must be the same folder on every node, found there nothing that a worker wrote")
    return dataclasses.replace(found, reused=False)


def _worker(data: DataConfig, folder: Path) -> pool.Work:
    return functools.partial(_stage, data, folder)


def _stage(data: DataConfig, folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    """Stage one file. Another try does not mend what a UserError says, so it is a reply like any other."""
    file = SourceFile(**{**item["file"], "path": Path(item["file"]["path"])})
    try:
        _check_seen(file)
        staged = stage.stage(file, data, 1, folder, lambda _: None)
    except UserError as error:
        return {"rows": 0, "refused": None, "error": str(error)}
    return {"rows": staged.tally.rows, "refused": staged.refused, "error": None}


def _check_seen(file: SourceFile) -> None:
    """Raises UserError for a file that this node lacks: it must not count as a file that cannot be read."""
    try:
        digest.check_unchanged(file.path, file.digest)
    except OSError as error:
        raise UserError(
            f"{file.path} must be the same file on every node, but one cannot read it: {error.strerror}. "
            "Put the sources and paths.store into folders that all nodes share"
        ) from None
