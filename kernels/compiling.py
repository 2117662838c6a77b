"""How long this process has spent compiling kernels, for estimates of remaining time. Does not import Numba."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_lock = threading.Lock()
_depth = 0  # compilations in progress: compiling a kernel also compiles the kernels that it calls
_began = 0.0
_spent = 0.0
listeners: list[Callable[[], None]] = []  # called when a compilation begins


def seconds() -> float:
    """Seconds spent compiling kernels so far. Kernels loaded from the cache do not count."""
    with _lock:
        return _spent + (time.monotonic() - _began if _depth else 0.0)


def active() -> bool:
    """Whether a kernel is being compiled now."""
    return _depth > 0


def begin() -> None:
    """Record that a compilation begins."""
    global _depth, _began
    with _lock:
        if not _depth:
            _began = time.monotonic()
        _depth += 1
    for listener in list(listeners):
        listener()


def end() -> None:
    """Record that a compilation has ended."""
    global _depth, _spent
    with _lock:
        _depth -= 1
        if not _depth:
            _spent += time.monotonic() - _began
