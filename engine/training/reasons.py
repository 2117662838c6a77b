"""Reasons of a score: the features of a row with the largest contributions to its margin.

A margin is a number that contributions add up to, together with a baseline that is the same for all rows: the log odds of the
positive class; of several classes the raw output of the class with the highest score less the mean of all raw outputs; of classes
in order the log odds of a class above the lowest; a number in the target's unit, or its logarithm where the loss has a log
link. Of several targets the main one is explained. Columns that a feature is encoded in are added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import UserError
from engine.features.encode import Encoder
from engine.training.drift_reference import encoded_columns
from engine.training.heads import Head

REASON, CONTRIBUTION = "reason_", "contribution_"


@dataclass(frozen=True)
class Reasons:
    """The reasons of n rows: place of the feature int32[n, k] (-1: no other feature contributes), its contribution
    float32[n, k], the largest in size first; the largest error of a row's sum, and the largest distance of a margin from the
    baseline, in the unit of the margin.
    """

    feature: NDArray[np.int32]
    contribution: NDArray[np.float32]
    error: float
    distance: float

    def columns(self, encoder: Encoder) -> dict[str, pa.Array]:
        """The columns `reason_1`, `contribution_1`, `reason_2`, ... of an output: a feature's name, and its contribution."""
        names = pa.array([item.name for item in encoder.features], pa.string())
        found: dict[str, pa.Array] = {}
        for place, (reason, contribution) in enumerate(pairs_of(self.feature.shape[1])):
            code = np.ascontiguousarray(self.feature[:, place])
            none = code < 0
            found[reason] = pa.DictionaryArray.from_arrays(pa.array(code, mask=none), names)
            found[contribution] = pa.array(np.ascontiguousarray(self.contribution[:, place]), mask=none)
        return found

    def packed(self) -> NDArray[np.int32]:
        """int32[n, 2 k]: the bits of both, for a digest."""
        return np.concatenate([self.feature, self.contribution.view(np.int32)], axis=1)


def pairs_of(count: int) -> list[tuple[str, str]]:
    """Names of the columns of so many reasons."""
    return [(f"{REASON}{place}", f"{CONTRIBUTION}{place}") for place in range(1, count + 1)]


def names_of(count: int) -> list[str]:
    """Names of the columns of so many reasons, in the order of an output."""
    return [name for pair in pairs_of(count) for name in pair]


def describe_margin(head: Head) -> str:
    """What contributions add up to, in words. Raises UserError for a loss whose scores are no function of one margin."""
    loss, target, classes = head.loss, head.name, head.classes
    if loss.task == "binary":
        return f"log odds that {target} is {classes[-1]!r}"
    if loss.ordered:
        return f"log odds that {target} is above {classes[0]!r}"
    if loss.task == "multiclass":
        return f"raw output of the class of {target} with the highest score, less the mean of all raw outputs"
    if loss.task != "regression" or loss.raw != 1:
        raise UserError(
            f"score.reasons must be 0 for a model of train.loss={loss.name}, whose {loss.outputs(len(classes))} raw outputs make "
            "a score together: give reasons for a model with a loss of one output"
        )
    return f"value of {target}" if loss.link is None else f"raw output of {target}, before the link of {loss.name}"


def shares_of(head: Head, scores: NDArray[Any], outputs: int, temperature: float = 1.0) -> NDArray[np.float64]:
    """float64[n, outputs]: what a row's margin has of each raw output of the model. Scores of the head: [n] or [n, classes]."""
    loss, n = head.loss, len(scores)
    found = np.zeros((n, outputs))
    mine = found[:, head.at]
    if loss.number:
        mine[:] = head.scale.scale if loss.link is None else 1.0
        return found
    if loss.ordered:
        mine[:, 0] = -1.0
    elif loss.task == "multiclass":
        mine[:] = -1.0 / mine.shape[1]
        mine[np.arange(n), np.argmax(scores, axis=1)] += 1.0
    else:
        mine[:] = 1.0
    mine /= temperature
    return found


def by_feature(encoder: Encoder, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n, features] from those of encoded columns [n, numbers and codes], added up column by column."""
    place = {item.name: index for index, item in enumerate(encoder.features)}
    found = np.zeros((len(contributions), len(place)))
    for name, columns, categorical in encoded_columns(encoder):
        for column in range(columns.start, columns.stop):
            found[:, place[name]] += contributions[:, column + (encoder.width if categorical else 0)]
    return found


def largest(values: NDArray[np.float64], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Places int32[n, count] and values float32[n, count] of the largest in size of each row, of equal ones the first.

    A value of 0 or no number is no reason: place -1 and 0.
    """
    size = np.where(np.isfinite(values), np.abs(values), 0.0)
    order = np.argsort(-size, axis=1, kind="stable")[:, :count]
    place, found = np.full((len(values), count), -1, np.int32), np.zeros((len(values), count), np.float32)
    taken = np.take_along_axis(values, order, axis=1)
    real = np.take_along_axis(size, order, axis=1) > 0
    place[:, : order.shape[1]] = np.where(real, order, -1)
    found[:, : order.shape[1]] = np.where(real, taken, 0.0)
    return place, found
