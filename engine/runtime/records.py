"""The one reader of records: JSON files of runs, bundles, registries and the store, which can come from anywhere.

The room that writes a record describes it as a TypedDict. `read` checks size, depth and shape before anyone uses a value, so
that a damaged or hostile file is a sentence and never a traceback. Unknown keys stay: a newer engine may have written them.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")
MOST_BYTES = 64 * 2**20
DEEPEST = 64
LARGEST = 2**63  # whole numbers beyond it are kept as text by those who write them
SHOWN = 80


@dataclass(frozen=True)
class Matching:
    """A text that a pattern matches whole; `meaning` says so in words."""

    pattern: str
    meaning: str


@dataclass(frozen=True)
class Within:
    """A number from `low` to `high`, both included."""

    low: float
    high: float = math.inf


Digest = Annotated[str, Matching(r"[0-9a-f]{64}", "64 hex digits")]
Count = Annotated[int, Within(0)]


class Damaged(UserError):
    """A record that is not what it must be."""


def read(path: Path, shape: Callable[..., T] | Any = Any, most: int = MOST_BYTES) -> Any:
    """The record in `path`, checked against `shape` (a TypedDict or another type hint).

    Raises Damaged, naming the file and the key; UserError where the file is not there.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise Damaged(f"{path} must be a record of at most {most:,} bytes, found {size:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} must exist, found nothing") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{path} must be JSON: {error}") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    return parse(text, shape, str(path))


def parse(text: str, shape: Any, where: str) -> Any:
    """The JSON value of a text, checked likewise; `where` names it in messages."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise Damaged(f"{where} must be nested at most {DEEPEST} deep, found more") from None
    except ValueError as error:  # also a whole number of thousands of digits
        raise Damaged(f"{where} must be JSON: {error}") from None
    _check_depth(value, where)
    conform(value, shape, where)
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for parent in level for item in _children(parent)]
        if not level:
            return
    raise Damaged(f"{where} must be nested at most {DEEPEST} deep, found more")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


# ------------------------------------------------------------------------------------------------------------ shape


def conform(value: Any, shape: Any, where: str) -> None:
    """Raise Damaged unless a JSON value is of the shape.

    Known are Any, None, bool, int, float, str, list, dict with text keys, unions, Literal, TypedDict, and Annotated with
    Matching or Within. A number is finite, and a whole one below 2**63.
    """
    if shape is Any:
        return
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if origin is typing.NotRequired:
        conform(value, arguments[0], where)
    elif origin is Annotated:
        conform(value, arguments[0], where)
        _check_rule(value, arguments[1], where)
    elif origin in (typing.Union, types.UnionType):
        _check_union(value, arguments, where)
    elif origin is typing.Literal:
        _require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
    elif typing.is_typeddict(shape):
        _check_record(value, shape, where)
    elif (origin or shape) is list:
        _require(isinstance(value, list), where, "a list", value)
        for index, item in enumerate(value if arguments else ()):
            conform(item, arguments[0], f"{where}[{index}]")
    elif (origin or shape) is dict:
        _require(isinstance(value, dict), where, "an object", value)
        for name, item in value.items() if arguments else ():
            conform(item, arguments[1], f"{where}.{_shown(name)}")
    else:
        _check_scalar(value, shape, where)


def _check_record(value: Any, shape: Any, where: str) -> None:
    _require(isinstance(value, dict), where, "an object", value)
    for name, hint in _fields(shape):
        if name in value:
            conform(value[name], hint, f"{where}: {name}")
        elif name in shape.__required_keys__ and typing.get_origin(hint) is not typing.NotRequired:
            raise Damaged(f"{where} must have {name!r}, found {', '.join(map(_shown, list(value)[:8])) or 'nothing'}")


@functools.cache
def _fields(shape: Any) -> Iterable[tuple[str, Any]]:
    return typing.get_type_hints(shape, include_extras=True).items()


def _check_union(value: Any, options: tuple[Any, ...], where: str) -> None:
    # What is no null was meant to be one of the others: their message is the one that helps.
    wanted = [option for option in options if (option is type(None)) == (value is None)] or list(options)
    for option in wanted[:-1]:
        try:
            return conform(value, option, where)
        except Damaged:
            continue
    conform(value, wanted[-1], where)


def _check_scalar(value: Any, shape: Any, where: str) -> None:
    if shape is None or shape is type(None):
        _require(value is None, where, "null", value)
    elif shape is bool:
        _require(isinstance(value, bool), where, "true or false", value)
    elif shape is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and -LARGEST <= value < LARGEST, where, "a whole number of 64 bits", value)
    elif shape is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and -1e300 <= value <= 1e300, where, "a finite number", value)
    elif shape is str:
        _require(isinstance(value, str), where, "text", value)
    else:
        raise AssertionError(f"a shape is made of JSON types, found {shape!r}")


def _check_rule(value: Any, rule: Any, where: str) -> None:
    if isinstance(rule, Matching):
        _require(re.fullmatch(rule.pattern, value) is not None, where, rule.meaning, value)
    elif isinstance(rule, Within):
        most = "" if math.isinf(rule.high) else f" to {rule.high:,}"
        _require(rule.low <= value <= rule.high, where, f"a number from {rule.low:,}{most}", value)


def _require(holds: bool, where: str, wanted: str, value: Any) -> None:
    if not holds:
        raise Damaged(f"{where} must be {wanted}, found {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object of {len(value):,} keys"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= LARGEST:
        return "a whole number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
