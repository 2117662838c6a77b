"""Parts of a dataset: cut at fixed rows, digested by value, counted and written by a few threads, in dataset order."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.data import profile
from engine.data.dataset import PART_ROWS, ROW_GROUP
from engine.data.order import Segment
from engine.runtime import digest


@dataclasses.dataclass
class Written:
    """The parts as the manifest names them, digests per column, counts and an even sample of rows."""

    parts: list[dict[str, Any]]
    column_digests: dict[str, str]
    counts: dict[str, dict[str, Any]]
    sample: pa.Table
    rows: int


def write_parts(
    segments: Iterator[list[Segment]], rows: int, schema: pa.Schema, event_time: str, folder: Path, threads: int,
    advance: Callable[[int], None],
) -> Written:  # fmt: skip
    """Write `part-00000.parquet`, ... and return what stands in them."""
    stride = max(1, rows // profile.SAMPLE_ROWS)
    waiting: deque[Future[tuple[dict[str, Any], dict[str, Any], pa.Table]]] = deque()
    done: list[tuple[dict[str, Any], dict[str, Any], pa.Table]] = []
    start = 0
    with ThreadPoolExecutor(threads) as pool:
        for place, pieces in enumerate(segments):
            waiting.append(pool.submit(_write_part, pieces, place, start, schema, event_time, folder, stride))
            start += sum(piece.stop - piece.start for piece in pieces)
            if len(waiting) > threads:
                done.append(waiting.popleft().result())
                advance(done[-1][0]["rows"])
        while waiting:
            done.append(waiting.popleft().result())
            advance(done[-1][0]["rows"])
    parts = [part for part, _, _ in done]
    sample = pa.concat_tables([rows_ for _, _, rows_ in done]) if done else schema.empty_table()
    return Written(parts, _column_digests(parts, schema), profile.merge([found for _, found, _ in done]), sample, start)


def _column_digests(parts: list[dict[str, Any]], schema: pa.Schema) -> dict[str, str]:
    return {name: digest.of_json([part["columns"][name] for part in parts]) for name in schema.names}


def _write_part(
    pieces: list[Segment], place: int, start: int, schema: pa.Schema, event_time: str, folder: Path, stride: int
) -> tuple[dict[str, Any], dict[str, Any], pa.Table]:
    table = pa.concat_tables([piece.take().cast(schema) for piece in pieces])
    assert table.num_rows <= PART_ROWS
    values = digest.TableDigest(schema)
    values.update(table)
    file = f"part-{place:05d}.parquet"
    metadata: list[pq.FileMetaData] = []
    with pa.OSFile(str(folder / file), "wb") as sink:
        pq.write_table(
            table, sink, row_group_size=ROW_GROUP, max_rows_per_page=ROW_GROUP,  # one page: no more is read of it
            compression="zstd", compression_level=1, write_page_checksum=True, metadata_collector=metadata,
        )  # fmt: skip
    times = table.column(event_time).cast(pa.int64())
    columns = values.columns()
    part = {
        "file": file, "start": start, "rows": table.num_rows, "digest": digest.of_json(list(columns.items())),
        "first_time": times[0].as_py(), "last_time": times[-1].as_py(), "columns": columns,
    }  # fmt: skip
    sample = table.take(pa.array(np.arange((-start) % stride, table.num_rows, stride)))
    return part, profile.counts(table, metadata[0]), sample


def canonical(table: pa.Table, first: list[str]) -> pa.Table:
    """A side table in an order that depends on its values only: by the named columns, then by all others.

    Plain values come before nested ones, which compare as text. Rows that differ only in the sign of a zero compare by that.
    """
    nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
    real = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    names = [*first, *(name for name in table.column_names if name not in (*first, *nested))]
    keys = [table[name] for name in names]
    keys += [pa.array(map(str, digest.python_values(table[name])), pa.string()) for name in nested]
    keys += [pa.array(np.signbit(table[name].to_numpy())) for name in real]
    numbered = pa.table(keys, [str(k) for k in range(len(keys))])
    order = pc.sort_indices(numbered, [(name, "ascending") for name in numbered.column_names])
    return table.take(order).combine_chunks()
