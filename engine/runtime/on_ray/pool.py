"""Work units on workers: threads of this process, or a Ray Data pool of actors.

A pool calls `work(item)` for every item and yields an Outcome for each, in order of completion. An item that raises or
kills its worker `tries` times gets an Outcome with the cause; the others continue. Items and results are small JSON values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from engine.config import plugins
from engine.config.plugins import Plugin
from engine.config.tree import Config
from engine.config.units import Size
from engine.errors import UserError
from engine.runtime import environment, stall, storage
from engine.runtime.on_ray import cluster

Item = TypeVar("Item")
Result = TypeVar("Result")
DEATH = "killed, out of memory, or its node lost"
POLL_SECONDS = 0.2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """The result of an item, or after the last try None and the cause."""

    item: Item
    result: Result | None
    tries: int
    cause: str = ""


def run_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    tries: int,
    prepare: Callable[[], None] = lambda: None,
    stalled: float = 600,
) -> Iterator[Outcome[Item, Result]]:
    """Run items on threads of this process; `prepare` is called once in each. Raises errors that no retry can fix at once,
    and Stalled when this process has used no CPU time for `stalled` seconds, so that all threads only wait.
    """
    served = _Threads(work, items, tries, prepare)
    servers = [threading.Thread(target=served.serve, name=f"unit_{place}", daemon=True) for place in range(threads)]
    try:
        for server in servers:
            server.start()
        for _ in items:
            yield served.outcome(stalled)
    except stall.Stalled:
        stall.leave()
        servers.clear()
        raise
    finally:
        served.stop.set()  # takes no longer than a unit
        for server in servers:
            server.join()


class _Threads(Generic[Item, Result]):
    """A queue of items for threads, the current item of each thread, and the outcomes."""

    def __init__(
        self, work: Callable[[Item], Result], items: Sequence[Item], tries: int, prepare: Callable[[], None]
    ) -> None:
        self.stop = threading.Event()
        self._work, self._tries, self._prepare = work, tries, prepare
        self._waiting, self._lock = iter(items), threading.Lock()
        self._found: queue.Queue[Outcome[Item, Result] | BaseException] = queue.Queue()
        self._at: dict[int, Item] = {}

    def serve(self) -> None:
        """Work until no item is left."""
        try:
            self._prepare()
            while not self.stop.is_set():
                with self._lock:
                    item = next(self._waiting, None)
                if item is None:
                    return
                self._at[threading.get_ident()] = item
                self._found.put(self._attempt(item))
                del self._at[threading.get_ident()]
        except BaseException as error:  # raised in the caller's thread
            self._found.put(error)

    def _attempt(self, item: Item) -> Outcome[Item, Result]:
        cause = ""
        for number in range(1, self._tries + 1):
            if self.stop.is_set():
                break
            try:
                return Outcome(item, self._work(item), number)
            except Exception as error:
                if is_hopeless(error):
                    raise
                cause = cluster.one_line(error)
        return Outcome(item, None, self._tries, cause)

    def outcome(self, stalled: float) -> Outcome[Item, Result]:
        """The next outcome. Raises errors of `serve`, and Stalled."""
        idle = stall.Idle()
        while True:
            try:
                found = self._found.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (seconds := idle.seconds()) > stalled:
                    at = "; ".join(map(str, self._at.values()))[:400]
                    raise stall.Stalled(
                        f"{len(self._at)} threads did nothing but wait for {seconds:.0f} s (cluster.stall), at {at}. A thread "
                        "cannot be ended, so the command ends. Check the disk or the service that they read, and run it "
                        "again: it continues from finished work"
                    ) from None
                continue
            if isinstance(found, BaseException):
                raise found
            return found


def is_hopeless(error: BaseException | None) -> bool:
    """Whether retries are useless for all units: the disk is full or not writable."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


# -------------------------------------------------------------------------------------------------------------- Ray


class Row(TypedDict):
    """What an actor is sent: the item as JSON."""

    item: str


class Reply(Row):
    """What it returns: the result as JSON, or the cause; `hopeless`: no retry can fix it."""

    result: str
    cause: str
    tries: int
    hopeless: bool


@dataclass(frozen=True)
class Actors:
    """The pool: at most `workers` actors, each with so many CPUs and GPUs of its node.

    `patience`: seconds without a reply after which a lost node is assumed, and seconds without a heartbeat after which an
    actor is killed. `stall`: seconds without any progress after which the pool ends. `ahead`: items that are queued at an
    actor while it works. Ray takes about 0.2 s to send the next one: queue short items, but not long ones, which an idle
    actor could take.
    """

    workers: int
    cpus: float = 1
    gpus: float = 0
    patience: float = 60
    ahead: int = 0
    stall: float = 600


def actors_for(config: Config, local: bool, gpus: float = 0) -> tuple[Config, Actors]:
    """The config of one worker, with its threads and memory, and the pool of `cluster.workers` of them.

    Cores and memory of this machine are divided among workers (`local`); for other machines the config decides.
    """
    workers = config.cluster.workers
    each = workers if local else 1
    cores = environment.threads_of(config) if local else 1
    threads = config.cluster.threads or max(1, cores // each)
    memory = max(1, config.resources.memory.bytes // each)
    mine = dataclasses.replace(config.resources, threads=threads, memory=Size(str(memory)))
    patience, stalled = cluster.timeout_seconds(config), cluster.stall_seconds(config)
    actors = Actors(workers, 1 if local else threads, gpus, patience, stall=stalled)
    return dataclasses.replace(config, resources=mine), actors


def run_actors(
    make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], actors: Actors, tries: int, marks: Path
) -> Iterator[Outcome[Item, Result]]:
    """Items on an autoscaling pool of Ray Data actors; each calls `make` once.

    Ray must be running (cluster.session). Ray restarts a dead actor and sends it its items again, without a limit: so tries
    are counted in files of `marks`, an empty folder that all nodes share, and so are deaths at the start, of which every
    actor may have `tries` in a row. A try begins with the work, so that an item that was only queued at a dead actor has lost
    none. Raises UserError for errors that no retry can fix, and if actors keep failing to start.
    """
    import ray.data

    cluster.check_alive()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = max(1, min(actors.workers, len(items)))
    context.max_consecutive_actor_init_deaths = most * tries  # by an exception; Ray's default is no limit
    texts = [{"item": json.dumps(item)} for item in items]
    given = cluster.answered(
        lambda: ray.data.from_items(texts, override_num_blocks=len(items)), actors.stall, "a place for the items"
    )
    rows = given.map(
        _Actor,
        fn_constructor_args=(make, plugins.held(), tries, str(marks), most * tries, storage.umask()),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=1 + actors.ahead
        ),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus or None,
    )
    for reply in _replies(rows, actors, marks):
        if reply["hopeless"]:
            raise UserError(reply["cause"])
        result = json.loads(reply["result"]) if reply["result"] else None
        yield Outcome(json.loads(reply["item"]), result, reply["tries"], reply["cause"])


def _replies(rows: Any, actors: Actors, marks: Path) -> Iterator[Reply]:
    """Rows of a Ray Dataset in order of completion.

    Raises UserError if actors raise at every start, if a node was lost and there is no reply (Ray waits without a limit for
    room for its actor), if a local cluster has lost its GCS or raylet, and Stalled.
    """
    import ray

    found: queue.Queue[Any] = queue.Queue()

    def pump() -> None:
        try:
            for row in rows.iter_rows():
                found.put(row)
            found.put(None)
        except BaseException as error:  # raised again below
            found.put(error)

    looks = _Looks(actors, marks)
    executor = rows._create_executor()  # made here, since Ray Data gives access to it only after its first reply
    rows._create_executor = lambda: executor
    thread = threading.Thread(target=pump, name="ray-data", daemon=True)
    thread.start()
    try:
        while True:
            try:
                reply = found.get(timeout=POLL_SECONDS)
            except queue.Empty:
                looks.look()
                continue
            looks.replied()
            if isinstance(reply, ray.exceptions.ActorDiedError):  # raised only for deaths at the start
                raise UserError(_no_start(str(reply).strip().splitlines()[-1])) from reply
            if isinstance(reply, BaseException):
                cluster.check_alive()
                raise reply
            if reply is None:
                return
            yield reply
    finally:
        # Ray Data's threads must end before Ray does: a later call would make Ray end this process without a message.
        with contextlib.suppress(stall.NoAnswer):
            stall.bounded(lambda: executor.shutdown(force=True), cluster.SHUTDOWN_SECONDS, "ray-data-end")
        thread.join(cluster.SHUTDOWN_SECONDS)
        if thread.is_alive():
            stall.leave()


class _Looks:
    """Checks while there is no reply: of the local cluster, the actors' heartbeats, and the number of nodes."""

    def __init__(self, actors: Actors, marks: Path) -> None:
        self._patience = actors.patience
        self._watch = cluster.watch(actors.stall, marks, actors.patience)
        self._nodes = self._alive()
        self._last = time.monotonic()

    def _alive(self) -> int | None:
        """Number of living nodes; None if Ray does not answer."""
        import ray

        with contextlib.suppress(stall.NoAnswer):
            return stall.bounded(lambda: sum(bool(node["Alive"]) for node in ray.nodes()), self._patience, "ray-nodes")
        return None

    def replied(self) -> None:
        """A reply has arrived."""
        self._last = time.monotonic()
        self._watch.progress()

    def look(self) -> None:
        """Raises UserError if no more replies can arrive."""
        cluster.check_alive()
        self._watch.look()
        if time.monotonic() - self._last < self._patience:
            return
        self._last = time.monotonic()
        left = self._alive()
        if left is not None and self._nodes is not None and left < self._nodes:
            raise UserError(
                f"{self._nodes - left} of {self._nodes} nodes of the cluster are gone and no unit was finished in "
                f"{self._patience:g} s. Run the command again: it continues from here with the remaining nodes, if "
                "cluster.workers (or cluster.min_workers) fits them"
            )


def _no_start(cause: str) -> str:
    return f"every worker must start, but starts failed repeatedly: {cause}. Fix that and run the command again"


class _Actor:
    """The worker in a Ray actor: an error becomes a reply; a death leaves the mark of a start or of a try.

    `starts`: largest number of marks of starts, including those of actors that are still starting.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Any], Any]],
        code: tuple[Plugin, ...],
        tries: int,
        marks: str,
        starts: int,
        umask: int,
    ) -> None:
        os.umask(umask)  # an existing cluster may have another one
        plugins.add(code)
        self.tries, self.marks = tries, Path(marks)
        self.broken = ""
        self.beats = stall.Beats(self.marks, cluster.node_here())
        if len(list(self.marks.glob("start.*"))) >= starts:
            self.broken = _no_start(f"their processes died ({DEATH})")
            return
        mark = self.marks / f"start.{uuid.uuid4().hex}"
        mark.touch()
        try:
            self.work = make()
        except UserError as error:  # a reply shows it; Ray would hide it in the death of an actor
            self.broken = str(error)
        else:
            for other in self.marks.glob("start.*"):  # a start has succeeded: earlier deaths no longer count
                other.unlink(missing_ok=True)
        finally:
            mark.unlink(missing_ok=True)
            self.beats.at = None

    def __call__(self, row: Row) -> Reply:
        self.beats.at = row["item"][:200]
        try:
            return self._answer(row)
        finally:
            self.beats.at = None

    def _answer(self, row: Row) -> Reply:
        if self.broken:
            return _reply(row, 0, cause=self.broken, hopeless=True)
        cause = f"its worker died: {DEATH}"
        while (number := self._next_try(row["item"])) <= self.tries:
            try:
                return _reply(row, number, result=json.dumps(self.work(json.loads(row["item"]))))
            except Exception as error:
                cause = cluster.one_line(error)
                if is_hopeless(error):
                    return _reply(row, number, cause=cause, hopeless=True)
        return _reply(row, self.tries, cause=cause)

    def _next_try(self, item: str) -> int:
        """1, 2, ... at each call for an item, counted across deaths of actors."""
        stem = hashlib.sha256(item.encode()).hexdigest()[:16]
        for number in range(1, self.tries + 1):
            with contextlib.suppress(FileExistsError), open(self.marks / f"{stem}.{number}", "x"):
                return number
        return self.tries + 1


def _reply(row: Row, tries: int, result: str = "", cause: str = "", hopeless: bool = False) -> Reply:
    return {"item": row["item"], "result": result, "cause": cause, "tries": tries, "hopeless": hopeless}
