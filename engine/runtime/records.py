"""Reading of records: JSON files of runs, bundles, registries and the store, which may come from untrusted sources.

The room that writes a record describes it as a TypedDict or a dataclass. `read` checks size, depth and shape before a value
is used, so that a damaged or hostile file gives an error message and never a traceback. Unknown keys are kept: a newer
engine may have written them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")
MOST_BYTES = 64 * 2**20
DEEPEST = 64
MOST_VALUES = 2**22
LARGEST = 2**63  # whole numbers beyond 64 bits, signed or not, are kept as text by those who write them
SHOWN = 80
_SIGN = re.compile(r'"(?:[^"\\]|\\.)*"|[{\[,]', re.DOTALL)  # a text, or what stands before a value


@dataclass(frozen=True)
class Matching:
    """A text that must match a pattern as a whole; `meaning` describes it for messages."""

    pattern: str
    meaning: str


@dataclass(frozen=True)
class Within:
    """A number from `low` to `high`, both included."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Format:
    """The number of a record's format. It is the first key of a shape, so that it is checked before the other keys."""

    newest: int
    oldest: int = 1
    remedy: str = "make it again"  # for a format that is too old for this engine


Digest = Annotated[str, Matching(r"[0-9a-f]{64}", "64 hex digits")]
Count = Annotated[int, Within(0, LARGEST - 1)]
Number = Any  # a number, or null where a `reason` is given: its arithmetic is that of the code that writes it
Instant = Annotated[int, Within(-LARGEST, LARGEST - 1)]  # microseconds since 1970 UTC


class Damaged(UserError):
    """A record with a wrong content."""


def read(path: Path, shape: type[T], most: int = MOST_BYTES) -> T:
    """The record in `path`, checked against `shape` (a TypedDict, or another type hint).

    Raises Damaged, naming the file and the key; UserError if the file does not exist.
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


def parse(text: str, shape: type[T], where: str) -> T:
    """The JSON value of a text, checked in the same way; `where` names it in messages."""
    try:
        check_values(text)
        value = json.loads(text, parse_constant=_refuse)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except RecursionError:
        raise Damaged(f"{where} must be nested at most {DEEPEST} deep, found more") from None
    except ValueError as error:  # also a whole number of thousands of digits
        raise Damaged(f"{where} must be JSON: {error}") from None
    _check_depth(value, where)
    fits: Callable[[Any], bool] = _fits(shape)  # type: ignore[arg-type]
    if not fits(value):
        conform(value, shape, where)
    return value  # type: ignore[no-any-return]


def check_values(text: str) -> None:
    """Raise ValueError where JSON holds more values than MOST_VALUES: an empty object takes thirty times its bytes."""
    if sum(map(text.count, "{[,")) > MOST_VALUES:  # those in texts included
        signs = itertools.islice((found for found in _SIGN.finditer(text) if found[0][0] != '"'), MOST_VALUES, None)
        if next(signs, None):
            raise ValueError(f"it must hold at most {MOST_VALUES:,} values, found more")


def filled(kind: type[T], items: Sequence[Mapping[str, object]], where: str) -> tuple[T, ...]:
    """A dataclass from the known keys of each item; lists become tuples and whole numbers floats where it has those types.

    Raises Damaged if an item does not have the dataclass's shape.
    """
    hints = typing.get_type_hints(kind)
    make = {name: {float: float, tuple: tuple}.get(typing.get_origin(hint) or hint) for name, hint in hints.items()}
    made = []
    for index, item in enumerate(items):
        conform(item, kind, f"{where}[{index}]")
        known = {name: rule(item[name]) if rule else item[name] for name, rule in make.items() if name in item}
        made.append(kind(**known))
    return tuple(made)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


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
    """Raise Damaged unless a JSON value has the shape.

    A shape is Any, None, bool, int, float, str, list, tuple (a list in JSON), dict with text keys, a union, Literal, TypedDict,
    dataclass, or Annotated with Matching, Within or Format. Numbers must be finite, whole numbers must fit 64 bits.
    """
    if shape in (Any, object):
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
    elif typing.is_typeddict(shape) or dataclasses.is_dataclass(shape):
        _check_record(value, shape, where)
    elif (origin or shape) in (list, tuple):
        _check_items(value, origin is tuple and arguments[-1] is not ..., arguments, where)
    elif (origin or shape) is dict:
        _require(isinstance(value, dict), where, "an object", value)
        for name, item in value.items() if arguments else ():
            conform(item, arguments[1], f"{where}.{_shown(name)}")
    else:
        _check_scalar(value, shape, where)


@functools.cache
def _fits(shape: Any) -> Callable[[Any], bool]:
    """A quick test that finds most values of a shape right; `conform` decides on the others and says what is wrong."""
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if shape in (Any, object):
        return lambda _: True
    if shape in (int, float, bool):  # of exactly this type, within bounds that need no thought
        return lambda value: type(value) is shape and -LARGEST <= value < LARGEST
    if shape is str:
        return lambda value: type(value) is str
    if shape in (None, type(None)):
        return lambda value: value is None
    if origin is Annotated and isinstance(arguments[1], Within):
        plain, least, most = _fits(arguments[0]), arguments[1].low, arguments[1].high
        return lambda value: plain(value) and least <= value <= most
    if origin is Annotated and isinstance(arguments[1], Matching):
        match = re.compile(arguments[1].pattern).fullmatch
        return lambda value: type(value) is str and match(value) is not None
    if origin is Annotated and isinstance(arguments[1], Format):
        return lambda value: type(value) is int and arguments[1].oldest <= value <= arguments[1].newest
    if origin is typing.NotRequired:
        return _fits(arguments[0])
    if origin in (typing.Union, types.UnionType):
        options = [_fits(option) for option in arguments]
        return lambda value: any(test(value) for test in options)
    if typing.is_typeddict(shape):
        fields = [(name, _fits(hint), required) for name, hint, required in _fields(shape)]
        return lambda value: (
            type(value) is dict
            and all(test(value[name]) if name in value else not required for name, test, required in fields)
        )
    if origin in (list, dict):
        item = _fits(arguments[-1])
        return lambda value: type(value) is origin and all(map(item, value.values() if origin is dict else value))
    return lambda _: False


def _check_items(value: Any, each: bool, hints: tuple[Any, ...], where: str) -> None:
    """`each`: the list has one item for each hint; otherwise all items have the first."""
    wanted = f"a list of {len(hints)}" if each else "a list"
    _require(isinstance(value, list) and (not each or len(value) == len(hints)), where, wanted, value)
    for index, item in enumerate(value if hints else ()):
        conform(item, hints[index if each else 0], f"{where}[{index}]")


def _check_record(value: Any, shape: Any, where: str) -> None:
    _require(isinstance(value, dict), where, "an object", value)
    for name, hint, required in _fields(shape):
        if name in value:
            conform(value[name], hint, f"{where}: {name}")
        elif required:
            raise Damaged(f"{where} must have {name!r}, found {', '.join(map(_shown, list(value)[:8])) or 'nothing'}")


@functools.cache
def _fields(shape: Any) -> Sequence[tuple[str, Any, bool]]:
    """(name, hint, whether it is required) of each key."""
    hints = typing.get_type_hints(shape, include_extras=True)
    if typing.is_typeddict(shape):
        needed = {name for name in shape.__required_keys__ if typing.get_origin(hints[name]) is not typing.NotRequired}
        return [(name, hint, name in needed) for name, hint in hints.items()]
    return [
        (item.name, hints[item.name], item.default is item.default_factory is dataclasses.MISSING)
        for item in dataclasses.fields(shape)
        if not item.name.startswith("_")
    ]


def _check_union(value: Any, options: tuple[Any, ...], where: str) -> None:
    # A value other than null is checked against the other options, whose message is the helpful one.
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
        _require(whole and -LARGEST <= value < 2 * LARGEST, where, "a whole number of 64 bits", value)
    elif shape is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        most = LARGEST if isinstance(value, int) else sys.float_info.max
        _require(number and abs(value) <= most, where, "a finite number", value)
    elif shape is str:
        _require(isinstance(value, str), where, "text", value)
    else:
        raise AssertionError(f"a shape is made of JSON types, found {shape!r}")


def _check_rule(value: Any, rule: Any, where: str) -> None:
    if isinstance(rule, Format):
        wanted = f"{rule.oldest} to {rule.newest}" if rule.oldest < rule.newest else f"{rule.newest}"
        remedy = rule.remedy if value < rule.oldest else "use a newer engine"
        if not rule.oldest <= value <= rule.newest:
            raise Damaged(f"{where} must be {wanted}, which is what this engine reads, found {value}: {remedy}")
    elif isinstance(rule, Matching):
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
