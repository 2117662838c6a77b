"""Slow functions (an API, a language model): called in batches of rows; what is done is kept, what fails is tried again.

A result is kept by the content of its row and the version of the function: so a run that was killed or failed goes on where
it was, late rows cost only themselves, and equal rows are computed once, in batches of any size.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config.sections.features import ViewConfig
from engine.data.arrow_types import same_value, schema_of
from engine.errors import UserError
from engine.features import functions
from engine.runtime import digest, storage

FOLDER = ".kept"  # in the feature store: <view>/<version>/<batch>.parquet
KEY = "$row"
PROBED = 8  # rows of the probe


@dataclass(frozen=True)
class Failure:
    """A batch that failed in every try: positions of all rows that wait for it, and the last error."""

    rows: np.ndarray
    error: str


Report = Callable[[int, int, str], None]  # a failed call: number of the try, rows, error


def kept_folder(store: Path, name: str, view: ViewConfig, kinds: Sequence[str]) -> Path:
    """Where results of a view's function are kept; `kinds` are the types of its inputs."""
    version = digest.of_json([functions.function_version(view.function), view.inputs, kinds, view.outputs])
    return storage.inside(store, "features", FOLDER, name, version[:16])


def outputs(view: ViewConfig, rows: pa.Table, where: str, sensitive: Collection[str]) -> pa.Table:
    """What the view's function gives for rows, without a store. Raises UserError where it fails, whatever `on_error` says."""
    if view.batch_rows is None:
        return functions.call(view.function, rows, view.outputs, where, sensitive)
    table, failures = in_batches(view, rows, where, sensitive)
    if failures:
        raise UserError(f"{failures[-1].error} ({view.retries + 1} tries)")
    return table


def in_batches(
    view: ViewConfig,
    rows: pa.Table,
    where: str,
    sensitive: Collection[str],
    folder: Path | None = None,
    report: Report = lambda *_: None,
) -> tuple[pa.Table, list[Failure]]:
    """The function's outputs, null where it failed in every try, and the batches that failed; results in `folder` are used and
    added to. `report` is called for every call that failed.
    """
    keys = row_keys(rows)
    kept = _kept(folder, view.outputs)
    known = set(kept[KEY].to_pylist())
    first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
    lacking, size = sorted(first.values()), view.batch_rows or len(keys) or 1
    waiting = [lacking[start : start + size] for start in range(0, len(lacking), size)]
    done, errors = [kept], dict[int, str]()
    for turn in range(1, view.retries + 2):
        left = []
        for batch in waiting:
            try:
                table = functions.call(view.function, rows.take(pa.array(batch)), view.outputs, where, sensitive)
            except functions.Failed as error:
                report(turn, len(batch), str(error))
                errors[batch[0]] = str(error)
                left.append(batch)
                continue
            done.append(table.append_column(KEY, pa.array([keys[place] for place in batch], pa.binary())))
            if folder is not None:
                name = hashlib.sha256(b"".join(keys[place] for place in batch)).hexdigest()
                storage.write_parquet(folder / f"{name}.parquet", done[-1])
        waiting = left
        if not waiting:
            break
        if turn <= view.retries:
            time.sleep(view.retry_pause.seconds)
    everything = pa.concat_tables(table.select(kept.column_names) for table in done)
    at = {key: place for place, key in enumerate(everything[KEY].to_pylist())}
    places = pa.array([at.get(key) for key in keys], pa.int64())
    failures = []
    for batch in waiting:
        lost = {keys[place] for place in batch}
        failures.append(Failure(np.flatnonzero([key in lost for key in keys]), errors[batch[0]]))
    return everything.drop_columns(KEY).take(places), failures


def row_keys(rows: pa.Table) -> list[bytes]:
    """A key of each row: SHA-256 of its values."""
    columns = [digest.python_values(column) for column in rows.columns]
    return [hashlib.sha256(repr(row).encode()).digest() for row in zip(*columns, strict=True)]


def _kept(folder: Path | None, kinds: dict[str, str]) -> pa.Table:
    """Every result in a folder: the outputs and the key of each row. A damaged file is as good as none."""
    schema = schema_of(kinds).append(pa.field(KEY, pa.binary()))
    found = [schema.empty_table()]
    for path in sorted(folder.glob("*.parquet")) if folder is not None else ():
        try:
            found.append(storage.read_parquet(path).select(schema.names).cast(schema))
        except (OSError, KeyError, pa.ArrowException):
            continue
    return pa.concat_tables(found)


def check_row_wise(view: ViewConfig, rows: pa.Table, where: str, sensitive: Collection[str]) -> None:
    """Call the function for a few rows together, in reverse order and alone. Raises UserError where a row's values differ."""

    def values(places: list[int]) -> dict[str, pa.ChunkedArray]:
        return dict(
            zip(
                view.outputs,
                functions.call(view.function, rows.take(pa.array(places)), view.outputs, where, sensitive).columns,
                strict=True,
            )
        )

    everyone = list(range(rows.num_rows))
    together = values(everyone)
    for how, places in (("in reverse order", everyone[::-1]), ("alone", everyone[:1]), ("alone", everyone[-1:])):
        for name, column in values(places).items():
            for value, place in zip(column, places, strict=True):
                if not same_value(value, before := together[name][place]):
                    shown = (
                        ""
                        if sensitive
                        else f": {before.as_py()!r} with {len(everyone) - 1} others, {value.as_py()!r} {how}"
                    )
                    raise UserError(
                        f"{where}: function {view.function.split('@')[0]!r} must give a row the same values whichever rows are "
                        f"beside it and each time, found another {name!r} {how}{shown}. Compute every row from itself alone"
                    )
