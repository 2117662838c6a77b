"""SQL expressions over the columns of one row: what they read, and their values. One row in, one value out.

Refused: aggregates, window functions, subqueries and anything whose value may change from call to call (now(), random()).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from engine.data import query
from engine.data.arrow_types import parse_type
from engine.errors import UserError


@functools.lru_cache(maxsize=256)
def expression_columns(sql: str, where: str = "expression") -> tuple[str, ...]:
    """Columns that an expression reads, sorted. Raises UserError for SQL that is not row-local and repeatable."""
    with query.connect() as connection:
        text = connection.execute("SELECT json_serialize_sql(?)", [f"SELECT ({sql}) AS value FROM rows"]).fetchone()[0]
        parsed = json.loads(text)
        if parsed["error"]:
            raise UserError(f"{where} must be one SQL expression, found {sql!r}: {parsed.get('error_message')}")
        nodes = parsed["statements"][0]["node"].get("select_list", [])
        if len(parsed["statements"]) != 1 or len(nodes) != 1:
            raise UserError(f"{where} must be one SQL expression, found {sql!r}")
        return tuple(sorted(set(_columns(nodes[0], where, _stabilities(connection)))))


def _stabilities(connection: Any) -> dict[str, set[str]]:
    rows = connection.execute("SELECT function_name, function_type, stability FROM duckdb_functions()").fetchall()
    found: dict[str, set[str]] = {}
    for name, kind, stability in rows:
        found.setdefault(name, set()).add("aggregate" if kind == "aggregate" else str(stability))
    return found


def _columns(node: Any, where: str, stabilities: dict[str, set[str]]) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _columns(item, where, stabilities)
    if not isinstance(node, dict):
        return
    kind = node.get("class")
    if kind in ("WINDOW", "SUBQUERY", "STAR"):
        raise UserError(f"{where} must read one row at a time, found a {kind.lower()}: use a windows view for history")
    if kind == "COLUMN_REF":
        yield node["column_names"][-1]
    if kind == "FUNCTION":
        marks = stabilities.get(node["function_name"], set())
        if "aggregate" in marks:
            raise UserError(f"{where} must read one row at a time, found the aggregate {node['function_name']!r}")
        # Some operators have one volatile overload among many: a function is refused when none is repeatable.
        if marks and "CONSISTENT" not in marks:
            raise UserError(f"{where} must give the same value every time, which {node['function_name']!r} does not")
    for value in node.values():
        if isinstance(value, (dict, list)):
            yield from _columns(value, where, stabilities)


def evaluate(expressions: Mapping[str, tuple[str, str]], rows: pa.Table, where: str = "expression") -> pa.Table:
    """One column per expression (name -> (SQL, type)), one value per row in the same order. Raises UserError."""
    selected = ", ".join(f'CAST(({sql}) AS {_sql_type(kind)}) AS "{name}"' for name, (sql, kind) in expressions.items())
    schema = pa.schema([(name, parse_type(kind)) for name, (_, kind) in expressions.items()])
    with query.connect() as connection:
        connection.register("rows", rows)
        batches = list(query.run(connection, f"SELECT {selected} FROM rows", where))
    table = pa.concat_tables(batches).cast(schema) if batches else schema.empty_table()
    if table.num_rows != rows.num_rows:
        raise UserError(f"{where} must give one value per row: {rows.num_rows} rows in, {table.num_rows} values out")
    return table.combine_chunks()


def _sql_type(kind: str) -> str:
    names = {
        "float64": "DOUBLE",
        "float32": "FLOAT",
        "int64": "BIGINT",
        "int32": "INTEGER",
        "string": "VARCHAR",
        "bool": "BOOLEAN",
    }
    if kind not in names:
        raise UserError(f"the type of an expression must be one of {', '.join(names)}, found {kind!r}")
    return names[kind]
