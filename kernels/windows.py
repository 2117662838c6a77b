"""Aggregates over trailing windows per entity, from the rows known at the decision time only.

A source row e of the entity counts for a probe decided at T under window w when

    known_at(e) < T   and   event_time(e) >= T - w

so it is active in (known_at, event_time + w]: added in known_at order, dropped in event_time order, one sweep for all windows
and aggregates (`kernels.sweep`). Sums are exact integers (`kernels.exact`), so a result depends on the rows in the window
alone: not on the order of tied rows, other entities, threads, or where the sweep began.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import check
from kernels.exact import FIXED_FORM, WHOLE_FORM, WIDE_FORM, any_wide, whole_bound
from kernels.folds import Fold, folded
from kernels.jit import check_threads, njit, run_ranges, split
from kernels.sort import ascending, bounds, dense_codes, grouped_columns, radix_order, radix_rows
from kernels.sweep import CODES, Plan, Probes, Source, sweep

_WITHOUT_VALUES = ("count", "recency")
WITH_PARAMETER = ("recency", "ewm_sum", "ewm_mean", "quantile")
Aggregate = str | tuple[str, int] | Fold  # a name, with its parameter; or one of the caller's
_NAT = check.NAT
_TASKS_PER_THREAD = 8
_PARALLEL_ROWS = 1 << 17


@njit(allocates=False)
def _count_dated(entity: Any, event: Any) -> Any:
    count = np.int64(0)
    for i in range(len(entity)):
        count += np.int64((entity[i] >= 0) & (event[i] != _NAT))
    return count


@njit(allocates=False)
def _fill(values: Any, counts: Any, order: Any, value: Any, keep: Any) -> Any:
    """value = values in sorted order (zeros if there are none), keep = whether each counts; returns whether all do.

    counts: bool by row, or empty where only NaN does not count.
    """
    whole = True
    for k in range(len(order)):
        row = order[k]
        found = values[row] + 0.0 if len(values) else 0.0  # -0.0 becomes 0.0
        value[k] = found
        keep[k] = (found == found) & (len(counts) == 0 or counts[row])
        whole = whole & keep[k]
    return whole


@njit
def _kept(keep: Any, starts: Any, event: Any, known: Any, other: Any, by_known: Any) -> Any:
    """The sorted rows to keep: (starts, event, known, other, by_known)."""
    at = np.empty(len(keep) + 1, np.int64)
    count = np.int64(0)
    for k in range(len(keep)):
        at[k] = count
        count += np.int64(keep[k])
    at[len(keep)] = count
    events, knowns, others = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, other.dtype)
    for k in range(len(keep)):
        if keep[k]:
            events[at[k]], knowns[at[k]], others[at[k]] = event[k], known[k], other[k]
    entering = np.empty(count if len(by_known) else np.int64(0), np.int64)
    count = np.int64(0)
    for k in by_known:
        if keep[k]:
            entering[count] = at[k]
            count += 1
    return at[starts], events, knowns, others, entering


@njit(allocates=False)
def _falls(known: Any, starts: Any, first: Any, last: Any) -> Any:
    """Whether known_at decreases anywhere within one of the groups [first, last)."""
    for g in range(first, last):
        for k in range(starts[g] + 1, starts[g + 1]):
            if known[k] < known[k - 1]:
                return True
    return False


@njit
def _order_ties(starts: Any, first: Any, last: Any, event: Any, known: Any, order: Any) -> None:
    """Sort rows of equal event_time by (known_at, row) in place; on entry they are in row order."""
    for g in range(first, last):
        low = starts[g]
        while low < starts[g + 1]:
            high = low + 1
            while high < starts[g + 1] and event[high] == event[low]:
                high += 1
            falls = False
            for k in range(low + 1, high):
                falls = falls or known[k] < known[k - 1]
            if falls:
                tied = known[low:high].copy(), order[low:high].copy()
                at = radix_rows(tied[0], np.arange(high - low))
                for k in range(high - low):
                    known[low + k], order[low + k] = tied[0][at[k]], tied[1][at[k]]
            low = high


@njit
def _order_by_known(starts: Any, first: Any, last: Any, known: Any, out: Any) -> None:
    """out[starts[g] : starts[g + 1]] = positions of group g in stable order of known_at."""
    for g in range(first, last):
        low, high = starts[g], starts[g + 1]
        found = radix_rows(known[low:high], np.arange(high - low))
        for k in range(high - low):
            out[low + k] = low + found[k]


def _over_groups(work: Any, starts: NDArray[np.int64], threads: int) -> list[Any]:
    """work(first, last) over ranges of groups with about the same number of rows."""
    cuts = np.searchsorted(starts, np.linspace(0, starts[-1], 8 * threads + 1).astype(np.int64))
    edges = [0, *np.minimum(cuts[1:-1], len(starts) - 1).tolist(), len(starts) - 1]
    return run_ranges(work, [(a, b) for a, b in itertools.pairwise(edges) if b > a], threads)


def _codes(entity: NDArray[np.int64], probe: NDArray[np.int64], threads: int) -> tuple[Any, Any, int, int]:
    """(source codes, probe codes, smallest, span): codes in [smallest, smallest + span); other probes get smallest + span."""
    codes, distinct, low, span = dense_codes(entity, threads)
    if len(distinct):
        at = np.minimum(np.searchsorted(distinct, probe), span - 1)
        probe = np.where(distinct[at] == probe, at, span)
    elif len(probe):
        least, most = bounds(probe, threads)
        if least < low or most > low + span:
            probe = np.where((probe < low) | (probe >= low + span), low + span, probe)
    return codes, probe, low, span


# --------------------------------------------------------------------------- rows in order
class Sorted:
    """Probes and source rows by entity and time, for any number of aggregates: sorting takes as long as a sweep.

    Shape, types, units and errors as of `trailing`.
    """

    def __init__(
        self,
        probe_entity: ArrayLike,
        probe_time: ArrayLike,
        source_entity: ArrayLike,
        event_time: ArrayLike,
        threads: int = 1,
    ) -> None:
        groups = check.integers("probe_entity", probe_entity)
        times = check.integers("probe_time", probe_time, len(groups))
        entity = groups if source_entity is probe_entity else check.integers("source_entity", source_entity)
        event = check.integers("event_time", event_time, len(entity))
        check_threads(threads)
        # Starting threads costs more than a pass over few rows.
        few = 1 if len(groups) + len(entity) < _PARALLEL_ROWS else threads
        self._given, self._rows, self._threads = event_time, len(entity), few
        dated = None
        if sum(run_ranges(lambda a, b: _count_dated(entity[a:b], event[a:b]), split(len(entity), few), few)) < len(
            entity
        ):
            dated = np.flatnonzero((entity >= 0) & (event != _NAT))
            entity, event = entity[dated], event[dated]
        in_order = ascending(event, few)
        codes, probe_codes, low, span = _codes(entity, groups, few)
        order = None if in_order else radix_order(event)
        self._order, self._starts, (self._event,) = grouped_columns(codes, low, span, few, order, [event])
        if dated is None and entity is groups and in_order and ascending(times, few):  # both have one order
            self._probes = Probes(self._starts, times[self._order], self._order)
        else:
            order = None if ascending(times, few) else radix_order(times)
            order, starts, (times,) = grouped_columns(probe_codes, low, span + 1, few, order, [times])
            self._probes = Probes(starts, times, order)
        if dated is not None:
            self._order = dated[self._order]

    def known(self, known_at: ArrayLike) -> Known:
        """The source rows with the times int64[m] at which they are known."""
        starts, event, threads = self._starts, self._event, self._threads
        if known_at is self._given:
            return Known(
                self._probes, self._rows, self._order, Source(starts, event, event, event[:0], event[:0]), threads
            )
        order = self._order.copy()
        known = check.integers("known_at", known_at, self._rows)[order]
        by_known = np.empty(0, np.int64)
        if len(known) and bounds(known, threads)[0] == _NAT:
            starts, event, known, order, _ = _kept(known != _NAT, starts, event, known, order, by_known)
        _over_groups(lambda a, b: _order_ties(starts, a, b, event, known, order), starts, threads)
        if any(_over_groups(lambda a, b: _falls(known, starts, a, b), starts, threads)):
            by_known = np.empty(len(order), np.int64)
            _over_groups(lambda a, b: _order_by_known(starts, a, b, known, by_known), starts, threads)
        return Known(self._probes, self._rows, order, Source(starts, event, known, event[:0], by_known), threads)


@dataclass(frozen=True)
class Known:
    """Probes, and source rows that are known at some time, in order; `order`: their rows as they were given."""

    probes: Probes
    rows: int
    order: NDArray[np.int64]
    source: Source  # without values
    few: int

    def aggregates(
        self,
        values: ArrayLike | None,
        windows: Sequence[int],
        aggregates: Sequence[Aggregate],
        counts: NDArray[np.bool_] | None = None,
        threads: int = 1,
    ) -> NDArray[np.float64]:
        """Aggregates as of `trailing`, of the rows where `counts` bool[m] is true."""
        numbers = None if values is None else check.floats("values", values, self.rows)
        widths, asked = _check_plan(windows, aggregates, numbers is not None)
        source = self._with_values(np.empty(0) if numbers is None else numbers, counts)
        if all(isinstance(item, tuple) for item in asked):
            return self._swept(source, widths, asked, numbers, threads)  # type: ignore[arg-type]
        out = np.empty((len(self.probes.order), len(widths), len(asked)))
        for place, item in enumerate(asked):
            if isinstance(item, Fold):
                out[:, :, place] = folded(item, source, self.probes, widths, threads)
        if plain := {place: item for place, item in enumerate(asked) if isinstance(item, tuple)}:
            out[:, :, list(plain)] = self._swept(source, widths, list(plain.values()), numbers, threads)
        return out

    def _swept(
        self,
        source: Source,
        widths: NDArray[np.int64],
        asked: Sequence[tuple[str, int]],
        numbers: NDArray[np.float64] | None,
        threads: int,
    ) -> NDArray[np.float64]:
        plan, probes = _plan(widths, asked, numbers, self.few), self.probes
        out = np.empty((len(probes.order), len(widths), len(asked)))

        def part(a: int, b: int) -> None:
            sweep(tuple(source), tuple(probes), tuple(plan), (a, b), out)

        run_ranges(part, split(len(out), 1 if threads == 1 else check_threads(threads) * _TASKS_PER_THREAD), threads)
        return out

    def _with_values(self, values: NDArray[np.float64], counts: NDArray[np.bool_] | None) -> Source:
        order, few = self.order, self.few
        value, keep = np.empty(len(order)), np.empty(len(order), np.bool_)
        chosen = np.empty(0, np.bool_) if counts is None else counts
        whole = run_ranges(
            lambda a, b: bool(_fill(values, chosen, order[a:b], value[a:b], keep[a:b])), split(len(order), few), few
        )
        starts, event, known, _, by_known = self.source
        return Source(
            *(
                (starts, event, known, value, by_known)
                if all(whole)
                else _kept(keep, starts, event, known, value, by_known)
            )
        )


def _check_plan(
    windows: Sequence[int], aggregates: Sequence[Aggregate], with_values: bool
) -> tuple[NDArray[np.int64], list[tuple[str, int] | Fold]]:
    """Windows in microseconds, and aggregates with their parameters (0 = none)."""
    widths = check.integers("windows", list(windows))
    asked = [(item, 0) if isinstance(item, str) else item for item in aggregates]
    pairs = [item for item in asked if isinstance(item, tuple)]
    names = [name for name, _ in pairs]
    if len(widths) == 0 or widths.min() < 1:
        raise ValueError(f"windows must be one or more positive numbers of microseconds, found {list(windows)}")
    unknown = [name for name in names if name not in CODES]
    if unknown or not asked:
        raise ValueError(f"aggregates must be among {', '.join(CODES)}, found {unknown or names}")
    needing = [item[0] if isinstance(item, tuple) else item.name for item in asked]
    needing = [name for name in needing if name not in _WITHOUT_VALUES]
    if not with_values and needing:
        raise ValueError(f"without values only {', '.join(_WITHOUT_VALUES)} are available, found {needing}")
    wrong = [pair for pair in pairs if pair[1] < 0 or (pair[1] and pair[0] not in WITH_PARAMETER)]
    if wrong:
        raise ValueError(f"only {', '.join(WITH_PARAMETER)} take a parameter, 1 or more, found {wrong}")
    wrong = [pair for pair in pairs if pair[0] == "quantile" and not 1 <= pair[1] <= 99]
    if wrong:
        raise ValueError(f"a quantile must have 1 to 99 per cent as its parameter, found {wrong}")
    return widths, asked


def trailing(
    probe_entity: ArrayLike,
    probe_time: ArrayLike,
    source_entity: ArrayLike,
    event_time: ArrayLike,
    known_at: ArrayLike,
    values: ArrayLike | None,
    windows: Sequence[int],
    aggregates: Sequence[Aggregate],
    threads: int = 1,
) -> NDArray[np.float64]:
    """Aggregates, per probe and window, of the source rows in the window.

    Shape: probe_* int64[n]; source_entity, event_time, known_at int64[m]; values float64[m] or None -> float64[n, windows,
    aggregates]. Times and windows in microseconds. A row counts when known_at < T and event_time >= T - w (module docstring).
    NaN is a null value: such a row does not count at all. Without values only count and recency are available.
    NaT (smallest int64) known_at is never known; NaT event_time or entity < 0 never counts; a probe with NaT or entity < 0
    has no rows. Inputs need not be sorted. -0.0 counts as 0.0.

    count     rows                                     first     value of the least (event_time, known_at, row position)
    sum       correctly rounded (math.fsum)            last      value of the greatest
    mean      sum / count                              recency   seconds from the latest event_time to T
    std       ddof = 1; NaN below two rows             distinct  number of distinct values, exact
    min, max  infinities included                      ewm_sum   sum of value * 2 ** (-age / half-life), half-life = w / 2,
                                                       ewm_mean  age = max(T - event_time, 0); the latter / sum of weights
    ("recency", k)  seconds from the k-th latest row   ("ewm_sum", h), ("ewm_mean", h)  with a half-life of h microseconds
    by (event_time, known_at, row position) to T   ("quantile", p)  of p per cent, 1 to 99, linear between the
                                                   neighbouring values (numpy's default; type 7 of Hyndman and Fan)
    A `kernels.folds.Fold` is an aggregate of the caller's own; FoldError where it fails.
    Without rows count is 0 and the rest NaN. With an infinite value sum and mean are that infinity (NaN with both signs), std
    is NaN; a quantile between a number and an infinity is that infinity, between both infinities NaN.
    Cost: linear in rows and windows; times log for distinct and quantiles, and for min, max, first and a k-th latest row when
    known_at is not in event order; ewm_* take time proportional to the rows in each window. Quantiles need 8 bytes per row of
    the current entity and window, and 24 more per row, in each thread.
    distinct is exact for any number of values and needs 40 to 72 bytes per row of the current entity in each thread. A sketch
    would not be cheaper: HyperLogLog keeps maxima, which cannot be undone when rows leave; the sliding variant (Chabchoub and
    Hebrail, 2010) can, but reads a thousand registers per probe and window and is 3 % off; this reads log2(rows) marks.
    Raises ValueError for shapes that disagree, unknown aggregates, windows < 1 or threads < 1; TypeError for wrong types.
    """
    return (
        Sorted(probe_entity, probe_time, source_entity, event_time, threads)
        .known(known_at)
        .aggregates(values, windows, aggregates, threads=threads)
    )


def _plan(
    widths: NDArray[np.int64],
    pairs: Sequence[tuple[str, int]],
    numbers: NDArray[np.float64] | None,
    threads: int,
) -> Plan:
    asked = {name for name, _ in pairs}
    sums = bool(asked & {"sum", "mean", "std"})
    return Plan(
        widths,
        np.array([CODES[name] for name, _ in pairs], np.int64),
        (sums, "std" in asked, _form(numbers, threads) if sums and numbers is not None else FIXED_FORM),
        (
            "min" in asked,
            "max" in asked,
            "first" in asked,
            bool(asked & {"last", "recency"}),
            "distinct" in asked,
            any(name == "recency" and parameter > 1 for name, parameter in pairs),
            "quantile" in asked,
        ),
        np.array([parameter for _, parameter in pairs], np.int64),
    )


def _form(numbers: NDArray[np.float64], threads: int) -> int:
    """The cheapest accumulator form that is exact for the sums of these numbers and of their squares."""
    parts = split(len(numbers), threads)
    sizes = run_ranges(lambda a, b: float(whole_bound(numbers[a:b])), parts, threads)
    if min(sizes, default=0.0) >= 0.0 and len(numbers) * max(sizes, default=0.0) ** 2 < 2.0**62:
        return WHOLE_FORM
    return WIDE_FORM if any(run_ranges(lambda a, b: any_wide(numbers[a:b]), parts, threads)) else FIXED_FORM
