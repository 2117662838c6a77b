"""Nothing that comes from data can steer a terminal, on stdout, on stderr or in a log."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import __main__ as shell
from engine.errors import UserError
from engine.runtime import terminal
from tests.lifecycle.recorded import make_run

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egnp.exe\x00[/red][bold]"


@given(st.text())
def test_no_control_or_format_character_is_left_but_line_ends_and_tabs(text) -> None:
    shown = terminal.printable(text)
    assert all(letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs") for letter in shown)
    assert terminal.printable(shown) == shown
    assert "\n" not in terminal.one_line(text)


def test_ordinary_text_is_shown_as_it_is() -> None:
    for text in ("straße 7 €", "日本語", "a\tb\n", "[/red]", "…▁▂"):
        assert terminal.printable(text) == text
    assert terminal.printable("\x1b[31m") == "\\x1b[31m" and terminal.printable("\u202e") == "\\u202e"


def test_tables_keep_their_columns_whatever_a_cell_holds() -> None:
    lines = terminal.table(
        ["name", "n"], [[HOSTILE + "\n", 1], [None, 2.5], [["a", "b"], 30], [{"k": 1}, True]]
    ).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[1:4]}) == 1
    assert lines[2].split() == ["-", "2.5"] and lines[3].startswith("a, b")


@pytest.mark.parametrize("command", [["runs"], ["compare", "RUN", "RUN"], ["lineage", "RUN"], ["runs", "--json"]])
def test_commands_that_show_records_show_codes(workplace, capsys, command) -> None:
    run = make_run(workplace, "20260101T000000-aaaaaa", status=HOSTILE, inputs={HOSTILE: "0" * 64}, alarms=[HOSTILE])
    other = make_run(workplace, "20260101T000001-bbbbbb", inputs={HOSTILE: "1" * 64}, chain={"inputs": "0" * 64})
    words = [str(run) if word == "RUN" else word for word in command]
    words = [*words[:-1], str(other)] if command[0] == "compare" else words
    assert shell.main(words) == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not any(letter in text for letter in "\x1b\x07\r\x9b\u202e\x00")
    if command[-1] == "--json":
        assert HOSTILE in [item["status"] for item in json.loads(shown.out)]


def test_an_error_and_a_run_log_show_codes(cli, step) -> None:
    def hostile(config, run):
        run.warn(f"column {HOSTILE}")
        raise UserError(f"category {HOSTILE}")

    step(hostile)
    found = cli("train")
    log = next(Path("runs/train/unnamed").glob("*/run.log")).read_text()
    for text in (found.err, log):
        assert "\\x1b" in text and "\\u202e" in text
        assert not any(letter in text for letter in "\x1b\x07\x9b\u202e\x00")
