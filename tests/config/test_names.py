"""A name stands for one thing: two features, a feature and a word of the engine's, two columns that SQL takes for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import feature_names, names, schema
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.sections.lifecycle import BacktestConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.features.spec import feature_list
from tests import tiny

COLUMNS = {
    "id": {"type": "string", "role": "id", "known_at": "prior"},
    "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
    "shop": {"type": "string", "role": "categorical", "known_at": "prior"},
    "amount": {"type": "float64", "role": "numeric", "known_at": "prior"},
}


NUMBER = {"type": "float64", "role": "numeric", "known_at": "prior"}
WINDOW = {"entity": ["shop"], "windows": ["7d"], "aggregates": {"rows": ["count"]}}
HOUR = {"column": "at", "parts": ["hour"]}
TABLES = {"side": {"static": True, "columns": {"shop": {"type": "string"}, "count_7d": {"type": "float64"}}}}


def config(columns: dict[str, Any] | None = None, **features: Any) -> Config:
    declared = {**COLUMNS, **(columns or {})}
    sources = {"orders": {"path": "o.csv", "columns": {name: item["type"] for name, item in declared.items()}}}
    data = {"sources": sources, "columns": declared, "tables": TABLES}
    return schema.build(Config, {"data": data, "features": {"as_of": "at", **features}})


def expression(*outputs: str) -> dict[str, Any]:
    return {"kind": "expression", "expressions": {name: "amount + 1" for name in outputs}}


def function(*outputs: str) -> dict[str, Any]:
    return {"kind": "function", "function": "f", "inputs": ["amount"], "outputs": dict.fromkeys(outputs, "float64")}


COLLISIONS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "column and window": (
        {"shop_count_7d": NUMBER},
        {"direct": {"shop_count_7d": True}, "views": {"shop": WINDOW}},
        ["features.direct.shop_count_7d", "features.views.shop.aggregates.rows (count of 7d)"],
    ),
    "column and calendar": (
        {"at_hour": NUMBER},
        {"direct": {"at_hour": True}, "calendar": {"at": HOUR}},
        ["features.direct.at_hour", "features.calendar.at.parts (hour)"],
    ),
    "column and cyclic calendar": (
        {"at_hour_sin": NUMBER},
        {"direct": {"at_hour_sin": True}, "calendar": {"at": {**HOUR, "cyclic": True}}},
        ["features.direct.at_hour_sin", "features.calendar.at.parts (hour)"],
    ),
    "calendar and window": (
        {},
        {"calendar": {"a_b": HOUR}, "views": {"a": expression("b_hour")}},
        ["features.calendar.a_b.parts (hour)", "features.views.a.expressions.b_hour"],
    ),
    "two windows views": (
        {"b": NUMBER},
        {"views": {"a": {**WINDOW, "aggregates": {"b": ["count"]}}, "a_b": WINDOW}},
        ["features.views.a.aggregates.b (count of 7d)", "features.views.a_b.aggregates.rows (count of 7d)"],
    ),
    "one windows view": (
        {"x": NUMBER, "x_ewm": NUMBER},
        {"views": {"a": {**WINDOW, "aggregates": {"x": ["ewm_sum"], "x_ewm": ["sum"]}}}},
        ["features.views.a.aggregates.x (ewm_sum of 7d)", "features.views.a.aggregates.x_ewm (sum of 7d)"],
    ),
    "column and as-of": (
        {"side_count_7d": NUMBER},
        {
            "direct": {"side_count_7d": True},
            "views": {"side": {"kind": "asof", "entity": ["shop"], "table": "side", "columns": ["count_7d"]}},
        },
        ["features.direct.side_count_7d", "features.views.side.columns.count_7d"],
    ),
    "expression and function": (
        {},
        {"views": {"a": expression("b_c"), "a_b": function("c")}},
        ["features.views.a.expressions.b_c", "features.views.a_b.outputs.c"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLISIONS)
def test_two_features_of_one_name_are_refused_naming_both(case: str) -> None:
    columns, features, both = COLLISIONS[case]
    made = config(columns, **features)
    with pytest.raises(UserError) as error:
        feature_names.check(made)
    assert all(origin in str(error.value) for origin in both), error.value
    assert "aliases: [" in str(error.value)


FEW = st.sampled_from(["a", "b", "a_b", "b_count", "count", "hour", "a_hour"])


@st.composite
def any_features(draw: st.DrawFn) -> dict[str, Any]:
    def some(values: st.SearchStrategy[Any]) -> dict[str, Any]:
        return draw(st.dictionaries(FEW, values, max_size=3))

    windows = st.fixed_dictionaries({
        "entity": st.just(["shop"]), "windows": st.lists(st.sampled_from(["1d", "7d"]), min_size=1, max_size=2),
        "aggregates": st.dictionaries(st.sampled_from(["rows", "a", "b"]), st.just(["count"]), min_size=1, max_size=2),
    })  # fmt: skip
    expressions = st.lists(FEW, min_size=1, max_size=2, unique=True).map(lambda outputs: expression(*outputs))
    calendars = st.booleans().map(lambda cyclic: {**HOUR, "cyclic": cyclic})
    return {
        "direct": some(st.just(True)), "calendar": some(calendars), "views": some(st.one_of(windows, expressions)),
    }  # fmt: skip


@given(any_features())
def test_a_config_is_refused_exactly_when_two_of_its_features_have_one_name(features: dict[str, Any]) -> None:
    made = config(dict.fromkeys(["a", "b", "a_b", "b_count", "count", "hour", "a_hour"], NUMBER), **features)
    called = [item.name for item in feature_list(made.data, made.features)]
    if len(set(called)) == len(called):
        feature_names.check(made)
    else:
        with pytest.raises(UserError, match="a name must be unique"):
            feature_names.check(made)


def test_views_that_are_left_out_take_no_name() -> None:
    feature_names.check(
        config({"shop_count_7d": NUMBER}, direct={"shop_count_7d": True}, views={"shop": WINDOW}, windows=False)
    )
    feature_names.check(config({"shop_count_7d": NUMBER}, direct={"shop_count_7d": False}, views={"shop": WINDOW}))


# ---------------------------------------------------------------------------------------------- words and folders


def edited(**data: Any) -> Config:
    made = schema.plain(config())["data"]
    return schema.build(Config, {"data": {**made, **data}})


@pytest.mark.parametrize(("make", "found"), [
    (lambda: config({"prior": {"type": "timestamp", "known_at": "prior"}}), "data.columns.prior is a time column"),
    (lambda: config({"rows": NUMBER}, views={"shop": WINDOW}), "data.columns.rows is a column"),
    (lambda: config({"$number": NUMBER}), "is reserved by the engine"),
    (lambda: config(views={".inputs": WINDOW}), "found '.inputs'"),
    (lambda: config(views={"shop/recent": WINDOW}), "found 'shop/recent'"),
    (lambda: edited(name="a/b"), "found 'a/b'"),
    (lambda: edited(tables={"x/y": {"query": "SELECT 1", "columns": {"k": {"type": "int64"}}}}), "found 'x/y'"),
])  # fmt: skip
def test_a_word_of_the_engine_s_as_a_name_is_refused(make: Callable[[], Config], found: str) -> None:
    with pytest.raises(UserError) as error:
        feature_names.check(make())
    assert found in str(error.value)


@pytest.mark.parametrize("name", feature_names.OUTPUT)
def test_an_event_time_called_like_a_column_of_the_output_is_refused(name: str) -> None:
    columns = {"id": COLUMNS["id"], name: COLUMNS["at"]}
    source = {"path": "o.csv", "columns": {key: item["type"] for key, item in columns.items()}}
    with pytest.raises(UserError, match=f"data.columns.{name} has role event_time"):
        feature_names.check(schema.build(Config, {"data": {"sources": {"orders": source}, "columns": columns}}))


HOSTILE = [
    "../x",
    "..",
    ".",
    "/etc/x",
    "x/../../y",
    "a/b",
    ".hidden",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "..\\x",
    "x" * 201,
    "é" * 101,
]


@pytest.mark.parametrize("slot", ["data.name", "data.sources", "data.tables", "features.views", "backtest.policies"])
@given(name=st.one_of(st.sampled_from([*HOSTILE, ""]), st.text(max_size=12), st.text(alphabet="./\\ax", max_size=6)))
def test_a_name_that_becomes_a_folder_stays_where_it_is_put_whoever_wrote_the_specification(
    slot: str, name: str
) -> None:
    section, _, key = slot.partition(".")
    value: Any = {
        "name": name,
        "sources": {name: {"path": "o.csv", "columns": {"id": "string"}}},
        "tables": {name: {"query": "SELECT 1", "columns": {"k": {"type": "int64"}}}},
        "views": {name: WINDOW},
        "policies": {name: {}},
    }[key]
    try:
        schema.build(
            {"data": DataConfig, "features": FeaturesConfig, "backtest": BacktestConfig}[section], {key: value}
        )
    except UserError as error:
        assert slot != "data.name" or name
        assert "must be names of folders" in str(error)
        return
    assert name not in HOSTILE
    if name:
        place = Path("/store", name)
        assert (
            place.parent == Path("/store") and place.name == name and len(name.encode("utf-8", "surrogatepass")) < 201
        )


@pytest.mark.parametrize("name", ["reise-2024", "größe", "a b", "x.y", "$t", "日本"])
def test_a_name_of_letters_spaces_dots_and_signs_is_one_of_a_folder(name: str) -> None:
    names.folder(name)
    names.folder({name: 1})


# -------------------------------------------------------------------------------------------------------- SQL


def test_columns_that_sql_takes_for_one_are_refused_where_sql_sees_them() -> None:
    double = {"Amount": NUMBER}
    feature_names.check(config(double))  # nothing but files: both are read by their exact name
    with pytest.raises(UserError, match=r"'amount' and 'Amount', which differ in case only, of data.columns.amount"):
        feature_names.check(config(double, views={"a": expression("b")}))
    for change in ({"query": "SELECT * FROM orders"}, {"rules": {"positive": {"holds": "amount > 0"}}}):
        plain = schema.plain(config(double))["data"]
        with pytest.raises(UserError, match="which differ in case only"):
            feature_names.check(schema.build(Config, {"data": {**plain, **change}}))


def test_sources_that_sql_takes_for_one_are_refused() -> None:
    plain = schema.plain(config())["data"]
    plain["sources"]["Orders"] = plain["sources"]["orders"]
    feature_names.check(schema.build(Config, {"data": {**plain, "name": "orders"}}))
    with pytest.raises(UserError, match=r"data.sources.orders and of data.sources.Orders"):
        feature_names.check(schema.build(Config, {"data": {**plain, "query": "SELECT * FROM orders"}}))


# ----------------------------------------------------------------------------------------------- from the shell


def called(folder: Path, name: str, *aliases: str) -> list[str]:
    """The tiny experiment with its column `size` under another name; words of the command line."""
    for part, path in ((part, folder / "conf" / part / "tiny.yaml") for part in ("data", "features")):
        tree = yaml.safe_load((tiny.DATA if part == "data" else tiny.FEATURES).replace("size", name))
        if part == "data":
            source = tree["sources"]["visits"]["columns"]
            source[name] = {"type": source[name], "aliases": ["size", *aliases]}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return ["--config-dir", str(folder / "conf"), *tiny.overrides(folder)]


def test_the_shell_refuses_before_anything_is_read_and_its_advice_works(
    workplace: Path, cli: Callable[..., Any]
) -> None:
    folder = tiny.write_tiny(workplace, rows=50)
    refused = cli("features", *called(folder, "shop_count_2d"))
    assert refused.code == 1 and "aliases: [shop_count_2d]" in refused.err and "Traceback" not in refused.err
    assert "features.direct.shop_count_2d" in refused.err and "features.views.shop.aggregates.rows" in refused.err
    assert not (folder / "store").exists()
    assert cli("features", *called(folder, "width", "shop_count_2d")).code == 0
