"""The alarm that ships, whole system: its rate on clean days, weeks and months, injected incidents, and its power.

Rules were chosen on May to August 2013 of flights; September to December and both taxi experiments judge them. Days are counted
and judged by the functions that `engine monitor` calls, and a run of `engine monitor` of the last window must find the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import binom

from benchmarks.harness import Row, Settings, show
from engine import api
from engine.config import compose, schema
from engine.config.tree import Config
from engine.data.calendar import local_days
from engine.features import required_columns
from engine.features.compute import as_floats
from engine.features.profile import Profile
from engine.features.table import ensure_table
from engine.monitoring.alarm_lines import CalibrationPlan, calibrate, judge
from engine.monitoring.daily_counts import LaterDays, daily_counts, judged_columns
from engine.monitoring.drift import FLOORS, Current, current_statistics
from engine.monitoring.reference import Reference, day_counts, day_text, read_reference
from engine.monitoring.rising_columns import rising
from engine.monitoring.statistics import profile_counts
from engine.monitoring.sudden_change import Course, DailyCounts, follow
from engine.monitoring.sudden_record import DISTANCE, rule_of
from engine.monitoring.window import whole
from engine.runtime.run import Run
from engine.scoring.predictor import Predictor, load
from engine.training.bundle_spec import with_spec_of
from engine.training.drift_reference import days_table

TAXI = Path(os.environ.get("ENGINE_SHARED_DATA", "/nowhere")) / "taxi"
# Experiment -> (words, first day of the clean period that judges, day after it).
EXPERIMENTS = {
    "flights": ((), "2013-09-01", "2014-01-01"),
    "taxi": ((f"data.path={TAXI}",), "2019-07-01", "2020-03-01"),
    "taxi_card": ((f"data.path={TAXI}",), "2019-07-01", "2020-03-01"),
}
LENGTHS = {"day": 1, "week": 7, "month": 30}
RATES = (("day", 0.01), ("day", 0.05), ("week", 0.05), ("month", 0.05))
WITHIN = 14  # days in which an incident must be found
EVERY = 14  # days between the starts of an injected incident
FOUND = 0.5  # of the starts: from there an incident counts as found
GOAL = 6  # incidents
TEMPERATURE, WIND, LATE = "weather_temp", "weather_wind_speed", "origin_late_mean_7d"


@dataclasses.dataclass(frozen=True)
class Stream:
    """A trained experiment: its reference, and the raw features of every day after it."""

    words: tuple[str, ...]
    config: Config
    predictor: Predictor
    known: Reference
    raw: pa.Table
    days: np.ndarray  # int[n] local day of each row of `raw`

    def profiles(self, change: Callable[[pa.Table], pa.Table] | None = None) -> dict[int, Profile]:
        """The profile of every local day, after a change of the raw features."""
        raw = self.raw if change is None else change(self.raw)
        days = np.arange(int(self.days[0]), int(self.days[-1]) + 1)
        starts, stops = (np.searchsorted(self.days, days + k).tolist() for k in (0, 1))
        counted = Profile.count_ranges(
            self.known.profile.spec, raw, list(zip(starts, stops, strict=True)), self.predictor.scores(raw)
        )
        return dict(zip(days.tolist(), counted, strict=True))

    def daily(self, profiles: Mapping[int, Profile]) -> DailyCounts:
        """The units that the rule `sudden` judges."""
        return joined(self.known, profiles, judged_columns(self.config, self.predictor.bundle.encoder, self.known))


def joined(known: Reference, profiles: Mapping[int, Profile], names: list[str]) -> DailyCounts:
    """Daily counts of a reference and later days."""
    table = days_table(known.profile.spec, dict(sorted(profiles.items())))
    return daily_counts(known, LaterDays(table, *day_counts(known.counted, table)), max(profiles), names)


def stream(name: str, folder: str) -> Stream:
    """Train an experiment and read what follows its reference, as `engine monitor` does."""
    words = (f"+experiment={name}", *EXPERIMENTS[name][0], f"paths.store={folder}/store", f"paths.runs={folder}/runs")
    model = api.run("train", *words, "tracking=off", "evaluate.bootstrap=0").directory
    words = (*words, "tracking=off", f"monitor.model={model}")
    predictor = load(str(model))
    config = with_spec_of(compose.compose(words, None).config, predictor.bundle)
    known = read_reference(predictor.bundle.directory, predictor.bundle.encoder)
    known = dataclasses.replace(known, rising=rising(config.features, known))
    run = Run.create("monitor", config, schema.plain(config))
    dataset = required_columns.ensure(config, run)
    time = config.data.event_time
    local = local_days(dataset.read([time])[time], config.data.time_zone)
    first = int(np.searchsorted(local, int(known.days[-1]) + 1))
    raw = ensure_table(config, run, dataset).read((first, dataset.rows))
    return Stream(words, config, predictor, known, raw, local[first:])


def wanted(name: str, settings: Settings) -> tuple[bool, bool]:
    """Whether rates of this experiment are asked for, and incidents."""
    rates = any(settings.wanted(clean_work(unit, alpha)) for unit, alpha in RATES)
    return rates, name == "flights" and settings.wanted("incidents")


def clean_work(unit: str, alpha: float) -> str:
    return f"clean_{unit}_{round(alpha * 100)}"


def rows_of(name: str, folder: str, settings: Settings) -> list[Row]:
    """Rates of one experiment, and the incidents of flights."""
    found, (rates, incidents) = stream(name, folder), wanted(name, settings)
    return (clean_rows(name, found) if rates else []) + ([incident_row(found)] if incidents else [])


# ------------------------------------------------------------------------------------------------------------ rates
def clean_rows(name: str, found: Stream) -> list[Row]:
    """Share of clean windows that alarm, by length and rate."""
    profiles, rows = found.profiles(), []
    start, stop = (int(np.datetime64(day, "D").astype(int)) for day in EXPERIMENTS[name][1:])
    for unit, alpha in RATES:
        length = LENGTHS[unit]
        rule, _ = rule_of(found.config.monitor, found.known, alpha)
        alarms = (by_distance if rule == DISTANCE else by_days)(found, profiles, length, alpha)
        judged = [alarm for day, alarm in alarms.items() if start <= day and day + length <= stop]
        others = [alarm for day, alarm in alarms.items() if day + length <= start]
        hits, most = sum(judged), int(binom.ppf(0.975, len(judged), alpha))
        note = f"{name}, rule {rule}: {hits} of {len(judged)}, at most {most} by the binomial bound of 97.5 %"
        if rule != DISTANCE:
            note += f"; {sum(others)} of {len(others)} in the months that the rule was chosen on"
        later = [day_text(day) for day, alarm in alarms.items() if alarm and day >= stop]
        note += f"; first alarm after them {later[0]}" if later else ""
        rate = hits / len(judged)
        row = Row(
            "monitor", clean_work(unit, alpha), len(judged), rate, "target", rate / alpha, None,
            f"of clean windows of {name}", alpha, note=note,
        )  # fmt: skip
        show(row)
        rows.append(row)
    return rows


def firsts(profiles: Mapping[int, Profile], length: int) -> range:
    """First days of separate windows."""
    return range(min(profiles), max(profiles) + 2 - length, length)


def by_days(found: Stream, profiles: Mapping[int, Profile], length: int, alpha: float) -> dict[int, bool]:
    """First day of each window -> whether an incident is opened in it."""
    course = follow(found.daily(profiles), alpha / length)
    listed = monitored(found, int(course.days[-1]) + 1 - length, length, alpha)["sudden"]["incidents"]
    agree([day_text(item.opened) for item in course.incidents], [item["opened"] for item in listed])
    opened = set(course.days[course.opened].tolist())
    return {day: any(day + k in opened for k in range(length)) for day in firsts(profiles, length)}


def monitored(found: Stream, first: int, length: int, alpha: float) -> dict[str, Any]:
    """The record of `engine monitor` of a window."""
    window = f"monitor.window=[{day_text(first)},{day_text(first + length)}]"
    plain = ("monitor.multivariate=false", "monitor.labels=false", "monitor.alarm_on=[drift]")
    done = api.run("monitor", *found.words, window, *plain, f"monitor.alpha={alpha}")
    record: dict[str, Any] = json.loads((done.directory / "drift.json").read_text())
    return record


def agree(ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ValueError(f"engine monitor must find what this benchmark finds, {ours}, found {theirs}")


def by_distance(found: Stream, profiles: Mapping[int, Profile], length: int, alpha: float) -> dict[int, bool]:
    """First day of each window -> whether its distance from the reference is an alarm."""
    monitor, alarms = found.config.monitor, {}
    plan = CalibrationPlan(
        length, alpha, monitor.psi_floor, monitor.season, monitor.resamples, monitor.block, monitor.seed
    )
    for first in firsts(profiles, length):
        days = np.arange(first, first + length)
        window = whole(found.known.profile.spec, {day: profiles[day] for day in days.tolist()})
        counts = profile_counts(window)
        line = calibrate(found.known, plan, {name: float(item.rows[0]) for name, item in counts.items()})
        statistics = current_statistics(found.known, Current(window, days, float(length)), counts, plan)
        alarms[first] = bool(judge(line, statistics[..., None], FLOORS)[1].any())
    agree(alarms[first], monitored(found, first, length, alpha)["alarm"])
    return alarms


# -------------------------------------------------------------------------------------------------------- incidents
def injections(raw: pa.Table) -> dict[str, Callable[[pa.Table], pa.Table]]:
    """Name -> a function that puts the incident into raw features."""
    rng = np.random.default_rng(0)
    distance = numbers(raw, "distance")
    mean, deviation = float(np.nanmean(distance)), float(np.nanstd(distance))
    return {
        "distance +.1 sd": lambda t: put(t, "distance", numbers(t, "distance") + 0.1 * deviation),
        "distance x1.2": lambda t: put(t, "distance", mean + 1.2 * (numbers(t, "distance") - mean)),
        "5 % missing": lambda t: without(t, "distance", rng),
        "AA +5 points": lambda t: more_of(t, "carrier", "AA", rng),
        "wind x1.15": lambda t: put(t, WIND, 1.15 * numbers(t, WIND)),
        "Celsius": lambda t: put(t, TEMPERATURE, (numbers(t, TEMPERATURE) - 32) / 1.8),
        "late rate x.8": lambda t: put(t, LATE, 0.8 * numbers(t, LATE)),
    }


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """float64[n] of a column, NaN for null."""
    return np.array(as_floats(table[name]), float)


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with other values of a column."""
    return table.set_column(table.column_names.index(name), name, pa.array(values, from_pandas=True))


def without(table: pa.Table, name: str, rng: np.random.Generator) -> pa.Table:
    """5 % of the values of a column are missing."""
    return put(table, name, np.where(rng.random(len(table)) < 0.05, np.nan, numbers(table, name)))


def more_of(table: pa.Table, name: str, value: str, rng: np.random.Generator) -> pa.Table:
    """5 % of the rows get a category they do not have."""
    values = np.array(table[name].to_pylist(), object)
    values[rng.choice(np.flatnonzero(values != value), round(0.05 * len(values)), replace=False)] = value
    return put(table, name, list(values))


def incident_row(found: Stream) -> Row:
    """How many of the incidents are found within WITHIN days, by daily windows at the default rate; at 5 % in the note."""
    clean = found.daily(found.profiles())
    changed = {name: found.daily(found.profiles(change)) for name, change in injections(found.raw).items()}
    start = int(np.datetime64(EXPERIMENTS["flights"][1], "D").astype(int))
    shares = {alpha: shares_found(clean, changed, start, alpha) for alpha in (found.config.monitor.alpha, 0.05)}
    counts, notes = [], []
    for alpha, by_name in shares.items():
        counts.append(sum(share >= FOUND for name, share in by_name.items() if name))
        listed = ", ".join(f"{name or 'nothing injected'} {share:.2f}" for name, share in by_name.items())
        notes.append(f"at {alpha:.0%} a day {counts[-1]} of {len(changed)}; share of starts found: {listed}")
    row = Row(
        "monitor", "incidents", len(changed), float(counts[0]), "target", counts[0] / GOAL, None,
        f"found of 7 within {WITHIN} days, from half of the starts", float(GOAL), note="; ".join(notes),
    )  # fmt: skip
    show(row)
    return row


def shares_found(clean: DailyCounts, changed: Mapping[str, DailyCounts], start: int, alpha: float) -> dict[str, float]:
    """Incident ("" for none) -> share of its starts from which an incident is opened within WITHIN days.

    Starts on which an incident of the clean days is open are left out: a change then raises no second alarm.
    """
    course = follow(clean, alpha)
    spans = [(item.opened, item.closed or int(clean.days[-1])) for item in course.incidents]
    hits: dict[str, list[bool]] = {name: [] for name in ("", *changed)}
    for day in range(start, int(clean.days[-1]) + 2 - WITHIN, EVERY):
        if not any(opened < day <= closed for opened, closed in spans):
            for name, other in {"": clean, **changed}.items():
                hits[name].append(bool(after(clean, other, day, WITHIN, alpha).opened[-WITHIN:].any()))
    return {name: float(np.mean(found)) for name, found in hits.items()}


def after(clean: DailyCounts, other: DailyCounts, day: int, length: int, alpha: float) -> Course:
    """The course of clean days up to `day` and then of `length` days of another stream."""
    at = int(np.searchsorted(clean.days, day))
    units = tuple(
        np.concatenate([old[:at], new[at : at + length]]) for old, new in zip(clean.units, other.units, strict=True)
    )
    return follow(DailyCounts(clean.days[: at + length], clean.columns, units), alpha)


# ------------------------------------------------------------------------------------------------------------ power
def power_scores(
    streams: Mapping[str, DailyCounts], days: list[int], length: int, alpha: float
) -> dict[str, list[float]]:
    """Variant -> how far each window of `length` days from one of `days` on is beyond its line; days before it are clean."""
    found: dict[str, list[float]] = {}
    for name, other in streams.items():
        courses = [after(streams["clean"], other, day, length, alpha) for day in days]
        found[name] = [float(np.nanmax((item.scores - item.lines)[:, -length:])) for item in courses]
    return found
