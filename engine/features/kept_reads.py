"""Rows of a dataset that several views read: most of their columns are the same, and decoding takes as long as sorting."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engine.data.dataset import Dataset

Rows = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class KeptReads(Dataset):
    """A dataset that keeps the columns it has read last, up to `limit` bytes. Another process gets it without them."""

    limit: int = 0
    _kept: dict[Rows, dict[str, pa.ChunkedArray]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def read(self, columns: list[str] | None = None, rows: Rows | None = None) -> pa.Table:
        """As of any dataset."""
        if columns == []:
            return super().read(columns, rows)
        span, schema = rows or (0, self.rows), self._schema(columns)
        with self._lock:
            found = self._kept.pop(span, {})
            if lacking := [name for name in schema.names if name not in found]:
                table = super().read(lacking, span)
                found = found | dict(zip(lacking, table.columns, strict=True))
            self._kept[span] = found  # the newest is the last
            while (
                sum(column.get_total_buffer_size() for kept in self._kept.values() for column in kept.values())
                > self.limit
            ):
                del self._kept[next(iter(self._kept))]
        return pa.Table.from_arrays([found[name] for name in schema.names], schema=schema)

    def __reduce__(self) -> Any:
        return Dataset, (self.directory, self.manifest, self.seal)
