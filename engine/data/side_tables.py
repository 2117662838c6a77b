"""Side tables: the order and the uniqueness of their ids, and their entries in the manifest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from engine.config import schema as config_schema
from engine.config.sections.data import Column, TableConfig
from engine.data import order
from engine.data.columns import as_text
from engine.data.dataset import ColumnEntry, TableEntry
from engine.data.quarantine import EQUAL
from engine.data.row_origins import compare
from engine.errors import UserError
from engine.runtime import digest


def key_columns(columns: dict[str, Column]) -> list[str]:
    """The columns that a table is ordered by: event time, then ids."""
    times = [name for name, column in columns.items() if column.role == "event_time"]
    return [*times, *(name for name, column in columns.items() if column.identifies and column.role != "event_time")]


def check_unique(name: str, table: TableConfig, rows: pa.Table) -> None:
    """Raise UserError unless the ids of a side table are unique. `rows` are sorted by them."""
    ids = key_columns(table.columns)
    # An event time alone is no key: without declared ids a table may hold many rows of one instant.
    if not any(column.identifies for column in table.columns.values()):
        return
    again = np.flatnonzero(order.equal_neighbours(rows.select(ids), ids))
    if not len(again):
        return
    sensitive = {column for column, item in table.columns.items() if item.sensitive}
    rest = [column for column in table.columns if column not in ids]
    found = compare(rows.take(pa.array(again)), rows.take(pa.array(again + 1)), rest, sensitive)
    differing = [place for place, (reason, _) in enumerate(found) if reason != EQUAL]
    first = (differing or [0])[0]
    example = ", ".join(
        f"{column} {'(sensitive)' if column in sensitive else as_text(rows.column(column)[int(again[first])])}"
        for column in ids
    )
    if differing:
        which = f"which differ in {found[first][1]}; name more id columns, or let a query choose one row"
    else:
        sql = f"SELECT DISTINCT * FROM ({table.query})" if table.query else f'SELECT DISTINCT * FROM "{name}"'
        which = f"all of them equal in every column: set {config_schema.word(f'data.tables.{name}.query', sql)}"
    raise UserError(
        f"data.tables.{name}: {', '.join(ids)} must be unique, found {len(again):,} rows too many, as for {example}, {which}"
    )


def table_entry(name: str, table: pa.Table, config: TableConfig) -> TableEntry:
    """The entry of a side table in the manifest."""
    values = digest.TableDigest(table.schema)
    values.update(table)
    columns: list[ColumnEntry] = [
        {"name": column, "type": item.type, "role": item.role, "known_at": item.known_at}
        for column, item in config.columns.items()
    ]
    return {
        "file": f"tables/{name}.parquet", "rows": table.num_rows, "digest": values.hexdigest(), "static": config.static,
        "columns": columns,
    }  # fmt: skip
