"""How long does it take to compile every kernel, and to load them from the cache?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Settings, show

CODE = (
    "import time; s = time.perf_counter(); from kernels.warmup import warmup; warmup(); print(time.perf_counter() - s)"
)


def run(_settings: Settings, _bandwidth: float) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for work, limit in (("compile_cold", 30.0), ("compile_cached", 2.0)):
            found = subprocess.run(
                [sys.executable, "-c", CODE],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parent.parent,
                env=os.environ | {"NUMBA_CACHE_DIR": cache},
            )
            seconds = float(found.stdout)
            rows.append(Row("compilation", work, 0, seconds, "limit", limit / seconds, None, "s", limit, 1.0))
            show(rows[-1])
    return rows
