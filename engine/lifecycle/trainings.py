"""Training runs that a command needs: found by their content, continued where they stopped, or new; one, or many on Ray."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import schema
from engine.config.nested import Tree
from engine.config.sections.runtime import ClusterConfig
from engine.config.tree import Config
from engine.runtime import environment, tracking
from engine.runtime.on_ray import cluster, pool
from engine.runtime.resume import unfinished
from engine.runtime.run import Run, RunRecord, load_record, plan_digest
from engine.training.train import train


@dataclass(frozen=True)
class Training:
    """A finished training run and its record."""

    directory: Path
    record: RunRecord

    @property
    def bundle(self) -> Path:
        """The model."""
        return self.directory / "model"


def trained(config: Config, parent: Run | None, dataset: str, hidden: tuple[str, ...] = ()) -> Training:
    """A finished training run of this config on a dataset (its digest): found by content, resumed, or new.

    The secrets of the parent, or `hidden` where it is in another process, are never written.
    """
    found = _finished(config, dataset)
    if found is not None:
        _say(parent, f"challenger: {found.directory} was trained on the same rows with the same settings and code")
        return found
    begun, secrets = unfinished("train", config), parent.hidden if parent is not None else hidden
    if begun is not None:
        run = Run.resume(begun, secrets)
    else:
        run = Run.create("train", config, schema.plain(config), hidden=secrets)
    if parent is not None:
        run.note(parent=str(parent.directory))
    tracker = tracking.start(config.tracking, run)
    try:
        run.finish(train(config, run))
    except BaseException as error:
        run.fail(error, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    finally:
        tracker.stop()
    return Training(run.directory, run.record)


def _finished(config: Config, dataset: str) -> Training | None:
    """The newest finished training run of this plan, dataset and code."""
    plan, code = plan_digest("train", config), environment.code()["engine_digest"]
    folder = Path(config.paths.runs) / "train" / config.name
    for done in sorted(folder.glob("*-*/DONE"), reverse=True):
        record = load_record(done.parent)
        if (record["plan"], record["chain"].get("dataset"), record["code"]["engine_digest"]) == (plan, dataset, code):
            return Training(done.parent, record)
    return None


def _say(run: Run | None, message: str) -> None:
    if run is not None:
        run.log(message)


def in_process(config: Config) -> Config:
    """The config with one worker in this process: many small trainings run in parallel, each in one process."""
    return dataclasses.replace(config, cluster=schema.build(ClusterConfig, {}, "cluster"))


class TrainOne:
    """Trains one plan in a Ray actor; the caller finds the training run by its content."""

    def __init__(self, dataset: str, hidden: tuple[str, ...], threads: int) -> None:
        self.dataset, self.hidden, self.threads = dataset, hidden, threads

    def __call__(self, item: Tree) -> dict[str, Any]:
        """Train; return the run directory."""
        return {"run": str(trained(self.config(item), None, self.dataset, self.hidden).directory)}

    def config(self, item: Tree) -> Config:
        """The config of an item, with the threads of this worker."""
        config = schema.build(Config, item)
        return dataclasses.replace(config, resources=dataclasses.replace(config.resources, threads=self.threads))


def trained_on_ray(
    config: Config, run: Run, items: Sequence[Tree], work: Callable[..., Callable[[Tree], dict[str, Any]]]
) -> Iterator[pool.Outcome[Tree, dict[str, Any]]]:
    """Outcomes of items on Ray actors of the config's cluster, as they finish; each actor makes `work(threads=...)` once."""
    marks = run.path("tries")
    shutil.rmtree(marks, ignore_errors=True)
    marks.mkdir()
    with cluster.session(config) as session:
        cluster.check_shared(session, [run.directory, Path(config.paths.store)])
        mine, actors = pool.actors_for(config, session.local, config.cluster.gpus_per_worker)
        make = functools.partial(work, threads=mine.resources.threads)
        yield from pool.run_actors(make, items, actors, 1 + config.cluster.retries, marks)
