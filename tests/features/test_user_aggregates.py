"""Aggregates of a user's own: computed like those of the engine, and refused where a number is of more than its window."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.config import feature_names, plugins, schema
from engine.config.sections.features import ViewConfig
from engine.errors import UserError
from engine.features import aggregates, audit
from engine.monitoring import rising_columns
from engine.runtime import purity
from engine.runtime.run import plan_digest
from kernels.folds import Fold
from tests import naive
from tests.features.test_store import built, config_of, days_of, everything, from_scratch, months_of_visits
from tests.tiny import H, visits, write_tiny

CODE = '''import numpy as np


class fading:
    """A sum that halves with every row.

    More about it.
    """

    start = (0.0,)

    def add(state, value, age):
        state[0] = state[0] / 2 + value

    def result(state):
        return state[0]


def span(values, ages):
    """Seconds between the first and the last row."""
    return ages[0] - ages[-1]
'''
PLUGIN = plugins.Plugin("aggregates.py", CODE.encode())
ASKED = ("plugins=[aggregates.py]", "features.views.shop.aggregates.amount=[mean, fading, span]")
WHERE = "features.views.v.aggregates.amount"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("aggregates"), 400)
    (folder / "conf" / "aggregates.py").write_text(CODE)
    return folder


def held(text: str, name: str = "own") -> str:
    """The name of an aggregate with the digest of its code, which is held."""
    plugin = plugins.Plugin("own.py", text.encode())
    plugins.add([plugin])
    return f"{name}@{plugin.digest}"


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        aggregates.user_aggregate(held(text), WHERE)
    assert str(caught.value).startswith(f"{WHERE}: aggregate 'own' (own.py, line ")
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- values


def test_views_hold_what_a_naive_twin_computes_under_names_without_the_digest(folder: Path) -> None:
    config = config_of(folder, *ASKED, "features.views.shop.derive={trend: amount_fading_2d / amount_mean_2d}")
    table = built(config)
    found, ids = everything(table), table.dataset.read(["visit"])["visit"].to_pylist()
    code: dict[str, Any] = {}
    exec(CODE, code)
    fading = Fold("fading", start=(0.0,), add=code["fading"].add, result=code["fading"].result)
    rows = visits(400).to_pylist()
    by_id = {row["visit"]: row for row in rows}
    micros = lambda at: None if at is None else round(at.timestamp() * 1e6)  # noqa: E731
    past: dict[Any, list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["at"], row["visit"])):
        past.setdefault(row["shop"], []).append((micros(row["at"]), micros(row["paid_at"]), 0, row["amount"]))
    for row_id, *features in zip(
        ids, *(found[f"shop_amount_{name}"].to_pylist() for name in ("fading_2d", "span_6h")),
        strict=True,
    ):  # fmt: skip
        row = by_id[row_id]
        decision = micros(row["at"]) - H
        mine = past[row["shop"]] if row["shop"] is not None else []
        for feature, fold, window in zip(features, (fading, Fold("span", code["span"])), (48 * H, 6 * H), strict=True):
            expected = naive.fold(fold, naive.counted(mine, decision, window), decision)
            assert math.isclose(expected, feature, rel_tol=1e-9) if feature is not None else math.isnan(expected)
    assert found["shop_trend"].null_count < 400


def test_the_code_is_part_of_the_plan_and_of_the_recipe_and_other_columns_are_kept(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "conf", tmp_path / "conf")
    pq.write_table(visits(400), tmp_path / "visits.parquet")
    before = built(config_of(tmp_path, *ASKED)).views["shop"]
    (tmp_path / "conf" / "aggregates.py").write_text(CODE.replace("/ 2", "/ 3"))
    config = config_of(tmp_path, *ASKED)
    after = built(config).views["shop"]
    recipes = [
        {name: item["recipe"] for name, item in view.manifest["parts"][0]["columns"].items()}
        for view in (before, after)
    ]
    changed = {name for name in recipes[0] if recipes[0][name] != recipes[1][name]}
    assert changed == {f"shop_amount_{name}_{window}" for name in ("fading", "span") for window in ("6h", "2d")}
    assert plan_digest("train", config) != plan_digest("train", config_of(folder, *ASKED))


@pytest.mark.slow
def test_appended_days_are_computed_alone_with_the_bytes_of_a_full_build(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "conf", tmp_path / "conf")
    months = months_of_visits()
    pq.write_table(months.slice(0, 800), tmp_path / "visits-0.parquet")
    config = config_of(tmp_path, *ASKED)
    built(config)
    pq.write_table(months.slice(800, 25), tmp_path / "visits-1.parquet")
    grown = built(config)
    assert days_of(grown) < 20 and everything(grown).equals(everything(from_scratch(tmp_path, tmp_path, *ASKED)))


@pytest.mark.slow
def test_the_audit_computes_them_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = (
        "features.views.shop.where='size > -1'",
        "features.views.shop.exclude={visit: visit}",
        "features.views.shop.by=known",
    )
    for words in (ASKED, (*ASKED, *extra)):
        config = config_of(folder, *words)
        dataset = built(config).dataset
        assert not audit.audit(config.data, config.features, dataset, 25)
    right = Fold.plainly
    monkeypatch.setattr(Fold, "plainly", lambda self, values, ages: right(self, values, ages) + (self.name == "fading"))
    aggregates.user_aggregate.cache_clear()
    monkeypatch.setattr(aggregates, "_probe", lambda *_: None)
    leaks = audit.audit(config.data, config.features, dataset, 25)
    assert leaks and {(leak.trial, leak.feature[:18]) for leak in leaks} == {("by hand", "shop_amount_fading")}
    aggregates.user_aggregate.cache_clear()


def test_features_show_says_where_they_are_from(folder: Path, cli: Callable[..., Any]) -> None:
    said = cli("features", "show", "shop", *config_words(folder)).out
    assert (
        "fading: add(state, value, age), result(state)\nA sum that halves with every row.\nfrom aggregates.py, line 4, "
        in said
    )
    assert "span(values, ages)\nSeconds between the first and the last row.\nfrom aggregates.py, line 19, " in said
    assert "More about it" not in said


def config_words(folder: Path) -> list[str]:
    from tests.tiny import overrides

    return [*overrides(folder, *ASKED), "--config-dir", str(folder / "conf")]


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fadeing", r"features.views.shop.aggregates.amount must be one of .*found 'fadeing'.*fading"),
        ("np", r"must be one of .*found 'np'"),
        ("'fa-ding'", r"'fa-ding' is no aggregate"),
        ("max_3", r"'max_3' is no aggregate"),
    ],
)
def test_a_name_that_nothing_defines_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(folder, ASKED[0], f"features.views.shop.aggregates.amount=[{name}]")


def test_rows_have_no_values_and_a_name_of_the_engine_is_not_defined_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"aggregates.rows must be count or recency, found 'span'"):
        config_of(folder, ASKED[0], "features.views.shop.aggregates.rows=[span]")
    shutil.copytree(folder / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "aggregates.py").write_text("def mean(values, ages): ...\n")
    with pytest.raises(
        UserError, match=r"bought: 'mean' is one of the engine, and aggregates.py defines it too: rename"
    ):
        config_of(tmp_path, ASKED[0], "features.views.shop.aggregates.amount=[mean]")


def test_a_package_offers_them_and_its_code_is_part_of_plan_and_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_package_.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = metadata.EntryPoint("span", "of_package_:span", aggregates.GROUP)
    monkeypatch.setattr(plugins, "installed", lambda group: {"span": entry} if group == aggregates.GROUP else {})
    words = "features.views.shop.aggregates.amount=[span]"
    found = []
    for text in (CODE, CODE + "\n"):
        (tmp_path / "of_package_.py").write_text(text)
        found.append((plan_digest("train", config_of(folder, words)), aggregates.version_of("span")))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1] and found[0][1].startswith("of_package_:span:")
    assert aggregates.user_aggregate("span", WHERE).plainly(np.array([1.0, 2.0]), np.array([5.0, 3.0])) == 2.0
    with pytest.raises(UserError, match=r"no file of `plugins` defines the aggregate 'spam'.*span"):
        aggregates.version_of("spam")


def test_a_users_aggregate_may_grow_with_its_window() -> None:
    assert (
        rising_columns._grows("fading@" + "0" * 64)
        and rising_columns._grows("sum")
        and not rising_columns._grows("mean")
    )


# ------------------------------------------------------------------------------------------------------------- probe

IMPURE = {
    "random.random()": r"calls Random.random",
    "np.random.rand()": r"calls numpy.random",
    "np.random.default_rng().random()": r"calls posix.urandom",
    "secrets.randbelow(9)": r"calls posix.urandom",
    "uuid.uuid4().int % 7": r"calls posix.urandom",
    "time.time() // 1e9": r"calls time.time",
    "datetime.datetime.now().year": r"calls datetime.now",
    "datetime.date.today().year": r"calls date.today",
    "__import__('pathlib').Path(__file__).exists() or 1": r"calls posix.stat",
    "id(values) % 1": r"calls builtins.id",
    "hash('a') % 1": r"calls builtins.hash",
    "SEEN.append(1) or len(SEEN)": r"the same number each time.*found \d.* and then \d",
    "values.sort() or 1": r"raised ValueError: .*read-only.*for 1 values: ",
    "str(values[0])": r"must give a number, found str, for 1 values: ",
    "1 / 0": r"raised ZeroDivisionError: division by zero, for 1 values: 2\d\.\d",
}
HEAD = "import datetime, random, secrets, time, uuid\nimport numpy as np\n\nSEEN = []\n\n"


@pytest.mark.parametrize("expression", IMPURE)
def test_a_function_of_more_than_its_window_is_refused_by_name(expression: str) -> None:
    import re

    said = refused(f"{HEAD}def own(values, ages):\n    return {expression}\n")
    assert re.search(IMPURE[expression], said), said


def test_what_fails_for_some_windows_only_is_no_fault_of_the_probe() -> None:
    name = held("import math\n\ndef own(values, ages):\n    return math.log(values.min())\n")
    assert aggregates.user_aggregate(name, WHERE).plainly(np.array([1.0]), np.array([1.0])) == 0.0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("own = 3\n", "must be a function of"),
        ("def own(values): ...\n", "must be a function of"),
        ("class own:\n    start = 0.0\n", "must have start, a tuple of numbers"),
        (
            "class own:\n    start = (0.0,)\n    def add(state, value): ...\n    def result(state): ...\n",
            "must have start, a tuple",
        ),
    ],
)
def test_what_is_no_aggregate_is_refused(code: str, message: str) -> None:
    assert message in refused(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("add", "message"),
    [
        ("state[0] += np.random.rand()", "calls numpy.random"),
        ("state[0] = str(value)", "must be compilable by Numba"),
        ("state[1] = value", "raised IndexError"),
        (
            "state[0] += LATER[0]; LATER[0] += 1.0",
            "must be compilable by Numba, or be a function of (values, ages): No implementation of function",
        ),
        ("state[0] += LATER.sum() + SEEN[0]; SEEN[0] += 1", "must be compilable by Numba"),
        ("state[0] += float(int(age) * 2**62)", "the same number compiled as in Python"),
    ],
)
def test_a_pair_is_refused_likewise(add: str, message: str) -> None:
    code = f"{HEAD}LATER = np.zeros(1)\n\nclass own:\n    start = (0.0,)\n\n    def add(state, value, age):\n        {add}\n\n"
    assert message in refused(code + "    def result(state):\n        return state[0]\n")


def test_an_error_names_file_aggregate_and_values_unless_these_are_sensitive(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "conf", tmp_path / "conf")
    pq.write_table(visits(400), tmp_path / "visits.parquet")
    text = CODE + "\n\ndef low(values, ages):\n    return 1 if values.min() < 60 else 1 / 0\n"
    (tmp_path / "conf" / "aggregates.py").write_text(text)
    words = (ASKED[0], "features.views.shop.aggregates.amount=[low]")
    found = r"views.shop.aggregates.amount: aggregate 'low' \(aggregates.py, line 24\) raised ZeroDivisionError"
    values = visits(400)["amount"].to_pylist()
    assert max(value for value in values if value is not None) > 60
    with pytest.raises(UserError, match=rf"{found}: division by zero, for \d+ values: \d"):
        built(config_of(tmp_path, *words))
    with pytest.raises(UserError, match=rf"{found}. Its message is not shown") as caught:
        built(config_of(tmp_path, *words, "data.columns.amount.sensitive=true", "data.columns.visit.sensitive=false"))
    assert "values" not in str(caught.value)


def test_a_watched_call_leaves_the_profiler_of_the_process_alone() -> None:
    import sys

    assert purity.watched(lambda: math.sqrt(4.0)) == (2.0, []) and sys.getprofile() is None


def test_a_view_names_them_by_digest_and_features_do_not() -> None:
    view = schema.build(ViewConfig, {"entity": ["a"], "windows": ["2d"], "aggregates": {"x": [f"own@{'0' * 64}"]}})
    assert [name for name, _ in feature_names.view_features("v", view)] == ["v_x_own_2d"]
