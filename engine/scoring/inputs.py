"""Inputs of a scoring run: the dataset of its config, or `score.input` with the history for its windows.

Rows of `score.input` become a dataset in the run directory, by the same path as any dataset: typed, checked, quarantined,
in order. They are not added to the store.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import schema
from engine.config import units as spans
from engine.config.sections.data import DataConfig
from engine.config.sections.features import ViewConfig
from engine.config.tree import Config
from engine.data import order
from engine.data.columns import MissingColumnError
from engine.data.dataset import Dataset, find_dataset, newest_dataset, row_ids
from engine.data.duplicates import RepeatedIdsError
from engine.data.files import SKIP, event_source
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import instants, required_columns
from engine.features.past import row_ranges
from engine.features.spec import history_inputs, windows_of
from engine.runtime import recorded_paths, records, remote, storage
from engine.runtime.run import Run, load_record
from engine.training.bundle import Bundle, SpecRecord

ALONE = "input"  # score.history: only the rows of the input


@dataclass(frozen=True)
class Inputs:
    """Rows to score, and the dataset that is history for their windows; None = only the rows themselves."""

    dataset: Dataset
    history: Dataset | None = None


def read_inputs(config: Config, run: Run, bundle: Bundle, passed: tuple[str, ...]) -> Inputs:
    """The rows to score, and their history. Raises UserError."""
    try:
        return _read_inputs(config, run, bundle, passed)
    except RepeatedIdsError as error:  # data.duplicates is part of the model: another value would be refused
        raise UserError(
            f"{error.fact}. Scoring keeps data.duplicates={config.data.duplicates} of the model's training: remove repeated "
            "ids, or train a model with data.duplicates=first or last"
        ) from None


def _read_inputs(config: Config, run: Run, bundle: Bundle, passed: tuple[str, ...]) -> Inputs:
    if config.score.input is None:
        return Inputs(required_columns.ensure(config, run, passed))
    history = history_of(config, run, bundle)  # checked before a long input is read
    data = input_data(config, passed)
    remote.record(Path(config.paths.store), *remote.of_data(schema.plain(data)).values())
    here = dataclasses.replace(config.paths, store=str(folder_of(run)))
    try:
        dataset = ensure_dataset(dataclasses.replace(config, data=data, paths=here), run, empty=True)
    except MissingColumnError as error:
        raise required_columns.needed_error(error, config, passed) from None
    except UserError as error:  # no row that is to be scored is left out
        error.args = (str(error).replace(SKIP.format(event_source(data)), ""),)
        raise
    lacking = [name for file in dataset.manifest["accounting"]["files"] for name in file.get("missing", ())]
    if lacking:
        run.log(f"score.input has no {', '.join(dict.fromkeys(lacking))}: not needed to score, read as null")
    return Inputs(dataset, history)


def folder_of(run: Run) -> Path:
    """The folder of the rows of `score.input` while they are scored."""
    return run.path("input")


def forget(run: Run) -> None:
    """Delete the run's copy of `score.input`."""
    shutil.rmtree(folder_of(run), ignore_errors=True)


def input_data(config: Config, passed: tuple[str, ...]) -> DataConfig:
    """The data specification with `score.input` as the event table's source, which requires only the columns that scoring
    needs. Raises UserError.
    """
    data = config.data
    try:
        name = event_source(data)
    except UserError:
        raise UserError(
            f"score.input replaces the source of the events, but data.query makes them from {', '.join(data.sources)} and "
            "data.name is none of these: set data.sources.<name>.path and leave score.input out"
        ) from None
    where, wanted = config.score.input or "", config.score
    away = "://" in where
    place = where if away else str(Path(where).expanduser().absolute())
    source = dataclasses.replace(
        data.sources[name], path=place, format="auto", hive=False, snapshot=None, refused="fail",
        endpoint=wanted.endpoint if away else None, region=wanted.region if away else None,
    )  # fmt: skip
    # Rules for a whole dataset do not apply to some rows.
    whole = {"min_rows": 0, "max_rows": None, "max_row_change": None, "freshness": None}
    moved = dataclasses.replace(data, sources={**data.sources, name: source}, **whole)  # type: ignore[arg-type]
    found = required_columns.for_scoring(moved, config.features, passed)
    columns = {
        column: dataclasses.replace(item, max_null_rate=None, max_null_change=None)
        for column, item in found.columns.items()
    }
    return dataclasses.replace(found, columns=columns)


# -------------------------------------------------------------------------------------------------------- history


def history_of(config: Config, run: Run, bundle: Bundle) -> Dataset | None:
    """The dataset that is history for `score.input`, from `score.history`; it is logged.

    Raises UserError where there is none, or where it is of another specification.
    """
    if not windows_of(bundle.features):
        return None
    if config.score.history == ALONE:
        run.warn("score.history=input: windows look back on the rows of score.input alone")
        return None
    found = stored_dataset(config, bundle)
    _check_alike(found, config)
    last = ""
    if found.rows:
        newest = found.read([found.event_time], rows=(found.rows - 1, found.rows))
        last = f", the last event at {spans.format_instant(int(instants.instants(newest.column(0))[0]))}"
    run.log(
        f"windows look back on score.input and on dataset {found.name} {found.digest[:12]} of {found.directory}: "
        f"{found.rows:,} rows{last}"
    )
    run.add_used("history", found.digest)
    run.note(history=str(found.directory.absolute()))  # where a rerun finds it
    return found


def stored_dataset(config: Config, bundle: Bundle) -> Dataset:
    """The dataset that `score.history` names, in the store or in that of the training run. Raises UserError."""
    name = config.data.name or records.read(bundle.directory / "spec.json", SpecRecord)["name"]
    stores = [Path(config.paths.store)]
    record = bundle.directory.parent / "run.json"
    if record.exists():  # a training run: its store is searched second
        stores.append(recorded_paths.store_of(load_record(record.parent)))
    folders = [storage.inside(store, "datasets", name) for store in stores]
    if config.score.history != "store":
        there = next((folder for folder in folders if folder.is_dir()), folders[0])
        return find_dataset(there, config.score.history, "score.history")
    found = next(filter(None, map(newest_dataset, folders)), None)
    if found is None:
        raise UserError(
            f"score.history must be a stored dataset of {name!r}, for the model's windows look back on past events, found "
            f"none in {' or '.join(map(str, dict.fromkeys(folders)))}. Say where it is with paths.store, make it with "
            "`ingest`, or let windows see the rows of score.input alone with score.history=input"
        )
    return found


def _check_alike(history: Dataset, config: Config) -> None:
    data = config.data
    for name in dict.fromkeys([*data.ids, *history_inputs(data, config.features)]):
        there = next((item["type"] for item in history.manifest["columns"] if item["name"] == name), None)
        if there != data.columns[name].type:
            raise UserError(
                f"the dataset that windows look back on, {history.directory}, must have column {name!r} of type "
                f"{data.columns[name].type} as the model has, found {there or 'none'}: name another with score.history"
            )


def with_past(
    rows: pa.Table,
    past: Dataset,
    data: DataConfig,
    views: list[ViewConfig],
    probes: pa.Table,
    decisions: np.ndarray,
) -> pa.Table:
    """`rows` of the input and the rows of `past` that windows of the probes, decided at int64[n] instants, may count, in dataset
    order. Of a row in both, the one in `past` counts, because it holds the outcome.
    """
    kept = [
        table.filter(_of_entities(table, probes, views))
        for range_ in row_ranges(past, data, views, decisions)
        for batch in past.batches(rows.column_names, range_)
        for table in [pa.Table.from_batches([batch])]
    ]
    known = pa.concat_tables([rows.slice(0, 0), *kept])
    again = pc.is_in(row_ids(rows, data.ids), row_ids(known, data.ids))
    together = pa.concat_tables([known, rows.filter(pc.invert(again))]).combine_chunks()
    places_ = order.sorted_rows(together, list(dict.fromkeys([data.event_time, *data.ids])))
    return together if places_ is None else together.take(pa.array(places_))


def _of_entities(table: pa.Table, probes: pa.Table, views: list[ViewConfig]) -> pa.Array:
    """bool[n]: rows whose entity some probe may have; of an entity of several columns each column is tested separately."""
    found = np.zeros(table.num_rows, bool)
    for view in views:
        mine = np.ones(table.num_rows, bool)
        for column, own in zip(view.keys, view.entity, strict=True):
            mine &= np.asarray(pc.is_in(table[column], pc.unique(probes[own])))
        found |= mine
    return pa.array(found)
