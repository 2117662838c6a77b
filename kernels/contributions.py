"""Contributions of columns to the scores of trees: Shapley values of the path-dependent kind, as TreeSHAP defines them.

Lundberg, Erion, Lee: Consistent individualized feature attribution for tree ensembles, 2018. A column that is not known sends a
row to both children, in the shares of the training rows that went there. What a tree gives is then a sum over its leaves of
products, one factor for each column on the leaf's path, and the Shapley value of a column is the integral over t in [0, 1] of
the derivative by that column's factor where each column is known with probability t (Owen: Multilinear extensions of games,
Management Science, 1972). The integrand is a polynomial, so Gauss-Legendre quadrature is exact: d columns on a path need d / 2
points. One walk down multiplies the factors, one walk up adds the leaves: time grows with nodes times points, while that of the
published algorithm grows with leaves times the square of the depth.

64 rows go through a tree together, each in a lane of its own: a row's bits never depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.jit import LANES, at_most, njit, run_ranges, split
from kernels.trees import TreePlan, load_block, rows_in_set, rows_of

MOST_POINTS = 64  # of the quadrature, for paths of up to 128 columns
MOST_BYTES = 2**30  # of the products of one tree
_ONE = np.uint64(1)


@dataclass(frozen=True)
class ContributionPlan:
    """What contributions need of trees beside their TreePlan; made by `contribution_plan`."""

    trees: TreePlan
    points: NDArray[np.int64]  # [trees], points of each tree's quadrature
    time: NDArray[np.float64]  # [MOST_POINTS + 1, MOST_POINTS], the points of a quadrature of so many
    weight: NDArray[np.float64]  # [MOST_POINTS + 1, MOST_POINTS], their weights, whose sum is 1
    slot: NDArray[np.int64]  # [nodes], place of the column among those that are used, numbers first
    parent: NDArray[np.int32]  # [nodes], within its tree; -1: root
    before: NDArray[
        np.int32
    ]  # [nodes], the nearest node above, within its tree, whose edge is of the same column; or -1
    share: NDArray[np.float64]  # [nodes], of the training rows of the parent; 1 for a root
    known: NDArray[np.float64]  # [nodes], product of the shares of this edge and of those above of the same column
    mean: NDArray[np.float64]  # [outputs], the base and what the trees give without any column


def contribution_plan(plan: TreePlan, cover: NDArray[np.float64]) -> ContributionPlan:
    """What contributions need: `cover` float64[nodes] is how many training rows (or how much weight) a node has seen.

    Raises ValueError for covers that are negative or not finite, and for a path of more than 2 * MOST_POINTS columns.
    """
    cover = np.ascontiguousarray(cover, np.float64)
    if cover.shape != plan.column.shape or not np.isfinite(cover).all() or (cover < 0).any():
        raise ValueError(f"cover must be {len(plan.column):,} finite numbers of at least 0, found {cover.shape}")
    nodes = len(plan.column)
    parent, before = np.full(nodes, -1, np.int32), np.full(nodes, -1, np.int32)
    share, known, reached = np.ones(nodes), np.ones(nodes), np.ones(nodes)
    distinct = np.zeros(nodes, np.int32)
    _paths(plan.root, plan.column, plan.child, cover, (parent, before, distinct), (share, known, reached))
    most = np.maximum.reduceat(distinct, plan.root[:-1]) if nodes else np.zeros(0, np.int32)
    points = np.maximum((most + 1) // 2, 1).astype(np.int64)
    if points.max(initial=1) > MOST_POINTS:
        raise ValueError(f"a path must have at most {2 * MOST_POINTS} columns, found {most.max()}")
    largest = int((np.diff(plan.root) * points).max(initial=0))
    if 8 * LANES * largest > MOST_BYTES:
        raise ValueError(
            f"a tree must have at most {MOST_BYTES // 8 // LANES:,} nodes times points of its quadrature, found {largest:,}"
        )
    time, weight = np.zeros((2, MOST_POINTS + 1, MOST_POINTS))
    for count in np.unique(points):
        x, w = np.polynomial.legendre.leggauss(int(count))
        time[count, :count], weight[count, :count] = (x + 1) / 2, w / 2
    mean = plan.base.astype(np.float64)
    leaf = plan.column < 0
    for tree in range(plan.trees):
        span = slice(plan.root[tree], plan.root[tree + 1])
        values = plan.leaves[plan.first_leaf[tree] : plan.first_leaf[tree + 1]]
        mean[tree % len(mean)] += (reached[span][leaf[span]] * values).sum()
    slot = plan.slot.astype(np.int64) + np.where(plan.set_of >= 0, len(plan.numbers), 0)
    return ContributionPlan(plan, points, time, weight, slot, parent, before, share, known, mean)


@njit
def _paths(root: Any, column: Any, child: Any, cover: Any, numbers: Any, shares: Any) -> None:
    parent, before, distinct = numbers
    share, known, reached = shares
    for t in range(len(root) - 1):
        first = root[t]
        for node in range(first, root[t + 1]):
            if column[node] < 0:
                continue
            left = first + child[node]
            total = cover[left] + cover[left + 1]
            for edge in range(left, left + 2):
                parent[edge] = node - first
                share[edge] = cover[edge] / total if total > 0 else 0.5
                reached[edge] = reached[node] * share[edge]
                at = node
                while at > first and column[first + parent[at]] != column[node]:
                    at = first + parent[at]
                fresh = at == first  # no edge above is of this column: the root has no edge
                before[edge] = -1 if fresh else at - first
                known[edge] = share[edge] if fresh else share[edge] * known[at]
                distinct[edge] = distinct[node] + (1 if fresh else 0)


# ------------------------------------------------------------------------------------------------------ contributions
@njit
def _factors(time: Any, weight: Any, edges: Any, first: Any, size: Any, tables: Any) -> None:
    """For every edge and point, where the edge is taken or not: the factor of the product, and what the product of a whole path
    is multiplied with to give what the edge's column adds. An edge takes the place of one above it of the same column.
    """
    before, _, known = edges
    taken, missed, gain, loss = tables
    for node in range(1, size):
        above = before[first + node]
        z, old = known[first + node], known[first + above] if above >= 0 else 1.0
        for q in range(len(time)):
            t = time[q]
            was = t + (1 - t) * old if above >= 0 else 1.0
            taken[node, q] = (t + (1 - t) * z) / was
            missed[node, q] = (1 - t) * z / was
            part = weight[q] * (1 - old) / was if above >= 0 else 0.0
            gain[node, q] = weight[q] * (1 - z) / (t + (1 - t) * z) - part
            loss[node, q] = -weight[q] / (1 - t) - part


@njit
def _directions(tree: Any, compare: Any, sets: Any, first: Any, size: Any, block: Any, went: Any) -> None:
    """went[node, lane]: 1 where the comparison above a node sends the row to it, else 0."""
    column, child, at_slot = tree
    threshold, missing_left, set_of = compare
    lanes, present, masks, kinds = block
    for node in range(size):
        which, at = set_of[first + node], at_slot[first + node]
        if column[first + node] < 0:
            continue
        if which >= 0:
            left = rows_in_set(sets[1], sets[0][which], sets[0][which + 1], present[at], masks[at], kinds[at])
        else:
            left = at_most(lanes, at << 6, threshold[first + node], missing_left[first + node])
        below = child[first + node]
        for r in range(LANES):
            goes = (left >> np.uint64(r)) & _ONE
            went[below, r] = 1.0 if goes != 0 else 0.0
            went[below + 1, r] = 0.0 if goes != 0 else 1.0


@njit
def _down(edges: Any, parent: Any, first: Any, size: Any, points: Any, tables: Any, went: Any, product: Any) -> None:
    """Products of the factors from the root to each node; `went` becomes whether all edges of the column so far are taken.

    Where one above is not taken, the column remains unknown: the product takes only the share of the rows.
    """
    before, share, _ = edges
    taken, missed = tables[0], tables[1]
    product[0, :points] = 1.0
    for node in range(1, size):
        above, up, z = before[first + node], parent[first + node], share[first + node]
        for q in range(points):
            a, b = taken[node, q], missed[node, q]
            if above < 0:
                for r in range(LANES):
                    product[node, q, r] = product[up, q, r] * (a if went[node, r] != 0.0 else b)
            else:
                for r in range(LANES):
                    factor = a if went[node, r] != 0.0 else b
                    product[node, q, r] = product[up, q, r] * (factor if went[above, r] != 0.0 else z)
        if above >= 0:
            for r in range(LANES):
                went[node, r] *= went[above, r]


@njit
def _sums(tree: Any, values: Any, first: Any, size: Any, points: Any, product: Any) -> None:
    """The product of each leaf times its value; of each inner node the sum of the leaves below it."""
    column, child, _ = tree
    for node in range(size - 1, -1, -1):
        below = child[first + node]
        for q in range(points):
            if column[first + node] < 0:
                for r in range(LANES):
                    product[node, q, r] *= values[below]
            else:
                for r in range(LANES):
                    product[node, q, r] = product[below, q, r] + product[below + 1, q, r]


@njit
def _gains(
    slots: Any, before: Any, first: Any, size: Any, points: Any, tables: Any, went: Any, product: Any, found: Any
) -> None:
    """found[slot, lane] += what every edge gives to its column."""
    slot, parent = slots
    part = np.zeros(LANES)
    for node in range(1, size):
        above, at = before[first + node], slot[first + parent[first + node]]
        part[:] = 0.0
        for q in range(points):
            a, b = tables[2][node, q], tables[3][node, q]
            for r in range(LANES):
                part[r] += product[node, q, r] * (a if went[node, r] != 0.0 else b)
        if above < 0:
            for r in range(LANES):
                found[at, r] += part[r]
        else:
            for r in range(LANES):
                found[at, r] += part[r] if went[above, r] != 0.0 else 0.0


@njit
def _contributions(
    rows: Any, roots: Any, tree: Any, compare: Any, sets: Any, used: Any, paths: Any, rule: Any, out: Any
) -> None:
    numeric, codes, share = rows
    root, first_leaf, leaves = roots
    parent, slot, edges = paths
    points, time, weight = rule
    numbers, columns = len(used[0]), len(used[0]) + len(used[1])
    widest, most = 1, 1
    for t in range(len(root) - 1):
        widest, most = max(widest, root[t + 1] - root[t]), max(most, points[t])
    block = (
        np.zeros(max(numbers, 1) << 6, np.float32), np.zeros((len(used[1]), LANES), np.int32),
        np.zeros((len(used[1]), LANES), np.uint64), np.zeros(len(used[1]), np.int64),
    )  # fmt: skip
    shape = (widest, most)
    tables = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    went, product = np.zeros((widest, LANES)), np.zeros((widest, most, LANES))
    total, found = np.zeros((columns, LANES)), np.zeros((columns, LANES))
    for start in range(0, len(numeric), LANES):
        count = min(LANES, len(numeric) - start)
        load_block(numeric, codes, start, count, used, block[0], block[1], block[2], block[3])
        total[:] = 0.0
        for t in range(len(root) - 1):
            first, size, m, k = root[t], root[t + 1] - root[t], points[t], t % share.shape[1]
            found[:] = 0.0
            _factors(time[m, :m], weight[m, :m], edges, first, size, tables)
            _directions(tree, compare, sets, first, size, block, went)
            _down(edges, parent, first, size, m, tables, went, product)
            _sums(tree, leaves[first_leaf[t] : first_leaf[t + 1]], first, size, m, product)
            _gains((slot, parent), edges[0], first, size, m, tables, went, product, found)
            for r in range(count):
                for at in range(columns):
                    total[at, r] += share[start + r, k] * found[at, r]
        for at in range(columns):
            column = used[0][at] if at < numbers else numeric.shape[1] + used[1][at - numbers]
            for r in range(count):
                out[start + r, column] = total[at, r]


def tree_contributions(
    numeric: NDArray[np.float32],
    codes: NDArray[np.int32],
    plan: ContributionPlan,
    share: NDArray[np.float64],
    threads: int = 1,
) -> NDArray[np.float64]:
    """float64[n, width + columns]: what each column of a row adds to the sum over outputs k of share[i, k] times output k.

    Together with `plan.mean` times the shares they are that sum, within rounding. Shape: numeric float32[n, width], codes
    int32[n, columns], share float64[n, outputs]. Raises ValueError for other shapes, TypeError for other types.
    """
    trees = plan.trees
    numeric, codes = rows_of(numeric, codes, trees)
    n = len(numeric)
    if share.shape != (n, len(trees.base)):
        raise ValueError(f"share must be [{n:,}, {len(trees.base)}], found {share.shape}")
    share = np.ascontiguousarray(share, np.float64)
    out = np.zeros((n, trees.width + trees.columns))
    facts = (
        (trees.root, trees.first_leaf, trees.leaves),
        (trees.column, trees.child, trees.slot),
        (trees.threshold, trees.missing_left, trees.set_of),
        (trees.set_at, trees.words),
        (trees.numbers, trees.categories),
        (plan.parent, plan.slot, (plan.before, plan.share, plan.known)),
        (plan.points, plan.time, plan.weight),
    )

    def part(a: int, b: int) -> None:
        low, high = a * LANES, min(b * LANES, n)
        _contributions((numeric[low:high], codes[low:high], share[low:high]), *facts, out[low:high])

    run_ranges(part, split(-(-n // LANES), threads), threads)
    return out
