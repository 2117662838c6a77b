"""`data gc`: a dataset that a run has named, the newest and the young ones stay; a kill leaves no half of one."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data import dataset_gc
from engine.runtime import storage

DAY = 86_400


def make_dataset(name: str, entry: str, digest: str, days: float = 10) -> Path:
    folder = Path("store/datasets") / name / entry
    folder.mkdir(parents=True)
    (folder / "part-0.parquet").write_bytes(b"x" * 1000)
    storage.write_json(folder / "manifest.json", {"digest": digest})
    os.utime(folder, (time.time() - days * DAY,) * 2)
    return folder


def make_run(digest: str, root: str = "runs", command: str = "train", **facts: Any) -> Path:
    folder = Path(root) / command / "shop" / f"2024-{len(list(Path(root).glob('*/*/*')))}"
    folder.mkdir(parents=True)
    storage.write_json(folder / "run.json", facts or {"chain": {"dataset": digest}})
    return folder


@pytest.fixture
def stored(workplace: Path) -> dict[str, Path]:
    found = {
        "stray": make_dataset("shop", "aaaa", "1" * 64),
        "named": make_dataset("shop", "bbbb", "2" * 64),
        "backtest": make_dataset("shop", "cccc", "3" * 64),
        "young": make_dataset("shop", "dddd", "4" * 64, days=0.5),
        "newest": make_dataset("shop", "eeee", "5" * 64),
        "used": make_dataset("other", "aaaa", "6" * 64),
        "half": make_dataset("shop", ".ffff.1234.tmp", "7" * 64),
    }
    storage.write_json(Path("store/datasets/shop/latest.json"), {"recipe": "", "entry": "eeee", "digest": "5" * 64})
    (Path("store/datasets/shop") / ".staged").mkdir()
    os.utime("store/datasets/shop/.staged", (0, 0))
    make_run("2" * 64)
    make_run("3" * 64, "store/backtest")
    make_run("", used={"dataset": "6" * 64})
    return found


def ask(cli, *words: str) -> dict[str, dict[str, Any]]:
    outcome = cli("data", "gc", *words, "--json")
    assert outcome.code == 0, outcome.err
    return {row["directory"]: row for row in json.loads(outcome.out)}


def test_what_keeps_a_dataset_is_said_and_only_the_others_go(cli, stored) -> None:
    rows = ask(cli)
    assert {name: rows[str(path)]["kept"] for name, path in stored.items()} == {
        "stray": None,
        "named": "named by train/shop/2024-0",
        "backtest": "named by train/shop/2024-0",
        "young": "younger than a day",
        "newest": "the newest of its name",
        "used": "named by train/shop/2024-1",
        "half": None,
    }
    assert all(path.exists() for path in stored.values())
    text = cli("data", "gc").out
    assert "2 of 7 datasets" in text and "add --delete" in text
    ask(cli, "--delete")
    assert {name for name, path in stored.items() if not path.exists()} == {"stray", "half"}
    assert Path("store/datasets/shop/.staged").exists() and not list(Path("store/datasets").glob(".removed-*"))
    assert not [row for row in ask(cli).values() if row["kept"] is None]


def test_a_name_that_is_being_ingested_is_left_alone(cli, stored) -> None:
    with open("store/datasets/shop/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = ask(cli, "--delete")
    assert rows[str(stored["stray"])]["kept"] == dataset_gc.INGEST and stored["stray"].exists()


def test_a_damaged_run_stops_the_clean_up(cli, stored) -> None:
    (make_run("9" * 64) / "run.json").write_text('{"chain": 3}')
    outcome = cli("data", "gc", "--delete")
    assert outcome.code == 1 and "run.json" in outcome.err and stored["stray"].exists()


def test_a_kill_during_the_removal_leaves_no_dataset(cli, stored, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def kill(path: Path, **_: Any) -> None:
        (path / "part-0.parquet").unlink()  # the manifest still says that all is there
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(storage.shutil, "rmtree", kill)
        cli("data", "gc", "--delete")
    names = {path.parent.name for path in Path("store/datasets").glob("*/*/manifest.json")}
    assert len(list(Path("store/datasets").glob(".removed-*"))) == 1 and len(names) == 5
    assert cli("data", "gc", "--delete").code == 0 and not list(Path("store/datasets").glob(".removed-*"))
