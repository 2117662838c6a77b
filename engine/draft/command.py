"""`engine init`: from files and a target to a data, a features and an experiment file that train as they are."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import api
from engine.config import compose, names
from engine.config.tree import Config
from engine.config.units import Span
from engine.data.readers.advice import better_options
from engine.draft import text
from engine.draft.column_types import Guess, settle_types
from engine.draft.plan import Asked, Draft, make_draft
from engine.draft.sources import Source, find_sources
from engine.errors import UserError
from engine.runtime import storage, terminal
from engine.runtime.progress import Progress

FOLDER = "mine"


def init(_config: Config, words: Sequence[str], options: Mapping[str, Any]) -> int:
    """Draft the files, write them, and say what was found and which command trains. Raises UserError."""
    if not words:
        raise UserError(
            "init must be followed by files, as in `python -m engine init sales.csv --target paid`, found none"
        )
    if "--target" not in options:
        raise UserError("--target must name the column to predict, or an SQL expression over columns, found nothing")
    folder = Path(options.get("--out", FOLDER))
    source = _events(find_sources(words), options["--target"])
    name = options.get("--name") or _name(source.name)
    names.folder(name)
    if name in _taken():
        raise UserError(f"--name must not be that of an experiment of the engine, found {name!r}: choose another")
    paths = {part: folder / part / f"{name}.yaml" for part in ("data", "features", "experiment")}
    for path in paths.values():
        if path.exists():
            raise UserError(
                f"{path} must not exist, so that nothing of yours is overwritten: remove it, or choose --out or --name"
            )
    asked = Asked(
        options["--target"],
        options.get("--time"),
        tuple(options.get("--id", ())),
        options.get("--zone", "UTC"),
        name,
        Span(options["--known"]) if "--known" in options else None,
    )
    with Progress(f"{name}: read", None, "rows") as progress:
        source, guesses = _typed(source, progress)
    draft = make_draft(source, guesses, asked)
    texts = {
        "data": text.data_yaml(draft),
        "features": text.features_yaml(draft),
        "experiment": text.experiment_yaml(draft),
    }
    for part, path in paths.items():
        storage.write_bytes(path, texts[part].encode())
    terminal.out(summary(draft, paths))
    _validate(folder, name)
    return 0


def _events(sources: list[Source], target: str) -> Source:
    """The source that holds the target. Raises UserError."""
    if len(sources) == 1:
        return sources[0]
    words = set(re.findall(r"\w+", target))
    having = [source for source in sources if target in source.config.columns or words & set(source.config.columns)]
    if len(having) != 1:
        raise UserError(
            f"one of the sources must have the target {target!r}, found {len(having)} of "
            f"{', '.join(source.name for source in sources)} with it"
        )
    return having[0]


def _taken() -> set[str]:
    """Names that configs of the engine have: theirs would be found first."""
    return {name for group in ("data", "features", "experiment") for name in compose.groups().get(group, ())}


def _name(name: str) -> str:
    return f"my_{name}" if name in _taken() else name


def _typed(source: Source, progress: Progress) -> tuple[Source, dict[str, Guess]]:
    """The source with types, and with the csv options that a look at its first and last lines advises."""
    config, guesses = settle_types(source, progress.advance)
    typed = dataclasses.replace(source, config=config)
    first = source.files[0]
    if first.format == "csv":
        better, reasons = better_options(first, config, "UTC")
        if reasons:
            source = dataclasses.replace(source, config=dataclasses.replace(source.config, csv=better))
            source.notes.extend(reasons)
            config, guesses = settle_types(source, progress.advance)
            typed = dataclasses.replace(source, config=config)
    return typed, guesses


def summary(draft: Draft, paths: Mapping[str, Path]) -> str:
    """What was found, in a few lines."""
    lines = [
        f"{draft.rows:,} rows of {draft.source.name}; event time {draft.time or 'none'} ({draft.time_why})",
        f"target {draft.target}: {draft.target_why}; loss {draft.loss}",
        f"identity: {draft.ids_why}",
        f"features: {len(draft.direct)} columns"
        + (f", the calendar of {draft.time}, {len(draft.views)} histories" if draft.time else ""),
    ]
    lines += [f"left out: {name} {reason}" for name, reason in draft.left_out.items()]
    lines += [f"question: {question}" for question in draft.questions]
    lines += [f"wrote {path}" for path in paths.values()]
    return "\n".join(lines) + "\n"


def _validate(folder: Path, name: str) -> None:
    """Check the files against what was written, as a run, and say which command trains. Raises UserError."""
    composed = compose.compose([f"+experiment={name}"], str(folder))
    api.execute("validate", composed, ["engine", "validate"])
    command = shlex.join(["python", "-m", "engine", "train", "--config-dir", str(folder), f"+experiment={name}"])
    terminal.out(f"train with: {command}\n")
