"""Arithmetic of the forward pass, by a fixed rule that is resolved once and recorded."""

from __future__ import annotations

from engine.config.tree import ModelConfig
from engine.errors import UserError
from engine.runtime import environment

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
NARROWEST = 64  # below this width of the widest hidden layer the casts cost more than bf16 products save


def resolve_precision(wanted: str, model: ModelConfig, device: str = "cpu") -> str:
    """`fp32` or `bf16`. `auto` takes bf16 where the hardware multiplies it (without avx512_bf16 or amx_bf16 it is ten
    times slower) and the model has a hidden layer of at least 64.

    Resume and reproduce pass the recorded value, so other hardware never changes the arithmetic silently.
    """
    if wanted in ("fp32", "bf16"):
        return wanted
    if wanted != "auto":
        raise UserError(f"train.precision must be auto, fp32 or bf16, found {wanted!r}")
    wide = model.kind == "mlp" and max(model.hidden, default=0) >= NARROWEST
    fast = device == "cuda" or bool(BF16_FLAGS & environment.cpu_flags())
    return "bf16" if wide and fast else "fp32"
