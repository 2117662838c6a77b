"""Permutation importance: what the watched metric loses on validation rows when a column, or all features of a view, are shuffled
among them. Breiman: Random Forests, Machine Learning, 2001; Fisher, Rudin, Dominici, JMLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.features.encode import Encoder
from engine.training.drift_reference import encoded_columns
from engine.training.evaluate import point_metrics
from engine.training.examples import Examples
from engine.training.loss import Loss

MOST_ROWS = 2_048
FEWEST_ROWS = 20
CONFIDENCE = 0.95
Scores = Callable[[NDArray[np.float32], NDArray[np.int32]], NDArray]


class Group(TypedDict):
    """Features that are shuffled together: how much worse the metric becomes, with an interval over the shuffles."""

    name: str
    features: int
    loss: float
    low: float | None
    high: float | None


class Importance(TypedDict):
    """The importance of each column and view, the largest first, and the metric, rows and shuffles behind it."""

    metric: str
    base: float
    rows: int
    shuffles: int
    groups: list[Group]


def permuted(
    encoder: Encoder, scores_of: Scores, valid: Examples, loss: Loss, metric: str, shuffles: int, weighted: bool
) -> Importance | None:
    """The importance on at most MOST_ROWS labelled rows, evenly spaced; None of too few, or where the metric has no value."""
    known = np.flatnonzero(np.isfinite(valid.target))
    rows = known[np.linspace(0, len(known) - 1, min(MOST_ROWS, len(known)), dtype=np.int64)] if len(known) else known
    if len(rows) < FEWEST_ROWS or not shuffles:
        return None
    numeric, codes = np.ascontiguousarray(valid.numeric[rows]), np.ascontiguousarray(valid.codes[rows])
    target = valid.target[rows]
    weight = valid.weight[rows] if weighted and valid.weight is not None else None
    sign = loss.metrics[metric].sign

    def quality(scores: NDArray) -> float:
        return sign * point_metrics(target, scores, loss, weight=weight)[metric]

    base = quality(scores_of(numeric, codes))
    if not np.isfinite(base):
        return None
    orders = [np.random.Generator(np.random.Philox(place)).permutation(len(rows)) for place in range(shuffles)]
    groups = []
    for name, places in _groups(encoder).items():
        # All shuffles of a group are scored together: a model is called with whole tiles.
        blocks = np.tile(numeric, (shuffles, 1)), np.tile(codes, (shuffles, 1))
        for place, order in enumerate(orders):
            part = slice(place * len(rows), (place + 1) * len(rows))
            for columns, categorical in places:
                block = blocks[categorical]
                block[part, columns] = block[part, columns][order]
        found = scores_of(*blocks)
        losses = np.array([base - quality(found[k * len(rows) : (k + 1) * len(rows)]) for k in range(shuffles)])
        groups.append(_group(name, len(places), losses))
    groups.sort(key=lambda item: (-item["loss"], item["name"]))
    return {"metric": metric, "base": sign * base, "rows": len(rows), "shuffles": shuffles, "groups": groups}


def _groups(encoder: Encoder) -> dict[str, list[tuple[slice, bool]]]:
    """Column or view -> the places of its features in the blocks: (columns, whether of the block of codes)."""
    origin = {feature.name: feature.origin for feature in encoder.features}
    found: dict[str, list[tuple[slice, bool]]] = {}
    for name, columns, categorical in encoded_columns(encoder):
        of = origin.get(name, "direct")
        found.setdefault(name if of == "direct" else of, []).append((columns, categorical))
    return found


def _group(name: str, features: int, losses: NDArray[np.float64]) -> Group:
    from scipy.special import stdtrit  # takes tenths of a second to import

    mean = float(losses.mean())
    if len(losses) < 2:
        return {"name": name, "features": features, "loss": mean, "low": None, "high": None}
    half = float(stdtrit(len(losses) - 1, 0.5 + CONFIDENCE / 2) * losses.std(ddof=1) / np.sqrt(len(losses)))
    return {"name": name, "features": features, "loss": mean, "low": mean - half, "high": mean + half}
