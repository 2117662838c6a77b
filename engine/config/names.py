"""Names: what a feature is called, and where a user's names meet each other's and the engine's.

A name stands for one thing. `check` refuses what a person writes where it does not; where a table of the engine's own holds
both, the engine's name gives way (`free`), so that a model whose column is called `prediction` is monitored like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config.tree import CalendarConfig, Config, DataConfig, FeaturesConfig, ViewConfig

OUTPUT = ("row_id", "score", "model")  # columns of every output of `score`
PRIOR, ROWS, NUMBER = "prior", "rows", "$number"
RENAME = (
    "To rename a column, declare it under another name in data.sources.<source>.columns with `aliases: [{0}]` (or rename it with "
    "AS in data.query), and use that name everywhere else"
)


LONGEST = 200  # bytes of a folder's name; file systems take 255, and the engine adds to it


def folder(value: str | Mapping[str, object]) -> None:
    """Raise UserError unless a name, or each key of a mapping, can be that of a folder or file and of nothing else.

    Also for specifications that a bundle or a run directory brings: such a name must not lead out of the store.
    """
    for name in (value,) if isinstance(value, str) else value:
        hidden = any(ord(character) < 32 or ord(character) == 127 for character in name)
        long = len(name.encode("utf-8", "surrogatepass")) > LONGEST
        if (not name and value != "") or name.startswith(".") or "/" in name or "\\" in name or hidden or long:
            raise UserError(
                "must be names of folders, without / or \\, without a dot in front and without control characters, at most "
                f"{LONGEST} bytes long, found {name!r}: folders that begin with a dot are the engine's, and / would lead "
                "into another's"
            )


def free(name: str, taken: Collection[str]) -> str:
    """The name of something of the engine's among a user's names: as it is, or in parentheses where that is taken."""
    while name in taken:
        name = f"({name})"
    return name


def distinct(names: Iterable[str]) -> list[str]:
    """The names in order; one that came before stands in parentheses."""
    found: dict[str, None] = {}
    for name in names:
        found[free(name, found)] = None
    return list(found)


def check_distinct(named: Iterable[tuple[str, str]], way_out: str, *, fold: bool = False) -> None:
    """Raise UserError naming both origins of a name that (name, origin) pairs hold twice; `fold`: whatever the case of letters.

    `{0}` in `way_out` stands for the name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, origin in named:
        key = name.casefold() if fold else name
        if key in seen:
            before, where = seen[key]
            both = f"{name!r}" if before == name else f"{before!r} and {name!r}, which differ in case only,"
            raise UserError(
                f"a name must stand for one thing, found {both} of {where} and of {origin}. {way_out.format(name)}"
            )
        seen[key] = name, origin


# -------------------------------------------------------------------------------------------------- of features


def window_name(view: str, column: str, aggregate: str, window: str) -> str:
    """`origin_dep_delay_mean_2h`; rows themselves are counted as `origin_count_2h`."""
    return f"{view}_{aggregate}_{window}" if column == ROWS else f"{view}_{column}_{aggregate}_{window}"


def calendar_features(name: str, calendar: CalendarConfig) -> Iterator[tuple[str, str]]:
    """(feature, part) of one time column, in order."""
    for part in calendar.parts:
        for wave in ("_sin", "_cos") if calendar.cyclic else ("",):
            yield f"{name}_{part}{wave}", part


def view_features(name: str, view: ViewConfig) -> Iterator[tuple[str, str]]:
    """(feature, key of the view that asks for it) in the order of the spec; of windows: column, window, aggregate."""
    if view.kind == "windows":
        for column, aggregates in view.aggregates.items():
            for window in view.windows:
                for aggregate in aggregates:
                    yield window_name(name, column, aggregate, window), f"aggregates.{column} ({aggregate} of {window})"
        return
    key = {"asof": "columns", "expression": "expressions", "function": "outputs"}[view.kind]
    for column in getattr(view, key):
        yield f"{name}_{column}", f"{key}.{column}"


def features(config: FeaturesConfig) -> Iterator[tuple[str, str]]:
    """(feature, config key that asks for it) of everything in use."""
    yield from ((name, f"features.direct.{name}") for name in config.direct_columns)
    for name, calendar in config.calendar.items():
        yield from (
            (feature, f"features.calendar.{name}.parts ({part})") for feature, part in calendar_features(name, calendar)
        )
    for name, view in config.active_views.items():
        yield from ((feature, f"features.views.{name}.{key}") for feature, key in view_features(name, view))


# --------------------------------------------------------------------------------------------------- of a config


def check(config: Config) -> None:
    """Raise UserError, naming both, where a name of a composed config stands for two things.

    For what a person writes now: a model that was trained before a rule was made keeps its specification.
    """
    data = config.data
    check_distinct(
        features(config.features),
        f"Call the view or the calendar otherwise, or the column. {RENAME}",
    )
    _check_words(data, config.features)
    _check_sql(data, config.features)


def _check_words(data: DataConfig, features: FeaturesConfig) -> None:
    """Columns that are called like a word of the engine's where the two would be mixed up."""
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
        if ROWS in view.aggregates and ROWS in data.columns:
            raise UserError(
                f"features.views.{name}.aggregates.rows counts rows, and data.columns.rows is a column: rename the column. "
                f"{RENAME.format(ROWS)}"
            )
    for name in (*data.columns, *(column for source in data.sources.values() for column in source.columns)):
        if name == NUMBER:
            raise UserError(
                f"{NUMBER} is a name of the engine's, found it as a column: rename it. {RENAME.format(NUMBER)}"
            )
    event_time = data.event_time if data.columns else ""
    if event_time in OUTPUT:
        raise UserError(
            f"data.columns.{event_time} has role event_time, which every output of `score` repeats, and has a column "
            f"{event_time!r} of its own: rename the column. {RENAME.format(event_time)}"
        )


def _check_sql(data: DataConfig, features: FeaturesConfig) -> None:
    """Names that SQL sees: there `Amount` and `amount` are one column, and the second could not be asked for."""
    asked = data.query is not None or any(table.query is not None for table in data.tables.values())
    if asked:
        check_distinct(
            ((name, f"data.sources.{name}") for name in data.sources), "Call the source otherwise", fold=True
        )
        for name, source in data.sources.items():
            where = f"data.sources.{name}.columns"
            check_distinct(((column, f"{where}.{column}") for column in source.columns), RENAME, fold=True)
    if data.rules or any(view.kind == "expression" for view in features.active_views.values()):
        check_distinct(((column, f"data.columns.{column}") for column in data.columns), RENAME, fold=True)
