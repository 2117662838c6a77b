"""The log of what was served: Parquet files in the run directory, written by a thread of their own."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config.sections.data import PLACE
from engine.features.spec import sensitive_features
from engine.runtime import storage
from engine.serving.online import Answer

GIVEN, FEATURE = "given.", "feature."  # before the names of columns of the request, and of features
ROWS, SECONDS = 50_000, 5.0  # a file is written after so many rows, or so long after the first of them


class Log:
    """Rows with what they were asked with, their features, scores and model. What reads a sensitive column is left out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, 0
        self.tables: queue.Queue[pa.Table | None] = queue.Queue()
        storage.make_folder(folder)
        self.thread = threading.Thread(target=self._write, name="served", daemon=True)
        self.thread.start()

    def add(self, rows: pa.Table, answer: Answer, served: int) -> None:
        """Rows that were answered at an instant, microseconds UTC."""
        n, data = rows.num_rows, answer.bundle.data
        secret = sensitive_features(data, answer.bundle.features)
        open_ = [name for name in rows.column_names if name != PLACE and not data.columns[name].sensitive]
        columns = {
            "row_id": answer.columns["row_id"],
            "served": pa.array(np.full(n, served)).cast(pa.timestamp("us", tz="UTC")),
            "model": pa.array([answer.bundle.digest] * n),
            "refused": pa.array(answer.refused, pa.string()),
            "past_until": pa.array([answer.newest] * n, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        }
        columns |= {name: answer.columns[name] for name in answer.columns.column_names[1:]}
        columns |= {GIVEN + name: rows[name] for name in open_}
        columns |= {FEATURE + name: answer.raw[name] for name in answer.raw.column_names if name not in secret}
        self.tables.put(pa.table(columns))

    def _write(self) -> None:
        waiting: list[pa.Table] = []
        ended, since = False, time.monotonic()
        while not ended:
            with contextlib.suppress(queue.Empty):
                table = self.tables.get(timeout=SECONDS)
                ended = table is None
                since = since if waiting else time.monotonic()
                waiting += [] if table is None else [table]
            due = ended or time.monotonic() - since >= SECONDS or sum(one.num_rows for one in waiting) >= ROWS
            if waiting and due:
                self._flush(waiting)
                waiting = []

    def _flush(self, tables: list[pa.Table]) -> None:
        """A file for each set of columns: models of other features may have followed each other."""
        for schema in dict.fromkeys(str(table.schema) for table in tables):
            mine = [table for table in tables if str(table.schema) == schema]
            storage.write_parquet(self.folder / f"part-{self.files:05d}.parquet", pa.concat_tables(mine))
            self.files += 1

    def close(self) -> None:
        """Write what is left."""
        self.tables.put(None)
        self.thread.join()
