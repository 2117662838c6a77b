"""Fixtures of the whole suite. Nothing here reaches the network or a folder outside of a test's own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from engine import __main__ as shell
from engine import commands
from engine.config import compose
from engine.config.tree import Config
from engine.runtime.on_ray import cluster, pool

ROOT = Path(__file__).resolve().parents[1]

# A shell ignores SIGINT for what it runs in the background, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time: a red test stays red until its cause is mended.
hypothesis.settings.register_profile("engine", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("engine")


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes the same choices of the same files once in a process: it took a third of the time of tests that run
    commands. Overrides, resolution and checks are done each time. In `tests/config` Hydra composes each time too.
    """
    anew, kept = compose._compose_with_hydra, dict[str, Any]()

    @functools.wraps(anew)
    def composed(words: list[str], folders: list[Path]) -> Any:
        files = [(str(path), path.read_bytes()) for folder in folders[1:] for path in sorted(folder.rglob("*.yaml"))]
        key = repr((words, folders, files))
        if key not in kept:
            kept[key] = anew(words, folders)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_compose_with_hydra", composed)
        yield


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """The engine calls fsync, but in this process it does not wait for the disk, which took milliseconds for every file. Tests
    kill processes, not the machine; that files are flushed, and in which order, they see from the calls.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def caller() -> Iterator[tuple[str, list[Any]]]:
    """(address, who has called it) of a server on this machine."""
    calls: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            try:
                while True:
                    connection, who = server.accept()
                    calls.append(who)
                    connection.close()
            except OSError:
                return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where torch finds no GPU; it is asked only when there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from engine.training import device

    if not device.has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {device.why_no_gpu()}"))


class Outcome(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def directory(self) -> Path:
        """The run directory: the last line on stdout."""
        return Path(self.out.splitlines()[-1])


@pytest.fixture
def shared_data() -> Path:
    """Folder of example data that does not come with the project; tests that want it skip without it."""
    folder = Path(os.environ.get("ENGINE_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no shared data: set ENGINE_SHARED_DATA to its folder")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start commands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("train", "train.lr=1")`: the shell in this process, started in an empty folder."""

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        code = shell.main(list(words))
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def process(workplace: Path) -> Callable[..., Outcome]:
    """`process("train", ...)`: the shell as a program of its own."""

    def run(*words: str, timeout: float = 60, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "engine", *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`step(function)` puts a function in the place of the `train` step, so that the shell can be seen without data."""

    def put(function: Callable[..., dict[str, float]], command: str = "train") -> None:
        module = types.ModuleType("step_of_a_test")
        module.function = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        replaced = dataclasses.replace(commands.COMMANDS[command], target=f"{module.__name__}:function", check="")
        monkeypatch.setitem(commands.COMMANDS, command, replaced)

    yield put


@dataclasses.dataclass
class FakeRay:
    """What `cluster=ray` runs on in a test without Ray: this process. It takes the last item first, and dies when told to."""

    sessions: int = 0
    open: int = 0
    dead: bool = False

    @contextlib.contextmanager
    def session(self, _: Config) -> Iterator[cluster.Session]:
        self.sessions += 1
        self.open += 1
        try:
            yield cluster.Session("here", True, ["one"])
        finally:
            self.open -= 1

    def run_actors(self, make: Callable[[], Any], items: list[Any], *_: Any) -> Iterator[pool.Outcome[Any, Any]]:
        work = make()
        for item in reversed(items):
            yield pool.Outcome(item, None, 4, "it died") if self.dead else pool.Outcome(item, work(item), 1)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray that is this process."""
    fake = FakeRay()
    monkeypatch.setattr(cluster, "session", fake.session)
    monkeypatch.setattr(pool, "run_actors", fake.run_actors)
    return fake
