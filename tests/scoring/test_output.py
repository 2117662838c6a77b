"""Files of the output: how many rows each, safe folder names, replaced whole, on disk and on an object store."""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import json
import os
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.scoring import ScoreConfig
from engine.data.arrow_types import parse_type
from engine.errors import UserError
from engine.runtime import digest, storage
from engine.runtime.run import Run
from engine.scoring import output
from engine.scoring.output import Layout, Place
from engine.scoring.plan import check_columns
from engine.scoring.read import predictions
from tests.scoring.conftest import ROWS, Shop, contents, rows_of
from tests.tiny import visits

Score = Callable[..., Run]


def parts_of(folder: Path, table: pa.Table, count: int) -> list[Path]:
    """The table in `count` files of about equal size."""
    edges = np.linspace(0, table.num_rows, count + 1).astype(int)
    paths = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        paths.append(folder / "parts" / f"{index:03d}.parquet")
        storage.write_parquet(paths[-1], table.slice(low, high - low))
    return paths


def write(folder: Path, table: pa.Table, count: int, layout: Layout, kind: str = "string") -> list[dict[str, object]]:
    place = Place(str(folder / "out"))
    parts = {path: digest.of_file(path) for path in parts_of(folder, table, count)}
    partition = {"column": layout.partition, "type": kind} if layout.partition else None
    with place.lock():
        files = output.write_files(place, parts, layout, folder / "rolled")
        output.publish(place, {"format": 1, "complete": True, "partition": partition, "files": files})
    return files


def rows(count: int) -> pa.Table:
    return pa.table({"row_id": [f"r{i}" for i in range(count)], "score": pa.array(np.arange(count), pa.float32())})


def test_a_hundred_rows_of_one_block_in_files_of_ten(tmp_path: Path) -> None:
    files = write(tmp_path, rows(100), 1, Layout(file_rows=10))
    assert [entry["rows"] for entry in files] == [10] * 10
    assert output.read_predictions(Place(str(tmp_path / "out"))).combine_chunks().equals(rows(100))


def test_five_partitions_from_64_blocks_leave_one_short_file_each_and_none_empty(tmp_path: Path) -> None:
    table = rows(10_000).append_column("key", pa.array([f"k{i % 5}" for i in range(10_000)]))
    files = write(tmp_path, table, 64, Layout(file_rows=1500, partition="key"))
    counts: dict[str, list[object]] = {}
    for entry in files:
        counts.setdefault(str(entry["name"]).split("/")[0], []).append(entry["rows"])
    assert counts == {f"key=k{i}": [1500, 500] for i in range(5)}
    found = output.read_predictions(Place(str(tmp_path / "out")))
    assert (
        found.sort_by([("key", "ascending"), ("score", "ascending")])
        .combine_chunks()
        .equals(table.sort_by([("key", "ascending"), ("score", "ascending")]).combine_chunks())
    )


@pytest.mark.parametrize(
    "layout", [Layout(file_rows=700), Layout(partition="key"), Layout(file_rows=300, partition="key")]
)
def test_files_are_the_same_bytes_for_any_cutting_into_parts(tmp_path: Path, layout: Layout) -> None:
    table = rows(3000).append_column("key", pa.array([f"k{i % 3}" for i in range(3000)]))
    for count in (1, 7):
        write(tmp_path / str(count), table, count, layout)
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "7" / "out")


NASTY = [
    "../../etc",
    "/abs",
    "a/b",
    "..",
    ".",
    "",
    "ü=ö",
    "100%",
    "%2e%2e",
    "a b",
    "nul\0",
    "CON",
    "x" * 60,
    None,
    "01001",
]


def test_values_of_a_partition_cannot_leave_the_folder_and_come_back_exact(tmp_path: Path) -> None:
    table = rows(len(NASTY)).append_column("key", pa.array(NASTY))
    write(tmp_path, table, 2, Layout(partition="key"))
    out = tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "parts", "rolled"}
    for path in out.iterdir():
        assert path.name == "_manifest.json" or (path.is_dir() and path.name.startswith("key="))
    found = output.read_predictions(Place(str(out))).sort_by("score")
    assert found["key"].to_pylist() == NASTY
    hive = pads.dataset(
        out, partitioning=pads.partitioning(pa.schema([("key", pa.string())]), flavor="hive")
    ).to_table()
    assert hive.sort_by("score")["key"].to_pylist() == NASTY, "any reader of hive folders"


def hive_values(out: Path, reader: str) -> list[str | None]:
    """The partition's values in the order of `score`, as a reader of hive folders sees them."""
    files = str(out / "**" / "*.parquet")
    if reader == "pyarrow":
        hive = pads.partitioning(pa.schema([("key", pa.string())]), flavor="hive")
        found = pads.dataset(out, partitioning=hive).to_table().sort_by("score")["key"].to_pylist()
    elif reader == "duckdb":
        duckdb = pytest.importorskip("duckdb")
        hive = "hive_partitioning=true, hive_types={'key': VARCHAR}"
        found = [
            key for (key,) in duckdb.sql(f"SELECT key FROM read_parquet('{files}', {hive}) ORDER BY score").fetchall()
        ]
    else:
        pl = pytest.importorskip("polars")
        table = pl.scan_parquet(files, hive_partitioning=True, hive_schema={"key": pl.String}).sort("score").collect()
        found = table["key"].to_list()
    return list(found)


@pytest.mark.parametrize("reader", ["pyarrow", "duckdb", "polars"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_reader_of_hive_folders_sees_each_row_with_its_value(reader: str, data: st.DataObject) -> None:
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    spiced = st.text(st.sampled_from("_.%/=\\ 0aü\0'\"*?[]{}+&#~-:"), max_size=8)
    drawn = data.draw(st.lists(st.none() | texts | spiced, min_size=1, max_size=6))
    values = [*drawn, *NASTY, "".join(filter(None, drawn))]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows(len(values)).append_column("key", pa.array(values)), 2, Layout(partition="key"))
        assert hive_values(Path(folder) / "out", reader) == values


def test_the_text_that_stands_for_null_in_folders_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    table = rows(3).append_column("key", pa.array(["a", None, output.HIVE_NULL]))
    with pytest.raises(
        UserError, match=r"score\.partition=key must not hold .*__HIVE_DEFAULT.* in row r2: use another"
    ):
        write(tmp_path, table, 1, Layout(partition="key"))
    assert not list((tmp_path / "out").rglob("*.parquet")), "nothing is published"


@pytest.mark.parametrize(("kind", "values"), [
    ("bool", [True, None, False]),
    ("int64", [2**53 + 1, -1, None]),
    ("float64", [0.1, 1e300, -0.0]),
    ("decimal(10,2)", [Decimal("1.50"), None, Decimal("-0.05")]),
    ("date", [datetime.date(1, 1, 1), datetime.date(9999, 12, 31), None]),
    ("timestamp", [datetime.datetime(1900, 1, 1, 5, 0, 0, 1, datetime.UTC), None]),
])  # fmt: skip
def test_values_of_other_types_come_back_in_their_type(tmp_path: Path, kind: str, values: list[Any]) -> None:
    assert output.has_text(kind)
    table = rows(len(values)).append_column("key", pa.array(values, parse_type(kind)))
    write(tmp_path, table, 1, Layout(partition="key"), kind)
    found = output.read_predictions(Place(str(tmp_path / "out"))).sort_by("score")
    assert found.combine_chunks().equals(table)


@pytest.mark.parametrize("kind", ["time", "duration", "binary", "list<string>", "map<string,int64>"])
def test_a_partition_whose_values_no_folder_can_hold_is_refused_before_anything_is_scored(kind: str) -> None:
    data = SimpleNamespace(columns={"key": SimpleNamespace(type=kind)}, event_time="at")
    config = SimpleNamespace(score=ScoreConfig(partition="key"), data=data)
    with pytest.raises(UserError, match=rf"score\.partition must be .*found 'key' of type {kind}"):
        check_columns(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event_time", "classes"), [("row_id", ()), ("score", ()), ("model", ()), ("score_a", ("a", "b"))]
)
def test_an_event_time_called_like_a_column_of_the_output_is_refused(event_time: str, classes: tuple[str, ...]) -> None:
    data = SimpleNamespace(columns={}, event_time=event_time)
    config = SimpleNamespace(score=ScoreConfig(), data=data)
    with pytest.raises(UserError, match=rf"of the output of `score` and of data\.columns\.{event_time} .*Rename"):
        check_columns(config, classes)  # type: ignore[arg-type]
    check_columns(SimpleNamespace(score=ScoreConfig(), data=SimpleNamespace(columns={}, event_time="score_date")))  # type: ignore[arg-type]


def test_a_value_too_long_for_a_folder_is_an_error_that_names_the_column(tmp_path: Path) -> None:
    table = rows(2).append_column("key", pa.array(["short", "ü" * 43]))
    with pytest.raises(
        UserError,
        match=r"score\.partition=key must have values .* at most 255 characters, found key=%C3%BC.* in row r1",
    ):
        write(tmp_path, table, 1, Layout(partition="key"))


@pytest.mark.parametrize("name", ["__init__", "write_table", "close"])
def test_a_disk_that_is_full_at_any_call_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(self: pq.ParquetWriter, *arguments: Any, **options: Any) -> None:
        self.is_open = False
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = {path: digest.of_file(path) for path in parts_of(tmp_path, rows(10), 1)}
    monkeypatch.setattr(pq.ParquetWriter, name, full)
    with pytest.raises(UserError, match=r"the disk that holds .*rolled.* is full"):
        output.write_files(Place(str(tmp_path / "out")), parts, Layout(file_rows=10), tmp_path / "rolled")


def test_a_folder_name_is_a_path_component_for_any_value() -> None:
    for value in NASTY:
        name = output.partition_folder("a/b", value)
        assert "/" not in name and "\0" not in name and name not in (".", "..") and name.startswith("a%2Fb=")
        if value is not None:
            assert urllib.parse.unquote(name.partition("=")[2]) == value


def test_too_many_partitions_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MOST_PARTITIONS", 4)
    with pytest.raises(UserError, match=r"score\.partition=key must have at most 4 values"):
        write(tmp_path, rows(5).append_column("key", pa.array(list("abcde"))), 1, Layout(partition="key"))


def test_a_rerun_replaces_the_output_whole_and_leaves_the_users_own_files(tmp_path: Path) -> None:
    write(tmp_path, rows(100), 5, Layout())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    stray = tmp_path / "out" / "part-00099-deadbeef.parquet"
    pq.write_table(rows(3), stray)
    write(tmp_path, rows(50), 2, Layout())
    assert output.read_predictions(Place(str(tmp_path / "out"))).num_rows == 50
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2 and not stray.exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_rerun_leaves_outputs_that_lie_in_folders_below_and_files_of_other_tools(tmp_path: Path) -> None:
    below = [tmp_path / "out" / name for name in ("2013-06-01", "day=2013-06-01")]
    for folder in below:
        write(folder, rows(20), 2, Layout())
    spark = tmp_path / "out" / "part-00000-6ca1b1b1-c000.snappy.parquet"
    pq.write_table(rows(3), spark)
    (left := tmp_path / "out" / "key=a" / "part-00000-deadbeef.parquet").parent.mkdir()
    pq.write_table(rows(3), left)
    write(tmp_path, rows(50), 2, Layout())
    assert spark.exists() and not left.exists()
    for folder in below:
        assert output.read_predictions(Place(str(folder / "out"))).num_rows == 20


def plain_rows(folder: Path) -> int:
    """Rows that a reader finds who knows nothing but `*.parquet`."""
    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


@pytest.mark.parametrize("name", ["stage", "_rename", "put_text"])
def test_until_the_manifest_is_written_readers_see_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, rows(100), 5, Layout())
    (tmp_path / "out" / "notes.txt").write_text("mine")  # so that the folder cannot be replaced as a whole
    with monkeypatch.context() as patch:
        patch.setattr(Place, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, rows(50), 2, Layout())
    assert output.read_predictions(Place(str(tmp_path / "out"))).combine_chunks().equals(rows(100))
    assert name == "put_text" or plain_rows(tmp_path / "out") == 100
    write(tmp_path, rows(50), 2, Layout())
    assert plain_rows(tmp_path / "out") == 50
    assert len(contents(tmp_path / "out")) == 4, "two files, the manifest and notes"


@pytest.mark.parametrize("layout", [Layout(), Layout(partition="key"), Layout(file_rows=7, partition="key")])
def test_whoever_dies_at_any_rename_leaves_the_earlier_output_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    old, new = (rows(count).append_column("key", pa.array([f"k{i % 3}" for i in range(count)])) for count in (0, 50))
    rename, seen = os.replace, []
    for number in range(1, 100):
        out, calls = tmp_path / str(number), itertools.count(1)
        if number % 2:
            write(out, old if number % 4 == 1 else new.slice(0, 20), 4, layout)
        before = plain_rows(out / "out")

        def replace(source: object, target: object, number: int = number, calls: Iterator[int] = calls) -> None:
            if next(calls) == number:
                raise KeyboardInterrupt
            rename(source, target)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with contextlib.suppress(KeyboardInterrupt):
                write(out, new, 4, layout)
        seen.append(plain_rows(out / "out"))
        assert seen[-1] in (before, 50)
        write(out, new, 4, layout)
        assert plain_rows(out / "out") == 50 and not list(out.glob(".*")), "nothing is left of the attempt"
        if next(calls) <= number:
            break
    assert seen.count(50) >= 1 and len(seen) > 6


def test_a_system_that_cannot_exchange_folders_replaces_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exchange", lambda *_: False)
    for count in (100, 50):
        write(tmp_path, rows(count), 2, Layout())
        assert output.read_predictions(Place(str(tmp_path / "out"))).combine_chunks().equals(rows(count))
        assert plain_rows(tmp_path / "out") == count and len(contents(tmp_path / "out")) == 3
    assert not list(tmp_path.glob(".*"))


def test_a_link_to_a_folder_stays_a_link_when_the_output_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    place = output.place_of(str(tmp_path / "out"), tmp_path)
    for count in (100, 50):
        parts = {path: digest.of_file(path) for path in parts_of(tmp_path, rows(count), 1)}
        with place.lock():
            files = output.write_files(place, parts, Layout(), tmp_path / "rolled")
            output.publish(place, {"format": 1, "complete": True, "partition": None, "files": files})
        assert (tmp_path / "out").is_symlink() and plain_rows(tmp_path / "disk") == count


def test_an_output_that_is_not_complete_is_read_by_its_manifest_only(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"))
    parts = {path: digest.of_file(path) for path in parts_of(tmp_path, rows(10), 2)}
    with place.lock():
        files = output.write_files(place, parts, Layout(), tmp_path / "rolled")
        output.publish(place, {"format": 1, "complete": False, "partition": None, "files": files})
    assert output.read_predictions(place).combine_chunks().equals(rows(10))
    assert plain_rows(tmp_path / "out") == 0
    write(tmp_path, rows(50), 2, Layout())
    assert plain_rows(tmp_path / "out") == 50 and len(contents(tmp_path / "out")) == 3


@pytest.mark.parametrize("target", ["gs://bucket/x", "s3://bucket//x", "s3://bucket/../x", "s3://"])
def test_an_output_address_of_another_kind_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"score\.output must be"):
        output.place_of(target, tmp_path)


def test_predictions_are_read_by_the_run_its_directory_or_the_text_of_it(unbroken: Run) -> None:
    found = rows_of(unbroken)
    assert predictions(unbroken).equals(found) and predictions(str(unbroken.directory)).equals(found)
    assert Run.read(str(unbroken.directory)) == Run.read(unbroken.directory)


def test_output_by_partition_with_a_size(score: Score, unbroken: Run, tmp_path: Path) -> None:
    run = score(
        "score.columns=[size]", "score.partition=shop", f"score.output={tmp_path / 'out'}", "score.file_size=8KB"
    )
    found = predictions(run.directory).sort_by("row_id")
    expected = rows_of(unbroken).sort_by("row_id")
    assert found.num_rows == ROWS and not (run.directory / "predictions").exists()
    for name in expected.column_names:
        assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name
    sizes = [entry["bytes"] for entry in json.loads((tmp_path / "out" / "_manifest.json").read_text())["files"]]
    assert len(sizes) > 8 and max(sizes) < 16_000
    assert run.record["chain"]["scores"] == unbroken.record["chain"]["scores"]


# ------------------------------------------------------------------------------------------------- object store


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The endpoint of an S3 service in this process, with a bucket `lake`."""
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store(f"http://{host}:{port}").create_dir("lake")
    yield f"http://{host}:{port}"
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def store(endpoint: str) -> pafs.S3FileSystem:
    host = urllib.parse.urlsplit(endpoint).netloc
    return pafs.S3FileSystem(endpoint_override=host, scheme="http", region="us-east-1", allow_bucket_creation=True)


def test_predictions_go_to_an_object_store_manifest_last_and_are_replaced_whole(
    score: Score, unbroken: Run, bucket: str
) -> None:
    words = ("score.output=s3://lake/scores", f"score.endpoint={bucket}", "score.region=us-east-1")
    run = score("score.columns=[shop,size]", *words)
    assert rows_of(run).equals(rows_of(unbroken))
    names = {info.path for info in store(bucket).get_file_info(pafs.FileSelector("lake/scores"))}
    assert len(names) == 7 and "lake/scores/_manifest.json" in names
    again = score("score.columns=[shop,size]", "score.partition=shop", *words)
    assert predictions(again).num_rows == ROWS
    assert not names & {info.path for info in store(bucket).get_file_info(pafs.FileSelector("lake/scores", recursive=True))
                        if info.path.endswith(".parquet")}  # fmt: skip
    assert "test" not in (run.directory / "run.json").read_text().split('"command_line"')[0]


def test_a_kill_before_the_output_is_named_leaves_nothing_that_a_reader_of_the_bucket_finds(
    score: Score, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("score.output=s3://lake/killed", f"score.endpoint={bucket}", "score.region=us-east-1")

    def names() -> set[str]:
        infos = store(bucket).get_file_info(pafs.FileSelector("lake/killed", recursive=True))
        return {info.path for info in infos if info.type == pafs.FileType.File}

    with monkeypatch.context() as patch:
        patch.setattr(Place, "reveal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(*words)
    assert names() and not [name for name in names() if name.endswith(".parquet")]
    assert predictions(score(*words)).num_rows == ROWS
    assert not [name for name in names() if "_staged" in name], "what the kill left is gone"


def test_events_come_from_an_object_store_other_than_where_the_model_was_trained(
    shop: Shop, score: Score, unbroken: Run, bucket: str
) -> None:
    with store(bucket).open_output_stream("lake/in/visits-1.parquet") as stream:
        stream.write((shop.folder / "visits.parquet").read_bytes())
    place = (
        "data.sources.visits.path=s3://lake/in",
        f"data.sources.visits.endpoint={bucket}",
        "data.sources.visits.region=us-east-1",
    )
    assert score(*place).record["chain"]["scores"] == unbroken.record["chain"]["scores"]


def test_an_input_and_a_file_of_scores_may_lie_in_an_object_store(shop: Shop, score: Score, bucket: str) -> None:
    new = visits(ROWS).slice(0, 50).drop_columns(["paid_at", "amount", "bought"])
    with store(bucket).open_output_stream("lake/new.csv") as stream:
        pacsv.write_csv(new, stream)
    words = ("score.input=s3://lake/new.csv", "score.output=s3://lake/out.csv", f"score.endpoint={bucket}")
    score(*words, "score.region=us-east-1")
    with store(bucket).open_input_stream("lake/out.csv") as stream:
        assert pacsv.read_csv(stream)["visit"].to_pylist() == sorted(new["visit"].to_pylist())
    assert list((shop.folder / "store" / "places").glob("*.json"))


def test_an_object_store_that_does_not_answer_is_an_error_that_names_it(score: Score, bucket: str) -> None:
    words = (f"score.endpoint={bucket}", "score.region=us-east-1")
    with pytest.raises(UserError, match="s3://nowhere/x cannot be written or read"):
        score("score.output=s3://nowhere/x", *words)
