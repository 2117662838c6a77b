"""Keys of `features`: the decision time, direct columns, calendars, views and the fitted encoding."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.config import names, units
from engine.config.schema import key, later_key, section
from engine.config.units import Moment, Span
from engine.errors import UserError, nearest
from kernels import AGGREGATES

_WITH_LENGTH = re.compile(r"(ewm_sum|ewm_mean)_(\d.*)")
_WITH_NUMBER = re.compile(r"(recency)_([1-9]\d{0,8})|(quantile)_([1-9]\d?)")
_OF_CODE = re.compile(r"[A-Za-z_]\w*(@[0-9a-f]{64})?")
_OF_ENGINE = re.compile(rf"({'|'.join(AGGREGATES)}|quantile)(_\d.*)?")  # or it would be, with another parameter
AGGREGATES_HINT = (*AGGREGATES, "recency_3", "quantile_95", "ewm_sum_6h", "ewm_mean_6h")
AGGREGATE_GROUP, FUNCTION_GROUP = "engine.aggregates", "engine.features"  # entry points of installed packages
ROWS = "rows"  # in place of a column: the rows themselves
# Parts of a time column, with the number of their values.
PARTS = {"hour": 24, "minute_of_day": 1440, "weekday": 7, "day": 31, "day_of_year": 366, "week": 53, "month": 12}


@dataclass(frozen=True, kw_only=True)
class CalendarConfig:
    """Parts (hour, weekday, ...) of a time column that is known before the decision."""

    column: str = key(help="time column")
    parts: tuple[str, ...] = key(("hour", "weekday"), "parts", choices=tuple(PARTS))
    zone: str | None = key(None, "time zone of the parts; null = data.time_zone", parse=units.zone)
    cyclic: bool = key(False, "as sine and cosine instead of one number")


@dataclass(frozen=True, kw_only=True)
class ExpressionConfig:
    """A feature computed from other columns of the same row."""

    SHORTHAND = "sql"
    sql: str = key(help="SQL expression over columns of the event table (DuckDB); one value per row")
    type: str = key("float64", "type of the value")


def aggregate_of(text: str) -> tuple[str, int]:
    """(name, parameter) of an aggregate of the engine: `recency_3` (since the third latest row), `quantile_95` (per cent),
    `ewm_mean_6h` (half-life of 6 hours, in microseconds); 0 = none. Raises UserError for an unknown one.
    """
    if text in AGGREGATES:
        return text, 0
    if match := _WITH_NUMBER.fullmatch(text):
        name, number = (part for part in match.groups() if part)
        return name, int(number)
    if match := _WITH_LENGTH.fullmatch(text):
        half_life = Span(match[2]).microseconds
        if half_life:
            return match[1], half_life
    raise UserError(f"{text!r} is no aggregate.{nearest(text, AGGREGATES_HINT)}")


def is_built_in(text: str) -> bool:
    """Whether an aggregate is one of the engine."""
    try:
        return bool(aggregate_of(text))
    except UserError:
        return False


def _check_aggregate(entry: str, name: str, of: str) -> None:
    """Raise UserError unless an aggregate is one of the engine or may be the name of a user's own, and suits what it is `of`."""
    try:
        own = _OF_CODE.fullmatch(name) and not _OF_ENGINE.fullmatch(name)
        base = name if own else aggregate_of(name)[0]
    except UserError as error:
        raise UserError(f"aggregates.{entry}: {error}") from None
    if of == ROWS and base not in ("count", "recency"):
        raise UserError(f"aggregates.{entry} must be count or recency, found {name!r}")


@dataclass(frozen=True, kw_only=True)
class AggregateConfig:
    """Aggregates of the past rows that a condition selects."""

    of: str = key("", "column of the past rows, or `rows` to count rows; empty = the name of the entry")
    where: str | None = key(
        None, "SQL condition over a past row (DuckDB); a row where it is false or null does not count"
    )
    aggregates: tuple[str, ...] = key(
        help="aggregates of the column; recency_3 = since the third latest row, quantile_95 = value that 95 % are below, "
        "ewm_mean_6h = with a half-life of 6 hours; or the name of one that a file of `plugins` defines, or an installed package "
        f"offers (entry point group {AGGREGATE_GROUP})"
    )


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """A named unit of the feature store: trailing windows over events, an as-of join with a table, SQL expressions over
    columns of the row, or a function of a plug-in file or an installed package.
    """

    kind: str = key("windows", "what the view computes", choices=("windows", "asof", "expression", "function"))
    description: str = key("", "what the view describes")
    owner: str = key("", "who is responsible for it")
    entity: tuple[str, ...] = key((), "key columns of the event table: whose history, or which row of the table")
    table: str | None = key(None, "side table that an as-of or a windows view reads; null = the events (windows)")
    on: tuple[str, ...] = key(
        (), "columns of the table (or of past events) that match the entity, in order; empty = the same names"
    )
    windows: tuple[Span, ...] = key((), "lengths of the trailing windows")
    by: str = later_key(
        "event",
        "time that must be within the window: of the event, or when its value became known",
        choices=("event", "known"),
    )
    where: str | None = later_key(
        None, "SQL condition over a past row (DuckDB): windows count only rows where it is true"
    )
    exclude: dict[str, str] = later_key(
        factory=dict,
        help="column of the event -> column of past rows: those with an equal value are the row's own, not counted",
    )
    aggregates: dict[str, tuple[str, ...] | AggregateConfig] = key(
        factory=dict, help="column -> aggregates, or name -> {of, where, aggregates}; `rows` -> [count, recency]"
    )
    derive: dict[str, ExpressionConfig] = later_key(
        factory=dict,
        help="feature -> SQL over the windows' aggregates, named without the view (amount_mean_1d / amount_mean_30d)",
    )
    columns: tuple[str, ...] = key((), "columns that an as-of view returns")
    max_age: Span | None = key(None, "largest age of a row that an as-of view accepts; null = any")
    inclusive: bool = key(False, "accept a row known exactly at the decision time")
    expressions: dict[str, ExpressionConfig] = key(factory=dict, help="feature -> SQL expression (kind expression)")
    function: str = key(
        "",
        f"function of a file of `plugins`, or of an installed package's entry-point group {FUNCTION_GROUP} (kind function)",
    )
    inputs: tuple[str, ...] = key((), "columns of the event table that the function reads")
    outputs: dict[str, str] = key(factory=dict, help="feature -> type of what the function returns")
    batch_rows: int | None = later_key(
        None, "rows of one call of a slow function, whose results are kept call by call; null = all rows at once", ge=1
    )
    retries: int = later_key(2, "further tries of a call of a slow function that failed", ge=0)
    retry_pause: Span = later_key(Span("1s"), "pause before the calls that failed are tried again")
    on_error: str = later_key(
        "fail", "rows for which a slow function failed in every try: an error, or null", choices=("fail", "null")
    )

    def __post_init__(self) -> None:
        needed = {
            "windows": ("entity", "windows", "aggregates"),
            "asof": ("entity", "table", "columns"),
            "expression": ("expressions",),
            "function": ("function", "inputs", "outputs"),
        }[self.kind]
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise UserError(
                f"a view of kind {self.kind} must have {' and '.join(needed)}; {' and '.join(missing)} is empty"
            )
        if self.batch_rows is not None and self.kind != "function":
            raise UserError(f"batch_rows is for views of kind function, found kind {self.kind}")
        if self.on_error == "null" and self.batch_rows is None:
            raise UserError("on_error=null is for functions that are called in batches: set batch_rows")
        past = {"by": self.by != "event", "where": self.where, "exclude": self.exclude, "derive": self.derive}
        unread = [name for name, value in past.items() if value]
        if unread and self.kind != "windows":
            raise UserError(f"{unread[0]} is for views of kind windows, found kind {self.kind}")
        for entry, asked in self.asked.items():
            if not asked.aggregates:
                raise UserError(f"aggregates.{entry} must name at least one aggregate, found none")
            for name in asked.aggregates:
                _check_aggregate(entry, name, asked.of)

    @property
    def asked(self) -> dict[str, AggregateConfig]:
        """The aggregates of a windows view: entry -> column, whole condition and aggregates."""
        found = {}
        for entry, item in self.aggregates.items():
            named = AggregateConfig(aggregates=item) if isinstance(item, tuple) else item
            conditions = [f"({sql})" for sql in (self.where, named.where) if sql is not None]
            found[entry] = replace(named, of=named.of or entry, where=" AND ".join(conditions) or None)
        return found

    @property
    def conditions_by_key(self) -> dict[str, str]:
        """The conditions as they are written: key of the view -> SQL."""
        found = {
            f"aggregates.{entry}.where": item.where
            for entry, item in self.aggregates.items()
            if isinstance(item, AggregateConfig)
        }
        return {key: sql for key, sql in {"where": self.where, **found}.items() if sql is not None}

    @property
    def conditions(self) -> list[str]:
        """The conditions over past rows."""
        return list(dict.fromkeys(asked.where for asked in self.asked.values() if asked.where is not None))

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns of the table, or of past events, that match the entity."""
        return self.on or self.entity


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How features are encoded as model input; fitted on the training split only."""

    numeric: str = key("standardise", "encoding of numbers", choices=("standardise", "quantile", "ple"))
    bins: int = key(16, "bins of a piecewise-linear encoding", ge=2, le=256)
    clip: float = key(8.0, "standardised values are clipped to this many standard deviations", gt=0)
    missing_indicator: bool = key(True, "add a 0/1 column for every numeric feature that is null in training")
    min_count: int = key(10, "categories less frequent than this in training share one code", ge=1)
    max_categories: int = key(5000, "categories beyond this many most frequent ones share that code too", ge=1)
    set_members: int = later_key(
        64,
        "members of a set that have a column of their own: the most frequent ones in training, of min_count rows",
        ge=0,
        le=4096,
    )
    text_buckets: int = later_key(256, "columns that the n-grams of a text are hashed into", ge=1, le=65_536)
    text_words: int = later_key(2, "n-grams of up to this many words; 0 = none", ge=0, le=5)
    text_characters: int = later_key(
        0, "n-grams of this many characters, for languages without blanks and for misspelt words; 0 = none", ge=0, le=10
    )

    def __post_init__(self) -> None:
        if not self.text_words + self.text_characters:
            raise UserError("text_words or text_characters must be more than 0: a text would have no n-grams")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The features of a row, as of the decision time."""

    as_of: Moment | None = key(None, "decision time: a time column with an optional lead (`scheduled - 1h`)")
    direct: dict[str, bool] = key(factory=dict, help="columns used unchanged: name -> true")
    calendar: dict[str, CalendarConfig] = key(factory=dict, help="parts of time columns by name")
    views: dict[str, ViewConfig] = key(factory=dict, help="views of the feature store by name", parse=names.folder)
    windows: bool = key(True, "false leaves out every view of kind windows")
    encode: EncodeConfig = section(EncodeConfig, "fitted encoding")

    @property
    def decision(self) -> Moment:
        """The decision time. Raises UserError where `as_of` is not given."""
        if self.as_of is None:
            raise UserError("features.as_of must say when the decision is taken, as in `scheduled - 1h`, found none")
        return self.as_of

    @property
    def active_views(self) -> dict[str, ViewConfig]:
        """The views in use."""
        return {name: view for name, view in self.views.items() if self.windows or view.kind != "windows"}

    @property
    def direct_columns(self) -> list[str]:
        """Columns used unchanged."""
        return [name for name, used in self.direct.items() if used]
