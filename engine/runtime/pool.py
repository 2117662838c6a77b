"""Work units over workers: threads of this process, or a Ray Data pool of actors. The second and smaller door to Ray.

A pool calls `work(item)` for every item and yields an Outcome for each, in order of completion. An item that raises or
kills its worker `tries` times is given up with its cause; the others go on. Items and results are small JSON values.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError

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
