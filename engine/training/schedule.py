"""The schedule of a run: rows and learning rate of each step, and the steps after which the trainer logs, saves or judges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config.sections.training import TrainConfig
from engine.training.sizes import sizes_of

START, END = 25.0, 1e4  # of one_cycle: the peak over its first rate, and that over the last


@dataclass(frozen=True)
class Schedule:
    """The split of training rows into epochs, steps and shards, which never depends on the workers. Steps count from 0 over all
    epochs; an epoch is a range of positions in its row order, and the last step of one may be short.
    """

    rows: int
    batch: int  # rows of a step, all workers together
    epochs: int
    patience: int
    config: TrainConfig
    shards: int

    @classmethod
    def of(cls, rows: int, config: TrainConfig) -> Schedule:
        """Batches of train.batch_size rows, or of all rows where there are fewer. Where sizes are `auto`, see `sizes_of`."""
        sizes = sizes_of(config, rows)
        return cls(rows, min(sizes.batch_size, rows), sizes.epochs, sizes.patience, config, sizes.shards)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.rows // self.batch)

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.epoch_steps * self.epochs

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, padding included."""
        return -(-self.batch // self.shards)

    def positions(self, step: int) -> tuple[int, int]:
        """Positions [start, stop) in the epoch's order of the rows of a step."""
        start = step % self.epoch_steps * self.batch
        return start, min(start + self.batch, self.rows)

    def shard_positions(self, step: int, shard: int) -> tuple[int, int]:
        """Positions of one shard of a step; empty when none are left."""
        first, last = self.positions(step)
        start = min(first + shard * self.shard_rows, last)
        return start, min(start + self.shard_rows, last)

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`."""
        return step // self.epoch_steps * self.rows + self.positions(step)[0]

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(self.config.schedule, step, self.steps, self.config.lr, self.config.warmup)

    def next_pause(self, step: int) -> int:
        """The number of steps done, more than `step`, at which something is logged, saved or judged next."""
        if step == 0:
            return 1  # the first step is logged, and its end is when training has started
        every = (self.config.log_every, self.config.checkpoint_every, self.epoch_steps)
        return min((step // interval + 1) * interval for interval in every if interval)


def learning_rate(kind: str, step: int, total: int, peak: float, warmup: float) -> float:
    """The rate of a step, counted from 0, of `total`.

    `cosine`, `linear` and `constant`: a linear rise over the share `warmup` of all steps, then half a cosine or a line down to
    0, or the peak. `one_cycle`: half a cosine up from peak / START over that share, and one down to peak / START / END, as
    torch.optim.lr_scheduler.OneCycleLR (Smith, Topin: Super-convergence, 2018).
    """
    if kind == "one_cycle":
        return _one_cycle(step, total, peak, warmup)
    ramp = round(warmup * total)
    if step < ramp:
        return peak * (step + 1) / ramp
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak * (1.0 - (step - ramp) / max(total - ramp, 1))
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(total - ramp, 1)))


def _one_cycle(step: int, total: int, peak: float, warmup: float) -> float:
    top, last = warmup * total - 1, total - 1
    begin, end = peak / START, peak / START / END
    if step < top:
        return begin + (peak - begin) * 0.5 * (1.0 - math.cos(math.pi * step / top))
    done = (step - max(top, 0.0)) / max(last - max(top, 0.0), 1.0)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
