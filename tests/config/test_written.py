"""A text key gets the text as it is written, by a file and by the command line; numbers are read alike by both."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.config import compose, literals, override_values
from engine.config.tree import Config
from engine.errors import UserError

# What YAML 1.1, OmegaConf or Hydra take for something else than text.
SURPRISES = (
    "0123", "0o17", "0x1F", "0b11", "1_000", "1e5", "1E-5", "123E456", "123e4567", "1.10", ".5", "1.", "+1", "-0", "-1.0",
    "1:30", "190:20:30", "190:20:30.15", "12345678901234567890.10", "yes", "No", "on", "OFF", "y", "n", "true", "False",
    "TRUE", "null", "Null", "NULL", "~", "2020-01-01", "2020-01-01T10:00:00", "2020-01-01 10:00:00", ".inf", "-.INF", ".nan",
    "inf", "NaN", "=", "10", "0",
)  # fmt: skip
NULLS = ("null", "Null", "NULL", "~")
NOT_ON_THE_COMMAND_LINE = ("~", "=")  # unquoted, its grammar refuses them

# Every kind of text key: where a file has it, where the command line has it, how the config gives it.
FILE = """
name: run-{text}
data:
  description: {text}
  path: {text}
  sources:
    a:
      path: {text}
      snapshot: {text}
      csv: {{nulls: [{text}]}}
      columns:
        id: {{type: string, aliases: [{text}]}}
        t: {{type: date, format: {text}}}
        u: {text}
    {source}: {{path: b, columns: {{x: string}}}}
  columns:
    id: {{type: string, role: id, values: [a, {text}]}}
    {text}: {{type: string}}
  rules: {{r: {text}}}
monitor: {{alerts: {{a: {{kind: file, to: {text}}}}}}}
tracking: {{tags: [{text}], group: {text}, project: {text}}}
"""
WORDS = (
    "name='run-{text}'", "tracking.project={text}", "data.description={text}", "data.path={text}", "data.sources.a.path={text}",
    "data.sources.a.snapshot={text}", "data.sources.a.csv.nulls=[{text}]", "data.sources.a.columns.u={text}",
    "data.sources.a.columns.id.aliases=[{text}]", "data.sources.a.columns.t={{type: date, format: {text}}}",
    "+data.sources[{source}]={{path: b, columns: {{x: string}}}}", "data.columns.id.values=[a,{text}]",
    "+data.columns[{text}]=string", "data.rules.r={text}", "+monitor.alerts={{a: {{kind: file, to: {text}}}}}",
    "tracking.tags=[{text}]", "tracking.group={text}",
)  # fmt: skip
GIVEN: dict[str, Callable[[Config], Any]] = {
    "name": lambda c: c.name.removeprefix("run-"),
    "project": lambda c: c.tracking.project,
    "description": lambda c: c.data.description,
    "path": lambda c: c.data.path,
    "source path": lambda c: c.data.sources["a"].path,
    "snapshot id": lambda c: c.data.sources["a"].snapshot,
    "nulls": lambda c: c.data.sources["a"].csv.nulls[0],
    "aliases": lambda c: c.data.sources["a"].columns["id"].aliases[0],
    "format": lambda c: c.data.sources["a"].columns["t"].format,
    "shorthand": lambda c: c.data.sources["a"].columns["u"].type,
    "source name": lambda c: list(c.data.sources)[-1],
    "values": lambda c: c.data.columns["id"].values[1],
    "column name": lambda c: list(c.data.columns)[-1],
    "rule": lambda c: c.data.rules["r"].holds,
    "alert": lambda c: c.monitor.alerts["a"].to,
    "tags": lambda c: c.tracking.tags[0],
    "group": lambda c: c.tracking.group,
}
NULLABLE = {"format", "snapshot id", "group"}
COLUMNS = "id: {type: string, role: id}, at: {type: timestamp, role: event_time}"


@pytest.fixture
def given_by(tmp_path: Path) -> Callable[..., Config]:
    """`given_by(delta, *words)`: the config of a small experiment, a delta of it in YAML, and words."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    base = f"# @package _global_\ndata: {{sources: {{a: {{path: a.csv, columns: {{id: string}}}}}}, columns: {{{COLUMNS}}}}}\n"
    (folder / "base.yaml").write_text(base)

    def build(delta: str, *words: str) -> Config:
        (folder / "own.yaml").write_text(f"# @package _global_\ndefaults: [base, _self_]\n{delta}\n", encoding="utf-8")
        return compose.compose(["+experiment=own", *words], str(tmp_path / "conf")).config

    return build


@pytest.mark.parametrize("text", SURPRISES)
def test_a_text_key_gets_the_text_as_written_by_a_file_and_by_the_command_line(text: str, given_by) -> None:
    name = text if not set(text) & set(" ~=<:+") else "x"  # the name of an experiment has letters of its own
    source = f"x{text}" if text.startswith(".") else text  # a source is a folder too, which no dot begins
    values = {"text": text, "source": source}
    expected = {kind: None if kind in NULLABLE and text in NULLS else text for kind in GIVEN}
    expected |= {"name": name, "source name": source}
    config = given_by(FILE.format(**values).replace(f"run-{text}", f"run-{name}"))
    assert {kind: value(config) for kind, value in GIVEN.items()} == expected
    if text not in NOT_ON_THE_COMMAND_LINE:
        config = given_by("", *(word.format(**values).replace(f"run-{text}", f"run-{name}") for word in WORDS))
        assert {kind: value(config) for kind, value in GIVEN.items()} == expected


def test_a_quoted_text_is_that_text_everywhere(given_by) -> None:
    for text in ("null", "~", "1.10", "no"):
        config = given_by(FILE.format(text=f"'{text}'", source=f"'{text}'").replace(f"run-'{text}'", "run-x"))
        assert {kind: value(config) for kind, value in GIVEN.items()} == {**dict.fromkeys(GIVEN, text), "name": "x"}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.epochs", "7", 7), ("train.epochs", "+7", 7), ("train.epochs", "1_000", 1000), ("train.epochs", "1e1", 10),
        ("train.epochs", "7.0", 7), ("train.epochs", "07", None), ("train.epochs", "0x10", None), ("train.epochs", "1:30", None),
        ("train.epochs", "yes", None), ("train.epochs", "0b1", None), ("train.epochs", "", None), ("train.epochs", "null", None),
        ("train.lr", "1e-3", 0.001), ("train.lr", ".5", 0.5), ("train.lr", "1.", 1.0), ("train.lr", "1E0", 1.0),
        ("train.lr", "0_1", None), ("train.lr", "007.5", None), ("train.lr", "1:30.5", None), ("train.lr", "on", None),
        ("train.lr", "inf", None), ("train.lr", "1e400", None), ("train.lr", "9007199254740993", None),
        ("cluster.dashboard", "yes", True), ("cluster.dashboard", "OFF", False), ("cluster.dashboard", "True", True),
        ("cluster.dashboard", "1", None), ("cluster.dashboard", "y", None), ("data.max_rows", "null", "null"),
        ("data.max_rows", "NULL", "null"), ("data.max_rows", "010", None), ("data.max_rows", "8", 8),
    ],
)  # fmt: skip
def test_numbers_truth_values_and_nulls_are_read_alike(key: str, text: str, expected: Any, given_by) -> None:
    section, name = key.split(".")
    results = []
    for delta, words in ((f"{section}: {{{name}: {text}}}", ()), ("", (f"{key}={text}",))):
        try:
            results.append(getattr(getattr(given_by(delta, *words), section), name))
        except UserError as error:
            assert key in str(error)
            results.append("refused")
    wanted = "refused" if expected is None else None if expected == "null" else expected
    assert results == [wanted, wanted] and type(results[0]) is type(results[1])


def _is_plain(text: str) -> bool:
    try:
        events = list(yaml.parse(f"a: [{text}]"))
    except yaml.YAMLError:
        return False
    scalars = [event for event in events if isinstance(event, yaml.ScalarEvent)]
    return [event.value for event in scalars] == ["a", text] and scalars[1].style is None


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("0123456789.eE+-_:xnu~ TZ", min_size=1, max_size=12), min_size=1, max_size=30))
def test_any_plain_text_of_a_file_arrives_as_it_is_written_and_as_the_quoted_one_does(given_by, texts) -> None:
    texts = [text for text in texts if _is_plain(text)]
    assume(texts)
    quoted = [f"'{text}'" for text in texts]
    for written_as in (texts, quoted):
        config = given_by(f"data: {{columns: {{id: {{values: [{', '.join(written_as)}]}}}}}}")
        assert list(config.data.columns["id"].values) == texts


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("0123456789.eE+-_", min_size=1, max_size=8))
def test_a_number_in_a_file_is_the_number_of_the_command_line(given_by, text) -> None:
    assume(_is_plain(text))
    results = []
    for delta, words in ((f"monitor: {{thresholds: {{x: {text}}}}}", ()), ("", (f"monitor.thresholds.x={text}",))):
        try:
            results.append(given_by(delta, *words).monitor.thresholds["x"])
        except UserError:
            results.append(None)
    assert results[0] == results[1]


def test_what_is_printed_and_what_is_saved_compose_to_the_same_config(tmp_path: Path, given_by) -> None:
    given_by("")
    words = ["+experiment=own", f"+data.columns.id.values=[{','.join(repr(t) for t in SURPRISES)}]", "name=1.10"]
    first = compose.compose(words, str(tmp_path / "conf"))
    assert list(first.config.data.columns["id"].values) == list(SURPRISES)
    for text in (compose.to_yaml(first.saved), json.dumps(first.saved)):
        assert _alone(tmp_path, text) == first.config


def _alone(tmp_path: Path, text: str) -> Config:
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}")
    return compose.compose(["+experiment=own"], str(tmp_path / "conf")).config


def test_interpolations_see_texts_and_numbers_of_their_keys(given_by) -> None:
    delta = "name: 1.10\ntrain: {epochs: 1_0, patience: '${train.epochs}'}\ndata: {name: 'x-${name}', description: '${name}'}"
    config = given_by(delta)
    assert (config.train.patience, config.data.name, config.data.description) == (10, "x-1.10", "1.10")


def test_a_sweep_runs_with_each_value_as_written() -> None:
    plans = override_values.combinations(["data.name=1.10,0123,null,'a,b'", "train.epochs=range(1,3)"])
    names = [compose.compose(plan).config.data.name for plan in plans[::2]]
    assert names == ["1.10", "0123", "null", "a,b"] and [plan[1] for plan in plans[:2]] == [
        "train.epochs=1",
        "train.epochs=2",
    ]


def test_an_experiment_may_have_a_number_for_its_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name in ("2024", "1.10", "0123", "on"):
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nname: {name}\n")
        assert compose.compose([f"+experiment={name}"], str(tmp_path)).config.name == name


@pytest.mark.parametrize("text", ["a: {'': 1}", "? [x]\n: 1", "? \n: 1", "x: {1: a, '1': b}"])
def test_a_name_that_is_no_text_or_stands_twice_is_refused(text: str, given_by) -> None:
    with pytest.raises(UserError, match=r"must be YAML.*(not a text|duplicate key).*own\.yaml"):
        given_by(text)


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("!!float 1.10", "1.10"), ("!!int 0123", "0123"), ("!!bool no", "no"), ("!!timestamp 2024-01-01", "2024-01-01"),
    ],
)  # fmt: skip
def test_a_tag_of_yaml_does_not_change_a_text(tagged: str, text: str, given_by) -> None:
    config = given_by(f"data: {{description: {tagged}, columns: {{id: {{values: [{tagged}]}}}}}}")
    assert (config.data.description, config.data.columns["id"].values) == (text, (text,))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("!!set {a, b}", "tag"), ("!!binary YWJj", "tag"), ("!!omap [a: 1]", "tag"), ("!!pairs [a: 1]", "tag"),
        ("!!int [a]", "scalar"), ("&x [a, *x]", "contains itself"), ('["\\ud800"]', "half of a surrogate"),
        ("[" * 3000, "too many"),
    ],
)  # fmt: skip
def test_yaml_that_no_key_takes_is_refused_with_its_file(value: str, reason: str, given_by) -> None:
    with pytest.raises(UserError, match=rf"must be YAML.*{reason}") as caught:
        given_by(f"data: {{columns: {{id: {{values: {value}}}}}}}")
    assert "own.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "word", ["data.path=\udcff", "data.\udcff=1", "data.columns.id.values=" + "[" * 500 + "]" * 500]
)
def test_a_word_that_cannot_be_read_or_kept_is_refused(word: str, given_by) -> None:
    with pytest.raises(UserError, match="an override must be"):
        given_by("", word)


@pytest.mark.parametrize("number", ["inf", "nan", "-inf", "1e400"])
@pytest.mark.parametrize("key", ["data.columns.id.max", "train.lr", "evaluate.bootstrap", "data.max_rows"])
def test_a_number_that_a_run_cannot_record_is_refused(key: str, number: str, given_by) -> None:
    with pytest.raises(UserError, match=f"{key} must be a finite number"):
        given_by("", f"{key}={number}")


def test_a_word_without_a_declared_type_is_what_it_looks_like() -> None:
    words = [literals.marked(text) for text in ("1", "1.5", "true", "null", "0123", "x")]
    assert literals.settled(words) == [1, 1.5, True, None, "0123", "x"]


@pytest.mark.parametrize(
    "line",
    ["{name}: &{name} [{uses}]", "{name}: &{name} {{<<: [{uses}]}}", "{name}: &{name} {{a: [{uses}]}}"],
    ids=["lists", "merges", "mappings"],
)
def test_aliases_that_repeat_aliases_are_refused_before_they_are_written_out(line: str, tmp_path: Path) -> None:
    names = [f"n{level}" for level in range(9)]
    lines = ["n0: &n0 {x: abcdefghij}"]
    lines += [line.format(name=name, uses=", ".join([f"*{below}"] * 12)) for below, name in pairwise(names)]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(lines))
    with open(path) as stream, pytest.raises(yaml.YAMLError, match=r"a\.yaml must not have more than 16,777,216 char"):
        literals.load(stream)
    path.write_text("\n".join(lines[:3]))  # aliases as people use them
    with open(path) as stream:
        assert literals.load(stream)["n0"] == {"x": "abcdefghij"}
