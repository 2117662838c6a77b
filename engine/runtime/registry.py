"""The registry of a model: its versions by content digest, its aliases, and the history of moves.

`<paths.runs>/registry/<name>/versions/<digest>/` has a full copy of the bundle, so that the judged model is the one that
serves, even if the training run is lost. `moves/000001.json`, `moves/000002.json`, ... are the only state: champion and
challenger result from replaying the moves. A move is one file, created exclusively under a lock and only if the champion is
still the one that the mover saw (compare-and-swap), so that a kill at any point leaves exactly one champion.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict, Unpack

from engine.config.nested import Tree
from engine.config.sections.runtime import posix_path
from engine.config.tree import NAME
from engine.errors import UserError, nearest
from engine.runtime import digest, records, storage
from engine.runtime import seal as seals
from engine.runtime.seal import FileRecord, Seal

FORMAT = 1  # of a move
CHECKED = 2  # of version.json, which has a checksum from this format on
MANIFEST = "bundle.json"
VERSION = "version.json"
ALIASES = ("champion", "challenger")
SHORTEST_PREFIX = 6


class NoAlias(UserError):
    """An alias has no version yet, or no longer."""


class Moved(UserError):
    """The champion is no longer the one that the mover saw."""


@dataclass(frozen=True)
class Version:
    """One model: the digest of its content and the seal (SHA-256 of its manifest) of the exact files."""

    digest: str
    seal: str
    directory: Path
    facts: VersionRecord

    @property
    def model(self) -> Path:
        """The bundle."""
        return self.directory / "model"


@dataclass(frozen=True)
class State:
    """The result of replaying the moves."""

    moves: list[MoveRecord] = field(default_factory=list)
    champions: tuple[str, ...] = ()  # every promotion that was not rolled back, the current champion last
    challenger: str | None = None

    @property
    def champion(self) -> str | None:
        """Digest of the champion."""
        return self.champions[-1] if self.champions else None

    def alias(self, name: str) -> str | None:
        """Digest of the version with an alias."""
        return {"champion": self.champion, "challenger": self.challenger}[name]


class Files(TypedDict):
    """The keys of a bundle's manifest that the registry reads."""

    digest: records.Digest
    files: dict[str, FileRecord]


class Figure(TypedDict):
    """A metric and its value."""

    name: str
    value: float | None


class VersionFacts(TypedDict, total=False):
    """Facts of a training run."""

    source: str
    seen_until: records.Instant
    split: Tree
    loss: str
    metric: Figure
    metrics: dict[str, float | None]
    train_rows: float | None
    seen_rows: records.Count  # trained on or watched, of a table without time


class VersionRecord(VersionFacts):
    """version.json: the exact artefact, and facts of its training run."""

    format: Annotated[int, records.Format(CHECKED)]
    digest: records.Digest
    seal: records.Digest
    registered: str
    check: NotRequired[records.Digest]


class DecisionPart(TypedDict, total=False):
    """The part of a decision that its move keeps: that it began (`at`), or its result."""

    kind: str
    id: str
    at: records.Instant
    path: str
    metric_name: str | None
    metric: float | None
    scores: dict[str, float | None]
    record: dict[str, object]


MoveRecord = TypedDict(
    "MoveRecord",
    {
        "format": Annotated[int, records.Format(FORMAT)],
        "number": int,
        "time": str,
        "action": Literal["promote", "rollback", "challenge", "note"],
        "from": str | None,
        "to": str | None,
        "who": str,
        "why": str,
        "decision": DecisionPart | None,
        "check": NotRequired[records.Digest],  # seals the rest
    },
)


class Registry:
    """Versions and moves of one model name below `root`; if its folder does not exist, the registry is empty."""

    def __init__(self, root: Path, name: str) -> None:
        if not NAME.fullmatch(name):
            raise UserError(f"a model's name must be letters, digits, dot, dash or underscore, found {name!r}")
        self.name = name
        self.directory = storage.inside(root, name)

    # ---------------------------------------------------------------------------------------------- reading

    def state(self) -> State:
        """Replay all moves. Raises UserError if one is missing or was changed."""
        champions: list[str] = []
        challenger: str | None = None
        paths = sorted((self.directory / "moves").glob("[0-9]*.json"))
        moves = [records.read(path, MoveRecord) for path in paths]
        for number, (path, move) in enumerate(zip(paths, moves, strict=True), 1):
            body = {key: value for key, value in move.items() if key != "check"}
            if move.get("number") != number or move.get("check") != digest.of_json(body):
                raise UserError(
                    f"{path} must be move {number} as it was written, found number {move.get('number')} at place {number}, "
                    "or another content: restore the file"
                )
            if move["action"] == "promote" and move["to"] is not None:
                champions.append(move["to"])
                challenger = None if challenger == move["to"] else challenger
            elif move["action"] == "rollback" and champions:
                champions.pop()
            elif move["action"] == "challenge":
                challenger = move["to"]
        return State(moves, tuple(champions), challenger)

    def versions(self) -> list[Version]:
        """All versions, by time of registration."""
        found = [self._open(path.parent) for path in (self.directory / "versions").glob(f"[0-9a-f]*/{VERSION}")]
        return sorted(found, key=lambda version: (version.facts["registered"], version.digest))

    def _open(self, directory: Path) -> Version:
        record = seals.read_checked(directory / VERSION, VersionRecord, CHECKED)
        return Version(record["digest"], record["seal"], directory, record)

    def find(self, reference: str) -> Version:
        """The version of an alias or a digest (its first 6 characters are enough if they are unique).

        Raises UserError, NoAlias for an alias without a version.
        """
        if reference in ALIASES:
            found = self.state().alias(reference)
            if found is None:
                way = f"`python -m engine registry promote {self.name} RUN` makes one the champion"
                if reference == "challenger":
                    way = "`retrain` or `registry challenge` makes one, and a promotion ends it"
                raise NoAlias(f"{self.name!r} has no {reference}: {way}")
            return self._open(self.directory / "versions" / found)
        matches = [version for version in self.versions() if version.digest.startswith(reference)]
        if len(reference) < SHORTEST_PREFIX or len(matches) != 1:
            known = [*ALIASES, *(version.digest[:12] for version in self.versions())]
            raise UserError(
                f"{self.name!r} must have exactly one version {reference!r}, found {len(matches)}.{nearest(reference, known)}"
            )
        return matches[0]

    def verify(self, version: Version) -> Path:
        """The bundle folder of a version, after a check that its files are the registered ones. Raises UserError."""
        check_seal(version.model, version.seal)
        return version.model

    # ---------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time; the lock ends with the process."""
        storage.make_folder(self.directory)
        with storage.disk_errors(self.directory), open(self.directory / ".lock", "a") as file:
            storage.lock(file, self.directory)
            yield

    def register(self, bundle: Path, seal: str, **facts: Unpack[VersionFacts]) -> Version:
        """Copy a bundle into the registry; the same content is registered once.

        `seal` is the SHA-256 of the manifest that the caller judged: UserError for other files.
        """
        check_seal(bundle, seal)
        content = str(records.read(bundle / MANIFEST, Files)["digest"])
        directory = storage.inside(self.directory, "versions", content)
        with self.lock():
            for stale in (self.directory / "versions").glob(".*.tmp"):  # of a writer that was killed
                shutil.rmtree(stale, ignore_errors=True)
            if not directory.exists():
                with storage.atomic_directory(directory) as temporary:
                    shutil.copytree(bundle, temporary / "model")
                    check_seal(temporary / "model", seal)
                    body = {"format": CHECKED, "digest": content, "seal": seal, "registered": _now(), **facts}
                    storage.write_json(temporary / VERSION, seals.checked(body))
        version = self._open(directory)
        self.verify(version)
        return version

    def move(
        self,
        action: Literal["promote", "rollback", "challenge", "note"],
        to: str | None,
        *,
        expected: str | None,
        who: str | None = None,
        why: str,
        decision: DecisionPart | None = None,
        after: int | None = None,
    ) -> MoveRecord:
        """Write one move, if the champion is still `expected`; `action` is promote, rollback, challenge or note.

        With `after`, only if there are still that many moves.
        The version that becomes champion is verified under the lock. Raises Moved if another process was faster, UserError if
        the artefact is not the one that was registered.
        """
        with self.lock():
            state = self.state()
            if state.champion != expected:
                raise Moved(
                    f"the champion of {self.name!r} must still be {short(expected)}, found {short(state.champion)}: "
                    "another promotion came first"
                )
            if after is not None and len(state.moves) != after:
                raise Moved(
                    f"{self.name!r} must have {after} moves as before, found {len(state.moves)}: another came first"
                )
            if action == "rollback":
                if len(state.champions) < 2:
                    raise UserError(f"{self.name!r} has no earlier champion to roll back to")
                to = state.champions[-2]
            if to is not None:
                self.verify(self.find(to))
            record: MoveRecord = {
                "format": FORMAT,
                "number": len(state.moves) + 1,
                "time": _now(),
                "action": action,
                "from": state.champion if action != "challenge" else state.challenger,
                "to": to,
                "who": who or user(),
                "why": why,
                "decision": decision,
            }
            record["check"] = digest.of_json(record)
            self._create(storage.inside(self.directory, "moves", f"{record['number']:06d}.json"), record)
        return record

    def _create(self, path: Path, record: MoveRecord) -> None:
        """Create a complete file, only if it does not exist: a hard link fails where a rename would replace the file."""
        storage.make_folder(path.parent)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise Moved(f"{path} was written by another process at the same time") from None
            storage.sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def root_of(runs: str | Path) -> Path:
    """The folder of all registries beside the runs. Raises UserError for an object store."""
    posix_path(str(runs))
    return Path(runs) / "registry"


def names(root: Path) -> list[str]:
    """Names of all models with a registry."""
    return sorted(path.name for path in root.glob("*") if path.is_dir() and NAME.fullmatch(path.name))


def resolve(reference: str, runs: str | Path) -> Path | None:
    """The verified bundle folder of `name@alias` or `name@digest`; None if the text does not have that form.

    Raises UserError if the name, the alias or the artefact does not exist.
    """
    name, at, version = reference.partition("@")
    if not at or not NAME.fullmatch(name) or not version or "/" in version:
        return None
    root = root_of(runs)
    if name not in names(root):
        raise UserError(f"{reference!r} names a model that is not in the registry {root}.{nearest(name, names(root))}")
    registry = Registry(root, name)
    return registry.verify(registry.find(version))


def seal_of(bundle: Path) -> str:
    """SHA-256 of a bundle's manifest, which lists the SHA-256 of every file: the identity of the exact artefact."""
    if not (bundle / MANIFEST).is_file():
        raise UserError(
            f"{bundle} must have a model bundle, but {MANIFEST} was not found: name a finished training run"
        )
    return digest.of_file(bundle / MANIFEST)


def check_seal(bundle: Path, seal: str) -> None:
    """Raise UserError unless manifest and files are those of the seal."""
    if seal_of(bundle) != seal:
        raise UserError(
            f"{bundle / MANIFEST} is not the manifest of the judged artefact ({seal_of(bundle)[:12]}, not {seal[:12]}): "
            "it was replaced. Restore it, or train again"
        )
    files = records.read(bundle / MANIFEST, Files)["files"]
    for name in files:
        Seal(files).check(bundle, name, "After it was judged it was replaced: restore it, or train again")


def short(value: str | None) -> str:
    """The first 12 characters of a digest, or `none`."""
    return value[:12] if value else "none"


def user() -> str:
    """Name of the user of this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return f"uid {os.getuid()}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
