"""Batch size, number of epochs and patience, by the number of training rows; shards of a batch, by the work in it.

The rule of `auto`: 200 steps an epoch, or as many as batches of LEAST_BATCH give; ten epochs, or as many as make STEPS steps.
Few rows in large batches are a few dozen steps, which leave a network near where it began. The rule was chosen on six data
sets (106 to 30,000 training rows) and judged on eight others against 4,096 rows and ten epochs, mean of three seeds:

    iris 90 rows, accuracy .83 -> .90              five noisy classes 3,600, accuracy .33 -> .42
    breast cancer 341, ROC AUC .975 -> .990        2 % positives 7,200, ROC AUC .55 -> .77
    digits 1,078, accuracy .76 -> .97              counts 15,000, R2 .15 -> .38
    friedman2 1,200, R2 .88 -> .98                 interactions 60,000, ROC AUC .786 -> .812

Whatever its size, a shard costs a millisecond or more: operations are called one by one, and small matrix products use a core
badly. Eight shards of 512 rows took 1.5 of the seconds of a plain loop over the same small network, four of 1,024 rows 1.0. So
`auto` halves their number until a shard has LEAST_WORK, about 4 ms of a core. More of them would let more threads and workers
share a step, which they then wait for to be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.config.sections.training import AUTO, TrainConfig
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training.model import Network

LEAST_BATCH, MOST_BATCH = 32, 4096
STEPS_PER_EPOCH, STEPS = 200, 1000
LEAST_EPOCHS, MOST_EPOCHS = 10, 100
LEAST_PATIENCE, PATIENCE_SHARE = 3, 5
MOST_SHARDS, LEAST_WORK = 8, 140_000_000  # multiply-adds of a shard's forward pass


@dataclass(frozen=True)
class Sizes:
    """Rows of a step, passes over the rows, epochs without a better metric before stopping (0: never), shards of a step."""

    batch_size: int
    epochs: int
    patience: int
    shards: int


def sizes_of(config: TrainConfig, rows: int, work: float = math.inf) -> Sizes:
    """The sizes for a number of training rows: from the config, or by the rule where it is `auto`.

    `work`: multiply-adds of a row in a forward pass; by default that of a model which is large enough for any number of shards.
    """
    least = 1 if config.shards == AUTO else int(config.shards)
    batch = _batch(rows, least) if config.batch_size == AUTO else int(config.batch_size)
    steps = -(-rows // max(1, min(batch, rows)))
    if config.epochs == AUTO:
        epochs = min(max(LEAST_EPOCHS, -(-STEPS // max(steps, 1))), MOST_EPOCHS)
    else:
        epochs = int(config.epochs)
    patience = max(LEAST_PATIENCE, epochs // PATIENCE_SHARE) if config.patience == AUTO else int(config.patience)
    shards = _shards(min(batch, rows), work) if config.shards == AUTO else int(config.shards)
    return Sizes(batch, epochs, patience, shards)


def _batch(rows: int, shards: int) -> int:
    """The largest power of two that leaves an epoch STEPS_PER_EPOCH steps, between the bounds; a shard has a row at least."""
    batch = MOST_BATCH
    while batch > LEAST_BATCH and batch * STEPS_PER_EPOCH > rows:
        batch //= 2
    return max(batch, shards)


def _shards(batch: int, work: float) -> int:
    """The largest power of two up to MOST_SHARDS whose shards have LEAST_WORK and a row each, or one shard."""
    shards = MOST_SHARDS
    while shards > 1 and (shards > batch or batch / shards * work < LEAST_WORK):
        shards //= 2
    return shards


def settle(config: Config, run: Run, rows: int, network: Callable[[], Network]) -> Config:
    """The config with its sizes as numbers, which run.json records for resume and reproduction.

    `network` makes the one that is to be trained; it is called where the rule needs it.
    """
    asked: dict[str, object] = {name: getattr(config.train, name) for name in Sizes.__annotations__}
    found: dict[str, Any] = run.record.get("sizes") or {}
    if not found:
        found = asdict(sizes_of(config.train, rows, network().work if config.train.shards == AUTO else math.inf))
    run.note(sizes=found)
    if AUTO in asked.values():
        said = ", ".join(f"{name} {found[name]:,}" for name, value in asked.items() if value == AUTO)
        run.log(f"train: {said} by rule for {rows:,} rows (auto)")
    return replace(config, train=replace(config.train, **found))
