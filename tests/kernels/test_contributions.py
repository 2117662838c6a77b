"""Contributions of columns to the scores of trees: Shapley values by their definition, and the same bits in any batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import contributions
from kernels.contributions import contribution_plan, tree_contributions
from kernels.trees import Forest, add_trees, tree_plan
from tests.kernels.cases import examples
from tests.kernels.test_trees import CARDINALITIES, WIDTH, grown, rows_of

COLUMNS = WIDTH + len(CARDINALITIES)


def covered(rng: Any, forest: Forest) -> Any:
    """Covers as after training: a parent has those of its children. Some leaves have seen nothing."""
    leaf = forest.column < 0
    cover = np.where(leaf, rng.integers(0, 30, len(leaf)), 0).astype(np.float64)
    for first, stop in itertools.pairwise(forest.root):
        inner = np.cumsum(~leaf[first:stop]) - 1
        for node in range(stop - first - 1, -1, -1):
            if not leaf[first + node]:
                left = first + 2 * inner[node] + 1
                cover[first + node] = cover[left] + cover[left + 1]
    return cover


class Tree:
    """What one tree gives a row of which some columns are known."""

    def __init__(self, forest: Forest, cover: Any, t: int) -> None:
        nodes = slice(forest.root[t], forest.root[t + 1])
        self.forest, self.column, self.value, self.cover = (
            forest, forest.column[nodes], forest.value[nodes], cover[nodes]
        )  # fmt: skip
        self.threshold, self.missing, self.set_of = (
            forest.threshold[nodes], forest.missing_left[nodes], forest.set_of[nodes]
        )  # fmt: skip
        self.order = np.cumsum(self.column >= 0) - 1

    def goes_left(self, node: int, numeric: Any, codes: Any) -> bool:
        column, at = self.column[node], self.set_of[node]
        if at >= 0:
            code = int(codes[column - WIDTH])
            words = self.forest.words[self.forest.set_at[at] : self.forest.set_at[at + 1]]
            return code // 32 < len(words) and bool(int(words[code // 32]) >> (code % 32) & 1)
        x = numeric[column]
        return bool(self.missing[node]) if np.isnan(x) else bool(x <= self.threshold[node])

    def expected(self, known: set[int], numeric: Any, codes: Any, node: int = 0) -> float:
        if self.column[node] < 0:
            return float(self.value[node])
        left = 2 * self.order[node] + 1
        if self.column[node] in known:
            return self.expected(known, numeric, codes, left if self.goes_left(node, numeric, codes) else left + 1)
        a, b = self.cover[left], self.cover[left + 1]
        share = a / (a + b) if a + b > 0 else 0.5
        return float(
            share * self.expected(known, numeric, codes, left)
            + (1 - share) * self.expected(known, numeric, codes, left + 1)
        )


def slow(forest: Forest, cover: Any, numeric: Any, codes: Any, share: Any) -> Any:
    """Shapley values by the sum over all subsets of the columns that a tree uses."""
    out, outputs = np.zeros((len(numeric), COLUMNS)), len(forest.base)
    for t in range(len(forest.root) - 1):
        tree = Tree(forest, cover, t)
        used = sorted({int(column) for column in tree.column if column >= 0})
        for i in range(len(numeric)):
            row = numeric[i], codes[i]
            value = {
                known: tree.expected(set(known), *row)
                for size in range(len(used) + 1)
                for known in itertools.combinations(used, size)
            }
            for column in used:
                for known in (known for known in value if column not in known):
                    times = math.factorial(len(known)) * math.factorial(len(used) - 1 - len(known))
                    gain = value[tuple(sorted((*known, column)))] - value[known]
                    out[i, column] += share[i, t % outputs] * times / math.factorial(len(used)) * gain
    return out


@examples(12)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 16), max_size=2), st.booleans())
def test_contributions_are_shapley_values_and_add_up(seed: int, sizes: list[int], wide: bool) -> None:
    rng = np.random.default_rng(seed)
    forest = grown(rng, [size for size in sizes for _ in range(2)], 2, np.float64 if wide else np.float32)
    numeric, codes = rows_of(rng, 3)
    cover, share, plan = covered(rng, forest), rng.normal(size=(3, 2)), tree_plan(forest, WIDTH, len(CARDINALITIES))
    explained = contribution_plan(plan, cover)
    found = tree_contributions(numeric, codes, explained, share)
    np.testing.assert_allclose(found, slow(forest, cover, numeric, codes, share), rtol=0, atol=1e-12)
    total = np.tile(forest.base, (3, 1))
    add_trees(numeric, codes, tree_plan(dataclasses.replace(forest, value=forest.value.astype(float)), WIDTH, 3), total)
    np.testing.assert_allclose(found.sum(axis=1), ((total - explained.mean) * share).sum(axis=1), rtol=0, atol=1e-6)


def test_a_row_has_the_bits_that_it_has_alone_in_any_batch_on_any_threads() -> None:
    rng = np.random.default_rng(3)
    forest = grown(rng, [31] * 4 + [1, 2], 2)
    plan = contribution_plan(tree_plan(forest, WIDTH, len(CARDINALITIES)), covered(rng, forest))
    numeric, codes = rows_of(rng, 331)
    share = rng.normal(size=(331, 2))
    whole = tree_contributions(numeric, codes, plan, share)
    assert len(np.unique(whole)) > 1000
    for cut, threads in ((1, 1), (37, 2), (64, 4), (200, 3)):
        parts = [
            tree_contributions(numeric[a : a + cut], codes[a : a + cut], plan, share[a : a + cut], threads)
            for a in range(0, 331, cut)
        ]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def chain(depth: int, columns: int) -> Forest:
    """One tree whose inner nodes are each the left child of the one before."""
    leaf = np.array([False, *([False, True] * (depth - 1)), True, True])
    return Forest(
        root=np.array([0, len(leaf)]),
        column=np.where(leaf, -1, (np.cumsum(~leaf) - 1) % columns).astype(np.int32),
        threshold=np.zeros(len(leaf), np.float32),
        missing_left=np.zeros(len(leaf), bool),
        set_of=np.full(len(leaf), -1, np.int32),
        set_at=np.zeros(1, np.int64),
        words=np.empty(0, np.uint32),
        value=np.linspace(-1, 1, len(leaf)) * leaf,
        base=np.zeros(1),
    )


@pytest.mark.parametrize(("depth", "columns"), [(60, 60), (120, 120), (200, 40)])
def test_deep_paths_add_up(depth: int, columns: int) -> None:
    forest, rng = chain(depth, columns), np.random.default_rng(depth)
    plan = tree_plan(forest, columns, 0)
    explained = contribution_plan(plan, covered(rng, forest) + 1)
    numeric, codes = rng.normal(-1.5, 1, size=(50, columns)).astype(np.float32), np.zeros((50, 0), np.int32)
    total = np.zeros((50, 1))
    add_trees(numeric, codes, plan, total)
    found = tree_contributions(numeric, codes, explained, np.ones((50, 1)))
    np.testing.assert_allclose(found.sum(axis=1), total[:, 0] - explained.mean, rtol=0, atol=1e-12)


def test_what_cannot_be_explained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tree_plan(chain(130, 130), 130, 0)
    with pytest.raises(ValueError, match="at most 128 columns, found 130"):
        contribution_plan(plan, np.ones(261))
    for cover in (np.ones(3), np.full(261, -1.0), np.full(261, np.inf)):
        with pytest.raises(ValueError, match="cover must be 261 finite numbers"):
            contribution_plan(plan, cover)
    monkeypatch.setattr(contributions, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="nodes times points"):
        contribution_plan(tree_plan(chain(5, 5), 5, 0), np.ones(11))
    monkeypatch.undo()
    small = contribution_plan(tree_plan(chain(5, 5), 5, 0), np.ones(11))
    with pytest.raises(ValueError, match=r"share must be \[2, 1\]"):
        tree_contributions(np.zeros((2, 5), np.float32), np.zeros((2, 0), np.int32), small, np.ones((1, 1)))
