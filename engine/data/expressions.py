"""SQL expressions over a table: the columns that they read, and their values, one per row or one of all rows.

Not allowed: window functions, subqueries, functions whose value changes from call to call (now(), random()), and
aggregates where there is one value per row.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from engine.data import failures, query, repeatable
from engine.data.arrow_types import parse_type
from engine.data.repeatable import Node
from engine.errors import UserError, nearest

# Errors of DuckDB while it computes: arithmetic without a result on some row.
NO_RESULT = ("OutOfRangeException", "ConversionException", "InvalidInputException")


@functools.lru_cache(maxsize=256)
def expression_columns(sql: str, where: str = "expression", aggregate: bool = False) -> tuple[str, ...]:
    """Columns that an expression over one row, or with `aggregate` over all rows, reads, sorted.

    Raises UserError for SQL that is not a single expression, reads other rows, may change from call to call, or has no
    aggregate where it must.
    """
    must = "must make one number of all rows (sum(x), avg(x), count(*))" if aggregate else "must read one row at a time"
    columns, aggregates, unknown = set(), 0, ""
    for node in nodes(sql, where):
        kind = node.get("class")
        if kind in ("WINDOW", "SUBQUERY", "STAR"):
            advice = "" if aggregate else ": use a windows view for history"
            raise UserError(f"{where} {must}, found a {kind.lower()}{advice}")
        if kind == "COLUMN_REF":
            columns.add(node["column_names"][-1])
        if kind == "FUNCTION":
            name, arguments = node["function_name"].lower(), len(repeatable.arguments_of(node))
            aggregates += repeatable.is_aggregate(name, arguments)
            unknown = unknown or ("" if repeatable.overloads(name, arguments) else name)
            if aggregates and not aggregate:
                raise UserError(f"{where} {must}, found the aggregate {name!r}")
            why = repeatable.changing(name, arguments)
            if why:
                raise UserError(
                    f"{where} must give the same value every time, which {name!r} does not: {why}. {repeatable.ADVICE}"
                )
    if aggregate and not aggregates and unknown:
        raise UserError(f"{where} calls {unknown!r}, which is no function.{nearest(unknown, repeatable.catalogue())}")
    if aggregate and not aggregates:
        raise UserError(f"{where} {must}, found one per row: {sql!r}")
    return tuple(sorted(columns))


def nodes(sql: str, where: str) -> Iterator[Node]:
    """Every node of an expression's parse tree, the outer before the inner. Raises UserError for other text."""
    return repeatable.nodes(_parsed(sql, where)["select_list"])


def _parsed(sql: str, where: str) -> Node:
    """Parse tree of a SELECT of one expression over `rows`."""
    # With parentheses nothing can follow it; without them it must hold together: not `a) + (b`, `a, b` or an empty text.
    trees = []
    for text in (sql, f"({sql})"):
        tree, reason = repeatable.parse(f"SELECT {text} AS value FROM rows")
        if tree is None or len(tree.get("select_list", ())) != 1 or not sql.strip():
            raise UserError(f"{where} must be one SQL expression, found {sql!r}" + (f": {reason}" if reason else ""))
        trees.append(tree)
    return trees[-1]


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
            query.register(connection, {"rows": rows}, where=where)
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
    """Raise UserError where a whole number is declared: for a fraction, which SQL would round, and what is not finite."""
    for name, (sql, kind) in expressions.items():
        if not kind.startswith("int"):
            continue
        value = f"CAST(({sql}) AS DOUBLE)"
        lost = f"SELECT {value} AS found FROM rows WHERE {value} <> round({value}) OR NOT isfinite({value}) LIMIT 1"
        found = next(
            (
                table["found"][0].as_py()
                for table in query.run(connection, lost, where, sensitive=sensitive)
                if table.num_rows
            ),
            None,
        )
        if found is not None:
            advice = "round() it" if math.isfinite(found) else "divide by nullif(x, 0), which gives null where x is 0"
            if sensitive and math.isfinite(found):
                found = "a fraction (not shown: it is computed from sensitive values)"
            raise UserError(
                f"{where}: expression {name!r} must give whole numbers ({kind}), found {found}: {advice}, or declare float64"
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


def aggregate(sql: str, tables: Iterable[pa.Table], where: str) -> list[float]:
    """The value of an expression over all rows of each table (of the same schema), which are called `rows`.

    NaN where there is none: no value at all (a sum without rows), a result that is not finite, or a row that has its
    values but no finite argument for an aggregate (ln(-1), 1 / 0), which min() would pass over. Nulls are left out, as always
    in SQL. Raises UserError with DuckDB's reason, and for a result that is no number.
    """
    statement = _with_checks(f"CAST(({sql}) AS DOUBLE)", where)
    found: list[float] = []
    with query.connect() as connection:
        for table in tables:
            query.register(connection, {"rows": table}, where=where)
            if not found:
                _check_number(connection, sql, where)
            try:
                (row,) = pa.concat_tables(query.run(connection, statement, where)).to_pylist()
                value, *finite = row.values()
            except failures.Unreadable as error:
                if type(error.__cause__).__name__ not in NO_RESULT:
                    raise
                value, finite = None, []
            found.append(value if value is not None and math.isfinite(value) and False not in finite else math.nan)
    return found


def _check_number(connection: Any, sql: str, where: str) -> None:
    with failures.explained(where):
        (kind,) = connection.sql(f"SELECT ({sql}) FROM rows").types
    if not re.fullmatch(r"[A-Z]*INT(EGER)?|DOUBLE|FLOAT|DECIMAL\(.*\)|BOOLEAN", str(kind)):
        raise UserError(f"{where} must make one number of all rows, found {kind} from {sql!r}")


@functools.lru_cache(maxsize=256)
def _with_checks(sql: str, where: str) -> str:
    """SELECT of the expression, and of a column for each argument of an aggregate: false if it is not finite on a row."""
    tree = _parsed(sql, where)
    probe = _parsed("bool_and(isfinite(TRY_CAST(argument AS DOUBLE)))", where)["select_list"][0]
    (argument,) = [node for node in repeatable.nodes(probe) if node.get("class") == "COLUMN_REF"]
    checks = []
    for node in repeatable.nodes(tree["select_list"]):
        arguments = repeatable.arguments_of(node) if node.get("class") == "FUNCTION" else []
        if arguments and repeatable.is_aggregate(node["function_name"].lower(), len(arguments)):
            check = json.dumps({**probe, "filter": node["filter"]})
            checks += [json.loads(check.replace(json.dumps(argument), json.dumps(given))) for given in arguments]
    named = [{**check, "alias": f"finite_{place}"} for place, check in enumerate(checks)]
    return repeatable.text({**tree, "select_list": [*tree["select_list"], *named]})
