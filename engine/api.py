"""The Python API, for programs and notebooks: `run` runs a step as the command line does, `load` opens a model for scoring."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine import commands
from engine.config import compose, secrecy
from engine.config.compose import Composed
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import resume, storage, tracking
from engine.runtime.on_ray import cluster, submit
from engine.runtime.run import Run

if TYPE_CHECKING:
    from engine.scoring.predictor import Predictor


def run(command: str, *overrides: str, config_dir: str | None = None) -> Run:
    """Run one step: `engine.run("train", "+experiment=flights", "train.lr=0.01")`.

    Returns the finished run: `run.directory`, `run.metrics`, `run.record`. Raises UserError for
    mistakes of the caller; any other error has the run directory as a note.
    """
    name, rest = commands.find(command.split())
    if rest or commands.COMMANDS[name].plain:
        raise UserError(f"engine.run takes a step, found {command!r}; use the command line for it")
    return execute(name, compose.compose(overrides, config_dir), ["engine.run", name])


def load(run: str | Path | Run, *, config_dir: str | None = None, trust: str | None = None) -> Predictor:
    """The predictor of a training run: its directory, the Run, or `NAME@champion` of the registry in `runs/`.

    `config_dir` is that of `engine.run`: the registry is in its folder of runs. A model that carries code of another store is
    loaded with `trust`, the digest that the refusal names; a Run is this program's own.
    `load(run).predict(events, history, tables)`: see Predictor.predict.
    """
    directory = run.directory if isinstance(run, Run) else Path(run)
    config = compose.compose((), config_dir).config if config_dir is not None else Config()
    if isinstance(run, Run):
        config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, **run.record["config"]["paths"]))
    bundles = importlib.import_module("engine.training.bundle")
    bundle = bundles.read_bundle(bundles.find_model(str(directory), Path(config.paths.runs)))
    importlib.import_module("engine.training.bundle_spec").admit(bundle, dataclasses.replace(config, trust=trust))
    predictor: Predictor = importlib.import_module("engine.scoring.predictor").predictor_of(bundle)
    return predictor


def execute(name: str, composed: Composed, program: Sequence[str]) -> Run:
    """Open the run, call the step, close the run. `program` is the part of the command line before the overrides.

    The step's module is imported before the directory is made, so that a missing package leaves nothing behind.
    """
    step = commands.function(name)
    composed = _in_job(composed)
    commands.check(name, composed.config)
    with storage.kept_from_others(composed.config.paths.mode, composed.config.data.sensitive):
        section = commands.COMMANDS[name].resume
        run = resume.open_run(name, composed, section, [*program, *composed.overrides])
        try:
            _carry_out(step, composed, run)
        finally:
            if storage.is_private():  # also where only the model declares sensitive columns
                storage.take_from_others(run.directory)
    return run


def _carry_out(step: Callable[[Config, Run], dict[str, float]], composed: Composed, run: Run) -> None:
    """Call the step and close the run."""
    tracker = None
    if composed.config.cluster.kind == "local" and composed.config.cluster.workers > 1:
        run.warn(
            f"cluster.workers={composed.config.cluster.workers} needs cluster=ray: cluster=local works in this process"
        )
    try:
        submit.adopt_source(run)
        tracker = tracking.start(composed.config.tracking, run)
        with cluster.recorded(run), storage.disk_errors(run.directory):
            run.finish(step(composed.config, run))
    except BaseException as error:
        run.fail(error, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        secrecy.hide_in(error, run.hidden)
        error.add_note(f"run directory: {run.directory}")
        raise
    finally:
        if tracker is not None:
            tracker.stop()


def _in_job(composed: Composed) -> Composed:
    """Inside a Ray job the working directory is a local copy that is deleted with the job: relative paths leave it."""
    paths = composed.config.paths
    paths = dataclasses.replace(paths, store=cluster.shared_path(paths.store), runs=cluster.shared_path(paths.runs))
    config = dataclasses.replace(composed.config, paths=paths)
    return dataclasses.replace(composed, config=config)
