"""Challengers: the periods they may use, their training runs, and the rows on which they are compared with the champion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import schema, units
from engine.config.sections.lifecycle import RetrainConfig
from engine.config.sections.training import SplitConfig
from engine.config.tree import Config
from engine.data.calendar import local_days
from engine.data.dataset import Dataset, row_ids
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features.instants import NEVER
from engine.features.table import FeatureTable, ensure_table
from engine.features.vocabulary import group_labels
from engine.lifecycle.challenger_gate import Judged
from engine.runtime import digest, environment, seal, storage
from engine.runtime.environment import threads_of
from engine.runtime.run import Run
from engine.scoring.predictor import Predictor, predictor_of
from engine.training.blocks import block_columns, blocks_of
from engine.training.bundle import Bundle, find_model, read_bundle, spec_of
from engine.training.bundle_spec import admit
from engine.training.classes import target_values
from engine.training.evaluate import Scored
from engine.training.gate import check_gate, scores_table
from engine.training.ripening import label_horizon, label_times
from engine.training.weights import row_weights, weight_column

FORMAT = 1
CHUNK_ROWS = 131_072


@dataclass(frozen=True)
class Periods:
    """Instants in microseconds UTC: train [start, valid), early stopping [valid, judge), judgement [judge, stop)."""

    start: int
    valid: int
    judge: int
    stop: int
    now: int

    @property
    def empty(self) -> bool:
        """Whether no time is left to judge on, or to train on."""
        return not self.start < self.valid <= self.judge < self.stop


@dataclass(frozen=True)
class History:
    """A dataset with the event times of its rows and the times when their labels became known."""

    config: Config
    dataset: Dataset
    event: np.ndarray  # int64[n] microseconds UTC, ascending
    known: np.ndarray  # int64[n]; NEVER for a row without a label

    @classmethod
    def read(cls, config: Config, run: Run) -> History:
        """The labels of the config's dataset, ingested where the store lacks it."""
        dataset = ensure_dataset(config, run)
        return cls(config, dataset, *label_times(config, dataset))


def horizon_of(policy: RetrainConfig, event: np.ndarray, known: np.ndarray, now: int) -> int:
    """Age in microseconds at which a row's label is expected."""
    return policy.maturity.microseconds if policy.maturity is not None else label_horizon(event, known, now)


def periods_of(policy: RetrainConfig, first: int, now: int, horizon: int, seen_until: int | None) -> Periods:
    """The periods of a challenger decided on at `now`; the first model (`seen_until=None`) keeps no rows for judgement.

    The judged rows are the newest mature ones that the champion has not seen.
    """
    stop = now - horizon
    judge = stop if seen_until is None else max(stop - policy.judge_length.microseconds, seen_until)
    start = first if policy.window == "expanding" else max(first, judge - policy.window_length.microseconds)
    return Periods(start, judge - policy.valid_length.microseconds, judge, stop, now)


def challenger_config(config: Config, periods: Periods, start_from: Path | None = None) -> Config:
    """The config that trains on these periods and on labels known by now, perhaps from the weights of a bundle."""

    def bounds(start: int, stop: int) -> tuple[str, ...]:
        return (units.format_instant(start), units.format_instant(stop)) if start < stop else ()

    split = (
        dataclasses.replace(config.split, test=())
        if not config.data.timed
        else SplitConfig(
            train=bounds(periods.start, periods.valid),
            valid=bounds(periods.valid, periods.judge),
            known_by=units.format_instant(periods.now),
            ripening="none",  # the periods have waited already
        )
    )
    # Keys that training does not read must not change its plan.
    aside = {
        name: schema.build(schema.hints(Config)[name], {}, name) for name in ("score", "monitor", "retrain", "backtest")
    }
    settings = dataclasses.replace(config.train, start_from=None if start_from is None else str(start_from))
    return dataclasses.replace(config, split=split, train=settings, **aside)


def check_anew(config: Config) -> None:
    """Raise UserError for a config that would not train a model anew on other periods."""
    if config.model.blend.bundles:
        raise UserError(
            "the model must be one that is trained anew on other rows, but model.blend.bundles are finished models, found "
            f"{', '.join(config.model.blend.bundles)}: name their kinds and settings in model.blend.models"
        )


def check_seeds(config: Config) -> None:
    """Raise UserError for a config whose seeds would not follow train.seed, where models with other seeds are compared."""
    if not isinstance(config.train.seeds, int):
        raise UserError(
            f"train.seeds must be a number where models with other seeds are compared, found {list(config.train.seeds)}: write "
            f"train.seeds={len(config.train.seeds)}"
        )


def spec_config(config: Config, bundle: Bundle) -> Config:
    """The config with a model's own data and feature specification; the paths of the raw files come from the config."""
    data, features = spec_of(bundle, config)
    return dataclasses.replace(config, data=data, features=features, split=SplitConfig())


class Workshop:
    """Models in memory, with their features and scores, for the duration of one command.

    With `cache` (a folder) scores are stored by content: code, model, dataset and rows.
    """

    def __init__(self, history: History, run: Run, cache: Path | None = None) -> None:
        self.history = history
        self.run = run
        self.cache = cache
        self.code = environment.code()["engine_digest"]
        self._predictors: dict[str, Predictor] = {}
        self._tables: dict[str, FeatureTable] = {}

    def predictor(self, bundle: Path) -> Predictor:
        """The model of a bundle; files and gate are checked the first time."""
        key = str(bundle.resolve())
        if key not in self._predictors:
            found = read_bundle(find_model(str(bundle), Path()))
            admit(found, self.history.config)
            predictor = predictor_of(found, threads_of(self.history.config))
            check_gate(predictor.bundle, predictor.model)
            self._predictors[key] = predictor
        return self._predictors[key]

    def table(self, predictor: Predictor) -> FeatureTable:
        """The raw features that a model reads, from the store."""
        spec = spec_config(self.history.config, predictor.bundle)
        key = digest.of_json([schema.plain(spec.data), schema.plain(spec.features)])
        if key not in self._tables:
            self._tables[key] = ensure_table(spec, self.run, ensure_dataset(spec, self.run))
        return self._tables[key]

    def scores(self, predictor: Predictor, rows: tuple[int, int]) -> np.ndarray:
        """Scores of a range of rows."""
        table = self.table(predictor)
        if self.cache is None:
            return scores_of(predictor, table, rows)
        recipe = digest.of_json([FORMAT, self.code, predictor.digest, table.dataset.digest, rows])
        path = self.cache / f"{recipe}.parquet"
        record = path.with_suffix(".json")
        if not _is_whole(path, record):
            storage.write_parquet(path, scores_table(scores_of(predictor, table, rows)))
            storage.write_json(record, seal.checked(dict(seal.record_of(path))))
        found = storage.read_parquet(path)
        columns = [np.asarray(column) for column in found.columns]
        return columns[0] if found.column_names == ["score"] else np.stack(columns, axis=1)


def scores_of(predictor: Predictor, table: FeatureTable, rows: tuple[int, int]) -> np.ndarray:
    """Scores of a range of rows, read in pieces."""
    parts = [
        predictor.bundle.heads.of(predictor.scores(table.read((low, min(low + CHUNK_ROWS, rows[1])))))
        for low in range(rows[0], rows[1], CHUNK_ROWS)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def labelled_rows(history: History, start: int, stop: int, known_by: int | None) -> np.ndarray:
    """int64[n] rows whose event is in [start, stop) and whose target is known by an instant (None: ever)."""
    low, high = history.dataset.row_range(start, stop)
    known = history.known[low:high]
    mask = known != NEVER
    if known_by is not None:
        mask &= known <= known_by
    return low + np.flatnonzero(mask)


def score_both(workshop: Workshop, champion: Predictor, challenger: Predictor, periods: Periods) -> Judged:
    """Both models' scores of the judged rows. Raises UserError where the two cannot be compared row by row."""
    history = workshop.history
    rows = history.dataset.row_range(periods.judge, periods.stop)
    for predictor in (champion, challenger):
        _check_same_rows(history, workshop.table(predictor), predictor, rows)
    if champion.bundle.model["classes"] != challenger.bundle.model["classes"]:
        raise UserError(
            f"both models must have the same classes, found {champion.bundle.model['classes']} in the champion and "
            f"{challenger.bundle.model['classes']} in the challenger: promote by hand"
        )
    classes = tuple(challenger.bundle.model["classes"])
    kind = max(predictor.model.target.kind for predictor in (champion, challenger))  # float64 where either needs it
    known = labelled(history, periods, classes, kind, workshop.run)
    old, new = (workshop.scores(predictor, rows)[known.places] for predictor in (champion, challenger))
    return Judged(known.target, old, new, known.slices, known.days, known.blocks, known.weight)


@dataclass(frozen=True)
class Labelled:
    """Rows of a period that have a label: places int64[n] from the period's first row, target float64[n], days, blocks and
    weight [n] as in Scored, slices name -> text [n].
    """

    places: np.ndarray
    target: np.ndarray
    days: np.ndarray
    blocks: np.ndarray
    weight: np.ndarray | None
    slices: dict[str, np.ndarray]

    def scored(self, scores: np.ndarray) -> Scored:
        """With the scores [m] or [m, classes] of all rows of the period."""
        return Scored(self.target, scores[self.places], self.days, self.blocks, self.weight)


def labelled(
    history: History, periods: Periods, classes: tuple[str, ...], kind: str, run: Run | None = None
) -> Labelled:
    """The judged rows with a label. Rows of a class that training never saw are left out, and `run`, where there is one, says
    how many. Targets are rounded to `kind`, as in training.
    """
    config = history.config
    low, high = history.dataset.row_range(periods.judge, periods.stop)
    rows = labelled_rows(history, periods.judge, periods.stop, periods.now)
    names = [name for name in config.evaluate.slices if not config.data.columns[name].sensitive]
    label, time, weight = config.data.target or "", config.data.event_time, weight_column(config)
    columns = [label, time, *names, *block_columns(config.evaluate), *([weight] if weight else [])]
    facts = history.dataset.read(list(dict.fromkeys(columns)), rows=(low, high)).take(pa.array(rows - low))
    with np.errstate(over="ignore"):
        target = target_values(facts[label], classes).astype(kind).astype(np.float64)
    seen = np.isfinite(target)  # a class that training never saw has no index
    if run is not None and not seen.all():
        run.warn(f"{int((~seen).sum()):,} judged rows have a {label} that training never saw: they are left out")
    days = local_days(facts[time], config.data.day_zone)
    return Labelled(
        places=(rows - low)[seen],
        target=target[seen],
        days=days[seen],
        blocks=blocks_of(config.evaluate, days, rows, facts)[seen],
        weight=row_weights(facts[weight], rows, weight)[seen] if weight else None,
        slices={name: group_labels(facts[name])[seen] for name in names},
    )


def _check_same_rows(history: History, table: FeatureTable, predictor: Predictor, rows: tuple[int, int]) -> None:
    data = history.config.data
    if table.dataset.digest == history.dataset.digest:
        return
    mine = row_ids(history.dataset.read(data.ids, rows=rows), data.ids)
    ids = predictor.bundle.data.ids
    theirs = row_ids(table.dataset.read(ids, rows=rows), ids) if table.dataset.rows >= rows[1] else None
    if theirs is None or not mine.equals(theirs):
        raise UserError(
            f"model {predictor.digest[:12]} reads the sources into other rows than this config: the two cannot be "
            "compared row by row; promote by hand"
        )


def write_judged(path: Path, judged: Judged) -> str:
    """Store the judged rows for a replay; returns the digest of their values."""
    table = judged_table(judged)
    storage.write_parquet(path, table)
    return digest.of_table(table)


def judged_table(judged: Judged) -> pa.Table:
    """`target`, `day`, `block`, perhaps `weight`, `champion`, `challenger` (one column a class where there are several) and
    `slice_<name>`.
    """
    columns: dict[str, Any] = {"target": judged.target, "day": judged.days, "block": judged.blocks}
    if judged.weight is not None:
        columns["weight"] = judged.weight
    for side, scores in (("champion", judged.champion), ("challenger", judged.challenger)):
        if scores.ndim == 1:
            columns[side] = scores
        else:
            columns |= {f"{side}_{index}": np.ascontiguousarray(scores[:, index]) for index in range(scores.shape[1])}
    columns |= {f"slice_{name}": pa.array(values, pa.string()) for name, values in judged.slices.items()}
    return pa.table(columns)


def _is_whole(path: Path, record: Path) -> bool:
    """Whether stored scores exist and are undamaged."""
    try:
        return seal.is_whole(path, seal.read_checked(record, seal.FileRecord))
    except UserError:  # missing or damaged: they are recomputed
        return False


def read_judged(path: Path, expected: str) -> Judged:
    """The judged rows of a decision. Raises UserError when their digest is not the recorded one."""
    table = storage.read_parquet(path)
    if digest.of_table(table) != expected:
        raise UserError(f"{path} must hold the rows that were judged (digest {expected[:12]}), found others")

    def side(name: str) -> np.ndarray:
        if name in table.column_names:
            return np.asarray(table[name])
        return np.stack([np.asarray(table[item]) for item in table.column_names if item.startswith(f"{name}_")], axis=1)

    slices = {
        name.removeprefix("slice_"): np.asarray(table[name].to_pylist(), object).astype(str)
        for name in table.column_names
        if name.startswith("slice_")
    }

    def column(name: str) -> np.ndarray | None:
        return np.asarray(table[name]) if name in table.column_names else None

    days, blocks = column("day"), column("block")
    if days is None or blocks is None:  # before format 5 of a decision: as if all were of one day
        days = blocks = np.zeros(len(table), np.int64)
    target, sides = np.asarray(table["target"]), (side("champion"), side("challenger"))
    return Judged(target, *sides, slices, days, blocks, column("weight"))
