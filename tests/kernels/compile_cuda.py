"""Compile every GPU twin to PTX for a Hopper card, on a machine without one; prints `ok NAME` a kernel.

Needs numba-cuda with NVIDIA's compiler wheels; run in a process of its own, since it stands in for the device that Numba asks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from numba import cuda
from numba import types as t

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
CAPABILITY = (9, 0)


class Card:
    compute_capability = CAPABILITY


# Numba asks the present device for what a device function is compiled for.
for module in list(sys.modules.values()):
    if "cuda" in getattr(module, "__name__", "") and hasattr(module, "get_current_device"):
        module.get_current_device = Card  # type: ignore[attr-defined]

from kernels import cuda as twins  # noqa: E402

twins.cuda = cuda


def array(kind: Any, dimensions: int) -> Any:
    return t.Array(kind, dimensions, "C")


F8, F4, I8, I4, U8, I2 = t.float64, t.float32, t.int64, t.int32, t.uint64, t.int16


def profile(real: Any) -> tuple[Any, ...]:
    return (
        *(array(real, 2),) * 3,
        *(array(I8, 1), array(F8, 2), array(I8, 2), array(F8, 1), array(F8, 1), array(U8, 2), array(I8, 3)),
    )


SIGNATURES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("_encode_numeric", ""): (array(F8, 2), array(I8, 2), array(F8, 2), array(F8, 1), array(F4, 2)),
    ("_encode_categorical", ""): (array(I8, 2), array(I8, 1), array(I4, 1), array(I8, 2), array(I8, 1), array(I4, 2)),
    ("_profile", "float32"): profile(F4),
    ("_profile", "float64"): profile(F8),
    ("_permute", ""): (I8, I8, array(U8, 1), I8, I8, array(I8, 1)),
    ("_mask", ""): (array(I8, 1), array(I8, 2), array(I8, 1), I8, I8, I2, array(I2, 2)),
    ("_windows", ""): (
        array(I8, 2),
        I8,
        t.Tuple((array(I8, 1), array(I8, 1), array(F8, 1))),
        array(I8, 1),
        t.Tuple((array(I8, 1), array(I8, 1))),
        t.Tuple((array(I8, 1), array(I8, 1), t.UniTuple(t.boolean, 3), t.UniTuple(t.boolean, 6))),
        t.Tuple(
            tuple(
                array(kind, n) for kind, n in ((U8, 3), (I8, 3), (U8, 3), (U8, 3), (I8, 3), (F8, 2), (I8, 2), (I8, 3))
            )
        ),
        t.Tuple(tuple(array(kind, n) for kind, n in ((I8, 2), (F8, 2), (F8, 2), (F8, 1), (I8, 1), (I8, 1), (I8, 1)))),
        array(F8, 3),
    ),
}

if __name__ == "__main__":
    for (name, real), signature in SIGNATURES.items():
        text = cuda.compile_ptx(twins._kernel(name, real).py_func, signature, cc=CAPABILITY)[0]
        # The quantum of a profile must round as on the CPU: no product may be fused with an addition.
        assert name != "_profile" or "fma.rn.f64" not in text, "fused multiply-add in the profile"
        print("ok", name, flush=True)  # noqa: T201
