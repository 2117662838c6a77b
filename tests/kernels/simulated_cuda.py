"""Checks of the GPU twins; run in a process of its own, since Numba reads NUMBA_ENABLE_CUDASIM when it is imported.

python tests/kernels/simulated_cuda.py CHECK runs one against the CPU kernels, in the simulator or on a card, and prints `ok`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=RuntimeWarning)  # wrap-around of NumPy scalars, meant, in simulated threads

from kernels import cuda, dropout, encode, order, profile  # noqa: E402

AWKWARD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, 1e300, -1.7e308, 2.5, 2.5, -7.0]


def host(array: Any) -> Any:
    return array.copy_to_host()


def values(n: int, k: int, kind: Any = np.float64) -> Any:
    block = np.random.default_rng(n * 31 + k).normal(size=(n, k))
    block[: len(AWKWARD), 0] = AWKWARD[:n]
    block[::7, k - 1] = np.nan
    with np.errstate(over="ignore"):
        return block.astype(kind)


def encode_numeric() -> None:
    knots = [-2.0, -0.5, -0.5, 0.0, 1.0, 2.5]
    plan = encode.numeric_plan([
        encode.NumericColumn("standardise", center=0.3, scale=1.7, low=-5, high=5, indicator=True),
        encode.NumericColumn("ple", edges=knots, low=-2, high=2.5),
        encode.NumericColumn("uniform", edges=knots, low=-2, high=2.5, fill=0.5),
        encode.NumericColumn("normal", edges=knots, low=-2, high=2.5, indicator=True),
        encode.NumericColumn("ple", edges=[1.0, 1.0, 1.0]),
    ])  # fmt: skip
    block = values(40, 5)
    want = encode.encode_numeric(block, plan, np.empty((40, plan.width), np.float32))
    got = host(cuda.NumericEncoder(plan).encode(block))
    normal = plan.integers[3, 1]
    others = [j for j in range(plan.width) if j != normal]
    np.testing.assert_array_equal(got[:, others], want[:, others])
    np.testing.assert_allclose(got[:, normal], want[:, normal], rtol=1e-6)


def profiles() -> None:
    for kind in (np.float32, np.float64):
        block = values(150, 35, kind)  # more columns than lanes
        edges = [profile.bins_of(block[30:, k].astype(float), 1 + k % 9).edges for k in range(35)]
        edges[2] = np.array([0.1, 0.1 + 1e-12, 0.2, 0.3])  # numbers that float32 cannot hold
        block[:5, 2] = np.array([0.1, 0.2, 0.3, 0.25, 0.15], kind)
        plan = profile.profile_plan(edges)
        found = cuda.Profiler(plan, kind)
        found.add(block[:70])
        found.add(block[70:])
        same_profile(found.result(), profile.profile(block, plan))


def same_profile(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(got.counts, want.counts)
    np.testing.assert_array_equal(got.low, want.low)
    np.testing.assert_array_equal(got.high, want.high)
    assert got.sums == want.sums


def row_order() -> None:
    for n, seed, epoch in ((1, 0, 0), (50, 3, 1), (4096, 1, 0), (4097, 7, 2), (5000, 2**63 - 1, 3)):
        start, stop = n // 3, min(n // 3 + 40, n)
        want = order.permutation(start, stop, n, seed, epoch)
        np.testing.assert_array_equal(host(cuda.permutation(start, stop, n, seed, epoch)), want)


def layer_key(seed: int, step: int, layer: int) -> Any:
    """The bits of the kernel's key as int64."""
    return np.uint64(dropout._key(np.uint64(seed), np.uint64(step), np.uint64(layer), np.uint64(0))).view(np.int64)


def masks() -> None:
    rows = np.random.default_rng(1).integers(0, 2**40, 9)
    keys = np.array([[layer_key(5, step, layer) for layer in range(2)] for step in range(3)])
    for width, p in ((1, 0.5), (6, 0.1), (8, 0.9)):
        want = dropout.dropout_mask(rows, width, 5, 2, 1, p, np.empty((9, width), np.float32))
        out = cuda.require_cuda().to_device(np.full((9, width), -1, np.int32))
        kept = int(np.float32(1 / (1 - p)).view(np.int32))
        cuda.dropout_mask(rows, keys, np.array([2]), 1, p, kept, out)
        np.testing.assert_array_equal(host(out).view(np.float32), want)


def no_fault() -> None:
    assert cuda.fault() == ""


CHECKS = {check.__name__: check for check in (encode_numeric, profiles, row_order, masks, no_fault)}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        CHECKS[name]()
        print("ok", name, flush=True)  # noqa: T201
