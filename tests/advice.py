"""To follow a message: the words of a command line that it advises, put into a config."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

WORD = r"(?:'[a-z]\w*(?:\.[^'=]+)+=[^']*'|[a-z]\w*(?:\.[\w<>-]+)+=[^\s;,']*[^\s;,.:')])"
SAID = re.compile(rf"(?:\bset|\bdeclare[^:;=]*?,|\bwith|\bas in|\bor) ({WORD}(?: {WORD})*)")


def advised(message: str) -> list[list[str]]:
    """The ways out that a message offers, each as words that belong together, without the quotes of the shell."""
    return [shlex.split(found) for found in SAID.findall(message)]


def follow(values: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """A copy of a plain config section called `data` under the words; an entry in short form (`x: string`) is written out."""
    values = copy.deepcopy(values)
    for word in words:
        override = OverridesParser.create().parse_override(word)
        root, *path, last = override.key_or_group.split(".")
        assert root == "data", word
        here = values
        for name in path:
            if not isinstance(here.get(name, {}), dict):
                here[name] = {"type": here[name]}
            here = here.setdefault(name, {})
        here[last] = override.value()
    return values
