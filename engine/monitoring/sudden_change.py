"""Has something changed suddenly? Each day against the days shortly before it, with alarms at a stated rate and incidents.

Shares of bins are compared by their square roots, whose sampling noise does not depend on the share. From each day are taken
an exponentially weighted baseline that ends LAG days earlier and the usual effect of its weekday (holidays are a weekday of their
own). What is left is whitened by the shrunk covariance of earlier such differences (Hotelling's T2 for one column), so that a
change counts by how unusual its direction is, not by how large it is. Each column has two distances: of the day, and of the mean
of the last WEEK days, in which no day counts for more than CLIP usual ones (a storm passes, a broken feed does not).

A distance is judged by the column's own earlier ones: its logarithm, 0 at their median and 1 at their largest. A day has two
scores, the largest of its day distances and of its week distances; they share alpha. A score alarms beyond the quantile of the
earlier scores (an exponential tail beyond them), at a level that adapts to the alarms so far: adaptive conformal inference (Gibbs
and Candes, NeurIPS 2021), on the logarithm of the level. Everything here looks back only, as in production.

Alarms of neighbouring days are one incident. It passes after QUIET days without one; after ANCHOR flagged days what it brought is
the new usual, and its columns get a baseline of those days.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

HALF_LIFE, LAG, WEEK = 10.0, 7, 7  # days
FEWEST_DAYS = 3  # of a baseline
FEWEST_DIFFERENCES = 21  # before the first whitening: three of each weekday
PRIOR = 20.0  # differences that the diagonal is worth in the covariance
NOISE = 0.02  # share of the sampling variance 1/n below which nothing is called steady
SHRINK, MOST = 2.0, 12.0  # earlier days that no effect of a weekday is worth; days that its mean remembers
CLIP = 1.5
FEWEST_SCORES = 20  # of a column, and of the line
SMALLEST_SPREAD = 0.5  # of log distances, median to largest
SMALLEST_DISTANCE = 0.02
SHARE, GROUPS = 0.01, 24  # bins with fewer of the rows are put together; most bins of a column
MOVED = 0.02  # effect floor: share of the rows that changed their bin
GAIN = 1.0  # of the logarithm of the level
RANGE = 10.0  # times alpha: how far the level adapts
TAIL = 0.1  # share of the scores that the tail is fitted to
HOLIDAY = 7
KINDS = 8  # weekdays and the holiday
ANCHOR, QUIET = (
    7,
    3,
)  # flagged days after which a change is the new usual; quiet days after which an incident has passed


@dataclass(frozen=True)
class DailyCounts:
    """Counts of units per consecutive local day. A unit is what is judged alone: the values of a column, or its missing rows."""

    days: np.ndarray  # int[D], since 1970-01-01
    columns: tuple[str, ...]  # of each unit; units of one column are re-anchored together
    units: tuple[np.ndarray, ...]  # float64[D, bins of the unit]


@dataclass
class Incident:
    """One change: days since 1970-01-01; `columns` by falling score."""

    opened: int
    columns: list[str]
    flagged: list[int] = field(default_factory=list)
    closed: int | None = None
    end: str = "open"  # open, passed, new usual, acknowledged


@dataclass(frozen=True)
class Course:
    """What each day's look found, [D]: scores of day and week, their lines (NaN: not judged), whether it was flagged, whether
    an incident was opened; and the incidents.
    """

    days: np.ndarray
    scores: np.ndarray  # [2, D]
    lines: np.ndarray  # [2, D]
    flagged: np.ndarray  # bool[D]
    opened: np.ndarray  # bool[D]
    standing: np.ndarray  # [units, 2, D] each unit's score
    incidents: list[Incident]

    @property
    def judged(self) -> np.ndarray:
        """bool[D]: days with a score and a line."""
        return np.asarray((np.isfinite(self.scores) & np.isfinite(self.lines)).any(axis=0))


def grouped(counts: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Bins with less than SHARE of the `usual` rows [bins] put into one, and no more than GROUPS bins."""
    share = usual / max(float(usual.sum()), 1.0)
    order = np.argsort(-share, kind="stable")[: GROUPS - 1]
    large = np.sort(order[share[order] >= SHARE])
    rest = np.setdiff1d(np.arange(counts.shape[1]), large)
    return np.concatenate([counts[:, large], counts[:, rest].sum(axis=1, keepdims=True)], axis=1)


def follow(
    daily: DailyCounts, alpha: float, holidays: Collection[int] = (), acknowledged: Collection[int] = ()
) -> Course:
    """Look at each day in turn. `alpha`: alarms per judged day; `holidays`, `acknowledged`: days since 1970-01-01."""
    watch = _Watch(daily, alpha, frozenset(holidays))
    for at in range(len(daily.days)):
        if int(daily.days[at]) in acknowledged:
            watch.acknowledge(at)
        watch.look(at)
    return watch.course()


class _Watch:
    """State of the looks so far. Units are padded to one width [C, B]."""

    def __init__(self, daily: DailyCounts, alpha: float, holidays: frozenset[int]) -> None:
        self.daily, self.alpha = daily, alpha
        count, width, days = len(daily.units), max((u.shape[1] for u in daily.units), default=1), len(daily.days)
        self.bins = np.array([unit.shape[1] for unit in daily.units], np.float64)
        self.shares = np.zeros((days, count, width))
        self.rows = np.zeros((days, count))
        for place, unit in enumerate(daily.units):
            self.rows[:, place] = unit.sum(axis=1)
            n = self.rows[:, place, None]
            self.shares[:, place, : unit.shape[1]] = np.divide(unit, n, out=np.zeros_like(unit), where=n > 0)
        self.roots = np.sqrt(self.shares)
        kinds = (daily.days + 3) % 7
        self.kinds = np.where(np.isin(daily.days, list(holidays)), HOLIDAY, kinds)
        self.columns = np.array(daily.columns)
        self.level = np.zeros((count, width))  # sums of the baseline
        self.plain = np.zeros((count, width))  # the same of shares
        self.weight = np.zeros(count)
        self.effect, self.seen = np.zeros((KINDS, count, width)), np.zeros((KINDS, count))
        self.products, self.differences = np.zeros((count, width, width)), np.zeros(count)
        self.root, self.whitened = np.zeros((count, width, width)), np.zeros(count, bool)
        self.norms = np.full((count, days), np.nan)
        self.clipped = np.full((days, count, width), np.nan)
        self.logs = np.full((count, 2, days), np.nan)
        self.past = np.full((count, 2, days), np.nan)  # the same without days of an incident that may last
        self.standing = np.full((count, 2, days), np.nan)
        self.small = np.zeros((count, days), bool)  # below the effect floor
        self.scores, self.lines = np.full((2, days), np.nan), np.full((2, days), np.nan)
        self.usable = np.ones((days, count), bool)  # days that may enter a baseline
        self.counted = np.ones(days, bool)  # days whose scores the line may use
        self.flagged, self.opened = np.zeros(days, bool), np.zeros(days, bool)
        self.log_level = math.log(alpha)
        self.fresh = 0  # days before this one enter the baseline at once
        self.incidents: list[Incident] = []

    # ------------------------------------------------------------------------------------------------ one day
    def look(self, at: int) -> None:
        here = self.rows[at] > 0
        self._advance(at - LAG)
        ready = here & (self.weight > FEWEST_DAYS)
        kind = self.kinds[at]
        difference = self.roots[at] - self.level / np.maximum(self.weight, 1e-9)[:, None]
        usual = self.seen[kind] / (self.seen[kind] + SHRINK)
        left = difference - self.effect[kind] * usual[:, None]
        moved = np.abs(self.shares[at] - self.plain / np.maximum(self.weight, 1e-9)[:, None]).sum(axis=1) / 2
        self._distances(at, left, ready & (self.differences >= FEWEST_DIFFERENCES), moved)
        self._score(at)
        self.past[:, :, at] = self.logs[:, :, at]
        self._judge(at)
        keep = ready & self.usable[at]
        if kind != HOLIDAY:
            self.products[keep] += left[keep, :, None] * left[keep, None, :]
            self.differences[keep] += 1
        share = 1 / (np.minimum(self.seen[kind], MOST) + 1)
        self.effect[kind][keep] += (share[:, None] * (difference - self.effect[kind]))[keep]
        self.seen[kind][keep] += 1
        if at < self.fresh:
            self._add(at, here)
            self.usable[at] = False

    def _advance(self, at: int) -> None:
        """A day becomes old enough for the baseline."""
        if at < 0:
            return
        fade = 0.5 ** (1 / HALF_LIFE)
        self.level *= fade
        self.plain *= fade
        self.weight *= fade
        if self.kinds[at] != HOLIDAY:
            self._add(at, (self.rows[at] > 0) & self.usable[at])

    def _add(self, at: int, units: np.ndarray) -> None:
        kind = self.kinds[at]
        usual = self.seen[kind] / (self.seen[kind] + SHRINK)
        self.level[units] += (self.roots[at] - self.effect[kind] * usual[:, None])[units]
        self.plain[units] += self.shares[at][units]
        self.weight[units] += 1

    def _distances(self, at: int, left: np.ndarray, ready: np.ndarray, moved: np.ndarray) -> None:
        """Log distances of the day and of the week of every unit that is ready."""
        units = np.flatnonzero(ready)
        if not len(units):
            return
        if self.daily.days[at] % WEEK == 0 or not self.whitened[units].all():
            self._whiten(units, self.rows[at, units])
        white = np.einsum("cij,cj->ci", self.root[units], left[units])
        norm = np.sqrt((white**2).sum(axis=1) / self.bins[units])
        count, middle, _ = _ranked(self.norms[units, :at])
        typical = np.where(count >= FEWEST_SCORES // 2, middle, 1.0)
        self.norms[units, at] = norm
        self.clipped[at, units] = (
            white * np.minimum(1.0, CLIP * np.maximum(typical, 0.05) / np.maximum(norm, 1e-9))[:, None]
        )
        recent = self.clipped[max(0, at - WEEK + 1) : at + 1, units]
        there = np.isfinite(recent[..., 0]).sum(axis=0)
        mean = np.nansum(recent, axis=0) / np.maximum(there, 1)[:, None]
        # As many times the mean's square as it has days: a week with fewer of them is as large by chance as a whole one.
        week = np.where(there > WEEK // 2, there * (mean**2).sum(axis=1) / self.bins[units], np.nan)
        self.logs[units, :, at] = np.log(np.maximum(np.stack([norm**2, week], axis=1), SMALLEST_DISTANCE))
        self.small[:, at] = moved < MOVED

    def _whiten(self, units: np.ndarray, rows: np.ndarray) -> None:
        """Inverse symmetric roots of the shrunk covariances. They turn no direction (as a Cholesky factor would), so the mean
        of a week adds up; made anew once a week.
        """
        count = self.differences[units][:, None]
        own = np.einsum("cii->ci", self.products[units]) / count + 0.125 / rows[:, None]
        diagonal = PRIOR * own / (count + PRIOR) + NOISE / rows[:, None]
        covariance = self.products[units] / (count + PRIOR)[..., None]
        covariance += diagonal[:, :, None] * np.eye(diagonal.shape[1])
        values, vectors = np.linalg.eigh(covariance)
        self.root[units] = (vectors / np.sqrt(values)[:, None]) @ vectors.transpose(0, 2, 1)
        self.whitened[units] = True

    def _score(self, at: int) -> None:
        count, middle, most = _ranked(self.past[:, :, :at])
        standing = (self.logs[:, :, at] - middle) / np.maximum(most - middle, SMALLEST_SPREAD)
        standing = np.where(self.small[:, at, None], np.minimum(standing, 0.0), standing)
        self.standing[:, :, at] = np.where(count >= FEWEST_SCORES, standing, np.nan)
        for scale in (0, 1):
            found = self.standing[:, scale, at]
            if np.isfinite(found).any():
                self.scores[scale, at] = np.nanmax(found)

    # ------------------------------------------------------------------------------------------------- alarms
    def _judge(self, at: int) -> None:
        for scale in (0, 1):
            past = self.scores[scale, :at][self.counted[:at]]
            self.lines[scale, at] = line(past[np.isfinite(past)], math.exp(self.log_level) / 2)
        beyond = bool((self.scores[:, at] > self.lines[:, at]).any())
        if not (np.isfinite(self.lines[:, at]) & np.isfinite(self.scores[:, at])).any():
            return
        self.flagged[at] = beyond
        incident = self.incidents[-1] if self.incidents and self.incidents[-1].closed is None else None
        if incident is None:
            self._adapt(beyond)
            if beyond:
                self.opened[at] = True
                incident = Incident(int(self.daily.days[at]), [])
                self.incidents.append(incident)
        if incident is not None:
            self._continue(incident, at, beyond)

    def _adapt(self, alarm: bool) -> None:
        """The level falls by an alarm and rises by a quiet day, in balance at alpha."""
        level = self.log_level + GAIN * (self.alpha - float(alarm))
        self.log_level = min(max(level, math.log(self.alpha / RANGE)), math.log(min(self.alpha * RANGE, 0.5)))

    def _continue(self, incident: Incident, at: int, beyond: bool) -> None:
        day = int(self.daily.days[at])
        if beyond:
            incident.flagged.append(day)
            for name in self._causes(at):
                if name not in incident.columns:
                    incident.columns.append(name)
            held = np.isin(self.columns, incident.columns)
            self.usable[at, held] = False
            self.past[held, :, at] = np.nan
            self.counted[at] = False
        if len(incident.flagged) >= ANCHOR:
            self._close(incident, at, "new usual")
        elif day - incident.flagged[-1] >= QUIET:
            incident.closed, incident.end = day, "passed"
            days = slice(self._since(incident), at + 1)
            self.usable[days], self.counted[days] = True, True
            self.past[:, :, days] = self.logs[:, :, days]

    def _since(self, incident: Incident) -> int:
        return int(np.searchsorted(self.daily.days, incident.opened))

    def _causes(self, at: int) -> list[str]:
        """Columns beyond all their earlier distances; the highest one without any."""
        with np.errstate(all="ignore"):
            found = np.fmax(self.standing[:, 0, at], self.standing[:, 1, at])
        order = np.argsort(-np.nan_to_num(found, nan=-np.inf), kind="stable")
        return list(dict.fromkeys(self.columns[k] for rank, k in enumerate(order) if rank == 0 or found[k] > 1.0))

    def _close(self, incident: Incident, at: int, end: str) -> None:
        """What the incident's days hold is the new usual of its columns."""
        incident.closed, incident.end = int(self.daily.days[at]), end
        first = self._since(incident)
        self._anchor(np.isin(self.columns, incident.columns), first, at + 1)
        self.counted[first : at + 1] = False

    def _anchor(self, units: np.ndarray, first: int, stop: int) -> None:
        """A new baseline of some units from the days [first, stop)."""
        self.level[units], self.plain[units], self.weight[units] = 0.0, 0.0, 0.0
        self.usable[max(0, first - LAG) : first, units] = False
        for at in range(first, stop):
            self._add(at, units & (self.rows[at] > 0))
        self.usable[first:stop, units] = False  # counted here, not again when they are old enough
        self.clipped[:stop, units] = np.nan
        self.past[units, :, first:stop] = np.nan

    def acknowledge(self, at: int) -> None:
        """From this day on every column has a new baseline, which the next LAG days enter at once."""
        if self.incidents and self.incidents[-1].closed is None:
            self._close(self.incidents[-1], at - 1, "acknowledged")
        self._anchor(np.ones(len(self.columns), bool), at, at)
        self.fresh = at + LAG

    def course(self) -> Course:
        return Course(
            self.daily.days, self.scores, self.lines, self.flagged, self.opened, self.standing, self.incidents
        )


def _ranked(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(number, median, largest) of the known values of each row; the lower of two middle ones; NaN without any."""
    ranked = np.sort(values, axis=-1)  # NaN is last
    count = np.isfinite(values).sum(axis=-1)
    if not values.shape[-1]:
        return count, *[np.full(count.shape, np.nan)] * 2
    place = np.stack([(count - 1) // 2, count - 1], axis=-1).clip(0)
    found = np.take_along_axis(ranked, place, axis=-1)
    return count, found[..., 0], found[..., 1]


def line(past: np.ndarray, level: float) -> float:
    """The value that a further score exceeds with probability `level`, from earlier scores [n]; NaN from too few.

    The order statistic ceil((n + 1)(1 - level)); beyond the largest an exponential tail fitted to the largest TAIL of them.
    """
    count = len(past)
    if count < FEWEST_SCORES:
        return math.nan
    ranked = np.sort(past)
    rank = math.ceil((count + 1) * (1 - level))
    if rank <= count:
        return float(ranked[rank - 1])
    top = ranked[-max(5, math.ceil(TAIL * count)) :]
    mean = float((top - top[0]).mean())
    return max(float(ranked[-1]), float(top[0] + mean * math.log(len(top) / count / level)))
