"""Memory limits of reading: batches are limited by bytes instead of rows.

A dictionary value counts as often as rows refer to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import UserError

BATCH_ROWS = 1 << 17
LARGEST_BATCH, SMALLEST_BATCH = 1 << 26, 1 << 20
LONGEST_ROW, SHORTEST_LIMIT = 1 << 28, 1 << 24


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bytes of a batch of rows, and of the longest row."""

    batch: int = LARGEST_BATCH
    row: int = LONGEST_ROW
    memory: int = 4_000_000_000

    @classmethod
    def of(cls, memory: int, readers: int = 1) -> Bounds:
        """Limits for `readers` files that are read at the same time within `memory` bytes; a row may take an eighth of it."""
        batch = min(max(memory // (32 * readers), SMALLEST_BATCH), LARGEST_BATCH)
        return cls(batch, min(max(memory // 8, SHORTEST_LIMIT), LONGEST_ROW), memory)

    def too_long(self, what: str, size: int) -> UserError:
        """The error for a row of `size` bytes."""
        return UserError(
            f"{what} takes {size:,} bytes, more than the {self.row:,} that a row may take under "
            f"resources.memory={self.memory:,} (an eighth of it, at most {LONGEST_ROW:,}): allow more memory, or do not "
            "declare that column"
        )


USUAL = Bounds()


def cut(batches: Iterator[pa.RecordBatch], bounds: Bounds) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most `bounds.batch` bytes once dictionaries are decoded.

    Raises UserError naming row and column if a single row is longer than `bounds.row`.
    """
    first = 1
    for batch in batches:
        yield from _halves(batch, first, bounds)
        first += batch.num_rows


def _halves(batch: pa.RecordBatch, first: int, bounds: Bounds) -> Iterator[pa.RecordBatch]:
    size = sum(decoded_bytes(column) for column in batch.columns)
    if size <= bounds.batch or not batch.num_rows:
        yield batch
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _halves(batch.slice(0, half), first, bounds)
        yield from _halves(batch.slice(half), first + half, bounds)
    elif size <= bounds.row:
        yield batch
    else:
        sizes = {name: decoded_bytes(batch.column(place)) for place, name in enumerate(batch.schema.names)}
        worst = max(sizes, key=sizes.__getitem__)
        raise bounds.too_long(f"row {first:,}, column {worst!r},", sizes[worst])


def decoded_bytes(array: Any) -> int:
    """Bytes of an array's values without dictionaries; at any depth of lists, maps and structs."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return decoded_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        return _dictionary_bytes(array)
    if pa.types.is_map(kind):
        array = pa.ListArray.from_arrays(
            array.offsets, pa.StructArray.from_arrays([array.keys, array.items], ["k", "v"])
        )
        kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * len(array) + decoded_bytes(array.flatten())
    if pa.types.is_struct(kind):
        return sum(decoded_bytes(part) for part in array.flatten())
    return int(array.nbytes)


def _dictionary_bytes(array: pa.DictionaryArray) -> int:
    values = array.dictionary
    if not len(values):
        return 4 * len(array)
    if pa.types.is_string(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_string(values.type):
        lengths = pc.fill_null(pc.binary_length(values), 0)
        longest = int(pc.max(lengths).as_py())
        if longest * len(array) < SMALLEST_BATCH:  # the usual case, without a look at every row
            return (4 + longest) * len(array)
        return 4 * len(array) + int(pc.sum(lengths.cast(pa.int64()).take(array.indices)).as_py() or 0)
    return decoded_bytes(values) * len(array) // len(values)


def indexed_bytes(array: Any) -> int:
    """Bytes of an array without its dictionaries."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return 4 * len(array)
    if pa.types.is_map(kind):
        return 8 * len(array) + indexed_bytes(array.keys) + indexed_bytes(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * len(array) + indexed_bytes(array.flatten())
    return sum(map(indexed_bytes, array.flatten())) if pa.types.is_struct(kind) else int(array.nbytes)


def longest_value(array: Any) -> int:
    """Bytes of the longest value in the dictionaries of an array; 0 without any."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        values = array.dictionary
        return int(pc.max(pc.binary_length(values)).as_py() or 0) if len(values) else 0
    if pa.types.is_map(kind):
        return max(longest_value(array.keys), longest_value(array.items))
    if pa.types.is_list(kind):
        return longest_value(array.values)
    return max(map(longest_value, array.flatten()), default=0) if pa.types.is_struct(kind) else 0


# ----------------------------------------------------------------------------------------------------------- Parquet

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}
PROBE_ROWS = 16
SKEW = 8  # largest assumed ratio of the bytes of a batch to those of an average batch

ReadPlan = tuple[list[int], int, tuple[str, ...]]
Probe = Callable[[int, list[str]], pa.RecordBatch]


def plan(parquet: pq.ParquetFile, wanted: list[str], bounds: Bounds, probe: Probe) -> Iterator[ReadPlan]:
    """(row groups, rows of a batch, leaves to be read as dictionaries) for stretches of a Parquet file.

    `probe(group, leaves)` gives a group's first PROBE_ROWS rows of the leaves, read as dictionaries. The metadata of column
    chunks has more detail, but reading it from a damaged file crashes the process (pyarrow 26).
    """
    leaves = [parquet.schema.column(place) for place in range(len(parquet.schema))]
    leaves = [leaf for leaf in leaves if any(leaf.path == path or leaf.path.startswith(f"{path}.") for path in wanted)]
    plain = [leaf for leaf in leaves if leaf.physical_type != "BYTE_ARRAY" and leaf.max_repetition_level == 0]
    rest = [leaf.path for leaf in leaves if leaf not in plain]
    texts = {leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"}
    fixed = sum(WIDTHS.get(leaf.physical_type, leaf.length) for leaf in plain)
    groups: list[int] = []
    same: tuple[int, tuple[str, ...]] = (0, ())
    for group in range(parquet.metadata.num_row_groups):
        about = parquet.metadata.row_group(group)
        rows = min(about.num_rows, BATCH_ROWS)
        width, repeated = float(fixed), list[str]()
        if rest and rows:
            # Uncompressed bytes are those of the rows, except for repeated values.
            stored = about.total_byte_size / about.num_rows
            width += stored * (SKEW if about.total_byte_size > bounds.batch else 1)
            for path, column in zip(rest, probe(group, rest).columns, strict=True):
                longest = longest_value(column)
                if path in texts and longest * rows > bounds.batch:
                    repeated.append(path)
                if path not in texts or pa.types.is_nested(column.type):
                    width += SKEW * indexed_bytes(column) / len(column)
        fitting = bounds.batch / max(width, 1.0)
        # A power of two, so that row groups of about the same width are read as one stretch.
        found = BATCH_ROWS if fitting >= BATCH_ROWS else 2 ** int(np.log2(max(fitting, 1))), tuple(repeated)
        if groups and found != same:
            yield groups, *same
            groups = []
        groups, same = [*groups, group], found
    if groups:
        yield groups, *same
