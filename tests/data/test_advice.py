"""Every message that advises something is followed: the words it gives are applied as they are, and then it works."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import compose, schema
from engine.config.sections.data import SourceColumn
from engine.data.dataset import Dataset
from engine.data.readers import advice
from engine.errors import UserError
from tests.advice import advised, follow
from tests.data.helpers import build, config

COLUMNS: dict[str, Any] = {
    "id": {"type": "string", "role": "id"},
    "at": {"type": "timestamp", "role": "event_time"},
    "amount": {"type": "float64"},
}
SOURCE: dict[str, Any] = {"id": "string", "at": "timestamp", "amount": "float64"}
ROWS = [(str(number), f"2024-01-{number + 1:02}T00:00:00Z", f"{number}.5") for number in range(9)]
LINES = [",".join(row) for row in ROWS]


def table(*lines: str, header: str = "id,at,amount") -> str:
    return "\n".join([header, *lines]) + "\n"


def section(path: str = "a.csv", source: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    sources = {"s": {"path": path, "columns": copy.deepcopy(SOURCE), **(source or {})}, **data.pop("more", {})}
    return {"columns": copy.deepcopy(COLUMNS), "sources": sources, **data}


def ways_out(folder: Path, data: dict[str, Any], rounds: int = 4) -> list[Dataset]:
    """The dataset at the end of each way that the messages offer, one after the other."""
    try:
        return [build(config(folder, {"path": str(folder), **data}))[0]]
    except UserError as error:
        assert rounds, error
        ways = advised(str(error))
        assert ways, f"no advice: {error}"
        return [found for words in ways for found in ways_out(folder, follow(data, words), rounds - 1)]


# ------------------------------------------------------------------------------------- what a look at the file says

NOTE = st.text(st.sampled_from("ab: ;\u00e9"), min_size=1, max_size=8)


@given(
    preamble=st.lists(NOTE, max_size=4),
    mark=st.sampled_from(["", "#", "//", "--", "%"]),
    among=st.lists(st.integers(0, 9), max_size=2),
    units=st.lists(st.sampled_from(["-,utc,EUR", "text,time,[F]", ",,double"]), max_size=2),
    footer=st.lists(NOTE, max_size=3),
    trailing=st.booleans(),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "cp1252", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoted=st.booleans(),
)
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_an_export_that_is_no_table_from_line_1_is_read_as_its_messages_say(
    tmp_path_factory: pytest.TempPathFactory, preamble: list[str], mark: str, among: list[int], units: list[str],
    footer: list[str], trailing: bool, delimiter: str, encoding: str, end: str, quoted: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("a")
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    )
    writer.writerows([("n\u00e9", *row[1:]) if number == 4 else row for number, row in enumerate(ROWS)])
    rows = [line + delimiter * trailing for line in text.getvalue().splitlines()]
    for place in among if mark else []:
        rows.insert(place, f"{mark} a note")
    lines = [
        *(mark + line for line in preamble), delimiter.join(SOURCE),
        *(line.replace(",", delimiter) + delimiter * trailing for line in units), *rows, *footer,
    ]  # fmt: skip
    (folder / "a.csv").write_bytes((end.join(lines) + end).encode(encoding))
    for found in ways_out(folder, section(), rounds=3):
        kept = found.read()
        assert kept["amount"].to_pylist() == [number + 0.5 for number in range(9)]
        assert kept["id"].to_pylist() == ["n\u00e9" if number == 4 else str(number) for number in range(9)]


def test_a_footer_far_behind_the_first_lines_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "HEAD", 256)
    monkeypatch.setattr(advice, "TAIL", 256)
    rows = [f"{number},2024-01-01T00:00:00Z,{number}" for number in range(100)]
    (tmp_path / "a.csv").write_text(table("-,-,EUR", *rows, "", "Total,,4950", "Made by an export"))
    (found,) = ways_out(tmp_path, section())
    assert found.rows == 100


def test_a_row_that_is_only_wrong_is_not_taken_for_a_line_of_units(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table("x,2024-01-01T00:00:00Z,five", *LINES))
    with pytest.raises(UserError, match=r"a\.csv, row 1, column 'amount': is no float64, found 'five'") as caught:
        build(config(tmp_path, {"path": str(tmp_path), **section()}))
    assert "skip_after_header" not in str(caught.value) and "footer" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- case by case


def declared(kind: str) -> dict[str, Any]:
    return section(source={"columns": {**SOURCE, "amount": kind}}, columns={**COLUMNS, "amount": kind})


STATIC: dict[str, Any] = {"static": True, "columns": {"id": {"type": "string", "role": "id"}, "amount": "float64"}}
DUPLICATE = ["7,2024-01-01T00:00:00Z,1", "7,2024-01-01T00:00:00Z,2"]
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a name that the file spells otherwise": (table(*LINES, header="id,at,Amount"), section()),
    "a column that the file lacks": (table(*(line.rpartition(",")[0] for line in LINES), header="id,at"), section()),
    "no header": ("\n".join(LINES) + "\n", section()),
    "a header with a name twice": (table(*LINES, header="id,at,id"), section()),
    "another delimiter": (table(*LINES, header="id,at,amount").replace(",", ";"), section()),
    "Excel's word about the delimiter": ("sep=;\n" + table(*LINES).replace(",", ";"), section()),
    "fields that are ragged": (table("1,2", *LINES), section(source={"csv": {"ragged": "fail"}})),
    "a value of another type": (
        table("x,2024-01-01T00:00:00Z,five", *LINES),
        section(source={"columns": {**SOURCE, "amount": {"type": "float64", "on_violation": "fail"}}}),
    ),
    "a value beyond a bound": (
        table(*LINES), section(columns={**COLUMNS, "amount": {"type": "float64", "max": 7, "on_violation": "fail"}})
    ),
    "a rule that is broken": (table(*LINES), section(rules={"small": {"holds": "amount < 7", "on_violation": "fail"}})),
    "a budget that is too small": (table("x,never,1", *LINES), section()),
    "columns that are not declared": (
        table(*(f"{line},1" for line in LINES), header="id,at,amount,x"), section(source={"unexpected": "fail"})
    ),
    "an alias beside the name": (
        table(*(f"{line},1" for line in LINES), header="id,at,amount,sum"),
        section(source={"columns": {**SOURCE, "amount": {"type": "float64", "aliases": ["sum", "total"]}}}),
    ),
    "two aliases": (
        table(*(f"{line},1" for line in LINES), header="id,at,total,sum"),
        section(source={"columns": {**SOURCE, "amount": {"type": "float64", "aliases": ["sum", "total"]}}}),
    ),
    "ids that differ": (table(*LINES, *DUPLICATE), section()),
    "ids of equal rows": (table(*LINES, LINES[0]), section()),
    "text where a list is declared": (
        table(*LINES), declared("list<float64>")
    ),
    "text where a duration is declared": (
        table(*LINES), declared("duration")
    ),
    "text where a query's column is declared a number": (
        table(*LINES), section(query='SELECT id, "at", [amount] AS amount FROM s')
    ),
    "a foreign key of another type": (
        table(*LINES),
        section(
            columns={**COLUMNS, "id": {**COLUMNS["id"], "references": "known.id"}},
            tables={"known": {
                "query": "SELECT CAST(id AS BIGINT) AS id FROM s", "static": True,
                "columns": {"id": {"type": "int64", "role": "id"}},
            }},
        ),
    ),
    "rows of a table that tie": (
        table(*LINES),
        section(tables={"known": {**STATIC, "query": "SELECT id, amount FROM s UNION ALL SELECT id, amount FROM s"}}),
    ),
    "rows of a table that have no query and tie": (
        table(*LINES),
        section(
            more={"known": {"path": "known.csv", "columns": {"id": "string", "amount": "float64"}}}, tables={"known": STATIC},
            query="SELECT * FROM s",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_what_a_message_advises_works(tmp_path: Path, case: str) -> None:
    text, data = TEXTS[case]
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "known.csv").write_text("id,amount\n1,2\n1,2\n2,3\n")
    with pytest.raises(UserError):
        build(config(tmp_path, {"path": str(tmp_path), **data}))
    assert all(found.rows >= 7 for found in ways_out(tmp_path, data))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("given", ["utf-8", "utf-16", "utf8-sig8"])
@pytest.mark.parametrize("form", ["header", "value", "json"])
def test_an_encoding_is_found_out(tmp_path: Path, encoding: str, given: str, form: str) -> None:
    text = table(
        *[line.replace("5,", "caf\u00e9\x81,") for line in LINES],
        header="id,at,amount,\u00e9" if form == "header" else "id,at,amount",
    )
    if form == "json":
        text = "".join(f'{{"id": "caf\u00e9{n}", "at": "2024-01-01T00:00:00Z", "amount": {n}}}\n' for n in range(9))
    if encoding == "cp1252":
        text = text.replace("\x81", "\u20ac")
    if form == "header":
        text = text.replace("T00:00:00Z,", "T00:00:00Z,").replace(".5\n", ".5,1\n")
    (tmp_path / ("a.jsonl" if form == "json" else "a.csv")).write_bytes(text.encode(encoding))
    data = section("a.jsonl" if form == "json" else "a.csv", {"csv": {"encoding": given}})
    assert all(found.rows == 9 for found in ways_out(tmp_path, data))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "arrow"])
def test_a_format_that_no_name_tells_is_found_out(tmp_path: Path, form: str) -> None:
    path = tmp_path / "export.out"
    if form == "csv":
        path.write_text(table(*LINES))
    elif form == "jsonl":
        path.write_text("".join(f'{{"id": "{i}", "at": "{at}", "amount": {amount}}}\n' for i, at, amount in ROWS))
    else:
        rows = pa.table(dict(zip(SOURCE, map(list, zip(*ROWS, strict=True)), strict=True)))
        if form == "parquet":
            pq.write_table(rows, path)
        else:
            with pa.ipc.new_file(str(path), rows.schema) as writer:
                writer.write_table(rows)
    (found,) = ways_out(tmp_path, section("export.out"))
    assert found.rows == 9


# ---------------------------------------------------------------------------------------------------------- types

UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes([n] * 16) for n in range(3)], pa.binary(16)))
ARRAYS: list[pa.Array] = [
    pa.array([True, False, None]), pa.array([1, 2, 3], pa.int8()), pa.array([1, 2, 2**63], pa.uint64()),
    pa.array(np.array([1, 2, 3], np.float16)), pa.array([1.5, 2, None]), pa.array([1, 2, 3], pa.decimal32(5, 2)),
    pa.array([1, 2, 3], pa.decimal256(50, 2)), pa.array(["a", "b", None]), pa.array(["a"] * 3, pa.large_string()),
    pa.array(["a"] * 3, pa.string_view()), pa.array([b"a"] * 3), pa.array([b"ab"] * 3, pa.binary(2)),
    pa.array([b"ab"] * 3, pa.binary_view()), UUIDS, pa.array([1, 2, 3], pa.date32()), pa.array([86_400_000] * 3, pa.date64()),
    pa.array([1, 2, 3], pa.time32("s")), pa.array([1000, 2000, 3000], pa.time64("ns")), pa.array([1, 2, 3], pa.timestamp("ms")),
    pa.array([1, 2, 3], pa.timestamp("s", "Asia/Tokyo")), pa.array([1, 2, 3], pa.duration("s")),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[1], [], None], pa.list_(pa.int32())), pa.array([["a"], [], None], pa.large_list(pa.large_string())),
    pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2)), pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    pa.array([{"a": {"b": 1}, "c": 2}] * 3), pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array([5])),
]  # fmt: skip
DECLARED = ["bool", "int64", "float64", "decimal(10,2)", "string", "binary", "date", "time", "duration", "timestamp",
            "list<int64>", "map<string,int64>"]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.type)[:40])
def test_a_type_that_a_message_names_can_be_declared_and_keeps_every_value(tmp_path: Path, array: pa.Array) -> None:
    rows = pa.table({"id": ["1", "2", "3"], "at": pa.array([1, 2, 3], pa.timestamp("us", "UTC")), "amount": array})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    met = 0
    for declared in DECLARED:
        data = section("a.arrow", {"columns": {**SOURCE, "amount": declared}})
        data["columns"]["amount"] = {"type": declared}
        try:
            build(config(tmp_path, {"path": str(tmp_path), **data}))
        except UserError as error:
            if "must be" not in str(error) or "quarantined" in str(error):
                continue  # single values do not fit
            met += 1
            (found,) = ways_out(tmp_path, data)
            assert found.rows == 3
            assert found.read()["amount"].null_count == array.null_count
    assert met


def test_a_uuid_is_text_where_text_is_declared(tmp_path: Path) -> None:
    rows = pa.table({"id": UUIDS, "at": pa.array([1, 2, 3], pa.timestamp("us", "UTC")), "amount": [1.0, 2.0, 3.0]})
    pq.write_table(rows, tmp_path / "a.parquet")
    found, _ = build(config(tmp_path, {"path": str(tmp_path), **section("a.parquet")}))
    assert found.read()["id"].to_pylist() == [str(value) for value in UUIDS.to_pylist()]


WORDS = "int integer bigint double decimal varchar(20) text uuid boolean datetime64[ns] array flaot64 list".split()


@pytest.mark.parametrize("word", WORDS)
def test_the_type_that_an_unknown_one_is_taken_for_can_be_declared(tmp_path: Path, word: str) -> None:
    (tmp_path / "a.csv").write_text(table(*LINES))
    with pytest.raises(UserError, match="unknown type") as caught:
        build(config(tmp_path, {"path": str(tmp_path), **section(source={"columns": {**SOURCE, "amount": word}})}))
    meant = str(caught.value).split("Did you mean '")[1].split("'")[0]
    schema_of_it = {**SOURCE, "amount": {"type": meant, "on_violation": "null"}}
    data = section(
        source={"columns": schema_of_it}, query='SELECT id, "at", 1.0 AS amount FROM s', max_quarantine="100%"
    )
    if not meant.startswith(("list", "map")):  # no CSV holds these
        assert build(config(tmp_path, {"path": str(tmp_path), **data}))[0].rows == 9


# ------------------------------------------------------------------------------------------------------ the shell


VALUES = "# ; \\t // null true 1.10 ü ' \" 50% utf-16-le decimal(10,2) = {} $x".split()


@pytest.mark.parametrize("value", [*VALUES, "a b", ""])
def test_a_word_that_is_advised_means_its_value_in_a_shell(value: str) -> None:
    (word,) = shlex.split(schema.word("data.description", value))
    assert compose.compose([word]).config.data.description == value


def test_a_column_that_is_declared_in_short_takes_words_about_its_keys(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "x.yaml").write_text(
        "# @package _global_\ndata:\n  sources:\n    s:\n      path: a.csv\n      columns: {a: string, b: 'decimal(5,1)'}\n"
    )
    words = ["data.sources.s.columns.a.missing=null", "data.sources.s.columns.b.aliases=[B]"]
    columns = compose.compose(["+experiment=x", *words], str(tmp_path)).config.data.sources["s"].columns
    assert (columns["a"].type, columns["a"].missing) == ("string", "null")
    assert (columns["b"].type, columns["b"].aliases) == ("decimal(5,1)", ("B",))


def test_a_choice_called_null_may_be_written_as_yaml_reads_it() -> None:
    found = schema.build(SourceColumn, {"type": "string", "missing": None, "on_violation": None})
    assert (found.missing, found.on_violation) == ("null", "null")


# ----------------------------------------------------------------------------------------------------- empty files

EMPTY = pa.schema([("id", pa.string()), ("at", pa.timestamp("us", "UTC")), ("amount", pa.float64())]).empty_table()


def empty_file(path: Path, form: str) -> None:
    if form == "no bytes":
        path.write_bytes(b"")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(b"" if form == "blank" else b"id,at,amount\n"))
    elif path.suffix == ".parquet":
        pq.write_table(EMPTY, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), EMPTY.schema):
            pass
    else:
        path.write_text("\n\n" if form == "blank" else "id,at,amount\n")


CASES = [
    *((form, suffix) for form in ("no bytes", "blank") for suffix in ("csv", "csv.gz", "jsonl")),
    *(("no bytes", suffix) for suffix in ("parquet", "arrow")),
    *(("no rows", suffix) for suffix in ("csv", "csv.gz", "parquet", "arrow")),
]


@pytest.mark.parametrize(("form", "suffix"), CASES)
def test_an_empty_file_alone_is_an_error_that_names_it_and_beside_others_it_can_be_left_out(
    tmp_path: Path, form: str, suffix: str
) -> None:
    empty_file(tmp_path / f"a.{suffix}", form)
    with pytest.raises(UserError, match=rf"a\.{suffix} is empty|because the files hold no rows \(.*a\.{suffix}\)"):
        build(config(tmp_path, {"path": str(tmp_path), **section(f"a.{suffix}")}))
    (tmp_path / "b.csv").write_text(table(*LINES))
    (found,) = ways_out(tmp_path, section("?.*"))
    assert found.rows == 9
    refused = found.manifest["accounting"]["refused_files"]
    assert refused == (form != "no rows")


def test_files_of_which_every_row_is_set_aside_are_told_from_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table("1,never,1"))
    with pytest.raises(UserError, match="of 1 rows in 1 files 1 were set aside"):
        build(config(tmp_path, {"path": str(tmp_path), **section(max_quarantine="100%")}))


def test_advice_about_a_column_with_a_dot_in_its_name_is_a_word_that_composes(tmp_path: Path) -> None:
    """The words go through the shell's own door: brackets keep the name together."""
    pq.write_table(pa.table({"id": ["1"], "at": [0], "sepal.length": [5]}), tmp_path / "a.parquet")
    columns = {"id": "string", "at": "int64", "sepal.length": "string"}
    declared = {
        "id": {"type": "string", "role": "id"},
        "when": {"type": "timestamp", "role": "event_time"},
        "sepal.length": "string",
    }
    data = {"path": str(tmp_path), "sources": {"s": {"path": "a.parquet", "columns": columns}}, "columns": declared}
    with pytest.raises(UserError) as caught:
        build(config(tmp_path, data))
    words = shlex.split(str(caught.value).partition("declare the type that it has, ")[2])
    assert words == ["data.sources.s.columns[sepal.length].type=int64"]
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n" + compose.to_yaml({"data": data})
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    composed = compose.compose(["+experiment=own", *words], str(tmp_path)).config
    assert composed.data.sources["s"].columns["sepal.length"].type == "int64"
