"""Days of a dataset, by which views are reused, and the parts of a view: runs of days of one UTC month.

Digests and decision times are kept for each UTC day of event time: an append computes the new days, a late row the days that
can see it. A part is one file of a view: the days of a month, cut after the day that fills PART_ROWS rows, so that an append
rewrites at most that much and a view of a year has a dozen files. Values do not depend on either: the kernels guarantee it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from engine.config.sections.features import ViewConfig
from engine.config.units import Moment
from engine.config.units import Span as Length
from engine.data.dataset import PART_ROWS, Dataset
from engine.errors import UserError
from engine.features import instants
from engine.runtime import digest, records, seal, storage

FORMAT = 2
KEPT = 32  # datasets of a name, newest first, whose inputs stay in the store
DAY = 86_400_000_000  # microseconds
Number = Annotated[int, records.Within(-(2**31), 2**31)]  # of a day since 1970
Digests = Annotated[str, records.Matching(r"([0-9a-f]{64})*", "64 hex digits a day")]


class DatasetPart(TypedDict):
    """A part of the dataset, by which an unchanged beginning is recognised."""

    start: records.Count
    rows: records.Count
    columns: dict[str, records.Digest]


class Span(TypedDict):
    """The earliest and the latest instant of a moment (of decisions, of values known) by day; NEVER where all are null."""

    earliest: list[records.Instant]
    latest: list[records.Instant]


class TableDays(TypedDict):
    """The days of a side table by the time column `time`, the digest of each day's rows, and each moment's latest time of the
    day; `digest` of the whole.
    """

    time: str
    digest: records.Digest
    days: list[Number]
    digests: Digests
    latest: NotRequired[dict[str, list[records.Instant]]]


class InputsRecord(TypedDict):
    """The days of a dataset that hold rows, the rows before which each ends, and digests and spans of moments by day."""

    format: Annotated[int, records.Format(FORMAT, FORMAT)]
    parts: list[DatasetPart]
    days: list[Number]
    stops: list[records.Count]
    columns: dict[str, Digests]
    spans: dict[str, Span]
    tables: dict[str, TableDays]


class Part(NamedTuple):
    """A file of a view: its name (2013-01; 2013-01-17 after a cut in the month), its rows, and its places in `Inputs.days`."""

    name: str
    rows: tuple[int, int]
    days: tuple[int, int]


@dataclass(frozen=True)
class ByDay:
    """Values of the days that hold rows: digests[k][d] of day days[d]; until[d]: the latest instant at which a window may
    begin and still count a row of that day, which is not the end of the day where windows go by known time.
    """

    days: list[int]
    digests: list[list[str]]
    until: list[int]
    by_known: bool = False
    _ranges: dict[tuple[int, int], str] = field(default_factory=dict)

    def between(self, first: int, stop: int) -> str:
        """One digest of days [first, stop) by place."""
        if (first, stop) not in self._ranges:
            self._ranges[first, stop] = digest.of_texts(
                itertools.chain.from_iterable(values[first:stop] for values in self.digests)
            )
        return self._ranges[first, stop]

    def reached(self, start: int, stop: int) -> list[str]:
        """Digests of the days that a window may count which begins at instant `start` or later and ends by `stop`."""
        first = bisect.bisect_left(self.days, start // DAY)
        earlier = [place for place in range(first) if self.until[place] >= start] if self.by_known else []
        runs = [self.between(place, place + 1) for place in earlier]
        return [*runs, self.between(first, bisect.bisect_right(self.days, stop // DAY))]

    @functools.cached_property
    def rows(self) -> list[tuple[Any, ...]]:
        """(day, its digests, until) for each day."""
        return list(zip(self.days, *self.digests, self.until, strict=True))

    @functools.cached_property
    def _set(self) -> frozenset[tuple[Any, ...]]:
        return frozenset(self.rows)

    def changed(self, before: ByDay) -> frozenset[tuple[Any, ...]]:
        """The rows that only one of both has."""
        return self._set ^ before._set


@dataclass
class Inputs:
    """What views depend on, by day of a dataset."""

    days: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    tables: dict[str, TableDays] = field(default_factory=dict)
    _by_day: dict[tuple[str, ...], ByDay] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """The parts of every view of the dataset, in order."""
        found: list[Part] = []
        start, first = 0, 0
        for place, (day, stop) in enumerate(zip(self.days, self.stops, strict=True)):
            after = _month(self.days[place + 1]) if place + 1 < len(self.days) else None
            if after != _month(day) or stop - start >= PART_ROWS:
                opens = not found or _month(self.days[first]) != _month(self.days[first - 1])
                name = _month(self.days[first]) if opens else _date(self.days[first])
                found.append(Part(str(name), (start, stop), (first, place + 1)))
                start, first = stop, place + 1
        return found

    def by_day(self, columns: Sequence[str], moments: Sequence[Moment] = ()) -> ByDay:
        """The digests of some columns and the number of rows, by day; `moments` place a row in a window beside its event."""
        key = (*columns, "", *moments)
        if key not in self._by_day:
            rows = [str(self.rows_of(place, place + 1)) for place in range(len(self.days))]
            latest = (self.spans[moment]["latest"] for moment in moments)
            until = [max(items) for items in zip(_ends(self.days), *latest, strict=True)]
            self._by_day[key] = ByDay(
                self.days, [rows, *(self.columns[name] for name in columns)], until, bool(moments)
            )
        return self._by_day[key]

    def table_by_day(self, table: str, moments: Sequence[Moment] = ()) -> ByDay:
        """The digests of a side table's rows by day; `moments` place a row in a window beside its event."""
        found = self.tables[table]
        latest = (found["latest"][moment] for moment in moments)
        until = [max(items) for items in zip(_ends(found["days"]), *latest, strict=True)]
        return ByDay(found["days"], [_split(found["digests"])], until, bool(moments))

    def reach(self, days: tuple[int, int], as_of: Moment, length: int | None) -> tuple[int, int] | None:
        """Instants from and to which a window of `length` (None = all history) may see from the rows of some days; None
        without a decision time.
        """
        found = self.spans[as_of]
        earliest = [time for time in found["earliest"][slice(*days)] if time != instants.NEVER]
        if not earliest:
            return None
        first = instants.ALWAYS if length is None else min(earliest) - length
        return first, max(found["latest"][slice(*days)])

    def rows_of(self, first: int, stop: int) -> int:
        """Rows of the days [first, stop) by place."""
        return self.stops[stop - 1] - (self.stops[first - 1] if first else 0) if stop > first else 0


def _ends(days: Sequence[int]) -> list[int]:
    return [(day + 1) * DAY - 1 for day in days]


def _month(day: int) -> np.datetime64:
    return np.datetime64(day, "D").astype("datetime64[M]")


def _date(day: int) -> np.datetime64:
    return np.datetime64(day, "D")


# ------------------------------------------------------------------------------------------------------- preparing


def prepare(
    store: Path,
    dataset: Dataset,
    columns: Sequence[str],
    moments: Sequence[Moment],
    tables: Sequence[tuple[str, str, Sequence[Moment]]],
) -> Inputs:
    """The inputs of some columns, of moments, and of side tables by (table, time column, moments).

    They are stored by the dataset's digest. Days that lie in unchanged parts of the dataset before it are not read again.
    """
    saved = load(store, dataset.name, dataset.digest)
    inputs = saved or _carried(store, dataset)
    grown = _add_days(inputs, dataset, [dataset.event_time, *(moment.column for moment in moments), *columns], moments)
    for table in tables:
        grown |= _add_table(inputs, dataset, *table)
    if grown or saved is None:
        parts: list[DatasetPart] = [
            {"start": part["start"], "rows": part["rows"], "columns": part["columns"]}
            for part in dataset.manifest["parts"]
        ]
        record: InputsRecord = {
            "format": FORMAT,
            "parts": parts,
            "days": inputs.days,
            "stops": inputs.stops,
            "columns": {name: "".join(values) for name, values in inputs.columns.items()},
            "spans": inputs.spans,
            "tables": inputs.tables,
        }
        path = _path(store, dataset.name, dataset.digest)
        storage.write_json(path, seal.checked(record))
        for old in _newest_first(path.parent, dataset.name)[KEPT:]:
            old.unlink(missing_ok=True)
    return inputs


def load(store: Path, name: str, dataset_digest: str) -> Inputs | None:
    """The stored inputs of a dataset; None where they are missing, damaged or of another format."""
    record = _record(_path(store, name, dataset_digest))
    return _inputs(record, len(record["days"])) if record else None


def _path(store: Path, name: str, dataset_digest: str) -> Path:
    return storage.inside(store, "features", ".inputs", f"{name}-{dataset_digest[:16]}.json")


def _newest_first(folder: Path, name: str) -> list[Path]:
    """The records of the datasets of a name."""
    return storage.newest_first(path for path in folder.glob("*.json") if path.stem[:-17] == name)


def _record(path: Path) -> InputsRecord | None:
    with contextlib.suppress(UserError):
        record = seal.read_checked(path, InputsRecord)
        counts = {len(record["stops"]), *(len(found["earliest"]) for found in record["spans"].values())}
        counts |= {len(text) // 64 for text in record["columns"].values()}
        counts |= {len(found["latest"]) for found in record["spans"].values()}
        if counts <= {len(record["days"])}:
            return record
    return None


def _inputs(record: InputsRecord, days: int) -> Inputs:
    columns = {name: _split(text)[:days] for name, text in record["columns"].items()}
    spans: dict[str, Span] = {
        moment: {"earliest": found["earliest"][:days], "latest": found["latest"][:days]}
        for moment, found in record["spans"].items()
    }
    return Inputs(record["days"][:days], record["stops"][:days], columns, spans, record["tables"])


def _carried(store: Path, dataset: Dataset) -> Inputs:
    """What the newest inputs of an earlier dataset of the same name say of days that both share."""
    for path in _newest_first(_path(store, dataset.name, dataset.digest).parent, dataset.name):
        if (record := _record(path)) is not None:
            # The last day in the unchanged rows may have more rows now. Columns that differ are digested anew.
            unchanged = {name: _unchanged_rows(record["parts"], dataset, name) for name in record["columns"]}
            rows = unchanged[dataset.event_time] if dataset.event_time in unchanged else 0
            inputs = _inputs(record, bisect.bisect_left(record["stops"], rows))
            for name in [name for name, count in unchanged.items() if count < rows or name not in dataset.schema.names]:
                del inputs.columns[name]
            for moment in [moment for moment in inputs.spans if Moment(moment).column not in inputs.columns]:
                del inputs.spans[moment]
            return inputs
    return Inputs()


def _split(digests: str) -> list[str]:
    return re.findall(r".{64}", digests)


def _unchanged_rows(before: Sequence[DatasetPart], dataset: Dataset, column: str) -> int:
    """Rows at the beginning of the dataset in which a column has its values of before."""
    rows = 0
    for old, new in zip(before, dataset.manifest["parts"], strict=False):
        same = column in old["columns"] and old["columns"][column] == new["columns"].get(column)
        if not same or (old["start"], old["rows"]) != (new["start"], new["rows"]):
            break
        rows += new["rows"]
    return rows


def _add_days(inputs: Inputs, dataset: Dataset, columns: Sequence[str], moments: Sequence[Moment]) -> bool:
    """Digest the known and the given columns of the days that lack them, and find spans. Says if there were any."""
    for name in columns:
        inputs.columns.setdefault(name, [])
    for moment in moments:
        inputs.spans.setdefault(moment, {"earliest": [], "latest": []})
    lengths = [len(found) for found in inputs.columns.values()]
    begin = min(*lengths, *(len(found["earliest"]) for found in inputs.spans.values()))
    rows = inputs.rows_of(0, begin)
    for place, (day, stop, table) in enumerate(_tables_by_day(dataset, list(inputs.columns), rows), begin):
        if place == len(inputs.days):
            inputs.days.append(day)
            inputs.stops.append(stop)
        lacking = table.select([name for name, found in inputs.columns.items() if place == len(found)])
        for name, value in digest.of_columns(lacking).items():
            inputs.columns[name].append(value)
        for text, span in inputs.spans.items():
            if place == len(span["earliest"]):
                times = instants.moment_times(table, Moment(text))
                times = times[times != instants.NEVER]
                span["earliest"].append(int(times.min()) if len(times) else instants.NEVER)
                span["latest"].append(int(times.max()) if len(times) else instants.NEVER)
    return rows < dataset.rows


def _tables_by_day(dataset: Dataset, columns: Sequence[str], at: int) -> Iterator[tuple[int, int, pa.Table]]:
    """(day, the row before which it ends, its rows) from row `at` on, which begins a day."""
    size = PART_ROWS
    while at < dataset.rows:
        stop = min(at + size, dataset.rows)
        table = dataset.read(list(columns), rows=(at, stop))
        days = instants.instants(table[dataset.event_time]) // DAY
        edges = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), stop - at]
        if stop < dataset.rows:  # the last day may continue
            edges.pop()
            size = 2 * size if len(edges) == 1 else PART_ROWS
        for low, high in itertools.pairwise(edges):
            yield int(days[low]), at + high, table.slice(low, high - low)
        at += edges[-1]


def _add_table(inputs: Inputs, dataset: Dataset, name: str, time: str, moments: Sequence[Moment]) -> bool:
    whole = dataset.table_digest(name)
    known = inputs.tables.get(name)
    if (
        known is not None
        and (known["time"], known["digest"]) == (time, whole)
        and {*moments} <= {*known.get("latest", ())}
    ):
        return False
    table = dataset.table(name)
    times = instants.instants(table[time])
    dated = np.flatnonzero(times != instants.NEVER)
    order = dated[np.argsort(times[dated] // DAY, kind="stable")]
    table, days = table.take(pa.array(order)), times[order] // DAY
    edges = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(days)] if len(days) else []
    digests = [digest.of_table(table.slice(low, high - low)) for low, high in itertools.pairwise(edges)]
    numbers = [int(days[low]) for low in edges[:-1]]
    spans = {str(moment): instants.moment_times(table, moment) for moment in moments}
    latest = {
        key: [int(span[low:high].max()) for low, high in itertools.pairwise(edges)] for key, span in spans.items()
    }
    inputs.tables[name] = {
        "time": time, "digest": whole, "days": numbers, "digests": "".join(digests), "latest": latest,
    }  # fmt: skip
    return True


# ------------------------------------------------------------------------------------------------------ dependence


@dataclass(frozen=True)
class Dependence:
    """What a column of a view depends on: a rule, the rows' own columns, and days that the rule may look back on.

    `length` is how far, in microseconds; None = without bound.
    """

    inputs: Inputs
    as_of: Moment
    rule: Any
    own: ByDay
    seen: ByDay | None = None
    length: int | None = 0

    @functools.cached_property
    def _rule(self) -> str:
        return digest.canonical_json(self.rule)

    def recipe(self, part: Part) -> str:
        """Digest of the rule and of the data that it may read for the rows of a part."""
        reach = self.inputs.reach(part.days, self.as_of, self.length)
        seen = self.seen.reached(*reach) if self.seen is not None and reach is not None else []
        return digest.of_texts([self._rule, self.own.between(*part.days), *seen])

    def unchanged(self, part: Part, before: Dependence, old: Part) -> tuple[int, int]:
        """Days at the beginning and at the end of a part whose values are those of `old` under an equal rule."""
        changed = self.seen.changed(before.seen) if self.seen and before.seen else frozenset()
        own, own_before = (side.own.rows[slice(*item.days)] for side, item in ((self, part), (before, old)))

        times = sorted((day[0] * DAY, day[-1]) for day in changed)  # first instant, and until

        def is_clean(place: int) -> bool:
            reach = self.inputs.reach((place, place + 1), self.as_of, self.length) if changed else None
            return reach is None or not any(start <= reach[1] and until >= reach[0] for start, until in times)

        first, stop = part.days
        most = min(len(own), len(own_before))
        head = sum(
            1 for _ in itertools.takewhile(lambda d: own[d] == own_before[d] and is_clean(first + d), range(most))
        )
        tail = itertools.takewhile(
            lambda d: own[-1 - d] == own_before[-1 - d] and is_clean(stop - 1 - d), range(most - head)
        )
        return head, sum(1 for _ in tail)


def view_length(view: ViewConfig, window: Length | None = None) -> int | None:
    """How far back the view (or one of its windows) looks, in microseconds; None = without bound; 0 = the row itself."""
    if view.kind == "windows":
        return max(item.microseconds for item in ([window] if window else view.windows))
    if view.kind == "asof":
        return view.max_age.microseconds if view.max_age else None
    return 0
