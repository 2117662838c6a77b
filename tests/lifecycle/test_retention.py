"""`runs rm` and `runs gc`: what must stay stays and says why, and a kill leaves no half of a run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.lifecycle import retention, runs
from engine.runtime import registry, storage
from tests.lifecycle.recorded import make_run, sha

DAY = 86_400


def aged(directory: Path, days: float) -> Path:
    """The run as it would be after some days."""
    for path in [*directory.rglob("*"), directory]:
        os.utime(path, (time.time() - days * DAY,) * 2)
    return directory


def unfinished(directory: Path) -> Path:
    (directory / "DONE").unlink()
    return directory


@pytest.fixture
def history(workplace: Path) -> dict[str, Path]:
    """Two years of a shop: a champion, a challenger, what was scored and monitored with them, and what nobody needs."""
    model = {name: sha(letter) for name, letter in (("old", "1"), ("first", "2"), ("champion", "3"), ("newest", "4"))}
    trained = {
        name: make_run(workplace, f"2024010{place}T000000-aaaaa{place}", outputs={"model": value, "dataset": sha("d")})
        for place, (name, value) in enumerate(model.items())
    }

    def after(name: str, command: str, taken: str, **more: Any) -> Path:
        return make_run(workplace, f"2024{name}T000000-bbbbbb", command, model=model[taken], **more)

    found = {
        **trained,
        "scored": after("0201", "score", "champion"),
        "scored by first": after("0202", "score", "first"),
        "scored newest": after("0203", "score", "champion", chain={"scores": sha("5")}),
        "watched old": after("0301", "monitor", "old"),
        "watched old newest": after("0302", "monitor", "old"),
        "watched": after("0303", "monitor", "champion"),
        "watched newest": after("0304", "monitor", "champion"),
        "retrain": make_run(workplace, "20240401T000000-cccccc", "retrain"),
        "retrain newest": make_run(workplace, "20240402T000000-cccccc", "retrain"),
        "killed": unfinished(make_run(workplace, "20240501T000000-dddddd", "ingest", status="running")),
    }
    decision = {"kind": "end", "id": found["retrain"].name, "path": "decision.json"}
    register(workplace, "shop", model["champion"], str(trained["champion"]), decision)
    for directory in found.values():
        aged(directory, 200)
    return found


def register(folder: Path, name: str, digest: str, source: str, decision: dict[str, Any]) -> None:
    """A registry with one champion, without a bundle."""
    book = registry.Registry(folder / "runs" / "registry", name)
    version = {"digest": digest, "seal": sha("f"), "source": source, "registered": "2024", "format": 1}
    version |= {"metric": {"name": "roc_auc", "value": 0.7}, "train_rows": 1.0, "split": {}, "seen_until": 0}
    (book.directory / "versions" / digest).mkdir(parents=True)
    storage.write_json(
        book.directory / "versions" / digest / "version.json", {**version, "loss": "binary", "metrics": {}}
    )
    move: dict[str, Any] = {"format": 1, "number": 1, "time": "2024", "action": "promote", "from": None, "to": digest}
    move |= {"who": "tests", "why": "", "decision": decision}
    move["check"] = registry.digest.of_json(move)
    storage.write_json(book.directory / "moves" / "000001.json", move)


def ask(cli, *words: str) -> dict[str, dict[str, Any]]:
    outcome = cli("runs", *words, "--json")
    assert outcome.code == 0, outcome.err
    return {row["directory"]: row for row in json.loads(outcome.out)}


def test_what_keeps_a_run_is_said(cli, history) -> None:
    rows = ask(cli, "gc")
    kept = {name: rows[str(directory)]["kept"] for name, directory in history.items()}
    assert kept == {
        "old": "what monitor/shop/20240302T000000-bbbbbb was made with",
        "first": "what score/shop/20240202T000000-bbbbbb was made with",
        "champion": "the training of shop@champion",
        "newest": "the newest finished one of its command, name and model",
        "scored": None,
        "scored by first": "the newest finished one of its command, name and model",
        "scored newest": "the newest finished one of its command, name and model",
        "watched old": None,
        "watched old newest": "the newest finished one of its command, name and model",
        "watched": "a window of shop@champion, which retrain counts",
        "watched newest": "a window of shop@champion, which retrain counts",
        "retrain": "the decision behind move 1 of shop",
        "retrain newest": "the newest finished one of its command, name and model",
        "killed": None,
    }
    assert all(directory.exists() for directory in history.values()), "without --delete nothing goes"


def test_only_what_nothing_keeps_is_removed(cli, history) -> None:
    going = {Path(name) for name, row in ask(cli, "gc").items() if row["kept"] is None}
    rows = ask(cli, "gc", "--delete")
    assert {Path(name) for name, row in rows.items() if row["removed"]} == going
    assert {directory for directory in history.values() if not directory.exists()} == going
    assert not list(Path("runs").glob(".removed-*"))
    assert not [row for row in ask(cli, "gc").values() if row["kept"] is None], "a second time there is nothing to do"


def test_young_and_unfinished_runs_stay(cli, history) -> None:
    aged(history["scored"], 20)
    aged(history["killed"], 0.5)
    assert {row["kept"] for row in ask(cli, "gc", "--older", "10d").values()} & {None} == {None}
    rows = ask(cli, "gc")
    assert rows[str(history["scored"])]["kept"] == "younger than 30d"
    # However short the bound: the same command goes on with a run that was interrupted today.
    assert ask(cli, "gc", "--older", "0s")[str(history["killed"])]["kept"] == "unfinished and recent: it can be resumed"
    assert ask(cli, "gc", "--older", "0s")[str(history["scored"])]["kept"] is None


def test_a_run_that_a_process_works_in_stays(cli, history) -> None:
    with open(history["killed"] / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ask(cli, "gc", "--delete")[str(history["killed"])]["kept"] == "in use by a process"
    assert history["killed"].exists()


def test_a_damaged_record_stops_the_clean_up(cli, history) -> None:
    """It may have named what would go."""
    (history["scored newest"] / "run.json").write_text("{")
    outcome = cli("runs", "gc", "--delete")
    assert outcome.code == 1 and "run.json" in outcome.err and history["scored"].exists()


@pytest.mark.parametrize("name", ["champion", "first", "newest", "retrain", "watched"])
def test_rm_refuses_what_is_needed_and_removes_nothing(cli, history, name: str) -> None:
    words = ("runs", "rm", str(history["scored"]), str(history[name]), "--delete")
    outcome = cli(*words)
    assert outcome.code == 1 and f"{history[name]} is " in outcome.err and "nothing was removed" in outcome.err
    assert history["scored"].exists() and history[name].exists()
    follow = cli(*(word for word in words if word != str(history[name])))  # the advice: leave these out
    assert follow.code == 0 and not history["scored"].exists() and history[name].exists()


def test_rm_takes_a_model_with_all_that_was_made_with_it(cli, history) -> None:
    """The advice: remove first what keeps it, or name it too. The newest of a kind is never removed."""
    later = make_run(Path.cwd(), "20240305T000000-bbbbbb", "score", model=sha("3"))
    outcome = cli("runs", "rm", history["watched old"].name[:8], "--delete")
    assert outcome.code == 0 and not history["watched old"].exists()
    outcome = cli("runs", "rm", str(history["scored"]), str(history["scored newest"]), "--delete")
    assert outcome.code == 0 and not history["scored newest"].exists() and later.exists()


def test_rm_shows_before_it_removes(cli, history) -> None:
    assert "may go" in cli("runs", "rm", str(history["scored"])).out and history["scored"].exists()
    assert "the training of shop@champion" in cli("runs", "rm", str(history["champion"])).out
    assert cli("runs", "rm").code == 1
    elsewhere = shutil.copytree(history["scored"], Path("elsewhere"))
    assert "must be in runs" in cli("runs", "rm", str(elsewhere), "--delete").err and elsewhere.exists()


@pytest.mark.parametrize("at", ["renamed", "half"])
def test_a_kill_during_the_removal_leaves_no_run_and_the_next_one_cleans_up(cli, history, monkeypatch, at: str) -> None:
    class Killed(BaseException):
        pass

    def kill(path: Path, **_: Any) -> None:
        if at == "half":
            (path / "metrics.json").unlink()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(storage.shutil, "rmtree", kill)
        cli("runs", "rm", str(history["scored"]), "--delete")
    assert not history["scored"].exists() and list(Path("runs").glob(".removed-*"))
    assert str(history["scored"]) not in {str(path.resolve()) for path in runs.directories(Path("runs"))}
    assert not [path for path in runs.directories(Path("runs")) if "removed" in str(path)]
    assert cli("runs", "gc", "--delete").code == 0 and not list(Path("runs").glob(".removed-*"))


KINDS = st.lists(
    st.tuples(
        st.sampled_from(["train", "score", "monitor", "retrain"]),
        st.integers(0, 3),  # model that was made (train) or taken
        st.booleans(),  # finished
        st.integers(0, 60),  # age in days
        st.one_of(st.none(), st.integers(0, 5)),  # parent
    ),
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(KINDS, st.sampled_from(["0s", "10d", "30d"]))
def test_no_history_loses_what_a_kept_run_needs(tmp_path: Path, kinds: list[Any], older: str) -> None:
    """Closure, newest and age, over histories at random."""
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    made: list[Path] = []
    for place, (command, model, finished, age, parent) in enumerate(kinds):
        facts: dict[str, Any] = (
            {"outputs": {"model": sha(str(model))}} if command == "train" else {"model": sha(str(model))}
        )
        if parent is not None and parent < place:
            facts["parent"] = str(made[parent])
        run = make_run(tmp_path, f"20240101T0000{place:02d}-aaaaaa", command, **facts)
        made.append(aged(run if finished else unfinished(run), age))
    found = retention.entries(tmp_path / "runs")
    book = retention.Named({sha("0"): "shop@champion"}, {sha("0"): "shop@champion"}, {})
    kept = retention.spread(found, retention.roots(found, book, retention.units.Span(older).microseconds, older))
    by_directory = {item.directory: item for item in found}
    for item in found:
        record = item.node.record
        if item.directory in kept:
            needed = [other for other in found if other.node.made.get("output model") == record.get("model", "-")]
            parent = record.get("parent")
            assert all(other.directory in kept for other in needed)
            assert parent is None or Path(parent) in kept
        else:
            assert record.get("outputs", {}).get("model") != sha("0")
            assert item.age >= retention.units.Span(older).microseconds and (
                item.finished or item.age >= retention.UNFINISHED
            )
            assert not item.finished or any(
                other.kind == item.kind and other.finished and other.directory.name > item.directory.name
                for other in by_directory.values()
            )
