"""The local log is the truth; a mirror in a tracker is made from it and can never touch the run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config.sections.runtime import TrackingConfig
from engine.config.units import Span
from engine.errors import UserError
from engine.runtime import tracking
from tests.lifecycle.recorded import make_run, sha
from tests.runtime.fake_wandb import FakeWandb, serving

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789012345678901234567890123456789"
SECRET = "hunter2-from-the-environment"


def lines(directory: Path, *entries: Mapping[str, Any]) -> None:
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps({"step": entry["step"], "time": 1.0, **entry}) + "\n")


def checkpoint(directory: Path, step: int) -> None:
    folder = directory / "checkpoints" / f"step-{step:010d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step}))


class Kept:
    """A mirror that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, str, float]] = []
        self.last = -1

    def log(self, row: int, step: int, time: float, values: Mapping[str, float]) -> None:
        assert row > self.last, "a tracker drops what does not rise"
        self.last = row
        self.sent += [(step, name, value) for name, value in values.items()]


# --------------------------------------------------------------------------------------------------- the local log


def test_a_replayed_step_has_one_value_that_of_the_last_attempt(tmp_path) -> None:
    lines(tmp_path, {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 3, "a": 3.0})
    lines(tmp_path, {"step": 2, "a": 20.0}, {"step": 4, "a": 4.0})
    points = tracking.read_points(tmp_path)
    assert [(p.step, p.values) for p in points] == [
        (1, {"a": 1.0}), (2, {"a": 20.0, "b": 5.0}), (3, {"a": 3.0}), (4, {"a": 4.0}),
    ]  # fmt: skip


def test_a_line_torn_by_a_kill_costs_that_line_alone(tmp_path) -> None:
    lines(tmp_path, {"step": 1, "a": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "time": 1.0, "a": 2')
    lines(tmp_path, {"step": 3, "a": 3.0})
    assert [p.step for p in tracking.read_points(tmp_path)] == [1, 3]
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "time": 1.0, "a"{"step": 3, "time": 1.0, "a": 3.0}\n{"step": 4'
    )
    assert [p.step for p in tracking.read_points(tmp_path)] == [3]


def test_a_value_that_was_not_finite_is_nan_and_no_log_is_no_points(tmp_path) -> None:
    assert tracking.read_points(tmp_path) == []
    lines(tmp_path, {"step": 1, "a": None})
    assert math.isnan(tracking.read_points(tmp_path)[0].values["a"])


def test_points_are_sent_once_and_only_as_far_as_a_checkpoint_covers_them(tmp_path) -> None:
    mirror = Kept()
    feed = tracking.Feed(tmp_path, mirror, -1)  # type: ignore[arg-type]
    lines(tmp_path, *({"step": step, "a": float(step)} for step in range(10)))
    feed.send_covered()
    assert mirror.sent == []
    checkpoint(tmp_path, 4)
    feed.send_covered()
    assert [step for step, _, _ in mirror.sent] == [0, 1, 2, 3, 4]
    lines(tmp_path, {"step": 4, "valid/b": 0.5})  # behind lines that may be replayed
    feed.send_covered()
    assert len(mirror.sent) == 5
    checkpoint(tmp_path, 9)
    feed.send_covered()
    assert mirror.sent[-1] == (4, "valid/b", 0.5)
    lines(
        tmp_path, {"step": 9, "valid/b": 0.25}, {"step": 10, "a": 10.0}
    )  # the first one after the checkpoint of its step
    feed.send_covered()
    assert mirror.sent[-1] == (9, "valid/b", 0.25)
    (tmp_path / "DONE").touch()
    feed.send_covered()
    assert [step for step, name, _ in mirror.sent if name == "a"] == list(range(11))


def test_a_checkpoint_without_a_readable_manifest_covers_nothing(tmp_path) -> None:
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / "step-0000000009").mkdir()
    (tmp_path / "checkpoints" / "step-0000000009" / "manifest.json").write_text("{")
    assert tracking.covered_step(tmp_path) == 3


def test_what_the_tracker_already_has_is_not_sent_again(tmp_path) -> None:
    mirror = Kept()
    lines(tmp_path, *({"step": step, "a": 1.0} for step in range(10)))
    tracking.Feed(tmp_path, mirror, 6).send(math.inf)  # type: ignore[arg-type]
    assert [step for step, _, _ in mirror.sent] == [7, 8, 9]


def test_a_point_whose_step_comes_late_is_sent_too(tmp_path) -> None:
    mirror = Kept()
    feed = tracking.Feed(tmp_path, mirror, -1)  # type: ignore[arg-type]
    lines(tmp_path, {"step": 1, "a": 1.0}, {"step": 9, "a": 9.0})
    checkpoint(tmp_path, 9)
    feed.send_covered()
    lines(tmp_path, {"step": 4, "a": 4.0}, {"step": 9, "b": 0.5}, {"step": 2, "a": None})
    feed.send_covered()
    (tmp_path / "DONE").touch()
    feed.send_covered()
    assert [(step, name) for step, name, _ in mirror.sent] == [(1, "a"), (9, "a"), (4, "a"), (9, "b"), (2, "a")]
    assert feed.missing() == []


def test_a_late_point_reaches_a_tracker_that_went_on_after_its_step(tmp_path) -> None:
    lines(tmp_path, {"step": 1, "a": 1.0}, {"step": 9, "a": 9.0}, {"step": 9, "valid/b": 0.5})
    mirror = Kept()
    feed = tracking.Feed(tmp_path, mirror, 1)  # the child was killed between the two lines of step 9
    feed.send(math.inf)
    assert mirror.sent == [(9, "valid/b", 0.5)] and feed.missing() == []


def test_a_value_that_was_sent_and_then_changed_is_not_called_complete(tmp_path) -> None:
    mirror = Kept()
    feed = tracking.Feed(tmp_path, mirror, -1)  # type: ignore[arg-type]
    lines(tmp_path, {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0})
    feed.send(2)
    lines(tmp_path, {"step": 2, "a": 2.5})
    feed.send(math.inf)
    assert [value for _, _, value in mirror.sent] == [1.0, 2.0] and feed.missing() == ["a of step 2"]
    with pytest.raises(RuntimeError, match=r"1 values of metrics.jsonl are not what the tracker holds: a of step 2"):
        tracking.check_whole(feed, done=True)
    tracking.check_whole(feed, done=False)


REPLAYED = [[(2, "a", 0.5), (0, "a", 0.5)], [(1, "a", 0.5)], [(2, "a", 0.5), (3, "a", 0.5), (1, "a", 0.5)], []]


@example(attempts=REPLAYED, covered=[0, 0, 2, 2])  # a step that was repeated after the last row that a child had sent
@settings(max_examples=200, deadline=None)
@given(
    attempts=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.sampled_from([0.5, 1e300, None, 3])), max_size=8),
        min_size=1, max_size=4,
    ),
    covered=st.lists(st.integers(-1, 13), min_size=4, max_size=4).map(sorted),
)  # fmt: skip
def test_every_point_is_sent_once_with_its_last_value_in_any_order_of_steps_and_restarts(attempts, covered) -> None:
    known: set[tuple[int, str]] = set()
    safe = -1
    with tempfile.TemporaryDirectory() as name:
        directory, mirror = Path(name), Kept()
        for attempt, upto in zip(attempts, covered, strict=False):
            # What a checkpoint covers comes late, but is not logged again.
            fresh = [entry for entry in attempt if entry[0] > safe or entry[:2] not in known]
            fresh = [entry for entry in fresh if entry[0] > safe or [e[:2] for e in fresh].count(entry[:2]) == 1]
            lines(directory, *({"step": step, metric: value} for step, metric, value in fresh))
            known |= {entry[:2] for entry in fresh}
            feed = tracking.Feed(directory, mirror, mirror.last)  # a child of its own, that knows the last row alone
            feed.send(upto)
            safe = upto
        feed.send(math.inf)
        truth = {(p.step, k): v for p in tracking.read_points(directory) for k, v in p.values.items()}
        assert sorted(map(repr, mirror.sent)) == sorted(repr((*key, value)) for key, value in truth.items())
        assert feed.missing() == []


def test_auto_goes_online_only_with_a_key(monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert tracking.resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.resolve_mode("auto") == "offline" and tracking.resolve_mode("online") == "online"


def test_an_unknown_back_end_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="found 'off'"):
        tracking.mirror_of(tmp_path, {}, TrackingConfig())


# -------------------------------------------------------------------------------------------------- whole programs

PROGRAM = """
import dataclasses, json, os, signal, sys, time, types
from engine import commands
from engine.__main__ import main

def step(config, run):
    begin = 0
    for path in sorted(run.directory.glob("checkpoints/*/manifest.json")):
        begin = json.loads(path.read_text())["step"] + 1
    for i in range(begin, 30):
        run.log_metrics(i, {"train/loss": 1 / (i + 1), "train/lr": config.train.lr})
        if i % 10 == 4:
            folder = run.path("checkpoints") / f"step-{i:010d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"step": i}))
            run.log_metrics(i, {"valid/roc_auc": 0.5 + i / 100})
        time.sleep(float(os.environ.get("PAUSE", "0")))
        if os.environ.get("KILL_AT") == str(i):
            os.kill(os.getpid(), signal.SIGKILL)
    bundle = run.path("model")
    bundle.mkdir(exist_ok=True)
    (bundle / "bundle.json").write_text("{}")
    (bundle / "model.safetensors").write_bytes(b"weights of the model")
    (run.directory / "report.html").write_text("<h1>a report</h1>")
    slices = {"shop": [{"value": "x", "rows": 3, "roc_auc": 0.75, "intervals": {}}]}
    (run.directory / "evaluation.json").write_text(json.dumps({"test": {"by_month": [], "slices": slices}}))
    run.link("weights", "ab" * 32)
    return {"test/roc_auc": 0.75, "test/odd": float("nan")}

module = types.ModuleType("a_step")
module.step = step
sys.modules["a_step"] = module
commands.COMMANDS["train"] = dataclasses.replace(commands.COMMANDS["train"], target="a_step:step", check="")
sys.exit(main(sys.argv[1:]))
"""


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "A_SECRET": SECRET, "HOME": str(folder), **variables}
    return subprocess.Popen(
        [sys.executable, str(program), *words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def train(folder: Path, *words: str, **variables: str) -> tuple[int, Path, str, float]:
    """(exit code, run directory, stderr, seconds) of a tracked run."""
    began = time.monotonic()
    process = start(folder, "train", "tracking=wandb", *words, **variables)
    _, err = process.communicate(timeout=120)
    seconds = time.monotonic() - began
    return process.returncode, sorted((folder / "runs/train/unnamed").iterdir())[-1], err, seconds


def online(fake: FakeWandb) -> dict[str, str]:
    return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": fake.url}


def expected() -> set[tuple[int, str, float]]:
    points = {(i, "train/loss", 1 / (i + 1)) for i in range(30)} | {(i, "train/lr", 0.001) for i in range(30)}
    return points | {(i, "valid/roc_auc", 0.5 + i / 100) for i in (4, 14, 24)}


def synced(directory: Path, fake: FakeWandb) -> None:
    segments = list(directory.glob("wandb/offline-run-*"))
    assert len(segments) == 1
    environment = {**os.environ, **online(fake), "HOME": str(directory)}
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", "--include-synced", str(segments[0])]
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Iterator[tuple[Path, FakeWandb]]:
    """A run that was killed at step 21 (checkpoint at 14), resumed, and synced twice to a good endpoint."""
    folder = tmp_path_factory.mktemp("offline")
    words = ("train.loss=binary", "tracking.group=${oc.env:A_SECRET}")
    code, first, _, _ = train(folder, *words, KILL_AT="21")
    assert code == -signal.SIGKILL
    wait_for(lambda: (first / "tracking.json").exists())
    assert json.loads((first / "tracking.json").read_text())["state"] == "unfinished"
    code, directory, err, _ = train(folder, *words)
    assert code == 0, err
    assert directory == first
    wait_for(lambda: json.loads((first / "tracking.json").read_text())["state"] == "complete")
    with serving() as fake:
        synced(directory, fake)
        once = sorted(fake.points(directory.name))
        synced(directory, fake)
        assert sorted(fake.points(directory.name)) == once
        yield directory, fake


def test_after_kill_and_resume_there_is_one_value_per_step_and_metric(offline) -> None:
    directory, fake = offline
    points = fake.points(directory.name)
    assert len(points) == len({(step, name) for step, name, _ in points})
    assert set(points) == expected()
    assert [line["_timestamp"] for line in fake.history(directory.name)] == sorted(
        line["_timestamp"] for line in fake.history(directory.name)
    )


def test_the_mirror_is_one_run_that_keeps_its_id_group_and_job_type(offline) -> None:
    directory, fake = offline
    assert list(fake.runs) == [directory.name]
    assert json.loads((directory / "run.json").read_text())["tracking"]["id"] == directory.name
    run = fake.runs[directory.name]
    assert run["jobType"] == "train" and run["project"] == "engine" and fake.exit_codes[directory.name] == 0


def test_config_is_flat_and_summary_holds_the_figures(offline) -> None:
    directory, fake = offline
    config = fake.config(directory.name)
    assert config["train.lr"] == 0.001 and config["command"] == "train" and config["model.hidden"] == [256, 256, 256]
    assert not any(name.startswith(("backtest", "retrain", "score.")) for name in config)
    summary = fake.summary(directory.name)
    assert summary["test/roc_auc"] == 0.75 and summary["chain/weights"] == "ab" * 32
    assert "test/odd" not in summary  # it could not be computed


def test_bundle_report_and_slices_are_sent(offline) -> None:
    _, fake = offline
    assert {entry["artifactTypeName"] for entry in fake.artifacts} == {"model", "run_table"}
    assert b"weights of the model" in fake.uploads.values()
    assert any(b"<h1>a report</h1>" in body for body in fake.uploads.values())
    table = next(body for name, body in fake.uploads.items() if "test_slices" in name)
    assert json.loads(table)["data"] == [["shop", "x", 3, 0.75]]


def test_no_secret_host_or_argument_leaves_and_nobody_else_is_called(offline) -> None:
    directory, fake = offline
    sent = fake.everything()
    assert fake.clients == {"127.0.0.1"}
    assert b"wandb-history" in sent and b"train.lr" in sent
    for word in (SECRET.encode(), b"program.py", os.uname().nodename.encode() + b'"', str(ROOT).encode() + b"/tests"):
        assert word not in sent, word
    for path in directory.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_nothing_is_written_into_the_home_folder(offline) -> None:
    home = offline[0].parents[3]
    assert not [path for path in home.rglob("*") if "wandb" in path.name and "runs" not in path.parts]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[float, dict[str, Any]]:
    """(seconds, metrics) of the same run without tracking."""
    folder = tmp_path_factory.mktemp("plain")
    began = time.monotonic()
    process = start(folder, "train", PAUSE="0.05")
    process.communicate(timeout=60)
    seconds = time.monotonic() - began
    directory = next((folder / "runs/train/unnamed").iterdir())
    assert not list(directory.glob("tracking*")) and not (directory / "wandb").exists()
    return seconds, json.loads((directory / "metrics.json").read_text())


@pytest.mark.parametrize(
    "mode", ["errors", pytest.param("slow", marks=pytest.mark.slow), pytest.param("drops", marks=pytest.mark.slow)]
)
def test_a_bad_endpoint_changes_nothing_and_the_mirror_is_repaired_later(tmp_path, plain, mode) -> None:
    with serving(mode) as bad:
        code, directory, err, seconds = train(tmp_path, "tracking.timeout=4s", PAUSE="0.05", **online(bad))
        assert code == 0, err
        assert json.loads((directory / "metrics.json").read_text()) == plain[1]
        assert (directory / "DONE").exists()
        assert float(re.search(r"overhead: tracking ([\d.]+) s", err).group(1)) < 2  # it waits for one second at most
        assert seconds < 3 * plain[0] + 10  # and not for the endpoint; a machine may be shared with other tests
        wait_for(lambda: (directory / "tracking.json").exists())
        assert json.loads((directory / "tracking.json").read_text())["state"] == "incomplete"
    with serving() as good:
        process = start(tmp_path, "track", "sync", str(directory), **online(good))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert set(good.points(directory.name)) == expected()
        if mode == "errors":  # a second time changes nothing
            start(tmp_path, "track", "sync", str(directory), **online(good)).communicate(timeout=120)
            assert sorted(good.points(directory.name)) == sorted(expected())
    assert json.loads((directory / "tracking.json").read_text())["state"] == "complete"


def test_a_killed_tracker_does_not_stop_the_run(tmp_path, plain) -> None:
    process = start(tmp_path, "train", "tracking=wandb", PAUSE="0.1")
    wait_for(lambda: list(tmp_path.glob("runs/train/unnamed/*/tracking.log")))
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    mine = [int(line.split()[0]) for line in children.stdout.splitlines() if "engine.runtime.tracking" in line]
    assert len(mine) == 1
    os.kill(mine[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    directory = next((tmp_path / "runs/train/unnamed").iterdir())
    assert process.returncode == 0 and (directory / "DONE").exists()
    assert "track sync" in err
    assert tracking.sync(directory, TrackingConfig(kind="wandb", mode="offline")).startswith(str(directory))
    with serving() as fake:
        synced(directory, fake)
        assert set(fake.points(directory.name)) == expected()


def test_online_points_arrive_once_through_a_kill_and_a_resume(tmp_path) -> None:
    with serving() as fake:
        code, first, _, _ = train(tmp_path, PAUSE="0.1", KILL_AT="21", **online(fake))
        assert code == -signal.SIGKILL
        wait_for(lambda: (first / "tracking.json").exists())
        covered = fake.points(first.name)
        assert covered and max(step for step, _, _ in covered) == 14
        code, directory, err, _ = train(tmp_path, PAUSE="0.1", **online(fake))
        assert code == 0 and directory == first, err
        wait_for(lambda: json.loads((directory / "tracking.json").read_text())["state"] == "complete")
        assert list(fake.runs) == [directory.name]
        # 30 lines of training, 3 of validation, the report: the second attempt goes on at its offset.
        assert sum(count for _, count in fake.history_chunks) == 34
        points = fake.points(directory.name)
        assert len(points) == len({(step, name) for step, name, _ in points})
        assert set(points) == expected()


def test_a_run_that_was_not_tracked_can_be_sent_later(tmp_path) -> None:
    directory = make_run(tmp_path, "20260101T000000-abcdef")
    before = (directory / "run.json").read_bytes()
    tracking.sync(directory, TrackingConfig(mode="offline"))
    assert (directory / "run.json").read_bytes() == before
    other = make_run(tmp_path / "other", "20260101T000000-fedcba")  # the process of W&B has its log with the first run
    tracking.sync(other, TrackingConfig(mode="offline"))
    links = [path for path in other.rglob("*") if path.is_symlink()]
    assert links and all(path.resolve().is_relative_to(other.resolve()) for path in links)
    with serving() as fake:
        synced(directory, fake)
        assert set(fake.points(directory.name)) == {(1, "train/loss", 0.7), (2, "train/loss", 0.6)}
        assert fake.config(directory.name)["train.lr"] == 0.01
        assert fake.summary(directory.name)["test/roc_auc"] == 0.75


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_late_steps_and_odd_names_and_values_reach_the_server(tmp_path, monkeypatch, mode) -> None:
    directory = make_run(tmp_path, "20260101T000000-abcdef")
    late = [{"step": 9, "train/loss": 0.5}, {"step": 4, "valid/roc_auc": 0.75}, {"step": 3, "_timestamp_of_x": 2.0}]
    odd = [
        {"step": 2**40, "train/loss": 1e300},
        {"step": 5, "valid/\u00fc.b c": 2**60},
        {"step": 0, "train/lr": 1e-300},
    ]
    lines(directory, *late, *odd)
    with serving() as fake:
        for name, value in online(fake).items():
            monkeypatch.setenv(name, value)
        tracking.sync(directory, TrackingConfig(mode=mode))
        if mode == "offline":
            synced(directory, fake)
        assert set(fake.points(directory.name)) == {
            (1, "train/loss", 0.7), (2, "train/loss", 0.6), (9, "train/loss", 0.5), (4, "valid/roc_auc", 0.75),
            (3, "metric/_timestamp_of_x", 2.0), (2**40, "train/loss", 1e300), (5, "valid/\u00fc.b c", float(2**60)),
            (0, "train/lr", 1e-300),
        }  # fmt: skip
    assert json.loads((directory / "tracking.json").read_text())["state"] == "complete"


def test_late_points_of_a_live_run_reach_the_server(tmp_path, monkeypatch) -> None:
    directory = make_run(tmp_path, "20260101T000000-fedcba")
    record = {**tracking.load_record(directory), "tracking": {"id": directory.name, "layout": tracking.LAYOUT}}
    with serving() as fake:
        for name, value in online(fake).items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # what another test has told the library of its endpoint
        mirror = tracking.mirror_of(directory, record, TrackingConfig(kind="wandb", mode="online"))
        feed = tracking.Feed(directory, mirror, mirror.open())
        lines(directory, {"step": 9, "train/loss": 0.5})
        feed.send(math.inf)
        lines(directory, {"step": 4, "valid/roc_auc": 0.75}, {"step": 9, "valid/roc_auc": 0.8})
        feed.send(math.inf)
        mirror.finish(record, {}, True)
        assert feed.missing() == []
        assert set(fake.points(directory.name)) == {
            (1, "train/loss", 0.7), (2, "train/loss", 0.6), (9, "train/loss", 0.5), (4, "valid/roc_auc", 0.75),
            (9, "valid/roc_auc", 0.8),
        }  # fmt: skip


def test_a_mirror_that_could_not_reach_its_server_keeps_the_points_and_is_not_called_complete(
    tmp_path, monkeypatch
) -> None:
    directory = make_run(tmp_path, "20260101T000000-fedcbb")
    record = {**tracking.load_record(directory), "tracking": {"id": directory.name, "layout": tracking.LAYOUT}}
    with serving("errors") as bad:
        for name, value in online(bad).items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        mirror = tracking.mirror_of(directory, record, TrackingConfig(kind="wandb", mode="online", timeout=Span("4s")))
        feed = tracking.Feed(directory, mirror, mirror.open())
        feed.send(math.inf)
        with pytest.raises(RuntimeError, match=r"could not be reached .*the points are in .*offline-run-"):
            mirror.finish(record, {}, True)
    with serving() as good:
        synced(directory, good)
        assert set(good.points(directory.name)) == {(1, "train/loss", 0.7), (2, "train/loss", 0.6)}


def drifted(folder: Path) -> Path:
    """A monitoring run, its dataset in the store, and beside it a bundle with rows of data."""
    chain = {"dataset": sha("d")}
    directory = make_run(folder, "20260101T000000-abcdef", "monitor", chain=chain, outputs={"model": sha("a")})
    statistics = {"psi": {"value": 0.5, "line": 0.2, "alarm": True}, "ks": {"value": None, "reason": "too few rows"}}
    columns = [{"name": "size", "status": "alarm", "rows": {"current": 7}, "statistics": statistics, "bins": [1, 2]}]
    (directory / "drift.json").write_text(json.dumps({"verdict": "alarm", "columns": columns}))
    (directory / "model" / "gate").mkdir(parents=True)
    for name in ("bundle.json", "reference.json", "reference_sample.parquet", "gate/rows.parquet"):
        (directory / "model" / name).write_text(f"content of {name}")
    entry = folder / "store" / "datasets" / "shop" / "x"
    entry.mkdir(parents=True)
    manifest = {"digest": sha("d"), "rows": 7, "spec": {"description": SECRET}}
    (entry / "manifest.json").write_text(json.dumps(manifest))
    (entry / "part-0.parquet").write_text("rows of the dataset")
    return directory


def test_drift_arrives_as_a_table_and_rows_of_data_stay_at_home(tmp_path) -> None:
    directory = drifted(tmp_path)
    tracking.sync(directory, TrackingConfig(mode="offline"))
    with serving() as fake:
        synced(directory, fake)
        table = json.loads(next(body for name, body in fake.uploads.items() if "drift" in name))
        assert dict(zip(table["columns"], table["data"][0], strict=True)) == {
            "name": "size", "status": "alarm", "rows current": 7, "psi": 0.5, "psi line": 0.2, "psi alarm": True,
            "ks": None, "ks reason": "too few rows",
        }  # fmt: skip
        assert {entry["artifactTypeName"] for entry in fake.artifacts} == {"model", "dataset", "run_table"}
        sent = fake.everything()
        assert b"content of bundle.json" in sent and b"content of reference.json" in sent
        for kept in (b"content of gate", b"content of reference_sample", b"rows of the dataset", SECRET.encode()):
            assert kept not in sent
        listed = [json.loads(body)["contents"] for name, body in fake.uploads.items() if name.startswith("manifest/")]
        entries = {name: entry for contents in listed for name, entry in contents.items()}
        for name in ("gate/rows.parquet", "reference_sample.parquet", "parts/part-0.parquet"):
            assert entries[name]["ref"].startswith("file://") and entries[name]["digest"]


def test_rows_of_a_bundle_are_sent_where_they_are_asked_for(tmp_path) -> None:
    directory = drifted(tmp_path)
    tracking.sync(directory, TrackingConfig(mode="offline", rows=True))
    with serving() as fake:
        synced(directory, fake)
        assert b"content of gate/rows.parquet" in fake.uploads.values()
        assert b"content of reference_sample.parquet" in fake.uploads.values()


def test_track_sync_names_what_it_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    from engine.config.tree import Config

    with pytest.raises(UserError, match="at least one run directory"):
        tracking.track_sync(Config(), [])
    with pytest.raises(UserError, match="must exist"):
        tracking.track_sync(Config(), ["nothing"])
