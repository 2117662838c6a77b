"""The features of a config, in order, and the columns that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import feature_names
from engine.config.leak_guard import check_known_by_decision
from engine.config.sections.data import Column, DataConfig
from engine.config.sections.features import CalendarConfig, FeaturesConfig, ViewConfig
from engine.config.units import Moment
from engine.data.expressions import expression_columns

NUMERIC, CATEGORICAL = "numeric", "categorical"
# Parts with few values are categories when they are not cyclic: hour 23 is not larger than hour 0.
CATEGORICAL_PARTS = ("hour", "weekday", "day", "week", "month")


@dataclass(frozen=True)
class Feature:
    """One raw feature: its name, kind (numeric or categorical) and origin (`direct`, `calendar` or a view's name)."""

    name: str
    kind: str
    origin: str


def column_kind(column: Column) -> str:
    """The kind of a column: declared categories, text and booleans are categorical; everything else is numeric."""
    return CATEGORICAL if column.role in ("categorical", "entity") else type_kind(column.type)


def type_kind(name: str) -> str:
    """The kind of a type by its name."""
    return CATEGORICAL if name.startswith(("string", "large_string", "bool")) else NUMERIC


def view_columns(name: str, view: ViewConfig, data: DataConfig) -> list[Feature]:
    """The features of one view, in the order of its spec; of windows: column, then window, then aggregate."""
    called = [feature for feature, _ in feature_names.view_features(name, view)]
    if view.kind == "windows":
        kinds = [NUMERIC] * len(called)
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
            each = [(column, len(view.windows) * len(wanted)) for column, wanted in view.aggregates.items()]
            read = [column for column, times in each for _ in range(times)]
            found += [item.name for column, item in zip(read, columns, strict=True) if column in hidden]
        elif hidden & set(view_inputs(view, data, features.decision.column)):
            found += [item.name for item in columns]
    return found


def view_inputs(view: ViewConfig, data: DataConfig, decided: str) -> list[str]:
    """Columns of the event table that decide a view's values; `decided` is the column of the decision time."""
    if view.kind == "expression":
        return sorted({column for item in view.expressions.values() for column in expression_columns(item.sql)})
    if view.kind == "function":
        return list(dict.fromkeys(view.inputs))
    columns = [data.event_time, decided, *view.entity]
    for column in view.aggregates:
        if column != "rows":
            columns += [column, *known_anchor(data.columns[column])]
    return list(dict.fromkeys(columns))


def known_moments(view: ViewConfig, data: DataConfig) -> list[Moment]:
    """The times, other than that of the event, that place an event in the windows of a view; none when `by` is event."""
    if view.by != "known":
        return []
    found = [data.columns[column].known_at for column in view.aggregates if column != "rows"]
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


def windows_of(features: FeaturesConfig) -> list[ViewConfig]:
    """The views in use that look back on past events."""
    return [view for view in features.active_views.values() if view.kind == "windows"]


def row_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of the event table that are read of the row itself; windows read the other columns of `event_inputs`."""
    columns = [features.as_of.column] if features.as_of else []
    columns += features.direct_columns
    columns += [calendar.column for calendar in features.calendar.values()]
    for view in features.active_views.values():
        own = view.kind in ("expression", "function")
        columns += view_inputs(view, data, features.decision.column) if own else view.entity
    return list(dict.fromkeys(columns))


def history_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of past events that windows read; empty without windows."""
    columns = []
    for view in windows_of(features):
        values = [column for column in view.aggregates if column != "rows"]
        columns += [data.event_time, *view.entity, *values]
        columns += [anchor for column in values for anchor in known_anchor(data.columns[column])]
    return list(dict.fromkeys(columns))


def event_inputs(data: DataConfig, features: FeaturesConfig) -> list[str]:
    """Columns of the event table that decide any feature."""
    columns = list(features.direct_columns)
    columns += [calendar.column for calendar in features.calendar.values()]
    for view in features.active_views.values():
        columns += view_inputs(view, data, features.decision.column)
    return list(dict.fromkeys(columns))
