"""Tables of pandas, Polars and Arrow in the Python interface: the result is of the kind that came in.

Neither pandas nor Polars is imported or needed here: who gives a frame has imported its library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from engine.errors import UserError

Frame = Any  # pandas.DataFrame, polars.DataFrame, pyarrow.Table or RecordBatch, or what exports an Arrow stream
Back = Callable[[pa.Table], Frame]  # a result, a row for each row of the frame, in the frame's kind


def take(what: str, frame: Frame) -> tuple[pa.Table, Back]:
    """The frame as an Arrow table, and the function that gives a result of as many rows in the frame's kind.

    pandas: the result has the frame's index. Raises UserError for what is no table.
    """
    library, kind = type(frame).__module__.split(".")[0], type(frame).__name__
    if library == "pandas" and kind == "DataFrame":
        return _of_pandas(what, frame), lambda table: _to_pandas(table, frame.index)
    if library == "polars" and kind == "DataFrame":
        return frame.to_arrow(), sys.modules["polars"].from_arrow
    if not isinstance(frame, pa.Table) and hasattr(frame, "__arrow_c_stream__") and kind != "Series":
        frame = pa.table(frame)
    if isinstance(frame, (pa.Table, pa.RecordBatch)):
        return frame if isinstance(frame, pa.Table) else pa.Table.from_batches([frame]), lambda table: table
    hint = ": give its collect()" if kind == "LazyFrame" else ""
    raise UserError(f"{what} must be a table of pandas, Polars or Arrow, found {library}.{kind}{hint}")


def _of_pandas(what: str, frame: Frame) -> pa.Table:
    for name in frame.columns:
        if not isinstance(name, str):
            raise UserError(f"{what}: columns must have texts as names, found {name!r}: rename it")
    if not frame.columns.is_unique:
        name = frame.columns[frame.columns.duplicated()][0]
        raise UserError(f"{what}: column {name!r} must occur once: rename it")
    try:
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except pa.ArrowException as error:
        raise UserError(f"{what} must have one type in each column: {'. '.join(map(str, error.args))}") from None


def _to_pandas(table: pa.Table, index: Any) -> Frame:
    """A frame with an index; whole numbers with nulls keep their type, since as floats they would lose digits."""
    pandas = sys.modules["pandas"]
    exact = {
        kind: getattr(pandas, f"{'U' if 'u' in name else ''}Int{name.lstrip('uint')}Dtype")()
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
        for kind in [pa.type_for_alias(name)]
    }
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        wanted = exact if column.null_count else {}
        found[name] = column.to_pandas(types_mapper=wanted.get).set_axis(index)
    return pandas.DataFrame(found, index=index)
