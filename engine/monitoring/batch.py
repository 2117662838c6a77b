"""A batch of a table without time: the rows of one scoring run, compared with as many rows that a hash draws.

The reference has a profile of each block of places (engine/data/places.py), which are drawn by chance, each with the whole of its
groups. So a window of the reference is a number of blocks that have as many rows as the batch, and it is as good as any other.
The number of rows of a batch is not judged: nothing says how many there should be.
"""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.tree import Config
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import required_columns
from engine.monitoring.alarm_lines import ENOUGH_REAL
from engine.monitoring.performance import UNJUDGED, Outcomes
from engine.monitoring.reference import Reference
from engine.monitoring.window import Stored, Window, asked, merged, outcomes_by_target, read_stored, scores_in
from engine.runtime.run import Run
from engine.scoring.read import predictions
from engine.training.bundle import Bundle
from engine.training.row_sample import chunks

DISTANCE_WHY = "rows without a time have no days before them to be compared with"


def batch_window(config: Config, run: Run, bundle: Bundle, reference: Reference, needed: list[str]) -> Window:
    """The rows of the scoring run `monitor.run`, at the time when it was scored; their labels are found by their ids."""
    stored = read_stored(config, run, reference)
    scored = round(datetime.datetime.fromisoformat(stored.record["started"]).timestamp() * 1e6)
    outcomes, others, (quality, reason) = None, dict[str, Outcomes](), asked(config)
    if config.monitor.labels or config.monitor.business:
        try:
            outcomes, others = merged(config, labelled_by_id(config, run, bundle, stored, needed))
        except UserError as error:
            quality, reason = UNJUDGED, f"the labels of the scoring run cannot be read: {error}"
    blocks = blocks_like(reference, stored.profile.rows)
    figures = stored.figures
    return Window(
        scored, scored + 1, stored.profile, outcomes, None, figures, quality, reason, blocks=blocks, others=others
    )


def blocks_like(reference: Reference, rows: int) -> int:
    """Blocks of the reference that have about as many rows; at least 1, and so few that ENOUGH_REAL windows share no block."""
    covered = reference.covered
    each = float(reference.rows[covered].mean())
    return max(1, min(round(rows / each), int(covered.sum()) // ENOUGH_REAL))


def labelled_by_id(
    config: Config, run: Run, bundle: Bundle, stored: Stored, needed: list[str]
) -> list[dict[str, Outcomes]]:
    """Scores of the run's rows that the dataset now has, beside their labels, by target; none where it has none of them.

    A row that it lacks has no label yet: it is counted among those without, where the dataset has others.
    """
    table = predictions(stored.directory, store=config.paths.store, trust=config.trust)
    dataset = required_columns.ensure(config, run, empty=False)
    rows, places = found_by_id(dataset, config.data.ids, table["row_id"].combine_chunks())
    if not len(rows):
        return []
    found = outcomes_by_target(config, bundle, dataset, rows, scores_in(table, bundle)[places], needed)
    absent = np.setdiff1d(np.arange(len(table)), places)
    if not len(absent):
        return [found]
    scores = scores_in(table, bundle)[absent]
    return [{name: with_absent(item, bundle.heads.of(scores, k)) for k, (name, item) in enumerate(found.items())}]


def found_by_id(dataset: Dataset, ids: list[str], wanted: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(dataset rows, ascending, that have one of the wanted ids; the place of each in `wanted`)."""
    rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in chunks((0, dataset.rows)):
        place = pc.fill_null(pc.index_in(row_ids(dataset.read(ids, rows=part), ids), value_set=wanted), -1)
        place = np.asarray(place).astype(np.int64)
        there = np.flatnonzero(place >= 0)
        rows.append(part[0] + there)
        places.append(place[there])
    return np.concatenate(rows), np.concatenate(places)


def with_absent(found: Outcomes, scores: np.ndarray) -> Outcomes:
    """With the scores of rows that the dataset does not have: they have no label, and weigh 1."""
    count = len(scores)
    columns = {name: np.concatenate([values, _nothing(values, count)]) for name, values in found.columns.items()}
    weight = None if found.weight is None else np.concatenate([found.weight, np.ones(count, found.weight.dtype)])
    blocks = None
    if found.blocks is not None:
        blocks = np.concatenate([found.blocks, np.zeros(count, found.blocks.dtype)])
    return Outcomes(
        np.concatenate([found.days, np.zeros(count, found.days.dtype)]),
        np.concatenate([found.target, np.full(count, np.nan)]),
        np.concatenate([found.scores, scores]),
        columns,
        found.unknown,
        weight,
        blocks,
    )


def _nothing(values: np.ndarray, count: int) -> np.ndarray:
    return np.full(count, None if values.dtype == object else np.nan, values.dtype)
