"""Instants of rows as int64 microseconds UTC: event times, decision times, and when a value becomes known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.sections.data import Column
from engine.config.units import Moment
from engine.errors import UserError

NEVER = np.iinfo(np.int64).min  # NaT: a null instant. Never compare it with `<`.
ALWAYS = -(2**62)  # before any event


def instants(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64[n] microseconds UTC of a timestamp column; null becomes NEVER."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    filled = pc.fill_null(column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()), NEVER)
    return np.asarray(filled)


def shifted(times: np.ndarray, offset: int) -> np.ndarray:
    """Instants plus an offset; a null instant stays null."""
    return np.where(times == NEVER, NEVER, times + offset) if offset else times


def moment_times(table: pa.Table, moment: Moment) -> np.ndarray:
    """int64[n] microseconds UTC of a moment such as `scheduled - 1h`."""
    return shifted(instants(table[moment.column]), moment.offset)


def known_times(table: pa.Table, column: Column) -> np.ndarray:
    """int64[n] when each row's value becomes known; NEVER where its time is null.

    Raises UserError for a column that does not say when, as a specification from elsewhere can have it.
    """
    if column.known_at is None:
        raise UserError(
            "a column that windows or as-of views read must say when it becomes known (known_at), found none"
        )
    if column.known_at == "prior":
        return np.full(table.num_rows, ALWAYS)
    return moment_times(table, column.known_at)


def known_as_past(table: pa.Table, event_times: np.ndarray, known: np.ndarray) -> np.ndarray:
    """When a row counts in a trailing window: its event has happened and its value is known, whichever is later.

    Without this rule a value known in advance (`prior`) would let future rows into the window.
    """
    assert len(event_times) == table.num_rows
    return np.where((known == NEVER) | (event_times == NEVER), NEVER, np.maximum(known, event_times))
