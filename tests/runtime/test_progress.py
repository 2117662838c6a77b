"""Progress: plain lines where there is no terminal, exact counts from threads, and never an error of its own."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.runtime import progress
from engine.runtime.progress import Progress


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
