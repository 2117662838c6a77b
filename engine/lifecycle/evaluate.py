"""The `evaluate` step: a finished model on the rows of the config; or, by `protocol.kind`, trainings on several cuts."""

from __future__ import annotations

from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import protocols
from engine.runtime.run import Run
from engine.training import train


def check(config: Config) -> None:
    """Check the config before an evaluation starts. Raises UserError."""
    if config.protocol.kind is not None and config.evaluate.model:
        raise UserError(
            f"evaluate.model must be left out with --protocol {config.protocol.kind}, which trains its own models, found "
            f"{config.evaluate.model!r}"
        )
    (train.check_evaluable if config.protocol.kind is None else protocols.check)(config)


def evaluate(config: Config, run: Run) -> dict[str, float]:
    """Measure a finished model, or what training comes to under a protocol. Raises UserError."""
    return (train.evaluate if config.protocol.kind is None else protocols.measure)(config, run)
