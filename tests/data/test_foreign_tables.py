"""A table that came from elsewhere runs nothing, calls nobody, and is read from its own folder only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data.readers import lake_tables
from engine.errors import UserError
from tests.data.helpers import build, config, read
from tests.data.test_remote import SOURCE, data, events
from tests.tiny import alter_delta_log

OUTSIDE = "must lie inside its folder"


@pytest.fixture
def iceberg(tmp_path: Path) -> Path:
    """The folder of a table whose Avro files are not compressed, so that a test can rewrite places in them."""
    pytest.importorskip("pyiceberg")
    pytest.importorskip("sqlalchemy")
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/house-a")
    catalog.create_namespace("n")
    table = catalog.create_table("n.events", events(100).schema, properties={"write.avro.compression-codec": "null"})
    table.append(events(100))
    catalog.close()
    return Path(table.location().removeprefix("file://"))


def change(folder: Path, pattern: str, old: bytes, new: bytes) -> None:
    """Write `new`, as long as `old`, in its place in the files that match; at least one must hold it."""
    assert len(old) == len(new)
    found = [path for path in (folder / "metadata").glob(pattern) if old in path.read_bytes()]
    assert found
    for path in found:
        path.write_bytes(path.read_bytes().replace(old, new))


def with_properties(folder: Path, **properties: str) -> None:
    for path in (folder / "metadata").glob("*.metadata.json"):
        content = json.loads(path.read_text())
        content["properties"] |= properties
        path.write_text(json.dumps(content))


PROPERTIES: dict[str, dict[str, str]] = {
    "a class": {"py-io-impl": "evil.Access"},
    "a class of the package": {"py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"},
    "a Java class": {"io-impl": "evil.Access"},
    "a place for new files": {"py-location-provider.impl": "evil.Access", "write.data.path": "s3://evil/data"},
    "a warehouse": {"warehouse": "s3://evil/house", "s3.endpoint": "{url}", "uri": "{url}", "type": "rest"},
    "a server": {"s3.endpoint": "{url}", "s3.signer.uri": "{url}", "token": "x", "DEFAULT_SCHEME": "s3"},
    "a catalog": {"py-catalog-impl": "evil.Access", "catalog-impl": "evil.Access", "rest.sigv4-enabled": "true"},
}


@pytest.mark.parametrize("attack", PROPERTIES)
def test_properties_of_an_iceberg_table_choose_no_class_and_no_place(
    tmp_path, monkeypatch, iceberg, caller, attack
) -> None:
    url, calls = caller
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from pyiceberg.io.pyarrow import PyArrowFileIO as Access\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with_properties(iceberg, **{name: value.format(url=url) for name, value in PROPERTIES[attack].items()})
    source = {"path": str(iceberg), "format": "iceberg", "columns": SOURCE}
    found, _ = build(config(tmp_path, data(tmp_path, source=source)))
    assert found.rows == 100
    assert not (tmp_path / "ran").exists() and not calls


@pytest.mark.parametrize("pattern", ["*.metadata.json", "snap-*.avro", "[!s]*-m0.avro"])
@pytest.mark.parametrize("place", ["another table", "a server", "above"])
def test_an_iceberg_table_is_read_from_its_own_folder_only(tmp_path, iceberg, caller, pattern, place) -> None:
    url, calls = caller
    shutil.copytree(tmp_path / "house-a", tmp_path / "house-b")
    old = f"file://{iceberg}/".encode()
    if place == "another table":
        new = old.replace(b"house-a", b"house-b")
    elif place == "a server":
        new = b"s3://evil/".ljust(len(old), b"x")
        with_properties(iceberg, **{"s3.endpoint": url})
    else:
        new = old.removesuffix(b"events/") + b"../xxx/"
    change(iceberg, pattern, old, new)
    source = {"path": str(iceberg), "format": "iceberg", "columns": SOURCE}
    with pytest.raises(UserError, match=OUTSIDE):
        build(config(tmp_path, data(tmp_path, source=source)))
    assert not calls


def test_a_location_elsewhere_is_not_followed(tmp_path, iceberg) -> None:
    for path in (iceberg / "metadata").glob("*.metadata.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "location": "s3://evil/x"}))
    found, _ = build(
        config(tmp_path, data(tmp_path, source={"path": str(iceberg), "format": "iceberg", "columns": SOURCE}))
    )
    assert found.rows == 100


def test_a_link_in_an_iceberg_table_leads_nowhere(tmp_path, iceberg) -> None:
    part = next((iceberg / "data").glob("*.parquet"))
    shutil.move(part, tmp_path / "secret.parquet")
    part.symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(UserError, match=OUTSIDE):
        build(config(tmp_path, data(tmp_path, source={"path": str(iceberg), "format": "iceberg", "columns": SOURCE})))


def delta_table(folder: Path, alter: Callable[[dict[str, Any]], Any]) -> Path:
    """A Delta table whose log's actions `alter` has changed."""
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(str(folder), events(100))
    alter_delta_log(folder, alter)
    return folder


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{folder}/secret.parquet", OUTSIDE),
        ("file://{folder}/secret.parquet", OUTSIDE),
        ("file:{folder}/secret.parquet", OUTSIDE),
        ("../secret.parquet", OUTSIDE),
        ("x/../../secret.parquet", OUTSIDE),
        ("%2E%2E/secret.parquet", OUTSIDE),
        ("..%2Fsecret.parquet", OUTSIDE),
        ("link.parquet", OUTSIDE),
        ("s3://evil/x.parquet", "an address"),
        ("http://{folder}/x.parquet", "an address"),
        ("file://host/x.parquet", "an address"),
        ("//host/x.parquet", "an address"),
    ],
)
def test_a_delta_table_is_read_from_its_own_folder_only(tmp_path, path, found) -> None:
    pq.write_table(events(100), tmp_path / "secret.parquet")

    def alter(action: dict[str, Any]) -> None:
        if "add" in action:
            action["add"]["path"] = path.format(folder=tmp_path)

    table = delta_table(tmp_path / "table", alter)
    (table / "link.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(UserError, match=found):
        build(config(tmp_path, data(tmp_path, "table", source={"format": "delta"})))


def test_options_in_a_delta_log_are_not_followed(tmp_path, caller) -> None:
    url, calls = caller
    options = {
        "AWS_ENDPOINT_URL": url,
        "endpoint": url,
        "delta.logStore.class": "evil.Store",
        "location": "s3://evil/x",
    }

    def alter(action: dict[str, Any]) -> None:
        if "metaData" in action:
            action["metaData"]["configuration"] = options

    delta_table(tmp_path / "table", alter)
    found, _ = build(config(tmp_path, data(tmp_path, "table", source={"format": "delta"})))
    assert found.rows == 100 and not calls


SIDECARS = [
    {"sidecar": {"path": name}} for name in ("../../../x", "file:///x", "%2E%2E%2F..%2F..%2Fx", "s3://evil/x/y")
]
NAMED = [
    ("p", "/x.bin"),
    ("p", "s3://evil/x.bin"),
    ("p", "../x"),
    ("u", "../../ab^-aqEH.-t@S}K{vb[*k^"),
    ("x", "/" + "a" * 21),
]
VECTORS = [{"add": {"deletionVector": {"storageType": kind, "pathOrInlineDv": name}}} for kind, name in NAMED]


@pytest.mark.parametrize("action", [*SIDECARS, *VECTORS])
def test_the_files_that_a_delta_log_names_lie_in_the_table(tmp_path, action) -> None:
    table = delta_table(tmp_path / "table", lambda _: None)
    checkpoint = f"{0:020d}.checkpoint.80a083e8-7026-4e79-81be-64bd76c43a11"
    for name in (f"{1:020d}.json", f"{checkpoint}.json", f"{checkpoint}.parquet"):
        file = table / "_delta_log" / name
        if file.suffix == ".json":
            file.write_text("no JSON\n" + json.dumps(action))
        else:
            pq.write_table(pa.Table.from_pylist([action]), file)
        with pytest.raises(UserError, match=OUTSIDE):
            lake_tables._delta(table, None)
        file.unlink()


def test_a_log_that_is_a_link_out_of_the_table_is_refused(tmp_path) -> None:
    table = delta_table(tmp_path / "table", lambda _: None)
    log = table / "_delta_log" / f"{0:020d}.json"
    shutil.move(log, tmp_path / "log.json")
    log.symlink_to(tmp_path / "log.json")
    with pytest.raises(UserError, match=OUTSIDE):
        build(config(tmp_path, data(tmp_path, "table", source={"format": "delta"})))


def test_what_the_advice_says_works(tmp_path) -> None:
    deltalake = pytest.importorskip("deltalake")
    table = delta_table(tmp_path / "table", lambda _: None)
    (tmp_path / "rows").mkdir()
    pq.write_table(deltalake.DeltaTable(str(table)).to_pyarrow_table(), tmp_path / "rows" / "a.parquet")
    kept, _ = read(tmp_path / "rows", SOURCE)
    assert kept.num_rows == 100
