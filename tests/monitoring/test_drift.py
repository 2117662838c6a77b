"""Drift against calibrated lines: quiet when nothing moved, loud when something did, and never silent about what it
cannot compute. Field reports E1-E7 in the whole comparison."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from engine.monitoring.alarm_lines import NAMES
from engine.monitoring.drift import Current, benjamini_hochberg
from engine.monitoring.drift_record import DIGITS, conclude
from engine.monitoring.statistics import HAS
from engine.runtime import storage
from tests.monitoring.synthetic import make_reference, make_window, record, run_drift, status


def steady(rng, day, rows):
    return {
        "x": rng.normal(0, 1, rows),
        "flat": np.full(rows, 5.0),
        "kind": rng.choice(["a", "b", "c"], rows, p=[0.5, 0.4, 0.1]),
    }


@pytest.fixture(scope="module")
def reference():
    return make_reference(steady, 60, 200)


def moved(**changes):
    def draw(rng, day, rows):
        columns = steady(rng, day, rows)
        for name, change in changes.items():
            columns[name] = change(rng, columns[name])
        return columns

    return draw


def some_missing(share):
    def change(rng, values):
        values = values.astype(object)
        values[rng.random(len(values)) < share] = None
        return values

    return change


def test_same_distribution_is_quiet(reference) -> None:
    drift = run_drift(reference, make_window(reference, steady, 7, 200))
    assert set(status(drift).values()) == {"quiet"}
    assert drift.alarms == []


@pytest.mark.parametrize(
    ("column", "change", "statistic"),
    [
        ("x", lambda rng, v: v + 1.0, "wasserstein"),
        ("x", lambda rng, v: v * 2.0, "psi"),
        ("x", some_missing(0.1), "missing"),
        ("x", lambda rng, v: np.where(rng.random(len(v)) < 0.1, 1e300, v), "outside"),
        ("x", lambda rng, v: np.where(rng.random(len(v)) < 0.1, np.inf, v), "outside"),
        ("flat", lambda rng, v: v + 1.0, "ks"),  # constant 5 against constant 6 (evidently#1900)
        ("kind", lambda rng, v: np.where(rng.random(len(v)) < 0.5, "a", v), "psi"),
        ("kind", lambda rng, v: np.where(rng.random(len(v)) < 0.1, "new", v), "unseen"),
    ],
)
def test_a_moved_column_alarms_by_the_statistic_that_shows_it(reference, column, change, statistic) -> None:
    drift = run_drift(reference, make_window(reference, moved(**{column: change}), 7, 200))
    assert status(drift)[column] == "alarm"
    assert record(drift, column)["statistics"][statistic]["alarm"]
    assert {name for name in drift.alarms if name != "prediction"} == {column}
    assert drift.causes[0]["column"] == column
    assert column in drift.discoveries


def discrete(rng, day, rows):
    return {
        "flag": (rng.random(rows) < 0.1).astype(np.int64),
        "sure": rng.random(rows) < 0.9,
        "rating": rng.choice([1.0, 2.0, 3.0, 4.0, 5.0], rows, p=[0.1, 0.1, 0.2, 0.3, 0.3]),
        "count": rng.poisson(1.5, rows),
        "spent": np.where(rng.random(rows) < 0.6, 0.0, rng.exponential(20, rows)),
    }


@pytest.mark.parametrize("column", ["flag", "sure", "rating", "count", "spent"])
def test_few_values_that_change_places_alarm_and_rounding_noise_does_not(column) -> None:
    def turned(rng, day, rows):
        columns = discrete(rng, day, rows)
        values = columns[column].astype(float)
        swapped = np.where(values == values.min(), np.median(values[values > values.min()]), values.min())
        return {**columns, column: swapped}

    def noisy(rng, day, rows):
        columns = {name: np.asarray(values, float) for name, values in discrete(rng, day, rows).items()}
        return {**columns, column: (columns[column] * (1 + 1e-7) + 1e-8).astype(np.float32)}

    reference = make_reference(discrete, 40, 200)
    drift = run_drift(reference, make_window(reference, turned, 7, 200))
    assert drift.alarms == [column]
    assert record(drift, column)["statistics"]["ks"]["alarm"]
    assert "p is that of values without ties" in record(drift, column)["statistics"]["ks"]["approximate"]
    quiet = run_drift(reference, make_window(reference, noisy, 7, 200))
    assert quiet.alarms == [] and record(quiet, column)["statistics"]["outside"]["value"] == 0


def test_new_and_vanished_categories_are_named_with_their_rows(reference) -> None:
    change = {"kind": lambda rng, v: np.where(v == "c", "brand-new", v)}
    drift = run_drift(reference, make_window(reference, moved(**change), 7, 200))
    item = record(drift, "kind")
    assert list(item["new"]["named"]) == ["brand-new"]
    assert item["new"]["named"]["brand-new"] == item["new"]["rows"] > 100
    assert list(item["vanished"]["named"]) == ["c"]
    assert item["statistics"]["chi_square"]["p"] < 1e-6


def test_an_all_null_column_is_not_computable_and_its_missing_rate_alarms(reference) -> None:
    nothing = moved(x=lambda rng, v: np.full(len(v), np.nan))
    drift = run_drift(reference, make_window(reference, nothing, 7, 200))
    item = record(drift, "x")
    assert item["status"] == "alarm"
    assert item["statistics"]["missing"]["alarm"]
    assert item["statistics"]["psi"]["value"] is None
    assert "no values" in item["statistics"]["psi"]["reason"]
    assert status(drift)["kind"] == "quiet"


def unconcluded(**given: Any) -> dict[str, Any]:
    """The part of a drift record that `conclude` reads, with nothing found but what is given."""
    empty: dict[str, Any] = {"causes": [], "performance": {}, "business": {}, "estimated": {}}
    return {**empty, "rule": {"name": "distance", "why": ""}, **given}


def test_an_empty_window_is_an_alarm_by_its_volume_and_nothing_else_is_called_quiet(reference) -> None:
    drift = run_drift(reference, make_window(reference, steady, 7, 0))
    assert status(drift)["(rows)"] == "alarm"
    assert {name: text for name, text in status(drift).items() if name != "(rows)"} == {
        "x": "not computable",
        "flat": "not computable",
        "kind": "not computable",
        "prediction": "not computable",
    }


def test_a_window_of_which_nothing_can_be_compared_is_not_quiet(reference) -> None:
    nothing = make_window(reference, steady, 7, 0)
    drift = run_drift(reference, Current(nothing.profile, None, 7.0))
    assert drift.not_computable == list(status(drift)) == ["x", "flat", "kind", "prediction", "(rows)"]
    verdict = unconcluded()
    conclude(verdict, drift, ("drift",))
    assert verdict["verdict"] == "cannot be judged" and not verdict["alarm"]
    assert verdict["unjudged"] == [{"kind": "drift", "text": "nothing could be compared"}]
    assert verdict["headline"].startswith("nothing could be compared; not computable: x, flat")


def test_a_column_that_training_never_saw_a_value_of_is_not_computable_and_stops_no_other() -> None:
    def draw(rng, day, rows):
        return {**steady(rng, day, rows), "dead": np.full(rows, np.nan)}

    reference = make_reference(draw, 40, 100)
    drift = run_drift(reference, make_window(reference, draw, 7, 100))
    assert status(drift)["dead"] == "not computable"
    assert "dead" in drift.not_computable
    assert record(drift, "dead")["reason"]
    assert status(drift)["x"] == "quiet"
    alive = moved(**{})
    woken = run_drift(reference, make_window(reference, lambda *a: {**alive(*a), "dead": np.ones(a[2])}, 7, 100))
    assert status(woken)["dead"] == "alarm"
    verdict = unconcluded()
    conclude(verdict, drift, ("drift",))
    assert verdict["verdict"] == "quiet in part" and verdict["headline"].endswith("not computable: dead")


def test_many_rows_do_not_make_a_small_move_an_alarm() -> None:  # evidently#50
    def draw(rng, day, rows):
        return {"x": rng.normal(0, 1, rows)}

    reference = make_reference(draw, 20, 20_000)
    drift = run_drift(reference, make_window(reference, lambda r, d, n: {"x": r.normal(0.06, 1, n)}, 2, 200_000))
    item = record(drift, "x")
    assert item["status"] == "quiet"
    assert item["statistics"]["ks"]["p"] < 1e-3  # reported, not decisive
    assert item["statistics"]["wasserstein"]["beyond"]  # nor the line alone: it has no effect worth an alarm
    assert item["statistics"]["wasserstein"]["value"] == pytest.approx(0.06, rel=0.1)


def test_equal_shares_in_samples_of_different_size_are_equal() -> None:  # whylogs#492
    def draw(rng, day, rows):
        return {"kind": np.array((["a"] + ["b"] * 4) * (rows // 5))}

    reference = make_reference(draw, 30, 50)
    drift = run_drift(reference, make_window(reference, draw, 7, 25))
    item = record(drift, "kind")
    assert item["statistics"]["chi_square"]["value"] == 0
    assert item["statistics"]["chi_square"]["p"] == 1
    assert item["statistics"]["psi"]["value"] == 0
    assert item["status"] == "quiet"


def test_new_category_in_chi_square_is_over_the_union_of_levels() -> None:  # alibi-detect#191
    def draw(rng, day, rows):
        return {"kind": np.array(["a", "b"] * (rows // 2))}

    reference = make_reference(draw, 10, 10)
    now = make_window(reference, lambda r, d, n: {"kind": np.array(["a"] * 45 + ["b"] * 45 + ["c"] * 10)}, 1, 100)
    item = record(run_drift(reference, now), "kind")["statistics"]["chi_square"]
    assert item["value"] == pytest.approx(10.526, abs=1e-3)
    assert item["dof"] == 2
    assert item["p"] == pytest.approx(0.00518, abs=1e-5)


def test_a_reference_smaller_than_its_bins_still_compares() -> None:
    reference = make_reference(steady, 3, 4)
    drift = run_drift(reference, make_window(reference, moved(x=lambda rng, v: v + 100.0), 1, 50))
    assert status(drift)["x"] == "alarm"
    json.dumps(storage.finite([drift.columns, drift.causes], DIGITS), allow_nan=False)


def test_one_bad_column_of_five_hundred_is_the_first_cause_and_the_only_one() -> None:
    def draw(rng, day, rows):
        return {f"c{index:03d}": values for index, values in enumerate(rng.normal(0, 1, (500, rows)))}

    def bad(rng, day, rows):
        return {**draw(rng, day, rows), "c317": rng.normal(0.8, 1, rows)}

    reference = make_reference(draw, 28, 100)
    drift = run_drift(reference, make_window(reference, bad, 7, 100))
    assert drift.alarms == ["c317"]
    assert drift.beyond.any(axis=1).sum() <= 2  # the line is for all columns together, before any floor
    assert drift.causes[0]["column"] == "c317"
    assert "c317" in drift.discoveries


def two_columns(a, b):
    return lambda rng, day, rows: {"a": rng.normal(a, 1, rows), "b": rng.normal(b, 1, rows)}


def test_importance_decides_between_two_columns_that_moved_alike() -> None:
    reference = make_reference(two_columns(0, 0), 40, 200)
    reference.importance.update(a=0.1, b=0.9)
    drift = run_drift(reference, make_window(reference, two_columns(1, 1), 7, 200))
    assert [item["column"] for item in drift.causes[:2]] == ["b", "a"]


def test_a_column_within_its_line_is_never_named_before_one_that_alarms() -> None:
    reference = make_reference(two_columns(0, 0), 40, 200)
    reference.importance.update(a=0.01, b=0.99)
    calm = {f"b.{name}": 1e9 for name in HAS["numeric"]}
    drift = run_drift(reference, make_window(reference, two_columns(0.5, 1), 7, 200), thresholds=calm)
    assert drift.alarms == ["a"]
    assert drift.causes[0]["column"] == "a"
    assert drift.causes[1]["column"] == "b" and not drift.causes[1]["notable"]  # far below its line of 1e9


def test_columns_missing_in_the_same_rows_are_named_as_one_feed() -> None:
    def draw(rng, day, rows):
        return {"a": rng.normal(0, 1, rows), "b": rng.normal(0, 1, rows), "z": rng.normal(0, 1, rows)}

    def broken(rng, day, rows):
        columns = draw(rng, day, rows)
        gone = rng.random(rows) < 0.2
        return {**columns, "a": np.where(gone, np.nan, columns["a"]), "b": np.where(gone, np.nan, columns["b"])}

    reference = make_reference(draw, 40, 200)
    drift = run_drift(reference, make_window(reference, broken, 7, 200))
    assert drift.causes[0]["missing_together_with"] == [{"a": "b", "b": "a"}[drift.causes[0]["column"]]]
    assert "together with" in drift.causes[0]["text"]


def test_manual_thresholds_override_line_and_floor_and_unknown_ones_are_named(reference) -> None:
    window = make_window(reference, moved(x=lambda rng, v: v + 0.3), 7, 200)
    assert status(run_drift(reference, window, thresholds={"x": 0.01}))["x"] == "alarm"
    assert status(run_drift(reference, window, thresholds={"x.ks": 0.01}))["x"] == "alarm"
    loud = make_window(reference, moved(x=lambda rng, v: v + 3.0), 7, 200)
    off = {f"x.{name}": 1e9 for name in HAS["numeric"]}
    assert status(run_drift(reference, loud, thresholds=off))["x"] == "quiet"
    with pytest.raises(UserError, match=r"'kinds'.*'kind'"):
        run_drift(reference, window, thresholds={"kinds": 1.0})


@pytest.mark.parametrize("key", ["kind.ks", "x.unseen", "x.volume", "(rows).psi", "prediction.unseen"])
def test_a_threshold_of_a_statistic_that_the_column_has_not_is_refused(reference, key) -> None:
    with pytest.raises(UserError, match=r"has no \w+: it has (psi|volume)"):
        run_drift(reference, make_window(reference, steady, 7, 20), thresholds={key: 0.1})


def test_a_threshold_that_cannot_be_judged_is_not_quiet(reference) -> None:
    infinite = make_window(reference, moved(x=lambda rng, v: np.where(np.arange(len(v)) == 0, np.inf, v)), 7, 200)
    assert status(run_drift(reference, infinite))["x"] == "quiet"
    drift = run_drift(reference, infinite, thresholds={"x.wasserstein": 0.1})
    assert status(drift)["x"] == "not computable"
    assert "values are infinite" in record(drift, "x")["reason"]


QUALITY = {
    "quiet": ({"status": "quiet"}, "quiet", []),
    "waiting": ({"status": "waiting", "reason": "0 labels"}, "quiet", []),
    "unjudged": ({"status": "cannot be judged", "reason": "one class"}, "cannot be judged", ["performance"]),
}


@pytest.mark.parametrize("name", QUALITY)
def test_what_was_asked_and_cannot_be_judged_is_a_verdict_of_its_own(reference, name) -> None:
    performance, expected, kinds = QUALITY[name]
    calm = run_drift(reference, make_window(reference, steady, 7, 200))
    loud = run_drift(reference, make_window(reference, moved(x=lambda rng, v: v + 1), 7, 200))
    verdict = unconcluded(performance=performance)
    conclude(verdict, calm, ("drift", "performance"))
    assert verdict["verdict"] == expected and [item["kind"] for item in verdict["unjudged"]] == kinds
    assert not kinds or "one class" in verdict["headline"]
    conclude(verdict, calm, ("drift",))  # not asked
    assert verdict["verdict"] == "quiet" and verdict["unjudged"] == []
    conclude(verdict, loud, ("drift", "performance"))
    assert verdict["verdict"] == "alarm" and [item["kind"] for item in verdict["unjudged"]] == kinds
    business = {"cost": {"value": None, "status": "cannot be judged", "reason": "no answer"}}
    verdict = unconcluded(performance=performance, business=business)
    conclude(verdict, calm, ("business",))
    assert verdict["verdict"] == "cannot be judged" and "cost cannot be judged: no answer" in verdict["headline"]


LOST = {"value": 0.6, "reference": 0.8, "band": [0.55, 0.65], "past_errors": 99, "worse_by": 0.6}


@pytest.mark.parametrize("kind", ["performance", "estimated"])
def test_a_distance_alarms_together_with_a_loss_of_quality_that_was_asked_for(reference, kind) -> None:
    loud = run_drift(reference, make_window(reference, moved(x=lambda rng, v: v + 1), 7, 200))
    quality = {"alarm": True, "alarming": ["roc_auc"], "metrics": {"roc_auc": LOST}}
    sudden = {"opened": [], "continued": [], "columns": []}
    given = {"rule": {"name": "sudden", "why": "short"}, "sudden": sudden, kind: quality}
    for words, kinds in ((("drift",), set()), ((kind,), {kind}), (("drift", kind), {"drift", kind})):
        verdict = unconcluded(**given)
        conclude(verdict, loud, words)
        assert {item["kind"] for item in verdict["alarms"]} == kinds
    assert "moved away from training" in verdict["headline"] and ", and quality " in verdict["headline"]


def test_labels_that_moved_alarm_where_it_was_asked_for(reference) -> None:
    calm = run_drift(reference, make_window(reference, steady, 7, 200))
    rate = {"value": 0.3, "reference": 0.2, "band": [0.18, 0.22], "beyond": True}
    performance = {"status": "quiet", "labels": {"positive_rate": rate}, "labels_moved": ["positive_rate"]}
    verdict = unconcluded(performance=performance)
    conclude(verdict, calm, ("drift",))
    assert not verdict["alarm"] and [item["kind"] for item in verdict["noted"]] == ["labels"]
    conclude(verdict, calm, ("labels",))
    assert verdict["alarms"] == [{"kind": "labels", "text": "labels moved: positive_rate 0.3 against 0.2"}]


ENDS = (1e160, -1e160, 1.7976931348623157e308, -1.7976931348623157e308, 5e-324, np.inf, np.nan)


@pytest.mark.parametrize("value", ENDS)
@pytest.mark.parametrize("place", ["reference", "window", "both"])
def test_values_at_the_ends_of_a_double_are_compared_like_others(value, place) -> None:
    def calm(rng, day, rows):
        return {**steady(rng, day, rows), "tail": rng.normal(0, 1, rows)}

    def far(rng, day, rows):
        columns = calm(rng, day, rows)
        tail = np.where(np.arange(rows) < 2, value, columns["tail"])
        return {**columns, "tail": tail, "flat": np.full(rows, value)}

    reference = make_reference(far if place != "window" else calm, 20, 50)
    drift = run_drift(reference, make_window(reference, far if place != "reference" else calm, 2, 50))
    json.dumps(storage.finite([drift.columns, drift.causes], DIGITS), allow_nan=False)
    assert {status(drift)[name] for name in ("kind", "x")} == {"quiet"}
    assert (status(drift)["flat"] == "alarm") == (place != "both")
    assert place != "both" or drift.alarms == []


def test_floors_are_what_separates_a_real_effect_from_a_visible_one(reference) -> None:
    window = make_window(reference, moved(x=lambda rng, v: v + 0.25), 30, 200)
    assert status(run_drift(reference, window, floors={name: 0.0 for name in NAMES}))["x"] == "alarm"
    assert status(run_drift(reference, window, floors={name: 0.5 for name in NAMES}))["x"] == "quiet"


def test_benjamini_hochberg_is_the_step_up_rule() -> None:
    p_values = {"a": 0.001, "b": 0.012, "c": 0.03, "d": 0.2, "e": 0.9}
    assert benjamini_hochberg(p_values, 0.05) == ["a", "b", "c"]
    assert benjamini_hochberg({"a": 0.2}, 0.05) == []
    assert benjamini_hochberg({}, 0.05) == []


def test_what_is_not_finite_is_null_in_the_record() -> None:
    assert storage.finite({"a": [float("nan"), (np.inf, np.float64(-np.inf))], "b": 0.1234567894}, DIGITS) == {
        "a": [None, [None, None]],
        "b": 0.123456789,
    }


def test_the_same_profile_gives_the_same_record(reference) -> None:
    window = make_window(reference, moved(x=lambda rng, v: v + 1.0), 7, 150)
    one, two = (run_drift(reference, window) for _ in range(2))
    assert json.dumps(storage.finite(one.columns, DIGITS)) == json.dumps(storage.finite(two.columns, DIGITS))
    assert one.line.heights.tolist() == two.line.heights.tolist()
