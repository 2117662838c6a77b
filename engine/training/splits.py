"""The rows of each period that training reads: those whose label was known when the next period began.

A label that became known later is from the future: no model that learnt it could have existed. To cut there alone would keep the
fast labels only, so `split.ripening` says what is done about the young rows: `wait` moves a period back by the age at which
labels have arrived, `weight` weights rows by the inverse probability that their label was known. Both are estimated from what
was known at the cut. Test rows take every label of the dataset.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.config import units
from engine.config.references import COUNTABLE
from engine.config.sections.training import ANY, AUTO
from engine.config.tree import SPLITS, Config
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features.compute import as_floats
from engine.features.instants import NEVER
from engine.features.vocabulary import as_texts
from engine.runtime.run import LabelsRecord, Run
from engine.training.classes import target_values
from engine.training.parts import part_rows, times_of, warn_of_parts
from engine.training.ripening import RIPE, days, label_horizon, label_times, ripe_weights

TENTHS = np.arange(1, 10) / 10  # edges of the groups of a numeric target
FUTURE = "labels from the future may be in it"
OUT = "split.ripening=weight keeps every row whose label was known, and weights it; none keeps the fast labels as they are"


@dataclass(frozen=True)
class Cut:
    """Until when a period's labels may have become known, in microseconds UTC, and the age that its rows must have by then."""

    instant: int
    maturity: int = 0


@dataclass(frozen=True)
class Split:
    """The rows of one period that are used."""

    name: str
    rows: np.ndarray  # int64[n] dataset row numbers, ascending
    unlabelled: int  # rows of the period as configured that have no label at all
    unripe: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64)
    )  # rows of it with a label that is not used
    used: tuple[int, int] = (0, 0)  # [from, to) of the rows that are used, microseconds UTC
    cut: Cut | None = None  # None: a label counts whenever it became known
    weight: np.ndarray | None = None  # float32[n], inverse probabilities
    part: np.ndarray | None = None  # int64, ascending: every row of a part that is no period; None: those of `used`
    targets: tuple[Split, ...] = ()  # of each of several targets; rows are then those that have one of them

    @property
    def by_target(self) -> tuple[Split, ...]:
        """The rows of each target."""
        return self.targets or (self,)


def find_splits(config: Config, dataset: Dataset, periods: tuple[str, ...], run: Run) -> dict[str, Split]:
    """The configured ones of `periods`; logs what is used, and warns of labels from the future and of a period without labels.

    Raises UserError where a training period is asked for and holds no row that may be used.
    """
    if config.split.by == "column":
        warn_of_parts(config, dataset, run)
    views, each = config.by_target, [dict[str, Split]() for _ in config.by_target]
    for name in SPLITS:
        if getattr(config.split, name):
            # A row that one target has learnt from must not be one that another is judged on.
            earliest = max((split.used[1] for found in each for split in found.values()), default=None)
            for view, found in zip(views, each, strict=True):
                found[name] = find_split(view, dataset, name, earliest)
    each = [{name: split for name, split in found.items() if name in periods} for found in each]
    for target, view, found in zip(config.target_names, views, each, strict=True):
        _say_splits(view, found, run, f"target {target}: " if len(views) > 1 else "")
    return {name: joined([found[name] for found in each]) for name in each[0]}


def joined(parts: list[Split]) -> Split:
    """The rows of a period that have at least one of its targets: of one target its own."""
    if len(parts) == 1:
        return parts[0]
    rows = functools.reduce(np.union1d, [part.rows for part in parts])
    there = [part.used for part in parts if part.used[0] < part.used[1]] or [parts[0].used]
    used = min(start for start, _ in there), max(stop for _, stop in there)
    return replace(parts[0], rows=rows, used=used, weight=None, targets=tuple(parts))


def _say_splits(config: Config, found: dict[str, Split], run: Run, said: str) -> None:
    """Log and warn of the rows of one target; `said` begins each line."""
    for name, split in found.items():
        if not len(split.rows):
            _refuse_or_warn(config, split, run, said)
        run.log(f"{said}split.{name}: {in_words(split, config.data.time_zone)}")
    if config.split.by != "time" and config.data.timed:
        run.warn(
            f"{said}split.by={config.split.by}: the parts hold rows of the same times, so that figures promise more than a model "
            "reaches on later rows. split.by=time measures that"
        )
    elif "train" in found and found["train"].cut is None and config.data.timed:
        run.warn(
            f"{said}{_why_any(config)}: {FUTURE}, and the figures then promise more than any model that could have existed"
        )


def find_split(config: Config, dataset: Dataset, name: str, earliest: int | None = None) -> Split:
    """The rows of a configured period; `earliest` is the instant at which the rows of the period before it end."""
    if config.split.by != "time":
        return find_part(config, dataset, name)
    start, stop = config.periods[f"split.{name}"]
    period = dataset.row_range(start, stop)
    labelled = _labelled(config, dataset, period)
    unlabelled = len(labelled) - int(labelled.sum())
    if (instant := cut_instant(config, name)) is None:
        return Split(name, period[0] + np.flatnonzero(labelled), unlabelled, used=(start, stop))
    event, known = label_times(config, dataset, (0, dataset.row_range(start, max(instant, stop))[1]))
    instant = min(instant, int(max(event.max(initial=start), known.max(initial=start)))) if instant == END else instant
    cut = Cut(instant, label_horizon(event, known, instant) if config.split.ripening == "wait" else 0)
    used = _used(start, stop, cut, None if name == "train" else earliest)
    low, high = dataset.row_range(*used) if used[0] < used[1] else (period[0], period[0])
    ripe = (known[low:high] != NEVER) & (known[low:high] <= instant)
    rows = low + np.flatnonzero(ripe)
    unripe = np.setdiff1d(period[0] + np.flatnonzero(labelled), rows, assume_unique=True)
    weight = None
    if config.split.ripening == "weight":
        group = label_groups(config, dataset, (event < instant) & (known != NEVER) & (known <= instant))
        weight = ripe_weights(event, known, group, instant)[rows]
    return Split(name, rows, unlabelled, unripe, used, cut, weight)


def find_part(config: Config, dataset: Dataset, name: str) -> Split:
    """The rows of a part by hash or by a column; a label counts whenever it became known. `used` are the times of its
    rows, or the places of a table without time.
    """
    by_place = config.split.by == "hash" and not config.data.timed and not config.split.turn.fraction
    if by_place:
        used = config.periods[f"split.{name}"]
        low, high = dataset.row_range(*used)
        rows = np.arange(low, high)
    else:
        rows = part_rows(config, dataset, name)
        used = times_of(config, dataset, rows)
    known = pc.is_valid(dataset.take([config.data.target or ""], rows)[0])
    labelled = np.asarray(known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known)
    unlabelled = len(rows) - int(labelled.sum())
    return Split(name, rows[labelled], unlabelled, used=used, part=rows)


END = np.iinfo(np.int64).max  # the cut of the last period is the end of the data


def cut_instant(config: Config, name: str) -> int | None:
    """Instant by which the labels of a period must be known, END for the end of the data; None: a label counts whenever."""
    known_by = config.split.known_by
    if name == "test" or known_by in (None, ANY):
        return None
    if known_by != AUTO:
        return config.instants["split.known_by"]
    if config.data.columns[config.data.target or ""].known_at is None:
        return None
    later = (config.periods.get(f"split.{after}") for after in SPLITS[SPLITS.index(name) + 1 :])
    return next((period[0] for period in later if period), END)


def _used(start: int, stop: int, cut: Cut, earliest: int | None) -> tuple[int, int]:
    """The period, moved back so that its last row has the cut's maturity; training rows keep their beginning, and a later
    period begins where the one before it ends, at the earliest.
    """
    end = min(stop, cut.instant - cut.maturity)
    if earliest is None:
        return start, end
    return max(start - (stop - end), min(earliest, start)), end


def _labelled(config: Config, dataset: Dataset, rows: tuple[int, int]) -> np.ndarray:
    target = dataset.read([config.data.target or ""], rows=rows)[0]
    return np.asarray(pc.is_valid(target.combine_chunks() if isinstance(target, pa.ChunkedArray) else target))


def label_groups(config: Config, dataset: Dataset, known: np.ndarray) -> np.ndarray:
    """int64[n] of the first n rows: a number for each value of the target; the tenth of the `known` ones (bool[n]) that it is in,
    where these are numbers of more than ten values.
    """
    name = config.data.target or ""
    target = dataset.read([name], rows=(0, len(known)))[0]
    if config.data.columns[name].type.startswith(COUNTABLE):
        values = as_floats(target)
        if len(np.unique(values[known])) > len(TENTHS) + 1:
            return np.searchsorted(np.quantile(values[known], TENTHS), values, "right").astype(np.int64)
    codes = as_texts(target).dictionary_encode().indices
    return np.asarray(pc.fill_null(codes, -1)).astype(np.int64)


# ------------------------------------------------------------------------------------------------------- in words


def _refuse_or_warn(config: Config, split: Split, run: Run, of: str) -> None:
    what = f"{of}split.{split.name} {list(getattr(config.split, split.name))}"
    if len(split.unripe) and split.cut is not None:
        by = units.format_instant(split.cut.instant, config.data.time_zone)
        ways = f"; or {OUT}" if split.cut.maturity else ""  # where no label is known yet, a weight does not help
        aged = f" and are at least {days(split.cut.maturity)} old, {RIPE}" if split.cut.maturity else ""
        said = (
            f"{what} must hold rows whose label is known at {by}{aged}, found none among {len(split.unripe):,} labelled rows. "
            f"Begin it earlier{ways}; or split.known_by={ANY} takes labels from the future"
        )
    else:
        said = f"{what} must hold labelled rows, found {split.unlabelled:,} rows, none with a label"
    if split.name == "train":
        raise UserError(said)
    run.warn(f"{said}: nothing is measured on it")


def _why_any(config: Config) -> str:
    if config.split.known_by in (None, ANY):
        return f"split.known_by={ANY}"
    return f"data.columns.{config.data.target}.known_at does not say when a label becomes known"


def in_words(split: Split, zone: str) -> str:
    """What of a period is used, as a clause, times in a zone."""
    said = f"{len(split.rows):,} rows"
    if split.cut is None:
        whenever = split.name != "test" and split.part is None
        return f"{said}, whenever their label became known" if whenever else said
    said += f", {len(split.unripe):,} not ripe: labels known at {units.format_instant(split.cut.instant, zone)}"
    if split.cut.maturity:
        said += f", rows to {units.format_instant(split.used[1], zone)}, for labels take {days(split.cut.maturity)}"
    if split.weight is not None and len(split.rows):
        said += f", weights to {split.weight.max():.3g}"
    return said


def account(config: Config, dataset: Dataset, split: Split, classes: tuple[str, ...]) -> LabelsRecord:
    """What run.json and the report say of a period: times, rows used and not ripe, and the mean of the target (the share of
    positives) of the rows used and of those with the rows that are not ripe.
    """
    zone, period = config.data.time_zone, list(getattr(config.split, split.name))
    found: LabelsRecord = {
        "period": period,
        "used": [units.format_instant(instant, zone) for instant in split.used] if config.data.timed else period,
        "known_by": None if split.cut is None else units.format_instant(split.cut.instant, zone),
        "maturity_days": None if split.cut is None else split.cut.maturity / units.MICROSECONDS["d"],
        "rows": len(split.rows),
        "not_ripe": len(split.unripe),
        "unlabelled": split.unlabelled,
    }
    if len(classes) > 2 or (not classes and config.data.columns[config.data.target or ""].sensitive):
        return found
    means = [
        _mean_target(config, dataset, rows, classes) for rows in (split.rows, np.union1d(split.rows, split.unripe))
    ]
    return {**found, "target_mean": means[0], "target_mean_with_not_ripe": means[1]}


def _mean_target(config: Config, dataset: Dataset, rows: np.ndarray, classes: tuple[str, ...]) -> float | None:
    if not len(rows):
        return None
    values = target_values(dataset.take([config.data.target or ""], rows)[0], classes)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
