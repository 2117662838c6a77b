"""Raw outputs of a network by its present weights, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.training.model import Network
from engine.training.predict import TILE_ROWS, Evaluators


def predict_logits(
    network: Network,
    numeric: Any,
    codes: Any,
    precision: str,
    tile_rows: int = TILE_ROWS,
    threads: int = 1,
    team: Any = None,
) -> np.ndarray:
    """float32[n, outputs], or [n, members, outputs], from numeric float32[n, F] and codes int32[n, K]."""
    return Evaluators.of(network, precision).logits(numeric, codes, tile_rows, threads, team)
