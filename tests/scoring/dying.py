"""A program that has scoring killed: `python -m tests.scoring.dying FOLDER MODEL TRIAL...` prints one JSON line a trial.

It imports everything once and computes nothing itself, so that it has one thread and may fork: every trial is a child
that dies by SIGKILL, and a second child that runs the same command again. A trial is `write:N` (at the Nth file that is
renamed into place: before that where N is even, after it where N is odd) or `time:PERCENT` of the seconds that
an unbroken run takes. A `write` trial that lives is the last one: the run has no such write.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

import engine.scoring.score  # noqa: F401 - imported before the fork, for speed
import kernels.jit  # noqa: F401
from engine import api
from engine.config import compose  # noqa: F401
from tests.tiny import overrides

RENAME = os.replace


def words(folder: Path, model: str, runs: Path, threads: int) -> list[str]:
    more = (
        "score.unit_rows=1024",
        "score.columns=[shop]",
        f"score.model={model}",
        f"resources.threads={threads}",
        f"score.reasons={os.environ.get('REASONS', '0')}",
    )
    return [*overrides(folder, *more), f"paths.runs={runs}", f"resources.threads={threads}"]


def child(work: Callable[[], object]) -> int:
    """Fork; the child works and leaves with 0. Returns its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            log = os.open("/dev/null", os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int, seconds: float = 120) -> int:
    """Wait status of a child; a hang is an error."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"process {process} did not end in {seconds} s")


def die_at_write(number: int) -> None:
    """SIGKILL ourselves around the `number`th rename: before it where the number is even, after it where it is odd."""
    count = 0

    def replace(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == number and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        RENAME(source, target)  # type: ignore[arg-type]
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


def finished(runs: Path) -> Path:
    """The newest run that is done: one killed before its record was whole is left behind, one killed after DONE is done."""
    return max(path.parent for path in (runs / "score" / "tiny").glob("*/DONE"))


def outputs(runs: Path) -> dict[str, str]:
    """Bytes of predictions, profile and ledger of the finished run, and the score link."""
    directory = finished(runs)
    files = [*(directory / "predictions").iterdir(), directory / "profile.json", directory / "ledger.parquet"]
    found = {path.name: path.read_bytes().hex() for path in files}
    return {**found, "scores": json.loads((directory / "run.json").read_text())["chain"]["scores"]}


def plain_rows(runs: Path) -> int:
    """Scored rows that a reader finds who knows nothing but `*.parquet`, in whatever folder.

    A folder `.name.tmp`, which is there between two renames, is one that readers pass over.
    """
    paths = [path for path in runs.rglob("*.parquet") if not path.parent.name.startswith(".")]
    files = [pq.ParquetFile(path) for path in paths]
    return sum(file.metadata.num_rows for file in files if "score" in file.schema_arrow.names)


def main(folder: Path, model: str, trials: list[str]) -> None:
    def score(runs: Path, number: int = 0, threads: int = 1) -> None:
        if number:
            die_at_write(number)
        api.run("score", *words(folder, model, runs, threads), config_dir=str(folder / "conf"))

    place = Path(tempfile.mkdtemp(prefix="trials-", dir=folder))
    whole = place / "whole"
    began = time.monotonic()
    assert ended(child(lambda: score(whole))) == 0
    seconds = time.monotonic() - began
    expected = outputs(whole)
    for index, trial in enumerate(trials):
        kind, _, value = trial.partition(":")
        runs = place / f"trial-{index}"
        number = int(value) if kind == "write" else 0
        process = child(lambda runs=runs, number=number, index=index: score(runs, number, 1 + index % 2))  # type: ignore[misc]
        if kind == "time":
            time.sleep(seconds * int(value) / 100)
            os.kill(process, signal.SIGKILL)
        killed = ended(process) == signal.SIGKILL
        done = len(list(runs.glob("score/tiny/*/parts/*.json")))
        seen = plain_rows(runs)
        again = ended(child(lambda runs=runs: score(runs))) if killed else 0  # type: ignore[misc]
        newest = finished(runs)
        metrics = json.loads((newest / "metrics.json").read_text())
        result = {
            "trial": trial,
            "killed": killed,
            "again": again,
            "equal": outputs(runs) == expected,
            "done": done,
            "seen": seen,
            "skipped": metrics["units_skipped"],
            "scored": metrics["score/units_scored"],
            "runs": len(list((runs / "score" / "tiny").iterdir())),
            "temporaries": len([*newest.rglob("*.tmp")]),
        }
        print(json.dumps(result), flush=True)  # noqa: T201
        shutil.rmtree(runs)
        if kind == "write" and not killed:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
