"""The table of raw features: views, direct and calendar features of a dataset, read by training, scoring and monitoring."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.config import schema
from engine.config.tree import Config
from engine.data.dataset import Dataset, taken
from engine.features import compute
from engine.features.spec import Feature, calendar_columns, check_expressions, feature_list
from engine.features.store import StoredView, ensure_views
from engine.runtime import digest
from engine.runtime.run import Run

BLOCK_BYTES = 64 << 20  # columns read together take about this much


@dataclass(frozen=True)
class FeatureTable:
    """Raw features of a dataset, one row per event in dataset order, read in ranges."""

    config: Config
    dataset: Dataset
    views: dict[str, StoredView]

    @property
    def features(self) -> list[Feature]:
        """The features, in column order."""
        return feature_list(self.config.data, self.config.features)

    @property
    def digest(self) -> str:
        """Content digest: views by content, direct and calendar features by the columns and rules they come from."""
        data, features = self.config.data, self.config.features
        direct = {name: self.dataset.column_digest(name) for name in features.direct_columns}
        calendar = {
            name: [schema.plain(item), self.dataset.column_digest(item.column), item.zone or data.time_zone]
            for name, item in features.calendar.items()
        }
        return digest.of_json(
            [self.dataset.rows, direct, calendar, {name: view.digest for name, view in self.views.items()}]
        )

    @property
    def failed(self) -> np.ndarray:
        """int64: the dataset rows of which a feature is null because a function failed."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(view.failed for view in self.views.values())]))

    def read(self, rows: tuple[int, int], columns: Sequence[str] | None = None) -> pa.Table:
        """Raw features of a range of rows; numbers are float64 with null for missing."""
        wanted = [feature.name for feature in self.features] if columns is None else list(columns)
        asked = set(wanted)
        found = self._direct(rows, asked)
        for view in self.views.values():
            names = [name for name in view.columns if name in asked]
            if names:
                table = view.read(names, rows)
                found.update(zip(names, table.columns, strict=True))
        return pa.table({name: found[name] for name in wanted})

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Raw features of the rows of these numbers, int64[n] ascending."""
        if not len(rows):
            return self.read((0, 0), columns)
        first = int(rows[0])
        return taken(self.read((first, int(rows[-1]) + 1), columns), rows - first)

    @staticmethod
    def columns_at_once(rows: tuple[int, int]) -> int:
        """Number of columns of a range of rows that are read together."""
        return max(1, BLOCK_BYTES // (8 * max(rows[1] - rows[0], 1)))

    def _direct(self, rows: tuple[int, int], wanted: set[str]) -> dict[str, pa.Array | pa.ChunkedArray]:
        """The requested direct and calendar features."""
        data, features = self.config.data, self.config.features
        asked = dataclasses.replace(
            features,
            direct={name: True for name in features.direct_columns if name in wanted},
            calendar={
                name: item
                for name, item in features.calendar.items()
                if any(feature.name in wanted for feature in calendar_columns(name, item))
            },
        )
        inputs = [*asked.direct_columns, *(item.column for item in asked.calendar.values())]
        if not inputs:
            return {}
        probes = self.dataset.read(list(dict.fromkeys(inputs)), rows=rows)
        return dict(compute.direct_features(data, asked, probes))


def ensure_table(config: Config, run: Run, dataset: Dataset, *, anew: bool = False) -> FeatureTable:
    """All views of the config, computed where the store lacks them; sets the `features` link of the chain."""
    check_expressions(config.data, config.features)
    views = ensure_views(config, dataset, run, anew=anew)
    run.note(views={name: view.directory.name for name, view in views.items()})
    table = FeatureTable(config, dataset, views)
    run.link("features", table.digest)
    return table
