"""Precision of the forward pass (fp32 or bf16), resolved once by a fixed rule and recorded."""

from __future__ import annotations

from typing import cast

from engine.config.sections.training import BOOSTERS, ModelConfig
from engine.errors import UserError
from engine.runtime import environment
from engine.runtime.run import Precision

HIDDEN = ("mlp", "tabm", "wide_and_deep")  # kinds with hidden layers of `model.hidden`
NARROWEST = 64  # with narrower hidden layers, casts cost more than bf16 products save


def resolve_precision(wanted: str, model: ModelConfig, device: str = "cpu") -> Precision:
    """`fp32` or `bf16`. `auto` uses bf16 where it is faster (`fast_bf16`) and the model has a hidden layer of at least 64.

    Resume and reproduce pass the recorded value, so other hardware never changes the arithmetic silently.
    """
    if model.kind in BOOSTERS:
        return "fp32"
    if wanted in ("fp32", "bf16"):
        return cast(Precision, wanted)
    if wanted != "auto":
        raise UserError(f"train.precision must be auto, fp32 or bf16, found {wanted!r}")
    wide = model.kind in HIDDEN and max(model.hidden, default=0) >= NARROWEST
    return "bf16" if wide and (device == "cuda" or fast_bf16()) else "fp32"


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16; without that it is ten times slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & environment.cpu_flags())


def fast_bf16() -> bool:
    """Whether bf16 is faster than fp32: with AMX, or with AVX-512 of a maker other than Intel, whose own gains nothing."""
    return has_bf16() and ("amx_bf16" in environment.cpu_flags() or environment.cpu_vendor() != "GenuineIntel")
