"""Keys of `registry`, `retrain` and `backtest`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import names
from engine.config.schema import key, section
from engine.config.units import Span


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """What the history records of a manual change of the champion."""

    who: str | None = key(None, "who makes the change; null = the user of this process")
    why: str = key("by hand", "reason for the change")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a challenger may replace the champion, judged on rows that neither was trained on."""

    metric: str | None = key(None, "metric to beat; null = the metric that training watches")
    bootstrap: int = key(400, "paired resamples of the judged blocks (evaluate.block: days)", ge=20)
    confidence: float = key(
        0.9,
        "two-sided coverage of the intervals of the differences",
        gt=0.5,
        lt=1,
    )
    min_gain: float | None = key(
        None,
        "the interval of the metric's gain must be above this; null = 1 % of what the champion is better than chance, "
        "which another seed alone may gain",
        ge=0,
    )
    cost_false_negative: float = key(5.0, "business cost of a positive that was not acted on", ge=0)
    cost_false_positive: float = key(1.0, "business cost of acting on a negative", ge=0)
    max_cost_rise: float = key(0.0, "largest rise of the business cost, as a share of the champion's", ge=0)
    max_slice_loss: float = key(0.02, "largest loss of the metric in a slice, where it is beyond chance", ge=0)
    min_slice_rows: int = key(500, "fewest judged rows of a slice that is checked", ge=2)
    max_ece_rise: float = key(0.02, "largest rise of the calibration error", ge=0)
    min_rows: int = key(1000, "fewest judged rows for a promotion", ge=2)


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """When a challenger is trained, on what, and how it is judged."""

    now: str | None = key(None, "instant of the decision; null = end of the newest monitored window")
    monitor: str | None = key(None, "monitoring run to decide on; null = the newest of this name")
    replay: str | None = key(
        None, "decision.json to decide again from its own evidence; nothing is trained or promoted"
    )
    triggers: tuple[str, ...] = key(
        ("drift", "performance", "age"),
        "what starts a retrain",
        choices=("always", "drift", "performance", "age", "volume"),
    )
    drift_windows: int = key(1, "windows in a row that must be in alarm", ge=1)
    performance_drop: float = key(
        0.01, "largest loss of the watched metric against the champion's own judged or tested figure", ge=0
    )
    max_age: Span = key(Span("100d"), "age of the champion's newest training row that starts a retrain")
    min_new_rows: int = key(10_000, "new labelled rows since the champion that start a retrain", ge=1)
    cool_down: Span = key(Span("45d"), "no retrain starts within this time after the last one")
    budget: int | None = key(None, "most retrains that may start within budget_period; null = any number", ge=1)
    budget_period: Span = key(Span("365d"), "period of the budget")
    window: str = key("expanding", "rows that a challenger is trained on", choices=("expanding", "sliding"))
    window_length: Span = key(Span("90d"), "length of a sliding window")
    valid_length: Span = key(Span("7d"), "newest part of the window, for early stopping; 0d = none")
    judge_length: Span = key(Span("14d"), "latest mature rows, which neither model was trained on, for the judgement")
    maturity: Span | None = key(
        None,
        "age at which a row's label is expected; null = the age by which 95 % of labels have arrived",
    )
    start: str = key("scratch", "initial weights", choices=("scratch", "champion"))
    resume: str = key("auto", "continue an unfinished run of the same plan", choices=("auto", "never"))
    gate: GateConfig = section(GateConfig, "when the challenger is promoted")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """One retraining policy in a backtest, as differences from `retrain`."""

    triggers: tuple[str, ...] = key(
        (), "what starts a retrain; empty = nothing", choices=("always", "drift", "performance", "age", "volume")
    )
    window: str | None = key(None, "null = as retrain.window", choices=("expanding", "sliding"))
    window_length: Span | None = key(None, "null = as retrain.window_length")
    cool_down: Span | None = key(None, "null = as retrain.cool_down")
    budget: int | None = key(None, "null = as retrain.budget", ge=1)
    drift_windows: int | None = key(None, "null = as retrain.drift_windows", ge=1)
    performance_drop: float | None = key(None, "null = as retrain.performance_drop", ge=0)


def default_policies() -> dict[str, PolicyConfig]:
    """The four policies that every backtest compares. A champion may become too old without any alarm."""
    return {
        "never": PolicyConfig(),
        "every": PolicyConfig(triggers=("always",), cool_down=Span("0s")),
        "drift": PolicyConfig(triggers=("drift", "age")),
        "performance": PolicyConfig(triggers=("performance", "age")),
    }


@dataclass(frozen=True, kw_only=True)
class BacktestConfig:
    """A replay of the past, period by period, with what was known then."""

    start: str | None = key(
        None, "first day that is scored; the first model is trained on the rows before; null = split.valid's"
    )
    stop: str | None = key(None, "end of the last period, excluded; null = the last event")
    period: str = key("month", "length of a period: month, or a span like 7d")
    policies: dict[str, PolicyConfig] = key(
        factory=default_policies,
        parse=names.folder,
        help="policies by name; only the given ones run, and one with the name of a default changes that default",
    )
    confidence: float = key(0.95, "coverage of the intervals in the report", gt=0, lt=1)
    resume: str = key("auto", "continue an unfinished run of the same plan", choices=("auto", "never"))

    def __post_init__(self) -> None:
        if self.period != "month":
            Span(self.period)
