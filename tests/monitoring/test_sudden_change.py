"""Sudden changes: distances against a slow twin, forward only, the rate of alarms, one incident for one change."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import linalg

from engine.config.sections.features import FeaturesConfig
from engine.config.sections.monitoring import MonitorConfig
from engine.errors import UserError
from engine.features.profile import Profile
from engine.monitoring import sudden_change as sudden
from engine.monitoring.alarm_lines import CalibrationPlan
from engine.monitoring.daily_counts import LaterDays, daily_counts, judged_columns
from engine.monitoring.statistics import Counts
from engine.monitoring.sudden_record import DISTANCE, SUDDEN, look_at, record_of, rule_of
from engine.monitoring.window import whole_days
from engine.training.drift_reference import days_table
from tests.monitoring.synthetic import FIRST, draw_table, make_reference

BINS = 8


def shares(columns: int = 5) -> np.ndarray:
    """[columns, BINS] of the usual day."""
    return np.random.default_rng(3).dirichlet(np.full(BINS, 4.0), columns)


def days_of(
    days: int,
    seed: int,
    columns: int = 5,
    rows: int = 400,
    change: dict[int, np.ndarray] | None = None,
    noise: float = 600.0,
) -> sudden.DailyCounts:
    """Days of multinomial rows with a weekday effect and noise of the day; from a day of `change` on, column 0 has its shares."""
    rng = np.random.default_rng(seed)
    usual, weekday = shares(columns), rng.normal(0, 0.1, (7, BINS))
    units = np.zeros((columns, days, BINS))
    now = usual.copy()
    for day in range(days):
        now[0] = (change or {}).get(day, now[0])
        for column in range(columns):
            tilted = now[column] * np.exp(weekday[(FIRST + day + 3) % 7])
            units[column, day] = rng.multinomial(rows, rng.dirichlet(noise * tilted / tilted.sum()))
    return sudden.DailyCounts(np.arange(FIRST, FIRST + days), tuple(f"c{k}" for k in range(columns)), tuple(units))


def moved(share: float) -> np.ndarray:
    """The shares of column 0 with `share` of the rows moved from the first bin and the last into a middle one."""
    found = shares()[0].copy()
    taken = found[0] * share, found[-1] * share
    found[0], found[-1], found[3] = found[0] - taken[0], found[-1] - taken[1], found[3] + sum(taken)
    return found


def followed(daily: sudden.DailyCounts, holidays: frozenset[int] = frozenset()) -> sudden._Watch:
    """The state after all days, with a line that no day reaches."""
    watch = sudden._Watch(daily, 1e-9, holidays)
    for at in range(len(daily.days)):
        watch.look(at)
    return watch


def naive_day_distances(unit: np.ndarray, days: np.ndarray) -> np.ndarray:
    """[D] log day distances of one unit without incidents, by loops over its days."""
    roots, rows = np.sqrt(unit / unit.sum(axis=1, keepdims=True)), unit.sum(axis=1)
    kinds = (days + 3) % 7
    effect, seen = np.zeros((7, unit.shape[1])), np.zeros(7)
    cleaned: list[np.ndarray] = []  # as they entered the baseline
    past: list[np.ndarray] = []
    whitener = None
    found = np.full(len(unit), np.nan)

    def usual(kind: int) -> np.ndarray:
        return np.asarray(effect[kind] * seen[kind] / (seen[kind] + 2.0))

    for t in range(len(unit)):
        if t >= 7:
            cleaned.append(roots[t - 7] - usual(kinds[t - 7]))
        weights = 0.5 ** (np.arange(len(cleaned))[::-1] / 10.0)
        if weights.sum() <= 3:
            continue
        difference = roots[t] - np.average(cleaned, axis=0, weights=weights)
        left = difference - usual(kinds[t])
        if len(past) >= 21:
            if days[t] % 7 == 0 or whitener is None:
                covariance = sum(np.outer(x, x) for x in past) / (len(past) + 20)
                diagonal = np.mean([x * x for x in past], axis=0) + 0.125 / rows[t]
                covariance = covariance + np.diag(20 * diagonal / (len(past) + 20) + 0.02 / rows[t])
                whitener = linalg.inv(linalg.sqrtm(covariance))
            white = whitener @ left
            found[t] = math.log(max(float(white @ white) / unit.shape[1], 0.02))
        past.append(left)
        rate = 1 / (min(seen[kinds[t]], 12) + 1)
        effect[kinds[t]] += rate * (difference - effect[kinds[t]])
        seen[kinds[t]] += 1
    return found


def test_day_distances_are_those_of_a_slow_twin() -> None:
    daily = days_of(90, seed=0, columns=2)
    watch = followed(daily)
    for place in range(2):
        twin = naive_day_distances(daily.units[place], daily.days)
        assert np.isfinite(twin).sum() > 50
        np.testing.assert_allclose(watch.logs[place, 0], twin, atol=1e-9)


@pytest.mark.parametrize("stop", [72, 83, 91])
def test_a_day_is_judged_without_later_days(stop: int) -> None:
    daily = days_of(100, 0, columns=2, change={80: moved(0.8)})
    whole = sudden.follow(daily, 0.05)
    part = sudden.follow(
        sudden.DailyCounts(daily.days[:stop], daily.columns, tuple(unit[:stop] for unit in daily.units)), 0.05
    )
    np.testing.assert_array_equal(part.scores, whole.scores[:, :stop])
    np.testing.assert_array_equal(part.lines, whole.lines[:, :stop])
    np.testing.assert_array_equal(part.opened, whole.opened[:stop])


def test_alarms_without_a_change_have_the_target_rate() -> None:
    looks = alarms = 0
    for seed in range(4):
        course = sudden.follow(days_of(300, seed, columns=3), 0.05)
        looks, alarms = looks + int(course.judged.sum()), alarms + int(course.opened.sum())
    assert looks > 4 * 200
    assert 0.02 < alarms / looks < 0.075  # within three binomial deviations, 0.022


def test_a_lasting_change_is_one_incident_and_the_line_sees_the_next_one() -> None:
    daily = days_of(260, seed=1, change={120: moved(0.8), 180: shares()[0]})
    course = sudden.follow(daily, 0.01)
    lasting = [item for item in course.incidents if item.end == "new usual"]
    assert [item.opened - FIRST for item in lasting] == [120, 180]
    assert all(item.columns[0] == "c0" and len(item.flagged) == sudden.ANCHOR for item in lasting)
    assert int(course.opened[100:].sum()) <= 3  # the two changes, and at most one false alarm in 160 days at 1 %


def test_a_day_out_of_line_is_an_incident_that_passes() -> None:
    course = sudden.follow(days_of(200, seed=2, change={150: moved(0.9), 151: shares()[0]}), 0.01)
    storm = next(item for item in course.incidents if item.opened == FIRST + 150)
    assert storm.end == "passed" and storm.flagged == [FIRST + 150]


def test_an_acknowledged_change_is_the_usual_at_once() -> None:
    daily = days_of(200, seed=1, change={150: moved(0.8)})
    loud = sudden.follow(daily, 0.01)
    calm = sudden.follow(daily, 0.01, acknowledged=[FIRST + 150])
    assert loud.opened[150:160].any() and not calm.opened[150:170].any()
    assert calm.judged[155:].all(), "the new baseline is there after a few days"


def test_a_holiday_has_a_course_of_its_own() -> None:
    holidays = [60, 100, 140, 180]
    change = {day: moved(0.9) for day in holidays} | {day + 1: shares()[0] for day in holidays} | {190: moved(0.9)}
    daily = days_of(200, seed=4, change=change)
    plain, named = (followed(daily, frozenset(FIRST + day for day in days)) for days in ([], holidays))
    assert (np.diff(named.logs[0, 0, holidays]) < -0.3).all(), "each holiday is expected better than the one before"
    assert named.logs[0, 0, 190] > plain.logs[0, 0, 190] + 0.2, (
        "holidays do not make the same change on another day usual"
    )
    np.testing.assert_array_equal(named.logs[..., :60], plain.logs[..., :60])


def test_missing_rows_below_the_floor_raise_no_alarm_and_above_it_do() -> None:
    def course(missing: int) -> sudden.Course:
        present, rng = np.full(150, 400.0), np.random.default_rng(0)
        gone = np.where(np.arange(150) >= 120, float(missing), 0.0)
        unit = np.stack([present - gone, gone], axis=1)
        other = rng.multinomial(400, np.full(BINS, 1 / BINS), 150).astype(float)
        return sudden.follow(sudden.DailyCounts(np.arange(FIRST, FIRST + 150), ("x", "y"), (unit, other)), 0.01)

    assert not any("x" in item.columns for item in course(4).incidents)  # 1 % of the rows; it was never missing before
    seen = course(20)
    assert seen.opened[120]
    assert [item.columns for item in seen.incidents if item.opened == FIRST + 120] == [["x"]]


def test_the_line_is_the_order_statistic_and_a_tail_beyond_it() -> None:
    scores = np.random.default_rng(0).exponential(1.0, 400)
    assert sudden.line(scores, 0.05) == np.sort(scores)[math.ceil(401 * 0.95) - 1]
    assert math.isnan(sudden.line(scores[:19], 0.05))
    far = [sudden.line(np.random.default_rng(seed).exponential(1.0, 400), 1e-4) for seed in range(40)]
    assert np.median(far) == pytest.approx(-math.log(1e-4), rel=0.1)


def test_a_baseline_needs_days_shortly_before() -> None:
    daily = days_of(160, seed=0)
    units = tuple(
        np.where((np.arange(160) >= 100)[:, None] & (np.arange(160) < 150)[:, None], 0.0, unit) for unit in daily.units
    )
    course = sudden.follow(dataclasses.replace(daily, units=units), 0.05)
    assert course.judged[99] and not course.judged[100:155].any()


def test_sparse_bins_are_one() -> None:
    counts = np.array([[50, 1, 0, 149], [40, 0, 2, 158]], float)
    found = sudden.grouped(counts, counts.sum(axis=0))
    np.testing.assert_array_equal(found, [[50, 149, 1], [40, 158, 2]])
    many = np.ones((1, 90))
    assert sudden.grouped(many, many[0]).shape == (1, sudden.GROUPS) and sudden.grouped(many, many[0]).sum() == 90


def test_daily_counts_join_reference_and_later_days() -> None:
    def draw(rng: np.random.Generator, _day: int, rows: int) -> dict[str, object]:
        return {"x": rng.normal(0, 1, rows), "kind": rng.choice(["a", "b"], rows)}

    reference = make_reference(draw, days=30, rows=50)
    later = {
        name: Counts(counts.values[:2], counts.missing[:2] + 5, counts.infinite[:2], counts.far[:2])
        for name, counts in reference.counts.items()
    }
    days = np.array([FIRST + 30, FIRST + 32])
    daily = daily_counts(reference, LaterDays(None, days, np.array([50.0, 10.0]), later), FIRST + 32, ["x", "kind"])
    assert daily.columns == ("x", "x", "kind", "kind", "(rows)") and len(daily.days) == 33
    missing = daily.units[1]
    assert missing[:30, 1].tolist() == [0.0] * 30 and missing[30:, 1].tolist() == [5.0, 0.0, 5.0]
    assert daily.units[-1][[29, 30, 31, 32], 0].tolist() == [50.0, 50.0, 0.0, 10.0]
    assert daily.units[-1][31].sum() == 0, "a day that nobody counted is not a day without rows"


def test_a_column_that_no_longer_follows_the_others_is_an_incident() -> None:
    def draw(rng: np.random.Generator, day: int, rows: int) -> dict[str, object]:
        far = rng.exponential(size=rows)
        long = far + 0.1 * rng.normal(size=rows)
        return {"far": far, "long": long if day < FIRST + 90 else rng.permutation(long)}

    reference = make_reference(draw, days=60, rows=100, related=("far", "long"))
    spec, rng = reference.profile.spec, np.random.default_rng(2)
    days = {FIRST + k: Profile.count(spec, draw_table(draw, rng, FIRST + k, 100)) for k in range(60, 100)}
    later = LaterDays.of(reference.counted, days_table(spec, days))
    nothing: Any = SimpleNamespace(features=FeaturesConfig()), SimpleNamespace(features=())  # no trailing windows
    names = judged_columns(*nothing, reference)
    daily = daily_counts(reference, later, FIRST + 99, names)
    (related,) = spec.conditional
    assert related.name in daily.columns and names[-1] == related.name
    course = sudden.follow(daily, 0.01)
    assert np.flatnonzero(course.opened[80:]).tolist() == [10]
    assert course.incidents[-1].columns == [related.name]
    without = daily_counts(reference, later, FIRST + 99, names[:-1])
    assert not sudden.follow(without, 0.01).opened[80:].any(), "each column by itself is as before"
    rising = dataclasses.replace(reference, rising={"far": "it follows the time"})
    assert judged_columns(*nothing, rising) == ["long", "prediction"], (
        "what is compared must not follow the time either"
    )


def test_a_day_that_no_run_counted_is_not_a_day_without_rows() -> None:
    def draw(rng: np.random.Generator, _day: int, rows: int) -> dict[str, object]:
        return {"x": rng.normal(0, 1, rows)}

    reference = make_reference(draw, days=30, rows=50)
    days = pa.array([FIRST + 30, FIRST + 30, FIRST + 32, FIRST + 33, FIRST + 33], pa.int32()).cast(pa.date32())
    bins, counts = pa.array([0, 1, 0, 0, 1], pa.int32()), pa.array([9, 9, 0, 8, 8], pa.int64())
    names = pa.array(["", "x", "", "", "x"])  # "": the number of rows
    table = pa.table({"day": days, "column": names, "bin": bins, "count": counts, "sum": pa.nulls(5, pa.float64())})
    later = LaterDays.of(reference.columns, table)
    assert later.days.tolist() == [FIRST + 30, FIRST + 32, FIRST + 33] and later.rows.tolist() == [9.0, 0.0, 8.0]
    volume = daily_counts(reference, later, FIRST + 33, ["x"]).units[-1]
    assert volume[30:, 0].tolist() == [9.0, 0.0, 0.0, 8.0]
    assert (volume[30:].sum(axis=1) > 0).tolist() == [True, False, True, True]


def test_a_part_of_a_day_is_no_day() -> None:
    hour, day = 3_600_000_000, 86_400_000_000
    rng = np.random.default_rng(0)
    full = make_reference(lambda *_: {"x": rng.normal(0, 1, 50)}, days=30, rows=50).profile

    def of(start: int, stop: int, *known: int) -> dict[int, int]:
        """Rows of the days; those in New York begin at 5:00 UTC."""
        found = whole_days(full.spec, dict.fromkeys(known, full), (start, stop), "America/New_York")
        return {at: profile.rows for at, profile in found.items()}

    rows = full.rows
    assert of(10 * day + 6 * hour, 13 * day + 5 * hour, 10, 11, 12) == {11: rows, 12: rows}
    assert of(10 * day + 5 * hour, 14 * day + 5 * hour, 10, 11, 12, 13) == dict.fromkeys((10, 11, 12, 13), rows)
    assert of(11 * day + 5 * hour, 11 * day + 6 * hour, 11) == {} == of(11 * day, 15 * day)
    assert of(10 * day + 5 * hour, 14 * day + 5 * hour, 12) == {10: 0, 11: 0, 12: rows}, "the data may end on day 12"


def test_the_rule_is_the_distance_where_the_reference_is_long() -> None:
    def draw(rng: np.random.Generator, _day: int, rows: int) -> dict[str, object]:
        return {"x": rng.normal(0, 1, rows)}

    short, long = make_reference(draw, days=40, rows=5), make_reference(draw, days=370, rows=5)
    settings = MonitorConfig()
    assert rule_of(settings, long, 0.01)[0] == DISTANCE
    assert rule_of(settings, long, 0.005)[0] == SUDDEN  # 400 separate days are needed
    assert rule_of(settings, short, 0.1)[0] == SUDDEN
    assert rule_of(dataclasses.replace(settings, rule="sudden"), long, 0.01)[0] == SUDDEN


def test_the_record_says_what_was_promised_and_realised() -> None:
    daily = days_of(200, seed=1, change={150: moved(0.8)})
    found = record_of(sudden.follow(daily, 0.01), 0.01, np.arange(FIRST + 148, FIRST + 153))
    assert found["judged"] and found["columns"][0] == "c0" and len(found["days"]) == 5
    assert found["alarms"] == len(found["incidents"]) and found["days_needed"] == 200 and not found["enough"]
    assert "cannot be promised" in found["words"]
    after = record_of(sudden.follow(daily, 0.01), 0.01, np.array([FIRST + 153]))
    assert after["opened"] == [] and len(after["continued"]) == 1
    week = look_at(MonitorConfig(), CalibrationPlan(7, 0.07, 1e-4), daily, daily.days[-7:])
    assert week["alpha_a_day"] == pytest.approx(0.01)


def test_a_wrong_acknowledgement_is_undone_by_leaving_it_out() -> None:
    daily, plan = days_of(200, seed=1, change={150: moved(0.8)}), CalibrationPlan(1, 0.01, 1e-4)
    day = str(np.datetime64("1970-01-01") + np.timedelta64(FIRST + 150, "D"))
    before, wrong, after = (
        look_at(MonitorConfig(acknowledge=days), plan, daily, daily.days[-1:]) for days in ((), (day,), ())
    )
    assert len(wrong["incidents"]) < len(before["incidents"])
    assert after == before, "nothing of a baseline is kept but the counts of the days"


def test_days_of_the_config_are_dates() -> None:
    with pytest.raises(UserError, match=r"holidays must hold days like 2024-12-25, found '25\.12\.'"):
        MonitorConfig(holidays=("25.12.",))


def test_after_an_acknowledgement_days_without_a_change_are_alarms_no_more_often() -> None:
    """The first weeks after it have fewer days than a week: they are no larger by chance."""
    opened = 0
    for seed in range(60):
        daily = days_of(150, seed=100 + seed, columns=4, rows=2000)
        opened += bool(sudden.follow(daily, 0.01, acknowledged=[FIRST + 110]).opened[110:125].any())
    assert opened <= 8, "15 days at 1 % each are about 8 of 60"
