"""Feature specification, point-in-time joins and windows, fitted encoding, feature store.

`history(...)` and `latest(...)` are for users who want point-in-time features only; `source(...)` opens the dataset that they
read.
"""

from __future__ import annotations

import importlib
from typing import Any

_API = ("history", "latest", "source")


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing the package stays quick.
    if name in _API:
        return getattr(importlib.import_module("engine.features.retrieval"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
