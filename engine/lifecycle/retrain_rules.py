"""The rules of when to retrain: pure functions of monitoring records, without clock or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.config import units
from engine.config.nested import Tree
from engine.config.sections.lifecycle import RetrainConfig
from engine.runtime import records
from engine.training.metrics import decimals, find_metric
from engine.training.ripening import RIPE, days


@dataclass(frozen=True)
class Observation:
    """One monitored window. Instants in microseconds UTC; None could not be computed."""

    start: int
    stop: int
    model: str | None = None  # digest of the model whose reference was used
    alarm: bool | None = None
    causes: tuple[str, ...] = ()
    metric: float | None = None  # of the rows whose labels were known
    metric_name: str = ""
    quality: str = ""  # verdict on labelled rows: quiet, alarm, cannot be judged; empty: too few labels
    quality_text: str = ""  # the reason for it


@dataclass(frozen=True)
class Champion:
    """The champion as the rules need it."""

    digest: str
    seen_until: int  # end of the newest row used in training or early stopping
    metric: float | None  # the watched metric on rows that it did not see, when it was promoted


@dataclass(frozen=True)
class Later:
    """Rows after the newest that the champion saw, up to `now`. Instants and lengths in microseconds."""

    horizon: int  # age at which a row's label is expected; a row counts from this age on
    rows: int
    labelled: int  # of these, rows whose label is known already, mature or not
    first: int | None  # event time of the first of them


@dataclass(frozen=True)
class Facts:
    """Everything that a decision to retrain depends on, as known at `now`."""

    now: int
    champion: Champion
    observations: tuple[Observation, ...]  # by time
    starts: tuple[int, ...]  # when retrains began
    new_rows: int  # labelled and mature rows that the champion has not seen
    later: Later | None = None  # the rows that do not count yet; None in records of older engines

    @classmethod
    def from_plain(cls, values: Tree, where: str) -> Facts:
        """The facts from their JSON form. Raises Damaged, naming the place `where` of the values."""
        records.conform(values, cls, where)
        observations = records.filled(Observation, values["observations"], f"{where}: observations")
        champion = records.filled(Champion, [values["champion"]], f"{where}: champion")[0]
        later = records.filled(Later, [values["later"]] if values.get("later") else [], f"{where}: later")
        return cls(values["now"], champion, observations, tuple(values["starts"]), values["new_rows"], *later)


@dataclass(frozen=True)
class Trigger:
    """Whether a retrain starts, with the reasons."""

    start: bool
    fired: tuple[str, ...]
    reason: str


def trigger(facts: Facts, policy: RetrainConfig) -> Trigger:
    """Apply every configured rule, then cool-down and budget."""
    answers = {name: RULES[name](facts, policy) for name in policy.triggers}
    fired = tuple(name for name, (fires, _) in answers.items() if fires)
    said = "; ".join(f"{name}: {reason}" for name, (fires, reason) in answers.items() if fires or not fired)
    if not fired:
        return Trigger(False, (), said or "the policy has no trigger")
    held = _held(facts, policy)
    return Trigger(held is None, fired, said if held is None else f"{said}; but no retrain: {held}")


def _held(facts: Facts, policy: RetrainConfig) -> str | None:
    if facts.starts:
        since, cool_down = facts.now - max(facts.starts), policy.cool_down.microseconds
        if since < cool_down:
            until = units.format_instant(max(facts.starts) + cool_down)
            return f"the last one began {days(since)} ago, within retrain.cool_down={policy.cool_down}, which ends at {until}"
    if policy.budget is not None:
        period = policy.budget_period.microseconds
        recent = sorted(start for start in facts.starts if facts.now - start < period)
        if len(recent) >= policy.budget:
            until = units.format_instant(recent[-policy.budget] + period)
            return (
                f"{len(recent)} began within {policy.budget_period}, retrain.budget={policy.budget}; the next one may begin "
                f"at {until}"
            )
    if facts.new_rows < 1:
        return f"no labelled row is new since the champion was trained{_why_none(facts, policy)}"
    return None


def _why_none(facts: Facts, policy: RetrainConfig) -> str:
    """Why rows after the champion's do not count as new labelled rows, and until when."""
    later, seen = facts.later, units.format_instant(facts.champion.seen_until)
    if later is None:
        return ""
    if facts.now <= facts.champion.seen_until:
        return f": it saw rows until {seen}, and the decision is taken before, at {units.format_instant(facts.now)}"
    if later.first is None:
        return f": it saw rows until {seen}, and the dataset holds none from then to {units.format_instant(facts.now)}"
    found = f": it saw rows until {seen}; of {later.rows:,} rows since then {later.labelled:,} have a label"
    ripe = later.first + later.horizon
    if ripe < facts.now:
        return f"{found}, and none of these is {days(later.horizon)} old, {ripening(policy)}"
    return (
        f"{found}, but a row counts when it is {days(later.horizon)} old, {ripening(policy)}: the first row reaches that age "
        f"at {units.format_instant(ripe)}. A shorter retrain.maturity counts rows earlier"
    )


def ripening(policy: RetrainConfig) -> str:
    """The origin of the age at which a row counts."""
    return RIPE if policy.maturity is None else f"retrain.maturity={policy.maturity}"


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
    if not measured:
        windows = len(_own(facts))
        return False, f"none of {windows} monitored windows of the champion has a figure: too few labels were known"
    newest = measured[-1]
    if newest.metric is None:  # an older figure does not describe it
        text = f"{newest.metric_name} of the newest window with labels is not computable; {newest.quality_text}"
        return newest.quality == "alarm", f"{text}: {newest.quality}"
    if facts.champion.metric is None:
        return False, "the champion has no figure of the watched metric to compare with"
    drop = find_metric(newest.metric_name).sign * (facts.champion.metric - newest.metric)
    text = (
        f"{newest.metric_name} {decimals(newest.metric)} against {decimals(facts.champion.metric)} when it was promoted"
    )
    return drop > policy.performance_drop, f"{text}, {policy.performance_drop:g} less is too much"


def _age(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    age = facts.now - facts.champion.seen_until
    return (
        age > policy.max_age.microseconds,
        f"the champion's newest row is {days(age)} old, {policy.max_age} is the limit",
    )


def _volume(facts: Facts, policy: RetrainConfig) -> tuple[bool, str]:
    said = f"{facts.new_rows:,} new labelled rows, {policy.min_new_rows:,} are enough"
    if facts.later and facts.later.labelled > facts.new_rows:
        unripe = facts.later.labelled - facts.new_rows
        said += f"; {unripe:,} more have a label but are not {days(facts.later.horizon)} old, {ripening(policy)}"
    return facts.new_rows >= policy.min_new_rows, said


RULES: dict[str, Callable[[Facts, RetrainConfig], tuple[bool, str]]] = {
    "always": lambda _facts, _policy: (True, "every time"),
    "drift": _drift,
    "performance": _performance,
    "age": _age,
    "volume": _volume,
}
