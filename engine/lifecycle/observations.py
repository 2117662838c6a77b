"""Reads monitoring records for the rules of retraining."""

from __future__ import annotations

from pathlib import Path

from engine.config import units
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.challenger_gate import judged_metric
from engine.lifecycle.retrain_rules import Observation
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.performance import ALARM, QUIET, UNJUDGED
from engine.runtime import records as reader
from engine.runtime.run import as_written
from engine.training.losses import loss_of

JUDGED = (QUIET, ALARM, UNJUDGED)  # statuses of windows whose labels are known


def records(config: Config) -> list[Path]:
    """drift.json of every finished monitoring run of this name, oldest first."""
    folder = Path(config.paths.runs) / "monitor" / config.name
    return sorted(
        done.parent / "drift.json" for done in folder.glob("*-*/DONE") if (done.parent / "drift.json").exists()
    )


def newest_record(config: Config) -> Path | None:
    """The record that retrain decides on: the run that retrain.monitor names, or the newest. Raises UserError."""
    if config.retrain.monitor is not None:
        path = Path(config.retrain.monitor) / "drift.json"
        if not path.exists():
            raise UserError(f"retrain.monitor must name a monitoring run, found no {path}")
        return path
    found = records(config)
    return found[-1] if found else None


def read_observations(config: Config) -> tuple[Observation, ...]:
    """The windows monitored up to the record that retrain decides on, each by its newest record, in time order."""
    newest = newest_record(config)
    if newest is None:
        return ()
    paths = [path for path in records(config) if path.parent.name <= newest.parent.name]
    metric = judged_metric(loss_of(config.train), config.retrain.gate)
    found = {}
    for path in dict.fromkeys([*paths, newest]):
        item = observation(read_record(path), metric, config.data.time_zone)
        found[item.start, item.stop, item.model] = item
    return tuple(sorted(found.values(), key=lambda item: (item.stop, item.start)))


def read_record(path: Path) -> DriftRecord:
    """A drift.json, checked against its seal. Raises UserError, because the decision depends on it."""
    return reader.read(as_written(path.parent, path.name, refuse=True), DriftRecord)


def observation(record: DriftRecord, metric: str, time_zone: str) -> Observation:
    """One monitored window from its drift.json. Raises UserError for an invalid window."""
    start, stop = units.between(record["window"], time_zone)
    kinds = {item["kind"] for item in (*record["alarms"], *record["noted"])}
    performance = record["performance"]
    measured = performance.get("metrics", {})
    status = performance.get("status", "")
    return Observation(
        start=start,
        stop=stop,
        model=record["model"],
        # Drift counts whether or not monitor.alarm_on names it.
        alarm=None
        if all(item["status"] == "not computable" for item in record["columns"])
        else bool(kinds & {"drift", "continued", "distance"}),
        causes=tuple(record["causes"]),
        metric=measured[metric]["value"] if metric in measured else None,
        metric_name=metric,
        quality=status if status in JUDGED else "",
        quality_text=performance.get("reason", ""),
    )
