"""Profiles: integers on a fixed specification, the same bytes for any split and order, and the right numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.features import EncodeConfig
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.profile import UNSEEN_KEPT, Profile, ProfileSpec
from engine.features.spec import Feature
from engine.features.vocabulary import NULL, RARE, UNSEEN
from engine.runtime import digest
from kernels.profile import MISSING, NEGATIVE_INFINITE, POSITIVE_INFINITE

FEATURES = [Feature("x", "numeric", "direct"), Feature("c", "categorical", "direct"), Feature("y", "numeric", "direct")]


def raw(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, rows)
    x[::13] = np.nan
    return pa.table(
        {
            "x": pa.array(x, from_pandas=True),
            "c": pa.array([None if i % 7 == 0 else f"k{v}" for i, v in enumerate(rng.integers(0, 6, rows))]),
            "y": np.full(rows, 5.0),
        }
    )


def spec_of(table: pa.Table, scores: np.ndarray | None = None, **options: object) -> ProfileSpec:
    encoder = Encoder.fit(FEATURES, table.select, EncodeConfig(min_count=2))
    return ProfileSpec.fit(encoder, table.select, scores, **options)  # type: ignore[arg-type]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(), st.sampled_from([0.5, -0.0, 1e300, 5e-324])), min_size=1, max_size=60),
    st.data(),
)
def test_any_split_and_order_of_the_rows_gives_the_same_bytes(values, data) -> None:
    train = raw(200)
    spec = spec_of(train, np.linspace(0, 1, 50))
    rows = len(values)
    table = pa.table(
        {
            "x": pa.array(values, pa.float64()),
            "c": pa.array([f"k{i % 9}" for i in range(rows)]),
            "y": pa.array(values[::-1], pa.float64()),
        }
    )
    scores = np.linspace(-1, 2, rows, dtype=np.float32)
    whole = Profile.count(spec, table, scores, threads=2)
    order = np.array(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(0, rows))
    parts = [order[:cut], order[cut:]]
    merged = Profile.empty(spec)
    for part in parts:
        merged = Profile.count(spec, table.take(pa.array(part)), scores[part]).merge(merged)
    assert digest.canonical_json(merged.to_json()) == digest.canonical_json(whole.to_json())
    again = Profile.from_json(whole.to_json(), spec)
    assert again.to_json() == whole.to_json()
    assert digest.canonical_json(again.merge(Profile.empty(spec)).to_json()) == digest.canonical_json(whole.to_json())


def test_counts_are_those_of_a_plain_count() -> None:
    train = raw(500)
    spec = spec_of(train)
    table = pa.table(
        {
            "x": pa.array([math.inf, -math.inf, None, math.nan, -1e9, 1e9, 0.0]),
            "c": pa.array(["k1", "new", "new", "other", None, "k1", "k2"]),
            "y": pa.array([5.0, 5.0, 6.0, 4.0, None, 5.0, 5.0]),
        }
    )
    found = Profile.count(spec, table)
    tail = found.numeric.counts[0, MISSING:]
    assert found.rows == 7
    assert (found.numeric.counts[0, MISSING], found.numeric.counts[0, NEGATIVE_INFINITE]) == (2, 1)
    assert (found.numeric.counts[0, POSITIVE_INFINITE], int(tail.sum())) == (1, 4)
    assert found.numeric.counts[0, 0] == 1  # below
    assert found.numeric.counts[0, spec.numeric[0].bins + 1] == 1  # above
    assert found.numeric.counts[1, :3].tolist() == [1, 4, 1]  # y: below 5, in the one bin of a constant, above
    known = spec.categorical[0].known_
    assert found.categories[0, NULL] == 1
    assert found.categories[0, UNSEEN] == 3
    assert found.categories[0, 3 + known.index("k1")] == 2
    assert found.unseen == ({"new": 2, "other": 1},)


def test_bins_hold_what_numpy_puts_into_them() -> None:
    train = raw(2000)
    spec = spec_of(train)
    values = np.random.default_rng(1).normal(0.3, 1.2, 5000)
    table = pa.table({"x": values, "c": pa.array(["k1"] * 5000), "y": np.full(5000, 5.0)})
    found = Profile.count(spec, table)
    edges = np.array(spec.numeric[0].edges)
    assert found.numeric.counts[0, 1 : len(edges)].tolist() == np.histogram(values, edges)[0].tolist()


def test_rare_and_unseen_are_apart() -> None:
    train = pa.table(
        {
            "x": np.arange(12.0),
            "c": pa.array(["a"] * 5 + ["b"] * 6 + ["once"]),
            "y": np.zeros(12),
        }
    )
    spec = spec_of(train)
    found = Profile.count(spec, train)
    assert (found.categories[0, RARE], found.categories[0, UNSEEN]) == (1, 0)


def test_unseen_categories_beyond_the_limit_are_kept_alike_for_any_split() -> None:
    spec = spec_of(raw(100))
    names = [f"new-{i}" for i in range(3 * UNSEEN_KEPT)] * 2
    table = pa.table({"x": np.zeros(len(names)), "c": names, "y": np.zeros(len(names))})
    whole = Profile.count(spec, table)
    assert len(whole.unseen[0]) == UNSEEN_KEPT
    assert set(whole.unseen[0].values()) == {2}
    for size in (1, 97, 300):
        merged = Profile.empty(spec)
        for low in reversed(range(0, len(names), size)):
            merged = merged.merge(Profile.count(spec, table.slice(low, size)))
        assert merged.to_json() == whole.to_json()


def test_sensitive_columns_keep_no_text() -> None:
    spec = spec_of(raw(100), sensitive=["c", "elsewhere"])
    found = Profile.count(spec, pa.table({"x": [0.0], "c": ["a person's name"], "y": [0.0]}))
    assert found.categories[0, UNSEEN] == 1
    assert "person" not in digest.canonical_json(found.to_json())


def test_multiclass_scores_are_one_column_a_class() -> None:
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], 300).astype(np.float32)
    spec = spec_of(raw(300), scores, classes=["a", "b", "c"])
    assert [item.name for item in spec.predictions] == ["prediction_a", "prediction_b", "prediction_c"]
    found = Profile.count(spec, raw(300), scores)
    assert found.predictions.counts.sum(axis=1).tolist() == [300, 300, 300]


def test_column_without_a_value_in_training_is_counted_not_refused() -> None:
    train = pa.table({"x": pa.nulls(20, pa.float64()), "c": pa.nulls(20, pa.string()), "y": np.zeros(20)})
    spec = spec_of(train)
    assert Profile.count(spec, train).numeric.counts[0, MISSING] == 20


def test_profiles_of_two_models_are_not_merged_and_an_absent_column_is_named() -> None:
    one, two = spec_of(raw(100)), spec_of(raw(100, seed=5))
    with pytest.raises(UserError, match="one specification"):
        Profile.empty(one).merge(Profile.empty(two))
    with pytest.raises(UserError, match="another"):
        Profile.from_json(Profile.empty(one).to_json(), two)
    with pytest.raises(UserError, match="'y'"):
        Profile.count(one, raw(10).drop_columns(["y"]))


def kept(path: Path, value: Any) -> Path:
    """The file, with a record in it."""
    path.write_text(json.dumps(value))
    return path


def test_specification_survives_json(tmp_path) -> None:
    train = raw(300)
    encoder = Encoder.fit(FEATURES, train.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, train.select, np.linspace(0, 1, 40))
    encoding = Encoder.read(kept(tmp_path / "features.json", encoder.to_json()))
    again = ProfileSpec.read(kept(tmp_path / "profile_spec.json", spec.to_json()), encoding)
    assert again.digest == spec.digest
    assert Profile.count(again, train).digest == Profile.count(spec, train).digest


def test_a_specification_of_format_1_counts_and_is_named_as_it_was(tmp_path) -> None:
    train = raw(300)
    encoder = Encoder.fit(FEATURES, train.select, EncodeConfig())
    numeric = [{"name": "x", "edges": [-2.0, 0.0, 2.0], "scale": 1.0}, {"name": "y", "edges": [5.0, 6.0], "scale": 5.0}]
    old = {"format": 1, "numeric": numeric, "categorical": ["c"], "predictions": [], "unnamed": []}
    spec = ProfileSpec.read(kept(tmp_path / "profile_spec.json", old), encoder)
    assert spec.to_json() == old and spec.format == 1
    vocabulary = encoder.categorical_[0]
    assert spec.digest == digest.of_json([old, [["c", vocabulary.known_, vocabulary.rare_]]])
    found = Profile.count(spec, train)
    assert found.to_json()["format"] == 1
    assert Profile.from_json(found.to_json(), spec).digest == found.digest
    assert found.numeric.counts[1, :3].tolist() == [0, 300, 0]
    assert [item.points for item in spec.numeric] == [(None, None), (None,)]
