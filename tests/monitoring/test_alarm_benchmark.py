"""Pieces of `python -m benchmarks monitor`: shifts of known size, rates at an equal line, days put after clean days."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import monitor as benchmark
from benchmarks import shipped_alarm
from engine.monitoring.sudden_change import DailyCounts

FIRST, DAYS = 18_000, 150


def days_of(shares: list[float], seed: int) -> DailyCounts:
    """One column of 400 rows a day."""
    units = np.random.default_rng(seed).multinomial(400, shares, DAYS).astype(float)
    return DailyCounts(np.arange(FIRST, FIRST + DAYS), ("x",), (units,))


def test_a_change_is_found_from_every_start_and_clean_days_raise_the_alarms_of_their_rate() -> None:
    usual = [0.25, 0.25, 0.25, 0.25]
    clean, moved = days_of(usual, 0), days_of([0.1, 0.4, 0.25, 0.25], 1)
    found = shipped_alarm.shares_found(clean, {"moved": moved, "the same": days_of(usual, 2)}, FIRST + 90, 0.01)
    assert found["moved"] == 1.0
    assert found["the same"] <= 0.5 and found[""] <= 0.5  # of 4 starts; 14 days at 1 % raise none 87 times of 100


def test_days_of_another_stream_follow_clean_days() -> None:
    clean, other = days_of([0.5, 0.5], 0), days_of([0.1, 0.9], 1)
    course = shipped_alarm.after(clean, other, FIRST + 100, 7, 0.05)
    assert course.days.tolist() == list(range(FIRST, FIRST + 107))
    same = shipped_alarm.after(clean, clean, FIRST + 100, 7, 0.05)
    np.testing.assert_array_equal(course.scores[:, :100], same.scores[:, :100])
    assert course.scores[0, 100] > same.scores[0, 100] + 1
    beyond = shipped_alarm.power_scores({"clean": clean, "other": other}, [FIRST + 100], 7, 0.05)
    assert beyond["other"][0] > 0 > beyond["clean"][0]


def test_power_is_counted_beyond_the_line_of_5_percent_of_the_clean_windows() -> None:
    clean = np.arange(100.0)
    assert benchmark.detected({"clean": clean, "mean": [94.0, 95.0, 96.0, 1e9, np.nan]}, "mean") == 0.4
    assert benchmark.detected({"clean": clean, "mean": clean}, "mean") == pytest.approx(0.04)
    assert benchmark.detected({}, "mean") is None
    loudest = benchmark.largest_standard({"clean": {"x": [0, 2], "y": [10, 30]}, "mean": {"x": [1, 4], "y": [20, 60]}})
    assert loudest == {"clean": [-1, 1], "mean": [0, 4]}


def test_shifts_have_the_size_that_is_stated() -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"x": rng.normal(0, 1, 10_000), "kind": rng.choice(["AA", "B"], 10_000, p=[0.1, 0.9])})
    more = shipped_alarm.more_of(table, "kind", "AA", rng)
    before, after = (np.mean(np.array(part["kind"].to_pylist()) == "AA") for part in (table, more))
    assert after - before == pytest.approx(0.05)
    gone = shipped_alarm.without(table, "x", rng)["x"]
    assert gone.null_count / 10_000 == pytest.approx(0.05, abs=0.01)
    assert shipped_alarm.firsts({day: None for day in range(10, 31)}, 7) == range(10, 26, 7)  # type: ignore[misc]


def test_windows_of_a_stream_are_cut_by_their_days() -> None:
    table = pa.table({"day": [244, 244, 245, 250, 251], "x": [1, 2, 3, 4, 5]})
    cut = benchmark.cut({"clean": table}, range(244, 260, 7), 7)["clean"]
    assert {at: part["x"].to_pylist() for at, part in cut.items()} == {244: [1, 2, 3, 4], 251: [5], 258: []}
