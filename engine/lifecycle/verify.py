"""`engine verify`: checks every file of the store, the runs and the registry against the digests sealed at writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from engine.config.tree import Config
from engine.data import stage
from engine.data.dataset import LATEST, Latest
from engine.data.dataset import MANIFEST as DATASET
from engine.errors import UserError
from engine.features.partitions import InputsRecord
from engine.lifecycle.runs import directories
from engine.runtime import marks, registry, remote, seal, terminal, trust
from engine.runtime.registry import Registry
from engine.scoring import units
from engine.training import bundle, checkpoint

DAMAGED = 2


def verify(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`engine verify [PATH ...] [--json]`: exit code 2 when a file is not what was written.

    Without a path it checks paths.store and paths.runs.
    """
    places = [Path(word) for word in words] or [Path(config.paths.store), Path(config.paths.runs)]
    for place in places:
        if words and not place.is_dir():
            raise UserError(f"verify takes folders of a store or of runs, but {str(place)!r} does not exist")
    found = [{"path": path, "problem": problem} for place in places for path, problem in problems(place)]
    terminal.rows(found, "--json" in options, "every file is what was written")
    return DAMAGED if found else 0


def problems(root: Path) -> Iterator[tuple[str, str]]:
    """(path, problem) of everything below a folder that is not what was written."""
    for path in sorted(root.rglob("*")):
        for pattern, look in LOOKS.items():
            if path.match(pattern) and not any(part.endswith(".tmp") for part in path.parts):
                yield from look(path)
    yield from _unsealed(root)


def _of_seal(path: Path) -> Iterator[tuple[str, str]]:
    folder = path.parent
    try:
        found = seal.read(folder)
    except UserError as error:
        yield str(path), str(error)
        return
    for name in found.damaged(folder):
        yield str(folder / name), "is not the file that was written"


def _of_files(damaged: Callable[[Path], list[Path]], remedy: str) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """A check of a record that names files."""
    return lambda path: ((str(file), f"is not what was written: {remedy}") for file in damaged(path))


def _of_one(read: Callable[[Path], object]) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """A check by a reader that raises UserError for damaged files."""

    def look(path: Path) -> Iterator[tuple[str, str]]:
        try:
            read(path)
        except UserError as error:
            yield str(path), str(error)

    return look


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
    for name in registry.names(root) if root.is_dir() else ():
        held = Registry(root, name)
        try:
            held.state()
            for version in held.versions():
                held.verify(version)
        except UserError as error:
            yield str(held.directory), str(error)


# Checks by the end of the path.
LOOKS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    seal.NAME: _of_seal,
    bundle.MANIFEST: _of_one(lambda path: bundle.read_manifest(path.parent)),
    ".staged/*.json": _of_files(stage.damaged, "the next ingest reads the source again"),
    "parts/*.json": _of_files(
        lambda path: units.read_whole(path)[1], "these rows are scored again when the run continues"
    ),
    "checkpoints/step-*": _of_one(checkpoint.load_checkpoint),
    LATEST: _of_one(lambda path: seal.read_checked(path, Latest)),
    ".inputs/*.json": _of_one(lambda path: seal.read_checked(path, InputsRecord)),
    f"{trust.FOLDER}/*.json": _of_one(marks.check),
    f"{remote.FOLDER}/*.json": _of_one(marks.check),
    "registry": _of_registry,
}
