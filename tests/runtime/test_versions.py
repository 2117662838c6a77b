"""What nodes of a cluster have otherwise than here is told before anything is sent there, and recorded."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import environment
from engine.runtime.on_ray import cluster, ray_private, submit, versions
from engine.runtime.run import Run

ROOT = Path(__file__).resolve().parents[2]
HERE = {
    "python": "3.11.7", "engine": "1.0", "digest": "a" * 64,
    "packages": {"pyarrow": "25.0", "torch": "2.13", "numba": "0.66", "numpy": "2.4", "duckdb": "2.0"},
}  # fmt: skip
PACKAGES = tuple(HERE["packages"])


def other(**changes: Any) -> dict[str, Any]:
    """A node that differs from HERE in what is named."""
    found = copy.deepcopy(HERE)
    for name, value in changes.items():
        (found["packages"] if name in PACKAGES else found)[name] = value
    return found


STOPPING = [
    {"engine": "1.1", "digest": "b" * 64}, {"digest": "b" * 64}, {"engine": None, "digest": None}, {"python": "3.12.7"},
    {"python": "3.12.7", "pyarrow": "24.0"},
]  # fmt: skip
WARNING = [{"python": "3.11.9"}, *({name: value} for name in PACKAGES for value in ("0.1", None))]


# ---------------------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize("change", STOPPING)
def test_another_engine_or_minor_version_of_python_stops_with_a_table(change) -> None:
    rows = versions.record(HERE, {"10.0.0.1 (ab)": HERE, "10.0.0.2 (cd)": other(**change)})["differences"]
    with pytest.raises(UserError, match="must be the same here and on every node") as raised:
        cluster.check_versions(rows, pytest.fail)
    lines = str(raised.value).splitlines()
    assert lines[1].split() == ["node", "package", "here", "there"]
    assert all(line.startswith("10.0.0.2 (cd)") for line in lines[2:-1]) and len(lines) == 3 + len(rows)


@pytest.mark.parametrize("change", WARNING)
def test_another_package_or_patch_of_python_is_a_warning_with_a_table(change) -> None:
    said: list[str] = []
    cluster.check_versions(versions.record(HERE, {"n": other(**change)})["differences"], said.append)
    (name,) = change
    assert len(said) == 1 and name in said[0] and str(change[name] or "not installed") in said[0]


def test_equal_nodes_are_no_word() -> None:
    cluster.check_versions(versions.record(HERE, {"a": HERE, "b": HERE})["differences"], pytest.fail)


@given(
    changes=st.dictionaries(
        st.sampled_from((*PACKAGES, "python", "digest", "engine")), st.sampled_from(("3.11.7", "3.11.8", "4.0.0")), max_size=5
    )
)  # fmt: skip
def test_every_difference_is_one_row_and_only_code_stops(changes) -> None:
    node = other(**changes)
    rows = list(versions.differences(HERE, {"n": node}))
    differing = {name for name in PACKAGES if node["packages"][name] != HERE["packages"][name]}
    differing |= {"python"} if node["python"] != HERE["python"] else set()
    differing |= {"engine"} if (node["engine"], node["digest"]) != (HERE["engine"], HERE["digest"]) else set()
    assert sorted(row["package"] for row in rows) == sorted(differing)
    assert any(map(versions.stops, rows)) == ("engine" in differing or node["python"].startswith("4"))


def test_here_is_what_a_run_records() -> None:
    found, code = versions.here(), environment.code()
    assert (found["engine"], found["digest"]) == (code["engine_version"], code["engine_digest"])
    known = environment.packages()
    assert found["packages"]["numpy"] == known["numpy"] and found["packages"]["pyarrow"] == known["pyarrow"]


def test_the_digest_is_that_of_the_repository_where_the_choices_lie_inside_the_package(tmp_path) -> None:
    for part in versions.PARTS:
        shutil.copytree(ROOT / part, tmp_path / "repository" / part)
        inside = tmp_path / "installed" / ("engine/conf" if part == "conf" else part)
        shutil.copytree(ROOT / part, inside, dirs_exist_ok=True)
    digests = [versions.digest_of(versions.parts_below(tmp_path / name)) for name in ("repository", "installed")]
    assert digests == [environment.code()["engine_digest"]] * 2
    (tmp_path / "installed/engine/conf/config.yaml").write_text("name: other\n")
    assert versions.digest_of(versions.parts_below(tmp_path / "installed")) != digests[0]


# ------------------------------------------------------------------------------------------- sessions and jobs


@pytest.fixture
def joined(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """A cluster that is joined by address; `joined["nodes"]` says what its nodes have."""
    state: dict[str, Any] = {"nodes": {"n": HERE}, "asked": 0}

    def of_nodes(*_: Any) -> dict[str, Any]:
        state["asked"] += 1
        return state["nodes"]

    pickling = types.SimpleNamespace(register_pickle_by_value=lambda _: None, unregister_pickle_by_value=lambda _: None)
    ray = types.SimpleNamespace(
        init=lambda **_: types.SimpleNamespace(address_info={"gcs_address": "h:1"}),
        nodes=lambda: [{"NodeID": "x", "Alive": True}],
        cluster_resources=lambda: {"CPU": 64.0},
        shutdown=lambda: None,
        cloudpickle=pickling,
    )
    monkeypatch.setattr(cluster, "_import_ray", lambda _: ray)
    monkeypatch.setattr(ray_private, "may_form_clusters", lambda _: None)
    monkeypatch.setattr(cluster, "_knock", lambda _: None)
    monkeypatch.setattr(cluster, "_answers", {})
    monkeypatch.setattr(versions, "of_nodes", of_nodes)
    monkeypatch.setattr(versions, "here", lambda: HERE)
    state["config"] = schema.build(
        Config,
        {"name": "x", "cluster": {"kind": "ray", "address": "h:1", "workers": 2}, "paths": {"runs": str(tmp_path)}},
    )
    yield state


def test_a_session_with_nodes_of_another_engine_is_never_opened(joined) -> None:
    joined["nodes"] = {"n": other(digest="b" * 64, pyarrow="24.0")}
    run = Run.create("train", joined["config"], schema.plain(joined["config"]))
    with pytest.raises(UserError, match=r"engine .*1\.0 \(a{12}\) +1\.0 \(b{12}\)"), cluster.recorded(run):
        with cluster.session(joined["config"]):
            pytest.fail("it was opened")
    record = json.loads((run.directory / "run.json").read_text())["cluster"]
    assert {row["package"] for row in record["differences"]} == {"engine", "pyarrow"}
    assert record["nodes"]["n"]["packages"]["pyarrow"] == "24.0"


def test_a_session_with_other_packages_warns_once_and_is_recorded(joined, capfd) -> None:
    joined["nodes"] = {"n": other(pyarrow="24.0", python="3.11.9")}
    run = Run.create("train", joined["config"], schema.plain(joined["config"]))
    with cluster.recorded(run):
        for _ in range(2):
            with cluster.session(joined["config"]):
                pass
    assert (run.directory / "run.log").read_text().count("some packages differ") == 1 and joined["asked"] == 1
    record = json.loads((run.directory / "run.json").read_text())["cluster"]
    assert [row["package"] for row in record["differences"]] == ["python", "pyarrow"] and record["here"] == HERE
    with cluster.session(joined["config"]):  # outside of a run
        pass
    assert "pyarrow" in capfd.readouterr().err.split("some packages differ")[-1]


def test_a_run_that_goes_on_keeps_what_each_attempt_ran_on(joined, monkeypatch) -> None:
    run = Run.create("train", joined["config"], schema.plain(joined["config"]))
    with cluster.recorded(run), cluster.session(joined["config"]):
        pass
    run.fail(KeyboardInterrupt(), "interrupted")
    monkeypatch.setattr(cluster, "_answers", {})
    joined["nodes"] = {"n": other(torch="2.12")}
    again = Run.resume(run.directory)
    with cluster.recorded(again), cluster.session(joined["config"]):
        pass
    record = json.loads((run.directory / "run.json").read_text())
    assert record["cluster"]["differences"] == []
    assert [row["package"] for row in record["resumes"][-1]["cluster"]["differences"]] == ["torch"]


def test_a_local_cluster_is_not_asked(joined, monkeypatch) -> None:
    config = schema.build(Config, {"cluster": {"kind": "ray", "workers": 2}})
    monkeypatch.setattr(cluster, "_start_reaper", lambda _: None)
    with cluster.session(config):
        assert joined["asked"] == 0


class Jobs:
    """A job server whose nodes have what they are given."""

    def __init__(self, nodes: dict[str, Any], said: str | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.log = f"some line\n{submit.ANSWER}{json.dumps(nodes)}\n" if said is None else said

    def submit_job(self, **job: Any) -> str:
        self.sent.append(job)
        return f"job-{len(self.sent)}"

    def get_job_status(self, _: str) -> Any:
        return types.SimpleNamespace(is_terminal=lambda: True, value="SUCCEEDED")

    def get_job_logs(self, job: str) -> str:
        return self.log if job == "job-1" else ""


@pytest.fixture
def submitting(tmp_path, monkeypatch) -> Any:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "conf.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(versions, "here", lambda: HERE)
    monkeypatch.setattr(submit, "cluster_versions", lambda _: {})

    def run(jobs: Jobs) -> int:
        monkeypatch.setattr(submit, "_connect", lambda _: (jobs, "http://h:1"))
        return submit.submit(schema.build(Config, {"paths": {"runs": str(tmp_path / "runs")}}), ["train"])

    return run


def test_nothing_is_uploaded_to_a_cluster_with_another_engine(submitting, tmp_path) -> None:
    jobs = Jobs({"n": other(engine="2.0", digest="c" * 64)})
    with pytest.raises(UserError, match=r"2\.0 \(c{12}\)"):
        submitting(jobs)
    assert len(jobs.sent) == 1 and "runtime_env" not in jobs.sent[0] and not (tmp_path / "runs").exists()


def test_an_engine_that_travels_with_the_job_is_not_compared(submitting, tmp_path) -> None:
    (tmp_path / "work" / "engine").mkdir()
    (tmp_path / "work" / "engine" / "__init__.py").write_text("")
    assert submitting(Jobs({"n": other(engine=None, digest=None)})) == 0


def test_other_packages_warn_and_reach_the_runs_record(submitting, tmp_path, monkeypatch, capfd) -> None:
    jobs = Jobs({"n": other(numba="0.60")})
    assert submitting(jobs) == 0
    assert "0.60" in capfd.readouterr().err and len(jobs.sent) == 2
    source = jobs.sent[1]["runtime_env"]["env_vars"][submit.SOURCE_VARIABLE]
    monkeypatch.setenv(submit.SOURCE_VARIABLE, source)
    config = schema.build(Config, {"name": "x", "paths": {"runs": str(tmp_path / "runs")}})
    run = Run.create("train", config, schema.plain(config))
    submit.adopt_source(run)
    record = json.loads((run.directory / "run.json").read_text())["submitted"]["versions"]
    assert [row["package"] for row in record["differences"]] == ["numba"] and record["nodes"]["n"]["engine"] == "1.0"


def test_nodes_that_do_not_answer_are_a_warning(submitting, capfd) -> None:
    jobs = Jobs({}, said="ModuleNotFoundError: No module named 'ray'\n")
    assert submitting(jobs) == 0
    assert "did not answer; the last line was: ModuleNotFoundError" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- a real cluster


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def odd_head(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a real cluster of one node; what lies in the folder is imported there before all else."""
    pytest.importorskip("ray")
    first = tmp_path_factory.mktemp("first")
    (first / "pyarrow-0.0.1.dist-info").mkdir()
    (first / "pyarrow-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pyarrow\nVersion: 0.0.1\n"
    )
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    words = [
        sys.executable, "-m", "ray.scripts.scripts",
        "start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false",
        "--node-ip-address=127.0.0.1", f"--object-store-memory={100 * 2**20}", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(first), str(ROOT)]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    path = tmp_path_factory.mktemp("head") / "log"
    with open(path, "w") as log:
        process = subprocess.Popen(words, env=variables, stdout=log, stderr=log)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, path.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}", first
    process.terminate()
    process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_real_node_says_its_own_versions_and_stops_a_run_by_another_engine(
    odd_head, tmp_path, monkeypatch, capfd
) -> None:
    address, first = odd_head
    monkeypatch.chdir(tmp_path)  # Ray lets workers import from the driver's folder
    config = schema.build(Config, {"cluster": {"kind": "ray", "address": address, "workers": 1}})
    with cluster.session(config):
        pass
    said = capfd.readouterr().err
    assert "some packages differ" in said and "0.0.1" in said
    for part in ("engine", "kernels", "conf"):
        (first / part).mkdir()
    (first / "engine" / "__init__.py").write_text('__version__ = "9.9"\n')
    monkeypatch.setattr(cluster, "_answers", {})
    with pytest.raises(UserError, match=r"pyarrow +\S+ +0\.0\.1") as raised, cluster.session(config):
        pytest.fail("it was opened")
    assert "9.9 (" in str(raised.value)
