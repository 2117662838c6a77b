"""The `monitor` step: one window against the reference of a model; drift, performance, alarms, report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units
from engine.config.tree import Config
from engine.data.calendar import day_start, local_days
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import required_columns
from engine.features.encode import as_texts
from engine.features.profile import Profile, ProfileRecord
from engine.features.table import FeatureTable, ensure_table
from engine.monitoring import alerts, history, report
from engine.monitoring.alarm_lines import FAMILIES, FEW, MIN_SCALE, NAMES, CalibrationPlan, windows_needed
from engine.monitoring.drift import FLOORS, Current, Drift, compare
from engine.monitoring.multivariate import compare_samples
from engine.monitoring.performance import (
    SHARE,
    UNASKED,
    UNJUDGED,
    WAITING,
    Judge,
    Outcomes,
    business,
    check_expressions,
    estimate,
    measure,
    read_outcomes,
)
from engine.monitoring.reference import Reference, read_reference
from engine.monitoring.rising_columns import rising
from engine.monitoring.statistics import MEANING, PREDICTION, profile_counts
from engine.runtime import digest, records, storage
from engine.runtime.run import Run, as_written, load_metrics, load_record
from engine.scoring.predictor import load, score_names
from engine.scoring.read import predictions
from engine.training.bundle import Bundle, find_model, quantile_of, read_bundle
from engine.training.bundle_spec import with_spec_of
from engine.training.classes import target_values
from engine.training.drift_reference import OUTCOME_ROWS
from engine.training.losses import LOSSES
from engine.training.row_sample import chosen_rows, chunks, encode_sample, sample_table

FORMAT = 2  # 1: without `unjudged`, and without `status` of performance
DAY = 86_400_000_000
LONGEST_WINDOW = 3_660
DIGITS = 9  # significant digits of drift.json: the last bits of a sum may differ between processors
BETWEEN_VALUES = 2  # format of profile specifications whose edges lie between data values
SAID = 5  # causes named in words


@dataclass(frozen=True)
class Window:
    """What is monitored: bounds in microseconds UTC, its profile, and the rows where they are at hand."""

    start: int
    stop: int
    profile: Profile
    outcomes: Outcomes | None
    sample: pa.Table | None
    operational: dict[str, Any]
    quality: str = WAITING  # what is said of quality where there are no outcomes, or labels were not asked for
    reason: str = "the window holds no rows"


def monitor(config: Config, run: Run) -> dict[str, float]:
    """Compare the window (or a scoring run's profile) with the model's reference; write drift.json, history, report.

    Sets an alarm (exit code 2) for what `monitor.alarm_on` names, or says that it cannot be judged (exit code 3).
    Raises UserError for a mistake of the user.
    """
    began = time.monotonic()
    settings = config.monitor
    if bool(settings.window) == bool(settings.run):
        raise UserError("monitor must be told either monitor.window (as in 2020-04) or monitor.run (a scoring run)")
    alerts.announce(settings, run)
    bundle = read_bundle(find_model(settings.model, Path(config.paths.runs), "monitor.model"))
    config = with_spec_of(config, bundle)
    run.note(model=bundle.digest)
    needed = check_expressions(
        settings.business, config.data.columns, len(bundle.model["classes"]) * _multiclass(bundle), config.data.target
    )
    reference = read_reference(bundle.directory, bundle.encoder)
    if settings.rising == "leave_out":
        reference = dataclasses.replace(reference, rising=rising(config.features, reference))
    if reference.profile.spec.format < BETWEEN_VALUES:
        run.warn(
            "this model's bins lie on data values, as in earlier versions: a change of a flag, a rating or a count may stay "
            "unseen. Train the model again"
        )
    window = (stored_window if settings.run else sliced_window)(config, run, bundle, reference, needed)
    judge = judge_of(config, bundle, window)
    past = reference_outcomes(config, bundle, window, needed, run)
    drift = compare(
        reference, current_of(config, window), plan_of(config, window), settings.floors, settings.thresholds
    )
    record = build_record(config, bundle, reference, window, drift, judge, past)
    finish(config, run, reference, drift, record, plan_of(config, window))
    return metrics_of(record, drift, time.monotonic() - began)


def _multiclass(bundle: Bundle) -> bool:
    return bool(LOSSES[bundle.model["loss"]].task == "multiclass")


# ------------------------------------------------------------------------------------------------------ the window


def sliced_window(config: Config, run: Run, bundle: Bundle, reference: Reference, needed: list[str]) -> Window:
    """A slice of the dataset, featurised and scored as `score` does it."""
    start, stop = config.periods["monitor.window"]
    predictor = load(config.monitor.model, config.paths.runs, config.resources.threads or 1)
    dataset = required_columns.ensure(config, run, empty=False)
    table = ensure_table(config, run, dataset)
    rows = dataset.row_range(start, stop)
    profile, parts = Profile.empty(reference.profile.spec), []
    with run.progress("monitor", rows[1] - rows[0]) as progress:
        for part in chunks(rows):
            raw = table.read(part)
            numeric, codes = bundle.encoder.transform(raw)
            scores = predictor.encoded_scores(numeric, codes)
            profile = profile.merge(Profile.count(profile.spec, raw, scores, codes))
            if config.monitor.labels or config.monitor.business:
                parts.append(outcomes_of(config, bundle, dataset, part, scores, needed))
            progress.advance(part[1] - part[0])
    sample = sample_of(config, bundle, table, rows) if config.monitor.multivariate else None
    operational = {"quarantine_rate": quarantine_rate(dataset)}
    return Window(start, stop, profile, merge_outcomes(parts), sample, operational, *asked(config))


def asked(config: Config) -> tuple[str, str]:
    """(status, reason) of the quality of a window without labelled rows."""
    if config.monitor.labels:
        return WAITING, "the window holds no rows"
    return UNASKED, "labels were not asked for (monitor.labels=false)"


def sample_of(config: Config, bundle: Bundle, table: FeatureTable, rows: tuple[int, int]) -> pa.Table:
    """About SAMPLE_ROWS encoded rows of the window, chosen by hash of their id as the reference's are."""
    blocks = encode_sample(config, table, bundle.encoder, list(chunks(rows)), max(rows[1] - rows[0], 1))
    return sample_table(config, bundle.encoder, *blocks)


def stored_window(config: Config, run: Run, bundle: Bundle, reference: Reference, needed: list[str]) -> Window:
    """A scoring run's profile; its rows are read only for labels."""
    directory = Path(config.monitor.run)
    state = records.read(as_written(directory, "profile.json", refuse=True), ProfileRecord)
    profile = Profile.from_json(state, reference.profile.spec)
    record = load_record(directory, refuse=True)
    if not (directory / "DONE").exists():
        raise UserError(f"{directory} is not finished (no DONE): monitor a scoring run that is")
    for name, value in record["outputs"].items():
        run.add_used(f"scoring {name}", value)
    start, stop = scored_period(config, directory, record)
    figures = {name.removeprefix("score/"): value for name, value in load_metrics(directory, refuse=True).items()}
    outcomes, (quality, reason) = None, asked(config)
    if config.monitor.labels or config.monitor.business:
        try:
            outcomes = stored_outcomes(config, run, bundle, directory, (start, stop), needed)
        except UserError as error:
            quality, reason = UNJUDGED, f"the rows of the scoring run cannot be matched with the dataset: {error}"
    return Window(start, stop, profile, outcomes, None, figures, quality, reason)


def scored_period(config: Config, directory: Path, record: Mapping[str, Any]) -> tuple[int, int]:
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
) -> Outcomes:
    """Scores of a scoring run beside the labels that the dataset has by now."""
    dataset = required_columns.ensure(config, run, empty=False)
    rows = dataset.row_range(*period)
    table = predictions(directory, store=config.paths.store, trust=config.trust)
    if table.num_rows != rows[1] - rows[0]:
        raise UserError(f"the run scored {table.num_rows} rows, the dataset now has {rows[1] - rows[0]} in its period")
    there = row_ids(dataset.read(config.data.ids, rows=rows), config.data.ids)
    if not pc.all(pc.equal(table["row_id"], there)).as_py() and table.num_rows:
        raise UserError("the run scored other rows than the dataset now has in its period, by their ids")
    names = score_names(tuple(bundle.model["classes"]) if _multiclass(bundle) else ())
    scores = np.stack([np.asarray(table[name]) for name in names], axis=1)
    return outcomes_of(config, bundle, dataset, rows, scores[:, 0] if names == ["score"] else scores, needed)


def outcomes_of(
    config: Config, bundle: Bundle, dataset: Dataset, rows: tuple[int, int], scores: np.ndarray, needed: list[str]
) -> Outcomes:
    """Days, targets (NaN where not known or not asked for), scores, and the columns that business metrics read."""
    target = config.data.target if config.monitor.labels else None
    names = list(dict.fromkeys([config.data.event_time, *([target] if target else []), *needed]))
    facts = dataset.read(names, rows=rows)
    labels = target_values(facts[target], bundle.model["classes"]) if target else np.full(len(scores), np.nan)
    days = local_days(facts[config.data.event_time], config.data.time_zone)
    unknown = int((facts[target].is_valid().to_numpy() & ~np.isfinite(labels)).sum()) if target else 0
    return Outcomes(days, labels, scores, {name: column_values(facts[name]) for name in needed}, unknown)


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    """float64[n] of numbers and truth values (null: NaN), texts of anything else (null: empty)."""
    if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64(), safe=False).combine_chunks().to_numpy(zero_copy_only=False))
    if pa.types.is_decimal(column.type):
        return np.asarray(column.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False))
    return np.array([text or "" for text in as_texts(column).to_pylist()], object)


def merge_outcomes(parts: list[Outcomes]) -> Outcomes | None:
    """The parts one after the other; None without any."""
    if not parts:
        return None
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    days, target, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("days", "target", "scores")
    )
    return Outcomes(days, target, scores, columns, sum(part.unknown for part in parts))


def quarantine_rate(dataset: Dataset) -> float | None:
    """Share of the source rows that ingest set aside."""
    totals = dataset.manifest["accounting"]
    return totals["quarantined"] / totals["rows_in"] if totals["rows_in"] else None


# ---------------------------------------------------------------------------------------------------- what is asked


def plan_of(config: Config, window: Window) -> CalibrationPlan:
    """How the line is calibrated for a window of this length."""
    settings = config.monitor
    return CalibrationPlan(
        length=_days_of(window),
        alpha=settings.alpha,
        psi_floor=settings.psi_floor,
        season=settings.season,
        resamples=settings.resamples,
        block=settings.block,
        seed=settings.seed,
    )


def _days_of(window: Window) -> int:
    """Days of the window; one that a row of another century stretches is calibrated like LONGEST_WINDOW days."""
    return min(max(1, round((window.stop - window.start) / DAY)), LONGEST_WINDOW)


def current_of(config: Config, window: Window) -> Current:
    """The profile with the local days of its bounds."""
    edges = pa.array([window.start, window.stop - 1], pa.timestamp("us", tz="UTC"))
    first, last = local_days(edges, config.data.time_zone)
    return Current(window.profile, np.arange(first, last + 1), (window.stop - window.start) / DAY)


def judge_of(config: Config, bundle: Bundle, window: Window) -> Judge:
    """How a loss of quality is measured."""
    settings = config.monitor
    return Judge(
        loss=bundle.model["loss"],
        evaluate=config.evaluate,
        quantile=quantile_of(bundle),
        alpha=settings.alpha,
        floor=settings.performance_floor,
        min_labelled=settings.min_labelled.fraction,
        length=_days_of(window),
        block=settings.block,
        seed=settings.seed,
        classes=tuple(bundle.model["classes"]) if _multiclass(bundle) else (),
    )


def reference_outcomes(config: Config, bundle: Bundle, window: Window, needed: list[str], run: Run) -> Outcomes | None:
    """The bundle's labelled rows; with the columns that business metrics read, where the dataset still has those rows."""
    path = bundle.directory / "reference_outcomes.parquet"
    if not path.exists():
        return None
    outcomes = read_outcomes(storage.read_parquet(path))
    if not needed or window.outcomes is None:
        return outcomes
    dataset = required_columns.ensure(config, run, empty=False)
    zone, first, last = config.data.time_zone, int(outcomes.days.min()), int(outcomes.days.max())
    bounds = [day_start(day, zone) for day in (first, last + 1)]
    rows = dataset.row_range(*bounds)
    take = pa.array(chosen_rows(dataset, config.data.ids, rows, OUTCOME_ROWS, rows[1] - rows[0]))
    facts = dataset.read([config.data.target or "", *needed], rows=rows).take(take)
    labels = target_values(facts[config.data.target or ""], bundle.model["classes"])
    known = np.isfinite(labels)
    if not np.array_equal(labels[known], outcomes.target):
        run.warn("the validation rows are no longer those of the reference: business metrics over columns get no band")
        return outcomes
    columns = {name: column_values(facts[name])[known] for name in needed}
    return dataclasses.replace(outcomes, columns=columns)


# ------------------------------------------------------------------------------------------------------- the record


class Told(TypedDict):
    """An alarm, or what was noted or could not be judged."""

    kind: str
    text: str


class DriftRecord(TypedDict):
    """drift.json. What is inside of columns and measurements is for people; monitoring and retraining read what is named here."""

    format: Annotated[int, records.Format(FORMAT)]
    verdict: str
    headline: str
    alarm: bool
    alarms: list[Told]
    unjudged: NotRequired[list[Told]]
    noted: list[Told]
    causes: list[str]
    window: tuple[str, str]
    rows: records.Count
    model: str
    profile: str
    calibration: dict[str, Any]
    attribution: list[dict[str, Any]]
    columns: list[ColumnRecord]
    discoveries: dict[str, Any]
    multivariate: dict[str, Any]
    performance: PerformanceRecord
    estimated: dict[str, Any]
    business: dict[str, Any]
    operational: dict[str, Any]
    meaning: dict[str, str]


class ColumnRecord(TypedDict):
    """One column of drift.json."""

    name: str
    kind: str
    status: str


class MetricRecord(TypedDict):
    """A measured metric."""

    value: float | None


class PerformanceRecord(TypedDict, total=False):
    """What labelled rows say; empty where nothing was asked."""

    status: str
    reason: str
    metrics: dict[str, MetricRecord]


def build_record(
    config: Config,
    bundle: Bundle,
    reference: Reference,
    window: Window,
    drift: Drift,
    judge: Judge,
    past: Outcomes | None,
) -> dict[str, Any]:
    """drift.json: what was compared, found and concluded. No path, run id or time of day is in it."""
    settings, zone = config.monitor, config.data.time_zone
    measured = measured_performance(config, window, past, judge)
    expected = expected_performance(reference, window, past, judge)
    for name, item in expected.get("metrics", {}).items():
        real = measured.get("metrics", {}).get(name, {}).get("value")
        item["error"] = item["value"] - real if real is not None else None
    custom = business(settings.business, past, window.outcomes, judge)
    sample = storage.read_parquet(bundle.directory / "reference_sample.parquet")
    record: dict[str, Any] = {
        "format": FORMAT,
        "verdict": "",
        "headline": "",
        "alarm": False,
        "alarms": [],
        "causes": [cause["text"] for cause in drift.causes if cause["notable"]][:SAID],
        "window": [units.format_instant(window.start, zone), units.format_instant(window.stop, zone)],
        "rows": window.profile.rows,
        "model": bundle.digest,
        "profile": window.profile.digest,
        "calibration": calibration_record(drift, plan_of(config, window), reference, {**FLOORS, **settings.floors}),
        "attribution": drift.causes,
        "columns": drift.columns,
        "discoveries": {
            "method": f"Benjamini-Hochberg at {settings.alpha}",
            "reliable": drift.line.separate >= FEW,  # p-values from fewer windows flatter
            "columns": drift.discoveries,
            "p_values": drift.p_values,
        },
        "multivariate": compare_samples(sample, window.sample, plan_of(config, window).length)
        if settings.multivariate
        else {},
        "performance": measured,
        "estimated": expected,
        "business": custom,
        "operational": window.operational,
        "meaning": MEANING,
    }
    conclude(record, drift, settings.alarm_on)
    return dict(storage.finite(record, DIGITS))


def measured_performance(config: Config, window: Window, past: Outcomes | None, judge: Judge) -> dict[str, Any]:
    """Metrics on labelled rows, or the reason why there are none."""
    if window.outcomes is None or not config.monitor.labels:
        status, reason = (window.quality, window.reason) if config.monitor.labels else asked(config)
        return {"alarm": False, "status": status, "reason": f"not computable, because {reason}"}
    return measure(past, window.outcomes, judge)


def expected_performance(reference: Reference, window: Window, past: Outcomes | None, judge: Judge) -> dict[str, Any]:
    """Metrics expected from the scores alone."""
    column = next(item for item in reference.columns if item.kind == PREDICTION)
    return estimate(past, column, profile_counts(window.profile)[column.name].values[0], judge.loss)


def calibration_record(
    drift: Drift, plan: CalibrationPlan, reference: Reference, floors: Mapping[str, float]
) -> dict[str, Any]:
    """The line and what it may promise: target rate, rate on held-out windows, whether windows are enough."""
    line, out = drift.line, drift.held_out
    needed = windows_needed(plan.alpha)
    realised = out.alarms / out.windows if out.windows else None
    enough = line.separate >= needed
    words = (
        f"target {plan.alpha:.1%} a window; "
        + (
            f"realised {out.alarms} of {out.windows} held-out windows ({realised:.1%}), "
            f"{out.over_line} over the line alone; "
            if realised is not None
            else "not realised on held-out windows, because the reference has fewer than two; "
        )
        + f"{line.separate} separate windows of {plan.length} days"
        + (f" (features look back {reference.memory} days), " if reference.memory else ", ")
        + (
            f"enough for {plan.alpha:.1%}"
            if enough
            else f"fewer than {needed}: {plan.alpha:.1%} cannot be promised, windows were put together from blocks of days"
        )
    )
    finite = line.scores[np.isfinite(line.scores)]
    return {
        "lines": {family: float(line.heights[NAMES.index(names[0])]) for family, names in FAMILIES.items()},
        "alpha": plan.alpha,
        "window_days": plan.length,
        "reference_days": int(reference.covered.sum()),
        "separate_windows": line.separate,
        "windows_needed": needed,
        "enough": enough,
        "resampled_windows": int((~line.real).sum()),
        "held_out": dataclasses.asdict(out),
        "realised": realised,
        "realised_interval": list(wilson(out.alarms, out.windows)) if out.windows else None,
        "season": plan.season,
        "floors": dict(floors),
        "smallest_scales": MIN_SCALE,
        "psi_floor": plan.psi_floor,
        "predictions_in_sample": reference.predictions_in_sample,
        "window_scores": np.sort(finite)[:: max(1, len(finite) // 200)].tolist(),
        "words": words,
    }


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate (Wilson, JASA 22, 1927)."""
    p = hits / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def conclude(record: dict[str, Any], drift: Drift, alarm_on: tuple[str, ...]) -> None:
    """Set verdict, headline, alarm, alarms, and what could not be judged, of a record."""
    loud, unjudged = alarming(record, drift), not_judged(record, drift)

    def texts(found: Mapping[str, str], wanted: bool) -> list[dict[str, str]]:
        return [{"kind": kind, "text": text} for kind, text in found.items() if (kind in alarm_on) == wanted]

    record["alarms"], record["unjudged"] = texts(loud, True), texts(unjudged, True)
    record["noted"] = texts(loud, False)
    record["alarm"] = bool(record["alarms"])
    blind = drift.not_computable
    calm = "quiet in part" if blind else "quiet"  # what was not seen is not quiet
    record["verdict"] = "alarm" if record["alarm"] else UNJUDGED if record["unjudged"] else calm
    parts = [item["text"] for item in (*record["alarms"], *record["unjudged"])]
    seen = len(drift.columns) - len(blind) - len(drift.left_out)
    if "drift" not in {**loud, **unjudged}:
        parts.append(f"{seen} columns within their lines")
    if blind:
        parts.append(f"not computable: {named(blind)}")
    if drift.left_out:
        parts.append(f"left out, for they follow the time: {named(drift.left_out)}")
    record["headline"] = "; ".join(parts)


def named(columns: list[str]) -> str:
    """The first SAID of some names."""
    return ", ".join(columns[:SAID]) + (", ..." if len(columns) > SAID else "")


def alarming(record: Mapping[str, Any], drift: Drift) -> dict[str, str]:
    """Kind -> words for what is beyond its lines and floors."""
    found: dict[str, str] = {}
    if drift.alarms:
        words = f", likely cause {record['causes'][0]}" if record["causes"] else f": {named(drift.alarms)}"
        found["drift"] = f"drift in {len(drift.alarms)} of {len(drift.columns)} columns{words}"
    performance = record["performance"]
    if performance.get("alarm"):
        found["performance"] = "; ".join(
            f"{name} is {item['value']:.4g}, the reference's band is {item['band'][0]:.4g} to {item['band'][1]:.4g} "
            f"({worse_text(item['worse_by'])})"
            for name, item in ((name, performance["metrics"][name]) for name in performance["alarming"])
        )
        if "reason" in performance:
            found["performance"] += f" ({performance['reason']})"
    worse = {name: item for name, item in record["business"].items() if item.get("alarm")}
    if worse:
        parts = [f"{name} {item['value']:.4g} against {item['reference']:.4g}" for name, item in worse.items()]
        found["business"] = ", ".join(parts)
    moved = [(name, performance["labels"][name]) for name in performance.get("labels_moved", ())]
    if moved:
        parts = [f"{name} {item['value']:.4g} against {item['reference']:.4g}" for name, item in moved]
        found["labels"] = f"labels moved: {', '.join(parts)}"
    return found


def worse_text(loss: float) -> str:
    """A relative loss in words."""
    return f"{loss:.1%} worse" if math.isfinite(loss) else "worse, and the reference leaves no share to tell it in"


def not_judged(record: Mapping[str, Any], drift: Drift) -> dict[str, str]:
    """Kind -> words for what was asked and has no answer, though its rows and labels are there."""
    found: dict[str, str] = {}
    if len(drift.not_computable) == len(drift.columns):
        found["drift"] = "nothing could be compared"
    performance = record["performance"]
    if performance.get("status") == UNJUDGED:
        found["performance"] = f"quality cannot be judged: {performance['reason']}"
    names = [name for name, item in record["business"].items() if item.get("status") == UNJUDGED]
    if names:
        found["business"] = "; ".join(
            f"{name} cannot be judged: {record['business'][name]['reason']}" for name in names
        )
    return found


# ----------------------------------------------------------------------------------------------------------- output


def finish(
    config: Config, run: Run, reference: Reference, drift: Drift, record: dict[str, Any], plan: CalibrationPlan
) -> None:
    """Write drift.json, history and report; say it; raise the alarm and tell who wants to know."""
    storage.write_json(run.path("drift.json"), record)
    run.link("drift", digest.of_json(record))
    floors = {**FLOORS, **config.monitor.floors}
    rows = history.reference_rows(reference, drift.line, plan, floors, record["model"])
    rows += history.earlier_rows(run, record["model"]) + history.current_rows(record)
    table = history.history_table(storage.finite(row, DIGITS) for row in rows)
    storage.write_parquet(run.path(*history.FILE), table)
    report.write_report(run.path("report.html"), config.name, record, table, drift)
    run.log(f"{record['verdict']}: {record['headline']}")
    run.log(record["calibration"]["words"])
    for cause in record["causes"][1:]:
        run.log(f"also {cause}")
    for item in record["noted"]:
        run.log(f"noted: {item['text']}")
    for item in record["unjudged"]:
        run.cannot_judge(f"{item['kind']}: {item['text']}")
    if lost := record["performance"].get("rows_of_unknown_target"):
        run.warn(f"{lost:,} rows have a {config.data.target} that training never saw: no metric counts them")
    for item in record["alarms"]:
        run.alarm(f"{item['kind']}: {item['text']}")
    if record["alarm"]:
        first = next((cause["column"] for cause in record["attribution"] if cause["notable"]), "")
        names = sorted(item["kind"] for item in record["alarms"])
        keys = ("verdict", "headline", "causes", "model", "window", "rows", "alarms")
        payload = {"name": config.name, "run": str(run.directory), **{key: record[key] for key in keys}}
        run.note(alerts=alerts.tell(config.monitor, run, f"{'+'.join(names)}:{first}", payload))


def metrics_of(record: Mapping[str, Any], drift: Drift, seconds: float) -> dict[str, float]:
    """The flat figures of the run."""
    calibration = record["calibration"]
    found = {
        "monitor/alarm": float(record["alarm"]),
        "monitor/unjudged": float(len(record["unjudged"])),
        "monitor/rows": float(record["rows"]),
        "monitor/columns": float(len(drift.columns)),
        "monitor/columns_alarming": float(len(drift.alarms)),
        "monitor/columns_not_computable": float(len(drift.not_computable)),
        "monitor/score": max((item["score"] for item in drift.columns if item["score"] is not None), default=math.nan),
        "monitor/target_rate": calibration["alpha"],
        "monitor/realised_rate": calibration["realised"] if calibration["realised"] is not None else math.nan,
        "monitor/separate_windows": float(calibration["separate_windows"]),
        "monitor/seconds": seconds,
    }
    performance = record["performance"]
    if "share_labelled" in performance:
        found["monitor/share_labelled"] = performance["share_labelled"]
    for name, item in {**performance.get("metrics", {}), **performance.get("labels", {})}.items():
        if not name.startswith(SHARE):  # a class may have any name
            found[f"monitor/{name}"] = item["value"] if item["value"] is not None else math.nan
    for name, item in record["estimated"].get("metrics", {}).items():
        found[f"monitor/estimated_{name}"] = item["value"] if item["value"] is not None else math.nan
    for name, item in record["business"].items():
        found[f"monitor/business_{name}"] = item["value"] if item["value"] is not None else math.nan
    return found
