"""Walks over nested dicts and lists, which configs and records are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tree = dict[str, Any]  # a config as nested dicts, or a section of one


def leaves(value: Any, path: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value; an empty dict is one, and so is a list, unless `lists` are walked too."""
    held = list(value.items()) if isinstance(value, Mapping) else []
    if lists and isinstance(value, list):
        held = list(enumerate(value))
    for name, item in held:
        yield from leaves(item, f"{path}.{name}" if path else str(name), lists)
    if path and not held:
        yield path, value


def mapped(value: Any, change: Callable[[str, Any], Any], key: Callable[[str], str] = str, path: str = "") -> Any:
    """A copy as dicts and lists, with every other value as `change(dotted path, value)` and every name as `key(name)`."""
    above = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key(str(name)): mapped(item, change, key, f"{above}{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, change, key, f"{above}{index}") for index, item in enumerate(value)]
    return change(path, value)


def differences(first: Any, second: Any, path: str = "", lists: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, first value, second value) of every value that differs; lists are values, unless `lists` of one length
    are walked too, their entries by `name` where they have one.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for name in dict.fromkeys([*first, *second]):
            yield from differences(first.get(name), second.get(name), f"{path}.{name}".strip("."), lists)
    elif lists and isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            name = one.get("name", index) if isinstance(one, dict) else index
            yield from differences(one, other, f"{path}.{name}".strip("."), lists)
    elif first != second:
        yield path, first, second
