"""Calibrates the alarm lines: thresholds with a stated false-alarm rate, from the reference's own windows.

Windows of the reference as long as the current one are compared with the rest of the reference. Each statistic of each
column is normalised by its own windows (median; the larger of MAD and upper tail, never below a
stated scale). Statistics of values and statistics of records are two families, each with its line and half of alpha
(Bonferroni): the (1 - half) quantile of the windows' largest normalised statistic of the family over all columns. With one
line for both, a few bursts of missing values in the reference would use up alpha, and no shift of values would reach it.
Scores are in units of the line.

Windows are resampled by blocks of days, never by rows, because days resemble their neighbours. Where there are fewer than
2 / alpha separate windows, more are resampled, and no line is below what the real windows reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.config.sections.monitoring import DRIFT_STATISTICS
from engine.monitoring.reference import Reference
from engine.monitoring.statistics import ColumnSpec, Counts, statistics

NAMES = DRIFT_STATISTICS  # the statistics that raise alarms
VOLUME = "volume"
FAMILIES = {"values": ("psi", "ks", "wasserstein", "outside", "unseen"), "records": ("missing", VOLUME)}
LINE = 1.0  # of a score
LEAST_HEIGHT = 1.0  # of a line above the centre, in scales
# Spread below which a column counts as steady: a fifth of the effect floors (of its root for PSI: psi is a squared
# distance, its root is what spreads evenly). Below it, bursts too small to matter would set the line for all columns.
MIN_SCALE = {
    "psi": 0.06,
    "ks": 0.02,
    "wasserstein": 0.02,
    "missing": 0.004,
    "outside": 0.004,
    "unseen": 0.004,
    "volume": 0.05,
}
MAD_TO_DEVIATION = 1.4826
# A column with jumps in the reference must jump further, but must not raise the line of the others: its scale is at
# least that of its upper tail.
TAIL, TAIL_TO_DEVIATION = 0.95, 1.6449
STRIDES = 4  # real windows overlap: one starts every quarter of its length
FOLDS = 5
FEW = 20  # with fewer separate windows, columns share centre and spread
KEPT = 0.25  # smallest share of the days that must be left for comparison
ENOUGH_REAL = 5  # from this many separate real windows, median and MAD use them alone


@dataclass(frozen=True)
class CalibrationPlan:
    """Settings of the calibration: window length in days, alpha, floor of PSI shares, season, resampling."""

    length: int
    alpha: float
    psi_floor: float
    season: str = "none"
    resamples: int = 300
    block: int = 7
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Weights float64[W, D] of the reference's days; `real` ones are contiguous, the others are resampled from blocks.

    `scored` are the weights for predictions, which exist on fewer days.
    """

    weights: np.ndarray
    scored: np.ndarray
    real: np.ndarray  # bool[W]


@dataclass(frozen=True)
class Line:
    """Calibrated lines. center, scale float64[columns + 1, statistics] (the last row: volume)."""

    heights: np.ndarray  # float64[statistics], in scales above the centre; one number for each family
    center: np.ndarray
    scale: np.ndarray
    scores: np.ndarray  # float64[W]: largest over columns and statistics, in units of the line
    column_scores: np.ndarray  # [columns + 1, W]: largest over the column's statistics
    real: np.ndarray
    separate: int  # real windows that do not overlap

    def normalised(self, found: np.ndarray) -> np.ndarray:
        """Scores [columns + 1, statistics, W] of statistics of that shape, beyond LINE where they are beyond their line;
        NaN where not computable.
        """
        return _spreads(found, self.center, self.scale) / self.heights[:, None]

    def limits(self) -> np.ndarray:
        """[columns + 1, statistics]: the lines, in the statistic's unit."""
        return _unrooted(self.center + self.scale * self.heights)

    def typical(self) -> np.ndarray:
        """[columns + 1, statistics]: the centre of the reference's own windows, in the statistic's unit."""
        return _unrooted(self.center)


@dataclass(frozen=True)
class HeldOut:
    """Alarms on windows of the reference that the line was not calibrated on."""

    windows: int
    over_line: int
    alarms: int  # over the line and over the effect floor
    alarms_by_column: dict[str, int]
    starts: list[int]


def rooted(found: np.ndarray) -> np.ndarray:
    """The statistics with PSI replaced by its root; [columns, statistics, W]."""
    result = np.array(found)
    at = NAMES.index("psi")
    result[:, at] = np.sqrt(np.maximum(result[:, at], 0.0))
    return result


def _spreads(found: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Distance of statistics [columns, statistics, W] above their centre, in scales."""
    with np.errstate(invalid="ignore"):
        return np.asarray((rooted(found) - center[..., None]) / scale[..., None])


def _unrooted(values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(NAMES)) == NAMES.index("psi"), values**2, values)


# ---------------------------------------------------------------------------------------------------------- windows


def contiguous(allowed: np.ndarray, length: int, stride: int) -> np.ndarray:
    """float64[W, D]: windows of `length` consecutive days, all of them allowed."""
    starts = range(0, len(allowed) - length + 1, stride)
    good = [start for start in starts if allowed[start : start + length].all()]
    weights = np.zeros((len(good), len(allowed)))
    for index, start in enumerate(good):
        weights[index, start : start + length] = 1.0
    return weights


def real_windows(reference: Reference, weights: np.ndarray) -> Windows:
    """Contiguous windows by their weights [W, D]; predictions count where every day of a window has them."""
    scored = weights * (weights @ ~reference.scored == 0)[:, None]
    return Windows(weights, scored, np.ones(len(weights), bool))


def from_blocks(allowed: np.ndarray, plan: CalibrationPlan, count: int, rng: np.random.Generator) -> np.ndarray:
    """float64[count, D]: windows resampled from blocks of consecutive allowed days, drawn with replacement."""
    weights = np.zeros((count, len(allowed)))
    block = max(1, min(plan.block, plan.length, int(allowed.sum())))
    while block > 1 and not any(allowed[s : s + block].all() for s in range(len(allowed) - block + 1)):
        block -= 1
    starts = np.array([s for s in range(len(allowed) - block + 1) if allowed[s : s + block].all()], np.int64)
    if not len(starts):
        return weights[:0]
    drawn = starts[rng.integers(0, len(starts), (count, math.ceil(plan.length / block)))]
    for offset in range(block):
        # The last block is cut where the window is full.
        used = drawn[:, : math.ceil((plan.length - offset) / block)]
        np.add.at(weights, (np.repeat(np.arange(count), used.shape[1]), (used + offset).ravel()), 1.0)
    return weights


def make_windows(reference: Reference, allowed: np.ndarray, plan: CalibrationPlan, rng: np.random.Generator) -> Windows:
    """Real windows of the allowed days, and resampled ones where the real ones are too few for alpha."""
    real = real_windows(reference, contiguous(allowed, plan.length, max(1, plan.length // STRIDES)))
    if separate_windows(allowed, plan.length, reference.memory) >= windows_needed(plan.alpha):
        return real
    count = max(plan.resamples, windows_needed(plan.alpha))
    more, more_scored = (from_blocks(days, plan, count, rng) for days in (allowed, allowed & reference.scored))
    if not len(more_scored):
        more_scored = np.zeros_like(more)
    flags = np.concatenate([real.real, np.zeros(len(more), bool)])
    return Windows(np.concatenate([real.weights, more]), np.concatenate([real.scored, more_scored]), flags)


def windows_needed(alpha: float) -> int:
    """Number of separate windows from which each line is one of them, so that alpha holds for any distribution."""
    return math.ceil(len(FAMILIES) / alpha)


def separate_windows(allowed: np.ndarray, length: int, memory: int = 0) -> int:
    """Windows of the allowed days that share no day and, by trailing windows of `memory` days, no event."""
    found, run, wait = 0, 0, 0
    for good in allowed:
        if wait:
            wait -= 1
            continue
        run = run + 1 if good else 0
        if run == length:
            found, run, wait = found + 1, 0, memory
    return found


def rest_of(weights: np.ndarray, allowed: np.ndarray, weekdays: np.ndarray, season: str, memory: int = 0) -> np.ndarray:
    """float64[W, D]: weights of the days that a window is compared with: allowed days outside it.

    Days within `memory` days of it are left out too, where that leaves KEPT of the days: their trailing windows see the
    same events, so they resemble the window more than a later window will resemble the reference. With season=weekday
    each weekday is weighted to the share that it has in the window.
    """
    inside = np.asarray(weights > 0)
    rest = np.asarray(~inside & allowed)
    if memory:
        apart: np.ndarray = rest & ~_near(inside, memory)
        rest = np.where((apart.sum(axis=1) >= KEPT * allowed.sum())[:, None], apart, rest)
    if season == "none":
        return rest.astype(np.float64)
    kinds = (weekdays[:, None] == np.arange(7)).astype(np.float64)  # [D, 7]
    wanted, there = weights @ kinds, rest @ kinds
    factor = np.divide(wanted, there, out=np.zeros_like(wanted), where=there > 0)
    return np.asarray(rest * (factor @ kinds.T))


def _near(inside: np.ndarray, days: int) -> np.ndarray:
    """bool[W, D]: days at most `days` days from a day of the window."""
    total = np.cumsum(np.pad(inside, ((0, 0), (days + 1, days))), axis=1)
    return np.asarray(total[:, 2 * days + 1 :] > total[:, : -(2 * days + 1)])


# ------------------------------------------------------------------------------------------------------- statistics


def window_statistics(
    reference: Reference,
    windows: Windows,
    allowed: np.ndarray,
    plan: CalibrationPlan,
    sizes: Mapping[str, float] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """float64[columns + 1, statistics, W]: each window against the rest of the allowed days.

    `sizes`: rows of each column in the current window; larger reference windows are thinned to it (needs `rng`), so
    that sampling noise enters the line.
    """
    found = np.full((len(reference.columns) + 1, len(NAMES), len(windows.weights)), np.nan)
    memory = min(reference.memory, len(reference.days) // 5)
    rest = rest_of(windows.weights, allowed, reference.weekdays, plan.season, memory)
    scored_rest = rest_of(windows.scored, allowed & reference.scored, reference.weekdays, plan.season, memory)
    windows_counts = reference.windows(windows.weights, windows.scored)
    rest_counts = reference.windows(rest, scored_rest)
    for index, column in enumerate(reference.columns):
        current, other = windows_counts[column.name], rest_counts[column.name]
        if sizes is not None and rng is not None and sizes.get(column.name):
            size, rows = sizes[column.name], current.rows
            if (rows > size).any():
                current = current.thinned(np.divide(size, rows, out=np.ones_like(rows), where=rows > 0), rng)
        _fill(found[index], column, other, current, plan.psi_floor, judged(reference, column.name))
    if not reference.timed:
        return found
    expected = expected_rows(reference, rest, windows.weights.sum(axis=1))
    rows = windows.weights @ reference.rows
    found[-1, NAMES.index(VOLUME)] = volume(rows, expected)
    return found


def judged(reference: Reference, column: str) -> tuple[str, ...]:
    """The statistics that raise alarms for a column; for one whose values follow the time, only those of records."""
    return FAMILIES["records"] if column in reference.rising else NAMES


def _fill(
    found: np.ndarray, column: ColumnSpec, reference: Counts, current: Counts, floor: float, names: tuple[str, ...]
) -> None:
    for name, values in statistics(column, reference, current, names, floor).items():
        found[NAMES.index(name)] = np.where(np.isfinite(values), values, np.nan)


def expected_rows(reference: Reference, rest: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float64[W]: expected rows of windows of so many days, at the rate of the days with weights `rest` [W, D]."""
    total, days = rest @ reference.rows, rest.sum(axis=1)
    return np.divide(total * lengths, days, out=np.full(len(days), np.nan), where=days > 0)


def volume(rows: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|ln(rows / expected)|; zero rows count as half a row on both sides: a shop that is closed on Sundays expects none."""
    return np.abs(np.log(np.maximum(rows, 0.5) / np.maximum(expected, 0.5)))


# ------------------------------------------------------------------------------------------------------------- line


def calibrate(reference: Reference, plan: CalibrationPlan, sizes: Mapping[str, float] | None = None) -> Line:
    """The lines for windows of plan.length days in which each column has `sizes` rows."""
    return _calibrate(reference, reference.covered, plan, sizes)


def _calibrate(
    reference: Reference, allowed: np.ndarray, plan: CalibrationPlan, sizes: Mapping[str, float] | None
) -> Line:
    rng = np.random.Generator(np.random.Philox(plan.seed))
    windows = make_windows(reference, allowed, plan, rng)
    found = window_statistics(reference, windows, allowed, plan, sizes, rng)
    separate = separate_windows(allowed, plan.length, reference.memory)
    own = windows.real if separate >= ENOUGH_REAL else np.ones(len(windows.real), bool)
    center, scale = _center_and_scale(rooted(found), own)
    if separate < FEW:
        center, scale = _borrowed(center, scale, [item.kind for item in reference.columns])
    spreads = _spreads(found, center, scale)
    heights = np.zeros(len(NAMES))
    for family in FAMILIES.values():
        members = [NAMES.index(name) for name in family]
        largest = _largest(spreads[:, members], axis=(0, 1))
        heights[members] = _quantile(largest, windows.real, separate, plan.alpha / len(FAMILIES))
    columns = _largest(spreads / heights[:, None], axis=1)
    return Line(heights, center, scale, _largest(columns, axis=0), columns, windows.real, separate)


def _center_and_scale(found: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and spread of each statistic of each column over its own windows; without windows: 0 and the floor."""
    values = np.where(np.isfinite(found), found, np.nan)
    # Predictions of a short validation period have no real window: they use resampled ones.
    has_own = np.asarray(np.isfinite(values[..., own]).any(axis=-1))
    values = np.sort(np.where(has_own[..., None] & ~own, np.nan, values), axis=-1)
    center = np.nan_to_num(_ranked(values, 0.5))
    deviation = MAD_TO_DEVIATION * _ranked(np.sort(np.abs(values - center[..., None]), axis=-1), 0.5)
    tail = (_ranked(values, TAIL) - center) / TAIL_TO_DEVIATION
    floor = np.array([MIN_SCALE[name] for name in NAMES])
    return center, np.maximum(floor, np.nan_to_num(np.maximum(deviation, tail)))


def _borrowed(center: np.ndarray, scale: np.ndarray, kinds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Few windows estimate a column's centre and spread poorly: they are at least those of the median column of its
    kind.
    """
    center, scale = center.copy(), scale.copy()
    for kind in sorted(set(kinds)):
        rows = np.flatnonzero([item == kind for item in kinds])
        for part in (center, scale):
            part[rows] = np.maximum(part[rows], np.median(part[rows], axis=0))
    return center, scale


def _ranked(values: np.ndarray, level: float) -> np.ndarray:
    """Quantile of ascending values with NaN last; at a half, the mean of the two neighbours; NaN where there are none."""
    count = np.isfinite(values).sum(axis=-1)
    place = level * (count - 1).clip(0)
    low, high = np.floor(place).astype(np.int64), np.ceil(place).astype(np.int64)
    left, right = (np.take_along_axis(values, at[..., None], axis=-1)[..., 0] for at in (low, high))
    return np.asarray(left + (place - low) * (right - left))


def _largest(scores: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The largest along one axis or more, without NaN; -inf where nothing was computable."""
    return np.asarray(np.where(np.isnan(scores), -np.inf, scores).max(axis=axis, initial=-np.inf))


def _quantile(scores: np.ndarray, real: np.ndarray, separate: int, alpha: float) -> float:
    """A line: order statistic ceil((n + 1)(1 - alpha)) of n separate real windows (their largest, where n is too
    small), and no lower than the (1 - alpha) quantile of resampled windows, where there are any, and LEAST_HEIGHT.
    """
    lines = [LEAST_HEIGHT]
    if separate and real.any():
        level = min(1.0, math.ceil((separate + 1) * (1 - alpha)) / separate)
        lines.append(float(np.quantile(scores[real], level, method="higher")))
    if (~real).any():
        lines.append(float(np.quantile(scores[~real], 1 - alpha, method="higher")))
    return max(lines)


def held_out(reference: Reference, plan: CalibrationPlan, floors: Mapping[str, float]) -> HeldOut:
    """Leave each separate window out in turn, calibrate on the rest, and count how many would have alarmed."""
    days, covered = len(reference.days), reference.covered
    starts = [
        start for start in range(0, days - plan.length + 1, plan.length) if covered[start : start + plan.length].all()
    ]
    over, alarms = 0, 0
    by_column: dict[str, int] = {}
    tested: list[int] = []
    for group in np.array_split(np.array(starts, np.int64), min(len(starts), FOLDS)) if len(starts) > 1 else []:
        allowed = covered.copy()
        allowed[group[0] : group[-1] + plan.length] = False
        if not allowed.any():
            continue
        weights = np.zeros((len(group), days))
        for row, start in enumerate(group):
            weights[row, start : start + plan.length] = 1.0
        windows = real_windows(reference, weights)
        line = _calibrate(reference, allowed, replace(plan, resamples=min(plan.resamples, 200)), None)
        found = window_statistics(reference, windows, allowed, plan)
        beyond, alarm = judge(line, found, floors)
        over += int(beyond.any(axis=(0, 1)).sum())
        alarms += int(alarm.any(axis=(0, 1)).sum())
        for index, column in enumerate([*(item.name for item in reference.columns), reference.rows_column]):
            count = int(alarm[index].any(axis=0).sum())
            if count:
                by_column[column] = by_column.get(column, 0) + count
        tested += [int(reference.days[start]) for start in group]
    return HeldOut(len(tested), over, alarms, dict(sorted(by_column.items())), tested)


def judge(line: Line, found: np.ndarray, floors: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """bool[columns + 1, statistics, W]: beyond the line; and also beyond the effect floor above the centre."""
    with np.errstate(invalid="ignore"):
        beyond = line.normalised(found) > LINE
        effect = found - line.typical()[..., None] >= np.array([floors[name] for name in NAMES])[:, None]
    return beyond, beyond & effect
