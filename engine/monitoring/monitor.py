"""The `monitor` step: compares a window with the reference of a model; drift, performance, alarms, report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import units
from engine.config.tree import Config
from engine.data import column_checks
from engine.data.calendar import day_start
from engine.errors import UserError
from engine.features import required_columns
from engine.monitoring import alerts, daily_counts, history, report, sudden_record
from engine.monitoring.alarm_lines import CalibrationPlan
from engine.monitoring.batch import DISTANCE_WHY, batch_window
from engine.monitoring.business import check_expressions
from engine.monitoring.drift import FLOORS, Drift, compare
from engine.monitoring.drift_record import DIGITS, DriftRecord, build_record, measured_performance
from engine.monitoring.performance import SHARE, Judge, Outcomes, PerformanceRecord, bands_of, read_outcomes
from engine.monitoring.reference import Reference, read_reference
from engine.monitoring.rising_columns import rising
from engine.monitoring.window import (
    Window,
    column_values,
    current_of,
    days_of,
    plan_of,
    sliced_window,
    stored_window,
)
from engine.runtime import digest, storage
from engine.runtime.run import Run
from engine.training.bundle import Bundle, find_model, read_bundle
from engine.training.bundle_spec import with_spec_of
from engine.training.classes import target_values
from engine.training.drift_reference import OUTCOME_ROWS, outcomes_file
from engine.training.heads import Head
from engine.training.row_sample import chosen_rows

BETWEEN_VALUES = 2  # format of profile specifications whose edges lie between data values


def monitor(config: Config, run: Run) -> dict[str, float]:
    """Compare the window (or a scoring run's profile) with the model's reference; write drift.json, history, report.

    Sets an alarm (exit code 2) for what `monitor.alarm_on` names, or says that it cannot be judged (exit code 3).
    Raises UserError for a mistake of the user.
    """
    began = time.monotonic()
    settings = config.monitor
    if bool(settings.window) == bool(settings.run):
        raise UserError("monitor needs either monitor.window (as in 2020-04) or monitor.run (a scoring run)")
    alerts.announce(settings, run)
    bundle = read_bundle(find_model(settings.model, Path(config.paths.runs), "monitor.model"))
    config = with_spec_of(config, bundle)
    run.note(model=bundle.digest)
    columns = column_checks.schema(config.data.columns)
    needed = check_expressions(
        settings.business, columns, len(bundle.loss.columns(bundle.model["classes"])), config.data.target
    )
    reference = dataclasses.replace(read_reference(bundle.directory, bundle.encoder), timed=config.data.timed)
    if settings.rising == "leave_out":
        reference = dataclasses.replace(reference, rising=rising(config.features, reference))
    if reference.profile.spec.format < BETWEEN_VALUES:
        run.warn(
            "this model's bin edges are on data values, as in earlier versions: a change of a flag, a rating or a count may not "
            "be found. Train the model again"
        )
    read = sliced_window if settings.window else stored_window if config.data.timed else batch_window
    window = read(config, run, bundle, reference, needed)
    judge = judge_of(config, bundle.heads.main, window)
    past, window = alike(config, reference_outcomes(config, bundle, window, needed, run), window, run)
    drift = compare(
        reference, current_of(config, window), plan_of(config, window), settings.floors, settings.thresholds
    )
    earlier = history.earlier_rows(run, bundle.digest)
    looked = look_back(config, run, bundle, reference, window)
    begin = units.format_instant(window.start, config.data.time_zone)
    length = judge.length if reference.timed else 0  # batches have no length
    judge = dataclasses.replace(judge, earlier_errors=history.errors_of(earlier, length, begin))
    others = other_targets(config, bundle, window)
    record = build_record(config, bundle, reference, window, drift, judge, past, looked, others)
    finish(config, run, reference, drift, record, earlier, plan_of(config, window))
    return metrics_of(record, drift, time.monotonic() - began)


def look_back(
    config: Config, run: Run, bundle: Bundle, reference: Reference, window: Window
) -> tuple[tuple[str, str], dict[str, Any]]:
    """((rule, why), record of the rule `sudden`); the counts of the days are kept for later runs."""
    settings, plan = config.monitor, plan_of(config, window)
    if not reference.timed:
        return (sudden_record.DISTANCE, DISTANCE_WHY), {}
    rule, why = sudden_record.rule_of(settings, reference, plan.alpha)
    if rule == sudden_record.DISTANCE:
        return (rule, why), {}
    if not window.days:
        why = "the window has no whole day whose rows are known (a stored profile of several days, a part of a day, or no rows)"
        return (sudden_record.DISTANCE, why), {}
    later = daily_counts.later_days(config, run, bundle, reference, window)
    storage.write_parquet(run.path(*daily_counts.FILE), later.table)
    names = daily_counts.judged_columns(config, bundle.encoder, reference)
    days = np.arange(min(window.days), max(window.days) + 1)
    daily = daily_counts.daily_counts(reference, later, int(days[-1]), names)
    found = sudden_record.look_at(settings, plan, daily, days)
    if not found["judged"]:
        return (sudden_record.DISTANCE, "too few days are counted before the window to compare it with them"), found
    return (rule, why), found


def judge_of(config: Config, head: Head, window: Window) -> Judge:
    """How a loss of quality of one target is measured."""
    settings = config.monitor
    return Judge(
        loss=head.loss,
        evaluate=config.evaluate,
        alpha=settings.alpha,
        floor=settings.performance_floor,
        min_labelled=settings.min_labelled.fraction,
        length=days_of(window),
        block=settings.block,
        seed=settings.seed,
        classes=head.classes,
        threshold=None if head.decision is None else head.decision.get("threshold"),
    )


def other_targets(config: Config, bundle: Bundle, window: Window) -> dict[str, PerformanceRecord]:
    """What labelled rows say of each target beside the main one; it raises no alarm."""
    found: dict[str, PerformanceRecord] = {}
    for k, item in enumerate(bundle.heads.items[1:], 1):
        path = bundle.directory / outcomes_file(k)
        past = read_outcomes(storage.read_parquet(path)) if path.exists() else None
        judge = judge_of(config, item, window)
        rows = window.others.get(item.name)
        found[item.name] = measured_performance(config, window, rows, past, judge, bands_of(past, judge))
    return found


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
    rows = np.arange(*dataset.row_range(*bounds))
    rows = rows[chosen_rows(dataset, config.data.ids, rows, OUTCOME_ROWS, len(rows))]
    facts = dataset.take([config.data.target or "", *needed], rows)
    labels = target_values(facts[config.data.target or ""], bundle.model["classes"])
    known = np.isfinite(labels)
    if not np.array_equal(labels[known], outcomes.target):
        run.warn("the validation rows are no longer those of the reference: business metrics over columns get no band")
        return outcomes
    columns = {name: column_values(facts[name])[known] for name in needed}
    return dataclasses.replace(outcomes, columns=columns)


def alike(config: Config, past: Outcomes | None, window: Window, run: Run) -> tuple[Outcomes | None, Window]:
    """Reference and window, both with weights or both without: a model of an earlier version keeps none."""
    current = window.outcomes
    if past is None or current is None or (past.weight is None) == (current.weight is None):
        return past, window
    if past.weight is None:
        run.warn(
            f"the labelled rows kept with this model have no weights: quality is measured without {config.data.weight}. Train "
            "the model again"
        )
    plain = dataclasses.replace(current, weight=None)
    recent = None if window.recent is None else dataclasses.replace(window.recent, weight=None)
    return dataclasses.replace(past, weight=None), dataclasses.replace(window, outcomes=plain, recent=recent)


# ----------------------------------------------------------------------------------------------------------- output


def finish(
    config: Config,
    run: Run,
    reference: Reference,
    drift: Drift,
    record: DriftRecord,
    earlier: list[history.Row],
    plan: CalibrationPlan,
) -> None:
    """Write drift.json, history and report; log the outcome, set the alarm and send alerts."""
    storage.write_json(run.path("drift.json"), record)
    run.link("drift", digest.of_json(record))
    floors = {**FLOORS, **config.monitor.floors}
    rows = history.reference_rows(reference, drift.line, plan, floors, record["model"]) if reference.timed else []
    rows += [*earlier, *history.current_rows(record)]
    table = history.history_table(storage.finite(row, DIGITS) for row in rows)
    storage.write_parquet(run.path(*history.FILE), table)
    report.write_report(run.path("report.html"), config.name, record, table, drift)
    run.log(f"{record['verdict']}: {record['headline']}")
    sudden = record["rule"]["name"] == sudden_record.SUDDEN
    run.log(f"rule {record['rule']['name']}, because {record['rule']['why']}")
    run.log((record["sudden"] if sudden else record["calibration"])["words"])
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
        notable = [cause["column"] for cause in record["attribution"] if cause["notable"]]
        first = next(iter(record["sudden"]["columns"] if sudden else notable), "")
        names = sorted(item["kind"] for item in record["alarms"])
        keys = ("verdict", "headline", "causes", "model", "window", "rows", "alarms")
        shown: Mapping[str, object] = record
        payload = {"name": config.name, "run": str(run.directory), **{key: shown[key] for key in keys}}
        run.note(alerts=alerts.tell(config.monitor, run, f"{'+'.join(names)}:{first}", payload))


def metrics_of(record: DriftRecord, drift: Drift, seconds: float) -> dict[str, float]:
    """The flat figures of the run."""
    calibration, sudden = record["calibration"], record["rule"]["name"] == sudden_record.SUDDEN
    rate = record["sudden"]["realised"] if sudden else calibration["realised"]
    found = {
        "monitor/alarm": float(record["alarm"]),
        "monitor/unjudged": float(len(record["unjudged"])),
        "monitor/rows": float(record["rows"]),
        "monitor/columns": float(len(drift.columns)),
        "monitor/columns_alarming": float(sum(item["status"] == "alarm" for item in record["columns"])),
        "monitor/columns_not_computable": float(len(drift.not_computable)),
        "monitor/score": max((item["score"] for item in drift.columns if item["score"] is not None), default=math.nan),
        "monitor/target_rate": record["sudden"]["alpha_a_day"] if sudden else calibration["alpha"],
        "monitor/realised_rate": rate if rate is not None else math.nan,
        "monitor/separate_windows": float(record["sudden"]["looks"] if sudden else calibration["separate_windows"]),
        "monitor/seconds": seconds,
    }
    performance = record["performance"]
    if "share_labelled" in performance:
        found["monitor/share_labelled"] = performance["share_labelled"]
    for name, item in {**performance.get("metrics", {}), **performance.get("labels", {})}.items():
        if not name.startswith(SHARE):  # a class may have any name
            found[f"monitor/{name}"] = item["value"] if item["value"] is not None else math.nan
    for target, other in record.get("targets", {}).items():
        for name, item in other.get("metrics", {}).items():
            found[f"monitor/{target}/{name}"] = item["value"] if item["value"] is not None else math.nan
    for name, item in record["estimated"].get("metrics", {}).items():
        found[f"monitor/estimated_{name}"] = item["value"] if item["value"] is not None else math.nan
    for name, item in record["business"].items():
        found[f"monitor/business_{name}"] = item["value"] if item["value"] is not None else math.nan
    return found
