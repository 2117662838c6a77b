"""Typed configuration from plain mappings: dataclasses with documented, bounded keys.

`key(...)` declares one key with its meaning and bounds; `build(Class, mapping)` checks a mapping and returns the frozen
object, or raises a UserError that names the dotted key, what was found, and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.config import nested
from engine.errors import UserError, nearest

MISSING = dataclasses.MISSING
_TRUE, _FALSE = {"true", "on", "yes"}, {"false", "off", "no"}


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    parse: Callable[[Any], Any] | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field: default, meaning, and what its values must satisfy (`parse` checks the value that is kept).

    A map that a config gives takes the place of a default with entries; it is not added to them (`wholes`).
    """
    bounds = {name: limit for name, limit in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if limit is not None}
    metadata = {"help": help, "choices": choices, "bounds": bounds, "parse": parse}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def later_key(*given: Any, **named: Any) -> Any:
    """A key that earlier versions lacked: saved configs and digests hold it only where it is not the default."""
    field = key(*given, **named)
    field.metadata = types.MappingProxyType({**field.metadata, "later": True})
    return field


def section(cls: type, help: str = "") -> Any:
    """A field that is itself a group of keys, all of which have defaults."""
    return key(factory=lambda: build(cls, {}), help=help)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved type hints of a dataclass."""
    return typing.get_type_hints(cls)


def build(cls: type, values: Any, path: str = "") -> Any:
    """The frozen `cls` from a mapping; every key is known, typed and within bounds.

    A class with `SHORTHAND = "type"` also accepts a bare value for that key: `carrier: string`.
    Raises UserError.
    """
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand and not isinstance(values, Mapping):
        values = {shorthand: values}
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the config'} must be a mapping with keys {_names(cls)}, found {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            where = f"{path}.{name}" if path else str(name)
            known = [f"{path}.{field}" if path else field for field in fields]
            raise UserError(f"unknown config key {where!r}.{dotted(name) or nearest(where, known)}")
    found = {}
    for name, field in fields.items():
        where = f"{path}.{name}" if path else name
        if name in values:
            value = values[name]
            if value is None and "null" in field.metadata.get("choices", ()):
                value = "null"  # a choice named null, which YAML reads as None
            found[name] = _value(hints(cls)[name], value, where)
            _check(field, found[name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"config key {where!r} must be given: {field.metadata.get('help', '')}")
    try:
        return cls(**found)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def dotted(name: Any) -> str:
    """A hint how to write a dotted key in a file, where a dot does not lead into a section; empty for other names."""
    section, _, rest = str(name).partition(".")
    return f" In a file a dot is part of the name: write `{section}: {{{rest}: ...}}`." if section and rest else ""


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{path} must be a list, found {value!r}; write [a, b]")
        return tuple(_value(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{path} must be a mapping from name to value, found {value!r}")
        return {str(name): _value(arguments[1], item, at(path, str(name))) for name, item in value.items()}
    return _scalar(hint, value, path)


def _union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    if value in ("null", "") and type(None) in arguments and not any(map(_is_text, arguments)):
        return None
    options = [argument for argument in arguments if argument is not type(None)]
    options.sort(
        key=lambda option: dataclasses.is_dataclass(option) == isinstance(value, Mapping)
    )  # its error is shown
    for option in options[:-1]:
        try:
            return _value(option, value, path)
        except UserError:
            continue
    return _value(options[-1], value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):  # a run stores its config as JSON, which has no NaN
        raise UserError(f"{path} must be a finite number, found {value!r}")
    if hint is Any:
        return value
    if hint is bool:
        text = str(value).lower()
        if isinstance(value, (bool, str)) and text in _TRUE | _FALSE:
            return text in _TRUE
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hint is float:
        if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and _is_float(value)):
            return float(value)
    elif _is_text(hint) and isinstance(value, (str, int, float)):
        # YAML 1.1 reads an unquoted `off` as False; a text key never means that.
        return _located(path, hint, ("on" if value else "off") if isinstance(value, bool) else str(value))
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    kind = "a text" if _is_text(hint) else kinds.get(hint, str(hint))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        kind = "a number that a float64 represents exactly"
    raise UserError(f"{path} must be {kind}, found {value!r}")


def _is_text(hint: Any) -> bool:
    """Whether it is `str` or a text that knows its meaning (`units.Span`)."""
    return isinstance(hint, type) and issubclass(hint, str)


def _is_float(number: int) -> bool:
    """Whether a float64 represents this whole number exactly."""
    try:
        return float(number) == number
    except OverflowError:
        return False


def _check(field: dataclasses.Field[Any], value: Any, path: str) -> None:
    choices = field.metadata.get("choices", ())
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item is not None and item not in choices:
            hint = nearest(str(item), choices, listed=False)
            raise UserError(f"{path} must be one of {', '.join(choices)}, found {item!r}.{hint}")
    for name, limit in field.metadata.get("bounds", {}).items():
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is not None and not _within(name, number, limit):
                words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}[name]
                raise UserError(f"{path} must be {words} {limit}, found {number!r}")
    parse = field.metadata.get("parse")
    if parse is not None and value is not None:
        for item in value if isinstance(value, tuple) else (value,):
            _located(path, parse, item)


def _located(path: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _within(name: str, value: float, limit: float) -> bool:
    # Positive tests, so that NaN is outside every bound.
    return {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[name]


def plain(value: Any, whole: bool = False) -> Any:
    """The config object as dicts, lists and scalars for JSON; `whole`: with every key that earlier versions lacked."""

    def leaf(_: str, item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            saved = [field.name for field in dataclasses.fields(item) if whole or _saved(field, item)]
            return plain({name: getattr(item, name) for name in saved}, whole)
        return str(item) if isinstance(item, str) else item

    return nested.mapped(value, leaf)


def _saved(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return not field.metadata.get("later") or getattr(value, field.name) != default


_BARE = re.compile(r"[A-Za-z0-9_./%+:-]+")


def word(name: str, value: Any) -> str:
    """`name=value` as typed in a shell: quoted for Hydra if its grammar requires that, then for the shell."""
    return shlex.quote(override(name, value))


_PLAIN_NAME = re.compile(r"""[^.\[\]="'\s][^.\[\]=\s]*""")


def at(key: str, name: str) -> str:
    """The key of an entry below `key` in override syntax: a name with a dot or another sign is in brackets."""
    if _PLAIN_NAME.fullmatch(name):
        return f"{key}.{name}" if key else name
    return f"{key}[{name}]" if "]" not in name else f'{key}["{name}"]'


def override(name: str, value: Any) -> str:
    """`name=value` as Hydra reads it: a text keeps its characters and stays a text."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    if not isinstance(value, str) or (_BARE.fullmatch(value) and not _means_more(value)):
        return f"{name}={value}"
    return f"{name}={quoted(value)}"


def quoted(text: str) -> str:
    """The text in quotes for a Hydra override, escaped so that any text is read unchanged."""
    escaped = re.sub(r'(\\*)"', lambda match: 2 * match.group(1) + '\\"', text)
    backslashes = len(escaped) - len(escaped.rstrip("\\"))
    return f'"{escaped}' + "\\" * backslashes + '"'


def _means_more(text: str) -> bool:
    """Whether a text without quotes would be read as a number, a boolean or null."""
    if text.lower() in _TRUE | _FALSE | {"null", "y", "n", "~"}:
        return True
    return text[:1] in "0123456789+-." and not text.endswith("%")


def documented(cls: type, path: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, meaning) of every key below `cls`; maps are shown as `name.<key>`."""
    for field in dataclasses.fields(cls):
        where = f"{path}.{field.name}" if path else field.name
        hint = hints(cls)[field.name]
        meaning = field.metadata.get("help", "")
        choices = field.metadata.get("choices", ())
        if choices:
            meaning = f"{meaning} ({' | '.join(choices)})"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from documented(hint, where)
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            yield f"{where}.<name>", "map", "{}", meaning
            yield from documented(typing.get_args(hint)[1], f"{where}.<name>")
        else:
            default = field.default
            if default is MISSING:
                default = plain(field.default_factory()) if field.default_factory is not MISSING else "(required)"
            yield where, _type_name(hint), default, meaning


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"[{_type_name(typing.get_args(hint)[0])}, ...]"
    if typing.get_origin(hint) is dict:
        return f"{{name: {_type_name(typing.get_args(hint)[1])}}}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if option is type(None) else _type_name(option) for option in typing.get_args(hint))
    return hint.__name__.lower() if _is_text(hint) else getattr(hint, "__name__", str(hint))


def wholes(cls: type, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted key, plain default) of every map whose default has entries; a config replaces such a map as a whole."""
    for field in dataclasses.fields(cls):
        hint, where = hints(cls)[field.name], f"{path}.{field.name}" if path else field.name
        if typing.get_origin(hint) is dict:
            if default := plain(field.default_factory()):  # type: ignore[misc,operator]
                yield where, default
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from wholes(hint, where)


def below(hint: Any, name: str | int) -> Any:
    """The type hint of the item at a name or index in a value of type `hint`; None if it is not declared."""
    for option in options(hint):
        if dataclasses.is_dataclass(option) and isinstance(option, type) and name in hints(option):
            return hints(option)[str(name)]
        if typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
        if typing.get_origin(option) is tuple and isinstance(name, int):
            return typing.get_args(option)[0]
    return None


def leaves(hint: Any) -> set[Any]:
    """The scalar types, NoneType included, that a value of type `hint` may have unless it is a list or mapping."""
    found = set()
    for option in options(hint):
        shorthand = getattr(option, "SHORTHAND", None)
        if shorthand:
            found |= leaves(hints(option)[shorthand])
        else:
            found |= {str, *getattr(option, "ALSO", ())} if _is_text(option) else {option}
    return found & {str, bool, int, float, type(None)}


def options(hint: Any) -> tuple[Any, ...]:
    """The types of which a value has one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def maps(cls: type, path: str = "") -> Iterator[str]:
    """Dotted keys of maps with names chosen by users: an override below one may add an entry."""
    for field in dataclasses.fields(cls):
        hint = hints(cls)[field.name]
        where = f"{path}.{field.name}" if path else field.name
        if typing.get_origin(hint) is dict:
            yield where
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from maps(hint, where)
