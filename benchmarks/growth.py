"""Does the cost of a kernel grow linearly with the rows, to 100 million?

The ratio is the time a row takes at 1 M rows over the time it takes here: 1 is linear, below 1 is worse. What is read at random
(`gather`, and the probes of `asof`) also pays for leaving the caches between 1 M and 10 M rows. A size that does not fit the
free memory is left out with a note.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, Settings, clock, show
from benchmarks.kernels import DAY, FOUR, events, lateness
from kernels import asof, encode, gather, order, profile, windows

SIZES = (1_000_000, 10_000_000, 100_000_000)


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    rows = []
    for work, (make, bytes_a_row) in WORKS.items():
        first = None
        for full in SIZES:
            n, name = settings.rows(full), f"{work}_{full // 1_000_000}m"
            if not settings.wanted(name):
                continue
            needed, free = n * bytes_a_row, _free_bytes()
            if needed > free:
                print(f"{name:22} left out: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free", file=sys.stderr)
                continue
            speed = n / clock(make(n, settings.threads), min(settings.repeats, 3)).warm
            first = first or speed
            rows.append(Row("growth", name, n, speed, "1m", speed / first, None, "rows/s", first))
            show(rows[-1])
    return rows


def window(n: int, threads: int) -> Callable[[], Any]:
    entity, time, value = events(n)
    return lambda: windows.trailing(entity, time, entity, time, time, value, [7 * DAY], FOUR, threads)


def window_late(n: int, threads: int) -> Callable[[], Any]:
    entity, time, value = events(n)
    known = time + lateness(n)
    return lambda: windows.trailing(entity, time, entity, time, known, value, [7 * DAY], FOUR, threads)


def join(n: int, threads: int) -> Callable[[], Any]:
    entity, time, _ = events(n)
    return lambda: asof.asof(entity, time, entity[::5], time[::5], time[::5], None, threads=threads)


def permutation(n: int, threads: int) -> Callable[[], Any]:
    return lambda: order.permutation(0, n, n, 0, 0, threads)


def gathered(n: int, threads: int) -> Callable[[], Any]:
    block, step = np.ones((n, 8), np.float32), 1 << 16  # ones: written, so that each page is memory of its own
    index, out = order.permutation(0, n, n, 1, 0, threads), np.empty((step, 8), np.float32)

    def call() -> None:
        for start in range(0, n, step):
            part = index[start : start + step]
            gather.gather_rows(block, part, out[: len(part)], threads)

    return call


def encoded(n: int, threads: int) -> Callable[[], Any]:
    """A column of each kind."""
    points = {"standardise": 0, "uniform": 65, "normal": 65, "ple": 5}
    columns = [encode.NumericColumn(kind, edges=np.linspace(-2.0, 2.0, count)) for kind, count in points.items()]
    plan, block = encode.numeric_plan(columns), np.random.default_rng(0).standard_normal((n, len(columns)))
    out = np.empty((n, plan.width), np.float32)
    return lambda: encode.encode_numeric(block, plan, out, threads)


def counts(n: int, threads: int) -> Callable[[], Any]:
    block = np.random.default_rng(0).random((n, 1), np.float32)
    plan = profile.profile_plan([np.linspace(0, 1, 256)])
    return lambda: profile.profile(block, plan, threads)


# Work -> (what makes the call, bytes that a row takes at the most, its data included)
WORKS: dict[str, tuple[Callable[[int, int], Callable[[], Any]], int]] = {
    "window": (window, 100),
    "window_late": (window_late, 130),
    "asof": (join, 40),
    "permutation": (permutation, 12),
    "gather": (gathered, 45),
    "encode": (encoded, 80),
    "profile": (counts, 6),
}


def _free_bytes() -> int:
    """Memory that programs can still have, by the kernel's estimate; without one, all that is asked for."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else sys.maxsize
