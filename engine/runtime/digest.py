"""Digests: SHA-256 of JSON, of files, of array bytes and of table values (not of their layout).

A recipe digest identifies a request, a content digest its result. The chain of a run consists of content digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import UserError

CHUNK = 1 << 22
TICK = 20_000_000  # ns; time stamps of files have the resolution of the kernel's tick (1 to 10 ms)


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[0] += time.perf_counter() - began


spent = [0.0]  # seconds that this process has spent on hashing, summed over threads


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Raises ValueError for NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_scalar
    )


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def of_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """Hex SHA-256 of texts that hold no line breaks, a cheaper `of_json` of a list."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def of_bytes(*parts: Any) -> str:
    """Hex SHA-256 of the parts, each preceded by its length, so that other boundaries give another digest."""
    hasher = hashlib.sha256()
    for part in parts:
        view = memoryview(part).cast("B")
        hasher.update(len(view).to_bytes(8, "little"))
        hasher.update(view)
    return hasher.hexdigest()


def of_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, memoised while path, inode, size and times stay the same.

    ctime is included: the system sets it at every change, and no program can set it back. A file that has just changed is
    not memoised, because its next change may get the same time stamp.
    """
    status = os.stat(path)
    key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if (known := _memo.get(key)) is not None:
        return known
    now = time.time_ns()
    hasher = hashlib.sha256()
    with _timed(), open(path, "rb") as file:
        while block := file.read(CHUNK):
            hasher.update(block)
    if status.st_ctime_ns < now - TICK:
        _memo[key] = hasher.hexdigest()
    return hasher.hexdigest()


_memo: dict[tuple[str, int, int, int, int], str] = {}


def check_unchanged(path: Path | str, digest: str) -> None:
    """Raise UserError if a file has changed since it was hashed, before it was read."""
    if of_file(path) != digest:
        raise UserError(f"{path} changed while it was read: inputs must not change during a run. Run the command again")


class TableDigest:
    """Content digest of a table given in pieces; it does not depend on how the rows are divided into pieces.

    Per column two streams are hashed: validity (one byte a row) and values (little-endian fixed width with zeros under
    null; for text the int32 byte lengths and, in a third stream, the bytes). Dictionary columns count as their values.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows = 0
        self._streams = {field.name: [hashlib.sha256() for _ in range(3)] for field in schema}

    def update(self, table: pa.Table | pa.RecordBatch) -> None:
        """Add rows; columns are taken by name."""
        self.rows += table.num_rows
        with _timed():
            for field in self.schema:
                column = table.column(field.name)
                for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                    if len(chunk):
                        _hash_column(chunk, self._streams[field.name])

    def columns(self) -> dict[str, str]:
        """Hex digest per column."""
        return {
            field.name: of_json(
                [str(_plain_type(field.type)), *(stream.hexdigest() for stream in self._streams[field.name])]
            )
            for field in self.schema
        }

    def hexdigest(self) -> str:
        """Digest of the whole: rows, column names in order, and column digests."""
        return of_json([self.rows, list(self.columns().items())])


def of_table(table: pa.Table) -> str:
    """Content digest of a table."""
    digest = TableDigest(table.schema)
    digest.update(table)
    return digest.hexdigest()


def of_columns(table: pa.Table) -> dict[str, str]:
    """Content digest of each column of a table."""
    digest = TableDigest(table.schema)
    digest.update(table)
    return digest.columns()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.large_string() if pa.types.is_string(kind) else pa.large_binary() if pa.types.is_binary(kind) else kind


def _hash_column(chunk: pa.Array, streams: list[Any]) -> None:
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    valid = np.asarray(pc.is_valid(chunk).cast(pa.uint8())) if chunk.null_count else np.ones(len(chunk), np.uint8)
    streams[0].update(valid)
    kind = chunk.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _hash_text(pc.fill_null(chunk, "") if chunk.null_count else chunk, streams)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _hash_text(pc.fill_null(chunk, b"") if chunk.null_count else chunk, streams)
    elif pa.types.is_boolean(kind):
        streams[1].update(np.asarray(pc.fill_null(chunk, False).cast(pa.uint8())))
    elif pa.types.is_null(kind):
        pass
    elif pa.types.is_nested(kind) or pa.types.is_decimal(kind):
        for value in python_values(chunk):
            streams[1].update(canonical_json(str(value)).encode())
    else:
        streams[1].update(_fixed_width(chunk, valid))


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values as Python objects; those with times outside Python's range have the stored numbers instead."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        pass
    found = []  # one by one: the result for a value must not depend on other values
    for place in range(len(column)):
        try:
            found.append(column[place].as_py())
        except (OverflowError, ValueError):
            one = column.slice(place, 1)
            found += _numbers(one.combine_chunks() if isinstance(one, pa.ChunkedArray) else one).to_pylist()
    return found


def _numbers(array: pa.Array) -> pa.Array:
    """The array with numbers instead of times, at any depth of lists and maps."""
    kind = array.type
    if pa.types.is_temporal(kind):
        return array.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    if pa.types.is_map(kind):
        array = array.take(pa.array(np.arange(len(array))))  # from_arrays does not support a mask with an offset
        return pa.MapArray.from_arrays(array.offsets, _numbers(array.keys), _numbers(array.items), mask=array.is_null())
    if pa.types.is_list(kind):
        array = array.take(pa.array(np.arange(len(array))))
        return pa.ListArray.from_arrays(array.offsets, _numbers(array.values), mask=array.is_null())
    return array


def _hash_text(chunk: pa.Array, streams: list[Any]) -> None:
    """Lengths and bytes of text without nulls."""
    _, offsets_, data = chunk.buffers()
    wide = pa.types.is_large_string(chunk.type) or pa.types.is_large_binary(chunk.type)
    offsets = np.frombuffer(offsets_, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    streams[1].update(np.diff(offsets).astype("<i4", copy=False))
    if data is not None:
        streams[2].update(memoryview(data)[offsets[0] : offsets[-1]])


def _fixed_width(chunk: pa.Array, valid: np.ndarray) -> np.ndarray:
    """The values as stored in memory, with zeros under null."""
    width = chunk.type.bit_width // 8
    numeric = width in (1, 2, 4, 8)
    data = np.frombuffer(chunk.buffers()[1], f"<u{width}" if numeric else f"V{width}")
    data = data[chunk.offset : chunk.offset + len(chunk)]
    if chunk.null_count and numeric:
        data = data * valid.astype(data.dtype)
    elif chunk.null_count:
        data = data.view(np.uint8).reshape(len(chunk), width) * valid[:, None]
    return _one_nan(data, width) if pa.types.is_floating(chunk.type) else data


def _one_nan(data: np.ndarray, width: int) -> np.ndarray:
    # All bit patterns of NaN become one. -0.0 stays distinct from 0.0, because readers can distinguish them.
    floats = data.view(f"<f{width}")
    missing = np.isnan(floats)
    if missing.any():
        floats = floats.copy()
        floats[missing] = np.nan
    return floats
