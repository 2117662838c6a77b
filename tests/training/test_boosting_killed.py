"""Boosted trees after ten kills are those of a run that nobody killed: two classes, three, a quantile, all of them sampled."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import schema
from engine.config.tree import Config
from engine.runtime import storage
from engine.runtime.run import Run
from engine.training import distributed
from engine.training.boosting import fit as boosting
from engine.training.boosting.fit import Rounds, fit_trees
from engine.training.checkpoint import TENSORS
from tests.training.conftest import CARDINALITIES, make_problem, open_run
from tests.training.test_boosting import KINDS, SAMPLED, settings
from tests.training.test_boosting_on_ray import Job
from tests.training.test_distributed import ROOT, At, attempts, head, importable, pytestmark

__all__ = ["head", "importable"]
pytestmark = [*pytestmark, pytest.mark.slow]
TASKS = {"binary": "binary", "multiclass": "multiclass", "regression": "quantile"}
KILLS = 10
KEYS = {"cardinalities": CARDINALITIES, "dataset_digest": "data"}


def facts_of(folder: Path, kind: str, task: str) -> tuple[Config, dict[str, object]]:
    keys = {"train__loss": TASKS[task], "train__checkpoint_every": 2}
    return settings(folder, kind, {**SAMPLED, "rounds": 60}, **keys), {
        **KEYS,
        "outputs": [3 if task == "multiclass" else 1],
    }


def begun(folder: Path) -> Path | None:
    """The directory of the one run in a folder, once it has a record."""
    return next((path.parent for path in folder.glob("runs/train/test/*/run.json")), None)


def run_of(config: Config, folder: Path) -> Run:
    """The run in a folder, to go on, or a new one."""
    directory = begun(folder)
    return open_run(config) if directory is None else Run.resume(directory)


def die_at(folder: Path, kind: str, task: str, number: int) -> None:
    """Go on with a run, to be killed: while a checkpoint is written, or some rounds after one."""
    add, save = Rounds._add, boosting.save_checkpoint
    config, keys = facts_of(folder, kind, task)
    run = run_of(config, folder)

    def adding(self: Rounds, grown: object) -> None:
        add(self, grown)  # type: ignore[arg-type]
        if self.state.round == 5 * number + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def saving(where: Path, step: int, *rest: object) -> None:
        if step >= 5 * number and number % 2:
            (where / f"step-{step:010d}").mkdir(parents=True)
            (where / f"step-{step:010d}" / TENSORS).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(where, step, *rest)  # type: ignore[arg-type]

    Rounds._add, boosting.save_checkpoint = adding, saving  # type: ignore[method-assign,assignment]
    fit_trees(make_problem(900, 0, task), make_problem(200, 1, task), config, run, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills_of_a_process_leave_the_trees_as_they_would_be(tmp_path: Path, kind: str, task: str) -> None:
    config, keys = facts_of(tmp_path / "whole", kind, task)
    whole = open_run(config)
    data, valid = make_problem(900, 0, task), make_problem(200, 1, task)
    expected = fit_trees(data, valid, config, whole, **keys)  # type: ignore[arg-type]
    config, keys = facts_of(tmp_path / "killed", kind, task)
    for number in range(1, KILLS + 1):
        process = multiprocessing.get_context("spawn").Process(
            target=die_at, args=(tmp_path / "killed", kind, task, number)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run = run_of(config, tmp_path / "killed")
    found = fit_trees(data, valid, config, run, **keys)  # type: ignore[arg-type]
    assert 44 <= found.metrics["resumed_from_step"] <= 51
    assert found.model.weights() == expected.model.weights()  # type: ignore[union-attr,operator]
    assert found.history == expected.history and run.record["chain"] == whole.record["chain"]


def drive(config: str, folder: str) -> None:
    """Train on two workers of a cluster, or go on, and write what came of it; called in a process of its own."""
    made = schema.build(Config, json.loads(Path(config).read_text()))
    keys = json.loads((Path(folder) / "keys.json").read_text())
    run = run_of(made, Path(folder) / "spread")
    result = distributed.fit_on_cluster(Path(folder) / "train", Path(folder) / "valid", made, run, **keys)
    trees = hashlib.sha256(result.model.weights()).hexdigest()  # type: ignore[union-attr,operator]
    found = {"trees": trees, "history": result.history, "chain": run.record["chain"], "metrics": result.metrics}
    storage.write_json(Path(folder) / "found.json", found)


def steps_done(directory: Path) -> int:
    """The last round in a run's metrics."""
    try:
        return int(json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def wait_for(what: str, process: subprocess.Popen, reached: object) -> None:
    end = time.monotonic() + 600
    while not reached():  # type: ignore[operator]
        assert process.poll() is None, f"the driver ended before {what}"
        assert time.monotonic() < end, what
        time.sleep(0.005)


@pytest.mark.parametrize("task", TASKS)
def test_ten_kills_of_workers_and_driver_leave_the_trees_as_they_would_be(
    tmp_path: Path, head: Iterator[str], task: str
) -> None:
    """In turn the first worker, the second and the driver, each after a hundred rounds more."""
    job = Job(tmp_path, task, rounds=1600, row_fraction=0.7, column_fraction=0.6)
    made = job.settings(
        cluster__kind="ray", cluster__workers=2, cluster__address=head, cluster__retries=KILLS, train__checkpoint_every=25,
        paths__runs=str(tmp_path / "spread/runs"),
    )  # fmt: skip
    config = tmp_path / "config.json"
    storage.write_json(config, schema.plain(made))
    storage.write_json(tmp_path / "keys.json", job.keys)
    call = "import sys; from tests.training.test_boosting_killed import drive; drive(*sys.argv[1:])"

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", call, str(config), str(tmp_path)], cwd=ROOT)

    process = start()
    wait_for("it began", process, lambda: begun(tmp_path / "spread"))
    directory = begun(tmp_path / "spread")
    assert directory is not None
    for number in range(KILLS):
        wait_for(f"kill {number}", process, lambda number=number: steps_done(directory) >= 100 * (number + 1))
        entered = attempts(At(directory))  # type: ignore[arg-type]
        if number % 3 == 2:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            (directory / "metrics.jsonl").unlink()  # so that the next attempt's rounds are waited for
            process = start()
        else:
            os.kill(next(item["pid"] for item in entered[-2:] if item["rank"] == number % 3), signal.SIGKILL)
            (directory / "metrics.jsonl").unlink()
    assert process.wait(600) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"]["resumed_from_step"] >= 100 * KILLS - 25
    assert found["trees"] == hashlib.sha256(job.expected.model.weights()).hexdigest()  # type: ignore[union-attr,operator]
    assert found["history"] == job.expected.history and found["chain"] == job.run.record["chain"]
