"""Places of rows: a hash of the ids, or of data.group, spread evenly over BLOCKS days from 1970-01-01 on.

A row's place depends on these values alone: it is the same whatever rows are beside it and in whatever file they are. Rows of
a group are in one place. Tables without an event time are in order of places, so that a share of the rows is a range, and a day
of places is a block of rows that were drawn by chance. Splits by hash are cut by the same places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.config.sections.data import PLACE, DataConfig
from engine.config.timeless import SPACE
from engine.data.arrow_types import TIMESTAMP
from engine.data.order import hashes


def place_columns(data: DataConfig) -> list[str]:
    """The columns that decide the places of rows."""
    return list(dict.fromkeys([*data.ids, *([data.group] if data.group else [])]))


def places(rows: pa.Table, ids: Sequence[str], group: str | None) -> NDArray[np.int64]:
    """int64[n] in [0, SPACE): the place of each row of a table with the columns `ids` and `group`. A row without a group is
    one by itself.
    """
    found = hashes(rows, list(ids))
    if group is not None:
        there = rows[group].is_valid().to_numpy()
        found = np.where(there, hashes(rows, [group]), found)
    # The upper 53 bits as a float64 in [0, 1) are exact, and one rounded product is the same on every machine.
    share = (found >> np.uint64(11)).astype(np.float64) / 2.0**53
    return np.minimum((share * SPACE).astype(np.int64), SPACE - 1)


def with_places(rows: pa.Table, data: DataConfig) -> pa.Table:
    """Typed rows of the event table; of one without time with their places, in the column PLACE."""
    if data.timed:
        return rows
    group = data.group if data.group in rows.column_names else None
    return rows.append_column(PLACE, pa.array(places(rows, data.ids, group)).cast(TIMESTAMP))
