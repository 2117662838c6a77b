"""XGBoost on Ray: the trees of one process, for any number of workers, through kills of workers."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.runtime.run import Run
from engine.training import distributed
from engine.training.boosting.fit import fit_trees
from engine.training.boosting.on_xgboost import refuse_other_machines
from engine.training.loop import FitResult
from tests.training.conftest import CARDINALITIES, make_config, make_problem, open_run
from tests.training.test_distributed import (
    LOOPBACK,
    at_step,
    descendants,
    head,
    importable,
    kill,
    listening,
    pytestmark,
)

__all__ = ["head", "importable", "pytestmark"]
ANY = "00000000"  # address of the listeners of XGBoost's workers
TREES = {"rounds": 30, "leaves": 7, "row_fraction": 0.8, "column_fraction": 0.7, "patience": 0}
KEYS: dict[str, Any] = {"dataset_digest": "data", "precision": "fp32"}


class Job:
    """Examples in files, and the trees that one process grows of them."""

    def __init__(self, folder: Path, task: str = "binary", **trees: Any) -> None:
        self.folder, self.loss, self.trees = folder, {"regression": "quantile"}.get(task, task), {**TREES, **trees}
        data, valid = make_problem(1501, 0, task), make_problem(300, 1, task)
        data.save(folder / "train")
        valid.save(folder / "valid")
        self.keys = {**KEYS, "cardinalities": CARDINALITIES, "outputs": [3 if task == "multiclass" else 1]}
        config = self.settings()
        self.run = open_run(config)
        self.expected = fit_trees(data, valid, config, self.run, **self.keys)
        self.run.finish({})

    def settings(self, **keys: Any) -> Any:
        kept = {
            "train__loss": self.loss,
            "train__checkpoint_every": 5,
            "train__log_every": 1,
            "model__trees": self.trees,
        }
        return make_config(self.folder, model__kind="xgboost", **{**kept, **keys})

    def fit(self, workers: int, run: Run | None = None, **keys: Any) -> tuple[FitResult, Run]:
        config = self.settings(cluster__kind="ray", cluster__workers=workers, **keys)
        run = run or open_run(config)
        try:
            return distributed.fit_on_cluster(
                self.folder / "train", self.folder / "valid", config, run, **self.keys
            ), run
        finally:
            run.finish({})

    def same(self, result: FitResult, run: Run) -> bool:
        """Whether trees, history and links are those of one process."""
        ours, theirs = (item.model.weights() for item in (result, self.expected))  # type: ignore[union-attr,operator]
        return (
            ours == theirs
            and result.history == self.expected.history
            and run.record["chain"] == self.run.record["chain"]
        )


def test_two_workers_grow_the_trees_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    seen: set[str] = set()
    look = distributed.Watch.look
    earlier = set(descendants(os.getpid()))

    def spy(watch: Any) -> None:
        seen.update(listening(set(descendants(os.getpid())) - earlier))
        look(watch)

    monkeypatch.setattr(distributed.Watch, "look", spy)
    result, run = job.fit(2)
    assert job.same(result, run)
    assert seen and seen <= {*LOOPBACK, ANY}  # the tracker too; workers are bound to the device (see below)


def test_a_listener_on_all_addresses_is_bound_to_the_loopback_device() -> None:
    with socket.create_server(("", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        assert refuse_other_machines() >= 1
        devices = [item.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) for item in (everywhere, here)]
        assert devices[0].startswith(b"lo") and not devices[1]
        with socket.create_connection(("127.0.0.1", everywhere.getsockname()[1]), timeout=5) as found:
            assert found.getpeername()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_the_trees_are_the_same_for_any_number_of_workers(tmp_path: Path, head: Iterator[str], task: str) -> None:
    job = Job(tmp_path, task)
    for workers in (1, 2, 4):
        result, run = job.fit(workers, cluster__address=head)
        assert job.same(result, run), f"{workers} workers"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL)])
def test_a_killed_worker_is_replaced_and_the_trees_are_the_same(
    tmp_path: Path, head: Iterator[str], rank: int, number: int
) -> None:
    job = Job(tmp_path, rounds=400)
    run = open_run(job.settings(cluster__kind="ray", cluster__workers=2, cluster__address=head))
    hit = at_step(run, 60, kill(rank, number))
    result, _ = job.fit(2, run, cluster__address=head)
    hit.join(1)
    assert job.same(result, run)
    assert result.metrics["train/attempts"] == 2 and result.metrics["resumed_from_step"] >= 50


@pytest.mark.slow
def test_what_the_library_refuses_is_said_once_and_without_a_traceback(tmp_path: Path, head: Iterator[str]) -> None:
    job = Job(tmp_path)
    wrong = {**job.trees, "params": {"interaction_constraints": "nonsense"}}
    with pytest.raises(
        UserError, match=r"^model=xgboost cannot grow trees: .*correct model.trees \(params: .*reported by rank"
    ):
        job.fit(2, cluster__address=head, model__trees=wrong)
