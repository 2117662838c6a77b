"""Which run a command works in: the newest unfinished one of the same plan, the named one, or a new one (keys `*.resume`).

The run then continues from its own files: training from engine/training/checkpoint.py, scoring from engine/scoring/units.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import nested, schema
from engine.config.nested import Tree
from engine.config.tree import IMMATERIAL, Config, without
from engine.errors import UserError
from engine.runtime.run import Run, RunBusy, RunRecord, is_free, plan_digest, records_below, runs_folder

if TYPE_CHECKING:
    from engine.config.compose import Composed


def open_run(command: str, composed: Composed, section: str | None, words: list[str]) -> Run:
    """The run that a command works in, by the key `resume` of a config section (None: always a new run); opened.

    Raises UserError for a named run that is finished, busy or of another command or plan.
    """
    choice = getattr(composed.config, section).resume if section else "never"
    if choice == "auto":
        directory = unfinished(command, composed.config)
        if directory is not None:
            try:
                return Run.resume(directory, composed.secrets, command_line=words)
            except RunBusy:
                pass  # another process resumed it meanwhile: this command starts a new run
    elif choice != "never":
        _check_same_plan(command, composed.config, composed.saved, Path(choice), f"{section}.resume")
        return Run.resume(Path(choice), composed.secrets, command_line=words)
    run = Run.create(command, composed.config, composed.saved, command_line=words, hidden=composed.secrets)
    if choice == "auto":
        _tell_of_another_plan(run, composed)
    return run


def unfinished(command: str, config: Config) -> Path | None:
    """The newest run of the same command, name and plan without DONE in which no process is working."""
    plan = plan_digest(command, config)
    folder = runs_folder(config, command)
    for directory in sorted(folder.glob("*-*"), reverse=True) if folder.is_dir() else []:
        if (directory / "DONE").exists() or not (directory / "run.json").exists():
            continue
        for _, record in records_below([directory]):
            if record.get("plan") == plan and is_free(directory):
                return directory
    return None


def _tell_of_another_plan(run: Run, composed: Composed) -> None:
    """Log why the newest earlier run, if unfinished, was not resumed: it has another plan."""
    earlier = sorted(path.parent for path in run.directory.parent.glob("*-*/run.json") if path.parent != run.directory)
    if not earlier or (earlier[-1] / "DONE").exists():
        return
    for directory, record in records_below(earlier[-1:]):
        if record.get("plan") != run.record["plan"]:
            changed = _changed_keys(record, composed.config, composed.saved)
            run.log(f"a new run: {directory} is unfinished but has another plan; these keys differ: {changed}")


def _changed_keys(record: RunRecord, config: Config, saved: Tree) -> str:
    """Keys of the plan whose values differ from those in a run's record."""
    now = {**schema.plain(config), **saved}
    found = nested.differences(without({**record["config"]}, IMMATERIAL), without(now, IMMATERIAL))
    return ", ".join(key for key, *_ in found) or "secret values"


def _check_same_plan(command: str, config: Config, saved: Tree, directory: Path, key: str) -> None:
    if not (directory / "run.json").is_file():
        raise UserError(
            f"{key} must be auto, never or a run directory, found {str(directory)!r}, which has no run.json"
        )
    record = Run.read(directory)
    if record["command"] != command:
        raise UserError(f"{key} must name a run of {command!r}, found a run of {record['command']!r}: {directory}")
    if record["plan"] != plan_digest(command, config):
        raise UserError(
            f"{directory} was started with another plan; these keys differ: {_changed_keys(record, config, saved)}. "
            f"Use the same overrides, or {key}=never"
        )
