"""Kill at any moment and start again; fill the disk: the dataset is whole or absent, and the digest is the same."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.data.dataset import open_dataset
from engine.data.ingest import ingest
from engine.data.ingest_plan import make_plan
from engine.data.stage_sources import stage_files
from engine.errors import UserError
from tests.data.helpers import build, config, run_of
from tests.data.test_ingest import data, events, write_csv

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
from pathlib import Path
from tests.data.helpers import build, config
from tests.data.test_ingest import data
folder, store = Path(sys.argv[1]), Path(sys.argv[2])
given = config(store, data(folder))
print("ready", flush=True)
found, metrics = build(given)
print(found.digest, int(metrics["ingest/files_reused"]), flush=True)
"""


def start(folder: Path, store: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(store)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n", child.communicate()[1]
    return child


def kill_and_resume(folder: Path, store: Path, rng: random.Random, kills: int, span: float) -> tuple[str, int]:
    """(digest, files reused by the run that ended) after `kills` runs were killed at random moments of `span` seconds."""
    for _ in range(kills):
        child = start(folder, store)
        time.sleep(rng.uniform(0, span))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for manifest in store.rglob("manifest.json"):
            assert manifest.parent.name.startswith(".") or (manifest.parent / "profile.json").exists()
    child = start(folder, store)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    digest, reused = out.split()
    assert not [path for path in store.rglob("*.tmp")]
    return digest, int(reused)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_ingest_goes_on_to_the_same_digest(tmp_path: Path, kills: int) -> None:
    for place in range(12):
        write_csv(events(8000, place, place * 8000), tmp_path / "in" / f"{place}.csv")
    began = time.monotonic()
    whole, _ = build(config(tmp_path / "whole", data(tmp_path)))
    span = 1.2 * (time.monotonic() - began)
    rng, left, reused = random.Random(7), kills, 0
    for trial in range(max(1, kills // 5)):
        step = min(5, left) if kills > 5 else kills
        digest, found = kill_and_resume(tmp_path, tmp_path / f"trial-{trial}", rng, step, span)
        assert digest == whole.digest
        left, reused = left - step, reused + found
    if kills > 5:
        assert reused > 0  # the work of killed runs was not all lost


def test_a_file_that_changes_while_it_is_read_leaves_nothing_half_written(tmp_path: Path) -> None:
    for place in range(2):
        write_csv(events(100, place, place * 100), tmp_path / "in" / f"{place}.csv")
    given = config(tmp_path, data(tmp_path))
    plan = make_plan(given, run_of(given))
    with open(tmp_path / "in" / "1.csv", "a", encoding="utf-8") as file:
        file.write("1,2020-01-01T00:00:00Z,1,x\n")
    with pytest.raises(UserError, match=r"1\.csv changed"):
        stage_files(plan, run_of(given))
    assert not list((tmp_path / "store").rglob("*.tmp"))


@contextlib.contextmanager
def tiny_disk(path: Path, size: str):
    path.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, check=False
        )
    except OSError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)  # busy where a file was left open


@pytest.mark.parametrize(
    ("size", "refused"), [("200k", "fail"), ("200k", "skip"), ("600k", "fail"), ("1m", "skip"), ("1500k", "fail")]
)
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_written(tmp_path: Path, size: str, refused: str) -> None:
    for place in range(3):
        write_csv(events(20_000, place, place * 20_000), tmp_path / "in" / f"{place}.csv")
    with tiny_disk(tmp_path / "disk", size):
        given = config(tmp_path / "disk", data(tmp_path, source={"refused": refused}))
        run = run_of(given)
        run._folder = tmp_path / "run"
        with pytest.raises(UserError, match=r"the disk that holds .* is full; free some space"):
            ingest(given, run)
        disk = tmp_path / "disk"
        assert not list(disk.rglob("*.tmp")) and not list(disk.rglob(".spool*"))
        entries = {path.parent for path in disk.rglob("part-*.parquet")}
        # The disk may be full only after the dataset was published: then it is whole.
        assert all(open_dataset(entry).read().num_rows == 60_000 for entry in entries)
    found, _ = build(config(tmp_path / "other", data(tmp_path)))
    assert found.rows == 60_000
