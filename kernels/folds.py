"""Aggregates of a caller's own over trailing windows: a pair (add, result) that Numba compiles, or a Python function.

A window's rows are those of `kernels.windows`. They come in order of (event_time, value), so that a result depends on the
values and ages in the window alone, whatever order the rows were in. Each window is computed from its first row on: it takes
time proportional to its rows.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import check
from kernels.jit import DISABLED, CannotCompile, njit, njit_given, run_ranges, split
from kernels.sweep import Probes, Source, first_of, minus, seconds

_NAT = check.NAT
_TASKS_PER_THREAD = 8
_NO_REASON = (
    "Failed in",
    "During:",
    "File ",
    "[",
    "-",
    ">>>",
)  # how lines of Numba's errors begin that say where, not what
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Numba puts them in where colorama is installed
_ONE_AT_A_TIME = threading.Lock()  # Python functions of callers need not bear threads


class FoldError(Exception):
    """A caller's function failed, or gave no number; the values and ages of the window, in order, where they are known."""

    def __init__(self, name: str, reason: str, values: NDArray[np.float64] | None = None) -> None:
        super().__init__(reason)
        self.name, self.reason, self.values = name, reason, values


@dataclass(frozen=True)
class Fold:
    """An aggregate of a caller's own.

    Either `function`(values float64[k], ages float64[k]) -> number, or a pair: `add`(state float64[s], value, age) changes the
    state, which begins as `start`, and `result`(state) is a number. Ages are seconds from the row to the decision. k >= 1.
    """

    name: str
    function: Callable[..., Any] | None = None
    start: tuple[float, ...] = ()
    add: Callable[..., None] | None = None
    result: Callable[..., Any] | None = None

    def plainly(self, values: NDArray[np.float64], ages: NDArray[np.float64]) -> float:
        """The aggregate of one window by Python alone; float64[k] each, in order. Raises FoldError."""
        try:
            with np.errstate(all="ignore"):
                if self.function is not None:
                    found = self.function(_read_only(values), _read_only(ages))
                else:
                    state = np.array(self.start, np.float64)
                    for value, age in zip(values, ages, strict=True):
                        self.add(state, value, age)  # type: ignore[misc]
                    found = self.result(state)  # type: ignore[misc]
        except (Exception, SystemExit) as error:
            raise FoldError(self.name, f"raised {type(error).__name__}: {error}", values) from error
        if not isinstance(found, (int, float, np.number, np.bool_)) or isinstance(found, np.complexfloating):
            raise FoldError(self.name, f"must give a number, found {type(found).__name__}", values)
        return float(found)


def in_order(values: NDArray[np.float64], ages: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rows of one window in the order in which they are folded: from the oldest on, rows of one age by value."""
    order = np.lexsort((values, -ages))
    return values[order], ages[order]


def folded(
    fold: Fold, source: Source, probes: Probes, windows: NDArray[np.int64], threads: int = 1
) -> NDArray[np.float64]:
    """The fold per probe and window, float64[n, windows]; NaN for a window without rows.

    Shape: `source` and `probes` as the sweep has them, windows int64[w] in microseconds. Raises FoldError.
    """
    starts, event, known, value, _ = source
    order = np.lexsort((value, event, np.repeat(np.arange(len(starts) - 1), np.diff(starts))))
    rows = (starts, event, known[order], value[order], _least_after(known[order], starts))
    out = np.empty((len(probes.order), len(windows)))
    if fold.function is not None or DISABLED:
        with _ONE_AT_A_TIME:
            _one_by_one(fold, rows, probes, windows, out)
        return out
    loop = compiled(fold)
    begin = np.array(fold.start, np.float64)
    try:
        run_ranges(
            lambda a, b: loop(rows, tuple(probes), windows, begin, (a, b), out),
            split(len(out), 1 if threads == 1 else threads * _TASKS_PER_THREAD),
            threads,
        )
    except Exception as error:
        with _ONE_AT_A_TIME:  # names the values, where Python fails as well
            _one_by_one(fold, rows, probes, windows, out)
        raise FoldError(fold.name, f"raised {type(error).__name__}: {error}") from error
    return out


@functools.lru_cache(maxsize=256)
def compiled(fold: Fold) -> Callable[..., None]:
    """The loop of a pair, compiled for this process. Raises FoldError for what Numba cannot compile."""
    add, result = (njit_given(part) for part in (fold.add, fold.result) if part is not None)

    def loop(source: Any, probes: Any, windows: Any, begin: Any, span: Any, out: Any) -> None:
        starts, event, known, value, least = source
        probe_starts, times, order = probes
        state = np.empty_like(begin)
        g = first_of(probe_starts, 0, len(probe_starts), span[0] + 1) - 1
        for p in range(span[0], span[1]):
            while probe_starts[g + 1] <= p:
                g += 1
            t, row = times[p], order[p]
            there = g + 1 < len(starts) and t != _NAT
            for w in range(len(windows)):
                count = 0
                if there:
                    low = first_of(event, starts[g], starts[g + 1], minus(t, windows[w]))
                    for k in range(low, first_of(least, low, starts[g + 1], t)):
                        if known[k] < t:
                            if count == 0:
                                state[:] = begin
                            add(state, value[k], seconds(t, event[k]))
                            count += 1
                out[row, w] = np.float64(result(state)) if count else np.nan

    made = njit_given(loop)
    try:
        made(_no_rows(), _no_probes(), np.array([1]), np.array(fold.start, np.float64), (0, 0), np.empty((0, 1)))
    except CannotCompile as error:
        lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines()]
        said = [line for line in lines if line and not line.startswith(_NO_REASON)]
        reason = said[0] if said else str(error)
        raise FoldError(
            fold.name, f"must be compilable by Numba, or be a function of (values, ages): {reason}"
        ) from None
    return made  # type: ignore[no-any-return]


def _no_rows() -> tuple[NDArray[Any], ...]:
    none = np.empty(0, np.int64)
    return np.zeros(1, np.int64), none, none, np.empty(0), none


def _no_probes() -> tuple[NDArray[Any], ...]:
    none = np.empty(0, np.int64)
    return np.zeros(1, np.int64), none, none


@njit
def _least_after(known: Any, starts: Any) -> Any:
    """int64[m]: the least known_at of each row and those after it in its group: ascending, so it can be searched."""
    out = known.copy()
    for g in range(len(starts) - 1):
        for k in range(starts[g + 1] - 2, starts[g] - 1, -1):
            out[k] = min(out[k], out[k + 1])
    return out


def _one_by_one(fold: Fold, rows: Any, probes: Probes, windows: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """The fold of every probe and window by Python; rows of two windows that are the same are folded once."""
    _, event, known, value, _ = rows
    before: tuple[tuple[int, int, int], float] = (0, 0, 0), np.nan  # (time, first row, end) and the result
    for p, w, low, high in _spans(rows, probes, windows):
        t = int(probes.time[p])
        if before[0] != (t, low, high) or high <= low:
            seen = low + np.flatnonzero(known[low:high] < t)
            ages = np.array([(t - at) / 1e6 for at in event[seen].tolist()])  # whole numbers: exact before the division
            before = (t, low, high), fold.plainly(value[seen], ages) if len(seen) else np.nan
        out[probes.order[p], w] = before[1]


def _spans(rows: Any, probes: Probes, windows: NDArray[np.int64]) -> Iterator[tuple[int, int, int, int]]:
    """(position of a probe, window, first row, end): the rows among which those of the window are."""
    starts, event, _, _, least = rows
    group = np.repeat(np.arange(len(probes.starts) - 1), np.diff(probes.starts))
    for p, (g, t) in enumerate(zip(group.tolist(), probes.time.tolist(), strict=True)):
        for w, width in enumerate(windows.tolist()):
            low = high = 0
            if g + 1 < len(starts) and t != _NAT:
                begin, end = int(starts[g]), int(starts[g + 1])
                low = begin + int(np.searchsorted(event[begin:end], max(t - width, _NAT + 1)))
                high = begin + int(np.searchsorted(least[begin:end], t))
            yield p, w, low, high


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    shown = array.copy()
    shown.flags.writeable = False
    return shown
