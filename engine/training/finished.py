"""A finished model: what evaluation, the bundle, the gate and scoring need of a model of any kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from engine.training.model import ArchitectureRecord, Network, architecture
from engine.training.predict import TILE_ROWS, Evaluators
from engine.training.target import TargetScale
from engine.training.threads import Team

FITTED = "fitted:"  # before the names of fitted arrays among the tensors


class Model(Protocol):
    """A model that scores encoded rows. The bits of a row's result do not depend on other rows or on threads."""

    @property
    def target(self) -> TargetScale:
        """The scale that turns raw outputs into values of the target."""

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """float32[n, outputs] from numeric float32[n, F] and codes int32[n, K]; `team`: a running thread team to use."""

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

    def logits(
        self, numeric: NDArray[np.float32], codes: NDArray[np.int32], threads: int = 1, team: Team | None = None
    ) -> NDArray[np.float32]:
        """See Model."""
        return self._evaluators.logits(numeric, codes, self.tile_rows, threads, team)

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
