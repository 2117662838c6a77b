"""Timeouts: calls that may never return, heartbeats of workers, and the limit of all waits, `cluster.stall`.

Progress is a returned result, or CPU time used by a worker that has work. A worker without a sign of life for
`cluster.timeout` is killed and its work given to others; without any progress for `cluster.stall` the command ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypedDict, TypeVar

from engine.errors import UserError

T = TypeVar("T")
BEAT_SECONDS = 0.5
END_SECONDS = 5.0


class Stalled(UserError):
    """There was no progress for `cluster.stall`."""


class NoAnswer(Exception):
    """A call did not return in time."""


def bounded(
    call: Callable[[], T],
    seconds: float,
    name: str,
    look: Callable[[], None] = lambda: None,
    until: threading.Event | None = None,
) -> T:
    """The result or error of `call()`, which runs in a new thread; NoAnswer after `seconds`, while the thread still runs.

    A thread cannot be ended from outside, but a daemon thread does not keep the process alive. `look` is called meanwhile and
    may raise. With `until` the thread lives until that event.
    """
    found: list[T] = []
    raised: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # raised again below
            raised.append(error)
        done.set()
        if until is not None:
            until.wait()

    threading.Thread(target=work, name=name, daemon=True).start()
    end = time.monotonic() + seconds
    while not done.wait(max(min(end - time.monotonic(), BEAT_SECONDS), 0)) and time.monotonic() < end:
        look()
    if raised:
        raise raised[0]
    if not found:
        raise NoAnswer(f"{name}: no answer in {seconds:g} s")
    return found[0]


# --------------------------------------------------------------------------------------- heartbeats of workers


BUSY = 0.02  # CPU seconds per second above which a process is working; an idle Ray process uses about a tenth of it


class Idle:
    """How long this process has used no CPU time."""

    def __init__(self) -> None:
        self._used, self._since = time.process_time(), time.monotonic()

    def seconds(self) -> float:
        """Seconds since it last used a noticeable amount of CPU time."""
        used, now = time.process_time(), time.monotonic()
        if used - self._used > BUSY / 2 * (now - self._since) + 0.05:
            self._used, self._since = used, now
        return now - self._since


class Process(TypedDict):
    """A worker process: `began` distinguishes processes with the same id."""

    node: str
    host: str
    pid: int
    began: str


class Beat(Process):
    """A worker's file: its current work, and its counts of beats and of beats with work."""

    at: str | None
    alive: int
    worked: int


class Beats:
    """A worker's heartbeat: a file in `folder`, written twice a second, with counts of beats and of beats with work.

    A process that is stopped, or stuck in the kernel, no longer changes its file; one that waits for ever beats without
    work. `at` describes its current work, None = idle.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self.at: str | None = "its start"
        self._path = folder / f"beat.{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._alive = self._worked = 0
        self._place: Process = {
            "node": node,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": began(os.getpid()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        used, then = time.process_time(), time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            now_used, now = time.process_time(), time.monotonic()
            self._alive += 1
            self._worked += self.at is not None and now_used - used > BUSY * (now - then)
            used, then = now_used, now
            self._write()

    def _write(self) -> None:
        seen: Beat = {**self._place, "at": self.at, "alive": self._alive, "worked": self._worked}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with contextlib.suppress(OSError):  # a missing beat does not stop the work
            temporary.write_text(json.dumps(seen), encoding="utf-8")
            os.replace(temporary, self._path)

    def end(self) -> None:
        """Stop the heartbeat, because the work is done."""
        self._ended.set()
        self._thread.join(END_SECONDS)  # or it would write its file once more
        self._path.unlink(missing_ok=True)


def began(pid: int) -> str:
    """Start time of a process in ticks of its machine, which distinguishes processes with the same id. Empty without /proc."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@dataclass
class Seen:
    """A worker as read from its file; `since`: time of the last change (monotonic seconds of this process)."""

    facts: Beat
    since: float

    def __str__(self) -> str:
        at = f", at {self.facts['at']}," if self.facts["at"] else ""
        return f"worker process {self.facts['pid']} on {self.facts['host']}{at}"


class Watch:
    """The driver's side of a wait: call `look()` regularly and `progress()` when a result has arrived.

    span: seconds without any progress (a result, or work by a worker) after which `look` raises Stalled. patience: seconds
    after which a worker whose file does not change is passed to `give_up`, once. folder: folder of the workers' files. start:
    seconds that the first worker, or a replacement, may take to start.
    detail: further facts for the message of Stalled.
    """

    def __init__(
        self,
        span: float,
        folder: Path,
        patience: float = math.inf,
        give_up: Callable[[Seen], None] = lambda _: None,
        detail: Callable[[], Sequence[str]] = tuple,
        start: float = 0,
    ) -> None:
        self._start = start
        self._span, self._folder, self._patience = span, folder, patience
        self._give_up, self._detail = give_up, detail
        self._seen: dict[str, Seen] = {}
        self._given: set[str] = set()
        self._last = time.monotonic()
        self._looked = -math.inf

    def progress(self) -> None:
        """A result has arrived."""
        self._last = time.monotonic()

    def look(self) -> None:
        """Read the workers' files. Raises Stalled."""
        now = time.monotonic()
        if now - self._looked < BEAT_SECONDS:
            return
        if now - self._looked > self._patience / 2 and self._looked > 0:  # this process itself was held up
            for seen in self._seen.values():
                seen.since = now
        self._looked = now
        found = {path.name: path for path in self._folder.glob("beat.*")}
        self._seen = {name: seen for name, seen in self._seen.items() if name in found}
        for name, path in found.items():
            with contextlib.suppress(OSError, ValueError):
                self._note(name, json.loads(path.read_text(encoding="utf-8")), now)
        for name, seen in [item for item in self._seen.items() if item[0] not in self._given]:
            if now - seen.since > self._patience:
                self._given.add(name)
                self._give_up(seen)
        # Without a worker, wait at least as long as a busy machine takes to start one.
        if now - self._last > (self._span if self._seen.keys() - self._given else max(self._span, self._start)):
            raise Stalled(self._said(now))

    def _note(self, name: str, facts: Beat, now: float) -> None:
        before = self._seen.get(name)
        if before is None or facts["worked"] > before.facts["worked"]:
            self._last = now
        if before is None or facts != before.facts:
            self._seen[name] = Seen(facts, now)

    def _said(self, now: float) -> str:
        silent = [seen for seen in self._seen.values() if now - seen.since > 4 * BEAT_SECONDS]
        idle = [seen for seen in self._seen.values() if seen not in silent and seen.facts["at"]]
        parts = [
            *(f"{seen} has not answered for {now - seen.since:.0f} s" for seen in silent),
            *(f"{seen} does nothing but wait" for seen in idle),
            *self._detail(),
        ]
        return (
            f"there was no result and no work by any worker for {now - self._last:.0f} s (cluster.stall): "
            f"{'; '.join(parts) or 'there is no worker, and the cluster starts none'}. Run the command again: it continues "
            "from finished work"
        )


def end_process(pid: int, start: str) -> bool:
    """Kill a process of this machine if it is still the one that began at `start`."""
    if not start or began(pid) != start:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def stopped(roots: Sequence[int]) -> list[str]:
    """Sentences about stopped processes among `roots` and their descendants. Linux only; else empty."""
    found, waiting, known = [], list(roots), set(roots)
    while waiting:
        pid = waiting.pop()
        try:
            words = Path(f"/proc/{pid}/stat").read_text()
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            children = [
                int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()
            ]
        except OSError:
            continue
        if (state := words.rpartition(")")[2].split()[0]) in ("T", "t"):
            found.append(f"{PurePath(name).name or 'process'} (process {pid}) is stopped (state {state})")
        waiting += [child for child in children if child not in known]
        known.update(children)
    return found


# ------------------------------------------------------------------------------------ stuck threads


_left: list[Any] = []


def leave(what: Any = None) -> None:
    """Note that a thread is stuck and cannot be ended: keep `what` until the process exits, which must not wait for it."""
    _left.append(what)


def is_left() -> bool:
    """Whether this process has stuck threads."""
    return bool(_left)
