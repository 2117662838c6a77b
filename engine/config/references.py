"""Checks that the columns and tables named by features and views exist and have suitable types."""

from __future__ import annotations

import re

from engine.config.leak_guard import check_column, check_known_by_decision
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig, ViewConfig
from engine.errors import UserError, nearest


def check_features(data: DataConfig, features: FeaturesConfig) -> None:
    """Raise UserError unless every name exists and every direct feature is known by the decision."""
    if features.as_of is None and (features.direct_columns or features.active_views or features.calendar):
        raise UserError("features.as_of must be the time of the decision, as in `scheduled - 1h`")
    if features.as_of is not None:
        _time_column(data, features.as_of.column, "features.as_of")
    for name in features.direct_columns:
        check_column(data, name, f"features.direct.{name}")
        check_known_by_decision(data, features, name, f"features.direct.{name}")
    for name, calendar in features.calendar.items():
        _time_column(data, calendar.column, f"features.calendar.{name}.column")
        check_known_by_decision(data, features, calendar.column, f"features.calendar.{name}.column")
    for name, view in features.active_views.items():
        _check_view(data, features, name, view)


def _time_column(data: DataConfig, name: str, where: str) -> None:
    check_column(data, name, where)
    if not data.columns[name].type.startswith("timestamp"):
        raise UserError(f"{where} names {name!r}, which must be a timestamp, found {data.columns[name].type!r}")


def _check_view(data: DataConfig, features: FeaturesConfig, name: str, view: ViewConfig) -> None:
    where = f"features.views.{name}"
    for key_, columns in (("entity", view.entity), ("inputs", view.inputs)):
        for column in columns:
            check_known_by_decision(data, features, column, f"{where}.{key_}")
    check_view_names(data, where, view)


def check_view_names(data: DataConfig, where: str, view: ViewConfig) -> None:
    """Raise UserError for a name in a view that does not exist, and for a column without known_at."""
    for column in (*view.entity, *view.inputs):
        check_column(data, column, where)
    if view.kind == "windows":
        _check_windows(data, where, view)
    if view.kind == "asof":
        _check_asof(data, where, view)


def _key_family(kind: str) -> str:
    """The family of a key's type: integers match integers, floats match floats, any other type only itself."""
    name = kind.replace(" ", "")
    return re.sub(r"^u?int\d+$", "integer", re.sub(r"^float\d+$", "float", name))


COUNTABLE = ("bool", "int", "uint", "float", "decimal")


def _check_windows(data: DataConfig, where: str, view: ViewConfig) -> None:
    for column in view.aggregates:
        if column == "rows":
            continue
        check_column(data, column, f"{where}.aggregates")
        if data.columns[column].known_at is None:
            raise UserError(
                f"{where}: column {column!r} must say when it becomes known (data.columns.{column}.known_at)"
            )
        if not data.columns[column].type.startswith(COUNTABLE):
            raise UserError(
                f"{where}.aggregates: column {column!r} must be a number or a boolean, found type "
                f"{data.columns[column].type}; `rows: [count]` counts rows"
            )


def _check_asof(data: DataConfig, where: str, view: ViewConfig) -> None:
    if view.table not in data.tables:
        raise UserError(
            f"{where}.table names {view.table!r}, which is not in data.tables.{nearest(str(view.table), data.tables)}"
        )
    table = data.tables[view.table]
    if len(view.on) not in (0, len(view.entity)):
        raise UserError(f"{where}.on must name as many columns as entity ({len(view.entity)}), found {len(view.on)}")
    for column in (*view.columns, *(view.on or view.entity)):
        if column not in table.columns:
            raise UserError(
                f"{where} names {column!r}, which is not a column of data.tables.{view.table}."
                f"{nearest(column, table.columns)}"
            )
    for column, other in zip(view.entity, view.on or view.entity, strict=True):
        kinds = data.columns[column].type, table.columns[other].type
        if _key_family(kinds[0]) != _key_family(kinds[1]):
            raise UserError(
                f"{where} matches {column!r} ({kinds[0]}) with {other!r} of data.tables.{view.table} ({kinds[1]}): keys must be "
                "of the same type. Declare both with one type"
            )
    for column in view.columns:
        if table.columns[column].known_at is None and not table.static:
            raise UserError(
                f"{where}: column {column!r} of table {view.table!r} must say when it becomes known "
                f"(data.tables.{view.table}.columns.{column}.known_at), or the table must be `static: true`"
            )
