"""The stepper interface: a stepper takes training steps on a CPU or GPU, and the trainer accounts for their figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training.examples import Examples
from engine.training.exchange import Exchange
from engine.training.flat import FlatWeights
from engine.training.interrupt import StopFlag
from engine.training.model import Network
from engine.training.objectives import Objective
from engine.training.optimizers import Optimizer
from engine.training.order import RowOrder
from engine.training.schedule import Schedule
from engine.training.threads import Team


@dataclass(frozen=True)
class TrainingJob:
    """A training job: model, rows and their order, config, and the workers that take part."""

    config: Config
    run: Run
    train: Examples
    model: Network
    order: RowOrder
    schedule: Schedule
    objectives: tuple[Objective, ...]
    dataset_digest: str
    precision: str
    exchange: Exchange
    team: Team
    stop: StopFlag


class StepFigures(NamedTuple):
    """Figures of one step, summed over all workers. A step with bad rows or an infinite norm has changed no weight."""

    loss: float  # sum of weight * loss
    weight: float  # sum of weights
    norm: float  # of the gradient before clipping
    rows: int
    stream: int  # sum of the hashes of (dataset row, position), modulo 2**64
    bad: int  # rows whose loss is not finite, or 1 where only their sum is not
    bad_rows: list[int]  # dataset rows among them, those of this worker and not all where there are many

    @property
    def mean_loss(self) -> float:
        """Mean loss of a row; 0 where all weights are 0."""
        return self.loss / self.weight if self.weight > 0 else 0.0


class StepsTaken(NamedTuple):
    """Consecutive steps: their figures, and their seconds by part."""

    figures: list[StepFigures]
    input: float
    compute: float
    communication: float
    stop: bool  # whether any worker was asked to stop


class Stepper(Protocol):
    """Takes the steps of a `TrainingJob`. Every call is collective; all workers see the same figures."""

    weights: FlatWeights
    optimizer: Optimizer
    identity: dict[str, str]  # what a checkpoint must share with the stepper that continues from it

    def run(self, step: int) -> StepsTaken:
        """Take step `step`, and perhaps later ones up to the schedule's next pause."""

    def logits(self, numeric: NDArray[np.float32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Raw outputs float32[n, outputs] by the present weights, of numeric float32[n, F] and codes int32[n, K]."""

    def finish(self) -> dict[str, float]:
        """Bring the model's weights to host memory; returns metrics of the hardware."""


MakeStepper = Callable[[TrainingJob], Stepper]
