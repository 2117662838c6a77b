"""A finished model: what evaluation, the bundle, the gate and scoring need of a model of any kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Protocol, TypedDict

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from engine.errors import UserError
from engine.runtime.records import Within
from engine.runtime.run import Precision
from engine.training.loss import Loss
from engine.training.losses import to_scores
from engine.training.model import ArchitectureRecord, Network, architecture
from engine.training.predict import TILE_ROWS, Evaluators
from engine.training.target import TargetScale, Values
from engine.training.threads import Team

FITTED = "fitted:"  # before the names of fitted arrays among the tensors


class PartRecord(TypedDict):
    """A model without its weights: its architecture, and the arithmetic that it is computed in."""

    architecture: ArchitectureRecord
    precision: Precision
    tile_rows: Annotated[int, Within(1, 2**20)]


class Model(Protocol):
    """A model that scores encoded rows. The bits of a row's result do not depend on other rows or on threads."""

    @property
    def target(self) -> TargetScale:
        """The scale that turns raw outputs into values of the target."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of a row's raw outputs."""

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """Raw outputs float32[n, ...] from numeric float32[n, F] and codes int32[n, K]; `team`: a running thread team to use."""

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """Scores [n], [n, classes] or [n, levels] of raw outputs, in the unit and type of the target (`losses.to_scores`)."""

    def baseline(self) -> NDArray[np.float64]:
        """float64[outputs]: the raw outputs that contributions start from, the same for every row."""

    def contributions(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        share: NDArray[np.float64],
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float64]:
        """float64[n, F + K]: what each column of a row adds to a margin, the sum over raw outputs k of share[i, k] times output k
        less its baseline, where share is float64[n, outputs]. The contributions of a weighted sum of models are the weighted
        sum of theirs. Raises UserError for a model that cannot tell.
        """

    def weights(self) -> bytes:
        """All learned numbers as safetensors bytes: equal models give equal bytes."""

    def describe(self) -> ArchitectureRecord:
        """JSON from which, with `weights`, the same model is built again."""


@dataclass(frozen=True)
class FinishedNetwork:
    """A torch network with the arithmetic that it is computed in: precision, and rows of a tile."""

    network: Network
    precision: str
    tile_rows: int = TILE_ROWS

    @property
    def target(self) -> TargetScale:
        """See Model."""
        return self.network.target

    @property
    def output_shape(self) -> tuple[int, ...]:
        """See Model."""
        return self.network.output_shape

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """See Model."""
        return self._evaluators.logits(numeric, codes, self.tile_rows, threads, team)

    def to_scores(self, loss: Loss, logits: NDArray[np.float32], exact: bool = False) -> Values:
        """See Model."""
        return to_scores(loss, logits, self.target, exact)

    def baseline(self) -> NDArray[np.float64]:
        """See Model."""
        raise UserError("score.reasons must be 0 for a network: reasons are given for boosted trees")

    def contributions(
        self,
        numeric: NDArray[np.float32],  # noqa: ARG002
        codes: NDArray[np.int32],  # noqa: ARG002
        share: NDArray[np.float64],  # noqa: ARG002
        threads: int = 1,  # noqa: ARG002
        team: Team | None = None,  # noqa: ARG002
    ) -> NDArray[np.float64]:
        """See Model."""
        return self.baseline()

    @functools.cached_property
    def _evaluators(self) -> Evaluators:
        return Evaluators.of(self.network, self.precision)

    def weights(self) -> bytes:
        """See Model."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        state |= {FITTED + name: torch.from_numpy(array) for name, array in self.network.fitted.items()}
        return bytes(safetensors.torch.save(state))

    def describe(self) -> ArchitectureRecord:
        """See Model."""
        return architecture(self.network)
