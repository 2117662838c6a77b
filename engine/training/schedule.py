"""The steps of a run: their batches, their learning rates, and after which of them the trainer looks at the weights."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.tree import TrainConfig
from engine.training.flat import learning_rate
from engine.training.shards import Batches
from engine.training.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Schedule:
    """A function of the number of rows and the config alone. Steps count from 0 over all epochs."""

    batches: Batches
    sizes: Sizes
    config: TrainConfig

    @classmethod
    def of(cls, rows: int, config: TrainConfig) -> Schedule:
        """For a number of training rows."""
        return cls(Batches.plan(rows, config), sizes_of(config, rows), config)

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.batches.steps * self.sizes.epochs

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(step, self.steps, self.config.lr, self.config.warmup)

    def rows_of(self, step: int) -> int:
        """Rows of a step, all workers together: the last step of an epoch may be short."""
        return min(self.batches.batch, self.batches.n - step % self.batches.steps * self.batches.batch)

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`."""
        epochs, inner = divmod(step, self.batches.steps)
        return epochs * self.batches.n + min(inner * self.batches.batch, self.batches.n)

    def next_pause(self, step: int) -> int:
        """The number of steps done, more than `step`, at which something is logged, saved or judged next."""
        if step == 0:
            return 1  # the first step is logged, and its end is when training has started
        every = (self.config.log_every, self.config.checkpoint_every, self.batches.steps)
        return min((step // interval + 1) * interval for interval in every if interval)
