"""Memory is bounded by the bytes of rows, not by their number, whatever few bytes of a file they come from."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.data import CsvOptions
from engine.data import bounds, order, write
from engine.data.bounds import Bounds
from engine.data.readers import split_text
from engine.data.readers.trim import without_footer
from engine.errors import UserError
from tests.data.helpers import build, config, read

ROOT = Path(__file__).resolve().parents[2]
UTC = pa.timestamp("us", tz="UTC")
MEGABYTE = "x" * 1_000_000
CHILD = """
import json, resource, sys
import duckdb, numba, pyarrow.json, pyarrow.csv, pyarrow.dataset
from tests.data.helpers import build, config
from pathlib import Path
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for name, data in json.loads(sys.argv[2]).items():
    dataset, _ = build(config(Path(sys.argv[1]) / name, data, memory="200MB"))
    print(json.dumps({"name": name, "rows": dataset.rows, "more": peak() - before}))
"""


def columns(rows: int, values: pa.Array) -> pa.Table:
    return pa.table({"id": pa.array(range(rows)), "w": pa.array(range(rows)).cast(UTC), "v": values})


def named(rows: int) -> pa.DictionaryArray:
    """A megabyte, named so many times."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([MEGABYTE]))


def data(path: Path, kind: str = "string", **more: Any) -> dict[str, Any]:
    columns = {"id": "int64", "w": "timestamp", "v": kind}
    declared: dict[str, Any] = {name: {"type": type_} for name, type_ in columns.items()}
    declared["id"]["role"], declared["w"]["role"] = "id", "event_time"
    return {"sources": {"t": {"path": str(path), "columns": columns}}, "columns": declared, **more}


def as_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")


def as_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def as_json(path: Path, table: pa.Table) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        for at in range(table.num_rows):
            file.write(json.dumps({"id": at, "w": f"1970-01-01T00:00:00.{at:06d}Z", "v": MEGABYTE}) + "\n")


@pytest.mark.slow
def test_four_hundred_megabytes_of_text_are_ingested_within_a_few_hundred_of_memory(tmp_path: Path) -> None:
    """One after the other in one process: the peak of each is that of those before it, too."""
    for name, make in {"a.parquet": as_parquet, "a.arrow": as_arrow, "a.jsonl.gz": as_json}.items():
        make(tmp_path / name, columns(400, named(400)))
    given = {name: data(tmp_path / name) for name in ("a.parquet", "a.arrow", "a.jsonl.gz")}
    words = [sys.executable, "-c", CHILD, str(tmp_path / "made"), json.dumps(given)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["rows"] for each in found] == [400] * 3
    assert all(each["more"] < 350 for each in found), found


def test_long_rows_make_the_same_dataset_whatever_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{at % 7}" * (200_000 if at % 5 == 0 else 20_000) for at in range(600)]
    as_parquet(tmp_path / "a.parquet", columns(600, pa.array(texts)))
    large, _ = build(config(tmp_path / "large", data(tmp_path / "a.parquet")))
    small, _ = build(config(tmp_path / "small", data(tmp_path / "a.parquet"), memory="8MB"))
    query, _ = build(
        config(tmp_path / "sql", data(tmp_path / "a.parquet", query="SELECT id, w, v FROM t"), memory="60MB")
    )
    assert large.digest == small.digest == query.digest
    groups = [pq.ParquetFile(item.directory / "part-00000.parquet").num_row_groups for item in (large, small)]
    assert min(groups) > 1
    for rows in ((0, 600), (37, 38), (299, 450)):
        assert small.read(["v"], rows)["v"].to_pylist() == texts[slice(*rows)]
    monkeypatch.setattr(write, "GROUP_BYTES", 1 << 60)
    usual, _ = build(config(tmp_path / "usual", data(tmp_path / "a.parquet")))
    assert usual.digest == large.digest


LONG = "y" * 20_000_000


def long_parquet(path: Path) -> None:
    as_parquet(path, columns(3, pa.array(["a", LONG, "b"])))


def long_arrow(path: Path) -> None:
    as_arrow(path, columns(3, pa.array(["a", LONG, "b"])))


def long_list(path: Path) -> None:
    as_parquet(path, columns(3, pa.array([["a"], [LONG, "b"], []], pa.list_(pa.string()))))


def long_json(path: Path) -> None:
    line = '{{"id": {}, "w": "2024-01-01T00:00:0{}Z", "v": "{}"}}\n'
    path.write_text("".join(line.format(at, at, text) for at, text in enumerate(["a", LONG, "b"])))


def long_csv(path: Path, quote: str = "") -> None:
    lines = [f"{at},2024-01-01T00:00:0{at}Z,{quote}{text}{quote}\n" for at, text in enumerate(["a", LONG, "b"])]
    path.write_text("id,w,v\n" + "".join(lines))


@pytest.mark.parametrize(
    ("name", "make", "kind", "said"),
    [
        ("a.parquet", long_parquet, "string", "row 2, column 'v', takes 20,000,0"),
        ("a.arrow", long_arrow, "string", "row 2, column 'v', takes 20,000,0"),
        ("l.parquet", long_list, "list<string>", "row 2, column 'v', takes 20,000,0"),
        ("a.jsonl", long_json, "string", "a row must not be longer than 16,777,216 bytes"),
        ("a.csv", long_csv, "string", "a row must not be longer than 16,777,216 bytes"),
        ("q.csv", lambda path: long_csv(path, '"'), "string", "a row must not be longer than 16,777,216 bytes"),
    ],
)
def test_a_row_beyond_the_limit_is_named_with_its_column_and_the_key_that_allows_it(
    name: str, make: Any, kind: str, said: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        build(config(tmp_path, data(tmp_path / name, kind), memory="50MB"))
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "resources.memory" in str(caught.value)
    assert build(config(tmp_path, data(tmp_path / name, kind), memory="300MB"))[0].rows == 3


class Endless(io.RawIOBase):
    """Text without a line end; says how much of it was taken."""

    def __init__(self, unit: bytes) -> None:
        self.block, self.taken = unit * (1 << 20), 0

    def read(self, size: int = -1) -> bytes:
        self.taken += size
        assert self.taken < 1 << 26, "it is read on and on"
        return self.block[:size]


@pytest.mark.parametrize("unit", [b"1,2,", b'"a","b",', b'{"a": 1} '])
@pytest.mark.parametrize(
    "options", [CsvOptions(), CsvOptions(escape="\\"), CsvOptions(comment="#"), CsvOptions(footer=1), None]
)
def test_text_without_a_line_end_is_refused_soon_after_the_limit_of_a_row(
    unit: bytes, options: CsvOptions | None
) -> None:
    bounds, endless = Bounds(batch=1 << 20, row=1 << 21), Endless(unit)
    stream = without_footer(endless, options.footer, bounds) if options else endless  # type: ignore[arg-type]
    found = split_text.pieces(stream, b"", options, bounds)
    with pytest.raises(UserError, match=r"a row must not be longer than 2,097,152 bytes .* found no line end in them"):
        list(split_text.separate_broken_rows(found, options, bounds) if options and options.escape else found)
    assert endless.taken < 4 * bounds.row + 2 * split_text.PIECE * bool(options and options.footer)


def test_a_quoted_text_without_an_end_is_refused_likewise_whatever_line_ends_it_has() -> None:
    bounds, endless = Bounds(batch=1 << 20, row=1 << 21), Endless(b"a\n")
    with pytest.raises(UserError, match=r"a row must not be longer than 2,097,152 bytes"):
        list(split_text.pieces(endless, b'"', CsvOptions(), bounds))  # type: ignore[arg-type]
    assert endless.taken < 4 * bounds.row


@pytest.mark.parametrize("csv", [{}, {"skip": 1}, {"comment": "1"}])
def test_a_file_without_a_line_end_is_refused_by_its_name_before_its_columns_are_known(
    csv: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(b"1,2," * (9 << 20))
    with pytest.raises(
        UserError, match=r"a\.csv: the header, a comment or .* longer than 16,777,216 bytes, found no line"
    ):
        read(tmp_path / "a.csv", {"a": "int64"}, csv=csv)


def test_a_file_that_is_one_json_list_is_refused_with_what_to_do_and_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" + b'{"id": 1}, ' * 300_000 + b"{}]")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.jsonl must hold one JSON object a line, .* It begins with \[: write"):
        read(tmp_path / "a.jsonl", {"id": "int64"})
    assert (
        tracemalloc.get_traced_memory()[1] < 10 * 3_300_000
    )  # some copies of the text; its items take thirty times as much
    tracemalloc.stop()


@pytest.mark.parametrize("first", [b'{"id": 1, ', b'{"id": 1, "id2": "\\ud83d", '])  # for either reader
def test_a_line_of_very_many_values_is_set_aside_alone(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(first + b'"x": [' + b"{}, " * 5_000_000 + b'{}]}\n{"id": 2}\n')
    table, staged = read(tmp_path / "a.jsonl", {"id": "int64"})
    assert table["id"].to_pylist() == [2]
    (record,) = staged.tally.table().to_pylist()
    assert record["row"] == 1 and "it must hold at most 4,194,304 values" in record["reason"]


def test_a_compressed_file_that_must_be_unpacked_whole_is_refused_beyond_memory(tmp_path: Path) -> None:
    pq.write_table(
        columns(40, pa.array([MEGABYTE[:-2] + f"{at:02d}" for at in range(40)])),
        tmp_path / "a.parquet",
        compression="none",
    )
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet\.gz must be unpacked in memory, but holds more than 25,000,000"):
        build(config(tmp_path, data(tmp_path / "a.parquet.gz"), memory="50MB"))
    assert build(config(tmp_path, data(tmp_path / "a.parquet"), memory="50MB"))[0].rows == 40


def test_json_lines_with_a_key_of_their_own_each_are_read_line_by_line(tmp_path: Path) -> None:
    lines = [json.dumps({"id": at, f"own{at}": at}) for at in range(5_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    table, staged = read(tmp_path / "a.jsonl", {"id": "int64"})
    assert table["id"].to_pylist() == list(range(5_000)) and len(staged.notes["unexpected"]) == 5_000
    assert pool.max_memory() - before < 100_000_000


cells = st.lists(st.none() | st.text("ab", max_size=40), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(cells, st.integers(20, 400), st.sampled_from(["plain", "dictionary", "list", "map", "struct"]))
def test_cut_batches_hold_the_same_rows_within_the_limit_or_one(
    values: list[str | None], limit: int, form: str
) -> None:
    array: Any = pa.array(values, pa.string())
    if form != "plain":
        array = array.dictionary_encode()
    offsets = pa.array(range(len(array) + 1), pa.int32())
    if form == "list":
        array = pa.ListArray.from_arrays(offsets, array)
    if form == "map":
        array = pa.MapArray.from_arrays(offsets, pa.array(["k"] * len(array)), array)
    if form == "struct":
        array = pa.StructArray.from_arrays([array], ["s"])
    batch = pa.record_batch({"v": array})
    found = list(bounds.cut(iter([batch, batch]), Bounds(limit, 10**6)))
    assert [value for part in found for value in part["v"].to_pylist()] == 2 * batch["v"].to_pylist()
    for part in found:
        assert part.num_rows == 1 or sum(map(bounds.decoded_bytes, part.columns)) <= limit
    text = sum(len(value or "") for value in values)
    assert text <= bounds.decoded_bytes(array) <= text + 100 * len(values)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_row_groups_of_any_form_are_read_whole_in_order(compression: str, tmp_path: Path) -> None:
    values = [f"{at}" * (1 + 5_000 * (at % 100 == 0)) for at in range(2_000)]
    nested = [[text] * (at % 3) for at, text in enumerate(values)]
    table = pa.table(
        {"v": values, "l": pa.array(nested), "f": pa.array(range(2_000)), "s": [{"x": text} for text in values]}
    )
    for group in (2_000, 37):
        pq.write_table(table, tmp_path / "a.parquet", compression=compression, row_group_size=group)
        wanted = {"v": "string", "l": "list<string>", "f": "int64", "s.x": "string"}
        for memory in (1, 4_000_000_000):
            given_ = config(
                tmp_path,
                {
                    "sources": {"s": {"path": str(tmp_path / "a.parquet"), "columns": wanted, "unexpected": "ignore"}},
                    "query": "SELECT 1",
                },
            )
            from engine.data import stage
            from engine.data.files import source_files

            (file,) = source_files("s", given_.data.sources["s"], given_.data, tmp_path)
            staged = stage.stage(file, given_.data, 1, None, lambda _: None, bounds=Bounds.of(memory))
            found = pa.concat_tables(list(staged.read()))
            assert found["v"].to_pylist() == values == found["s.x"].to_pylist()
            assert found["l"].to_pylist() == nested and found["f"].to_pylist() == list(range(2_000))


def test_buckets_of_a_spool_are_cut_by_the_bytes_of_their_rows(tmp_path: Path) -> None:
    schema = pa.schema([("t", UTC), ("v", pa.string())])
    spool = order.Spool(schema, "t", ["t"], tmp_path, 1 << 20)
    for at in range(64):
        spool.add(pa.table({"t": pa.array([at]).cast(UTC), "v": ["z" * 200_000]}, schema))
    sizes = [segment.bytes for segment, _ in spool.segments(10**6, write.np.zeros(0, int))]
    assert sum(sizes) > 64 * 200_000 and max(sizes) < 3 << 20
    spool.close()
