"""Resume: finds the newest whole checkpoint of a run, the same one on every worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.errors import UserError
from engine.runtime.run import Run
from engine.training.checkpoint import Checkpoint, load_checkpoint, newest_whole
from engine.training.exchange import Exchange


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
