"""Batch training and scoring on tabular and event data. Importing this loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import load as load
    from engine.api import run as run

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]


def __getattr__(name: str) -> Any:
    """`engine.run` and `engine.load` come from `engine.api` when first used."""
    if name in ("run", "load"):
        return getattr(importlib.import_module("engine.api"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
