"""SIGKILL at any moment, then the same command again: the output of an unbroken run, and no finished unit scored twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engine
from engine.errors import UserError
from engine.runtime.run import Run
from engine.scoring import score as score_module
from tests.conftest import ROOT
from tests.scoring.conftest import ROWS, Shop, contents

UNITS = -(-ROWS // 1024)


def trials(shop: Shop, names: list[str], reasons: int = 0) -> list[dict[str, Any]]:
    keys = {"PYTHONPATH": str(ROOT), "REASONS": str(reasons)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.scoring.dying", str(shop.folder), str(shop.model), *names],
        capture_output=True, text=True, timeout=570, check=False, cwd=ROOT, env={**os.environ, **keys},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["again"] == 0 and result["equal"], result
        assert result["temporaries"] == 0, result
        assert result["seen"] in (0, ROWS), "a reader of *.parquet sees all rows or none"
        if result["killed"] and result["runs"] == 1:
            assert result["skipped"] == result["done"], "finished units are not scored again"
            assert result["skipped"] + result["scored"] == UNITS


def test_killed_around_writes_and_at_random_moments(shop: Shop) -> None:
    moments = random.Random(7)
    # 6 units have 2 renames each; run.json, context, ledger, profile and manifest make up the rest.
    names = [
        f"time:{moments.randint(10, 80)}",
        *(f"write:{number}" for number in (4, 12, 15, 25)),
    ]
    results = trials(shop, names)
    check(results)
    assert sum(result["killed"] for result in results) >= 4
    assert len({result["done"] for result in results}) >= 3


@pytest.mark.slow
def test_killed_around_every_write(shop: Shop) -> None:
    results = trials(shop, [f"write:{number}" for number in range(1, 100)])
    check(results)
    assert len(results) > 2 * UNITS and not results[-1]["killed"], "all writes there are were tried"


@pytest.mark.slow
def test_thirty_drivers_killed_at_random_moments(shop: Shop) -> None:
    moments = random.Random(11)
    results = trials(shop, [f"time:{moments.randint(3, 97)}" for _ in range(30)])
    check(results)
    assert sum(result["killed"] for result in results) >= 15


@pytest.mark.slow
def test_drivers_that_give_reasons_killed_at_random_moments(shop: Shop) -> None:
    moments = random.Random(5)
    results = trials(shop, [*(f"time:{moments.randint(3, 97)}" for _ in range(8)), "write:8", "write:13"], reasons=3)
    check(results)
    assert sum(result["killed"] for result in results) >= 5


# ------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB; making one takes the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler.write_bytes(b"\0" * max(free - leave, 0))
    return filler


@pytest.mark.parametrize("leave", [0, 30_000, 70_000, 130_000])
def test_a_full_disk_leaves_whole_files_and_a_rerun_finishes(
    shop: Shop, unbroken: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    words = shop.words("score.columns=[shop,size]", runs=small_disk / "runs")
    prepare = score_module.prepare
    filler: list[Path] = []

    def prepare_and_fill(*arguments: Any) -> Any:
        plan = prepare(*arguments)
        filler.append(fill(small_disk, leave))
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "prepare", prepare_and_fill)
        with pytest.raises(UserError, match=r"the disk that holds .* is full"):
            engine.run("score", *words, config_dir=shop.conf)
    (directory,) = (small_disk / "runs" / "score" / "tiny").iterdir()
    assert not (directory / "DONE").exists() and not (directory / "predictions" / "_manifest.json").exists()
    for part in directory.rglob("*.parquet"):
        pq.read_table(part)
    filler[0].unlink()
    run = engine.run("score", *words, config_dir=shop.conf)
    assert run.directory == directory
    assert contents(run.directory / "predictions") == contents(unbroken.directory / "predictions")
    assert (run.directory / "profile.json").read_bytes() == (unbroken.directory / "profile.json").read_bytes()
    assert not list(directory.rglob("*.tmp"))
