"""The past events that windows may count: which rows of a dataset hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from engine.config.sections.data import DataConfig
from engine.config.sections.features import ViewConfig
from engine.data.dataset import Dataset
from engine.features import instants
from engine.features.partitions import view_length
from engine.features.spec import known_moments

Rows = tuple[int, int]  # [start, stop)


def row_ranges(dataset: Dataset, data: DataConfig, views: Sequence[ViewConfig], decisions: np.ndarray) -> list[Rows]:
    """Ranges of rows, in order and apart, that hold every event that the windows of rows decided at int64[n] instants may
    count; a decision NEVER taken needs none.
    """
    times = decisions[decisions != instants.NEVER]
    if not views or not len(times):
        return []
    first, last = int(times.min()), int(times.max())
    lengths = [view_length(view) or 0 for view in views]
    start, stop = dataset.row_range(first - max(lengths, default=0), last)
    earlier: set[Rows] = set()
    for view, length in zip(views, lengths, strict=True):
        for moment in known_moments(view, data):
            earlier |= set(dataset.groups_reaching(moment.column, first - length - moment.offset, start))
    return [*sorted(earlier), (start, stop)]


def past_events(
    dataset: Dataset, data: DataConfig, views: Sequence[ViewConfig], decisions: np.ndarray, columns: list[str]
) -> pa.Table:
    """The columns of the rows in `row_ranges`."""
    return read_ranges(dataset, columns, row_ranges(dataset, data, views, decisions))


def read_ranges(dataset: Dataset, columns: list[str], ranges: Sequence[Rows]) -> pa.Table:
    """The columns of some ranges of rows, one after the other."""
    return pa.concat_tables([dataset.read(columns, rows) for rows in ranges or [(0, 0)]])
