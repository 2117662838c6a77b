"""Checks of names: safe for folders and files, and unique."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from engine.errors import UserError

LONGEST = 200  # bytes of a folder's name; file systems allow 255, and the engine adds to it


def folder(value: str | Mapping[str, object]) -> None:
    """Raise UserError unless a name, or each key of a mapping, is a safe name of a folder or file.

    Also applied to specifications read from a bundle or run directory: such a name must not lead out of the store.
    """
    for name in (value,) if isinstance(value, str) else value:
        hidden = any(ord(character) < 32 or ord(character) == 127 for character in name)
        long = len(name.encode("utf-8", "surrogatepass")) > LONGEST
        if (not name and value != "") or name.startswith(".") or "/" in name or "\\" in name or hidden or long:
            raise UserError(
                "must be names of folders, without / or \\, without a dot in front and without control characters, at most "
                f"{LONGEST} bytes long, found {name!r}: folders that begin with a dot are reserved for the engine, and / "
                "would lead into another folder"
            )


def free(name: str, taken: Collection[str]) -> str:
    """A name of the engine that is not among the users' names: unchanged, or in parentheses if it is taken."""
    while name in taken:
        name = f"({name})"
    return name


def distinct(names: Iterable[str]) -> list[str]:
    """The names in order; repeated ones in parentheses."""
    found: dict[str, None] = {}
    for name in names:
        found[free(name, found)] = None
    return list(found)


def check_distinct(named: Iterable[tuple[str, str]], way_out: str, *, fold: bool = False) -> None:
    """Raise UserError, with both origins, if a name occurs twice in (name, origin) pairs; `fold` ignores case.

    `{0}` in `way_out` is replaced by the name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, origin in named:
        key = name.casefold() if fold else name
        if key in seen:
            before, where = seen[key]
            both = f"{name!r}" if before == name else f"{before!r} and {name!r}, which differ in case only,"
            raise UserError(f"a name must be unique, found {both} of {where} and of {origin}. {way_out.format(name)}")
        seen[key] = name, origin
