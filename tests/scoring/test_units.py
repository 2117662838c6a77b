"""Work units: what is cut, what is left, what counts as done."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.runtime import seal, storage
from engine.scoring import units

RANGES = st.lists(st.integers(0, 60), min_size=2, max_size=12, unique=True).map(sorted)


@given(RANGES, st.integers(1, 20), st.integers(1, 8))
def test_units_cover_every_row_once_and_meet_at_multiples_of_the_tile(edges: list[int], rows: int, tile: int) -> None:
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    cut = list(units.cut(ranges, rows, tile))
    assert [row for low, high in cut for row in range(low, high)] == [
        row for low, high in ranges for row in range(low, high)
    ]
    size = -(-rows // tile) * tile
    for low, high in cut:
        assert 0 < high - low <= size
        assert low % size == 0 or any(low == start for start, _ in ranges)
        assert high % size == 0 or any(high == stop for _, stop in ranges)


@given(RANGES)
def test_gaps_and_what_is_done_make_up_the_whole(edges: list[int]) -> None:
    done = list(zip(edges[::2], edges[1::2], strict=False))
    left = list(units.gaps((0, 61), done))
    rows = sorted(row for low, high in [*done, *left] for row in range(low, high))
    assert rows == list(range(61))


def write(parts: Path, unit: units.Unit, record: bool = True) -> None:
    part = units.part_path(parts, unit)
    with storage.atomic_path(part) as temporary:
        temporary.write_bytes(unit.name.encode())
    if record:
        written: units.UnitRecord = {
            "format": units.FORMAT,
            "start": unit.start,
            "stop": unit.stop,
            "digest": unit.digest,
            "rows": unit.rows,
            "quarantined": 0,
            "part": seal.record_of(part),
            "refused": None,
            "input": "0" * 64,
            "tiles": [],
            "profile": None,
            "reused": False,
            "seconds": {},
            "peak_memory_bytes": 0,
        }
        storage.write_json(units.record_path(parts, unit), seal.checked(written))


def test_only_units_with_a_record_and_whole_files_of_this_context_count(tmp_path: Path) -> None:
    done, torn, open_ = (units.make_unit(low, low + 10, "context") for low in (0, 10, 20))
    other = units.make_unit(30, 40, "another context")
    for unit in (done, torn, open_, other):
        write(tmp_path, unit, record=unit is not open_)
    units.part_path(tmp_path, torn).write_bytes(b"half")
    assert units.finished(tmp_path, (0, 40), "context") == [done]
    units.remove_others(tmp_path, [done])
    assert {path.name for path in tmp_path.iterdir()} == {f"{done.name}.part", f"{done.name}.json"}


def test_of_overlapping_units_one_counts(tmp_path: Path) -> None:
    wide, late = units.make_unit(0, 20, "c"), units.make_unit(10, 30, "c")
    for unit in (wide, late):
        write(tmp_path, unit)
    assert units.finished(tmp_path, (0, 30), "c") == [wide]


def test_a_context_that_changed_is_refused_and_named(tmp_path: Path) -> None:
    first = units.check_context(tmp_path, {"model": "a" * 64, "input": "b" * 64})
    assert units.check_context(tmp_path, {"model": "a" * 64, "input": "b" * 64}) == first
    with pytest.raises(UserError, match=r"the input changed since it began.*was bbbbbbbbbbbbbbbb, is cccccccccccccccc"):
        units.check_context(tmp_path, {"model": "a" * 64, "input": "c" * 64})
