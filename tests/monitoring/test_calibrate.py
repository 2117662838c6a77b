"""Lines keep the false-alarm rate that they state, for windows of time that resemble their neighbours."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from engine.monitoring.alarm_lines import (
    LINE,
    NAMES,
    CalibrationPlan,
    Windows,
    calibrate,
    contiguous,
    from_blocks,
    held_out,
    judge,
    make_windows,
    rest_of,
    separate_windows,
    window_statistics,
)
from engine.monitoring.drift import FLOORS, current_statistics
from engine.monitoring.statistics import profile_counts
from tests.monitoring.synthetic import make_reference, make_window, record, run_drift, status


def wandering(strength: float):
    """Days whose mean wanders: rows of a day resemble one another more than those of another day."""

    def draw(rng, day, rows):
        level = np.random.default_rng(day).normal(0, strength)
        return {f"c{k}": rng.normal(level * (k % 2), 1, rows) for k in range(6)}

    return draw


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_realised_rate_of_fresh_windows_is_near_alpha(strength: float) -> None:
    draw = wandering(strength)
    reference = make_reference(draw, 120, 100)
    plan = CalibrationPlan(1, 0.05, 1e-4)
    line = calibrate(reference, plan)
    alarms = 0
    for seed in range(60):
        shifted = functools.partial(lambda s, rng, day, rows: draw(rng, day + 1000 * (s + 1), rows), seed)
        window = make_window(reference, shifted, 1, 100, seed + 5)
        found = current_statistics(reference, window, profile_counts(window.profile), plan)
        alarms += bool(judge(line, found[..., None], FLOORS)[0].any())
    # Binomial(60, 0.05): 99.9 % of the time at most 10.
    assert alarms <= 10


def test_shuffled_rows_would_have_promised_too_much() -> None:
    """With days that wander, the line from windows of days lies above that of exchangeable rows."""
    still, moving = (
        calibrate(make_reference(wandering(s), 60, 100), CalibrationPlan(1, 0.05, 1e-4)) for s in (0.0, 0.5)
    )
    column = 1  # c1 wanders, c0 does not
    assert moving.center[column, NAMES.index("wasserstein")] > 2 * still.center[column, NAMES.index("wasserstein")]


def test_held_out_windows_count_alarms_that_the_line_did_not_see() -> None:
    def draw(rng, day, rows):
        return {"x": rng.normal(3.0 if day == 18_030 else 0.0, 1, rows)}

    found = held_out(make_reference(draw, 40, 100), CalibrationPlan(1, 0.05, 1e-4, resamples=100), FLOORS)
    assert found.windows == 40
    assert found.alarms >= 1
    assert found.alarms_by_column["x"] >= 1
    assert found.over_line >= found.alarms


def test_small_windows_widen_the_band() -> None:
    reference = make_reference(wandering(0.0), 60, 400)
    plan = CalibrationPlan(1, 0.05, 1e-4)
    limits = []
    for rows in (400, 40, 8):
        line = calibrate(reference, plan, {item.name: float(rows) for item in reference.columns})
        limits.append(line.limits()[0, NAMES.index("ks")])
    assert limits[0] < limits[1] < limits[2]
    tiny = make_window(reference, wandering(0.0), 1, 8)
    assert {name for name, text in status(run_drift(reference, tiny)).items() if text == "alarm"} <= {"(rows)"}


def test_a_column_that_leapt_before_does_not_raise_the_line_of_the_others() -> None:
    def draw(rng, day, rows):
        wild = 3.0 if day % 10 == 0 else 0.0
        return {"wild": rng.normal(wild, 1, rows), "calm": rng.normal(0, 1, rows)}

    reference = make_reference(draw, 100, 100)
    drift = run_drift(
        reference, make_window(reference, lambda r, d, n: {**draw(r, 1, n), "calm": r.normal(0.7, 1, n)}, 1, 100)
    )
    assert status(drift)["calm"] == "alarm"
    leapt = run_drift(reference, make_window(reference, lambda r, d, n: draw(r, 10, n), 1, 100))
    assert status(leapt)["wild"] == "quiet"


def test_a_window_of_the_reference_is_judged_by_the_very_score_that_its_line_was_made_of() -> None:
    """Bit for bit, or rounding would put the window that the line goes through beyond it."""
    allowed, plan = np.ones(60, bool), CalibrationPlan(1, 0.01, 1e-4)
    reference = make_reference(wandering(0.3), 60, 50)
    real = np.eye(60)
    line = calibrate(reference, plan)
    found = line.normalised(window_statistics(reference, Windows(real, real, np.ones(60, bool)), allowed, plan))
    assert (np.nanmax(found, axis=1) == line.column_scores[:, line.real]).all()
    assert np.nanmax(found) <= LINE


def test_storms_of_missing_values_do_not_raise_the_line_of_the_values() -> None:
    """One column loses half of its rows on one day in 25: a moderate shift of another column's values is still seen."""

    def draw(rng, day, rows, shift=0.0):
        lost = rng.random(rows) < (0.5 if day % 25 == 1 else 0.0)
        return {"leaky": np.where(lost, np.nan, rng.normal(0, 1, rows)), "calm": rng.normal(shift, 1, rows)}

    reference = make_reference(draw, 200, 400)
    heights = dict(zip(NAMES, calibrate(reference, CalibrationPlan(1, 0.05, 1e-4)).heights, strict=True))
    assert heights["missing"] == heights["volume"] > 10 * heights["ks"]
    assert heights["ks"] == heights["psi"] == heights["wasserstein"] == heights["outside"] == heights["unseen"]
    moved = make_window(reference, functools.partial(draw, shift=0.4), 1, 400)
    assert status(run_drift(reference, moved)) == {
        "leaky": "quiet",
        "calm": "alarm",
        "prediction": "quiet",
        "(rows)": "quiet",
    }


def closed_on(weekdays):
    """Days on which fewer rows come, or none."""

    def draw(rng, day, rows):
        return {"x": rng.normal(0, 1, weekdays.get((day + 3) % 7, rows))}

    return draw


def test_rows_are_expected_by_the_day_closed_ones_counted_as_the_lines_count_them() -> None:
    draw = closed_on({5: 0, 6: 0})
    drift = run_drift(make_reference(draw, 70, 200), make_window(make_reference(draw, 70, 200), draw, 7, 200))
    assert record(drift, "(rows)")["statistics"]["volume"]["value"] == pytest.approx(0.0, abs=1e-9)
    half = make_window(make_reference(draw, 70, 200), draw, 7, 100)
    assert status(run_drift(make_reference(draw, 70, 200), half))["(rows)"] == "alarm"


def test_a_closed_day_does_not_take_the_predictions_out_of_its_window() -> None:
    reference = make_reference(closed_on({5: 0, 6: 0}), 140, 200, scored=70)
    line = calibrate(reference, CalibrationPlan(7, 0.05, 1e-4, resamples=100))
    predicted = [item.name for item in reference.columns].index("prediction")
    starts = np.flatnonzero(np.isfinite(line.column_scores[predicted, line.real]))
    assert starts.tolist() == list(range(71, 139 - 7 + 1))  # predictions from Monday 71 to Friday 138


def test_a_gap_between_the_periods_hides_no_change_of_the_number_of_rows() -> None:
    def draw(rng, day, rows):
        return {"x": rng.normal(0, 1, 0 if 18_060 <= day < 18_100 else rows)}

    reference = make_reference(draw, 130, 200)
    assert reference.covered.sum() == 90
    assert held_out(reference, CalibrationPlan(7, 0.05, 1e-4, resamples=100), FLOORS).windows == 8 + 3
    found = {rows: status(run_drift(reference, make_window(reference, draw, 7, rows))) for rows in (100, 200, 400)}
    assert {rows: item["(rows)"] for rows, item in found.items()} == {100: "alarm", 200: "quiet", 400: "alarm"}


def test_rows_that_come_once_a_month_are_no_gaps() -> None:
    def draw(rng, day, rows):
        return {"x": rng.normal(0, 1, rows if day % 30 == 0 else 0)}

    reference = make_reference(draw, 300, 50)
    assert reference.covered.all()


def test_rows_of_a_weekday_are_expected_by_that_weekday() -> None:
    reference = make_reference(closed_on({6: 50}), 70, 200)

    def of_sunday(rows):
        found = make_window(reference, lambda rng, day, _: {"x": rng.normal(0, 1, rows)}, 1, rows)
        assert int(found.days[0] + 3) % 7 == 6
        return status(run_drift(reference, found, season="weekday"))["(rows)"]

    assert of_sunday(50) == "quiet"
    assert of_sunday(200) == "alarm"


def test_a_day_that_is_always_closed_expects_no_rows_and_hides_nothing_of_the_others() -> None:
    reference = make_reference(closed_on({6: 0}), 364, 1000)
    plan = CalibrationPlan(1, 0.05, 1e-4, season="weekday", resamples=100)
    assert np.isfinite(calibrate(reference, plan).heights).all()

    def of_day(later, rows):
        found = make_window(reference, lambda rng, day, _: {"x": rng.normal(0, 1, rows)}, 1, rows)
        assert int(found.days[0] + 3) % 7 == 6
        drift = run_drift(reference, type(found)(found.profile, found.days + later, 1.0), season="weekday")
        return status(drift)["(rows)"]

    assert of_day(0, 0) == "quiet" and of_day(0, 1000) == "alarm"  # Sunday
    assert of_day(1, 1) == "alarm" and of_day(1, 1000) == "quiet"  # Monday


def test_weekdays_that_the_reference_lacks_are_the_reason_why_rows_cannot_be_compared() -> None:
    reference = make_reference(lambda rng, day, rows: {"x": rng.normal(0, 1, rows)}, 5, 200)  # Sunday to Thursday
    window = make_window(reference, lambda rng, day, rows: {"x": rng.normal(0, 1, rows)}, 1, 200)
    assert int(window.days[0] + 3) % 7 == 4
    rows = record(run_drift(reference, window, season="weekday"), "(rows)")
    assert rows["status"] == "not computable" and "reference has no such days" in rows["reason"]


def test_weekday_season_forgives_a_sunday_and_not_a_monday_that_looks_like_one() -> None:
    def draw(rng, day, rows):
        sunday = (day + 3) % 7 == 6
        return {"x": rng.normal(1.5 if sunday else 0.0, 1, rows)}

    reference = make_reference(draw, 70, 200)
    sunday = make_window(reference, lambda r, d, n: {"x": r.normal(1.5, 1, n)}, 1, 200)  # day 18070 is a Sunday
    assert (int(sunday.days[0]) + 3) % 7 == 6
    assert status(run_drift(reference, sunday, season="weekday"))["x"] == "quiet"
    monday = type(sunday)(sunday.profile, sunday.days + 1, 1.0)
    assert status(run_drift(reference, monday, season="weekday"))["x"] == "alarm"


def test_windows_are_whole_days_in_a_row_and_blocks_fill_a_window() -> None:
    allowed = np.ones(20, bool)
    allowed[9] = False
    real = contiguous(allowed, 5, 2)
    assert (real.sum(axis=1) == 5).all()
    assert (real[:, 9] == 0).all()
    assert all(np.ptp(np.flatnonzero(row)) == 4 for row in real)
    drawn = from_blocks(allowed, CalibrationPlan(11, 0.05, 1e-4, block=4), 50, np.random.default_rng(0))
    assert (drawn.sum(axis=1) == 11).all()
    assert (drawn[:, 9] == 0).all()
    assert separate_windows(allowed, 5) == 3


def test_enough_real_windows_need_no_resampled_ones() -> None:
    reference = make_reference(wandering(0.0), 45, 20)
    rng = np.random.default_rng(0)
    allowed = np.ones(45, bool)
    assert make_windows(reference, allowed, CalibrationPlan(1, 0.05, 1e-4), rng).real.all()
    assert not make_windows(reference, allowed, CalibrationPlan(1, 0.01, 1e-4), rng).real.all()


def test_the_rest_leaves_the_window_out_and_weighs_weekdays_as_it_does() -> None:
    days = np.arange(28)
    window = np.zeros((1, 28))
    window[0, :2] = 1.0
    rest = rest_of(window, np.ones(28, bool), days % 7, "none")
    assert rest[0].tolist() == [0, 0, *[1.0] * 26]
    apart = rest_of(window, np.ones(28, bool), days % 7, "none", memory=3)
    assert apart[0].tolist() == [0, 0, 0, 0, 0, *[1.0] * 23]
    nearly_all = rest_of(window, np.ones(28, bool), days % 7, "none", memory=25)
    assert nearly_all[0].tolist() == rest[0].tolist()
    season = rest_of(window, np.ones(28, bool), days % 7, "weekday")
    assert [season[0, days % 7 == k].sum() for k in range(7)] == pytest.approx([1, 1, 0, 0, 0, 0, 0])


def test_predictions_of_a_short_validation_period_are_calibrated_on_its_days() -> None:
    reference = make_reference(lambda r, d, n: {"x": r.normal(0, 1, n)}, 60, 100, scored=10)
    assert reference.scored.sum() == 10
    current = make_window(reference, lambda r, d, n: {"x": r.normal(0, 1, n)}, 14, 100)
    assert status(run_drift(reference, current))["prediction"] == "quiet"
    far = make_window(reference, lambda r, d, n: {"x": r.normal(2, 1, n)}, 14, 100)
    assert status(run_drift(reference, far))["prediction"] == "alarm"
