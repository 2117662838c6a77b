"""Views of user functions in the store: the probe before a view is computed, rows that are kept, and rows that failed."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config import secrecy
from engine.config.sections.data import DataConfig
from engine.config.sections.features import ViewConfig
from engine.config.tree import Config
from engine.data.dataset import Dataset, row_ids
from engine.errors import UserError
from engine.features import calls, functions
from engine.features.spec import view_columns
from engine.runtime import storage
from engine.runtime.on_ray.cluster import append_line, read_lines
from engine.runtime.run import Run


def prepare(name: str, view: ViewConfig, data: DataConfig, dataset: Dataset, failed: Path) -> None:
    """Refuse a function that does not compute each row from itself alone, by a few rows spread over the dataset; remove what
    an earlier attempt of the run left in `failed`.

    A slow function that fails here says so where its values are computed. Raises UserError.
    """
    for path in _files(failed, name):
        path.unlink()
    places = np.unique(np.linspace(0, dataset.rows - 1, min(calls.PROBED, dataset.rows)).astype(np.int64)).tolist()
    if len(places) > 1:
        inputs = list(dict.fromkeys(view.inputs))
        rows = pa.concat_tables([dataset.read(inputs, rows=(place, place + 1)) for place in places])
        try:
            calls.check_row_wise(view, rows, f"features.views.{name}", _sensitive(data, inputs))
        except functions.Failed:
            if view.batch_rows is None:
                raise


def kept_features(
    name: str, view: ViewConfig, config: Config, dataset: Dataset, rows: tuple[int, int], failed: Path
) -> dict[str, pa.Array]:
    """The features of dataset rows [start, stop); results are kept in the store, rows that failed are written to `failed`.

    Raises UserError for rows that failed, unless the view's `on_error` is null.
    """
    where, data = f"features.views.{name}", config.data
    inputs = dataset.read(list(dict.fromkeys(view.inputs)), rows=rows)
    sensitive = _sensitive(data, inputs.column_names)
    storage.make_folder(failed)

    def report(turn: int, count: int, error: str) -> None:
        append_line(_listed(failed, name), {"try": turn, "rows": count, "error": secrecy.redact(error)})

    folder = calls.kept_folder(Path(config.paths.store), name, view, [str(field.type) for field in inputs.schema])
    table, failures = calls.in_batches(view, inputs, where, sensitive, folder, report)
    if failures:
        path = failed / f"{name}-{rows[0]:012d}.parquet"
        lost = np.concatenate([failure.rows for failure in failures])
        facts = dataset.read(list(dict.fromkeys([*data.ids, *view.inputs])), rows=rows).take(pa.array(lost))
        shown = {"row": pa.array(lost + rows[0])}
        if not _sensitive(data, data.ids):
            shown["row_id"] = row_ids(facts, data.ids)
        shown |= {f"inputs.{column}": facts[column] for column in inputs.column_names if column not in sensitive}
        errors = [secrecy.redact(failure.error) for failure in failures for _ in failure.rows]
        storage.write_parquet(path, pa.table({**shown, "error": errors}))
        if view.on_error == "fail":
            raise UserError(
                f"{len(lost)} rows failed in {view.retries + 1} tries; {path} lists them. {failures[-1].error}. What is done is "
                f"kept: run the command again for the rest, or set {where}.on_error=null for nulls"
            )
    columns = (column.combine_chunks() for column in table.columns)
    return dict(zip((item.name for item in view_columns(name, view, data)), columns, strict=True))


def told(run: Run, name: str, failed: Path) -> np.ndarray:
    """int64: the dataset rows that failed in every try while a view was computed; logs the calls that failed."""
    lines = read_lines(_listed(failed, name), dict[str, object])
    if lines:
        run.log(
            f"features {name}: {len(lines)} calls failed and were tried again, or given up: {_listed(failed, name)}"
        )
    found = [np.asarray(storage.read_parquet(path, ["row"])["row"]) for path in _files(failed, name)]
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    warn_of_nulls(run, name, len(rows))
    return rows


def warn_of_nulls(run: Run, name: str, rows: int) -> None:
    """Warn of rows that are null because a function failed."""
    if rows:
        run.warn(f"features {name}: {rows} rows are null because the function failed; `features` tries them again")


def _files(failed: Path, name: str) -> list[Path]:
    """The files of rows that failed, one a range of dataset rows."""
    return sorted(failed.glob(f"{glob.escape(name)}-{'[0-9]' * 12}.parquet"))


def _listed(failed: Path, name: str) -> Path:
    return failed / f"{name}.jsonl"


def _sensitive(data: DataConfig, columns: list[str] | tuple[str, ...]) -> list[str]:
    return [column for column in columns if data.columns[column].sensitive]
