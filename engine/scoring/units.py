"""Work units of scoring: ranges of dataset rows on multiples of the tile, and the records that commit them.

A unit is done when its record `parts/<unit>.json` exists. `commit` writes it after `parts/<unit>.part`, both by rename,
so a kill at any moment leaves a unit done or not done. Names and records hold no run, time of day or path. Parts are
Parquet, but no `*.parquet` matches their names, because a killed run may leave only some of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from engine.errors import UserError
from engine.features.profile import ProfileRecord
from engine.runtime import digest, records, seal, storage
from engine.runtime.seal import FileRecord

FORMAT = 2  # 2: a unit's input holds the event times too
CONTEXT = "context.json"


@dataclass(frozen=True, order=True)
class Unit:
    """Dataset rows [start, stop) scored by one worker at once; `digest` covers the data and the model."""

    start: int
    stop: int
    digest: str

    @property
    def name(self) -> str:
        """Stem of the unit's files."""
        return f"{self.start:012d}-{self.stop:012d}-{self.digest[:8]}"

    @property
    def rows(self) -> int:
        """Number of rows, including those that the model cannot score."""
        return self.stop - self.start


def make_unit(start: int, stop: int, context: str) -> Unit:
    """The unit of a range of rows in a context (digest of model, features, dataset and output)."""
    return Unit(start, stop, digest.of_json([FORMAT, context, start, stop]))


def cut(ranges: Iterable[tuple[int, int]], unit_rows: int, tile_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges cut at absolute multiples of `unit_rows`, which is raised to whole tiles."""
    size = -(-unit_rows // tile_rows) * tile_rows
    for start, stop in ranges:
        while start < stop:
            edge = min((start // size + 1) * size, stop)
            yield start, edge
            start = edge


def gaps(whole: tuple[int, int], done: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of `whole` that no range of `done` covers. Ranges of `done` must be disjoint."""
    at = whole[0]
    for start, stop in sorted(done):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < whole[1]:
        yield at, whole[1]


# ---------------------------------------------------------------------------------------------------------- records


class UnitReasons(TypedDict):
    """Of the reasons of a unit: digests of its tiles' ids and reasons, in order, and the largest error of a row's sum."""

    tiles: list[records.Digest]
    error: float


class UnitRecord(TypedDict):
    """parts/<unit>.json: the result of one unit. `tiles` are digests of its tiles' ids and scores, in order."""

    format: Annotated[int, records.Format(FORMAT, FORMAT)]
    start: records.Count
    stop: records.Count
    digest: records.Digest
    rows: records.Count
    quarantined: records.Count
    part: FileRecord
    refused: FileRecord | None
    input: records.Digest
    tiles: list[records.Digest]
    profile: ProfileRecord | None
    reused: bool
    seconds: dict[str, float]
    peak_memory_bytes: records.Count
    reasons: NotRequired[UnitReasons]


class Item(TypedDict):
    """Rows for a worker; `earlier`: the digest of the unit of these rows in the run that is appended to."""

    start: int
    stop: int
    earlier: NotRequired[str]


class Reply(TypedDict):
    """What the driver needs of a unit's record; `found`: the unit was done before."""

    found: bool
    reused: bool
    rows: int
    seconds: dict[str, float]
    peak_memory_bytes: int


class SetAside(TypedDict):
    """Rows of a unit that failed in every try."""

    start: int
    stop: int
    tries: int
    cause: str


def reply_of(record: UnitRecord, found: bool = False) -> Reply:
    """The reply about a unit; the driver reads the rest from the record's file, one unit at a time."""
    return {
        "found": found,
        "reused": record["reused"],
        "rows": record["rows"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
    }


def part_path(parts: Path, unit: Unit) -> Path:
    """The unit's scored rows."""
    return parts / f"{unit.name}.part"


def refused_path(parts: Path, unit: Unit) -> Path:
    """The file of rows that the model cannot score; absent when there are none."""
    return parts / f"{unit.name}.refused.part"


def record_path(parts: Path, unit: Unit) -> Path:
    """The unit's record; its presence is the commit."""
    return parts / f"{unit.name}.json"


def commit(parts: Path, unit: Unit, record: UnitRecord) -> None:
    """Write the record of a unit, after its other files: from then on the unit is done."""
    storage.write_json(record_path(parts, unit), seal.checked(record))


def read_record(parts: Path, unit: Unit) -> UnitRecord | None:
    """The record of a finished unit with undamaged files, else None."""
    record, lacking = read_whole(record_path(parts, unit))
    return None if lacking else record


def read_whole(path: Path) -> tuple[UnitRecord | None, list[Path]]:
    """(a unit's record, the damaged ones among the record and its files)."""
    try:
        record = seal.read_checked(path, UnitRecord)
    except UserError:
        return None, [path]
    files = {path.with_suffix(".part"): record["part"], path.with_suffix(".refused.part"): record["refused"]}
    return record, [file for file, entry in files.items() if entry is not None and not seal.is_whole(file, entry)]


def finished(parts: Path, whole: tuple[int, int], context: str) -> list[Unit]:
    """Units of the context that are done, in order; where two overlap the earlier one counts."""
    found: list[Unit] = []
    for path in sorted(parts.glob("*.json")):
        unit = _unit_of(path.stem, context)
        inside = unit is not None and whole[0] <= unit.start < unit.stop <= whole[1]
        if unit and inside and (not found or unit.start >= found[-1].stop) and read_record(parts, unit):
            found.append(unit)
    return found


def _unit_of(stem: str, context: str) -> Unit | None:
    try:
        start, stop = (int(text) for text in stem.split("-")[:2])
    except ValueError:
        return None
    unit = make_unit(start, stop, context)
    return unit if unit.name == stem else None


def remove_others(parts: Path, keep: Iterable[Unit]) -> int:
    """Delete every file that belongs to no unit of `keep`: parts without a record, temporary files, other ranges."""
    places = (part_path, refused_path, record_path)
    kept = {place(parts, unit) for unit in keep for place in places}
    strays = [path for path in parts.iterdir() if path not in kept] if parts.is_dir() else []
    for path in strays:
        # An actor that outlives its driver for a moment may still write in a folder, which is then deleted next time.
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return len(strays)


# ---------------------------------------------------------------------------------------------------------- context


Context = dict[str, object]  # the values behind a unit's digest: flat names and JSON values, compared one by one


def check_context(directory: Path, context: Context) -> str:
    """The context's digest; it is written for the first attempt, and any later one must have the same.

    Raises UserError naming what changed.
    """
    path = directory / CONTEXT
    if path.exists():
        before = records.read(path, Context)
        changed = [name for name in {**before, **context} if before.get(name) != context.get(name)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{directory} cannot be resumed: the {name} changed since it began (was {_short(before.get(name))}, is "
                f"{_short(context.get(name))}). Start a new run with score.resume=never"
                + (f"; changed too: {', '.join(changed[1:])}" if changed[1:] else "")
            )
    else:
        storage.write_json(path, context)
    return digest.of_json(context)


def _short(value: Any) -> str:
    text = str(value)
    return text[:16] if isinstance(value, str) and len(text) == 64 else text
