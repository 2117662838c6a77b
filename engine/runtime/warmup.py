"""The `warmup` command: compile every kernel into the cache and show the seconds of each family."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config.tree import Config
from kernels import warmup as kernels_warmup


def warmup(_config: Config, _words: Sequence[str]) -> int:
    """Compile all kernels, or load them from the cache, and print how long each family took."""
    for name, seconds in kernels_warmup.warmup().items():
        sys.stdout.write(f"{name:<12}  {seconds:6.2f} s\n")
    return 0
