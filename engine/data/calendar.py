"""Local days and months of instants, for any year that a dataset may hold: by Arrow's calendar, which has no end in 9999."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units


def local_days(times: pa.ChunkedArray | pa.Array, time_zone: str) -> np.ndarray:
    """int32[n] local days since 1970-01-01 of instants; a null time has none (an event time is never null)."""
    local = pc.local_timestamp(times.cast(pa.timestamp("us", tz="UTC")).cast(pa.timestamp("us", tz=time_zone)))
    days = local.cast(pa.date32()).cast(pa.int32())
    return np.asarray(days.combine_chunks() if isinstance(days, pa.ChunkedArray) else days)


def day_start(day: int, time_zone: str) -> int:
    """Instant at which a local day (since 1970-01-01) begins; where a clock change skips midnight, the change itself."""
    local = pa.array([day * units.MICROSECONDS["d"]], pa.timestamp("us"))
    found = pc.assume_timezone(local, time_zone, ambiguous="earliest", nonexistent="latest")
    return int(found.cast(pa.int64())[0].as_py())


def months_of(days: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(YYYY-MM, bool[n] which of the local days lie in it) of each month that has some, in order of time."""
    months, inverse = np.unique(days.astype("datetime64[D]").astype("datetime64[M]"), return_inverse=True)
    return [(str(month), inverse == place) for place, month in enumerate(months)]
