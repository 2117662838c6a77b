"""Aggregates of a user's own for views of windows: of a plug-in file, or of an installed package that offers them in the entry
point group `engine.aggregates`.

An aggregate is a function of (values float64[k], ages float64[k]) that gives a number, or a class with `start`, a tuple of
numbers, and the functions `add(state, value, age)` and `result(state)`, which Numba compiles: `add` changes the state, an array
float64 that begins as `start`. The rows of a window come from the oldest on, rows of one time by value; an age is the seconds
from the row to the decision. A window without rows is null, and so is a result of NaN.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.config import plugins
from engine.config.sections.features import AGGREGATE_GROUP as GROUP
from engine.config.sections.features import ViewConfig, aggregate_of, is_built_in
from engine.errors import UserError, nearest
from engine.runtime import purity
from kernels.folds import Fold, FoldError, compiled, in_order
from kernels.jit import DISABLED
from kernels.windows import Aggregate, trailing

SHOWN = 8  # values in a message
CLOSE = 1e-9  # relative: compiled code may round a power or a logarithm differently from Python
SIZES = (1, 2, 3, 7, 40)  # rows of the windows of the probe


def computed(name: str, where: str) -> Aggregate:
    """What `kernels.windows` computes for the name of an aggregate. Raises UserError."""
    return aggregate_of(name) if is_built_in(name) else user_aggregate(name, where)


def version_of(name: str) -> str:
    """The name of an aggregate of the engine; with its version for a user's own. Raises UserError where there is none."""
    if is_built_in(name) or plugins.split(name)[1] is not None:
        return name
    return plugins.version_of(name, GROUP) or _unknown(name)


def versions_of(view: ViewConfig) -> list[str]:
    """Versions of the user's own aggregates of a view."""
    names = dict.fromkeys(name for asked in view.asked.values() for name in asked.aggregates)
    return [version_of(name) for name in names if not is_built_in(name)]


def check(name: str, view: ViewConfig) -> None:
    """Raise UserError for a user's own aggregate of a view that does not compute a window from itself alone."""
    for entry, asked in view.asked.items():
        for item in asked.aggregates:
            computed(item, f"features.views.{name}.aggregates.{entry}")


@functools.cache
def user_aggregate(name: str, where: str) -> Fold:
    """The aggregate of a name, found to compute each window from itself alone. Raises UserError."""
    short, digest = plugins.split(name)
    if digest is not None:
        made = plugins.load(name)
    elif name in plugins.installed(GROUP):
        made = plugins.installed(GROUP)[name].load()
    else:
        _unknown(name)
    fold = _fold(short, made, f"{where}: {described(name)}")
    _probe(fold, f"{where}: {described(name)}")
    return fold


def described(name: str) -> str:
    """An aggregate and where it is defined, for messages."""
    short, digest = plugins.split(name)
    if digest is None:
        return f"aggregate {short!r} ({plugins.version_of(name, GROUP)})"
    plugin = plugins.of_digest(digest, short)
    return f"aggregate {short!r} ({plugin.file}, line {plugin.defined[short].lineno})"


def signature(name: str) -> list[str]:
    """What an aggregate takes and gives, and where it is from, as lines."""
    short, digest = plugins.split(name)
    node = None if digest is None else plugins.of_digest(digest, short).defined[short]
    told = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
    first = (
        f"{short}: add(state, value, age), result(state)"
        if isinstance(node, ast.ClassDef)
        else f"{short}(values, ages)"
    )
    lines = [first, *(told or "").split("\n\n")[0].splitlines()]
    if digest is None:
        return [*lines, f"from {version_of(name)}"]
    plugin = plugins.of_digest(digest, short)
    return [*lines, f"from {plugin.file}, line {plugin.defined[short].lineno}, {digest}"]


def failed(where: str, name: str, error: FoldError, sensitive: bool) -> UserError:
    """The error of an aggregate, with the file and the values; without them, and what may quote them, where `sensitive`."""
    text = f"{where}: {described(name)}"
    if sensitive:
        kind = error.reason.split(":")[0]
        return UserError(f"{text} {kind}. Its message is not shown, because it may quote a sensitive column")
    return UserError(f"{text} {error.reason}{_of(error.values)}")


def _of(values: np.ndarray | None) -> str:
    if values is None:
        return ""
    shown = ", ".join(repr(value) for value in values[:SHOWN].tolist())
    return f", for {len(values)} values: {shown}{', ...' if len(values) > SHOWN else ''}"


def _unknown(name: str) -> Any:
    raise UserError(
        f"no file of `plugins` defines the aggregate {name!r}, and no installed package offers it in the entry-point group "
        f"{GROUP}.{nearest(name, plugins.installed(GROUP))}"
    )


def _fold(short: str, made: Any, where: str) -> Fold:
    if not isinstance(made, type):
        if not callable(made) or not _takes(made, 2):
            raise UserError(f"{where} must be a function of (values, ages), or a class with start, add and result")
        return Fold(short, made)
    parts = [getattr(made, part, None) for part in ("add", "result")]
    start = getattr(made, "start", None)
    numbers = isinstance(start, tuple) and start and all(isinstance(x, (int, float)) for x in start)
    if not (numbers and callable(parts[0]) and callable(parts[1]) and _takes(parts[0], 3) and _takes(parts[1], 1)):
        raise UserError(
            f"{where} must have start, a tuple of numbers, add(state, value, age) and result(state), found start={start!r}"
        )
    add, result = parts
    fold = Fold(short, start=tuple(float(x) for x in start), add=add, result=result)  # type: ignore[union-attr]
    try:
        if not DISABLED:
            compiled(fold)
    except FoldError as error:
        raise UserError(f"{where} {error.reason}") from None
    return fold


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- probe


def _probe(fold: Fold, where: str) -> None:
    """Refuse an aggregate whose numbers come from more than the window: a few windows, again in another order, and compiled.

    A window that it has no number for (such as a logarithm of what is not positive) is no fault here.
    """
    windows = _windows()
    first = [_tried(fold, *window) for window in windows]
    if all(isinstance(found, FoldError) for found in first):
        error = first[0]
        raise UserError(f"{where} {error.reason}{_of(error.values)}")  # type: ignore[union-attr]
    code = getattr(fold.function or fold.add, "__code__", None)
    again, called = purity.watched(
        lambda: [_tried(fold, *window) for window in reversed(windows)], getattr(code, "co_filename", None)
    )
    if called:
        raise UserError(
            f"{where} must compute its number from the window alone, found that it calls {', '.join(called)}"
        )
    for (values, ages), one, other in zip(windows, first, reversed(again), strict=True):
        if _bits(one) != _bits(other):
            raise UserError(
                f"{where} must give a window the same number each time, whatever was computed before, found {_shown(one)} and "
                f"then {_shown(other)}{_of(values)}"
            )
        if fold.function is None and not isinstance(one, FoldError):
            found = _compiled(fold, values, ages)
            if not np.isclose(found, one, rtol=CLOSE, atol=0, equal_nan=True):
                raise UserError(
                    f"{where} must give the same number compiled as in Python, found {found!r} and {one!r}{_of(values)}: "
                    "compiled code keeps globals and types as they were at first"
                )


def _tried(fold: Fold, values: np.ndarray, ages: np.ndarray) -> float | FoldError:
    try:
        return fold.plainly(values, ages)
    except FoldError as error:
        return error


def _bits(found: float | FoldError) -> bytes | str:
    return type(found).__name__ if isinstance(found, FoldError) else np.float64(found).tobytes()


def _shown(found: float | FoldError) -> str:
    return f"an error ({found.reason})" if isinstance(found, FoldError) else repr(found)


def _compiled(fold: Fold, values: np.ndarray, ages: np.ndarray) -> float:
    events = (-1e6 * ages).astype(np.int64)
    same = np.zeros(len(values), np.int64)
    return float(trailing([0], [0], same, events, events, values, [10**15], [fold])[0, 0, 0])


def _windows() -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, ages in whole seconds) of windows: amounts, small counts, and numbers of both signs; with ties."""
    draw = np.random.default_rng(0)
    found = []
    for size in SIZES:
        for values in (
            np.round(draw.lognormal(3, 1, size), 2),
            draw.integers(0, 3, size).astype(float),
            draw.normal(0, 100, size),
        ):
            found.append(in_order(values, draw.integers(1, 10**6, size).astype(float) // 1000 + 1))
    return found
