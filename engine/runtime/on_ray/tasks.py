"""Shares of a step on the workers of a Ray cluster: JSON values in and out, rows in files that the driver reads.

A share's result must not depend on the worker or on its other shares; no worker waits for another.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import storage
from engine.runtime.on_ray import cluster, pool

Share = Callable[[Any], Any]  # JSON values in and out


class Workers:
    """`with Workers(config) as workers: workers.run(...)`: the cluster starts at the first run and ends with the block."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._open = contextlib.ExitStack()
        self._session: cluster.Session | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def run(
        self, shares: list[Any], make: Callable[[Config], Share], folder: Path, failure: Callable[[Any], str]
    ) -> Iterator[Any]:
        """The results of `make(config)(share)` for each share, in order of completion, on `cluster.workers` Ray actors.

        shares: JSON values. `make` gets the config of a worker: its threads and its memory. `failure` gives the message for a
        failed share. Raises UserError if a worker does, if a node does not share `folder`, and if workers keep dying.
        """
        if self._session is None:
            self._session = self._open.enter_context(cluster.session(self._config))
        cluster.check_shared(self._session, [folder])
        mine, actors = pool.actors_for(self._config, self._session.local)
        tries = self._config.cluster.retries + 1
        marks = folder.absolute().with_name(f".tries.{uuid.uuid4().hex[:8]}.tmp")
        storage.make_folder(marks)
        try:
            for outcome in pool.run_actors(_Start(make, mine), shares, actors, tries, marks):
                if outcome.result is None:
                    raise UserError(f"{failure(outcome.item)} in {outcome.tries} tries: {outcome.cause}")
                if outcome.result["error"]:
                    raise UserError(outcome.result["error"])
                yield outcome.result["value"]
        finally:
            storage.remove(marks, marks.parent)  # at once: actors may still write there


@dataclass(frozen=True)
class _Start:
    """The start of an actor."""

    make: Callable[[Config], Share]
    config: Config

    def __call__(self) -> Callable[[Any], Answer]:
        return _Answering(self.make(self.config))


class Answer(TypedDict):
    """The value of a share, or the message of a UserError."""

    value: Any
    error: str | None


@dataclass(frozen=True)
class _Answering:
    """The work of an actor. A UserError is a reply like any other, since retries would not help."""

    work: Share

    def __call__(self, share: Any) -> Answer:
        try:
            return {"value": self.work(share), "error": None}
        except UserError as error:
            return {"value": None, "error": str(error)}
