"""Checkpoints: tensors in safetensors, the rest in a JSON manifest that is written last and records sizes and
digests.

A folder without a manifest, or whose files do not match it, does not count: a resumed run uses the newest whole one and
names those that it skipped. Which run is resumed: engine/runtime/resume.py. Nothing here unpickles: torch.load is never called.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from engine.errors import UserError
from engine.runtime import digest, records, seal, storage
from engine.runtime.run import Run
from engine.training.exchange import Exchange
from engine.training.model import ArchitectureRecord

FORMAT = 2
CHECKED = 2  # a manifest checks itself from this format on
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"


class ManifestRecord(TypedDict):
    """manifest.json: the identity that a resumed run must share, and the state of the loop."""

    format: Annotated[int, records.Format(FORMAT)]
    step: records.Count
    plan: str
    dataset: NotRequired[str]
    seeds: NotRequired[dict[str, int]]
    precision: NotRequired[str]
    architecture: NotRequired[ArchitectureRecord]
    state: NotRequired[dict[str, object]]  # of the loop
    spent: NotRequired[dict[str, float]]
    files: dict[str, seal.FileRecord]


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint, verified."""

    folder: Path
    manifest: ManifestRecord
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object], keep: int
) -> Path:
    """Write `root/step-<step>/` and remove all but the newest `keep`; a broken folder in the way is replaced.

    Folders of later steps are damaged leftovers that a resume skipped: they are removed first.
    """
    folder = storage.inside(root.parent, root.name) / f"step-{step:010d}"
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()  # while it is rewritten it must not count
    payload = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    with storage.atomic_path(folder / TENSORS) as temporary:
        temporary.write_bytes(payload)
    files = {TENSORS: {"bytes": len(payload), "sha256": digest.of_bytes(payload)}}
    storage.write_json(folder / MANIFEST, seal.checked({"format": FORMAT, "step": step, **facts, "files": files}))
    found = candidates(root)
    at = found.index(folder)
    for old in found[:at] + found[at + keep :]:
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; whole or not."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; sizes and digests are checked before a byte is interpreted.

    Raises UserError with the reason for a damaged one.
    """
    manifest = seal.read_checked(folder / MANIFEST, ManifestRecord, CHECKED)
    expected = manifest["files"].get(TENSORS)
    if expected is None:
        raise UserError(f"{folder / MANIFEST} must name {TENSORS}")
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"{path} must exist, found nothing")
    payload = path.read_bytes()
    if len(payload) != expected["bytes"]:
        raise UserError(f"{path} must have {expected['bytes']} bytes, found {len(payload)}")
    if digest.of_bytes(payload) != expected["sha256"]:
        raise UserError(f"{path} must have the digest that its manifest names; its bytes were changed")
    return Checkpoint(folder, manifest, read_tensors(payload, path))


def read_tensors(payload: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of safetensors bytes; any other format, such as a pickle, is refused and never executed."""
    if len(payload) < 8 or struct.unpack("<Q", payload[:8])[0] > len(payload) - 8 or payload[8:9] != b"{":
        raise UserError(
            f"{path} must be safetensors; pickled checkpoints are refused because loading one runs its code"
        )
    try:
        return load_tensors(payload)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} must be safetensors: {error}") from None


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """(newest checkpoint that verifies, or None; the reason why each newer one was skipped)."""
    passed_over: list[str] = []
    for folder in candidates(root):
        try:
            return load_checkpoint(folder), passed_over
        except UserError as error:
            passed_over.append(f"checkpoint {folder.name} is not whole and is passed over: {error}")
    return None, passed_over


def newest_checkpoint(root: Path, run: Run, exchange: Exchange) -> Checkpoint | None:
    """The newest whole checkpoint in a folder, as rank 0 finds it; None where training starts at step 0.

    Damaged ones that are skipped are named in run.log.
    """
    found, passed_over = newest_whole(root) if exchange.rank == 0 else (None, [])
    for reason in passed_over:
        run.warn(reason)
    step = int(exchange.first([found.step if found else -1])[0])
    if step < 0:
        if passed_over:
            run.warn("no checkpoint is whole: training starts at step 0")
        return None
    return found or load_checkpoint(root / f"step-{step:010d}")


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, object]) -> None:
    """Raise UserError naming the first entry of `identity` that the checkpoint does not share."""
    for name, value in identity.items():
        if checkpoint.manifest.get(name) != value:
            raise UserError(
                f"a run must continue from its own checkpoint: {checkpoint.folder} has another {name} "
                f"({checkpoint.manifest.get(name)} instead of {value}). Start a new run with train.resume=never"
            )
