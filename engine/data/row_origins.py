"""File and row of each row of an event table, and the differences of rows with one id, for reports of duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from engine.config.sections.data import Column
from engine.data.columns import TEXT_LIMIT, as_text
from engine.data.dataset import row_ids
from engine.data.quarantine import CONFLICTING, EQUAL, Place
from engine.data.stage import Staged


class Origin:
    """File and row of kept event rows, computed from the dropped rows; empty for the rows of a query (no files)."""

    def __init__(self, staged: Sequence[Staged]) -> None:
        self._staged = list(staged)
        self._seen = 0
        self._dropped: list[np.ndarray] = []

    def passed(self, rows: int, mask: np.ndarray | None) -> None:
        """Count the next `rows` rows; `mask`: which of them were kept, None = all."""
        if mask is not None:
            self._dropped.append(self._seen + np.flatnonzero(~mask))
        self._seen += rows

    def places(self, numbers: np.ndarray) -> list[Place]:
        """{"file", "row"} of the kept rows of these numbers (from 0, in the order in which they came)."""
        if not self._staged:
            return [{} for _ in numbers]
        dropped = np.concatenate([np.zeros(0, np.int64), *self._dropped])
        numbers = nth_absent(dropped, np.asarray(numbers))
        starts = np.cumsum([0, *(item.tally.kept for item in self._staged)])
        of_file = np.searchsorted(starts, numbers, "right") - 1
        rows = np.zeros(len(numbers), np.int64)
        for place in np.unique(of_file):
            mine = of_file == place
            rows[mine] = 1 + nth_absent(_lost_rows(self._staged[place]) - 1, numbers[mine] - starts[place])
        return [
            {"file": self._staged[place].file.shown, "row": row}
            for place, row in zip(of_file.tolist(), rows.tolist(), strict=True)
        ]


def _lost_rows(staged: Staged) -> np.ndarray:
    """Numbers of the quarantined rows of a file, ascending."""
    records = staged.tally.table()
    return np.unique(np.asarray(records.filter(pc.equal(records["policy"], "quarantine"))["row"]))


def nth_absent(present: np.ndarray, places: np.ndarray) -> np.ndarray:
    """int64: the numbers at these places (from 0) among the whole numbers from 0 on that are not in `present` (rising)."""
    return places + np.searchsorted(present - np.arange(len(present)), places, "right")


def compare(
    rows: pa.Table, others: pa.Table, columns: Sequence[str], sensitive: set[str]
) -> list[tuple[str, str | None]]:
    """(reason, differences) for each row and the corresponding other one: `amount 7.0 (kept: 8.0)`."""
    texts: list[list[str]] = [[] for _ in range(rows.num_rows)]
    for name in columns:
        for place in np.flatnonzero(_differ(rows.column(name), others.column(name))):
            found, kept = as_text(rows.column(name)[int(place)]), as_text(others.column(name)[int(place)])
            texts[place].append(name if name in sensitive else f"{name} {_or_null(found)} (kept: {_or_null(kept)})")
    return [(CONFLICTING, ", ".join(text)[:TEXT_LIMIT]) if text else (EQUAL, None) for text in texts]


def _or_null(text: str | None) -> str:
    return "null" if text is None else text


def _differ(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """bool[n]; null equals null, and NaN equals NaN."""
    if pa.types.is_nested(first.type):
        pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
        return np.array([repr(one) != repr(other) for one, other in pairs], bool)
    same = pc.fill_null(pc.equal(first, second), False)
    same = pc.or_(same, pc.and_(pc.is_null(first, nan_is_null=True), pc.is_null(second, nan_is_null=True)))
    if pa.types.is_floating(first.type):  # null is not NaN
        same = pc.and_(same, pc.equal(pc.is_null(first), pc.is_null(second)))
    return ~np.asarray(same.combine_chunks())


def locate(table: pa.Table, columns: dict[str, Column]) -> Callable[[np.ndarray], list[Place]]:
    """The `row_id` of rows of a table by their positions: their ids, or their first columns; null where all are sensitive."""
    ids = [name for name, column in columns.items() if column.identifies and not column.sensitive]
    ids = (
        ids
        or [
            name
            for name, column in columns.items()
            if not column.sensitive and not column.type.startswith(("list", "map"))
        ][:3]
    )

    def locate(positions: np.ndarray) -> list[Place]:
        if not ids:
            return [{"row_id": None} for _ in positions]
        return [{"row_id": text} for text in row_ids(table.select(ids).take(pa.array(positions)), ids).to_pylist()]

    return locate
