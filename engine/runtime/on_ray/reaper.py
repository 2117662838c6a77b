"""Ends the processes of a local Ray cluster when the process that started it is gone, and records its run as failed.

Run as a program of its own (it imports nothing of the engine): `python reaper.py OWNER LOCAL RUN`, with a pipe as standard
input that closes when the owner (a process id) dies; before it leaves in good order it writes a word there. Ray's own agents
outlive a driver that was killed by some minutes, and Ray ends a driver that has lost its GCS or raylet, with nothing
recorded. Only processes are touched that name the owner's session directory (Ray has the owner's id in it), and their
children, and only those that are still the same (start time) when it comes to it.
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
    """The cluster's processes: those that name its session directory, those known before, and their children."""
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
    """Have run.json of a run whose process is gone say `failed`, unless it says how it ended or another process has taken it
    up; and say so.
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
        f"error: {said}. Run the command again: it goes on from what is done. Run directory: {directory}\n"
    )


def main(owner: int, local: bool, directory: str) -> None:
    """Watch until standard input closes, give the cluster a moment to end by itself, then end it."""
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
