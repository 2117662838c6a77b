"""Inputs that are called like what monitoring calls its own are monitored like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.features import EncodeConfig
from engine.config.sections.monitoring import BusinessConfig
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.profile import Profile, ProfileSpec, category_label
from engine.monitoring import history
from engine.monitoring.business import check_expressions
from engine.monitoring.column_findings import Pair
from engine.monitoring.drift import manual_lines
from engine.monitoring.reference import read_reference
from engine.monitoring.statistics import column_specs, profile_counts
from engine.runtime import storage
from engine.training.drift_reference import days_table
from tests.monitoring import synthetic

OWN = ("prediction", "(prediction)", "(rows)", "", "()", "((rows))")


def draws(names: list[str], moved: str | None = None) -> synthetic.Draw:
    def draw(rng: np.random.Generator, day: int, rows: int) -> dict[str, object]:
        return {name: rng.normal(5.0 if name == moved else 0.0, 1, rows) for name in names}

    return draw


@settings(max_examples=8)
@given(st.lists(st.sampled_from(OWN), min_size=1, max_size=4, unique=True), st.data())
def test_only_the_input_that_moved_alarms_whatever_it_is_called(names: list[str], data: st.DataObject) -> None:
    moved = data.draw(st.sampled_from(names))
    reference = synthetic.make_reference(draws(names), days=40, rows=60)
    assert reference.rows.tolist() == [60.0] * 40
    drift = synthetic.run_drift(reference, synthetic.make_window(reference, draws(names, moved), 7, 60))
    found = synthetic.status(drift)
    assert len(drift.columns) == len(found) == len(names) + 2  # and predictions, and the number of rows
    assert {name for name, status in found.items() if status == "alarm"} == {moved}
    assert {item["kind"] for item in drift.columns if item["name"] in names} == {"numeric"}
    assert [item["kind"] for item in drift.columns[-2:]] == ["prediction", "volume"]


def test_names_that_meet_nobody_stay_as_they_were() -> None:
    reference = synthetic.make_reference(draws(["x"]), days=20, rows=20)
    assert [item.name for item in reference.columns] == ["x", "prediction"] and reference.rows_column == "(rows)"


def test_days_of_an_input_called_prediction_are_apart_from_the_model_s_own() -> None:
    table = pa.table({"prediction": np.arange(50.0), "": np.arange(50.0)})
    encoder = Encoder.fit(synthetic.features_of(table), table.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, table.select, np.linspace(0, 1, 50))
    profile = Profile.count(spec, table, np.full(50, 2.0, np.float32))
    written = days_table(spec, {7: profile}).group_by("column").aggregate([("count", "sum")])
    assert dict(zip(written["column"].to_pylist(), written["count_sum"].to_pylist(), strict=True)) == {
        "()": 50, "prediction": 50, "": 50, "(prediction)": 50,
    }  # fmt: skip
    counts = profile_counts(profile)
    assert list(counts) == [item.name for item in column_specs(spec)] == ["prediction", "", "(prediction)"]
    assert counts["(prediction)"].values[0, -1] == 50 and counts["prediction"].values[0, -1] == 0


def test_a_reference_in_which_an_older_engine_mixed_them_is_refused(tmp_path: Path) -> None:
    table = pa.table({"prediction": np.arange(50.0)})
    encoder = Encoder.fit(synthetic.features_of(table), table.select, EncodeConfig())
    spec = ProfileSpec.fit(encoder, table.select, np.linspace(0, 1, 50))
    days = days_table(spec, {7: Profile.count(spec, table, np.zeros(50, np.float32))})
    mixed = pa.array([name.strip("()") for name in days["column"].to_pylist()])
    state = {"format": 1, "importance": {}, "predictions_in_sample": False, "profile": Profile.empty(spec).to_json()}
    storage.write_json(tmp_path / "reference.json", state)
    storage.write_json(tmp_path / "profile_spec.json", spec.to_json())
    storage.write_parquet(tmp_path / "reference.parquet", days)
    assert [item.name for item in read_reference(tmp_path, encoder).columns] == ["prediction", "(prediction)"]
    storage.write_parquet(tmp_path / "reference.parquet", days.set_column(1, "column", mixed))
    with pytest.raises(UserError, match=r"mixes the input 'prediction' .* train the model again"):
        read_reference(tmp_path, encoder)


def test_a_threshold_that_could_mean_two_columns_is_refused_and_its_advice_works() -> None:
    reference = synthetic.make_reference(draws(["a", "a.psi", "a.ks"]), days=20, rows=20)
    with pytest.raises(UserError, match=r"write 'a\.psi\.psi' for the column, 'a' for the other"):
        manual_lines(reference, {"a.psi": 0.2})
    places = [item.name for item in reference.columns]
    found = manual_lines(reference, {"a.psi.psi": 0.2, "a": 0.3, "a.ks.psi": 0.4})
    assert [(places[at], value) for at, _, value in found] == [("a.psi", 0.2), ("a", 0.3), ("a.ks", 0.4)]
    with pytest.raises(UserError, match=r"'a\.ks\.psi' for the column"):
        manual_lines(reference, {"a.ks": 0.2})


def test_a_business_metric_called_like_a_metric_or_a_column_keeps_its_own_row() -> None:
    rows = [
        {"source": "current", "from": "a", "to": "b", "model": "m", "column": "x", "kind": kind, "value": value}
        for kind, value in (("numeric", None), ("metric", 0.7), ("business", 12.0))
    ]
    assert history.history_table([*rows, rows[2] | {"value": 13.0}])["value"].to_pylist() == [None, 0.7, 13.0]


def test_a_business_expression_does_not_read_the_model_s_score_for_a_column_of_that_name() -> None:
    both = pa.schema({"fare": pa.float64(), "label": pa.float64()})
    asked = {"a": BusinessConfig(expression="mean(score * fare)"), "b": BusinessConfig(expression="mean(label)")}
    assert check_expressions(asked, both, 0, "label") == ["fare"]  # the label is the target
    with pytest.raises(UserError, match=r"monitor\.business\.a reads 'score', which is both an output of the model"):
        check_expressions(asked, pa.schema({"fare": pa.float64(), "score": pa.float64()}), 0, "late")
    with pytest.raises(UserError, match=r"monitor\.business\.b reads 'label'"):
        check_expressions(asked, both, 0, "late")


@given(st.lists(st.sampled_from(["(null)", "(unseen)", "(rare)", "'(rare)'", "a"]), min_size=1, max_size=5))
def test_categories_called_like_the_engine_s_words_are_counted_apart(values: list[str]) -> None:
    column = pa.array([*values, None, "b"], pa.string())
    table = pa.table({"c": column})
    encoder = Encoder.fit(synthetic.features_of(table), table.select, EncodeConfig(min_count=1))
    spec = ProfileSpec.fit(encoder, table.select, np.zeros(2))
    counts = profile_counts(Profile.count(spec, table))["c"]
    spec_of_c = column_specs(spec)[0]
    pair = Pair(spec_of_c, counts, counts)
    assert sum(pair.levels(counts).values()) == len(values) + 1 and len(pair.levels(counts)) == len({*values, "b"})
    labels = [category_label(encoder.categorical_[0], code) for code in range(encoder.categorical_[0].size)]
    assert json.dumps(labels[:3]) == '["(null)", "(unseen)", "(rare)"]' and not set(labels[:3]) & set(labels[3:])
