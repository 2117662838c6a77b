"""What every public kernel promises of its input: any layout is read, nothing is changed, no rows are rows too."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels import (
    AGGREGATES,
    asof,
    conditional,
    contributions,
    dropout,
    encode,
    exact,
    gather,
    hashing,
    metrics,
    profile,
    statistics,
    text,
    trees,
    windows,
)
from tests.kernels.cases import layouts

N = 40
DRAW = np.random.default_rng(8)
ENTITY, PROBE = DRAW.integers(-1, 4, N), DRAW.integers(-1, 4, N)
TIME, EVENT = DRAW.integers(0, 60, N), DRAW.integers(0, 60, N)
KNOWN = EVENT + DRAW.integers(0, 9, N)
VALUES = np.where(DRAW.random(N) < 0.1, np.nan, DRAW.standard_normal(N))
BLOCK = np.stack([VALUES, VALUES[::-1]], 1)
CODES = DRAW.integers(0, 3, (N, 2))
COUNTS = DRAW.integers(1, 9, (2, N))
EDGES = np.sort(DRAW.standard_normal(5))
Y, SCORE, WEIGHT = DRAW.integers(0, 2, N), DRAW.random(N).round(1), DRAW.random(N)
NUMERIC = encode.numeric_plan([encode.NumericColumn(indicator=True), encode.NumericColumn("ple", edges=EDGES.tolist())])
PROFILE = profile.profile_plan([EDGES, EDGES])
CONDITIONAL = conditional.ConditionalPlan(
    np.array([0, 1]),
    DRAW.integers(-1, 2, (2, 7)),
    DRAW.standard_normal((2, 7)),
    np.sort(DRAW.standard_normal((2, 8, 3))),
)
RATED = [Y, SCORE, WEIGHT]
FLAGS = np.array([False, True, True])
TREES = trees.tree_plan(
    trees.Forest(
        root=np.array([0, 3]),
        column=np.array([1, -1, -1], np.int32),
        threshold=np.zeros(3, np.float32),
        missing_left=FLAGS,
        set_of=np.full(3, -1, np.int32),
        set_at=np.zeros(1, np.int64),
        words=np.empty(0, np.uint32),
        value=np.arange(3.0),
        base=np.zeros(1),
    ),
    2,
    2,
)
EXPLAINED = contributions.contribution_plan(TREES, np.array([3.0, 1.0, 2.0]))
NARROW, KEYS = BLOCK.astype(np.float32), CODES.astype(np.int32)


def added(numeric: Any, codes: Any, threads: int) -> Any:
    total = np.zeros((len(numeric), 1))
    trees.add_trees(numeric, codes, TREES, total, threads)
    return total


def encoded(values: Any, threads: int) -> Any:
    return encode.encode_numeric(values, NUMERIC, np.empty((len(values), NUMERIC.width), np.float32), threads)


LETTERS = DRAW.choice(np.frombuffer(b"ab .", np.uint8), 60)
NGRAMS = text.NGrams(5, 2, 3, 7)


def padded(offsets: Any) -> Any:
    """Offsets of no text where there are none."""
    return offsets if len(offsets) else [0]


def hashed(offsets: Any, data: Any) -> Any:
    return hashing.hash_bytes(data, padded(offsets))


# name -> (call, arrays that have a row for each row, arrays that have not); threads where a call takes them
CALLS: dict[str, tuple[Callable[..., Any], list[Any], list[Any]]] = {
    "asof": (
        lambda *arrays, threads: asof.asof(*arrays, 20, threads=threads),
        [PROBE, TIME, ENTITY, EVENT, KNOWN],
        [],
    ),
    "trailing": (
        lambda *arrays, threads: windows.trailing(*arrays, [5, 30], list(AGGREGATES), threads=threads),
        [PROBE, TIME, ENTITY, EVENT, KNOWN, VALUES],
        [],
    ),
    "dropout_mask": (
        lambda rows: dropout.dropout_mask(rows, 3, 1, 2, 3, 0.5, np.empty((len(rows), 3), np.float32)),
        [TIME],
        [],
    ),
    "encode_numeric": (lambda values, threads: encoded(values, threads), [BLOCK], []),
    "quantiles_of": (lambda values: encode.quantiles_of(values, 4), [VALUES], []),
    "group_sums": (lambda values, groups: exact.group_sums(values, groups, 4), [SCORE, CODES[:, 0].copy()], []),
    "moments": (exact.moments, [VALUES], []),
    "total": (exact.total, [SCORE], []),
    "gather_rows": (
        lambda index, block, threads: gather.gather_rows(block, index, np.empty((len(index), 2)), threads),
        [DRAW.integers(0, N, N)],
        [BLOCK],
    ),
    "columns_of": (gather.columns_of, [BLOCK], []),
    "hash_u64": (hashing.hash_u64, [TIME], []),
    "hash_bytes": (hashed, [np.sort(TIME)], [DRAW.integers(0, 256, 60).astype(np.uint8)]),
    "roc_auc": (metrics.roc_auc, RATED, []),
    "bins_of": (lambda values: profile.bins_of(values, 4), [VALUES], []),
    "profile_plan": (lambda edges: profile.profile_plan([edges]), [], [EDGES]),
    "profile": (lambda block, threads: profile.profile(block, PROFILE, threads), [BLOCK], []),
    "category_counts": (profile.category_counts, [CODES], [np.array([3, 3])]),
    "conditional_codes": (
        lambda block, threads: conditional.conditional_codes(block, CONDITIONAL, threads),
        [BLOCK],
        [],
    ),
    "ks_profiles": (statistics.ks_profiles, [*COUNTS], []),
    "wasserstein_profiles": (
        lambda a, b, edges: statistics.wasserstein_profiles((a, -9.0, 9.0), (b, -8.0, 9.0), edges),
        [],
        [*COUNTS[:, :6], EDGES],
    ),
    "areas": (statistics.areas, [], [COUNTS[0, : len(EDGES)].astype(float), EDGES, EDGES[1:]]),
    "add_trees": (added, [NARROW, KEYS], []),
    "tree_leaves": (lambda *rows: trees.tree_leaves(*rows, TREES), [NARROW, KEYS], []),
    "contribution_plan": (
        lambda cover: contributions.contribution_plan(TREES, cover).share,
        [],
        [np.array([3.0, 1.0, 2.0])],
    ),
    "tree_contributions": (
        lambda numeric, codes, share, threads: contributions.tree_contributions(
            numeric, codes, EXPLAINED, share[:, None], threads
        ),
        [NARROW, KEYS, SCORE],
        [],
    ),
    "rows_of": (lambda *rows: trees.rows_of(*rows, TREES), [NARROW, KEYS], []),
    "children_of": (trees.children_of, [], [np.array([0, 3]), FLAGS]),
    "text_counts": (lambda offsets, data: text.text_counts(data, padded(offsets), NGRAMS), [np.sort(TIME)], [LETTERS]),
    "encode_texts": (
        lambda offsets, data, idf, seen, threads: text.encode_texts(data, padded(offsets), NGRAMS, idf, seen, threads),
        [np.sort(TIME)],
        [LETTERS, np.linspace(1, 2, 5), np.frombuffer(b"\x5a\x01", np.uint8)],
    ),
    "vector_norms": (text.vector_norms, [BLOCK], []),
    "pinball": (lambda y, score, weight: metrics.pinball(y, score, 0.3, weight), RATED, []),
    "pinball_sum": (lambda y, score, weight: metrics.pinball_sum(y, score, 0.3, weight), RATED, []),
}
for of_rows in ("roc_curve", "precision_recall_curve", "average_precision", "log_loss", "log_loss_sum", "brier"):
    CALLS[of_rows] = getattr(metrics, of_rows), RATED, []
for of_rows in ("brier_sum", "reliability", "reliability_sum", "ece"):
    CALLS[of_rows] = getattr(metrics, of_rows), RATED, []
for of_counts in ("psi", "js_distance"):
    CALLS[of_counts] = getattr(statistics, of_counts), [*COUNTS], []

PARTS = {  # of kernels, called with arrays that these have made
    *("radix_order", "sort_keys", "dense_codes", "grouped_columns", "ascending", "bounds"),
    *("wide_integer", "scale_of", "psi_of", "js_of", "gaps", "excess", "wasserstein_of"),
}


@pytest.fixture(autouse=True)
def _threads_for_few_rows_too(monkeypatch):
    monkeypatch.setattr(windows, "_PARALLEL_ROWS", 0)
    monkeypatch.setattr(metrics, "_PARALLEL_ROWS", 0)


def plain(result: Any) -> Any:
    """Something that is equal where every byte is."""
    if dataclasses.is_dataclass(result):
        return repr(result)
    if isinstance(result, (tuple, list)):
        return [plain(item) for item in result]
    if isinstance(result, int):  # of any size
        return result
    array = np.asarray(result)
    return array.dtype.str, array.shape, array.tobytes()


def functions() -> dict[str, Any]:
    """Public functions of the kernels that take arrays."""
    found = {}
    families = (
        "asof conditional contributions dropout encode exact gather hashing metrics profile sort statistics text trees"
    )
    for name in [*families.split(), "windows"]:
        module = importlib.import_module(f"kernels.{name}")
        for key, function in inspect.getmembers(module, inspect.isfunction):
            own = (
                function.__module__ == module.__name__
                and not key.startswith("_")
                and not hasattr(function, "__wrapped__")
            )
            if own and any("Array" in str(p.annotation) for p in inspect.signature(function).parameters.values()):
                found[key] = function
    return found


def test_every_public_kernel_is_called_here():
    assert set(functions()) == {*CALLS, *PARTS}


@pytest.mark.parametrize("name", CALLS)
def test_layout_and_threads_do_not_change_a_byte_and_the_input_stays(name):
    call, rows, others = CALLS[name]
    threaded = "threads" in inspect.signature(functions()[name]).parameters
    arrays = [*rows, *others]
    expected = plain(call(*(array.copy() for array in arrays), **({"threads": 1} if threaded else {})))
    variants = list(zip(*map(layouts, arrays), strict=True))
    if name == "columns_of":  # it says so
        variants = [variant for variant in variants if variant[0].flags.c_contiguous]
    for variant in variants:
        before = [array.tobytes() for array in variant]
        for threads in (1, 2, 4) if threaded else (1,):
            assert plain(call(*variant, **({"threads": threads} if threaded else {}))) == expected
        assert [array.tobytes() for array in variant] == before


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("count", [0, 1])
def test_no_rows_and_one_row_are_rows(name, count):
    call, rows, others = CALLS[name]
    few = [array[:count] for array in rows]
    threads = {"threads": 2} if "threads" in inspect.signature(functions()[name]).parameters else {}
    if name == "bins_of" and count == 0:
        with pytest.raises(ValueError, match="found none among 0"):
            call(*few, *others, **threads)
    else:
        call(*few, *others, **threads)
