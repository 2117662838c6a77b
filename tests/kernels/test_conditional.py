"""Conditional codes: a tree over some columns, then the bin of a value among the edges of its leaf."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.conditional import LEAVES, NODES, ConditionalPlan, conditional_codes

NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0]))


def slowly(row: list[float], value: int, columns: list[int], cuts: list[float], edges: list[list[float]]) -> int:
    """The code of one row of one conditional column."""
    if math.isnan(row[value]):
        return 0
    node = 0
    while node < NODES:
        right = columns[node] >= 0 and row[columns[node]] > cuts[node]
        node = 2 * node + (2 if right else 1)
    return 1 + sum(row[value] > edge for edge in edges[node - NODES])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20), st.integers(0, 10**6))
def test_codes_are_those_of_a_slow_twin(rows: list[tuple[float, float, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, cuts = rng.integers(-1, 3, (2, NODES)), rng.integers(-1, 2, (2, NODES)).astype(float)
    edges = np.sort(rng.integers(-2, 3, (2, LEAVES, 3)).astype(float), axis=2)
    edges[0, :, 2] = np.inf
    plan = ConditionalPlan(np.array([0, 2]), columns, cuts, edges)
    expected = [
        [
            slowly(list(row), int(plan.value[k]), columns[k].tolist(), cuts[k].tolist(), edges[k].tolist())
            for k in (0, 1)
        ]
        for row in rows
    ]
    assert conditional_codes(np.array(rows), plan).tolist() == expected


def test_a_block_without_a_column_of_the_plan_is_refused() -> None:
    plan = ConditionalPlan(np.array([0]), np.full((1, NODES), 2), np.zeros((1, NODES)), np.zeros((1, LEAVES, 1)))
    with pytest.raises(ValueError, match=r"\[n, 3 or more\], found \(5, 2\)"):
        conditional_codes(np.zeros((5, 2)), plan)
