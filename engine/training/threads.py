"""Thread teams for independent pieces of work, each on one core, with torch limited to one thread.

Threads take pieces in any order; a piece writes only its own memory, so the result is deterministic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch

from engine.config.tree import Config
from engine.runtime import environment


def compute_threads(config: Config) -> int:
    """cluster.threads, else resources.threads, else the cores of this process."""
    return config.cluster.threads or environment.threads_of(config)


class Team:
    """`with Team(2) as team: team.run(work, 8)` calls work(0) .. work(7) on two threads, the caller being one of
    them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(threads, 1)

    def __enter__(self) -> Team:
        self._outer = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = (
            ThreadPoolExecutor(self.threads - 1, "engine", initializer=torch.set_num_threads, initargs=(1,))
            if self.threads > 1
            else None
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._outer)

    def run(self, work: Callable[[int], None], count: int) -> None:
        """Call work(i) for every i in range(count); raises the first error after all threads have stopped."""
        ticket = itertools.count()  # next() is one step under the interpreter lock

        def share() -> None:
            for index in iter(ticket.__next__, None):
                if index >= count:
                    return
                work(index)

        helpers = min(self.threads, count) - 1
        futures = [self._pool.submit(share) for _ in range(helpers)] if self._pool is not None else []
        try:
            share()
        finally:
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
