"""Scores of trees: what a walk from root to leaf gives, for any batch, and no layout that is not a tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import trees
from kernels.trees import Forest, TreePlan, add_trees, children_of, tree_leaves, tree_plan
from tests.kernels.cases import examples

WIDTH, CARDINALITIES = 5, (3, 40, 70)


def tree_scores(numeric: np.ndarray, codes: np.ndarray, plan: TreePlan, threads: int = 1) -> np.ndarray:
    """float32[n, outputs]: base plus the leaves that each row reaches."""
    total = np.tile(plan.base, (len(numeric), 1))
    add_trees(numeric, codes, plan, total, threads)
    return total.astype(np.float32, copy=False)


def grown(rng: Any, sizes: list[int], outputs: int = 1, dtype: Any = np.float64) -> Forest:
    """Random trees with so many leaves."""
    nodes: dict[str, list[Any]] = {"column": [], "threshold": [], "missing_left": [], "set_of": [], "value": []}
    root, sets = [0], []
    for leaves in sizes:
        inner, waiting = leaves - 1, 1
        for _ in range(2 * leaves - 1):
            # the last node that waits may only be a leaf when no inner node is left to come
            split = inner > 0 and (waiting == 1 or rng.random() < 0.6)
            category = split and rng.random() < 0.4
            waiting += 1 if split else -1
            inner -= split
            column = int(rng.integers(0, WIDTH)) if split else -1
            if category:
                which = int(rng.integers(0, len(CARDINALITIES)))
                column = WIDTH + which
                sets.append(rng.integers(0, 2**32, -(-CARDINALITIES[which] // 32), dtype=np.uint32))
            nodes["column"].append(column)
            nodes["threshold"].append(np.float32(rng.normal()).item() if split and not category else 0.0)
            nodes["missing_left"].append(bool(rng.random() < 0.5))
            nodes["set_of"].append(len(sets) - 1 if category else -1)
            nodes["value"].append(0.0 if split else rng.normal())
        root.append(len(nodes["column"]))
    return Forest(
        root=np.array(root),
        column=np.array(nodes["column"], np.int32),
        threshold=np.array(nodes["threshold"], np.float32),
        missing_left=np.array(nodes["missing_left"], bool),
        set_of=np.array(nodes["set_of"], np.int32),
        set_at=np.cumsum([0, *map(len, sets)]),
        words=np.concatenate([np.empty(0, np.uint32), *sets]),
        value=np.array(nodes["value"], dtype),
        base=rng.normal(size=outputs),
    )


def rows_of(rng: Any, n: int) -> tuple[Any, Any]:
    numeric = rng.normal(size=(n, WIDTH)).astype(np.float32)
    awkward = [np.nan, np.inf, -np.inf, -0.0, 0.0, np.float32(3e38), np.float32(1e-45)]
    numeric[rng.random(numeric.shape) < 0.2] = rng.choice(awkward)
    codes = np.stack([rng.integers(0, size + 30, n) for size in CARDINALITIES], axis=1).astype(np.int32)
    return numeric, codes


def slow(forest: Forest, numeric: Any, codes: Any) -> Any:
    """Row after row, tree after tree, from the root down."""
    leaf = forest.column < 0
    kind, outputs = forest.value.dtype.type, len(forest.base)
    out = np.empty((len(numeric), outputs), forest.value.dtype)
    for i in range(len(numeric)):
        total = [kind(value) for value in forest.base]
        for t in range(len(forest.root) - 1):
            tree = slice(forest.root[t], forest.root[t + 1])
            order = np.cumsum(~leaf[tree]) - 1
            node = 0
            while not leaf[tree][node]:
                column, at = forest.column[tree][node], forest.set_of[tree][node]
                if at >= 0:
                    code = int(codes[i, column - WIDTH])
                    words = forest.words[forest.set_at[at] : forest.set_at[at + 1]]
                    left = code // 32 < len(words) and bool(int(words[code // 32]) >> (code % 32) & 1)
                else:
                    x = numeric[i, column]
                    left = bool(forest.missing_left[tree][node]) if np.isnan(x) else x <= forest.threshold[tree][node]
                node = 2 * order[node] + (1 if left else 2)
            total[t % outputs] += forest.value[tree][node]
        out[i] = total
    return out.astype(np.float32)


@examples(20)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 40), max_size=6), st.integers(1, 130), st.booleans())
def test_scores_are_those_of_a_walk_from_the_root(seed: int, sizes: list[int], n: int, wide: bool) -> None:
    rng = np.random.default_rng(seed)
    forest = grown(rng, [size for size in sizes for _ in range(2)], 2, np.float64 if wide else np.float32)
    numeric, codes = rows_of(rng, n)
    found = tree_scores(numeric, codes, tree_plan(forest, WIDTH, len(CARDINALITIES)))
    assert found.tobytes() == slow(forest, numeric, codes).tobytes()


def test_a_row_has_the_bits_that_it_has_alone_in_any_batch_on_any_threads() -> None:
    rng = np.random.default_rng(3)
    plan = tree_plan(grown(rng, [31] * 12 + [1, 2]), WIDTH, len(CARDINALITIES))
    numeric, codes = rows_of(rng, 331)
    whole = tree_scores(numeric, codes, plan)
    for cut, threads in ((1, 1), (37, 2), (64, 4), (200, 3)):
        parts = [tree_scores(numeric[a : a + cut], codes[a : a + cut], plan, threads) for a in range(0, 331, cut)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    total = np.tile(plan.base, (331, 1))
    half = tree_plan(grown(np.random.default_rng(3), [31] * 12 + [1, 2]), WIDTH, len(CARDINALITIES))
    add_trees(numeric, codes, half, total)
    assert total.astype(np.float32).tobytes() == whole.tobytes()


def test_a_tree_of_many_leaves_is_walked_row_by_row_with_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    large = trees.BLOCKED_LEAVES + 5
    forest = grown(rng, [large, 3])
    numeric, codes = rows_of(rng, 70)
    plan = tree_plan(forest, WIDTH, len(CARDINALITIES))
    assert tree_scores(numeric, codes, plan).tobytes() == slow(forest, numeric, codes).tobytes()
    leaf = tree_leaves(numeric, codes, plan)
    first = dataclasses.replace(forest, root=forest.root[:2], base=np.zeros(1))
    nodes = forest.root[1]
    first = dataclasses.replace(
        first,
        **{name: getattr(forest, name)[:nodes] for name in ("column", "threshold", "missing_left", "set_of", "value")},
    )
    alone = tree_scores(numeric, codes, tree_plan(first, WIDTH, len(CARDINALITIES)))
    assert np.array_equal(plan.leaves[leaf].astype(np.float32), alone[:, 0]) and len(np.unique(leaf)) > 5


@pytest.mark.parametrize(
    "leaf",
    [
        [False],
        [True, True],
        [False, True],
        [False, True, True, True, True],
        [True, False, True],
        [False, False, True, True],
    ],
)
def test_nodes_that_are_no_tree_in_level_order_are_refused(leaf: list[bool]) -> None:
    with pytest.raises(ValueError, match="level order"):
        children_of(np.array([0, len(leaf)]), np.array(leaf))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("column", 99, "one of 5 numbers, found column 99"),
        ("column", 5, "one of 5 numbers, found column 5"),
        ("set_of", 7, "set must be of one of 3 categories|name one of"),
        ("set_of", -2, "name one of"),
        ("root", 9, "root must rise|level order"),
    ],
)
def test_an_index_that_leads_outside_is_refused(name: str, value: int, said: str) -> None:
    forest = Forest(
        root=np.array([0, 3]),
        column=np.array([1, -1, -1], np.int32),
        threshold=np.zeros(3, np.float32),
        missing_left=np.zeros(3, bool),
        set_of=np.full(3, -1, np.int32),
        set_at=np.zeros(1, np.int64),
        words=np.empty(0, np.uint32),
        value=np.zeros(3),
        base=np.zeros(1),
    )
    tree_plan(forest, WIDTH, 3)
    wrong = getattr(forest, name).copy()
    wrong[-1 if name == "root" else 0] = value
    with pytest.raises(ValueError, match=said):
        tree_plan(dataclasses.replace(forest, **{name: wrong}), WIDTH, 3)
