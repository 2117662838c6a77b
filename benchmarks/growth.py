"""Does the cost of a kernel grow linearly with the rows, to 100 million?

The ratio is the time a row takes at 1 M rows over the time it takes here: 1 is linear, below 1 is worse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Row, Settings, clock, show
from benchmarks.kernels import DAY, FOUR, events
from kernels import asof, order, profile, windows


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    rows = []
    for work, make in WORKS.items():
        first = None
        for full in (1_000_000, 10_000_000, 100_000_000):
            if not settings.wanted(work):
                continue
            n = settings.rows(full)
            speed = n / clock(make(n, settings.threads), min(settings.repeats, 3)).warm
            first = first or speed
            rows.append(
                Row("growth", f"{work}_{full // 1_000_000}m", n, speed, "1m", speed / first, None, "rows/s", first)
            )
            show(rows[-1])
    return rows


def window(n: int, threads: int) -> Callable[[], Any]:
    entity, time, value = events(n)
    return lambda: windows.trailing(entity, time, entity, time, time, value, [7 * DAY], FOUR, threads)


def join(n: int, threads: int) -> Callable[[], Any]:
    entity, time, _ = events(n)
    return lambda: asof.asof(entity, time, entity[::5], time[::5], time[::5], None, threads=threads)


def permutation(n: int, threads: int) -> Callable[[], Any]:
    return lambda: order.permutation(0, n, n, 0, 0, threads)


def counts(n: int, threads: int) -> Callable[[], Any]:
    block = np.random.default_rng(0).random((n, 1), np.float32)
    plan = profile.profile_plan([np.linspace(0, 1, 256)])
    return lambda: profile.profile(block, plan, threads)


WORKS = {"window": window, "asof": join, "permutation": permutation, "profile": counts}
