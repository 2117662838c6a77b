"""The shell with units that take SLOW_UNITS seconds more, and one (DEADLY_UNIT) that kills its process.

STARTS is a folder in which an actor that starts leaves its process id and waits for a second; with DEADLY_START it dies.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from engine import __main__ as shell
from engine.scoring import score as step
from engine.scoring.worker import Job, UnitScorer, open_scorer


class SlowScorer:
    """Stands for the scorer in actors; goes there by name."""

    def __init__(self, scorer: UnitScorer) -> None:
        self.scorer = scorer

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if str(item["start"]) == os.environ.get("DEADLY_UNIT"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("SLOW_UNITS", "0")))
        return self.scorer(item)


def open_slow(job: Job, threads: int) -> SlowScorer:
    if "STARTS" in os.environ:
        (Path(os.environ["STARTS"]) / str(os.getpid())).touch()
        if "DEADLY_START" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)
    return SlowScorer(open_scorer(job, threads))


def main(words: list[str] | None) -> int:
    step.open_scorer = open_slow  # type: ignore[assignment]
    return shell.main(words)
