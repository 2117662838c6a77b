"""drift.json: what was compared, found and concluded, and which of it is an alarm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from engine.config import units
from engine.config.tree import Config
from engine.monitoring.alarm_lines import FAMILIES, FEW, MIN_SCALE, NAMES, CalibrationPlan, windows_needed
from engine.monitoring.business import business
from engine.monitoring.column_findings import Cause, ColumnRecord
from engine.monitoring.drift import FLOORS, Drift
from engine.monitoring.estimate import Unlabelled, drawn_labels, estimate, learned
from engine.monitoring.multivariate import Together, compare_samples
from engine.monitoring.performance import (
    UNJUDGED,
    BandsOf,
    Judge,
    MetricRecord,
    Outcomes,
    PerformanceRecord,
    bands_of,
    measure,
)
from engine.monitoring.rates import wilson
from engine.monitoring.reference import Reference
from engine.monitoring.statistics import MEANING, PREDICTION, profile_counts
from engine.monitoring.sudden_record import SUDDEN
from engine.monitoring.window import Window, asked, plan_of
from engine.runtime import records, storage
from engine.training.bundle import Bundle

FORMAT = 3  # 1: without `unjudged`, and without `status` of performance; 2: without `rule` and `sudden`
DIGITS = 9  # significant digits of drift.json: the last bits of a sum may differ between processors
SAID = 5  # causes named in words


class Notice(TypedDict):
    """An alarm, or what was noted or could not be judged."""

    kind: str
    text: str


class VerdictRecord(TypedDict):
    """The part of drift.json that says what was concluded, of which rows."""

    format: Annotated[int, records.Format(FORMAT)]
    verdict: str
    headline: str
    alarm: bool
    window: tuple[str, str]
    rows: records.Count


class DriftRecord(VerdictRecord):
    """drift.json. Monitoring and retraining read the keys named here; the rest of columns and measurements is for people."""

    alarms: list[Notice]
    unjudged: NotRequired[list[Notice]]
    noted: list[Notice]
    causes: list[str]
    model: str
    profile: str
    rule: NotRequired[RuleRecord]
    sudden: NotRequired[dict[str, Any]]
    calibration: dict[str, Any]
    attribution: list[Cause]
    columns: list[ColumnRecord]
    discoveries: dict[str, Any]
    multivariate: dict[str, Together]
    performance: PerformanceRecord
    estimated: PerformanceRecord
    business: dict[str, MetricRecord]
    operational: dict[str, records.Number]
    meaning: dict[str, str]
    targets: NotRequired[dict[str, PerformanceRecord]]


class RuleRecord(TypedDict):
    """Which rule decided a drift alarm, and why."""

    name: str
    why: str


LOSSES_OF_QUALITY = {"performance": "quality fell", "estimated": "quality is expected to be lower"}


def build_record(
    config: Config,
    bundle: Bundle,
    reference: Reference,
    window: Window,
    drift: Drift,
    judge: Judge,
    past: Outcomes | None,
    looked: tuple[tuple[str, str], dict[str, Any]],
    others: dict[str, PerformanceRecord],
) -> DriftRecord:
    """drift.json: what was compared, found and concluded. No path, run id or time of day is in it."""
    (rule, sudden), settings, zone = looked, config.monitor, config.data.time_zone
    bands, meaning = bands_of(past, judge), learned(past, window.recent, judge)
    measured = measured_performance(config, window, window.outcomes, past, judge, bands)
    rows = unlabelled(reference, window, past)
    expected = estimate(past, window.recent, rows, judge, measured.get("metrics", {}), bands, meaning)
    labels = drawn_labels(meaning, window.outcomes, judge) if settings.business else None
    custom = business(settings.business, past, window.outcomes, judge, labels)
    sample = storage.read_parquet(bundle.directory / "reference_sample.parquet")
    record: DriftRecord = {
        "format": FORMAT,
        "verdict": "",
        "headline": "",
        "alarm": False,
        "alarms": [],
        "causes": causes(drift, rule[0], sudden),
        "window": (units.format_instant(window.start, zone), units.format_instant(window.stop, zone)),
        "rows": window.profile.rows,
        "model": bundle.digest,
        "profile": window.profile.digest,
        "rule": {"name": rule[0], "why": rule[1]},
        "sudden": sudden,
        "calibration": calibration_record(drift, plan_of(config, window), reference, {**FLOORS, **settings.floors}),
        "attribution": drift.causes,
        "columns": [with_rule(item, drift, rule[0], sudden) for item in drift.columns],
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
        "unjudged": [],
        "noted": [],
    }
    if others:
        record["targets"] = others
    conclude(record, drift, settings.alarm_on)
    return storage.finite(record, DIGITS)  # type: ignore[no-any-return]


def causes(drift: Drift, rule: str, sudden: Mapping[str, Any]) -> list[str]:
    """The likely causes in words: columns that changed suddenly, or that moved away from the reference."""
    if rule == SUDDEN:
        return [f"{name}: unlike the days before" for name in sudden["columns"]][:SAID]
    return [cause["text"] for cause in drift.causes if cause["notable"]][:SAID]


def with_rule(item: ColumnRecord, drift: Drift, rule: str, sudden: Mapping[str, Any]) -> ColumnRecord:
    """A column's record with the status that the rule gives it."""
    if rule != SUDDEN or item["status"] not in ("alarm", "quiet"):
        return item
    loud = item["name"] in sudden["columns"] or item["name"] in drift.by_threshold
    return {**item, "status": "alarm" if loud else "moved" if item["status"] == "alarm" else "quiet"}


def measured_performance(
    config: Config, window: Window, rows: Outcomes | None, past: Outcomes | None, judge: Judge, bands: BandsOf
) -> PerformanceRecord:
    """Metrics on labelled `rows` of the window, or the reason why there are none."""
    if rows is None or not config.monitor.labels:
        status, reason = (window.quality, window.reason) if config.monitor.labels else asked(config)
        return {"alarm": False, "status": status, "reason": f"not computable, because {reason}"}
    return measure(past, rows, judge, bands)


def unlabelled(reference: Reference, window: Window, past: Outcomes | None) -> Unlabelled | None:
    """The scores of the window: of its rows where they are at hand, else by bins of its profile, where one score is all."""
    if window.outcomes is not None:
        return Unlabelled(window.outcomes.scores, window.outcomes.weight)
    columns = [item for item in reference.columns if item.kind == PREDICTION]
    if past is None or len(columns) != 1 or columns[0].edges is None:
        return None
    return Unlabelled.of_counts(columns[0], profile_counts(window.profile)[columns[0].name].values[0], past)


def calibration_record(
    drift: Drift, plan: CalibrationPlan, reference: Reference, floors: Mapping[str, float]
) -> dict[str, Any]:
    """The alarm line: target rate, rate on held-out windows, and whether there are enough windows to promise it."""
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
        + f"{line.separate} separate windows of {plan.length} {'days' if reference.timed else 'blocks that a hash draws'}"
        + (f" (features look back {reference.memory} days), " if reference.memory else ", ")
        + (
            f"enough for {plan.alpha:.1%}"
            if enough
            else f"fewer than {needed}: {plan.alpha:.1%} cannot be promised, windows were put together from blocks"
            + (" of days" if reference.timed else "")
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


def conclude(record: DriftRecord, drift: Drift, alarm_on: tuple[str, ...]) -> None:
    """Set verdict, headline, alarm, alarms, and what could not be judged, of a record."""
    loud, unjudged = alarming(record, drift), not_judged(record, drift)
    fell = [words for kind, words in LOSSES_OF_QUALITY.items() if kind in alarm_on and kind in loud]
    if "drift" in alarm_on and "distance" in loud and fell:
        moved = loud.pop("distance")
        loud["drift"] = "; ".join(filter(None, (loud.get("drift"), f"{moved}, and {' and '.join(fell)}")))

    def texts(found: Mapping[str, str], wanted: bool) -> list[Notice]:
        return [{"kind": kind, "text": text} for kind, text in found.items() if (kind in alarm_on) == wanted]

    record["alarms"], record["unjudged"] = texts(loud, True), texts(unjudged, True)
    record["noted"] = texts(loud, False)
    record["alarm"] = bool(record["alarms"])
    blind = drift.not_computable
    calm = "quiet in part" if blind else "quiet"  # a column that could not be computed is not quiet
    record["verdict"] = "alarm" if record["alarm"] else UNJUDGED if record["unjudged"] else calm
    parts = [item["text"] for item in (*record["alarms"], *record["unjudged"])]
    seen = len(drift.columns) - len(blind) - len(drift.left_out)
    if record["rule"]["name"] == SUDDEN and "drift" not in {**loud, **unjudged}:
        parts.append("no sudden change")
    elif "drift" not in {**loud, **unjudged}:
        parts.append(f"{seen} columns within their lines")
    if blind:
        parts.append(f"not computable: {named(blind)}")
    if drift.left_out:
        parts.append(f"left out, for they follow the time: {named(drift.left_out)}")
    record["headline"] = "; ".join(parts)


def named(columns: list[str]) -> str:
    """The first SAID of some names."""
    return ", ".join(columns[:SAID]) + (", ..." if len(columns) > SAID else "")


def alarming(record: DriftRecord, drift: Drift) -> dict[str, str]:
    """Kind -> text of what is beyond its lines and floors."""
    found = drift_texts(record, drift)
    performance = record["performance"]
    if performance.get("alarm"):
        found["performance"] = fallen_text(performance)
    for target, other in record.get("targets", {}).items():
        if other.get("alarm"):
            # `monitor.alarm_on` does not name it: it is noted.
            found[f"performance of {target}"] = f"target {target}: {fallen_text(other)}"
    expected = record["estimated"]
    if expected.get("alarming"):
        found["estimated"] = ", ".join(
            f"{name} is expected to be {item['value']:.4g}, {item['band'][0]:.4g} to {item['band'][1]:.4g} by "
            f"{item['past_errors']} past errors ({worse_text(item['worse_by'])} at least)"
            for name, item in ((name, expected["metrics"][name]) for name in expected["alarming"])
        )
    worse = {name: item for name, item in record["business"].items() if item.get("alarm")}
    if worse:
        parts = [f"{name} {item['value']:.4g} against {item['reference']:.4g}" for name, item in worse.items()]
        found["business"] = ", ".join(parts)
    moved = [(name, performance["labels"][name]) for name in performance.get("labels_moved", ())]
    if moved:
        parts = [f"{name} {item['value']:.4g} against {item['reference']:.4g}" for name, item in moved]
        found["labels"] = f"labels moved: {', '.join(parts)}"
    return found


def drift_texts(record: DriftRecord, drift: Drift) -> dict[str, str]:
    """What is said of drift: `drift` alarms, `continued` and `distance` are noted."""
    found: dict[str, str] = {}
    share = f"{len(drift.alarms)} of {len(drift.columns)} columns"
    if record["rule"]["name"] != SUDDEN:
        if drift.alarms:
            words = f", likely cause {record['causes'][0]}" if record["causes"] else f": {named(drift.alarms)}"
            found["drift"] = f"drift in {share}{words}"
        return found
    sudden = record["sudden"]
    parts = (
        [f"sudden change on {', '.join(sudden['opened'])} in {named(sudden['columns'])}"] if sudden["opened"] else []
    )
    parts += [f"beyond its threshold: {named(drift.by_threshold)}"] if drift.by_threshold else []
    if parts:
        found["drift"] = "; ".join(parts)
    if sudden["continued"]:
        found["continued"] = f"the incident of {', '.join(sudden['continued'])} continues in {named(sudden['columns'])}"
    if drift.alarms:
        found["distance"] = f"moved away from training in {share} ({named(drift.alarms)}); {record['rule']['why']}"
    return found


def fallen_text(performance: PerformanceRecord) -> str:
    """What alarming metrics are, and what they were."""
    text = "; ".join(
        f"{name} is {item['value']:.4g}, the reference's band is {item['band'][0]:.4g} to {item['band'][1]:.4g} "
        f"({worse_text(item['worse_by'])})"
        for name, item in ((name, performance["metrics"][name]) for name in performance["alarming"])
    )
    return f"{text} ({performance['reason']})" if "reason" in performance else text


def worse_text(loss: float) -> str:
    """A relative loss in words."""
    return f"{loss:.1%} worse" if math.isfinite(loss) else "worse, and the reference leaves no share to tell it in"


def not_judged(record: DriftRecord, drift: Drift) -> dict[str, str]:
    """Kind -> text of what was asked for and cannot be judged, though rows and labels are there."""
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
