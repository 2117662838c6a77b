"""A cluster that is started here answers its own processes only: its key-value store holds functions that workers unpickle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import schema
from engine.config.tree import Config
from engine.runtime import terminal
from engine.runtime.on_ray import cluster, ray_private

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray
WRITE = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_put(b"k", b"evil", True, b"fun", timeout=5)
    print("written")
except Exception as error:
    print("refused:", type(error).__name__, str(error)[:200])
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and an environment that says nothing of tokens."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(address: str, **variables: str | None) -> str:
    """What a client in a process of its own is answered; None takes a variable away."""
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", WRITE, address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"died: {done.stderr[-300:]}"


def test_a_client_without_the_token_is_refused_and_the_token_is_nowhere_on_disk(home, capfd) -> None:
    config = schema.build(Config, {"cluster": {"kind": "ray", "workers": 1}})
    with cluster.session(config) as session:
        token = os.environ["RAY_AUTH_TOKEN"]
        assert write(session.address) == "written"
        none = {"RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}
        for variables in (none, {"RAY_AUTH_TOKEN": None}, {"RAY_AUTH_TOKEN": "f" * 64}):  # the second: from ~/.ray
            assert write(session.address, **variables).startswith(("refused", "died")), variables
        logs = Path(ray._private.worker._global_node.get_session_dir_path())
        files = [*logs.rglob("*"), *home.rglob("*")]
        assert not [path for path in files if path.is_file() and token.encode() in path.read_bytes()]
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
        assert not [line for line in lines if token.encode() in line]
    assert token not in "".join(capfd.readouterr())
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & os.environ.keys()


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    found: list[str] = []
    monkeypatch.setattr(terminal, "err", found.append)
    cluster._say_once.cache_clear()
    yield found
    cluster._say_once.cache_clear()


def test_a_ray_without_tokens_is_used_with_one_warning(home, told, monkeypatch) -> None:
    monkeypatch.setattr(ray_private, "has_tokens", lambda: False)
    assert cluster._token_variables() == cluster._token_variables() == {}
    assert len(told) == 1 and "update Ray" in told[0]


def test_a_token_or_a_mode_of_the_users_own_is_kept(home, told, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "mine"))
    assert cluster._token_variables() == {"RAY_AUTH_MODE": "token"} and not told
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster._token_variables() == {}
    assert len(told) == 1 and "unset it" in told[0]
