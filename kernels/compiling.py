"""How long this process has compiled kernels, for whoever estimates how long work will take. Numba is not imported here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_lock = threading.Lock()
_depth = 0  # compilations that are under way: a kernel compiles those that it calls inside its own
_began = 0.0
_spent = 0.0
listeners: list[Callable[[], None]] = []  # called when a compilation begins


def seconds() -> float:
    """Seconds in which a kernel was being compiled, up to now. What the cache holds is loaded, not compiled."""
    with _lock:
        return _spent + (time.monotonic() - _began if _depth else 0.0)


def active() -> bool:
    """Whether a kernel is being compiled now."""
    return _depth > 0


def begin() -> None:
    """A compilation begins."""
    global _depth, _began
    with _lock:
        if not _depth:
            _began = time.monotonic()
        _depth += 1
    for listener in list(listeners):
        listener()


def end() -> None:
    """A compilation has ended."""
    global _depth, _spent
    with _lock:
        _depth -= 1
        if not _depth:
            _spent += time.monotonic() - _began
