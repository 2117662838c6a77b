"""The error type for users' mistakes: what is required, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake or a condition that the user can fix; the shell prints it without a traceback and exits 1."""


def nearest(word: str, choices: Iterable[str], listed: bool = True) -> str:
    """` Did you mean 'x'?` for the nearest of `choices`, never `word` itself. If none is near: the choices, if `listed`."""
    names = sorted({str(choice) for choice in choices} - {word})
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return did_you_mean(close)
    return f" Known: {', '.join(names)}." if names and listed else ""


def did_you_mean(names: Iterable[str]) -> str:
    """` Did you mean 'x' or 'y'?`."""
    return f" Did you mean {' or '.join(repr(name) for name in names)}?"
