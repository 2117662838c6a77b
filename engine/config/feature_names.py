"""Names of features, and checks for conflicts among users' names and with the engine's."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import plugins
from engine.config.names import check_distinct
from engine.config.references import past_columns
from engine.config.sections.data import DataConfig
from engine.config.sections.features import ROWS, CalendarConfig, FeaturesConfig, ViewConfig
from engine.config.tree import Config
from engine.errors import UserError

OUTPUT = ("row_id", "score", "model")  # columns of every output of `score`
PRIOR, NUMBER = "prior", "$number"
RENAME = (
    "To rename a column, declare it under another name in data.sources.<source>.columns with `aliases: [{0}]` (or rename it with "
    "AS in data.query), and use that name everywhere else"
)


def window_name(view: str, entry: str, aggregate: str, window: str) -> str:
    """Name of a windows feature: `origin_dep_delay_mean_2h`, or `origin_count_2h` for a count of rows."""
    aggregate = plugins.split(aggregate)[0]
    return f"{view}_{aggregate}_{window}" if entry == ROWS else f"{view}_{entry}_{aggregate}_{window}"


def calendar_features(name: str, calendar: CalendarConfig) -> Iterator[tuple[str, str]]:
    """(feature, part) of one time column, in order."""
    for part in calendar.parts:
        for wave in ("_sin", "_cos") if calendar.cyclic else ("",):
            yield f"{name}_{part}{wave}", part


def view_features(name: str, view: ViewConfig) -> Iterator[tuple[str, str]]:
    """(feature, the view's key that defines it) in the order of the spec; for windows: column, window, aggregate."""
    if view.kind == "windows":
        for entry, asked in view.asked.items():
            for window in view.windows:
                for aggregate in asked.aggregates:
                    yield (
                        window_name(name, entry, aggregate, window),
                        f"aggregates.{entry} ({plugins.split(aggregate)[0]} of {window})",
                    )
        yield from ((f"{name}_{feature}", f"derive.{feature}") for feature in view.derive)
        return
    key = {"asof": "columns", "expression": "expressions", "function": "outputs"}[view.kind]
    for column in getattr(view, key):
        yield f"{name}_{column}", f"{key}.{column}"


def features(config: FeaturesConfig) -> Iterator[tuple[str, str]]:
    """(feature, config key that defines it) of all features in use."""
    yield from ((name, f"features.direct.{name}") for name in config.direct_columns)
    for name, calendar in config.calendar.items():
        yield from (
            (feature, f"features.calendar.{name}.parts ({part})") for feature, part in calendar_features(name, calendar)
        )
    for name, view in config.active_views.items():
        yield from ((feature, f"features.views.{name}.{key}") for feature, key in view_features(name, view))


def check(config: Config) -> None:
    """Raise UserError if a name of a composed config is ambiguous, naming both of its uses.

    Only for a newly written config: a model that was trained before a rule existed keeps its specification.
    """
    data = config.data
    check_distinct(
        features(config.features),
        f"Rename the view, the calendar or the column. {RENAME}",
    )
    _check_words(data, config.features)
    _check_sql(data, config.features)


def _check_words(data: DataConfig, features: FeaturesConfig) -> None:
    """Raise UserError for columns named like a keyword of the engine where the two would be confused."""
    known = [
        column.known_at
        for columns in (data.columns, *(item.columns for item in data.tables.values()))
        for column in columns.values()
    ]
    prior = data.columns.get(PRIOR)
    if prior is not None and prior.type.startswith("timestamp") and PRIOR in known:
        raise UserError(
            "known_at: prior means `known long before`, and data.columns.prior is a time column: write `prior + 0s` where "
            f"the column is meant, and rename the column where `known long before` is. {RENAME.format(PRIOR)}"
        )
    for name, view in features.active_views.items():
        if ROWS in view.aggregates and ROWS in past_columns(view, data):
            raise UserError(
                f"features.views.{name}.aggregates.rows counts rows, and data.columns.rows is a column: rename the column. "
                f"{RENAME.format(ROWS)}"
            )
    for name in (*data.columns, *(column for source in data.sources.values() for column in source.columns)):
        if name == NUMBER:
            raise UserError(
                f"{NUMBER} is reserved by the engine, found it as a column: rename it. {RENAME.format(NUMBER)}"
            )
    event_time = data.event_time if data.columns else ""
    if event_time in OUTPUT:
        raise UserError(
            f"data.columns.{event_time} has role event_time and is copied to every output of `score`, which has another "
            f"column {event_time!r}: rename the column. {RENAME.format(event_time)}"
        )


def _check_sql(data: DataConfig, features: FeaturesConfig) -> None:
    """Raise UserError for names that SQL cannot distinguish: `Amount` and `amount` are the same column there."""
    asked = data.query is not None or any(table.query is not None for table in data.tables.values())
    if asked:
        check_distinct(
            ((name, f"data.sources.{name}") for name in data.sources), "Rename one of the sources", fold=True
        )
        for name, source in data.sources.items():
            where = f"data.sources.{name}.columns"
            check_distinct(((column, f"{where}.{column}") for column in source.columns), RENAME, fold=True)
    views = features.active_views.values()
    if data.rules or any(view.kind == "expression" or view.conditions for view in views):
        check_distinct(((column, f"data.columns.{column}") for column in data.columns), RENAME, fold=True)
