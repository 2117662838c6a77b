"""Rows in the place of sensitive ones give features of the same kind and hold none of the values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.errors import UserError
from engine.training.surrogates import hidden, stand_in

DATA = {
    "name": "d",
    "sources": {"s": {"path": "x.csv", "columns": {"id": "int64", "pay": {"type": "float64", "sensitive": True}}}},
    "columns": {
        "id": {"type": "int64", "role": "id", "sensitive": True},
        "at": {"type": "timestamp", "role": "event_time", "known_at": "prior", "sensitive": True},
        "who": {"type": "string", "role": "entity", "known_at": "prior", "sensitive": True},
        "pay": {"type": "float64", "known_at": "prior"},
        "small": {"type": "int8", "known_at": "prior", "sensitive": True},
        "born": {"type": "date", "known_at": "prior", "sensitive": True},
        "open": {"type": "float64", "known_at": "prior"},
    },
}
FEATURES = {
    "as_of": "at",
    "direct": {"who": True, "pay": True, "small": True, "open": True},
    "views": {
        "past": {"entity": ["who"], "windows": ["1d"], "aggregates": {"pay": ["max"]}},
        "made": {
            "kind": "expression",
            "expressions": {"digits": {"sql": "CAST(substr(who, 2) AS INTEGER)", "type": "int64"}},
        },
    },
}


def rows() -> pa.Table:
    at = 1_577_836_800_000_000 + np.arange(12) * 3_600_000_000
    return pa.table(
        {
            "id": pa.array(np.arange(12) + 7_000_001),
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
            "who": pa.array([None if i == 3 else f"p{i % 4}" for i in range(12)]),
            "pay": pa.array(np.arange(12) + 7000.125),
            "small": pa.array(np.arange(12), pa.int8()),
            "born": pa.array(np.arange(12), pa.int32()).cast(pa.date32()),
            "open": pa.array(np.arange(12) + 0.5),
        }
    )


@pytest.mark.parametrize("view", ["past", "made"])
def test_values_go_and_what_is_equal_null_or_open_stays(view: str) -> None:
    plan = {**FEATURES, "views": {view: FEATURES["views"][view]}}  # type: ignore[index]
    data, features = schema.build(DataConfig, DATA, "data"), schema.build(FeaturesConfig, plan, "features")
    table = rows()
    assert data.columns["pay"].sensitive and hidden(data, table.column_names, {})
    probes, history, _, found = stand_in(data, features, table, table, {}, "")
    assert probes.schema == table.schema and probes["open"].equals(table["open"]) and probes["at"].equals(table["at"])
    assert probes.equals(history) and found.num_rows == 12
    for name in ("id", "who", "pay"):
        assert not set(probes[name].drop_null().to_pylist()) & set(table[name].to_pylist())
    who = probes["who"].to_pylist()
    assert probes["born"].null_count == 12 and len(set(probes["id"].to_pylist())) == 12
    if view == "past":
        pay = np.asarray(probes["pay"])
        assert 6990 < pay.mean() < 7020 and len(set(pay)) == 12
        assert (who[0] == who[4] == who[8]) and who[3] is None and len(set(who)) == 5
    else:  # an HMAC has no digits where the expression looks for them
        assert who == [None] * 12
    assert stand_in(data, features, table, table, {}, "")[0].equals(probes)


def test_nothing_is_hidden_where_nothing_is_sensitive() -> None:
    data = schema.build(DataConfig, DATA, "data")
    assert not hidden(data, ["open"], {})


def test_a_function_that_fails_on_nulls_too_says_so() -> None:
    plan = {**FEATURES, "views": {"made": {"kind": "expression", "expressions": {
        "d": {"sql": "CASE WHEN born IS NULL THEN CAST('x' AS INTEGER) ELSE 1 END", "type": "int64"}}}}}  # fmt: skip
    data, features = schema.build(DataConfig, DATA, "data"), schema.build(FeaturesConfig, plan, "features")
    with pytest.raises(UserError, match="Conversion Error"):
        stand_in(data, features, rows(), rows(), {}, "")
