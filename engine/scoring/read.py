"""Reads the predictions of a scoring run by its manifest."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from engine.errors import UserError
from engine.runtime import remote
from engine.runtime.run import Run, load_record
from engine.scoring import output


def predictions(
    run: str | Path | Run, *, incomplete: bool = False, store: str | Path = "store", trust: str | None = None
) -> pa.Table:
    """All predictions of a scoring run (the Run or its directory), in dataset order, as its manifest names them.

    Raises UserError for a run that set units aside, unless `incomplete` is true, and for a directory whose rows are at a
    remote address that neither `store` has used before nor `trust` (a digest that the refusal names) allows.
    """
    directory = run.directory if isinstance(run, Run) else Path(run)
    wanted = load_record(directory).get("predictions", {})
    there = remote.place(wanted.get("output"), wanted.get("endpoint"), wanted.get("region"))
    if there is not None and not isinstance(run, Run):
        remedy = f"Name the store of your scoring run (paths.store, here {store}). "
        remote.check(Path(store), {"score.output": there}, trust, str(directory), remedy)
    place = output.place_of(wanted.get("output"), directory, wanted.get("endpoint"), wanted.get("region"))
    manifest = output.read_manifest(place)
    if manifest is not None and not manifest["complete"] and not incomplete:
        raise UserError(
            f"{directory} is incomplete: {len(manifest.get('set_aside', []))} units were set aside; run it again"
        )
    return output.read_predictions(place)
