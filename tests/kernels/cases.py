"""Inputs that break kernels, shared by their tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kernels import jit

NAT = np.iinfo(np.int64).min
HOUR, DAY = 3_600_000_000, 86_400_000_000


def examples(count: int) -> settings:
    """Derandomised; fewer examples in plain Python."""
    return settings(
        max_examples=max(5, count // 4) if jit.DISABLED else count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -7.0, 0.1, 1e9 + 0.25, 2.0**53, -(2.0**62)]),
    st.sampled_from([np.nan, np.inf, -np.inf, 5e-324, -2.2e-308, 1e-13, 1e300, -1e300, 1.7e308]),
    st.floats(-1e6, 1e6),
)
ORDINARY = st.one_of(st.sampled_from([0.0, 1.0, 1.0, 2.5, -7.0, np.nan]), st.floats(-1e3, 1e3))


def over_all_exponents(seed: int) -> Any:
    """A number of every exponent that a double has, denormals included, signs and order mixed."""
    rng = np.random.default_rng(seed)
    powers = np.ldexp(1.0 + rng.random(2046 + 52).round(3), np.arange(-1074, 1024))
    return rng.permutation(powers * np.where(np.arange(len(powers)) % 2, 1.0, -1.0))


def layouts(array: Any) -> list[Any]:
    """The same values read-only, strided, as a slice with an offset, and backwards in memory."""
    frozen = array.copy()
    frozen.flags.writeable = False
    strided = np.repeat(array, 2, axis=0)[::2]
    padded = np.concatenate([array[:1], array, array[:1]])[1 : len(array) + 1]
    return [frozen, strided, padded, np.ascontiguousarray(array[::-1])[::-1]]


def same_bytes(results: list[Any]) -> bool:
    return all(np.asarray(r).tobytes() == np.asarray(results[0]).tobytes() for r in results)
