"""Typed config out of plain mappings: what passes, what is refused, and what the message names."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import typing
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema
from engine.config.schema import build, key, section
from engine.config.tree import Config
from engine.config.units import Moment, Share, Size, Span
from engine.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Inner:
    SHORTHAND = "kind"
    kind: str = key("a", "what", choices=("a", "b", "off"))
    size: int = key(3, "how many", ge=1, lt=10)


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float = key(0.5, "share", gt=0, le=1)
    flag: bool = key(False, "whether")
    label: str | None = key(None, "name")
    widths: tuple[int, ...] = key((8,), "widths", ge=1)
    inner: Inner = section(Inner, "inner keys")
    named: dict[str, Inner] = key(factory=dict, help="by name")
    given: str = key(help="must be given")


@dataclass(frozen=True, kw_only=True)
class Meant:
    windows: tuple[Span, ...] = key((Span("7d"),), "spans")
    memory: Size | None = key(None, "size")
    limit: Share = key(Share("1%"), "share")
    known_at: Moment | None = key(None, "moment")


def refused(values: object) -> str:
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    return str(caught.value)


def test_defaults_fill_in_and_nested_mappings_become_objects() -> None:
    built = build(Outer, {"given": "x", "named": {"n": {"size": 4}, "m": "b"}})
    assert built.inner == Inner() and built.named == {"n": Inner(size=4), "m": Inner(kind="b")}


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "'given' must be given"),
        ({"given": "x", "rte": 1}, "unknown config key 'rte'. Did you mean 'rate'?"),
        ({"given": "x", "inner": {"sise": 1}}, "unknown config key 'inner.sise'. Did you mean 'inner.size'?"),
        ({"given": "x", "named": {"n": {"sise": 1}}}, "unknown config key 'named.n.sise'"),
        ({"given": "x", "rate": 0}, "rate must be greater than 0, found 0"),
        ({"given": "x", "rate": math.nan}, "rate must be a finite number, found nan"),
        ({"given": "x", "rate": "0.5"}, "rate must be a number, found '0.5'"),
        ({"given": "x", "rate": True}, "rate must be a number, found True"),
        ({"given": "x", "inner": {"size": 10}}, "inner.size must be less than 10, found 10"),
        ({"given": "x", "inner": {"size": 1.5}}, "inner.size must be a whole number, found 1.5"),
        ({"given": "x", "inner": {"kind": "c"}}, "inner.kind must be one of a, b, off, found 'c'"),
        ({"given": "x", "flag": 1}, "flag must be true or false, found 1"),
        ({"given": "x", "widths": 8}, "widths must be a list, found 8"),
        ({"given": "x", "widths": "88"}, "widths must be a list, found '88'"),
        ({"given": "x", "widths": [8, 0]}, "widths must be at least 1, found 0"),
        ({"given": "x", "named": [1]}, "named must be a mapping"),
        ({"given": None}, "given must be a text, found None"),
        ([1], "the config must be a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_what_was_found(values: object, message: str) -> None:
    assert message in refused(values)


def test_yaml_reads_off_as_false_and_a_text_key_takes_it_back() -> None:
    assert build(Inner, {"kind": False}).kind == "off"
    assert build(Outer, {"given": "x", "flag": "off"}).flag is False


def test_whole_floats_are_whole_numbers() -> None:
    assert build(Inner, {"size": 4.0}).size == 4


@given(st.integers(-5, 20))
def test_bounds_hold_exactly(size: int) -> None:
    if 1 <= size < 10:
        assert build(Inner, {"size": size}).size == size
    else:
        with pytest.raises(UserError):
            build(Inner, {"size": size})


def test_plain_and_build_are_inverse() -> None:
    built = build(Outer, {"given": "x", "named": {"n": "b"}, "widths": [1, 2]})
    assert build(Outer, schema.plain(built)) == built


def test_a_text_with_a_meaning_is_parsed_once_and_stays_the_text_as_written() -> None:
    values = {"windows": ["90min", "1.50h"], "memory": 5_000, "limit": 0.25, "known_at": "due - 1h"}
    built = build(Meant, values)
    for meant in (built, pickle.loads(pickle.dumps(built)), copy.deepcopy(built)):
        assert meant == built
        assert [window.microseconds for window in meant.windows] == [5_400_000_000, 5_400_000_000]
        assert (meant.memory.bytes, meant.limit.fraction) == (5_000, 0.25)
        assert (meant.known_at.column, meant.known_at.offset) == ("due", -3_600_000_000)
    written = {**values, "memory": "5000", "limit": "0.25"}
    assert schema.plain(built) == json.loads(json.dumps(dataclasses.asdict(built))) == written
    assert {type(item) for item in [*schema.plain(built).values(), *schema.plain(built)["windows"]]} == {str, list}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"windows": ["7d", "7"]}, r"windows\[1\]: a span must be a number and one of .*, found '7'"),
        ({"memory": "4 apples"}, "memory: a size must be .*, found '4 apples'"),
        ({"memory": ["4GB"]}, r"memory must be a text, found \['4GB'\]"),
        ({"memory": ""}, "memory: a size must be .*, found ''"),
        ({"limit": 1.5}, "limit: a share must be between 0 and 1 .*, found '1.5'"),
        ({"known_at": "1h"}, "known_at: a moment must be .*, found '1h'"),
    ],
)
def test_a_text_without_the_meaning_is_refused_by_its_key(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Meant, values)


def sections(cls: type) -> Iterator[type]:
    yield cls
    for hint in schema.hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part)  # type: ignore[arg-type]


def test_every_default_of_the_tree_has_the_type_that_its_key_is_read_as() -> None:
    assert len({*sections(Config)}) > 25
    for cls in sections(Config):
        for field in dataclasses.fields(cls):
            if isinstance(field.default, str):
                hint = schema.hints(cls)[field.name]
                assert type(field.default) in (hint, *typing.get_args(hint)), f"{cls.__name__}.{field.name}"


def test_every_key_of_the_tree_says_what_it_means() -> None:
    silent = [path for path, _, _, meaning in schema.documented(Config) if not meaning]
    assert silent == []


def test_every_documented_default_is_the_default() -> None:
    values = schema.plain(Config(), whole=True)
    for path, _, default, _ in schema.documented(Config):
        if "<name>" not in path:
            node = values
            for part in path.split("."):
                node = node[part]
            shown = list(default) if isinstance(default, tuple) else default
            assert node == shown, path


def test_nearest_offers_a_near_name_or_all() -> None:
    assert nearest("trian", ["train", "score"]) == " Did you mean 'train'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b."
    assert nearest("zzz", []) == ""
