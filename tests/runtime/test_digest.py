"""Equal content has equal digests however it is laid out; different content has not."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import itertools
import os
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.runtime import digest

COLUMNS = {
    "text": pa.array(["a", None, "", "Ωλ", "a"]),
    "code": pa.array(["x", "y", None, "x", "y"]).dictionary_encode(),
    "whole": pa.array([1, None, 3, -4, 0], pa.int32()),
    "real": pa.array([0.0, -0.0, float("nan"), None, 1e308]),
    "truth": pa.array([True, False, None, True, True]),
    "when": pa.array([0, None, 1, 2, 3], pa.timestamp("us", "UTC")),
    "money": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("0.00"), decimal.Decimal("2.50"), None]),
    "bytes": pa.array([b"a", None, b"", b"\0", b"a"]),
    "mark": pa.array([b"abc", None, b"\0\0\0", b"abd", b"abc"], pa.binary(3)),
    "list": pa.array([[1], None, [], [1, 2], [3]]),
    "empty": pa.nulls(5),
}
TABLE = pa.table(COLUMNS)


def in_pieces(table: pa.Table, cuts: list[int]) -> str:
    edges = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    found = digest.TableDigest(table.schema)
    for start, stop in itertools.pairwise(edges):
        found.update(table.slice(start, stop - start))
    return found.hexdigest()


def test_the_digests_of_stored_datasets_stay_valid() -> None:
    """Computed before the values of a column were hashed as they lie in memory."""
    assert digest.of_table(TABLE) == "9830b2f790a67d119cf616ad190adffdaba0b89e48bd5f8f528d487cfa0b40f8"


@given(st.lists(st.integers(0, 5), max_size=5))
def test_any_cutting_of_the_rows_gives_the_same_digest(cuts: list[int]) -> None:
    assert in_pieces(TABLE, cuts) == digest.of_table(TABLE)


@pytest.mark.parametrize("name", COLUMNS)
def test_slices_with_an_offset_are_read_where_they_begin(name: str) -> None:
    table = TABLE.select([name])
    copied = pa.table({name: table.column(name).combine_chunks().take(pa.array([1, 2, 3]))})
    assert digest.of_table(table.slice(1, 3)) == digest.of_table(copied)


@pytest.mark.parametrize("name", sorted(set(COLUMNS) - {"empty"}))
def test_every_value_counts(name: str) -> None:
    table = TABLE.select([name])
    seen = {digest.of_table(table.take(pa.array(rows))) for rows in ([0, 1], [1, 0], [0, 3], [0], [1, 1])}
    assert len(seen) == 5


def test_the_layout_does_not_count() -> None:
    plain = pa.table({"a": ["x", "y", "x"]})
    assert digest.of_table(plain) == digest.of_table(pa.table({"a": plain["a"].dictionary_encode()}))
    assert digest.of_table(plain) == digest.of_table(plain.cast(pa.schema([("a", pa.large_string())])))


def test_what_lies_under_a_null_does_not_count() -> None:
    def with_garbage(value: int) -> pa.Table:
        valid = pa.py_buffer(np.packbits([1, 0, 1], bitorder="little"))
        data = pa.py_buffer(np.array([1, value, 3], np.int64))
        return pa.table({"a": pa.Array.from_buffers(pa.int64(), 3, [valid, data])})

    assert digest.of_table(with_garbage(7)) == digest.of_table(with_garbage(0))
    assert digest.of_table(with_garbage(7)) == digest.of_table(pa.table({"a": [1, None, 3]}))


def test_nan_is_one_value_but_a_null_is_not_nan_and_minus_zero_is_not_zero() -> None:
    other_nan = np.array([0x7FF8000000000001], np.uint64).view(np.float64)
    first = digest.of_table(pa.table({"a": [float("nan")]}))
    assert first == digest.of_table(pa.table({"a": pa.array(other_nan)}))
    assert first != digest.of_table(pa.table({"a": pa.array([None], pa.float64())}))
    assert digest.of_table(pa.table({"a": [0.0]})) != digest.of_table(pa.table({"a": [-0.0]}))


def test_a_boundary_between_texts_cannot_move() -> None:
    tables = [pa.table({"a": values}) for values in (["ab", "c"], ["a", "bc"], ["abc", ""], ["", "abc"])]
    assert len({digest.of_table(table) for table in tables}) == 4
    assert digest.of_bytes(b"ab", b"c") != digest.of_bytes(b"a", b"bc")


def test_names_types_order_and_rows_count() -> None:
    one = pa.table({"a": [1], "b": [1]})
    others = [
        one.select(["b", "a"]),
        one.rename_columns(["a", "c"]),
        one.cast(pa.schema({"a": "int32", "b": "int64"})),
        one.slice(0, 0),
    ]
    assert digest.of_table(one) not in {digest.of_table(other) for other in others}


def test_canonical_json_is_the_same_for_equal_values() -> None:
    assert digest.of_json({"b": 1, "a": (1, 2)}) == digest.of_json({"a": [1, 2], "b": np.int64(1)})
    assert digest.of_json({"a": {3, 1}}) == digest.of_json({"a": [1, 3]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest.of_json(float("nan"))
    with pytest.raises(TypeError, match="not a JSON value"):
        digest.of_json(datetime.date(2020, 1, 1))


def test_a_file_is_hashed_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = digest.of_file(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    assert digest.of_file(path) == hashlib.sha256(b"two").hexdigest()
    with pytest.raises(UserError, match="changed while it was read"):
        digest.check_unchanged(path, first)


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    digest.of_file(path)
    other.write_bytes(b"two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert digest.of_file(path) == hashlib.sha256(b"two").hexdigest()


def test_two_changes_within_one_tick_of_the_file_systems_clock_are_two_digests(tmp_path, monkeypatch) -> None:
    path, stat = tmp_path / "a", os.stat

    def coarse(place):
        found, tick = stat(place), 10_000_000
        times = {name: getattr(found, name) // tick * tick for name in ("st_mtime_ns", "st_ctime_ns")}
        return types.SimpleNamespace(st_ino=found.st_ino, st_size=found.st_size, **times)

    monkeypatch.setattr(digest, "os", types.SimpleNamespace(stat=coarse))
    for at in range(300):
        path.write_bytes(at.to_bytes(2, "little"))
        assert digest.of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_has_lain_is_read_once(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    monkeypatch.setattr(digest, "TICK", -3600 * 10**9)  # an hour passes
    found = digest.of_file(path)
    monkeypatch.setattr(digest.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    assert digest.of_file(path) == found
