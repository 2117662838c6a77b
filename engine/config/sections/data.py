"""Keys of `data`: sources, the query over them, the schema of the result, side tables and rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.config import names, units
from engine.config.schema import key, later_key, section
from engine.config.units import Moment, Share, Span
from engine.errors import UserError, nearest

ROLES = (
    "id", "event_time", "entity", "categorical", "numeric", "vector", "set", "text", "target", "weight", "time", "ignore",
)  # fmt: skip
# Role -> the type of its columns (a pattern, and an example of it).
TYPE_OF_ROLE = {
    "vector": (r"list<(float|u?int)\d+>", "list<float32>"),
    "set": (r"list<(string|u?int\d+)>", "list<string>"),
    "text": (r"string", "string"),
}

PLACE = "_place"  # in a table without time, the column by which its rows are in order: engine/data/places.py
BLOCKS = 1000  # parts of equal share in which places lie: a thousandth is a day from 1970-01-01 on


@dataclass(frozen=True)
class Format:
    """A format of sources: its name in messages, and the endings of its files."""

    title: str
    suffixes: tuple[str, ...] = ()


FORMATS = {  # data/readers/formats.py has the readers
    "csv": Format("CSV", (".csv", ".tsv", ".txt", ".dat")),
    "jsonl": Format("JSON Lines", (".jsonl", ".ndjson", ".json")),
    "parquet": Format("Parquet", (".parquet", ".pq")),
    "arrow": Format("Arrow IPC", (".arrow", ".feather", ".ipc")),
    "iceberg": Format("iceberg table"),
    "delta": Format("delta table"),
}


@dataclass(frozen=True, kw_only=True)
class SourceColumn:
    """One declared column of a source file, before any query."""

    SHORTHAND = "type"
    type: str = key(help="Arrow type name: string, bool, int64, float64, decimal(p,s), date, timestamp, ...")
    nullable: bool = key(True, "whether a null is allowed")
    aliases: tuple[str, ...] = key((), "other names that files use for this column")
    format: str | None = key(
        None, "strptime format of a timestamp or date in text, read strictly (31/02 is refused); null = ISO 8601"
    )
    zone: str | None = key(None, "zone of timestamps without an offset; null = data.time_zone", parse=units.zone)
    path: str | None = key(None, "dotted path of a nested field, if it differs from the name")
    missing: str = key("fail", "when a file lacks the column", choices=("fail", "null"))
    on_violation: str = key(
        "quarantine", "what happens to a value of another type", choices=("fail", "quarantine", "null", "warn")
    )
    sensitive: bool = key(False, "keep its values out of quarantine, samples and logs")

    def __post_init__(self) -> None:
        if self.format is not None and self.type.strip() not in ("timestamp", "date"):
            raise UserError(f"format is for columns of type timestamp or date, found type {self.type!r}: leave it out")


@dataclass(frozen=True, kw_only=True)
class CsvOptions:
    """The format of text files."""

    delimiter: str = key(",", "field separator")
    quote: str = key('"', "quote character")
    escape: str | None = key(None, "escape character; null = a doubled quote")
    encoding: str = key("utf-8", "text encoding (utf-8, utf-16, latin-1, ...); a byte-order mark is honoured")
    decimal: str = key(".", "decimal separator")
    thousands: str = key("", "separator of digit groups in numbers; empty = none")
    quoted_nulls: bool = key(False, 'whether a quoted field may be null; if false, "" is an empty text')
    ragged: str = key("quarantine", "when a row has more or fewer fields", choices=("fail", "quarantine"))
    nulls: tuple[str, ...] = key(("",), "spellings of null")
    header: bool = key(True, "whether the first line names the columns; without it the declared order holds")
    skip: int = key(0, "lines to skip before the header (or the first row)", ge=0)
    skip_after_header: int = key(0, "lines to skip after the header, such as units of measure", ge=0)
    footer: int = key(0, "lines to skip at the end of the file, such as totals; blank lines count", ge=0)
    comment: str | None = key(None, "lines that begin with this text are skipped, before and after the header")
    trailing_delimiter: bool = key(
        False, "every row ends with one more delimiter than the header, with nothing after it"
    )

    def __post_init__(self) -> None:
        if self.delimiter == "\\t":  # as typed on a command line
            object.__setattr__(self, "delimiter", "\t")
        if self.skip_after_header and not self.header:
            raise UserError("skip_after_header needs a header, found header=false: use skip")
        if self.comment is not None and (not self.comment.strip() or set(self.comment) & set("\r\n")):
            raise UserError(f"comment must be the text that comment lines begin with, found {self.comment!r}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Files of one kind, with their declared columns."""

    path: str = key(
        help="file, glob, folder, pkg://package/path or s3://bucket/key; relative to data.path; names in _ or . are skipped"
    )
    format: str = key("auto", "file format; auto = by the file name", choices=("auto", *FORMATS))
    columns: dict[str, SourceColumn] = key(help="declared columns: name -> type or mapping")
    csv: CsvOptions = section(CsvOptions, "text file options")
    unexpected: str = key("warn", "when a file has a column that is not declared", choices=("fail", "warn", "ignore"))
    hive: bool = key(False, "read key=value folders as columns, typed as declared")
    refused: str = key("fail", "when a file cannot be read at all", choices=("fail", "skip"))
    endpoint: str | None = key(None, "s3:// service other than AWS, as in http://127.0.0.1:9000")
    region: str | None = key(None, "s3:// region; null = from the credential chain")
    snapshot: str | None = key(None, "Iceberg snapshot id or Delta version; null = the current one")

    def __post_init__(self) -> None:
        if not self.columns:
            raise UserError("columns must declare at least one column")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a dataset: its type and role, its allowed values and when it becomes known."""

    SHORTHAND = "type"
    type: str = key(help="Arrow type name: string, bool, int64, float64, decimal(p,s), date, timestamp, ...")
    role: str = key("ignore", "what the column is for", choices=ROLES)
    width: int | None = later_key(None, "how many numbers each list of a column with role vector has", ge=1, le=65_536)
    id: bool = key(False, "part of the row's identity beside its role; role id says the same")
    description: str = key("", "meaning of the column")
    nullable: bool = key(True, "whether a null is allowed")
    min: float | str | None = key(None, "smallest allowed value")
    max: float | str | None = key(None, "largest allowed value")
    values: tuple[str, ...] = key((), "allowed values; empty = any")
    on_violation: str = key(
        "quarantine",
        "what happens to a row that violates the rules above",
        choices=("fail", "quarantine", "null", "warn"),
    )
    sensitive: bool = key(False, "keep its values out of quarantine, samples and logs")
    known_at: Moment | None = key(
        None, "when the value becomes known: `prior`, or a time column with an optional offset (`arrived + 15min`)"
    )
    references: str | None = key(None, "foreign key: table.column whose values must contain this one")
    max_null_rate: Share | None = key(None, "largest share of nulls in the dataset")
    max_null_change: Share | None = key(None, "largest change of the share of nulls since the previous dataset")

    def __post_init__(self) -> None:
        pattern, example = TYPE_OF_ROLE.get(self.role, ("", ""))
        if pattern and not re.fullmatch(pattern, self.type.replace(" ", "")):
            raise UserError(f"a column with role {self.role} must be of a type such as {example}, found {self.type!r}")
        if (self.role == "vector") != (self.width is not None):
            found = f"found width {self.width} with role {self.role}" if self.width else "found none"
            raise UserError(
                f"width must say how many numbers each list of a vector has, and is for role vector only, {found}"
            )

    @property
    def identifies(self) -> bool:
        """Whether the column is part of the row's identity."""
        return self.id or self.role == "id"


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A table joined with the events (weather, products): by as-of joins, or static."""

    query: str | None = key(None, "SQL over the sources; null = the source of the same name, unchanged")
    columns: dict[str, Column] = key(help="schema of the result")
    static: bool = key(False, "a table without time, whose values are always known")


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """One rule over several columns of a row."""

    SHORTHAND = "holds"
    holds: str = key(help="SQL expression that must not be false on any row")
    on_violation: str = key(
        "quarantine", "what happens to a row that violates it", choices=("fail", "quarantine", "warn")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The event table: its sources and what it must satisfy."""

    name: str = key("", "name of the dataset in the store", parse=names.folder)
    description: str = key("", "what one row represents")
    path: str = key("", "root of the sources' relative paths")
    time_zone: str = key("UTC", "zone of instants without an offset, and of days and months", parse=units.zone)
    sources: dict[str, SourceConfig] = key(factory=dict, help="files by name", parse=names.folder)
    query: str | None = key(
        None,
        "SQL over the sources that makes the event table, null = the only source; rejected if it may give other rows each "
        "time (random(), now(), LIMIT without ORDER BY)",
    )
    columns: dict[str, Column] = key(factory=dict, help="schema of the event table")
    group: str | None = later_key(
        None,
        "column whose rows belong together, as a customer: no split by hash divides them, and in a table without event_time "
        "blocks and windows do not either; null = each row by itself",
    )
    positive: str | None = key(
        None,
        "positive value of a target with two values, such as fraud; null = true, 1, or the last one in sort order",
    )
    tables: dict[str, TableConfig] = key(factory=dict, help="side tables by name", parse=names.folder)
    duplicates: str = key("fail", "rows with equal ids", choices=("fail", "first", "last"))
    known_time: str | None = key(None, "time column that decides which row is first or last; null = the event time")
    rules: dict[str, RuleConfig] = key(factory=dict, help="rules over several columns: name -> SQL expression")
    min_rows: int = key(0, "fewest rows that the dataset may have", ge=0)
    max_rows: int | None = key(None, "most rows that the dataset may have", ge=0)
    max_row_change: Share | None = key(
        None, "largest change of the number of rows since the previous dataset, as a share"
    )
    freshness: Span | None = key(None, "largest age of the newest event at ingest")
    max_quarantine: Share = key(Share("1%"), "share of rows that may be quarantined before ingest stops")

    def __post_init__(self) -> None:
        names_ = {name for source in self.sources.values() for name, item in source.columns.items() if item.sensitive}
        object.__setattr__(self, "columns", _as_sensitive(self.columns, names_))
        tables = {
            name: replace(item, columns=_as_sensitive(item.columns, names_)) for name, item in self.tables.items()
        }
        object.__setattr__(self, "tables", tables)
        if self.columns and PLACE not in self.columns and not self.with_role("event_time"):
            place = Column(
                type="timestamp", role="event_time", known_at=Moment("prior"), description="by hash of the ids"
            )
            object.__setattr__(self, "columns", {**self.columns, PLACE: place})
        _check_roles(self.columns)
        if self.columns:
            self._check_group()
        if not self.timed:
            self._check_without_time()
        for table, columns in {"": self.columns, **{name: item.columns for name, item in self.tables.items()}}.items():
            _check_known_at(table, columns)
        if self.columns and not self.sources:
            raise UserError("sources must name at least one source")

    @property
    def sensitive(self) -> list[str]:
        """Columns of sources, of events and of side tables whose values must never be shown, sorted by name."""
        found = {name for source in self.sources.values() for name, item in source.columns.items() if item.sensitive}
        for columns in (self.columns, *(table.columns for table in self.tables.values())):
            found |= {name for name, column in columns.items() if column.sensitive}
        return sorted(found)

    def with_role(self, *roles: str) -> list[str]:
        """Names of the columns with one of the roles, in declared order."""
        return [name for name, column in self.columns.items() if column.role in roles]

    @property
    def event_time(self) -> str:
        """The event time column; of a table without time PLACE, which the engine fills."""
        return self.with_role("event_time")[0]

    @property
    def timed(self) -> bool:
        """Whether rows have an event time, or no columns are declared."""
        return PLACE not in self.columns

    @property
    def shown_time(self) -> list[str]:
        """The event time column, if rows have one: PLACE is in no output."""
        return [self.event_time] if self.timed else []

    @property
    def day_zone(self) -> str:
        """The zone in which days are cut; UTC for the blocks of a table without time."""
        return self.time_zone if self.timed else "UTC"

    def _check_group(self) -> None:
        if self.group is not None and self.group not in self.columns:
            raise UserError(f"group names {self.group!r}, which is not a column.{nearest(self.group, self.columns)}")
        if self.group is not None:
            check_single(self.columns[self.group], self.group, "group")

    def _check_without_time(self) -> None:
        """Raise UserError for what needs an event time."""
        for name, column in self.columns.items():
            if column.known_at not in (None, "prior"):
                raise UserError(
                    f"columns.{name}.known_at must be `prior` (known when the row is scored) or be left out, for no column has "
                    f"role event_time, found `{column.known_at}`: without a time nothing is known later"
                )
        if self.freshness is not None:
            raise UserError(f"freshness={self.freshness} needs a column with role event_time, found none: leave it out")
        if self.duplicates != "fail" and self.known_time is None:
            raise UserError(
                f"duplicates={self.duplicates} needs known_time, the time column that decides which row is "
                f"{self.duplicates}, for no column has role event_time"
            )

    @property
    def ids(self) -> list[str]:
        """The id columns, in declared order."""
        return [name for name, column in self.columns.items() if column.identifies]

    @property
    def target(self) -> str | None:
        """The target column, if the dataset has one."""
        return next(iter(self.with_role("target")), None)

    def with_target(self, name: str, positive: str | None) -> DataConfig:
        """The section with another column as its target."""
        columns = {
            key: replace(item, role="ignore") if item.role == "target" else item for key, item in self.columns.items()
        }
        return replace(self, columns={**columns, name: replace(columns[name], role="target")}, positive=positive)

    @property
    def weight(self) -> str | None:
        """The weight column, if the dataset has one."""
        return next(iter(self.with_role("weight")), None)


def check_single(column: Column, name: str, where: str) -> None:
    """Raise UserError for a column of lists or maps where rows are told apart by one value each."""
    if column.type.startswith(("list<", "map<")):
        raise UserError(
            f"{where} must name a column with one value a row, found {name!r} of type {column.type}: name another, or compute "
            "one in data.query"
        )


def _as_sensitive(columns: dict[str, Column], sensitive: set[str]) -> dict[str, Column]:
    """The columns; one whose source column is sensitive becomes sensitive too."""
    return {
        name: replace(item, sensitive=True) if name in sensitive and not item.sensitive else item
        for name, item in columns.items()
    }


def _check_roles(columns: dict[str, Column]) -> None:
    counts = {role: [name for name, column in columns.items() if column.role == role] for role in ROLES}
    if len(counts["event_time"]) > 1:
        raise UserError(f"columns must have at most one with role event_time, found {counts['event_time']}")
    if (place := columns.get(PLACE)) is not None and (place.role, place.type) != ("event_time", "timestamp"):
        raise UserError(f"{PLACE} is reserved by the engine, found it as a column: rename it")
    if columns and not any(column.identifies for column in columns.values()):
        raise UserError(
            "columns must have at least one with role id: row_id is computed from the id columns. Where nothing identifies a "
            "row, declare two columns of the source, `file: {type: string, path: $digest}` and `row: {type: int64, path: $row}`"
        )
    for role in ("id", "event_time", "entity", "target", "weight"):
        for name, column in columns.items():
            if column.role == role or (role == "id" and column.id):
                check_single(column, name, f"role {role}")
    for role in ("target", "weight"):
        if len(counts[role]) > 1:
            raise UserError(f"columns must have at most one with role {role}, found {counts[role]}")


def _check_known_at(table: str, columns: dict[str, Column]) -> None:
    where = f"tables.{table}.columns" if table else "columns"
    for name, column in columns.items():
        if column.known_at is None or column.known_at == "prior":
            continue
        anchor = column.known_at.column
        if anchor not in columns:
            raise UserError(
                f"{where}.{name}.known_at names {anchor!r}, which is not a column.{nearest(anchor, columns)}"
            )
        if not columns[anchor].type.startswith("timestamp"):
            raise UserError(
                f"{where}.{name}.known_at names {anchor!r}, which must be a timestamp, found {columns[anchor].type!r}"
            )
