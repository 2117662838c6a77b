"""Compile every GPU twin to PTX for a Hopper card, on a machine without one; prints `ok NAME` a kernel.

Types are those of the launches that the checks of `simulated_cuda` would make. Needs numba-cuda with NVIDIA's compiler wheels;
run in a process of its own, since it stands in for the device that Numba asks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numba import cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
CAPABILITY = (9, 0)


class Card:
    compute_capability = CAPABILITY


# Numba asks the present device for what a device function is compiled for.
for module in list(sys.modules.values()):
    if "cuda" in getattr(module, "__name__", "") and hasattr(module, "get_current_device"):
        module.get_current_device = Card  # type: ignore[attr-defined]

from kernels import cuda as twins  # noqa: E402
from kernels import encode, profile  # noqa: E402

twins.cuda = cuda
twins._twins()  # compiles for the card, whatever stands in for it below


class Host:
    """Arrays of a launch stay where they are: their types are those of arrays on a card."""

    @staticmethod
    def to_device(array: Any) -> Any:
        return array.copy()

    @staticmethod
    def device_array(shape: Any, kind: Any) -> Any:
        return np.zeros(shape, kind)


SEEN: dict[tuple[str, str, tuple[Any, ...]], Any] = {}  # (kernel, its constants, types of the arguments) -> kernel


class Launch:
    """What stands in for a kernel: it keeps the types of the arguments."""

    compiled = staticmethod(twins._kernel)

    def __init__(self, name: str, **constants: Any) -> None:
        self.name, self.constants = name, constants

    def __getitem__(self, configuration: Any) -> Launch:
        return self

    def __call__(self, *arguments: Any) -> None:
        kernel = self.compiled(self.name, **self.constants)
        SEEN[self.name, str(self.constants), tuple(kernel.typeof_pyval(a) for a in arguments)] = kernel


def launch_all() -> None:
    """Each kernel with the types that it meets: 16-bit and 32-bit masks, both types of profiled numbers."""
    twins.cuda, twins._kernel = Host, Launch  # type: ignore[assignment]
    numbers, keys = np.random.default_rng(0).normal(size=(50, 2)), np.arange(50)
    plan = encode.numeric_plan([encode.NumericColumn("ple", edges=[-1.0, 0.0, 1.0])] * 2)
    for kind in (np.float64, np.float32):
        twins.NumericEncoder(plan).encode(numbers.astype(kind))
        twins.Profiler(profile.profile_plan([np.array([0.0, 1.0, 2.0])] * 2), kind).add(numbers.astype(kind))
    twins.permutation(0, 50, 5000, 1, 0)
    for word in (np.int16, np.int32):
        twins.dropout_mask(keys, keys[:, None], keys[:1], 0, 0.1, 7, np.zeros((50, 8), word))


def may_fuse(text: str) -> list[str]:
    """Additions of doubles that a later compiler may fuse with a product before them, so that it rounds otherwise.

    Products by a half are exact; those with `.rn` are never fused.
    """
    made = dict(re.findall(r"\bmul\.f64\s+(%fd\d+), ((?!.*0d3FE0000000000000).*);", text))
    sums = re.findall(r"\b(?:add|sub)\.f64\s+%fd\d+, (.*);", text)
    return [line for line in sums if any(operand in made for operand in line.split(", "))]


if __name__ == "__main__":
    launch_all()
    for (name, _, types), kernel in SEEN.items():
        text = cuda.compile_ptx(kernel.py_func, types, cc=CAPABILITY)[0]
        # The quantum of a profile must round as on the CPU; a logarithm need not.
        assert name != "_profile" or not may_fuse(text), may_fuse(text)
        assert name != "_profile" or "fma.rn.f64" not in text, "fused multiply-add in the profile"
        print("ok", name, flush=True)  # noqa: T201
