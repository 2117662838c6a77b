"""Processes of a command's Ray cluster that stop at any moment: the command ends, with the same bytes or a sentence.

STALL_TRIALS says how many (default 50), STALL_SEED which, STALL_TABLE a file that gets a line for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import engine
from tests.features.test_store import months_of_visits
from tests.tiny import overrides, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[2]
BOUND = 150.0  # seconds from the stop to the end; cluster.stall is 12 of them, a restart of actors on a busy machine the most
RAY = ("cluster=ray", "cluster.workers=2", "cluster.timeout=4s", "cluster.stall=12s", "cluster.retries=2")
COMMANDS = {
    "train": ("train.epochs=6", "train.checkpoint_every=20"),
    "score": ("score.unit_rows=1024",),
    "features": (),
}
EARLY, LATE = 15.0, 8.0  # seconds after the first sign of the cluster, or of its first worker
LINK = {"train": "weights", "score": "scores", "features": "features"}
KINDS = {
    "gcs_server": "GCS", "raylet/raylet": "raylet", "reaper.py": "reaper", "TrainController": "controller",
    "RayTrainWorker": "training worker", "MapWorker": "actor", "Map(_Actor)": "actor", "ray::IDLE": "idle worker",
    "ray::": "other Ray worker", "agent": "agent", "monitor": "monitor",
}  # fmt: skip


@dataclass
class Undisturbed:
    """What a command gives when nothing is stopped."""

    folders: dict[str, Path] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    chain: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = write_tiny(tmp_path_factory.mktemp("stalls"), 6000)
    months = write_tiny(tmp_path_factory.mktemp("months"))
    pq.write_table(months_of_visits(), next(months.glob("visits*.parquet")))
    found, conf = Undisturbed(), str(folder / "conf")
    model = engine.run("train", *overrides(folder, "train.epochs=1"), config_dir=conf).directory
    for command, more in COMMANDS.items():
        place = months if command == "features" else folder
        words = [*overrides(place, *more), *([f"score.model={model}"] if command == "score" else [])]
        run = engine.run(command, *words, config_dir=conf)
        found.folders[command] = place
        found.words[command] = words
        found.chain[command] = run.record["chain"][LINK[command]]
    return found


def tree(process: int) -> dict[int, str]:
    """Process -> kind, of everything below a process."""
    found: dict[int, str] = {}
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                words = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                kind = next((kind for part, kind in KINDS.items() if part in words), "")
                found |= {child: kind} | tree(child)
    return found


def is_there(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def start(undisturbed: Undisturbed, command: str, folder: Path) -> subprocess.Popen[bytes]:
    """The command on Ray in a process group of its own; it logs to `folder/log`."""
    code = "import sys; from tests.scoring import slow_units; sys.exit(slow_units.main(None))"
    store = [f"paths.store={folder / 'store'}"] if command == "features" else []
    words = [command, *undisturbed.words[command], *RAY, *store, f"paths.runs={folder / 'runs'}"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *words, f"--config-dir={undisturbed.folders[command] / 'conf'}"],
            stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SLOW_UNITS": "0.3"},
        )  # fmt: skip


def stop_one(driver: subprocess.Popen[bytes], moments: random.Random) -> tuple[int, str]:
    """Stop a random process of a random kind at a random moment; (0, "") where the command was quicker."""
    wanted, span = ({"GCS"}, EARLY) if moments.random() < 0.3 else ({"actor", "training worker"}, LATE)
    while not wanted & set(tree(driver.pid).values()):
        if driver.poll() is not None:
            return 0, ""
        time.sleep(0.05)
    time.sleep(moments.random() * span)
    found = tree(driver.pid)
    kinds = sorted(set(found.values()) - {""})
    if driver.poll() is not None or not kinds:
        return 0, ""
    kind = moments.choice(kinds)
    process = moments.choice([process for process, its in found.items() if its == kind])
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGSTOP)
        return process, kind
    return 0, ""


def end_all(driver: subprocess.Popen[bytes], known: set[int]) -> int:
    """End what is left of a trial; how many processes that were after the grace of the reaper."""
    if driver.poll() is None:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    until = time.monotonic() + 15
    while any(map(is_there, known)) and time.monotonic() < until:
        time.sleep(0.2)
    left = [process for process in known if is_there(process)]
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(left)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("trial", range(int(os.environ.get("STALL_TRIALS", "50"))))
def test_a_stopped_process_ends_in_equal_bytes_or_a_sentence(
    undisturbed: Undisturbed, tmp_path: Path, trial: int
) -> None:
    moments = random.Random(int(os.environ.get("STALL_SEED", "0")) * 1000 + trial)
    command = moments.choice(sorted(COMMANDS))
    if command == "features":
        shutil.copytree(undisturbed.folders[command] / "store" / "datasets", tmp_path / "store" / "datasets")
    driver = start(undisturbed, command, tmp_path)
    _, kind = stop_one(driver, moments)
    known, stopped = set(tree(driver.pid)), time.monotonic()
    while driver.poll() is None and time.monotonic() - stopped < BOUND:
        known |= set(tree(driver.pid))
        time.sleep(0.1)
    seconds, code = time.monotonic() - stopped, driver.poll()
    left = end_all(driver, known)
    log = (tmp_path / "log").read_text()
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("run.json")]
    outcome = "equal" if code == 0 else log.strip().rpartition("error: ")[2][:300].replace("\n", " ")
    if table := os.environ.get("STALL_TABLE"):
        with open(table, "a") as file:
            file.write(f"{trial}|{kind or 'none'}|{command}|{code}|{seconds:.0f}|{left}|{record['status']}|{outcome}\n")
    assert code is not None, f"{command} with a stopped {kind} did not end in {BOUND} s:\n{log[-3000:]}"
    assert "Traceback" not in log, log[-3000:]
    assert left == 0
    if code == 0:
        assert record["chain"][LINK[command]] == undisturbed.chain[command]
        return
    assert record["status"] == "failed" and "error: " in log
    again = start(undisturbed, command, tmp_path)
    assert again.wait(BOUND) == 0, (tmp_path / "log").read_text()[-3000:]
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").rglob("run.json"))]
    assert records[-1]["chain"][LINK[command]] == undisturbed.chain[command]
