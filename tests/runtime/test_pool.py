"""Actors of the pool, called as Ray calls them: what goes wrong becomes a reply, and a try is counted when it begins."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.runtime import stall
from engine.runtime.on_ray.pool import Actors, _Actor, run_actors, run_threads

ROW = {"item": json.dumps({"n": 1})}


def marks_in(folder: Path) -> list[Path]:
    """Marks of starts and tries; not the signs of life."""
    return [path for path in folder.iterdir() if not path.name.lstrip(".").startswith("beat")]


def test_an_actor_that_cannot_start_says_what_is_to_be_mended(tmp_path: Path) -> None:
    def make() -> Callable[[Any], Any]:
        raise UserError("the store must be there, found nothing")

    reply = _Actor(make, (), 3, str(tmp_path), 3, 0o022)(ROW)
    assert reply["hopeless"] and reply["cause"] == "the store must be there, found nothing"
    assert not marks_in(tmp_path), "no item has lost a try"


def test_a_start_that_raises_is_no_death(tmp_path: Path) -> None:
    """Ray counts those, and tells the error itself."""

    def make() -> Callable[[Any], Any]:
        raise ValueError("no such layer")

    for _ in range(3):
        with pytest.raises(ValueError, match="no such layer"):
            _Actor(make, (), 3, str(tmp_path), 2, 0o022)
    assert not marks_in(tmp_path)


def test_starts_that_only_death_can_have_ended_are_finite(tmp_path: Path) -> None:
    """A start leaves its mark until it has come to an end: here the marks seen during starts stay, as after SIGKILL."""
    began: list[str] = []

    def make() -> Callable[[Any], Any]:
        began.extend(path.name for path in tmp_path.glob("start.*") if path.name not in began)
        return lambda _: {}

    for number in (1, 2):
        actor = _Actor(make, (), 3, str(tmp_path), 2, 0o022)
        assert len(began) == number and not actor(ROW)["hopeless"]
        assert not list(tmp_path.glob("start.*")), "a start that succeeds takes away the marks of those that did not"
        for name in began:
            (tmp_path / name).touch()
    reply = _Actor(make, (), 3, str(tmp_path), 2, 0o022)(ROW)
    assert len(began) == 2 and reply["hopeless"] and "starts failed" in reply["cause"]


def test_an_item_that_raises_has_all_its_tries_and_one_that_waited_at_a_dead_actor_has_lost_none(
    tmp_path: Path,
) -> None:
    began: list[Any] = []

    def make(error: type[BaseException]) -> Callable[[Any], Any]:
        def work(item: dict[str, Any]) -> dict[str, Any]:
            began.append(item["n"])
            raise error("a\nvalue")

        return work

    with pytest.raises(SystemExit):  # the actor dies at its first item; another one waits
        _Actor(lambda: make(SystemExit), (), 3, str(tmp_path), 3, 0o022)(ROW)
    second = _Actor(lambda: make(ValueError), (), 3, str(tmp_path), 3, 0o022)
    assert second(ROW)["tries"] == 3 and began == [1, 1, 1]
    reply = second({"item": json.dumps({"n": 2})})
    assert began == [1, 1, 1, 2, 2, 2] and reply["cause"] == "ValueError: a value" and not reply["hopeless"]


def test_threads_that_only_wait_end_the_work_with_what_they_are_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "_left", [])
    never = threading.Event()

    def work(item: dict[str, Any]) -> dict[str, Any]:
        if item["n"] == 2:
            never.wait()
        return item

    replies = []
    began = time.monotonic()
    with pytest.raises(stall.Stalled, match=r"1 threads did nothing but wait for \d+ s \(cluster.stall\), at {'n': 2}"):
        for outcome in run_threads(work, [{"n": n} for n in range(5)], 2, 1, stalled=1.0):
            replies.append(outcome.item["n"])
    assert sorted(replies) == [0, 1, 3, 4] and time.monotonic() - began < 30
    assert stall.is_left(), "the process ends without waiting for the thread"
    never.set()


def test_threads_that_work_for_longer_than_the_bound_go_on() -> None:
    def work(item: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            pass
        return item

    assert [outcome.result for outcome in run_threads(work, [{"n": 1}], 2, 1, stalled=0.5)] == [{"n": 1}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own
def test_a_stop_before_the_first_reply_leaves_nothing_behind_that_starts_ray_again(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    began, marks = tmp_path / "began", tmp_path / "marks"
    marks.mkdir()

    def make() -> Callable[[Any], Any]:
        def work(_: dict[str, Any]) -> dict[str, Any]:
            began.touch()
            time.sleep(600)
            return {}

        return work

    def stop() -> None:
        while not began.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    keys = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    ray.init(address="local", num_cpus=2, log_to_driver=False, **keys)
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            list(run_actors(make, [{"n": 1}], Actors(1, 1, 0.0, 20.0), 3, marks))
        assert "ray-data" not in [thread.name for thread in threading.enumerate()]
    finally:
        ray.shutdown()
    time.sleep(3)
    assert not ray.is_initialized()
