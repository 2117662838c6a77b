"""The window that is monitored: scored from the dataset, or read from a scoring run; its profile, sample and outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units
from engine.config.tree import Config
from engine.data.calendar import day_start, local_days
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import required_columns
from engine.features.instants import NEVER, known_times
from engine.features.profile import Profile, ProfileRecord, ProfileSpec
from engine.features.spec import known_anchor
from engine.features.table import FeatureTable, ensure_table
from engine.features.vocabulary import as_texts
from engine.monitoring.alarm_lines import CalibrationPlan
from engine.monitoring.business import value_type
from engine.monitoring.drift import Current
from engine.monitoring.performance import UNASKED, UNJUDGED, WAITING, Outcomes
from engine.monitoring.reference import Reference
from engine.runtime import records
from engine.runtime.run import Run, RunRecord, as_written, load_metrics, load_record
from engine.scoring.predictor import Predictor, load, score_names
from engine.scoring.read import predictions
from engine.training.blocks import block_columns, blocks_of
from engine.training.bundle import Bundle
from engine.training.classes import target_values
from engine.training.drift_reference import OUTCOME_ROWS, profiles_by_day
from engine.training.ripening import label_horizon, label_times
from engine.training.row_sample import chosen_rows, chunks, encode_sample, pieces, sample_table
from engine.training.weights import row_weights, weight_column

DAY = 86_400_000_000
LONGEST_WINDOW = 3_660
HORIZON_SPANS = 4  # times `monitor.recent` before the window, in whose rows labels are timed


@dataclass(frozen=True)
class Window:
    """What is monitored: bounds in microseconds UTC, its profile, and its rows if they are available."""

    start: int
    stop: int
    profile: Profile
    outcomes: Outcomes | None
    sample: pa.Table | None
    operational: dict[str, records.Number]
    quality: str = WAITING  # the status of quality if there are no outcomes, or labels were not asked for
    reason: str = "the window holds no rows"
    days: Mapping[int, Profile] = field(default_factory=dict)  # of each whole local day, where they are known
    recent: Outcomes | None = None  # labelled rows of the days before it
    blocks: int | None = None  # of a batch of a table without time: blocks of the reference that have as many rows
    others: Mapping[str, Outcomes] = field(default_factory=dict)  # of the targets beside the main one


def sliced_window(config: Config, run: Run, bundle: Bundle, reference: Reference, needed: list[str]) -> Window:
    """A slice of the dataset, featurised and scored as `score` does it."""
    start, stop = config.periods["monitor.window"]
    predictor = load(config.monitor.model, config.paths.runs, config.resources.threads or 1)
    dataset = required_columns.ensure(config, run, empty=False)
    table = ensure_table(config, run, dataset)
    rows = dataset.row_range(start, stop)
    days: dict[int, Profile] = {}
    parts: list[dict[str, Outcomes]] = []
    with run.progress("monitor", rows[1] - rows[0]) as progress:
        for part in chunks(rows):
            raw = table.read(part)
            numeric, codes = bundle.encoder.transform(raw)
            scores = predictor.encoded_scores(numeric, codes)
            add_days(
                days, profiles_by_day(config, dataset, reference.profile.spec, np.arange(*part), raw, scores, codes)
            )
            if config.monitor.labels or config.monitor.business:
                parts.append(outcomes_by_target(config, bundle, dataset, np.arange(*part), scores, needed))
            progress.advance(part[1] - part[0])
    sample = sample_of(config, bundle, table, rows) if config.monitor.multivariate else None
    operational = {"quarantine_rate": quarantine_rate(dataset)}
    recent = recent_outcomes(config, bundle, predictor, table, (start, stop))
    profile = whole(reference.profile.spec, days)
    days = whole_days(reference.profile.spec, days, (start, stop), config.data.time_zone)
    main, others = merged(config, parts)
    return Window(start, stop, profile, main, sample, operational, *asked(config), days, recent, others=others)


def add_days(days: dict[int, Profile], more: Iterable[tuple[int, Profile]]) -> None:
    """Add profiles of local days to those that are there."""
    for day, profile in more:
        days[day] = days[day].merge(profile) if day in days else profile


def whole_days(
    spec: ProfileSpec, days: Mapping[int, Profile], period: tuple[int, int], zone: str
) -> dict[int, Profile]:
    """Profiles of the local days that lie in a period [from, to) from their first to their last instant, up to the last one with
    rows. A day without rows before it has an empty profile: it is an outage, or a day on which nothing happens.
    """
    first = int(local_days(pa.array([period[0]], pa.timestamp("us", tz="UTC")), zone)[0])
    return {
        day: days[day] if day in days else Profile.empty(spec)
        for day in range(first, max(days, default=first - 1) + 1)
        if period[0] <= day_start(day, zone) and day_start(day + 1, zone) <= period[1]
    }


def whole(spec: ProfileSpec, days: Mapping[int, Profile]) -> Profile:
    """The profile of all days together."""
    found = Profile.empty(spec)
    for profile in days.values():
        found = found.merge(profile)
    return found


def recent_outcomes(
    config: Config, bundle: Bundle, predictor: Predictor, table: FeatureTable, window: tuple[int, int]
) -> Outcomes | None:
    """A sample of `monitor.recent` days, with the labels that are known when the window ends.

    They end before the window, and early enough for labels to have come: of younger rows only the fast ones are known, and
    these may be mostly of one class.
    """
    dataset, target = table.dataset, config.data.target or ""
    if not config.monitor.labels or config.data.columns[target].known_at is None:
        return None
    length = config.monitor.recent.microseconds
    looked_at = dataset.row_range(window[0] - HORIZON_SPANS * length, window[1])
    event, known = label_times(config, dataset, looked_at)
    stop = min(window[0], window[1] - label_horizon(event, known, window[1]))
    rows = dataset.row_range(stop - length, stop)
    parts = []
    for part in chunks(rows):
        take = chosen_rows(dataset, config.data.ids, np.arange(*part), OUTCOME_ROWS, rows[1] - rows[0])
        encoded = bundle.encoder.transform(table.read(part).take(pa.array(take)))
        scores = bundle.heads.of(predictor.encoded_scores(*encoded))
        times = dict.fromkeys([config.data.event_time, *known_anchor(config.data.columns[target])])
        facts = dataset.read(list(times), rows=part)
        known = known_times(facts, config.data.columns[target])[take]
        classes = bundle.heads.main.classes
        found = outcomes_of(config, classes, dataset, np.arange(*part), np.zeros(part[1] - part[0]), []).take(take)
        labels = np.where((known != NEVER) & (known <= window[1]), found.target, np.nan)
        parts.append(replace(found, scores=scores, target=labels))
    return merge_outcomes(parts)


def asked(config: Config) -> tuple[str, str]:
    """(status, reason) of the quality of a window without labelled rows."""
    if config.monitor.labels:
        return WAITING, "the window holds no rows"
    return UNASKED, "labels were not asked for (monitor.labels=false)"


def sample_of(config: Config, bundle: Bundle, table: FeatureTable, rows: tuple[int, int]) -> pa.Table:
    """About SAMPLE_ROWS encoded rows of the window, chosen by hash of their id as the reference's are."""
    blocks = encode_sample(config, table, bundle.encoder, list(pieces(np.arange(*rows))), max(rows[1] - rows[0], 1))
    return sample_table(config, bundle.encoder, *blocks)


@dataclass(frozen=True)
class Stored:
    """A finished scoring run: its directory, its record, its profile and its figures."""

    directory: Path
    record: RunRecord
    profile: Profile
    figures: dict[str, records.Number]


def read_stored(config: Config, run: Run, reference: Reference) -> Stored:
    """The scoring run of `monitor.run`. Raises UserError where it is not finished."""
    directory = Path(config.monitor.run)
    scored = load_metrics(directory, refuse=True) if (directory / "DONE").exists() else {}
    if scored.get("score/rows") == 0:
        raise UserError(f"monitor.run must name a scoring run with rows, found none in {directory}: name another run")
    state = records.read(as_written(directory, "profile.json", refuse=True), ProfileRecord)
    profile = Profile.from_json(state, reference.profile.spec)
    record = load_record(directory, refuse=True)
    if not (directory / "DONE").exists():
        raise UserError(f"{directory} is not finished (no DONE): monitor a scoring run that is")
    for name, value in record["outputs"].items():
        run.add_used(f"scoring {name}", value)
    figures = {name.removeprefix("score/"): value for name, value in load_metrics(directory, refuse=True).items()}
    return Stored(directory, record, profile, figures)


def stored_window(config: Config, run: Run, bundle: Bundle, reference: Reference, needed: list[str]) -> Window:
    """A scoring run's profile; its rows are read only for labels."""
    stored = read_stored(config, run, reference)
    directory, record, profile = stored.directory, stored.record, stored.profile
    start, stop = scored_period(config, directory, record)
    outcomes, recent, others, (quality, reason) = None, None, dict[str, Outcomes](), asked(config)
    if config.monitor.labels or config.monitor.business:
        try:
            found = stored_outcomes(config, run, bundle, directory, (start, stop), needed)
            outcomes, others = merged(config, [found])
        except UserError as error:
            quality, reason = UNJUDGED, f"the rows of the scoring run cannot be matched with the dataset: {error}"
        else:
            recent = recently_known(config, run, bundle, (start, stop))
    edges = local_days(pa.array([start, stop - 1], pa.timestamp("us", tz="UTC")), config.data.day_zone)
    days = {int(edges[0]): profile} if edges[0] == edges[1] else {}
    if record["config"].get("score", {}).get("between"):
        days = whole_days(reference.profile.spec, days, (start, stop), config.data.time_zone)
    return Window(start, stop, profile, outcomes, None, stored.figures, quality, reason, days, recent, others=others)


def recently_known(config: Config, run: Run, bundle: Bundle, period: tuple[int, int]) -> Outcomes | None:
    """`recent_outcomes` of a scoring run: the days before it are scored here. None where the dataset has none of them."""
    target = config.data.target or ""
    if not (config.monitor.labels and config.monitor.recent.microseconds and target):
        return None
    if config.data.columns[target].known_at is None:
        return None
    dataset = required_columns.ensure(config, run, empty=False)
    if not dataset.row_range(0, period[0])[1]:
        return None
    predictor = load(config.monitor.model, config.paths.runs, config.resources.threads or 1)
    return recent_outcomes(config, bundle, predictor, ensure_table(config, run, dataset), period)


def scored_period(config: Config, directory: Path, record: RunRecord) -> tuple[int, int]:
    """[from, to) of the events that a scoring run scored: as asked, or from its first to its last event."""
    bounds = record["config"].get("score", {}).get("between") or ()
    if bounds:
        return units.between(tuple(bounds), config.data.time_zone)
    table = predictions(directory, store=config.paths.store, trust=config.trust)
    times = table[config.data.event_time].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    if not len(times):
        raise UserError(f"{directory} has scored no row: there is nothing to monitor")
    values = np.asarray(times)
    return int(values.min()), int(values.max()) + 1


def stored_outcomes(
    config: Config, run: Run, bundle: Bundle, directory: Path, period: tuple[int, int], needed: list[str]
) -> dict[str, Outcomes]:
    """Scores of a scoring run beside the labels that the dataset has by now, by target."""
    dataset = required_columns.ensure(config, run, empty=False)
    rows = dataset.row_range(*period)
    table = predictions(directory, store=config.paths.store, trust=config.trust)
    if table.num_rows != rows[1] - rows[0]:
        raise UserError(f"the run scored {table.num_rows} rows, the dataset now has {rows[1] - rows[0]} in its period")
    there = row_ids(dataset.read(config.data.ids, rows=rows), config.data.ids)
    if not pc.all(pc.equal(table["row_id"], there)).as_py() and table.num_rows:
        raise UserError("the run scored other rows than the dataset now has in its period, by their ids")
    return outcomes_by_target(config, bundle, dataset, np.arange(*rows), scores_in(table, bundle), needed)


def scores_in(table: pa.Table, bundle: Bundle) -> np.ndarray:
    """The scores [n] or [n, k] of all targets, of a table of predictions."""
    names = score_names(bundle.heads.names)
    scores = np.stack([np.asarray(table[name]) for name in names], axis=1)
    return scores[:, 0] if names == ["score"] else scores


def outcomes_by_target(
    config: Config, bundle: Bundle, dataset: Dataset, rows: np.ndarray, scores: np.ndarray, needed: list[str]
) -> dict[str, Outcomes]:
    """`outcomes_of` each target, from the scores of all."""
    heads = bundle.heads
    return {
        name: outcomes_of(view, heads.items[k].classes, dataset, rows, heads.of(scores, k), [] if k else needed)
        for k, (name, view) in enumerate(zip(config.target_names, config.by_target, strict=True))
    }


def merged(config: Config, parts: list[dict[str, Outcomes]]) -> tuple[Outcomes | None, dict[str, Outcomes]]:
    """The outcomes of the main target, and of others by name, of parts one after the other; None without any."""
    found = {name: merge_outcomes([part[name] for part in parts]) for name in config.target_names}
    others = {name: item for name, item in found.items() if item is not None}
    return others.pop(config.target_names[0], None), others


def outcomes_of(
    config: Config,
    classes: tuple[str, ...],
    dataset: Dataset,
    rows: np.ndarray,
    scores: np.ndarray,
    needed: list[str],
) -> Outcomes:
    """Of dataset rows int64[n], ascending: days, targets (NaN where not known or not asked for), scores, and the columns that
    business metrics read.
    """
    target = config.data.target if config.monitor.labels else None
    weight = weight_column(config)
    names = [config.data.event_time, *block_columns(config.evaluate), *needed]
    names += [name for name in (target, weight) if name]
    facts = dataset.take(list(dict.fromkeys(names)), rows)
    labels = target_values(facts[target], classes) if target else np.full(len(scores), np.nan)
    days = local_days(facts[config.data.event_time], config.data.day_zone)
    unknown = int((facts[target].is_valid().to_numpy() & ~np.isfinite(labels)).sum()) if target else 0
    return Outcomes(
        days,
        labels,
        scores,
        {name: column_values(facts[name]) for name in needed},
        unknown,
        row_weights(facts[weight], rows, weight, np.isfinite(labels)) if weight else None,
        blocks_of(config.evaluate, days, rows, facts),
    )


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    """float64[n] of numbers and truth values (null: NaN), texts of anything else (null: None)."""
    if value_type(column.type) == pa.float64():
        return np.asarray(column.cast(pa.float64(), safe=False).combine_chunks().to_numpy(zero_copy_only=False))
    return np.asarray(as_texts(column).to_numpy(zero_copy_only=False), object)


def merge_outcomes(parts: list[Outcomes]) -> Outcomes | None:
    """The parts one after the other; None without any."""
    if not parts:
        return None
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    days, target, scores, blocks = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("days", "target", "scores", "blocks")
    )
    weights = [part.weight for part in parts if part.weight is not None]
    weight = np.concatenate(weights) if weights else None
    return Outcomes(days, target, scores, columns, sum(part.unknown for part in parts), weight, blocks)


def quarantine_rate(dataset: Dataset) -> float | None:
    """Share of the source rows that ingest set aside."""
    totals = dataset.manifest["accounting"]
    return totals["quarantined"] / totals["rows_in"] if totals["rows_in"] else None


def plan_of(config: Config, window: Window) -> CalibrationPlan:
    """How the line is calibrated for a window of this length."""
    settings = config.monitor
    return CalibrationPlan(
        length=days_of(window),
        alpha=settings.alpha,
        psi_floor=settings.psi_floor,
        season=settings.season,
        resamples=settings.resamples,
        block=settings.block,
        seed=settings.seed,
    )


def days_of(window: Window) -> int:
    """Days of the window; one that a row of another century stretches is calibrated like LONGEST_WINDOW days. Of a batch its
    blocks.
    """
    if window.blocks is not None:
        return window.blocks
    return min(max(1, round((window.stop - window.start) / DAY)), LONGEST_WINDOW)


def current_of(config: Config, window: Window) -> Current:
    """The profile with the local days of its bounds; a batch has none."""
    if window.blocks is not None:
        return Current(window.profile, None, window.blocks)
    edges = pa.array([window.start, window.stop - 1], pa.timestamp("us", tz="UTC"))
    first, last = local_days(edges, config.data.day_zone)
    return Current(window.profile, np.arange(first, last + 1), (window.stop - window.start) / DAY)
