"""Checks that SQL gives the same result each time, from DuckDB's parse tree and catalogue of functions.

Not allowed: access to more than the rows (the clock, random numbers, settings, files), and a choice by the order of rows
(LIMIT without ORDER BY, `first(x)`). If the order of rows only affects rounding or ties, a query is allowed, and runs on
sources that are sorted by their values.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.data import query
from engine.errors import UserError, nearest

Node = dict[str, Any]  # of DuckDB's parse tree, which decides its keys

# Marked in the catalogue as changing, but only with the time zone, which is fixed, or because it ends the query.
STEADY = ("make_timestamptz", "error")
# Not marked there: (name, number of arguments).
UNMARKED = {
    ("age", 1): "it reads the clock", ("reservoir_quantile", 2): "it draws a sample",
    ("version", 0): "it depends on the version of DuckDB",
}  # fmt: skip
CHANGES = {
    "VOLATILE": "its value changes from call to call",
    "CONSISTENT_WITHIN_QUERY": "its value changes from run to run",
}
CLOCK = ("current_date", "current_time", "current_timestamp", "localtime", "localtimestamp")  # written without ()
# Aggregates with the same bits for any order of the rows; others may round or break ties by the order.
EXACT = (
    "count", "count_star", "count_if", "countif", "min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor",
    "bitstring_agg", "approx_count_distinct", "histogram", "histogram_exact", "median", "quantile", "quantile_cont",
    "quantile_disc", "mad",
)  # fmt: skip
PICKING = (
    "first", "last", "any_value", "arbitrary", "list", "array_agg", "string_agg", "group_concat", "listagg",
)  # fmt: skip
IN_ORDER = (*PICKING, "row_number", "ntile", "lag", "lead", "first_value", "last_value", "nth_value", "fill")
TABLE_FUNCTIONS = ("unnest", "range", "generate_series", "repeat", "repeat_row", "json_each", "json_tree")
PLAIN_JOINS = ("REGULAR", "NATURAL", "CROSS", "DEPENDENT")
ADVICE = "Use a column of the sources, or write the value out."
ONLY_SOURCES = "SQL sees the sources and nothing else."
SYSTEM_SCHEMAS = ("information_schema", "pg_catalog")


@dataclass(frozen=True)
class Use:
    """A part of a query whose result does not depend on the rows alone: its name, why, and what to write instead."""

    found: str
    why: str
    instead: str


@dataclass
class _Walk:
    """The state of a walk over a parse tree."""

    tables: Mapping[str, Collection[str]]  # columns by source
    own: set[str] = field(default_factory=set)  # names of WITH
    read: set[str] = field(default_factory=set)
    by_order: bool = False


def check(sql: str, tables: Mapping[str, Collection[str]], where: str) -> frozenset[str]:
    """The sources that must be sorted before the query runs; empty if their order does not matter.

    `tables` gives the columns of each source. Raises UserError for a query whose rows may differ from run to run.
    """
    tree, reason = parse(sql)
    if tree is None:
        raise UserError(f"{where} must be one SELECT statement, but DuckDB says: {reason}")
    walk = _Walk({name.lower(): columns for name, columns in tables.items()})
    walk.own = {entry["key"].lower() for node in nodes(tree) for entry in node.get("cte_map", {}).get("map", ())}
    for use in _uses(tree, walk):
        raise UserError(f"{where} must give the same rows each time, found {use.found}: {use.why}. {use.instead}")
    read = {name for name in tables if name.lower() in walk.read}
    return frozenset(read if walk.by_order else ())


@functools.lru_cache(maxsize=256)
def parse(sql: str) -> tuple[Node | None, str]:
    """DuckDB's parse tree of one SELECT, or None and the reason if the text is not one."""
    with query.connect() as connection:
        text = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()[0]
    parsed = json.loads(text)
    if parsed["error"] or len(parsed["statements"]) != 1:
        return None, str(parsed.get("error_message") or "there must be one statement")
    return dict(parsed["statements"][0]["node"]), ""


def text(tree: Node) -> str:
    """The SQL of a parse tree."""
    with query.connect() as connection:
        statement = json.dumps({"error": False, "statements": [{"node": tree}]})
        return str(connection.execute("SELECT json_deserialize_sql(?)", [statement]).fetchone()[0])


def nodes(tree: Any) -> Iterator[Node]:
    """Every node of a tree, the outer before the inner."""
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            yield from nodes(value)


# ------------------------------------------------------------------------------------------------ functions


@dataclass(frozen=True)
class Overload:
    """One entry of the catalogue."""

    kind: str
    arguments: int
    more: bool  # takes any number more
    change: str | None  # how its value changes though its arguments are the same
    definition: str | None  # SQL of a macro


@functools.cache
def catalogue() -> dict[str, list[Overload]]:
    """DuckDB's functions by name."""
    with query.connect() as connection:
        rows = connection.execute(
            "SELECT function_name, function_type, len(parameters), varargs IS NOT NULL, stability, macro_definition "
            "FROM duckdb_functions()"
        ).fetchall()
    found: dict[str, list[Overload]] = {}
    for name, kind, arguments, more, stability, definition in rows:
        change = CHANGES.get(stability, "its value changes") if stability not in (None, "CONSISTENT") else None
        found.setdefault(name.lower(), []).append(Overload(kind, arguments, more, change, definition))
    return found


def arguments_of(node: Node) -> list[Node]:
    """The arguments of a call, as nodes; DuckDB before 2.0 calls them children."""
    return [item.get("expression", item) for item in node.get("arguments") or node.get("children") or ()]


def overloads(name: str, arguments: int) -> list[Overload]:
    """Those that a call may mean: of this number of arguments, or all where none has it."""
    known = [item for item in catalogue().get(name, []) if item.kind in ("scalar", "aggregate", "window", "macro")]
    fitting = [item for item in known if item.arguments == arguments or (item.more and item.arguments <= arguments)]
    return fitting or known


def is_aggregate(name: str, arguments: int) -> bool:
    """Whether a call makes one value of many rows, by itself or inside a macro."""
    return any(
        item.kind == "aggregate"
        or any(is_aggregate(call["function_name"], len(arguments_of(call))) for call in _calls(item.definition))
        for item in overloads(name, arguments)
    )


def changing(name: str, arguments: int) -> str | None:
    """Why a call gives another value at another time, or None. A macro changes as what it stands for does."""
    if name in STEADY:
        return None
    if (name, arguments) in UNMARKED:
        return UNMARKED[name, arguments]
    found = overloads(name, arguments)
    # Some operators have one changing overload among many (that of a time zone, which is fixed).
    if found and all(item.change for item in found):
        return found[0].change
    for item in found:
        for node in nodes(_definition(item.definition)):
            if node.get("class") == "COLUMN_REF" and node["column_names"][-1].lower() in CLOCK:
                return "it reads the clock"
            inner = (
                changing(node["function_name"], len(arguments_of(node))) if node.get("class") == "FUNCTION" else None
            )
            if inner:
                return inner
    return None


def _calls(definition: str | None) -> Iterator[Node]:
    return (node for node in nodes(_definition(definition)) if node.get("class") == "FUNCTION")


def _definition(text: str | None) -> Any:
    """Parse tree of a macro; none for other functions and for macros that are tables."""
    return (parse(f"SELECT {text}")[0] if text and not text.startswith(("SELECT", "WITH")) else None) or {}


# ---------------------------------------------------------------------------------------------------- walking


def _uses(tree: Any, walk: _Walk) -> Iterator[Use]:
    for node in nodes(tree):
        visit = VISITS.get(str(node.get("class") or node.get("type")))
        if visit is not None:
            yield from visit(node, walk)
        if isinstance(node.get("modifiers"), list):
            yield from _modifiers(node["modifiers"], walk)
        yield from _sample(node.get("sample"), walk)
        walk.by_order |= bool(node.get("key_targets"))  # WITH RECURSIVE ... USING KEY keeps the last row of a key


def _function(node: Node, walk: _Walk) -> Iterator[Use]:
    name, arguments = node["function_name"].lower(), len(arguments_of(node))
    why = changing(name, arguments)
    if why:
        yield Use(f"{name}()", why, ADVICE)
    if not is_aggregate(name, arguments):
        return
    hidden = [call["function_name"] for item in overloads(name, arguments) for call in _calls(item.definition)]
    picks = next((inner for inner in hidden if inner in PICKING), None)
    if name in PICKING and not node["order_bys"]["orders"]:
        yield Use(f"{name}()", "it takes rows in the order in which they come", f"Say it: {name}(x ORDER BY y).")
    if picks:
        why = f"DuckDB defines it by {picks}(), which takes rows in the order in which they come"
        yield Use(f"{name}()", why, f"Write it out with {picks}(x ORDER BY y).")
    walk.by_order |= name not in EXACT


def _window(node: Node, walk: _Walk) -> Iterator[Use]:
    name = node["function_name"].lower()
    by_rows = any(str(node[end]).endswith("_ROWS") for end in ("start", "end"))
    if not node["orders"] and not node.get("arg_orders") and (name in IN_ORDER or by_rows):
        why = "without ORDER BY it takes rows in the order in which they come"
        yield Use(f"{name}() OVER", why, f"Say it: {name}(...) OVER (... ORDER BY y).")
    change = changing(name, len(arguments_of(node)))
    if change:
        yield Use(f"{name}()", change, ADVICE)
    walk.by_order = True


def _column(node: Node, walk: _Walk) -> Iterator[Use]:
    names = [name.lower() for name in node["column_names"]]
    declared = {column.lower() for columns in walk.tables.values() for column in columns}
    if len(names) == 1 and names[0] in CLOCK and names[0] not in declared:
        yield Use(names[0], "it reads the clock", ADVICE)


def _table(node: Node, walk: _Walk) -> Iterator[Use]:
    name = node["table_name"]
    walk.read.add(name.lower())
    if node.get("schema_name") in SYSTEM_SCHEMAS or name.lower() not in {*walk.tables, *walk.own}:
        yield Use(repr(name), "it is none of data.sources", ONLY_SOURCES + nearest(name, walk.tables))


def _table_function(node: Node, walk: _Walk) -> Iterator[Use]:
    name = node["function"]["function_name"].lower()
    if name not in TABLE_FUNCTIONS:
        yield Use(f"{name}()", "it reads something else than the rows", ONLY_SOURCES + nearest(name, walk.tables))


def _show(*_: Any) -> Iterator[Use]:
    yield Use("SHOW, DESCRIBE or SUMMARIZE", "it describes tables, partly by samples", "Use SELECT over the sources.")


def _join(node: Node, walk: _Walk) -> Iterator[Use]:
    if node["ref_type"] == "POSITIONAL":
        why = "it pairs rows by the order in which they come"
        yield Use("POSITIONAL JOIN", why, "Join by a column that both sides have.")
    walk.by_order |= node["ref_type"] not in PLAIN_JOINS  # ASOF: one of several rows of an instant


def _modifiers(modifiers: list[Node], walk: _Walk) -> Iterator[Use]:
    """ORDER BY, LIMIT, OFFSET and DISTINCT of one SELECT."""
    kinds = [item["type"] for item in modifiers]
    ordered = "ORDER_MODIFIER" in kinds
    chosen = "DISTINCT ON" if any(item.get("distinct_on_targets") for item in modifiers) else ""
    chosen = chosen or ("LIMIT or OFFSET" if any(kind.startswith("LIMIT") for kind in kinds) else "")
    if chosen and not ordered:
        why = "without ORDER BY it keeps the rows that come first"
        yield Use(chosen, why, "Add ORDER BY to the same SELECT.")
    walk.by_order |= bool(chosen)


def _sample(sample: Any, walk: _Walk) -> Iterator[Use]:
    if not isinstance(sample, dict):
        return
    if int(sample["seed"]) < 0:
        why = "it draws other rows each time"
        yield Use("a sample without a seed", why, "Name one: USING SAMPLE reservoir(100 ROWS) REPEATABLE (1).")
    walk.by_order = True


VISITS = {
    "FUNCTION": _function,
    "WINDOW": _window,
    "COLUMN_REF": _column,
    "BASE_TABLE": _table,
    "TABLE_FUNCTION": _table_function,
    "SHOW_REF": _show,
    "JOIN": _join,
}
