"""The commands of the shell and of `engine.run`, as data: to add one is to add one line. Imports no other room."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError, nearest

EVERY = ("cluster", "tracking", "paths", "resources")
DATA = ("data", "split", "features")


@dataclass(frozen=True)
class Command:
    """What a command calls and which parts of the config it reads.

    A step is `function(config, run) -> {metric: value}` and gets a run directory; a plain command (`plain=True`) is
    `function(config, words) -> exit code` and gets none. `resume` names the section whose `resume` key it obeys.
    """

    target: str
    help: str
    sections: tuple[str, ...] = ()
    resume: str | None = None
    plain: bool = False
    usage: str = "[key=value ...]"


# A name of two words (`features list`) wins over its first word alone.
COMMANDS: dict[str, Command] = {
    "ingest": Command("engine.data.ingest:ingest", "read the sources, check them, store the dataset", DATA),
    "features": Command("engine.features.build:features", "compute the feature views of a dataset", DATA),
    "train": Command(
        "engine.training.train:train", "fit a model and measure it", ("train", "model", "evaluate", *DATA), "train"
    ),
    "evaluate": Command("engine.training.train:evaluate", "measure a model on rows with labels", ("evaluate", *DATA)),
    "score": Command("engine.scoring.score:score", "write predictions for a period", ("score", *DATA), "score"),
}


def find(words: list[str]) -> tuple[str, list[str]]:
    """(command name, the words after it); raises UserError when the first word is no command."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, words[length:]
    first = words[0]
    if "=" in first:
        raise UserError(f"a command must come first, as in `python -m engine train {first}`.{nearest('', COMMANDS)}")
    raise UserError(f"unknown command {first!r}.{nearest(first, COMMANDS)}")


def function(name: str) -> Callable[..., Any]:
    """The function behind a command; its module is imported only now."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
