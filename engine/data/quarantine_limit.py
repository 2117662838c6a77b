"""The limit on quarantined rows, and the message when an ingest exceeds it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow.compute as pc

from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.data.files import SourceFile, event_source
from engine.data.quarantine import QuarantineRecord, Tally, is_duplicate, place_of, quarantine
from engine.data.readers import advice


def excess(data: DataConfig, tallies: Sequence[Tally], files: Iterable[SourceFile]) -> str | None:
    """The message if the tallies of one part quarantine more rows than allowed (how many, why, the first one, and what to
    do), else None. Duplicates that are dropped by policy do not count.
    """
    rows = sum(tally.rows for tally in tallies)
    lost = sum(tally.quarantined for tally in tallies)
    reasons: Counter[str] = Counter()
    for tally in tallies:
        for (column, reason, policy), count in tally.counts.items():
            if is_duplicate(reason):
                lost -= count
            elif policy == "quarantine":
                reasons[f"{column} {reason}".strip()] += count
    if lost <= data.max_quarantine.fraction * rows:
        return None
    first = _first(tallies)
    file = next((file for file in files if file.shown == first["file"]), None)
    hint = advice.advice(file, data.sources[file.source], data.time_zone) if file else ""
    worst = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))
    ways = hint or _other_ways(data, first, lost, rows)
    return (
        f"{lost:,} of {rows:,} rows are quarantined ({lost / rows:.2%}), more than "
        f"data.max_quarantine={data.max_quarantine}: {worst}. The first is {_told(first)}.{ways}"
    )


def _first(tallies: Sequence[Tally]) -> QuarantineRecord:
    records = quarantine(list(tallies))
    counted = pc.and_(pc.equal(records["policy"], "quarantine"), pc.invert(is_duplicate(records["reason"])))
    return records.filter(counted).slice(0, 1).to_pylist()[0]  # type: ignore[no-any-return]


def _told(record: QuarantineRecord) -> str:
    column = f", column {record['column']!r}" if record["column"] else ""
    value = f", found {record['value']!r}" if record["value"] is not None else ""
    return f"{place_of(record, record['part'])}{column}: {record['reason']}{value}"


def _other_ways(data: DataConfig, first: QuarantineRecord, lost: int, rows: int) -> str:
    name = first["column"]
    if data.query is None and name in data.columns and first["part"] == "events":
        columns = data.sources[event_source(data)].columns
        if name in columns and columns[name].type != data.columns[name].type:
            word = schema.word(schema.at("data.columns", name) + ".type", columns[name].type)
            return f" The source has another type: set {word}"
    if lost == rows:
        return " No row is left: fix the source, or its declared types or bounds"
    percent = math.ceil(100 * lost / rows)
    return f" Fix the source, its declared types or bounds, or allow more with data.max_quarantine={percent}%"
