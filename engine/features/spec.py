"""The features of a config, in order, and the columns that they are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.config import feature_names
from engine.config.leak_guard import check_known_by_decision
from engine.config.names import check_distinct
from engine.config.references import past_columns
from engine.config.sections.data import Column, DataConfig
from engine.config.sections.features import ROWS, AggregateConfig, CalendarConfig, FeaturesConfig, ViewConfig
from engine.config.units import Moment
from engine.data.expressions import expression_columns
from engine.errors import UserError, nearest

NUMERIC, CATEGORICAL = "numeric", "categorical"
VECTOR, SET, TEXT = "vector", "set", "text"  # kinds of features that are several numbers (features.parts)
PARTED = (VECTOR, SET, TEXT)
# Parts with few values are categories when they are not cyclic: hour 23 is not larger than hour 0.
CATEGORICAL_PARTS = ("hour", "weekday", "day", "week", "month")


@dataclass(frozen=True)
class Feature:
    """One raw feature: its name, kind (numeric, categorical, vector, set or text) and origin (`direct`, `calendar` or a view's
    name).
    """

    name: str
    kind: str
    origin: str


def column_kind(column: Column) -> str:
    """The kind of a column: by its role where that says so, else by its type."""
    if column.role in PARTED:
        return column.role
    return CATEGORICAL if column.role in ("categorical", "entity") else type_kind(column.type)


def type_kind(name: str) -> str:
    """The kind of a type by its name: texts and booleans are categories, lists of texts sets, other lists vectors."""
    if name.startswith("list<"):
        return SET if name == "list<string>" else VECTOR
    return CATEGORICAL if name.startswith(("string", "large_string", "bool")) else NUMERIC


def view_columns(name: str, view: ViewConfig, data: DataConfig) -> list[Feature]:
    """The features of one view, in the order of its spec; of windows: column, then window, then aggregate."""
    called = [feature for feature, _ in feature_names.view_features(name, view)]
    if view.kind == "windows":
        derived = [type_kind(item.type) for item in view.derive.values()]
        kinds = [NUMERIC] * (len(called) - len(derived)) + derived
    elif view.kind == "asof":
        table = data.tables[view.table or ""]
        kinds = [column_kind(table.columns[column]) for column in view.columns]
    elif view.kind == "expression":
        kinds = [type_kind(item.type) for item in view.expressions.values()]
    else:
        kinds = [type_kind(kind) for kind in view.outputs.values()]
    return [Feature(feature, kind, name) for feature, kind in zip(called, kinds, strict=True)]


def calendar_columns(name: str, calendar: CalendarConfig) -> list[Feature]:
    """The features of one time column."""
    return [
        Feature(feature, CATEGORICAL if part in CATEGORICAL_PARTS and not calendar.cyclic else NUMERIC, "calendar")
        for feature, part in feature_names.calendar_features(name, calendar)
    ]


def feature_list(data: DataConfig, features: FeaturesConfig) -> list[Feature]:
    """Every feature of the config: direct, calendar, then views, in declared order."""
    found = [Feature(name, column_kind(data.columns[name]), "direct") for name in features.direct_columns]
    for name, calendar in features.calendar.items():
        found += calendar_columns(name, calendar)
    for name, view in features.active_views.items():
        found += view_columns(name, view, data)
    return found


def sensitive_features(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Raw features computed from a sensitive column: direct ones, those of its calendar, and those of views that read one."""
    hidden = {name for name, column in data.columns.items() if column.sensitive}
    found = [name for name in features.direct_columns if name in hidden]
    for name, calendar in features.calendar.items():
        if calendar.column in hidden - {data.event_time}:  # event times are shown
            found += [item.name for item in calendar_columns(name, calendar)]
    for name, view in features.active_views.items():
        columns = view_columns(name, view, data)
        if view.kind == "asof":
            table = data.tables[view.table or ""]
            pairs = zip(view.columns, columns, strict=True)
            found += [item.name for column, item in pairs if table.columns[column].sensitive]
        elif view.kind == "windows":
            past = past_columns(view, data)
            each = [
                (hides_past(asked, past), len(view.windows) * len(asked.aggregates)) for asked in view.asked.values()
            ]
            secret = [item for item, times in each for _ in range(times)]
            secret += [any(secret)] * len(view.derive)
            found += [item.name for item, hides in zip(columns, secret, strict=True) if hides]
        elif hidden & set(view_inputs(view, data, features.decision.column)):
            found += [item.name for item in columns]
    return found


def hides_past(asked: AggregateConfig, past: Mapping[str, Column]) -> bool:
    """Whether an aggregate is computed from values of a sensitive column."""
    return any(past[column].sensitive for column in [*value_of(asked), *condition_columns(asked)])


def value_of(asked: AggregateConfig) -> list[str]:
    """The column whose values are aggregated; none where rows are."""
    return [] if asked.of == ROWS else [asked.of]


def condition_columns(asked: AggregateConfig) -> list[str]:
    """Columns that the condition over past rows reads, sorted."""
    return [] if asked.where is None else list(expression_columns(asked.where))


def derived_from(view: ViewConfig, feature: str) -> list[str]:
    """The aggregates, by name without the view, that a derived feature reads."""
    return list(expression_columns(view.derive[feature].sql))


def past_inputs(view: ViewConfig, data: DataConfig) -> list[str]:
    """Columns of past rows (of the view's table, or of events) that the windows read."""
    columns = past_columns(view, data)
    found = [past_time(view, data), *view.keys]
    for asked in view.asked.values():
        for column in knowing(view, asked, data):
            found += [column, *known_anchor(columns[column])]
    return list(dict.fromkeys(found))


def knowing(view: ViewConfig, asked: AggregateConfig, data: DataConfig) -> list[str]:
    """Columns of a past row that must be known for it to count: its value, those of the condition, the key of its own row, and
    the keys that are known later than the row.
    """
    read = [*value_of(asked), *condition_columns(asked), *view.exclude.values(), *late_keys(view, data)]
    return list(dict.fromkeys(read))


def late_keys(view: ViewConfig, data: DataConfig) -> list[str]:
    """The columns of past rows that match the entity and may become known after the event."""
    columns, event_time = past_columns(view, data), past_time(view, data)
    moments = [(key, columns[key].known_at) for key in view.keys]
    return [
        key
        for key, moment in moments
        if not (moment is None or moment == "prior" or (moment.column == event_time and moment.offset <= 0))
    ]


def past_time(view: ViewConfig, data: DataConfig) -> str:
    """The event time of the past rows. Raises UserError for a side table without exactly one."""
    if view.table is None:
        return data.event_time
    names = [name for name, column in data.tables[view.table].columns.items() if column.role == "event_time"]
    if len(names) != 1:
        raise UserError(
            f"data.tables.{view.table}.columns must have exactly one with role event_time, or the table be `static: true`; "
            f"found {names}"
        )
    return names[0]


def view_inputs(view: ViewConfig, data: DataConfig, decided: str) -> list[str]:
    """Columns of the event table that decide a view's values; `decided` is the column of the decision time."""
    if view.kind == "expression":
        return sorted({column for item in view.expressions.values() for column in expression_columns(item.sql)})
    if view.kind == "function":
        return list(dict.fromkeys(view.inputs))
    columns = [data.event_time, decided, *view.entity, *view.exclude]
    return list(
        dict.fromkeys([*columns, *(past_inputs(view, data) if view.kind == "windows" and not view.table else [])])
    )


def known_moments(view: ViewConfig, data: DataConfig) -> list[Moment]:
    """The times, other than that of the event, that place a past row in the windows of a view; none when `by` is event."""
    if view.by != "known":
        return []
    columns = past_columns(view, data)
    found = [columns[column].known_at for asked in view.asked.values() for column in knowing(view, asked, data)]
    return sorted({moment for moment in found if moment is not None and moment != "prior"})


def known_anchor(column: Column) -> list[str]:
    """The time column that says when a value is known; none for `prior`."""
    return [] if column.known_at is None or column.known_at == "prior" else [column.known_at.column]


def check_expressions(data: DataConfig, features: FeaturesConfig) -> None:
    """Raise UserError unless every column that an expression reads exists and is known by the decision."""
    for name, view in features.active_views.items():
        for output, item in view.expressions.items():
            where = f"features.views.{name}.expressions.{output}"
            for column in expression_columns(item.sql, where):
                check_known_by_decision(data, features, column, where)
        check_past_sql(f"features.views.{name}", view, data)


def check_past_sql(where: str, view: ViewConfig, data: DataConfig) -> None:
    """Raise UserError unless every column that a condition over past rows reads exists and says when it becomes known, and
    every aggregate that a derived feature reads exists.
    """
    named = [(name.removeprefix("_"), f"{where}.{key}") for name, key in feature_names.view_features("", view)]
    if view.derive:
        check_distinct(named, "SQL does not tell them apart: rename an entry of aggregates", fold=True)
    aggregates = [name for name, _ in named]
    for feature, item in view.derive.items():
        key = f"{where}.derive.{feature}"
        unknown = [name for name in expression_columns(item.sql, key) if name not in aggregates[: -len(view.derive)]]
        if unknown or not derived_from(view, feature):
            found = repr(unknown[0]) if unknown else "none"
            hint = nearest(unknown[0] if unknown else "", aggregates[: -len(view.derive)])
            raise UserError(f"{key} must be computed from aggregates of the view, found {found}.{hint}")
    columns, read = past_columns(view, data), set()
    for key, sql in view.conditions_by_key.items():
        for column in expression_columns(sql, f"{where}.{key}"):
            read.add(column)
            if column not in columns:
                raise UserError(
                    f"{where}.{key} names {column!r}, which past rows do not have.{nearest(column, columns)}"
                )
            if columns[column].known_at is None:
                raise UserError(f"{where}.{key} reads {column!r}, which must say when it becomes known (known_at)")
    check_distinct(((name, f"{where}.where") for name in sorted(read)), feature_names.RENAME, fold=True)


def windows_of(features: FeaturesConfig) -> list[ViewConfig]:
    """The views in use that look back on past events of the event table."""
    return [view for view in features.active_views.values() if view.kind == "windows" and view.table is None]


def row_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of the event table that are read of the row itself; windows read the other columns of `event_inputs`."""
    columns = [features.as_of.column] if features.as_of else []
    columns += features.direct_columns
    columns += [calendar.column for calendar in features.calendar.values()]
    for view in features.active_views.values():
        own = view.kind in ("expression", "function")
        columns += view_inputs(view, data, features.decision.column) if own else [*view.entity, *view.exclude]
    return list(dict.fromkeys(columns))


def history_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of past events that windows read; empty without windows."""
    return list(dict.fromkeys(column for view in windows_of(features) for column in past_inputs(view, data)))


def event_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of the event table that decide any feature."""
    columns = list(features.direct_columns)
    columns += [calendar.column for calendar in features.calendar.values()]
    for view in features.active_views.values():
        columns += view_inputs(view, data, features.decision.column)
    return list(dict.fromkeys(columns))


def trailing_features(config: FeaturesConfig, features: Iterable[Feature]) -> set[str]:
    """Names of the features of trailing windows, which smear a day over those after it."""
    windows = {name for name, view in config.active_views.items() if view.kind == "windows"}
    return {feature.name for feature in features if feature.origin in windows}
