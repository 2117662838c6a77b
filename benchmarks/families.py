"""Which family of models is best on the flights, with its defaults and after a search of 20 trials, month by month?

Trained on January to March 2013, stopped and searched on April, measured on each month from May on. Each family is searched with
`engine sweep` (the same budget of trials), and both its defaults and the config that was found are trained with five seeds:
mean and spread of ROC AUC and log loss over seeds, seconds of a training, rows a second. The search never sees May or later.
The TabM is smaller than its defaults (benchmarks/quality.py), with three seeds and no search: one of its trainings takes minutes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import engine
from benchmarks.harness import Row, Settings, show
from benchmarks.quality import BRIEF, FLIGHTS, QUICK, SMALL, Part, parts_of, scores
from engine.runtime.run import load_metrics
from kernels.metrics import log_loss, roc_auc

JSON = Path(__file__).parent / "results/families.json"
TRIALS, SEEDS = 20, 5
TREES = {
    "model.trees.learning_rate": {"log": [0.01, 0.3]},
    "model.trees.row_fraction": {"uniform": [0.5, 1.0]},
    "model.trees.column_fraction": {"uniform": [0.3, 1.0]},
    "model.trees.l2": {"log": [0.01, 10.0]},
}
SPACES: dict[str, dict[str, Any]] = {
    "lightgbm": {**TREES, "model.trees.leaves": {"choice": [7, 15, 31, 63, 127]}},
    "xgboost": {**TREES, "model.trees.depth": {"int": [3, 9]}},
    "mlp": {
        "train.lr": {"log": [5e-4, 1e-2]},
        "train.weight_decay": {"log": [1e-4, 0.3]},
        "model.dropout": {"uniform": [0.0, 0.5]},
        "model.hidden": {"choice": [[128, 128], [256, 256], [256, 256, 256], [512, 256]]},
    },
}


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        place = (f"paths.store={folder}/store", f"paths.runs={folder}/runs", f"resources.threads={settings.threads}")
        words = (*FLIGHTS, *place, *QUICK, "evaluate.importance=0")
        runs: dict[str, list[Path]] = {}
        for family, space in SPACES.items():
            if settings.wanted(family):
                runs |= searched(words, family, space)
        if settings.wanted("tabm"):
            trained = [engine.run("train", *words, BRIEF, "model=tabm", *SMALL, f"train.seed={k}") for k in (1, 2, 3)]
            runs["tabm"] = [one.directory for one in trained]
        return months(words, runs)


def searched(words: tuple[str, ...], family: str, space: dict[str, Any]) -> dict[str, list[Path]]:
    """Training runs of the family's defaults and of the best config, each with SEEDS seeds."""
    entries = [f"++sweep.space[{name}]={json.dumps(values)}" for name, values in space.items()]
    more = (f"sweep.trials={TRIALS}", f"sweep.seeds={SEEDS}", "sweep.best=1", f"model={family}", BRIEF)
    done = engine.run("sweep", *words, *more, *entries)
    found = json.loads((done.directory / "sweep.json").read_text())
    default, best = (list(map(Path, entry["runs"])) for entry in found["seeds"][:2])
    return {family: default, f"{family}, searched": best}


def months(words: tuple[str, ...], runs: dict[str, list[Path]]) -> list[Row]:
    """A row for each month and family: `ours` is the mean ROC AUC of its seeds, `peer_value` the mean log loss."""
    directories = [directory for each in runs.values() for directory in each]
    test = parts_of(words, directories[0])["test"]
    predicted = {name: [scores(directory, test) for directory in each] for name, each in runs.items()}
    found, of_row = [], test.day.astype("M8[M]")
    for month in np.unique(of_row):
        rows = np.flatnonzero(of_row == month)
        for name, each in predicted.items():
            found.append(line(f"flights_{str(month).replace('-', '_')}", name, rows, test, each, runs[name]))
            show(found[-1])
    return found


def line(work: str, name: str, rows: np.ndarray, test: Part, each: list[np.ndarray], runs: list[Path]) -> Row:
    target = test.encoded.target[rows].astype(np.float64)
    areas = [float(roc_auc(target, score[rows])) for score in each]
    losses = [float(log_loss(target, score[rows])) for score in each]
    figures = [load_metrics(directory) for directory in runs]
    seconds, speed = (np.mean([figure[f"train/{key}"] for figure in figures]) for key in ("seconds", "rows_per_second"))
    note = f"sd {np.std(areas, ddof=1):.4f}; log loss {np.mean(losses):.4f} (sd {np.std(losses, ddof=1):.4f}); {seconds:.1f} s"
    return Row("families", work, len(rows), float(np.mean(areas)), name, None, None, "ROC AUC", float(np.mean(losses)),
               runs=len(each), note=f"{note}, {speed / 1000:,.0f} k rows/s")  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """A line a month, and one of means over months; of each family the ROC AUC with its spread over seeds, and the log loss."""
    names = list(dict.fromkeys(row.peer for row in rows))
    lines = ["| month | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for work in dict.fromkeys(row.work for row in rows):
        of = {row.peer: row for row in rows if row.work == work}
        cells = [f"{of[name].ours:.4f} {of[name].note.split(';')[0]}, {of[name].peer_value:.4f}" for name in names]
        lines.append(f"| `{work}` | " + " | ".join(cells) + " |")
    means = [[row for row in rows if row.peer == name] for name in names]
    cells = [
        f"{np.mean([row.ours for row in own]):.4f}, {np.mean([row.peer_value or 0 for row in own]):.4f}"
        for own in means
    ]
    lines.append("| mean of months | " + " | ".join(cells) + " |")
    lines.append("| a training | " + " | ".join(own[0].note.split("; ")[-1] for own in means) + " |")
    return "\n".join(lines)
