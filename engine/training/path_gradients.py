"""Contributions of a network's inputs: integrated gradients along a path from a typical row to the row that is scored.

Sundararajan, Taly, Yan: Axiomatic attribution for deep networks, ICML 2017. The typical row has the median of each encoded number
and the most frequent code of each category among the training rows. Numbers move along a straight line. Codes cannot move: they
change half-way, one after the other, once in the order of the columns and once in the opposite one, and a category contributes
the mean of the two steps that its change makes. So what two features do together is shared equally between them, whatever the
module makes of its codes: it is called as it is.

The integral is a sum over STEPS points: Gauss-Legendre, half of them before the codes change and half after. Everything is in
float32, also for a model that scores in bf16. Each call of a module has BLOCK rows at STEPS points, padded, in one shape: a
row's bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from engine.training.examples import Examples, aligned_empty
from engine.training.predict import Evaluators
from engine.training.threads import Team

STEPS, BLOCK = 32, 32
MEDIAN_ROWS = 100_000  # evenly spaced: enough for a median
_X, _W = np.polynomial.legendre.leggauss(STEPS // 2)
TIMES = np.concatenate([(_X + 1) / 4, (_X + 3) / 4])
WEIGHTS = np.concatenate([_W, _W]) / 4


class TypicalRecord(TypedDict):
    """The typical row in model.json."""

    numeric: list[float]
    codes: list[int]


@dataclass(frozen=True)
class Typical:
    """A typical training row: numeric float32[F], codes int32[K]."""

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, train: Examples, cardinalities: Sequence[int]) -> Typical:
        """Lower medians and most frequent codes, of equally frequent ones the lowest, of at most MEDIAN_ROWS training rows."""
        rows = slice(None, None, -(-max(len(train), 1) // MEDIAN_ROWS))
        numeric, codes = train.numeric[rows], train.codes[rows]
        middle = (len(numeric) - 1) // 2
        columns = [np.partition(numeric[:, index], middle)[middle] for index in range(numeric.shape[1])]
        counts = [np.bincount(codes[:, k], minlength=size) for k, size in enumerate(cardinalities)]
        return cls(np.array(columns, np.float32), np.array([count.argmax() for count in counts], np.int32))

    @classmethod
    def read(cls, record: TypicalRecord) -> Typical:
        """From a record."""
        return cls(np.array(record["numeric"], np.float32), np.array(record["codes"], np.int32))

    def record(self) -> TypicalRecord:
        """As a record."""
        return {"numeric": [float(value) for value in self.numeric], "codes": self.codes.tolist()}


class PathGradients:
    """Contributions by the weights of `evaluators`, which compute in float32."""

    def __init__(self, evaluators: Evaluators, typical: Typical) -> None:
        self._evaluators, self._typical = evaluators, typical

    def baseline(self) -> NDArray[np.float64]:
        """float64[outputs]: the raw outputs of the typical row."""
        typical = self._typical
        numeric, codes = np.tile(typical.numeric, (BLOCK, 1)), np.tile(typical.codes, (BLOCK, 1))
        return self._outputs(np.repeat(numeric, STEPS, axis=0), np.repeat(codes, STEPS, axis=0))[0]

    def contributions(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], share: NDArray[np.float64], team: Team
    ) -> NDArray[np.float64]:
        """See engine.training.finished.Model."""
        n, width = numeric.shape
        out = np.zeros((n, width + codes.shape[1]))

        def run(index: int) -> None:
            part = slice(index * BLOCK, min((index + 1) * BLOCK, n))
            count = part.stop - part.start
            x, c = np.tile(self._typical.numeric, (BLOCK, 1)), np.tile(self._typical.codes, (BLOCK, 1))
            of = np.zeros((BLOCK, share.shape[1]))
            x[:count], c[:count], of[:count] = numeric[part], codes[part], share[part]
            out[part, :width] = self._numbers(x, c, of)[:count]
            out[part, width:] = self._categories(x, c, of)[:count]

        team.run(run, -(-n // BLOCK))
        return out

    def _numbers(
        self, x: NDArray[np.float32], codes: NDArray[np.int32], share: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64[BLOCK, F] by gradients at every point of the path."""
        if not x.shape[1]:
            return np.zeros(x.shape)
        away = x.astype(np.float64) - self._typical.numeric
        path = self._typical.numeric + away[:, None] * TIMES[:, None]
        there = np.where((TIMES > 0.5)[:, None], codes[:, None], self._typical.codes)
        gradients = self._evaluators.gradients(
            _aligned(path.reshape(-1, x.shape[1]), np.float32),
            _aligned(there.reshape(BLOCK * STEPS, codes.shape[1]), np.int32),
            torch.from_numpy(np.repeat(share, STEPS, axis=0).astype(np.float32)),
        )
        found = gradients.numpy().reshape(BLOCK, STEPS, -1)
        total = np.zeros(away.shape)
        for step, weight in enumerate(WEIGHTS):
            total += weight * found[:, step]
        return total * away

    def _categories(
        self, x: NDArray[np.float32], codes: NDArray[np.int32], share: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64[BLOCK, K] by the changes of the codes half-way."""
        columns = codes.shape[1]
        if not columns:
            return np.zeros(codes.shape)
        middle = ((x.astype(np.float64) + self._typical.numeric) / 2).astype(np.float32)
        changed = np.tri(columns + 1, columns, -1, dtype=bool)  # the first j codes are those of the row
        states = np.concatenate([changed, changed[:, ::-1]])  # and the last j
        margins = np.empty((BLOCK, len(states)))
        for low in range(0, len(states), STEPS):
            some = states[np.minimum(np.arange(low, low + STEPS), len(states) - 1)]
            there = np.where(some, codes[:, None], self._typical.codes).reshape(-1, columns)
            outputs = self._outputs(np.repeat(middle, STEPS, axis=0), there).reshape(BLOCK, STEPS, -1)
            margin = np.zeros((BLOCK, STEPS))
            for k in range(outputs.shape[2]):
                margin += share[:, k, None] * outputs[:, :, k]
            margins[:, low : low + STEPS] = margin[:, : len(states) - low]
        forward, backward = margins[:, : columns + 1], margins[:, columns + 1 :]
        return (np.diff(forward, axis=1) + np.diff(backward, axis=1)[:, ::-1]) / 2

    def _outputs(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float64]:
        """float64[BLOCK * STEPS, outputs], the mean of the members'."""
        found = self._evaluators(_aligned(numeric, np.float32), _aligned(codes, np.int32)).double()
        return np.asarray((found.mean(1) if found.dim() == 3 else found).numpy())


def _aligned(values: NDArray[np.generic], kind: type[np.generic]) -> torch.Tensor:
    held = aligned_empty(values.shape, kind)
    held[:] = values
    return torch.from_numpy(held)
