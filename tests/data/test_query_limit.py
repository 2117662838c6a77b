"""A query without an end is interrupted: by its limit, and by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from engine.data import query
from engine.errors import UserError

ENDLESS = "SELECT count(*) AS n FROM range(10000000000) a, range(10000000000) b"
SLOW_AT_THE_END = (
    "SELECT a.range AS n FROM range(1000) a UNION ALL SELECT count(*) FROM range(10000000000) a, range(1000) b"
)


@pytest.mark.parametrize("sql", [ENDLESS, SLOW_AT_THE_END])
def test_a_query_without_an_end_is_interrupted_at_its_limit(sql: str) -> None:
    began = time.monotonic()
    with (
        query.connect() as connection,
        pytest.raises(UserError, match=r"data.query must give its next rows within 0.5 s"),
    ):
        list(query.run(connection, sql, "data.query", 100, limit=0.5))
    assert time.monotonic() - began < 60


def test_ctrl_c_is_heard_while_a_query_runs() -> None:
    began = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with query.connect() as connection, pytest.raises(KeyboardInterrupt):
        list(query.run(connection, ENDLESS, "data.query"))
    assert time.monotonic() - began < 60


def test_the_time_that_the_reader_of_the_rows_takes_is_not_the_querys() -> None:
    batch = pa.record_batch({"n": ["x" * 2000] * 2048})  # more than is read ahead

    def slow() -> Iterator[pa.RecordBatch]:
        for _ in range(4):
            time.sleep(0.7)  # longer than between two looks at the clock
            yield batch

    with query.connect() as connection:
        query.register(connection, {"t": pa.RecordBatchReader.from_batches(batch.schema, slow())})
        rows = 0
        for found in query.run(connection, "SELECT n FROM t", "data.query", 2048, limit=3):
            rows += found.num_rows
            time.sleep(1.5)
        assert rows == 4 * 2048
