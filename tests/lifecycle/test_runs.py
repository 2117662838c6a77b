"""Runs are found, filtered and sorted from their directories."""

from __future__ import annotations

import json
import os

import pytest

from engine.errors import UserError
from engine.lifecycle import runs
from engine.runtime.run import load_record
from tests.lifecycle.recorded import config, make_run


@pytest.fixture
def three(workplace):
    """Runs with ROC AUC 0.75, 0.74 and none (it was killed)."""
    first = make_run(workplace, "20260101T000000-aaaaaa")
    second = make_run(workplace, "20260101T000001-bbbbbb", metrics={"test/roc_auc": 0.74}, config=config(train__lr=0.1))
    third = make_run(workplace, "20260101T000002-cccccc", status="running")
    (third / "metrics.json").unlink()
    (third / "DONE").unlink()
    return first, second, third


def listed(cli, *words: str) -> list[str]:
    outcome = cli("runs", *words, "--json")
    assert outcome.code == 0, outcome.err
    return [entry["id"][-1] for entry in json.loads(outcome.out)]


def test_newest_first_without_a_sort(cli, three) -> None:
    assert listed(cli) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("test/roc_auc > 0.74", "a"),
        ("test/roc_auc >= 0.74", "ba"),
        ("test/roc_auc>=0.74 and train.lr = 0.1", "b"),
        ('"test/roc_auc">=0.74 AND "train.lr" = 0.1', "b"),
        ("train.lr != 0.1", "ca"),
        ("status = 'killed'", "c"),
        ("contains(id, 'aaaa') or started like '%:02'", "ba"),
        ("name = 'shop' and command == 'train'", "cba"),
        ("test/roc_auc IS NULL", "c"),
        ("not (test/roc_auc > 0.74)", "b"),
        ("model.hidden[1] = 16 and seconds / 2 between 4 and 6 and name <> 'test/roc_auc'", "cba"),
    ],
)
def test_conditions(cli, three, where, expected) -> None:
    assert "".join(listed(cli, "--where", where)) == expected


def test_sorts_put_the_largest_first_and_what_lacks_the_key_last(cli, three) -> None:
    assert listed(cli, "--sort", "test/roc_auc") == ["a", "b", "c"]
    assert listed(cli, "--sort", "-test/roc_auc") == ["b", "a", "c"]
    assert listed(cli, "--sort", "test/roc_auc", "--limit", "1") == ["a"]


def test_the_table_shows_what_was_filtered_sorted_and_asked_for(cli, three) -> None:
    lines = cli(
        "runs", "--where", "train.lr < 1", "--sort", "test/roc_auc", "--columns", "model.hidden"
    ).out.splitlines()
    assert lines[0].split() == [
        "command", "name", "status", "started", "seconds", "train.lr", "test/roc_auc", "model.hidden", "directory",
    ]  # fmt: skip
    assert "[16, 16]" in lines[1] and "0.75" in lines[1] and lines[1].endswith("runs/train/shop/20260101T000000-aaaaaa")
    assert "killed" in lines[3] and "killed" not in lines[1]


def test_a_run_whose_process_lives_is_running(workplace) -> None:
    directory = make_run(workplace, "x", status="running", pid=os.getpid())
    (directory / "DONE").unlink()
    assert runs.summary(directory, load_record(directory))["status"] == "running"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--where", "test/roc > 1"), "'test/roc', which no run has. Did you mean 'test/roc_auc'?"),
        (("--where", "roc_auc"), "'roc_auc', which no run has. Did you mean 'test/roc_auc'?"),
        (("--where", "command = train"), "'train', which no run has."),
        (("--where", "command = train"), "A text is written in single quotes: 'train'."),
        (("--where", "test/roc_auc = null"), "by IS NULL or IS NOT NULL"),
        (("--where", "test/roc_auc"), "--where must be a condition such as train.lr < 0.1, found DOUBLE"),
        (("--where", "max(train.lr) > 1"), "--where must read one row at a time, found the aggregate 'max'"),
        (("--where", "train.lr >"), "--where must be one SQL expression"),
        (("--where", "(SELECT count(*) FROM read_text('/etc/passwd')) > 0"), "found a subquery"),
        (("--where", "started < now()"), "'now' does not"),
        (("--sort", "train.rl"), "--sort names 'train.rl', which no run has. Did you mean 'train.lr'?"),
        (("--columns", "x"), "--columns names 'x', which no run has"),
        (("--limit", "many"), "--limit must be a number of runs, found 'many'"),
        (("--where",), "--where must be followed by a value"),
        (("--srot", "x"), "unknown option '--srot'. Did you mean '--sort'?"),
        (("x",), "unknown command 'runs x'"),
    ],
)
def test_mistakes_are_named(cli, three, words, message) -> None:
    outcome = cli("runs", *words)
    assert outcome.code == 1 and message in outcome.err and not outcome.out


def test_no_runs_are_an_empty_list(cli) -> None:
    assert cli("runs", "--where", "test/roc_auc > 1", "--json").out == "[]\n"


def test_a_damaged_record_does_not_hide_the_others(cli, three) -> None:
    (three[1] / "run.json").write_text("{")
    assert listed(cli) == ["c", "a"]


def test_a_run_is_found_by_directory_and_by_the_start_of_its_id(workplace, three) -> None:
    folder = workplace / "runs"
    assert runs.find_run(str(three[0]), folder) == three[0].resolve()
    assert runs.find_run("20260101T000001", folder) == three[1].resolve()
    with pytest.raises(UserError, match="must name one run, found 3"):
        runs.find_run("20260101", folder)
    with pytest.raises(UserError, match=r"but has no run\.json"):
        runs.find_run(str(folder), folder)
    with pytest.raises(UserError, match="does not exist"):
        runs.find_run("nowhere/at/all", folder)


def test_a_registered_version_leads_to_its_training_run(workplace, three) -> None:
    model = workplace / "runs" / "registry" / "shop" / "versions" / "0123456789" / "model"
    model.mkdir(parents=True)
    facts = {"format": 1, "digest": "0" * 64, "seal": "0" * 64, "registered": "2026-01-01T00:00:00+00:00"}
    (model.parent / "version.json").write_text(json.dumps({**facts, "source": str(three[0])}))
    assert runs.run_of_model(model) == three[0].resolve()
    assert runs.run_of_model(three[1] / "model") == three[1].resolve()
    (model.parent / "version.json").write_text(json.dumps({**facts, "source": "gone"}))
    with pytest.raises(UserError, match=r"the training run of .* was not found"):
        runs.run_of_model(model)
