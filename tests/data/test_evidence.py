"""What quarantine says of a row is what the file holds: its own text, its file and row, and of a duplicate both rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.ingest import ingest
from engine.data.quarantine import CONFLICTING, EQUAL
from engine.data.readers import split_text
from engine.errors import UserError
from engine.runtime import storage
from tests.data.helpers import build, config, read, run_of

KINDS = {"n": "int64", "x": "float64", "b": "bool", "s": "string", "t": "timestamp"}
RIGHT = {"n": "7", "x": "1.50", "b": "true", "s": '"a"', "t": '"2024-01-01T00:00:00Z"'}
WRITTEN = [
    "7", "-0", "1.50", "1e3", "12345678901234567890", '"7"', '""', '" "', '"\\u00e9"', '"caf\u00e9"', '"a\\"b"', "true", "false",
    '{"k": 1}', '{ "k" :1.0,"l":[ ] }', "[1]", "[ 1,2.50 ]", "[]", "{}", '"2024-13-01T00:00:00Z"', '["}", "\\\\"]', "NaN",
]  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(WRITTEN)), min_size=1, max_size=8),
    st.integers(1, 90),
)
@settings(max_examples=150)
def test_json_is_shown_as_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], piece: int
) -> None:
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    lines = [", ".join(f'"{name}": {({**RIGHT, wrong: text})[name]}' for name in KINDS) for wrong, text in cells]
    path.write_text("".join(f"{{{line}}}\n" for line in lines), encoding="utf-8")
    usual, split_text.PIECE = split_text.PIECE, piece
    try:
        _, found = read(path, KINDS)
    finally:
        split_text.PIECE = usual
    for record in found.tally.records:
        wrong, text = cells[record["row"] - 1]
        assert (record["column"], record["value"]) == (wrong, text)
    certain = {
        number for number, (name, text) in enumerate(cells, 1) if text[0] in "[{" or (name == "s" and text == "7")
    }
    assert certain <= {record["row"] for record in found.tally.records}


@pytest.mark.parametrize("inner", ["7", '"t"', "false", '{"v": "1"}', '{"v": [1]}', '[{"v": 1}]'])
def test_json_on_the_way_to_a_nested_field_is_shown_as_it_is_written(tmp_path: Path, inner: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"n": {{"v": 1.5}}}}\n{{"n": {inner}}}\n')
    _, found = read(tmp_path / "x.jsonl", {"v": {"type": "float64", "path": "n.v"}})
    (record,) = found.tally.records
    assert (record["row"], record["value"]) == (2, json.dumps(json.loads(inner)["v"]) if inner[0] == "{" else inner)


COLUMNS = {
    "id": {"type": "string", "role": "id"},
    "at": {"type": "timestamp", "role": "event_time"},
    "amount": {"type": "float64", "min": 0, "max": 100},
}
SOURCE = {"id": "string", "at": "timestamp", "amount": "float64"}


def quarantined(folder: Path, path: str, **data: Any) -> list[dict[str, Any]]:
    given = {
        "path": str(folder), "columns": COLUMNS, "max_quarantine": "100%",
        "sources": {"s": {"path": path, "columns": SOURCE, **data.pop("source", {})}}, **data,
    }  # fmt: skip
    found, _ = build(config(folder, given))
    rows = storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist()
    names = ("file", "kept_file")
    return [{**row, **{name: row[name] and Path(row[name]).name for name in names}} for row in rows]


@pytest.mark.parametrize("text", ["-1", "-01.50", "1e3", "+101", "  -2 "])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_value_that_breaks_a_rule_is_shown_as_the_file_holds_it(tmp_path: Path, text: str, form: str) -> None:
    rows = [("1", "2024-01-01T00:00:00Z", "5"), ("2", "2024-01-02T00:00:00Z", text)]
    path = tmp_path / f"a.{form}"
    if form == "csv":
        path.write_text("id,at,amount\n" + "".join(",".join(row) + "\n" for row in rows))
    elif form == "jsonl":
        text = text.strip().removeprefix("+").replace("-01", "-1")
        path.write_text(
            "".join(f'{{"id": "{i}", "at": "{at}", "amount": {text if i == "2" else 5}}}\n' for i, at, _ in rows)
        )
    else:
        pq.write_table(pa.table(dict(zip(SOURCE, map(list, zip(*rows, strict=True)), strict=True))), path)
    (record,) = quarantined(tmp_path, path.name)
    assert (record["file"], record["row"], record["column"], record["value"]) == (path.name, 2, "amount", text)


@pytest.mark.parametrize("sensitive", [False, True])
def test_a_sensitive_value_is_shown_in_no_form(tmp_path: Path, sensitive: bool) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"id": "1", "at": "2024-01-01T00:00:00Z", "amount": 5}\n'
        '{"id": "2", "at": "2024-01-01T00:00:00Z", "amount": -777}\n'
        '{"id": "3", "at": "2024-01-01T00:00:00Z", "amount": "-777"}\n'
        '{"id": "1", "at": "2024-01-01T00:00:00Z", "amount": 77}\n'
    )
    columns = {**COLUMNS, "amount": {**COLUMNS["amount"], "sensitive": sensitive}}
    records = quarantined(tmp_path, "a.jsonl", columns=columns, duplicates="first")
    assert len(records) == 3 and ("77" not in str(records)) == sensitive


ROW = st.tuples(st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["1", "2", "x", "-1", ""]))


@given(st.lists(st.lists(ROW, max_size=6), min_size=1, max_size=3), st.sampled_from(["first", "last"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_duplicate_names_both_rows_and_says_whether_they_are_equal(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[str, str]]], keep: str, strict: bool
) -> None:
    folder = tmp_path_factory.mktemp("d")
    for number, rows in enumerate(files):
        lines = "".join(f"{id},2024-01-01T00:00:00Z,{amount}\n\n" for id, amount in rows)
        (folder / f"{number}.csv").write_text("id,at,amount\nz,2024-01-01T00:00:00Z,1\n" + lines)
    query = "SELECT 'a' AS id UNION SELECT 'b' UNION SELECT 'z'"
    tables = {"known": {"query": query, "columns": {"id": {"type": "string", "role": "id"}}, "static": True}}
    columns = {**COLUMNS, "id": {**COLUMNS["id"], "references": "known.id"}} if strict else COLUMNS
    records = quarantined(folder, "*.csv", duplicates=keep, columns=columns, tables=tables)
    duplicates = [record for record in records if record["reason"] in (EQUAL, CONFLICTING)]

    def row_of(file: str, row: int) -> tuple[str, str]:
        return [("z", "1"), *files[int(file[0])]][row - 1]

    left = [("z", "1") for _ in files] + [row for rows in files for row in rows if row[1] in ("1", "2", "")]
    left = [row for row in left if not strict or row[0] in "abz"]
    assert len(duplicates) == len(left) - len({row[0] for row in left})
    for record in duplicates:
        gone, kept = row_of(record["file"], record["row"]), row_of(record["kept_file"], record["kept_row"])
        assert gone[0] == kept[0] == record["row_id"] and (record["reason"] == EQUAL) == (gone == kept)
        assert (record["file"], record["row"]) != (record["kept_file"], record["kept_row"])
        if gone != kept:
            was, now = (f"{float(one[1])}" if one[1] else "null" for one in (gone, kept))
            assert record["value"] == f"amount {was} (kept: {now})"


def test_rows_of_a_query_that_share_an_id_are_compared_though_they_have_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,at,amount\n" + "1,2024-01-01T00:00:00Z,5\n" * 2)
    query = "SELECT * FROM s UNION ALL SELECT DISTINCT '2', \"at\", x FROM s, (VALUES (1), (2)) v(x)"
    records = quarantined(tmp_path, "a.csv", duplicates="first", query=query)
    assert [(r["row_id"], r["file"], r["reason"]) for r in sorted(records, key=lambda r: r["row_id"])] == [
        ("1", None, EQUAL), ("2", None, CONFLICTING),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("5", "5", r"as '1' in .*a\.csv, row \d, and .*a\.csv, row \d, which are equal in every column; set data\.duplicates="),
        ("5", "6", r"which differ in amount \d\.0 \(kept: \d\.0\); name more id columns, or set data\.duplicates="),
    ],
)  # fmt: skip
def test_duplicates_that_are_refused_are_shown(tmp_path: Path, first: str, second: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,at,amount\n1,2024-01-01T00:00:00Z,{first}\n1,2024-01-01T00:00:00Z,{second}\n")
    with pytest.raises(UserError, match=said):
        quarantined(tmp_path, "a.csv")
    assert len(quarantined(tmp_path, "a.csv", duplicates="first")) == 1


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("allowed", ["1%", "100%"])
def test_a_source_of_which_no_row_is_kept_leaves_its_quarantine(tmp_path: Path, form: str, allowed: str) -> None:
    path = tmp_path / f"a.{form}"
    table = pa.table({"id": ["1", "2"], "at": ["never", "never"], "amount": ["1", "2"]})
    if form == "csv":
        path.write_text("id,at,amount\n1,never,1\n2,never,2\n")
    elif form == "jsonl":
        path.write_text('{"id": "1", "at": "never", "amount": 1}\n{"id": "2", "at": "never", "amount": 2}\n')
    elif form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    data = {"path": str(tmp_path), "columns": COLUMNS, "sources": {"s": {"path": path.name, "columns": SOURCE}}}
    given = config(tmp_path, {**data, "max_quarantine": allowed})
    run = run_of(given)
    with pytest.raises(UserError, match=r"records of violations are stored in .*quarantine\.parquet") as caught:
        ingest(given, run)
    records = storage.read_parquet(run.path("quarantine.parquet")).to_pylist()
    assert [(Path(r["file"]).name, r["row"], r["column"]) for r in records] == [
        (path.name, 1, "at"),
        (path.name, 2, "at"),
    ]
    assert "allow more" not in str(caught.value)  # it would not help
