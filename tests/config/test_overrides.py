"""Keys of the command line: names with dots, slashes and the like can be written, and a refusal shows how."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import __main__ as shell
from engine.config import compose, override_values, overrides
from engine.config.tree import Config
from engine.errors import UserError

BASE = """# @package _global_
data:
  sources: {iris: {path: iris.csv, columns: {id: string, sepal.length: float64}}}
  columns:
    id: {type: string, role: id, known_at: prior}
    at: {type: timestamp, role: event_time, known_at: prior}
    sepal.length: {type: float64, known_at: prior}
    sepal: {type: float64}
    km/h: float64
    größe: float64
features: {as_of: at}
"""


@pytest.fixture
def iris(tmp_path: Path):
    """`iris(*words)`: the config of an experiment whose columns have dots in their names."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "iris.yaml").write_text(BASE, encoding="utf-8")
    delta = "# @package _global_\ndefaults: [iris, _self_]\ndata: {columns: {sepal.length: {max: 9}}}\n"
    (tmp_path / "experiment" / "delta.yaml").write_text(delta)

    def build(*words: str, experiment: str = "iris") -> Config:
        return compose.compose([f"+experiment={experiment}", *words], str(tmp_path)).config

    return build


@pytest.mark.parametrize(
    "name", ["[sepal.length]", '["sepal.length"]', "['sepal.length']", '."sepal.length"', ".'sepal.length'"]
)
def test_a_name_with_a_dot_is_written_in_brackets_or_quotes(name: str, iris) -> None:
    config = iris(f"data.columns{name}.min=0", f"+data.columns{name}.values=[1.10]", experiment="delta")
    column = config.data.columns["sepal.length"]
    assert (column.min, column.max, column.values, column.type) == (0, 9, ("1.10",), "float64")
    assert "sepal.length" not in iris(f"~data.columns{name}").data.columns
    assert (
        iris(f"data.sources.iris.columns{name}.missing='null'").data.sources["iris"].columns["sepal.length"].missing
        == "null"
    )


@pytest.mark.parametrize("name", ["km/h", "größe", "at"])
def test_other_signs_need_no_brackets_and_a_bare_type_stays_when_a_key_is_added(name: str, iris) -> None:
    columns = iris(f"data.columns.{name}.description=x").data.columns
    assert columns[name].description == "x" and columns[name].type in ("float64", "timestamp")


def test_below_a_map_of_plain_values_the_rest_of_the_key_is_one_name(iris) -> None:
    config = iris("monitor.thresholds.sepal.length.psi=0.2", "features.direct.sepal.length=true")
    assert config.monitor.thresholds == {"sepal.length.psi": 0.2} and config.features.direct == {"sepal.length": True}


@pytest.mark.parametrize(
    "word",
    [
        "data.columns.sepal.length.min=0", "+data.columns.sepal.length.max=5", "data.columns.sepal.width={type: float64}",
        "~data.columns.sepal.length.known_at", "data.sources.iris.columns.sepal.length.missing='null'",
        "+data.rules.a.b.holds=true", "data.columns.petal.length.type=float64",
    ],
)  # fmt: skip
def test_a_name_that_fell_apart_is_refused_with_the_word_that_works(word: str, iris) -> None:
    with pytest.raises(UserError, match="A name with a dot must be in brackets") as caught:
        iris(word)
    advised = shlex.split(re.search(r"in brackets: (.*)$", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert len(advised) == 1
    iris(*advised)


def test_a_misspelt_key_gets_the_nearest_and_not_brackets(iris) -> None:
    with pytest.raises(UserError, match=r"'data\.columns\.at\.minn'\. Did you mean 'min'\?$"):
        iris("data.columns.at.minn=0")


def test_a_sweep_over_a_name_with_a_dot_runs_with_each_value(iris) -> None:
    plans = override_values.combinations(
        ["data.columns[sepal.length].min=0,1.5", "data.columns.'sepal.length'.max=7,8"]
    )
    bounds = [iris(*plan).data.columns["sepal.length"] for plan in plans]
    assert [(column.min, column.max) for column in bounds] == [(0, 7), (0, 8), (1.5, 7), (1.5, 8)]


@pytest.mark.parametrize(
    "word", ["=1", "a", "a..b=1", ".a=1", "a[b=1", "a[=1", "+=1", "~", "a.=1", "a]b=1", "hydra.x=1", "hydra=1"]
)
def test_a_word_of_another_form_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"must be key=value|unknown config key"):
        compose.compose([word])


def test_plus_needs_a_new_key_and_tilde_an_old_one(iris) -> None:
    with pytest.raises(UserError, match=r"is there already: write train\.lr=VALUE, without the \+"):
        iris("+train.lr=1")
    assert iris("++train.lr=1").train.lr == 1
    with pytest.raises(UserError, match=r"unknown config key 'train\.lrr'"):
        iris("train.lrr=1")
    with pytest.raises(UserError, match=r"data\.columns has no entry 'width'"):
        iris("~data.columns.width")
    with pytest.raises(UserError, match=r"write ~data\.max_quarantine to"):
        iris("~data.max_quarantine=2%")
    assert iris("~data.max_quarantine=1%").data.max_quarantine == "1%"


def test_an_item_of_a_list_is_named_by_its_place(iris) -> None:
    words = ["split.train=[2020-01-01,2020-02-01]", "split.train.1=2020-03-01"]
    assert iris(*words).split.train == ("2020-01-01", "2020-03-01")
    assert iris("split.train=[2020-01-01,2020-02-01]", "split.train[1]=2020-03-01").split.train[1] == "2020-03-01"
    with pytest.raises(UserError, match="unknown config key"):
        iris("split.train.0=2020-01-01")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_shows_the_way_and_its_example_works(words: list[str], iris, capsys) -> None:
    assert shell.main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    example = re.search(r"in brackets: '([^']+)'", text).group(1)  # type: ignore[union-attr]
    assert iris(example).data.columns["sepal.length"].min == 0


@given(
    st.lists(st.text(st.characters(exclude_characters='"', exclude_categories=("Cs", "Cc")), min_size=1), min_size=1)
)
def test_a_key_that_is_written_is_the_key_that_is_read(parts) -> None:
    word = overrides.read(f"++{overrides.dotted(tuple(parts))}=x=y")
    assert word is not None and list(word.parts) == parts and (word.sign, word.value) == ("++", "x=y")
