"""Keys of `score`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import key
from engine.config.units import Size
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which rows are scored with which model, and where scores go."""

    model: str = key("", "run directory or name@alias")
    shadow: str | None = key(
        None, "second model, as name@challenger, whose scores are written to shadow_score and shadow_model; null = none"
    )
    between: tuple[str, ...] = key((), "[from, to] of the event time, from included, to excluded; empty = all")
    input: str | None = key(
        None,
        "rows to score that are in no dataset, labelled or not: a file, glob, folder or s3:// address instead of the event "
        "table's source; null = the dataset",
    )
    history: str = key(
        "store",
        "history for windows, in addition to score.input: store = the newest stored dataset of the model's data; a dataset "
        "there (its recipe or digest, or their first digits); or input = no other rows",
    )
    unit_rows: int = key(262_144, "rows of a work unit", ge=1)
    resume: str = key("auto", "auto continues the newest unfinished run of this plan; never; or a run directory")
    mode: str = key("all", "score everything, or only rows that no earlier run has scored", choices=("all", "append"))
    columns: tuple[str, ...] = key((), "columns passed through to the output")
    reasons: int = key(
        0,
        "features of each row with the largest contributions to its score, as columns reason_1, contribution_1, ...; 0 = none",
        ge=0,
    )
    features: str = key(
        "store",
        "read views from the feature store, or compute them per unit from the history they need (the same bits)",
        choices=("store", "compute"),
    )
    profile: bool = key(True, "count the drift profile of inputs and scores in the same pass")
    tries: int = key(3, "attempts at a unit that raises an error or kills its worker, before it is set aside", ge=1)
    output: str | None = key(
        None,
        "where scores go: a folder or s3://bucket/prefix, or one file that ends in .csv, .jsonl or .parquet; null = the run "
        "directory",
    )
    endpoint: str | None = key(None, "s3:// service of input and output other than AWS, as in http://127.0.0.1:9000")
    region: str | None = key(None, "s3:// region of input and output; null = from the credential chain")
    partition: str | None = key(None, "column whose values become folders `column=value` (hive)")
    file_rows: int = key(0, "rows of an output file; 0 = one file per unit, or by file_size", ge=0)
    file_size: Size | None = key(None, "target size of output files, as in 128MB; null = by file_rows")
    compression_level: int = key(1, "zstd level of the output", ge=1, le=22)

    def __post_init__(self) -> None:
        if self.file_rows and self.file_size is not None:
            raise UserError("file_rows and file_size must not both be set: remove one of them")
        if self.history != "store" and self.input is None:
            raise UserError(
                f"history={self.history} needs score.input: rows of a dataset use the dataset's own history"
            )
