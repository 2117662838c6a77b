"""The leak guard: no column that is a feature is known later than the row's decision.

This checks declarations, before any row is read. kernels/windows.py and kernels/asof.py hold each past row to known_at < T
(an as-of view with `inclusive`: <= T).
"""

from __future__ import annotations

from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.errors import UserError, nearest


def check_column(data: DataConfig, name: str, where: str) -> None:
    """Raise UserError unless the event table has the column."""
    if name not in data.columns:
        raise UserError(f"{where} names {name!r}, which is not in data.columns.{nearest(name, data.columns)}")


def check_known_by_decision(data: DataConfig, features: FeaturesConfig, name: str, where: str) -> None:
    """Raise UserError, naming both times, when a column of the row is known later than the decision."""
    check_column(data, name, where)
    known_at = data.columns[name].known_at
    if known_at is None:
        raise UserError(
            f"{where}: column {name!r} must say when it becomes known (data.columns.{name}.known_at); "
            "write `prior` if it is known long before, like a schedule or a static attribute"
        )
    if known_at == "prior":
        return
    decision = features.decision
    if known_at.column != decision.column:
        raise UserError(
            f"{where}: {name!r} is known at `{known_at}` and the decision is taken at `{features.as_of}`: times of two "
            f"columns, which cannot be compared. If {name!r} is known by the decision in every row, declare it as "
            f"`data.columns.{name}.known_at: {features.as_of}`, or as `prior`; else use it in a windows view (past rows "
            f"only), or set features.as_of to a time relative to {known_at.column!r}"
        )
    if known_at.offset > decision.offset:
        raise UserError(
            f"{where} leaks the future: {name!r} is known at `{known_at}`, after the decision at `{features.as_of}`. "
            f"Use it in a windows view (past rows only), or move features.as_of"
        )


def known_by_decision(data: DataConfig, features: FeaturesConfig, name: str) -> bool:
    """Whether the column's value is known by the decision in every row."""
    known_at, decision = data.columns[name].known_at, features.as_of
    if known_at is None or known_at == "prior" or decision is None:
        return known_at == "prior"
    return known_at.column == decision.column and known_at.offset <= decision.offset
