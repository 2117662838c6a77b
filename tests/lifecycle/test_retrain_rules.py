"""Rules of retraining, and the gate between two models, on records made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import schema, units
from engine.config.sections.lifecycle import GateConfig, RetrainConfig
from engine.lifecycle import challenger_gate
from engine.lifecycle.challenger import periods_of
from engine.lifecycle.challenger_gate import Judged, evidence, verdict
from engine.lifecycle.retrain_rules import Champion, Facts, Later, Observation, trigger
from engine.training.losses import LOSSES
from engine.training.resampling import poisson_counts

D = units.MICROSECONDS["d"]
NOW = 400 * D
GATE = schema.build(GateConfig, {"min_rows": 100, "min_slice_rows": 50, "bootstrap": 100, "max_ece_rise": 0.05})


def policy(**values: Any) -> RetrainConfig:
    return schema.build(RetrainConfig, values)  # type: ignore[no-any-return]


def facts(*windows: Any, **changes: Any) -> Facts:
    """Facts at day 400; windows of 30 days, the newest last: True/False/None = alarm, a number = metric."""
    observations = []
    for place, window in enumerate(reversed(windows)):
        stop = NOW - 30 * D * place
        known: dict[str, Any] = {"alarm": window} if window is None or isinstance(window, bool) else {"metric": window}
        observations.append(Observation(stop - 30 * D, stop, "champ", metric_name="roc_auc", **known))
    base = Facts(NOW, Champion("champ", 300 * D, 0.75), tuple(observations), (), 5000)
    return dataclasses.replace(base, **changes)


# ------------------------------------------------------------------------------------------------------ triggers


@pytest.mark.parametrize(
    ("windows", "k", "starts"),
    [
        ((True,), 1, True),
        ((True, False), 1, False),
        ((False, True), 2, False),
        ((True, True), 2, True),
        ((True, False, True), 2, False),
        ((), 1, False),
        ((None,), 1, False),
        ((True, None), 1, False),
    ],
)
def test_drift_must_be_sustained(windows: tuple[Any, ...], k: int, starts: bool) -> None:
    answer = trigger(facts(*windows), policy(triggers=["drift"], drift_windows=k))
    assert answer.start is starts
    assert answer.fired == (("drift",) if starts else ())


def test_drift_that_cannot_be_computed_says_so() -> None:
    assert "could not be computed" in trigger(facts(None), policy(triggers=["drift"])).reason


def test_an_alarm_against_the_last_champion_starts_nothing() -> None:
    old = facts(True)
    other = dataclasses.replace(old.observations[0], model="the champion before")
    assert not trigger(dataclasses.replace(old, observations=(other,)), policy(triggers=["drift"])).start


def test_a_window_that_is_not_over_plays_no_part() -> None:
    late = dataclasses.replace(facts(True).observations[0], stop=NOW + 1)
    assert not trigger(facts(observations=(late,)), policy(triggers=["drift"])).start


@pytest.mark.parametrize(("metric", "starts"), [(0.741, False), (0.739, True), (0.80, False)])
def test_performance_below_the_band_starts(metric: float, starts: bool) -> None:
    assert trigger(facts(metric), policy(triggers=["performance"], performance_drop=0.01)).start is starts


def test_performance_of_a_loss_counts_the_other_way() -> None:
    seen = facts(0.60)
    loss = dataclasses.replace(seen.observations[0], metric_name="log_loss", metric=0.80)
    assert trigger(dataclasses.replace(seen, observations=(loss,)), policy(triggers=["performance"])).start


@pytest.mark.parametrize(("quality", "starts"), [("alarm", True), ("quiet", False), ("cannot be judged", False)])
def test_a_figure_that_cannot_be_computed_is_not_passed_over_for_an_older_one(quality: str, starts: bool) -> None:
    seen = facts(0.76, None)
    newest = dataclasses.replace(seen.observations[0], quality=quality, quality_text="all rows have the same target")
    answer = trigger(
        dataclasses.replace(seen, observations=(*seen.observations[1:], newest)), policy(triggers=["performance"])
    )
    assert answer.start is starts
    assert "roc_auc of the newest window with labels is not computable" in answer.reason
    assert f"all rows have the same target: {quality}" in answer.reason
    assert trigger(facts(0.70, None), policy(triggers=["performance"])).start  # no labels yet: the older one counts


def test_age_and_volume_start() -> None:
    assert trigger(facts(), policy(triggers=["age"], max_age="99d")).start
    assert not trigger(facts(), policy(triggers=["age"], max_age="100d")).start
    assert trigger(facts(), policy(triggers=["volume"], min_new_rows=5000)).start
    assert not trigger(facts(), policy(triggers=["volume"], min_new_rows=5001)).start


def test_repeated_alarms_within_the_cool_down_start_one_retrain() -> None:
    rules = policy(triggers=["drift"], cool_down="60d")
    assert trigger(facts(True), rules).start
    held = trigger(facts(True, starts=(NOW - 59 * D,)), rules)
    assert (held.start, held.fired) == (False, ("drift",))
    assert "cool_down=60d" in held.reason
    assert trigger(facts(True, starts=(NOW - 60 * D,)), rules).start


def test_the_budget_counts_starts_of_its_period() -> None:
    rules = policy(triggers=["always"], budget=2, budget_period="100d")
    assert trigger(facts(starts=(NOW - 50 * D, NOW - 100 * D)), rules).start
    held = trigger(facts(starts=(NOW - 50 * D, NOW - 99 * D)), rules)
    assert not held.start
    assert "retrain.budget=2" in held.reason


def test_without_a_new_label_nothing_starts() -> None:
    assert "no labelled row is new" in trigger(facts(True, new_rows=0), policy(triggers=["drift"])).reason


@pytest.mark.parametrize(("later", "said"), [
    (None, r"since the champion was trained$"),
    (Later(263 * D, 0, 0, None), r"saw rows until 1970-10-28.* and the dataset holds none from then to 1971-02-05"),
    (
        Later(263 * D, 1234, 56, 310 * D),
        r"of 1,234 rows since then 56 have a label, but a row counts when it is 263\.0 days old, by when 95 % of labels "
        r"arrive: the first row reaches that age at 1971-07-28T00:00:00\+00:00. A shorter retrain\.maturity",
    ),
    (Later(9 * D, 1234, 0, 310 * D), r"of 1,234 rows since then 0 have a label, and none of these is 9\.0 days old"),
])  # fmt: skip
def test_a_refusal_for_want_of_labels_says_what_is_there_and_when_the_first_row_counts(
    later: Later | None, said: str
) -> None:
    reason = trigger(facts(True, new_rows=0, later=later), policy(triggers=["drift"])).reason
    assert re.search(said, reason), reason


def test_performance_without_a_figure_says_whose_is_missing() -> None:
    rules = policy(triggers=["performance"])
    assert "the champion has no figure" in trigger(facts(0.7, champion=Champion("champ", 300 * D, None)), rules).reason
    assert "none of 2 monitored windows of the champion has a figure" in trigger(facts(True, None), rules).reason


def test_a_refusal_says_when_it_ends() -> None:
    rules = policy(triggers=["always"], cool_down="60d", budget=2, budget_period="100d")
    starts = (NOW - 90 * D, NOW - 70 * D)
    for held, begun in (
        (trigger(facts(starts=(NOW - 10 * D,)), rules), (NOW - 10 * D,)),
        (trigger(facts(starts=starts), rules), starts),
    ):
        assert not held.start
        (until,) = re.findall(r"at (\d{4}-\d\d-\d\dT\S+)$", held.reason)
        then = units.instant(until, "UTC")
        assert trigger(facts(now=then, starts=begun, observations=()), rules).start
        assert not trigger(facts(now=then - 1, starts=begun, observations=()), rules).start


def test_volume_counts_labels_that_are_not_ripe_apart() -> None:
    answer = trigger(
        facts(later=Later(30 * D, 9000, 7500, 310 * D)), policy(triggers=["volume"], min_new_rows=6000, maturity="30d")
    )
    assert not answer.start
    assert "; 2,500 more have a label but are not 30.0 days old, retrain.maturity=30d" in answer.reason


def test_facts_survive_json() -> None:
    given = facts(True, None, 0.7, starts=(1, 2), later=Later(9 * D, 5, 4, 3))
    assert Facts.from_plain(json.loads(json.dumps(dataclasses.asdict(given))), "facts.json") == given


# ------------------------------------------------------------------------------------------------------ periods


@settings(max_examples=40)
@given(
    first=st.integers(0, 100), length=st.integers(30, 300), horizon=st.integers(0, 80), seen=st.integers(0, 400),
    window=st.sampled_from(["expanding", "sliding"]), judge_days=st.integers(1, 60), valid=st.integers(0, 20),
)  # fmt: skip
def test_periods_follow_one_another_and_neither_model_saw_what_is_judged(
    first: int, length: int, horizon: int, seen: int, window: str, judge_days: int, valid: int
) -> None:
    rules = policy(window=window, window_length="50d", judge_length=f"{judge_days}d", valid_length=f"{valid}d")
    now = (first + length) * D
    found = periods_of(rules, first * D, now, horizon * D, seen * D)
    assert found.stop == now - horizon * D
    assert found.judge >= seen * D
    assert found.judge - found.valid == valid * D
    if window == "sliding":
        assert found.judge - found.start <= 50 * D or found.start == first * D
    if not found.empty:
        assert first * D <= found.start < found.valid <= found.judge < found.stop <= now


# ---------------------------------------------------------------------------------------------------------- gate


def rows(seed: int = 0, n: int = 4000, skill: tuple[float, float] = (1.0, 1.0), shared: float = 0.9) -> Judged:
    """Two nearly calibrated models that see the truth through noise, much of it common to both; more skill, less noise."""
    rng = np.random.default_rng(seed)
    truth, common = rng.normal(size=n), rng.normal(size=n)
    target = (rng.random(n) < 1 / (1 + np.exp(1.0 - 2.0 * truth))).astype(float)
    scores = []
    for level in skill:
        noise = (shared * common + np.sqrt(1 - shared**2) * rng.normal(size=n)) / level
        seen = (truth + noise) / (1 + 1 / level**2)  # the mean of the truth given what is seen
        scores.append((1 / (1 + np.exp(0.75 - 1.5 * seen))).astype(np.float32))
    days = np.arange(n) * 28 // max(n, 1)
    return Judged(target, scores[0], scores[1], {"side": np.where(rng.random(n) < 0.5, "left", "right")}, days, days)


def test_a_better_challenger_wins_and_a_worse_one_does_not() -> None:
    assert verdict(evidence(rows(skill=(1.0, 1.4)), LOSSES["binary"], GATE), GATE)[0] == challenger_gate.PROMOTE
    answer, reasons = verdict(evidence(rows(skill=(1.4, 1.0)), LOSSES["binary"], GATE), GATE)
    assert answer == challenger_gate.KEEP
    assert "the challenger is worse" in reasons[0]


def test_an_equal_challenger_does_not_win() -> None:
    same = rows()
    same = dataclasses.replace(same, challenger=same.champion)
    found = evidence(same, LOSSES["binary"], GATE)
    assert (found["metric"]["gain"], found["metric"]["low"], found["metric"]["high"]) == (0, 0, 0)
    assert verdict(found, GATE)[0] == challenger_gate.KEEP
    wins = sum(
        verdict(evidence(rows(seed), LOSSES["binary"], GATE), GATE)[0] == challenger_gate.PROMOTE for seed in range(20)
    )
    assert wins <= 4  # a chance gain passes a one-sided 5 % test in about 1 of 20


@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_a_gain_that_another_seed_may_give_does_not_win_however_sure_it_is(loss: str) -> None:
    """By default the gain must be above 1 % of what the champion is better than chance, of a loss 1 % of the loss."""
    rng = np.random.default_rng(0)
    error, days = rng.normal(size=20_000), np.arange(20_000) * 28 // 20_000
    if loss == "binary":
        target = rng.integers(0, 2, 20_000).astype(float)
        sides = [(1 / (1 + np.exp(-(target - 0.5) * skill - error))).astype(np.float32) for skill in (1.0, 1.008, 1.05)]
    else:
        target = np.zeros(20_000)
        sides = [error * size for size in (1.0, 0.995, 0.98)]
    gate = dataclasses.replace(GATE, max_ece_rise=1.0, max_cost_rise=10.0)
    found = [evidence(Judged(target, sides[0], side, {}, days, days), LOSSES[loss], gate) for side in sides]
    assert found[1]["metric"]["low"] > 0
    answers = [verdict(item, gate) for item in found]
    assert [answer for answer, _ in answers] == [challenger_gate.KEEP, challenger_gate.KEEP, challenger_gate.PROMOTE]
    assert f"the gain must be above {found[1]['metric']['least_gain']:.2g}" in answers[1][1][0]
    none = dataclasses.replace(gate, min_gain=0.0)
    assert (
        verdict(evidence(Judged(target, sides[0], sides[1], {}, days, days), LOSSES[loss], none), none)[0]
        == challenger_gate.PROMOTE
    )


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["champion", "challenger"])
def test_a_metric_that_is_not_defined_never_wins(side: str, broken: float) -> None:
    given = rows(skill=(1.0, 1.4))
    scores = getattr(given, side).copy()
    scores[7] = broken
    found = json.loads(
        json.dumps(evidence(dataclasses.replace(given, **{side: scores}), LOSSES["binary"], GATE), allow_nan=False)
    )
    answer, reasons = verdict(found, GATE)
    assert answer == challenger_gate.KEEP
    assert f"1 scores of the {side} are not finite" in reasons[0]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_alone_is_no_judgement(value: float) -> None:
    given = rows(skill=(1.0, 1.4))
    found = evidence(dataclasses.replace(given, target=np.full(given.rows, value)), LOSSES["binary"], GATE)
    answer, reasons = verdict(found, GATE)
    assert answer == challenger_gate.KEEP
    assert "the same target" in reasons[0]


def test_too_few_rows_are_no_judgement() -> None:
    answer, reasons = verdict(evidence(rows(n=99, skill=(0.5, 3.0)), LOSSES["binary"], GATE), GATE)
    assert answer == challenger_gate.KEEP
    assert "only 99 judged rows" in reasons[0]
    empty = rows(n=0)
    assert verdict(evidence(empty, LOSSES["binary"], GATE), GATE)[0] == challenger_gate.KEEP


def test_a_slice_that_loses_much_stops_a_promotion() -> None:
    given = rows(skill=(1.0, 1.8))
    scores = given.challenger.copy()
    left = np.flatnonzero(given.slices["side"] == "left")[:700]
    slices = {"side": np.where(np.isin(np.arange(given.rows), left), "small", "rest")}
    scores[left] = np.random.default_rng(1).permutation(scores[left])
    found = evidence(dataclasses.replace(given, challenger=scores, slices=slices), LOSSES["binary"], GATE)
    answer, reasons = verdict(found, GATE)
    assert answer == challenger_gate.KEEP
    assert any("slice side=small" in reason for reason in reasons)


def test_a_slice_of_one_class_is_guarded_by_its_log_loss() -> None:
    given = rows(skill=(1.0, 1.8))
    negative = np.flatnonzero(given.target == 0)[:700]
    slices = {"side": np.where(np.isin(np.arange(given.rows), negative), "none", "rest")}
    scores = given.challenger.copy()
    scores[negative] = np.clip(scores[negative] + 0.1, 0, 1)
    judged = dataclasses.replace(given, challenger=scores, slices=slices)
    found = evidence(judged, LOSSES["binary"], GATE)
    assert next(part for part in found["slices"] if part["value"] == "none")["metric"] == "log_loss"
    assert any("side=none" in reason and "of log_loss" in reason for reason in verdict(found, GATE)[1])
    earlier = evidence(judged, LOSSES["binary"], GATE, stand_ins=False)  # as decisions of format 1 were taken
    assert not any("side=none" in reason for reason in verdict(earlier, GATE)[1])


def test_lost_calibration_stops_a_promotion() -> None:
    given = rows(skill=(1.0, 1.4))
    sharp = np.where(given.challenger < 0.5, given.challenger / 8, 1 - (1 - given.challenger) / 8).astype(np.float32)
    loose = dataclasses.replace(GATE, max_cost_rise=100.0)
    answer, reasons = verdict(evidence(dataclasses.replace(given, challenger=sharp), LOSSES["binary"], loose), loose)
    assert answer == challenger_gate.KEEP
    assert len(reasons) == 1
    assert "calibration error" in reasons[0]


def test_a_business_cost_that_rises_beyond_chance_stops_a_promotion() -> None:
    given = rows(skill=(1.0, 1.4))
    shy = (given.challenger * 0.2).astype(np.float32)  # the same ranking, but hardly anyone is above the threshold
    loose = dataclasses.replace(GATE, max_ece_rise=1.0)
    answer, reasons = verdict(evidence(dataclasses.replace(given, challenger=shy), LOSSES["binary"], loose), loose)
    assert answer == challenger_gate.KEEP
    assert len(reasons) == 1
    assert "business cost" in reasons[0]


def test_costs_by_hand() -> None:
    gate = dataclasses.replace(GATE, cost_false_negative=5.0, cost_false_positive=1.0)
    target, scores = np.array([1, 1, 0, 0.0]), np.array([0.9, 0.1, 0.9, 0.1])
    assert challenger_gate.row_costs(target, scores, 1 / 6, gate).tolist() == [0, 5, 1, 0]


def test_the_interval_is_of_the_difference_not_of_two_separate_figures() -> None:
    close = evidence(rows(shared=0.99), LOSSES["binary"], GATE)["metric"]
    apart = evidence(rows(shared=0.0), LOSSES["binary"], GATE)["metric"]
    assert (close["high"] - close["low"]) < (apart["high"] - apart["low"]) / 3


def test_days_are_the_sample_not_rows() -> None:
    """Ten copies of each row are no more evidence than one."""
    given = rows(skill=(1.0, 1.1))
    often = np.repeat(np.arange(given.rows), 10)
    sides = (given.target[often], given.champion[often], given.challenger[often])
    copied = Judged(*sides, {}, given.days[often], given.blocks[often])
    one, many = (evidence(judged, LOSSES["binary"], GATE)["metric"] for judged in (given, copied))
    assert (one["low"], one["high"]) == pytest.approx((many["low"], many["high"]), rel=1e-6)


def test_the_interval_of_a_gain_holds_the_true_one_as_often_as_it_says() -> None:
    """Two models that differ by a mood of the day, which lasts: the true gain in mean absolute error is 0."""
    gate, held = dataclasses.replace(GATE, metric="mae", bootstrap=200), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        mood = np.zeros(58)
        for day in range(1, 58):
            mood[day] = 0.3 * mood[day - 1] + rng.normal()
        lift, days = np.repeat(mood[30:], 20), np.repeat(np.arange(28), 20)
        noise = rng.normal(10, 1, 560)
        found = evidence(Judged(np.zeros(560), noise, noise + lift, {}, days, days), LOSSES["squared"], gate)["metric"]
        held += found["low"] <= 0 <= found["high"]
    assert 0.84 <= held / 200 <= 0.95, held / 200


def test_a_judgement_of_few_days_says_so() -> None:
    given = rows(skill=(1.0, 1.4))
    few = given.days * 4 // 28
    answer, reasons = verdict(evidence(dataclasses.replace(given, days=few, blocks=few), LOSSES["binary"], GATE), GATE)
    assert answer == challenger_gate.KEEP
    assert "lie in 4 days" in reasons[0] and "at least 5: raise retrain.judge_length" in reasons[0]
    week = given.days * 7 // 28
    answer, reasons = verdict(
        evidence(dataclasses.replace(given, days=week, blocks=week), LOSSES["binary"], GATE), GATE
    )
    assert answer == challenger_gate.KEEP
    assert "7 days were judged, and a gain of this size shows in about 11 (retrain.judge_length)" in reasons[0]


def test_each_look_at_a_champion_is_paid_for() -> None:
    lucky = evidence(rows(seed=3, n=1500, skill=(1.0, 1.08)), LOSSES["binary"], GATE)
    assert lucky["metric"]["low"] > 0 and lucky["looks"]["wealth"] < 20
    answer, reasons = verdict(lucky, GATE)
    assert answer == challenger_gate.KEEP and reasons[0].startswith(
        "judgement 1 against this champion: bets on the days"
    )


def test_many_slices_do_not_block_by_chance() -> None:
    given = rows(n=8000, skill=(1.0, 1.4))
    slices = {"cell": np.random.default_rng(0).integers(0, 50, 8000).astype(str)}
    gate = dataclasses.replace(GATE, max_slice_loss=0.0, min_slice_rows=20)
    found = evidence(dataclasses.replace(given, slices=slices), LOSSES["binary"], gate)
    alone = [part for part in found["slices"] if part["high"] is not None and part["high"] < 0]
    chances = sorted(part["chance"] for part in found["slices"] if part.get("chance") is not None)
    expected = max((len(chances) - place) * chance for place, chance in enumerate(chances[:3]))
    assert max(sorted(part["adjusted"] for part in found["slices"] if "adjusted" in part)[:3]) == pytest.approx(
        min(expected, 1.0)
    )
    assert not any(reason.startswith("slice") for reason in verdict(found, gate)[1]), alone


def test_the_same_rows_give_the_same_evidence() -> None:
    assert evidence(rows(), LOSSES["binary"], GATE) == evidence(rows(), LOSSES["binary"], GATE)


def test_the_resamples_are_poisson_counts_that_repeat() -> None:
    counts = poisson_counts(365, 400, seed=3)
    assert np.array_equal(poisson_counts(365, 400, seed=3), counts)
    assert not np.array_equal(poisson_counts(365, 400, seed=4), counts)
    shares = np.bincount(counts.ravel().astype(int), minlength=8)[:5] / counts.size
    np.testing.assert_allclose(shares, np.exp(-1) / np.array([1, 1, 2, 6, 24]), atol=3e-3)


def test_chance_is_that_of_the_rows_where_a_metric_has_no_chance_of_its_own() -> None:
    """Average precision of a score without information is the share of positives, here nine of ten."""
    rng = np.random.default_rng(1)
    target = (rng.random(6_000) < 0.9).astype(float)
    days = np.arange(6_000) // 300
    champion, challenger = (
        np.float32(1 / (1 + np.exp(-(skill * (target - 0.5) + rng.normal(size=6_000))))) for skill in (0.3, 0.6)
    )
    gate = dataclasses.replace(GATE, metric="average_precision", min_gain=None)
    metric = evidence(Judged(target, champion, challenger, {}, days, days), LOSSES["binary"], gate)["metric"]
    assert metric["least_gain"] == pytest.approx(0.01 * (metric["champion"] - target.mean()), rel=1e-6)
    assert metric["least_gain"] < 0.002
