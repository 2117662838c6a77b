"""Work units over workers: threads of this process, or a Ray Data pool of actors. The second and smaller door to Ray.

A pool calls `work(item)` for every item and yields an Outcome for each, in order of completion. An item that raises or
kills its worker `tries` times is given up with its cause; the others go on. Items and results are small JSON values.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from engine.config.tree import ClusterConfig
from engine.errors import UserError
from engine.runtime import environment

Item = dict[str, Any]
Work = Callable[[Item], dict[str, Any]]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Outcome:
    """What an item came to: its result, or after the last try none and the cause."""

    item: Item
    result: dict[str, Any] | None
    tries: int
    cause: str = ""


def run_threads(
    work: Work, items: Sequence[Item], threads: int, tries: int, prepare: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Items on threads of this process; `prepare` is called once in each. Raises what no retry can mend at once."""
    stop = threading.Event()

    def attempt(item: Item) -> Outcome:
        cause = ""
        for number in range(1, tries + 1):
            if stop.is_set():
                break
            try:
                return Outcome(item, work(item), number)
            except Exception as error:
                if is_hopeless(error):
                    raise
                cause = describe(error)
        return Outcome(item, None, tries, cause)

    with ThreadPoolExecutor(threads, "unit", initializer=prepare) as executor:
        waiting = iter(items)
        # No more in flight than threads: what is queued costs nothing, and a stop takes no longer than a unit.
        flying: set[Future[Outcome]] = {executor.submit(attempt, item) for item in itertools.islice(waiting, threads)}
        try:
            while flying:
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    if (item := next(waiting, None)) is not None:
                        flying.add(executor.submit(attempt, item))
                    yield outcome
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


def is_hopeless(error: BaseException | None) -> bool:
    """Whether another try cannot help any unit: the disk is full or may not be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


def describe(error: BaseException) -> str:
    """One line that says what was raised."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


# -------------------------------------------------------------------------------------------------------------- Ray


def run_actors(
    make: Callable[[], Work], items: Sequence[Item], cluster: ClusterConfig, threads: int, tries: int
) -> Iterator[Outcome]:
    """Items on a pool of Ray Data actors that grows from one to `cluster.workers`; each calls `make` once.

    Ray must be running. An actor holds one item at a time, so that its death costs no other; Ray starts it again. What is
    missing when the rest is done was in an actor that died: it has lost a try and goes into the next round.
    """
    lost = {json.dumps(item): 0 for item in items}
    causes: dict[str, str] = {}
    while lost:
        for reply in _round(make, list(lost), cluster, threads):
            key, failed = reply["item"], reply["result"] == ""
            if reply["hopeless"]:
                raise UserError(reply["cause"])
            if not failed:
                yield Outcome(json.loads(key), json.loads(reply["result"]), lost.pop(key) + 1)
                continue
            causes[key] = reply["cause"]
        for key in list(lost):
            lost[key] += 1
            if lost[key] >= tries:
                cause = causes.get(key, "its worker died (killed, out of memory, or its node lost)")
                yield Outcome(json.loads(key), None, lost.pop(key), cause)


def _round(make: Callable[[], Work], keys: list[str], cluster: ClusterConfig, threads: int) -> Iterator[dict[str, Any]]:
    """Replies of one pass over the items, in order of completion; an item whose actor dies has none."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = max(1, min(cluster.workers, len(keys)))
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=1)
    rows = ray.data.from_items([{"item": key} for key in keys], override_num_blocks=len(keys)).map(
        _Actor,
        fn_constructor_args=(make, threads),
        compute=pool,
        num_cpus=threads,
        num_gpus=cluster.gpus_per_worker or None,
        max_restarts=-1,
        max_task_retries=0,
    )
    yield from rows.iter_rows()


class _Actor:
    """What runs in a Ray actor: errors become replies, so that only a death loses one."""

    def __init__(self, make: Callable[[], Work], threads: int) -> None:
        environment.set_threads(threads)
        self.work = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        reply = {"item": row["item"], "result": "", "cause": "", "hopeless": False}
        try:
            return {**reply, "result": json.dumps(self.work(json.loads(row["item"])))}
        except Exception as error:
            return {**reply, "cause": describe(error), "hopeless": is_hopeless(error)}


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, threads: int) -> Iterator[float]:
    """Ray while the block runs; yields the seconds that its start took. A cluster that we joined goes on afterwards."""
    import ray

    began = time.monotonic()
    running = ray.is_initialized()
    if not running:
        _start(ray, cluster, threads)
    try:
        yield time.monotonic() - began
    finally:
        if not running:
            ray.shutdown()


def _start(ray: Any, cluster: ClusterConfig, threads: int) -> None:
    variables = {"NUMBA_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": variables},
    }
    if cluster.address is not None or "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ:
        variables.pop("PYTHONPATH")
        ray.init(address=cluster.address or "auto", **options)
    else:
        # By default Ray would join whatever was started last on this machine.
        cores = max(environment.cores(), cluster.workers * threads + 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, _node_ip_address="127.0.0.1", **options)
