"""What a library is asked for: rows in, one tree for each output and round out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.training.trees import Trees


@dataclass(frozen=True)
class Rows:
    """Encoded rows to grow trees on: numeric float32[n, F], codes int32[n, K], the codes that each category has, -1, 0 or 1 for
    each number: falls, free, rises with it.
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.int32]
    cardinalities: Sequence[int]
    outputs: int
    monotone: Sequence[int] = ()


class Grower(Protocol):
    """Grows trees; a round depends on its number and its gradients only. `sums`: the type that leaves are summed in."""

    sums: str

    def grow(self, round_: int, gradient: NDArray[np.float32], hessian: NDArray[np.float32]) -> Trees | None:
        """One tree an output from gradient and hessian [n, outputs]; None where no split is worth it."""


def check_library(name: str) -> Any:
    """The library, imported. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"model={name} needs the package {name}: pip install 'tabular-engine[{name}]'") from None
