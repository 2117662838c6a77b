"""The reference in the bundle: days add up to the whole, and what is sensitive stays out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from engine.config.sections.data import Column, DataConfig, SourceColumn, SourceConfig
from engine.config.sections.features import EncodeConfig, FeaturesConfig
from engine.config.tree import Config
from engine.config.units import Moment
from engine.data.calendar import local_days
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec
from engine.features.spec import Feature, sensitive_features
from engine.monitoring.reference import day_counts
from engine.monitoring.statistics import column_specs, profile_counts
from engine.training.classes import target_values
from engine.training.drift_reference import days_table, permutation_importance
from engine.training.row_sample import sample_table

FEATURES = [Feature("x", "numeric", "direct"), Feature("c", "categorical", "direct"), Feature("y", "numeric", "direct")]


def rows(n: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, n)
    x[::7], x[1::11] = np.nan, np.inf
    kinds = [None if k == 0 else f"k{k}" for k in rng.integers(0, 5, n)]
    return pa.table({"x": pa.array(x, from_pandas=True), "c": kinds, "y": rng.integers(0, 3, n) * 1.0})


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    table = rows(300, 0)
    return Encoder.fit(FEATURES, table.select, EncodeConfig(min_count=1))


def test_days_written_and_read_back_add_up_to_the_whole(encoder: Encoder) -> None:
    train = rows(300, 0)
    spec = ProfileSpec.fit(encoder, train.select, np.linspace(0, 1, 50))
    # Far outside the edges, and a day without predictions.
    days = {10: Profile.count(spec, rows(40, 1), np.linspace(-1, 2, 40, dtype=np.float32))}
    days[12] = Profile.count(spec, rows(30, 2))
    numbers, per_day, counts = day_counts(column_specs(spec), days_table(spec, days))
    assert numbers.tolist() == [10, 11, 12]
    assert per_day.tolist() == [40, 0, 30]
    whole = profile_counts(days[10].merge(days[12]))
    for name, item in counts.items():
        for part in ("values", "missing", "infinite"):
            assert getattr(item, part).sum(axis=0).tolist() == getattr(whole[name], part)[0].tolist(), (name, part)
        assert item.far.sum(axis=0) == pytest.approx(whole[name].far[0])
    assert counts["prediction"].rows.tolist() == [40, 0, 0]


def test_local_days_follow_the_zone_not_utc() -> None:
    times = pa.array(
        [1_370_044_800_000_000, 1_370_062_800_000_000], pa.timestamp("us", tz="UTC")
    )  # 2013-06-01 00:00, 05:00
    assert np.diff(local_days(times, "UTC")).tolist() == [0]
    assert np.diff(local_days(times, "America/New_York")).tolist() == [1]


def test_importance_is_the_change_of_the_score_and_nothing_for_what_the_model_ignores(encoder: Encoder) -> None:
    numeric, codes = encoder.transform(rows(200, 3))
    found = permutation_importance(encoder, lambda values, _: 2.0 * values[:, 0], numeric, codes)
    assert found["x"] > 0.5
    assert found["c"] == found["y"] == 0.0
    by_code = permutation_importance(encoder, lambda _, c: c[:, 0].astype(float), numeric, codes)
    assert by_code["c"] > 0 and by_code["x"] == 0
    before = numeric.copy()
    permutation_importance(encoder, lambda values, _: values[:, 0], numeric, codes)
    assert np.array_equal(before, numeric)


def test_sensitive_columns_are_not_in_the_sample(encoder: Encoder) -> None:
    columns = {
        "id": Column(type="int64", role="id"),
        "at": Column(type="timestamp", role="event_time", known_at=Moment("prior")),
        "x": Column(type="float64", role="numeric", known_at=Moment("prior"), sensitive=True),
        "c": Column(type="string", role="categorical", known_at=Moment("prior")),
        "y": Column(type="float64", role="numeric", known_at=Moment("prior")),
    }
    source = SourceConfig(path="x.csv", columns={"id": SourceColumn(type="int64")})
    features = FeaturesConfig(as_of=Moment("at"), direct={"x": True, "c": True, "y": True})
    config = Config(data=DataConfig(name="d", sources={"s": source}, columns=columns), features=features)
    assert sensitive_features(config.data, config.features) == ["x"]
    table = sample_table(config, encoder, np.zeros(5, np.int32), *encoder.transform(rows(5, 1)))
    assert not [name for name in table.column_names if ":x" in name]
    assert "category:c" in table.column_names
    open_ = dataclasses.replace(
        config.data, columns={**columns, "x": dataclasses.replace(columns["x"], sensitive=False)}
    )
    shown = sample_table(
        dataclasses.replace(config, data=open_), encoder, np.zeros(5, np.int32), *encoder.transform(rows(5, 1))
    )
    assert "numeric:x" in shown.column_names


def test_values_of_a_sensitive_category_are_numbered_not_named(encoder: Encoder) -> None:
    spec = ProfileSpec.fit(encoder, rows(300, 0).select, np.linspace(0, 1, 50), sensitive=["c"])
    labels = next(item for item in column_specs(spec) if item.name == "c").labels
    assert labels == ("(unseen)", "(rare)", "(value 1)", "(value 2)", "(value 3)", "(value 4)")
    open_ = ProfileSpec.fit(encoder, rows(300, 0).select, np.linspace(0, 1, 50))
    named = next(item for item in column_specs(open_) if item.name == "c").labels
    assert sorted(named[2:]) == ["k1", "k2", "k3", "k4"]


def test_targets_are_numbers_or_class_places_and_unknown_is_nan() -> None:
    assert target_values(pa.chunked_array([[1.5, None]]), ())[0] == 1.5
    found = target_values(pa.chunked_array([["b", "a", None, "new"]]), ("a", "b"))
    assert found[:2].tolist() == [1.0, 0.0]
    assert np.isnan(found[2:]).all()
