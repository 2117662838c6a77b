"""Frames of pandas, Polars and Arrow come back as what they were, with every value."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import frames
from engine.errors import UserError

BIG = 2**53 + 1
TABLE = pa.table(
    {
        "whole": pa.array([BIG, None, -3], pa.int64()),
        "small": pa.array([1, 2, 3], pa.uint8()),
        "real": pa.array([0.1, None, float("inf")]),
        "text": pa.array(["a", None, "ü"]),
        "yes": pa.array([True, None, False]),
        "at": pa.array([0, None, 1_577_836_800_000_001], pa.timestamp("us", tz="UTC")),
    }
)
MAKE: dict[str, Callable[[pa.Table], Any]] = {
    "pandas": lambda table: frames._to_pandas(table, pd.RangeIndex(table.num_rows)),
    "pandas with Arrow types": lambda table: table.to_pandas(types_mapper=pd.ArrowDtype),
    "polars": pl.from_arrow,
    "arrow": lambda table: table,
}


@pytest.mark.parametrize("kind", list(MAKE))
def test_a_frame_comes_back_as_it_was(kind: str) -> None:
    frame = MAKE[kind](TABLE)
    table, back = frames.take("rows", frame)
    assert isinstance(table, pa.Table) and type(back(table)) is type(frame)
    again = frames.take("rows", back(table))[0]
    for found in (table, again):
        assert found.to_pylist() == TABLE.to_pylist()


@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=20),
    st.sampled_from(["pandas", "pandas with Arrow types", "polars"]),
)
def test_whole_numbers_keep_every_digit(values: list[int | None], kind: str) -> None:
    table, back = frames.take("rows", MAKE[kind](pa.table({"x": pa.array(values, pa.int64())})))
    assert table["x"].to_pylist() == values
    assert frames.take("rows", back(table))[0]["x"].to_pylist() == values


def test_a_result_has_the_index_of_the_frame() -> None:
    frame = pd.DataFrame({"a": [1, 2]}, index=pd.Index([7, 7], name="who"))
    table, back = frames.take("rows", frame)
    assert table.column_names == ["a"]
    pd.testing.assert_frame_equal(
        back(pa.table({"b": [0.5, np.nan]})), pd.DataFrame({"b": [0.5, np.nan]}, index=frame.index)
    )


def test_what_exports_an_arrow_stream_is_a_table() -> None:
    batch = TABLE.to_batches()[0]
    for frame in (batch, pa.RecordBatchReader.from_batches(batch.schema, [batch])):
        table, back = frames.take("rows", frame)
        assert table.equals(TABLE) and back(table) is table


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        ({"a": [1]}, r"found builtins.dict$"),
        (pl.LazyFrame({"a": [1]}), r"found polars.LazyFrame: give its collect\(\)"),
        (pd.Series([1]), r"found pandas.Series"),
        (pl.Series([1]), r"found polars.Series"),
        (pd.DataFrame({3: [1]}), r"texts as names, found 3"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"column 'a' must occur once"),
        (pd.DataFrame({"a": [1, "x"]}), r"one type in each column: .*column a with type object"),
    ],
)
def test_what_is_no_table_is_named(frame: Any, found: str) -> None:
    with pytest.raises(UserError, match=rf"^rows.*{found}"):
        frames.take("rows", frame)


def test_arrow_needs_neither_library() -> None:
    text = """
import sys

class Neither:
    def find_spec(name, *_):
        if name.split(".")[0] in ("pandas", "polars"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Neither)
import pyarrow, engine.features.retrieval, engine.scoring.predictor, engine.data.frames as frames
print(frames.take("rows", pyarrow.table({"a": [1]}))[0].num_rows)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
