"""Every declared type over every type that a file may have: a value is kept exactly, or it is a finding. Never another value."""

from __future__ import annotations

import datetime as dt
import json
import math
import zoneinfo
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.data import Column
from engine.config.tree import Config
from engine.data import column_checks
from engine.data.arrow_types import alike, as_keys, parse_type
from engine.data.parse import FALSE, TRUE, Reading, to_type
from engine.errors import UserError
from tests.data.helpers import read

ZONE = "Europe/Berlin"
BERLIN = zoneinfo.ZoneInfo(ZONE)
DECLARED = (
    "bool", "int8", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64", "string", "binary", "date", "time",
    "timestamp", "duration", "decimal(10,2)", "decimal(38,0)", "decimal(40,3)",
)  # fmt: skip
NIGHT = dt.datetime(2022, 1, 1, 23, 30)
WHOLE = [0, 1, -1, 5, 127, 128, 255, 256, 2**11 + 1, 2**24 + 1, 2**31, 2**53, 2**53 + 1, 2**60, 2**63 - 1]
MOMENTS = [NIGHT, dt.datetime(2022, 1, 1), dt.datetime(2022, 1, 1, 23), dt.datetime(1969, 12, 31, 23, 59, 59), None]
DECIMALS = [
    "0.10",
    "0.50",
    "1.00",
    "-7.25",
    "1234567890123456.78",
    "9007199254740993.00",
    "255.00",
    "16777217.00",
    "0.30",
]
SOURCES: dict[str, pa.Array] = {
    "bool": pa.array([True, False, None]),
    "int8": pa.array([0, -128, 127, None], pa.int8()),
    "int32": pa.array([0, 255, 2**24 + 1, -(2**31), None], pa.int32()),
    "int64": pa.array([*WHOLE, -(2**63), None], pa.int64()),
    "uint64": pa.array([*WHOLE[3:], 2**63, 2**64 - 1, None], pa.uint64()),
    "float16": pa.array(np.array([0.1, 1.5, 2.0, np.nan, np.inf], np.float16)),
    "float32": pa.array([0.1, 1.5, 2.0, float("nan"), float("inf"), 3e38, -0.0, None], pa.float32()),
    "float64": pa.array([0.1, 1.5, 2.0, float("nan"), float("-inf"), 1e300, 5e-324, 2.0**63, 2.0**53, 0.25, None]),
    "decimal(18,2)": pa.array([*map(Decimal, DECIMALS), None], pa.decimal128(18, 2)),
    "decimal(38,20)": pa.array([Decimal("0.1"), Decimal("0.12345678901234567891"), Decimal(3), None], pa.decimal128(38, 20)),
    "date32": pa.array([dt.date(2022, 1, 1), dt.date(1800, 1, 1), dt.date(9999, 12, 31), None]),
    "date64": pa.array([dt.date(2022, 1, 1), None], pa.date64()),
    "timestamp naive": pa.array(MOMENTS, pa.timestamp("us")),
    "timestamp ns": pa.array([1_641_079_800_000_000_001, 1_641_079_800_000_000_000, None], pa.int64()).cast(pa.timestamp("ns")),
    "timestamp s": pa.array(MOMENTS, pa.timestamp("s")),
    "timestamp UTC": pa.array(MOMENTS, pa.timestamp("us")).cast(pa.timestamp("us", "UTC")),
    "timestamp zoned": pa.array(MOMENTS, pa.timestamp("ms")).cast(pa.timestamp("ms", "America/New_York")),
    "time32": pa.array([0, 86_399, None], pa.time32("s")),
    "time64 ns": pa.array([1_500, 2_000, None], pa.int64()).cast(pa.time64("ns")),
    "duration ns": pa.array([1_500, 2_000, None], pa.int64()).cast(pa.duration("ns")),
    "string": pa.array(["5", "005", "1.10", "x", "true", "9007199254740993", "16777217", "2022-01-01", "2022-02-31", "10:00",
                        "2022-01-01T23:00:00Z", "2022-01-01 00:00", "1e5", "-0", "inf", " 7 ", "0.1", "300", "1e400", None]),
    "large string": pa.array(["5", "x", None], pa.large_string()),
    "dictionary": pa.array(["5", "x", "5", None]).dictionary_encode(),
    "binary": pa.array([b"5", b"\xff", None]),
    "null": pa.nulls(2),
}  # fmt: skip


def text_value(text: str, declared: str) -> Any:
    """What a text means as the declared type; None where it means nothing. Independent of the engine and of Arrow."""
    plain = text.strip()
    try:
        if declared == "bool":
            return True if plain in TRUE else False if plain in FALSE else None
        if declared.startswith(("int", "uint")):
            value = Decimal(plain)
            return int(value) if "e" not in plain.lower() and value == value.to_integral_value() else None
        if declared.startswith("float"):
            return int(plain) if plain.lstrip("+-").isdigit() else float(plain)
        if declared.startswith("decimal"):
            return Decimal(plain)
        if declared == "date":
            return dt.date.fromisoformat(plain) if len(plain) == 10 else None
        if declared == "time":
            return dt.time.fromisoformat(plain)
        if declared == "timestamp":
            moment = dt.datetime.fromisoformat(plain)
            return moment if moment.tzinfo else moment.replace(tzinfo=BERLIN)
    except (ValueError, InvalidOperation, OverflowError):
        return None
    return text


def is_kept(value: Any, result: Any, declared: str) -> bool:
    """Whether the result says what the value of the file says."""
    if isinstance(value, bytes) and declared != "binary":
        value = value.decode()
    if isinstance(value, str) and declared not in ("string", "binary"):
        written = value
        if (value := text_value(written, declared)) is None:
            return False
        if isinstance(value, float):  # a fraction in text is the nearest float of the type
            nearest = {"float16": np.float16, "float32": np.float32}.get(declared, float)
            if result == 0 and set("123456789") & set(written.lower().split("e")[0]):
                return False
            return bool(nearest(value) == result) or math.isnan(value)
    if declared == "string":
        return bool(result == value)
    if declared == "binary":
        return bool(result == (value.encode() if isinstance(value, str) else value))
    if isinstance(value, (int, float, Decimal)) and isinstance(result, (int, float, Decimal)):
        return is_same_number(value, result)
    if isinstance(value, dt.datetime) and not isinstance(result, dt.datetime):
        local = value.astimezone(BERLIN) if value.tzinfo else value
        return isinstance(result, dt.date) and local.replace(tzinfo=None) == dt.datetime.combine(result, dt.time())
    if isinstance(value, dt.date) and isinstance(result, dt.datetime):
        if not isinstance(value, dt.datetime):
            value = dt.datetime.combine(value, dt.time())
        return bool((value if value.tzinfo else value.replace(tzinfo=BERLIN)) == result)
    return type(value) is type(result) and bool(value == result)


def is_same_number(value: Any, result: Any) -> bool:
    """Equal numbers; a decimal and a float where either is the other, rounded to its digits."""
    if isinstance(value, Decimal) and isinstance(result, float):
        return abs(Decimal(result) - value) * 2 < Decimal(1).scaleb(value.as_tuple().exponent)  # type: ignore[arg-type]
    if isinstance(value, float) and isinstance(result, Decimal):
        return Decimal(repr(value)) == result
    if any(math.isnan(number) or math.isinf(number) for number in (value, result)):
        return str(float(value)) == str(float(result))
    return Fraction(value) == Fraction(result)


def python(array: pa.Array) -> list[Any]:
    """Values as Python has them; what it cannot hold as its number of the smallest unit."""
    found = []
    for scalar in array:
        try:
            found.append(scalar.as_py())
        except (ValueError, OverflowError):
            found.append(scalar.value)
    if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
        return [None if value is None else ns_moment(value) for value in found]
    if pa.types.is_duration(array.type) and array.type.unit == "ns":
        return [None if value is None else value.to_pytimedelta() for value in found]
    return found


def ns_moment(value: Any) -> Any:
    """A pandas Timestamp or a number of nanoseconds as a datetime, or None where microseconds do not hold it."""
    number = value if isinstance(value, int) else getattr(value, "value", None)
    if number is None:
        return value
    return dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=number // 1000) if number % 1000 == 0 else number


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("source", SOURCES)
def test_a_value_is_kept_exactly_or_is_a_finding(source: str, declared: str) -> None:
    array, kind = SOURCES[source], parse_type(declared)
    try:
        parsed = to_type(array, kind, Reading(ZONE))
    except UserError as error:
        assert "must be" in str(error) and declared.partition("(")[0] in str(error)
        return
    assert parsed.values.type == kind and len(parsed.values) == len(array)
    values, results, bad = python(array), python(parsed.values), set(parsed.bad.tolist())
    for row, (value, result) in enumerate(zip(values, results, strict=True)):
        if row in bad:  # a time of less than a microsecond, too, which Python does not hold
            assert result is None and parsed.reason
        elif result is None:
            assert value is None or (isinstance(value, str) and not value.strip())
        else:
            assert is_kept(value, result, declared), f"{value!r} became {result!r}"
    # A list of them is kept where its items are.
    listed = to_type(
        pa.ListArray.from_arrays(pa.array(range(len(array) + 1), pa.int32()), array), pa.list_(kind), Reading(ZONE)
    )
    assert listed.bad.tolist() == parsed.bad.tolist()
    kept = [None if row in bad else [result] for row, result in enumerate(results)]
    if kind != pa.string() or not bad:
        assert [
            None if item is None else python(pa.array(item, kind)) for item in listed.values.to_pylist()
        ] == kept or any(isinstance(value, float) and math.isnan(value) for value in results)


def test_what_is_exact_is_no_finding() -> None:
    """The other half of the table: exactness must not be had by refusing."""
    for values, declared in (
        (pa.array([2**60, -(2**63), 2**53 + 2]), "float64"),
        (pa.array([2**63], pa.uint64()), "float64"),
        (pa.array([Decimal("0.10"), Decimal("123456789012.34")]), "float64"),
        (pa.array([Decimal("0.10")]), "float32"),
        (pa.array([0.1]), "decimal(10,2)"),
        (pa.array([2.0, -3.0]), "int8"),
        (pa.array(["9007199254740994", "0.1", "123456789.123456789"]), "float64"),
        (pa.array([dt.datetime(2022, 1, 1, 23)], pa.timestamp("us", "UTC")), "date"),
        (pa.array([dt.datetime(2022, 1, 1)]), "date"),
    ):
        parsed = to_type(values, parse_type(declared), Reading(ZONE))
        assert not len(parsed.bad) and parsed.values.null_count == 0, (values, declared)
    assert to_type(pa.array([Decimal("0.10")]), pa.float32(), Reading()).values[0].as_py() == pytest.approx(
        np.float32(0.1), abs=0
    )
    zoned = to_type(SOURCES["timestamp UTC"], pa.date32(), Reading(ZONE))
    assert zoned.values[2].as_py() == dt.date(2022, 1, 2) and zoned.bad.tolist() == [0, 1, 3] and ZONE in zoned.reason


NUMBERS = [
    "5",
    "-0",
    "1.10",
    "9007199254740993",
    "9007199254740994",
    "16777217",
    "1e5",
    "1e400",
    "1e-400",
    "0.0000E-999",
    "1E-50",
    "0." + "0" * 400 + "1",
    "300",
    "0.1",
    "2.50",
    "-7",
]


@pytest.mark.parametrize(
    "declared", ["int8", "int64", "uint64", "float32", "float64", "decimal(10,2)", "bool", "string"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_of_text_files_are_kept_or_found_whatever_reads_them(kind: str, declared: str, tmp_path: Path) -> None:
    """Arrow's own readers and the careful ones; each value in a file of its own, so that no other one decides the way."""
    for text in NUMBERS:
        path = tmp_path / f"{abs(hash((text, declared)))}.{kind}"
        path.write_text(f"n,v\n1,{text}\n" if kind == "csv" else f'{{"n": 1, "v": {text}}}\n')
        table, staged = read(path, {"n": "int64", "v": declared})
        if not staged.tally.quarantined:
            assert is_kept(text, table["v"][0].as_py(), declared), f"{text} became {table['v'][0]}"
        elif kind == "csv":
            expected = to_type(pa.array([text]), parse_type(declared), Reading())
            assert expected.bad.tolist() == [0]


@pytest.mark.parametrize(
    ("value", "declared", "kept"),
    [
        ([1, 2], "list<int64>", [1, 2]), ([1.5], "list<int64>", None), ([2.0], "list<int64>", [2]), ([True], "list<int64>", None),
        (["1"], "list<int64>", None), ([2**53 + 1], "list<float64>", None), ([0.1], "list<float64>", [0.1]),
        ([1], "list<string>", None), (["a", None], "list<string>", ["a", None]), ([[1], [2]], "list<list<int64>>", [[1], [2]]),
        ([[1], [2.5]], "list<list<int64>>", None), ({"a": 1}, "map<string,int64>", [("a", 1)]),
        ({"a": 1.5}, "map<string,int64>", None),
        ({"a": 1}, "list<int64>", None), ([1], "map<string,int64>", None), (["2022-02-31"], "list<date>", None),
        (["2022-02-28"], "list<date>", [dt.date(2022, 2, 28)]), ([0.10], "list<decimal(10,2)>", [Decimal("0.10")]),
        ([], "list<int64>", []),
    ],
)  # fmt: skip
def test_items_of_lists_in_json_are_kept_or_the_list_is_found(
    value: Any, declared: str, kept: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "v": item}) + "\n" for n, item in enumerate((value, None))))
    table, staged = read(path, {"n": "int64", "v": declared})
    assert staged.tally.quarantined == (kept is None)
    assert table["v"].to_pylist() == ([None] if kept is None else [kept, None])


# ------------------------------------------------------------------------------- rules of the config: bounds, values, keys


@pytest.mark.parametrize(
    ("kind", "values", "rule", "kept"),
    [
        ("int64", [2**53, 2**53 + 1, 2**53 + 2], {"min": str(2**53 + 1)}, [2**53 + 1, 2**53 + 2]),
        ("int64", [2**53, 2**53 + 1, 2**53 + 2], {"max": 2**53 + 1}, [2**53, 2**53 + 1]),
        ("int64", [2**62 - 1, 2**62, 2**62 + 1], {"max": 2**62}, [2**62 - 1, 2**62]),
        ("int64", [2, 3, 4], {"min": 2.5, "max": 3.5}, [3]),
        ("int64", [-3, -2], {"min": -2.5}, [-2]),
        ("uint64", [2**64 - 2, 2**64 - 1], {"max": 2**64 - 2}, [2**64 - 2]),
        ("decimal(20,2)", [Decimal("12345678901234567.88"), Decimal("12345678901234567.89")], {"min": "12345678901234567.89"},
         [Decimal("12345678901234567.89")]),
        ("float64", [0.1, 0.2], {"max": 0.1}, [0.1]),
        ("float64", [1.0, 2.5, 2.0], {"values": ["1", "2.50"]}, [1.0, 2.5]),
        ("decimal(10,2)", [Decimal("1.10"), Decimal("1.20")], {"values": ["1.1"]}, [Decimal("1.10")]),
        ("int64", [5, 6], {"values": ["005"]}, [5]),
        ("bool", [True, False], {"values": ["yes"]}, [True]),
        ("date", [dt.date(2022, 1, 1), dt.date(2022, 1, 2)], {"values": ["2022-01-02"]}, [dt.date(2022, 1, 2)]),
        ("string", ["5", "005", " 5"], {"values": ["005"]}, ["005"]),
    ],
)  # fmt: skip
def test_bounds_and_allowed_values_are_compared_exactly(
    kind: str, values: list[Any], rule: dict[str, Any], kept: list[Any]
) -> None:
    column = schema.build(Column, {"type": kind, **rule})
    table = pa.table({"x": pa.array(values, parse_type(kind))})
    bad = {int(place) for finding in column_checks.find(table, {"x": column}, ZONE) for place in finding.positions}
    assert [value for place, value in enumerate(values) if place not in bad] == kept


def test_an_allowed_value_of_another_type_is_refused() -> None:
    column = schema.build(Column, {"type": "int64", "values": ["1", "x"]})
    with pytest.raises(UserError, match="values of a int64 column must be of that type, found 'x'"):
        column_checks.find(pa.table({"x": [1]}), {"x": column}, ZONE)


KEYS = {
    "int8": pa.int8(), "int64": pa.int64(), "uint64": pa.uint64(), "float32": pa.float32(), "float64": pa.float64(),
    "bool": pa.bool_(), "string": pa.string(), "large string": pa.large_string(), "date": pa.date32(),
    "naive": pa.timestamp("us"), "utc": pa.timestamp("us", "UTC"), "zoned": pa.timestamp("ms", ZONE),
    "decimal": pa.decimal128(9, 2),
    "other decimal": pa.decimal128(9, 3), "time": pa.time64("us"), "binary": pa.binary(),
}  # fmt: skip
LIKE = [{"int8", "int64", "uint64"}, {"float32", "float64"}, {"string", "large string"}, {"utc", "zoned"}]


@pytest.mark.parametrize("first", KEYS)
def test_keys_of_two_types_are_compared_only_where_the_types_are_alike(first: str) -> None:
    for second in KEYS:
        assert alike(KEYS[first], KEYS[second]) == (first == second or any({first, second} <= group for group in LIKE))


INTEGERS = [pa.int8(), pa.int64(), pa.uint8(), pa.uint64()]


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=30), st.sampled_from(INTEGERS), st.sampled_from(INTEGERS))
def test_integer_keys_of_any_width_are_equal_where_the_numbers_are(numbers: list[int], wide: Any, narrow: Any) -> None:
    numbers = [number for number in [*numbers, -1, 0, 255] if _fits(number, wide)]
    found = as_keys(pa.array(numbers, wide), narrow).to_pylist()
    assert found == [number if _fits(number, narrow) else None for number in numbers]


def _fits(number: int, kind: pa.DataType) -> bool:
    signed = pa.types.is_signed_integer(kind)
    return -(2 ** (kind.bit_width - 1)) * signed <= number < 2 ** (kind.bit_width - signed)


def test_a_foreign_key_of_another_type_is_refused() -> None:
    column = schema.build(Column, {"type": "bool", "references": "t.k"})
    with pytest.raises(UserError, match=r"data\.columns\.x must have the type of t\.k, int64, found bool"):
        column_checks.find_orphans(pa.table({"x": [True]}), {"x": column}, {"t": pa.table({"k": [1]})})
    column = schema.build(Column, {"type": "int64", "references": "t.k"})
    table = pa.table({"x": pa.array([1, -1, 2**40])})
    found = column_checks.find_orphans(table, {"x": column}, {"t": pa.table({"k": pa.array([1, 255], pa.uint8())})})
    assert found[0].positions.tolist() == [1, 2]


@pytest.mark.parametrize(("left", "right", "refused"), [
    ("bool", "int64", True), ("int64", "string", True), ("date", "timestamp", True), ("int64", "float64", True),
    ("decimal(9,2)", "decimal(9,3)", True), ("int32", "int64", False), ("decimal(9, 2)", "decimal(9,2)", False),
    ("float32", "float64", False), ("string", "string", False),
])  # fmt: skip
def test_an_as_of_view_matches_keys_of_one_type(left: str, right: str, refused: bool) -> None:
    columns = {
        "id": {"type": "string", "role": "id", "known_at": "prior"},
        "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
        "key": {"type": left, "known_at": "prior"},
    }
    tables = {"side": {"static": True, "columns": {"k": {"type": right}, "v": {"type": "float64"}}}}
    view = {"kind": "asof", "entity": ["key"], "on": ["k"], "table": "side", "columns": ["v"]}
    values = {
        "data": {"sources": {"s": {"path": "a", "columns": {"id": "string"}}}, "columns": columns, "tables": tables},
        "features": {"as_of": "at", "views": {"v": view}},
    }
    if not refused:
        assert schema.build(Config, values).features.views["v"].on == ("k",)
        return
    with pytest.raises(
        UserError, match=r"features\.views\.v matches 'key' .* with 'k' .*keys must be of the same type"
    ):
        schema.build(Config, values)


def test_text_in_parquet_is_read_as_text_elsewhere(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v": ["9007199254740993", "0.1", None]}), tmp_path / "a.parquet")
    table, staged = read(tmp_path / "a.parquet", {"v": "float64"})
    assert table["v"].to_pylist() == [0.1, None] and staged.tally.quarantined == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("list<int64>", [3, "x"]), ("list<string>", ["a", 3]), ("list<timestamp>", ["x"]), ("list<list<int64>>", [[1], 5]),
        ("map<string,int64>", {"a": 1, "b": "x"}), ("map<date,string>", {"2024-01-01": "a", "x": "b"}),
        ("map<timestamp,string>", {"": "a"}), ("map<time,list<int64>>", {"25:00:00": [1]}),
        ("list<map<date,string>>", [{"2024-01-01": "a"}, {"x": "b"}]), ("map<string,map<date,string>>", {"a": {"x": "b"}}),
        ("list<timestamp>", ["2024-01-01", ""]), ("list<date>", ["", None]), ("list<time>", [None, " "]),
        ("list<decimal(5,2)>", ["1.5", ""]), ("map<string,date>", {"a": None, "b": ""}), ("list<int64>", 3),
        ("list<list<date>>", [["2024-01-01"], [""]]), ("duration", "1h"), ("list<duration>", ["1h"]),
    ],
)  # fmt: skip
def test_a_wrong_element_or_key_sets_its_row_aside_and_not_the_file(kind: str, value: Any, tmp_path: Path) -> None:
    empty = {"l": [], "m": {}}.get(kind[0])
    lines = [{"id": number, "v": item} for number, item in enumerate([None, value, empty])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table, staged = read(tmp_path / "a.jsonl", {"id": "int64", "v": {"type": kind, "on_violation": "quarantine"}})
    assert table.to_pylist() == [{"id": 0, "v": None}, {"id": 2, "v": None if empty is None else []}]
    (record,) = staged.tally.table().to_pylist()
    assert (record["file"], record["row"], record["column"]) == (str(tmp_path / "a.jsonl"), 2, "v")
    assert (
        record["value"] == json.dumps(value)
        or record["value"].startswith(f"item {len(value)}: ")
        or value == ["", None]
    )


def test_the_item_that_cannot_be_read_is_shown_however_long_its_list_is(tmp_path: Path) -> None:
    days = ["2024-01-01"] * 1000
    rows = [[*days, ""], [*days, "x", "y"], [*days, 5]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"v": row}) for row in rows))
    pq.write_table(pa.table({"v": pa.array([*rows[:2], days], pa.list_(pa.string()))}), tmp_path / "a.parquet")
    shown = ["item 1001: ''", "item 1001: 'x'", "item 1001: '5'"]
    for name, found in (("a.jsonl", shown), ("a.parquet", shown[:2])):
        _, staged = read(tmp_path / name, {"v": "list<date>"})
        assert sorted(record["value"] for record in staged.tally.table().to_pylist()) == sorted(found)
        _, staged = read(tmp_path / name, {"v": {"type": "list<date>", "sensitive": True}})
        assert {record["value"] for record in staged.tally.table().to_pylist()} == {None}
