"""The rows of a part that is no period: by a hash of the ids or of data.group, or by a column that names it (`split.by`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import timeless
from engine.config.tree import Config
from engine.data import column_checks
from engine.data.dataset import Dataset
from engine.data.places import place_columns, places
from engine.features.instants import instants
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
    asked = dataclasses.replace(data.columns[column], values=getattr(split, name))
    values = column_checks.allowed(asked, dataset.schema.field(column).type, data.time_zone)
    for part in chunks((0, dataset.rows)):
        mine = pc.is_in(dataset.read([column], rows=part)[0], values)
        found.append(part[0] + np.flatnonzero(np.asarray(pa.chunked_array(mine.chunks, pa.bool_()).combine_chunks())))
    return np.concatenate(found)


def times_of(config: Config, dataset: Dataset, rows: np.ndarray) -> tuple[int, int]:
    """[from, to) of the event times of rows (int64, ascending), microseconds UTC; (0, 0) without any."""
    if not len(rows):
        return 0, 0
    first, last = (instants(dataset.take([config.data.event_time], rows[[at]])[0])[0] for at in (0, -1))
    return int(first), int(last) + 1
