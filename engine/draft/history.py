"""Windows and periods proposed from when rows happen: by the gaps between rows of an entity, and the last fifth of the time."""

from __future__ import annotations

import datetime
import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

DAY = 86_400.0
LADDER = {"1h": 3_600.0, "6h": 21_600.0, "1d": DAY, "7d": 7 * DAY, "28d": 28 * DAY, "90d": 90 * DAY, "365d": 365 * DAY}
MOST = 3  # windows of a view
ROWS = 3.0  # rows that a window should hold, of the median entity
SPAN = 0.25  # longest window, as a share of the time that the data covers


def gap_seconds(entity: pa.ChunkedArray, seconds: NDArray[np.float64]) -> float:
    """Median gap in seconds between rows of one entity; NaN where none returns. `seconds` is in order of time."""
    codes = np.asarray(pc.fill_null(pc.dictionary_encode(entity).combine_chunks().indices, -1))
    order = np.lexsort((seconds, codes))
    same = (np.diff(codes[order]) == 0) & (codes[order][1:] >= 0)
    gaps = np.diff(seconds[order])[same]
    return float(np.median(gaps)) if len(gaps) else float("nan")


def windows_for(gap: float, span: float) -> list[str]:
    """Lengths of windows for entities whose rows are `gap` seconds apart, of data that covers `span` seconds.

    They go by the time when a value became known, so that a short one is filled however late outcomes are.
    """
    least = ROWS * gap
    usable = [name for name, length in LADDER.items() if least <= length <= SPAN * span]
    if len(usable) <= MOST:
        return usable
    places = np.linspace(0, len(usable) - 1, MOST).round().astype(int)
    return [usable[place] for place in places]


def periods(seconds: NDArray[np.float64], zone: str) -> dict[str, tuple[str, str]] | None:
    """train, valid and test as [from, to] days: the last tenth of the rows is for the test, the tenth before for validation.

    None where the rows are of fewer than three days.
    """
    local = zoneinfo.ZoneInfo(zone)

    def day(second: float) -> datetime.date:
        return datetime.datetime.fromtimestamp(second, local).date()

    first, last = day(float(seconds.min())), day(float(seconds.max())) + datetime.timedelta(days=1)
    valid, test = (day(float(np.quantile(seconds, share))) for share in (0.8, 0.9))
    test = max(test, first + datetime.timedelta(days=2))
    valid = min(max(valid, first + datetime.timedelta(days=1)), test - datetime.timedelta(days=1))
    if not first < valid < test < last:
        return None
    edges = [str(edge) for edge in (first, valid, test, last)]
    return {name: (edges[place], edges[place + 1]) for place, name in enumerate(("train", "valid", "test"))}
