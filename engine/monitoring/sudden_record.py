"""What the rule `sudden` says of a window: whether it decides, what it found, its rate so far, and the incidents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.config.sections.monitoring import MonitorConfig, local_day
from engine.monitoring.alarm_lines import CalibrationPlan, windows_needed
from engine.monitoring.rates import wilson
from engine.monitoring.reference import Reference, day_text
from engine.monitoring.sudden_change import ANCHOR, Course, DailyCounts, Incident, follow

YEAR = 365
DISTANCE, SUDDEN = "distance", "sudden"
NAMED = 5  # columns of an incident


def rule_of(settings: MonitorConfig, reference: Reference, alpha: float) -> tuple[str, str]:
    """(rule, why) that decides a drift alarm, before the window's days are known."""
    if settings.rule != "auto":
        return settings.rule, f"monitor.rule={settings.rule}"
    span, needed = int(reference.covered.sum()), windows_needed(alpha)
    if span < YEAR:
        return SUDDEN, f"the reference has {span} days, so season and drift cannot be told apart"
    if span < needed:
        return SUDDEN, f"the reference has {span} days, fewer than {needed}"
    return DISTANCE, f"the reference has {span} days, which span a year and are at least {needed}"


def look_at(settings: MonitorConfig, plan: CalibrationPlan, daily: DailyCounts, window: np.ndarray) -> dict[str, Any]:
    """The record of `sudden`: `window` are the local days of the monitored window, the last days of `daily`.

    A window of several days has its alpha shared by them.
    """
    holidays, known = ([local_day(day, "") for day in days] for days in (settings.holidays, settings.acknowledge))
    level = plan.alpha / plan.length
    return record_of(follow(daily, level, holidays, known), level, window)


def record_of(course: Course, level: float, window: np.ndarray) -> dict[str, Any]:
    """The record of a course."""
    inside = np.isin(course.days, window)
    judged, opened = course.judged, course.opened
    looks, alarms = int(judged.sum()), int(opened.sum())
    needed = math.ceil(2 / level)
    enough = looks >= needed
    first = [item for item in course.incidents if item.opened in window]
    going = [
        item for item in course.incidents if item.opened < window[0] and any(day in window for day in item.flagged)
    ]
    words = f"target {level:.2%} a day; "
    words += (
        f"realised {alarms} of {looks} days, looking forward only ({alarms / looks:.1%}); "
        if looks
        else "no day judged; "
    )
    words += f"{looks} separate days, " + (
        "enough" if enough else f"fewer than {needed}: {level:.2%} cannot be promised"
    )
    return {
        "judged": bool((judged & inside).any()),
        "alpha_a_day": level,
        "days": [_day(course, at) for at in np.flatnonzero(inside).tolist()],
        "looks": looks,
        "alarms": alarms,
        "realised": alarms / looks if looks else None,
        "realised_interval": list(wilson(alarms, looks)) if looks else None,
        "days_needed": needed,
        "enough": enough,
        "opened": [day_text(item.opened) for item in first],
        "continued": [day_text(item.opened) for item in going],
        "columns": list(dict.fromkeys(name for item in (*first, *going) for name in item.columns)),
        "incidents": [_incident(item) for item in course.incidents],
        "anchor_days": ANCHOR,
        "words": words,
    }


def _day(course: Course, at: int) -> dict[str, Any]:
    scores, lines = (values[:, at].tolist() for values in (course.scores, course.lines))
    return {
        "day": day_text(int(course.days[at])),
        "scores": dict(zip(("day", "week"), scores, strict=True)),
        "lines": dict(zip(("day", "week"), lines, strict=True)),
        "flagged": bool(course.flagged[at]),
    }


def _incident(item: Incident) -> dict[str, Any]:
    return {
        "opened": day_text(item.opened),
        "closed": day_text(item.closed) if item.closed is not None else None,
        "end": item.end,
        "flagged_days": len(item.flagged),
        "columns": item.columns[:NAMED],
        "more_columns": max(len(item.columns) - NAMED, 0),
    }


def incident_text(item: dict[str, Any]) -> str:
    """One line for a person."""
    names = ", ".join(item["columns"]) + (f" and {item['more_columns']} more" if item["more_columns"] else "")
    days = f"{item['flagged_days']} day" + "s" * (item["flagged_days"] != 1)
    end = "open" if item["closed"] is None else f"{item['end']} on {item['closed']}"
    return f"{item['opened']}: {names} ({days} beyond the line; {end})"
