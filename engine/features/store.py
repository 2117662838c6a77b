"""The feature store: one folder per view and recipe, Parquet with one row per event in dataset order.

A recipe is the view's spec with the content digests of the columns that decide it, so a view is reused by every
experiment that asks the same, and one changed window recomputes that window's columns only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.config import schema
from engine.config.tree import Config, DataConfig, ViewConfig
from engine.data.dataset import Dataset
from engine.features import compute
from engine.features.spec import known_anchor, view_columns, view_inputs, window_name
from engine.runtime import digest, environment, storage
from engine.runtime.run import Run

FORMAT = 1  # raise when the values of a view change for the same recipe
ROW_GROUP = 131_072


@dataclass(frozen=True)
class StoredView:
    """A computed view in the store."""

    name: str
    directory: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """Content digest of all columns."""
        return str(self.manifest["digest"])

    def read(self, columns: Sequence[str] | None = None, rows: tuple[int, int] | None = None) -> pa.Table:
        """Columns in dataset order, of all rows or of a range; only the row groups needed are read."""
        path = self.directory / "part-00000.parquet"
        names = list(columns) if columns is not None else list(self.manifest["columns"])
        if rows is None:
            return storage.read_parquet(path, names)
        start, stop = rows
        with pq.ParquetFile(path, page_checksum_verification=True, memory_map=True) as file:
            groups = range(start // ROW_GROUP, min(-(-stop // ROW_GROUP), file.num_row_groups))
            table = file.read_row_groups(list(groups), columns=names)
        return table.slice(start - (start // ROW_GROUP) * ROW_GROUP, stop - start)


def ensure_view(
    name: str, view: ViewConfig, config: Config, dataset: Dataset, run: Run, *, anew: bool = False
) -> StoredView:
    """The view of the dataset: from the store when its recipe is there, else computed (only the columns it lacks)."""
    columns = column_recipes(name, view, config, dataset)
    recipe = digest.of_json([FORMAT, name, list(columns.items())])
    folder = storage.inside(Path(config.paths.store), "features", name)
    directory = folder / recipe[:16]
    if not anew and (stored := _open(name, directory)):
        return stored
    found = {} if anew else _reusable(folder, columns)
    table, seconds = _complete(name, view, config, dataset, run, found)
    table = table.select(list(columns))
    digests = digest.TableDigest(table.schema)
    digests.update(table)
    manifest = {
        "format": FORMAT,
        "view": name,
        "recipe": recipe,
        "digest": digests.hexdigest(),
        "rows": table.num_rows,
        "spec": schema.plain(view),
        "as_of": config.features.as_of,
        "dataset": {"name": dataset.name, "recipe": dataset.recipe, "digest": dataset.digest},
        "columns": {
            column: {"recipe": columns[column], "digest": value} for column, value in digests.columns().items()
        },
        "reused_columns": len(found),
        "seconds": round(seconds, 3),
    }
    with storage.atomic_directory(directory) as temporary:
        # Floats of a window repeat little: byte-stream-split with a fast codec writes 3x faster than a dictionary.
        storage.write_parquet(
            temporary / "part-00000.parquet",
            table,
            row_group_size=ROW_GROUP,
            use_dictionary=_texts(table),
            compression="lz4",
        )
        storage.write_json(temporary / "manifest.json", manifest)
    stored = _open(name, directory)
    assert stored is not None
    return stored


def _texts(table: pa.Table) -> list[str]:
    return [field.name for field in table.schema if not pa.types.is_floating(field.type)]


def _open(name: str, directory: Path) -> StoredView | None:
    if not (directory / "manifest.json").exists():
        return None
    return StoredView(name, directory, storage.read_json(directory / "manifest.json"))


def _reusable(folder: Path, columns: dict[str, str]) -> dict[str, tuple[StoredView, str]]:
    """Columns of other recipes of this view that are the same by recipe: name -> (stored view, its name there)."""
    wanted = {recipe: name for name, recipe in columns.items()}
    found: dict[str, tuple[StoredView, str]] = {}
    for directory in sorted(folder.glob("*")) if folder.is_dir() else []:
        stored = _open(folder.name, directory)
        for column, entry in stored.manifest["columns"].items() if stored else ():
            if entry["recipe"] in wanted:
                found.setdefault(wanted[entry["recipe"]], (stored, column))  # type: ignore[arg-type]
    return found


def _complete(
    name: str, view: ViewConfig, config: Config, dataset: Dataset, run: Run, found: dict[str, tuple[StoredView, str]]
) -> tuple[pa.Table, float]:
    """All columns of the view: those found, and the rest computed; and the seconds that took."""
    columns: dict[str, Any] = {column: stored.read([there])[there] for column, (stored, there) in found.items()}
    missing = lacking(name, view, config.data, set(columns))
    with run.progress(f"features {name}", dataset.rows) as progress:
        if missing is not None:
            tables = {view.table: dataset.table(view.table)} if view.table else {}
            events = dataset.read(view_inputs(view, config.data, config.features.as_of or ""))
            columns.update(
                compute.view_features(
                    name, missing, config.data, config.features, events, events, tables, threads_of(config)
                )
            )
        progress.advance(dataset.rows)
        seconds = dataset.rows / max(progress.rate, 1e-9)
    return pa.table(columns), seconds


def lacking(name: str, view: ViewConfig, data: DataConfig, have: set[str]) -> ViewConfig | None:
    """The smallest view that computes the columns not in `have`; None when nothing is lacking."""
    names = [feature.name for feature in view_columns(name, view, data)]
    if have.issuperset(names):
        return None
    if not have or view.kind == "asof":
        return view
    windows = [
        window
        for window in view.windows
        if any(
            window_name(name, column, item, window) not in have
            for column, items in view.aggregates.items()
            for item in items
        )
    ]
    aggregates = {
        column: tuple(
            item for item in items if any(window_name(name, column, item, window) not in have for window in windows)
        )
        for column, items in view.aggregates.items()
    }
    values = {**schema.plain(view), "windows": windows, "aggregates": {k: v for k, v in aggregates.items() if v}}
    return schema.build(ViewConfig, values)  # type: ignore[no-any-return]


def column_recipes(name: str, view: ViewConfig, config: Config, dataset: Dataset) -> dict[str, str]:
    """Digest of what decides each column of the view: rule, entity, decision time, and contents of its inputs.

    The view's name, owner and description decide nothing.
    """
    data = config.data
    common: dict[str, Any] = {
        "format": FORMAT,
        "kind": view.kind,
        "as_of": config.features.as_of,
        "inputs": {
            column: dataset.column_digest(column)
            for column in view_inputs(_without_values(view), data, config.features.as_of or "")
        },
        "entity": list(view.entity),
    }
    if view.kind == "asof":
        common |= {"table": dataset.table_digest(view.table or ""), "on": list(view.on), "max_age": view.max_age}
        common |= {"inclusive": view.inclusive, "static": data.tables[view.table or ""].static}
        return {
            f"{name}_{column}": digest.of_json([common, column, data.tables[view.table or ""].columns[column].known_at])
            for column in view.columns
        }
    return {
        window_name(name, column, aggregate, window): digest.of_json(
            [common, _value_recipe(column, data, dataset), aggregate, window]
        )
        for column, aggregates in view.aggregates.items()
        for window in view.windows
        for aggregate in aggregates
    }


def _without_values(view: ViewConfig) -> ViewConfig:
    return schema.build(
        ViewConfig, {**schema.plain(view), "aggregates": {"rows": ["count"]} if view.aggregates else {}}
    )  # type: ignore[no-any-return]


def _value_recipe(column: str, data: DataConfig, dataset: Dataset) -> list[Any]:
    if column == "rows":
        return ["rows"]
    spec = data.columns[column]
    anchors = {anchor: dataset.column_digest(anchor) for anchor in known_anchor(spec)}
    return [dataset.column_digest(column), spec.known_at, anchors]


def threads_of(config: Config) -> int:
    """Compute threads of this process."""
    return config.resources.threads or environment.cores()
