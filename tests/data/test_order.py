"""Dataset order: a table is cut where it can be, and what is counted of a part does not depend on how it is counted."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import order, profile


@given(st.lists(st.integers(0, 12), max_size=40), st.lists(st.integers(0, 40), max_size=3), st.integers(1, 6))
def test_runs_are_cut_at_the_first_place_where_all_before_is_earlier(
    times: list[int], chunks: list[int], least: int
) -> None:
    edges = [0, *sorted(min(cut, len(times)) for cut in chunks), len(times)]
    column = pa.chunked_array([times[low:high] for low, high in itertools.pairwise(edges)], pa.timestamp("us", "UTC"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "RUN_ROWS", least)
        runs = [run.column("at").cast(pa.int64()).to_pylist() for run in order._runs(pa.table({"at": column}), "at")]
    assert runs == _slow_runs(times, least)


def _slow_runs(times: list[int], least: int) -> list[list[int]]:
    runs, start = [], 0
    while len(times) - start > 2 * least:
        cut = next(
            (place for place in range(start + least, len(times)) if max(times[:place]) < min(times[place:])), None
        )
        if cut is None:
            break
        runs.append(times[start:cut])
        start = cut
    return [*runs, times[start:]] if times[start:] else runs


def test_bounds_of_text_are_the_same_from_the_statistics_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [None, "", "a", "Ωλ", "\U0001f986", "z" * 30]
    table = pa.table(
        {
            "text": rng.choice(np.array(words, object), 1000).tolist(),
            "late": [None] * 990 + ["b"] * 10,
            "long": ["y" * 5000] + ["x"] * 999,
            "none": pa.array([None] * 1000, pa.string()),
            "a.b": ["q"] * 1000,
            "a": [{"b": "r"}] * 1000,
        }
    )
    metadata: list[pq.FileMetaData] = []
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100, metadata_collector=metadata)
    assert profile._text_bounds(metadata[0], "text") == ("", "\U0001f986")
    assert profile._text_bounds(metadata[0], "long") is None and profile._text_bounds(metadata[0], "a.b") is None
    assert profile.counts(table, metadata[0]) == profile.counts(table)
