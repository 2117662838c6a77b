"""What is wrong with a sensitive column is said by column and row, and its values by nobody: by no library, rule or function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import schema
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.data.expressions import evaluate
from engine.errors import UserError
from engine.features import functions
from engine.features.compute import raw_features
from tests.data.helpers import build, config

CANARY = "c4nary"
SOURCE: dict[str, Any] = {
    "path": "x.csv",
    "columns": {"id": "int64", "at": "timestamp", "who": {"type": "string", "sensitive": True}, "n": "int64"},
}
COLUMNS: dict[str, Any] = {
    "id": {"type": "int64", "role": "id"},
    "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
    "who": {"type": "string"},
    "n": {"type": "int64"},
}
TEXT = "id,at,who,n\n" + "".join(f"{i},2020-01-0{1 + i},c4nary-{i},{i}\n" for i in range(6))


def data(**changes: Any) -> dict[str, Any]:
    return {"name": "d", "sources": {"x": SOURCE}, "columns": COLUMNS, "max_quarantine": 1.0, **changes}


def who(**changes: Any) -> dict[str, Any]:
    return {**COLUMNS, "who": {**COLUMNS["who"], **changes}}


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a query that casts": (
        data(query='SELECT id, "at", who, CAST(who AS INT) AS n FROM "x"'),
        TEXT,
        "Conversion Error",
    ),
    "a query of a side table": (
        data(
            tables={
                "t": {
                    "query": 'SELECT CAST(who AS INT) AS k FROM "x"',
                    "columns": {"k": {"type": "int64", "role": "id"}},
                }
            }
        ),
        TEXT,
        "Conversion Error",
    ),
    "a rule that casts": (data(rules={"r": {"holds": "CAST(who AS INT) > 0"}}), TEXT, "Conversion Error"),
    "a cast to another type": (
        data(columns={**COLUMNS, "who": {"type": "int64", "on_violation": "fail"}}),
        TEXT,
        "'who'",
    ),
    "a bound": (data(columns=who(max="a", on_violation="fail")), TEXT, "'who'"),
    "values": (data(columns=who(values=["a"], on_violation="fail")), TEXT, "'who'"),
    "a key": (data(columns=who(role="id")), TEXT + TEXT.split("\n", 1)[1], "must be unique"),
    "a key beside others": (data(), TEXT + "5,2020-01-06,c4nary-other,5\n", "must be unique"),
    "a row with too many fields": (
        data(sources={"x": {**SOURCE, "csv": {"ragged": "fail"}}}),
        TEXT + "7,2020-01-01,c4nary-7,1,c4nary-8\n",
        "fields",
    ),
    "a type of the source": (
        data(
            sources={
                "x": {
                    **SOURCE,
                    "columns": {
                        **SOURCE["columns"],
                        "who": {"type": "int64", "sensitive": True, "on_violation": "fail"},
                    },
                }
            }
        ),
        TEXT,
        "'who'",
    ),
    "an open quote": (data(), TEXT + '7,2020-01-01,"c4nary-7,1\n', ""),
    "no UTF-8": (data(), TEXT + "7,2020-01-01,c4nary-\udcff,1\n", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_ingest_names_the_column_and_quotes_no_value(case: str, tmp_path: Path, capfd) -> None:
    plan, text, said = CASES[case]
    (tmp_path / "x.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        build(config(tmp_path, {**plan, "path": str(tmp_path)}))
    except UserError as error:
        assert CANARY not in str(error) and said in str(error), error
        assert CANARY not in str(error.__cause__ or "")
    else:
        assert not said
    assert CANARY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_broken_file_of_another_format_quotes_no_value(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"id": [1], "at": ["x"], "who": [CANARY], "n": [1]}), file, compression="none")
        file.write_bytes(file.read_bytes()[:-40] + b"c4nary" * 8)
    else:
        file.write_text('{"id": 1, "who": "c4nary-1", "at": "2020-01-01", "n": c4nary}\n{"who": "c4nary')
    with pytest.raises(UserError) as caught:
        build(
            config(tmp_path, data(sources={"x": {**SOURCE, "path": file.name}}, max_quarantine=0.0, path=str(tmp_path)))
        )
    assert CANARY not in str(caught.value)


def plan_of(view: dict[str, Any]) -> tuple[DataConfig, FeaturesConfig]:
    known = {name: {**column, "known_at": "prior"} for name, column in COLUMNS.items()}
    return (
        schema.build(DataConfig, data(columns=known), "data"),
        schema.build(FeaturesConfig, {"as_of": "at", "views": {"v": view}}, "features"),
    )


ROWS = pa.table(
    {
        "id": [1],
        "at": pa.array([0], pa.timestamp("us", tz="UTC")),
        "who": [f"{CANARY}-1"],
        "n": [7],
    }
)


@pytest.mark.parametrize("sql", ["CAST(who AS INTEGER)", "length(who) + 0.731905"])
def test_an_expression_that_fails_quotes_no_value(sql: str) -> None:
    plan = plan_of({"kind": "expression", "expressions": {"x": {"sql": sql, "type": "int64"}}})
    with pytest.raises(UserError) as caught:
        raw_features(*plan, ROWS, ROWS, {}, 1)
    assert CANARY not in str(caught.value) and "731905" not in str(caught.value).replace(sql, "")
    assert "who" in str(caught.value) or "sensitive" in str(caught.value)
    with pytest.raises(UserError, match=r"c4nary-1|8\.731905"):  # where nothing is sensitive, the reason helps
        evaluate({"x": (sql, "int64")}, ROWS)


def test_a_function_that_fails_quotes_no_value(monkeypatch) -> None:
    class Entry:
        dist = None
        value = "tests"

        @staticmethod
        def load() -> Any:
            def function(rows: pa.Table) -> pa.Table:
                raise KeyError(rows["who"][0].as_py())

            return function

    monkeypatch.setattr(functions, "_found", lambda: {"f": Entry})
    plan = plan_of({"kind": "function", "function": "f", "inputs": ["who"], "outputs": {"x": "float64"}})
    with pytest.raises(UserError, match=r"raised KeyError in .*test_sensitive.py, line \d+") as caught:
        raw_features(*plan, ROWS, ROWS, {}, 1)
    assert CANARY not in str(caught.value)


def test_a_column_of_a_sensitive_source_column_is_sensitive() -> None:
    plan = schema.build(DataConfig, data(), "data")
    assert plan.columns["who"].sensitive and not plan.columns["n"].sensitive and plan.sensitive == ["who"]
    assert CANARY not in json.dumps(schema.plain(plan))
