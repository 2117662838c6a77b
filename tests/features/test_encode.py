"""The fitted encoding: same answer for any row order, aligned by name, separate codes for null, unseen and rare."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from engine.config.sections.features import EncodeConfig
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.spec import Feature
from engine.features.vocabulary import NULL, RARE, UNSEEN, concealed, group_labels, numbered_labels

NUMBER = Feature("x", "numeric", "direct")
CATEGORY = Feature("c", "categorical", "direct")


def fit(table: pa.Table, features: list[Feature], **options: object) -> Encoder:
    return Encoder.fit(features, table.select, EncodeConfig(**options))  # type: ignore[arg-type]


def test_standardise_agrees_with_scikit_learn() -> None:
    values = np.random.default_rng(3).normal(1e6, 3.0, 1000)
    encoder = fit(pa.table({"x": values}), [NUMBER])
    numeric, _ = encoder.transform(pa.table({"x": values}))
    expected = StandardScaler().fit_transform(values[:, None])
    np.testing.assert_allclose(numeric, expected, atol=1e-5)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(width=64)), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
    st.sampled_from(["standardise", "quantile", "ple"]),
)
def test_every_encoded_number_is_finite_and_fit_ignores_row_order(values, random, kind) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    encoder = fit(pa.table({"x": pa.array(values, pa.float64())}), [NUMBER], numeric=kind)
    again = fit(pa.table({"x": pa.array(shuffled, pa.float64())}), [NUMBER], numeric=kind)
    assert encoder.digest == again.digest
    numeric, _ = encoder.transform(pa.table({"x": pa.array([*values, math.inf, -math.inf, 1e308], pa.float64())}))
    assert np.isfinite(numeric).all()


def test_constant_column_gives_zero_and_missing_gets_its_own_column() -> None:
    encoder = fit(pa.table({"x": [5.0, 5.0, None]}), [NUMBER])
    numeric, _ = encoder.transform(pa.table({"x": [5.0, 6.0, None]}))
    assert encoder.numeric_names == ["x", "x_missing"]
    assert numeric.tolist() == [[0, 0], [0, 0], [0, 1]]


def test_all_null_column_gives_zeros() -> None:
    encoder = fit(pa.table({"x": pa.nulls(3, pa.float64())}), [NUMBER])
    assert encoder.transform(pa.table({"x": [1.0, None, 3.0]}))[0][:, 0].tolist() == [0, 0, 0]


def test_unseen_null_and_rare_have_codes_of_their_own() -> None:
    # Field report D5: an unseen id must never take the code of the nearest known one.
    encoder = fit(pa.table({"c": [1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 9]}), [CATEGORY], min_count=2)
    _, codes = encoder.transform(pa.table({"c": [1, 2, 4, 7, 8, None, 9]}))
    known, unseen, null, rare = codes[:2, 0], codes[2:5, 0], codes[5, 0], codes[6, 0]
    assert len(set(known.tolist())) == 2 and (known > RARE).all()
    assert (unseen == UNSEEN).all() and null == NULL and rare == RARE
    assert encoder.cardinalities == [3 + 5]


def test_codes_do_not_depend_on_fit_order() -> None:
    values = ["b", "a", "b", "c", "a", None]
    first = fit(pa.table({"c": values}), [CATEGORY], min_count=1)
    second = fit(pa.table({"c": values[::-1]}), [CATEGORY], min_count=1)
    assert first.digest == second.digest
    assert first.categorical_[0].known_ == ("a", "b", "c")


def test_columns_are_taken_by_name() -> None:
    # Field report D6: another order of columns gives the same scores; a missing one is an error that names it.
    table = pa.table({"a": [1.0, 2.0], "b": [3.0, 9.0], "c": ["x", "y"]})
    features = [Feature("a", "numeric", "direct"), Feature("b", "numeric", "direct"), CATEGORY]
    encoder = fit(table, features, min_count=1)
    shuffled = table.select(["c", "a", "b"]).append_column("d", pa.array([0, 0]))
    assert encoder.check_columns(shuffled.column_names) == ["d"]
    for left, right in zip(encoder.transform(table), encoder.transform(shuffled), strict=True):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(UserError, match="'b'"):
        encoder.transform(table.drop_columns(["b"]))


def test_state_survives_json(tmp_path) -> None:
    table = pa.table({"x": [1.0, None, 2.5, 1e300], "c": ["ä", "b", None, "ä"]})
    for kind in ("standardise", "quantile", "ple"):
        encoder = fit(table, [NUMBER, CATEGORY], numeric=kind, min_count=1)
        (tmp_path / "features.json").write_text(json.dumps(encoder.to_json(), allow_nan=False))
        again = Encoder.read(tmp_path / "features.json")
        assert again == encoder and again.digest == encoder.digest
        np.testing.assert_array_equal(again.transform(table)[0], encoder.transform(table)[0])


def test_state_of_a_newer_format_is_refused(tmp_path) -> None:
    (tmp_path / "features.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="found 99: use a newer engine"):
        Encoder.read(tmp_path / "features.json")


def test_transform_does_not_edit_its_input() -> None:
    values = np.array([1.0, np.nan, 3.0])
    table = pa.table({"x": values})
    fit(table, [NUMBER]).transform(table)
    np.testing.assert_array_equal(values, [1.0, np.nan, 3.0])


def test_a_null_and_a_text_that_reads_like_one_are_two_groups() -> None:
    column = pa.chunked_array([["None", None, "(null)"], ["nan", None, ""]])
    assert group_labels(column).tolist() == ["None", "(null)", "'(null)'", "nan", "(null)", ""]
    assert group_labels(pa.array([1, None, 2])).tolist() == ["1", "(null)", "2"]


def test_a_sensitive_feature_has_the_same_codes_and_no_text(tmp_path) -> None:
    texts = ["a"] * 5 + ["b"] * 3 + ["rare"] + [None]
    table = pa.table({"c": texts, "open": texts})
    features = [Feature("c", "categorical", "direct"), Feature("open", "categorical", "direct")]
    plain = Encoder.fit(features, table.select, EncodeConfig(min_count=2))
    hidden = Encoder.fit(features, table.select, EncodeConfig(min_count=2), sensitive=["c"])
    rows = pa.table({"c": [None, "new", "rare", "a", "b"], "open": ["a"] * 5})
    assert hidden.transform(rows)[1].tolist() == plain.transform(rows)[1].tolist()
    state = json.dumps(hidden.to_json()["categorical"][0])
    assert not any(f'"{text}"' in state for text in ("a", "b", "rare"))
    (tmp_path / "features.json").write_text(json.dumps(hidden.to_json()))
    assert hidden.categorical_[1] == plain.categorical_[1] and Encoder.read(tmp_path / "features.json") == hidden
    again = Encoder.fit(features, table.take(list(range(9, -1, -1))).select, EncodeConfig(min_count=2), sensitive=["c"])
    assert again.digest == hidden.digest and hidden.to_json()["format"] == 2 and plain.to_json()["format"] == 1
    concealed_rows = rows.set_column(0, "c", concealed(rows["c"], hidden.salt))
    assert hidden.transform(concealed_rows)[1].tolist() == plain.transform(rows)[1].tolist()


def test_labels_of_a_sensitive_column_are_numbers_by_frequency() -> None:
    column = pa.array(["x", "y", "y", None, "a", "x", "y"])
    assert numbered_labels(column).tolist() == [
        "(value 2)", "(value 1)", "(value 1)", "(null)", "(value 3)", "(value 2)", "(value 1)",
    ]  # fmt: skip
