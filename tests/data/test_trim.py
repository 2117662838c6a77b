"""Exports that are no table from line 1: preamble, comments, units, trailing delimiters and footers, cut at any place."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.data import CsvOptions
from engine.data.bounds import USUAL
from engine.data.readers import split_text, trim
from engine.errors import UserError
from tests.data.helpers import read

COLUMNS = {"n": "int64", "t": "string"}
TEXT = st.text(st.sampled_from('ab,"\n\r# \u00e9'), max_size=6)
LINE = st.text(st.sampled_from('ab,"#; \u00e9'), max_size=8)


def table_of(path: Path, piece: int, **options: Any) -> tuple[list[tuple[Any, Any]], list[tuple[int, str]]]:
    """(rows, (row number, reason) of what is quarantined) of a file read in blocks of `piece` bytes."""
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        table, found = read(path, COLUMNS, csv=options)
    finally:
        split_text.PIECE = usual
    assert found.tally.rows == found.tally.kept + found.tally.quarantined
    rows = list(zip(*(table.column(name).to_pylist() for name in COLUMNS), strict=True)) if table.num_rows else []
    return rows, sorted((record["row"], record["reason"]) for record in found.tally.records)


def written(rows: list[tuple[Any, Any]], end: str, quoting: Any, trailing: bool) -> list[str]:
    """One text a row, its line end included."""
    found = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="," + end if trailing else end, quoting=quoting).writerow(row)
        found.append(text.getvalue())
    return found


@given(
    rows=st.lists(st.tuples(st.integers(-9, 9) | st.just("x"), TEXT), min_size=1, max_size=8),
    preamble=st.lists(LINE, max_size=3),
    comments=st.lists(st.tuples(st.integers(0, 8), LINE), max_size=4),
    units=st.lists(LINE, max_size=2),
    footer=st.lists(LINE, max_size=3),
    trailing=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    piece=st.integers(1, 60),
    marks=st.sampled_from(["", "\ufeff"]),
    ended=st.booleans(),
)
@settings(max_examples=150)
def test_what_surrounds_a_table_leaves_no_trace_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list, preamble: list, comments: list, units: list, footer: list,
    trailing: bool, end: str, quoting: Any, piece: int, marks: str, ended: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("c")
    (folder / "plain.csv").write_bytes(("n,t" + end + "".join(written(rows, end, quoting, False))).encode())
    lines = written(rows, end, quoting, trailing)
    for place, text in comments:
        lines.insert(min(place, len(lines)), f"#{text}{end}")
    around = [line + end for line in preamble], [line + end for line in units], [line + end for line in footer]
    text = marks + "".join([*around[0], "n,t" + end, *around[1], *lines, *around[2]])
    if footer and footer[-1] and not ended:
        text = text.removesuffix(end)
    (folder / "export.csv.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "export.csv").write_bytes(text.encode())
    options = {
        "skip": len(preamble), "skip_after_header": len(units), "footer": len(footer), "comment": "#",
        "trailing_delimiter": trailing,
    }  # fmt: skip
    right = table_of(folder / "plain.csv", 1 << 20)
    assert table_of(folder / "export.csv", piece, **options) == right
    assert table_of(folder / "export.csv.gz", piece, **options) == right


MESSY = ["1,a", '2,"b"', '3,"c,d"', '4,"e\n#f"', '5,"g""h"', '6,i"j', '7,"k"l', "8", "x,o", "", "9,#m"]


@given(st.lists(st.sampled_from([*MESSY, "#", '#"', "#a,b,c"]), max_size=14), st.integers(1, 40))
@settings(max_examples=150)
def test_comments_among_rows_of_broken_quotes_are_left_out_and_rows_keep_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    (folder / "a.csv").write_text("\n".join(["n,t", *lines]) + "\n")
    (folder / "b.csv").write_text("\n".join(["n,t", *(line for line in lines if line[:1] != "#")]) + "\n")
    assert table_of(folder / "a.csv", piece, comment="#") == table_of(folder / "b.csv", 1 << 20)


@given(st.binary(max_size=40), st.integers(0, 4), st.integers(1, 50), st.sampled_from([b"\n", b"\r\n"]))
@settings(max_examples=150)
def test_a_footer_is_the_last_lines_of_the_file(data: bytes, lines: int, piece: int, end: bytes) -> None:
    data = data.replace(b"\r", b"").replace(b"a", b"\n").replace(b"\n", end)
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        found = trim.without_footer(io.BytesIO(data), lines, USUAL).read()  # type: ignore[arg-type]
    finally:
        split_text.PIECE = usual
    kept = data.splitlines(keepends=True)
    assert found == b"".join(kept[: max(len(kept) - lines, 0)])


@pytest.mark.parametrize(
    ("last", "kept"),
    [("3,c,", [1, 2, 3]), ("3,c", [1, 2]), ("3,c,d", [1, 2]), ('3,c,""', [1, 2, 3]), ('3,c," "', [1, 2]), ("3,c,,", [1, 2])],
)  # fmt: skip
def test_a_trailing_delimiter_has_nothing_behind_it(tmp_path: Path, last: str, kept: list[int]) -> None:
    (tmp_path / "x.csv").write_text(f"n,t\n1,a,\n2,b,\n{last}\n")
    rows, bad = table_of(tmp_path / "x.csv", 1 << 20, trailing_delimiter=True)
    assert [row[0] for row in rows] == kept and [row for row, _ in bad] == [3] * (3 - len(kept))
    with_header = (tmp_path / "x.csv").read_text().replace("n,t\n", "n,t,\n")
    (tmp_path / "y.csv").write_text(with_header)
    assert table_of(tmp_path / "y.csv", 1 << 20, trailing_delimiter=True) == (rows, bad)
    with pytest.raises(UserError, match=r"x\.csv, row 3") if len(kept) < 3 else io.StringIO():
        table_of(tmp_path / "x.csv", 1 << 20, trailing_delimiter=True, ragged="fail")


def test_a_file_of_nothing_but_what_is_left_out_is_empty_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("#a\n#b\nn,t\n")
    with pytest.raises(UserError, match=r"is empty: .* beside what csv\.skip and csv\.comment leave out"):
        table_of(tmp_path / "x.csv", 1 << 20, comment="#", skip=3)
    assert table_of(tmp_path / "x.csv", 1 << 20, comment="#") == ([], [])


@pytest.mark.parametrize("options", [{"comment": ""}, {"comment": "a\nb"}, {"header": False, "skip_after_header": 1}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        schema.build(CsvOptions, options)
