"""User functions: features computed by a function of an installed package, found by the entry point group `engine.features`.

A function is `f(rows: pyarrow.Table) -> pyarrow.Table`: one row in, one row out, in the same order. It must read nothing but
its input. The package's version is part of the recipe.
"""

from __future__ import annotations

import functools
import importlib.metadata
import traceback
from collections.abc import Callable, Collection
from typing import Any

import pyarrow as pa

from engine.data.arrow_types import parse_type
from engine.errors import UserError, nearest

GROUP = "engine.features"


@functools.cache
def _found() -> dict[str, Any]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def function_version(name: str) -> str:
    """`package==version` of an installed function. Raises UserError when there is none."""
    entry = _entry(name)
    return f"{entry.dist.name}=={entry.dist.version}:{entry.value}" if entry.dist else entry.value


def call(name: str, rows: pa.Table, outputs: dict[str, str], where: str, sensitive: Collection[str] = ()) -> pa.Table:
    """The declared outputs of an installed function, with type and row count checked.

    Raises UserError when the output is not as declared, and when it fails on `sensitive` columns: its own error may quote their
    values.
    """
    function: Callable[[pa.Table], pa.Table] = _entry(name).load()
    try:
        table = function(rows)
    except Exception as error:
        if not sensitive:
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where}: function {name!r} raised {type(error).__name__} in {at.filename}, line {at.lineno}. Its message is not "
            f"shown, because it may quote the sensitive {', '.join(sensitive)}"
        ) from None
    if not isinstance(table, pa.Table) or table.num_rows != rows.num_rows:
        found = f"{table.num_rows} rows" if isinstance(table, pa.Table) else type(table).__name__
        raise UserError(f"{where}: function {name!r} must give a pyarrow.Table of {rows.num_rows} rows, found {found}")
    lacking = [output for output in outputs if output not in table.column_names]
    if lacking:
        raise UserError(f"{where}: function {name!r} must give {lacking[0]!r}, found {', '.join(table.column_names)}")
    columns = []
    for output, kind in outputs.items():
        try:
            columns.append(table[output].cast(parse_type(kind)))
        except (KeyError, pa.ArrowException) as error:
            told = "" if sensitive else f": {error}"
            raise UserError(f"{where}: function {name!r} must give {output!r} once, as {kind}{told}") from None
    return pa.table(columns, names=list(outputs))


def _entry(name: str) -> Any:
    if name not in _found():
        raise UserError(
            f"no installed package offers {name!r} in the entry-point group {GROUP}.{nearest(name, _found())} "
            "A function must come from an installed package"
        )
    return _found()[name]
