"""Months of a view over the workers of a Ray cluster: a worker computes a share and writes its files where the driver looks.

A month's values depend on the dataset alone, so it does not matter who made them, nor what else they made. A worker reads the
history that its months need from the store; rows travel in files only, and no worker waits for another.
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.config import units
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import cluster, environment, pool, storage

Share = Callable[[Any], Any]  # JSON values in and out


def run_shares(
    config: Config, shares: list[Any], make: Callable[[Config], Share], folder: Path, what: str
) -> Iterator[Any]:
    """What `make(config)` makes of each share, in order of completion, by `cluster.workers` Ray actors.

    shares: JSON values. `make` gets the config of a worker: its threads and its memory. Raises UserError where a worker
    does, where a node does not see `folder`, and where workers keep dying.
    """
    marks = folder.with_name(f".tries.{uuid.uuid4().hex[:8]}.tmp")
    storage.make_folder(marks)
    try:
        with cluster.session(config) as session:
            cluster.check_shared(session, [folder])
            mine = worker_config(config, session.local)
            cpus = 1 if session.local else mine.resources.threads
            actors = pool.Actors(config.cluster.workers, cpus=cpus, patience=cluster.timeout_seconds(config))
            # The closing over `mine` happens here, for only the session knows whether workers share this machine.
            start = _Start(make, mine)
            for outcome in pool.run_actors(start, shares, actors, config.cluster.retries + 1, marks.absolute()):
                if outcome.result is None:
                    raise UserError(f"{what} could not be computed in {outcome.tries} tries: {outcome.cause}")
                if outcome.result["error"]:
                    raise UserError(outcome.result["error"])
                yield outcome.result["value"]
    finally:
        shutil.rmtree(marks, ignore_errors=True)


def worker_config(config: Config, local: bool) -> Config:
    """The config of one worker: cores and memory of this machine are shared out; another machine has its own."""
    workers = config.cluster.workers
    here = max(1, (config.resources.threads or environment.cores()) // workers) if local else 1
    memory = units.size(config.resources.memory) // (workers if local else 1)
    resources = dataclasses.replace(
        config.resources, threads=config.cluster.threads or here, memory=str(max(memory, 1))
    )
    return dataclasses.replace(config, resources=resources)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What an actor calls once."""

    make: Callable[[Config], Share]
    config: Config

    def __call__(self) -> pool.Work:
        return _Answer(self.make(self.config))


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Another try does not mend what a UserError says, so it is a reply like any other."""

    work: Share

    def __call__(self, share: Any) -> dict[str, Any]:
        try:
            return {"value": self.work(share), "error": None}
        except UserError as error:
            return {"value": None, "error": str(error)}
