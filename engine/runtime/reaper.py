"""Ends the processes of a local Ray cluster when the process that started it is gone, however that went.

Run as a program of its own (it imports nothing of the engine): `python reaper.py SESSION_DIR`, with a pipe as standard
input that closes when the owner dies. Ray's own agents outlive a driver that was killed by some minutes. Only processes
are touched that name the cluster's session directory, and their children, and only those that are still the same (start
time) when it comes to it.
"""

from __future__ import annotations

import contextlib
import os
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


def members(session: str, known: Known) -> Known:
    """The cluster's processes: those that name its session directory, those known before, and their children."""
    alive = processes()
    found = {pid: start for pid, start in known.items() if alive.get(pid, (0, ""))[1] == start}
    for pid, (_, start) in alive.items():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and session.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = start
    grown = True
    while grown:
        children = {pid: start for pid, (parent, start) in alive.items() if parent in found and pid not in found}
        found |= children
        grown = bool(children)
    found.pop(os.getpid(), None)
    return found


def main(session: str) -> None:
    """Watch until standard input closes, give the cluster a moment to end by itself, then end it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: Known = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        known = members(session, known)
    end = time.monotonic() + GRACE_SECONDS
    while (known := members(session, known)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in known:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
