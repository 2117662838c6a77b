"""The training device: resolved once, before anything is recorded, and read from the record on resume."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from engine.config.tree import Config
from engine.errors import UserError

RESIDENT_SHARE = 0.6  # of the free device memory that packed rows may fill; the rest is for activations and graphs
TF32 = False  # fp32 means fp32: matrix products of float32 operands are not rounded to TF32's 10 bits


def has_gpu() -> bool:
    """Whether torch finds a GPU in this process."""
    return bool(torch.cuda.is_available())


def why_no_gpu() -> str:
    """The reason where `has_gpu` is false."""
    return f"torch {torch.__version__} " + ("has no CUDA" if torch.version.cuda is None else "sees no device")


def resolve_device(config: Config, recorded: str | None = None) -> str:
    """`cpu` or `cuda` for `train.device`; the device recorded by an earlier start of the run has priority.

    `auto` uses a GPU where torch finds one in this process, and on a cluster where workers have any. Raises UserError
    where a GPU is required, or was used before, and there is none.
    """
    wanted = recorded or config.train.device
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device must be auto, cpu or cuda, found {wanted!r}")
    remote = config.cluster.kind != "local"
    found = config.cluster.gpus_per_worker > 0 if remote else has_gpu()
    if wanted == "auto":
        return "cuda" if found else "cpu"
    if wanted == "cuda" and not found:
        before = " (this run began on one)" if recorded else ""
        if remote:
            raise UserError(
                f"train.device=cuda needs GPUs{before}, found cluster.gpus_per_worker={config.cluster.gpus_per_worker:g}: "
                "set cluster.gpus_per_worker=1, or train.device=cpu"
            )
        raise UserError(
            f"train.device=cuda needs an NVIDIA GPU{before}, found none: {why_no_gpu()}. Use train.device=cpu"
        )
    return wanted


def is_resident(nbytes: int, free: int) -> bool:
    """Whether packed rows of `nbytes` stay on a device with `free` bytes: while they fill at most RESIDENT_SHARE of it."""
    return nbytes <= RESIDENT_SHARE * free


@dataclass(frozen=True)
class Placement:
    """Where the packed rows are stored, and the figures of the decision."""

    resident: bool
    nbytes: int
    free: int

    @classmethod
    def choose(cls, nbytes: int, device: torch.device) -> Placement:
        """By the free memory of the device; on a CPU rows are always in place."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**62
        return cls(is_resident(nbytes, free), nbytes, free)

    def described(self) -> str:
        """For run.log."""
        where = "resident on the device" if self.resident else "streamed from host memory"
        return f"{self.nbytes:,} bytes of packed rows are {where} ({RESIDENT_SHARE:.0%} of {self.free:,} free bytes may be used)"


def prepare_backend() -> None:
    """Arithmetic of matrix products on GPUs as stated by TF32."""
    torch.set_float32_matmul_precision("high" if TF32 else "highest")


def describe_device(device: str, index: int = 0) -> dict[str, str | int | bool | None]:
    """Facts for run.json: card, memory, versions, arithmetic. For `cpu` the processor alone."""
    if device != "cuda":
        return {"kind": "cpu", "name": platform.processor() or platform.machine()}
    card = torch.cuda.get_device_properties(index)
    return {
        "kind": "cuda",
        "name": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": TF32,
    }
