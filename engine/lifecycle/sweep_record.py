"""sweep.json: the trials of a sweep in order, its best configs with other seeds, and the best of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from engine.config.nested import Tree
from engine.errors import UserError
from engine.runtime import records
from engine.runtime.run import as_written, load_record

FORMAT = 1
State = Literal["done", "cut", "failed"]


class TrialRecord(TypedDict):
    """A trial: the values of its keys, its state, its metric (of the last rung where it was cut), and its run."""

    number: int
    values: Tree
    state: State
    value: float | None
    rungs: list[float | None]
    run: str | None
    rows: NotRequired[int]  # training rows that it took, counted each epoch; sweeps of earlier engines lack it
    seconds: float
    cause: NotRequired[str]


class SeedsRecord(TypedDict):
    """A config trained with several seeds: figures of each, validation first."""

    number: int | None  # of the trial; None: the config without the search
    values: Tree
    valid: list[float]
    test: list[float]
    runs: list[str]


class BestRecord(TypedDict, total=False):
    """The best config; without a trial that could be finished only `number` (None) and `values`."""

    number: int | None
    values: Tree
    run: str
    valid: float | None
    searched: float | None
    too_good_by: float | None
    test: float | None
    test_without_search: float | None
    gain: float | None
    spread_of_seeds: float | None
    beyond_seeds: bool


class SweepRecord(TypedDict):
    """sweep.json."""

    format: Annotated[int, records.Format(FORMAT)]
    name: str
    metric: str
    higher_is_better: bool
    dataset: str
    trials: list[TrialRecord]
    seeds: list[SeedsRecord]
    best: BestRecord
    importance: dict[str, float]
    seconds: float


def is_sweep(directory: Path) -> bool:
    """Whether a run directory is that of a finished sweep."""
    return (directory / "sweep.json").is_file() and load_record(directory)["command"] == "sweep"


def read_sweep(directory: Path, refuse: bool = False) -> SweepRecord:
    """The record of a sweep; `refuse`: see `as_written`. Raises UserError."""
    return records.read(as_written(directory, "sweep.json", refuse), SweepRecord)


def best_run(directory: Path) -> Path:
    """The training run with the best config of a sweep. Raises UserError."""
    best: Any = read_sweep(directory, refuse=True)["best"]
    if "run" not in best:
        raise UserError(
            f"{directory} must have a trial that was finished, found none: sweep.json has the cause of each"
        )
    return Path(best["run"])


def compared_runs(directory: Path) -> list[Path]:
    """A training run of the config without the search, and one of each of the best configs with the same seed, each run once."""
    return [
        Path(run)
        for run in dict.fromkeys(entry["runs"][0] for entry in read_sweep(directory)["seeds"] if entry["runs"])
    ]
