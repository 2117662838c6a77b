"""When to retrain: pure rules over what monitoring has seen. No clock, no files: the same record gives the same answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from engine.config import units
from engine.config.tree import RetrainConfig
from engine.training.evaluate import HIGHER_IS_BETTER


@dataclass(frozen=True)
class Observation:
    """One monitored window. Instants in microseconds UTC; None is what could not be computed."""

    start: int
    stop: int
    model: str | None = None  # digest of the model whose reference was used
    alarm: bool | None = None
    causes: tuple[str, ...] = ()
    metric: float | None = None  # of the rows whose labels were known
    metric_name: str = ""
    quality: str = ""  # what monitoring made of labelled rows: quiet, alarm, cannot be judged; empty: too few labels
    quality_text: str = ""  # its words


@dataclass(frozen=True)
class Champion:
    """What the rules must know of the model that serves."""

    digest: str
    seen_until: int  # end of the newest row that training or early stopping looked at
    metric: float | None  # the watched metric on rows that it did not see, when it was promoted


@dataclass(frozen=True)
class Facts:
    """All that a decision to retrain depends on, as it was known at `now`."""

    now: int
    champion: Champion
    observations: tuple[Observation, ...]  # by time
    starts: tuple[int, ...]  # when retrains began
    new_rows: int  # labelled and mature rows that the champion has not seen

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Facts:
        """The inverse of `plain`."""
        observations = tuple(
            Observation(**{**item, "causes": tuple(item["causes"])}) for item in values["observations"]
        )
        return cls(
            values["now"], Champion(**values["champion"]), observations, tuple(values["starts"]), values["new_rows"]
        )


@dataclass(frozen=True)
class Trigger:
    """Whether a retrain starts, and why or why not."""

    start: bool
    fired: tuple[str, ...]
    reason: str


def trigger(facts: Facts, policy: RetrainConfig) -> Trigger:
    """Ask every configured rule, then cool-down and budget."""
    answers = {name: RULES[name](facts, policy) for name in policy.triggers}
    fired = tuple(name for name, (fires, _) in answers.items() if fires)
    said = "; ".join(f"{name}: {reason}" for name, (fires, reason) in answers.items() if fires or not fired)
    if not fired:
        return Trigger(False, (), said or "the policy has no trigger")
    held = _held(facts, policy)
    return Trigger(held is None, fired, said if held is None else f"{said}; but no retrain: {held}")


def _held(facts: Facts, policy: RetrainConfig) -> str | None:
    if facts.starts:
        since = facts.now - max(facts.starts)
        if since < units.span(policy.cool_down):
            return f"the last one began {_days(since)} ago, within retrain.cool_down={policy.cool_down}"
    if policy.budget is not None:
        recent = sum(facts.now - start < units.span(policy.budget_period) for start in facts.starts)
        if recent >= policy.budget:
            return f"{recent} began within {policy.budget_period}, retrain.budget={policy.budget}"
    if facts.new_rows < 1:
        return "no labelled row is new since the champion was trained"
    return None


def _own(facts: Facts) -> list[Observation]:
    """Finished windows that were compared with the present champion, by time."""
    mine = [item for item in facts.observations if item.model in (None, facts.champion.digest)]
    return sorted((item for item in mine if item.stop <= facts.now), key=lambda item: item.stop)


def _drift(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    windows = _own(facts)
    newest = windows[-policy.drift_windows :]
    run = 0
    for item in reversed(windows):
        if not item.alarm:
            break
        run += 1
    if len(newest) == policy.drift_windows and all(item.alarm for item in newest):
        causes = "; ".join(newest[-1].causes[:3])
        return True, f"alarm in {run} windows in a row, {policy.drift_windows} are enough ({causes})"
    if windows and windows[-1].alarm is None:
        return False, "drift of the newest window could not be computed"
    return False, f"alarm in {run} of the {policy.drift_windows} windows in a row that are needed"


def _performance(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    measured = [item for item in _own(facts) if item.metric is not None or item.quality]
    nothing = "no window with labels, or no figure of the champion, to compare"
    if not measured:
        return False, nothing
    newest = measured[-1]
    if newest.metric is None:  # an older figure says nothing of it
        text = f"{newest.metric_name} of the newest window with labels is not computable; {newest.quality_text}"
        return newest.quality == "alarm", f"{text}: {newest.quality}"
    if facts.champion.metric is None:
        return False, nothing
    sign = 1.0 if HIGHER_IS_BETTER.get(newest.metric_name, True) else -1.0
    drop = sign * (facts.champion.metric - newest.metric)
    text = f"{newest.metric_name} {newest.metric:.4f} against {facts.champion.metric:.4f} when it was promoted"
    return drop > policy.performance_drop, f"{text}, {policy.performance_drop:g} less is too much"


def _age(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    age = facts.now - facts.champion.seen_until
    return age > units.span(
        policy.max_age
    ), f"the champion's newest row is {_days(age)} old, {policy.max_age} is the limit"


def _volume(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    return (
        facts.new_rows >= policy.min_new_rows,
        f"{facts.new_rows:,} new labelled rows, {policy.min_new_rows:,} are enough",
    )


def _days(length: int) -> str:
    return f"{length / units.MICROSECONDS['d']:.1f} days"


RULES: dict[str, Callable[[Facts, RetrainConfig], tuple[bool, str]]] = {
    "always": lambda _facts, _policy: (True, "every time"),
    "drift": _drift,
    "performance": _performance,
    "age": _age,
    "volume": _volume,
}
