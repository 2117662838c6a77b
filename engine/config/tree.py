"""The config tree: every key of every command, with its type, default, bounds and meaning.

Defaults live here and nowhere else; `conf/` holds choices and experiments as differences from them.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace

from engine.config import names, units
from engine.config.schema import key, section
from engine.errors import UserError, nearest

# What a loss is for. `engine.training.metrics` lists what can be measured.
TASKS = {
    "binary": "binary",
    "multiclass": "multiclass",
    "squared": "regression",
    "huber": "regression",
    "quantile": "regression",
}
AUTO = units.AUTO
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
ROLES = ("id", "event_time", "entity", "categorical", "numeric", "target", "weight", "time", "ignore")
AGGREGATES = (
    "count", "sum", "mean", "std", "min", "max", "last", "first", "recency", "distinct", "ewm_sum", "ewm_mean",
)  # fmt: skip
PARTS = ("hour", "minute_of_day", "weekday", "day", "day_of_year", "week", "month")
DRIFT_STATISTICS = ("psi", "ks", "wasserstein", "missing", "outside", "unseen", "volume")
FORMATS = ("auto", "csv", "jsonl", "parquet", "arrow", "iceberg", "delta")


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class SourceColumn:
    """One declared column of a source file, before any query."""

    SHORTHAND = "type"
    type: str = key(help="Arrow type name: string, bool, int64, float64, decimal(p,s), date, timestamp, ...")
    nullable: bool = key(True, "whether a null is allowed")
    aliases: tuple[str, ...] = key((), "other names that files use for this column")
    format: str | None = key(
        None, "strptime format of a timestamp or date in text, read strictly (31/02 is no day); null = ISO 8601"
    )
    zone: str | None = key(None, "zone of timestamps without an offset; null = data.time_zone", parse=units.zone)
    path: str | None = key(None, "dotted path of a nested field, where it differs from the name")
    missing: str = key("fail", "when a file lacks the column", choices=("fail", "null"))
    on_violation: str = key(
        "quarantine", "what happens to a value that is not of the type", choices=("fail", "quarantine", "null", "warn")
    )
    sensitive: bool = key(False, "keep its values out of quarantine, samples and logs")

    def __post_init__(self) -> None:
        if self.format is not None and self.type.strip() not in ("timestamp", "date"):
            raise UserError(f"format is for columns of type timestamp or date, found type {self.type!r}: leave it out")


@dataclass(frozen=True, kw_only=True)
class CsvOptions:
    """How text files are written."""

    delimiter: str = key(",", "field separator")
    quote: str = key('"', "quote character")
    escape: str | None = key(None, "escape character; null = a doubled quote")
    encoding: str = key("utf-8", "text encoding (utf-8, utf-16, latin-1, ...); a byte-order mark is honoured")
    decimal: str = key(".", "decimal separator")
    thousands: str = key("", "separator of digit groups in numbers; empty = none")
    quoted_nulls: bool = key(False, 'whether a quoted field may spell null; without it "" is an empty text')
    ragged: str = key("quarantine", "when a row has more or fewer fields", choices=("fail", "quarantine"))
    nulls: tuple[str, ...] = key(("",), "spellings of null")
    header: bool = key(True, "whether the first line names the columns; without it the declared order holds")
    skip: int = key(0, "lines before the header (or the first row) that are no part of the table", ge=0)
    skip_after_header: int = key(0, "lines after the header that are no rows, such as units of measure", ge=0)
    footer: int = key(0, "lines at the end of the file that are no rows, such as totals; blank lines count", ge=0)
    comment: str | None = key(None, "lines that begin with this text are left out, before the header and after it")
    trailing_delimiter: bool = key(
        False, "every row ends with one more delimiter than the header has, with nothing behind it"
    )

    def __post_init__(self) -> None:
        if self.delimiter == "\\t":  # as it is typed on a command line
            object.__setattr__(self, "delimiter", "\t")
        if self.skip_after_header and not self.header:
            raise UserError("skip_after_header counts from the header, found header=false: use skip")
        if self.comment is not None and (not self.comment.strip() or set(self.comment) & set("\r\n")):
            raise UserError(f"comment must be the text that comment lines begin with, found {self.comment!r}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Files of one kind, with the columns they are declared to have."""

    path: str = key(
        help="file, glob, folder, pkg://package/path or s3://bucket/key; relative to data.path; names in _ or . are left out"
    )
    format: str = key("auto", "file format; auto goes by the file name", choices=FORMATS)
    columns: dict[str, SourceColumn] = key(help="declared columns: name -> type or mapping")
    csv: CsvOptions = section(CsvOptions, "text file options")
    unexpected: str = key("warn", "when a file has a column that is not declared", choices=("fail", "warn", "ignore"))
    hive: bool = key(False, "read key=value folders as columns, typed as declared")
    refused: str = key("fail", "when a file cannot be read at all", choices=("fail", "skip"))
    endpoint: str | None = key(None, "s3:// service other than AWS, as in http://127.0.0.1:9000")
    region: str | None = key(None, "s3:// region; null = as the credential chain says")
    snapshot: str | None = key(None, "Iceberg snapshot id or Delta version; null = the current one")

    def __post_init__(self) -> None:
        if not self.columns:
            raise UserError("columns must declare at least one column")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a dataset: what it is, what it may hold and when it becomes known."""

    SHORTHAND = "type"
    type: str = key(help="Arrow type name: string, bool, int64, float64, decimal(p,s), date, timestamp, ...")
    role: str = key("ignore", "what the column is for", choices=ROLES)
    id: bool = key(False, "part of the row's identity beside its role; role id says the same")
    description: str = key("", "what it means")
    nullable: bool = key(True, "whether a null is allowed")
    min: float | str | None = key(None, "smallest allowed value")
    max: float | str | None = key(None, "largest allowed value")
    values: tuple[str, ...] = key((), "allowed values; empty = any")
    on_violation: str = key(
        "quarantine",
        "what happens to a row that breaks the rules above",
        choices=("fail", "quarantine", "null", "warn"),
    )
    sensitive: bool = key(False, "keep its values out of quarantine, samples and logs")
    known_at: str | None = key(
        None, "when the value becomes known: `prior`, or a time column with an optional offset (`arrived + 15min`)"
    )
    references: str | None = key(None, "foreign key: table.column whose values must contain this one")
    max_null_rate: str | float | None = key(None, "largest share of nulls in the dataset", parse=units.share)
    max_null_change: str | float | None = key(
        None, "largest change of the share of nulls against the previous dataset", parse=units.share
    )

    def __post_init__(self) -> None:
        if self.known_at is not None and self.known_at != "prior":
            units.moment(self.known_at)

    @property
    def identifies(self) -> bool:
        """Whether the column is part of the row's identity."""
        return self.id or self.role == "id"


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A table beside the events (weather, products): looked up by as-of joins, or static."""

    query: str | None = key(None, "SQL over the sources; null = the source of the same name as it is")
    columns: dict[str, Column] = key(help="schema of the result")
    static: bool = key(False, "a table without time: its values are known long before")


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """One rule over several columns of a row."""

    SHORTHAND = "holds"
    holds: str = key(help="SQL expression that must not be false")
    on_violation: str = key(
        "quarantine", "what happens to a row that breaks it", choices=("fail", "quarantine", "warn")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The event table: where it comes from and what it must be."""

    name: str = key("", "name of the dataset in the store", parse=names.folder)
    description: str = key("", "what one row is")
    path: str = key("", "root of the sources' relative paths")
    time_zone: str = key("UTC", "zone of every bound without an offset, and of days and months", parse=units.zone)
    sources: dict[str, SourceConfig] = key(factory=dict, help="files by name", parse=names.folder)
    query: str | None = key(
        None,
        "SQL over the sources that shapes the event table, null = the only source; refused where it may give other rows "
        "each time (random(), now(), LIMIT without ORDER BY)",
    )
    columns: dict[str, Column] = key(factory=dict, help="schema of the event table")
    positive: str | None = key(
        None,
        "value of a target with two values that the score is for, as in fraud; null = true, 1, or the last one by sorting",
    )
    tables: dict[str, TableConfig] = key(factory=dict, help="tables beside the events", parse=names.folder)
    duplicates: str = key("fail", "rows with equal ids", choices=("fail", "first", "last"))
    known_time: str | None = key(None, "time column by which first and last are meant; null = the event time")
    rules: dict[str, RuleConfig] = key(factory=dict, help="rules over several columns: name -> SQL expression")
    min_rows: int = key(0, "fewest rows that the dataset may have", ge=0)
    max_rows: int | None = key(None, "most rows that the dataset may have", ge=0)
    max_row_change: str | float | None = key(
        None, "largest change of the number of rows against the previous dataset, as a share", parse=units.share
    )
    freshness: str | None = key(None, "oldest that the newest event may be when it is ingested", parse=units.span)
    max_quarantine: str | float = key(
        "1%", "share of rows that may be quarantined before ingest stops", parse=units.share
    )

    def __post_init__(self) -> None:
        said = {name for source in self.sources.values() for name, item in source.columns.items() if item.sensitive}
        object.__setattr__(self, "columns", _as_sensitive(self.columns, said))
        tables = {name: replace(item, columns=_as_sensitive(item.columns, said)) for name, item in self.tables.items()}
        object.__setattr__(self, "tables", tables)
        _check_roles(self.columns)
        for table, columns in {"": self.columns, **{name: item.columns for name, item in self.tables.items()}}.items():
            _check_known_at(table, columns)
        if self.columns and not self.sources:
            raise UserError("sources must name at least one source")

    @property
    def sensitive(self) -> list[str]:
        """Columns of sources, of events and of side tables whose values must be shown nowhere, sorted by name."""
        found = {name for source in self.sources.values() for name, item in source.columns.items() if item.sensitive}
        for columns in (self.columns, *(table.columns for table in self.tables.values())):
            found |= {name for name, column in columns.items() if column.sensitive}
        return sorted(found)

    def with_role(self, *roles: str) -> list[str]:
        """Names of the columns with one of the roles, in declared order."""
        return [name for name, column in self.columns.items() if column.role in roles]

    @property
    def event_time(self) -> str:
        """The event time column."""
        return self.with_role("event_time")[0]

    @property
    def ids(self) -> list[str]:
        """The id columns, in declared order."""
        return [name for name, column in self.columns.items() if column.identifies]

    @property
    def target(self) -> str | None:
        """The target column, if the dataset has one."""
        return next(iter(self.with_role("target")), None)


def _as_sensitive(columns: dict[str, Column], said: set[str]) -> dict[str, Column]:
    """The columns, those sensitive too of which that is only said where they come from."""
    return {
        name: replace(item, sensitive=True) if name in said and not item.sensitive else item
        for name, item in columns.items()
    }


def _check_roles(columns: dict[str, Column]) -> None:
    counts = {role: [name for name, column in columns.items() if column.role == role] for role in ROLES}
    if columns and len(counts["event_time"]) != 1:
        raise UserError(f"columns must have exactly one with role event_time, found {counts['event_time']}")
    if columns and not any(column.identifies for column in columns.values()):
        raise UserError("columns must have at least one with role id: row_id is made of the id columns")
    for role in ("target", "weight"):
        if len(counts[role]) > 1:
            raise UserError(f"columns must have at most one with role {role}, found {counts[role]}")


def _check_known_at(table: str, columns: dict[str, Column]) -> None:
    where = f"tables.{table}.columns" if table else "columns"
    for name, column in columns.items():
        if column.known_at in (None, "prior"):
            continue
        anchor, _ = units.moment(column.known_at or "")
        if anchor not in columns:
            raise UserError(f"{where}.{name}.known_at names {anchor!r}, which is no column.{nearest(anchor, columns)}")
        if not columns[anchor].type.startswith("timestamp"):
            raise UserError(
                f"{where}.{name}.known_at names {anchor!r}, which must be a timestamp, found {columns[anchor].type!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Periods of the event time, each [from, to], from included and to excluded, in data.time_zone."""

    train: tuple[str, ...] = key((), "rows that weights and encodings are fitted on")
    valid: tuple[str, ...] = key((), "rows that early stopping and calibration look at")
    test: tuple[str, ...] = key((), "rows that only the evaluation looks at")
    known_by: str | None = key(
        None, "instant by which a row's target must be known to be trained on or watched; null = any time"
    )
    snapshot: str | None = key(
        None,
        "train on this dataset of the store (its recipe or digest, or how they begin), whatever the sources hold now",
    )


# ------------------------------------------------------------------------------------------------------ features


@dataclass(frozen=True, kw_only=True)
class CalendarConfig:
    """Parts of a time column that is known before the decision."""

    column: str = key(help="time column")
    parts: tuple[str, ...] = key(("hour", "weekday"), "parts", choices=PARTS)
    zone: str | None = key(None, "zone in which the parts are read; null = data.time_zone", parse=units.zone)
    cyclic: bool = key(False, "as sine and cosine instead of one number")


@dataclass(frozen=True, kw_only=True)
class ExpressionConfig:
    """A feature made of other columns of the same row."""

    SHORTHAND = "sql"
    sql: str = key(help="SQL expression over columns of the event table (DuckDB); one row in, one value out")
    type: str = key("float64", "type of the value")


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """A named, owned unit of the feature store: trailing windows over events, an as-of join with a table, SQL expressions
    over columns of the row, or a function of an installed package.
    """

    kind: str = key("windows", "what the view computes", choices=("windows", "asof", "expression", "function"))
    description: str = key("", "what it tells")
    owner: str = key("", "who answers for it")
    entity: tuple[str, ...] = key((), "columns of the event table that say whose history or whose row")
    table: str | None = key(None, "table that an as-of view looks into; null = the events (windows)")
    on: tuple[str, ...] = key((), "columns of the table that match the entity, in order; empty = the same names")
    windows: tuple[str, ...] = key((), "lengths of the trailing windows", parse=units.span)
    aggregates: dict[str, tuple[str, ...]] = key(factory=dict, help="column -> aggregates; `rows` -> [count, recency]")
    columns: tuple[str, ...] = key((), "columns that an as-of view brings")
    max_age: str | None = key(None, "oldest row that an as-of view accepts; null = any", parse=units.span)
    inclusive: bool = key(False, "accept a row known exactly at the decision time")
    expressions: dict[str, ExpressionConfig] = key(factory=dict, help="feature -> SQL expression (kind expression)")
    function: str = key("", "name in the entry-point group engine.features of an installed package (kind function)")
    inputs: tuple[str, ...] = key((), "columns of the event table that the function reads")
    outputs: dict[str, str] = key(factory=dict, help="feature -> type of what the function returns")

    def __post_init__(self) -> None:
        needed = {
            "windows": ("entity", "windows", "aggregates"),
            "asof": ("entity", "table", "columns"),
            "expression": ("expressions",),
            "function": ("function", "inputs", "outputs"),
        }[self.kind]
        lacking = [name for name in needed if not getattr(self, name)]
        if lacking:
            raise UserError(
                f"a view of kind {self.kind} must have {' and '.join(needed)}; {' and '.join(lacking)} is empty"
            )
        for column, asked in self.aggregates.items():
            for name in asked:
                if name not in AGGREGATES:
                    raise UserError(f"aggregates.{column} names {name!r}.{nearest(name, AGGREGATES)}")
                if column == "rows" and name not in ("count", "recency"):
                    raise UserError(f"aggregates.rows must be count or recency, found {name!r}")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How raw features become the numbers that the model reads; fitted on the training split only."""

    numeric: str = key("standardise", "encoding of numbers", choices=("standardise", "quantile", "ple"))
    bins: int = key(16, "bins of a piecewise-linear encoding", ge=2, le=256)
    clip: float = key(8.0, "standardised values are cut to this many standard deviations", gt=0)
    missing_indicator: bool = key(True, "add a 0/1 column for every numeric feature that is null in training")
    min_count: int = key(10, "categories seen less often in training share one code", ge=1)
    max_categories: int = key(5000, "categories beyond the most frequent share that code too", ge=1)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What the model sees of a row, as of the decision time."""

    as_of: str | None = key(None, "decision time: a time column with an optional lead (`scheduled - 1h`)")
    direct: dict[str, bool] = key(factory=dict, help="columns used as they are: name -> true")
    calendar: dict[str, CalendarConfig] = key(factory=dict, help="parts of time columns by name")
    views: dict[str, ViewConfig] = key(factory=dict, help="views of the feature store by name", parse=names.folder)
    windows: bool = key(True, "off leaves out every windows view")
    encode: EncodeConfig = section(EncodeConfig, "fitted encoding")

    def __post_init__(self) -> None:
        if self.as_of is not None:
            units.moment(self.as_of)

    @property
    def active_views(self) -> dict[str, ViewConfig]:
        """The views in use."""
        return {name: view for name, view in self.views.items() if self.windows or view.kind != "windows"}

    @property
    def direct_columns(self) -> list[str]:
        """Columns used as they are."""
        return [name for name, used in self.direct.items() if used]


# --------------------------------------------------------------------------------------------- training, scoring


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture."""

    kind: str = key("mlp", "architecture", choices=("mlp", "linear"))
    hidden: tuple[int, ...] = key((256, 256, 256), "widths of the hidden layers", ge=1)
    dropout: float = key(0.1, "share of activations dropped in training", ge=0, lt=1)
    embedding_max: int = key(32, "widest categorical embedding", ge=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the weights are found."""

    seed: int = key(0, "keys the row order, initial weights and dropout", ge=0)
    loss: str = key("binary", "what is minimised", choices=tuple(TASKS))
    quantile: float = key(0.5, "level of the quantile loss", gt=0, lt=1)
    huber_delta: float = key(1.0, "where the Huber loss turns linear, in standard deviations of the target", gt=0)
    max_classes: int = key(
        100, "most classes that loss=multiclass takes; more values are mostly a number, which other losses learn", ge=2
    )
    class_weight: str = key("none", "weight of the classes in the loss", choices=("none", "balanced"))
    sampling: str = key(
        "each",
        "an epoch takes each row once, or draws as many with replacement so that classes are equally frequent",
        choices=("each", "balanced"),
    )
    epochs: int | str = key(
        AUTO,
        "passes over the training rows; auto = 10, or as many as make 1,000 steps, at most 100",
        parse=units.count(1),
    )
    batch_size: int | str = key(
        AUTO,
        "rows of one optimizer step; auto = a 200th of the training rows, down to a power of two, from 32 to 4096",
        parse=units.count(1),
    )
    shards: int = key(8, "logical shards of a batch; fixed, so that weights do not depend on workers", ge=1)
    lr: float = key(0.001, "peak learning rate", gt=0)
    weight_decay: float = key(0.01, "AdamW weight decay", ge=0)
    warmup: float = key(0.05, "share of all steps that warm up; cosine decay follows", ge=0, lt=1)
    clip: float = key(1.0, "largest gradient norm; 0 = no clipping", ge=0)
    patience: int | str = key(
        AUTO,
        "epochs without a better validation metric before stopping, 0 = never; auto = a fifth of the epochs, at least 3",
        parse=units.count(0),
    )
    metric: str | None = key(None, "validation metric to watch; null = roc_auc, accuracy, rmse, mae or pinball by loss")
    precision: str = key("auto", "arithmetic of the forward pass", choices=("auto", "fp32", "bf16"))
    reduction: str = key("exact", "how gradients are added up", choices=("exact", "ddp"))
    order: str = key("full", "shuffle over all rows or within windows of rows", choices=("full", "windowed"))
    window_rows: int = key(1_000_000, "rows of one window where order=windowed", ge=1)
    on_bad_loss: str = key("stop", "when a loss is NaN or infinite", choices=("stop", "skip"))
    checkpoint_every: int = key(0, "steps between checkpoints; 0 = at epoch ends only", ge=0)
    keep_checkpoints: int = key(2, "newest checkpoints kept", ge=1)
    resume: str = key("auto", "auto continues the newest unfinished run of this plan; never; or a run directory")
    log_every: int = key(50, "steps between lines of metrics.jsonl", ge=1)
    device: str = key("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    start_from: str | None = key(
        None, "model whose encoding and weights training goes on from: a run or name@version; null = from scratch"
    )

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < self.shards:
            raise UserError(f"batch_size must be at least shards={self.shards}, found {self.batch_size}")
        for name, wrong in (
            ("loss", TASKS[self.loss] == "regression"),
            ("class_weight", self.class_weight == "balanced"),
            ("order", self.order == "windowed"),
        ):
            if wrong and self.sampling == "balanced":
                raise UserError(
                    f"sampling=balanced needs a loss over classes, class_weight=none (classes would count twice) and "
                    f"order=full, found {name}={getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on rows with labels."""

    model: str = key("", "run directory or name@alias to evaluate (command `evaluate`)")
    slices: tuple[str, ...] = key((), "columns by which the metric is broken down")
    bootstrap: int = key(200, "resamples behind the intervals; 0 = none", ge=0)
    confidence: float = key(0.95, "coverage of the intervals", gt=0, lt=1)
    ece_bins: int = key(15, "bins of the calibration error", ge=2)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which rows are scored by which model."""

    model: str = key("", "run directory or name@alias")
    shadow: str | None = key(
        None, "second model, as name@challenger, whose scores go beside in shadow_score and shadow_model; null = none"
    )
    between: tuple[str, ...] = key((), "[from, to] of the event time, from included, to excluded; empty = all")
    input: str | None = key(
        None,
        "rows to score that are in no dataset, labelled or not: a file, glob, folder or s3:// address in place of the event "
        "table's source; null = the dataset",
    )
    history: str = key(
        "store",
        "what windows look back on beside score.input: store = the newest stored dataset of the model's data, a dataset "
        "there (its recipe or digest, or how they begin), or input = nothing else",
    )
    unit_rows: int = key(262_144, "rows of a work unit", ge=1)
    resume: str = key("auto", "auto continues the newest unfinished run of this plan; never; or a run directory")
    mode: str = key("all", "score everything, or only what an earlier run has not seen", choices=("all", "append"))
    columns: tuple[str, ...] = key((), "columns passed through to the output")
    features: str = key(
        "store",
        "views from the feature store, or computed by each unit from the history it needs (the same bits)",
        choices=("store", "compute"),
    )
    profile: bool = key(True, "count the drift profile of inputs and scores in the same pass")
    tries: int = key(3, "times that a unit may raise or kill its worker before it is set aside", ge=1)
    output: str | None = key(
        None,
        "where predictions go: a folder or s3://bucket/prefix, or one file that ends in .csv, .jsonl or .parquet; null = the "
        "run directory",
    )
    endpoint: str | None = key(None, "s3:// service of input and output other than AWS, as in http://127.0.0.1:9000")
    region: str | None = key(None, "s3:// region of input and output; null = as the credential chain says")
    partition: str | None = key(None, "column whose values become folders `column=value` (hive)")
    file_rows: int = key(0, "rows of an output file; 0 = one file a unit, or by file_size", ge=0)
    file_size: str | int | None = key(
        None, "size that output files aim at, as in 128MB; null = by file_rows", parse=units.size
    )
    compression_level: int = key(1, "zstd level of the output", ge=1, le=22)

    def __post_init__(self) -> None:
        if self.file_rows and self.file_size is not None:
            raise UserError("file_rows and file_size must not both be set: they say the same thing twice")
        if self.history != "store" and self.input is None:
            raise UserError(
                f"history={self.history} goes with score.input: rows of a dataset have the dataset's own history"
            )


@dataclass(frozen=True, kw_only=True)
class BusinessConfig:
    """A number of one's own over scored rows, watched like any metric."""

    SHORTHAND = "expression"
    expression: str = key(
        help="arithmetic over `score`, `label` and columns ending in a mean, sum, min, max or count (docs/monitoring.md)"
    )
    better: str = key("lower", "which way is good", choices=("lower", "higher"))


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """Who is told of an alarm."""

    SHORTHAND = "kind"
    kind: str = key("log", "how", choices=("log", "file", "command", "webhook"))
    to: str = key("", "file to append to, command to start (gets drift.json's path), or URL to post to (a secret)")
    timeout: str = key(
        "10s", "how long a command, or one attempt at a web service, may take as a whole", parse=units.span
    )
    tries: int = key(3, "attempts at a web service", ge=1)

    def __post_init__(self) -> None:
        if self.kind != "log" and not self.to:
            raise UserError(f"to must say where a {self.kind} alert goes, found nothing")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is compared with the reference, and when it is an alarm."""

    model: str = key("", "run directory or name@alias whose reference is used")
    window: str | tuple[str, ...] = key("", "a month 2020-04, a day 2020-04-07, or [from, to]")
    run: str = key("", "scoring run whose stored profile is compared, in place of a window of the dataset")
    alpha: float = key(0.01, "false-alarm rate over all columns together, per window", gt=0, lt=1)
    alarm_on: tuple[str, ...] = key(
        ("drift", "performance"), "what makes an alarm", choices=("drift", "performance", "business")
    )
    rising: str = key(
        "leave_out",
        "values of columns that follow the time (counts that grow with the data's age, a month, a row number)",
        choices=("leave_out", "judge"),
    )
    season: str = key("none", "weekday: compare with days of the same weekdays", choices=("none", "weekday"))
    floors: dict[str, float] = key(
        factory=dict,
        help="effect floors in place of the defaults, smallest changes worth an alarm: " + ", ".join(DRIFT_STATISTICS),
    )
    thresholds: dict[str, float] = key(
        factory=dict, help="manual lines: column or column.statistic -> value; without a statistic psi is meant"
    )
    psi_floor: float = key(1e-4, "smallest share that PSI sees in a bin", gt=0, lt=1)
    resamples: int = key(300, "windows put together from blocks of days where real ones are too few", ge=50)
    block: int = key(7, "consecutive days that such windows are put together from", ge=1)
    seed: int = key(0, "keys the resampling", ge=0)
    labels: bool = key(True, "measure performance on rows whose label is known")
    min_labelled: str | float = key("50%", "share of labels that must be known to judge performance", parse=units.share)
    performance_floor: float = key(0.1, "smallest relative loss of quality worth an alarm", ge=0)
    multivariate: bool = key(True, "PCA reconstruction error and domain classifier, where rows are at hand")
    business: dict[str, BusinessConfig] = key(factory=dict, help="numbers of one's own by name")
    alerts: dict[str, AlertConfig] = key(factory=dict, help="who is told, by name")
    cooldown: str = key("1d", "time in which the same cause is not told again", parse=units.span)

    def __post_init__(self) -> None:
        for name, value in self.floors.items():
            if name not in DRIFT_STATISTICS:
                raise UserError(f"floors names {name!r}.{nearest(name, DRIFT_STATISTICS)}")
            if value < 0:
                raise UserError(f"floors.{name} must not be negative, found {value}")
        for kind, numbers in (("floors", self.floors), ("thresholds", self.thresholds)):
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise UserError(f"{kind}.{name} must be a finite number, found {value}")


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """What the history keeps of a move made by hand."""

    who: str | None = key(None, "who moves; null = the user of this process")
    why: str = key("by hand", "reason of the move")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a challenger may replace the champion, judged on rows that neither saw."""

    metric: str | None = key(None, "metric to beat; null = the one that training watches")
    bootstrap: int = key(400, "paired resamples of the judged rows", ge=20)
    confidence: float = key(0.9, "two-sided coverage of the intervals of the differences", gt=0.5, lt=1)
    min_gain: float = key(0.0, "the interval of the metric's gain must lie above this", ge=0)
    cost_false_negative: float = key(5.0, "business cost of a positive that was not acted on", ge=0)
    cost_false_positive: float = key(1.0, "business cost of acting on a negative", ge=0)
    max_cost_rise: float = key(0.0, "the business cost may rise by no more than this share of the champion's", ge=0)
    max_slice_loss: float = key(
        0.02, "a slice may lose no more of the metric than this, where it is beyond chance", ge=0
    )
    min_slice_rows: int = key(500, "judged rows that a slice must have to guard", ge=2)
    max_ece_rise: float = key(0.02, "the calibration error may rise by no more than this", ge=0)
    min_rows: int = key(1000, "judged rows without which nothing is promoted", ge=2)


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """When a challenger is trained, on what, and how it is judged."""

    now: str | None = key(None, "instant of the decision; null = end of the newest monitored window")
    monitor: str | None = key(None, "monitoring run to decide on; null = the newest of this name")
    replay: str | None = key(None, "decision.json to decide again from its own evidence; nothing is trained or moved")
    triggers: tuple[str, ...] = key(
        ("drift", "performance", "age"),
        "what starts a retrain",
        choices=("always", "drift", "performance", "age", "volume"),
    )
    drift_windows: int = key(1, "windows in a row that must be in alarm", ge=1)
    performance_drop: float = key(
        0.01, "loss of the watched metric against the champion's own judged or tested figure that is too much", ge=0
    )
    max_age: str = key("100d", "age of the champion's newest training row that is too old", parse=units.span)
    min_new_rows: int = key(10_000, "new labelled rows since the champion that are worth a retrain", ge=1)
    cool_down: str = key("45d", "no retrain starts within this time of the last one", parse=units.span)
    budget: int | None = key(None, "most retrains that may start within budget_period; null = any number", ge=1)
    budget_period: str = key("365d", "length of time that the budget is for", parse=units.span)
    window: str = key("expanding", "rows that a challenger is trained on", choices=("expanding", "sliding"))
    window_length: str = key("90d", "length of a sliding window", parse=units.span)
    valid_length: str = key("7d", "newest part of the window, for early stopping; 0d = none", parse=units.span)
    judge_length: str = key("14d", "latest mature rows, which neither model saw, for the judgement", parse=units.span)
    maturity: str | None = key(
        None, "age at which a row's label is expected; null = by when 95 % of labels arrive", parse=units.span
    )
    start: str = key("scratch", "where weights start", choices=("scratch", "champion"))
    resume: str = key("auto", "continue an unfinished run of the same plan", choices=("auto", "never"))
    gate: GateConfig = section(GateConfig, "when the challenger wins")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """One way to decide in a backtest: differences from `retrain`."""

    triggers: tuple[str, ...] = key(
        (), "what starts a retrain; empty = nothing", choices=("always", "drift", "performance", "age", "volume")
    )
    window: str | None = key(None, "null = as retrain.window", choices=("expanding", "sliding"))
    window_length: str | None = key(None, "null = as retrain.window_length", parse=units.span)
    cool_down: str | None = key(None, "null = as retrain.cool_down", parse=units.span)
    budget: int | None = key(None, "null = as retrain.budget", ge=1)
    drift_windows: int | None = key(None, "null = as retrain.drift_windows", ge=1)
    performance_drop: float | None = key(None, "null = as retrain.performance_drop", ge=0)


def default_policies() -> dict[str, PolicyConfig]:
    """The four that every backtest compares. A champion that nothing alarms about may still grow old."""
    return {
        "never": PolicyConfig(),
        "every": PolicyConfig(triggers=("always",), cool_down="0s"),
        "drift": PolicyConfig(triggers=("drift", "age")),
        "performance": PolicyConfig(triggers=("performance", "age")),
    }


@dataclass(frozen=True, kw_only=True)
class BacktestConfig:
    """The past, period by period, as it would have been known then."""

    start: str | None = key(
        None, "first day that is scored; the first model is trained on what is before; null = split.valid's"
    )
    stop: str | None = key(None, "end of the last period, excluded; null = the last event")
    period: str = key("month", "length of a period: month, or a span like 7d")
    policies: dict[str, PolicyConfig] = key(
        factory=default_policies,
        parse=names.folder,
        help="policies by name; those that are given are all that run, and one named as a default only changes it",
    )
    confidence: float = key(0.95, "coverage of the intervals in the report", gt=0, lt=1)
    resume: str = key("auto", "continue an unfinished run of the same plan", choices=("auto", "never"))

    def __post_init__(self) -> None:
        if self.period != "month":
            units.span(self.period)


# ------------------------------------------------------------------------------------------------------- runtime


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who does the work."""

    kind: str = key("local", "in this process, or Ray", choices=("local", "ray"))
    workers: int = key(1, "training or scoring workers", ge=1)
    threads: int = key(0, "compute threads of each worker; 0 = cores shared out", ge=0)
    gpus_per_worker: float = key(0, "GPUs of each worker", ge=0)
    address: str | None = key(None, "null = the job's own cluster or a new local one; auto; host:port")
    timeout: str = key("60s", "how long a silent worker is waited for before its work goes to others", parse=units.span)
    stall: str = key("10min", "how long a command goes on when nothing is done at all; then it ends", parse=units.span)
    min_workers: int = key(0, "workers that an attempt may go on with when the cluster shrank; 0 = all", ge=0)
    retries: int = key(3, "attempts after the first one failed", ge=0)
    dashboard: bool = key(False, "Ray's dashboard on a local cluster (loopback only)")
    upload_limit: str = key("100MB", "largest working folder that `submit` uploads", parse=units.size)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Who watches."""

    kind: str = key("off", "mirror of the metrics", choices=("off", "wandb"))
    project: str = key("engine", "W&B project")
    entity: str | None = key(None, "W&B entity")
    mode: str = key("auto", "auto = online where WANDB_API_KEY is set", choices=("auto", "online", "offline"))
    group: str | None = key(None, "group of runs in the tracker; null = the name of the experiment")
    tags: tuple[str, ...] = key((), "tags of the run in the tracker")
    rows: bool = key(False, "send the rows of data that a model's bundle holds (gate, samples); else by reference")
    timeout: str = key("60s", "how long the mirror may take to open, or to finish after the run", parse=units.span)


def is_address(text: str) -> bool:
    """Whether a path is an address such as s3://bucket/runs, also where a path library has made s3:/bucket/runs of it."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", text))


def posix_path(text: str) -> None:
    """Raise UserError for an address such as s3://bucket/runs."""
    if is_address(text):
        raise UserError(
            f"runs, store and registry must lie on a POSIX path, found {text!r}: they are renamed and locked there, and a "
            "promotion needs a lock or a conditional put, which obstore has but the engine does not depend on. Take a shared "
            "file system; `score.output` may be s3://"
        )


PLACE = "not given: beside the folder of --config-dir (in it where it is the working directory or holds one already)"


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where files go: relative to where the command is started. Without a value they lie beside the folder of --config-dir."""

    store: str = key("store", f"datasets and features; {PLACE}", parse=posix_path)
    runs: str = key("runs", f"run directories and the registry; {PLACE}", parse=posix_path)
    mode: str = key(
        "auto",
        "who may read what is written: private = the user alone (0600, folders 0700), umask = as the process has it, "
        "auto = private where columns are sensitive",
        choices=("auto", "private", "umask"),
    )


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What a process may use."""

    memory: str | int = key(
        "4GB", "memory that ingest and features may fill; a row of the data may take an eighth of it", parse=units.size
    )
    threads: int = key(0, "compute threads; 0 = all cores", ge=0)
    query: str = key("1h", "how long the next rows of a SQL query may take; then it is interrupted", parse=units.span)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole config."""

    name: str = key("unnamed", "name of the experiment: runs go to runs/<command>/<name>/")
    data: DataConfig = section(DataConfig)
    split: SplitConfig = section(SplitConfig)
    features: FeaturesConfig = section(FeaturesConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    score: ScoreConfig = section(ScoreConfig)
    monitor: MonitorConfig = section(MonitorConfig)
    registry: RegistryConfig = section(RegistryConfig)
    retrain: RetrainConfig = section(RetrainConfig)
    backtest: BacktestConfig = section(BacktestConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    paths: PathsConfig = section(PathsConfig)
    resources: ResourcesConfig = section(ResourcesConfig)
    trust: str | None = key(
        None, "digest of code or remote places from elsewhere that may be used here (the refusal names it)"
    )

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"name must be letters, digits, dot, dash or underscore, found {self.name!r}")
        if self.data.columns:
            _check_features(self.data, self.features)
            for period in ("train", "valid", "test"):
                bounds = getattr(self.split, period)
                if bounds:
                    _located(f"split.{period}", units.between, bounds, self.data.time_zone)
            _check_split(self.split, self.data.time_zone)
            partition = [self.score.partition] if self.score.partition else []
            for column in (*self.evaluate.slices, *self.score.columns, *partition):
                if column not in self.data.columns:
                    raise UserError(f"{column!r} is no column of data.columns.{nearest(column, self.data.columns)}")
        for where, text in (("split.known_by", self.split.known_by), ("retrain.now", self.retrain.now)):
            if text is not None:
                _located(where, units.instant, text, self.data.time_zone)
        if self.score.between:
            _located("score.between", units.between, self.score.between, self.data.time_zone)
        if self.monitor.window:
            _located("monitor.window", units.window, self.monitor.window, self.data.time_zone)


def _located(where: str, check: object, *arguments: object) -> None:
    try:
        check(*arguments)  # type: ignore[operator]
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _check_split(split: SplitConfig, zone: str) -> None:
    names = [name for name in ("train", "valid", "test") if getattr(split, name)]
    for earlier, later in itertools.pairwise(names):
        stop, start = units.between(getattr(split, earlier), zone)[1], units.between(getattr(split, later), zone)[0]
        if start < stop:
            raise UserError(
                f"split.{later} must start when split.{earlier} has ended ({getattr(split, earlier)[1]}), "
                f"found {getattr(split, later)[0]}"
            )


def _check_features(data: DataConfig, features: FeaturesConfig) -> None:
    """Every name resolves, and no direct feature is known later than the decision."""
    if features.as_of is None and (features.direct_columns or features.active_views or features.calendar):
        raise UserError("features.as_of must say when the decision is taken, as in `scheduled - 1h`")
    if features.as_of is not None:
        anchor, _ = units.moment(features.as_of)
        _time_column(data, anchor, "features.as_of")
    for name in features.direct_columns:
        _known_column(data, name, f"features.direct.{name}")
        check_known_by_decision(data, features, name, f"features.direct.{name}")
    for name, calendar in features.calendar.items():
        _time_column(data, calendar.column, f"features.calendar.{name}.column")
        check_known_by_decision(data, features, calendar.column, f"features.calendar.{name}.column")
    for name, view in features.active_views.items():
        _check_view(data, features, name, view)


def _known_column(data: DataConfig, name: str, where: str) -> None:
    if name not in data.columns:
        raise UserError(f"{where} names {name!r}, which is no column of data.columns.{nearest(name, data.columns)}")


def _time_column(data: DataConfig, name: str, where: str) -> None:
    _known_column(data, name, where)
    if not data.columns[name].type.startswith("timestamp"):
        raise UserError(f"{where} names {name!r}, which must be a timestamp, found {data.columns[name].type!r}")


def check_known_by_decision(data: DataConfig, features: FeaturesConfig, name: str, where: str) -> None:
    """Raise UserError, naming both times, when a column of the row is known later than the decision."""
    _known_column(data, name, where)
    known_at = data.columns[name].known_at
    if known_at is None:
        raise UserError(
            f"{where}: column {name!r} must say when it becomes known (data.columns.{name}.known_at); "
            "write `prior` if it is known long before, as a schedule or a static attribute is"
        )
    if known_at == "prior":
        return
    known, decision = units.moment(known_at), units.moment(features.as_of or "")
    if known[0] != decision[0]:
        raise UserError(
            f"{where}: {name!r} is known at `{known_at}` and the decision is taken at `{features.as_of}`: times of two "
            f"columns, which cannot be compared. If {name!r} is known by the decision in every row, declare it as "
            f"`data.columns.{name}.known_at: {features.as_of}`, or as `prior`; else use it in a windows view (past rows "
            f"only), or decide at a moment of {known[0]!r} (features.as_of)"
        )
    if known[1] > decision[1]:
        raise UserError(
            f"{where} leaks the future: {name!r} is known at `{known_at}`, after the decision at `{features.as_of}`. "
            f"Use it in a windows view (past rows only), or move features.as_of"
        )


def known_by_decision(data: DataConfig, features: FeaturesConfig, name: str) -> bool:
    """Whether every row has the column's value by its decision."""
    known_at = data.columns[name].known_at
    if known_at in (None, "prior") or features.as_of is None:
        return known_at == "prior"
    known, decision = units.moment(known_at or ""), units.moment(features.as_of)
    return known[0] == decision[0] and known[1] <= decision[1]


def _check_view(data: DataConfig, features: FeaturesConfig, name: str, view: ViewConfig) -> None:
    where = f"features.views.{name}"
    for key_, columns in (("entity", view.entity), ("inputs", view.inputs)):
        for column in columns:
            check_known_by_decision(data, features, column, f"{where}.{key_}")
    check_view_names(data, where, view)


def check_view_names(data: DataConfig, where: str, view: ViewConfig) -> None:
    """Raise UserError for a name in a view that leads nowhere, and for a column that does not say when it is known."""
    for column in (*view.entity, *view.inputs):
        _known_column(data, column, where)
    if view.kind == "windows":
        _check_windows(data, where, view)
    if view.kind == "asof":
        _check_asof(data, where, view)


def _key_family(kind: str) -> str:
    """What keys of a type are compared with: integers with integers, floats with floats, anything else with its like."""
    name = kind.replace(" ", "")
    return re.sub(r"^u?int\d+$", "integer", re.sub(r"^float\d+$", "float", name))


COUNTABLE = ("bool", "int", "uint", "float", "decimal")


def _check_windows(data: DataConfig, where: str, view: ViewConfig) -> None:
    for column in view.aggregates:
        if column == "rows":
            continue
        _known_column(data, column, f"{where}.aggregates")
        if data.columns[column].known_at is None:
            raise UserError(
                f"{where}: column {column!r} must say when it becomes known (data.columns.{column}.known_at)"
            )
        if not data.columns[column].type.startswith(COUNTABLE):
            raise UserError(
                f"{where}.aggregates: column {column!r} must be a number or a truth value, found type "
                f"{data.columns[column].type}; the rows themselves are counted by `rows: [count]`"
            )


def _check_asof(data: DataConfig, where: str, view: ViewConfig) -> None:
    if view.table not in data.tables:
        raise UserError(
            f"{where}.table names {view.table!r}, which is no table of data.tables."
            f"{nearest(str(view.table), data.tables)}"
        )
    table = data.tables[view.table]
    if len(view.on) not in (0, len(view.entity)):
        raise UserError(f"{where}.on must name as many columns as entity ({len(view.entity)}), found {len(view.on)}")
    for column in (*view.columns, *(view.on or view.entity)):
        if column not in table.columns:
            raise UserError(
                f"{where} names {column!r}, which is no column of data.tables.{view.table}."
                f"{nearest(column, table.columns)}"
            )
    for column, other in zip(view.entity, view.on or view.entity, strict=True):
        kinds = data.columns[column].type, table.columns[other].type
        if _key_family(kinds[0]) != _key_family(kinds[1]):
            raise UserError(
                f"{where} matches {column!r} ({kinds[0]}) with {other!r} of data.tables.{view.table} ({kinds[1]}): keys must be "
                "of one type. Declare both as the same"
            )
    for column in view.columns:
        if table.columns[column].known_at is None and not table.static:
            raise UserError(
                f"{where}: column {column!r} of table {view.table!r} must say when it becomes known "
                f"(data.tables.{view.table}.columns.{column}.known_at), or the table must be `static: true`"
            )


# ------------------------------------------------------------------------------------------------------- digests

# Keys that must not change what comes out; the plan digest leaves them out.
IMMATERIAL = (
    "cluster", "tracking", "paths", "resources", "trust", "train.resume", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_every", "score.resume", "score.unit_rows", "score.tries", "score.features",
)  # fmt: skip


def without(values: dict[str, object], dotted: tuple[str, ...]) -> dict[str, object]:
    """A copy of nested dicts without the dotted keys."""
    copy = {name: without(item, ()) if isinstance(item, dict) else item for name, item in values.items()}
    for path in dotted:
        *parents, last = path.split(".")
        node: object = copy
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    return copy
