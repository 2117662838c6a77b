"""Values at the ends of their types: kept exactly or quarantined by file, row and column; what describes them is finite."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import units
from engine.data import calendar, profile, show
from engine.data.parse import FIRST_YEAR, LAST_YEAR
from engine.runtime import digest, storage
from tests.data.helpers import build, config

UTC = pa.timestamp("us", tz="UTC")
ENDS = np.iinfo(np.int64)
NEW_YEAR_10000 = 253_402_300_800_000_000
ISO = "lies beyond the years -32000 to 32000, which the calendar reaches"


def numbers(kind: pa.DataType, *values: int | None) -> pa.Array:
    """Values of a type of time from its stored numbers."""
    return pa.array(values, pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)


def nested(*values: list[int] | None) -> pa.Array:
    return pa.array(values, pa.list_(pa.int64())).cast(pa.list_(UTC))


# (declared type, what stands in the file, rows that are quarantined)
KEPT: list[tuple[str, pa.Array, list[int]]] = [
    ("float64", pa.array([1.0, 1e160, 1.7976931348623157e308, -1.7976931348623157e308]), []),
    ("float64", pa.array([-0.0, 0.0, 5e-324, -1e-310, 2.2250738585072014e-308]), []),
    ("float64", pa.array([float("inf"), float("-inf"), float("nan"), None]), []),
    ("float32", pa.array([3.4e38, -3.4e38, 1e-45], pa.float32()), []),
    ("float16", pa.array(np.array([65504, -65504, 6e-8], np.float16)), []),
    ("int64", pa.array([ENDS.max, ENDS.min, 0]), []),
    ("uint64", pa.array([2**64 - 1, 0], pa.uint64()), []),
    ("decimal(76,2)", pa.array([Decimal("9" * 74 + ".99"), Decimal("-" + "9" * 74 + ".99")], pa.decimal256(76, 2)), []),
    ("string", pa.array(["", "\0", "a\0b", "x" * 1_000_000, "\U0010ffff", None]), []),
    ("binary", pa.array([b"", b"\0", b"\xff" * 100_000]), []),
    ("time", numbers(pa.time64("us"), 0, 86_399_999_999), []),
    ("duration", numbers(pa.duration("us"), ENDS.max, ENDS.min + 1, 0), []),
    ("date", numbers(pa.date32(), 0, 2_932_896, 2_932_897, -719_529, -719_530), []),
    ("date", numbers(pa.date32(), 0, 2**31 - 1, -(2**31)), [2, 3]),
    ("timestamp", numbers(UTC, 0, NEW_YEAR_10000 - 1, NEW_YEAR_10000, -62_135_596_800_000_001, -62_167_219_200_000_001), []),
    ("timestamp", numbers(UTC, 0, ENDS.max, ENDS.min + 1, ENDS.min), [2, 3, 4]),
    ("timestamp", numbers(pa.timestamp("ms", tz="UTC"), 0, ENDS.max, ENDS.min + 1), [2, 3]),
    ("timestamp", numbers(pa.timestamp("ns"), 0, ENDS.max - 1_807, ENDS.min + 808), []),
    ("list<timestamp>", nested([NEW_YEAR_10000, 0], [ENDS.max], [], None, [1]), []),
]  # fmt: skip


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Kiritimati"])
@pytest.mark.parametrize(
    ("kind", "values", "bad"), KEPT, ids=[f"{kind}-{place}" for place, (kind, _, _) in enumerate(KEPT)]
)
def test_the_ends_of_a_type_are_kept_or_quarantined_and_never_end_an_ingest(
    kind: str, values: pa.Array, bad: list[int], zone: str, tmp_path: Path
) -> None:
    if zone != "UTC" and "time" not in kind:
        pytest.skip("no zone in it")
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"id": pa.array(range(len(values))), "at": numbers(UTC, *range(len(values))), "v": values}), path
    )
    columns = {"id": "int64", "at": "timestamp", "v": kind}
    declared: dict[str, Any] = {name: {"type": type_} for name, type_ in columns.items()}
    declared["id"] |= {"role": "id"}
    declared["at"] |= {"role": "event_time"}
    given_ = config(
        tmp_path,
        {"sources": {"t": {"path": str(path), "columns": columns}}, "columns": declared, "time_zone": zone, "max_quarantine": 1},
    )  # fmt: skip
    dataset, _ = build(given_)
    found = storage.read_parquet(dataset.directory / "quarantine" / "quarantine.parquet").to_pylist()
    assert [(item["file"], item["row"], item["column"]) for item in found] == [(str(path), row, "v") for row in bad]
    assert {item["reason"] for item in found} <= {ISO, "cannot be kept exactly as timestamp"}
    kept = pa.array([place for place in range(len(values)) if place + 1 not in bad])
    expected = values.take(kept)
    stored = dataset.read(["v"])["v"].combine_chunks()
    if values.type == pa.timestamp("ns"):
        assert len(stored) == len(expected)  # local times in a zone: their shift is tested elsewhere
    elif pa.types.is_nested(values.type):
        assert digest.python_values(stored) == digest.python_values(expected)
    else:
        assert storage_bytes(stored) == storage_bytes(expected.cast(stored.type))
    described = json.loads((dataset.directory / "profile.json").read_text())
    json.dumps(described, allow_nan=False)
    assert f"{dataset.rows:,} rows" in show.page(dataset, described)


def storage_bytes(values: pa.Array) -> list[Any]:
    """Null, or the very bits; -0.0 is not 0.0."""
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.int32() if values.type.bit_width == 32 else pa.int64())
    return [repr(value) for value in values.to_pylist()]


finite = st.floats(allow_nan=False, allow_infinity=False)
awkward = st.sampled_from([1.7976931348623157e308, -1.7976931348623157e308, 1e160, 5e-324, -5e-324, 0.0, -0.0, 1.0])


@settings(max_examples=150, deadline=None)
@given(st.lists(finite | awkward, min_size=1, max_size=30))
def test_a_histogram_of_any_finite_numbers_is_finite_ascending_and_counts_each_once(values: list[float]) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = profile._histogram(pa.chunked_array([pa.array(values, pa.float64())]))
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert np.isfinite([*edges, found["mean"]]).all() and min(values) == edges[0] and max(values) == edges[-1]
    assert sum(counts) == len(values) and edges == sorted(edges)
    assert min(values) <= found["mean"] <= max(values) or np.isclose(found["mean"], values).any()
    json.dumps(found, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(st.integers(-(10**18), 10**18), st.sampled_from(["UTC", "America/New_York", "Asia/Tokyo"]))
def test_the_text_of_any_instant_reads_back_as_that_instant(instant: int, zone: str) -> None:
    assert units.instant(units.format_instant(instant, zone), "UTC") == instant


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.none() | st.lists(st.sampled_from([0, 1, NEW_YEAR_10000, ENDS.max]), max_size=3), max_size=8),
    st.integers(0, 8),
)
def test_the_digest_of_times_that_python_lacks_does_not_depend_on_the_cutting(
    values: list[list[int] | None], cut: int
) -> None:
    table = pa.table({"v": nested(*values)})
    whole, parts = digest.TableDigest(table.schema), digest.TableDigest(table.schema)
    whole.update(table)
    parts.update(table.slice(0, cut))
    parts.update(table.slice(cut))
    assert whole.hexdigest() == parts.hexdigest()


def test_a_day_begins_where_its_local_midnight_lies_in_any_year() -> None:
    for zone in ("UTC", "America/New_York", "America/Sao_Paulo", "Africa/Cairo"):
        for day in range(-3_000, 24_000, 13):
            text = (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()
            assert calendar.day_start(day, zone) == units.instant(text, zone)
        for year in (FIRST_YEAR, 0, 9_999, 10_000, LAST_YEAR):
            day = int(np.datetime64(year - 1970, "Y").astype("datetime64[D]").astype(np.int64))
            start = calendar.day_start(day, zone)
            assert calendar.local_days(numbers(UTC, start - 1, start), zone).tolist() == [day - 1, day]
