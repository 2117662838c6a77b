"""Keys of `monitor`: what is compared, when an alarm is raised, business metrics, alerts."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

from engine.config.schema import key, later_key
from engine.config.units import Share, Span
from engine.errors import UserError, nearest

DRIFT_STATISTICS = ("psi", "ks", "wasserstein", "missing", "outside", "unseen", "volume")


def local_day(text: str, where: str) -> int:
    """Days since 1970-01-01 of an ISO date. Raises UserError."""
    try:
        return (datetime.date.fromisoformat(text) - datetime.date(1970, 1, 1)).days
    except ValueError:
        raise UserError(f"{where} must hold days like 2024-12-25, found {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class BusinessConfig:
    """A user-defined number over scored rows, monitored like any metric."""

    SHORTHAND = "expression"
    expression: str = key(
        help="SQL over `score`, `label` and columns that ends in one number: sum(fare * label) / count(*) (docs/monitoring.md)"
    )
    better: str = key("lower", "which direction is better", choices=("lower", "higher"))


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """Where an alarm is sent."""

    SHORTHAND = "kind"
    kind: str = key("log", "how", choices=("log", "file", "command", "webhook"))
    to: str = key("", "file to append to, command to start (with the path of drift.json), or URL to post to (a secret)")
    timeout: Span = key(Span("10s"), "longest total time of a command, or of one attempt at a web service")
    tries: int = key(3, "attempts at a web service", ge=1)

    def __post_init__(self) -> None:
        if self.kind != "log" and not self.to:
            raise UserError(f"to must say where a {self.kind} alert is sent, but it is empty")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is compared with the reference, and when an alarm is raised."""

    model: str = key("", "run directory or name@alias whose reference is used")
    window: str | tuple[str, ...] = key("", "a month 2020-04, a day 2020-04-07, or [from, to]")
    run: str = key("", "scoring run whose stored profile is compared, instead of a window of the dataset")
    alpha: float = key(0.01, "false-alarm rate over all columns together, per window", gt=0, lt=1)
    alarm_on: tuple[str, ...] = key(
        ("drift", "performance"),
        "what raises an alarm",
        choices=("drift", "performance", "business", "estimated", "labels"),
    )
    rule: str = later_key(
        "auto",
        "what decides a drift alarm. sudden: each day against the days before it; distance: the window against the reference; "
        "auto: distance where the reference spans a year and has 2/alpha days, else sudden",
        choices=("auto", "sudden", "distance"),
    )
    holidays: tuple[str, ...] = later_key(
        (), "local days (2024-12-25) with a course of their own, for the rule `sudden`"
    )
    acknowledge: tuple[str, ...] = later_key(
        (), "local days from which a known change is the usual, so that it alarms no longer, for the rule `sudden`"
    )
    rising: str = key(
        "leave_out",
        "columns that always change with time (counts that grow with the data's age, a month, a row number)",
        choices=("leave_out", "judge"),
    )
    season: str = key("none", "weekday: compare with days of the same weekdays", choices=("none", "weekday"))
    floors: dict[str, float] = key(
        factory=dict,
        help="effect floors (smallest changes worth an alarm) by statistic: " + ", ".join(DRIFT_STATISTICS),
    )
    thresholds: dict[str, float] = key(
        factory=dict, help="manual lines: column or column.statistic -> value; the default statistic is psi"
    )
    psi_floor: float = key(1e-4, "smallest share of a bin in PSI", gt=0, lt=1)
    resamples: int = key(300, "windows resampled from blocks of days where real windows are too few", ge=50)
    block: int = key(7, "consecutive days in a block of such a window", ge=1)
    seed: int = key(0, "seed of the resampling", ge=0)
    labels: bool = key(True, "measure performance on rows whose label is known")
    min_labelled: Share = key(Share("50%"), "share of labels that must be known to judge performance")
    recent: Span = key(
        Span("28d"),
        "labelled days before the window that say what a score means, for estimates; 0d = the reference alone",
    )
    performance_floor: float = key(0.1, "smallest relative loss of quality worth an alarm", ge=0)
    multivariate: bool = key(True, "PCA reconstruction error and domain classifier, where rows are available")
    business: dict[str, BusinessConfig] = key(factory=dict, help="user-defined numbers by name")
    alerts: dict[str, AlertConfig] = key(factory=dict, help="where alarms are sent, by name")
    cooldown: Span = key(Span("1d"), "time in which the same cause is not sent again")

    def __post_init__(self) -> None:
        for kind, days in (("holidays", self.holidays), ("acknowledge", self.acknowledge)):
            for day in days:
                local_day(day, kind)
        for name, value in self.floors.items():
            if name not in DRIFT_STATISTICS:
                raise UserError(f"floors names {name!r}.{nearest(name, DRIFT_STATISTICS)}")
            if value < 0:
                raise UserError(f"floors.{name} must not be negative, found {value}")
        for kind, numbers in (("floors", self.floors), ("thresholds", self.thresholds)):
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise UserError(f"{kind}.{name} must be a finite number, found {value}")
