"""Reads the reference of a bundle: counts per local day and column, which add up to windows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config.names import free
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.monitoring.statistics import PREDICTION, ColumnSpec, Counts, column_specs, conditional_specs
from engine.runtime import records, storage
from engine.training.drift_reference import MISSING_BIN, NEGATIVE_BIN, POSITIVE_BIN, ROWS, ReferenceRecord

ROWS_COLUMN = "(rows)"
GAP_DAYS, GAP_STEPS = 7, 3  # closed weekends and monthly rows are not gaps
GAP_BLOCKS = (
    30  # blocks of a table without time, of a thousand: by chance so many in a row are empty where rows are very few
)
LONGEST_GAP = 400  # days; longer than GAP_DAYS, so that a shortened gap is still a gap
WEEKDAY_OF_DAY_0 = 3  # 1970-01-01 was a Thursday; Monday is 0


@dataclass(frozen=True)
class Reference:
    """Counts per consecutive local day. `counts[name]` has one window a day; a day without rows holds zeros."""

    columns: list[ColumnSpec]
    days: np.ndarray  # int32[D], since 1970-01-01, local
    rows: np.ndarray  # float64[D]
    counts: dict[str, Counts]
    profile: Profile
    importance: dict[str, float]
    predictions_in_sample: bool
    memory: int = 0  # length of the longest trailing window in days
    history: int | None = None  # days of data before the first of these; None: not recorded by an older model
    rising: Mapping[str, str] = field(default_factory=dict)  # columns whose values follow the time, and why
    conditional: list[ColumnSpec] = field(default_factory=list)  # counted in `counts`, and no part of `columns`
    timed: bool = True  # days are those of events, not blocks of a table without time
    _stacks: dict[bool, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def windows(self, weights: np.ndarray, scored: np.ndarray) -> dict[str, Counts]:
        """Counts of every column in windows: sums of days with `weights` [W, D], for predictions `scored` [W, D]."""
        found: dict[str, Counts] = {}
        for predictions, part in ((False, weights), (True, scored)):
            names = [item.name for item in self.columns if (item.kind == PREDICTION) == predictions]
            if not names:
                continue
            # One product for all columns. Counts are whole numbers, so its order of addition does not matter.
            if predictions not in self._stacks:
                self._stacks[predictions] = np.concatenate([self.counts[name].stacked() for name in names], axis=1)
            block, at = part @ self._stacks[predictions], 0
            for name in names:
                width = self.counts[name].values.shape[1] + 5
                found[name] = Counts.unstacked(block[:, at : at + width])
                at += width
        return found

    @property
    def counted(self) -> list[ColumnSpec]:
        """Every column that `counts` has."""
        return [*self.columns, *self.conditional]

    @property
    def rows_column(self) -> str:
        """The name of the number of rows among the columns."""
        return free(ROWS_COLUMN, {column.name for column in self.columns})

    def place(self, column: str) -> int:
        """Number of a column."""
        return next(place for place, item in enumerate(self.columns) if item.name == column)

    @property
    def weekdays(self) -> np.ndarray:
        """int[D]: 0 is Monday."""
        return weekdays(self.days)

    @property
    def covered(self) -> np.ndarray:
        """bool[D]: days of its periods. Days without rows are left out where they are more than GAP_DAYS in a row and
        GAP_STEPS times the usual distance of days with rows: such a gap lies between the periods, or is an outage, and
        does not count in the expected rows.
        """
        busy = np.flatnonzero(self.rows > 0)
        steps = np.diff(busy)
        found = np.ones(len(self.days), bool)
        least = GAP_DAYS if self.timed else GAP_BLOCKS
        for place in np.flatnonzero(steps - 1 > max(least, GAP_STEPS * np.median(steps))) if len(steps) else ():
            found[busy[place] + 1 : busy[place + 1]] = False
        return found

    @property
    def scored(self) -> np.ndarray:
        """bool[D]: days with predictions, and closed days between them."""
        found = np.zeros(len(self.days), bool)
        for column in self.columns:
            if column.kind == PREDICTION:
                found |= self.counts[column.name].rows > 0
        days = np.flatnonzero(found)
        if len(days):
            found[days[0] : days[-1]] |= self.rows[days[0] : days[-1]] == 0
        return found


def weekdays(days: np.ndarray) -> np.ndarray:
    """int[n] weekdays of days since 1970-01-01: 0 is Monday."""
    return np.asarray((days + WEEKDAY_OF_DAY_0) % 7)


def day_text(day: int) -> str:
    """ISO date of a local day."""
    return str(np.datetime64("1970-01-01") + np.timedelta64(day, "D"))


def read_reference(directory: Path, encoder: Encoder) -> Reference:
    """The reference of a verified bundle. Raises UserError where the model was trained without one."""
    if not (directory / "reference.json").exists():
        raise UserError(f"{directory} must hold a reference (reference.json), which is missing: train the model again")
    state = records.read(directory / "reference.json", ReferenceRecord)
    spec = ProfileSpec.read(directory / "profile_spec.json", encoder)
    columns = column_specs(spec)
    table = storage.read_parquet(directory / "reference.parquet")
    _check_names(directory, spec, table)
    conditional = conditional_specs(spec)
    days, rows, counts = day_counts([*columns, *conditional], table)
    profile = Profile.from_json(state["profile"], spec)
    facts = (state["importance"], state["predictions_in_sample"], state.get("memory_days", 0))
    history = state.get("history_days")
    return Reference(columns, days, rows, counts, profile, *facts, history=history, conditional=conditional)


def _check_names(directory: Path, spec: ProfileSpec, table: pa.Table) -> None:
    """Raise UserError for a reference of an older engine that counted an input and an engine column of its name as one."""
    plain = [ROWS, *spec.inputs, *(item.name for item in spec.predictions)]
    apart = [free(ROWS, spec.columns), *spec.columns]
    written = set(table["column"].unique().to_pylist())
    mixed = [name for name, column in zip(plain, apart, strict=True) if name != column and column not in written]
    if mixed:
        raise UserError(
            f"{directory / 'reference.parquet'} mixes the input {mixed[0]!r} with the engine's column of "
            "that name, as an older engine wrote it: train the model again"
        )


def day_counts(columns: list[ColumnSpec], table: pa.Table) -> tuple[np.ndarray, np.ndarray, dict[str, Counts]]:
    """(days, rows of each, counts by column) of reference.parquet."""
    day = np.asarray(table["day"].cast(pa.int32()))
    names = table["column"].combine_chunks().dictionary_encode()
    facts = {
        name: np.asarray(table[name].fill_null(np.nan if name == "sum" else 0)) for name in ("bin", "count", "sum")
    }
    if not len(day):
        raise UserError("reference.parquet must hold at least one day, but it is empty: train the model again")
    days = _consecutive(np.unique(day))
    order = np.argsort(np.asarray(names.indices), kind="stable")
    bounds = np.searchsorted(np.asarray(names.indices)[order], np.arange(len(names.dictionary) + 1))
    places = {name.as_py(): order[bounds[k] : bounds[k + 1]] for k, name in enumerate(names.dictionary)}
    empty = np.empty(0, np.int64)

    def part(name: str) -> dict[str, np.ndarray]:
        at = places.get(name, empty)
        return {"day": np.searchsorted(days, day[at]), **{key: values[at] for key, values in facts.items()}}

    rows = np.zeros(len(days))
    total = part(free(ROWS, {column.name for column in columns}))
    rows[total["day"]] = total["count"]
    return days, rows, {column.name: _column_counts(column, len(days), part(column.name)) for column in columns}


def _consecutive(present: np.ndarray) -> np.ndarray:
    """int32[D]: the days that hold rows and the days between; of a gap longer than LONGEST_GAP only its first days,
    because a single row of another century would otherwise take memory for every day since.
    """
    parts = [np.arange(a, min(b, a + LONGEST_GAP + 1)) for a, b in itertools.pairwise(present.tolist())]
    return np.concatenate([*parts, present[-1:]]).astype(np.int32)


def _column_counts(column: ColumnSpec, days: int, part: dict[str, np.ndarray]) -> Counts:
    values, missing = np.zeros((days, column.width)), np.zeros(days)
    infinite, far = np.zeros((days, 2)), np.zeros((days, 2))
    bins, day, count = part["bin"], part["day"], part["count"]
    if column.edges is None:  # codes: 0 null, then the values
        missing[day[bins == 0]] = count[bins == 0]
        values[day[bins > 0], bins[bins > 0] - 1] = count[bins > 0]
        return Counts(values, missing, infinite, far)
    values[day[bins >= 0], bins[bins >= 0]] = count[bins >= 0]
    missing[day[bins == MISSING_BIN]] = count[bins == MISSING_BIN]
    for side, bin_ in enumerate((NEGATIVE_BIN, POSITIVE_BIN)):
        infinite[day[bins == bin_], side] = count[bins == bin_]
    for side, bin_ in enumerate((0, column.width - 1)):
        far[day[bins == bin_], side] = part["sum"][bins == bin_]
    return Counts(values, missing, infinite, far)
