"""Predictors: a trained model in memory that scores rows, `load(run).predict(events, history, tables)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from engine.config.sections.data import PLACE
from engine.data import frames
from engine.data.column_checks import declared
from engine.data.dataset import row_ids
from engine.data.places import with_places
from engine.errors import UserError
from engine.features.compute import raw_features
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import history_inputs, row_inputs
from engine.runtime import environment
from engine.scoring.cuda_tiles import DeviceRows, DeviceScorer
from engine.training.blend import Blend
from engine.training.bundle import Bundle, find_model, load_model, read_bundle
from engine.training.classes import ScoreMeaning, heads_meaning
from engine.training.decision import COLUMN, decide
from engine.training.finished import FinishedNetwork, Model
from engine.training.intervals import LOWER, UPPER, bounds_of
from engine.training.reasons import Reasons, by_feature, describe_margin, largest, shares_of
from engine.training.threads import Team

SLAB_ROWS = 16_384  # rows encoded and scored at once: they fit in a core's cache


@dataclass(frozen=True)
class Scored:
    """Rows with their encoded blocks float32[n, F] and int32[n, K] and their scores, in host memory; `device` holds the rows
    on a device.
    """

    raw: pa.Table
    scores: np.ndarray
    numeric: np.ndarray
    codes: np.ndarray
    device: DeviceRows | None = None

    def count(self, spec: ProfileSpec, good: np.ndarray) -> Profile:
        """The profile of `good` rows, bool[n]: the same bytes whether the device counts or the CPU."""
        counted = None
        if self.device is not None and spec.numeric and not spec.parts:
            counted = self.device.count(spec.plan, good)
        if good.all():
            return Profile.count(spec, self.raw, self.scores, self.codes, numeric=counted)
        raw = self.raw.filter(pa.array(good))
        return Profile.count(spec, raw, self.scores[good], self.codes[good], numeric=counted)


@dataclass(frozen=True)
class Predictor:
    """A bundle with its model in memory. Threads may share one: it is immutable."""

    bundle: Bundle
    model: Model
    threads: int = 1
    device: str = "cpu"
    profile_spec: ProfileSpec | None = None
    team: Team | None = None  # a running thread team; without it every call starts one
    shadow: Predictor | None = None  # a second model, whose scores are added
    scorer: DeviceScorer | None = None  # buffers and graphs on the device

    def __repr__(self) -> str:
        count, bundle = len(self.bundle.encoder.features), self.bundle
        return (
            f"<Predictor of {bundle.data.target!r} ({bundle.model['loss']}) from {count} features, model {bundle.digest[:12]} in "
            f"{bundle.directory}>"
        )

    @property
    def digest(self) -> str:
        """Content digest of the model."""
        return self.bundle.digest

    @property
    def columns(self) -> tuple[str, ...]:
        """What the scores of a row are for where it has several: names of classes, or levels of quantiles."""
        return self.bundle.heads.names

    @property
    def meaning(self) -> ScoreMeaning:
        """The meaning of a score: the target, and its positive class (of two), or what its scores are for (several)."""
        return heads_meaning(self.bundle.heads)

    @property
    def added(self) -> tuple[str, ...]:
        """Columns of an output beside the scores."""
        found: list[str] = []
        for k, item in enumerate(self.bundle.heads.items):
            bounds = () if item.loss.interval is None else (LOWER, UPPER)
            names = (*([COLUMN] if item.decision is not None else []), *bounds)
            found += [name + self.bundle.heads.suffix(k) for name in names]
        return tuple(found)

    @property
    def tile_rows(self) -> int:
        """Rows of the fixed shape that the model is called with."""
        return int(self.bundle.model["tile_rows"])

    def scores(self, raw: pa.Table) -> np.ndarray:
        """Scores of raw features: float32 probabilities [n] or [n, classes], or values [n] in the target's type.

        Columns are taken by name; more than needed are ignored. Raises UserError naming a feature that is absent.
        """
        numeric, codes = self.bundle.encoder.transform(raw)
        return self.encoded_scores(numeric, codes)

    def output(self, scores: np.ndarray) -> dict[str, pa.Array]:
        """Columns of an output from scores [n] or [n, k]: of each target the scores, the `decision`, text of a class, if there is
        one, and `lower` and `upper` if it has intervals.
        """
        heads = self.bundle.heads
        columns: dict[str, pa.Array] = {}
        for k, item in enumerate(heads.items):
            mine, of = heads.of(scores, k), heads.suffix(k)
            columns |= score_columns(mine, self.columns[item.columns])
            if item.decision is not None:
                codes = decide(item.decision, mine).astype(np.int32)
                columns[COLUMN + of] = pa.DictionaryArray.from_arrays(codes, pa.array(item.classes))
            if (interval := item.loss.interval) is not None:
                for name, values in zip((LOWER, UPPER), bounds_of(interval, mine), strict=True):
                    columns[name + of] = pa.array(values.astype(mine.dtype))
        return columns

    def scored(self, raw: pa.Table, lap: Callable[[str], None] = lambda _: None) -> Scored:
        """Raw features encoded and scored, on the device where possible; `lap` is called with the name of each stage."""
        encoder = self.bundle.encoder
        if self.scorer is not None and self.scorer.encodes:
            encoder.check_columns(raw.column_names)
            values, codes = encoder.values(raw), encoder.codes(raw)
            lap("encode")
            rows = self.scorer.rows(values, codes)
            lap("model")
            return Scored(raw, self._scores(rows.logits), rows.numeric, codes, rows)
        n = raw.num_rows
        numeric = np.empty((n, encoder.width), np.float32)
        codes = np.empty((n, len(encoder.cardinalities)), np.int32)
        found = []
        for low in range(0, n, SLAB_ROWS):
            part = slice(low, low + SLAB_ROWS)
            numeric[part], codes[part] = encoder.transform(raw.slice(low, SLAB_ROWS))
            lap("encode")
            found.append(self.encoded_scores(numeric[part], codes[part]))
            lap("model")
        return Scored(raw, np.concatenate(found) if found else self.encoded_scores(numeric, codes), numeric, codes)

    def encoded_scores(self, numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Scores of encoded blocks float32[n, F] and int32[n, K]."""
        return self._scores(self.logits(numeric, codes))

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        return self.bundle.heads.scores(self.model, logits)

    def logits(self, numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Raw outputs float32[n, outputs] of encoded blocks."""
        if self.scorer is not None:
            return self.scorer.logits(numeric, codes)
        return self.model.logits(numeric, codes, self.threads, self.team)

    @property
    def margin(self) -> str:
        """What the contributions of reasons add up to, in words. Raises UserError where a loss has none."""
        of_all = "mean over members, by their weights, of the " if isinstance(self.model, Blend) else ""
        return of_all + describe_margin(self.bundle.heads.main)

    def reasons(self, numeric: np.ndarray, codes: np.ndarray, scores: np.ndarray, count: int) -> Reasons:
        """The `count` features that contribute most to each row's margin, from its encoded blocks and scores [n] or [n, k]; of
        several targets to that of the main one.

        Computed on the CPU: the bits of a row's reasons do not depend on other rows, on threads or on the device. Raises
        UserError for a model that cannot tell.
        """
        encoder, model, heads = self.bundle.encoder, self.model, self.bundle.heads
        temperature, main = float(self.bundle.model.get("temperature", 1.0)), heads.of(scores)
        assert self.margin
        parts, errors, distances = [], [0.0], [0.0]
        for low in range(0, max(len(numeric), 1), SLAB_ROWS):
            part = slice(low, low + SLAB_ROWS)
            block = numeric[part], codes[part]
            outputs = model.explained(model.logits(*block, self.threads, self.team))
            share = shares_of(heads.main, main[part], outputs.shape[1], temperature)
            found = by_feature(encoder, model.contributions(*block, share, self.threads, self.team))
            distance = ((outputs - model.baseline()) * share).sum(axis=1)
            distances.append(_furthest(distance))
            errors.append(_furthest(distance - found.sum(axis=1)))
            parts.append(largest(found, count))
        feature, contribution = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return Reasons(feature, contribution, max(errors), max(distances))

    def predict(
        self,
        events: frames.Frame,
        history: frames.Frame | None = None,
        tables: Mapping[str, frames.Frame] | None = None,
        reasons: int = 0,
    ) -> frames.Frame:
        """Scores of events by `row_id`, in the order of the events; features are computed as in training.

        Tables are of pandas, Polars or Arrow; the scores come in the kind of `events` (pandas: with their index).
        `events` holds the event table's columns that describe a row at its decision; `history` past events with their
        outcomes, for windows (default: the events themselves); `tables` the side tables of as-of views.
        Columns of other types than the declared ones are read as ingest reads them: a time without an offset is local to
        `data.time_zone`.
        `reasons`: so many columns `reason_1` and `contribution_1`, the features with the largest contributions to each score.
        Raises UserError naming a column or table that is absent, or the first value that its declared type cannot hold.
        """
        given, back = frames.take("events", events)
        past = None if history is None else frames.take("history", history)[0]
        sides = {name: frames.take(f"tables[{name!r}]", side)[0] for name, side in (tables or {}).items()}
        self._check_events(given, past, sides)
        data, features = self.bundle.data, self.bundle.features
        given = with_places(declared("events", given, data.columns, data.time_zone), data)
        past = given if past is None else declared("history", past, data.columns, data.time_zone)
        sides = {
            name: declared(f"tables[{name!r}]", side, data.tables[name].columns, data.time_zone)
            for name, side in sides.items()
            if name in data.tables
        }
        raw = raw_features(data, features, given, past, sides, self.threads)
        numeric, codes = self.bundle.encoder.transform(raw)
        scores = self.encoded_scores(numeric, codes)
        columns = {"row_id": row_ids(given, data.ids), **self.output(scores)}
        if reasons:
            columns |= self.reasons(numeric, codes, scores, reasons).columns(self.bundle.encoder)
        return back(pa.table(columns))

    def _check_events(self, events: pa.Table, history: pa.Table | None, tables: Mapping[str, pa.Table]) -> None:
        data, features = self.bundle.data, self.bundle.features
        for name in (*data.ids, *row_inputs(data, features)):
            if name not in (PLACE, *events.column_names):
                raise UserError(f"events must have column {name!r}, found {', '.join(events.column_names)}")
        for name in history_inputs(data, features):
            if history is None and name not in events.column_names:
                raise UserError(
                    f"history must be given, because windows look back on {name!r}, which the events do not have: a table of "
                    "past events with their outcomes, or one without rows where there are none"
                )
            if history is not None and name not in history.column_names:
                raise UserError(
                    f"history must have column {name!r}, which windows look back on, found {', '.join(history.column_names)}"
                )
        for view in self.bundle.features.active_views.values():
            if view.table and view.table not in tables:
                raise UserError(f"tables must have {view.table!r}, which a view reads; found {sorted(tables)}")


def _furthest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))


def score_names(several: tuple[str, ...]) -> list[str]:
    """Columns that hold the scores: `score`, or one `score_<class>` a class, `score_q10` a quantile."""
    return [f"score_{name}" for name in several] or ["score"]


def score_columns(scores: np.ndarray, several: tuple[str, ...]) -> dict[str, pa.Array]:
    """The scores of `score_names`, from [n], [n, classes] or [n, levels]."""
    columns = [scores] if scores.ndim == 1 else list(scores.T)
    named = zip(score_names(several), columns, strict=True)
    return {name: pa.array(np.ascontiguousarray(column)) for name, column in named}


def single_threaded() -> None:
    """Make torch compute in the calling thread only; call it once in every thread that scores units."""
    torch.set_num_threads(1)


def load(model: Path | str, runs: Path | str = "runs", threads: int = 0, device: str = "cpu") -> Predictor:
    """The predictor of a training run's directory; digests are checked before anything is parsed. Raises UserError."""
    return predictor_of(read_bundle(find_model(str(model), Path(runs))), threads, device)


def predictor_of(bundle: Bundle, threads: int = 0, device: str = "cpu") -> Predictor:
    """The predictor of a bundle. The code of a plug-in's model runs: `bundle_spec.admit` comes first. Raises UserError."""
    saved = bundle.directory / "profile_spec.json"
    spec = ProfileSpec.read(saved, bundle.encoder) if saved.exists() else None
    loaded, scorer = load_model(bundle), None
    if not isinstance(loaded, FinishedNetwork):
        device = "cpu"
    elif device != "cpu":
        scorer = DeviceScorer(loaded.network, loaded.precision, device, plan=bundle.encoder.plan)
    return Predictor(bundle, loaded, threads or environment.cores(), device, spec, scorer=scorer)
