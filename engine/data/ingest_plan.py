"""The plan of an ingest: the schema is checked, the files are found and hashed, the recipe is derived from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import schema as config_schema
from engine.config.nested import Tree
from engine.config.sections.data import Column, DataConfig, SourceConfig
from engine.config.tree import Config
from engine.data import column_checks, repeatable, stage
from engine.data.columns import FILE, OF_FILE
from engine.data.dataset import FORMAT
from engine.data.expressions import expression_columns
from engine.data.files import SourceFile, event_source, resolve, source_files
from engine.data.readers import lake_tables
from engine.errors import UserError, nearest
from engine.runtime import digest, environment, remote, storage
from engine.runtime.run import Run

RECIPE_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class IngestPlan:
    """The files of every source, the recipe, and the folders of the dataset and of staged files."""

    config: Config
    files: list[SourceFile]
    recipe: str
    folder: Path
    memory: int
    threads: int

    @property
    def data(self) -> DataConfig:
        """The data section of the config."""
        return self.config.data

    @property
    def entry(self) -> Path:
        """Folder of the dataset."""
        return self.folder / self.recipe[:16]

    @property
    def staged(self) -> Path:
        """Folder of staged source files."""
        return self.folder / ".staged"


def make_plan(config: Config, run: Run) -> IngestPlan:
    """Find and hash the inputs, derive the recipe, and record both in the run. Raises UserError before anything is read."""
    data = config.data
    if not data.columns:
        raise UserError(
            "data.columns must declare the event table: choose a dataset with +experiment=NAME or +data=NAME"
        )
    check_schema(data)
    folder = storage.inside(Path(config.paths.store), "datasets", data.name or config.name)
    remote.record(Path(config.paths.store), *remote.of_data(config_schema.plain(data)).values())
    files = [file for name, source in data.sources.items() for file in _files(name, source, data, folder / ".remote")]
    identities: dict[str, list[Any]] = {name: [] for name in data.sources}
    for file in files:
        identities[file.source].append(file.identity)
    spec = contents_of(data)
    asked: list[Any] = [RECIPE_FORMAT, FORMAT, stage.FORMAT, spec, identities, _named(files, data)]
    if any(ordered(data, sql, where) for where, sql in queries(data)):
        asked.append("sources in order")
    recipe = digest.of_json(asked)
    run.add_inputs({file.shown: file.digest for file in files})
    run.link("inputs", digest.of_json(identities))
    memory = config.resources.memory.bytes
    return IngestPlan(config, files, recipe, folder, memory, environment.threads_of(config))


def contents_of(data: DataConfig) -> Tree:
    """The plain specification without keys that affect no value of the dataset."""
    plain = config_schema.plain(data)
    aside = ("path", "positive", "group") if data.timed else ("path", "positive")
    return {name: item for name, item in plain.items() if name not in aside}


def _files(name: str, source: SourceConfig, data: DataConfig, cache: Path) -> list[SourceFile]:
    if source.format in lake_tables.LIBRARIES:
        return [lake_tables.table_file(name, source, resolve(source.path, data.path))]
    return source_files(name, source, data, cache)


def _named(files: list[SourceFile], data: DataConfig) -> list[list[str]]:
    """(source, name) of files whose name becomes a column; such names are part of the recipe."""
    named = {
        name for name, source in data.sources.items() if any(column.path == FILE for column in source.columns.values())
    }
    return [[file.source, file.path.name] for file in files if file.source in named]


def check_schema(data: DataConfig) -> None:
    """Check every type, bound and reference of the schema. Raises UserError."""
    for name, source in data.sources.items():
        _check_source(name, source)
    for columns in (data.columns, *(table.columns for table in data.tables.values())):
        _check_bounds(columns, data.time_zone)
    known = data.known_time
    if known is not None and known not in data.columns:
        raise UserError(f"data.known_time names {known!r}, which is no column.{nearest(known, data.columns)}")
    for name, table in data.tables.items():
        if table.query is None and name not in data.sources:
            raise UserError(f"data.tables.{name} must have a query, or data.sources a source of that name")
    for where, sql in queries(data):
        ordered(data, sql, where)
    for name, rule in data.rules.items():
        expression_columns(rule.holds, f"data.rules.{name}")
    if data.query is None:
        event_source(data)


def queries(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(config key, SQL) of the events and of each side table that has a query."""
    found = {
        "data.query": data.query,
        **{f"data.tables.{name}.query": item.query for name, item in data.tables.items()},
    }
    yield from ((where, sql) for where, sql in found.items() if sql is not None)


def ordered(data: DataConfig, sql: str, where: str) -> frozenset[str]:
    """Sources that must be sorted before a query. Raises UserError if its rows may differ from run to run."""
    return repeatable.check(sql, {name: tuple(source.columns) for name, source in data.sources.items()}, where)


def _check_source(name: str, source: SourceConfig) -> None:
    stage.schema_of({column: item.type for column, item in source.columns.items()})
    for column, item in source.columns.items():
        if item.path in OF_FILE and item.type not in ("string", "int64"):
            raise UserError(f"data.sources.{name}.columns.{column}: {item.path} must be string or int64")
    for option in (source.csv.delimiter, source.csv.quote or "x", source.csv.decimal):
        if len(option) != 1 or not option.isascii():
            where = f"data.sources.{name}.csv"
            raise UserError(f"{where}: delimiter, quote and decimal must be one ASCII character, found {option!r}")


def _check_bounds(columns: dict[str, Column], zone: str) -> None:
    kinds = column_checks.schema(columns)
    for name, column in columns.items():
        for value in (column.min, column.max):
            if value is not None:
                column_checks.bound(value, kinds.field(name).type, zone)
