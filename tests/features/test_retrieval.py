"""Point-in-time retrieval, latest values, the catalog and the leak trial, on a small store."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine.features
from engine.config import schema
from engine.config.compose import compose
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.tree import Config
from engine.data.dataset import Dataset
from engine.data.expressions import evaluate, expression_columns
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import audit, catalog, functions
from engine.features.instants import instants
from engine.features.table import ensure_table
from engine.runtime import storage
from engine.runtime.run import Run
from tests.tiny import overrides, write_tiny

UTC = datetime.UTC


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), 600)


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return compose(overrides(folder), str(folder / "conf")).config


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    run = Run.create("features", config, {})
    found = ensure_dataset(config, run)
    ensure_table(config, run, found)
    run.finish({})
    return found


@pytest.fixture
def shell(cli: Callable[..., Any], folder: Path, dataset: Dataset) -> Callable[..., Any]:
    return lambda *words: cli(*words, *overrides(folder), "--config-dir", str(folder / "conf"))


# ------------------------------------------------------------------------------------------------------- history


def test_history_gives_what_training_saw(config: Config, dataset: Dataset) -> None:
    rows = np.random.default_rng(0).permutation(dataset.rows)[:50]
    events = dataset.read(["shop", "at"]).take(pa.array(rows))
    times = pa.array(instants(events["at"]) - 3_600_000_000, pa.timestamp("us", tz="UTC"))
    asked = pa.table({"who": pa.array(range(50)), "shop": events["shop"], "time": times})
    found = engine.features.history(asked, ["shop"], config=config, dataset=dataset)
    run = Run.create("features", config, {})
    table = ensure_table(config, run, dataset)
    run.finish({})
    stored = table.read((0, dataset.rows)).take(pa.array(rows))
    assert found.column_names[:3] == ["who", "shop", "time"]
    for name in table.views["shop"].columns:
        assert found[name].combine_chunks().equals(stored[name].combine_chunks()), name


@pytest.mark.parametrize("kind", ["pandas", "categories", "polars"])
def test_history_and_latest_give_the_kind_of_table_that_came_in(config: Config, dataset: Dataset, kind: str) -> None:
    events = dataset.read(["shop", "at"]).take(pa.array(range(0, 300, 7)))
    asked = pa.table({"shop": events["shop"], "time": events["at"], "who": pa.array(range(events.num_rows))})
    frame = pl.from_arrow(asked) if kind == "polars" else asked.to_pandas().set_index("who")
    if kind == "categories":
        frame = frame.astype({"shop": "category"})
    found = engine.features.history(frame, "shop", config=config, dataset=dataset)
    plain = engine.features.history(asked, "shop", config=config, dataset=dataset)
    names = plain.column_names[3:]
    assert names[0] == "shop_count_6h" and type(found) is type(frame)
    newest = engine.features.latest("shop", config, dataset, entity=frame[["shop"]])
    assert type(newest) is type(frame)
    if kind == "polars":
        assert found.equals(pl.from_arrow(plain))
        of_shop = dict(newest.select("shop", "shop_amount_mean_2d").iter_rows())
    else:
        pd.testing.assert_frame_equal(found[["shop", "time"]], frame, check_dtype=False, check_categorical=False)
        pd.testing.assert_frame_equal(found[names].reset_index(drop=True), plain.select(names).to_pandas())
        of_shop = dict(zip(newest["shop"], newest["shop_amount_mean_2d"], strict=True))
    every = engine.features.latest("shop", config, dataset).to_pylist()
    assert {row["shop"]: row["shop_amount_mean_2d"] for row in every}.items() <= of_shop.items()


def test_history_refuses_two_views_that_give_one_name(config: Config, dataset: Dataset) -> None:
    window = {"entity": ["shop"], "windows": ["2d"], "aggregates": {"rows": ["count"]}}
    views = {"shop_amount": window, "shop": {**window, "aggregates": {"amount": ["count"]}}}
    table = pa.table({"shop": ["shop-1"], "time": pa.array([datetime.datetime(2020, 1, 20, tzinfo=UTC)])})
    with pytest.raises(
        UserError, match=r"'shop_amount_count_2d' of views\.shop_amount\.aggregates\.rows .* views\.shop\."
    ):
        engine.features.history(table, views, config=config, dataset=dataset)


def test_history_takes_views_that_are_not_in_the_config(config: Config, dataset: Dataset) -> None:
    asked = pa.table({"shop": ["shop-1"], "time": pa.array([datetime.datetime(2020, 1, 20, tzinfo=UTC)])})
    view = {"entity": ["shop"], "windows": ["30d"], "aggregates": {"rows": ["count"]}}
    found = engine.features.history(asked, {"mine": view}, config=config, dataset=dataset)
    events = dataset.read(["shop", "at"])
    before = [
        s == "shop-1" and t < datetime.datetime(2020, 1, 20, tzinfo=UTC)
        for s, t in zip(*(c.to_pylist() for c in events.columns), strict=True)
    ]
    assert found["mine_count_30d"].to_pylist() == [float(sum(before))]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table([["a"], ["b"]], ["shop", "shop"]), "column 'shop' must occur once"),
        (pa.table({"shop": ["a"], "__decision": [1]}), "column '__decision' is reserved for"),
        (pa.table({"shop": ["a"]}), "timestamp column 'time'"),
        (pa.table({"time": pa.array([datetime.datetime(2020, 1, 1, tzinfo=UTC)])}), "column 'shop' of view 'shop'"),
        (
            pa.table(
                {"shop": ["a"], "shop_count_6h": [1], "time": pa.array([datetime.datetime(2020, 1, 1, tzinfo=UTC)])}
            ),
            "already has a column 'shop_count_6h'",
        ),
        (
            pa.table({"shop": [5], "time": pa.array([datetime.datetime(2020, 1, 1, tzinfo=UTC)])}),
            "column 'shop' must be string, as the keys of view 'shop' are, found int64: give that type",
        ),
        (
            pa.table({"shop": [b"a"], "time": pa.array([datetime.datetime(2020, 1, 1, tzinfo=UTC)])}),
            "column 'shop' must be string, as the keys of view 'shop' are, found binary",
        ),
    ],
)
def test_history_says_what_is_wrong(config: Config, dataset: Dataset, table: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.features.history(table, ["shop"], config=config, dataset=dataset)
    with pytest.raises(UserError, match=r"no view 'shp'.*'shop'"):
        engine.features.history(table, ["shp"], config=config, dataset=dataset)


@pytest.mark.parametrize(
    ("times", "found"),
    [
        (pa.array([0, None, 1_500], pa.timestamp("ns")), "1500 ns since 1970 in row 2"),
        (pa.array([0, 10**13], pa.timestamp("s")), "10000000000000 s since 1970 in row 1"),
    ],
)
def test_history_takes_times_of_whole_microseconds_only(
    config: Config, dataset: Dataset, times: pa.Array, found: str
) -> None:
    table = pa.table({"shop": ["shop-1"] * len(times), "time": times})
    with pytest.raises(UserError, match=f"column 'time' must hold whole microseconds.*found {found}: give"):
        engine.features.history(table, ["shop"], config=config, dataset=dataset)


def test_latest_has_the_bytes_of_the_offline_value_at_that_instant(config: Config, dataset: Dataset) -> None:
    row = 500
    probe = dataset.read(["shop", "at"], rows=(row, row + 1))
    at = int(instants(probe["at"])[0]) - 3_600_000_000
    found = engine.features.latest("shop", config, dataset, at, {"shop": probe["shop"][0].as_py()})
    run = Run.create("features", config, {})
    stored = ensure_table(config, run, dataset).read((row, row + 1))
    run.finish({})
    assert found.num_rows == 1
    for name in ("shop_count_6h", "shop_bought_mean_2d", "shop_amount_max_2d"):
        assert found[name].combine_chunks().equals(stored[name].combine_chunks()), name


def test_latest_has_each_entity_once_and_exports(shell: Callable[..., Any], tmp_path: Path) -> None:
    assert shell("features", "latest", "shop", "--out", str(tmp_path / "latest.parquet")).code == 0
    assert shell("features", "latest", "shop", "--out", str(tmp_path / "latest.sqlite")).code == 0
    table = pq.read_table(tmp_path / "latest.parquet")
    assert table["shop"].to_pylist() == [f"shop-{i}" for i in range(8)]
    with sqlite3.connect(tmp_path / "latest.sqlite") as connection:
        rows = connection.execute("SELECT shop, shop_amount_mean_2d FROM latest ORDER BY shop").fetchall()
    assert rows == list(zip(table["shop"].to_pylist(), table["shop_amount_mean_2d"].to_pylist(), strict=True))


# ------------------------------------------------------------------------------------------------------- catalog


def test_exported_instants_are_numbers_and_decimals_dates_and_times_are_text(tmp_path: Path) -> None:
    day, path = datetime.datetime(2020, 1, 2, 3, 4, tzinfo=UTC), tmp_path / "x.sqlite"
    row = {"key": "a", "at": day, "price": decimal.Decimal("1.50"), "day": day.date(), "hour": day.time(), "n": 2}
    catalog.export(pa.Table.from_pylist([row]), ["key"], path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT * FROM latest").fetchall()
    assert found == [("a", 1_577_934_240_000_000, "1.50", "2020-01-02", "03:04:00.000000", 2)]


def test_the_catalog_lists_shows_and_compares(
    shell: Callable[..., Any], config: Config, dataset: Dataset, folder: Path
) -> None:
    listed = json.loads(shell("features", "list", "--json").out)
    assert [(row["view"], row["owner"], row["features"]) for row in listed] == [("shop", "tests", 8)]
    shown = json.loads(shell("features", "show", "shop", "--json").out)
    counts = next(item for item in shown["statistics"] if item["feature"] == "shop_count_2d")
    assert counts["min"] == 0 and counts["max"] > 1
    assert shell("features", "features.views.shop.windows=[6h,3d]").code == 0
    versions = [item["version"] for item in json.loads(shell("features", "show", "shop", "--json").out)["versions"]]
    assert len(versions) == 2
    differing = json.loads(shell("features", "diff", "shop", *versions, "--json").out)
    assert {row["differs"] for row in differing} == {"only in the first", "only in the second"}
    assert all("_6h" not in row["feature"] for row in differing)


def test_gc_keeps_what_a_run_has_named(
    shell: Callable[..., Any], folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("features", "features.views.shop.windows=[6h,4d]")
    versions = {item["version"] for item in json.loads(shell("features", "show", "shop", "--json").out)["versions"]}
    monkeypatch.setattr("engine.features.catalog.KEEP_RECENT", -1)
    assert json.loads(shell("features", "gc", "--json").out) == []
    monkeypatch.setattr("engine.features.catalog.used_directories", lambda config: {})
    assert {row["version"] for row in json.loads(shell("features", "gc", "--json").out)} == versions


def test_gc_takes_what_a_killed_command_has_left_at_once(
    shell: Callable[..., Any], folder: Path, dataset: Dataset
) -> None:
    shell("features")
    left = storage.temporary_name(next((folder / "store" / "features" / "shop").glob("*")))
    left.mkdir()
    assert [row["version"] for row in json.loads(shell("features", "gc", "--json").out)] == [left.name]
    assert shell("features", "gc", "--delete").code == 0 and not left.exists()


def test_a_kill_during_gc_leaves_no_version_that_counts(
    shell: Callable[..., Any], folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("features", "features.views.shop.windows=[6h,5d]")
    versions = json.loads(shell("features", "show", "shop", "--json").out)["versions"]
    stored, killed = folder / "store" / "features", []

    def kill(path: Path, **_: Any) -> None:
        if killed:  # what the killed one has left is removed by the next
            return remove(path)
        killed.append(path)
        raise KeyboardInterrupt

    remove = storage.shutil.rmtree
    monkeypatch.setattr("engine.features.catalog.KEEP_RECENT", -1)
    monkeypatch.setattr("engine.features.catalog.used_directories", lambda config: {})
    monkeypatch.setattr(storage.shutil, "rmtree", kill)
    assert shell("features", "gc", "--delete").code == 130
    left = json.loads(shell("features", "show", "shop", "--json").out)["versions"]
    assert len(left) == len(versions) - 1 and len(list(stored.glob(".removed-*"))) == 1
    assert [row["view"] for row in json.loads(shell("features", "list", "--json").out)] == ["shop"]
    assert shell("features", "gc", "--delete").code == 0 and not list(stored.glob(".removed-*"))


def test_gc_keeps_what_a_run_of_a_backtest_has_named(
    cli: Callable[..., Any], shell: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*overrides(folder), f"paths.runs={folder / 'store' / 'backtest'}", "--config-dir", str(folder / "conf")]
    assert cli("features", "features.views.shop.windows=[6h,7d]", *words).code == 0
    monkeypatch.setattr("engine.features.catalog.KEEP_RECENT", -1)
    assert json.loads(shell("features", "gc", "--json").out) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show",), "name one view, found 0"),
        (("show", "shp"), "no view 'shp'. Did you mean 'shop'"),
        (("latest", "shop", "--entity", "shop"), "COLUMN=VALUE"),
        (("latest", "shop", "--entity", "shp=1"), "no entity column 'shp'"),
        (("latest", "shop", "--out", "x.csv"), ".parquet, .sqlite or .db"),
        (("audit", "--rows", "many"), "whole number, 0 or more, found 'many'"),
        (("audit", "--rows", "-5"), "whole number, 0 or more, found '-5'"),
        (("diff", "shop", "0", "1"), "no version"),
    ],
)
def test_mistakes_get_one_message(shell: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    outcome = shell("features", *words)
    assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.err


# --------------------------------------------------------------------------------------------------------- audit


def test_audit_of_honest_views_is_quiet(shell: Callable[..., Any]) -> None:
    outcome = shell("features", "audit", "--rows", "30")
    assert outcome.code == 0 and "no leak" in outcome.out


def test_audit_finds_a_leak(config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let windows believe that every value is known at its event: the trial must name the features that saw it."""
    monkeypatch.setattr(audit.compute, "moments_of", lambda columns, names: ())
    found = audit.audit(config.data, config.features, dataset, 40)
    assert {leak.feature.split("_")[1] for leak in found} == {"bought", "amount"}


# --------------------------------------------------------------------------------------- expressions and functions


def test_an_expression_view_is_row_local_and_guarded(folder: Path, dataset: Dataset) -> None:
    view = "features.views.deal={kind: expression, expressions: {wide: 'abs(size) * 2', big: {sql: 'size > 1', type: bool}}}"
    config = compose([*overrides(folder), view], str(folder / "conf")).config
    run = Run.create("features", config, {})
    table = ensure_table(config, run, dataset).read((0, dataset.rows))
    size = dataset.read(["size"])["size"].to_pylist()
    assert table["deal_wide"].to_pylist() == [None if s is None else abs(s) * 2 for s in size]
    assert table["deal_big"].to_pylist() == [None if s is None else s > 1 for s in size]
    leaky = "features.views.deal={kind: expression, expressions: {x: 'amount * 2'}}"
    config = compose([*overrides(folder), leaky], str(folder / "conf")).config
    with pytest.raises(UserError, match="'amount' is known at `paid_at` and the decision is taken at `at - 1h`"):
        ensure_table(config, run, dataset)
    run.finish({})


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("sum(x)", "the aggregate 'sum'"),
        ("row_number() OVER ()", "a window"),
        ("(SELECT 1)", "a subquery"),
        ("random()", "'random' does not"),
        ("now()", "'now' does not"),
        ("x +", "one SQL expression"),
        ("1; DROP TABLE rows", "one SQL expression"),
        (" ", "one SQL expression, found ' '"),
        ("a, b", "one SQL expression, found 'a, b'"),
        ("a > 1) OR (b > 1", "one SQL expression, found"),
    ],
)
def test_an_expression_that_is_not_row_local_is_refused(sql: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expression_columns(sql, "features.views.v.expressions.x")


def test_an_expression_of_whole_numbers_is_not_rounded() -> None:
    rows = pa.table({"a": [4, 5, None]})
    assert evaluate({"x": ("a * 2", "int64"), "y": ("a / 2", "float64")}, rows).to_pydict() == {
        "x": [8, 10, None],
        "y": [2.0, 2.5, None],
    }
    for sql in ("a / 2", "'2.5'", "a * 0.5"):
        with pytest.raises(
            UserError, match=r"'x' must give whole numbers \(int64\), found 2\.5: round\(\) it, or declare"
        ):
            evaluate({"x": (sql, "int64")}, rows)
    assert evaluate({"x": ("round(a / 2)", "int64")}, rows)["x"].to_pylist() == [2, 3, None]
    for sql, found in (("a / 0", "inf"), ("(a - 4) / 0", "(nan|inf)"), ("-a / 0", "-inf")):
        with pytest.raises(UserError, match=rf"whole numbers \(int64\), found {found}: divide by nullif\(x, 0\)"):
            evaluate({"x": (sql, "int64")}, rows)
    assert evaluate({"x": ("a / nullif(0, 0)", "int64")}, rows)["x"].to_pylist() == [None, None, None]


def test_an_expression_cannot_read_files() -> None:
    with pytest.raises(UserError):
        evaluate({"x": ("(SELECT count(*) FROM read_text('/etc/passwd'))", "float64")}, pa.table({"a": [1]}))


def test_an_installed_function_is_called_and_held_to_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value, dist = "double", "package:double", None

        @staticmethod
        def load() -> Callable[[pa.Table], pa.Table]:
            return lambda rows: pa.table({"twice": pa.compute.multiply(rows["x"], 2)})

    monkeypatch.setattr(functions, "_found", lambda: {"double": Entry})
    columns = {
        "id": {"type": "int64", "role": "id"},
        "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
        "x": {"type": "int64", "known_at": "prior"},
    }
    data = schema.build(DataConfig, {"sources": {"s": {"path": "s", "columns": {"id": "int64"}}}, "columns": columns})
    view = {"kind": "function", "function": "double", "inputs": ["x"], "outputs": {"twice": "int64"}}
    features = schema.build(FeaturesConfig, {"as_of": "at", "views": {"v": view}})
    rows = pa.table({"x": [1, 2, None]})
    found = engine.features.compute.raw_features(data, features, rows, rows, {})
    assert found.to_pydict() == {"v_twice": [2, 4, None]}
    with pytest.raises(UserError, match="must give 'thrice', found twice"):
        functions.call("double", rows, {"thrice": "int64"}, "v")
    with pytest.raises(UserError, match=r"v: function 'double' must give 'twice' once, as list<int64>: .*cast"):
        functions.call("double", rows, {"twice": "list<int64>"}, "v")
    with pytest.raises(UserError, match=r"defines 'dubble', and no installed package offers it.*'double'"):
        functions.call("dubble", rows, {}, "v")
