"""`score.output=FILE`: all scores of a run in one file, as CSV, JSON lines or Parquet by its name.

A row has row_id, the id columns, the event time, the decision time, `score.columns` and the scores, in the order of the
event time and then the ids, like every dataset. The file is whole or absent. It is written from the run's predictions, which
are kept.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from engine.config.tree import Config
from engine.data.arrow_types import parse_type
from engine.data.files import COMPRESSIONS, SUFFIXES
from engine.errors import UserError
from engine.features import instants
from engine.runtime import storage
from engine.training.decision import COLUMN
from engine.training.intervals import LOWER, UPPER
from engine.training.reasons import names_of

ADDED = (COLUMN, LOWER, UPPER)
OF_TARGETS = tuple(f"{name}_" for name in ADDED)  # of several targets
DECIDED = "decided_at"
FOREIGN = (
    ".xlsx",
    ".xls",
    ".ods",
    ".orc",
    ".avro",
    ".h5",
    ".pkl",
    ".pickle",
    ".sqlite",
    ".db",
    ".html",
    ".xml",
    ".txt",
)
Write = Callable[[pa.Table], None]


def is_file(target: str | None) -> bool:
    """Whether `score.output` names a file, by its suffix; an existing folder stays a folder.

    Raises UserError for a suffix of data files that is not written.
    """
    if target is None or target.endswith("/"):
        return False
    suffix = Path(target).suffix.lower()
    if suffix in WRITERS:
        return "://" in target or not Path(target).expanduser().is_dir()
    if (suffix in SUFFIXES or suffix in (*COMPRESSIONS, *FOREIGN)) and not Path(target).expanduser().is_dir():
        raise UserError(f"score.output must be a folder or end in {', '.join(WRITERS)}, found {target!r}")
    return False


def check_apart(target: str | None, read: Iterable[str]) -> None:
    """Raise UserError where the file of `score.output` is one of the inputs, whose rows it would overwrite."""
    if not is_file(target):
        return
    wanted = _real(str(target))
    for name in read:
        if _real(name) == wanted:
            raise UserError(
                f"score.output must be another file than those that are read, found {target}, which holds the rows to score. "
                "Name another file"
            )


def _real(name: str) -> str:
    return name if "://" in name else str(Path(name).expanduser().resolve())


def needed_columns(config: Config) -> list[str]:
    """Columns of the dataset that a file needs in addition to those of predictions."""
    data, as_of = config.data, config.features.as_of
    wanted = [*data.ids, *([as_of.column] if as_of and data.timed else [])]
    return [name for name in wanted if name != data.event_time]


def check_file(config: Config) -> None:
    """Raise UserError for a column that the file adds itself, or that its format cannot hold."""
    for name in (*config.score.columns, *config.data.ids):
        kind = parse_type(config.data.columns[name].type)
        if name == DECIDED:
            raise UserError(
                f"{DECIDED!r} is a column of score.output itself: leave it out of score.columns, or rename the id"
            )
        if not str(config.score.output).endswith(".parquet") and (pa.types.is_nested(kind) or pa.types.is_binary(kind)):
            raise UserError(
                f"score.output={config.score.output} must hold plain values, found column {name!r} of type "
                f"{config.data.columns[name].type}: use a name that ends in .parquet"
            )


def write_file(path: Path, parts: Iterable[Path], config: Config) -> int:
    """Write the rows of the parts, in order, to a local file; returns how many. One part is in memory at a time."""
    rows = 0
    with contextlib.ExitStack() as stack:
        write: Write | None = None
        for part in parts:
            table = laid_out(storage.read_parquet(part), config)
            if write is None:
                write = stack.enter_context(WRITERS[Path(str(config.score.output)).suffix.lower()](path, table.schema))
            write(table)
            rows += table.num_rows
    return rows


def laid_out(table: pa.Table, config: Config) -> pa.Table:
    """Columns of the file from those of predictions."""
    data, as_of = config.data, config.features.as_of
    found = {name: table[name] for name in dict.fromkeys(["row_id", *data.ids, *data.shown_time])}
    if as_of and data.timed:
        decisions = instants.moment_times(table, as_of)
        found[DECIDED] = pa.array(decisions, pa.timestamp("us", tz="UTC"), mask=decisions == instants.NEVER)
    beside = {*ADDED, *names_of(config.score.reasons)}
    scores = [
        name for name in table.column_names if name.startswith(("score", "shadow_score", *OF_TARGETS)) or name in beside
    ]
    known = {*found, *needed_columns(config), *config.score.columns}
    found |= {name: table[name] for name in config.score.columns if name not in found}
    found |= {name: table[name] for name in scores if name not in known}
    return pa.table(found)


# -------------------------------------------------------------------------------------------------------- formats


@contextlib.contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[Write]:
    """Texts are quoted, nulls are empty and not quoted, times are ISO 8601 in UTC."""
    plain = pa.schema([(field.name, _csv_type(field.type)) for field in schema])
    with pa.OSFile(str(path), "wb") as file, pacsv.CSVWriter(file, plain) as writer:
        yield lambda table: writer.write_table(pa.table([_csv_column(column) for column in table.columns], plain))


def _csv_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _csv_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        return pa.chunked_array([_iso(column)])
    return column.cast(_csv_type(column.type))


def _iso(column: pa.ChunkedArray) -> pa.Array:
    """Instants as texts: 2013-06-01T09:00:00Z, with a fraction where there is one."""
    texts = pc.replace_substring(column.cast(pa.timestamp("us", tz="UTC")).cast(pa.string()), " ", "T")
    return pc.replace_substring_regex(texts, r"\.0+Z$", "Z").combine_chunks()


@contextlib.contextmanager
def _jsonl(path: Path, _: pa.Schema) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:

        def write(table: pa.Table) -> None:
            plain = pa.table({name: _json_column(table[name]) for name in table.column_names})
            for batch in plain.to_batches(max_chunksize=16_384):
                for row in batch.to_pylist():
                    whole = {
                        name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()
                    }
                    file.write(json.dumps(whole, ensure_ascii=False) + "\n")

        yield write


def _json_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = _csv_column(column)
    kind = column.type
    as_is = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return column if as_is else column.cast(pa.string())


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Write]:
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        yield writer.write_table


WRITERS: dict[str, Callable[[Path, pa.Schema], contextlib.AbstractContextManager[Write]]] = {
    ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet,
}  # fmt: skip
