"""What a library raises at a user's data is a sentence with file, column and what to do, never a traceback; the advice works."""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.sections.data import SourceColumn, SourceConfig
from engine.data import failures
from engine.data.expressions import evaluate
from engine.data.readers import lake_tables
from engine.errors import UserError
from engine.runtime import digest
from tests.data.helpers import build, config, read

UTC = pa.timestamp("us", tz="UTC")
ROWS = 300
COLUMNS = {
    "i": "int64", "s": "string", "u": "string", "f": "float64", "t": "timestamp", "b": "bool", "l": "list<int64>",
    "d": "binary",
}  # fmt: skip


def table() -> pa.Table:
    draw = random.Random(1)
    return pa.table(
        {
            "i": pa.array(range(ROWS)),
            "s": pa.array([f"v{draw.randrange(20)}" for _ in range(ROWS)]),
            "u": pa.array([f"id-{i}" for i in range(ROWS)]),
            "f": pa.array([draw.random() if draw.random() > 0.1 else None for _ in range(ROWS)]),
            "t": pa.array([i * 10**9 for i in range(ROWS)]).cast(UTC),
            "b": pa.array([draw.random() < 0.5 for _ in range(ROWS)]),
            "l": pa.array([[1, 2]] * ROWS, pa.list_(pa.int64())),
            "d": pa.array([b"x" * (i % 50) for i in range(ROWS)]),
        }
    )


def as_parquet(path: Path, compression: str, checksums: bool) -> None:
    pq.write_table(
        table(), path, compression=compression, row_group_size=100, write_page_checksum=checksums, data_page_size=500
    )


def as_arrow(path: Path, compression: str, _: bool) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression if compression in ("zstd", "lz4") else None)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table().schema, options=options) as writer:
        writer.write_table(table(), max_chunksize=100)


def as_csv(path: Path, *_: Any) -> None:
    plain = table().select(["i", "s", "u", "f"]).to_pylist()
    lines = ["i,s,u,f", *(f"{r['i']},{r['s']},{r['u']},{'' if r['f'] is None else r['f']}" for r in plain)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def as_json(path: Path, *_: Any) -> None:
    path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, table().select(["i", "s", "u", "f"]).to_pylist())).encode(), mtime=0)
    )


FORMATS = {"a.parquet": as_parquet, "a.arrow": as_arrow, "a.csv.gz": as_csv, "a.jsonl.gz": as_json}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_with_flipped_bits_is_read_or_refused_in_a_sentence_and_its_digest_differs(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    columns = COLUMNS if "gz" not in name else {name: COLUMNS[name] for name in ("i", "s", "u", "f")}

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(["snappy", "zstd", "none", "gzip", "lz4"]),
        st.booleans(),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4, unique=True),
        st.sampled_from([1.0, 1.0, 1.0, 0.7]),
    )
    def check(compression: str, checksums: bool, flips: list[tuple[float, int]], kept: float) -> None:
        FORMATS[name](path, compression, checksums)
        before = digest.of_file(path)
        raw = bytearray(path.read_bytes())
        for place, bit in flips:
            raw[int(place * len(raw))] ^= 1 << bit
        changed = bytes(raw[: int(kept * len(raw))]) != path.read_bytes()
        path.write_bytes(raw[: int(kept * len(raw))])
        assert (digest.of_file(path) != before) == changed
        try:
            found, staged = read(path, columns, csv={"ragged": "quarantine"} if "csv" in name else {})
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert staged.tally.rows == found.num_rows + staged.tally.quarantined
            assert list(found.column_names) in (list(columns), [])

    check()


def broken_page(path: Path, column: str, group: int) -> None:
    """A Parquet file with checksums in which one data page of a column is damaged."""
    as_parquet(path, "none", True)
    metadata = pq.ParquetFile(path).metadata
    place = [metadata.row_group(group).column(k).path_in_schema for k in range(metadata.num_columns)].index(column)
    chunk = metadata.row_group(group).column(place)
    raw = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    raw[start + chunk.total_compressed_size - 3] ^= 255
    path.write_bytes(raw)


@pytest.mark.parametrize(("column", "group"), [("f", 0), ("u", 2), ("i", 1)])
def test_a_damaged_page_is_told_with_its_column_and_rows_and_both_ways_on_work(
    column: str, group: int, tmp_path: Path
) -> None:
    as_parquet(tmp_path / "good.parquet", "zstd", True)
    broken_page(tmp_path / "broken.parquet", column, group)

    def built(columns: dict[str, str], **source: Any) -> pa.Table:
        declared: dict[str, Any] = {
            name: {"type": kind} for name, kind in columns.items() if name in ("i", "t", "f", "u")
        }
        declared["i"]["role"], declared["t"]["role"] = "id", "event_time"
        sources = {"t": {"path": str(tmp_path / "*.parquet"), "columns": columns, **source}}
        dataset, _ = build(config(tmp_path, {"sources": sources, "columns": declared, "duplicates": "first"}))
        return dataset.read()

    with pytest.raises(UserError) as caught:
        built(COLUMNS)
    said = str(caught.value)
    rows = f"row group {group + 1} (rows {100 * group + 1} to {100 * group + 100})"
    assert f"broken.parquet cannot be read as Parquet in column {column!r}, {rows}: " in said
    assert "data.sources.t.refused=skip" in said and f"without column {column!r}" in said
    assert built(COLUMNS, refused="skip").num_rows == ROWS
    if column not in ("i", "t"):
        assert built({name: kind for name, kind in COLUMNS.items() if name != column}).num_rows == ROWS


HALF = pa.array(np.array([1, 2, 3], np.float16))
WIDE = pa.array([Decimal("1.00")] * 3, pa.decimal256(76, 2))
QUERY = "SELECT id, w, v FROM t"


def sql(folder: Path, values: pa.Array, kind: str, **data: Any) -> pa.Table:
    """A dataset of (id, w, v) by a query or rule."""
    path = folder / "a.parquet"
    pq.write_table(pa.table({"id": range(3), "w": pa.array(range(3)).cast(UTC), "v": values}), path)
    result = data.pop("result", kind)
    declared = {"id": {"type": "int64", "role": "id"}, "w": {"type": "timestamp", "role": "event_time"}, "v": result}
    declared["v"] = {"type": result}
    columns = {"id": "int64", "w": "timestamp", "v": kind}
    given_ = {"sources": {"t": {"path": str(path), "columns": columns}}, "columns": declared, **data}
    return build(config(folder, given_))[0].read()


RULES = {"r": {"holds": "v > 0", "on_violation": "warn"}}
CAST, TRY = "SELECT id, w, CAST(v AS BIGINT) AS v FROM t", "SELECT id, w, TRY_CAST(v AS BIGINT) AS v FROM t"
WORDS = pa.array(["a", "1", "2"])
# (column, declared type, what is wrong, words of the message, what it advises)
SQL: list[tuple[pa.Array, str, dict[str, Any], str, tuple[str, dict[str, Any]]]] = [
    (HALF, "float16", {"query": QUERY}, "float32 for a float16", ("float32", {"query": QUERY})),
    (HALF, "float16", {"rules": RULES}, "float32 for a float16", ("float32", {"rules": RULES})),
    (WIDE, "decimal(76,2)", {"query": QUERY}, r"decimal\(38,s\)", ("decimal(38,2)", {"query": QUERY})),
    (WIDE, "decimal(76,2)", {"rules": RULES}, r"decimal\(38,s\)", ("decimal(38,2)", {"rules": RULES})),
    (
        WORDS, "string", {"query": CAST, "result": "int64"}, "'a' to INT64.*TRY_CAST",
        ("string", {"query": TRY, "result": "int64"}),
    ),
    (
        WORDS, "string", {"rules": {"r": {"holds": "CAST(v AS BIGINT) > 0"}}}, "'a' to INT64.*TRY_CAST",
        ("string", {"rules": {"r": {"holds": "TRY_CAST(v AS BIGINT) > 0"}}}),
    ),
    (
        pa.array([2**63 - 1, 1, 2]), "int64", {"query": "SELECT id, w, v + 1 AS v FROM t", "result": "float64"}, "DOUBLE",
        ("int64", {"query": "SELECT id, w, CAST(v AS DOUBLE) + 1 AS v FROM t", "result": "float64"}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "kind", "wrong", "words", "advised"), SQL)
def test_what_sql_cannot_do_is_told_with_an_advice_that_works(
    values: pa.Array, kind: str, wrong: dict[str, Any], words: str, advised: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        sql(tmp_path, values, kind, **wrong)
    (tmp_path / "again").mkdir()
    assert sql(tmp_path / "again", values, advised[0], **advised[1]).num_rows == 3


def test_a_file_is_not_skipped_for_a_rule_that_fails_on_one_of_its_values(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.rules: .*TRY_CAST"):
        sql(tmp_path, WORDS, "string", rules={"r": {"holds": "CAST(v AS BIGINT) > 0"}})


@pytest.mark.parametrize(
    ("expression", "kind", "rows"),
    [
        ("CAST(v AS DOUBLE)", "float64", {"v": ["a"]}),
        ("v", "float32", {"v": HALF}),
        ("v", "float32", {"v": [1e300]}),
        ("v", "float64", {"v": WIDE}),
        ("v * 2", "int64", {"v": [2**62]}),
        ("v", "int32", {"v": [2**40]}),
        ("regexp_matches(v, '(')", "bool", {"v": ["a"]}),
    ],
)
def test_an_expression_that_fails_on_a_value_is_a_sentence(expression: str, kind: str, rows: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^features\.views\.x: .*Error"):
        evaluate({"x": (expression, kind)}, pa.table(rows), "features.views.x")


@pytest.mark.parametrize(
    ("expression", "kind", "declared"),
    [
        ("340282366920938463463374607431768211455::UHUGEINT", "UHUGEINT", "decimal(39,0)"),
        ("md5_number(CAST(id AS VARCHAR))", "UHUGEINT", "decimal(38,0)"),
        ("TIMETZ '12:00:00+02'", "TIME WITH TIME ZONE", "time"), ("'101'::BIT", "BIT", "binary"),
        ("12::BIGNUM", "BIGNUM", "binary"), ("[5::UHUGEINT]", "UHUGEINT", "list<decimal(38,0)>"),
    ],
)  # fmt: skip
def test_values_of_sql_that_are_lost_on_their_way_out_are_refused_with_an_advice_that_works(
    expression: str, kind: str, declared: str, tmp_path: Path
) -> None:
    numbers = pa.array([1, 2, 3])
    with pytest.raises(UserError, match=f"column 'v' must .*found {kind} of SQL: write CAST"):
        sql(tmp_path, numbers, "int64", query=f"SELECT id, w, {expression} AS v FROM t", result=declared)
    query = f'SELECT id, w, CAST({expression} AS VARCHAR) AS "v" FROM t'
    assert sql(tmp_path, numbers, "int64", query=query, result="string").num_rows == 3


def test_a_time_that_sql_has_without_an_offset_is_kept(tmp_path: Path) -> None:
    query = "SELECT id, w, TIMESTAMPTZ '2024-01-01 12:00:00+02' AS v FROM t"
    found = sql(tmp_path, pa.array([1, 2, 3]), "int64", query=query, result="timestamp")
    assert found["v"][0].as_py().isoformat() == "2024-01-01T10:00:00+00:00"


def torn_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"i,s\n1,a\n")[:-5])


def plain_gzip(path: Path) -> None:
    path.write_bytes(b"i,s\n1,a\n")


def full_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "i,s\n1,a\n")
        archive.writestr("b.csv", "i,s\n2,b\n")


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv.gz", torn_gzip), ("a.csv.gz", plain_gzip), ("a.csv.zip", full_zip)]
)
def test_an_archive_that_cannot_be_unpacked_is_told_with_the_ways_on(name: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}.*; replace the file; .*data\.sources\.s\.refused=skip$"):
        read(tmp_path / name, {"i": "int64", "s": "string"})
    assert read(tmp_path / name, {"i": "int64", "s": "string"}, refused="skip")[1].refused


def test_a_damaged_arrow_batch_is_told_with_its_column(tmp_path: Path) -> None:
    as_arrow(tmp_path / "a.arrow", "none", False)
    raw = (tmp_path / "a.arrow").read_bytes()
    offsets = np.cumsum([0, *(len(f"id-{i}") for i in range(100))], dtype=np.int32).tobytes()
    assert raw.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(raw.replace(offsets, offsets[:40] + b"\xff" * 8 + offsets[48:]))
    with pytest.raises(UserError, match=r"a\.arrow cannot be read as Arrow IPC: column 'u': "):
        read(tmp_path / "a.arrow", COLUMNS)


def test_half_of_a_character_in_json_is_a_finding_of_its_row(tmp_path: Path) -> None:
    rows = ['{"i": 1, "s": "a"}', '{"i": 2, "s": "\\ud800"}', '{"i": 3, "s": "\\ud83d\\ude00", "\\udc00": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found, staged = read(tmp_path / "a.jsonl", {"i": "int64", "s": "string"})
    assert found["s"].to_pylist() == ["a", "\U0001f600"] and staged.tally.quarantined == 1
    found, _ = read(tmp_path / "a.jsonl", {"i": "int64", "s": {"type": "string", "on_violation": "null"}})
    assert found["s"].to_pylist() == ["a", None, "\U0001f600"]


def test_a_line_of_json_that_is_no_object_is_told_in_the_words_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"i": 1}\n5\nnull\n"x"\n[1]\ntrue\n')
    lost = read(tmp_path / "a.jsonl", {"i": "int64"})[1].tally.records
    assert [record["reason"].split(": ")[1] for record in lost] == [
        "it is a number", "it is null", "it is a text", "it is a list", "it is a truth value",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
@pytest.mark.parametrize("snapshot", ["1e5", "123e4567", "-1", "1_0", "latest", "٣"])
def test_a_snapshot_that_is_no_whole_number_is_refused(kind: str, snapshot: str, tmp_path: Path) -> None:
    source = SourceConfig(path="t", columns={"i": SourceColumn(type="int64")}, format=kind, snapshot=snapshot)
    with pytest.raises(UserError, match=rf"data\.sources\.s\.snapshot must be .* a whole number, found '{snapshot}'"):
        lake_tables.table_file("s", source, tmp_path)


def test_a_fault_of_the_engine_keeps_its_traceback() -> None:
    for fault in (lambda: {}["a"], lambda: len(None), lambda: [][1]):  # type: ignore[arg-type]
        with pytest.raises((KeyError, TypeError, IndexError)), failures.explained("x"):
            fault()
    for raised in (lambda: pa.array([2**63]), lambda: pa.array(["x"]).cast(pa.int64()), lambda: open("/nowhere/x")):
        with pytest.raises(UserError, match=r"^x: "), failures.explained("x"):
            raised()


# ------------------------------------------------------------------------------------------------------------ Delta


def delta(folder: Path, features: list[str], fields: list[dict[str, Any]], *commits: list[dict[str, Any]]) -> Path:
    """A Delta table of one file `part.parquet` (columns of `written`), its log by hand."""
    log = folder / "lake" / "_delta_log"
    log.mkdir(parents=True)
    written = pa.table({"a": pa.array(range(10)), "w": pa.array(range(10)).cast(UTC)})
    pq.write_table(written, folder / "lake" / "part.parquet")
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
    configuration = {
        "delta.enableDeletionVectors": "true",
        "delta.columnMapping.mode": "name" if "columnMapping" in features else "none",
    }
    metadata = {
        "id": "11111111-1111-1111-1111-111111111111", "format": {"provider": "parquet", "options": {}}, "partitionColumns": [],
        "schemaString": json.dumps({"type": "struct", "fields": fields}), "configuration": configuration, "createdTime": 1,
    }  # fmt: skip
    first = [{"protocol": protocol}, {"metaData": metadata}, {"add": added(folder)}]
    for number, actions in enumerate([first, *commits]):
        (log / f"{number:020d}.json").write_text("\n".join(map(json.dumps, actions)))
    return folder / "lake"


def added(folder: Path, **more: Any) -> dict[str, Any]:
    size = (folder / "lake" / "part.parquet").stat().st_size
    entry = {"path": "part.parquet", "partitionValues": {}, "size": size, "modificationTime": 1, "dataChange": True}
    return {**entry, "stats": '{"numRecords": 10}', **more}


def field(name: str, kind: str, **metadata: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "nullable": True, "metadata": metadata}


def test_rows_that_a_deletion_vector_deletes_are_not_read_and_make_another_dataset(tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    gone = {
        "storageType": "i",
        "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000315c8Xg0@@Ma",
        "sizeInBytes": 36,
        "cardinality": 2,
    }
    later = [{"remove": {"path": "part.parquet", "deletionTimestamp": 2, "dataChange": True}}, {"add": {}}]
    lake = delta(tmp_path, ["deletionVectors"], [field("a", "long"), field("w", "timestamp")], later)
    later[1] = {"add": added(tmp_path, deletionVector=gone)}
    (lake / "_delta_log" / f"{1:020d}.json").write_text("\n".join(map(json.dumps, later)))

    def built(snapshot: str | None) -> Any:
        columns = {"a": {"type": "int64", "role": "id"}, "w": {"type": "timestamp", "role": "event_time"}}
        source = {
            "path": str(lake),
            "format": "delta",
            "columns": {"a": "int64", "w": "timestamp"},
            "snapshot": snapshot,
        }
        return build(config(tmp_path, {"sources": {"t": source}, "columns": columns}))[0]

    whole, rest = built("0"), built(None)
    assert whole.read(["a"])["a"].to_pylist() == list(range(10))
    assert rest.read(["a"])["a"].to_pylist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert whole.recipe != rest.recipe


def test_columns_that_a_delta_table_maps_are_read_by_their_names_in_the_table(tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    mapped = [
        field("order", "long", **{"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "a"}),
        field("placed", "timestamp", **{"delta.columnMapping.id": 2, "delta.columnMapping.physicalName": "w"}),
    ]
    lake = delta(tmp_path, ["columnMapping"], mapped)
    declared = {"order": {"type": "int64", "role": "id"}, "placed": {"type": "timestamp", "role": "event_time"}}
    source = {"path": str(lake), "format": "delta", "columns": {"order": "int64", "placed": "timestamp"}}
    dataset, _ = build(config(tmp_path, {"sources": {"t": source}, "columns": declared}))
    assert dataset.read(["order"])["order"].to_pylist() == list(range(10))


def test_a_feature_that_the_library_lacks_is_named(tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    lake = delta(tmp_path, ["timeTravelling"], [field("a", "long"), field("w", "timestamp")])
    with pytest.raises(UserError, match=r"data\.sources\.t: .*cannot be read as delta table: .*timeTravelling"):
        declared = {"a": {"type": "int64", "role": "id"}, "w": {"type": "timestamp", "role": "event_time"}}
        source = {"path": str(lake), "format": "delta", "columns": {"a": "int64", "w": "timestamp"}}
        build(config(tmp_path, {"sources": {"t": source}, "columns": declared}))
