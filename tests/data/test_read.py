"""Readers against slow oracles: Python's csv and json modules, one value at a time, pieces of every size."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import time
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.arrow_types import parse_type, type_name
from engine.data.parse import Reading, to_type
from engine.data.readers import csv_files, split_text
from engine.errors import UserError
from tests.data.helpers import read

TEXT = st.text(st.sampled_from('ab,"\n\r\t x\u00e9'), max_size=6)


@given(
    st.lists(st.tuples(TEXT, st.integers(-(2**63), 2**63 - 1), TEXT), max_size=12),
    st.integers(3, 80),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60)
def test_text_survives_whatever_it_holds(
    tmp_path_factory: pytest.TempPathFactory, rows: list, piece: int, end: str
) -> None:
    path = tmp_path_factory.mktemp("c") / "x.csv"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "n", "b"])
    for row in rows:
        writer.writerow(row)
    path.write_bytes(text.getvalue().encode())
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        table, found = read(path, {"a": "string", "n": "int64", "b": "string"})
    finally:
        split_text.PIECE = usual
    got = list(zip(*(table.column(name).to_pylist() for name in "anb"), strict=True)) if table.num_rows else []
    assert got == [(a, n, b) for a, n, b in rows]
    assert found.tally.quarantined == 0 and found.tally.rows == len(rows)


ROWS = ["1,a", '2,"b"', '3,"c,d"', '4,"e\nf"', '5,"g""h"', '6,i"j', '7,"k"l', "8", "9,m,n", "x,o", ""]


@given(st.lists(st.sampled_from(ROWS), max_size=14), st.integers(1, 40))
@settings(max_examples=80)
def test_rows_are_numbered_and_accounted_for_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], piece: int
) -> None:
    path = tmp_path_factory.mktemp("c") / "x.csv"
    path.write_text("\n".join(["n,t", *rows]) + "\n")
    good = {"1,a": "a", '2,"b"': "b", '3,"c,d"': "c,d", '4,"e\nf"': "e\nf", '5,"g""h"': 'g"h', '6,i"j': 'i"j'}
    real = [row for row in rows if row]
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        table, found = read(path, {"n": "int64", "t": "string"})
    finally:
        split_text.PIECE = usual
    assert (table.column("t").to_pylist() if table.num_rows else []) == [good[row] for row in real if row in good]
    assert sorted(record["row"] for record in found.tally.records) == [
        i for i, row in enumerate(real, 1) if row not in good
    ]
    assert found.tally.rows == len(real) == found.tally.kept + found.tally.quarantined


def test_an_unclosed_quote_loses_the_rest_as_one_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('n,t\n1,a\n2,"never\n3,closed\n')
    table, found = read(tmp_path / "x.csv", {"n": "int64", "t": "string"})
    assert table.column("n").to_pylist() == [1] and found.tally.rows == 2
    assert "unexpected end of data" in found.tally.records[0]["reason"]


def test_the_fast_and_the_careful_path_agree(tmp_path: Path) -> None:
    values = {
        "int64": [
            "1",
            " 2 ",
            "+3",
            "007",
            "1.0",
            "",
            "9223372036854775807",
            "9223372036854775808",
            "1e3",
            "0x1",
            "1_0",
        ],
        "float64": ["1", " 2.5 ", "+3", "1e5", "", "inf", "-Infinity", "nan", "1,5", "1e999", "0x1p3"],
        "bool": ["true", "F", "1", "0", "", "Yes", "maybe", "TRUE"],
        "date": ["2020-02-29", "2021-02-29", "", "20200101", "2020-1-1"],
        "timestamp": [
            "2020-01-01T00:00:00Z",
            "2020-01-01 00:00",
            "2020-01-01",
            "",
            "2020-01-01T00:00:00+05:30",
            "1577836800",
            "x",
        ],
    }
    for kind, texts in values.items():
        alone = []
        for place, text in enumerate(texts):  # each alone: the fast path takes what it can
            path = tmp_path / f"{kind}-{place}.csv"
            path.write_text(f"v|k\n{text}|1\n")
            table, found = read(path, {"v": kind, "k": "int64"}, csv={"delimiter": "|"})
            alone.append((table.column("v")[0].as_py() if table.num_rows else None, found.tally.quarantined))
        path = tmp_path / f"{kind}.csv"  # together: the bad ones force the careful path on all
        path.write_text("v|k\n" + "".join(f"{text}|1\n" for text in texts))
        table, found = read(path, {"v": {"type": kind, "on_violation": "null"}, "k": "int64"}, csv={"delimiter": "|"})
        bad = {record["row"] for record in found.tally.records}
        together = [(value, int(i in bad)) for i, value in enumerate(table.column("v").to_pylist(), 1)]
        assert str(alone) == str(together)


@pytest.mark.parametrize(
    ("text", "kind", "right"),
    [
        ("+3", "int64", 3), ("1.0", "int64", 1), ("-0007.000", "int64", -7), ("1e3", "int64", None), ("1.5", "int64", None),
        ("18446744073709551615", "uint64", 2**64 - 1), ("-1", "uint64", None), ("300", "uint8", None),
        ("9007199254740993", "int64", 2**53 + 1), ("9007199254740993.0", "int64", 2**53 + 1),
        ("1.10", "decimal(5,2)", Decimal("1.10")), ("1.005", "decimal(5,2)", None), ("1e2", "decimal(5,2)", Decimal("100.00")),
        ("12:30:15.5", "time", datetime.time(12, 30, 15, 500_000)), ("24:00", "time", None), ("9:00", "time", None),
        ("1.5", "float16", 1.5), ("70000", "float16", None), ("12:30:15", "string", "12:30:15"), ("007", "string", "007"),
    ],
)  # fmt: skip
def test_a_text_becomes_the_value_or_none(text: str, kind: str, right: object) -> None:
    parsed = to_type(pa.array(["", text]), parse_type(kind), Reading())
    assert parsed.values[1].as_py() == right
    assert parsed.bad.tolist() == ([1] if right is None else [])


@pytest.mark.parametrize(
    ("values", "kind", "right", "bad"),
    [
        (pa.array([1.0, 2.5, None]), "int64", [1, None, None], [1]),
        (pa.array([2**53 + 1]), "float64", [None], [0]),
        (pa.array([300, -1]), "uint8", [None, None], [0, 1]),
        (pa.array([0.1, 2.0]), "float32", [None, 2.0], [0]),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), "int64", [None, 2], [0]),
        (pa.array([1_500, 2_000], pa.timestamp("ns")), "timestamp", [None, 2], [0]),
        (pa.array([1, None], pa.timestamp("s")), "timestamp", [1_000_000, None], []),
        (pa.array(["a", None]).dictionary_encode(), "string", ["a", None], []),
    ],
)
def test_a_cast_keeps_a_value_exactly_or_names_it(values: pa.Array, kind: str, right: list, bad: list[int]) -> None:
    parsed = to_type(values, parse_type(kind), Reading())
    shown = parsed.values.cast(pa.int64()) if kind == "timestamp" else parsed.values
    assert shown.to_pylist() == right and parsed.bad.tolist() == bad


@pytest.mark.parametrize(
    "text", ["0x1F", "0X1f", " 0x1F", "\t0x1F", "-0x1F", "+0x1F", '"0x1F"', "0xFFFFFFFFFFFFFFFF", "0x"]
)
@pytest.mark.parametrize("place", ["first", "later", "very first"])
def test_hexadecimal_text_is_no_integer_wherever_it_stands(tmp_path: Path, text: str, place: str) -> None:
    row = f"{text},7\n" if place != "later" else f"7,{text}\n"
    header = place != "very first"
    path = tmp_path / "a.csv"
    path.write_text(("v,k\n1,1\n" if header else "") + row)
    _, found = read(path, {"v": "int64", "k": "int64"}, csv={"header": header})
    assert found.tally.quarantined == 1


def test_an_x_inside_a_text_keeps_the_fast_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tail numbers such as N920XJ once sent whole files down the careful path, at a third of the speed."""
    path = tmp_path / "a.csv"
    path.write_text("v,k\nN920XJ,1\n10x,2\na0xb,3\n")
    careful = csv_files._Parser._careful
    pieces = []
    monkeypatch.setattr(csv_files._Parser, "_careful", lambda self, piece: pieces.append(piece) or careful(self, piece))
    table, _ = read(path, {"v": "string", "k": "int64"})
    assert table.column("v").to_pylist() == ["N920XJ", "10x", "a0xb"] and not pieces


def test_local_times_at_a_clock_change() -> None:
    texts = ["2013-11-03 01:30:00", "2013-03-10 02:30:00", "2013-07-01 00:00:00", "2013-11-03T01:30:00-05:00"]
    parsed = to_type(pa.array(texts), parse_type("timestamp"), Reading(zone="America/New_York"))
    seconds = [None if v is None else v // 10**6 for v in parsed.values.cast(pa.int64()).to_pylist()]
    assert seconds == [
        1383456600,
        None,
        1372651200,
        1383460200,
    ]  # the first 01:30; 02:30 never was; summer time; the second 01:30
    assert parsed.bad.tolist() == [1]


def test_json_lines_keep_numbers_as_written(tmp_path: Path) -> None:
    lines = [
        '{"id": 9007199254740993, "x": 1.5, "t": "a", "d": 1.10, "in": {"deep": 7}}',
        '{"t": "b", "id": 2, "x": null, "d": "2.345", "in": {}}',
        '{"id": "3", "x": 1, "t": "c"}',
        '{"id": 4, "x": "1.5", "t": 5, "d": null}',
        "not json",
        '{"id": 6, "id": 7}',
        "[1]",
        '{"id": 8, "x": 2, "t": "é", "d": 0.30, "extra": [1]}',
    ]
    for name, raw in (("x.jsonl", "\n".join(lines).encode()), ("x.jsonl.gz", gzip.compress("\n".join(lines).encode()))):
        (tmp_path / name).write_bytes(raw)
        columns = {
            "id": "int64",
            "x": "float64",
            "t": "string",
            "d": "decimal(6,3)",
            "deep": {"type": "int64", "path": "in.deep"},
        }
        table, found = read(tmp_path / name, columns)
        assert table.column("id").to_pylist() == [9007199254740993, 2, 8]
        assert table.column("d").to_pylist() == [Decimal("1.100"), Decimal("2.345"), Decimal("0.300")]
        assert table.column("deep").to_pylist() == [7, None, None] and table.column("t").to_pylist() == ["a", "b", "é"]
        bad = sorted((record["row"], record["column"]) for record in found.tally.records if record["column"])
        assert bad == [(3, "id"), (4, "t"), (4, "x")]
        assert sorted(record["row"] for record in found.tally.records if not record["column"]) == [5, 6, 7]
        assert found.notes["unexpected"] == ["extra"] or "extra" in found.notes["unexpected"]


RECORD = st.fixed_dictionaries(
    {
        "a": st.none() | st.integers(-(2**63), 2**63 - 1),
        "b": st.none() | st.text(max_size=5),
        "c": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    }
)


@given(st.lists(RECORD, min_size=1, max_size=8))
@settings(max_examples=40)
def test_json_lines_are_read_like_python_reads_them(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, _ = read(path, {"a": "int64", "b": "string", "c": "float64"})
    assert table.to_pylist() == rows


def test_a_missing_key_is_a_missing_column_only_where_no_line_has_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    table, _ = read(tmp_path / "x.jsonl", {"a": "int64", "b": "int64"})
    assert table.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    with pytest.raises(UserError, match=r"x\.jsonl: column 'c' is missing"):
        read(tmp_path / "x.jsonl", {"a": "int64", "b": "int64", "c": "int64"})


@pytest.mark.parametrize(
    "kind",
    ["int8", "uint64", "float16", "decimal(38,10)", "decimal(76,2)", "list<map<string,int64>>", "timestamp", "time"],
)
def test_type_names_come_back(kind: str) -> None:
    assert type_name(parse_type(kind)) == kind


@pytest.mark.parametrize(
    ("kind", "hint"), [("int46", "int64"), ("varchar", "string"), ("decimal(3,5)", "scale"), ("timestmp", "timestamp")]
)
def test_an_unknown_type_names_the_nearest(kind: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        parse_type(kind)


@given(st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b'"')))
def test_quotes_in_place_are_told_from_quotes_out_of_place(raw: bytes) -> None:
    # Oracle: a strict reader that must not complain, and whose fields hold no bare quote where none was doubled.
    if split_text.well_quoted(raw, b'"', b","):
        text = raw.decode("latin-1")
        list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_numbers_of_rows_stay_right_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_text, "PIECE", 1000)
    rng = np.random.default_rng(0)
    lines = [f"{i},{i * 2}" if rng.random() > 0.02 else f"{i},bad" for i in range(5000)]
    (tmp_path / "x.csv").write_text("a,b\n" + "\n".join(lines))
    for threads in (1, 3):
        table, found = read(tmp_path / "x.csv", {"a": "int64", "b": "int64"}, threads=threads)
        assert [record["row"] for record in found.tally.records] == [
            i for i, line in enumerate(lines, 1) if line.endswith("bad")
        ]
        assert table.num_rows == 5000 - len(found.tally.records)


def test_a_file_without_header_has_the_columns_that_stand_in_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("1,x\n2,y\n")
    columns = {"file": {"type": "string", "path": "$file"}, "n": "int64", "row": {"type": "int64", "path": "$row"}}
    columns |= {"digest": {"type": "string", "path": "$digest"}}
    table, found = read(tmp_path / "in" / "a.csv", {**columns, "s": "string"}, csv={"header": False})
    assert found.tally.quarantined == 0
    of_file = {"file": "a.csv", "digest": hashlib.sha256(b"1,x\n2,y\n").hexdigest()}
    assert table.to_pylist() == [{**of_file, "n": n, "row": n, "s": s} for n, s in ((1, "x"), (2, "y"))]


def test_what_stands_where_a_nested_object_must_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": {"v": 1.5}}\n{"n": null}\n{"n": 7}\n{"n": {}}\n{"n": "t"}\n{"n": false}\n')
    table, found = read(tmp_path / "x.jsonl", {"v": {"type": "float64", "path": "n.v"}})
    assert table.column("v").to_pylist() == [1.5, None, None]
    told = [(item["row"], item["value"], item["reason"]) for item in found.tally.records]
    assert told == [(3, "7", "is no float64"), (5, '"t"', "is no float64"), (6, "false", "is no float64")]
    (tmp_path / "x.jsonl").write_text('{"n": null}\n{"n": null}\n')  # all null is not missing
    assert read(tmp_path / "x.jsonl", {"v": {"type": "float64", "path": "n.v"}})[0]["v"].to_pylist() == [None, None]


def test_a_file_of_no_json_lines_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1},\n{"a": 2}]\n')
    with pytest.raises(UserError, match=r"x\.json must hold one JSON object a line, found none in 2 lines"):
        read(tmp_path / "x.json", {"a": "int64"})


ARCHIVES = ("x.csv.gz", "x.csv.zst", "x.csv.bz2", "x.csv.xz", "x.csv.zip", "x.jsonl.gz", "x.parquet.gz", "x.arrow.xz")


def pack(path: Path, text: bytes) -> bytes:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.csv", text)
        return path.read_bytes()
    if path.suffix == ".zst":
        return pa.Codec("zstd").compress(text, asbytes=True)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix](text)


DAMAGES = [(name, damage) for name in ARCHIVES for damage in ("other", "torn", "flipped")]
DAMAGES.remove(("x.csv.zst", "flipped"))  # Arrow writes .zst without a checksum


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_broken_archive_is_refused_with_its_name(tmp_path: Path, name: str, damage: str) -> None:
    rng = random.Random(0)
    whole = bytearray(pack(tmp_path / name, b"a\n" + b"".join(b"%d\n" % rng.getrandbits(50) for _ in range(5000))))
    if damage == "flipped":
        for place in range(len(whole) // 2, len(whole) // 2 + 8):
            whole[place] ^= 0xFF
    broken = {"other": b"no archive at all", "torn": bytes(whole[: len(whole) // 2])}.get(damage, bytes(whole))
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(UserError, match=rf"{re.escape(name)}.* cannot be unpacked"):
        read(tmp_path / name, {"a": "int64"})


def test_what_is_no_broken_archive_is_not_called_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.csv.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "a\n2\n")
    with pytest.raises(UserError, match="must hold exactly one file, found 2") as two:
        read(tmp_path / "x.csv.zip", {"a": "int64"})
    (tmp_path / "y.csv").write_bytes(b"a\n1\n\x81\n")
    with pytest.raises(UserError, match="must be cp1252 text, found byte 0x81") as torn:
        read(tmp_path / "y.csv", {"a": "int64"}, csv={"encoding": "cp1252"})
    assert "unpacked" not in f"{two.value}{torn.value}"


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    whole = bytearray(pack(tmp_path / "x.csv.zip", b"a\n1\n"))
    whole[6] |= 1  # the flag of the member, and that in the directory
    whole[whole.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.csv.zip").write_bytes(whole)
    with pytest.raises(UserError, match=r"cannot be unpacked: .*encrypted"):
        read(tmp_path / "x.csv.zip", {"a": "int64"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_line_in_which_excel_tells_the_delimiter_is_no_row(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["sep=;", "a;b", "1;2,5", "3;4", ""])
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    options = {"delimiter": ";", "decimal": ",", "encoding": encoding}
    table, found = read(tmp_path / "x.csv", {"a": "int64", "b": "float64"}, csv=options)
    assert table.to_pylist() == [{"a": 1, "b": 2.5}, {"a": 3, "b": 4.0}] and found.tally.rows == 2
    with pytest.raises(UserError, match=r"its first line says that ';' separates fields, csv\.delimiter is ','"):
        read(tmp_path / "x.csv", {"a": "int64", "b": "float64"}, csv={"encoding": encoding})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.csv").write_bytes("a,b\n1,ä\n".encode(encoding))
    with pytest.raises(UserError, match=rf"seems to be UTF-16 text without a mark: set .*encoding={encoding}"):
        read(tmp_path / "x.csv", {"a": "int64", "b": "string"})
    table, _ = read(tmp_path / "x.csv", {"a": "int64", "b": "string"}, csv={"encoding": encoding})
    assert table.to_pylist() == [{"a": 1, "b": "ä"}]


TEXTS = (
    "1", "-1", "+1", "1.0", "1.5", ".5", "5.", "1e3", "1E-3", "nan", "-inf", "Infinity", "1e999", "300", "70000",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "0x10", "1_000", "1,5", "", " 7 ", "abc", None,
    "true", "F", "yes", "maybe", "2020-02-29", "2021-02-29", "2020-2-9", "29/02/2020", "2020-01-01T00:00:00Z",
    "2020-01-01 00:00:00.123456", "2020-01-01T25:00:00", "2020-01-01 12:00 +0530", "12:30", "12:30:00.5", "25:00", "9:30",
)  # fmt: skip
KINDS = (
    "int8", "int32", "int64", "uint64", "float16", "float32", "float64", "decimal(6,2)", "bool", "date", "time",
    "timestamp", "string",
)  # fmt: skip


@pytest.mark.parametrize("form", [None, "%d/%m/%Y"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_good_or_bad_by_itself(kind: str, form: str | None) -> None:
    together = to_type(pa.array(TEXTS), parse_type(kind), Reading(format=form))
    alone = [to_type(pa.array([text], pa.string()), parse_type(kind), Reading(format=form)) for text in TEXTS]
    assert together.bad.tolist() == [place for place, one in enumerate(alone) if len(one.bad)]
    assert together.values.equals(pa.concat_arrays([one.values for one in alone])) or kind.startswith("float")
    assert str(together.values.to_pylist()) == str([one.values[0].as_py() for one in alone])


@pytest.mark.parametrize("found", ["int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize("kind", ["int8", "int64", "uint64", "float32", "float64", "decimal(6,2)"])
def test_a_number_is_good_or_bad_by_itself(kind: str, found: str) -> None:
    numbers = [0, 1, 127, 128, 2**24 + 1, 2**53 + 1, 2**63 - 1, None]
    numbers += [] if found == "uint64" else [-1, -129]
    numbers += [float("nan"), float("inf"), 0.5, 1e30, -0.0] if found.startswith("float") else []
    if found.startswith("float"):
        array = pa.array([None if number is None else float(number) for number in numbers])
        array = array.cast(parse_type(found), safe=False)
    else:
        array = pa.array(numbers, parse_type(found))
    together = to_type(array, parse_type(kind), Reading())
    alone = [to_type(array.slice(place, 1), parse_type(kind), Reading()) for place in range(len(array))]
    assert together.bad.tolist() == [place for place, one in enumerate(alone) if len(one.bad)]
    assert str(together.values.to_pylist()) == str([one.values[0].as_py() for one in alone])


@pytest.mark.parametrize("kind", ["int64", "float64", "decimal(9,2)", "bool", "date", "time", "timestamp"])
def test_a_column_that_holds_other_text_than_declared_is_found_out_at_once(kind: str) -> None:
    if kind == "decimal(9,2)":
        assert to_type(pa.array([5, None, 10**9]), parse_type(kind), Reading()).values.to_pylist() == [5, None, None]
    began = time.process_time()
    assert len(to_type(pa.array(["n/a?"] * 200_000), parse_type(kind), Reading()).bad) == 200_000
    assert time.process_time() - began < 4  # value by value it took 18 s


@given(
    st.lists(st.sampled_from([b"1,a", b"2,\xe9", b"\xe9,3,\xff", b"\xff", b'4,"\xe9\n"', b"5,\xc3\xa9"]), max_size=8),
    st.integers(1, 30),
)
def test_rows_of_another_length_may_hold_bytes_that_are_no_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], piece: int
) -> None:
    path = tmp_path_factory.mktemp("c") / "x.csv"
    path.write_bytes(b"\n".join([b"n,t", *rows]) + b"\n")
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        _, found = read(path, {"n": "string", "t": "binary"})
    finally:
        split_text.PIECE = usual
    wrong = [
        (number, row.decode("utf-8", "backslashreplace")) for number, row in enumerate(rows, 1) if row[:1] > b"\x7f"
    ]
    assert [(record["row"], record["value"]) for record in found.tally.records] == wrong
