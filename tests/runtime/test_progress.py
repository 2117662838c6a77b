"""Progress: plain lines where there is no terminal, exact counts from threads, and never an error of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.runtime import progress
from engine.runtime.progress import COMPILING, Progress
from engine.training import distributed
from kernels import compiling, jit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_end_with_what_was_done(capsys) -> None:
    with Progress("ingest", total=1000) as shown:
        shown.advance(400)
        shown.advance(600, note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ingest: 1,000 of 1,000 (100%) rows, ")
    assert "took" in lines[0] and lines[0].endswith("loss 0.5")


def test_a_terminal_gets_one_line_that_is_drawn_over(monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with Progress("train", total=2, unit="steps") as shown:
        shown.advance(1)
        shown.advance(1)
    text = screen.getvalue()
    assert text.count("\n") == 1 and text.count("\r") == 2 and "█" * 24 in text


def test_threads_lose_no_count(capsys) -> None:
    with Progress("score") as shown, ThreadPoolExecutor(8) as pool:
        list(pool.map(shown.advance, [1] * 2000))
    assert shown.done == 2000


def test_a_failure_is_shown_as_stopped_and_passes_on(capsys) -> None:
    with pytest.raises(RuntimeError), Progress("x", total=10) as shown:
        shown.advance(3)
        raise RuntimeError
    assert "3 of 10 (30%)" in (text := capsys.readouterr().err) and "stopped after" in text


def test_a_screen_that_is_gone_does_not_stop_the_work(monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress("x") as shown:
        screen.close()
        shown.advance(1)
    assert shown.done == 1


def test_figures_are_short() -> None:
    assert [progress.format_count(value) for value in (0, 999, 1500, 2.5e6, 3e9)] == [
        "0",
        "999",
        "1.5 k",
        "2.5 M",
        "3 G",
    ]
    assert [progress.format_seconds(value) for value in (0.5, 59, 75, 3700)] == ["0.5s", "59s", "1m15s", "1h01m"]


# -------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def clock(monkeypatch):
    """`clock.append(seconds)` lets time pass for progress and compilation."""
    passed: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: sum(passed))
    monkeypatch.setattr(compiling, "_spent", 0.0)
    return passed


def compile_for(clock: list[float], *seconds: float) -> None:
    """A kernel that compiles others inside its own compilation."""
    for _ in seconds:
        compiling.begin()
    for length in seconds:
        clock.append(length)
        compiling.end()


def test_an_estimate_leaves_out_the_time_in_which_kernels_were_compiled(clock, capsys) -> None:
    """A first run said `481 rows/s, 10m44s left` of work that took seconds."""
    with Progress("features", total=30_000) as shown:
        compile_for(clock, 15, 10)
        clock.append(11)
        shown.advance(11_000)
        assert shown.rate == pytest.approx(1_000)
        clock.append(9)
        compile_for(clock, 5)
        clock.append(10)
        shown.advance(19_000)
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"features: 0 of 30,000 (0%) rows, {COMPILING}"
    assert second == "features: 11,000 of 30,000 (37%) rows, 1 k rows/s, 19s left"
    assert last == f"features: 30,000 of 30,000 (100%) rows, 1 k rows/s, took 1m00s, 30s of it {COMPILING}"


def test_compiling_is_said_once_and_only_while_work_is_shown(clock, capsys) -> None:
    compile_for(clock, 5)
    with Progress("a", total=10) as shown:
        shown.advance(5)
        for _ in range(3):
            compile_for(clock, 0.1)
    compile_for(clock, 5)
    lines = capsys.readouterr().err.splitlines()
    assert [COMPILING in line for line in lines] == [True, False]
    assert compiling.listeners == []


def test_a_worker_tells_its_driver_that_it_compiles(clock, tmp_path, capsys) -> None:
    path = tmp_path / "progress.json"
    worker, driver = distributed.FileProgress(path, "train", 100, "rows", 0), Progress("train", total=100)
    with driver:
        with worker:
            compiling.begin()
            clock.append(20)
            seen = distributed.json.loads(path.read_text())
            driver.follow(**seen)
            assert seen["note"] == COMPILING == driver._note
            compiling.end()
            clock.append(10)
            worker.advance(50)
            seen = distributed.json.loads(path.read_text())
        driver.follow(**seen)
        assert driver._note == ""
        assert (seen["done"], seen["seconds"], seen["note"]) == (50, pytest.approx(10), "")


SCRIPT = """
import numpy as np
from engine.runtime.progress import Progress
from kernels import compiling, order
with Progress("rows", total=1) as shown:
    order.permutation(0, 3, 3, 0, 0)
    shown.advance(1)
print(round(compiling.seconds(), 3))
"""


@pytest.mark.skipif(jit.DISABLED, reason="nothing is compiled")
def test_what_the_cache_holds_is_not_said_to_be_compiled(tmp_path) -> None:
    """A real kernel: the first process compiles it, the second one loads it."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        said.append((COMPILING in done.stderr, float(done.stdout)))
    assert said[0][0] and said[0][1] > 0.1
    assert said[1] == (False, 0.0)
