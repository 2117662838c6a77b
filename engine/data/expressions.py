"""SQL expressions over the columns of one row: the columns that they read, and their values, one per row.

Not allowed: aggregates, window functions, subqueries, and functions whose value changes from call to call (now(), random()).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from engine.data import failures, query, repeatable
from engine.data.arrow_types import parse_type
from engine.errors import UserError


@functools.lru_cache(maxsize=256)
def expression_columns(sql: str, where: str = "expression") -> tuple[str, ...]:
    """Columns that an expression over one row reads, sorted.

    Raises UserError for SQL that is not a single expression, reads other rows, or may change from call to call.
    """
    tree, reason = repeatable.parse(f"SELECT ({sql}) AS value FROM rows")
    if tree is None or len(tree.get("select_list", ())) != 1:
        raise UserError(f"{where} must be one SQL expression, found {sql!r}" + (f": {reason}" if reason else ""))
    columns = set()
    for node in repeatable.nodes(tree["select_list"]):
        kind = node.get("class")
        if kind in ("WINDOW", "SUBQUERY", "STAR"):
            raise UserError(
                f"{where} must read one row at a time, found a {kind.lower()}: use a windows view for history"
            )
        if kind == "COLUMN_REF":
            columns.add(node["column_names"][-1])
        if kind == "FUNCTION":
            name, arguments = node["function_name"].lower(), repeatable.arguments_of(node)
            if repeatable.is_aggregate(name, arguments):
                raise UserError(f"{where} must read one row at a time, found the aggregate {name!r}")
            why = repeatable.changing(name, arguments)
            if why:
                raise UserError(
                    f"{where} must give the same value every time, which {name!r} does not: {why}. {repeatable.ADVICE}"
                )
    return tuple(sorted(columns))


def evaluate(
    expressions: Mapping[str, tuple[str, str]],
    rows: pa.Table,
    where: str = "expression",
    sensitive: Collection[str] = (),
) -> pa.Table:
    """One column per expression (name -> (SQL, type)), one value per row in the same order.

    Raises UserError, without values of the rows if some of their columns are `sensitive`.
    """
    selected = ", ".join(f'CAST(({sql}) AS {_sql_type(kind)}) AS "{name}"' for name, (sql, kind) in expressions.items())
    schema = pa.schema([(name, parse_type(kind)) for name, (_, kind) in expressions.items()])
    with query.connect() as connection:
        with failures.explained(where, sensitive=sensitive):
            connection.register("rows", rows)
            _check_whole(connection, expressions, where, sensitive)
        batches = list(query.run(connection, f"SELECT {selected} FROM rows", where, sensitive=sensitive))
    with failures.explained(where, sensitive=sensitive):
        table = pa.concat_tables(batches).cast(schema) if batches else schema.empty_table()
    if table.num_rows != rows.num_rows:
        raise UserError(f"{where} must give one value per row: {rows.num_rows} rows in, {table.num_rows} values out")
    return table.combine_chunks()


def _check_whole(
    connection: Any, expressions: Mapping[str, tuple[str, str]], where: str, sensitive: Collection[str]
) -> None:
    """Raise UserError for a fraction where a whole number is declared, because SQL would round it."""
    for name, (sql, kind) in expressions.items():
        if not kind.startswith("int"):
            continue
        value = f"CAST(({sql}) AS DOUBLE)"
        lost = f"SELECT {value} AS found FROM rows WHERE {value} <> round({value}) LIMIT 1"
        found = next(
            (
                table["found"][0].as_py()
                for table in query.run(connection, lost, where, sensitive=sensitive)
                if table.num_rows
            ),
            None,
        )
        if found is not None:
            found = "a fraction (not shown: it is computed from sensitive values)" if sensitive else found
            raise UserError(
                f"{where}: expression {name!r} must give whole numbers ({kind}), found {found}: round() it, or declare float64"
            )


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
