"""Files of an ingest over real Ray workers: the bytes, the accounts and the errors of an ingest in one process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from engine.config.tree import Config
from engine.data import stage, stage_on_workers
from engine.data.bounds import Bounds
from engine.data.files import SourceFile, source_files
from engine.errors import UserError
from tests.conftest import FakeRay
from tests.data.helpers import build, config
from tests.data.test_ingest import BAD, data, events, write_csv

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
RAY = {"kind": "ray", "workers": 2}


def bytes_of(folder: Path) -> dict[str, str]:
    """Digest of every file of a dataset or of the staged files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def sources(folder: Path, **more: Any) -> dict[str, Any]:
    """Five files: three that are right, one with bad rows, one that is no Parquet file."""
    for place in range(3):
        write_csv(events(200, place, place * 200), folder / "in" / f"{place}.csv")
    (folder / "in" / "bad.csv").write_text(BAD)
    (folder / "in" / "torn.parquet").write_bytes(b"PAR1 torn")
    return data(folder, source={"refused": "skip", **more.pop("source", {})}, max_quarantine=1.0, **more)


def test_workers_stage_the_bytes_that_one_process_stages(tmp_path: Path) -> None:
    given = sources(tmp_path)
    alone, counts = build(config(tmp_path / "alone", given))
    apart, away = build(config(tmp_path / "ray", given, cluster=RAY))
    assert apart.digest == alone.digest and apart.recipe == alone.recipe
    assert bytes_of(apart.directory) == bytes_of(alone.directory)
    assert bytes_of(apart.directory.parent / ".staged") == bytes_of(alone.directory.parent / ".staged")
    for name in ("rows", "rows_in", "quarantined", "refused_files", "files", "files_reused"):
        assert away[f"ingest/{name}"] == counts[f"ingest/{name}"], name
    assert counts["ingest/refused_files"] == 1 and counts["ingest/quarantined"] == 4
    # Nothing is read again: the only file that left no staged form is the refused one, and one file needs no cluster.
    again, reused = build(config(tmp_path / "ray", given, cluster=RAY))
    assert again.digest == alone.digest and reused["ingest/files_reused"] == 4


def test_a_file_that_a_node_does_not_see_is_no_refused_file(tmp_path: Path) -> None:
    given = config(tmp_path, sources(tmp_path))
    file = source_files("s", given.data.sources["s"], given.data, tmp_path / "cache")[0]
    item, bounds = stage_on_workers._plain(0, file), Bounds()
    assert stage_on_workers._stage(tmp_path / "x", given.data, bounds, item) == {
        "place": 0,
        "rows": 200,
        "refused": None,
    }
    os.rename(file.path, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="must be the same file on every node"):
        stage_on_workers._stage(tmp_path / "y", given.data, bounds, item)
    file.path.write_text("other\n")
    with pytest.raises(UserError, match="changed while it was read"):
        stage_on_workers._stage(tmp_path / "y", given.data, bounds, item)


def test_what_a_worker_says_becomes_the_error_of_the_run(tmp_path: Path, fake_ray: FakeRay) -> None:
    with pytest.raises(UserError, match=r"torn\.parquet cannot be read as Parquet"):
        build(config(tmp_path, sources(tmp_path, source={"refused": "fail"}), cluster=RAY))
    fake_ray.dead = True
    with pytest.raises(UserError, match=r"torn\.parquet could not be read in 4 tries: it died"):
        build(config(tmp_path, sources(tmp_path), cluster=RAY))
    assert not list((tmp_path / "store").rglob(".tries*")) and not list((tmp_path / "store").rglob("manifest.json"))


def test_one_new_file_starts_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("no cluster is needed")

    write_csv(events(20), tmp_path / "in" / "a.csv")
    given: Config = config(tmp_path, data(tmp_path), cluster=RAY)
    monkeypatch.setattr(stage_on_workers, "stage_files", refuse)
    assert build(given)[0].rows == 20
    write_csv(events(20, 1, 20), tmp_path / "in" / "b.csv")
    assert build(given)[1]["ingest/files_reused"] == 1
    assert stage.names(  # both have a staged form that the next ingest finds
        source_files("s", given.data.sources["s"], given.data, tmp_path), given.data
    ) == {path.stem for path in (tmp_path / "store").rglob(".staged/*.arrow")}


def test_what_is_staged_already_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in enumerate("ab"):
        write_csv(events(20, place, 20 * place), tmp_path / "in" / f"{name}.csv")
    build(config(tmp_path, data(tmp_path)))
    write_csv(events(20, 2, 40), tmp_path / "in" / "c.csv")
    loaded: list[str] = []
    load = stage.load

    def spy(file: SourceFile, *rest: Any) -> stage.Staged | None:
        found = load(file, *rest)
        loaded.extend([file.path.name] if found else [])
        return found

    monkeypatch.setattr(stage, "load", spy)
    made, counts = build(config(tmp_path, data(tmp_path), cluster=RAY))
    assert (made.rows, counts["ingest/files_reused"], sorted(loaded)) == (60, 2, ["a.csv", "b.csv"])
