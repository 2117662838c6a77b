"""What happens to a value or row that breaks the schema: fail, quarantine, null or warn; every one is recorded.

The reasons are made where rows are checked: readers/, parse.py, columns.py, column_checks.py, rules.py and duplicates.py; for
rows that a model cannot score, in engine/scoring/worker.py (`refusals`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.columns import TEXT_LIMIT, Finding, Lost
from engine.errors import UserError
from engine.runtime import records


class PolicyError(UserError):
    """A violation whose policy is `fail`: it ends the ingest, whatever is said about files that cannot be read."""


QUARANTINE = pa.schema(
    [
        ("part", pa.string()),  # `source flights`, `events` or `table weather`
        ("file", pa.string()),
        ("row", pa.int64()),  # 1-based, header and blank lines not counted; null for rows of a query
        ("row_id", pa.string()),
        ("column", pa.string()),
        ("value", pa.string()),
        ("reason", pa.string()),
        ("policy", pa.string()),
        ("kept_file", pa.string()),  # for a duplicate: file and row of the kept row with the same id
        ("kept_row", pa.int64()),
    ]
)
NO_RECORDS = QUARANTINE.empty_table()
DUPLICATE = "id occurs more than once"
EQUAL, CONFLICTING = (
    f"{DUPLICATE}: equal to the row that is kept",
    f"{DUPLICATE}: other values than the row that is kept",
)

RECORDS = 10_000


class ViolationRecord(TypedDict):
    """The number of rows of one column that violate one rule, and the policy that was applied."""

    column: str
    reason: str
    policy: str
    count: records.Count


class TallyRecord(TypedDict):
    """rows = kept + quarantined of one file or step."""

    rows: records.Count
    kept: records.Count
    quarantined: records.Count
    violations: list[ViolationRecord]


class Place(TypedDict, total=False):
    """Where a row is: file and row, or row_id."""

    file: str | None
    row: int | None
    row_id: str | None


class QuarantineRecord(Place, total=False):
    """A row of QUARANTINE; what it does not have is null there."""

    part: str
    column: str | None
    value: str | None
    reason: str
    policy: str
    kept_file: str | None
    kept_row: int | None


@dataclasses.dataclass
class Tally:
    """Rows in, kept and quarantined of one part of an ingest, violations by (column, reason, policy), and their records."""

    part: str
    rows: int = 0
    kept: int = 0
    quarantined: int = 0
    counts: Counter[tuple[str, str, str]] = dataclasses.field(default_factory=Counter)
    tables: list[pa.Table] = dataclasses.field(default_factory=list)
    _recent: list[QuarantineRecord] = dataclasses.field(default_factory=list)

    def note(self, records: list[QuarantineRecord]) -> None:
        """Add records (names of QUARANTINE). There may be millions: as Arrow they take a tenth of the memory of objects."""
        self._recent += records
        if len(self._recent) >= RECORDS:
            self.table()

    def table(self) -> pa.Table:
        """The records so far, in the order of their addition."""
        if self._recent:
            rows = [{name: item.get(name) for name in QUARANTINE.names} for item in self._recent]
            self.tables.append(pa.Table.from_pylist(rows, QUARANTINE))
            self._recent = []
        return pa.concat_tables(self.tables) if self.tables else NO_RECORDS

    @property
    def records(self) -> list[QuarantineRecord]:
        """The records as objects."""
        return self.table().to_pylist()  # type: ignore[no-any-return]

    def check(self) -> None:
        """Assert that every row is accounted for."""
        assert self.rows == self.kept + self.quarantined, (self.part, self.rows, self.kept, self.quarantined)

    def as_json(self) -> TallyRecord:
        """Plain form for a manifest."""
        violations: list[ViolationRecord] = [
            {"column": column, "reason": reason, "policy": policy, "count": count}
            for (column, reason, policy), count in sorted(self.counts.items())
        ]
        return {"rows": self.rows, "kept": self.kept, "quarantined": self.quarantined, "violations": violations}


def is_duplicate(reason: Any) -> Any:
    """Whether a reason (or each of an Arrow array) is that of a duplicate that was dropped by policy."""
    return reason.startswith(DUPLICATE) if isinstance(reason, str) else pc.starts_with(reason, DUPLICATE)


Locate = Callable[[np.ndarray], list[Place]]


def apply(table: pa.Table, findings: list[Finding], tally: Tally, locate: Locate) -> tuple[pa.Table, np.ndarray | None]:
    """(table without quarantined rows, mask of the rows kept or None for all). Raises UserError if the policy is `fail`.

    `locate` gives file and row, or row_id, for positions of the table.
    """
    tally.rows += table.num_rows
    dropped = np.zeros(table.num_rows, bool)
    for finding in findings:
        if not len(finding.positions):
            continue
        _record(finding, tally, locate)
        if finding.policy == "quarantine":
            dropped[finding.positions] = True
        elif finding.policy == "null":
            table = _set_null(table, finding)
    lost = int(dropped.sum())
    tally.quarantined += lost
    tally.kept += table.num_rows - lost
    if not lost:
        return table, None
    return table.filter(pa.array(~dropped)), ~dropped


def _record(finding: Finding, tally: Tally, locate: Locate) -> None:
    if finding.policy == "fail":
        where = f", column {finding.column!r}" if finding.column else ""
        raise PolicyError(
            f"{place_of(locate(finding.positions[:1])[0], tally.part)}{where}: {finding.reason}, "
            f"found {finding.values[0]!r} ({len(finding.positions)} such in this batch); "
            f"fix the data, or set {finding.key}=quarantine"
        )
    tally.counts[finding.column, finding.reason, finding.policy] += len(finding.positions)
    entry: QuarantineRecord = {
        "part": tally.part,
        "column": finding.column or None,
        "reason": finding.reason,
        "policy": finding.policy,
    }
    for start in range(0, len(finding.positions), RECORDS):
        places = locate(finding.positions[start : start + RECORDS])
        values = finding.values[start : start + RECORDS]
        tally.note([{**entry, **place, "value": value} for place, value in zip(places, values, strict=True)])


def place_of(place: Place, part: str) -> str:
    """The position of a row as text: file and row, or part and row_id."""
    if place.get("file") is not None:
        return f"{place['file']}, row {place['row']}"
    return f"{part}, row_id {place.get('row_id')!r}"


def record_lost_rows(lost: list[Lost], tally: Tally, file: str, policy: str, sensitive: bool, key: str) -> None:
    """Account for rows that could not be split into fields; `key` is the config key of their policy."""
    for item in lost:
        value = None if sensitive else item.text[:TEXT_LIMIT]
        if policy == "fail":
            found = "" if value is None else f"; found {value!r}"
            raise PolicyError(f"{file}, row {item.number}: {item.reason}{found}; fix the data, or set {key}=quarantine")
        tally.rows += 1
        tally.quarantined += 1
        tally.counts["", item.reason, "quarantine"] += 1
        entry: QuarantineRecord = {"part": tally.part, "file": file, "row": item.number, "column": None, "value": value}
        tally.note([{**entry, "reason": item.reason, "policy": "quarantine"}])


def _set_null(table: pa.Table, finding: Finding) -> pa.Table:
    if finding.column not in table.column_names:
        return table
    place = table.column_names.index(finding.column)
    column = table.column(place)
    mask = np.zeros(table.num_rows, bool)
    mask[finding.positions] = True
    emptied = pc.if_else(pa.array(mask), pa.scalar(None, column.type), column)
    return table.set_column(place, table.schema.field(place), emptied)


def quarantine(tallies: list[Tally]) -> pa.Table:
    """The records of all parts, sorted by their values."""
    table = pa.concat_tables([NO_RECORDS, *(found for tally in tallies if (found := tally.table()).num_rows)])
    order = pc.sort_indices(table, [(name, "ascending") for name in QUARANTINE.names])
    return table.take(order)
