"""From the columns that a file has to the columns that its source declares; what differs is noted per file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from engine.config import schema
from engine.config.sections.data import SourceConfig
from engine.data.arrow_types import parse_type, type_name
from engine.data.files import SourceFile
from engine.data.parse import Parsed, Reading, UnrelatedError, to_type
from engine.errors import UserError, did_you_mean

FILE, ROW, DIGEST = (
    "$file",
    "$row",
    "$digest",
)  # paths of columns that are filled with the name, row number and digest of a file
OF_FILE = (FILE, ROW, DIGEST)
TEXT_LIMIT = 200


@dataclasses.dataclass
class Finding:
    """Positions of a table whose value of `column` breaks the schema, the policy that decides about them, and the config key
    that gives the policy. `items`: whether each of the values is an item of what the column holds.
    """

    column: str
    positions: np.ndarray
    reason: str
    policy: str
    values: list[str | None]
    key: str
    items: Sequence[bool] = ()


@dataclasses.dataclass
class Lost:
    """A row that could not be split into fields."""

    number: int
    text: str
    reason: str


# (column, positions of a chunk) -> texts of the values in the file; None for a column that the file does not have.
Evidence = Callable[[str, np.ndarray], "list[str | None] | None"]


@dataclasses.dataclass
class Chunk:
    """Rows of one file in file order: 1-based row numbers, typed columns, findings, lost rows, and access to the text of
    single values in the file.
    """

    numbers: np.ndarray
    table: pa.Table
    findings: list[Finding]
    lost: list[Lost] = dataclasses.field(default_factory=list)
    evidence: Evidence | None = None

    def shown(self, finding: Finding) -> Finding:
        """The finding with its values as written in the file, if it shows any."""
        shown = any(value is not None for value in finding.values)
        texts = self.evidence(finding.column, finding.positions) if self.evidence and shown else None
        if texts is None:
            return finding
        kept = finding.items or [False] * len(texts)
        texts = [own if item else text for own, text, item in zip(finding.values, texts, kept, strict=True)]
        return dataclasses.replace(finding, values=texts)


def evidence_of(raw: Mapping[str, pa.Array]) -> Evidence:
    """Evidence from raw arrays by declared name."""
    return lambda name, places: [as_text(raw[name][int(place)]) for place in places] if name in raw else None


class Notes(TypedDict, total=False):
    """How the columns of a file differ from the declared ones; `snapshot`: that of a table."""

    missing: list[str]
    unexpected: list[str]
    renamed: dict[str, str]
    reordered: bool
    converted: dict[str, str]
    snapshot: str


@dataclasses.dataclass
class Matched:
    """Declared column -> place in the file (None if it is missing there), and notes for the report."""

    places: dict[str, int | None]
    notes: Notes


class MissingColumnError(UserError):
    """A declared column is missing in a file: the `fact`, and `advice` for a user who may change the declaration."""

    def __init__(self, fact: str, advice: str, source: str, column: str, file: str) -> None:
        super().__init__(fact + advice)
        self.fact, self.advice, self.source, self.column, self.file = fact, advice, source, column, file


def match(found: list[str], source: SourceConfig, file: SourceFile, advice: Callable[[], str] = lambda: "") -> Matched:
    """Find each declared column by name, nested path or alias; `advice` gives a hint from the file's content.

    Raises UserError for a missing column, an ambiguous name, and, depending on the source's policy, an unexpected column.
    """
    where = f"data.sources.{file.source}"
    places: dict[str, int | None] = {}
    notes: Notes = {}
    taken: set[int] = set()
    for name, column in source.columns.items():
        if column.path in OF_FILE or name in file.partitions:
            continue
        places[name] = _place(name, (column.path or name, *column.aliases), found, file, advice)
        if places[name] is None:
            if column.missing == "fail":
                raise MissingColumnError(
                    f"{file.shown}: column {name!r} is missing; the file has {_some(found)}.",
                    (advice() or _other_name(name, found, f"{where}.columns.{name}")),
                    file.source,
                    name,
                    file.shown,
                )
            notes.setdefault("missing", []).append(name)
        else:
            taken.add(places[name])  # type: ignore[arg-type]
            if found[places[name]] != (column.path or name):  # type: ignore[index]
                notes.setdefault("renamed", {})[name] = found[places[name]]  # type: ignore[index]
    _unexpected(found, taken, source, file, notes)
    order = [place for place in places.values() if place is not None]
    if order != sorted(order):
        notes["reordered"] = True
    return Matched(places, notes)


def _place(
    name: str, names: Iterable[str], found: list[str], file: SourceFile, advice: Callable[[], str]
) -> int | None:
    present = [known for known in dict.fromkeys(names) if known in found]
    if not present:
        return None
    if len(present) > 1:
        main, *aliases = names
        kept = main if main in present else present[0]
        left = json.dumps([alias for alias in aliases if alias == kept or alias not in present], ensure_ascii=False)
        word = shlex.quote(f"{schema.at(f'data.sources.{file.source}.columns', name)}.aliases={left}")
        raise UserError(
            f"{file.shown}: column {name!r} has {_some(present)} in the file: name one of them, as in {word}"
        )
    if found.count(present[0]) > 1:
        order = " Declare every column of the file in its order, with csv.header=false and csv.skip"
        raise UserError(
            f"{file.shown}: column {name!r} occurs more than once in the file ({_some(found)}): it is not clear which is "
            f"meant.{advice() or (order if file.format == 'csv' else '')}"
        )
    return found.index(present[0])


def _unexpected(found: list[str], taken: set[int], source: SourceConfig, file: SourceFile, notes: Notes) -> None:
    extra = [name for place, name in enumerate(found) if place not in taken]
    if not extra or source.unexpected == "ignore":
        return
    if source.unexpected == "fail":
        raise UserError(
            f"{file.shown}: columns {_some(extra)} are not declared; declare them, or set "
            f"data.sources.{file.source}.unexpected=warn"
        )
    notes["unexpected"] = extra


def _some(names: list[str], limit: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _other_name(name: str, found: list[str], where: str) -> str:
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.6)
    listed = shlex.quote(f"{where}.aliases={json.dumps(close, ensure_ascii=False)}")
    said = (
        f"{did_you_mean(close)} If so, set {listed}, else"
        if close
        else f" If the file has another name for it, add that to {where}.aliases;"
    )
    return f"{said} set {where}.missing=null if files may lack the column"


def reading(source: SourceConfig, name: str, zone: str) -> Reading:
    """How text of a declared column is read."""
    column = source.columns[name]
    return Reading(column.zone or zone, column.format, source.csv.decimal, source.csv.thousands)


def typed(
    raw: Mapping[str, pa.Array],
    numbers: np.ndarray,
    source: SourceConfig,
    file: SourceFile,
    zone: str,
    notes: Notes,
) -> tuple[pa.Table, list[Finding]]:
    """Declared columns, in declared order and with the declared types, from the raw arrays of a file.

    Raises UserError naming the file and column when a column is of an unrelated type.
    """
    arrays, findings = [], []
    for name, column in source.columns.items():
        kind = parse_type(column.type)
        values = _raw(name, raw, numbers, source, file, kind)
        try:
            parsed = to_type(values, kind, reading(source, name, zone))
        except UnrelatedError as error:
            advice = error.advice(schema.at(f"data.sources.{file.source}.columns", name), column.path or name)
            raise UserError(f"{file.shown}: column {name!r} {error}{advice}") from None
        except UserError as error:
            raise UserError(f"{file.shown}: column {name!r} {error}") from None
        if len(parsed.bad):
            shown = shown_values(values, parsed, column.sensitive)
            of_items = [int(place) in parsed.items for place in parsed.bad]
            findings.append(
                Finding(name, parsed.bad, parsed.reason, column.on_violation, shown, policy_key(file, name), of_items)
            )
        if not column.nullable and len(parsed.values) and parsed.values.null_count > len(parsed.bad):
            empty = np.setdiff1d(np.flatnonzero(np.asarray(parsed.values.is_null())), parsed.bad)
            policy = "quarantine" if column.on_violation == "null" else column.on_violation
            findings.append(
                Finding(name, empty, "must not be null", policy, [None] * len(empty), policy_key(file, name))
            )
        _note_conversion(name, values.type, kind, notes)
        arrays.append(parsed.values)
    names = list(source.columns)
    return pa.Table.from_arrays(arrays, names=names), findings


def policy_key(file: SourceFile, column: str) -> str:
    """The config key of the policy for values that are not of the source column's type."""
    return schema.at(f"data.sources.{file.source}.columns", column) + ".on_violation"


def _raw(
    name: str,
    raw: Mapping[str, pa.Array],
    numbers: np.ndarray,
    source: SourceConfig,
    file: SourceFile,
    kind: pa.DataType,
) -> Any:
    path = source.columns[name].path
    if path == FILE:
        return pa.array([file.path.name] * len(numbers), pa.string())
    if path == DIGEST:
        return pa.array([file.digest] * len(numbers), pa.string())
    if path == ROW:
        return pa.array(numbers, pa.int64())
    if name in file.partitions:
        return pa.array([file.partitions[name]] * len(numbers), pa.string())
    values = raw.get(name)
    return pa.nulls(len(numbers), kind) if values is None else values


def _note_conversion(name: str, found: pa.DataType, kind: pa.DataType, notes: Notes) -> None:
    if pa.types.is_dictionary(found):
        found = found.value_type
    text = pa.types.is_string(found) or pa.types.is_binary(found)
    if not text and type_name(found) != type_name(kind):
        notes.setdefault("converted", {})[name] = f"{type_name(found)} -> {type_name(kind)}"


def shown_values(values: Any, parsed: Parsed, sensitive: bool) -> list[str | None]:
    """What could not be read, as text: the value, or the first such item of it; nothing for a sensitive column."""
    if sensitive:
        return [None] * len(parsed.bad)
    places = ((values[int(place)], parsed.items.get(int(place))) for place in parsed.bad)
    return [as_text(value) if item is None else item_text(item, as_text(value.values[item])) for value, item in places]


def item_text(place: int, text: str | None) -> str:
    """An item of a list or a map, which may be too long to show, by its 0-based place."""
    return f"item {place + 1}: {text!r}"[:TEXT_LIMIT]


def as_text(scalar: Any) -> str | None:
    """A value as short, readable text; bytes that are not UTF-8 are escaped."""
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if not scalar.is_valid:
        return None
    if pa.types.is_time(scalar.type):
        return f"{scalar.value} {scalar.type.unit}"  # as_py would wrap values outside of a day
    try:
        value = scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        # Python's dates end in the year 9999; Arrow's do not.
        value = _beyond_python(scalar)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return str(value)[:TEXT_LIMIT]


def _beyond_python(scalar: Any) -> str:
    if not pa.types.is_temporal(scalar.type):
        return "(not shown)"
    return f"{scalar.value} {getattr(scalar.type, 'unit', 'days')} since 1970"
