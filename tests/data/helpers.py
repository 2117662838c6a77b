"""Short ways to a source, a config and a dataset; every file a test reads it makes itself, or takes from a fixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config import schema
from engine.config.tree import Config, DataConfig
from engine.data import stage
from engine.data.dataset import Dataset
from engine.data.files import source_files
from engine.data.ingest import ensure, ingest
from engine.data.stage import Staged
from engine.runtime.run import Run


def read(path: Path | str, columns: dict[str, Any], zone: str = "UTC", threads: int = 2, **source: Any) -> tuple[pa.Table, Staged]:
    """(kept rows, what was found) of one source, its files in canonical order, without a dataset around it."""
    tables, staged = [], None
    for item in stage_all(path, columns, zone, threads, **source):
        tables += list(item.read())
        staged = item
    assert staged is not None
    return pa.concat_tables(tables) if tables else pa.table({}), staged


def stage_all(path: Path | str, columns: dict[str, Any], zone: str = "UTC", threads: int = 2, **source: Any) -> list[Staged]:
    """Every file of one source, staged in memory."""
    data = schema.build(
        DataConfig,
        {"name": "t", "time_zone": zone, "sources": {"s": {"path": str(path), "columns": columns, **source}}, "query": "SELECT 1"},
    )
    files = source_files("s", data.sources["s"], data, Path(path).parent / ".remote")
    return [stage.stage(file, data, threads, None, lambda _: None) for file in files]


def config(folder: Path, data: dict[str, Any], **resources: Any) -> Config:
    """A config with this data section; store and runs stand below `folder`."""
    return schema.build(
        Config,
        {
            "name": "t", "data": {"name": "t", **data}, "resources": {"threads": 2, **resources},
            "paths": {"store": str(folder / "store"), "runs": str(folder / "runs")},
        },
    )  # fmt: skip


def run_of(given: Config, command: str = "ingest") -> Run:
    """A new run directory."""
    return Run.create(command, given, {})


def build(given: Config) -> tuple[Dataset, dict[str, float]]:
    """Ingest and open."""
    metrics = ingest(given, run_of(given))
    return ensure(given, run_of(given)), metrics
