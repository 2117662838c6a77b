"""Scores of decision trees: blocks of 64 rows go through a tree together, a row's bits never depend on its neighbours.

A tree is an array of nodes in level order, the two children of a node side by side: those of its k-th inner node are nodes
2 k + 1 and 2 k + 2. So a layout is a tree or it is refused, and no link can lead back. For every inner node one comparison
gives a 64-bit mask, whose bit r says whether row r would go left; rows that reach a child are the mask of its parent and this.
That takes each node once a block instead of each level once a row: no step waits for the one before. The idea of masks is that
of QuickScorer (Lucchese et al., SIGIR 2015) and RapidScorer (Ye et al., KDD 2018).

A number goes left where x <= threshold in float32, a missing one where `missing_left`; a category where its code is in the
node's set. Leaves are added in the order of the trees, in the type of their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import check
from kernels.jit import LANES, at_most, njit, put_lanes, run_ranges, split

BLOCKED_LEAVES = 1024  # of a tree; rows go through a larger one by themselves, which takes fewer comparisons
MOST_LEAVES = 2**16  # of a tree that is scored in blocks: leaves are numbered in 16 bits
_ALL = np.uint64(2**64 - 1)
_ONE = np.uint64(1)


@dataclass(frozen=True)
class Forest:
    """Trees as arrays. Tree t adds to output t mod outputs. Columns of a row are its numbers, then its categories."""

    root: NDArray[np.int64]  # [trees + 1], first node of each tree
    column: NDArray[np.int32]  # [nodes]; -1: leaf
    threshold: NDArray[np.float32]  # [nodes]
    missing_left: NDArray[np.bool_]  # [nodes]
    set_of: NDArray[np.int32]  # [nodes], number of a category's set; -1: the node compares a number
    set_at: NDArray[np.int64]  # [sets + 1], first word of each set
    words: NDArray[np.uint32]  # bit c of a set: whether code c goes left
    value: NDArray[Any]  # [nodes], float32 or float64: what a leaf adds
    base: NDArray[np.float64]  # [outputs], added before the trees


@dataclass(frozen=True)
class TreePlan:
    """Checked trees, ready for `add_trees`; made by `tree_plan`."""

    root: NDArray[np.int64]  # [trees + 1]
    column: NDArray[np.int32]  # [nodes], of numbers then categories; -1: leaf
    slot: NDArray[np.int32]  # [nodes], place of the column among those that are used
    child: NDArray[np.int32]  # [nodes], left child within the tree; of a leaf its number within the tree
    threshold: NDArray[np.float32]  # [nodes]
    missing_left: NDArray[np.bool_]  # [nodes]
    set_of: NDArray[np.int32]  # [nodes], number of a category's set
    set_at: NDArray[np.int64]  # [sets + 1], words of each set
    words: NDArray[np.uint32]  # bit c of a set: whether code c goes left
    leaves: NDArray[Any]  # values of the leaves, float32 or float64, tree after tree
    first_leaf: NDArray[np.int64]  # [trees + 1]
    numbers: NDArray[np.int64]  # used columns of numbers, by slot
    categories: NDArray[np.int64]  # used columns of categories, by slot
    base: NDArray[Any]  # [outputs], added before the trees
    width: int
    columns: int

    @property
    def trees(self) -> int:
        """Number of trees."""
        return len(self.root) - 1


def _spans(offsets: NDArray[np.int64], total: int) -> bool:
    """Whether offsets rise from 0 to `total`. Their range comes first: the difference of two that lie far outside overflows."""
    if len(offsets) < 1 or (offsets < 0).any() or (offsets > total).any():
        return False
    return bool(offsets[0] == 0 and offsets[-1] == total and (np.diff(offsets) >= 0).all())


def children_of(root: NDArray[np.int64], leaf: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64[nodes]: the left child of an inner node within its tree, the number of a leaf within its tree.

    Shape: root int64[trees + 1], leaf bool[nodes]. Raises ValueError where the nodes of a tree are not in level order.
    """
    sizes = np.diff(root)
    if not _spans(root, len(leaf)) or (sizes < 1).any():
        raise ValueError(f"root must rise from 0 to the number of nodes, {len(leaf):,}, by at least 1 a tree")
    if not len(leaf):
        return np.zeros(0, np.int64)
    place = np.arange(len(leaf)) - np.repeat(root[:-1], sizes)
    inner: NDArray[np.int64] = np.cumsum(~leaf) - ~leaf  # inner nodes before this one
    inner = inner - np.repeat(inner[root[:-1]], sizes)
    inners = np.add.reduceat(~leaf, root[:-1], dtype=np.int64)
    if (2 * inner < place).any() or (2 * inners + 1 != sizes).any():  # a node that is nobody's child; too few children
        raise ValueError("the nodes of a tree must be in level order, two children for every inner node")
    return np.where(leaf, place - inner, 2 * inner + 1)


def tree_plan(forest: Forest, width: int, columns: int) -> TreePlan:
    """Trees ready for scoring rows of `width` numbers and `columns` categories.

    Raises ValueError where an index leads outside or the nodes of a tree are not in level order.
    """
    root, column, value, set_of = forest.root, forest.column, forest.value, forest.set_of
    root, leaf = np.ascontiguousarray(root, np.int64), column < 0
    for name in ("threshold", "missing_left", "set_of", "value"):
        if len(getattr(forest, name)) != len(column):
            raise ValueError(
                f"{name} must have an entry for each of {len(column):,} nodes, found {len(getattr(forest, name)):,}"
            )
    if value.dtype not in (np.float32, np.float64):
        raise ValueError(f"value must be float32 or float64, found {value.dtype}")
    child = children_of(root, leaf)
    if child[leaf].max(initial=0) >= MOST_LEAVES:
        raise ValueError(f"a tree must have at most {MOST_LEAVES:,} leaves, found {child[leaf].max() + 1:,}")
    _check_columns(forest, width, columns)
    numbers = np.unique(column[~leaf & (set_of < 0)]).astype(np.int64)
    categories = np.unique(column[~leaf & (set_of >= 0)]).astype(np.int64)
    slot = np.where(set_of < 0, np.searchsorted(numbers, column), np.searchsorted(categories, column))
    first_leaf = np.concatenate([[0], np.cumsum(leaf)])[root]
    return TreePlan(
        root=root,
        column=np.ascontiguousarray(column, np.int32),
        slot=np.where(leaf, -1, slot).astype(np.int32),
        child=child.astype(np.int32),
        threshold=np.ascontiguousarray(forest.threshold, np.float32),
        missing_left=np.ascontiguousarray(forest.missing_left, bool),
        set_of=np.ascontiguousarray(set_of, np.int32),
        set_at=np.ascontiguousarray(forest.set_at, np.int64),
        words=np.ascontiguousarray(forest.words, np.uint32),
        leaves=np.ascontiguousarray(value[leaf]),
        first_leaf=first_leaf.astype(np.int64),
        numbers=numbers,
        categories=categories - width,
        base=np.ascontiguousarray(forest.base, value.dtype),
        width=width,
        columns=columns,
    )


def _check_columns(forest: Forest, width: int, columns: int) -> None:
    column, set_of, set_at, inner = forest.column, forest.set_of, forest.set_at, forest.column >= 0
    if not _spans(set_at, len(forest.words)):
        raise ValueError(f"set_at must rise from 0 to the number of words, {len(forest.words):,}")
    of_numbers, of_sets = column[inner & (set_of < 0)], column[inner & (set_of >= 0)]
    if (column < -1).any() or (of_numbers >= width).any():
        raise ValueError(f"a comparison must be of one of {width} numbers, found column {of_numbers.max(initial=-1)}")
    if (of_sets < width).any() or (of_sets >= width + columns).any():
        raise ValueError(f"a set must be of one of {columns} categories, found column {of_sets.max(initial=-1)}")
    if (set_of >= len(set_at) - 1).any() or (set_of < -1).any():
        raise ValueError(f"set_of must name one of {len(set_at) - 1:,} sets or be -1, found {set_of.max(initial=-1)}")


# ---------------------------------------------------------------------------------------------------------- scoring
@njit(inline=True)
def _in_set(words: Any, low: Any, high: Any, code: Any) -> Any:
    """Whether a code is in the set of words [low, high)."""
    word = low + (code >> 5)
    return code >= 0 and word < high and (words[word] >> np.uint32(code & 31)) & np.uint32(1) != 0


@njit
def load_block(
    numeric: Any, codes: Any, start: Any, count: Any, plan: Any, lanes: Any, present: Any, masks: Any, kinds: Any
) -> None:
    """A block of rows by column: numbers side by side, and for every category the codes that occur with their rows."""
    numbers, categories = plan
    for s in range(len(numbers)):
        f = numbers[s]
        for r in range(count):
            lanes[(s << 6) + r] = numeric[start + r, f]
    for s in range(len(categories)):
        f, found = categories[s], 0
        for r in range(count):
            code, at = codes[start + r, f], 0
            while at < found and present[s, at] != code:
                at += 1
            if at == found:
                present[s, at], masks[s, at] = code, np.uint64(0)
                found += 1
            masks[s, at] |= _ONE << np.uint64(r)
        kinds[s] = found


@njit
def rows_in_set(words: Any, low: Any, high: Any, present: Any, masks: Any, found: Any) -> Any:
    """uint64: rows of the block whose code is in the set."""
    left = np.uint64(0)
    for at in range(found):
        if _in_set(words, low, high, np.int64(present[at])):
            left |= masks[at]
    return left


@njit
def _one_by_one(
    numeric: Any, codes: Any, start: Any, count: Any, first: Any, nodes: Any, sets: Any, width: Any, leaf: Any
) -> None:
    """Number of the leaf of each row of a block, row by row."""
    column, child, threshold, missing_left, set_of = nodes
    set_at, words = sets
    for r in range(count):
        node = first
        while column[node] >= 0:
            f = column[node]
            if set_of[node] >= 0:
                code = np.int64(codes[start + r, f - width])
                left = _in_set(words, set_at[set_of[node]], set_at[set_of[node] + 1], code)
            else:
                x = numeric[start + r, f]
                left = x <= threshold[node] or (missing_left[node] and x != x)
            node = first + child[node] + (0 if left else 1)
        leaf[r] = np.uint16(child[node])


@njit
def _add_trees(numeric: Any, codes: Any, total: Any, roots: Any, nodes: Any, sets: Any, used: Any, width: Any) -> None:
    root, first_leaf, leaves, slot = roots
    child, threshold, missing_left, set_of = nodes[1:]
    set_at, words = sets
    n, outputs = total.shape
    widest = 1
    for t in range(len(root) - 1):
        widest = max(widest, root[t + 1] - root[t])
    lanes = np.zeros(max(len(used[0]), 1) << 6, np.float32)
    present, masks = np.zeros((len(used[1]), 64), np.int32), np.zeros((len(used[1]), 64), np.uint64)
    kinds, reach, leaf = np.zeros(len(used[1]), np.int64), np.zeros(widest + 2, np.uint64), np.zeros(64, np.uint16)
    for start in range(0, n, 64):
        count = min(64, n - start)
        load_block(numeric, codes, start, count, used, lanes, present, masks, kinds)
        for t in range(len(root) - 1):
            first, size = root[t], root[t + 1] - root[t]
            if size >= 2 * BLOCKED_LEAVES:
                _one_by_one(numeric, codes, start, count, first, nodes, sets, width, leaf)
            else:
                reach[0] = _ALL
                for node in range(first, first + size):
                    at, mask = slot[node], reach[node - first]
                    if at < 0:
                        put_lanes(leaf, mask, child[node])
                        continue
                    if set_of[node] >= 0:
                        low, high = set_at[set_of[node]], set_at[set_of[node] + 1]
                        left = rows_in_set(words, low, high, present[at], masks[at], kinds[at])
                    else:
                        left = at_most(lanes, at << 6, threshold[node], missing_left[node])
                    reach[child[node]] = mask & left
                    reach[child[node] + 1] = mask & ~left
            k, values = t % outputs, first_leaf[t]
            for r in range(count):
                total[start + r, k] += leaves[values + leaf[r]]


@njit
def _leaves(numeric: Any, codes: Any, nodes: Any, sets: Any, width: Any, out: Any) -> None:
    for start in range(0, len(out), 64):
        count = min(64, len(out) - start)
        _one_by_one(numeric, codes, start, count, 0, nodes, sets, width, out[start : start + count])


def rows_of(
    numeric: NDArray[np.float32], codes: NDArray[np.int32], plan: TreePlan
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows that a plan's kernels can read. Raises TypeError for other types, ValueError for other shapes."""
    if numeric.dtype != np.float32 or codes.dtype != np.int32:
        raise TypeError(f"numeric and codes must be float32 and int32, found {numeric.dtype} and {codes.dtype}")
    if numeric.shape != (len(codes), plan.width) or codes.shape != (len(numeric), plan.columns):
        raise ValueError(
            f"numeric and codes must be [n, {plan.width}] and [n, {plan.columns}], found {numeric.shape} and {codes.shape}"
        )
    return np.require(numeric, requirements=["C", "W"]), np.require(codes, requirements=["C", "W"])


def add_trees(
    numeric: NDArray[np.float32], codes: NDArray[np.int32], plan: TreePlan, total: NDArray[Any], threads: int = 1
) -> None:
    """total[i, k] += the leaves that row i reaches in the trees of output k, one after the other.

    Shape: numeric float32[n, width], codes int32[n, columns], total [n, outputs] of the type of the leaves. Raises ValueError
    for other shapes, TypeError for other types.
    """
    numeric, codes = rows_of(numeric, codes, plan)
    n = len(numeric)
    check.output("total", total, (n, len(plan.base)), plan.leaves.dtype)
    nodes = (plan.column, plan.child, plan.threshold, plan.missing_left, plan.set_of)
    facts = (
        (plan.root, plan.first_leaf, plan.leaves, plan.slot), nodes, (plan.set_at, plan.words),
        (plan.numbers, plan.categories), plan.width,
    )  # fmt: skip

    def part(a: int, b: int) -> None:
        low, high = a * LANES, min(b * LANES, n)
        _add_trees(numeric[low:high], codes[low:high], total[low:high], *facts)

    run_ranges(part, split(-(-n // LANES), threads), threads)


def tree_leaves(numeric: NDArray[np.float32], codes: NDArray[np.int32], plan: TreePlan) -> NDArray[np.uint16]:
    """uint16[n]: the leaf that each row reaches in a plan's first tree, counted in the order of its nodes.

    Arguments and errors of `add_trees`.
    """
    numeric, codes = rows_of(numeric, codes, plan)
    out = np.zeros(len(numeric), np.uint16)
    nodes = (plan.column, plan.child, plan.threshold, plan.missing_left, plan.set_of)
    _leaves(numeric, codes, nodes, (plan.set_at, plan.words), plan.width, out)
    return out
