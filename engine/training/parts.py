"""The rows of a part that is no period: by a hash of the ids or of data.group, or by a column that names it (`split.by`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import timeless
from engine.config.tree import SPLITS, Config
from engine.data import column_checks
from engine.data.arrow_types import parse_type
from engine.data.dataset import Dataset
from engine.data.places import place_columns, places
from engine.errors import UserError
from engine.features.instants import instants
from engine.runtime.run import Run
from engine.training.row_sample import chunks


def part_rows(config: Config, dataset: Dataset, name: str) -> np.ndarray:
    """int64, ascending: the dataset rows of a part, labelled or not. Raises UserError for a value that the column cannot have."""
    data, split = config.data, config.split
    found = [np.empty(0, np.int64)]
    if split.by == "hash":
        start, stop = config.periods[f"split.{name}"]
        turn = round(split.turn.fraction * timeless.SPACE)
        for part in chunks((0, dataset.rows)):
            place = places(dataset.read(place_columns(data), rows=part), data.ids, data.group) - turn
            place = np.where(place < 0, place + timeless.SPACE, place)
            found.append(part[0] + np.flatnonzero((start <= place) & (place < stop)))
        return np.concatenate(found)
    column = split.column or ""
    values = part_values(config)[name]
    for part in chunks((0, dataset.rows)):
        mine = pc.is_in(dataset.read([column], rows=part)[0], values)
        found.append(part[0] + np.flatnonzero(np.asarray(pa.chunked_array(mine.chunks, pa.bool_()).combine_chunks())))
    return np.concatenate(found)


def part_values(config: Config) -> dict[str, pa.Array]:
    """The values of split.column that each part of split.by=column names, in the column's type.

    Raises UserError for one that the column cannot have, and for one in two parts: the same rows would be learnt and judged on.
    """
    column = config.data.columns[config.split.column or ""]
    found: dict[str, pa.Array] = {}
    for name in SPLITS:
        written = getattr(config.split, name)
        try:
            values = column_checks.allowed(
                dataclasses.replace(column, values=written), parse_type(column.type), config.data.time_zone
            )
        except UserError as error:
            raise UserError(f"split.{name}: {error}") from None
        for other, known in found.items():
            shared = np.flatnonzero(np.asarray(pc.is_in(values, known)))
            if len(shared):
                raise UserError(
                    f"split.{name} and split.{other} must have no value in common, found {written[shared[0]]!r} in both: leave "
                    "it out of one of them"
                )
        found[name] = values
    return found


def warn_of_parts(config: Config, dataset: Dataset, run: Run) -> None:
    """Warn of values of split.by=column that no row has, and of groups (data.group) that are divided among its parts."""
    column, group = config.split.column or "", config.data.group
    parts = {name: values for name, values in part_values(config).items() if len(values)}
    if not dataset.rows:
        return
    names = list(dict.fromkeys([column, *([group] if group else [])]))
    pairs = [dataset.read(names, rows=part).group_by(names).aggregate([]) for part in chunks((0, dataset.rows))]
    table = pa.concat_tables(pairs).group_by(names).aggregate([])
    inside = {name: pc.is_in(table[column], values) for name, values in parts.items()}
    for name, values in parts.items():
        there = np.asarray(pc.is_in(values, table[column].combine_chunks()))
        absent = [repr(text) for text, is_there in zip(getattr(config.split, name), there, strict=True) if not is_there]
        if absent and there.any():  # of a part without any row the next lines speak anyway
            run.warn(f"split.{name} names {', '.join(absent)}, which no row has in {column!r}")
    if group is None:
        return
    each = [table.filter(mask)[group].drop_null().unique() for mask in inside.values()]
    counts = pc.value_counts(pa.concat_arrays(each)).field("counts") if each else pa.array([], pa.int64())
    divided = int(np.sum(np.asarray(counts) > 1))
    if divided:
        run.warn(
            f"split.by=column divides {divided:,} of {len(counts):,} groups (data.group={group}): their rows are in two parts "
            "or more, so that figures promise more than a model reaches on new groups. split.by=hash divides none"
        )


def times_of(config: Config, dataset: Dataset, rows: np.ndarray) -> tuple[int, int]:
    """[from, to) of the event times of rows (int64, ascending), microseconds UTC; (0, 0) without any."""
    if not len(rows):
        return 0, 0
    first, last = (instants(dataset.take([config.data.event_time], rows[[at]])[0])[0] for at in (0, -1))
    return int(first), int(last) + 1
