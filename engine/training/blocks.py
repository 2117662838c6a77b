"""The block of each row: what intervals, bands and the gate between models draw whole, as its rows are not independent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.config.sections.training import EvaluateConfig
from engine.features.vocabulary import as_texts
from kernels.hashing import hash_bytes

Array = NDArray[Any]
ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads the number of a period over 64 bits


def block_columns(config: EvaluateConfig) -> list[str]:
    """The column that `blocks_of` reads; none for blocks of days and for single rows."""
    return [config.block_column] if config.block_column else []


def blocks_of(config: EvaluateConfig, days: Array, rows: Array, facts: pa.Table) -> Array:
    """int64[n]: the label of the block of each row; those of days and of single rows rise with time.

    Shape: days int[n], local days; rows int64[n], dataset rows; facts: a table of n rows with the `block_columns`.
    """
    if config.block == "row":
        return rows
    period = days.astype(np.int64) // config.block_days if config.block_days else np.zeros(len(days), np.int64)
    if config.block_column is None:
        return period
    texts = as_texts(facts[config.block_column]).fill_null("")
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    hashes = hash_bytes(np.frombuffer(texts.buffers()[2] or b"", np.uint8), offsets)
    return np.asarray((hashes + period.astype(np.uint64) * ODD).view(np.int64))
