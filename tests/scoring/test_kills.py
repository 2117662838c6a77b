"""SIGKILL at any moment, then the same command again: the output of an unbroken run, and no finished unit scored twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.scoring.conftest import ROWS, Shop

UNITS = -(-ROWS // 1024)


def trials(shop: Shop, names: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.scoring.dying", str(shop.folder), str(shop.model), *names],
        capture_output=True, text=True, timeout=570, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["again"] == 0 and result["equal"], result
        assert result["temporaries"] == 0, result
        if result["killed"] and result["runs"] == 1:
            assert result["skipped"] == result["done"], "finished units are not scored again"
            assert result["skipped"] + result["scored"] == UNITS


def test_killed_around_writes_and_at_random_moments(shop: Shop) -> None:
    moments = random.Random(7)
    # 6 units have 2 renames each; run.json, context, ledger, profile and manifest make up the rest.
    names = [
        *(f"write:{number}" for number in (4, 9, 12, 15, 22, 25, 28)),
        *(f"time:{moments.randint(100, 900)}" for _ in "ab"),
    ]
    results = trials(shop, names)
    check(results)
    assert sum(result["killed"] for result in results) >= 5
    assert len({result["done"] for result in results}) >= 3


@pytest.mark.slow
def test_killed_around_every_write(shop: Shop) -> None:
    results = trials(shop, [f"write:{number}" for number in range(1, 36)])
    check(results)
    assert not results[-1]["killed"], "there is no 35th write: all were tried"


@pytest.mark.slow
def test_thirty_drivers_killed_at_random_moments(shop: Shop) -> None:
    moments = random.Random(11)
    results = trials(shop, [f"time:{moments.randint(20, 1500)}" for _ in range(30)])
    check(results)
    assert sum(result["killed"] for result in results) >= 15
