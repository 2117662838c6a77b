"""Feature specification, point-in-time joins and windows, fitted encoding, feature store.

`engine.features.history(...)` and `engine.features.latest(...)` are for users who want point-in-time features and nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

_API = ("history", "latest")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing a room must stay quick.
    if name in _API:
        return getattr(importlib.import_module("engine.features.retrieval"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
