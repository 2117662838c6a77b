"""`monitor --incidents`: the incidents of a name, from the newest monitoring run that looked for sudden changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from engine.config.tree import Config
from engine.errors import UserError
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.sudden_record import incident_text
from engine.runtime import records, terminal
from engine.runtime.run import as_written


def incidents(config: Config, _words: list[str], options: Mapping[str, str]) -> int:
    """Print the incidents, oldest first. Raises UserError where no run of the name looked for them."""
    folder = Path(config.paths.runs) / "monitor" / config.name
    for done in sorted(folder.glob("*-*/DONE"), reverse=True):
        record = records.read(as_written(done.parent, "drift.json", refuse=True), DriftRecord)
        sudden = record.get("sudden")
        if not sudden:
            continue
        if "--json" in options:
            lines = [
                json.dumps({"model": record["model"], "until": record["window"][1], "incidents": sudden["incidents"]})
            ]
        else:
            found = [incident_text(item) for item in sudden["incidents"]]
            lines = [*(found or ["no incident"]), f"until {record['window'][1]}; {sudden['words']}"]
        terminal.out("".join(f"{line}\n" for line in lines))
        return 0
    raise UserError(f"no monitoring run of {config.name!r} in {folder} looked for sudden changes: run `monitor` first")
