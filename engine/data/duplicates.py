"""Rows that share their ids: found, compared, and set aside by the policy `data.duplicates`."""

from __future__ import annotations

import numpy as np

from engine.config.sections.data import DataConfig
from engine.data import order
from engine.data.quarantine import EQUAL, QuarantineRecord, Tally, place_of
from engine.data.row_origins import Origin, compare, locate
from engine.errors import UserError


class RepeatedIdsError(UserError):
    """Rows share their ids. `fact`: the message without its advice, which names `data.duplicates`."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(fact + advice)
        self.fact = fact


def drop_duplicates(data: DataConfig, spool: order.Spool, origin: Origin, tally: Tally) -> np.ndarray:
    """Row numbers to leave out so that every id occurs once, by policy. Raises UserError where that is `fail`."""
    duplicates = spool.duplicates()
    if duplicates is None:
        return np.zeros(0, np.int64)
    keep = "first" if data.duplicates == "fail" else data.duplicates
    lost, kept = order.losers(duplicates, data.ids, data.known_time or data.event_time, keep)
    sensitive = {name for name, column in data.columns.items() if column.sensitive}
    numbers = np.asarray(lost.column("$number"))
    compared = compare(lost, kept, [name for name in data.columns if name not in data.ids], sensitive)
    places = zip(
        origin.places(numbers), origin.places(np.asarray(kept.column("$number"))),
        locate(lost, data.columns)(np.arange(lost.num_rows)), compared, strict=True,
    )  # fmt: skip
    named = ", ".join(data.ids)
    records: list[QuarantineRecord] = [
        {
            **place, **ids, "kept_file": kept_place.get("file"), "kept_row": kept_place.get("row"), "value": differing,
            "part": tally.part, "column": named, "reason": reason, "policy": "quarantine",
        }
        for place, kept_place, ids, (reason, differing) in places
    ]  # fmt: skip
    if data.duplicates == "fail":
        _refuse_duplicates(data, records, duplicates.num_rows)
    tally.kept -= len(numbers)
    tally.quarantined += len(numbers)
    tally.counts.update((named, record["reason"], "quarantine") for record in records)
    tally.note(records)
    tally.check()
    return np.sort(numbers)


def _refuse_duplicates(data: DataConfig, records: list[QuarantineRecord], rows: int) -> None:
    """Raises UserError with the first pair of rows of one id, one that differs where there is one."""
    differing = [record for record in records if record["reason"] != EQUAL]
    first = (differing or records)[0]
    hidden = any(data.columns[name].sensitive for name in data.ids)
    shown = "" if hidden else f", as {first['row_id']!r}"
    where = f" in {first['kept_file']}, row {first['kept_row']}, and {place_of(first, '')}" if first.get("file") else ""
    which = f"which differ in {first['value']}" if first in differing else "which are equal in every column"
    ways = ["name more id columns"] if len(differing) == len(records) else []
    raise RepeatedIdsError(
        f"the id columns {', '.join(data.ids)} must be unique, found {rows:,} rows that share one{shown}{where}, {which}",
        f"; {', or '.join([*ways, 'set data.duplicates=first or data.duplicates=last'])}",
    )
