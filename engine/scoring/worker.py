"""Scores one work unit: read, features, encode, model, write, count. Runs in a thread or in a Ray actor.

A worker gets paths and a range of rows and returns a small record; rows are never sent between processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.dataset import Dataset, open_dataset, row_ids
from engine.errors import UserError
from engine.features import instants, store
from engine.features.compute import direct_features, raw_features
from engine.features.past import past_events
from engine.features.spec import event_inputs, history_inputs, row_inputs, windows_of
from engine.features.store import StoredView
from engine.runtime import digest, seal, storage
from engine.runtime.progress import Laps
from engine.runtime.seal import FileRecord
from engine.scoring import units
from engine.scoring.inputs import with_past
from engine.scoring.predictor import Predictor, Scored, load, score_columns, score_names, single_threaded
from engine.scoring.units import Item, Reply, Unit, UnitRecord
from engine.training.reasons import Reasons
from engine.training.threads import Team

READ_ROWS = 131_072  # rows in memory at once, on absolute multiples: whole row groups of the store
STAGES = ("read", "features", "encode", "model", "reasons", "profile", "write")


@dataclass(frozen=True)
class Job:
    """The settings shared by all units of a run, as plain values."""

    bundle: str
    dataset: str
    views: dict[str, str]  # name -> folder in the store; empty = computed by the unit
    parts: str
    context: str
    columns: tuple[str, ...]
    profile: bool
    level: int
    device: str
    earlier: str | None = None  # parts/ of the run that is appended to
    shadow: str | None = None  # bundle of the second model
    history: str | None = None  # dataset that is history for windows, in addition to that of the rows
    reasons: int = 0  # of each row


class UnitScorer:
    """`UnitScorer(job, predictor, dataset, views)(item)` scores the unit of `item`; returns what the driver needs."""

    def __init__(self, job: Job, predictor: Predictor, dataset: Dataset, views: dict[str, StoredView]) -> None:
        self.job, self.predictor, self.dataset, self.views = job, predictor, dataset, views
        self.parts = Path(job.parts)
        data, features = predictor.bundle.data, predictor.bundle.features
        self.columns = list(dict.fromkeys([*data.ids, data.event_time, *job.columns, *event_inputs(data, features)]))
        self.profile_spec = predictor.profile_spec if job.profile else None
        beside = predictor.shadow
        self.shadow = beside and replace(beside, threads=predictor.threads, team=predictor.team)
        self.past_columns = list(dict.fromkeys([*data.ids, *history_inputs(data, features)]))
        self.past = open_dataset(job.history) if job.history else None
        self._tables: dict[str, pa.Table] | None = None

    def __call__(self, item: Item) -> Reply:
        """Score one unit. A done unit is not scored again."""
        unit = units.make_unit(item["start"], item["stop"], self.job.context)
        record = units.read_record(self.parts, unit)
        found = record is not None
        if record is None and (earlier := item.get("earlier")):
            record = self._reused(unit, earlier)
        if record is None:
            record = self._score(unit)
        if not found:
            units.commit(self.parts, unit, record)
        return units.reply_of(record, found)

    def empty(self) -> pa.Table:
        """The output without rows."""
        facts, raw = self._read((0, 0), Laps(STAGES))
        scored = self.predictor.scored(raw)
        ids = row_ids(facts, self.predictor.bundle.data.ids)
        beside = self._why(self._reasons(scored)) | self._beside(raw, hashlib.sha256(), Laps(STAGES))
        return self._output(ids, facts, scored.scores, np.ones(0, bool), beside)

    def warm_up(self) -> None:
        """Send a tile of missing values through encoder, models and profile: kernels and torch load here, not in a unit."""
        raw = self._read((0, 0), Laps(STAGES))[1]
        raw = pa.table({item.name: pa.nulls(self.predictor.tile_rows, item.type) for item in raw.schema})
        scored = self.predictor.scored(raw)
        self._reasons(scored)
        self._beside(raw, hashlib.sha256(), Laps(STAGES))
        if self.profile_spec is not None:
            scored.count(self.profile_spec, np.ones(raw.num_rows, bool))

    # ------------------------------------------------------------------------------------------------- one unit

    def _score(self, unit: Unit) -> UnitRecord:
        clock = Laps(STAGES)
        pieces, refused, profile = [], [], None
        content, why = (Content(unit.start, self.predictor.tile_rows) for _ in range(2))
        inputs, error = hashlib.sha256(), 0.0
        for rows in steps(unit.start, unit.stop, READ_ROWS):
            facts, raw = self._read(rows, clock)
            ids = row_ids(facts, self.predictor.bundle.data.ids)
            scored = self.predictor.scored(raw, clock.lap)
            scores = scored.scores
            refusal = refusals(self.predictor, facts)
            self._add_input(inputs, ids, facts, refusal)
            _add_blocks(inputs, scored.numeric, scored.codes)
            reasons = self._reasons(scored)
            clock.lap("reasons")
            beside = self._why(reasons) | self._beside(raw, inputs, clock)
            refusal.add(~finite(scores), "the model gives no finite score")
            good = refusal.codes == 0
            content.add(rows[0], ids, scores, good)
            if reasons is not None:
                why.add(rows[0], ids, reasons.packed(), good)
                error = max(error, reasons.error)
            clock.lap("write")
            if self.profile_spec is not None:
                part = scored.count(self.profile_spec, good)
                profile = part if profile is None else profile.merge(part)
                clock.lap("profile")
            pieces.append(self._output(ids, facts, scores, good, beside))
            if not good.all():
                refused.append(refusal.table(rows[0], ids))
            clock.lap("write")
        out = pa.concat_tables(pieces).combine_chunks()
        entry = self._write(units.part_path(self.parts, unit), out)
        aside = self._write(units.refused_path(self.parts, unit), pa.concat_tables(refused)) if refused else None
        clock.lap("write")
        record: UnitRecord = {
            "format": units.FORMAT,
            "start": unit.start,
            "stop": unit.stop,
            "digest": unit.digest,
            "rows": out.num_rows,
            "quarantined": unit.rows - out.num_rows,
            "part": entry,
            "refused": aside,
            "input": inputs.hexdigest(),
            "tiles": content.tiles,
            "profile": None if profile is None else profile.to_json(),
            "reused": False,
            "seconds": clock.seconds,
            "peak_memory_bytes": peak_memory(),
        }
        return {**record, "reasons": {"tiles": why.tiles, "error": error}} if self.job.reasons else record

    def _reasons(self, scored: Scored) -> Reasons | None:
        """The reasons of the rows, where the run wants any."""
        if not self.job.reasons:
            return None
        return self.predictor.reasons(scored.numeric, scored.codes, scored.scores, self.job.reasons)

    def _why(self, reasons: Reasons | None) -> dict[str, pa.Array]:
        """Their columns."""
        return {} if reasons is None else reasons.columns(self.predictor.bundle.encoder)

    def _read(self, rows: tuple[int, int], clock: Laps) -> tuple[pa.Table, pa.Table]:
        """Columns of the event table, and raw features."""
        facts = self.dataset.read(self.columns, rows=rows)
        clock.lap("read")
        raw = self._features(rows, facts)
        clock.lap("features")
        return facts, raw

    def _features(self, rows: tuple[int, int], facts: pa.Table) -> pa.Table:
        bundle = self.predictor.bundle
        if not self.job.views and bundle.features.active_views:
            return self._computed(facts)
        found = dict(direct_features(bundle.data, bundle.features, facts))
        for view in self.views.values():
            found.update(zip(view.manifest["columns"], view.read(rows=rows).columns, strict=True))
        return pa.table({feature.name: found[feature.name] for feature in bundle.encoder.features})

    def _computed(self, facts: pa.Table) -> pa.Table:
        """Features of rows, with the past events that their windows need."""
        data, features = self.predictor.bundle.data, self.predictor.bundle.features
        views = windows_of(features)
        decisions = instants.moment_times(facts, features.decision)
        history = past_events(self.dataset, data, views, decisions, self.past_columns)
        if self.past is not None:
            history = with_past(history, self.past, data, views, facts, decisions)
        if self._tables is None:
            names = {view.table for view in features.active_views.values() if view.table}
            self._tables = {name: self.dataset.table(name) for name in sorted(names)}
        return raw_features(data, features, facts, history, self._tables, self.predictor.threads)

    def _beside(self, raw: pa.Table, inputs: Any, clock: Laps) -> dict[str, pa.Array]:
        """Columns `shadow_...` of the second model, whose blocks go into the unit's input; empty without one.

        A missing score is NaN: it does not set aside a row that the first model scores.
        """
        if self.shadow is None:
            return {}
        scored = self.shadow.scored(raw, clock.lap)
        _add_blocks(inputs, scored.numeric, scored.codes)
        columns = {
            **score_columns(scored.scores, self.shadow.columns),
            "model": _repeat(self.shadow.digest, raw.num_rows),
        }
        return {f"shadow_{name}": column for name, column in columns.items()}

    def _output(
        self, ids: pa.Array, facts: pa.Table, scores: np.ndarray, good: np.ndarray, beside: dict[str, pa.Array]
    ) -> pa.Table:
        table = pa.table({
            "row_id": ids,
            **{name: facts[name] for name in self.predictor.bundle.data.shown_time},
            **{name: facts[name] for name in self.job.columns},
            **self.predictor.output(scores),
            "model": _repeat(self.predictor.digest, len(ids)),
            **beside,
        })  # fmt: skip
        return table if good.all() else table.filter(pa.array(good))

    def _write(self, path: Path, table: pa.Table) -> FileRecord:
        storage.write_parquet(path, table, compression_level=self.job.level, use_dictionary=_repeated(table))
        return seal.record_of(path)

    def _add_input(self, hasher: Any, ids: pa.Array, facts: pa.Table, refusal: Refusals) -> None:
        """The columns that the output repeats, and the rows that the model cannot score."""
        repeated = facts.select([self.predictor.bundle.data.event_time, *self.job.columns])
        hasher.update(digest.of_table(repeated.add_column(0, "", ids)).encode())
        if refusal.reasons:
            hasher.update(digest.of_json(refusal.reasons).encode())
            hasher.update(_bytes(refusal.codes))

    # --------------------------------------------------------------------------------------------------- append

    def _reused(self, unit: Unit, earlier: str) -> UnitRecord | None:
        """The record of an earlier run for the same rows, when the inputs of the model are equal bit by bit."""
        assert self.job.earlier is not None
        folder = Path(self.job.earlier)
        before = units.read_record(folder, Unit(unit.start, unit.stop, earlier))
        if before is None or (self.profile_spec is not None and before["profile"] is None):
            return None
        clock, inputs = Laps(STAGES), hashlib.sha256()
        old = Unit(unit.start, unit.stop, earlier)
        scores, good = self._found(folder, old, before)
        profile = None
        for rows in steps(unit.start, unit.stop, READ_ROWS):
            facts, raw = self._read(rows, clock)
            ids = row_ids(facts, self.predictor.bundle.data.ids)
            self._add_input(inputs, ids, facts, refusals(self.predictor, facts))
            numeric, codes = self.predictor.bundle.encoder.transform(raw)
            _add_blocks(inputs, numeric, codes)
            if self.shadow is not None:
                _add_blocks(inputs, *self.shadow.bundle.encoder.transform(raw))
            clock.lap("encode")
            if self.profile_spec is not None:
                # Values with one code (two unseen texts) are distinguished here.
                low, high = rows[0] - unit.start, rows[1] - unit.start
                part = Scored(raw, scores[low:high], numeric, codes).count(self.profile_spec, good[low:high])
                profile = part if profile is None else profile.merge(part)
                clock.lap("profile")
        if inputs.hexdigest() != before["input"]:
            return None
        storage.link(units.part_path(folder, old), units.part_path(self.parts, unit))
        if before["refused"] is not None:
            storage.link(units.refused_path(folder, old), units.refused_path(self.parts, unit))
        clock.lap("write")
        return {
            **before,
            "digest": unit.digest,
            "profile": None if profile is None else profile.to_json(),
            "reused": True,
            "seconds": clock.seconds,
            "peak_memory_bytes": peak_memory(),
        }

    def _found(self, folder: Path, unit: Unit, record: UnitRecord) -> tuple[np.ndarray, np.ndarray]:
        """(scores, bool[n]: rows that have one) of a unit that an earlier run has scored."""
        good = np.ones(unit.rows, bool)
        if record["refused"] is not None:
            refused = storage.read_parquet(units.refused_path(folder, unit), ["row"])
            good[np.asarray(refused["row"]) - unit.start] = False
        names = score_names(self.predictor.columns)
        part = storage.read_parquet(units.part_path(folder, unit), names)
        found = np.stack([np.asarray(part[name]) for name in names], axis=1)
        scores = np.full((unit.rows, len(names)), np.nan, found.dtype)
        scores[good] = found
        return (scores if self.predictor.columns else scores[:, 0]), good


class Content:
    """Digests of (row id, values) for every tile of absolute dataset rows, so that any split into units gives the same list."""

    def __init__(self, start: int, tile_rows: int) -> None:
        self._at, self._tile_rows = start, tile_rows
        self.tiles: list[str] = []

    def add(self, start: int, ids: pa.Array, scores: np.ndarray, good: np.ndarray) -> None:
        """Add rows that follow those added before, from dataset row `start`; only `good` ones count."""
        assert start == self._at
        texts = ids.cast(pa.large_string())
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        letters = memoryview(texts.buffers()[2] or b"")
        lengths = np.diff(offsets).astype("<i4")
        values = np.ascontiguousarray(scores, scores.dtype.newbyteorder("<"))
        whole = bool(good.all())
        for low, high in steps(start, start + len(ids), self._tile_rows):
            a, b = low - start, high - start
            hasher = hashlib.sha256()
            if whole:
                hasher.update(_bytes(lengths[a:b]))
                hasher.update(letters[offsets[a] : offsets[b]])
                hasher.update(_bytes(values[a:b]))
            elif good[a:b].any():
                keep = np.flatnonzero(good[a:b]) + a
                hasher.update(_bytes(lengths[keep]))
                for row in keep:
                    hasher.update(letters[offsets[row] : offsets[row + 1]])
                hasher.update(_bytes(values[keep]))
            self.tiles.append(hasher.hexdigest())
        self._at = start + len(ids)


def steps(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at absolute multiples of `size`."""
    return units.cut([(start, stop)], size, 1)


@dataclass
class Refusals:
    """Rows that the model cannot score, with reasons: `codes` int16[n], 0 = it can, else 1 + place in `reasons`."""

    codes: np.ndarray
    reasons: list[str]

    def add(self, mask: np.ndarray, reason: str) -> None:
        """Set aside the rows of `mask` that are not set aside yet."""
        if mask.any():
            self.reasons.append(reason)
            self.codes[mask & (self.codes == 0)] = len(self.reasons)

    def table(self, start: int, ids: pa.Array) -> pa.Table:
        """Dataset row, id and reason of every refused row; the first row is dataset row `start`."""
        rows = np.flatnonzero(self.codes)
        return pa.table({
            "row": pa.array(start + rows, pa.int64()),
            "row_id": ids.take(pa.array(rows)),
            "reason": pa.array([self.reasons[code - 1] for code in self.codes[rows]], pa.string()),
        })  # fmt: skip


def refusals(predictor: Predictor, facts: pa.Table) -> Refusals:
    """Rows with a null in a column that describes them and declares none, or without a decision time. Values that
    only windows of later rows read may be null, because they are not known yet.
    """
    data, features = predictor.bundle.data, predictor.bundle.features
    found = Refusals(np.zeros(facts.num_rows, np.int16), [])
    required = [data.event_time, *(name for name in row_inputs(data, features) if not data.columns[name].nullable)]
    if features.as_of:
        required.append(features.as_of.column)
    for name in dict.fromkeys(required):
        if facts[name].null_count:
            found.add(np.asarray(pc.is_null(facts[name])), f"{name} is null, where none is allowed")
    return found


def finite(scores: np.ndarray) -> np.ndarray:
    """bool[n]: rows whose scores, [n] or [n, k], are all finite."""
    found: np.ndarray = np.isfinite(scores) if scores.ndim == 1 else np.isfinite(scores).all(axis=1)
    return found


def _add_blocks(hasher: Any, numeric: np.ndarray, codes: np.ndarray) -> None:
    """The values that decide the scores of these rows."""
    hasher.update(_bytes(numeric))
    hasher.update(_bytes(codes))


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _repeat(text: str, rows: int) -> pa.Array:
    """dictionary<int32, string>[rows] of one text."""
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([text]))


def _repeated(table: pa.Table) -> list[str]:
    """Columns worth a dictionary page: texts other than ids."""
    return [
        field.name
        for field in table.schema
        if field.name != "row_id" and (pa.types.is_dictionary(field.type) or pa.types.is_string(field.type))
    ]


def peak_memory() -> int:
    """Peak resident bytes of this process so far: of Linux's two figures the one that a child does not inherit."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_scorer(job: Job, threads: int) -> UnitScorer:
    """The scorer in another process, from paths alone, warm; its threads run as long as the process does."""
    single_threaded()
    predictor = load(job.bundle, threads=threads, device=job.device)
    if job.shadow is not None:
        predictor = replace(predictor, shadow=load(job.shadow, threads=threads, device=job.device))
    predictor = replace(predictor, team=Team(threads).__enter__())
    views = {name: open_view(name, Path(folder)) for name, folder in job.views.items()}
    scorer = UnitScorer(job, predictor, open_dataset(job.dataset), views)
    scorer.warm_up()
    return scorer


def open_view(name: str, folder: Path) -> StoredView:
    """A view of the store. Raises UserError when it is missing or damaged."""
    found = store.open_view(name, folder)
    if found is None:
        raise UserError(f"{folder} must hold the view {name!r}, which is missing or damaged: run `features` again")
    return found
