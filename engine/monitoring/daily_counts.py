"""Counts per local day: of the reference, of the days that were monitored before, of those between, and of the window.

They are kept in `monitor/days.parquet` (the format of reference.parquet), so that no day is counted twice and a scoring run of
one day has a past to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config.tree import Config
from engine.data.calendar import day_start
from engine.features import required_columns
from engine.features.encode import Encoder
from engine.features.profile import Profile
from engine.features.spec import trailing_features
from engine.features.table import ensure_table
from engine.monitoring.history import newest_file
from engine.monitoring.reference import Reference, day_counts
from engine.monitoring.statistics import ColumnSpec, Counts
from engine.monitoring.sudden_change import DailyCounts, grouped
from engine.monitoring.window import Window, add_days
from engine.runtime.run import Run
from engine.scoring.predictor import load
from engine.training.bundle import Bundle
from engine.training.drift_reference import days_table, profiles_by_day
from engine.training.row_sample import chunks

FILE = ("monitor", "days.parquet")
SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("day", pa.date32()),
        ("column", pa.string()),
        ("bin", pa.int32()),
        ("count", pa.int64()),
        ("sum", pa.float64()),
    ]
)


@dataclass(frozen=True)
class LaterDays:
    """Days that are not the reference's: their table, and counts by column [D]."""

    table: pa.Table
    days: np.ndarray
    rows: np.ndarray
    counts: dict[str, Counts]

    @classmethod
    def of(cls, columns: list[ColumnSpec], table: pa.Table) -> LaterDays:
        """The days that the table has: one without rows is in it, one that nobody counted is not."""
        if not table.num_rows:
            return cls(table, np.empty(0, np.int32), np.empty(0), {})
        days, rows, counts = day_counts(columns, table)
        there = np.isin(days, np.asarray(table["day"].cast(pa.int32())))
        return cls(table, days[there], rows[there], {name: item.take(there) for name, item in counts.items()})


def later_days(config: Config, run: Run, bundle: Bundle, reference: Reference, window: Window) -> LaterDays:
    """The days kept by earlier runs, those up to the window that nobody has counted, where the dataset is at hand, and the
    window's own.
    """
    spec = reference.profile.spec
    kept = newest_file(run, bundle.digest, FILE, SCHEMA) or SCHEMA.empty_table()
    days = dict(window.days)
    if config.monitor.window and window.days:
        add_days(days, days_between(config, run, bundle, reference, kept, min(window.days)).items())
    fresh = SCHEMA.empty_table()
    if days:
        counted = days_table(spec, dict(sorted(days.items())))
        fresh = counted.add_column(0, "model", pa.array([bundle.digest] * len(counted), pa.string())).cast(SCHEMA)
    old = kept.filter(pc.invert(pc.is_in(kept["day"].cast(pa.int32()), pa.array(sorted(days), pa.int32()))))
    table = pa.concat_tables([old, fresh]).sort_by(
        [("day", "ascending"), ("column", "ascending"), ("bin", "ascending")]
    )
    return LaterDays.of(reference.counted, table)


def days_between(
    config: Config, run: Run, bundle: Bundle, reference: Reference, kept: pa.Table, until: int
) -> dict[int, Profile]:
    """Profiles of the local days after the reference and before `until`, from the first one that is not kept."""
    known = set(np.asarray(kept["day"].cast(pa.int32())).tolist())
    first = int(reference.days[-1]) + 1
    while first < until and first in known:
        first += 1
    spec = reference.profile.spec
    found = {day: Profile.empty(spec) for day in range(first, until)}  # a day without rows is known too
    if not found:
        return found
    predictor = load(config.monitor.model, config.paths.runs, config.resources.threads or 1)
    dataset = required_columns.ensure(config, run, empty=False)
    table = ensure_table(config, run, dataset)
    rows = dataset.row_range(*(day_start(day, config.data.time_zone) for day in (first, until)))
    with run.progress("days before the window", rows[1] - rows[0]) as progress:
        for part in chunks(rows):
            raw = table.read(part)
            numeric, codes = bundle.encoder.transform(raw)
            scores = predictor.encoded_scores(numeric, codes)
            add_days(found, profiles_by_day(config, dataset, spec, np.arange(*part), raw, scores, codes))
            progress.advance(part[1] - part[0])
    return found


def judged_columns(config: Config, encoder: Encoder, reference: Reference) -> list[str]:
    """Columns in which a sudden change is looked for: not those that follow the time, nor features of trailing windows, which
    smear a day over those after it (unless there are no others). Conditional columns are of others that are judged.
    """
    trailing = trailing_features(config.features, encoder.features)
    names = [column.name for column in reference.columns if column.name not in reference.rising]
    names = [name for name in names if name not in trailing] or names
    spec = reference.profile.spec.conditional
    return names + [item.name for item in spec if {item.value, *item.given} <= set(names)]


def daily_counts(reference: Reference, later: LaterDays, until: int, columns: list[str]) -> DailyCounts:
    """Units of the columns for every local day up to `until`: values, missing rows, and the number of rows.

    The number of rows is counted against as many as a usual day of the reference has, so that it is a share like the others.
    """
    stretch = np.flatnonzero(np.diff(reference.days) != 1)
    start = int(reference.days[stretch[-1] + 1 if len(stretch) else 0])
    days = np.arange(start, max(until, int(reference.days[-1])) + 1)
    names, units = [], []
    covered, related = reference.covered, {item.name for item in reference.conditional}
    for name in columns:
        values, missing = _on(days, reference.days, reference.counts[name], covered)
        if name in later.counts:
            _put(values, missing, days, later.days, later.counts[name])
        usual = values[days <= reference.days[-1]].sum(axis=0)
        if values.shape[1] > 1 and usual.sum():
            names.append(name)
            units.append(grouped(values, usual))
        if name not in related:  # its missing rows are those of its value
            names.append(name)
            units.append(np.stack([values.sum(axis=1), missing], axis=1))
    names.append(reference.rows_column)
    units.append(_volume(days, reference, later))
    keep = days <= until
    return DailyCounts(days[keep], tuple(names), tuple(unit[keep] for unit in units))


def _bins(counts: Counts) -> np.ndarray:
    """[D, bins] with infinities in the outer bins."""
    values = counts.values.copy()
    values[:, [0, -1]] += counts.infinite
    return values


def _on(days: np.ndarray, there: np.ndarray, counts: Counts, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, missing = np.zeros((len(days), counts.values.shape[1])), np.zeros(len(days))
    inside = (there >= days[0]) & covered
    values[there[inside] - days[0]] = _bins(counts)[inside]
    missing[there[inside] - days[0]] = counts.missing[inside]
    return values, missing


def _put(values: np.ndarray, missing: np.ndarray, days: np.ndarray, there: np.ndarray, counts: Counts) -> None:
    inside = (there >= days[0]) & (there <= days[-1])
    values[there[inside] - days[0]] = _bins(counts)[inside]
    missing[there[inside] - days[0]] = counts.missing[inside]


def _volume(days: np.ndarray, reference: Reference, later: LaterDays) -> np.ndarray:
    rows = np.full(len(days), np.nan)
    inside = (reference.days >= days[0]) & reference.covered
    rows[reference.days[inside] - days[0]] = reference.rows[inside]
    after = (later.days >= days[0]) & (later.days <= days[-1])
    rows[later.days[after] - days[0]] = later.rows[after]
    usual = float(np.nanmean(rows[days <= reference.days[-1]]))
    known = np.isfinite(rows)
    return np.stack([np.where(known, rows, 0.0), np.where(known, usual, 0.0)], axis=1)
