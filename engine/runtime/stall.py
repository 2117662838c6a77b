"""Calls that may never return, and what is left of them when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NoAnswer(Exception):
    """A call that has not come back in its time."""


def bounded(call: Callable[[], T], seconds: float, name: str) -> T:
    """What `call()` returns or raises, in a thread of its own; NoAnswer after `seconds`, and the thread is left alone.

    No thread can be ended from outside, but this one does not keep the process from ending.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # raised again below
            raised.append(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise NoAnswer(f"{name}: no answer in {seconds:g} s")
    return found[0]
