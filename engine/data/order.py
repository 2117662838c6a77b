"""Dataset order: (event time, id columns). In memory where it fits, else by spilled ranges of time; the same either way.

Keys are packed into 64-bit words whose order is the order of the rows; ids are unique, so no tie is left.
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from engine.errors import UserError
from engine.runtime import digest, storage
from kernels.hashing import hash_bytes, hash_u64

SAMPLE_EVERY, SAMPLE_BYTES = 997, 1 << 20
RUN_ROWS = 1 << 17


class DuplicateIdsError(Exception):
    """Two rows have equal ids; raised where the order is found out, which may be in a thread that writes."""


class Rows:
    """A table that is put into order of some columns when its first rows are taken."""

    def __init__(self, table: pa.Table, keys: list[str]) -> None:
        self.count = table.num_rows
        self.bytes = table.nbytes
        self._table, self._keys = table, keys
        self._lock = threading.Lock()
        self._ready = False
        self._order: np.ndarray | None = None
        self._whole = False  # the table is one chunk

    def take(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of the order. Files are mostly in order of time: then they lie near each other in the table."""
        with self._lock:
            if not self._ready:
                self._order = sorted_rows(self._table, self._keys)
                self._ready = True
        if self._order is None:
            return self._table.slice(start, stop - start)
        places = self._order[start:stop]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low <= 4 * len(places):
            return _taken(self._table.slice(low, high - low), places - low)
        with self._lock:
            if not self._whole:
                columns = [_unchunked(column) for column in self._table.columns]
                self._table, self._whole = pa.Table.from_arrays(columns, names=self._table.column_names), True
        return _taken(self._table, places)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a piece of the dataset that is in order."""

    rows: Rows
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """About how many they take in memory."""
        return self.rows.bytes * (self.stop - self.start) // max(self.rows.count, 1)

    def take(self) -> pa.Table:
        """The rows."""
        return self.rows.take(self.start, self.stop)

    def slices(self, size: int) -> Iterator[pa.Table]:
        """The rows in tables of about `size` bytes."""
        step = max((self.stop - self.start) * size // max(self.bytes, 1), 1)
        for start in range(self.start, self.stop, step):
            yield self.rows.take(start, min(start + step, self.stop))


# ----------------------------------------------------------------------------------------------------------- keys


def _code(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """(uint64 codes that sort as the values do, number of bits they need); no nulls."""
    kind = column.type
    if (
        pa.types.is_timestamp(kind)
        or pa.types.is_time64(kind)
        or pa.types.is_duration(kind)
        or pa.types.is_date64(kind)
    ):
        values = np.asarray(column.cast(pa.int64()).combine_chunks())
    elif pa.types.is_date32(kind) or pa.types.is_time32(kind):
        values = np.asarray(column.cast(pa.int32()).combine_chunks()).astype(np.int64)
    elif pa.types.is_integer(kind):
        values = np.asarray(column.combine_chunks())
    elif pa.types.is_boolean(kind):
        values = np.asarray(column.cast(pa.uint8()).combine_chunks())
    elif pa.types.is_nested(kind):
        raise UserError(f"an id column must be a plain value, found {kind}")
    else:
        encoded = column.combine_chunks().dictionary_encode()
        order = pc.sort_indices(encoded.dictionary)
        rank = np.empty(len(order), np.int64)
        rank[np.asarray(order)] = np.arange(len(order))
        values = rank[np.asarray(encoded.indices)]
    if values.dtype != np.uint64:
        values = values.astype(np.int64, copy=False)
    least, most = int(values.min()), int(values.max())
    codes = values.view(np.uint64) - np.uint64(least % 2**64)
    return codes, max((most - least).bit_length(), 1)


def packed(table: pa.Table, names: list[str]) -> list[np.ndarray]:
    """The columns as few uint64 words, most significant first: comparing words compares rows."""
    words: list[np.ndarray] = []
    used = 64
    for name in names:
        codes, bits = _code(table.column(name))
        if used + bits > 64:
            words.append(codes)
            used = bits
        else:
            words[-1] = (words[-1] << np.uint64(bits)) | codes
            used += bits
    return words


def sorted_rows(table: pa.Table, names: list[str]) -> np.ndarray | None:
    """Positions that put the rows in order of the columns; None where they are in order already.

    Raises DuplicateIdsError where two rows are equal in all of them.
    """
    if table.num_rows < 2:
        return None
    words = packed(table, names)
    order = None
    if len(words) == 1:
        word = words[0]
        if not bool(np.all(word[1:] >= word[:-1])):
            order = np.argsort(word)
    else:
        order = np.lexsort(words[::-1])
    ordered = words if order is None else [word[order] for word in words]
    if np.any(np.logical_and.reduce([word[1:] == word[:-1] for word in ordered])):
        raise DuplicateIdsError
    return None if order is not None and bool(np.all(order[1:] > order[:-1])) else order


def hashes(table: pa.Table, names: list[str]) -> np.ndarray:
    """uint64 hash per row of the columns; equal values give equal hashes wherever the row stands."""
    total = np.zeros(table.num_rows, np.uint64)
    for place, name in enumerate(names):
        total = hash_u64(total ^ _column_hash(table.column(name)), place + 1)
    return total


def _column_hash(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        if pa.types.is_temporal(kind):
            array = array.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
        elif pa.types.is_boolean(kind):
            array = array.cast(pa.uint8())
        return hash_u64(np.asarray(pc.fill_null(array, 0)))
    text = array if pa.types.is_string(kind) or pa.types.is_binary(kind) else array.cast(pa.string())
    text = pc.fill_null(text.cast(pa.large_binary()), b"")
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    data = text.buffers()[2]
    raw = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    return hash_bytes(raw, offsets)


# ---------------------------------------------------------------------------------------------------------- spool


class Spool:
    """Rows on their way into dataset order: kept in memory up to `memory` bytes, spilled to `folder` beyond.

    Rows are numbered in the order in which they are added; `drop` takes row numbers.
    """

    def __init__(self, schema: pa.Schema, event_time: str, ids: list[str], folder: Path, memory: int) -> None:
        self.schema, self.event_time, self.ids = schema, event_time, ids
        self.rows = 0
        self._folder = folder / f".spool-{uuid.uuid4().hex[:8]}"
        self._memory = memory
        self._held: list[pa.Table] = []
        self._bytes = self._spilled = 0
        self._files: list[Path] = []
        self._sample: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if not table.num_rows:
            return
        times = np.asarray(table.column(self.event_time).cast(pa.int64()).combine_chunks())
        # Long rows count for more: what is cut by the sample is bytes.
        every = int(min(max(table.num_rows * SAMPLE_BYTES // max(table.nbytes, 1), 1), SAMPLE_EVERY))
        self._sample.append(times[(-self.rows) % every :: every])
        self.rows += table.num_rows
        self._held.append(table)
        self._bytes += table.nbytes
        if self._bytes > self._memory:
            self._spill()

    def _spill(self) -> None:
        path = self._folder / f"run-{len(self._files):05d}.arrow"
        _write_ipc(path, self._held, self.schema)
        self._files.append(path)
        self._spilled += self._bytes
        self._held, self._bytes = [], 0
        pa.default_memory_pool().release_unused()

    def tables(self) -> Iterator[pa.Table]:
        """All rows in the order in which they were added."""
        for path in self._files:
            yield from read_ipc(path)
        yield from self._held

    def close(self) -> None:
        """Remove what was spilled."""
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            path.unlink(missing_ok=True)
        if self._folder.is_dir():
            self._folder.rmdir()

    # ---------------------------------------------------------------------------------------------- duplicates

    def duplicates(self) -> pa.Table | None:
        """Rows whose ids occur more than once, with their row number in column `$number`; None when there are none."""
        if self.rows < 2:
            return None
        path = self._folder / "hashes"
        storage.make_folder(self._folder)
        with storage.disk_errors(path), open(path, "wb") as file:
            for table in self.tables():
                file.write(hashes(table, self.ids).data)  # tofile would not say why it stopped
        twice = self._twice(path)
        found, start = [], 0
        if len(twice):
            for table in self.tables():
                mine = np.fromfile(path, np.uint64, table.num_rows, offset=8 * start)
                local = np.flatnonzero(np.isin(mine, twice))
                if len(local):
                    found.append(table.take(pa.array(local)).append_column("$number", pa.array(local + start)))
                start += table.num_rows
        path.unlink()
        if not found:
            return None
        # Equal hashes of different ids are no duplicates: compare the ids themselves.
        candidates = pa.concat_tables(found)
        order, same = _by_values(candidates, self.ids)
        mask = np.zeros(candidates.num_rows, bool)
        mask[order[1:][same]] = mask[order[:-1][same]] = True
        return candidates.filter(pa.array(mask)) if len(mask) and mask.any() else None

    def _twice(self, path: Path) -> np.ndarray:
        """Hashes that stand more than once in the file, share by share of their range, so that memory is kept."""
        found = []
        shares = 1 + 32 * self.rows // max(self._memory, 1 << 20)
        for share in range(shares):
            mine = []
            for start in range(0, self.rows, RUN_ROWS):
                block = np.fromfile(path, np.uint64, RUN_ROWS, offset=8 * start)
                mine.append(block[block % np.uint64(shares) == share] if shares > 1 else block)
            hashed = np.concatenate(mine)
            del mine
            hashed.sort()
            found.append(np.unique(hashed[1:][hashed[1:] == hashed[:-1]]))
        return np.concatenate(found)

    # ---------------------------------------------------------------------------------------------- order

    def segments(self, part_rows: int, drop: np.ndarray) -> Iterator[tuple[Segment, bool]]:
        """(segment, whether a part ends with it) in dataset order; a part has `part_rows` rows, the last one perhaps fewer."""
        waiting: Segment | None = None
        room = part_rows
        for rows in self._ordered(drop):
            start = 0
            while start < rows.count:
                if waiting is not None:
                    yield waiting, room == part_rows
                stop = min(start + room, rows.count)
                waiting = Segment(rows, start, stop)
                room = room - (stop - start) or part_rows
                start = stop
        if waiting is not None:
            yield waiting, True

    def _ordered(self, drop: np.ndarray) -> Iterator[Rows]:
        if not self._files:
            yield from self._sorted(self._held, drop)
            return
        for bucket in self._buckets(drop):
            yield from self._sorted(list(read_ipc(bucket)), np.zeros(0, np.int64))
            bucket.unlink()
            pa.default_memory_pool().release_unused()

    def _sorted(self, tables: list[pa.Table], drop: np.ndarray) -> Iterator[Rows]:
        table = pa.concat_tables(tables) if tables else self.schema.empty_table()
        tables = []
        if len(drop):
            table = table.filter(pa.array(np.isin(np.arange(table.num_rows), drop, invert=True)))
        keys = [self.event_time, *(name for name in self.ids if name != self.event_time)]
        for run in _runs(table, self.event_time):
            yield Rows(run, keys)

    def _buckets(self, drop: np.ndarray) -> Iterator[Path]:
        """Files of disjoint, rising ranges of event time, each about as large as memory allows."""
        self._spill() if self._held else None
        sample = np.sort(np.concatenate(self._sample))
        count = max(2, -(-3 * self._spilled // max(self._memory, 1)), len(self._files) + 1)
        edges = np.unique(sample[np.linspace(0, len(sample), count, endpoint=False).astype(int)[1:]])
        paths = [self._folder / f"bucket-{place:05d}.arrow" for place in range(len(edges) + 1)]
        writers = [_IpcFile(path, self.schema) for path in paths]
        start = 0
        for table in self.tables():
            count_rows = table.num_rows
            if len(drop):
                keep = np.isin(np.arange(start, start + count_rows), drop, invert=True)
                table = table.filter(pa.array(keep))
            start += count_rows
            times = np.asarray(table.column(self.event_time).cast(pa.int64()).combine_chunks())
            bucket = np.searchsorted(edges, times, "right")
            for place in np.unique(bucket):
                writers[place].write(table.filter(pa.array(bucket == place)))
        for writer in writers:
            writer.close()
        for path in self._files:
            path.unlink()
        pa.default_memory_pool().release_unused()
        yield from paths


def _runs(table: pa.Table, event_time: str) -> Iterator[pa.Table]:
    """Slices of a table, each with times not before those of the previous one, so that each can be sorted alone, in cache.

    A file that is ordered by days, in any order within a day, has such cuts; one in random order is a single run.
    """
    start = 0
    for cuts in _cuts(table.column(event_time).cast(pa.int64())) if len(table) > 2 * RUN_ROWS else ():
        while len(table) - start > 2 * RUN_ROWS:
            place = int(np.searchsorted(cuts, start + RUN_ROWS))
            if place == len(cuts):
                break
            yield table.slice(start, int(cuts[place]) - start)
            start = int(cuts[place])
    if start < len(table):
        yield table.slice(start)


def _cuts(times: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Rows at which all earlier rows have earlier times than this and all later rows, block by block (cache size)."""
    blocks = [np.asarray(times.slice(at, RUN_ROWS).combine_chunks()) for at in range(0, len(times), RUN_ROWS)]
    earliest = np.minimum.accumulate([block.min() for block in blocks][::-1])[::-1]  # of a block and all later blocks
    latest = np.iinfo(np.int64).min
    for place, block in enumerate(blocks):
        before = np.maximum.accumulate(np.concatenate([[latest], block]))
        after = np.minimum.accumulate(block[::-1])[::-1]
        if place + 1 < len(blocks):
            after = np.minimum(after, earliest[place + 1])
        yield place * RUN_ROWS + np.flatnonzero(before[:-1] < after)
        latest = before[-1]


def _taken(table: pa.Table, places: np.ndarray) -> pa.Table:
    """Rows of a table at valid places; column by column, so that memory is reused while it is in cache."""
    indices = pa.array(places)
    columns = [pc.take(_unchunked(column), indices, boundscheck=False) for column in table.columns]
    return pa.Table.from_arrays(columns, names=table.column_names)


def _unchunked(column: pa.ChunkedArray) -> pa.Array:
    """The column as one chunk, for which `take` is fast; text beyond 2 GiB gets 64-bit offsets."""
    if column.type in (pa.string(), pa.binary()) and column.nbytes > 2**31 - 2**20:
        column = column.cast({pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}[column.type])
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class _IpcFile:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        storage.make_folder(path.parent)
        self._path = path
        with storage.disk_errors(path):
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def write(self, table: pa.Table) -> None:
        with storage.disk_errors(self._path):
            self._writer.write_table(table)

    def close(self) -> None:
        with storage.disk_errors(self._path):
            self._writer.close()
            self._sink.close()


def _write_ipc(path: Path, tables: list[pa.Table], schema: pa.Schema) -> None:
    file = _IpcFile(path, schema)
    for table in tables:
        file.write(table)
    file.close()


def read_ipc(path: Path) -> Iterator[pa.Table]:
    """The batches of an Arrow file, read one at a time. Not memory-mapped, since the file is compressed."""
    with pa.OSFile(str(path), "rb") as file:
        reader = pa.ipc.open_file(file)
        for place in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(place)])


# ----------------------------------------------------------------------------------------------- which one to keep


def losers(duplicates: pa.Table, ids: list[str], known: str, keep: str) -> tuple[pa.Table, pa.Table]:
    """(the dropped rows among rows with equal ids, for each of them the row that is kept): the first or last by known time
    is kept, ties by the digest of the row.

    A null known time is later than any other.
    """
    by = ids if known in ids else [*ids, known]
    order, tied = _by_values(duplicates, by)
    same = tied if known in ids else equal_neighbours(duplicates.take(pa.array(order)), ids)
    winners = np.ones(len(order), bool)  # places in `order`
    winners[1 if keep == "first" else 0 : len(order) if keep == "first" else -1] = ~same
    starts = np.flatnonzero(np.diff(tied.astype(np.int8), prepend=0, append=0) == 1)
    stops = np.flatnonzero(np.diff(tied.astype(np.int8), prepend=0, append=0) == -1) + 1
    choose: Callable[..., Any] = min if keep == "first" else max
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if winners[start:stop].any():
            texts = _texts(duplicates.take(pa.array(order[start:stop])))
            winners[start:stop] = np.arange(stop - start) == texts.index(choose(texts))
    group = np.concatenate([[0], np.cumsum(~same)])
    kept = order[winners][group[~winners]]
    lost = order[~winners]
    in_order = np.argsort(lost)
    return duplicates.take(pa.array(lost[in_order])), duplicates.take(pa.array(kept[in_order]))


def _texts(rows: pa.Table) -> list[str]:
    names = [name for name in rows.column_names if name != "$number"]
    columns = [[str(value) for value in digest.python_values(rows.column(name))] for name in names]
    return [digest.of_json(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def _by_values(table: pa.Table, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(order of the rows by the columns, nulls last; bool[n - 1] whether a row equals the next one in that order)."""
    order = np.asarray(pc.sort_indices(table, [(name, "ascending") for name in names])).astype(np.int64)
    return order, equal_neighbours(table.select(names).take(pa.array(order)), names)


def equal_neighbours(table: pa.Table, names: list[str]) -> np.ndarray:
    """bool[n - 1]: whether a row equals the next one in these columns; null equals null."""
    same = np.ones(max(table.num_rows - 1, 0), bool)
    for name in names:
        column = table.column(name)
        above, below = column.slice(0, len(same)), column.slice(1)
        equal = pc.fill_null(pc.equal(above, below), False)
        same &= np.asarray(pc.or_(equal, pc.and_(pc.is_null(above), pc.is_null(below))))
    return same
