"""User functions: features computed by a function of a plug-in file, or of an installed package that offers it in the entry
point group `engine.features`.

A function is `f(rows: pyarrow.Table) -> pyarrow.Table`: `rows` has the view's `inputs`, the result its `outputs`, one row for
each row in the same order. It must read nothing but its input, and give a row the same values whichever rows are beside it. The
digest of the file, or the package's version, is part of the recipe.
"""

from __future__ import annotations

import ast
import importlib.metadata
import traceback
from collections.abc import Callable, Collection
from typing import Any

import pyarrow as pa

from engine.config import plugins
from engine.config.sections.features import FUNCTION_GROUP as GROUP
from engine.data.arrow_types import parse_type, schema_of
from engine.errors import UserError, nearest


class Failed(UserError):
    """A call of a function ended with an error of its own; another try may succeed."""


def _found() -> dict[str, importlib.metadata.EntryPoint]:
    return plugins.installed(GROUP)


def function_version(name: str) -> str:
    """`name@digest` of a plug-in's function, `plugins.version_of` of an installed one. Raises UserError."""
    if plugins.split(name)[1] is not None:
        return name
    return plugins.entry_version(_entry(name))


def call(name: str, rows: pa.Table, outputs: dict[str, str], where: str, sensitive: Collection[str] = ()) -> pa.Table:
    """The declared outputs of a function, with type and row count checked.

    Raises Failed where the function raises an error, without its text if it may quote values of `sensitive` columns, and
    UserError when the output is not as declared.
    """
    if not rows.num_rows:
        return schema_of(outputs).empty_table()
    function = _function(name)
    name = plugins.split(name)[0]
    try:
        table = function(rows)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(getattr(function, "__code__", None), "co_filename", None)
        at = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        text = f"{where}: function {name!r} raised {type(error).__name__} in {at.filename}, line {at.lineno}"
        if sensitive:
            because = f"because it may quote the sensitive {', '.join(sensitive)}"
            raise Failed(f"{text}. Its message is not shown, {because}") from None
        raise Failed(f"{text}: {error}") from error
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


def signature(name: str, kinds: dict[str, str], outputs: dict[str, str]) -> list[str]:
    """What a function takes and gives, as lines: `kinds` are the types of its inputs by column."""
    short, digest = plugins.split(name)
    columns, values = (", ".join(f"{key}: {kind}" for key, kind in items.items()) for items in (kinds, outputs))
    lines = [f"{short}(rows: pyarrow.Table[{columns}]) -> pyarrow.Table[{values}]"]
    if digest is None:
        return [*lines, f"from {function_version(name)}"]
    plugin = plugins.of_digest(digest, short)
    node = plugin.defined[short]
    told = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
    return [*lines, *(told or "").split("\n\n")[0].splitlines(), f"from {plugin.file}, line {node.lineno}, {digest}"]


def _function(name: str) -> Callable[[pa.Table], pa.Table]:
    found = _entry(name).load() if plugins.split(name)[1] is None else plugins.load(name)
    return found  # type: ignore[no-any-return]


def _entry(name: str) -> Any:
    if name not in _found():
        raise UserError(
            f"no file of `plugins` defines {name!r}, and no installed package offers it in the entry-point group {GROUP}."
            f"{nearest(name, _found())} Name its file: plugins: [features.py]"
        )
    return _found()[name]
