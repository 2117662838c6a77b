"""Readers of Parquet and Arrow IPC: declared columns only, in batches, page checksums verified, nested columns by path."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.config.sections.data import SourceConfig
from engine.data.bounds import BATCH_ROWS, PROBE_ROWS, Bounds, cut, plan
from engine.data.columns import OF_FILE, Chunk, Finding, Matched, Notes, evidence_of, match, policy_key, typed
from engine.data.files import SourceFile, is_compressed, unpacked


def read_parquet(
    file: SourceFile, source: SourceConfig, zone: str, threads: int, notes: Notes, bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of a Parquet file. INT96 is read as microseconds, which reach the year 294246 (nanoseconds end in 2262)."""
    origin = unpacked(file.path, bounds.memory) if is_compressed(file.path) else str(file.path)
    with _open_parquet(origin, "us") as parquet:
        names = column_names(parquet.schema_arrow, source)
        matched = match(names, source, file)
        notes.update(matched.notes)
        wanted = _wanted(matched, names)
        batches = cut(_parquet_batches(parquet, origin, wanted, threads, bounds), bounds)
        found = chunks(batches, matched, names, file, source, zone, notes)
        legacy = [name for name in wanted if name in _int96(parquet)]
        if legacy:
            columns = {name: names[place] for name, place in matched.places.items() if place is not None}
            columns = {name: path for name, path in columns.items() if path in legacy}
            keys = {name: policy_key(file, name) for name in columns}
            found = _within_reach(found, origin, columns, source, keys)
        yield from found


def damaged_part(file: SourceFile, source: SourceConfig, bounds: Bounds) -> tuple[str, str]:
    """(declared column, row group with its rows) of a Parquet file that cannot be read; empty if it is not a single part."""
    with contextlib.suppress(Exception):  # the first failure is already reported
        origin = unpacked(file.path, bounds.memory) if is_compressed(file.path) else str(file.path)
        with _open_parquet(origin, "us") as parquet:
            names = column_names(parquet.schema_arrow, source)
            places = match(names, source, file).places
            first = 1
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows - 1
                for name, place in places.items():
                    if place is not None and not _readable(parquet, names[place], group):
                        return name, f"row group {group + 1} (rows {first:,} to {last:,})"
                first = last + 1
    return "", ""


def _readable(parquet: pq.ParquetFile, path: str, group: int) -> bool:
    try:
        for _ in parquet.iter_batches(1 << 12, row_groups=[group], columns=[path], use_threads=False):
            pass
    except Exception:
        return False
    return True


def _open_parquet(origin: Any, unit: str, metadata: Any = None, repeated: list[str] | None = None) -> pq.ParquetFile:
    """Open a file without pre-buffering, with which Arrow would keep every byte of the file until it is closed."""
    return pq.ParquetFile(
        origin, page_checksum_verification=True, coerce_int96_timestamp_unit=unit, pre_buffer=False, buffer_size=1 << 20,
        metadata=metadata, read_dictionary=repeated,
    )  # fmt: skip


def _parquet_batches(
    parquet: pq.ParquetFile, origin: Any, wanted: list[str], threads: int, bounds: Bounds
) -> Iterator[pa.RecordBatch]:
    """Batches of the wanted columns; those with long repeated values are read as dictionaries."""
    if not wanted:
        yield pa.RecordBatch.from_struct_array(pa.array([{}] * parquet.metadata.num_rows, pa.struct([])))
        return

    with contextlib.ExitStack() as opened:
        probes: list[pq.ParquetFile] = []

        def probe(group: int, leaves: list[str]) -> pa.RecordBatch:
            if not probes:
                texts = [leaf for leaf in leaves if _is_text(parquet, leaf)]
                probes.append(opened.enter_context(_open_parquet(origin, "us", parquet.metadata, texts)))
            parts = []
            for leaf in leaves:  # one at a time: leaves of one struct would come as one column
                part = next(probes[0].iter_batches(PROBE_ROWS, row_groups=[group], columns=[leaf]), None)
                if part is None:
                    raise pa.ArrowInvalid(f"row group {group + 1} must hold rows, found none")
                parts.append(part)
            return pa.RecordBatch.from_arrays([part.column(0) for part in parts], [*leaves])

        stretches = list(plan(parquet, wanted, bounds, probe))
    rows = 0
    for groups, size, repeated in stretches:
        with contextlib.ExitStack() as opened:
            reader = parquet
            if repeated:
                reader = opened.enter_context(_open_parquet(origin, "us", parquet.metadata, list(repeated)))
            for batch in reader.iter_batches(size, row_groups=groups, columns=wanted, use_threads=threads > 1):
                rows += batch.num_rows
                yield batch
    if rows != parquet.metadata.num_rows:
        raise pa.ArrowInvalid(f"its footer has {parquet.metadata.num_rows:,} rows, its pages {rows:,}")


def _is_text(parquet: pq.ParquetFile, leaf: str) -> bool:
    places = range(len(parquet.schema))
    return any(
        parquet.schema.column(place).path == leaf and parquet.schema.column(place).physical_type == "BYTE_ARRAY"
        for place in places
    )


def _int96(parquet: pq.ParquetFile) -> set[str]:
    columns = (parquet.schema.column(place) for place in range(len(parquet.schema)))
    return {column.path for column in columns if column.physical_type == "INT96"}


def _within_reach(
    chunks: Iterator[Chunk], origin: Any, columns: dict[str, str], source: SourceConfig, keys: dict[str, str]
) -> Iterator[Chunk]:
    """INT96 holds days of which microseconds do not reach all, and Arrow lets those wrap around: read again in seconds,
    which reach them, and name the values where the two do not agree.
    """
    with _open_parquet(origin, "s") as parquet:
        paths = list(columns.values())
        coarse = parquet.iter_batches(batch_size=1 << 12, columns=paths, use_threads=False)
        rest = pa.table({path: pa.array([], pa.timestamp("s")) for path in paths})
        for chunk in chunks:
            while rest.num_rows < len(chunk.numbers):
                rest = pa.concat_tables([rest, pa.Table.from_batches([next(coarse)])], promote_options="permissive")
            seconds, rest = rest.slice(0, len(chunk.numbers)).combine_chunks(), rest.slice(len(chunk.numbers))
            for name, path in columns.items():
                whole = seconds.column(path).cast(pa.int64()).combine_chunks()
                # Local times were moved by their zone: two days of slack, where a wrap is off by millions of years.
                found = pc.divide(chunk.table.column(name).cast(pa.int64()), 1_000_000).combine_chunks()
                # What wrapped around to a year beyond the calendar is null by now.
                off = pc.fill_null(pc.greater(pc.abs(pc.subtract(whole, found)), 172_800), True)
                bad = np.flatnonzero(np.asarray(pc.and_(off, pc.is_valid(whole))))
                if len(bad):
                    chunk.findings[:] = [
                        _without(finding, bad) if finding.column == name else finding for finding in chunk.findings
                    ]
                    column = source.columns[name]
                    shown = [None if column.sensitive else f"{whole[int(place)]} s since 1970" for place in bad]
                    reason, policy = "lies beyond the years that microseconds reach", column.on_violation
                    finding = Finding(name, bad, reason, policy, shown, keys[name])
                    chunk.findings.append(finding)
                    chunk.evidence = None  # Arrow's values are not those of the file
                    chunk.table = _emptied(chunk.table, name, bad)
            yield chunk


def _without(finding: Finding, positions: np.ndarray) -> Finding:
    kept = np.flatnonzero(~np.isin(finding.positions, positions))
    values = [finding.values[place] for place in kept.tolist()]
    return dataclasses.replace(finding, positions=finding.positions[kept], values=values)


def _emptied(table: pa.Table, name: str, positions: np.ndarray) -> pa.Table:
    mask = np.zeros(table.num_rows, bool)
    mask[positions] = True
    place = table.column_names.index(name)
    values = pc.if_else(pa.array(mask), pa.scalar(None, table.schema.field(place).type), table.column(place))
    return table.set_column(place, name, values)


def read_arrow(
    file: SourceFile, source: SourceConfig, zone: str, _threads: int, notes: Notes, bounds: Bounds
) -> Iterator[Chunk]:
    """Chunks of an Arrow IPC file or stream; every batch is fully validated, since its buffers are untrusted."""
    origin = unpacked(file.path, bounds.memory) if is_compressed(file.path) else pa.memory_map(str(file.path))
    reader = _open_ipc(origin)
    names = column_names(reader.schema, source)
    matched = match(names, source, file)
    notes.update(matched.notes)
    yield from chunks(cut(_ipc_batches(reader), bounds), matched, names, file, source, zone, notes)


def _open_ipc(origin: Any) -> Any:
    if origin.size() == 0:
        raise pa.ArrowInvalid("the file is empty")
    if origin.read(6) == b"ARROW1":
        origin.seek(0)
        return pa.ipc.open_file(origin)
    origin.seek(0)
    return pa.ipc.open_stream(origin)


def _ipc_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    batches = (
        (reader.get_batch(i) for i in range(reader.num_record_batches))
        if hasattr(reader, "num_record_batches")
        else reader
    )
    for batch in batches:
        batch.validate()
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise pa.ArrowInvalid(f"column {name!r}: {error}") from None
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def column_names(schema: pa.Schema, source: SourceConfig) -> list[str]:
    """Column names of the file; a struct that a declared path leads into stands as those paths."""
    top = list(schema.names)
    nested = []
    for name, column in source.columns.items():
        for path in (column.path or name, *column.aliases):
            if path not in top and path not in OF_FILE and "." in path and _leads(schema, path.split(".")):
                nested.append(path)
    roots = {path.split(".")[0] for path in nested}
    return [name for name in top if name not in roots] + nested


def _leads(schema: pa.Schema, parts: list[str]) -> bool:
    if schema.names.count(parts[0]) != 1:
        return False
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _wanted(matched: Matched, names: list[str]) -> list[str]:
    return [names[place] for place in matched.places.values() if place is not None]


def chunks(
    batches: Iterator[pa.RecordBatch], matched: Matched, names: list[str], file: SourceFile, source: SourceConfig, zone: str,
    notes: Notes,
) -> Iterator[Chunk]:  # fmt: skip
    """Typed chunks of record batches: declared columns by name or path, rows numbered from 1."""
    first = 1
    for batch in batches:
        raw = {name: _column(batch, names[place]) for name, place in matched.places.items() if place is not None}
        numbers = np.arange(first, first + batch.num_rows)
        table, findings = typed(raw, numbers, source, file, zone, notes)
        first += batch.num_rows
        yield Chunk(numbers, table, findings, evidence=evidence_of(raw))


def _column(batch: pa.RecordBatch, path: str) -> pa.Array:
    if path in batch.schema.names:
        return batch.column(path)
    root, *rest = path.split(".")
    return pc.struct_field(batch.column(root), rest)
