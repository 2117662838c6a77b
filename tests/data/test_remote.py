"""Object stores and lake tables. The store is moto's server on loopback; the libraries are extras, tests skip without."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from engine.config.sections.data import DataConfig, SourceColumn, SourceConfig
from engine.data import files
from engine.errors import UserError
from tests.data.helpers import build, config
from tests.data.test_ingest import SOURCE, data, events

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-1234")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem = pafs.S3FileSystem(
        endpoint_override=endpoint.removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    filesystem.create_dir("events")
    return filesystem


@pytest.mark.parametrize(
    "pattern", ["*.csv", "*/*.csv", "**/*.csv", "a/**/*.csv", "**", "a/*/2.csv", "**/[12].csv", "?.csv"]
)
def test_a_pattern_finds_the_objects_that_it_finds_among_files(tmp_path: Path, pattern: str) -> None:
    places = (
        "0.csv",
        "a/1.csv",
        "a/b/2.csv",
        "a/b/c/3.csv",
        "z/a/b/4.csv",
        "a/b/5.txt",
        "_temporary/6.csv",
        "a/_SUCCESS",
    )
    for place in places:
        (tmp_path / "k" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "k" / place).touch()
    there = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    local = [path for path in glob.glob(f"{tmp_path}/k/{pattern}", recursive=True) if Path(path).is_file()]
    right = sorted(str(Path(path).relative_to(tmp_path)) for path in local if "/_" not in path)
    assert [item.path for item in files._objects(there, f"k/{pattern}")] == right
    found = files.source_files(
        "s",
        SourceConfig(path=f"k/{pattern}", format="csv", columns={"id": SourceColumn(type="int64")}),
        DataConfig(path=str(tmp_path)),
        tmp_path / "cache",
    )
    assert sorted(str(file.path.relative_to(tmp_path)) for file in found) == right


@pytest.mark.parametrize(
    ("path", "root", "found"),
    [
        ("a/*.csv", "s3://bucket/key", "s3://bucket/key/a/*.csv"),
        ("a.csv", "s3://bucket/", "s3://bucket/a.csv"),
        ("data/a.csv", "pkg://package", "pkg://package/data/a.csv"),
        ("a.csv", "gs://bucket", "gs://bucket/a.csv"),
        ("s3://other/a.csv", "s3://bucket", "s3://other/a.csv"),
        ("pkg://package/a.csv", "s3://bucket", "pkg://package/a.csv"),
        ("/a.csv", "s3://bucket", "/a.csv"),
        ("~/a.csv", "pkg://package", "~/a.csv"),
        ("a.csv", "/folder", "a.csv"),
        ("a.csv", "", "a.csv"),
    ],
)
def test_a_path_below_an_address_keeps_both_slashes(path: str, root: str, found: str) -> None:
    assert files.address(path, root) == found


def test_a_folder_of_a_package_can_be_the_root_of_sources() -> None:
    assert (
        files.resolve("compose.py", "pkg://engine/config") == Path(files.__file__).parents[1] / "config" / "compose.py"
    )
    with pytest.raises(UserError, match=r"must be a path, pkg:// or s3://, found 'gs://bucket/a.csv'"):
        files.resolve("a.csv", "gs://bucket")


def test_objects_are_read_like_files(tmp_path: Path, endpoint: str, bucket: Any) -> None:
    table = events(300)
    (tmp_path / "in").mkdir()
    for place in range(3):
        part = table.slice(place * 100, 100)
        pq.write_table(part, tmp_path / "in" / f"{place}.parquet")
        pq.write_table(part, f"events/day/{place}.parquet", filesystem=bucket)
        pq.write_table(part, f"events/day/_temporary/0/{place}.parquet", filesystem=bucket)
    local, _ = build(config(tmp_path / "local", data(tmp_path)))
    places = [("s3://events/day", tmp_path), ("s3://events/day/*.parquet", tmp_path)]
    places += [("day/*.parquet", "s3://events"), ("*.parquet", "s3://events/day/")]  # below an address as data.path
    for path, root in places:
        source = {"path": path, "endpoint": endpoint, "region": "us-east-1"}
        folder = tmp_path / path.replace("/", "-").replace("*", "x")
        remote, _ = build(config(folder, {**data(tmp_path, source=source), "path": str(root)}))
        assert remote.digest == local.digest
        assert "test-secret-1234" not in (remote.directory / "manifest.json").read_text()
    copy = next(folder.glob("**/.remote/*/0.parquet"))
    whole = copy.read_bytes()
    copy.write_bytes(bytes(len(whole)))  # a damaged copy is fetched again
    again, _ = build(config(folder, {**data(tmp_path, source=source), "path": str(root)}))
    assert copy.read_bytes() == whole and again.digest == local.digest
    with pytest.raises(UserError, match="s3://events/nothing must hold objects, found none"):
        build(config(tmp_path / "x", data(tmp_path, source={**source, "path": "s3://events/nothing"})))
    with pytest.raises(UserError, match=r"cannot be read|must hold objects"):
        build(config(tmp_path / "x", data(tmp_path, source={**source, "path": "s3://no-such-bucket/x"})))


def test_a_delta_table_is_read_at_a_version(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    first, second = events(100), events(50, 1, 100)
    deltalake.write_deltalake(str(tmp_path / "lake"), first)
    deltalake.write_deltalake(str(tmp_path / "lake"), second, mode="append")
    both, _ = build(config(tmp_path, data(tmp_path, "lake", source={"format": "delta"})))
    assert both.rows == 150 and both.manifest["accounting"]["files"][0]["snapshot"] == "1"
    old, _ = build(config(tmp_path / "old", data(tmp_path, "lake", source={"format": "delta", "snapshot": "0"})))
    (tmp_path / "in").mkdir()
    pq.write_table(first, tmp_path / "in" / "a.parquet")
    plain, _ = build(config(tmp_path / "plain", data(tmp_path)))
    assert old.rows == 100 and old.digest == plain.digest
    with pytest.raises(UserError, match="cannot be read as delta table"):
        build(config(tmp_path / "none", data(tmp_path, "in", source={"format": "delta"})))


def test_an_iceberg_table_is_read_at_a_snapshot(tmp_path: Path) -> None:
    pytest.importorskip("pyiceberg")
    pytest.importorskip("sqlalchemy")
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("n")
    first, second = events(100), events(50, 1, 100)
    table = catalog.create_table("n.events", first.schema)
    table.append(first)
    snapshot = table.current_snapshot().snapshot_id
    table.append(second)
    folder = Path(table.location().removeprefix("file://"))
    source = {"path": str(folder), "format": "iceberg", "columns": SOURCE}
    both, _ = build(config(tmp_path, data(tmp_path, source=source)))
    assert both.rows == 150
    old, _ = build(config(tmp_path / "old", data(tmp_path, source={**source, "snapshot": str(snapshot)})))
    (tmp_path / "in").mkdir()
    pq.write_table(first, tmp_path / "in" / "a.parquet")
    plain, _ = build(config(tmp_path / "plain", data(tmp_path)))
    assert old.digest == plain.digest and old.manifest["accounting"]["files"][0]["snapshot"] == str(snapshot)
