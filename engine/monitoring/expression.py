"""Business metrics: arithmetic over `score`, `label` and columns, from a small allowed part of Python's grammar.

    mean(where((score > 0.5) & (label == 0), 5, 0))        cost of a false alarm, per row
    sum(where(score > 0.5, fare_amount, 0)) / count()      revenue at stake, per row

The text is parsed, never executed: names, numbers, texts, + - * / // % **, comparisons, & | ~, and the functions below.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.errors import UserError, nearest

LABEL = "label"
BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: np.true_divide,
    ast.FloorDiv: np.floor_divide,
    ast.Mod: np.mod,
    ast.Pow: np.float_power,
    ast.BitAnd: np.logical_and,
    ast.BitOr: np.logical_or,
}
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: np.logical_not,
    ast.Not: np.logical_not,
}
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ROWWISE: dict[str, tuple[int, Callable[..., Any]]] = {
    "where": (3, np.where),
    "abs": (1, np.abs),
    "log": (1, np.log),
    "exp": (1, np.exp),
    "sqrt": (1, np.sqrt),
    "is_missing": (1, lambda values: np.isnan(values) if values.dtype.kind == "f" else values == ""),
    "minimum": (2, np.minimum),
    "maximum": (2, np.maximum),
}
# All of these leave missing values out.
REDUCE: dict[str, Callable[[Any], Any]] = {"sum": np.nansum, "mean": np.nanmean, "min": np.nanmin, "max": np.nanmax}
COUNT = "count"
LARGEST = 2_000  # characters


def names_in(expression: str) -> set[str]:
    """Names of the values that an expression reads. Raises UserError for an invalid expression."""
    tree = parse(expression)
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in calls}


def parse(expression: str) -> ast.Expression:
    """The syntax tree, with allowed nodes only. Raises UserError."""
    if len(expression) > LARGEST:
        raise UserError(f"an expression must be at most {LARGEST} characters, found {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"an expression must be arithmetic as in mean(score), found {expression!r}: {error}") from None
    for node in ast.walk(tree):
        _check(node, expression)
    return tree


def _check(node: ast.AST, expression: str) -> None:
    if isinstance(node, ast.Call):
        known = [*ROWWISE, *REDUCE, COUNT]
        if not isinstance(node.func, ast.Name) or node.func.id not in known or node.keywords:
            found = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
            raise UserError(f"expression {expression!r} calls {found!r}.{nearest(found, known)}")
        wanted = ROWWISE[node.func.id][0] if node.func.id in ROWWISE else int(node.func.id != COUNT)
        if len(node.args) != wanted and not (node.func.id == COUNT and len(node.args) == 1):
            raise UserError(f"{node.func.id} in {expression!r} must have {wanted} arguments, found {len(node.args)}")
        return
    if isinstance(node, ast.Constant):
        if not isinstance(node.value, (int, float, str)):
            raise UserError(f"expression {expression!r} must hold numbers and texts only, found {node.value!r}")
        return
    allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Load)
    if not isinstance(node, allowed) and type(node) not in {**BINARY, **UNARY, **COMPARE}:
        raise UserError(
            f"expression {expression!r} must be arithmetic, comparisons and {', '.join([*ROWWISE, *REDUCE, COUNT])}; "
            f"found {type(node).__name__}"
        )


def evaluate(expression: str, values: Mapping[str, np.ndarray]) -> float:
    """The value of an expression; NaN where the arithmetic has no result, even on one row only.

    `values`: arrays [n] by name; where the expression reads `label`, rows without one are left out first. Missing values
    are left out of sums, means and extremes; a sum of missing values only is NaN.
    Raises UserError for an unknown name, and when the result is not one number.
    """
    tree = parse(expression)
    used = names_in(expression)
    for name in sorted(used):
        if name not in values:
            raise UserError(f"expression {expression!r} reads {name!r}.{nearest(name, values)}")
    rows = len(next(iter(values.values()))) if values else 0
    keep = np.isfinite(values[LABEL]) if LABEL in used else np.ones(rows, bool)
    scope = {name: values[name][keep] for name in used}
    with np.errstate(all="ignore"):
        try:
            result = np.asarray(_value(tree.body, scope, int(keep.sum())))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"expression {expression!r} cannot be computed: {error}") from None
    if result.ndim or result.dtype.kind not in "biuf":
        raise UserError(f"expression {expression!r} must end in one number (a mean, sum or count), found one per row")
    return float(result)


def _value(node: ast.AST, scope: Mapping[str, np.ndarray], rows: int) -> Any:
    if isinstance(node, ast.Constant):
        # Numbers as floats: no integer can grow without bound, and no text can be repeated.
        return node.value if isinstance(node.value, str) else float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)](_value(node.left, scope, rows), _value(node.right, scope, rows))
    if isinstance(node, ast.UnaryOp):
        return UNARY[type(node.op)](_value(node.operand, scope, rows))
    if isinstance(node, ast.Compare):
        sides = [_value(side, scope, rows) for side in (node.left, *node.comparators)]
        parts = [COMPARE[type(op)](sides[k], sides[k + 1]) for k, op in enumerate(node.ops)]
        return parts[0] if len(parts) == 1 else np.logical_and.reduce(parts)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    arguments = [_value(argument, scope, rows) for argument in node.args]
    if node.func.id in ROWWISE:
        return ROWWISE[node.func.id][1](*(np.asarray(item) for item in arguments))
    if node.func.id == COUNT:
        return np.sum(arguments[0]) if arguments else rows
    return _reduced(node.func.id, np.asarray(arguments[0], np.float64), _missing(node, scope))


def _missing(node: ast.AST, scope: Mapping[str, np.ndarray]) -> np.ndarray | bool:
    """bool[n]: rows that lack a value that the node reads."""
    read = [scope[name.id] for name in ast.walk(node) if isinstance(name, ast.Name) and name.id in scope]
    return np.logical_or.reduce([np.isnan(values) for values in read if values.dtype.kind == "f"] or [False])


def _reduced(name: str, values: np.ndarray, missing: np.ndarray | bool) -> Any:
    """Sum, mean, minimum or maximum without missing values. A row with values but no result is not missing."""
    if (np.isinf(values) | (np.isnan(values) & ~np.asarray(missing))).any():
        return np.nan
    if np.isnan(values).all():
        return 0.0 if name == "sum" and not values.size else np.nan
    return REDUCE[name](values)
