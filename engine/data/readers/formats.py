"""The readers of sources by format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.config.sections.data import SourceConfig
from engine.data.bounds import Bounds
from engine.data.columns import Chunk, Notes
from engine.data.files import SourceFile
from engine.data.readers import arrow_files, csv_files, json_files, lake_tables

Reader = Callable[[SourceFile, SourceConfig, str, int, Notes, Bounds], Iterator[Chunk]]
# FORMATS in engine/config/sections/data.py has the names, titles and file endings of the same formats.
READERS: dict[str, Reader] = {
    "csv": csv_files.read,
    "jsonl": json_files.read,
    "parquet": arrow_files.read_parquet,
    "arrow": arrow_files.read_arrow,
    "delta": lake_tables.read,
    "iceberg": lake_tables.read,
}
