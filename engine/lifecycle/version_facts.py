"""The registry's facts of a training run: where it is, what it has seen, its metrics."""

from __future__ import annotations

from pathlib import Path

from engine.config import schema, units
from engine.config.nested import Tree
from engine.config.sections.data import PLACE
from engine.config.sections.training import SplitConfig
from engine.runtime.registry import VersionFacts
from engine.runtime.run import load_metrics, load_record
from engine.training.evaluate import watched_metric
from engine.training.losses import recorded_loss


def version_facts(run: Path) -> VersionFacts:
    """The registry's record of a training run: directory, periods, metrics."""
    record = load_record(run, refuse=True)
    split, zone = record["config"]["split"], record["config"]["data"]["time_zone"]
    loss = recorded_loss(record["config"]["train"])
    metric = watched_metric(loss, record["config"]["train"]["metric"])
    metrics = load_metrics(run, refuse=True)
    used = record.get("labels") or {}  # older runs read whole periods
    if timed := is_timed(record["config"]["data"]["columns"]):
        ends = [
            units.between(used[name]["used"] if name in used else split[name], zone)[1]
            for name in ("train", "valid")
            if split.get(name)
        ]
    else:
        ends = [units.instant(record["started"], zone)]
    seen = sum(used[name]["rows"] for name in ("train", "valid") if name in used)
    return {
        "source": str(run),
        "seen_until": max(ends),
        **({} if timed else {"seen_rows": seen}),
        "split": split if timed else schema.plain(schema.build(SplitConfig, split)),
        "loss": loss.name,
        "metric": {
            "name": metric,
            "value": next(
                (
                    metrics[f"{part}/{metric}"]
                    for part in ("test", "valid")
                    if metrics.get(f"{part}/{metric}") is not None
                ),
                None,
            ),
        },
        "metrics": {
            name: value
            for name, value in metrics.items()
            if name.startswith(("valid/", "test/")) and name.count("/") == 1
        },
        "train_rows": metrics.get("train/rows"),
    }


def is_timed(columns: Tree) -> bool:
    """Whether the columns of a saved config have an event time."""
    roles = {name: item.get("role") for name, item in columns.items() if isinstance(item, dict)}
    return any(role == "event_time" and name != PLACE for name, role in roles.items())
