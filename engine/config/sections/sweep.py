"""Keys of `sweep`: the search for hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config.schema import key
from engine.errors import UserError

Whole = int  # the key `int` hides the type below it
KINDS = ("log", "uniform", "int", "choice")


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Values that one key may have: exactly one of `log`, `uniform`, `int` and `choice`."""

    log: tuple[float, ...] = key((), "numbers from the first to the second, drawn evenly on a logarithmic scale")
    uniform: tuple[float, ...] = key((), "numbers from the first to the second")
    int: tuple[Whole, ...] = key((), "whole numbers from the first to the second, both included")
    choice: tuple[Any, ...] = key((), "the values themselves")
    when: dict[str, Any] = key(
        factory=dict, help="key -> value, or list of values, that must hold for this key to be searched"
    )

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name)]
        if len(given) != 1:
            raise UserError(f"must have one of {', '.join(KINDS)} with values, found {' and '.join(given) or 'none'}")
        if self.kind != "choice":
            values = getattr(self, self.kind)
            if len(values) != 2 or not values[0] < values[1]:
                raise UserError(f"{self.kind} must be two numbers, the lower one first, found {list(values)}")
        if self.log and self.log[0] <= 0:
            raise UserError(f"log must begin above 0, found {list(self.log)}")

    @property
    def kind(self) -> str:
        """Which of `log`, `uniform`, `int` and `choice` is given."""
        return next(name for name in KINDS if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search over keys of the config. Its result does not depend on what finishes first."""

    space: dict[str, SpaceConfig] = key(factory=dict, help="key of the config -> the values it may have")
    trials: int = key(20, "configs that are tried at most", ge=1)
    rows: int = key(
        0, "no round begins once the trials have taken this many training rows, counted each epoch; 0 = no limit", ge=0
    )
    seconds: float = key(
        0.0,
        "no round begins after this many seconds of the command; how many trials there are then depends on the machine; "
        "0 = no limit",
        ge=0,
    )
    round: int = key(
        4, "trials that are asked for together: the sampler learns from whole rounds, however many run at once", ge=1
    )
    parallel: int = key(1, "trials that run at once, with cluster=ray; cluster=local runs one after the other", ge=1)
    sampler: str = key("tpe", "how configs are chosen", choices=("tpe", "random", "grid", "cmaes"))
    seed: int = key(0, "seed of the sampler", ge=0)
    metric: str | None = key(None, "validation metric to improve; null = the one that training watches")
    rungs: tuple[int, ...] = key(
        (),
        "epochs after which a round keeps only its best trials (successive halving); empty = every trial is finished",
        ge=1,
    )
    keep: float = key(0.34, "share of a round's trials that goes on at a rung", gt=0, lt=1)
    best: int = key(3, "best configs that are trained anew with other seeds", ge=1)
    seeds: int = key(3, "seeds of these trainings, and of the config without the search", ge=1)
    resume: str = key("auto", "continue an unfinished run of the same plan", choices=("auto", "never"))

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.rungs, self.rungs[1:], strict=False)):
            raise UserError(f"rungs must rise, found {list(self.rungs)}")
