"""Point-in-time features of any entities at any instants, for users of Python and notebooks.

`history(entity_table, views, ...)` takes entity rows with times and returns their features, computed by the same code as
in training and scoring. `latest` does this for every entity at one instant.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import schema
from engine.config.compose import compose
from engine.config.feature_names import view_features
from engine.config.names import check_distinct
from engine.config.nested import Tree
from engine.config.references import check_view_names
from engine.config.sections.features import FeaturesConfig, ViewConfig
from engine.config.tree import Config
from engine.data import column_checks, frames
from engine.data.arrow_types import alike, parse_type, type_name
from engine.data.dataset import Dataset
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError, nearest
from engine.features import compute, instants, required_columns
from engine.features.past import past_events
from engine.features.spec import check_past_sql, view_columns, view_inputs
from engine.runtime.environment import threads_of
from engine.runtime.run import Run

PROBE_TIME = "__decision"
Views = str | Sequence[str] | Mapping[str, ViewConfig | Tree]  # names, or specifications by name


def source(*overrides: str, config_dir: str | None = None) -> tuple[Config, Dataset]:
    """The config and the dataset that `history` and `latest` read, from overrides such as "+experiment=flights".

    The dataset is ingested where the store lacks it. Raises UserError.
    """
    config = compose(overrides, config_dir).config
    return config, dataset_of(config)


def dataset_of(config: Config, *, scoring: bool = False) -> Dataset:
    """The dataset of a config, by a scratch run that leaves nothing in the runs folder; for `scoring` files may lack columns
    known only later, such as the target.
    """
    run = Run.create("features", config, {})
    try:
        return required_columns.ensure(config, run) if scoring else ensure_dataset(config, run)
    finally:
        run.fail(KeyboardInterrupt(), "closed")
        shutil.rmtree(run.directory, ignore_errors=True)


def history(
    entity_table: frames.Frame,
    views: Views,
    *,
    config: Config,
    dataset: Dataset,
    time: str = "time",
) -> frames.Frame:
    """`entity_table` with one more column per feature, each as of the row's `time`, in the same row order.

    entity_table: a table of pandas, Polars or Arrow; the result is of that kind, and a feature has the name that it has in
    training (`customer_amount_mean_30d`).
    views: names of views of the config (or one), or name -> view specification. The table must hold the views' entity columns
    and `time` (a timestamp of whole microseconds; without a zone it is UTC, and a null gives the features of an entity
    without history). A row of the dataset counts when it was known before `time`. Raises UserError.
    """
    given, back = frames.take("entity_table", entity_table)
    return back(_history(given, views, config, dataset, time))


def _history(entity_table: pa.Table, views: Views, config: Config, dataset: Dataset, time: str) -> pa.Table:
    chosen = _views(views, config)
    named = (
        (feature, f"views.{name}.{key}") for name, view in chosen.items() for feature, key in view_features(name, view)
    )
    check_distinct(named, "Rename the view, or retrieve the views one by one")
    _check_table(entity_table, time)
    features = schema.build(FeaturesConfig, {"as_of": PROBE_TIME})
    found: dict[str, pa.ChunkedArray] = {name: entity_table[name] for name in entity_table.column_names}
    probes = entity_table.append_column(PROBE_TIME, _whole_microseconds(entity_table[time], time))
    for name, view in chosen.items():
        if view.exclude and not any(column in probes.column_names for column in view.exclude):
            view = replace(view, exclude={})  # entities, not rows of the dataset: they have no rows of their own
        needed = _check_probes(name, view, config, entity_table)
        columns = {column: config.data.columns[column] for column in needed if column in config.data.columns}
        probes = column_checks.declared("entity_table", probes, columns, config.data.time_zone)
        events, tables = _needed(view, config, dataset, instants.instants(probes[PROBE_TIME]))
        found |= compute.view_features(name, view, config.data, features, probes, events, tables, threads_of(config))
    return pa.table(found)


def _check_table(entity_table: pa.Table, time: str) -> None:
    names = entity_table.column_names
    for column in names:
        if names.count(column) > 1 or column == PROBE_TIME:
            why = "is reserved for the decision time" if column == PROBE_TIME else "must occur once"
            raise UserError(f"entity_table's column {column!r} {why}: rename it")
    if time not in names or not pa.types.is_timestamp(entity_table.schema.field(time).type):
        raise UserError(
            f"entity_table must have a timestamp column {time!r}, found {entity_table.schema.to_string()[:200]}"
        )


def _whole_microseconds(times: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        return times.cast(pa.timestamp("us", tz="UTC"))
    except pa.ArrowInvalid:
        rounded = times.cast(pa.timestamp("us"), safe=False).cast(times.type, safe=False)
        row = pc.index(pc.not_equal(rounded, times), True).as_py()
        raise UserError(
            f"entity_table's column {name!r} must hold whole microseconds that fit 64 bits, found {times[row].value} "
            f"{times.type.unit} since 1970 in row {row}: give microseconds, rounded down"
        ) from None


def latest(
    name: str,
    config: Config,
    dataset: Dataset,
    at: int | None = None,
    entity: Mapping[str, str] | frames.Frame | None = None,
) -> frames.Frame:
    """Features of a view for every entity as of the instant `at`; the default is just after the last event.

    An Arrow table with one row per entity, sorted by it; equal in bytes to what a row decided at that instant would see offline.
    entity: column -> value of one entity; or a table of pandas, Polars or Arrow with the entities wanted, which is returned
    in its kind and order with the features. Raises UserError.
    """
    view = _views([name], config)[name]
    if not view.entity:
        raise UserError(f"view {name!r} has no entity: its values belong to a row, not to an entity")
    instant = at if at is not None else _after_last(dataset)
    if entity is not None and not isinstance(entity, Mapping):
        given, back = frames.take("entity", entity)
        return back(_history(_at(given, instant), [name], config, dataset, "as_of"))
    keys = entities(view, dataset, instant)
    for column, value in (entity or {}).items():
        if column not in view.entity:
            raise UserError(f"view {name!r} has no entity column {column!r}.{nearest(column, view.entity)}")
        wanted = column_checks.declared(
            "entity", pa.table({column: [value]}), {column: config.data.columns[column]}, config.data.time_zone
        )
        keys = keys.filter(pc.equal(keys[column], wanted[column][0]))
    return _history(_at(keys, instant), [name], config, dataset, "as_of")


def _at(keys: pa.Table, instant: int) -> pa.Table:
    """The table with a column `as_of` that holds the instant."""
    return keys.append_column("as_of", pa.array(np.full(keys.num_rows, instant), pa.timestamp("us", tz="UTC")))


def entities(view: ViewConfig, dataset: Dataset, before: int) -> pa.Table:
    """The distinct keys of events before an instant, sorted; keys with a null part are left out."""
    rows = dataset.row_range(instants.ALWAYS, before)
    seen = [
        pa.Table.from_batches([batch]).group_by(list(view.entity)).aggregate([])
        for batch in dataset.batches(list(view.entity), rows=rows)
    ]
    if not seen:
        return dataset.read(list(view.entity), rows=(0, 0))
    keys = pa.concat_tables(seen).group_by(list(view.entity)).aggregate([]).select(list(view.entity))
    return keys.drop_null().sort_by([(column, "ascending") for column in view.entity])


def _after_last(dataset: Dataset) -> int:
    if not dataset.rows:
        return 0
    return int(instants.instants(dataset.read([dataset.event_time], rows=(dataset.rows - 1, dataset.rows))[0])[0]) + 1


def _views(views: Views, config: Config) -> dict[str, ViewConfig]:
    if isinstance(views, Mapping):
        chosen = {
            name: view if isinstance(view, ViewConfig) else schema.build(ViewConfig, view, f"views.{name}")
            for name, view in views.items()
        }
        for name, view in chosen.items():
            check_view_names(config.data, f"views.{name}", view)
            check_past_sql(f"views.{name}", view, config.data)
        return chosen
    names = [views] if isinstance(views, str) else views
    for name in names:
        if name not in config.features.views:
            raise UserError(f"no view {name!r} in features.views.{nearest(name, config.features.views)}")
    return {name: config.features.views[name] for name in names}


def _check_probes(name: str, view: ViewConfig, config: Config, probes: pa.Table) -> Sequence[str]:
    """The columns of the table that the view reads. Raises UserError where one is missing."""
    keys = [*view.entity, *view.exclude]
    needed = keys if view.kind in ("windows", "asof") else view_inputs(view, config.data, PROBE_TIME)
    for column in needed:
        if column not in probes.column_names:
            raise UserError(
                f"entity_table must have column {column!r} of view {name!r}, found {', '.join(probes.column_names)}"
            )
        found, declared = probes.schema.field(column).type, parse_type(config.data.columns[column].type)
        if column in keys and not alike(found, declared):
            raise UserError(
                f"entity_table's column {column!r} must be {type_name(declared)}, as the keys of view {name!r} are, found "
                f"{type_name(found)}: give that type"
            )
    for feature in view_columns(name, view, config.data):
        if feature.name in probes.column_names:
            raise UserError(f"entity_table already has a column {feature.name!r}, which view {name!r} gives: rename it")
    return needed


def _needed(
    view: ViewConfig, config: Config, dataset: Dataset, decisions: np.ndarray
) -> tuple[pa.Table, dict[str, pa.Table]]:
    if view.kind != "windows" or view.table:
        return pa.table({}), {view.table: dataset.table(view.table)} if view.table else {}
    columns = view_inputs(view, config.data, config.data.event_time)
    return past_events(dataset, config.data, [view], decisions, columns), {}
