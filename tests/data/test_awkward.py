"""Files that other readers stumble over: each is read rightly, or refused or quarantined with file, row and reason."""

from __future__ import annotations

import datetime
import resource
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from tests.data.helpers import read, stage_all

DATE, TIME = {"type": "date", "format": "%d-%m-%Y"}, {"type": "timestamp", "format": "%d-%m-%Y %H:%M:%S"}
UTC = datetime.UTC


@pytest.fixture
def awkward(shared_data: Path) -> Path:
    folder = shared_data / "awkward"
    if not folder.is_dir():
        pytest.skip("the awkward files are not here")
    return folder


def at(*parts: int) -> datetime.datetime:
    return datetime.datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type]


# (file, declared columns, options of the source, column -> values that must come out)
READ: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, list[Any]]]] = [
    ("csv/auto_duplicate_header_collision.csv", {"b": "string", "a_1": "string"}, {}, {"a_1": ["text1", "text2"]}),
    (
        "csv/auto_unnamed_columns.csv",
        {f"c{i}": "string" for i in range(13)},
        {"csv": {"header": False}},
        {"c0": ["123", "345"], "c3": [None, None], "c12": ["value1", "value2"]},
    ),
    ("csv/auto_utf8bom.csv", {"id": "int64", "name": "string"}, {}, {"id": [1, 2], "name": ["Mark", "Hannes"]}),
    (
        "csv/bad_date_2.csv",
        {"date": "date", "specification_version": "string"},
        {"csv": {"delimiter": "|"}},
        {
            "date": [datetime.date(2023, 12, 3), *[datetime.date(2023, 4, 6)] * 3, datetime.date(2022, 11, 9)],
            "specification_version": ["2.2.2", *["2.2.0"] * 4],
        },
    ),
    (
        "csv/bad_date_timestamp_mix.csv",
        {"date": "date", "eventID": "string", "subplotID": "string", "ts": "timestamp", "t2_2": TIME},
        {},
        {
            "date": [datetime.date(2016, 10, 3)],
            "subplotID": ["41_10_1"],
            "ts": [at(2020, 1, 1, 1, 2, 3)],
            "t2_2": [at(2020, 1, 1, 1, 2, 3)],
        },
    ),
    ("csv/big_number.csv", {"bignumber": "decimal(20,2)"}, {}, {"bignumber": [Decimal("82544000000000707.52")]}),
    (
        "csv/conflict_timestamp.csv",
        {"ts": "timestamp", "t2_2": TIME},
        {"csv": {"delimiter": ";"}},
        {"ts": [at(2020, 1, 1, 1, 2, 3)], "t2_2": [at(2020, 1, 1, 1, 2, 3)]},
    ),
    (
        "csv/hive-partitioning_mismatching_types_part_1_test.csv",
        {"a": "string", "b": "string"},
        {},
        {"a": ["xxx"], "b": ["42"]},
    ),
    (
        "csv/hive-partitioning_mismatching_types_part_2_test.csv",
        {"a": "string", "b": "string"},
        {},
        {"a": ["99"], "b": ["world"]},
    ),
    ("csv/integer_exponent.csv", {"a": "int64", "b": "int64", "c": "float64"}, {}, {"c": [3.0, 6.0, 1e-07]}),
    (
        "csv/invalid_utf8.csv",
        {"a": "string"},
        {"csv": {"header": False, "encoding": "utf-16"}},
        {"a": ["bla", "bla", "\ufffd"]},
    ),
    (
        "csv/leading_zeros.csv",
        {"CODGEO": "string", "NAISD14": "int64"},
        {"unexpected": "ignore"},
        {"CODGEO": ["09001", "09002", "09003", "09004", "09005", "09006"], "NAISD14": [0, 6, 4, 0, 2, 0]},
    ),
    (
        "csv/leading_zeros2.csv",
        {
            "comune": "string",
            "codice_regione": "string",
            "data_entrata_in_carica": {"type": "date", "format": "%d/%m/%Y"},
        },
        {"unexpected": "ignore"},
        {
            "comune": ["030151360", "030120530", "020040580", "030150870", "190480090"],
            "codice_regione": ["03", "03", "02", "03", "19"],
            "data_entrata_in_carica": [datetime.date(2021, 10, d) for d in (13, 4)]
            + [datetime.date(2020, 9, 23)]
            + [datetime.date(2021, 10, d) for d in (4, 27)],
        },
    ),
    (
        "csv/mixed_new_line.csv",
        {"a": "int64", "b": "int64", "c": "int64"},
        {"csv": {"header": False}},
        {"a": [1, 4, 7], "c": [3, 6, 9]},
    ),
    (
        "csv/null_multiple_nulls.csv",
        {"name": "string", "age": "int64", "height": "float64"},
        {"csv": {"nulls": ["", "null", "none"]}},
        {"age": [31, None, 26], "height": [1.73, None, None]},
    ),
    (
        "csv/nullbyte_header.csv",
        {"col1": "string", "col2": {"type": "string", "aliases": ["col\0002"]}},
        {"csv": {"delimiter": "|"}},
        {"col1": ["val1"], "col2": ["val2"]},
    ),
    (
        "csv/test_mixed_line_endings.csv",
        {"a": "int64", "b": "string", "c": "int64"},
        {"csv": {"header": False}},
        {"a": [10, 20, 30], "b": ["hello", "world", "test"], "c": [20, 30, 30]},
    ),
    (
        "csv/thousands_separator_simple.csv",
        {"a": "decimal(18,2)"},
        {"csv": {"header": False, "delimiter": ";", "thousands": ","}},
        {"a": [Decimal(x) for x in ("100000.00", "300000.20", "300000000.40", "50.00", "9999999999.20")]},
    ),
    (
        "csv/timestamp_timezone.csv",
        {"time": "timestamp", "description": "string"},
        {},
        {
            "time": [
                at(2020, 1, 1),
                at(2020, 1, 1, 8),
                at(2020, 1, 1),
                at(2020, 1, 1),
                at(2019, 12, 31, 16),
                at(2019, 12, 31, 18, 30),
                at(2019, 12, 31, 10, 15),
                at(2020, 1, 1, 3, 30),
            ]
        },
    ),
    (
        "parquet/dk_aws_kinesis.parquet",
        {"event_timestamp": "timestamp", "arrival_delay_ms": "int32"},
        {"unexpected": "ignore"},
        {
            "arrival_delay_ms": [-129, -2330, -2825, -800],
            "event_timestamp": [
                at(2022, 11, 22, 0, 1, 0, 871000),
                at(2022, 11, 22, 0, 1, 7, 670000),
                at(2022, 11, 22, 0, 1, 13, 175000),
                at(2022, 11, 22, 0, 1, 20, 200000),
            ],
        },
    ),
    (
        "parquet/dk_decimals.parquet",
        {"l1": "decimal(3,2)", "l2": "decimal(30,2)", "l3": "float64", "l4": "decimal(30,2)"},
        {},
        {
            "l1": [Decimal("0.10"), Decimal("-0.10")],
            "l2": [Decimal("0.10"), Decimal("-0.10")],
            "l3": [0.1, -0.1],
            "l4": [Decimal("0.10"), Decimal("-0.10")],
        },
    ),
    ("parquet/dk_empty.parquet", {"col1": "string"}, {}, {"col1": []}),
    (
        "parquet/dk_null_type_column.parquet",
        {"id": "int32", "val": "string"},
        {},
        {"id": [1, 2, 3], "val": [None, None, None]},
    ),
    (
        "parquet/dk_pandas-date.parquet",
        {"foo": "date"},
        {},
        {"foo": [datetime.date(2021, 1, 12), datetime.date(1921, 12, 24)]},
    ),
    (
        "parquet/dk_silly-names.parquet",
        {"önë": "int64", "": "string", "🦆": "bool"},
        {},
        {"önë": [1, 2, 3], "": ["foo", "bar", "baz"], "🦆": [True, False, True]},
    ),
    (
        "parquet/dk_unsigned.parquet",
        {"a": "uint8", "b": "uint16", "c": "int64", "d": "uint64"},
        {},
        {"a": [1, 2, 3, 4, 5, 255], "c": [1, 2, 3, 4, 5, 4294967295], "d": [1, 2, 3, 4, 5, 18446744073709551615]},
    ),
    (
        "parquet/pt_alltypes_dictionary.parquet",
        {
            "id": "int32",
            "bigint_col": "int64",
            "double_col": "float64",
            "string_col": "string",
            "timestamp_col": "timestamp",
        },
        {"unexpected": "ignore"},
        {
            "bigint_col": [0, 10],
            "double_col": [0.0, 10.1],
            "string_col": ["0", "1"],
            "timestamp_col": [at(2009, 1, 1), at(2009, 1, 1, 0, 1)],
        },
    ),
    (
        "parquet/pt_byte_array_decimal.parquet",
        {"value": "decimal(4,2)"},
        {},
        {"value": [Decimal(f"{i}.00") for i in range(1, 25)]},
    ),
    (
        "parquet/pt_int64_decimal.parquet",
        {"value": "decimal(10,2)"},
        {},
        {"value": [Decimal(f"{i}.00") for i in range(1, 25)]},
    ),
    (
        "parquet/pt_column_chunk_key_value_metadata.parquet",
        {"column1": "int32", "column2": "int32"},
        {},
        {"column1": []},
    ),
    (
        "parquet/pt_nested_maps.snappy.parquet",
        {"a": "map<string,map<int32,bool>>", "b": "int32"},
        {"unexpected": "ignore"},
        {
            "a": [
                [("a", [(1, True), (2, False)])],
                [("b", [(1, True)])],
                [("c", None)],
                [("d", [])],
                [("e", [(1, True)])],
                [("f", [(3, True), (4, False), (5, True)])],
            ]
        },
    ),
    (
        "parquet/pt_nested_structs.rust.parquet",
        {"least": {"type": "int64", "path": "roll_num.min"}, "many": {"type": "uint64", "path": "PC_CUR.count"}},
        {"unexpected": "ignore"},
        {"least": [190406409000602], "many": [495]},
    ),
    ("parquet/pt_old_list_structure.parquet", {"a": "list<list<int32>>"}, {}, {"a": [[[1, 2], [3, 4]]]}),
    ("parquet/pt_single_nan.parquet", {"mycol": "float64"}, {}, {"mycol": [None]}),
    (
        "parquet/pt_unknown-logical-type.parquet",
        {"column with known type": "string", "column with unknown type": "binary"},
        {},
        {"column with unknown type": [b"unknown string 1", b"unknown string 2", b"unknown string 3"]},
    ),
    (
        "arrow/dictionary_null_value.arrow",
        {"dict0": "string", "dict1": "string", "dict2": "int64"},
        {},
        {
            "dict1": [
                None,
                None,
                "be£jdbi",
                "be£jdbi",
                None,
                None,
                "f6µfmµi",
                None,
                "be£jdbi",
                None,
                None,
                "iµfcfoe",
                "f6µfmµi",
                "iµfcfoe",
                None,
                None,
                None,
            ]
        },
    ),
]


@pytest.mark.parametrize(("name", "columns", "options", "right"), READ, ids=[case[0] for case in READ])
def test_a_file_is_read_rightly(awkward: Path, name: str, columns: dict, options: dict, right: dict) -> None:
    table, found = read(awkward / name, columns, **options)
    assert found.tally.quarantined == 0
    for column, values in right.items():
        assert (table.column(column).to_pylist() if table.num_rows else []) == values


# (file, columns, options, rows in, [(row, column, value)] quarantined, part of the reason)
QUARANTINED: list[tuple[str, dict[str, Any], dict[str, Any], int, list[tuple[int, str | None, str | None]], str]] = [
    ("csv/big_number.csv", {"bignumber": "int64"}, {}, 1, [(1, "bignumber", "82544000000000707.52")], "is no int64"),
    (
        "csv/borked_date.csv",
        {"a": DATE},
        {},
        2069,
        [(2068, "a", "10-10.2020"), (2069, "a", "10/10.2020")],
        "is no date",
    ),
    (
        "csv/csv_quoted_newline_odd.csv",
        {"content": "string"},
        {},
        2,
        [(2, None, "84,hello world")],
        "has 2 fields, must have 1",
    ),
    (
        "csv/error_timestamp.csv",
        {"t": {"type": "timestamp", "path": "'2020-01-01 00:01:01'"}, "w": {"type": "string", "path": "'worlds'"}},
        {},
        3101,
        [(3001, "t", "bla")],
        "is no timestamp",
    ),
    ("csv/integer_exponent.csv", {"a": "int64", "b": "int64", "c": "int64"}, {}, 3, [(3, "c", "1E-7")], "is no int64"),
    ("csv/mixed_dates.csv", {"A": "int64", "B": "date"}, {}, 5, [(3, "B", "03/10/2024")], "is no date"),
    (
        "csv/mixed_decimal.csv",
        {"A": "int64", "B": "float64"},
        {"csv": {"delimiter": ";", "decimal": ","}},
        5,
        [(4, "B", "5.555")],
        "is no float64",
    ),
    (
        "csv/mixed_new_line_2.csv",
        {"a": "int64", "b": "int64"},
        {"csv": {"header": False}},
        4,
        [(3, None, "6")],
        "has 1 fields",
    ),
    (
        "csv/multiple_files_more_columns_file_6.csv",
        {c: "int64" for c in "abcd"},
        {},
        6,
        [(6, "d", "4.9")],
        "is no int64",
    ),
    (
        "csv/thousands_separator_simple.csv",
        {"a": "float64"},
        {"csv": {"header": False, "delimiter": ";"}},
        5,
        [(1, "a", "100,000.00"), (2, "a", "300,000.20"), (3, "a", "300,000,000.40")],
        "is no float64",
    ),
    (
        "csv/timestamp_with_tz.csv",
        {"id": "int64", "timestamps": "timestamp"},
        {},
        2,
        [(2, "timestamps", "2021-05-25 04:55:03.382494 EST")],
        "is no timestamp",
    ),
    (
        "csv/rejects_frankstein_nightmare.csv",
        {"a": "int64", "b": "int64", "c": "string"},
        {},
        47,
        [
            (9, None, "1,2"),
            (13, None, '1,2,"pedro",5'),
            (18, "b", "bla"),
            (21, None, '1,2,"pedro"bla'),
            (37, "c", "pedro\\xff\\xff"),
        ],
        "",
    ),
    (
        "parquet/dk_invalid_utf8_dictionary.parquet",
        {"X1": "string"},
        {},
        2,
        [(1, "X1", "TREL\\xc3")],
        "is not valid UTF-8",
    ),
    (
        "parquet/dk_negative-timetz.parquet",
        {"col33": "time"},
        {"unexpected": "ignore"},
        3,
        [(1, "col33", "-13899000 ms"), (2, "col33", "-53940000 ms"), (3, "col33", "-39356000 ms")],
        "time",
    ),
    (
        "parquet/pt_int96_from_spark.parquet",
        {"a": "timestamp"},
        {},
        6,
        [(6, "a", "361746257437964 s since 1970")],
        "lies beyond the years",
    ),
]


@pytest.mark.parametrize(
    ("name", "columns", "options", "rows", "bad", "reason"), QUARANTINED, ids=[case[0] for case in QUARANTINED]
)
def test_a_bad_row_is_quarantined_with_its_place(
    awkward: Path, name: str, columns: dict, options: dict, rows: int, bad: list, reason: str
) -> None:
    table, found = read(awkward / name, columns, **options)
    tally = found.tally
    assert (tally.rows, tally.kept, tally.quarantined) == (rows, rows - len(bad), len(bad))
    assert table.num_rows == rows - len(bad)
    assert sorted((r["row"], r["column"], r["value"]) for r in tally.records) == sorted(bad)
    assert all(reason in record["reason"] and record["file"].endswith(name) for record in tally.records)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("csv/auto_duplicate_header_collision.csv", {"a": "int64"}, {}, "'a' occurs more than once"),
    ("csv/auto_duplicate_header_columns.csv", {"a": "string"}, {}, "'a' occurs more than once"),
    ("csv/empty.csv", {"a": "string"}, {}, "is empty"),
    ("csv/encodings_utf16.csv", {"name": "string"}, {}, "is UTF-16 text: set data.sources.s.csv.encoding=utf-16"),
    ("csv/encodings_shift_jis.csv", {"名前": "string"}, {}, "the header must be UTF-8, found byte 0x96 at 0"),
    ("csv/invalid_utf8.csv", {"a": "string"}, {"csv": {"header": False}}, "is UTF-16 text"),
    ("csv/nullbyte_header.csv", {"col1": "string", "col2": "string"}, {"csv": {"delimiter": "|"}}, "'col2' is missing"),
    ("parquet/dk_bigdecimal.parquet", {"a": "decimal(38,2)"}, {}, "Decimal precision out of range"),
    ("parquet/dk_userdata1.parquet", {"id": "string"}, {"unexpected": "ignore"}, "must be string, found int32"),
    (
        "parquet/pt_bad_ARROW-RS-GH-6229-DICTHEADER.parquet",
        {"nation_key": "int32"},
        {"unexpected": "ignore"},
        "cannot be read as Parquet",
    ),
    ("arrow/duplicate_fieldnames.arrow", {"ints": "int32"}, {}, "'ints' occurs more than once"),
]


@pytest.mark.parametrize(("name", "columns", "options", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_file_is_refused_with_the_reason(awkward: Path, name: str, columns: dict, options: dict, reason: str) -> None:
    with pytest.raises(UserError) as error:
        read(awkward / name, columns, **options)
    assert reason in str(error.value) and name in str(error.value)


def test_the_large_awkward_files(awkward: Path) -> None:
    table, found = read(
        awkward / "csv/error_quotednewlines.csv", {"i": "int64", "w": {"type": "string", "aliases": ["'world'"]}}
    )
    assert table.num_rows == 10100 and found.tally.quarantined == 0
    assert pc.sum(table.column("i")).as_py() == sum(
        int(line.split(",")[0]) for line in _quoted_rows(awkward / "csv/error_quotednewlines.csv")
    )
    assert table.column("w")[10000].as_py() == "h\n1,e\n2,l\n3,l\n4,o"
    table, _ = read(
        awkward / "csv/encodings_all_latin1.csv", {"a": "string"}, csv={"header": False, "encoding": "latin-1"}
    )
    assert table.num_rows == 190 and table.column("a").to_pylist()[-1] == "ÿ" and '"' in table.column("a").to_pylist()
    table, _ = read(
        awkward / "csv/encodings_shift_jis.csv", {"名前": "string", "年齢": "int64"}, csv={"encoding": "shift_jis"}
    )
    assert table.num_rows == 20 and table.slice(1, 1).to_pylist() == [{"名前": "山田", "年齢": 30}]
    table, _ = read(awkward / "csv/encodings_utf16.csv", {"name": "string", "age": "int64"}, csv={"encoding": "utf-16"})
    assert table.num_rows == 20 and table.slice(0, 1).to_pylist() == [{"name": "José Álvarez", "age": 30}]
    table, found = read(
        awkward / "csv/real_ncvoter.csv",
        {f"c{i}": "string" for i in range(94)},
        csv={"delimiter": "\t", "header": False},
    )
    assert found.tally.quarantined == 0 and table.num_rows == 10 and table.column("c2")[0].as_py() == "000009113186"
    columns = {f"c{i}": "string" for i in range(14)} | {"c2": "date", "c4": "int64"}
    table, found = read(awkward / "csv/real_web_page.csv", columns, csv={"delimiter": "|", "header": False})
    assert found.tally.quarantined == 0 and table.num_rows == 60 and table.column("c4")[0].as_py() == 2450810
    table, _ = read(awkward / "parquet/dk_manyrowgroups.parquet", {"42": "int32"})
    assert (
        table.num_rows == 1001
        and table.column(0).to_pylist()
        == pq.read_table(awkward / "parquet/dk_manyrowgroups.parquet").column(0).to_pylist()
    )
    table, _ = read(
        awkward / "parquet/dk_userdata1.parquet",
        {"cc": "string", "salary": "float64", "registration_dttm": "timestamp"},
        unexpected="ignore",
    )
    assert (
        table.num_rows == 1000
        and table.column("cc")[0].as_py() == "6759521864920116"
        and table.column("registration_dttm")[0].as_py() == at(2016, 2, 3, 7, 55, 29)
    )


def _quoted_rows(path: Path) -> list[str]:
    """Rows by a slow and obvious cutter."""
    rows, row, inside = [], "", False
    for letter in path.read_text().split("\n", 1)[1]:
        inside ^= letter == '"'
        if letter == "\n" and not inside:
            rows.append(row)
            row = ""
        else:
            row += letter
    return [row_ for row_ in [*rows, row] if row_]


def test_int96_keeps_the_year_9999(awkward: Path) -> None:
    table, _ = read(awkward / "parquet/pt_int96_from_spark.parquet", {"a": "timestamp"})
    micros = table.column("a").cast(pa.int64()).to_pylist()
    assert micros == [1704141296123456, 1704070800000000, 253402225200000000, 1735599600000000, None]


def test_floats_of_every_width_keep_nan_apart_from_null(awkward: Path) -> None:
    table, _ = read(awkward / "parquet/pt_float16_nonzeros_and_nans.parquet", {"x": "float16"})
    assert [None if v is None else str(v) for v in table.column("x").to_pylist()] == [
        None,
        "1.0",
        "-2.0",
        "nan",
        "0.0",
        "-1.0",
        "-0.0",
        "2.0",
    ]
    table, _ = read(
        awkward / "parquet/pt_floating_orders_nan_count.parquet",
        {"float_ieee754": "float32", "double_typedef": "float64"},
        unexpected="ignore",
    )
    right = pq.read_table(awkward / "parquet/pt_floating_orders_nan_count.parquet")
    for name in table.column_names:
        np.testing.assert_array_equal(table.column(name).to_numpy(), right.column(name).to_numpy())


def test_columns_in_another_order_are_matched_by_name(awkward: Path) -> None:
    staged = stage_all(awkward / "csv/multiple_files_different_order_file_*.csv", {c: "int64" for c in "abc"})
    rows = [row for item in staged for table in item.read() for row in table.to_pylist()]
    assert sorted(rows, key=str) == sorted([{"a": 1, "b": 2, "c": 3}] * 2 + [{"a": 3, "b": 2, "c": 1}] * 2, key=str)
    assert [item.notes.get("reordered") for item in staged].count(True) == 1


def test_every_awkward_file_is_in_these_tests_and_none_needs_much_memory(awkward: Path) -> None:
    text = Path(__file__).read_text()
    for path in sorted(awkward.rglob("*.*")):
        assert path.name in text or path.name.startswith("multiple_files_different_order"), path.name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000  # kB


# ------------------------------------------------------------------- the kinds behind the files, made here


def test_a_flipped_bit_in_a_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"x": pa.array(range(5000))}), path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as Parquet in column 'x', .*: .*(CRC|checksum)"):
        read(path, {"x": "int64"})


def test_int96_is_read_in_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    stamps = pa.array([0, 1_700_000_000_123_456, None, 9_000_000_000_000_000], pa.timestamp("us"))
    pq.write_table(pa.table({"t": stamps}), path, use_deprecated_int96_timestamps=True)
    table, _ = read(path, {"t": "timestamp"})
    assert table.column("t").cast(pa.int64()).to_pylist() == [0, 1_700_000_000_123_456, None, 9_000_000_000_000_000]


def test_a_dictionary_that_holds_null_gives_null(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), pa.array(["a", None, "b"]))
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), pa.schema([("c", column.type)])) as writer:
        writer.write_table(pa.table({"c": column}))
    table, _ = read(tmp_path / "x.arrow", {"c": "string"})
    assert table.column("c").to_pylist() == ["a", None, None, "b"]


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,x\n2,\xff\xfe\n3,y\n")
    table, found = read(tmp_path / "x.csv", {"a": "int64", "b": "string"})
    assert table.column("b").to_pylist() == ["x", "y"]
    assert [(r["row"], r["column"], r["value"]) for r in found.tally.records] == [(2, "b", "\\xff\\xfe")]


def test_a_decimal_of_too_many_digits_is_no_decimal(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n999.99\n99999\n1.234\n-1.5\n")
    table, found = read(tmp_path / "x.csv", {"a": "decimal(5,2)"})
    assert table.column("a").to_pylist() == [Decimal("999.99"), Decimal("-1.50")]
    assert [r["value"] for r in found.tally.records] == ["99999", "1.234"]


def test_a_float_that_overflows_is_no_infinity(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1e999,1\n-inf,2\n1e308,3e39\n")
    table, found = read(tmp_path / "x.csv", {"a": "float64", "b": {"type": "float32", "on_violation": "null"}})
    assert table.to_pylist() == [{"a": float("-inf"), "b": 2.0}, {"a": 1e308, "b": None}]
    assert [(r["row"], r["value"]) for r in found.tally.records] == [(1, "1e999"), (3, "3e39")]
