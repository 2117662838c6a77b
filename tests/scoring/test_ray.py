"""Scoring over Ray: the same output as threads in one process, and actors, drivers and nodes that die."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engine
from engine.runtime import storage
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests.conftest import ROOT
from tests.scoring.conftest import ROWS, Shop, contents, rows_of
from tests.tiny import visits

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
RAY = ("cluster=ray", "cluster.workers=2", "score.columns=[shop,size]")
UNITS = -(-ROWS // 1024)


def same(directory: Path, unbroken: Run) -> bool:
    names = ("profile.json", "ledger.parquet")
    return contents(directory / "predictions") == contents(unbroken.directory / "predictions") and all(
        (directory / name).read_bytes() == (unbroken.directory / name).read_bytes() for name in names
    )


def test_ray_actors_write_the_bytes_that_threads_write(score: Callable[..., Run], unbroken: Run) -> None:
    run = score(*RAY)
    assert same(run.directory, unbroken) and rows_of(run).equals(rows_of(unbroken))
    assert run.metrics["score/units_scored"] == UNITS and run.metrics["score/startup_seconds"] > 0


@pytest.mark.slow
def test_rows_scores_and_profile_are_the_same_bytes_for_1_2_and_8_workers_and_any_unit_size(
    shop: Shop, tmp_path: Path
) -> None:
    pq.write_table(visits(30_000), tmp_path / "visits.parquet")
    place = (f"data.path={tmp_path}", f"paths.store={tmp_path / 'store'}", "score.columns=[shop,size]")

    def run(*more: str) -> Run:
        return engine.run("score", *shop.words(*place, *more, runs=tmp_path / "runs"), config_dir=shop.conf)

    expected = run("score.unit_rows=100000", "resources.threads=1")
    assert expected.metrics["score/units"] == 1 and rows_of(expected).num_rows == 30_000
    for workers, unit_rows, count in ((1, 5000, 6), (2, 100_000, 1), (8, 1024, 30), (8, 2048, 15)):
        found = run("cluster=ray", f"cluster.workers={workers}", f"score.unit_rows={unit_rows}")
        assert found.metrics["score/units"] == count
        assert rows_of(found).equals(rows_of(expected)), (workers, unit_rows)
        assert found.record["chain"]["scores"] == expected.record["chain"]["scores"], "the bits of ids and scores"
        assert (found.directory / "profile.json").read_bytes() == (expected.directory / "profile.json").read_bytes()


# ---------------------------------------------------------------------------------------------- deaths (slow)


class Scoring:
    """The command in a process of its own, its actors made slow so that a kill finds them at work."""

    def __init__(self, shop: Shop, runs: Path, *more: str, **variables: str) -> None:
        self.runs = runs
        code = "import sys; from tests.scoring import slow_units; sys.exit(slow_units.main(sys.argv[1:]))"
        words = ["score", *shop.words(*RAY, *more, runs=runs), f"--config-dir={shop.conf}"]
        log = open(runs.parent / f"{runs.name}.log", "a")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )  # fmt: skip
        log.close()

    @property
    def directory(self) -> Path:
        (directory,) = (self.runs / "score" / "tiny").iterdir()
        return directory

    def wait_for_units(self, count: int, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while len(list(self.runs.glob("score/tiny/*/parts/*.json"))) < count:
            assert self.process.poll() is None and time.monotonic() < until, "no units"
            time.sleep(0.02)

    def actors(self) -> list[int]:
        """Process ids of the scoring actors: descendants of the driver that Ray has named so."""
        found = []
        for process in descendants(self.process.pid):
            text = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace") if alive(process) else ""
            if text.startswith("ray::") and ("MapWorker" in text or "Map(_Actor)" in text):
                found.append(process)
        return found

    def stop(self) -> None:
        """Nothing of it outlives the test."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)

    def end(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(shop: Shop, tmp_path: Path) -> Iterator[Callable[..., Scoring]]:
    """`start("cluster.workers=1", SLOW_UNITS="0.4")`: a scoring command that goes on in the background."""
    started: list[Scoring] = []

    def begin(*more: str, **variables: str) -> Scoring:
        started.append(Scoring(shop, tmp_path / "runs", *more, **variables))
        return started[-1]

    yield begin
    for scoring in started:
        scoring.stop()


Start = Callable[..., "Scoring"]


def alive(process: int) -> bool:
    return Path(f"/proc/{process}/cmdline").exists()


def descendants(process: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children") if alive(process) else ():
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def metrics_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_an_actor_killed_at_work_costs_nothing(start: Start, unbroken: Run, tmp_path: Path, seed: int) -> None:
    scoring = start(SLOW_UNITS="0.4")
    moments = random.Random(seed)
    scoring.wait_for_units(moments.randint(0, 3))
    until = time.monotonic() + 60
    while not scoring.actors() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(moments.random() * 0.4)
    os.kill(moments.choice(scoring.actors()), signal.SIGKILL)
    assert scoring.end() == 0, (tmp_path / "runs.log").read_text()[-3000:]
    assert same(scoring.directory, unbroken)
    metrics = metrics_of(scoring.directory)
    assert metrics["score/units_failed"] == 0 and metrics["score/units_retried"] <= 1


@pytest.mark.slow
def test_an_actor_killed_while_it_starts_costs_nothing(start: Start, unbroken: Run, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    starts.mkdir()
    scoring = start("cluster.workers=1", STARTS=str(starts))
    until = time.monotonic() + 60
    while not list(starts.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    victim = next(starts.iterdir())
    os.kill(int(victim.name), signal.SIGKILL)
    assert scoring.end() == 0, (tmp_path / "runs.log").read_text()[-3000:]
    assert same(scoring.directory, unbroken) and len(list(starts.iterdir())) == 2, "another one in its place"
    metrics = metrics_of(scoring.directory)
    assert metrics["score/units_failed"] == metrics["score/units_retried"] == 0


@pytest.mark.slow
def test_actors_that_die_at_every_start_end_the_run_which_can_go_on(
    start: Start, unbroken: Run, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    starts.mkdir()
    scoring = start("score.tries=2", STARTS=str(starts), DEADLY_START="1")
    assert scoring.end(120) == 1
    said = (tmp_path / "runs.log").read_text().splitlines()
    assert any(line.startswith("error: every worker must start, but") and "out of memory" in line for line in said)
    assert len(list(starts.iterdir())) == 4, "two workers of two tries"
    again = start("score.tries=2")
    assert again.end() == 0 and again.directory == scoring.directory and same(again.directory, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_driver_killed_at_work_is_taken_up_again(start: Start, unbroken: Run, tmp_path: Path, seed: int) -> None:
    scoring = start(SLOW_UNITS="0.4")
    scoring.wait_for_units(1 + seed % 4)
    os.killpg(scoring.process.pid, signal.SIGKILL)
    scoring.process.wait(20)
    time.sleep(3)  # Ray's own processes notice that their driver is gone
    done = len(list(scoring.directory.glob("parts/*.json")))
    again = start("cluster.workers=1", SLOW_UNITS="0")
    assert again.end() == 0, (tmp_path / "runs.log").read_text()[-3000:]
    assert same(again.directory, unbroken)
    metrics = metrics_of(again.directory)
    assert metrics["units_skipped"] == done and metrics["score/units_scored"] == UNITS - done


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_stop_ends_the_run_as_interrupted_and_it_goes_on(
    start: Start, unbroken: Run, tmp_path: Path, number: int
) -> None:
    scoring = start(SLOW_UNITS="1")
    scoring.wait_for_units(1)
    scoring.process.send_signal(number)
    assert scoring.end() == 130, (tmp_path / "runs.log").read_text()[-3000:]
    assert Run.read(scoring.directory)["status"] == "interrupted"
    done = len(list(scoring.directory.glob("parts/*.json")))
    again = start()
    assert again.end() == 0 and same(again.directory, unbroken)
    assert 1 <= metrics_of(again.directory)["units_skipped"] == done < UNITS


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, 3])
def test_a_unit_that_kills_its_worker_is_set_aside_and_no_other_is_lost(
    start: Start, unbroken: Run, tmp_path: Path, tries: int
) -> None:
    """Of one try too: a unit that waits at the worker that dies has not had it."""
    scoring = start(f"score.tries={tries}", SLOW_UNITS="0.3", DEADLY_UNIT="2048")
    assert scoring.end() == 1
    log = (tmp_path / "runs.log").read_text()
    assert f"rows 2048 to 3072 failed {tries} times: its worker died" in log
    rest = predictions(scoring.directory, incomplete=True)
    expected = rows_of(unbroken)["row_id"].to_pylist()
    assert rest["row_id"].to_pylist() == expected[:2048] + expected[3072:]
    ledger = storage.read_parquet(scoring.directory / "ledger.parquet").to_pylist()
    assert [row["start"] for row in ledger if row["state"] == "set aside"] == [2048]
    again = start(f"score.tries={tries}")
    assert again.end() == 0 and same(again.directory, unbroken)


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of a head without CPUs and two nodes with one each, on loopback."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    cluster.workers = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
    yield cluster
    cluster.shutdown()
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_whole_node_lost_costs_nothing(
    shop: Shop, start: Start, unbroken: Run, tmp_path: Path, nodes: Any, seed: int
) -> None:
    words = (f"cluster.address={nodes.address}", "cluster.timeout=15s")
    scoring = start(*words, SLOW_UNITS="0.5")
    scoring.wait_for_units(1 + seed)
    nodes.remove_node(nodes.workers[seed % 2], allow_graceful=False)
    code = scoring.end()
    if code != 0:  # the loss took what the driver cannot do without: the same command again
        again = start(f"cluster.address={nodes.address}", "cluster.workers=1")
        assert again.end() == 0, (tmp_path / "runs.log").read_text()[-3000:]
    assert same(scoring.directory, unbroken)
