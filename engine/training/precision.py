"""Arithmetic of the forward pass, by a fixed rule that is resolved once and recorded."""

from __future__ import annotations

from engine.config.sections.training import ModelConfig
from engine.errors import UserError
from engine.runtime import environment

NARROWEST = 64  # below this width of the widest hidden layer the casts cost more than bf16 products save


def resolve_precision(wanted: str, model: ModelConfig, device: str = "cpu") -> str:
    """`fp32` or `bf16`. `auto` takes bf16 where it pays (`fast_bf16`) and the model has a hidden layer of at least 64.

    Resume and reproduce pass the recorded value, so other hardware never changes the arithmetic silently.
    """
    if wanted in ("fp32", "bf16"):
        return wanted
    if wanted != "auto":
        raise UserError(f"train.precision must be auto, fp32 or bf16, found {wanted!r}")
    wide = model.kind == "mlp" and max(model.hidden, default=0) >= NARROWEST
    return "bf16" if wide and (device == "cuda" or fast_bf16()) else "fp32"


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16; without that it is ten times slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & environment.cpu_flags())


def fast_bf16() -> bool:
    """Whether bf16 is faster than fp32: with AMX, or AVX-512 of another maker than Intel, whose own takes as long for it."""
    return has_bf16() and ("amx_bf16" in environment.cpu_flags() or environment.cpu_vendor() != "GenuineIntel")
