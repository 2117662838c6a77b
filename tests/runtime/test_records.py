"""A record that is damaged or hostile is a sentence that names the file and the key; it costs little and stops nobody else."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.runtime import records
from engine.runtime.records import Damaged, Matching, Within


class Part(TypedDict):
    name: str
    rows: Annotated[int, Within(0, 10)]


class Whole(TypedDict):
    digest: records.Digest
    parts: list[Part]
    kind: Literal["a", "b"]
    rate: float | None
    by_name: dict[str, bool]
    note: NotRequired[str]


GOOD: dict[str, Any] = {
    "digest": "0" * 64,
    "parts": [{"name": "x", "rows": 3}],
    "kind": "a",
    "rate": 1,
    "by_name": {"y": True},
    "unknown": [],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with another value at `parts.0.rows`."""
    made = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    node = made
    for parent in parents:
        node = node[int(parent) if parent.isdigit() else parent]
    node[last] = value
    return made


def test_a_record_of_its_shape_passes_and_unknown_keys_stay(tmp_path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    assert records.read(tmp_path / "r.json", Whole) == GOOD


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "0" * 64, "x"]),
    lambda values: (
        st.lists(values, max_size=2) | st.dictionaries(st.sampled_from([*GOOD, "name", "note"]), values, max_size=2)
    ),
)


@given(path=st.sampled_from([*GOOD, "note", "parts.0.rows", "parts.0.name", "by_name.y"]), value=JSON)
def test_what_the_quick_test_lets_pass_has_the_shape(path: str, value: Any) -> None:
    made = changed(path, value)
    assert not records._fits(Open)(made) or conforms(made, Open)


class Open(TypedDict):
    digest: records.Digest
    parts: list[Part]
    rate: float | None
    by_name: dict[str, bool]
    note: NotRequired[str]
    unknown: list[Any]


def conforms(value: Any, shape: Any) -> bool:
    try:
        records.conform(value, shape, "r")
    except Damaged:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("digest", "../../etc", "digest must be 64 hex digits, found '../../etc'"),
        ("digest", 5, "digest must be text, found 5"),
        ("parts", {}, "parts must be a list, found an object of 0 keys"),
        ("parts.0.rows", 11, "parts[0]: rows must be a number from 0 to 10, found 11"),
        ("parts.0.rows", True, "rows must be a whole number of 64 bits, found True"),
        ("parts.0.rows", 1.0, "rows must be a whole number of 64 bits, found 1.0"),
        ("parts.0.rows", 10**30, "found a whole number beyond 64 bits"),
        ("parts.0.name", None, "name must be text, found None"),
        ("kind", "c", "kind must be one of 'a', 'b', found 'c'"),
        ("kind", [], "kind must be one of 'a', 'b', found a list of 0"),
        ("rate", "1", "rate must be a finite number, found '1'"),
        ("by_name.y", 1, "by_name.'y' must be true or false, found 1"),
        ("note", 7, "note must be text, found 7"),
    ],
)
def test_what_is_of_another_shape_is_named(tmp_path, path, value, said) -> None:
    (tmp_path / "r.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(Damaged) as caught:
        records.read(tmp_path / "r.json", Whole)
    assert said in str(caught.value) and str(tmp_path / "r.json") in str(caught.value)


def test_a_required_key_that_lacks_is_named_and_another_may_lack(tmp_path) -> None:
    for name in GOOD:
        (tmp_path / "r.json").write_text(json.dumps({key: value for key, value in GOOD.items() if key != name}))
        if name == "unknown":
            records.read(tmp_path / "r.json", Whole)
        else:
            with pytest.raises(Damaged, match=f"must have '{name}'"):
                records.read(tmp_path / "r.json", Whole)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{}", "7", '"x"', "{", "\0", "NaN", '{"a": Infinity}', "[" * 100_000, "[" * 70 + "]" * 70,
        '{"a":' * 5_000 + "1" + "}" * 5_000, "9" * 100_000, '{"n": 1' + "0" * 5_000 + "}", '{"digest": 1e999}', "\ufeff{}",
    ],
)  # fmt: skip
def test_text_that_is_no_record_is_a_sentence(tmp_path, text) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(Damaged, match=r"r\.json"):
        records.read(tmp_path / "r.json", Whole)


def test_bytes_that_are_no_text_a_folder_and_nothing_are_sentences(tmp_path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    (tmp_path / "folder").mkdir()
    for name in ("bytes", "folder", "nothing"):
        with pytest.raises(UserError, match=name):
            records.read(tmp_path / name, Whole)


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path) -> None:
    with open(tmp_path / "r.json", "wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(Damaged, match="at most 67,108,864 bytes, found 1,099,511,627,776"):
        records.read(tmp_path / "r.json", dict)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and time.monotonic() - began < 5


@pytest.mark.parametrize("unit", ["{}", "[]", "0", '"a"'])
def test_a_record_of_very_many_values_is_refused_before_they_are_made(tmp_path, monkeypatch, unit) -> None:
    monkeypatch.setattr(records, "MOST_VALUES", 2**15)
    (tmp_path / "r.json").write_text("[" + f"{unit}," * records.MOST_VALUES + unit + "]")
    tracemalloc.start()
    with pytest.raises(Damaged, match=r"r\.json must be JSON: it must hold at most 32,768 values, found more"):
        records.read(tmp_path / "r.json", list)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (tmp_path / "r.json").stat().st_size
    (tmp_path / "r.json").write_text(json.dumps([unit * records.MOST_VALUES, ',\\"[' * records.MOST_VALUES]))
    assert len(records.read(tmp_path / "r.json", list)) == 2, "signs in texts are no values"


def test_four_million_values_are_too_many() -> None:
    with pytest.raises(Damaged, match="at most 4,194,304 values, found more"):
        records.parse("[" + "0," * 2**22 + "0]", list, "r.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.sampled_from(["digest", "parts", "kind", "rate", "by_name", "parts.0.rows", "parts.0.name", "note"]), json_values
)
def test_any_value_in_any_place_passes_or_is_a_sentence(path, value) -> None:
    try:
        records.parse(json.dumps(changed(path, value)), Whole, "r.json")
    except Damaged as error:
        assert "r.json" in str(error) and len(str(error)) < 400


def test_a_shape_that_is_no_json_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="made of JSON types"):
        records.conform(1, set, "x")
    assert Matching("a", "b") != Matching("a", "c")
