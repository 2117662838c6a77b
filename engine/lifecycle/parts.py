"""Retraining of a table without time: on the parts of split.by=hash, of which the test rows are judged.

A row's part never changes, also when rows are added: no model of this split was trained on the rows that are judged. Each look at
a challenger judges the same rows, so that each has a stake of its own (engine/lifecycle/looks.py).
"""

from __future__ import annotations

from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.challenger import History, Periods, labelled_rows
from engine.runtime.registry import Version


def parts_of(config: Config, now: int) -> Periods:
    """The parts of the config, in places, for a decision at `now`. Raises UserError where there are none."""
    if config.retrain.window != "expanding":
        raise UserError(
            f"retrain.window={config.retrain.window} is a time, which the rows of these data do not have: leave it out"
        )
    found = config.periods if config.split.by == "hash" and not config.split.turn.fraction else {}
    if not {"split.train", "split.test"} <= set(found):
        raise UserError(
            "retrain of data without an event time needs split.by=hash with train and test, for both models are judged on the "
            f"test rows, found split.by={config.split.by}, turn={config.split.turn}, train={list(config.split.train)}, "
            f"test={list(config.split.test)}"
        )
    return Periods(*found["split.train"], *found["split.test"], now)


def new_rows(history: History, version: Version, now: int) -> int:
    """How many more labelled rows there are to train on than the champion had.

    Raises UserError where the champion was trained on other parts, so that it may have seen the rows that are judged.
    """
    config = history.config
    split, other = config.split, version.facts["split"]
    parts_of(config, now)
    asked = (split.by, split.train, split.valid)
    if asked != (other.get("by", "time"), *(tuple(other.get(name) or ()) for name in ("train", "valid"))):
        raise UserError(
            f"the champion must have been trained on the parts of this config (split.train={list(split.train)}, "
            f"split.valid={list(split.valid)}), found {other}: it may have seen the rows that are judged. Train with this split, "
            "and promote that model by hand"
        )
    parts = [config.periods[f"split.{name}"] for name in ("train", "valid") if getattr(split, name)]
    there = sum(len(labelled_rows(history, *part, now)) for part in parts)
    return max(there - int(version.facts.get("seen_rows", 0)), 0)


def lacking(history: History, least: int, periods: Periods) -> str | None:
    """The reason why a challenger cannot be judged, or None."""
    judged = len(labelled_rows(history, periods.judge, periods.stop, periods.now))
    return f"only {judged:,} test rows have a label, retrain.gate.min_rows={least:,}" if judged < least else None
