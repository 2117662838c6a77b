"""Ends the processes of a local Ray cluster when the process that started it is gone, and records its run as failed.

Run as a separate program (it imports nothing of the engine): `python reaper.py OWNER LOCAL RUN`, with a pipe as standard
input that closes when the owner (a process id) dies; before a normal exit the owner writes a word there. Ray's agents
outlive a killed driver by some minutes, and Ray ends a driver that has lost its GCS or raylet without a record. Only
processes whose command line has the owner's session directory (which contains the owner's id) are killed, with their
children, and only if they are still the same processes (start time).
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

LOOK_SECONDS = 1.0
GRACE_SECONDS = 3.0
Known = dict[int, str]


def processes() -> dict[int, tuple[int, str]]:
    """Process -> (parent, start time)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                if words[0] != "Z":
                    found[int(entry.name)] = (int(words[1]), words[19])
    return found


def members(owner: int, known: Known) -> Known:
    """The cluster's processes: those with its session directory in the command line, known ones, and their children."""
    session = re.compile(rb"/session_[0-9_-]+_%d(?![0-9_-])" % owner)
    alive = processes()
    found = {pid: start for pid, start in known.items() if alive.get(pid, (0, ""))[1] == start}
    for pid, (_, start) in alive.items():
        with contextlib.suppress(OSError):
            if pid not in (os.getpid(), owner) and session.search(Path(f"/proc/{pid}/cmdline").read_bytes()):
                found[pid] = start
    grown = True
    while grown:
        children = {pid: start for pid, (parent, start) in alive.items() if parent in found and pid not in found}
        found |= children
        grown = bool(children)
    found.pop(os.getpid(), None)
    return found


def record(directory: Path, owner: int) -> None:
    """Set the status of a run whose process is gone to `failed`, with a message, unless run.json records its end or another
    process has resumed it.
    """
    with open(directory / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        if run["status"] != "running" or run["pid"] != owner:
            return
        said = "the process of the command was killed, or Ray ended it because it had lost its GCS or raylet"
        ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        run.update(status="failed", error=said, ended=ended)
        temporary = directory / f".run.json.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, directory / "run.json")
    sys.stderr.write(
        f"error: {said}. Run the command again: it continues from finished work. Run directory: {directory}\n"
    )


def main(owner: int, local: bool, directory: str) -> None:
    """Wait until standard input closes, give the cluster a few seconds to end by itself, then kill it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: Known = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        known = members(owner, known) if local else {}
    if not sys.stdin.buffer.read() and directory:
        with contextlib.suppress(OSError, ValueError, KeyError):
            record(Path(directory), owner)
    end = time.monotonic() + GRACE_SECONDS
    while local and (known := members(owner, known)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in known:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3])
