"""Columns that may not be known when a row is scored: each is left out, with what was found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from engine.draft.events import seconds_of
from engine.draft.roles import is_time

ALONE = 0.95  # area under the ROC curve, or rank correlation, that one honest column hardly has
ONE_CLASS = 0.999
WITH_OUTCOME = 0.2  # share of rows without a target in which a column is empty, beyond that in other rows
LATER = 0.99
WITH_DELAY = 0.3  # rank correlation with the time that the label took
MOST_VALUES = 50  # of a column whose values are looked at one by one
LEAST = 30  # rows behind a finding


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The target as numbers float64[n] (NaN where it is missing), its loss, and when it was known, if that is a column."""

    values: NDArray[np.float64]
    loss: str
    known_at: str | None


def later_times(table: pa.Table, time: str) -> dict[str, float]:
    """Time columns that lie after the event time in nearly all rows -> median delay in seconds."""
    found = {}
    start = seconds_of(table[time])
    for field in table.schema:
        if field.name == time or not is_time(field.type):
            continue
        delay = seconds_of(table[field.name]) - start
        delay = delay[np.isfinite(delay)]
        if len(delay) >= LEAST and np.mean(delay >= 0) >= LATER and np.median(delay) > 0:
            found[field.name] = float(np.median(delay))
    return found


def find_suspects(table: pa.Table, columns: list[str], time: str, outcome: Outcome) -> dict[str, str]:
    """Column -> what makes it suspect, of the columns that could be features. Rows of `table` are in order of time."""
    found = {}
    delay = None if outcome.known_at is None else seconds_of(table[outcome.known_at]) - seconds_of(table[time])
    for name in columns:
        values = table[name]
        one = not pa.types.is_nested(values.type)  # a value by itself, not a list
        reason = (
            _of_one_class(values, outcome)
            or _with_outcome(values, outcome)
            or (_tells_alone(values, outcome) if one else "")
            or ("" if delay is None else _with_delay(values, delay, outcome.known_at or ""))
        )
        if reason:
            found[name] = reason
    return found


def _of_one_class(values: pa.ChunkedArray, outcome: Outcome) -> str:
    """Filled for one class of a target of two, and hardly for the other."""
    if outcome.loss != "binary" or not values.null_count:
        return ""
    known = np.isfinite(outcome.values)
    filled = pc.is_valid(values).to_numpy(zero_copy_only=False) & known
    shares = [np.mean(filled[outcome.values == label]) for label in (0.0, 1.0)]
    most = int(np.argmax(shares))
    share_of = np.mean(outcome.values[filled] == most) if filled.sum() >= LEAST else 0.0
    base = np.mean(outcome.values[known] == most)
    if share_of >= ONE_CLASS and base < 0.99:
        return f"is filled for one class of the target only ({share_of:.1%} of its {filled.sum():,} values)"
    return ""


def _with_outcome(values: pa.ChunkedArray, outcome: Outcome) -> str:
    """Empty where the target is missing, and filled elsewhere."""
    without = ~np.isfinite(outcome.values)
    if without.sum() < LEAST or not values.null_count:
        return ""
    empty = pc.is_null(values).to_numpy(zero_copy_only=False)
    there, else_ = np.mean(empty[without]), np.mean(empty[~without])
    if there - else_ > WITH_OUTCOME:
        return (
            f"comes with the outcome: empty in {there:.0%} of the rows without a target, in {else_:.0%} of the others"
        )
    return ""


def _tells_alone(values: pa.ChunkedArray, outcome: Outcome) -> str:
    """Predicts the target of the later half of the rows by itself, fitted on the earlier half."""
    known = np.isfinite(outcome.values)
    y = outcome.values[known]
    x = values.filter(pa.array(known))
    half = len(y) // 2
    if half < LEAST:
        return ""
    if outcome.loss == "multiclass":
        guess, base = (
            _modes(_binned(x, half), y, half),
            np.max(np.unique(y[half:], return_counts=True)[1]) / (len(y) - half),
        )
        hits = float(np.mean(guess == y[half:]))
        return f"predicts the class of {hits:.1%} of the rows by itself" if hits > ALONE and base < 0.9 else ""
    numbers = _numbers(x)
    guesses = [] if numbers is None else [numbers[half:]]
    if numbers is None or len(np.unique(numbers[np.isfinite(numbers)])) <= MOST_VALUES:  # codes need not be in order
        guesses.append(_means(x, y, half))
    if x.null_count:
        guesses.append(pc.is_null(x).to_numpy(zero_copy_only=False)[half:].astype(np.float64))
    strength = max((_strength(guess, y[half:], outcome.loss) for guess in guesses), default=0.0)
    if strength <= ALONE:
        return ""
    what = "area under the ROC curve" if outcome.loss == "binary" else "rank correlation"
    return f"predicts the target by itself ({what} {strength:.3f})"


def _strength(guess: NDArray[np.float64], y: NDArray[np.float64], loss: str) -> float:
    """How well a guess [n] orders the target [n]: area under the ROC curve, or rank correlation, whichever its direction."""
    seen = np.isfinite(guess)
    if seen.sum() < LEAST or len(np.unique(y[seen])) < 2 or np.ptp(guess[seen]) == 0:
        return 0.0
    if loss == "binary":
        area = _area(guess[seen], y[seen])
        return max(area, 1 - area)
    return abs(float(stats.spearmanr(guess[seen], y[seen]).statistic))


def _binned(x: pa.ChunkedArray, half: int) -> pa.ChunkedArray:
    """Numbers of many values by the part of the earlier half's values that they lie in; other columns as they are."""
    numbers = _numbers(x)
    if numbers is None or len(np.unique(numbers[np.isfinite(numbers)])) <= MOST_VALUES:
        return x
    earlier = numbers[:half][np.isfinite(numbers[:half])]
    edges = np.unique(np.quantile(earlier, np.linspace(0, 1, MOST_VALUES + 1)[1:-1]))
    return pa.chunked_array([pa.array(np.where(np.isfinite(numbers), np.searchsorted(edges, numbers), -1))])


def _with_delay(values: pa.ChunkedArray, delay: NDArray[np.float64], known_at: str) -> str:
    """Goes with the time that the label took, which nobody knows at the event."""
    x = _numbers(values)
    if x is None:
        return ""
    seen = np.isfinite(x) & np.isfinite(delay)
    if seen.sum() < LEAST or np.ptp(x[seen]) == 0:
        return ""
    rank = float(stats.spearmanr(x[seen], delay[seen]).statistic)
    if abs(rank) > WITH_DELAY:
        return f"goes with the time until {known_at} (rank correlation {rank:.2f}), which nobody knows at the event"
    return ""


def by_rank(table: pa.Table, names: list[str], outcome: Outcome) -> list[str]:
    """The columns of numbers by their rank correlation with the target, the strongest first."""

    def strength(name: str) -> float:
        x = _numbers(table[name])
        seen = np.isfinite(outcome.values) if x is None else np.isfinite(x) & np.isfinite(outcome.values)
        if x is None or seen.sum() < LEAST or np.ptp(x[seen]) == 0:
            return 0.0
        return abs(float(stats.spearmanr(x[seen], outcome.values[seen]).statistic))

    return sorted(names, key=strength, reverse=True)


def _numbers(values: pa.ChunkedArray) -> NDArray[np.float64] | None:
    """float64[n] with NaN for null; None for text."""
    kind = values.type
    if pa.types.is_boolean(kind):
        values = pc.cast(values, pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return None
    return np.asarray(
        pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64
    )  # ids may pass 2**53


def _codes(x: pa.ChunkedArray) -> NDArray[np.int64]:
    """int64[n], a number for each value; 0 for null."""
    encoded = pc.dictionary_encode(x).combine_chunks()
    return np.asarray(pc.fill_null(encoded.indices, -1), np.int64) + 1


def _means(x: pa.ChunkedArray, y: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """For each later row, the mean target of earlier rows with its value; NaN for a new value."""
    codes = _codes(x)
    size = int(codes.max()) + 1
    counts = np.bincount(codes[:half], minlength=size)
    sums = np.bincount(codes[:half], y[:half], size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)[codes[half:]]


def _modes(x: pa.ChunkedArray, y: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """For each later row, the most frequent class of earlier rows with its value; NaN for a new value."""
    codes = _codes(x)
    classes, place = np.unique(y[:half], return_inverse=True)
    size = (int(codes.max()) + 1) * len(classes)
    counts = np.bincount(codes[:half] * len(classes) + place, minlength=size).reshape(-1, len(classes))
    return np.where(counts.sum(1) > 0, classes[counts.argmax(1)], np.nan)[codes[half:]]


def _area(scores: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Area under the ROC curve by ranks (Mann, Whitney 1947)."""
    ranks = stats.rankdata(scores)
    positive = y == 1.0
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(y) - count)))
