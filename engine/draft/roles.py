"""Roles of columns by what they hold: event time, ids, entities, numbers, categories, and what is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.draft.events import Figures, seconds_of
from engine.errors import UserError, nearest

FEW = 20  # whole numbers of no more values are categories
WORDS = 2.0  # text of so many words on average, of which more than half differ, is read as words
LONG_TEXT = 40.0  # characters; longer text that rarely repeats is no category
SAME_WIDTH = 0.99  # of the lists of numbers, where these are vectors
NEARLY_UNIQUE = 0.9
PART = 0.95  # of the rows, where a column is taken for a part of the time
UNIQUE = "no two rows share it"
MOST_COLUMNS = 3  # of an id that is found
TAIL = 10.0  # quartile ranges from the median to a value that is far from the others
_CODE = re.compile(r"(^|_)(id|code|zip|postal|type|kind|number|no|zone|class|group)(_|$)", re.IGNORECASE)
_EVENT = re.compile(
    r"event|creat|start|order|book|pickup|open|sched|submit|request|^ts$|^time|^date|stamp|_at$", re.IGNORECASE
)
_OWNER = re.compile(
    r"customer|client|user|patient|member|person|account|household|subject|driver|buyer|seller", re.IGNORECASE
)
_END = re.compile(r"end|clos|drop|arriv|finish|deliver|paid|update|modif|resol|ship|cancel|return", re.IGNORECASE)


def is_time(kind: pa.DataType) -> bool:
    """Whether values of a type are instants or days."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def must_have(name: str, table: pa.Table, option: str) -> None:
    """Raise UserError unless the table has the column that an option names."""
    if name not in table.column_names:
        raise UserError(f"{option} must be a column of the files, found {name!r}.{nearest(name, table.column_names)}")


def pick_time(table: pa.Table, figures: dict[str, Figures], given: str | None) -> tuple[str, str]:
    """(event time column, why): the given one, or the time that every row has and that is earliest in a row; empty where no
    column is one. Raises UserError where the given one is not.
    """
    times = [name for name, column in figures.items() if is_time(column.type) and column.filled]
    if given is not None:
        must_have(given, table, "--time")
        if given not in times:
            raise UserError(
                f"--time must name a column of times, found {given!r} of {figures[given].type}: {_times(times)}"
            )
        return given, "as given by --time"
    whole = [name for name in times if figures[name].filled >= 0.999 * figures[name].rows]
    if not whole:
        return "", f"no column is one in every row; if there is one, {_times(times)}"
    if len(whole) == 1:
        return whole[0], "the only time that every row has"
    named = [name for name in whole if _EVENT.search(name) and not _END.search(name)]
    order = sorted(whole, key=lambda name: (name not in named, _median(table[name])))
    return order[0], f"of the times that every row has ({', '.join(whole)}), by its name and as the earliest"


def _times(names: Sequence[str]) -> str:
    if names:
        return f"name one of {', '.join(names)} with --time, or fill its empty rows"
    return "add a column with the date or time of each row, and name it with --time"


def _median(values: pa.ChunkedArray) -> float:
    return float(np.nanmedian(seconds_of(values)))


def pick_ids(
    table: pa.Table, figures: dict[str, Figures], time: str, given: Sequence[str], rows: int
) -> tuple[list[str], str]:
    """(id columns, why): those given, a column or up to three that no two rows share; empty where nothing identifies a row.

    Where the table is a part of all `rows`, it cannot show that no two of them share a value.
    """
    if given:
        for name in given:
            must_have(name, table, "--id")
        if twice := repeated(table, given):
            return list(given), f"as given by --id, and {twice:,} rows have one that another row has"
        return list(given), "as given by --id" if table.num_rows < rows else UNIQUE
    if table.num_rows < rows:
        return (
            [],
            f"of {rows:,} rows not all were compared, so a row is known by its file and its number there; or name --id",
        )
    usable = [
        name
        for name in table.column_names
        if (column := figures[name]).filled == column.rows
        and not (pa.types.is_floating(column.type) or pa.types.is_nested(column.type))
        and column.distinct > 1
    ]
    alone = [name for name in usable if figures[name].distinct == table.num_rows and name != time]
    if alone:
        return [min(alone, key=lambda name: (not _CODE.search(name), usable.index(name)))], UNIQUE
    rest = sorted((name for name in usable if name != time), key=lambda name: -figures[name].distinct)[:8]
    with_time = [time] if time else []
    for size in range(2 - len(with_time), MOST_COLUMNS + 1 - len(with_time)):
        for others in itertools.combinations(rest, size):
            if _distinct(table, [*with_time, *others]) == table.num_rows:
                return [*with_time, *others], UNIQUE
    return [], "no columns identify a row, so it is known by its file and its number there"


def repeated(table: pa.Table, ids: Sequence[str]) -> int:
    """How many rows have the same values of some columns as an earlier one; 0 for no columns."""
    return table.num_rows - _distinct(table, ids) if ids else 0


def _distinct(table: pa.Table, names: Sequence[str]) -> int:
    return int(table.select(list(names)).group_by(list(names)).aggregate([]).num_rows)


def role_of(column: Figures) -> tuple[str, str]:
    """(role, reason) of a column that is no id, time or target; the reason is empty for one that is used as usual."""
    kind = column.type
    if not column.filled:
        return "ignore", "null in every row"
    if column.distinct == 1:
        return "ignore", "has one value only" + (" beside null" if column.filled < column.rows else "")
    if is_time(kind):
        return "time", ""
    if pa.types.is_list(kind):
        return _role_of_list(column)
    if pa.types.is_string(kind):
        if column.words >= WORDS and column.distinct > column.filled / 2 and column.filled > FEW:
            return "text", ""
        if column.distinct > NEARLY_UNIQUE * column.filled and column.filled > FEW:
            return "ignore", "has another text in nearly every row"
        if column.length > LONG_TEXT and column.distinct > column.filled / 2:
            return "ignore", "is long text without words"
        return "categorical", ""
    if pa.types.is_integer(kind):
        code = bool(_CODE.search(column.name))
        if code and column.distinct > NEARLY_UNIQUE * column.filled and column.filled > FEW:
            return "ignore", "is a number that names the row"
        few = column.distinct <= FEW
        return ("categorical" if few or (code and column.distinct <= column.filled / 5) else "numeric"), ""
    if pa.types.is_boolean(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numeric", ""
    return "ignore", f"is of type {kind}, of which no feature is made"


def _role_of_list(column: Figures) -> tuple[str, str]:
    item = column.type.value_type
    if pa.types.is_string(item):
        return "set", ""
    if (pa.types.is_floating(item) or pa.types.is_integer(item)) and column.width:
        if column.same_width >= SAME_WIDTH:
            return "vector", ""
        if pa.types.is_integer(item):
            return "set", ""
        return (
            "ignore",
            f"has lists of different lengths, {column.same_width:.0%} of {column.width} numbers, and is no vector",
        )
    return "ignore", f"is of type {column.type}, of which no feature is made"


def calendar_parts(table: pa.Table, time: str, zone: str) -> dict[str, str]:
    """Columns of whole numbers that are a part of the event time, such as its month -> reason to leave them out."""
    local = pc.local_timestamp(
        pc.assume_timezone(pc.cast(table[time], pa.timestamp("us")), "UTC").cast(pa.timestamp("us", zone))
    )
    found = {}
    for part, of in {"year": pc.year, "month": pc.month, "day": pc.day, "hour": pc.hour, "minute": pc.minute}.items():
        values = of(local)
        for field in table.schema:
            named = part in field.name.lower() and pa.types.is_integer(field.type)
            if named and pc.mean(pc.cast(pc.equal(table[field.name], values), pa.float64())).as_py() > PART:
                found[field.name] = f"is the {part} of {time}, which the calendar has"
    return found


def pick_entities(figures: dict[str, Figures], roles: dict[str, str], most: int = 3) -> list[str]:
    """Columns whose values return often, the most different first: histories are kept for each of their values."""
    found = [
        column
        for name, column in figures.items()
        if roles.get(name) == "categorical"
        and column.filled >= 10 * column.distinct
        and column.distinct >= (3 if pa.types.is_string(column.type) else 10)
    ]
    return [column.name for column in sorted(found, key=lambda column: -column.distinct)[:most]]


def pick_group(figures: dict[str, Figures], ids: Sequence[str]) -> str | None:
    """A column named like someone or something that has several rows, the most different first; None without any."""
    found = [
        column
        for name, column in figures.items()
        if name not in ids
        and (_OWNER.search(name) or name.lower().endswith("_id"))
        and (pa.types.is_string(column.type) or pa.types.is_integer(column.type))
        and FEW < column.distinct < NEARLY_UNIQUE * column.filled
    ]
    return max(found, key=lambda column: column.distinct).name if found else None


def task_of(column: Figures, table: pa.Table) -> tuple[str, str]:
    """(loss, what the target is) of a target column. Raises UserError where nothing can be learnt from it."""
    name, kind = column.name, column.type
    if column.distinct < 2:
        raise UserError(f"the target must have at least two values, found {column.distinct} in {name!r}")
    if is_time(kind):
        raise UserError(
            f"the target must be a number, a class or yes and no, found times in {name!r}: write what is asked, as in "
            f"--target 'epoch({name} - other_time)'"
        )
    if column.distinct == 2:
        return "binary", f"two values: {_values(table[name])}"
    classes = pa.types.is_string(kind) or (
        pa.types.is_integer(kind) and column.distinct <= FEW and column.high < 2 * FEW
    )
    if not classes:
        low, middle, high = pc.quantile(pc.cast(table[name], pa.float64(), safe=False), [0.25, 0.5, 0.75]).to_pylist()
        if max(column.high - middle, middle - column.low) > TAIL * max(high - low, 1e-300):
            return (
                "huber",
                f"a number, {column.shown}, with a few values far from the others, which count less in this loss",
            )
        return "squared", f"a number, {column.shown}"
    if column.distinct > 100:
        raise UserError(f"a target of text must have at most 100 classes, found {column.distinct:,} values in {name!r}")
    return "multiclass", f"{column.distinct} classes: {_values(table[name])}"


def _values(values: pa.ChunkedArray) -> str:
    counted = sorted(pc.value_counts(values.drop_null()).to_pylist(), key=lambda item: -item["counts"])
    shown = [f"{item['values']} ({item['counts']:,})" for item in counted[:4]]
    return ", ".join(shown) + (", ..." if len(counted) > 4 else "")
