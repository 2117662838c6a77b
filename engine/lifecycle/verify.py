"""`engine verify`: every file of the store, the runs and the registry against what was sealed when it was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.config.tree import Config
from engine.data import stage
from engine.data.dataset import MANIFEST as DATASET
from engine.data.ingest import LATEST, Latest
from engine.errors import UserError
from engine.lifecycle.runs import directories
from engine.lifecycle.words import take
from engine.runtime import registry, seal, terminal
from engine.runtime.registry import Registry
from engine.training import bundle

DAMAGED = 2


def verify(config: Config, words: list[str]) -> int:
    """`engine verify [PATH ...] [--json]`: exit code 2 when a file is not what was written.

    Without a path: all of paths.store and paths.runs.
    """
    others, options = take(words, ("--json",))
    places = [Path(word) for word in others] or [Path(config.paths.store), Path(config.paths.runs)]
    for place in places:
        if others and not place.is_dir():
            raise UserError(f"verify takes folders of a store or of runs, found {str(place)!r}, where there is none")
    found = [{"path": path, "problem": problem} for place in places for path, problem in problems(place)]
    terminal.rows(found, "--json" in options, "every file is what was written")
    return DAMAGED if found else 0


def problems(root: Path) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of everything below a folder that is not what was written."""
    for path in sorted(root.rglob(seal.NAME)):
        if not any(part.endswith(".tmp") for part in path.parts):
            yield from _of_seal(path.parent)
    for path in sorted(root.rglob(bundle.MANIFEST)):
        yield from _of_bundle(path.parent)
    for path in sorted(root.rglob(".staged/*.json")):
        for damaged in stage.damaged(path):
            yield str(damaged), "is not what was staged: the next ingest reads the source again"
    for path in sorted(root.rglob(LATEST)):
        yield from _of_record(path, Latest)
    for path in sorted(root.rglob(".inputs/*.json")):
        yield from _of_record(path)
    yield from _unsealed(root)
    for folder in sorted(root.rglob("registry")):
        yield from _of_registry(folder)


def _of_seal(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        found = seal.read(folder)
    except UserError as error:
        yield str(folder / seal.NAME), str(error)
        return
    for name in found.damaged(folder):
        yield str(folder / name), "is not the file that was written"


def _of_bundle(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        bundle.read_manifest(folder)
    except UserError as error:
        yield str(folder), str(error)


def _of_record(path: Path, shape: object = dict) -> Iterator[tuple[str, str]]:
    try:
        seal.read_checked(path, shape)
    except UserError as error:
        yield str(path), str(error)


def _unsealed(root: Path) -> Iterator[tuple[str, str]]:
    """Entries of the store and finished runs that have no seal."""
    entries = [
        path.parent for path in root.rglob(DATASET) if path.parent.parent.parent.name in ("datasets", "features")
    ]
    finished = [path for path in directories(root) if (path / "DONE").exists()]
    for folder in sorted([*entries, *finished]):
        if not (folder / seal.NAME).exists() and not folder.name.startswith("."):
            yield str(folder), f"has no {seal.NAME}: it was written by an older engine, and cannot be verified"


def _of_registry(root: Path) -> Iterator[tuple[str, str]]:
    for name in registry.names(root):
        held = Registry(root, name)
        try:
            held.state()
            for version in held.versions():
                held.verify(version)
        except UserError as error:
            yield str(held.directory), str(error)
