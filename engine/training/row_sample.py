"""A sample of encoded rows, chosen by hash of their id: of the rows of a reference, and of a window that is monitored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from engine.config.tree import Config
from engine.data.calendar import local_days
from engine.data.dataset import Dataset, row_ids
from engine.features.encode import Encoder
from engine.features.spec import sensitive_features
from engine.features.table import FeatureTable
from kernels.hashing import hash_bytes

SAMPLE_ROWS = 20_000
CHUNK_ROWS = 131_072


def chunks(rows: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The range in pieces of CHUNK_ROWS."""
    for low in range(rows[0], rows[1], CHUNK_ROWS):
        yield low, min(low + CHUNK_ROWS, rows[1])


def pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers in pieces of CHUNK_ROWS."""
    for low in range(0, len(rows), CHUNK_ROWS):
        yield rows[low : low + CHUNK_ROWS]


def id_hashes(dataset: Dataset, ids: list[str], rows: np.ndarray) -> np.ndarray:
    """uint64[n] hash of the id of each of the rows: a choice by it depends on nothing but the id."""
    texts = row_ids(dataset.take(ids, rows), ids).cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return hash_bytes(np.frombuffer(texts.buffers()[2] or b"", np.uint8), offsets)


def chosen_rows(dataset: Dataset, ids: list[str], rows: np.ndarray, wanted: int, total: int) -> np.ndarray:
    """Places in `rows` (int64[n] ascending) of their share of about `wanted` rows of `total`: the smallest hashes."""
    if total <= wanted:
        return np.arange(len(rows))
    return np.flatnonzero(id_hashes(dataset, ids, rows) < np.uint64(2**64 * wanted // total))


def encode_sample(
    config: Config, table: FeatureTable, encoder: Encoder, parts: Sequence[np.ndarray], total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sample of the rows of some parts (int64 ascending) that have `total` rows together."""
    event_time = config.data.event_time
    days, numeric, codes = [np.empty(0, np.int32)], [np.empty((0, encoder.width), np.float32)], []
    codes.append(np.empty((0, len(encoder.categorical_)), np.int32))
    for part in parts:
        rows = part[chosen_rows(table.dataset, config.data.ids, part, SAMPLE_ROWS, total)]
        block = encoder.transform(table.take(rows))
        times = table.dataset.take([event_time], rows)[event_time]
        days.append(local_days(times, config.data.day_zone))
        numeric.append(block[0])
        codes.append(block[1])
    return np.concatenate(days), np.concatenate(numeric), np.concatenate(codes)


def sample_table(
    config: Config, encoder: Encoder, days: np.ndarray, numeric: np.ndarray, codes: np.ndarray
) -> pa.Table:
    """reference_sample.parquet: day, then the encoded columns by name; sensitive features are left out."""
    hidden = set(sensitive_features(config.data, config.features))
    columns: dict[str, pa.Array] = {"day": pa.array(days, pa.int32()).cast(pa.date32())}
    pairs = zip(encoder.numeric_of, encoder.numeric_, strict=True)
    raw = [name for name, item in pairs for _ in item.outputs()]
    for at, (name, of) in enumerate(zip(encoder.numeric_names, raw, strict=True)):
        if of not in hidden:
            columns[f"numeric:{name}"] = pa.array(np.ascontiguousarray(numeric[:, at]))
    for index, vocabulary in enumerate(encoder.categorical_):
        if vocabulary.name not in hidden:
            columns[f"category:{vocabulary.name}"] = pa.array(np.ascontiguousarray(codes[:, index]))
    return pa.table(columns)
