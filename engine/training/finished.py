"""A finished model: what evaluation, the bundle, the gate and scoring need of a model of any kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, NotRequired, Protocol, TypedDict

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
from engine.training.path_gradients import PathGradients, Typical, TypicalRecord
from engine.training.predict import TILE_ROWS, Evaluators
from engine.training.target import TargetScale, Values
from engine.training.threads import Team

FITTED = "fitted:"  # before the names of fitted arrays among the tensors


class PartRecord(TypedDict):
    """A model without its weights: its architecture, the arithmetic that it is computed in, and a network's typical row."""

    architecture: ArchitectureRecord
    precision: Precision
    tile_rows: Annotated[int, Within(1, 2**20)]
    typical: NotRequired[TypicalRecord]


class TypicalPart(TypedDict, total=False):
    """The part of a record that says how a network's contributions begin."""

    typical: TypicalRecord


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

    def explained(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """float64[n, outputs]: what contributions explain, from raw outputs; of several members the (weighted) mean of theirs."""

    def baseline(self) -> NDArray[np.float64]:
        """float64[outputs]: where contributions start from, the same for every row."""

    def contributions(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        share: NDArray[np.float64],
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float64]:
        """float64[n, F + K]: what each column of a row adds to a margin, the sum over k of share[i, k] times `explained` output k
        less its baseline, where share is float64[n, outputs]. The contributions of a weighted sum of models are the weighted
        sum of theirs. Raises UserError for a model that cannot tell.
        """

    def weights(self) -> bytes:
        """All learned numbers as safetensors bytes: equal models give equal bytes."""

    def describe(self) -> ArchitectureRecord:
        """JSON from which, with `weights`, the same model is built again."""


@dataclass(frozen=True)
class FinishedNetwork:
    """A torch network with the arithmetic that it is computed in (precision, rows of a tile), and a typical training row."""

    network: Network
    precision: str
    tile_rows: int = TILE_ROWS
    typical: Typical | None = None  # of networks that can give reasons

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

    def explained(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """See Model."""
        wide = logits.astype(np.float64)
        return np.asarray(wide.mean(axis=1)) if wide.ndim == 3 else wide

    def baseline(self) -> NDArray[np.float64]:
        """See Model. The raw outputs of a typical training row."""
        return self._path_gradients.baseline()

    def contributions(
        self,
        numeric: NDArray[np.float32],
        codes: NDArray[np.int32],
        share: NDArray[np.float64],
        threads: int = 1,
        team: Team | None = None,
    ) -> NDArray[np.float64]:
        """See Model. Integrated gradients (engine.training.path_gradients), within the error of their quadrature."""
        if team is None:
            with Team(threads) as own:
                return self.contributions(numeric, codes, share, threads, own)
        return self._path_gradients.contributions(numeric, codes, share, team)

    @functools.cached_property
    def _path_gradients(self) -> PathGradients:
        if self.typical is None:
            raise UserError(
                "reasons need a typical training row, which a network of an earlier version does not have: train it again"
            )
        return PathGradients(Evaluators.of(self.network, "fp32"), self.typical)

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


def typical_of(model: Model) -> TypicalPart:
    """The typical row of a network's record; nothing for other models."""
    known = model.typical if isinstance(model, FinishedNetwork) else None
    return {} if known is None else {"typical": known.record()}
