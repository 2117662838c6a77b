"""Metrics of predictions, from (y, score, weight).

Every metric depends on the rows alone, not on their order (sums are exact, tied scores are ordered by weight), threads or
chunks. y is 0 or 1 for binary metrics; weights are not negative. A metric that is undefined (no rows, one class where two
are needed, no weight) is NaN; invalid input (NaN score, y of 2, a negative weight) is a ValueError.

Rows that come in parts: log loss, Brier, pinball, the reliability table and ECE are made of exact sums (`LossSum`,
`ReliabilitySum`): the sums of any split add up to the bits of the whole. ROC AUC and average precision are not: they depend
on the rank of each score among all others, so no summary shorter than the scores merges exactly. A histogram of scores per
class does merge (`kernels.profile`), but does not order the pairs that fall into one bin.

References: Fawcett, An introduction to ROC analysis, 2006; average precision as in scikit-learn (no interpolation); ECE of
Guo et al., On calibration of modern neural networks, 2017, over equal-width bins.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check, exact
from kernels.jit import njit, run_ranges
from kernels.sort import radix_order, sort_keys

_SIGN = np.uint64(1 << 63)
_PARALLEL_ROWS = 1 << 16


# --------------------------------------------------------------------------- input
def _binary(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[Any, NDArray[np.float64], Any]:
    """(y uint8[n], score float64[n] without NaN, weight float64[n] or None)."""
    scores = check.floats("score", score)
    raw = np.asarray(y)
    labels = raw if raw.dtype == np.bool_ else check.floats("y", raw)
    if labels.ndim != 1 or len(labels) != len(scores):
        raise ValueError(f"y must have {len(scores)} entries, found shape {labels.shape}")
    wrong = _first_wrong(labels, scores)
    if wrong >= 0:
        raise ValueError(
            f"y must be 0 or 1 and score a number, found y={labels[wrong]} score={scores[wrong]} at {wrong}"
        )
    return labels, scores, _weights(weight, len(scores))


def _weights(weight: ArrayLike | None, n: int) -> NDArray[np.float64] | None:
    if weight is None:
        return None
    weights = check.floats("weight", weight, n)
    if len(weights) and not (np.min(weights) >= 0 and np.max(weights) < np.inf):
        raise ValueError(f"weight must be finite and not negative, found {np.min(weights)} .. {np.max(weights)}")
    return weights


@njit
def _first_wrong(y: Any, score: Any) -> Any:
    for i in range(len(y)):
        if not (y[i] == 0 or y[i] == 1) or score[i] != score[i]:
            return i
    return -1


def _probabilities(score: NDArray[np.float64]) -> None:
    if len(score) and not (np.min(score) >= 0 and np.max(score) <= 1):
        raise ValueError(f"score must be a probability in [0, 1], found {np.min(score)} .. {np.max(score)}")


# --------------------------------------------------------------------------- ranking
@njit(inline=True)
def _key(score: Any) -> Any:
    """The score as an unsigned integer in the same order."""
    bits = np.float64(score + 0.0).view(np.uint64)  # -0.0 ties with 0.0
    return ~bits if bits & _SIGN else bits | _SIGN


@njit
def _keys_between(y: Any, score: Any, low: Any, high: Any, positive: Any, negative: Any) -> Any:
    """Keys in [low, high] of the scores, by class; returns (positives, negatives)."""
    p, q = 0, 0
    for i in range(len(y)):
        key = _key(score[i])
        if low <= key <= high:
            if y[i] == 1:
                positive[p] = key
                p += 1
            else:
                negative[q] = key
                q += 1
    return p, q


@njit
def _sampled_keys(score: Any, step: Any) -> Any:
    out = np.empty((len(score) + step - 1) // step, np.uint64)
    for i in range(len(out)):
        out[i] = _key(score[i * step])
    return out


@njit
def _twice_wins(positive: Any, negative: Any) -> Any:
    """Over all pairs: 2 for a positive above a negative, 1 for a tie. Both arrays ascend."""
    wins, below, through = np.int64(0), np.int64(0), np.int64(0)
    for i in range(len(positive)):
        key = positive[i]
        while below < len(negative) and negative[below] < key:
            below += 1
        through = max(through, below)
        while through < len(negative) and negative[through] <= key:
            through += 1
        wins += below + through
    return wins


def roc_auc(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None, threads: int = 1) -> float:
    """Probability that a random positive scores above a random negative, ties counting half. NaN with one class.

    Shape: y {0, 1}[n], score float64[n] (infinities rank), weight float64[n] -> float. Without weights exact integers, rounded
    once. Raises ValueError as in the module docstring.
    """
    labels, scores, weights = _binary(y, score, weight)
    if weights is not None:
        true, false = _cumulated(labels, scores, weights)
        return _area(true, false)
    parts = threads if len(scores) >= _PARALLEL_ROWS else 1
    cuts = np.sort(_sampled_keys(scores, max(len(scores) // 4096, 1)))
    pivots = [0, *(int(cuts[len(cuts) * part // parts]) for part in range(1, parts)), 1 << 64]

    def wins(part: int, _: int) -> tuple[int, int, int]:
        """Of the scores between two pivots: twice the wins, positives, negatives. Unused pages of `sides` are never touched."""
        if pivots[part] == pivots[part + 1]:
            return 0, 0, 0
        sides = np.empty((2, len(scores)), np.uint64)
        low, high = np.uint64(pivots[part]), np.uint64(pivots[part + 1] - 1)
        p, q = _keys_between(labels, scores, low, high, sides[0], sides[1])
        positive, negative = sort_keys(sides[0, :p]), sort_keys(sides[1, :q])
        return int(_twice_wins(positive, negative)), int(p), int(q)

    total, below, above = 0, 0, 0
    for within, p, q in run_ranges(wins, [(part, part + 1) for part in range(parts)], threads):
        total += within + 2 * p * below
        above, below = above + p, below + q
    return total / (2 * above * below) if above and below else float("nan")


def _descending(labels: Any, scores: NDArray[np.float64], weights: Any) -> NDArray[np.int64]:
    """Rows by score descending; ties by (y, weight), so that cumulative sums do not depend on the order of rows."""
    order = None
    if weights is not None:
        order = radix_order((weights + 0.0).view(np.int64))
        order = radix_order(np.asarray(labels).astype(np.int64), order)
    bits = (scores + 0.0).view(np.int64)
    rising = np.where(bits < 0, ~bits ^ np.int64(-(2**63)), bits)
    return radix_order(~rising, order)


@njit
def _cumulate(labels: Any, scores: Any, weights: Any, order: Any, true: Any, false: Any) -> Any:
    """true[k], false[k]: weight of positives and negatives down to the k-th distinct score; k = 0 is none. Returns k + 1."""
    count = 0
    above, rest = 0.0, 0.0
    true[0], false[0] = 0.0, 0.0
    for k in range(len(order)):
        row = order[k]
        w = weights[row] if len(weights) else 1.0
        if labels[row] == 1:
            above += w
        else:
            rest += w
        if k == len(order) - 1 or scores[order[k + 1]] != scores[row]:
            count += 1
            true[count], false[count] = above, rest
    return count + 1


def _cumulated(labels: Any, scores: Any, weights: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    order = _descending(labels, scores, weights)
    true, false = np.empty(len(order) + 1), np.empty(len(order) + 1)
    used = _cumulate(labels, scores, np.empty(0) if weights is None else weights, order, true, false)
    return true[:used], false[:used]


def _area(true: NDArray[np.float64], false: NDArray[np.float64]) -> float:
    if not (true[-1] > 0 and false[-1] > 0):
        return float("nan")
    parts = np.diff(false / false[-1]) * (true[1:] / true[-1] + true[:-1] / true[-1]) * 0.5
    return min(exact.total(parts), 1.0)


class Curve(NamedTuple):
    """Points of a curve from the highest threshold down; x ascends for ROC (false rate) and for PR (recall)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def roc_curve(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Curve:
    """(false positive rate, true positive rate) at every distinct score, from (0, 0) to (1, 1); NaN with one class."""
    true, false = _cumulated(*_binary(y, score, weight))
    with np.errstate(invalid="ignore"):
        return Curve(false / false[-1], true / true[-1])


def precision_recall_curve(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Curve:
    """(recall, precision) at every distinct score of positive weight, from the highest down; NaN without positives."""
    true, false = _cumulated(*_binary(y, score, weight))
    kept = true + false > 0
    with np.errstate(invalid="ignore"):
        return Curve(true[kept] / true[-1], true[kept] / (true + false)[kept])


def average_precision(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Sum over distinct scores of precision * gain in recall (scikit-learn's rule). NaN without positives."""
    recall, precision = precision_recall_curve(y, score, weight)
    if len(recall) == 0 or not recall[-1] > 0:
        return float("nan")
    return exact.total(np.diff(recall, prepend=0.0) * precision)


# --------------------------------------------------------------------------- losses
@dataclass(frozen=True)
class LossSum:
    """The exact sums of a mean loss: sum of weight * loss and sum of weights, in units of 2**-1084.

    Each weight * loss is rounded to a double first: an error of 2**-53 relative, or of 2**-1075 when it is below 2**-1022.
    Without weights each row weighs 1. Sums of parts are added with +, starting from `LossSum()`.
    """

    loss: int = 0
    weight: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        """The sums over the rows of both."""
        return LossSum(self.loss + other.loss, self.weight + other.weight)

    def mean(self) -> float:
        """Mean loss; NaN without weight."""
        return exact.nearest_double(self.loss) / exact.nearest_double(self.weight) if self.weight else float("nan")


def _loss_sum(losses: NDArray[np.float64], weights: NDArray[np.float64] | None) -> LossSum:
    if weights is None:
        weights = np.ones(len(losses))
    with np.errstate(over="ignore"):  # `group_sums` raises for an infinite product
        weighted = losses * weights
    one_group = np.zeros(len(losses), np.int64)
    return LossSum(*(exact.group_sums(x, one_group, 1)[0] for x in (weighted, weights)))


@njit
def _log_losses(y: Any, p: Any, floor: Any, out: Any) -> None:
    for i in range(len(y)):
        likely = p[i] if y[i] == 1 else 1.0 - p[i]
        out[i] = -np.log(min(max(likely, floor), 1.0))


def log_loss_sum(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> LossSum:
    """-log(probability predicted for the actual class), the probability clipped to at least 2**-52. Nats."""
    labels, scores, weights = _binary(y, score, weight)
    _probabilities(scores)
    losses = np.empty(len(scores))
    _log_losses(labels, scores, float(np.finfo(float).eps), losses)
    return _loss_sum(losses, weights)


def log_loss(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of `log_loss_sum`. NaN without rows."""
    return log_loss_sum(y, score, weight).mean()


def brier_sum(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> LossSum:
    """(score - y)**2."""
    labels, scores, weights = _binary(y, score, weight)
    _probabilities(scores)
    return _loss_sum((scores - labels) ** 2, weights)


def brier(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of `brier_sum`. NaN without rows."""
    return brier_sum(y, score, weight).mean()


def pinball_sum(y: ArrayLike, score: ArrayLike, quantile: float, weight: ArrayLike | None = None) -> LossSum:
    """max(q * (y - score), (q - 1) * (y - score)): the loss of a predicted q-quantile.

    Raises ValueError unless 0 < q < 1 and y and score are finite.
    """
    scores = check.floats("score", score)
    targets = check.floats("y", y, len(scores))
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be in (0, 1), found {quantile}")
    error = targets - scores
    if not np.all(np.isfinite(error)):
        raise ValueError(f"y and score must be finite, found a difference of {error[~np.isfinite(error)][0]}")
    return _loss_sum(np.maximum(quantile * error, (quantile - 1.0) * error), _weights(weight, len(scores)))


def pinball(y: ArrayLike, score: ArrayLike, quantile: float, weight: ArrayLike | None = None) -> float:
    """Mean of `pinball_sum`. NaN without rows."""
    return pinball_sum(y, score, quantile, weight).mean()


# --------------------------------------------------------------------------- calibration
class Reliability(NamedTuple):
    """Per equal-width bin of the score: weight of its rows, their mean score, share of positives (NaN when empty)."""

    edges: NDArray[np.float64]
    weight: NDArray[np.float64]
    score: NDArray[np.float64]
    positive: NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilitySum:
    """The exact sums of a reliability table: weight, weight * score and weight * y per bin, in units of 2**-1084.

    Sums of parts with the same number of bins are added with +.
    """

    weight: list[int]
    score: list[int]
    positive: list[int]

    def __add__(self, other: ReliabilitySum) -> ReliabilitySum:
        """The sums over the rows of both. Raises ValueError when their numbers of bins differ."""
        if len(self.weight) != len(other.weight):
            raise ValueError(f"both must have {len(self.weight)} bins, found {len(other.weight)}")
        sides = zip(astuple(self), astuple(other), strict=True)
        return ReliabilitySum(*([p + q for p, q in zip(a, b, strict=True)] for a, b in sides))

    def table(self) -> Reliability:
        """The table; NaN in bins without weight."""
        weight, score, positive = ([exact.nearest_double(v) for v in sums] for sums in astuple(self))
        mass = np.array(weight)
        with np.errstate(invalid="ignore"):
            means = np.array(score) / mass, np.array(positive) / mass
        return Reliability(np.linspace(0.0, 1.0, len(mass) + 1), mass, *means)

    def ece(self) -> float:
        """Mean over rows of |share of positives - mean score| of the row's bin; NaN without weight."""
        table = self.table()
        used = table.weight > 0
        if not used.any():
            return float("nan")
        gaps = table.weight[used] * np.abs(table.positive[used] - table.score[used])
        return exact.total(gaps) / exact.total(table.weight)


def reliability_sum(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None, bins: int = 10) -> ReliabilitySum:
    """Sums of `reliability`. Raises ValueError for bins < 1 and as in the module docstring."""
    labels, scores, weights = _binary(y, score, weight)
    _probabilities(scores)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    which = np.minimum(np.searchsorted(np.linspace(0.0, 1.0, bins + 1), scores, side="right") - 1, bins - 1)
    weights = np.ones(len(scores)) if weights is None else weights
    columns = (weights, weights * scores, weights * labels)
    return ReliabilitySum(*(exact.group_sums(column, which, bins) for column in columns))


def reliability(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None, bins: int = 10) -> Reliability:
    """Reliability table over `bins` equal bins [k / bins, (k + 1) / bins) of [0, 1], 1 in the last."""
    return reliability_sum(y, score, weight, bins).table()


def ece(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None, bins: int = 10) -> float:
    """Expected calibration error: mean over rows of |share of positives - mean score| of the row's bin. NaN without rows."""
    return reliability_sum(y, score, weight, bins).ece()
