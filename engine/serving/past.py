"""The past in memory: rows that windows and as-of joins of some entities may read, found without a pass over all rows.

What is found may hold more rows than count; the feature code decides. So the features are those of a whole dataset, bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig, ViewConfig
from engine.data import order
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import instants
from engine.features.partitions import view_length
from engine.features.spec import history_inputs, known_moments

COMPACT = 512  # blocks of added rows that are joined into one
Entity = tuple[object, ...]


class Index:
    """Row numbers by the values of key columns, ascending; rows can be added at the end."""

    def __init__(self, columns: tuple[str, ...], table: pa.Table) -> None:
        self.columns = columns
        self.rows: dict[Entity, np.ndarray] = {}
        self.added: dict[Entity, list[int]] = {}
        self._fill(table)

    def _fill(self, table: pa.Table) -> None:
        codes = np.zeros(table.num_rows, np.int64)
        for column in self.columns:
            encoded = table[column].combine_chunks().dictionary_encode(null_encoding="encode")
            _, codes = np.unique(codes * len(encoded.dictionary) + np.asarray(encoded.indices), return_inverse=True)
        by_code = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[by_code], prepend=-1))
        firsts = table.select(list(self.columns)).take(pa.array(by_code[starts]))
        groups = np.split(by_code, starts[1:]) if len(starts) else []
        self.rows = dict(zip(entities(firsts, self.columns), groups, strict=True))

    def add(self, table: pa.Table, first: int) -> None:
        """Rows that are numbered from `first` on."""
        for place, entity in enumerate(entities(table, self.columns)):
            self.added.setdefault(entity, []).append(first + place)

    def find(self, wanted: set[Entity], times: np.ndarray, start: int | None, stop: int) -> list[np.ndarray]:
        """Rows of the entities with a time in [start, stop]; of rows that were added, with any time."""
        found = []
        for entity in wanted:
            rows = self.rows.get(entity)
            if rows is not None:
                mine = times[rows]  # ascending, as the dataset is
                low = 0 if start is None else int(np.searchsorted(mine, start))
                found.append(rows[low : int(np.searchsorted(mine, stop, side="right"))])
            if entity in self.added:
                found.append(np.array(self.added[entity], np.int64))
        return found


def entities(table: pa.Table, columns: Sequence[str]) -> list[Entity]:
    """The values of the columns, row by row."""
    lists = [table[column].to_pylist() for column in columns]
    return list(zip(*lists, strict=True)) if lists else [()] * table.num_rows


@dataclasses.dataclass
class Rows:
    """A table whose rows are found by entity. `times` int64[fixed] are event times of the rows that were there from the start,
    ascending (without one all are 0), and `newest` is the latest of all rows.
    """

    table: pa.Table
    times: np.ndarray
    indices: dict[tuple[str, ...], Index]
    newest: int | None

    @property
    def fixed(self) -> int:
        """Rows that were there from the start."""
        return len(self.times)

    @classmethod
    def of(cls, table: pa.Table, time: str | None, keys: set[tuple[str, ...]]) -> Rows:
        """Index a table in order of its event time."""
        times = np.zeros(table.num_rows, np.int64) if time is None else instants.instants(table[time])
        by_time = np.argsort(times, kind="stable")  # a side table may be in another order
        table = table.take(pa.array(by_time)).combine_chunks()
        newest = int(times.max()) if len(times) else None
        return cls(table, times[by_time], {columns: Index(columns, table) for columns in keys}, newest)

    def add(self, rows: pa.Table, time: str) -> None:
        """Append rows; those of a row id that is there already replace it when they are read."""
        first = self.table.num_rows
        for index in self.indices.values():
            index.add(rows, first)
        self.table = pa.concat_tables([self.table, rows.select(self.table.column_names).cast(self.table.schema)])
        added = instants.instants(rows[time])
        self.newest = max(
            int(added.max(initial=instants.ALWAYS)), instants.ALWAYS if self.newest is None else self.newest
        )
        if self.table.column(0).num_chunks > COMPACT:
            self.table = self.table.combine_chunks()


class Past:
    """The past events of a dataset, and its side tables, as the features of one specification read them."""

    def __init__(self, data: DataConfig, features: FeaturesConfig, dataset: Dataset | None) -> None:
        self.data, self.features = data, features
        views = features.active_views.values()
        self.views = [view for view in views if view.kind in ("windows", "asof")]
        self.lag = 0  # longest time between an event and when a value of it became known
        names = sorted({view.table for view in self.views if view.table})
        needed = any(view.table is None for view in self.views)
        if dataset is None and (names or needed):
            raise UserError(
                "a model with windows or as-of views needs a dataset of past events in the store, found none"
            )
        self.events: Rows | None = None
        if needed and dataset is not None:
            columns = list(dict.fromkeys([data.event_time, *data.ids, *history_inputs(data, features)]))
            self.events = Rows.of(dataset.read(columns), data.event_time, self._keys(None))
            self._widen(self.events.table)
        self.tables: dict[str, Rows] = {}
        for name in names:
            assert dataset is not None
            time = next(
                (column for column, item in data.tables[name].columns.items() if item.role == "event_time"), None
            )
            self.tables[name] = Rows.of(dataset.table(name), time, self._keys(name))

    def _keys(self, table: str | None) -> set[tuple[str, ...]]:
        return {tuple(view.keys) for view in self.views if view.table == table}

    def _widen(self, events: pa.Table) -> None:
        """Keep the longest time until a value of an event is known, for windows that count values when they are known."""
        times = instants.instants(events[self.data.event_time])
        for view in self.views:
            for moment in known_moments(view, self.data) if view.table is None else ():
                known = instants.moment_times(events, moment)
                lags = (known - times)[known != instants.NEVER]
                self.lag = max(self.lag, int(lags.max(initial=0)))

    @property
    def newest(self) -> int | None:
        """The latest event time, microseconds UTC; None without past events."""
        return None if self.events is None else self.events.newest

    def add(self, events: pa.Table) -> None:
        """Append past events, in their declared types, where there are windows; columns that are absent are null."""
        if self.events is None:
            return
        for field in self.events.table.schema:
            if field.name not in events.column_names:
                events = events.append_column(field, pa.nulls(events.num_rows, field.type))
        self._widen(events)
        self.events.add(events, self.data.event_time)

    def of(self, view: ViewConfig, probes: pa.Table) -> tuple[pa.Table, dict[str, pa.Table]]:
        """(past events, side table by name) with every row that the view may read for the probes."""
        if view.kind not in ("windows", "asof"):
            return probes.slice(0, 0), {}
        if view.table is None:
            assert self.events is not None
            return self._read(self.events, view, probes), {}
        return probes.slice(0, 0), {view.table: self._read(self.tables[view.table], view, probes)}

    def _read(self, rows: Rows, view: ViewConfig, probes: pa.Table) -> pa.Table:
        decisions = instants.moment_times(probes, self.features.decision)
        decisions = decisions[decisions != instants.NEVER]
        static = view.table is not None and self.data.tables[view.table].static
        found = [np.empty(0, np.int64)]
        if len(decisions):
            start, stop = (None, 0) if static else self._reach(view, decisions)
            wanted = set(entities(probes, view.entity))
            found += rows.indices[tuple(view.keys)].find(wanted, rows.times, start, stop)
        places = np.sort(np.concatenate(found))  # of entities, which have no row in common
        taken = rows.table.take(pa.array(places))
        if view.table is not None or not len(places) or places[-1] < rows.fixed:
            return taken
        return self._newest_of_each(taken)

    def _reach(self, view: ViewConfig, decisions: np.ndarray) -> tuple[int | None, int]:
        """Event times that the view may read for decisions: from (None: any), to."""
        length = view_length(view)
        first, last = int(decisions.min()), int(decisions.max())
        return None if length is None else first - length - self.lag, last

    def _newest_of_each(self, events: pa.Table) -> pa.Table:
        """Of rows with one id the last one, for it holds the outcome; in the order of a dataset."""
        ids = row_ids(events, self.data.ids)
        numbered = pa.table({"id": ids, "place": np.arange(len(ids))}).group_by("id").aggregate([("place", "max")])
        events = events.take(numbered["place_max"].sort())
        places = order.sorted_rows(events, list(dict.fromkeys([self.data.event_time, *self.data.ids])))
        return events if places is None else events.take(pa.array(places))
