"""Source files over the workers of a Ray cluster: a worker stages whole files in the store, where the driver finds them.

A staged file depends on the file and the schema alone, so it does not matter who made it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from engine.config.nested import Tree
from engine.config.sections.data import DataConfig
from engine.config.tree import Config
from engine.data import stage
from engine.data.bounds import Bounds
from engine.data.columns import MissingColumnError
from engine.data.files import SourceFile
from engine.data.quarantine import Tally
from engine.data.stage import Staged
from engine.errors import UserError
from engine.runtime import digest, storage
from engine.runtime.on_ray import tasks


class Item(TypedDict):
    """A file for a worker: its place among the files, and a SourceFile as JSON values."""

    place: int
    file: Tree


class Reply(TypedDict, total=False):
    """What became of it; `missing`: the arguments of a MissingColumnError."""

    missing: list[str]
    place: int
    rows: int
    refused: str | None


def stage_files(config: Config, files: list[SourceFile], folder: Path, advance: Callable[[int], None]) -> list[Staged]:
    """The files, staged in `folder` by `cluster.workers` Ray actors, in the given order.

    Raises UserError where a policy says so, where a node does not see the same files, and where workers keep dying.
    """
    storage.make_folder(folder)
    refused: dict[int, str | None] = {}
    items = [_plain(place, file) for place, file in enumerate(files)]
    make = functools.partial(_stager, folder.absolute())
    with tasks.Workers(config) as workers:
        for reply in workers.run(items, make, folder, lambda item: f"{files[item['place']].shown} could not be read"):
            if reply.get("missing"):
                raise MissingColumnError(*reply["missing"])
            refused[reply["place"]] = reply["refused"]
            advance(reply["rows"])
    return [_collect(file, config.data, folder, refused[place]) for place, file in enumerate(files)]


def _plain(place: int, file: SourceFile) -> Item:
    """The file as JSON values; workers do not share the driver's current folder."""
    return {"place": place, "file": {**dataclasses.asdict(file), "path": str(file.path.absolute())}}


def _collect(file: SourceFile, data: DataConfig, folder: Path, refused: str | None) -> Staged:
    if refused is not None:
        return Staged(file, Tally(f"source {file.source}"), {}, refused=refused)
    found = stage.load(file, data, folder)
    if found is None:
        raise UserError(f"{folder} must be the same folder on every node, found there nothing that a worker wrote")
    return dataclasses.replace(found, reused=False)


def _stager(folder: Path, config: Config) -> tasks.Share:
    return functools.partial(_stage, folder, config.data, Bounds.of(config.resources.memory.bytes))


def _stage(folder: Path, data: DataConfig, bounds: Bounds, item: Item) -> Reply:
    file = SourceFile(**{**item["file"], "path": Path(item["file"]["path"])})
    _check_seen(file)
    try:
        staged = stage.stage(file, data, 1, folder, lambda _: None, bounds=bounds)
    except MissingColumnError as error:  # a reply is JSON: it keeps what an error is about
        return {"missing": [error.fact, error.advice, error.source, error.column, error.file]}
    return {"place": item["place"], "rows": staged.tally.rows, "refused": staged.refused}


def _check_seen(file: SourceFile) -> None:
    """Raises UserError for a file that this node lacks: it must not count as a file that cannot be read."""
    try:
        digest.check_unchanged(file.path, file.digest)
    except OSError as error:
        raise UserError(
            f"{file.path} must be the same file on every node, but one cannot read it: {error.strerror}. "
            "Put the sources and paths.store into folders that all nodes share"
        ) from None
