"""Finds what a function of a user's own reads besides its arguments: the clock, random numbers, files, the network.

Only what it reads while it is watched is found, and only calls that Python reports: those of C functions, such as `time.time`,
and draws from numpy's own generator.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
MODULES = ("time", "_socket")  # every function of them
FUNCTIONS = {
    ("posix", "urandom"), ("posix", "getpid"), ("posix", "listdir"), ("posix", "stat"), ("io", "open"), ("_io", "open"),
    ("builtins", "input"),
}  # fmt: skip
METHODS = ("Random.", "datetime.now", "datetime.today", "datetime.utcnow", "date.today")
COMPILER = str(Path("numba") / "core")
OWN = {
    ("builtins", "id"),
    ("builtins", "hash"),
}  # where the watched code itself calls them: libraries use them without harm


def watched(work: Callable[[], T], file: str | None = None) -> tuple[T, list[str]]:
    """(what `work` gives, names of what it called that gives other values another time), sorted.

    `file`: the file of the watched code as its frames have it. Call `work` once before: what it imports reads files.
    """
    found: set[str] = set()

    def told(frame: FrameType, event: str, called: Any) -> None:
        place = frame.f_code.co_filename
        if event != "c_call" or place.startswith("<frozen importlib") or place.endswith("linecache.py"):
            return  # linecache shows warnings
        module, name = getattr(called, "__module__", None), str(getattr(called, "__qualname__", ""))
        own = (module, name) in OWN and place == file
        told_of = (
            own or module in MODULES or (module, name) in FUNCTIONS or (module is None and name.startswith(METHODS))
        )
        if told_of and not _compiles(frame):
            found.add(f"{module}.{name}" if module else name)

    before, state, collecting = sys.getprofile(), _numpy_state(), gc.isenabled()
    gc.disable()  # what a collection calls, such as finalizers of other objects, is not the code's own
    sys.setprofile(told)
    try:
        answer = work()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    if _numpy_state() != state:
        found.add("numpy.random")
    return answer, sorted(found)


def _compiles(frame: FrameType | None) -> bool:
    """Whether Numba's compiler is at work, which looks at the clock and at files: the first call of a kernel in a process."""
    while frame is not None:
        if COMPILER in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _numpy_state() -> Any:
    _, keys, *rest = np.random.get_state()
    return np.asarray(keys).tobytes(), *rest
