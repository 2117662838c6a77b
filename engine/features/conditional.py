"""Conditional columns: what a number is, given numbers that it goes with.

Each is fitted once with the model: a small tree over the columns with the largest rank correlations (CART: Breiman et al.,
Classification and regression trees, 1984, on ranks), and the quantiles of the values in each leaf. Its bins have about equal
shares while the relation holds. A column that is shuffled, or of other rows, keeps its distribution and leaves these bins.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypedDict

import numpy as np
from numpy.typing import NDArray

from engine.config.names import free
from engine.runtime.records import Damaged, Within
from kernels.conditional import LEAVES, NODES, ConditionalPlan

Array = NDArray[np.float64]
BINS = 8
MOST = 8  # conditional columns of a model
MOST_GIVEN = 4  # columns that a tree chooses from
CANDIDATES, FIT_ROWS = 128, 16_384
FEWEST_ROWS = 1_000
FEWEST_VALUES = 10  # distinct ones, of a column that has a condition
LEAST_LEAF = 1 / 64  # of the rows
CUTS = 15  # of a column that a node tries
EXPLAINED = 0.25  # least share of the ranks' variance that a tree explains


class ConditionalRecord(TypedDict):
    """A conditional column in profile_spec.json: nodes as (place in `given` or -1, cut), edges of each leaf."""

    name: str
    value: str
    given: list[str]
    nodes: list[tuple[Annotated[int, Within(-1, MOST_GIVEN - 1)], float]]
    edges: list[list[float]]


@dataclass(frozen=True)
class Conditional:
    """A numeric column within the leaves of a tree over others; see `kernels.conditional`."""

    name: str
    value: str
    given: tuple[str, ...]
    nodes: tuple[tuple[int, float], ...]
    edges: tuple[tuple[float, ...], ...]

    def to_json(self) -> ConditionalRecord:
        """As in a record."""
        edges = [list(items) for items in self.edges]
        return {
            "name": self.name,
            "value": self.value,
            "given": list(self.given),
            "nodes": list(self.nodes),
            "edges": edges,
        }

    @classmethod
    def of(cls, state: ConditionalRecord, columns: Sequence[str]) -> Conditional:
        """From a record; `columns` are those that exist. Raises Damaged."""
        given, nodes, edges = state["given"], state["nodes"], state["edges"]
        lacking = [name for name in (state["value"], *given) if name not in columns]
        if lacking:
            raise Damaged(f"{state['name']!r} names the column {lacking[0]!r}, which the encoder has not fitted")
        fits = len(given) <= MOST_GIVEN and len(nodes) == NODES and all(place < len(given) for place, _ in nodes)
        fits = fits and len(edges) == LEAVES and all(len(items) < BINS and sorted(items) == items for items in edges)
        if not fits:
            raise Damaged(
                f"{state['name']!r} must have {NODES} nodes over its columns, and {LEAVES} ascending lists of edges"
            )
        tree = tuple((place, float(cut)) for place, cut in nodes)
        return cls(
            state["name"], state["value"], tuple(given), tree, tuple(tuple(map(float, items)) for items in edges)
        )


@functools.lru_cache(maxsize=16)
def plan_of(items: tuple[Conditional, ...]) -> tuple[list[str], ConditionalPlan]:
    """(columns of the block, the kernel's form)."""
    names = list(dict.fromkeys(name for item in items for name in (item.value, *item.given)))
    places = {name: place for place, name in enumerate(names)}
    edges = np.full((len(items), LEAVES, BINS - 1), np.inf)
    columns, cuts = np.full((len(items), NODES), -1), np.zeros((len(items), NODES))
    for k, item in enumerate(items):
        for leaf, found in enumerate(item.edges):
            edges[k, leaf, : len(found)] = found
        for node, (place, cut) in enumerate(item.nodes):
            columns[k, node], cuts[k, node] = (places[item.given[place]] if place >= 0 else -1), cut
    value = np.array([places[item.value] for item in items], np.int64)
    return names, ConditionalPlan(value, columns, cuts, edges)


# ---------------------------------------------------------------------------------------------------------- fitting


def fit_conditional(values: Mapping[str, Array], taken: Sequence[str]) -> tuple[Conditional, ...]:
    """The MOST columns that others explain best, each relation once. `values`: float64[n] by column, of the same training
    rows; `taken`: names that are in use.
    """
    kept = {name: column for name, column in list(values.items())[:CANDIDATES] if _varies(column)}
    names = list(kept)
    if len(names) < 2:
        return ()
    block = np.stack(list(kept.values()), axis=1)
    ranks = np.stack([_ranks(column) for column in block.T], axis=1)
    related = _correlations(ranks)
    cuts = [_cuts(column) for column in block.T]
    found = []
    for k in range(len(names)):
        rows = np.isfinite(block[:, k])
        places = np.argsort(-related[k], kind="stable")[: min(MOST_GIVEN, len(names) - 1)]
        nodes, leaf = grow(block[rows][:, places], ranks[rows, k], [cuts[place] for place in places])
        share = _explained(ranks[rows, k], leaf)
        if share >= EXPLAINED:
            found.append((share, k, places, nodes, rows, leaf))
    chosen: list[Conditional] = []
    used: list[str] = [*taken]
    for _, k, places, nodes, rows, leaf in sorted(found, key=lambda item: -item[0]):
        asked = sorted({place for place, _ in nodes if place >= 0})
        given = tuple(names[places[place]] for place in asked)
        if len(chosen) == MOST or any(names[k] in item.given and item.value in given for item in chosen):
            continue
        tree = tuple((asked.index(place) if place >= 0 else -1, cut) for place, cut in nodes)
        edges = tuple(_edges(block[rows, k][leaf == number]) for number in range(LEAVES))
        name = free(f"{names[k]} given {', '.join(given)}", set(used))
        used.append(name)
        chosen.append(Conditional(name, names[k], given, tree, edges))
    return tuple(chosen)


def grow(block: Array, target: Array, cuts: Sequence[Array]) -> tuple[list[tuple[int, float]], NDArray[np.int64]]:
    """(nodes, leaf int64[n] of each row) of the tree with the least squared error of `target` [n], split by split.

    Shape: block float64[n, k], NaN on the left; cuts: those that each of the k columns may be split at, ascending.
    """
    codes = np.stack(
        [np.where(np.isnan(x), 0, np.searchsorted(at, x)) for at, x in zip(cuts, block.T, strict=True)], axis=1
    )
    least = max(1, round(LEAST_LEAF * len(target)))
    at = np.zeros(len(target), np.int64)
    nodes: list[tuple[int, float]] = []
    for node in range(NODES):
        rows = np.flatnonzero(at == node)
        place, number = _best_split(codes[rows], target[rows], [len(item) for item in cuts], least)
        nodes.append((place, float(cuts[place][number]) if place >= 0 else 0.0))
        right = codes[rows, place] > number if place >= 0 else np.zeros(len(rows), bool)
        at[rows] = 2 * node + 1 + right
    return nodes, at - NODES


def _best_split(codes: NDArray[np.int64], target: Array, cuts: Sequence[int], least: int) -> tuple[int, int]:
    """(column, cut) after which the two sides' means explain most; (-1, 0) where no cut leaves `least` rows on both sides."""
    best, chosen = 1e-9 * len(target), (-1, 0)
    gap = target - target.mean() if len(target) else target
    for place, number in enumerate(cuts):
        rows = np.cumsum(np.bincount(codes[:, place], minlength=number + 1))[:number]
        sums = np.cumsum(np.bincount(codes[:, place], gap, number + 1))[:number]
        other = len(target) - rows
        fits = (rows >= least) & (other >= least)
        gain = np.where(fits, np.square(sums) * (1 / np.maximum(rows, 1) + 1 / np.maximum(other, 1)), 0.0)
        if number and gain.max() > best:
            best, chosen = float(gain.max()), (place, int(gain.argmax()))
    return chosen


def _varies(column: Array) -> bool:
    known = column[np.isfinite(column)]
    return len(known) >= FEWEST_ROWS and len(np.unique(known)) >= FEWEST_VALUES


def _ranks(column: Array) -> Array:
    """Mean ranks in (0, 1); the middle for what is missing."""
    known, found = np.isfinite(column), np.full(len(column), 0.5)
    _, place, rows = np.unique(column[known], return_inverse=True, return_counts=True)
    found[known] = ((np.cumsum(rows) - rows / 2) / max(len(place), 1))[place]
    return found


def _correlations(ranks: Array) -> Array:
    """Absolute correlations [k, k] of ranks [n, k]; -1 of a column with itself, which comes last."""
    gap = ranks - ranks.mean(axis=0)
    gap = gap / np.maximum(np.sqrt(np.square(gap).sum(axis=0)), 1e-300)
    found = np.abs(np.einsum("ni,nj->ij", gap, gap))  # BLAS would add in an order that depends on its threads
    np.fill_diagonal(found, -1)
    return found


def _explained(target: Array, leaf: NDArray[np.int64]) -> float:
    rows = np.bincount(leaf, minlength=LEAVES)
    means = np.bincount(leaf, target, LEAVES) / np.maximum(rows, 1)
    return 1 - float(np.square(target - means[leaf]).sum() / max(np.square(target - target.mean()).sum(), 1e-300))


def _cuts(column: Array) -> Array:
    return _between(np.sort(column[np.isfinite(column)]), CUTS + 1)


def _edges(column: Array) -> tuple[float, ...]:
    return tuple(_between(np.sort(column), BINS).tolist())


def _between(ranked: Array, parts: int) -> Array:
    """Up to parts - 1 edges of about equal shares of ascending values, each between two distinct ones."""
    if not len(ranked):
        return ranked
    low = ranked[np.arange(1, parts) * len(ranked) // parts]
    above = np.searchsorted(ranked, low, side="right")
    low, above = low[above < len(ranked)], above[above < len(ranked)]
    return np.unique(low / 2 + ranked[above] / 2)
