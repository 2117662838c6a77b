"""The draft itself: what each column is for, when it is known, and why; what the three files are written from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.config import units
from engine.config.units import Span
from engine.data.arrow_types import type_name
from engine.data.columns import DIGEST, FILE, ROW
from engine.draft import events, history, roles, suspects
from engine.draft.column_types import Guess
from engine.draft.events import Figures, StandIn, quoted
from engine.draft.sources import Source
from engine.errors import UserError, nearest
from engine.features.spec import PARTED

TARGET = "target"  # name of a target that is an expression
PRIOR = "prior"
FEATURES = ("categorical", "numeric", *PARTED)  # roles of columns that are features
LATE = "1d"  # after the event, an outcome is taken to be known where no column says when
PAST_NUMBERS = 3  # columns known later whose past means are features


@dataclasses.dataclass
class ColumnDraft:
    """A column of the event table: type, role, when it is known, and the comment beside it."""

    type: str
    role: str
    known_at: str
    comment: str = ""
    id: bool = False
    width: int = 0  # of a vector


@dataclasses.dataclass
class View:
    """Windows over the past rows of an entity, by when their values became known."""

    entity: str
    windows: list[str]
    aggregates: dict[str, list[str]]


@dataclasses.dataclass
class Draft:
    """A draft of the three files."""

    name: str
    zone: str
    source: Source
    guesses: dict[str, Guess]
    query: list[str]
    columns: dict[str, ColumnDraft]
    time: str
    time_why: str
    ids_why: str
    target: str
    target_why: str
    loss: str
    duplicates: bool
    direct: list[str]
    calendar: bool
    left_out: dict[str, str]  # column -> reason
    questions: list[str]
    views: list[View]
    split: dict[str, tuple[str, str]]
    rows: int
    group: str | None = None  # in a table without time, whose event time is empty
    late: Span | None = None  # after the event, outcomes are known


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user says: target (a column or an SQL expression), event time, ids, zone, name of the experiment, and how long
    after the event outcomes are known, where no column says it.
    """

    target: str
    time: str | None
    ids: tuple[str, ...]
    zone: str
    name: str
    known: Span | None = None


def make_draft(source: Source, guesses: dict[str, Guess], asked: Asked) -> Draft:
    """Look at the rows and decide. Raises UserError where the files cannot be trained on, with what to add."""
    source = _with_times(source, guesses)
    raw, rows = events.read_rows(source, asked.zone)
    figures = events.figures_of(raw)
    stand_ins = events.stand_ins(raw, figures)
    is_column = asked.target in raw.column_names
    if not is_column and re.fullmatch(r"\w+", asked.target):
        header = " The files have no header line that was found." if "column_1" in raw.column_names else ""
        raise UserError(
            f"--target must be a column of the files, or an SQL expression over them, found {asked.target!r}.{header}"
            f"{nearest(asked.target, raw.column_names)}"
        )
    target = asked.target if is_column else _free(TARGET, raw.column_names)
    lines = _query(source.name, stand_ins, "" if is_column else f"({asked.target}) AS {target}")
    table = events.select({source.name: raw}, "\n".join(lines), "--target") if lines else raw
    figures = events.figures_of(table)
    time, time_why = roles.pick_time(table, figures, asked.time)
    if time:
        table = table.filter(pc.is_valid(table[time])).sort_by(time)
    else:  # files may be in order of the target, and suspects are found by two halves
        table = table.take(pa.array(np.random.Generator(np.random.Philox(0)).permutation(len(table))))
    ids, ids_why = roles.pick_ids(table.drop_columns([target]), figures, time, asked.ids, rows)
    if not time and (twice := roles.repeated(table, ids)):
        raise UserError(
            f"--id must name columns that no two rows share, for without a time nothing says which one counts, found {twice:,} "
            f"rows with a {', '.join(ids)} that another row has: name another column with it, or leave it out"
        )
    loss, target_why = roles.task_of(figures[target], table)
    draft = Draft(
        name=asked.name, zone=asked.zone, source=source, guesses=guesses, query=lines, columns={}, time=time,
        time_why=time_why, ids_why=ids_why, target=target, target_why=target_why, loss=loss,
        duplicates=bool(ids) and ids_why != roles.UNIQUE, direct=[],
        calendar=True, left_out={}, questions=[], views=[], split={}, rows=rows,
        group=None if time else roles.pick_group(figures, [*ids, target]), late=asked.known,
    )  # fmt: skip
    _columns(
        draft, table, figures, ids, _named_in(asked.target, raw.column_names) if not is_column else set(), stand_ins
    )
    if time:
        _splits(draft, table)
    return draft


def _with_times(source: Source, guesses: dict[str, Guess]) -> Source:
    """The source with days read as times, at their midnight: event times and the times when values are known must be times."""
    columns = dict(source.config.columns)
    for name, column in columns.items():
        if column.type == "date":
            columns[name] = dataclasses.replace(column, type="timestamp")
            if name in guesses:
                guesses[name] = dataclasses.replace(guesses[name], type="timestamp")
    return dataclasses.replace(source, config=dataclasses.replace(source.config, columns=columns))


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _query(source: str, stand_ins: dict[str, StandIn], target: str) -> list[str]:
    """Lines of the query over the source; none where its rows are taken as they are."""
    if not stand_ins and not target:
        return []
    replaced = [f"{item.sql} AS {quoted(name)}" for name, item in stand_ins.items()]
    rows = f"FROM {quoted(source)}"
    star = f"* REPLACE ({', '.join(replaced)})" if replaced else "*"
    if not target:
        return [f"SELECT {star}", rows]
    inner = f"(SELECT {star} {rows})" if replaced else quoted(source)
    return [f"SELECT *, {target}", f"FROM {inner}"]


def _named_in(sql: str, columns: Sequence[str]) -> set[str]:
    """Columns whose name is in an expression, in any case, quoted or not: SQL does not tell them apart."""
    text = sql.casefold()
    return {name for name in columns if re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text)}


def _columns(
    draft: Draft,
    table: pa.Table,
    figures: dict[str, Figures],
    ids: list[str],
    in_target: set[str],
    stand_ins: dict[str, StandIn],
) -> None:
    """Fill in columns, features and questions."""
    time, target = draft.time, draft.target
    later = suspects.later_times(table, time) if time else {}
    known_at = _label_time(table, target, later)
    outcome = suspects.Outcome(_as_numbers(table[target], draft.loss), draft.loss, known_at)
    found = {name: roles.role_of(column) for name, column in figures.items() if name not in (time, target)}
    parts = roles.calendar_parts(table, time, draft.zone) if time else {}
    found |= {name: ("ignore", reason) for name, reason in parts.items() if name in found}
    usable = [name for name, (role, _) in found.items() if role in FEATURES and name not in in_target]
    doubts = suspects.find_suspects(table, usable, time, outcome)
    doubts |= {name: "is part of the target" for name in in_target if name in found and found[name][0] != "ignore"}
    whole_days = {name for name in later if not _has_hours(table[name].drop_null())}
    label_known = (
        ""
        if not time
        else f"{units.named(time)} + {draft.late or LATE}"
        if known_at is None
        else _at_end(known_at, whole_days)
    )
    at_event = units.named(time) if time else PRIOR
    for name, column in figures.items():
        role, reason = found.get(name, ("", ""))
        if name in ids and role == "ignore":
            role, reason = "id", ""
        known = _at_end(name, whole_days) if name in later else label_known if name in doubts else at_event
        if name == time:
            role, known = "event_time", at_event
        elif name == target:
            role, known = "target", label_known
        width = column.width if role == "vector" else 0
        comment = _comment(column, stand_ins)
        draft.columns[name] = ColumnDraft(type_name(column.type), role, known, comment, name in ids, width)
        if reason or name in doubts or (role == "time" and (name in later or not time)):
            lies = "lies after the event" if time else "is a time, of which no feature is made here"
            draft.left_out[name] = reason or doubts.get(name) or lies
    if not ids:
        _add_row_number(draft)
    draft.direct = [name for name in usable if name not in doubts]
    if not time:
        draft.calendar = False
        draft.questions.append(
            f"Is every feature known when a row is scored? A table without a time cannot show that a value comes with {target} "
            "or after it: take out what does"
        )
        return
    _ask(draft, known_at, table[time])
    past = [name for name in doubts if found.get(name, ("",))[0] == "numeric"]
    _views(draft, table, figures, suspects.by_rank(table, past, outcome)[:PAST_NUMBERS])


def _at_end(name: str, whole_days: set[str]) -> str:
    """When a value with the time `name` is known: then, or at the end of the day where the time is a day."""
    return f"{units.named(name)} + 1d" if name in whole_days else units.named(name)


def _label_time(table: pa.Table, target: str, later: dict[str, float]) -> str | None:
    """The column that says when the target was known: of the later times that are there where the target is, the latest."""
    there = pc.is_valid(table[target])
    usable = {}
    for name, delay in later.items():
        together = pc.and_(there, pc.is_valid(table[name]))
        if pc.sum(together).as_py() >= 0.98 * pc.sum(there).as_py():
            usable[name] = delay
    return max(usable, key=lambda name: usable[name]) if usable else None


def _as_numbers(values: pa.ChunkedArray, loss: str) -> NDArray[np.float64]:
    """The target as float64[n]: classes by their sorted place, NaN for null."""
    if loss in ("binary", "multiclass"):
        classes = pc.unique(values.drop_null()).sort()
        values = pc.index_in(values, value_set=classes)
    return np.asarray(pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)


def _comment(column: Figures, stand_ins: dict[str, StandIn]) -> str:
    parts = [column.shown if column.filled else "null in every row"]
    if 0 < column.filled < column.rows:
        parts.append(f"null in {1 - column.filled / column.rows:.1%}")
    if column.name in stand_ins:
        item = stand_ins[column.name]
        parts.append(f"{item.value} ({item.rows:,} rows) is taken for null: see the query")
    return ", ".join(parts)


def _add_row_number(draft: Draft) -> None:
    taken = list(draft.columns)
    of_file = ("file_name", FILE, "string") if draft.time else ("file_digest", DIGEST, "string")
    for name, path, kind in (of_file, ("row_number", ROW, "int64")):
        name = _free(name, taken)
        column = dataclasses.replace(
            next(iter(draft.source.config.columns.values())), type=kind, path=path, format=None, missing="fail"
        )
        columns = {**draft.source.config.columns, name: column}
        draft.source = dataclasses.replace(
            draft.source, config=dataclasses.replace(draft.source.config, columns=columns)
        )
        draft.columns[name] = ColumnDraft(kind, "id", draft.time or PRIOR, "", True)


def _ask(draft: Draft, known_at: str | None, times: pa.ChunkedArray) -> None:
    """The questions that only a person can answer, with the cautious choice that is taken."""
    if known_at is None and draft.late is None:
        draft.questions.append(
            f"When is {draft.target} known? No column says it, so it is taken to be known {LATE} after {draft.time}. Say it with "
            "--known, as in `--known 6h`, or set `known_at` of its column: the histories below use past outcomes from then on"
        )
    if draft.guesses.get(draft.time) is not None and draft.zone == "UTC" and _has_hours(times):
        draft.questions.append(
            f"In which time zone are local times such as {draft.time}? UTC is taken: set `time_zone`"
        )


def _has_hours(times: pa.ChunkedArray) -> bool:
    return bool(np.any(events.seconds_of(times) % history.DAY))


def _views(draft: Draft, table: pa.Table, figures: dict[str, Figures], past: list[str]) -> None:
    """Windows for the entities among the categories that are known at the event."""
    kinds = {name: draft.columns[name].role for name in draft.direct}
    seconds = events.seconds_of(table[draft.time])
    draft.calendar = _has_hours(table[draft.time])
    span = float(seconds[-1] - seconds[0])
    aggregates = {"rows": ["count", "recency"]}
    if draft.loss != "multiclass" and draft.columns[draft.target].type != "string":
        aggregates[draft.target] = ["mean"]
    aggregates |= {name: ["mean"] for name in past}
    step = max(draft.rows / len(table), 1.0)  # rows were thinned out: gaps are shorter in truth
    for entity in roles.pick_entities(figures, kinds):
        windows = history.windows_for(history.gap_seconds(table[entity], seconds) / step, span)
        if windows:
            draft.views.append(View(entity, windows, aggregates))


def _splits(draft: Draft, table: pa.Table) -> None:
    seconds = events.seconds_of(table[draft.time])
    found = history.periods(seconds, draft.zone)
    if found is None:
        raise UserError(
            f"rows must be of at least three days, to train on the first and test on the last, found "
            f"{len(np.unique(seconds // history.DAY))} days in {draft.time!r}: name another column with --time"
        )
    draft.split = found
