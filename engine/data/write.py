"""Writes the parts of a dataset: cut at fixed rows, digested by value, counted and written by threads, in dataset order."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.data import profile
from engine.data.dataset import PART_ROWS, ROW_GROUP, PartEntry
from engine.data.order import Segment
from engine.runtime import digest


@dataclasses.dataclass
class Written:
    """The entries of the parts in the manifest, digests per column, counts and an even sample of rows."""

    parts: list[PartEntry]
    column_digests: dict[str, str]
    counts: dict[str, profile.Counts]
    sample: pa.Table
    rows: int


SETTINGS: dict[str, object] = {
    "compression": "zstd", "compression_level": 1, "write_page_checksum": True,
    "max_rows_per_page": ROW_GROUP,  # one page per group, since a group is always read as a whole
}  # fmt: skip
LONG = 1_000  # bytes per value, on average, above which a sample has only the beginnings of texts
GROUP_BYTES = 1 << 25  # of a row group, which is read or written at once
Done = tuple[PartEntry, dict[str, profile.Counts], pa.Table]


def write_parts(
    segments: Iterator[tuple[Segment, bool]], rows: int, schema: pa.Schema, event_time: str, folder: Path, threads: int,
    memory: int, advance: Callable[[int], None],
) -> Written:  # fmt: skip
    """Write `part-00000.parquet`, ... and return their entries, digests, counts and a sample.

    Parts are written in threads if several fit into `memory`; a part with longer rows is written piece by piece.
    """
    stride = max(1, rows // profile.SAMPLE_ROWS)
    room = max(memory // (4 * (threads + 1)), min(1 << 27, memory // 8))
    waiting: deque[Future[Done]] = deque()
    done: list[Done] = []

    def finish(count: int) -> None:
        while len(waiting) > count:
            done.append(waiting.popleft().result())
            advance(done[-1][0]["rows"])

    place = start = 0
    pieces: list[Segment] = []
    long: _LongPart | None = None
    with ThreadPoolExecutor(threads) as pool:
        for segment, ends in segments:
            pieces.append(segment)
            if long is None and sum(piece.bytes for piece in pieces) > room:
                finish(0)
                long = _LongPart(place, start, schema, event_time, folder, stride)
            if long is not None:
                while pieces:
                    long.add(pieces.pop(0))
            if not ends:
                continue
            if long is not None:
                done.append(long.close())
                advance(done[-1][0]["rows"])
                start, long = start + done[-1][0]["rows"], None
            else:
                waiting.append(pool.submit(_write_part, pieces, place, start, schema, event_time, folder, stride))
                start += sum(piece.stop - piece.start for piece in pieces)
                finish(threads)
            place, pieces = place + 1, []
        finish(0)
    parts = [part for part, _, _ in done]
    sample = pa.concat_tables([rows_ for _, _, rows_ in done]) if done else schema.empty_table()
    digests = {name: digest.of_json([part["columns"][name] for part in parts]) for name in schema.names}
    return Written(parts, digests, profile.merge([found for _, found, _ in done]), sample, start)


class _LongPart:
    """A part that does not fit into memory, written a row group at a time."""

    def __init__(self, place: int, start: int, schema: pa.Schema, event_time: str, folder: Path, stride: int) -> None:
        self._schema, self._event_time, self._start, self._stride = schema, event_time, start, stride
        self._file, self._rows = f"part-{place:05d}.parquet", 0
        self._digest = digest.TableDigest(schema)
        self._times: list[int] = []
        self._counts: list[dict[str, profile.Counts]] = []
        self._samples: list[pa.Table] = []
        self._sink = pa.OSFile(str(folder / self._file), "wb")
        self._writer = pq.ParquetWriter(self._sink, schema, **SETTINGS)

    def add(self, segment: Segment) -> None:
        for piece in segment.slices(GROUP_BYTES):
            table = piece.cast(self._schema)
            self._digest.update(table)
            self._writer.write_table(table, ROW_GROUP)
            times = table.column(self._event_time).cast(pa.int64())
            self._times += [times[0].as_py(), times[-1].as_py()]
            self._counts.append(profile.counts(table))
            self._samples.append(_sampled(table, self._start + self._rows, self._stride))
            self._rows += table.num_rows

    def close(self) -> Done:
        self._writer.close()
        self._sink.close()
        part = _part_entry(self._file, self._start, self._rows, self._digest, self._times[0], self._times[-1])
        return part, profile.merge(self._counts), pa.concat_tables(self._samples)


def _part_entry(file: str, start: int, rows: int, values: digest.TableDigest, first: int, last: int) -> PartEntry:
    columns = values.columns()
    return {
        "file": file, "start": start, "rows": rows, "digest": digest.of_json(list(columns.items())),
        "first_time": first, "last_time": last, "columns": columns,
    }  # fmt: skip


def _sampled(table: pa.Table, start: int, stride: int) -> pa.Table:
    """Every `stride`-th row of the dataset among those of a table that begins at row `start`; long texts are shortened."""
    sample = table.take(pa.array(np.arange((-start) % stride, table.num_rows, stride)))
    for place, field in enumerate(sample.schema):
        column = sample.column(place)
        if column.nbytes <= LONG * sample.num_rows:
            continue
        if pa.types.is_string(field.type):
            column = pc.utf8_slice_codeunits(column, 0, LONG)
        elif pa.types.is_binary(field.type) or pa.types.is_nested(field.type):  # a profile does not show their values
            column = pa.nulls(sample.num_rows, field.type)
        sample = sample.set_column(place, field, column)
    return sample


def _write_part(
    pieces: list[Segment], place: int, start: int, schema: pa.Schema, event_time: str, folder: Path, stride: int
) -> Done:
    table = pa.concat_tables([piece.take().cast(schema) for piece in pieces])
    assert table.num_rows <= PART_ROWS
    values = digest.TableDigest(schema)
    values.update(table)
    file = f"part-{place:05d}.parquet"
    metadata: list[pq.FileMetaData] = []
    group = GROUP_BYTES * table.num_rows // max(table.nbytes, 1)
    with pa.OSFile(str(folder / file), "wb") as sink:
        pq.write_table(
            table, sink, row_group_size=max(min(group, ROW_GROUP), 1), metadata_collector=metadata, **SETTINGS
        )
    times = table.column(event_time).cast(pa.int64())
    part = _part_entry(file, start, table.num_rows, values, times[0].as_py(), times[-1].as_py())
    return part, profile.counts(table, metadata[0]), _sampled(table, start, stride)


def canonical(table: pa.Table, first: list[str]) -> pa.Table:
    """A side table sorted by its values: by the named columns, then by all others.

    Nested columns come last and compare as text. Rows that differ only in the sign of a zero are sorted by the sign.
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
