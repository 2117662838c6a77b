"""Partitions of a view: one part per UTC calendar month of event time, computed from the months it may look back on.

An append computes the new months only; a late row recomputes the months that can see it; only the months in reach must be in
memory. Values do not depend on the partitions, bit by bit: the kernels guarantee it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
import pyarrow as pa

from engine.config.sections.features import ViewConfig
from engine.config.units import Moment, Span
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features import instants
from engine.runtime import digest, records, seal, storage

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One month of a dataset: its name (2013-01), instants [start, stop) and rows [first, last)."""

    name: str
    start: int
    stop: int
    rows: tuple[int, int]


def month_parts(dataset: Dataset) -> list[Part]:
    """The months that hold rows, in order. The search steps from row to row, so empty months cost nothing."""
    found: list[Part] = []
    at = 0
    while at < dataset.rows:
        table = dataset.read([dataset.event_time], rows=(at, at + 1))
        month = np.datetime64(int(instants.instants(table[0])[0]), "us").astype("datetime64[M]")
        start, stop = month_span(str(month))
        rows = dataset.row_range(start, stop)
        assert rows[0] == at < rows[1], (rows, at)
        found.append(Part(str(month), start, stop, rows))
        at = rows[1]
    return found


class InputsRecord(TypedDict):
    """Column -> month -> digest, and moment -> month -> (earliest, latest) time, empty where each is null."""

    format: Annotated[int, records.Format(FORMAT, FORMAT)]
    columns: dict[str, dict[str, records.Digest]]
    spans: dict[str, dict[str, list[int]]]


class Inputs:
    """Digests of a dataset's columns, and the spans of decision and known times, by month; stored beside the store's views,
    because every append needs them again.
    """

    def __init__(self, store: Path, dataset: Dataset, parts: Sequence[Part]) -> None:
        self.dataset, self.parts = dataset, parts
        self._path = storage.inside(store, "features", ".inputs", f"{dataset.name}-{dataset.digest[:16]}.json")
        saved: InputsRecord = {"format": FORMAT, "columns": {}, "spans": {}}
        with contextlib.suppress(UserError):  # missing, of another format, or damaged: it is recomputed
            saved = seal.read_checked(self._path, InputsRecord)
        self._columns, self._spans = saved["columns"], saved["spans"]

    def prepare(self, columns: Sequence[str], moments: Sequence[Moment]) -> None:
        """Digest the columns, and find the spans of the moments, that are not there yet, in one pass over the months."""
        lacking = [name for name in columns if name not in self._columns]
        unseen = [moment for moment in moments if moment not in self._spans]
        if not lacking and not unseen:
            return
        for part in self.parts:
            times = [moment.column for moment in unseen]
            table = self.dataset.read(list(dict.fromkeys([*lacking, *times])), rows=part.rows)
            for name in lacking:
                self._columns.setdefault(name, {})[part.name] = digest.of_table(table.select([name]))
            for moment in unseen:
                self._spans.setdefault(moment, {})[part.name] = _span(instants.moment_times(table, moment))
        record: InputsRecord = {"format": FORMAT, "columns": self._columns, "spans": self._spans}
        storage.write_json(self._path, seal.checked(record))

    def decisions(self, part: Part, as_of: Moment) -> tuple[int, int] | None:
        """(earliest, latest) decision time of a month's rows; None when no row has one."""
        span = self._spans[as_of][part.name]
        return (span[0], span[1]) if span else None

    def column(self, name: str, part: Part) -> str:
        """Digest of a column's values in a month."""
        return self._columns[name][part.name]

    def reach(self, part: Part, as_of: Moment, length: int | None) -> tuple[int, int]:
        """Instants [from, to) of event time that a window of `length` (None = all history) may see from a month's rows."""
        span = self.decisions(part, as_of)
        if span is None:
            return part.start, part.start
        return (instants.ALWAYS if length is None else span[0] - length), span[1]

    def within(self, start: int, stop: int, known: Sequence[Moment] = ()) -> list[Part]:
        """Months that overlap instants [start, stop), and earlier ones of which a `known` moment is at or after `start`."""

        def reaches(part: Part) -> bool:
            return start < part.stop or any(
                start <= max(self._spans[moment][part.name], default=start - 1) for moment in known
            )

        return [part for part in self.parts if part.start < stop and reaches(part)]


def _span(times: np.ndarray) -> list[int]:
    times = times[times != instants.NEVER]
    return [int(times.min()), int(times.max())] if len(times) else []


def view_length(view: ViewConfig, window: Span | None = None) -> int | None:
    """How far back the view (or one of its windows) looks, in microseconds; None = without bound; 0 = the row itself."""
    if view.kind == "windows":
        return max(item.microseconds for item in ([window] if window else view.windows))
    if view.kind == "asof":
        return view.max_age.microseconds if view.max_age else None
    return 0


def table_months(table: pa.Table, time: str) -> dict[str, str]:
    """Digest of a side table's rows by UTC month of its event time, in the table's order."""
    times = instants.instants(table[time])
    months = (times.astype("datetime64[us]").astype("datetime64[M]")).astype(str)
    found = {}
    for month in sorted(set(months[times != instants.NEVER].tolist())):
        rows = np.flatnonzero(months == month)
        found[month] = digest.of_table(table.take(pa.array(rows)))
    return found


def month_span(name: str) -> tuple[int, int]:
    """Instants [start, stop) of a UTC month `2013-01`, of any year that a timestamp may have."""
    month = np.datetime64(name, "M")
    start, stop = (int(edge.astype("datetime64[us]").astype(np.int64)) for edge in (month, month + 1))
    return start, stop
