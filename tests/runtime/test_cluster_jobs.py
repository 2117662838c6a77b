"""A job on a cluster that `ray start --head` made: its run lands in the shared directory, with the local run's weights."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from engine.config import compose
from engine.errors import UserError
from engine.runtime.on_ray import submit
from tests import tiny

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a job's relative paths lead to."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the job server of a cluster started as people do."""
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "ENGINE_HOME": str(home)}
    words = [str(RAY), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    # Ray's job server gives a job the cluster that was started last in the same folder: other tests start some too.
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    words += [
        f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--dashboard-host=127.0.0.1",
        f"--object-store-memory={100 * 2**20}",
        f"--ray-client-server-port={free_port()}",
    ]
    log = open(tmp_path_factory.mktemp("head") / "log", "w")
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, Path(log.name).read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), timeout=5):
            break
        time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(60)
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder under git, with the tiny experiment, changed since its commit."""
    folder = tmp_path / "work"
    tiny.write_tiny(folder)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    with open(folder / "conf" / "experiment" / "tiny.yaml", "a") as file:
        file.write("# changed since\n")
    monkeypatch.chdir(folder)
    return folder


def local_weights(words: list[str], folder: Path) -> dict[str, str]:
    """The chain of the same command in this folder, in one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "engine", *words, f"paths.runs={folder / 'local'}"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads((Path(done.stdout.splitlines()[-1]) / "run.json").read_text())["chain"]


def run_directory(out: str) -> Path:
    """The last line of a job's log that is a path."""
    return Path(next(line for line in reversed(out.splitlines()) if line.startswith("/")))


def test_ray_job_submit_works_as_it_is(head, home, work):
    """The run lies where the job's relative paths lead to, not in the node-local copy that goes with the job."""
    words = ["train", "--config-dir", "conf", "+experiment=tiny", "data.path=.", "resources.threads=2"]
    expected = local_weights(words, work)
    job = [sys.executable, "-m", "engine", *words, "cluster=ray", "cluster.workers=2"]
    command = [str(RAY), "job", "submit", "--address", head, "--working-dir", ".", "--", *job]
    # A cluster that was started where Ray keeps a token asks for it; Ray's own client sends it only when told to.
    mode = {"RAY_AUTH_MODE": "token"} if Path("~/.ray/auth_token").expanduser().exists() else {}
    done = subprocess.run(command, env={**os.environ, **mode}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = run_directory(done.stdout)
    assert (directory / "DONE").exists() and directory.is_relative_to(home / "runs")
    assert json.loads((directory / "run.json").read_text())["chain"] == expected


def test_a_submitted_run_is_the_local_run(head, work, capfd, monkeypatch):
    words = ["train", "--config-dir", str(work / "conf"), *tiny.overrides(work)]
    expected = local_weights(words, work)
    config = compose.compose(tiny.overrides(work), str(work / "conf")).config
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    capfd.readouterr()
    code = submit.submit(config, [*words, "cluster=ray", "cluster.workers=2"])
    out = capfd.readouterr().out
    assert code == 0, out
    directory = run_directory(out)
    assert (directory / "DONE").exists() and directory.is_relative_to(work / "runs")
    record = json.loads((directory / "run.json").read_text())
    assert record["chain"] == expected
    commit = subprocess.run(["git", "-C", str(work), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["submitted"]["git"]["commit"] == commit.stdout.strip() and record["submitted"]["patch"]
    assert record["submitted"]["versions"]["nodes"] and not record["submitted"]["versions"]["differences"]
    assert record["cluster"]["nodes"] and not record["cluster"]["differences"]
    assert "+# changed since" in (directory / "source.patch").read_text()


def test_a_cluster_with_another_python_is_refused_before_the_upload(head, work, monkeypatch):
    monkeypatch.setattr(submit, "cluster_versions", lambda _: {"python": "3.1.4", "ray": "2.60.0"})
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    with pytest.raises(UserError, match="python must be the same here and on the cluster"):
        submit.submit(compose.compose([]).config, ["train"])


def test_the_cluster_says_its_versions(head):
    from ray.job_submission import JobSubmissionClient

    submit._use_token()
    found = submit.cluster_versions(JobSubmissionClient(head))
    assert found == {"python": platform.python_version(), "ray": metadata.version("ray")}
