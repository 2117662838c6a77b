"""Compares one window with the reference: statistics, verdict by column, likely causes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import UserError, nearest
from engine.features.profile import Profile
from engine.monitoring.alarm_lines import (
    NAMES,
    VOLUME,
    CalibrationPlan,
    HeldOut,
    Line,
    calibrate,
    expected_rows,
    held_out,
    judge,
    judged,
    volume,
)
from engine.monitoring.column_findings import (
    LEFT_OUT,
    Cause,
    ColumnRecord,
    Pair,
    StatisticRecord,
    causes_of,
    describe,
    describe_volume,
)
from engine.monitoring.reference import Reference, weekdays
from engine.monitoring.statistics import HAS, Counts, profile_counts, statistics

# Effect floors: the smallest change beyond what is typical that is worth an alarm; config key monitor.floors.
FLOORS = {
    "psi": 0.1,
    "ks": 0.1,
    "wasserstein": 0.1,
    "missing": 0.02,
    "outside": 0.02,
    "unseen": 0.02,
    "volume": 0.25,
}


@dataclass(frozen=True)
class Current:
    """The window that is compared: a profile, and the local days it covers (None where a stored profile has no days)."""

    profile: Profile
    days: np.ndarray | None
    length: float  # days, may be fractional


@dataclass(frozen=True)
class Drift:
    """The outcome. found [columns + 1, statistics]; beyond, alarm of the same shape."""

    line: Line
    held_out: HeldOut
    found: np.ndarray
    beyond: np.ndarray
    alarm: np.ndarray
    columns: list[ColumnRecord]
    causes: list[Cause]
    p_values: dict[str, float]
    discoveries: list[str]
    pairs: dict[str, Pair]
    by_threshold: list[str]  # columns that are beyond a manual threshold

    @property
    def alarms(self) -> list[str]:
        """Names of the columns that alarm."""
        return [item["name"] for item in self.columns if item["status"] == "alarm"]

    @property
    def left_out(self) -> list[str]:
        """Names of the columns whose values follow the time and are not judged."""
        return [item["name"] for item in self.columns if item["status"] == LEFT_OUT]

    @property
    def not_computable(self) -> list[str]:
        """Names of the columns without any computable statistic."""
        return [item["name"] for item in self.columns if item["status"] == "not computable"]


def compare(
    reference: Reference,
    current: Current,
    plan: CalibrationPlan,
    floors: Mapping[str, float],
    thresholds: Mapping[str, float],
) -> Drift:
    """Calibrate the lines for a window like the current one, and judge it.

    Raises UserError for a manual threshold of a column or statistic that does not exist.
    """
    floors = {**FLOORS, **floors}
    asked = {at for at, *_ in manual_lines(reference, thresholds)}
    rising = {name: why for name, why in reference.rising.items() if reference.place(name) not in asked}
    reference = replace(reference, rising=rising)
    counts = profile_counts(current.profile)
    sizes = {name: float(item.rows[0]) for name, item in counts.items()}
    line = calibrate(reference, plan, sizes)
    found = current_statistics(reference, current, counts, plan)
    beyond, alarm = (part[..., 0] for part in judge(line, found[..., None], floors))
    alarm = with_manual(reference, found, alarm, thresholds)
    limits = lines_by_statistic(line, floors)
    for at, statistic, value in manual_lines(reference, thresholds):
        limits[at, statistic] = value
    base = reference_counts(reference, current.days, plan.season)
    pairs = {item.name: Pair(item, base[item.name], counts[item.name]) for item in reference.columns}
    columns = []
    for index, pair in enumerate(pairs.values()):
        facts = _facts(index, found, beyond, alarm, limits, line, floors)
        columns.append(describe(pair, facts, reference, current.profile, plan.psi_floor))
    facts = _facts(-1, found, beyond, alarm, limits, line, floors)
    if reference.timed:
        columns.append(describe_volume(reference.rows_column, facts, current.profile.rows, current.days is not None))
    for at, statistic, _ in manual_lines(reference, thresholds):
        if columns[at]["status"] == "quiet" and np.isnan(found[at, statistic]):
            name = NAMES[statistic]
            why = columns[at]["statistics"].get(name, {}).get("reason", "not computable")
            columns[at] |= {"status": "not computable", "reason": f"its threshold of {name} cannot be judged: {why}"}
    p_values = empirical_p(line, found, [*(item.name for item in reference.columns), reference.rows_column])
    return Drift(
        line,
        held_out(reference, plan, floors),
        found,
        beyond,
        alarm,
        columns,
        causes_of(columns),
        p_values,
        benjamini_hochberg(p_values, plan.alpha),
        pairs,
        sorted(
            {columns[at]["name"] for at, statistic, _ in manual_lines(reference, thresholds) if alarm[at, statistic]}
        ),
    )


# ------------------------------------------------------------------------------------------------------- statistics


def current_statistics(
    reference: Reference, current: Current, counts: Mapping[str, Counts], plan: CalibrationPlan
) -> np.ndarray:
    """float64[columns + 1, statistics]: the window against the whole reference; NaN where not computable."""
    found = np.full((len(reference.columns) + 1, len(NAMES)), np.nan)
    base = reference_counts(reference, current.days, plan.season)
    for index, column in enumerate(reference.columns):
        values = statistics(
            column, base[column.name], counts[column.name], judged(reference, column.name), plan.psi_floor
        )
        for name, value in values.items():
            found[index, NAMES.index(name)] = value[0] if np.isfinite(value[0]) else np.nan
    if current.days is not None:
        rest = day_weights(reference, current.days, plan.season)
        expected = expected_rows(reference, rest, np.array([current.length]))
        found[-1, NAMES.index(VOLUME)] = volume(np.array([current.profile.rows]), expected)[0]
    return found


def reference_counts(reference: Reference, days: np.ndarray | None, season: str) -> dict[str, Counts]:
    """The whole reference by column; with season=weekday each weekday weighs as it does in the window's days."""
    if season == "none" or days is None:
        return profile_counts(reference.profile)
    weights = day_weights(reference, days, season)
    return reference.windows(weights, weights * reference.scored)


def day_weights(reference: Reference, days: np.ndarray, season: str) -> np.ndarray:
    """float64[1, D]: 1 for every covered day; with season=weekday such that each weekday has the share it has in `days`."""
    covered = reference.covered[None, :].astype(np.float64)
    if season == "none":
        return covered
    shares = np.bincount(weekdays(days), minlength=7) / len(days)
    there = np.bincount(reference.weekdays, covered[0], minlength=7) / covered.sum()
    return np.asarray(covered * np.divide(shares, there, out=np.zeros(7), where=there > 0)[reference.weekdays])


def lines_by_statistic(line: Line, floors: Mapping[str, float]) -> np.ndarray:
    """[columns + 1, statistics]: value of each statistic from which it alarms."""
    return np.maximum(line.limits(), line.typical() + np.array([floors[name] for name in NAMES]))


def manual_lines(reference: Reference, thresholds: Mapping[str, float]) -> list[tuple[int, int, float]]:
    """(column index, statistic index, value) of manual thresholds."""
    volume_ = [(reference.rows_column, "volume")] if reference.timed else []
    names, kinds = map(list, zip(*((item.name, item.kind) for item in reference.columns), *volume_, strict=True))
    found = []
    for key, value in thresholds.items():
        column, _, statistic = key.rpartition(".")
        if key in names and column in names and statistic in NAMES:
            raise UserError(
                f"monitor.thresholds names {key!r}, which is a column and the {statistic} of the column {column!r}: write "
                f"{key + '.psi'!r} for the column"
                + (f", {column!r} for the other" if statistic == "psi" else ", or train with another name")
            )
        if key in names or statistic not in NAMES:
            column, statistic = key, VOLUME if key == reference.rows_column else "psi"
        if column not in names:
            raise UserError(f"monitor.thresholds names {key!r}, not a monitored column.{nearest(column, names)}")
        kind = kinds[names.index(column)]
        if statistic not in HAS[kind]:
            raise UserError(
                f"monitor.thresholds names {key!r}, but a column of kind {kind} has no {statistic}: it has "
                f"{', '.join(HAS[kind])}"
            )
        found.append((names.index(column), NAMES.index(statistic), float(value)))
    return found


def with_manual(
    reference: Reference, found: np.ndarray, alarm: np.ndarray, thresholds: Mapping[str, float]
) -> np.ndarray:
    """The alarms; a manual threshold replaces the line and the floor."""
    alarm = alarm.copy()
    for column, statistic, value in manual_lines(reference, thresholds):
        alarm[column, statistic] = found[column, statistic] >= value
    return alarm


def empirical_p(line: Line, found: np.ndarray, names: list[str]) -> dict[str, float]:
    """Share of the reference's windows, of all columns together, that scored as high (Davison and Hinkley 1997, 4.2).

    Scores are normalised by column, so they may be pooled; one column alone has too few windows for a small p.
    """
    scores = line.normalised(found[..., None])[..., 0]
    pooled = np.sort(line.column_scores[np.isfinite(line.column_scores)])
    result = {}
    for index, name in enumerate(names):
        if not np.isnan(scores[index]).all():
            above = len(pooled) - int(np.searchsorted(pooled, np.nanmax(scores[index]), side="left"))
            result[name] = (1 + above) / (1 + len(pooled))
    return result


def benjamini_hochberg(p_values: Mapping[str, float], alpha: float) -> list[str]:
    """Columns that the step-up procedure rejects at false discovery rate alpha (JRSS B 57, 1995)."""
    ranked = sorted(p_values.items(), key=lambda item: (item[1], item[0]))
    last = max((rank for rank, (_, p) in enumerate(ranked, 1) if p <= alpha * rank / len(ranked)), default=0)
    return [name for name, _ in ranked[:last]]


def _facts(
    index: int,
    found: np.ndarray,
    beyond: np.ndarray,
    alarm: np.ndarray,
    limits: np.ndarray,
    line: Line,
    floors: Mapping[str, float],
) -> dict[str, StatisticRecord]:
    """Line, score and alarm of each computable statistic of one column."""
    scores = line.normalised(found[..., None])[index, :, 0]
    typical = line.typical()[index]
    return {
        name: {
            "value": float(found[index, at]),
            "typical": float(typical[at]),
            "line": float(limits[index, at]),
            "score": float(scores[at]),
            "beyond": bool(beyond[index, at]),
            "effect": bool(found[index, at] - typical[at] >= floors[name]),
            "alarm": bool(alarm[index, at]),
        }
        for at, name in enumerate(NAMES)
        if np.isfinite(found[index, at])
    }
