"""Keys of `protocol`: how `evaluate --protocol` cuts the rows, again and again."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import key
from engine.config.units import Span

PROTOCOLS = ("forward", "grouped", "random")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """Trainings on several cuts of the rows, each with several seeds."""

    kind: str | None = key(
        None,
        "forward: periods one after the other, each model tested on the period after it. grouped: folds by a hash of data.group. "
        "random: folds by a hash of the ids, whatever belongs together; it is beside the others too. null = "
        "evaluate.model is measured",
        choices=PROTOCOLS,
    )
    folds: int = key(5, "periods, or folds", ge=2, le=100)
    seeds: int = key(2, "trainings on each of them, with seeds from train.seed on", ge=1, le=100)
    gap: Span = key(Span("0d"), "least time between training, validation and test, for forward")
