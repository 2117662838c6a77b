"""Columns that follow the time are left out with a reason, and nothing else is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.features import FeaturesConfig
from engine.monitoring.column_findings import NEAR
from engine.monitoring.reference import Reference
from engine.monitoring.rising_columns import rising
from tests.monitoring.synthetic import FIRST, make_reference, make_window, record, run_drift, status

FEATURES = schema.build(
    FeaturesConfig,
    {
        "as_of": "at",
        "calendar": {
            "at": {"column": "at", "parts": ["month", "hour", "day_of_year"]},
            "wave": {"column": "at", "parts": ["week"], "cyclic": True},
        },
        "views": {
            "shop": {
                "entity": ["shop"],
                "windows": ["7d", "365d"],
                "aggregates": {"rows": ["count"], "paid": ["mean", "max"]},
            }
        },
    },
)


def draw(rng, day, rows):
    at = day - FIRST
    level = rng.exponential(1, rows)
    return {
        "at_month": np.full(rows, f"m{at // 30}"),
        "at_hour": rng.choice(["1", "2", "3"], rows),
        "at_day_of_year": np.full(rows, float(at)),
        "wave_week_sin": np.full(rows, np.sin(at / 58)),
        "shop_count_7d": rng.poisson(7 * level),
        "shop_count_365d": rng.poisson(min(at + 1, 365) * level),
        "shop_paid_max_365d": level * np.sqrt(min(at + 1, 365)),
        "shop_paid_mean_365d": rng.normal(5, 1, rows),
        "number": at * 1000 + np.arange(rows),
        "left": 1e6 - at * 1000 - np.arange(rows),
        "warmth": rng.normal(0.1 * at, 5, rows),  # spring
        "noise": rng.normal(0, 1, rows),
        "flat": np.full(rows, 5.0),
    }


@pytest.fixture(scope="module")
def young() -> Reference:
    """Sixty days, from the first event on."""
    return dataclasses.replace(make_reference(draw, 60, 50), history=0)


def test_what_follows_the_time_is_named_with_its_reason(young) -> None:
    found = rising(FEATURES, young)
    assert set(found) == {
        *("at_month", "at_day_of_year", "wave_week_sin"),
        *("shop_count_365d", "shop_paid_max_365d", "number", "left"),
    }
    assert found["at_month"] == "month has a cycle of 365 days, of which the reference has 60"
    assert "window of 365d" in found["shop_count_365d"] and "0 days before the reference" in found["shop_count_365d"]
    assert "rises with time" in found["number"] and "falls with time" in found["left"]


@pytest.mark.parametrize(
    ("days", "history", "kept"),
    [
        (400, 0, {"at_month", "wave_week_sin"}),
        (60, 365, {"shop_count_365d", "shop_paid_max_365d"}),
        (60, None, {"shop_count_365d", "shop_paid_max_365d"}),  # an older model does not say
    ],
)
def test_a_whole_cycle_and_a_full_window_are_judged(young, days, history, kept) -> None:
    reference = young if days == 60 else make_reference(draw, days, 50)
    assert not kept & set(rising(FEATURES, dataclasses.replace(reference, history=history)))


def test_a_column_that_follows_the_time_neither_alarms_nor_hides_others(young) -> None:
    reference = dataclasses.replace(young, rising=rising(FEATURES, young))
    calm = run_drift(reference, make_window(reference, draw, 7, 50))
    assert {name for name, item in status(calm).items() if item == "left out"} == set(reference.rising)
    assert set(calm.alarms) <= {"warmth"}  # a season is no growth: it is judged
    assert calm.left_out and record(calm, "number")["reason"].startswith("left out: it rises")
    assert not {item["column"] for item in calm.causes if item["notable"]} & set(reference.rising)
    judged = run_drift(young, make_window(young, draw, 7, 50))
    assert {"number", "at_day_of_year", "shop_count_365d"} <= set(judged.alarms)

    def lost(rng, day, rows):
        return {**draw(rng, day, rows), "number": np.where(rng.random(rows) < 0.3, np.nan, day)}

    drift = run_drift(reference, make_window(reference, lost, 7, 50))
    assert status(drift)["number"] == "alarm" and record(drift, "number")["statistics"]["missing"]["alarm"]
    asked = run_drift(reference, make_window(reference, draw, 7, 50), thresholds={"number.ks": 0.1})
    assert status(asked)["number"] == "alarm"


@settings(max_examples=12, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 1.0]), min_size=6, max_size=6), st.integers(0, 99))
def test_no_column_far_below_its_lines_is_named_as_a_cause(shifts, seed) -> None:
    def steady(rng, day, rows):
        return {f"c{k}": rng.normal(0, 1, rows) + 0.3 * np.sin(day + k) for k in range(6)}

    def moved(rng, day, rows):
        return {
            name: values + shift for (name, values), shift in zip(steady(rng, day, rows).items(), shifts, strict=True)
        }

    reference = make_reference(steady, 30, 60)
    drift = run_drift(
        reference,
        make_window(reference, moved, 1, 60, seed=seed),
        floors={"psi": 0.01, "ks": 0.01, "wasserstein": 0.01},
    )
    for cause in drift.causes:
        parts = record(drift, cause["column"])["statistics"].values()
        near = [part for part in parts if "line" in part and part["value"] >= NEAR * part["line"]]
        assert bool(near) or not cause["notable"]
    assert all(item["notable"] for item in drift.causes if item["alarm"])
