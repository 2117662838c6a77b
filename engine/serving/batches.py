"""Requests that arrive together are scored together: one call of the model costs nearly the same for one row as for a hundred."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from engine.serving.online import Answer


class Full(Exception):
    """Too many rows wait."""


@dataclass
class Waiting:
    """Rows of one request, and where their answer goes."""

    rows: pa.Table
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batches:
    """A bounded queue of requests before one thread that scores. Requests with other columns are scored apart."""

    def __init__(self, score: Callable[[pa.Table], Answer], wait: float, batch_rows: int, queue_rows: int) -> None:
        self.score, self.wait, self.batch_rows, self.queue_rows = score, wait, batch_rows, queue_rows
        self.waiting: list[Waiting] = []
        self.rows = 0  # that wait, or are being scored
        self.sizes: list[int] = []  # rows of the batches since they were last looked at
        self.arrived = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="score")

    async def submit(self, rows: pa.Table) -> Answer:
        """The answer to rows. Raises Full, and whatever scoring them raises."""
        if self.rows + rows.num_rows > self.queue_rows:
            raise Full
        one = Waiting(rows)
        self.rows += rows.num_rows
        self.waiting.append(one)
        self.arrived.set()
        try:
            return await one.answer
        finally:
            self.rows -= rows.num_rows

    async def run(self) -> None:
        """Score until cancelled. While a batch is scored the next one gathers."""
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            if sum(one.rows.num_rows for one in self.waiting) < self.batch_rows:
                await asyncio.sleep(self.wait)
            batch = self._take()
            if not self.waiting:
                self.arrived.clear()
            self.sizes.append(sum(one.rows.num_rows for one in batch))
            await loop.run_in_executor(self.thread, self._score, batch, loop)

    def _take(self) -> list[Waiting]:
        """The first requests that fit into a batch and have the same columns; one at least."""
        first, taken, rows = self.waiting[0], list[Waiting](), 0
        for one in self.waiting:
            if taken and (one.rows.schema != first.rows.schema or rows + one.rows.num_rows > self.batch_rows):
                break
            taken.append(one)
            rows += one.rows.num_rows
        del self.waiting[: len(taken)]
        return taken

    def _score(self, batch: list[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """Answer each request of a batch; where the batch fails, each alone, so that one cannot fail the others."""
        try:
            whole = self.score(pa.concat_tables([one.rows for one in batch]).combine_chunks())
        except Exception as error:
            if len(batch) == 1:
                loop.call_soon_threadsafe(_fail, batch[0], error)
            else:
                for one in batch:
                    self._score([one], loop)
            return
        low = 0
        for one in batch:
            high = low + one.rows.num_rows
            loop.call_soon_threadsafe(_tell, one, whole.rows(low, high))
            low = high

    def call(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Do something in the thread that scores, between batches."""
        return asyncio.get_running_loop().run_in_executor(self.thread, work)

    def close(self) -> None:
        """End the thread once its batch is done."""
        self.thread.shutdown(wait=True)


def _tell(one: Waiting, answer: Answer) -> None:
    if not one.answer.done():  # its client has left
        one.answer.set_result(answer)


def _fail(one: Waiting, error: Exception) -> None:
    if not one.answer.done():
        one.answer.set_exception(error)
