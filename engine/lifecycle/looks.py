"""What the looks at challengers of one champion have shown together: a bet on each judged day.

Every judgement is another chance to promote by luck. Someone who stakes 1 and bets, day by day, that challengers gain, is not
expected to gain while they do not, so the stake reaches 20 times its size with a probability of at most 1 in 20, whenever one
looks (Ville's inequality; Waudby-Smith & Ramdas: Estimating means of bounded random variables by betting, JRSS B 2024). Part of
the stake, 6 / (pi k)^2, is kept for the k-th look: evidence against one challenger does not use up that of the next.
Nobody knows the largest loss beforehand, so a bet loses no more than its wealth. That favours the challenger where rare large
losses offset many small gains. Of 12 looks of 14 days at challengers that are no better, chance wins 2 % of champions with
normal gains, 5 % with exponential losses, but 61 % where one day in 20 loses what the others gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.runtime.records import Count, Within

STAKES = (0.1, 0.3, 0.6)  # of the wealth for a gain of the root mean square of earlier days; a third of the stake each


Part = Annotated[float, Within(0)]


class LooksRecord(TypedDict):
    """`Looks` in decision.json, and in the registry's history."""

    number: Count
    parts: tuple[Part, Part, Part]
    days: Count
    squares: Annotated[float, Within(0)]
    until: int | None
    wealth: NotRequired[float]


@dataclass(frozen=True)
class Looks:
    """The state of the bets: looks so far, what the parts of the stake in use have become under each of STAKES, days seen with
    the sum of squares of their gains, and the last of them (local, since 1970-01-01).
    """

    number: int = 0
    parts: tuple[float, ...] = (0.0,) * len(STAKES)
    days: int = 0
    squares: float = 0.0
    until: int | None = None

    @property
    def wealth(self) -> float:
        """What the whole stake has become, without the part that is kept for later looks."""
        return math.fsum(self.parts)

    def after(self, days: NDArray[Any], gains: NDArray[Any]) -> Looks:
        """The state after one more look; days int[n] ascending and the gain of each. A day that an earlier look has bet on is
        left out.
        """
        number = self.number + 1
        begun = 6 / (math.pi * number) ** 2 / len(STAKES)
        parts, seen, squares, until = [part + begun for part in self.parts], self.days, self.squares, self.until
        for day, gain in zip(days.tolist(), gains.tolist(), strict=True):
            if until is not None and day <= until:
                continue
            if seen and squares:  # the size of a bet is known before its day
                size = gain / math.sqrt(squares / seen)
                parts = [part * max(1 + stake * size, 0.0) for part, stake in zip(parts, STAKES, strict=True)]
            seen, squares, until = seen + 1, squares + gain * gain, day
        return Looks(number, tuple(parts), seen, squares, until)

    def plain(self) -> LooksRecord:
        """As in a record."""
        one, two, three = self.parts
        return {
            "number": self.number,
            "parts": [one, two, three],  # type: ignore[typeddict-item] # as JSON gives it back
            "days": self.days,
            "squares": self.squares,
            "until": self.until,
            "wealth": self.wealth,
        }

    @classmethod
    def of(cls, saved: LooksRecord | None) -> Looks:
        """From `plain`; the start without it."""
        if not saved:
            return cls()
        return cls(saved["number"], tuple(saved["parts"]), saved["days"], saved["squares"], saved["until"])


def fewest_days(wanted: float) -> int:
    """Days with the same gain after which the bets of a first look have paid `wanted` times the stake."""
    days = 1
    while Looks().after(np.arange(days), np.ones(days)).wealth < wanted:
        days += 1
    return days
