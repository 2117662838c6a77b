"""Windows without the rows that belong to the row itself, such as the payments of a booking that is to be judged.

Few rows have some of their own within a window. Those are computed again, each as an entity of its own that holds copies of the
rows in its window except its own; the bits are those of `trailing` over these rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.features import instants
from kernels.windows import Aggregate, trailing

COPIES = 4_000_000  # past rows in memory at once, of as many probes as have them together
Arrays = tuple[np.ndarray, ...]


def leave_out(
    block: np.ndarray,
    probes: Arrays,
    source: Arrays,
    own: Arrays,
    values: np.ndarray | None,
    windows: Sequence[int],
    aggregates: Sequence[Aggregate],
    threads: int,
) -> None:
    """Correct float64[n, windows, aggregates] in place, where it counts rows of the probe's own.

    probes = (entity codes, decisions) int64[n]; source = (entity codes, times within the window, known times) int64[m];
    own = codes of own keys int64[n] and int64[m], -1 for none.
    """
    (entity, times), (past, placed, known), (key, past_key) = probes, source, own
    widest, usable = max(windows), known != instants.NEVER
    mine = _Spans(np.where(usable & (past >= 0), past_key, -1), placed)
    probe, row = mine.pairs(np.where(times != instants.NEVER, key, -1), times, widest)
    counts = (past[row] == entity[probe]) & (known[row] < times[probe])
    again = np.unique(probe[counts])
    others = _Spans(np.where(usable, past, -1), placed)
    sizes = np.cumsum(others.counts(entity[again], times[again], widest))
    for part in np.split(again, np.searchsorted(sizes, np.arange(COPIES, sizes[-1] if len(sizes) else 0, COPIES))):
        probe, row = others.pairs(entity[part], times[part], widest)
        kept = past_key[row] != key[part][probe]
        probe, row = probe[kept], row[kept]
        block[part] = trailing(
            np.arange(len(part)), times[part], probe, placed[row], known[row], None if values is None else values[row],
            windows, aggregates, threads,
        )  # fmt: skip


class _Spans:
    """Past rows by (code, time), to look up those of a code within [T - widest, T)."""

    def __init__(self, codes: np.ndarray, placed: np.ndarray) -> None:
        self._times = np.unique(placed)
        keys = self._keys(codes, np.searchsorted(self._times, placed))
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def _keys(self, codes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        return codes * (len(self._times) + 1) + ranks

    def _bounds(self, codes: np.ndarray, times: np.ndarray, widest: int) -> tuple[np.ndarray, np.ndarray]:
        floor = np.iinfo(np.int64).min + 1
        since = np.where(times >= floor + widest, times - widest, floor)
        low, high = (
            np.searchsorted(self._sorted, self._keys(codes, np.searchsorted(self._times, edge)))
            for edge in (since, times)
        )
        return low, np.where(codes >= 0, high, low)

    def counts(self, codes: np.ndarray, times: np.ndarray, widest: int) -> np.ndarray:
        """int64[n]: rows of each."""
        low, high = self._bounds(codes, times, widest)
        return np.asarray(high - low)

    def pairs(self, codes: np.ndarray, times: np.ndarray, widest: int) -> tuple[np.ndarray, np.ndarray]:
        """(place in `codes`, past row) of each such row, in the order of codes and then of time."""
        low, high = self._bounds(codes, times, widest)
        sizes = high - low
        places = np.repeat(np.arange(len(codes)), sizes)
        steps = np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return places, self._order[np.repeat(low, sizes) + steps]
