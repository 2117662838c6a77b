"""Words of a plain command taken apart: options with their values, and what remains."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import UserError


def take(
    words: Iterable[str], flags: tuple[str, ...] = (), valued: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str]]:
    """(other words, option -> value); a flag's value is its own name. Raises UserError where a value is lacking."""
    others: list[str] = []
    options: dict[str, str] = {}
    remaining = iter(words)
    for word in remaining:
        if word in flags:
            options[word] = word
        elif word in valued:
            options[word] = next(remaining, "")
            if not options[word]:
                raise UserError(f"{word} must be followed by a value, found nothing")
        else:
            others.append(word)
    return others, options
