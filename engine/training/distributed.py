"""Distributed training: runs the training loop on the workers of a Ray cluster; each opens the files and owns its shards."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

from torch import distributed

from engine.config import plugins, schema
from engine.config.nested import Tree
from engine.config.plugins import Plugin
from engine.config.sections.training import BOOSTERS
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import records, stall, storage
from engine.runtime.on_ray import cluster
from engine.runtime.progress import BAR_SECONDS, COMPILING, Progress
from engine.runtime.run import Run, RunRecord, Series
from engine.training import interrupt
from engine.training.boosting.fit import fit_trees
from engine.training.boosting.on_xgboost import collective
from engine.training.checkpoint import MANIFEST, newest_whole
from engine.training.examples import Examples
from engine.training.exchange import Alone, Exchange, Group
from engine.training.flat import FlatWeights
from engine.training.loop import Epoch, FitKeys, FitResult, fit
from engine.training.model import from_architecture
from engine.training.networks import Fitted
from engine.training.sizes import sizes_of
from engine.training.trees import from_arrays, is_trees
from kernels import compiling

OUTCOME = "outcome.json"
SENT = ("command", "name", "plan", "device")
ATTEMPTS = "attempts.jsonl"  # a line of each worker that enters an attempt
BEATS = "beats"  # signs of life of each worker
PROGRESS = "progress.json"  # progress of rank 0, for the driver to show
SECTIONS = ("name", "paths", "train", "model", "evaluate", "cluster", "resources")  # what workers read of the config


class Payload(TypedDict):
    """What a worker is sent; `record`: the keys SENT of run.json."""

    config: Tree
    directory: str
    record: RunRecord
    series: Series
    train: str
    valid: str | None
    keys: FitKeys
    monotone: list[int]
    fitted: dict[str, Any]
    code: tuple[Plugin, ...]


class Attempt(TypedDict, total=False):
    """A line of ATTEMPTS: a worker's entry (seconds since 1970), or the end of the first step."""

    entered: float
    rank: int
    world: int
    pid: int
    first_step: float


class OutcomeRecord(TypedDict, total=False):
    """outcome.json: the result, or why the workers stopped."""

    status: str
    message: str
    metrics: dict[str, float]
    best_epoch: int
    steps: int
    history: list[Epoch]
    links: dict[str, str]


def fit_on_cluster(  # noqa: PLR0913
    train_dir: Path,
    valid_dir: Path | None,
    config: Config,
    run: Run,
    *,
    cardinalities: Sequence[int],
    outputs: Sequence[int],
    dataset_digest: str,
    precision: str,
    monotone: Sequence[int] = (),
    fitted: Fitted | None = None,
) -> FitResult:
    """`fit` on `cluster.workers` Ray workers, from folders that `Examples.save` wrote; the weights are those of `fit`.

    A failed attempt is repeated from the newest whole checkpoint, `cluster.retries` times. Raises UserError as `fit`
    does and when the workers keep failing, KeyboardInterrupt after a stop that left a checkpoint.
    """
    began = time.time()
    directory = run.directory.resolve()
    for name in (OUTCOME, interrupt.FILE, ATTEMPTS, "failures.jsonl"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / BEATS, ignore_errors=True)
    rows = len(Examples.open(train_dir))
    boosted = config.model.kind in BOOSTERS
    if not boosted:
        _check_workers(rows, config, run)
    facts: FitKeys = {
        "cardinalities": list(cardinalities),
        "outputs": list(outputs),
        "dataset_digest": dataset_digest,
        "precision": precision,
    }
    payload = payload_of(train_dir, valid_dir, config, run, facts, monotone, fitted)
    with cluster.session(config) as opened, interrupt.StopFlag(run.stops) as stop:
        connected = time.time()
        cluster.check_shared(opened, [directory, Path(train_dir).resolve()])
        watch = Watch(
            run,
            stop,
            config.model.trees.rounds if boosted else rows * sizes_of(config.train, rows).epochs,
            cluster.start_seconds(config),
            cluster.watch(cluster.stall_seconds(config), directory / BEATS, math.inf),  # Ray Train ends silent workers
            "rounds" if boosted else "rows",
        )
        try:
            cluster.run_training(config, directory, train_worker, payload, watch.look)
        except cluster.TrainingFailed as error:
            watch.look()
            raise UserError(
                f"training failed on the cluster, first cause {error}. The checkpoints are kept: run the command "
                "again to resume"
            ) from error
        finally:
            watch.close()
            if (directory / BEATS).exists():
                storage.remove(directory / BEATS, directory)  # at once: workers may still write there
        outcome = read_outcome(directory)
        if outcome is None:
            raise UserError("the workers ended without a record; see run.log")
        if outcome["status"] == "stopped":
            raise KeyboardInterrupt(outcome["message"])
    startup = _startup(directory, began, connected, opened.seconds)
    return _result(run, outcome, precision, startup, config.train.decay, fitted)


def payload_of(
    train_dir: Path,
    valid_dir: Path | None,
    config: Config,
    run: Run,
    facts: FitKeys,
    monotone: Sequence[int] = (),
    fitted: Fitted | None = None,
) -> Payload:
    """What the workers of a training are sent; arguments as of `fit_on_cluster`."""
    return {
        # Sections that workers do not read are not sent: passwords of sources and alerts stay here.
        "config": {name: value for name, value in schema.plain(config).items() if name in SECTIONS},
        "directory": str(run.directory.resolve()),
        "record": cast(RunRecord, {name: run.record.get(name) for name in SENT if name in run.record}),
        "series": replace(run.series, folder=run.series.folder.resolve()),
        "train": str(Path(train_dir).resolve()),
        "valid": str(Path(valid_dir).resolve()) if valid_dir else None,
        "keys": facts,
        "monotone": list(monotone),
        "fitted": dict(fitted or {}),
        "code": plugins.held(),
    }


def _check_workers(rows: int, config: Config, run: Run) -> None:
    sizes = sizes_of(config.train, rows)
    least = min(rows, sizes.batch_size, sizes.shards)
    if config.cluster.workers > least:
        run.warn(
            f"cluster.workers={config.cluster.workers} but a step has {least} shards with rows ({rows} rows in all): "
            f"{config.cluster.workers - least} workers will wait. The weights are the same"
        )


class Watch:
    """The driver's work while the workers train: shows progress and failures, and passes a stop on to the workers."""

    def __init__(
        self,
        run: Run,
        stop: interrupt.StopFlag,
        total: int,
        patience: float,
        bound: stall.Watch | None = None,
        unit: str = "rows",
    ) -> None:
        self._bound, self._unit = bound, unit
        self._run, self._stop, self._total, self._patience = run, stop, total, patience
        self._shown_failures = self._entered = 0
        self._idle_since: float | None = time.monotonic()
        self._asked = False
        self._progress: Progress | None = None
        (run.directory / PROGRESS).unlink(missing_ok=True)  # of an attempt whose driver was killed

    def look(self) -> None:
        """Called a few times a second."""
        if self._stop.requested() and not self._asked:
            self._asked = True
            self._run.log("stopping: the workers write a checkpoint first")
            (self._run.directory / interrupt.FILE).touch()
        for failure in cluster.failures(self._run.directory)[self._shown_failures :]:
            self._shown_failures += 1
            self._idle_since = time.monotonic()
            if self._bound is not None:
                self._bound.progress()
            self._run.warn(f"an attempt failed, first cause {cluster.first_cause([failure])}")
        self._tell_of_waiting()
        self._show()
        if self._bound is not None:
            self._bound.look()

    def _tell_of_waiting(self) -> None:
        """Warns while Ray waits silently for room, which it does without limit with `cluster.min_workers`."""
        entered = len(cluster.read_lines(self._run.directory / ATTEMPTS, Attempt))
        if entered > self._entered:
            self._entered, self._idle_since = entered, None
        elif self._idle_since is not None and time.monotonic() - self._idle_since > self._patience:
            self._idle_since = time.monotonic()
            self._run.warn(f"no workers for {self._patience:g} s: the cluster has no room for them yet")

    def _show(self) -> None:
        path = self._run.directory / PROGRESS
        try:
            seen = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if self._progress is None:
            self._progress = self._run.progress("train", self._total, self._unit, seen["start"]).__enter__()
        self._progress.follow(**seen)

    def close(self) -> None:
        """End the display."""
        self._show()
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        (self._run.directory / PROGRESS).unlink(missing_ok=True)


def read_outcome(directory: Path) -> OutcomeRecord | None:
    """What rank 0 wrote at its end, or None."""
    path = directory / OUTCOME
    return records.read(path, OutcomeRecord) if path.exists() else None


def _result(
    run: Run,
    outcome: OutcomeRecord,
    precision: str,
    startup: Mapping[str, float],
    decay: str = "auto",
    fitted: Fitted | None = None,
) -> FitResult:
    for name, value in outcome["links"].items():
        run.link(name, value)
    found, passed_over = newest_whole(run.directory / "checkpoints")
    if found is None or found.step != outcome["steps"]:
        seen = f"step {found.step}" if found else "none"
        raise UserError(
            f"{run.directory / 'checkpoints'} must hold the trained weights, those of step {outcome['steps']}, found {seen}"
            f"{''.join(f'; {reason}' for reason in passed_over)}. Run the command again to resume"
        )
    metrics = {**outcome["metrics"], **startup}
    where = f"{found.folder / MANIFEST}: architecture"
    if is_trees(found.manifest["architecture"]):
        arrays = {name: tensor.numpy() for name, tensor in found.tensors.items()}
        grown = from_arrays(arrays, found.manifest["architecture"], where).first(int(metrics["train/trees"]))
        return FitResult(grown, metrics, outcome["best_epoch"], outcome["steps"], outcome["history"], precision)
    most = found.tensors["weights"].numel()
    model = from_architecture(found.manifest["architecture"], most, where, fitted)
    weights = FlatWeights(model, precision, decay)
    weights.load(found.tensors)
    weights.load(found.tensors, "average_")
    weights.load(found.tensors, "best_")
    return FitResult(model, metrics, outcome["best_epoch"], outcome["steps"], outcome["history"], precision)


def _startup(directory: Path, began: float, connected: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the call to the first step, by part: workers of the first attempt, first step of the last one."""
    noted = cluster.read_lines(directory / ATTEMPTS, Attempt)
    entries = [item for item in noted if "entered" in item]
    ready = next((item["first_step"] for item in noted if item.get("first_step")), None)
    found = {f"startup/{name}_seconds": seconds for name, seconds in parts.items()}
    first, last = (
        max(item["entered"] for item in attempt)
        for attempt in (entries[: entries[0]["world"]], entries[-entries[-1]["world"] :])
    )
    found["startup/workers_seconds"] = first - connected
    if ready:
        found["startup/first_step_seconds"] = ready - last
        found["startup/seconds"] = first - began + ready - last
    found["train/attempts"] = float(len([item for item in entries if item["rank"] == 0]))
    return found


# ----------------------------------------------------------------------------------------------- inside a worker


class WorkerRun(Run):
    """The run in a worker: links are kept for the driver, and only rank 0 writes."""

    def __init__(self, directory: Path, record: RunRecord, rank: int) -> None:
        super().__init__(directory, {**record, "chain": {}})
        self._rank = rank
        self._metrics = cluster.WorkerMetrics(f"{record['name']}/{directory.name}") if rank == 0 else None

    def save(self) -> None:
        """Nothing: only the driver writes the record."""

    def log(self, message: str) -> None:
        """One line, of rank 0."""
        if self._rank == 0:
            super().log(message)

    def warn(self, message: str) -> None:
        """One line, of rank 0."""
        if self._rank == 0:
            super().warn(message)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the gauges, of rank 0."""
        if self._metrics is not None:
            super().log_metrics(step, values)
            self._metrics.set(values)

    def progress(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> Progress:
        """Progress that the driver displays."""
        return FileProgress(self.directory / PROGRESS if self._rank == 0 else None, label, total, unit, start)


class FileProgress(Progress):
    """Progress written to a small file a few times a second, for another process to show."""

    def __init__(self, path: Path | None, label: str, total: int | None, unit: str, start: int) -> None:
        super().__init__(label, total, unit, start)
        self._path = path
        self._every = BAR_SECONDS

    def __enter__(self) -> Progress:
        super().__enter__()
        self._show(self._began)
        return self

    def _show(self, now: float, last: bool = False, failed: bool = False) -> None:  # noqa: ARG002
        if self._path is not None:
            temporary = self._path.with_suffix(".tmp")
            note = COMPILING if compiling.active() else self._note
            seen = {"start": self._start, "done": self.done, "seconds": self._worked(now), "note": note}
            with contextlib.suppress(OSError):  # a display never stops the work
                temporary.write_text(json.dumps(seen), encoding="utf-8")
                os.replace(temporary, self._path)


def train_worker(payload: Payload) -> None:
    """The function of every worker. An error ends the attempt on all workers, whose collectives would wait for this one."""
    entered = time.time()
    place = cluster.worker_place()
    directory = Path(payload["directory"])
    plugins.add(payload["code"])
    config = schema.build(Config, payload["config"])
    run = WorkerRun(directory, payload["record"], place.rank)
    run.series = payload["series"]
    beats = stall.Beats(directory / BEATS, cluster.node_here())
    beats.at = f"rank {place.rank}"
    cluster.append_line(
        directory / ATTEMPTS, {"entered": entered, "rank": place.rank, "world": place.world, "pid": os.getpid()}
    )
    outcome: OutcomeRecord
    try:
        train = Examples.open(Path(payload["train"]))
        valid = Examples.open(Path(payload["valid"])) if payload["valid"] else None
        backend = "cpu:gloo,cuda:nccl" if run.record.get("device") == "cuda" else "gloo"
        with process_group(place, cluster.timeout_seconds(config), backend) as exchange:
            result = _fit(train, valid, config, run, payload, exchange, place)
        outcome = {
            "status": "done",
            "metrics": result.metrics,
            "best_epoch": result.best_epoch,
            "steps": result.steps,
            "history": result.history,
            "links": run.record["chain"],
        }
        if place.rank == 0:
            cluster.append_line(directory / ATTEMPTS, {"first_step": result.first_step})
    except KeyboardInterrupt as error:
        outcome = {"status": "stopped", "message": str(error)}
    if place.rank == 0:
        storage.write_json(directory / OUTCOME, outcome)
    beats.end()


def _fit(
    train: Examples,
    valid: Examples | None,
    config: Config,
    run: Run,
    payload: Payload,
    exchange: Exchange,
    place: cluster.WorkerPlace,
) -> FitResult:
    keys, local = payload["keys"], place.local_world
    if config.model.kind not in BOOSTERS:
        fitted = payload["fitted"]
        return fit(train, valid, config, run, exchange=exchange, local_workers=local, fitted=fitted, **keys)
    with collective(place.rank, place.world, place.address, cluster.broadcast):
        monotone = payload["monotone"]
        return fit_trees(train, valid, config, run, exchange=exchange, local_workers=local, monotone=monotone, **keys)


@contextlib.contextmanager
def process_group(place: cluster.WorkerPlace, timeout: float, backend: str = "gloo") -> Iterator[Exchange]:
    """The workers' process group: gloo, and also NCCL for tensors on GPUs.

    Its store listens on the node's own address, which is loopback on a local cluster.

    A collective that waits longer than `timeout` seconds raises, so a stalled peer ends the attempt.
    """
    if place.world == 1:
        yield Alone()
        return
    limit = datetime.timedelta(seconds=timeout)
    listener = socket.create_server((place.address, 0)) if place.rank == 0 else None
    host, port = cluster.broadcast(listener.getsockname()[:2] if listener else None)
    descriptor = listener.detach() if listener else None
    store = distributed.TCPStore(
        host, port, place.world, place.rank == 0, limit, wait_for_workers=False, master_listen_fd=descriptor
    )
    distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=limit)
    yield Group()
    # Not in a finally: after a failure Ray ends the processes, and an orderly exit would wait for dead workers.
    distributed.barrier()
    distributed.destroy_process_group()
