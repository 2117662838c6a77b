"""Conditional columns: fitted by a small tree, counted like categories, and read back within limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.tree import DecisionTreeRegressor

from engine.config.sections.features import EncodeConfig
from engine.features.conditional import BINS, MOST, fit_conditional, grow
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature
from engine.runtime.records import Damaged
from kernels.conditional import DEPTH, LEAVES, NODES

NAMES = ("far", "long", "noise")


def drawn(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`long` follows `far`; `noise` follows nothing."""
    rng = np.random.default_rng(seed)
    far = rng.exponential(size=rows)
    return {"far": far, "long": far + 0.1 * rng.normal(size=rows), "noise": rng.normal(size=rows)}


def spec_of(table: pa.Table) -> tuple[ProfileSpec, Encoder]:
    encoder = Encoder.fit([Feature(name, "numeric", "direct") for name in NAMES], table.select, EncodeConfig())
    return ProfileSpec.fit(encoder, table.select, None, related=NAMES), encoder


def shares(spec: ProfileSpec, values: dict[str, np.ndarray]) -> np.ndarray:
    """Of the bins of the first conditional column, without missing values."""
    counts = Profile.count(spec, pa.table(values)).conditional[0, 1:]
    return np.asarray(counts / counts.sum())


def test_a_relation_has_one_conditional_column_and_shuffling_moves_its_rows() -> None:
    spec, _ = spec_of(pa.table(drawn(6_000)))
    assert len(spec.conditional) == 1
    assert {spec.conditional[0].value, *spec.conditional[0].given} >= {"far", "long"}
    fresh = drawn(4_000, 1)
    assert np.abs(shares(spec, fresh) - 1 / BINS).max() < 0.03
    shuffled = shares(spec, {**fresh, "long": np.random.default_rng(2).permutation(fresh["long"])})
    assert shuffled[0] + shuffled[-1] > 0.7  # its own distribution is the same


def test_the_tree_is_as_good_as_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    block = rng.integers(0, 8, (4_000, 3)).astype(float)
    target = np.sin(block[:, 0]) + block[:, 1] * (block[:, 2] > 4) + 0.1 * rng.normal(size=4_000)
    cuts = [np.arange(7) + 0.5] * 3
    _, leaf = grow(block, target, cuts)
    theirs = DecisionTreeRegressor(max_depth=DEPTH, min_samples_leaf=round(4_000 / 64)).fit(block, target)
    means = np.array([target[leaf == k].mean() if (leaf == k).any() else 0.0 for k in range(LEAVES)])
    assert np.square(target - means[leaf]).sum() == pytest.approx(np.square(target - theirs.predict(block)).sum())


def test_missing_values_go_left_and_are_counted_apart() -> None:
    values = drawn(5_000)
    values["far"][::10], values["long"][1::10] = np.nan, np.nan
    spec, _ = spec_of(pa.table(values))
    counts = Profile.count(spec, pa.table(values)).conditional[0]
    assert counts[0] == 500 and counts.sum() == 5_000


def test_few_rows_and_few_values_give_no_conditional_column() -> None:
    few = drawn(900)
    assert fit_conditional(few, ()) == ()
    assert fit_conditional({name: np.sign(column) for name, column in drawn(5_000).items()}, ()) == ()


def test_the_most_related_columns_are_chosen_and_named_apart() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=3_000)
    values = {f"c{k}": base + (k + 1) * 0.05 * rng.normal(size=3_000) for k in range(MOST + 4)}
    found = fit_conditional(values, ())
    assert len(found) == MOST
    again = fit_conditional(values, [found[0].name])
    assert again[0].name == f"({found[0].name})"
    assert [dataclasses.replace(item, name="") for item in again] == [
        dataclasses.replace(item, name="") for item in found
    ]


def test_any_split_merges_to_the_same_bytes_and_json_keeps_them(tmp_path: Path) -> None:
    table = pa.table(drawn(3_000))
    spec, encoder = spec_of(table)
    whole = Profile.count(spec, table, threads=3)
    parts = [Profile.count(spec, table.slice(at, 700)) for at in range(0, 3_000, 700)]
    merged = Profile.empty(spec)
    for part in reversed(parts):
        merged = merged.merge(part)
    assert merged.digest == whole.digest
    file = tmp_path / "profile_spec.json"
    file.write_text(json.dumps(spec.to_json()))
    again = ProfileSpec.read(file, encoder)
    assert again == spec and again.digest == spec.digest
    saved = json.loads(json.dumps(whole.to_json()))
    assert Profile.from_json(saved, again).digest == whole.digest
    saved["conditional"][spec.conditional[0].name].pop()
    with pytest.raises(Damaged, match=f"{BINS + 1} counts of 'long given far'|{BINS + 1} counts of 'far given"):
        Profile.from_json(saved, again)


def changed(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The record with other entries of its conditional column."""
    return {**state, "conditional": [{**state["conditional"][0], **more}]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"value": "other"}, "the column 'other', which the encoder has not fitted"),
        ({"given": ["far", "other"]}, "the column 'other'"),
        ({"nodes": [[3, 0.0]] * NODES}, f"{NODES} nodes over its columns"),
        ({"nodes": [[-1, 0.0]] * (NODES - 1)}, f"{NODES} nodes over its columns"),
        ({"edges": [[1.0, 0.0]] * LEAVES}, "ascending lists of edges"),
        ({"edges": [[0.0] * BINS] * LEAVES}, "ascending lists of edges"),
        ({"name": "noise"}, "a name of its own"),
    ],
)
def test_a_hostile_conditional_column_is_damaged(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    spec, encoder = spec_of(pa.table(drawn(2_000)))
    file = tmp_path / "profile_spec.json"
    file.write_text(json.dumps(changed(json.loads(json.dumps(spec.to_json())), **more)))
    with pytest.raises(Damaged, match=message):
        ProfileSpec.read(file, encoder)


def test_too_many_conditional_columns_are_damaged(tmp_path: Path) -> None:
    spec, encoder = spec_of(pa.table(drawn(2_000)))
    state = json.loads(json.dumps(spec.to_json()))
    state["conditional"] = [{**state["conditional"][0], "name": f"n{k}"} for k in range(MOST + 1)]
    file = tmp_path / "profile_spec.json"
    file.write_text(json.dumps(state))
    with pytest.raises(Damaged, match=f"at most {MOST} conditional columns"):
        ProfileSpec.read(file, encoder)
