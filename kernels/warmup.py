"""Compile every kernel once, into the cache, so that no step has to compile later.

One process fills the cache before workers start. Each family is called on a few rows with the types that the engine uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kernels import (
    AGGREGATES,
    asof,
    conditional,
    contributions,
    dropout,
    encode,
    folds,
    gather,
    hashing,
    metrics,
    order,
    profile,
    sort,
    text,
    trees,
    windows,
)


def _order() -> None:
    order.permutation(0, 3, 3, 0, 0)
    order.permutation(0, 3, order.SMALL + 1, 0, 0)


def _gather() -> None:
    for dtype in gather.GATHERED:
        gather.gather_rows(np.zeros((2, 2), dtype), np.array([1]), np.empty((1, 2), dtype))
    gather.columns_of(np.zeros((1, 1)))


def _sort() -> None:
    codes = np.array([0, 1])
    for before in (None, sort.radix_order(codes)):
        sort.grouped_columns(codes, 0, 2, 1, before, [codes])
    sort.sort_keys(codes.astype(np.uint64))


def _windows() -> None:
    entity, event = np.array([0, 0]), np.array([0, 1])
    never = np.iinfo(np.int64).min
    cases = [(event, np.nan), (np.array([2, 1]), 2.0), (np.array([2, never]), 2.0)]
    for known, value in cases:
        values = np.array([1.0, value])
        of_caller = folds.Fold("largest", lambda values, _: values.max())
        windows.trailing(entity, event, entity, event, known, values, [5], [*AGGREGATES, of_caller])


def _asof() -> None:
    one = np.array([0])
    asof.asof(one, one, one, one, one, None)


def _encode() -> None:
    plan = encode.numeric_plan([encode.NumericColumn()])
    encode.encode_numeric(np.zeros((1, 1)), plan, np.empty((1, 1), np.float32))


def _hashing() -> None:
    hashing.hash_u64(np.array([1]))
    hashing.hash_bytes(np.zeros(1, np.uint8), np.array([0, 1]))


def _dropout() -> None:
    for dtype in (np.float32, np.int16):
        dropout.dropout_mask(np.array([1]), 4, 0, 0, 0, 0.5, np.empty((1, 4), dtype))


def _metrics() -> None:
    y, score = np.array([0.0, 1.0]), np.array([0.2, 0.8])
    for weight in (None, np.ones(2)):
        for metric in (metrics.roc_auc, metrics.average_precision, metrics.log_loss, metrics.brier, metrics.ece):
            metric(y, score, weight)


def _profile() -> None:
    plan = profile.profile_plan([[0.0, 1.0]])
    for dtype in (np.float32, np.float64):
        profile.profile(np.zeros((1, 1), dtype), plan)
    for code in (np.int32, np.int64):
        profile.category_counts(np.zeros((1, 1), code), [1])


def _trees() -> None:
    nothing = np.zeros(1, np.int32) - 1
    for kind in (np.float32, np.float64):
        forest = trees.Forest(
            root=np.array([0, 1]),
            column=nothing,
            threshold=np.zeros(1, np.float32),
            missing_left=np.zeros(1, bool),
            set_of=nothing,
            set_at=np.zeros(1, np.int64),
            words=np.zeros(0, np.uint32),
            value=np.zeros(1, kind),
            base=np.zeros(1),
        )
        rows = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32)
        plan = trees.tree_plan(forest, 1, 1)
        trees.add_trees(*rows, plan, np.zeros((1, 1), kind))
        explained = contributions.contribution_plan(plan, np.zeros(1))
        contributions.tree_contributions(*rows, explained, np.ones((1, 1)))


def _conditional() -> None:
    nodes, leaves = conditional.NODES, conditional.LEAVES
    plan = conditional.ConditionalPlan(
        np.zeros(1, np.int64), np.zeros((1, nodes), np.int64), np.zeros((1, nodes)), np.zeros((1, leaves, 1))
    )
    conditional.conditional_codes(np.zeros((1, 1)), plan)


def _text() -> None:
    grams = text.NGrams(2, 1, 1, 0)
    data, offsets = np.full(1, 97, np.uint8), np.array([0, 1])
    text.text_counts(data, offsets, grams)
    text.encode_texts(data, offsets, grams, np.ones(2), np.zeros(1, np.uint8))
    text.vector_norms(np.ones((1, 1)))


FAMILIES: dict[str, Callable[[], None]] = {
    "order": _order,
    "gather": _gather,
    "sort": _sort,
    "windows": _windows,
    "asof": _asof,
    "encode": _encode,
    "hashing": _hashing,
    "dropout": _dropout,
    "metrics": _metrics,
    "profile": _profile,
    "trees": _trees,
    "conditional": _conditional,
    "text": _text,
}


def warmup() -> dict[str, float]:
    """Compile all kernels or load them from the cache; returns the seconds that each family took and their `total`."""
    seconds = {}
    for name, call in FAMILIES.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds | {"total": sum(seconds.values())}
