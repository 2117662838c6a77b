"""DuckDB: SQL over tables that are handed to it, with access to nothing else, neither files nor the network."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from engine.data import failures
from engine.data.bounds import BATCH_ROWS
from engine.errors import UserError
from engine.runtime import stall

UNORDERED = "$unordered"
LIMIT_SECONDS = 3600.0  # for expressions over a batch of rows, which resources.query does not limit
INTERRUPT_SECONDS = 10.0
T = TypeVar("T")
# DuckDB converts these to other values: large integers to negative ones, times without their offset, internal bytes.
_NOT_KEPT = re.compile(r"\b(UHUGEINT|TIME WITH TIME ZONE|BIT|BIGNUM)\b")


def library() -> Any:
    """DuckDB, imported at the first query, so that what uses no SQL does not need it. Raises UserError."""
    try:
        import duckdb
    except ImportError:
        raise UserError("SQL needs DuckDB, which was not found: pip install duckdb") from None
    return duckdb


@contextlib.contextmanager
def connect(memory: int | None = None, spill: Path | None = None, without: str = "") -> Iterator[Any]:
    """A locked-down in-memory connection with one thread (parallel sums of doubles change from run to run).

    `spill` is the only folder that it may write to, `without` names steps of the optimizer to disable.
    """
    connection = library().connect(":memory:", config={"threads": 1, "python_enable_replacements": False})
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET preserve_insertion_order = true")
        if memory is not None:
            connection.execute(f"SET memory_limit = '{memory // 2**20}MiB'")
        if spill is not None:
            connection.execute(f"SET temp_directory = '{str(spill).replace(chr(39), chr(39) * 2)}'")
        else:
            connection.execute("SET temp_directory = ''")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        connection.execute(f"SET disabled_optimizers = '{without}'")
        connection.execute("SET allowed_paths = []")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection
    finally:
        connection.close()


def run(
    connection: Any,
    sql: str,
    where: str,
    rows: int = BATCH_ROWS,
    sensitive: Collection[str] = (),
    limit: float = LIMIT_SECONDS,
) -> Iterator[pa.Table]:
    """Batches of about `rows` rows of one SELECT. Raises UserError with DuckDB's reason, without values of the data if
    columns are `sensitive`, and if the next rows take longer than `limit` seconds.
    """
    duckdb = library()
    with failures.explained(where, sensitive=sensitive):
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError(f"{where} must be one SELECT statement")
        relation = connection.sql(sql)
        _refuse_types(relation, where)
        reader = _within(limit, connection, where, lambda: relation.to_arrow_reader(rows))
    while True:
        # Not around the yield: errors of the caller are not the query's.
        with failures.explained(where, sensitive=sensitive):
            batch = _within(limit, connection, where, lambda: next(reader, None))
        if batch is None:
            return
        yield pa.Table.from_batches([batch])


def _within(limit: float, connection: Any, where: str, call: Callable[[], T]) -> T:
    """The result of a call in a new thread: it can be interrupted with Ctrl-C, and is after `limit` seconds."""
    late, ended = time.monotonic() + limit, threading.Event()

    def work() -> T:
        try:
            return call()
        finally:
            ended.set()

    def look() -> None:
        if time.monotonic() > late:
            raise UserError(
                f"{where} must give its next rows within {limit:g} s (resources.query), but gave none: let the query read or "
                "join less, or allow it more time"
            )

    try:
        return stall.bounded(work, math.inf, "sql", look)
    except BaseException:
        if not ended.is_set():
            connection.interrupt()
            ended.wait(INTERRUPT_SECONDS)
        raise


def _refuse_types(relation: Any, where: str) -> None:
    for name, kind in zip(relation.columns, map(str, relation.types), strict=True):
        if found := _NOT_KEPT.search(kind):
            raise UserError(
                f"{where}: column {name!r} must be of a type whose values are kept, found {found[0]} of SQL: "
                f"write CAST(... AS VARCHAR) AS {_quoted(name)} and declare it as string"
            )


def register(
    connection: Any,
    tables: Mapping[str, pa.Table | pa.dataset.Dataset],
    ordered: Collection[str] = (),
    where: str | None = None,
) -> None:
    """Register tables or datasets under their names; those of `ordered` are sorted by their values.

    Raises UserError for a column of a type that is unknown in SQL; it begins with `where`, or names the source.
    """
    for name, table in tables.items():
        types = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        with failures.explained(where or f"source {name} cannot be queried", f"its columns are {types}"):
            if name in ordered:
                connection.register(UNORDERED, table)
                connection.execute(
                    f"CREATE TEMP TABLE {_quoted(name)} AS FROM {_quoted(UNORDERED)} ORDER BY {_every(table)}"
                )
                connection.unregister(UNORDERED)
            else:
                connection.register(name, table)


def columns_read(sql: str, tables: Mapping[str, pa.Schema], wanted: Collection[str], where: str) -> dict[str, set[str]]:
    """Columns of each table on which the rows and the wanted columns of a SELECT depend, from DuckDB's plan for these
    columns only.

    Raises UserError with DuckDB's reason.
    """
    asked = ", ".join(map(_quoted, wanted))
    # The tables have no rows; these optimizers would conclude from that that nothing is read.
    with connect(without="statistics_propagation,filter_pushdown") as connection, failures.explained(where):
        register(connection, {name: schema.empty_table() for name, schema in tables.items()}, tables)
        ((_, plan),) = connection.execute(
            f"EXPLAIN (FORMAT json) SELECT {asked} FROM ({sql.strip().rstrip(';')})"
        ).fetchall()
    found: dict[str, set[str]] = {name: set() for name in tables}
    waiting = list(json.loads(plan))
    while waiting:
        node = waiting.pop()
        waiting += node.get("children", ())
        facts = node.get("extra_info", {})
        if "Table" in facts:
            name = next(name for name in tables if facts["Table"].endswith((f".{name}", f".{_quoted(name)}")))
            columns = facts.get("Projections", [])
            found[name] |= {columns} if isinstance(columns, str) else set(columns)
    return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _every(table: Any) -> str:
    """All columns, then the signs of numbers: 0.0 and -0.0 compare as equal."""
    reals = [_quoted(field.name) for field in table.schema if pa.types.is_floating(field.type)]
    return ", ".join([*(_quoted(field.name) for field in table.schema), *(f"signbit({name})" for name in reals)])
