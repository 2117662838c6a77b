"""Run directories made by hand: what a step would have left, without the step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

CONFIG = {
    "name": "shop",
    "data": {"name": "shop", "path": "."},
    "model": {"hidden": [16, 16]},
    "train": {"lr": 0.01, "seed": 0},
    "paths": {"store": "store", "runs": "runs"},
    "tracking": {"kind": "off"},
}
ENVIRONMENT = {"python": "3.11.7", "packages": {"torch": "2.13"}, "hardware": {"cpu": "x"}, "threads": {}}


def sha(letter: str) -> str:
    return letter * 64


def make_run(folder: Path, name: str, command: str = "train", /, **changes: Any) -> Path:
    """`folder/runs/<command>/shop/<name>/` of a finished run; keyword arguments are laid over its record."""
    directory = folder / "runs" / command / "shop" / name
    directory.mkdir(parents=True)
    metrics = changes.pop(
        "metrics", {"test/roc_auc": 0.75, "test/roc_auc_low": 0.7, "test/roc_auc_high": 0.8, "train/seconds": 9.0}
    )
    history = changes.pop(
        "history", [{"step": 1, "time": 1, "train/loss": 0.7}, {"step": 2, "time": 2, "train/loss": 0.6}]
    )
    record = {
        "format": 1,
        "command": command,
        "name": "shop",
        "folder": str(folder),
        "config": copy.deepcopy(CONFIG),
        "code": {"engine_version": "0.1.0", "engine_digest": sha("e"), "engine_git": None, "user_git": None},
        "environment": ENVIRONMENT,
        "inputs": {},
        "outputs": {},
        "chain": {},
        "status": "done",
        "started": f"2026-01-01T00:00:{len(list(folder.glob('runs/*/*/*'))):02d}",
        "seconds": 10.0,
        "pid": 2**22 - 1,
        **changes,
    }
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "metrics.json").write_text(json.dumps(metrics))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (directory / "DONE").touch()
    return directory


def config(**dotted: Any) -> dict[str, Any]:
    """The config with some keys changed: `config(train__lr=0.1)`."""
    made = copy.deepcopy(CONFIG)
    for name, value in dotted.items():
        section, _, key = name.partition("__")
        made[section][key] = value  # type: ignore[index]
    return made
