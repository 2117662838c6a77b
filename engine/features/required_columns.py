"""The columns that a row must have to be scored: those known at its decision that some feature needs, not its outcome.

A file to be scored may lack the target, the weight, and every other column that is known only after the decision or that no
feature needs; they are not checked either. Such values are null, so no window uses an outcome that is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pyarrow as pa

from engine.config.leak_guard import known_by_decision
from engine.config.sections.data import PLACE, DataConfig, SourceConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.tree import Config
from engine.data import query
from engine.data.arrow_types import schema_of
from engine.data.columns import MissingColumnError
from engine.data.dataset import Dataset
from engine.data.files import event_source
from engine.data.make_dataset import ensure_dataset
from engine.data.places import place_columns
from engine.errors import UserError
from engine.features.spec import event_inputs, row_inputs
from engine.runtime.run import Run


def demanded(data: DataConfig, features: FeaturesConfig, passed: Iterable[str] = ()) -> list[str]:
    """Columns of the event table that every row to be scored must have, in declared order; `passed` go to the output."""
    needed = {*data.ids, data.event_time, *row_inputs(data, features), *passed}
    needed |= set() if data.timed else set(place_columns(data))
    needed |= {data.known_time} if data.known_time else set()
    needed |= {name for name in event_inputs(data, features) if known_by_decision(data, features, name)}
    needed -= set(data.with_role("target", "weight")) - set(row_inputs(data, features)) - set(passed)
    return [name for name in data.columns if name in needed]


def for_scoring(data: DataConfig, features: FeaturesConfig, passed: Iterable[str] = ()) -> DataConfig:
    """The data specification that requires only the columns needed for scoring. Raises UserError."""
    wanted = demanded(data, features, passed)
    columns = {
        name: column
        if name in wanted
        else dataclasses.replace(column, nullable=True, on_violation="null", max_null_rate=None, max_null_change=None)
        for name, column in data.columns.items()
    }
    sources = {name: _relaxed(source, _read_of(name, data, wanted)) for name, source in data.sources.items()}
    return dataclasses.replace(data, columns=columns, sources=sources)


def _read_of(source: str, data: DataConfig, wanted: list[str]) -> set[str]:
    """Columns of a source that the wanted columns of the events, or a side table, are computed from."""
    declared = data.sources[source].columns
    if source in data.tables or any(table.query is not None for table in data.tables.values()):
        for_tables = _read_by_tables(source, data)
    else:
        for_tables = set()
    if data.query is None:
        of_events = set(wanted) if source == event_source(data) else set()
    else:
        given = [name for name in wanted if name != PLACE]
        of_events = query.columns_read(data.query, _types(data), given, "data.query").get(source, set())
    return (for_tables | of_events) & set(declared)


def _read_by_tables(source: str, data: DataConfig) -> set[str]:
    found: set[str] = set()
    for name, table in data.tables.items():
        if table.query is None:
            found |= set(table.columns) if name == source else set()
        else:
            where = f"data.tables.{name}.query"
            found |= query.columns_read(table.query, _types(data), list(table.columns), where).get(source, set())
    return found


def _types(data: DataConfig) -> dict[str, pa.Schema]:
    return {
        name: schema_of({column: item.type for column, item in source.columns.items()})
        for name, source in data.sources.items()
    }


def _relaxed(source: SourceConfig, read: set[str]) -> SourceConfig:
    columns = {
        name: column
        if name in read
        else dataclasses.replace(column, missing="null", nullable=True, on_violation="null")
        for name, column in source.columns.items()
    }
    return dataclasses.replace(source, columns=columns)


def needed_error(error: MissingColumnError, config: Config, passed: Iterable[str] = ()) -> UserError:
    """The error for a file that lacks a column needed for scoring."""
    names = ", ".join(name for name in demanded(config.data, config.features, passed) if name != PLACE)
    return UserError(f"{error.fact} The model needs it of every row ({names}): give the file a column of that name")


def ensure(config: Config, run: Run, passed: Iterable[str] = (), *, empty: bool = True) -> Dataset:
    """The dataset of `config.data`; a column that a file lacks and scoring does not need is null. It may have no rows only
    where `empty` is true. Raises UserError.
    """
    try:
        return ensure_dataset(config, run, empty=empty)
    except MissingColumnError as error:
        data = for_scoring(config.data, config.features, passed)
        if error.source not in data.sources or data.sources[error.source].columns[error.column].missing != "null":
            raise needed_error(error, config, passed) from None
        run.log(f"column {error.column!r} is missing in {error.file}: not needed to score, read as null")
        return ensure_dataset(dataclasses.replace(config, data=data), run, empty=empty)
