"""Bets on the days of several judgements: by hand, and as often wrong as they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engine.lifecycle.decide import looks_of
from engine.lifecycle.looks import STAKES, Looks, fewest_days
from engine.runtime.registry import State

PART = 6 / np.pi**2


def plainly(looks: list[list[float]]) -> float:
    """The wealth after looks, each a list of daily gains: a number for the part begun at each look, under each stake."""
    total = 0.0
    for stake in STAKES:
        begun: list[float] = []
        seen: list[float] = []
        for number, gains in enumerate(looks, 1):
            begun.append(PART / number**2 / len(STAKES))
            for gain in gains:
                bet = stake / np.sqrt(np.mean(np.square(seen))) if seen else 0.0
                begun = [wealth * max(1 + bet * gain, 0.0) for wealth in begun]
                seen.append(gain)
        total += sum(begun)
    return total


def after(looks: list[list[float]]) -> Looks:
    state, day = Looks(), 0
    for gains in looks:
        state = Looks.of(state.after(np.arange(day, day + len(gains)), np.array(gains)).plain())  # as it is stored
        day += len(gains)
    return state


def test_the_wealth_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    looks = [rng.normal(0.3, 1, days).tolist() for days in (14, 0, 5, 20)]
    assert after(looks).wealth == pytest.approx(plainly(looks), rel=1e-12)
    assert (after(looks).number, after(looks).days, after(looks).until) == (4, 39, 38)


def test_a_day_is_bet_on_once() -> None:
    days, gains = np.arange(10), np.linspace(0.5, 1, 10)
    once = Looks().after(days, gains)
    again = once.after(days[5:], gains[5:])
    assert again.wealth == pytest.approx(once.wealth + PART / 4) and again.days == 10


def test_looks_go_on_from_the_last_one_at_this_champion() -> None:
    def move(action: str, to: str | None, champion: str = "", number: int = 0) -> dict[str, Any]:
        record = {"champion": champion, "evidence": {"looks": Looks(number).plain()}}
        return {
            "action": action,
            "to": to,
            "decision": {"kind": "end", "id": f"{number}", "record": record} if number else None,
        }

    moves = [
        move("promote", "a"),
        move("note", None, "a", 1),
        move("promote", "b", "a", 2),
        move("note", None, "b", 3),
        move("rollback", "a"),
    ]
    state = cast(State, SimpleNamespace(moves=moves))
    assert [looks_of(state, name, but="").number for name in ("a", "b", "c")] == [2, 3, 0]
    assert looks_of(state, "a", but="2").number == 1


def test_the_unit_of_the_metric_does_not_matter() -> None:
    gains = np.random.default_rng(1).normal(0.3, 1, 30)
    days = np.arange(30)
    assert Looks().after(days, gains * 1e-30).wealth == pytest.approx(Looks().after(days, gains).wealth, rel=1e-9)


@pytest.mark.parametrize("skewed", [False, True])
def test_chance_is_promoted_at_most_as_often_as_promised_over_many_looks(skewed: bool) -> None:
    """Twelve looks of 14 days at challengers that are no better: 5 % of champions, where a test of each look would lose 46 %."""
    rng = np.random.default_rng(2)
    lost = 0
    for _ in range(400):
        gains = rng.exponential(1, (12, 14)) - 1 if skewed else rng.normal(size=(12, 14))
        state = Looks()
        for number, look in enumerate(gains):
            state = state.after(np.arange(14) + 14 * number, look)
            if state.wealth >= 20:
                lost += 1
                break
    assert lost / 400 <= 0.05


def test_a_challenger_that_gains_is_seen() -> None:
    rng = np.random.default_rng(3)
    found = sum(Looks().after(np.arange(56), rng.normal(0.6, 1, 56)).wealth >= 20 for _ in range(100))
    assert found >= 80


def test_fewest_days_are_what_the_same_gain_every_day_takes() -> None:
    wealths = [Looks().after(np.arange(days), np.full(days, 0.01)).wealth for days in (10, 11)]
    assert wealths[0] < 20 <= wealths[1] and fewest_days(20) == 11
