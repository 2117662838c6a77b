"""Checks that the columns and tables named by features and views exist and have suitable types."""

from __future__ import annotations

import re
from collections.abc import Mapping

from engine.config.leak_guard import check_column, check_known_by_decision
from engine.config.sections.data import TYPE_OF_ROLE, Column, DataConfig, check_single
from engine.config.sections.features import ROWS, FeaturesConfig, ViewConfig
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
        _check_list(data.columns[name], f"data.columns.{name}", f"features.direct.{name}")
    for name, calendar in features.calendar.items():
        _time_column(data, calendar.column, f"features.calendar.{name}.column")
        check_known_by_decision(data, features, calendar.column, f"features.calendar.{name}.column")
    for name, view in features.active_views.items():
        _check_view(data, features, name, view)


def _check_list(column: Column, where: str, used: str) -> None:
    """Raise UserError for a list that is a feature and does not say what it is."""
    if column.type.startswith("list<") and column.role not in TYPE_OF_ROLE:
        raise UserError(
            f"{used} is a list, which must have role vector (and a width) or role set, found role {column.role}: set {where}.role"
        )


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
    for column in view.exclude:
        if data.columns[column].known_at is not None:  # an id without it is known with its row
            check_known_by_decision(data, features, column, f"{where}.exclude")


def check_view_names(data: DataConfig, where: str, view: ViewConfig) -> None:
    """Raise UserError for a name in a view that does not exist, and for a column without known_at."""
    for column in (*view.entity, *view.inputs):
        check_column(data, column, where)
    for column in view.entity:
        check_single(data.columns[column], column, f"{where}.entity")
    if view.table is not None and view.kind not in ("windows", "asof"):
        raise UserError(f"{where}.table is read by windows and asof views only, found it in one of kind {view.kind}")
    if view.kind in ("windows", "asof"):
        _check_past(data, where, view)
        _check_keys(data, where, view, dict(zip(view.entity, view.keys, strict=True)))
    if view.kind == "windows":
        _check_windows(data, where, view)


def _key_family(kind: str) -> str:
    """The family of a key's type: integers match integers, floats match floats, any other type only itself."""
    name = kind.replace(" ", "")
    return re.sub(r"^u?int\d+$", "integer", re.sub(r"^float\d+$", "float", name))


COUNTABLE = ("bool", "int", "uint", "float", "decimal")


def past_columns(view: ViewConfig, data: DataConfig) -> dict[str, Column]:
    """Columns of the rows that the view looks back on: of its table, or of past events."""
    return data.columns if view.table is None else data.tables[view.table].columns


def _check_windows(data: DataConfig, where: str, view: ViewConfig) -> None:
    columns, there = past_columns(view, data), _past_name(view)
    if view.table is not None and data.tables[view.table].static:
        raise UserError(f"{where}.table must have times, found {view.table!r}, which is `static: true`: read it as of")
    for asked in view.asked.values():
        if asked.of == ROWS:
            continue
        _check_past_column(view, data, asked.of, f"{where}.aggregates")
        if columns[asked.of].known_at is None:
            raise UserError(
                f"{where}: column {asked.of!r} must say when it becomes known ({there}.{asked.of}.known_at)"
            )
        if not columns[asked.of].type.startswith(COUNTABLE):
            raise UserError(
                f"{where}.aggregates: column {asked.of!r} must be a number or a boolean, found type "
                f"{columns[asked.of].type}; `rows: [count]` counts rows"
            )
    for column in view.on if view.table is None else ():
        if columns[column].known_at is None:
            raise UserError(f"{where}.on: column {column!r} must say when it becomes known ({there}.{column}.known_at)")
    for column in view.exclude:
        check_column(data, column, f"{where}.exclude")
        check_single(data.columns[column], column, f"{where}.exclude")
    _check_keys(data, f"{where}.exclude", view, view.exclude)


def _past_name(view: ViewConfig) -> str:
    return "data.columns" if view.table is None else f"data.tables.{view.table}.columns"


def _check_past_column(view: ViewConfig, data: DataConfig, column: str, where: str) -> None:
    columns = past_columns(view, data)
    if column not in columns:
        raise UserError(f"{where} names {column!r}, which is not in {_past_name(view)}.{nearest(column, columns)}")


def _check_keys(data: DataConfig, where: str, view: ViewConfig, pairs: Mapping[str, str]) -> None:
    """Raise UserError unless the columns that are matched, of the event -> of past rows, exist and have the same type."""
    for column, other in pairs.items():
        _check_past_column(view, data, other, where)
        kinds = data.columns[column].type, past_columns(view, data)[other].type
        if _key_family(kinds[0]) != _key_family(kinds[1]):
            raise UserError(
                f"{where} matches {column!r} ({kinds[0]}) with {other!r} of {_past_name(view)} ({kinds[1]}): keys must be "
                "of the same type. Declare both with one type"
            )


def _check_past(data: DataConfig, where: str, view: ViewConfig) -> None:
    if (view.table is not None or view.kind == "asof") and view.table not in data.tables:
        raise UserError(
            f"{where}.table names {view.table!r}, which is not in data.tables.{nearest(str(view.table), data.tables)}"
        )
    if len(view.on) not in (0, len(view.entity)):
        raise UserError(f"{where}.on must name as many columns as entity ({len(view.entity)}), found {len(view.on)}")
    for column in view.columns:
        _check_past_column(view, data, column, where)
        table = data.tables[view.table or ""]
        _check_list(table.columns[column], f"data.tables.{view.table}.columns.{column}", f"{where}.columns.{column}")
        if table.columns[column].known_at is None and not table.static:
            raise UserError(
                f"{where}: column {column!r} of table {view.table!r} must say when it becomes known "
                f"({_past_name(view)}.{column}.known_at), or the table must be `static: true`"
            )
