"""Command-line overrides such as `data.columns[sepal.length].min=0`: parse their keys and apply them to a plain config.

A key is names joined by dots. A name with a dot or another sign of this grammar is written in brackets or quotes:
`data.columns[sepal.length].min`, `data.columns."sepal.length".min`. Below a map of plain values (`monitor.thresholds`,
`features.direct`) the rest of the key is one name. `+` adds, `++` adds or changes, `~` removes.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import typing
from typing import Any

from engine.config import literals, schema
from engine.config.nested import Tree
from engine.errors import UserError, nearest

_NAME = re.compile(r"""\[(?:"([^"]*)"|'([^']*)'|([^\]"'][^\]]*))\]|"([^"]*)"|'([^']*)'|([^.\[\]="'][^.\[=]*)""")


@dataclasses.dataclass(frozen=True)
class Word:
    """One override: its sign (`+`, `++`, `~` or empty), the names of its key (`bare`: not quoted), its value's text."""

    sign: str
    parts: tuple[str, ...]
    bare: tuple[bool, ...]
    value: str | None

    @property
    def key(self) -> str:
        """The key in its recommended spelling."""
        return dotted(self.parts)


def read(text: str) -> Word | None:
    """Parse one word of the command line; None if it does not have the form of an override."""
    sign = re.match(r"~|\+{0,2}", text)[0]  # type: ignore[index]
    place, parts, bare = len(sign), list[str](), list[bool]()
    while match := _NAME.match(text, place):
        found = [group for group in match.groups() if group is not None]
        parts.append(found[0])
        bare.append(match.group(6) is not None)
        place = match.end()
        if text[place : place + 1] == ".":
            place += 1
        elif text[place : place + 1] != "[":
            break
    rest = text[place:]
    if not parts or text[place - 1] == "." or (rest[:1] != "=" and (rest or sign != "~")):
        return None
    return Word(sign, tuple(parts), tuple(bare), rest[1:].lstrip() if rest else None)


def dotted(parts: tuple[str, ...]) -> str:
    """The key as text, with brackets around names that need them."""
    key = ""
    for part in parts:
        key = schema.at(key, part)
    return key


def apply(values: Tree, word: Word, value: Any, config: type) -> None:
    """Change the plain config in place. Raises UserError for a key that does not exist, or that `+` would add twice."""
    parts, mapped = _parts(word, config)
    sign = "++" if mapped and not word.sign else word.sign
    wholes = dict(schema.wholes(config))
    node: Any = values
    hint: Any = config
    for place, part in enumerate(parts[:-1]):
        child, hint = _get(node, part), schema.below(hint, part)
        default = wholes.get(".".join(parts[:place]), {})
        if child is ABSENT and part in default and sign != "~":
            child = copy.deepcopy(default[part])
        if not isinstance(child, (dict, list)):
            child = _opened(child, hint, sign, word)
        _set(node, part, child, word)
        node = child
    last, old = parts[-1], _get(node, parts[-1])
    if sign == "~":
        if old is ABSENT:
            raise Unknown(word.key)
        if word.value is not None and str(literals.texts(value)) != str(literals.texts(old)):
            raise UserError(f"config key {word.key!r} has another value: write ~{word.key} to remove any value")
        del node[int(last) if isinstance(node, list) else last]
    elif sign == "" and old is ABSENT:
        raise Unknown(word.key)
    elif sign == "+" and old not in (ABSENT, None) and not isinstance(value, (dict, list)):
        raise UserError(f"config key {word.key!r} is there already: write {word.key}=VALUE, without the +")
    elif isinstance(old, (dict, list)) and isinstance(value, (dict, list)) and type(old) is not type(value):
        raise UserError(
            f"{word.key}={word.value} gives a key a value of another kind: a section or a map takes {{name: value}}, "
            "a list [a, b]"
        )
    elif isinstance(value, dict) and value and ".".join(parts) in wholes:
        _set(node, last, whole(wholes[".".join(parts)], value), word)
    else:
        _set(node, last, merged(old, value), word)


def whole(default: Tree, given: Tree) -> Tree:
    """A map given as a whole: only its entries; an entry with the name of a default changes that default."""
    return {name: merged(default.get(name), item) for name, item in given.items()}


class Unknown(UserError):
    """No such key."""


ABSENT: Any = object()


def _parts(word: Word, config: type) -> tuple[tuple[str, ...], bool]:
    """The names of the key, and whether it leads into a map of free names."""
    hint: Any = config
    mapped = False
    for place, part in enumerate(word.parts):
        below = schema.below(hint, part)
        if typing.get_origin(hint) is dict:
            mapped = True
            rest = word.parts[place:]
            if dataclasses.is_dataclass(below):
                _refuse_unquoted(word, place, below)
            elif len(rest) > 1 and schema.below(below, rest[-1]) is not None and not rest[-1].isdecimal():
                return (*word.parts[:place], ".".join(rest[:-1]), rest[-1]), True  # an entry may be a list or a section
            elif (
                not any(typing.get_origin(kind) is tuple for kind in schema.options(below)) or not rest[-1].isdecimal()
            ):
                return (*word.parts[:place], ".".join(rest)), True
        hint = below
    return word.parts, mapped


def _refuse_unquoted(word: Word, place: int, section: Any) -> None:
    """Raise UserError if a name with a dot was written without brackets, so that its second part is an unknown key."""
    known = [field.name for field in dataclasses.fields(section)]
    rest = word.parts[place + 1 :]
    # `columns.sepal.width={type: float64}` is a column of its own, though a column has a key `width`.
    whole = len(rest) == 1 and (word.value or "").startswith("{") and not _is_section(schema.below(section, rest[0]))
    if not rest or (rest[0] in known and not whole) or not (word.bare[place] and word.bare[place + 1]):
        return
    later = None if whole else next((count for count, part in enumerate(rest) if part in known), None)
    unknown = f"unknown config key {dotted(word.parts[: place + 2])!r}."
    hint = nearest(rest[0], known, listed=False)
    if later is None and hint and not whole:
        raise UserError(unknown + hint)
    length = (len(rest) if later is None else later) + 1
    name = ".".join(word.parts[place : place + length])
    key = dotted((*word.parts[:place], name, *word.parts[place + length :]))
    example = shlex.quote(f"{word.sign}{key}" + ("" if word.value is None else f"={word.value}"))
    raise UserError(f"{unknown} A name with a dot must be in brackets: {example}")


def _is_section(hint: Any) -> bool:
    """Whether a value of this type may be a mapping."""
    kinds = schema.options(hint)
    return any(dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict or kind is Any for kind in kinds)


def _opened(child: Any, hint: Any, sign: str, word: Word) -> Tree:
    """A mapping instead of the value that a longer key leads through: `x: int64` becomes {type: int64}."""
    shorthand = getattr(hint, "SHORTHAND", None)
    if child is not ABSENT and child is not None:
        if shorthand is None or "${" in str(child):
            raise UserError(f"{word.key!r} leads through a value, found {child!r}")
        return {shorthand: child}
    if sign in ("", "~"):
        raise Unknown(word.key)
    return {}


def _get(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part, ABSENT)
    return node[int(part)] if part.isdecimal() and int(part) < len(node) else ABSENT


def _set(node: Any, part: str, value: Any, word: Word) -> None:
    if isinstance(node, dict):
        node[part] = value
    elif part.isdecimal() and int(part) < len(node):
        node[int(part)] = value
    else:
        raise UserError(f"{word.key!r} must name an item of a list of {len(node)}, found {part!r}")


def merged(old: Any, new: Any) -> Any:
    """`old` updated by `new`: mappings key by key, other values replaced; `???` keeps an existing value."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old if new == "???" and old is not None else new
    return {**old, **{name: merged(old.get(name), item) for name, item in new.items()}}
