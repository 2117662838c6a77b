"""Ingest: the declared schema decides, every row is accounted for, and the content does not depend on the way it came."""

from __future__ import annotations

import datetime
import errno
import gzip
import json
import os
import random
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import arrow_types, order, stage
from engine.data import dataset as dataset_module
from engine.data.dataset import row_ids
from engine.data.files import SourceFile
from engine.data.ingest import ingest
from engine.data.make_dataset import ensure_dataset
from engine.data.readers import csv_files
from engine.data.show import show
from engine.data.validate import validate
from engine.errors import UserError
from engine.runtime import digest, storage
from tests.data.helpers import build, config, run_of

COLUMNS = {
    "id": {"type": "int64", "role": "id"},
    "at": {"type": "timestamp", "role": "event_time", "known_at": "prior"},
    "amount": {"type": "float64", "known_at": "at"},
    "label": {"type": "string"},
}
SOURCE = {"id": "int64", "at": "timestamp", "amount": "float64", "label": "string"}


def events(count: int, seed: int = 0, start: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    at = 1_600_000_000_000_000 + rng.integers(0, count // 3 + 1, count) * 1_000_000  # many ties
    return pa.table(
        {
            "id": pa.array(2**53 + 1 + start + rng.permutation(count)),
            "at": pa.array(at, pa.timestamp("us", tz="UTC")),
            "amount": pa.array(np.round(rng.normal(0, 10, count), 3), mask=rng.random(count) < 0.1),
            "label": pa.array([None if i % 7 == 0 else f"x{i % 5:03d}" for i in range(count)]),
        }
    )


def data(folder: Path, path: str = "in", **more: Any) -> dict[str, Any]:
    source = {"path": path, "columns": SOURCE, **more.pop("source", {})}
    return {"path": str(folder), "sources": {"s": source}, "columns": COLUMNS, **more}


def write_csv(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.csv.write_csv(table, path)


# ------------------------------------------------------------------------------------------------------- identity


def test_ids_beyond_float_precision_and_nulls_are_exact(tmp_path: Path) -> None:
    table = events(500)
    write_csv(table, tmp_path / "in" / "a.csv")
    found, metrics = build(config(tmp_path, data(tmp_path)))
    assert found.read().equals(table.sort_by([("at", "ascending"), ("id", "ascending")]).cast(found.schema))
    assert metrics["ingest/rows"] == 500


@given(
    st.integers(0, 10_000),
    st.integers(1, 60),
    st.lists(st.sampled_from(["csv", "csv.gz", "csv.zip", "parquet", "arrow", "jsonl"]), min_size=1, max_size=4),
)
@settings(max_examples=15)
def test_formats_splits_and_orders_give_one_digest(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, formats: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("split")
    table = events(rows, seed)
    write_csv(table, folder / "whole" / "a.csv")
    whole, _ = build(config(folder, data(folder, "whole")))
    rng = random.Random(seed)
    shuffled = table.take(pa.array(rng.sample(range(rows), rows)))
    cuts = sorted(rng.randint(0, rows) for _ in formats[1:])
    for place, (start, stop, kind) in enumerate(zip([0, *cuts], [*cuts, rows], formats, strict=True)):
        write_as(shuffled.slice(start, stop - start), folder / "parts" / f"{rng.randint(0, 999)}-{place}.{kind}")
    parts, _ = build(config(folder / "other", data(folder, "parts"), threads=rng.choice([1, 2, 4])))
    assert parts.digest == whole.digest and parts.rows == rows
    assert parts.read().equals(whole.read())


def write_as(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7, use_dictionary=True)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif kind == "jsonl":
        lines = []
        for row in table.to_pylist():
            row["at"] = row["at"].isoformat()
            lines.append(json.dumps(row) + "\n")
        # an empty file is refused: JSON Lines has no header that could say what it holds
        if lines:
            path.write_text("".join(lines))
    else:
        write_csv(table, path.with_name("plain.tmp"))
        raw = path.with_name("plain.tmp").read_bytes()
        path.with_name("plain.tmp").unlink()
        if kind == "csv.gz":
            path.write_bytes(gzip.compress(raw))
        elif kind == "csv.zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("inner.csv", raw)
        else:
            path.write_bytes(raw)


def test_a_column_of_every_type_comes_out_as_it_went_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    day = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    values: dict[str, Any] = {
        "bool": True, "binary": b"\xff", "string": "ü", "date": day.date(), "time": day.time(), "timestamp": day,
        "duration": datetime.timedelta(days=1), "decimal(5,2)": Decimal("1.50"), "decimal(50,2)": Decimal("1.50"),
        "list<string>": ["a", None], "map<string,int64>": [("a", 1)],
        **{f"{sign}int{bits}": 7 for sign in ("", "u") for bits in (8, 16, 32, 64)},
        **{f"float{bits}": 0.5 for bits in (16, 32, 64)},
    }  # fmt: skip
    assert {name.split("(")[0].split("<")[0] for name in values} == {*arrow_types._TYPES, "decimal", "list", "map"}
    table = events(3)
    for kind, value in values.items():
        table = table.append_column(kind, pa.array([value, None, value], arrow_types.parse_type(kind)))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    source = {**SOURCE, **{kind: kind for kind in values}}
    columns = {**COLUMNS, **{kind: {"type": kind} for kind in values}}
    given = config(tmp_path, {**data(tmp_path, source={"columns": source}), "columns": columns})
    found, _ = build(given)
    right = table.sort_by([("at", "ascending"), ("id", "ascending")])
    assert found.read().to_pylist() == right.cast(found.schema).to_pylist()
    show(given, ["t"], {})
    assert "float16" in capsys.readouterr().out


def test_spilling_to_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "PART_ROWS", 1000)
    monkeypatch.setattr("engine.data.make_dataset.PART_ROWS", 1000)
    for place in range(6):
        write_csv(events(3000, place, place * 3000), tmp_path / "in" / f"{place}.csv")
    held, _ = build(config(tmp_path, data(tmp_path)))
    spills: list[int] = []
    monkeypatch.setattr(order.Spool, "_spill", _counting(order.Spool._spill, spills))
    spilled, _ = build(config(tmp_path / "b", data(tmp_path), memory=400_000))
    assert len(spills) >= 3
    assert spilled.digest == held.digest and spilled.rows == 18_000 and len(spilled.parts) == 18
    assert not list((tmp_path / "b" / "store").rglob(".spool*"))


def test_a_file_is_kept_on_disk_where_its_rows_outgrow_the_memory_not_its_bytes(tmp_path: Path) -> None:
    table = events(300_000).set_column(3, "label", pa.array(["x" * 40] * 300_000))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    pq.write_table(table, path)
    assert path.stat().st_size * 2 < table.nbytes
    given = data(tmp_path, "in/a.parquet")
    held, _ = build(config(tmp_path, given, memory=5 * table.nbytes))
    staged, _ = build(config(tmp_path / "b", given, memory=3 * table.nbytes))
    assert held.digest == staged.digest
    assert not (tmp_path / "store" / "datasets" / "t" / ".staged").exists()
    assert list((tmp_path / "b" / "store" / "datasets" / "t" / ".staged").glob("*.arrow"))


def _counting(function: Any, calls: list[int]) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return counted


def test_a_recipe_that_is_there_is_reused_and_the_command_always_works(tmp_path: Path) -> None:
    write_csv(events(100), tmp_path / "in" / "a.csv")
    given = config(tmp_path, data(tmp_path))
    first, _ = build(given)
    before = (first.directory / "part-00000.parquet").stat().st_mtime_ns
    assert ensure_dataset(given, run_of(given)).directory == first.directory
    ingest(given, run_of(given))
    assert (first.directory / "part-00000.parquet").stat().st_mtime_ns == before  # readers may hold it
    (first.directory / "part-00000.parquet").unlink()
    ingest(given, run_of(given))
    assert ensure_dataset(given, run_of(given)).read().num_rows == 100


# ------------------------------------------------------------------------------------------------------ evolution


def test_an_all_null_file_first_does_not_decide_the_type(tmp_path: Path) -> None:
    at = pa.array([datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)] * 2, pa.timestamp("us", tz="UTC"))
    base = {"at": at, "amount": pa.array([1.0, 2.0])}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({**base, "id": [1, 2], "label": pa.nulls(2)}), tmp_path / "in" / "f0.parquet")
    pq.write_table(pa.table({**base, "id": [3, 4], "label": ["x", "y"]}), tmp_path / "in" / "f1.parquet")
    strict = pa.schema([*pa.table({**base, "id": [5, 6]}).schema, pa.field("label", pa.string(), nullable=False)])
    pq.write_table(pa.table({**base, "id": [5, 6], "label": ["x", "y"]}, strict), tmp_path / "in" / "f2.parquet")
    found, _ = build(config(tmp_path, data(tmp_path)))
    assert found.read().column("label").to_pylist() == [None, None, "x", "y", "x", "y"]
    assert found.schema.field("label").type == pa.string()


def test_a_column_that_only_later_files_have_is_kept_when_declared_and_reported_when_not(tmp_path: Path) -> None:
    full = events(10)
    write_csv(full.slice(0, 4).drop_columns(["amount"]), tmp_path / "in" / "f0.csv")
    write_csv(full.slice(4), tmp_path / "in" / "f1.csv")
    with pytest.raises(UserError, match=r"f0\.csv: column 'amount' is missing"):
        build(config(tmp_path, data(tmp_path)))
    optional = {**SOURCE, "amount": {"type": "float64", "missing": "null"}}
    found, _ = build(config(tmp_path, data(tmp_path, source={"columns": optional})))
    right = {row["id"]: row["amount"] for row in full.slice(4).to_pylist()}
    assert {row["id"]: row["amount"] for row in found.read().to_pylist()} == {
        **{i.as_py(): None for i in full.slice(0, 4)["id"]},
        **right,
    }
    files = {Path(item["file"]).name: item for item in found.manifest["accounting"]["files"]}
    assert files["f0.csv"]["missing"] == ["amount"] and "missing" not in files["f1.csv"]
    write_csv(full.append_column("extra", pa.array(range(10))), tmp_path / "extra" / "f.csv")
    found, _ = build(config(tmp_path / "c", data(tmp_path, "extra")))
    assert found.manifest["accounting"]["files"][0]["unexpected"] == ["extra"]
    with pytest.raises(UserError, match=r"f\.csv: columns 'extra' are not declared"):
        build(config(tmp_path / "d", data(tmp_path, "extra", source={"unexpected": "fail"})))


def test_renamed_reordered_and_widened_columns_are_noted(tmp_path: Path) -> None:
    table = events(20)
    (tmp_path / "in").mkdir()
    changed = table.rename_columns(["key", "at", "amount", "label"]).select(["label", "key", "amount", "at"])
    changed = changed.set_column(2, "amount", pa.array(np.arange(20, dtype=np.int32)))
    pq.write_table(changed, tmp_path / "in" / "a.parquet")
    found, _ = build(
        config(tmp_path, data(tmp_path, source={"columns": {**SOURCE, "id": {"type": "int64", "aliases": ["key"]}}}))
    )
    report = found.manifest["accounting"]["files"][0]
    assert (
        report["renamed"] == {"id": "key"}
        and report["reordered"]
        and report["converted"] == {"amount": "int32 -> float64"}
    )
    assert sorted(found.read().column("amount").to_pylist()) == list(range(20))


@pytest.mark.parametrize("only", [False, True])
def test_partition_values_have_the_declared_type(tmp_path: Path, only: bool) -> None:
    for code, start in (("01001", 0), ("2A001", 10)):
        if not (only and code == "2A001"):
            write_csv(events(5, start=start), tmp_path / "in" / f"code={code}" / "a.csv")
    columns = {**COLUMNS, "code": {"type": "string"}}
    found, _ = build(
        config(
            tmp_path,
            {**data(tmp_path, source={"hive": True, "columns": {**SOURCE, "code": "string"}}), "columns": columns},
        )
    )
    assert set(found.read().column("code").to_pylist()) == ({"01001"} if only else {"01001", "2A001"})


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a[1]*.csv")
    write_csv(events(7), tmp_path / "in" / "a1x.csv")
    found, _ = build(config(tmp_path, data(tmp_path, "in/a[1]*.csv")))
    assert found.rows == 5


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("in", "0123"), ("in/**", "0123"), ("in/*", "0"), ("in/*/*.csv", "13"), ("in/**/*.csv", "0123"),
        ("in/_temporary/**", "4"), ("in/_*/*/*.csv", "4"), ("in/.*.csv", "5"), ("in/_temporary", "4"),
    ],
)  # fmt: skip
def test_hidden_files_must_be_named_and_linked_folders_are_entered(tmp_path: Path, path: str, found: str) -> None:
    for place, name in enumerate(("0.csv", "a/1.csv", "a/b/2.csv", "z/3.csv", "_temporary/0/4.csv", ".5.csv")):
        folder = "elsewhere" if name == "z/3.csv" else "in"
        write_csv(events(1, start=place), tmp_path / folder / name)
    (tmp_path / "in" / "_SUCCESS").touch()
    (tmp_path / "in" / "z").symlink_to(tmp_path / "elsewhere" / "z")
    (tmp_path / "elsewhere" / "z" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a" / "b" / "circle").symlink_to("..")
    ids = build(config(tmp_path, data(tmp_path, path)))[0].read().column("id").to_pylist()
    assert sorted(ids) == [2**53 + 1 + int(place) for place in found]


def test_a_folder_or_a_link_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    (tmp_path / "in" / "b.csv").symlink_to("nothing")
    with pytest.raises(UserError, match=r"in/b\.csv cannot be read: No such file"):
        build(config(tmp_path, data(tmp_path, "in/*.csv")))
    (tmp_path / "in" / "b.csv").unlink()
    (tmp_path / "in" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read all
    with pytest.raises(UserError, match=r"in/locked cannot be read: Permission denied"):
        build(config(tmp_path, data(tmp_path)))
    assert build(config(tmp_path, data(tmp_path, "in/*.csv")))[0].rows == 5


def test_glob_characters_in_the_path_of_the_data_are_plain(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "[ab]*" / "in" / "1.csv")
    write_csv(events(7), tmp_path / "a" / "in" / "1.csv")
    assert build(config(tmp_path, data(tmp_path / "[ab]*", "in/?.csv")))[0].rows == 5


# ------------------------------------------------------------------------------------- policies and their accounts


BAD = """id,at,amount,label
1,2020-01-01T00:00:00Z,5,a
2,2020-01-02T00:00:00Z,-1,b
3,never,1,c
4,2020-01-04T00:00:00Z,x,d
,2020-01-05T00:00:00Z,1,e
6,2020-01-06T00:00:00Z,1
"""


def bad(tmp_path: Path, source_policy: str, policy: str, **more: Any) -> dict[str, Any]:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "bad.csv").write_text(BAD)
    columns = {**COLUMNS, "amount": {"type": "float64", "min": 0, "on_violation": policy}}
    source = {**SOURCE, "amount": {"type": "float64", "on_violation": source_policy}}
    return {**data(tmp_path, source={"columns": source}), "columns": columns, "max_quarantine": 1.0, **more}


def test_quarantine_names_file_row_column_value_and_reason(tmp_path: Path) -> None:
    found, metrics = build(config(tmp_path, bad(tmp_path, "quarantine", "quarantine")))
    rows = storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist()
    assert [
        (Path(r["file"]).name, r["row"], r["column"], r["value"], r["reason"])
        for r in sorted(rows, key=lambda r: r["row"])
    ] == [
        ("bad.csv", 2, "amount", "-1", "must be at least 0.0"),
        ("bad.csv", 3, "at", "never", "is no timestamp"),
        ("bad.csv", 4, "amount", "x", "is no float64"),
        ("bad.csv", 5, "id", None, "must not be null"),
        ("bad.csv", 6, None, "6,2020-01-06T00:00:00Z,1", "has 3 fields, must have 4"),
    ]
    assert found.read().column("id").to_pylist() == [1]
    assert metrics["ingest/rows_in"] == 6 == found.rows + metrics["ingest/quarantined"]


def test_null_and_warn_keep_the_row(tmp_path: Path) -> None:
    nulled, _ = build(config(tmp_path, bad(tmp_path, "null", "null")))
    assert dict(zip(*nulled.read(["id", "amount"]).to_pydict().values(), strict=True)) == {1: 5.0, 2: None, 4: None}
    warned, _ = build(config(tmp_path / "w", bad(tmp_path, "warn", "warn")))
    assert dict(zip(*warned.read(["id", "amount"]).to_pydict().values(), strict=True)) == {1: 5.0, 2: -1.0, 4: None}
    assert warned.manifest["accounting"]["quarantined"] == 3


def test_fail_stops_at_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bad\.csv, row 2, column 'amount': must be at least 0\.0, found '-1'"):
        build(config(tmp_path, bad(tmp_path, "null", "fail")))
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_budget_of_quarantined_rows_stops_the_run_and_leaves_them_for_a_look(tmp_path: Path) -> None:
    given = config(tmp_path, bad(tmp_path, "quarantine", "quarantine", max_quarantine="50%"))
    run = run_of(given)
    with pytest.raises(
        UserError, match=r"source s: 5 of 6 rows are quarantined \(83\.33%\), more than data\.max_quarantine=50%"
    ):
        ingest(given, run)
    assert storage.read_parquet(run.path("quarantine.parquet")).num_rows == 5
    assert not list((tmp_path / "store").rglob("part-*"))


def test_sensitive_values_appear_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(
        "id,at,amount,label\n1,2020-01-01T00:00:00Z,5,SECRET-1\n2,2020-01-01T00:00:00Z,SECRET-2,SECRET-3\n"
    )
    source = {
        **SOURCE,
        "amount": {"type": "float64", "sensitive": True},
        "label": {"type": "string", "sensitive": True},
    }
    columns = {
        **COLUMNS,
        "amount": {"type": "float64", "sensitive": True},
        "label": {"type": "string", "sensitive": True, "values": ["other"], "on_violation": "warn"},
    }
    given = config(tmp_path, {**data(tmp_path, source={"columns": source}), "columns": columns, "max_quarantine": 1.0})
    found, _ = build(given)
    texts = [
        path.read_bytes()
        for folder in (tmp_path / "runs", found.directory)
        for path in folder.rglob("*")
        if path.is_file() and "part-" not in path.name
    ]
    assert texts and not any(b"SECRET" in text for text in texts)
    assert found.read().num_rows == 1


@pytest.mark.parametrize("ragged", ["quarantine", "fail"])
@pytest.mark.parametrize("query", [None, "SELECT * FROM s"])
def test_what_is_sensitive_in_the_dataset_is_so_in_its_sources(tmp_path: Path, ragged: str, query: str | None) -> None:
    (tmp_path / "in").mkdir()
    head = "id,at,amount,label\n1,2020-01-01T00:00:00Z,5,a\n"
    (tmp_path / "in" / "a.csv").write_text(f"{head}2,2020-01-01T00:00:00Z,SECRET-1,\n3,2020-01-01T00:00:00Z,SECRET-2\n")
    source = {"csv": {"ragged": ragged}}

    def told(**amount: Any) -> str:
        columns = {**COLUMNS, "amount": {"type": "float64", **amount}}
        given = data(tmp_path, source=source, max_quarantine=1.0, **({"query": query} if query else {}))
        try:
            found, _ = build(config(tmp_path, {**given, "columns": columns}))
        except UserError as error:
            return str(error)
        return str(storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist())

    assert "SECRET-2" in told() and "has 3 fields" in told()
    closed = told(sensitive=True)  # what is staged already holds the values
    assert "SECRET" not in closed and "has 3 fields" in closed


def test_a_refused_file_stops_or_is_counted(tmp_path: Path) -> None:
    write_csv(events(10), tmp_path / "in" / "good.csv")
    (tmp_path / "in" / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"torn\.parquet cannot be read as Parquet"):
        build(config(tmp_path, data(tmp_path)))
    found, metrics = build(config(tmp_path, data(tmp_path, source={"refused": "skip"})))
    assert found.rows == 10 and metrics["ingest/refused_files"] == 1
    assert any(item["refused"] and "torn.parquet" in item["refused"] for item in found.manifest["accounting"]["files"])


def test_rules_over_columns_keep_file_and_row(tmp_path: Path) -> None:
    write_csv(events(10), tmp_path / "in" / "a.csv")
    found, _ = build(config(tmp_path, data(tmp_path, rules={"small": "amount < 5"}, max_quarantine=1.0)))
    right = [i for i, row in enumerate(events(10).to_pylist(), 1) if row["amount"] is not None and row["amount"] >= 5]
    rows = storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist()
    assert right and [row["row"] for row in rows] == right and {row["column"] for row in rows} == {"small"}


@pytest.mark.parametrize(("keep", "left"), [("first", ["a", "c"]), ("last", ["b", "c"])])
def test_duplicates_by_policy(tmp_path: Path, keep: str, left: list[str]) -> None:
    text = "id,at,amount,label\n1,2020-01-01T00:00:00Z,1,a\n1,2020-02-01T00:00:00Z,1,b\n2,2020-01-15T00:00:00Z,1,c\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(text)
    with pytest.raises(UserError, match="the id columns id must be unique, found 2 rows that share one, as '1'"):
        build(config(tmp_path, data(tmp_path)))
    found, _ = build(config(tmp_path, data(tmp_path, duplicates=keep)))
    assert sorted(found.read().column("label").to_pylist()) == left
    assert found.manifest["accounting"]["results"]["events"]["quarantined"] == 1
    # the same over an append, in any order of files
    head, *lines = text.splitlines()
    for place, line in enumerate(reversed(lines)):
        (tmp_path / "split").mkdir(exist_ok=True)
        (tmp_path / "split" / f"{place}.csv").write_text(f"{head}\n{line}\n")
    split, _ = build(config(tmp_path / "x", data(tmp_path, "split", duplicates=keep)))
    assert split.digest == found.digest


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_which_of_equal_ids_stays_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    """The one kept is the smallest or largest of (known time, digest of the row); null is later than any time."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    table = pa.table({
        "a": pa.array(rng.integers(0, 4, n), mask=rng.random(n) < 0.1),
        "b": pa.array([f"b{v}" for v in rng.integers(0, 2, n)]),
        "known": pa.array(rng.integers(0, 3, n), pa.timestamp("us", tz="UTC"), mask=rng.random(n) < 0.2),
        "x": pa.array(rng.integers(0, 2, n)),
        "$number": pa.array(np.arange(n)),
    })  # fmt: skip
    rows = table.to_pylist()

    def rank(row: dict[str, Any]) -> Any:
        text = digest.of_json({name: str(row[name]) for name in ("a", "b", "known", "x")})
        return row["known"] is None, row["known"] or datetime.datetime.max.replace(tzinfo=datetime.UTC), text

    for keep, choose in (("first", min), ("last", max)):
        dropped, kept = (found.to_pylist() for found in order.losers(table, ["a", "b"], "known", keep))
        lost = {row["$number"] for row in dropped}
        assert len(lost) == len(dropped) and not lost & {row["$number"] for row in kept}
        assert [(row["a"], row["b"]) for row in dropped] == [(row["a"], row["b"]) for row in kept]
        for ids in {(row["a"], row["b"]) for row in rows}:
            group = [row for row in rows if (row["a"], row["b"]) == ids]
            (left,) = [row for row in group if row["$number"] not in lost]
            assert rank(left) == choose(map(rank, group))


def test_foreign_keys(tmp_path: Path) -> None:
    write_csv(events(21), tmp_path / "in" / "a.csv")
    (tmp_path / "labels.csv").write_text("label,weight\nx000,1\nx001,2\nx002,1\nx003,1\n")
    given = data(tmp_path, max_quarantine=1.0)
    given["sources"]["labels"] = {"path": "labels.csv", "columns": {"label": "string", "weight": "int64"}}
    given["tables"] = {
        "labels": {"static": True, "columns": {"label": {"type": "string", "role": "id"}, "weight": "int64"}}
    }
    given["columns"] = {**COLUMNS, "label": {"type": "string", "references": "labels.label"}}
    found, _ = build(config(tmp_path, given))
    right = [row["id"] for row in events(21).to_pylist() if row["label"] != "x004"]
    assert sorted(found.read().column("id").to_pylist()) == sorted(right) and len(right) < 21
    rows = storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist()
    assert {row["reason"] for row in rows} == {"must stand in labels.label"} and {row["value"] for row in rows} == {
        "x004"
    }


def test_a_damaged_side_table_is_named_with_the_way_out(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    (tmp_path / "labels.csv").write_text("label\na\n")
    given = data(tmp_path)
    given["sources"]["labels"] = {"path": "labels.csv", "columns": {"label": "string"}}
    given["tables"] = {"labels": {"static": True, "columns": {"label": {"type": "string", "role": "id"}}}}
    found, _ = build(config(tmp_path, given))
    assert found.table("labels").to_pydict() == {"label": ["a"]}
    (found.directory / "tables" / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"labels.parquet is damaged \(.*\). Run `ingest` again"):
        found.table("labels")


def test_the_order_of_a_side_table_is_that_of_its_values_nested_ones_and_signs_of_zero_too(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    rows = [{"k": 1, "x": x, "tags": tags} for x in (0.0, -0.0, None) for tags in ([2, 1], [1], [], None)]
    kinds = {"k": "int64", "x": "float64", "tags": "list<int64>"}
    given = data(tmp_path)
    given["sources"]["side"] = {"path": "side.parquet", "columns": kinds}
    given["tables"] = {"side": {"columns": kinds}}
    types = pa.schema([("k", pa.int64()), ("x", pa.float64()), ("tags", pa.list_(pa.int64()))])
    found = set()
    for turn, shuffled in enumerate((rows, rows[::-1], random.Random(1).sample(rows, len(rows)))):
        pq.write_table(pa.Table.from_pylist(shuffled, types), tmp_path / "side.parquet")
        dataset, _ = build(config(tmp_path / str(turn), given))
        found.add((dataset.table_digest("side"), str(dataset.table("side").to_pylist())))
    assert len(found) == 1


def test_a_foreign_key_of_another_type_is_refused(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    (tmp_path / "labels.csv").write_text("label\n1\n")
    given = data(tmp_path)
    given["sources"]["labels"] = {"path": "labels.csv", "columns": {"label": "int64"}}
    given["tables"] = {"labels": {"static": True, "columns": {"label": {"type": "int64", "role": "id"}}}}
    given["columns"] = {**COLUMNS, "label": {"type": "string", "references": "labels.label"}}
    with pytest.raises(UserError, match=r"data.columns.label must have the type of labels.label, int64, found string"):
        build(config(tmp_path, given))


# ------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"min_rows": 101}, r"at least 101 rows \(min_rows\), found 100"),
        ({"max_rows": 99}, r"at most 99 rows \(max_rows\), found 100"),
        ({"freshness": "30d"}, r"its newest event may be 30d old \(freshness\), found 2020-"),
        (
            {"columns": {**COLUMNS, "label": {"type": "string", "max_null_rate": "10%"}}},
            r"'label' may be null in 10% of the rows \(max_null_rate\), found 15\.00%",
        ),
    ],
)
def test_a_contract_names_the_clause_that_is_broken(tmp_path: Path, clause: dict, message: str) -> None:
    write_csv(events(100), tmp_path / "in" / "a.csv")
    with pytest.raises(UserError, match=message):
        build(config(tmp_path, {**data(tmp_path), **clause}))
    assert not list((tmp_path / "store").rglob("part-*"))


def test_a_batch_is_compared_with_the_one_before(tmp_path: Path) -> None:
    write_csv(events(100), tmp_path / "in" / "a.csv")
    build(config(tmp_path, data(tmp_path)))
    write_csv(events(100, 1, 100), tmp_path / "in" / "b.csv")
    with pytest.raises(UserError, match=r"max_row_change\), found 100 -> 200"):
        build(config(tmp_path, data(tmp_path, max_row_change="20%")))
    columns = {**COLUMNS, "label": {"type": "string", "max_null_change": "5%"}}
    (tmp_path / "in" / "b.csv").write_text(
        "id,at,amount,label\n" + "".join(f"{i},2020-01-01T00:00:00Z,1,\n" for i in range(20))
    )
    with pytest.raises(
        UserError, match=r"share of nulls of 'label' may change by 5% \(max_null_change\), found 15\.00% -> 29\.17%"
    ):
        build(config(tmp_path, {**data(tmp_path), "columns": columns}))


# ----------------------------------------------------------------------------------------------- append and resume


@pytest.mark.parametrize("count", [1, 4])
def test_an_append_reads_only_new_files_and_equals_a_full_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    opened: list[str] = []

    def counted(file: SourceFile, *arguments: Any) -> Any:
        opened.append(file.path.name)
        return csv_files.read(file, *arguments)

    monkeypatch.setitem(stage.READERS, "csv", counted)
    for place in range(count):
        write_csv(events(200, place, place * 200), tmp_path / "in" / f"{place}.csv")
    given = config(tmp_path, data(tmp_path))
    _, first = build(given)
    assert first["ingest/files_reused"] == 0 and sorted(opened) == [f"{place}.csv" for place in range(count)]
    opened.clear()
    write_csv(events(200, 9, 2000), tmp_path / "in" / "9.csv")
    appended, second = build(given)
    assert opened == ["9.csv"]
    assert second["ingest/files_reused"] == count and second["ingest/files"] == count + 1
    rebuilt, third = build(config(tmp_path / "new", data(tmp_path)))
    assert third["ingest/files_reused"] == 0
    assert appended.digest == rebuilt.digest and appended.rows == 200 * (count + 1)
    (tmp_path / "in" / "0.csv").unlink()
    opened.clear()
    build(given)
    assert not opened and len(list((tmp_path / "store").rglob(".staged/*.arrow"))) == count


def test_a_staged_file_that_is_damaged_is_read_again(tmp_path: Path) -> None:
    for place in range(2):
        write_csv(events(50, place, place * 50), tmp_path / "in" / f"{place}.csv")
    given = config(tmp_path, data(tmp_path))
    found, _ = build(given)
    staged = sorted((tmp_path / "store").rglob(".staged/*.arrow"))[0]
    staged.write_bytes(staged.read_bytes()[:100])
    again, metrics = build(given)
    assert metrics["ingest/files_reused"] == 1 and again.digest == found.digest


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere.csv"}, r"data\.sources\.s: .*nowhere\.csv must exist, found nothing"),
        ({"path": "in/*.parquet"}, r"must match files, found none"),
        ({"path": "../../etc/passwd.csv"}, r"must exist, found nothing"),
        ({"path": "pkg://no_such_package/x.csv"}, r"package 'no_such_package', which is not installed"),
        ({"path": "pkg://engine/../setup.py"}, r"a path must stay inside"),
        ({"path": "ftp://host/x.csv"}, r"a source path must be a path, pkg:// or s3://"),
        ({"columns": {**SOURCE, "id": "int65"}}, r"column 'id': unknown type 'int65'\. Did you mean 'int64'"),
        ({"columns": {**SOURCE, "more": "string"}}, r"a\.csv: column 'more' is missing"),
    ],
)
def test_a_mistake_gives_one_clear_message(tmp_path: Path, change: dict, message: str) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    with pytest.raises(UserError, match=message):
        build(config(tmp_path, data(tmp_path, source=change)))
    assert not list((tmp_path / "store").rglob("part-*"))


def test_a_query_is_one_select_that_sees_the_sources_only(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    for sql, message in (
        ("DROP TABLE s", "must be one SELECT"),
        ("SELECT 1; SELECT 2", "must be one SELECT"),
        (f"SELECT * FROM '{tmp_path}/in/a.csv'", "a.csv': it is none of data.sources"),
        (f"SELECT * FROM read_csv('{tmp_path}/in/a.csv')", r"read_csv\(\): it reads something else than the rows"),
        ("SELECT id, FROM FROM s", "must be one SELECT statement, but DuckDB says: syntax error"),
        ('SELECT id, "at", amount FROM s', "data.query must give column 'label' once, found only id, at, amount"),
        ("SELECT id, att FROM s", "data.query: Binder Error"),
        ('SELECT id, "at", label AS amount, label FROM s', "label AS amount|is no float64|quarantined"),
    ):
        with pytest.raises(UserError, match=message):
            build(config(tmp_path, data(tmp_path, query=sql)))


def test_only_sql_needs_duckdb_and_says_so_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    monkeypatch.setitem(sys.modules, "duckdb", None)  # as where it is not installed
    assert build(config(tmp_path, data(tmp_path)))[0].rows == 5
    for more in ({"query": "SELECT * FROM s"}, {"rules": {"small": "amount < 5"}}):
        with pytest.raises(UserError, match=r"needs DuckDB, which was not found: pip install duckdb"):
            build(config(tmp_path, data(tmp_path, **more)))


def test_a_rule_that_sql_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    with pytest.raises(UserError, match=r"data\.rules: Binder Error.*no_such"):
        build(config(tmp_path, data(tmp_path, rules={"small": "no_such < 5"})))


def test_a_type_that_sql_lacks_is_one_clear_message(tmp_path: Path) -> None:
    write_csv(events(5), tmp_path / "in" / "a.csv")
    source = {"columns": {**SOURCE, "amount": "float16"}}
    with pytest.raises(UserError, match=r"source s cannot be queried: .*amount halffloat"):
        build(config(tmp_path, data(tmp_path, query="SELECT * FROM s", source=source, max_quarantine=1.0)))


def test_a_query_result_is_checked_by_its_ids(tmp_path: Path) -> None:
    write_csv(events(50), tmp_path / "in" / "a.csv")
    columns = {**COLUMNS, "amount": {"type": "float64", "max": 5}}
    found, _ = build(
        config(tmp_path, {**data(tmp_path, query="SELECT * FROM s", max_quarantine=1.0), "columns": columns})
    )
    rows = storage.read_parquet(found.directory / "quarantine" / "quarantine.parquet").to_pylist()
    right = {str(row["id"]) for row in events(50).to_pylist() if (row["amount"] or 0) > 5}
    assert {row["row_id"] for row in rows} == right and right
    assert {row["part"] for row in rows} == {"events"}


# ------------------------------------------------------------------------------------------------ validate and show


def test_validate_reports_every_file_and_stores_nothing(tmp_path: Path) -> None:
    write_csv(events(10), tmp_path / "in" / "good.csv")
    given = config(tmp_path, data(tmp_path))
    run = run_of(given)
    assert validate(given, run) == {"validate/files": 1.0, "validate/rows": 10.0, "validate/quarantined": 0.0}
    write_csv(events(10).drop_columns(["amount"]), tmp_path / "in" / "missing.csv")
    (tmp_path / "in" / "bad.csv").write_text(BAD)
    run = run_of(given)
    with pytest.raises(UserError, match="2 of 3 files break the schema"):
        validate(given, run)
    report = json.loads(run.path("validation.json").read_text())
    problems = {Path(item["file"]).name: item["problems"] for item in report["files"]}
    assert report["ok"] is False and not problems["good.csv"]
    assert "column 'amount' is missing" in problems["missing.csv"][0] and "4 of 6 rows" in problems["bad.csv"][0]
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("*.parquet"))


def test_show_names_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(tmp_path, data(tmp_path))
    with pytest.raises(UserError, match="no dataset 'x' in the store"):
        show(given, ["x"], {})
    write_csv(events(10), tmp_path / "in" / "good.csv")
    found, _ = build(given)
    show(given, ["t"], {"--json": ""})
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"]["digest"] == found.digest and shown["profile"]["columns"]["label"]["nulls"] == 2


def test_shares_of_texts_are_of_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["often"] * 50 + [None] * 50 + [f"x{place}" for place in range(100)] + ["twice"] * 2
    write_csv(events(len(labels)).set_column(3, "label", pa.array(labels)), tmp_path / "in" / "a.csv")
    given = config(tmp_path, data(tmp_path))
    build(given)
    show(given, ["t"], {})
    assert "102 distinct: often 25%, twice <1%, x0 <1%, x1 <1%\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ row ids


def test_row_ids_are_unambiguous() -> None:
    table = pa.table({"a": ["x|y", "x", "x\\", None, "\\N"], "b": ["z", "y|z", "|z", "z", "z"]})
    ids = row_ids(table, ["a", "b"]).to_pylist()
    assert len(set(ids)) == 5 and ids[0] == "x\\|y|z"
    times = pa.table({"t": pa.array([0, 1_500_000, None], pa.timestamp("us", tz="UTC"))})
    assert row_ids(times, ["t"]).to_pylist() == ["1970-01-01T00:00:00Z", "1970-01-01T00:00:01.500000Z", "\\N"]
    assert row_ids(times.slice(0, 1), ["t"]).to_pylist() == ["1970-01-01T00:00:00Z"]
