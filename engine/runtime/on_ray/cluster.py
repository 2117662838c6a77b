"""Ray clusters: join or start one, and run a training function on its workers.

A local cluster listens on loopback only and is shut down at the end. Only small descriptions of work and small records of
results go through Ray; rows stay in files that every worker opens itself.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import json
import logging
import os
import re
import secrets as random_names
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import environment, records, stall, terminal
from engine.runtime.on_ray import ray_private, versions
from engine.runtime.run import Run

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
OBJECT_STORE_BYTES = 100 * 2**20  # descriptions and records; never rows
KNOCK_SECONDS = 5.0
ANSWER_SECONDS = 120.0  # a node that starts its first worker for this job may be slow
START_SECONDS = 60.0  # at least: a busy machine starts slowly
SHUTDOWN_SECONDS = 15.0
HOME_VARIABLE = "ENGINE_HOME"
T = TypeVar("T")


@dataclass
class Session:
    """A cluster that this process is connected to."""

    address: str
    local: bool
    nodes: list[str]
    seconds: dict[str, float] = field(default_factory=dict)


def inside_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return ray_private.JOB_VARIABLE in os.environ


def shared_path(path: str) -> str:
    """`path` unchanged, or inside a Ray job relative to ENGINE_HOME (default `~/engine`).

    The working directory of a job is a node-local copy that is removed with the job.
    """
    if not inside_job() or Path(path).is_absolute() or "://" in path:
        return path
    return str(Path(os.environ.get(HOME_VARIABLE, "~/engine")).expanduser() / path)


# ---------------------------------------------------------------------------------------------------- connecting


def timeout_seconds(config: Config) -> float:
    """cluster.timeout in seconds, which limits the waits of Ray Train and of the collectives."""
    return max(config.cluster.timeout.seconds, 1.0)


def stall_seconds(config: Config) -> float:
    """cluster.stall in seconds, the limit of every wait."""
    return max(config.cluster.stall.seconds, 1.0)


def start_seconds(config: Config) -> float:
    """Seconds in which workers must be placed and started."""
    return max(timeout_seconds(config), START_SECONDS)


def _variables(config: Config) -> dict[str, str]:
    """Environment variables of Ray Train, its controller and workers; its defaults notice a stall only after minutes."""
    seconds = timeout_seconds(config)
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_SECONDS),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_seconds(config)),
        # Without its GCS Ray ends the process with no useful message: cluster.stall must come first.
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(int(stall_seconds(config)) + 120),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(start_seconds(config)),  # `broadcast` also waits for slow starters
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }


def _loopback_variables() -> dict[str, str]:
    """Environment variables that keep Ray and gloo on loopback, and switch off the watcher for preempted machines."""
    found = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    return found | {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else found


@contextlib.contextmanager
def session(config: Config) -> Iterator[Session]:
    """Connect by `cluster.address`: null is the job's own cluster inside a Ray job, else a new one on loopback.

    Raises UserError if Ray is missing, there is no cluster at the address, none can be started, or it has too few CPUs.
    """
    check_folder()
    if stall.is_left():
        raise UserError("a part of Ray is stuck in this process: start the command in a new process")
    began = time.monotonic()
    local = _starts_local(config)
    ray = _import_ray(local)
    imported = time.monotonic()
    variables = _variables(config) | (_loopback_variables() | _token_variables() if local else {})
    before = {name: os.environ.get(name) for name in variables}
    watcher: subprocess.Popen[bytes] | None = None
    ended = threading.Event()
    os.environ.update(variables)
    if local:
        ray_private.read_token_again()
    stop = signal.getsignal(signal.SIGTERM)
    try:
        watcher = _start_reaper(local)
        # The thread that starts Ray must live on: Ray asks Linux to end its processes when their parent thread ends.
        patience = max(stall_seconds(config), START_SECONDS)
        opened = answered(lambda: _connect(ray, config), patience, "a start", ended)
        if stop is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)  # Ray's handler would exit with 15 at any point
        opened.seconds = {"ray_import": imported - began, "ray_init": time.monotonic() - imported}
        answered(lambda: _check_size(ray, config), stall_seconds(config), "the list of its CPUs")
        if not opened.local:  # a local cluster starts this interpreter
            _check_nodes(ray, opened)
        yield opened
    finally:
        _shut_down(ray, watcher)
        if not stall.is_left():
            ended.set()
        ray_private.may_form_clusters(True)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if local:
            ray_private.read_token_again()


def _shut_down(ray: Any, watcher: subprocess.Popen[bytes] | None) -> None:
    """Leave the cluster, and shut down a local one. If Ray no longer answers, that is left to the end of the process:
    ending Ray's processes now would make Ray end this process without a message.
    """
    try:
        with contextlib.suppress(Exception):
            if stall.is_left() or broken() or unwell():
                raise stall.NoAnswer
            stall.bounded(ray.shutdown, SHUTDOWN_SECONDS, "ray-shutdown")
    except stall.NoAnswer:
        atexit.unregister(ray.shutdown)  # it would block too
        stall.leave(watcher)  # its standard input closes with this process
        return
    if watcher is not None and watcher.stdin is not None:
        with contextlib.suppress(OSError):
            watcher.stdin.write(b"done")
            watcher.stdin.close()
        try:
            watcher.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            watcher.send_signal(signal.SIGCONT)  # it may have been stopped; then it does its work now
            stall.leave(watcher)


def answered(call: Callable[[], T], seconds: float, what: str, until: threading.Event | None = None) -> T:
    """The result or error of a call of Ray. Raises Stalled without one within `seconds`. `until`: see stall.bounded."""
    try:
        return stall.bounded(
            call, seconds, "ray-call", look=check_alive if until is None else lambda: None, until=until
        )
    except stall.NoAnswer:
        stall.leave()
        said = "; ".join(broken() or unwell()) or "look at its logs"
        raise stall.Stalled(
            f"Ray has not answered a request for {what} for {seconds:.0f} s (cluster.stall): {said}.{_logs()}"
        ) from None


def broken() -> list[str]:
    """Sentences about required processes of a local cluster (GCS, raylet) that have ended."""
    codes = [(kind, process.pid, process.poll()) for kind, process in ray_private.services().items()]
    return [f"Ray's {kind} (process {pid}) has ended with {code}" for kind, pid, code in codes if code is not None]


def unwell() -> list[str]:
    """Sentences about processes of a local cluster that are stopped."""
    return stall.stopped([os.getpid()])


def watch(span: float, folder: Path, patience: float) -> stall.Watch:
    """A watch over workers with heartbeats in `folder`; those that are silent for `patience` seconds are killed."""
    return stall.Watch(span, folder, patience, give_up=_end_worker, detail=unwell, start=START_SECONDS)


def node_here() -> str:
    """Ray's name of the node that this worker is on; empty outside of Ray."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""


def check_alive() -> None:
    """Raises UserError if a local cluster has lost its GCS or raylet, before Ray ends this process."""
    if said := broken():
        raise UserError(
            f"{'; '.join(said)}, without which no work can continue.{_logs()} Run the command again: it continues from "
            "finished work"
        )


def _end_worker(seen: stall.Seen) -> None:
    """Kill a worker that does not answer, so that Ray gives its work to another worker."""
    facts = seen.facts
    _say(f"{seen} does not answer: it is killed, and its work goes to others")
    if facts["host"] == socket.gethostname() and stall.end_process(facts["pid"], facts["began"]):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(facts["node"], soft=False)
    end = ray.remote(num_cpus=0)(stall.end_process).options(scheduling_strategy=place)
    with contextlib.suppress(Exception):  # perhaps the whole node does not answer
        stall.bounded(lambda: end.remote(facts["pid"], facts["began"]), KNOCK_SECONDS, "ray-kill")


def _token_variables() -> dict[str, str]:
    """Environment variables that protect a local cluster with a token from other users of this machine.

    The cluster's key-value store has functions that workers unpickle. The token is new in each process and only in the
    environment of the cluster's processes, which other users cannot read, unlike Ray's file (~/.ray/auth_token).
    A token or mode set by the user is kept.
    """
    if not ray_private.has_tokens():
        _say_once("this Ray has no tokens, so other users of this machine can reach the cluster: update Ray")
        return {}
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        _say_once("RAY_AUTH_MODE is not token, so other users of this machine can reach the cluster: unset it")
        return {}
    mine = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return {"RAY_AUTH_MODE": "token"} | ({} if mine else {"RAY_AUTH_TOKEN": _token()})


@functools.cache
def _token() -> str:
    return random_names.token_hex(32)


@functools.cache
def _say_once(text: str) -> None:
    _say(text)


def _say(text: str) -> None:
    run = _run.get()
    if run is not None:
        run.warn(text)
    else:
        terminal.err(f"warning: {text}\n")


def check_folder() -> None:
    """Raises UserError if workers would import a file of the current folder instead of the engine."""
    hidden = environment.hidden_from_workers(Path.cwd())
    if hidden is not None:
        raise UserError(
            f"Ray lets workers import from the current folder, where they would import {hidden} instead of the engine. Start "
            "the command in another folder"
        )


def _start_reaper(local: bool) -> subprocess.Popen[bytes] | None:
    """Start a small process that outlives this one: if this one is killed, it ends a local cluster and records the run as
    failed. Needs /proc.
    """
    if not Path("/proc/self/stat").exists():
        return None
    run = _run.get()
    directory = "" if run is None else str(run.directory.resolve())
    program = str(Path(__file__).with_name("reaper.py"))
    words = [sys.executable, "-I", "-S", program, str(os.getpid()), str(int(local)), directory]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def _import_ray(local: bool) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("cluster=ray needs Ray: pip install 'ray[default,data,train]', or use cluster=local") from None
    ray_private.may_form_clusters(not local)
    return ray


def _starts_local(config: Config) -> bool:
    return config.cluster.address is None and not inside_job()


def _connect(ray: Any, config: Config) -> Session:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = config.cluster.address
    if address is None and inside_job():
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address is None:
        try:
            # Plain ray.init() would attach to the cluster that was started last on this machine.
            context = ray.init(
                address="local",
                num_cpus=max(environment.cores(), config.cluster.workers + 1),
                include_dashboard=config.cluster.dashboard,
                dashboard_host=LOOPBACK,
                object_store_memory=OBJECT_STORE_BYTES,
                **{ray_private.NODE_ADDRESS: LOOPBACK},
                **quiet,
            )
        except Exception as error:  # Ray raises a bare Exception for a start that took too long
            raise UserError(
                f"cluster=ray must start a Ray cluster on this machine, but Ray's start failed ({one_line(error)}).{_logs()}"
                " A machine that is busy or short of memory can be the cause: run the command again, join a running "
                "cluster with cluster.address, or use cluster=local"
            ) from error
    else:
        try:
            _knock(address)
            context = ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            if "Version mismatch" in str(error):
                said = " ".join(str(error).split())
                raise UserError(
                    f"Ray and Python must be the same here and on the cluster at {address!r}: {said}"
                ) from None
            raise UserError(
                f"cluster.address must be that of a running Ray cluster, but none was found at {address!r} "
                f"({str(error).splitlines()[0]}). Start one with `ray start --head`, or leave it null for a local one"
            ) from None
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return Session(str(context.address_info["gcs_address"]), _starts_local(config), nodes)


def _logs() -> str:
    """A sentence with the log folder of the newest cluster started by this process; empty without one."""
    sessions = sorted(Path(ray_private.temporary_directory()).glob(f"session_*_{os.getpid()}"))
    return f" Its logs are in {sessions[-1] / 'logs'}." if sessions else ""


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray itself would retry for more than a minute."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if match:
        socket.create_connection((match.group(1), int(match.group(2))), timeout=KNOCK_SECONDS).close()


def _check_size(ray: Any, config: Config) -> None:
    least = config.cluster.min_workers or config.cluster.workers
    for kind, each in (("CPU", 1.0), ("GPU", config.cluster.gpus_per_worker)):
        have = float(ray.cluster_resources().get(kind, 0.0))
        if each and have < least * each:
            raise UserError(
                f"cluster.workers={config.cluster.workers} needs {least * each:g} {kind}s on the cluster, found {have:g}."
                " Lower cluster.workers, or set cluster.min_workers"
            )


_answers: dict[tuple[str, ...], dict[str, versions.Versions]] = {}  # by cluster, once per process: loaded code stays
_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("run", default=None)


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Sessions opened in the block record the versions of their nodes in this run, and warn in its log."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def _check_nodes(ray: Any, opened: Session) -> None:
    """Query every node's versions before work is started there. Raises UserError if they must not be mixed."""
    run = _run.get()
    found: versions.ClusterRecord = {
        "address": opened.address,
        **versions.record(versions.here(), _ask_nodes(ray, opened)),
    }
    if run is not None:
        place = run.record["resumes"][-1] if run.resumed else run.record
        if place.get("cluster") == found:  # a command opens a session for each of its steps
            return
        place["cluster"] = found
        run.save()
    check_versions(found["differences"], _say)


def _ask_nodes(ray: Any, opened: Session) -> dict[str, versions.Versions]:
    key = (opened.address, *sorted(opened.nodes))
    if key not in _answers:
        ray.cloudpickle.register_pickle_by_value(versions)  # a node may have another engine, or none
        try:
            _answers[key] = versions.of_nodes(ray, ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"every node of the cluster must report its versions, but Ray failed: {one_line(error)}"
            ) from None
        finally:
            ray.cloudpickle.unregister_pickle_by_value(versions)
    return _answers[key]


def check_versions(differences: Sequence[versions.Difference], warn: Callable[[str], Any]) -> None:
    """Warn of versions that differ on nodes. Raises UserError with the table if engine or Python's minor version differ."""
    if not differences:
        return
    table = versions.table(differences)
    if any(versions.stops(one) for one in differences):
        raise UserError(
            f"engine and Python must be the same here and on every node of the cluster, found:\n{table}\n"
            "Install the same versions on the nodes, or start the command on a machine with theirs"
        )
    warn(f"some packages differ between here and the nodes, so results may differ in their last digits:\n{table}")


def check_shared(opened: Session, folders: Sequence[Path]) -> None:
    """Check that folders are shared: every node must read a probe file in each and write a reply beside it.

    Raises UserError naming the node and the folder that is not shared. A single machine is not checked.
    """
    if len(opened.nodes) < 2:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = random_names.token_hex(8)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{token}"
        probe.write_text(token)
        try:
            answer = ray.remote(num_cpus=0)(_answer_probe)
            for node in opened.nodes:
                placed = answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
                found = ray.get(placed.remote(str(probe), node), timeout=60)
                reply = folder / f".probe-{token}-{node}"
                if found != token or not reply.exists():
                    raise UserError(
                        f"{folder} must be the same folder on every node, but node {node[:12]} found "
                        f"{'another one' if found is None else 'it and cannot write there'}. "
                        "Set paths.runs and paths.store to folders that all nodes share"
                    )
        finally:
            for path in folder.glob(f".probe-{token}*"):
                path.unlink(missing_ok=True)


def _answer_probe(path: str, node: str) -> str | None:
    try:
        text = Path(path).read_text()
        Path(f"{path}-{node}").write_text(text)
    except OSError:
        return None
    return text


# ------------------------------------------------------------------------------------------------------ training


class TrainingFailed(Exception):
    """The workers failed more often than `cluster.retries` allows; the message has the first cause and its rank."""


def run_training(
    config: Config,
    directory: Path,
    function: Callable[[T], None],
    payload: T,
    poll: Callable[[], None],
) -> None:
    """Call `function(payload)` on every worker, and again on all of them after a failure.

    `function` is importable by name on the workers and forms their process group itself. An error of one worker ends
    the attempt for all; a UserError also ends the training, and is raised here. `poll` is called several times a second in
    this thread, for signals and progress. Raises TrainingFailed with the first cause and its rank.
    """
    trainer = answered(lambda: _trainer(config, directory, function, payload), stall_seconds(config), "a training")
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again below
            outcome.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        check_alive()
        poll()
    if outcome:
        failure = getattr(outcome[0], "controller_failure", None)
        if isinstance(failure, UserError):
            raise failure
        causes = [first_cause(failures(directory)), _no_room(config, failure)]
        raise TrainingFailed("; then ".join(filter(None, causes)) or one_line(outcome[0])) from outcome[0]


def _no_room(config: Config, failure: BaseException | None) -> str:
    """The message if workers could not be placed, else empty."""
    if type(failure).__name__ != ray_private.NO_ROOM:
        return ""
    return (
        f"the cluster had no room for {config.cluster.workers} workers within {start_seconds(config):g} s "
        f"(tries: {config.cluster.retries + 1}): free CPUs or GPUs, or lower cluster.workers or cluster.min_workers"
    )


def _trainer(config: Config, directory: Path, function: Callable[[T], None], payload: T) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = config.cluster
    workers: Any = settings.workers
    if 0 < settings.min_workers < settings.workers:
        workers = (settings.min_workers, settings.workers)
    trainer = TorchTrainer(
        function,
        train_loop_config=payload,
        torch_config=_no_backend(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, **({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=settings.retries, controller_failure_limit=settings.retries),
            callbacks=[_failure_log(directory)],
        ),
    )
    # Each helper costs a process and a second of the start. There are no datasets to manage, and a cluster that ends with
    # this process needs no clean-up.
    idle = {ray_private.IDLE, ray_private.CLEANER} if _starts_local(config) else {ray_private.IDLE}
    ray_private.leave_out_callbacks(trainer, idle)
    return trainer


def _no_backend() -> Any:
    """Leave out Ray's set-up of torch.distributed: its store listens on every interface, and it would import torch in the
    controller. The workers connect with each other by `broadcast`.
    """
    from ray.train.backend import BackendConfig

    class NoBackend(BackendConfig):  # type: ignore[misc]
        backend = "gloo"

    return NoBackend()


def _failure_log(directory: Path) -> Any:
    """A callback of Ray Train's controller that writes each failure of the workers into `failures.jsonl`.

    A user's mistake would occur again: it is raised here, since an error in a callback ends the run without a retry.
    """
    from ray.train import UserCallback

    class FailureLog(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            for rank, error in worker_exceptions.items():
                if isinstance(error, UserError):
                    raise UserError(f"{error} (reported by rank {rank})")
            record_failure(directory, {rank: one_line(error) for rank, error in worker_exceptions.items()})

    return FailureLog()


class Failure(TypedDict):
    """A line of failures.jsonl: the error of each rank."""

    time: float
    ranks: dict[str, str]


def record_failure(directory: Path, by_rank: Mapping[int, str]) -> None:
    """Append one line with the error of each rank."""
    ranks = {str(rank): text for rank, text in by_rank.items()}
    failure: Failure = {"time": round(time.time(), 3), "ranks": ranks}
    append_line(directory / "failures.jsonl", failure)


def failures(directory: Path) -> list[Failure]:
    """Failures so far, oldest first."""
    return read_lines(directory / "failures.jsonl", Failure)


def append_line(path: Path, values: Mapping[str, object]) -> None:
    """Append one JSON line to a file that several processes write and read."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path, shape: type[T]) -> list[T]:
    """The JSON lines of a file, without a line that is still being written; empty if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = (line for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return [records.parse(line, shape, str(path)) for line in lines]


def first_cause(found: Sequence[Failure]) -> str:
    """The first rank that failed, and its error.

    When a worker dies the connections of its peers break: their errors come last.
    """
    if not found:
        return ""
    ranks = found[-1]["ranks"]
    echoes = (
        "gloo", "Connection closed by peer", "Connection reset", "NCCL", "Timed out waiting", "Broken pipe",
        "/src/collective/",  # a file of XGBoost
    )  # fmt: skip
    order = sorted(ranks, key=lambda rank: (any(word in ranks[rank] for word in echoes), int(rank)))
    return f"rank {order[0]}: {ranks[order[0]]}"


def one_line(error: BaseException) -> str:
    """The useful line of an error, which Ray may have wrapped; of a UserError, its whole message."""
    cause = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error
    text = str(cause)
    if "actor died" in text or "ActorDied" in type(cause).__name__:
        place = re.search(r"node_ip='([^']+)', pid=(\d+)", text)
        return "its process died" + (f" (pid {place.group(2)} on {place.group(1)})" if place else "")
    silent = re.search(r"hanging for ([\d.]+) seconds", text)
    if silent:
        return f"did not answer for {silent.group(1)} seconds (cluster.timeout)"
    shown = " ".join(text.split())
    if isinstance(cause, UserError):
        return shown
    last = text.rstrip().rpartition("\n")[2].strip()
    return f"{type(cause).__name__}: {last if 'Traceback' in text else shown}"[:400]


# ----------------------------------------------------------------------------------------------- inside a worker


@dataclass(frozen=True)
class WorkerPlace:
    """A worker's rank, the numbers of workers, and its address."""

    rank: int
    world: int
    local_world: int
    address: str


def worker_place() -> WorkerPlace:
    """The worker's rank and neighbours; only inside `run_training`'s function."""
    import ray
    from ray.train import get_context

    context = get_context()
    address = ray.util.get_node_ip_address()
    return WorkerPlace(context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), address)


def broadcast(value: Any) -> Any:
    """Send a small value of rank 0 to every rank; only inside `run_training`'s function."""
    from ray.train.collective import broadcast_from_rank_zero

    return broadcast_from_rank_zero(value)


class WorkerMetrics:
    """The run's metrics as Prometheus gauges of Ray's metrics endpoint. Errors are ignored."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Export `train/rows_per_second` as `engine_train_rows_per_second`, and so on."""
        with contextlib.suppress(Exception):
            from ray.util.metrics import Gauge

            for name, value in values.items():
                if name not in self._gauges:
                    plain = "engine_" + name.replace("/", "_").replace("@", "_")
                    self._gauges[name] = Gauge(plain, description=name, tag_keys=("run",))
                self._gauges[name].set(float(value), tags={"run": self._run})
