"""Short ways to a source, a config and a dataset; every file a test reads it makes itself, or takes from a fixture."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.config.tree import Config
from engine.data import stage
from engine.data.dataset import Dataset
from engine.data.files import source_files
from engine.data.ingest import ingest
from engine.data.make_dataset import ensure_dataset
from engine.data.stage import Staged
from engine.runtime.progress import Progress


def read(
    path: Path | str, columns: dict[str, Any], zone: str = "UTC", threads: int = 2, **source: Any
) -> tuple[pa.Table, Staged]:
    """(kept rows, what was found) of one source, its files in canonical order, without a dataset around it."""
    tables, staged = [], None
    for item in stage_all(path, columns, zone, threads, **source):
        tables += list(item.read())
        staged = item
    assert staged is not None
    return pa.concat_tables(tables) if tables else pa.table({}), staged


def stage_all(
    path: Path | str, columns: dict[str, Any], zone: str = "UTC", threads: int = 2, **source: Any
) -> list[Staged]:
    """Every file of one source, staged in memory."""
    data = schema.build(
        DataConfig,
        {
            "name": "t",
            "time_zone": zone,
            "sources": {"s": {"path": str(path), "columns": columns, **source}},
            "query": "SELECT 1",
        },
    )
    files = source_files("s", data.sources["s"], data, Path(path).parent / ".remote")
    return [stage.stage(file, data, threads, None, lambda _: None) for file in files]


def config(folder: Path, data: dict[str, Any], cluster: dict[str, Any] | None = None, **resources: Any) -> Config:
    """A config with this data section; store and runs stand below `folder`."""
    return schema.build(
        Config,
        {
            "name": "t", "data": {"name": "t", **data}, "resources": {"threads": 2, **resources},
            "paths": {"store": str(folder / "store"), "runs": str(folder / "runs")}, "cluster": cluster or {},
        },
    )  # fmt: skip


class QuietRun:
    """The part of a run that the data room uses, without git, clock and disk."""

    def __init__(self, folder: Path) -> None:
        self.record: dict[str, Any] = {"inputs": {}, "outputs": {}, "chain": {}}
        self.lines: list[str] = []
        self._folder = folder / uuid.uuid4().hex[:8]

    def log(self, message: str) -> None:
        self.lines.append(message)

    warn = log

    def masked(self, value: Any) -> Any:
        return value

    def link(self, name: str, value: str) -> None:
        self.record["chain"][name] = value

    def add_inputs(self, digests: dict[str, str]) -> None:
        self.record["inputs"].update(digests)

    def add_output(self, name: str, value: str) -> None:
        self.record["outputs"][name] = value

    def progress(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> Progress:
        return Progress(label, total, unit, start)

    def path(self, *parts: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder.joinpath(*parts)


def run_of(given: Config) -> Any:
    """A run for a step that is called by itself."""
    return QuietRun(Path(given.paths.runs))


def build(given: Config) -> tuple[Dataset, dict[str, float]]:
    """Ingest and open."""
    metrics = ingest(given, run_of(given))
    return ensure_dataset(given, run_of(given)), metrics
