"""Who shows no sign of life is ended, what makes no progress ends, and a run whose process is gone says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.runtime import stall
from engine.runtime.stall import Beats, Watch

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, time
from pathlib import Path
from engine.runtime.stall import Beats
beats = Beats(Path(sys.argv[1]), "node")
beats.at = "unit 7"
end = time.monotonic() + 60
while time.monotonic() < end:
    if sys.argv[2] == "wait":
        time.sleep(0.1)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    """`worker("work")`: a process that beats in `tmp_path` until the test ends."""
    started = []

    def start(how: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), how], cwd=ROOT)
        started.append(process)
        while not any(str(process.pid) in path.read_text() for path in tmp_path.glob("beat.*")):
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def looks(watch: Watch, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watch.look()
        time.sleep(0.1)


def test_a_worker_that_stops_is_given_up_by_name_and_one_that_works_goes_on(tmp_path: Path, worker: Any) -> None:
    given: list[stall.Seen] = []
    watch = Watch(60, tmp_path, 1.5, given.append)
    works, stops = worker("work"), worker("wait")
    looks(watch, 1)
    os.kill(stops.pid, signal.SIGSTOP)
    looks(watch, 3)
    (seen,) = given
    assert seen.facts["pid"] == stops.pid and "at unit 7, on" not in str(seen)
    assert str(seen).startswith(f"worker process {stops.pid} on ") and str(seen).endswith(", at unit 7,")
    assert stall.end_process(stops.pid, seen.facts["began"]) and stops.wait(5) == -signal.SIGKILL
    assert not stall.end_process(works.pid, "another start") and works.poll() is None


def test_work_is_progress_and_a_wait_is_none(tmp_path: Path, worker: Any) -> None:
    worker("work")
    looks(Watch(2, tmp_path), 4)
    for path in tmp_path.glob("beat.*"):
        path.unlink()
    waits = worker("wait")
    with pytest.raises(stall.Stalled, match=rf"worker process {waits.pid} on .*, at unit 7, does nothing but wait"):
        looks(Watch(2, tmp_path / "gone"), 0) if waits.poll() is not None else looks(watch_of(tmp_path, waits), 6)


def watch_of(folder: Path, process: subprocess.Popen[bytes]) -> Watch:
    """A watch that sees one process only."""
    own = folder / "own"
    own.mkdir()
    (beat,) = [path for path in folder.glob("beat.*") if f'"pid": {process.pid}' in path.read_text()]
    (own / beat.name).symlink_to(beat)
    return Watch(2, own)


def test_without_any_worker_the_bound_says_so(tmp_path: Path) -> None:
    with pytest.raises(stall.Stalled, match="there is no worker, and the cluster starts none"):
        looks(Watch(0.5, tmp_path), 3)


def test_a_call_that_does_not_come_back_is_left_alone_and_what_it_raises_is_raised(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(stall.NoAnswer):
        stall.bounded(lambda: time.sleep(3), 0.3, "slow")
    assert time.monotonic() - began < 2
    assert stall.bounded(lambda: 7, 5, "quick") == 7
    with pytest.raises(ZeroDivisionError):
        stall.bounded(lambda: 1 // 0, 5, "wrong")


def test_beats_end_with_the_work(tmp_path: Path) -> None:
    beats = Beats(tmp_path / "beats", "node")
    assert len(list((tmp_path / "beats").glob("beat.*"))) == 1
    beats.end()
    time.sleep(2 * stall.BEAT_SECONDS)
    assert not list((tmp_path / "beats").glob("beat.*"))


@pytest.mark.parametrize("orderly", [True, False])
def test_a_run_whose_process_is_gone_is_recorded_as_failed(tmp_path: Path, orderly: bool) -> None:
    record = {"status": "running", "pid": 2**22 + 1, "name": "é"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    reaper = [
        sys.executable,
        "-I",
        "-S",
        str(ROOT / "engine/runtime/on_ray/reaper.py"),
        str(record["pid"]),
        "0",
        str(tmp_path),
    ]
    done = subprocess.run(reaper, input=b"done" if orderly else b"", capture_output=True, timeout=20, check=True)
    found = json.loads((tmp_path / "run.json").read_text())
    if orderly:
        assert found == record and not done.stderr
        return
    assert found["status"] == "failed" and "lost its GCS or raylet" in found["error"] and found["name"] == "é"
    assert b"error: the process of the command was killed" in done.stderr and str(tmp_path).encode() in done.stderr
    again = {**record, "pid": 5}
    (tmp_path / "run.json").write_text(json.dumps(again))
    subprocess.run(reaper, input=b"", capture_output=True, timeout=20, check=True)
    assert json.loads((tmp_path / "run.json").read_text()) == again, "another process has taken it up"
