"""`engine runs rm` and `runs gc`: find run directories that may be removed, and the reasons that keep the others.

A run is kept while a process uses it, while the registry names it (its model, its decisions, the windows of a champion), while
it is the newest of its kind or recent, and while a kept run uses its model or scores. Nothing is removed without --delete.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import units
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.lineage import Node, node_of, parent_of
from engine.lifecycle.runs import directories, find_run, status
from engine.runtime import registry, storage, terminal
from engine.runtime.run import is_free, load_record, remove

OLDER = "30d"
UNFINISHED = units.MICROSECONDS["d"]  # the same command continues it
STORED = ("dataset", "features", "inputs")  # outputs in the store, not in the run that made them first


@dataclass(frozen=True)
class Entry:
    """A run directory that may be removed: its node, whether it is finished or in use, and its age in microseconds."""

    node: Node
    finished: bool
    busy: bool
    age: int

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.node.directory

    @property
    def kind(self) -> tuple[Any, ...]:
        """The kind of a run: command, name and model. The newest finished run of a kind is kept."""
        record = self.node.record
        return record["command"], record["name"], record.get("model")


@dataclass(frozen=True)
class Named:
    """The contents of the registries: models by digest, digests of champions and challengers, and decisions by run."""

    models: Mapping[str, str]
    serving: Mapping[str, str]
    decisions: Mapping[str, str]


# -------------------------------------------------------------------------------------------------------- commands


def gc(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`runs gc [--older SPAN] [--delete] [--json]`."""
    if words:
        raise UserError(f"runs gc takes options only, found {words[0]!r}: `runs rm {words[0]}` removes a run by name")
    older = units.Span(options.get("--older", OLDER)).microseconds
    runs = Path(config.paths.runs)
    found = entries(runs)
    kept = spread(found, roots(found, named(registry.root_of(runs)), older, options.get("--older", OLDER)))
    return _carry_out(found, kept, options, runs)


def rm(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`runs rm RUN ... [--delete] [--json]`; every other run counts as kept. Raises UserError when a named one must stay."""
    if not words:
        raise UserError("runs rm needs the runs to remove: name directories, or the first letters of their ids")
    runs = Path(config.paths.runs)
    chosen = {find_run(word, runs).resolve() for word in words}
    found = entries(runs)
    kept = roots(found, named(registry.root_of(runs)), 0, "0s")
    kept |= {item.directory: "not named" for item in found if item.directory not in chosen}
    kept = {directory: reason for directory, reason in spread(found, kept).items() if directory in chosen}
    if strangers := chosen - {item.directory for item in found}:
        raise UserError(f"a run to remove must be in {runs} (paths.runs), found {min(strangers)}")
    if kept and "--delete" in options:
        told = "; ".join(f"{directory} is {reason}" for directory, reason in kept.items())
        raise UserError(f"nothing was removed: {told}. Leave these out, or remove first what keeps them")
    return _carry_out([item for item in found if item.directory in chosen], kept, options, runs)


def _carry_out(found: Sequence[Entry], kept: Mapping[Path, str], options: Mapping[str, str], runs: Path) -> int:
    delete, rows = "--delete" in options, []
    if delete:
        storage.purge(runs)
    for item in found:
        size = storage.bytes_of([item.directory])
        reason = kept.get(item.directory)
        if delete and reason is None and not remove(item.directory, runs):
            reason = IN_USE
        record = item.node.record
        rows.append(
            {
                "command": record["command"],
                "name": record["name"],
                "status": status(item.directory, record),
                "days": round(item.age / units.MICROSECONDS["d"], 1),
                "bytes": size,
                "kept": reason,
                "directory": str(item.directory),
            }
        )
    terminal.collected(rows, "runs", delete, "--json" in options, "no runs")
    return 0


# ---------------------------------------------------------------------------------------------------- what keeps it

IN_USE = "in use by a process"


def entries(runs: Path) -> list[Entry]:
    """Every run below a folder, oldest first. Raises UserError at a damaged record, which may name a run in use."""
    found = []
    for directory in map(Path.resolve, directories(runs)):
        finished = (directory / "DONE").exists()
        changed = max(path.stat().st_mtime for path in directory.iterdir() if path.name[0] != ".")
        age = round((time.time() - changed) * units.MICROSECONDS["s"])
        node = node_of(directory, load_record(directory))
        found.append(Entry(node, finished, not finished and not is_free(directory), age))
    return found


def named(root: Path) -> Named:
    """The contents of all registries below a folder."""
    models: dict[str, str] = {}
    serving: dict[str, str] = {}
    decisions: dict[str, str] = {}
    for name in registry.names(root):
        book = registry.Registry(root, name)
        state = book.state()
        models |= {version.digest: f"{name}@{registry.short(version.digest)}" for version in book.versions()}
        aliases = {state.alias(alias): f"{name}@{alias}" for alias in registry.ALIASES}
        serving |= {value: alias for value, alias in aliases.items() if value is not None}
        for move in state.moves:
            if (identity := (move["decision"] or {}).get("id")) is not None:
                decisions[identity] = f"move {move['number']} of {name}"
    return Named(models | serving, serving, decisions)


def roots(found: Sequence[Entry], book: Named, older: int, told: str) -> dict[Path, str]:
    """Runs that are kept for themselves, not for another run, with the reason."""
    newest = {item.kind: item.directory for item in found if item.finished}
    rules: tuple[Callable[[Entry], str | None], ...] = (
        lambda item: IN_USE if item.busy else None,
        lambda item: _named_by(book.models, _models(item.node), "the training of {}"),
        lambda item: _named_by(book.decisions, [item.directory.name], "the decision behind {}"),
        lambda item: _named_by(book.serving, _watched(item.node), "a window of {}, which retrain counts"),
        lambda item: (
            "the newest finished one of its command, name and model"
            if newest.get(item.kind) == item.directory
            else None
        ),
        lambda item: (
            None if item.finished or item.age >= max(older, UNFINISHED) else "unfinished and recent: it can be resumed"
        ),
        lambda item: f"younger than {told}" if item.age < older else None,
    )
    reasons = {item.directory: next(filter(None, (rule(item) for rule in rules)), None) for item in found}
    return {directory: reason for directory, reason in reasons.items() if reason is not None}


def _named_by(names: Mapping[str, str], keys: Iterable[str], text: str) -> str | None:
    return next((text.format(names[key]) for key in keys if key in names), None)


def _models(node: Node) -> list[str]:
    return [value for name, value in node.made.items() if name == "output model"]


def _watched(node: Node) -> list[str]:
    return [node.took["model"]] if node.record["command"] == "monitor" and "model" in node.took else []


def spread(found: Sequence[Entry], kept: Mapping[Path, str]) -> dict[Path, str]:
    """Adds the runs that kept runs need: the runs whose model or scores they use, and the runs that started them."""
    by_directory = {item.directory: item.node for item in found}
    makers: dict[str, list[Path]] = {}
    for item in found:
        for name, value in item.node.made.items():
            if name == "scores" or (name.startswith("output ") and name.removeprefix("output ") not in STORED):
                makers.setdefault(value, []).append(item.directory)
    reasons, waiting = dict(kept), [directory for directory in kept if directory in by_directory]
    while waiting:
        node = by_directory[waiting.pop()]
        took = [value for name, value in node.took.items() if not name.startswith("input ")]
        parent = parent_of(node)
        needed = {
            maker: "what {} was made with" for maker in itertools.chain.from_iterable(makers.get(v, []) for v in took)
        }
        if parent in by_directory:
            needed.setdefault(parent, "the run that started {}")
        for directory, text in needed.items():
            if directory not in reasons:
                reasons[directory] = text.format(_short(node.directory))
                waiting.append(directory)
    return reasons


def _short(directory: Path) -> str:
    return "/".join(directory.parts[-3:])
