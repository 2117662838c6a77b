"""The leak guard: no feature of a row is known later than the row's decision."""

from __future__ import annotations

from engine.config import units
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
    known, decision = units.moment(known_at), units.moment(features.as_of or "")
    if known[0] != decision[0]:
        raise UserError(
            f"{where}: {name!r} is known at `{known_at}` and the decision is taken at `{features.as_of}`: times of two "
            f"columns, which cannot be compared. If {name!r} is known by the decision in every row, declare it as "
            f"`data.columns.{name}.known_at: {features.as_of}`, or as `prior`; else use it in a windows view (past rows "
            f"only), or set features.as_of to a time relative to {known[0]!r}"
        )
    if known[1] > decision[1]:
        raise UserError(
            f"{where} leaks the future: {name!r} is known at `{known_at}`, after the decision at `{features.as_of}`. "
            f"Use it in a windows view (past rows only), or move features.as_of"
        )


def known_by_decision(data: DataConfig, features: FeaturesConfig, name: str) -> bool:
    """Whether the column's value is known by the decision in every row."""
    known_at = data.columns[name].known_at
    if known_at in (None, "prior") or features.as_of is None:
        return known_at == "prior"
    known, decision = units.moment(known_at or ""), units.moment(features.as_of)
    return known[0] == decision[0] and known[1] <= decision[1]
