"""What is looked at before a job is sent, and how its end is read."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine
from engine.config import compose, schema
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime.on_ray import submit
from engine.runtime.run import Run


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder under git, with what must not be uploaded."""
    folder = tmp_path / "work"
    for name, size in {
        "a.py": 10,
        "big/data.bin": 5000,
        ".git/objects/x": 9000,
        ".venv/lib": 9000,
        "store/d": 9000,
        "runs/r": 9,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    monkeypatch.chdir(folder)
    return folder


def test_outputs_and_git_are_left_out_and_the_largest_entries_named(tree):
    """Field report H1."""
    files = submit.upload_files(tree)
    assert files == {"a.py": 10, "big/data.bin": 5000}
    assert submit.largest_entries(files) == [("big", 5000), ("a.py", 10)]


def test_what_git_ignores_is_left_out(tree):
    for folder in (".git", ".venv", "store", "runs"):
        subprocess.run(["rm", "-r", str(tree / folder)], check=True)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    (tree / ".gitignore").write_text("big/\n")
    assert set(submit.upload_files(tree)) == {"a.py", ".gitignore"}


SECRETS = [
    ".env", ".env.local", "prod.env", "sub/.ENV", "server.pem", "keys/tls.KEY", "id_rsa", "id_ed25519", "credentials",
    "credentials.json", "gcp-service-account-1.json", ".netrc", ".aws/config", "home/.ssh/known_hosts", ".kube/config",
    ".npmrc", ".pypirc", "secrets.yaml", ".git-credentials", "store.p12", "terraform.tfstate", ".pgpass", "secrets/db.txt",
]  # fmt: skip
KEPT = [
    "a.py",
    "secrets.py",
    ".env.example",
    "keys.csv",
    "environment.yaml",
    "tokenizer.json",
    "id_columns.txt",
    "keyboard.md",
]


@pytest.mark.parametrize("under_git", [True, False])
def test_files_that_hold_secrets_are_not_uploaded_and_named(tmp_path, monkeypatch, capsys, under_git) -> None:
    work = tmp_path / "work"
    for name in [*SECRETS, *KEPT]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    (tmp_path / "id_rsa").write_text("x")
    (work / "notes.txt").symlink_to(tmp_path / "id_rsa")
    if under_git:  # also what git tracks: somebody has committed it by mistake
        subprocess.run(["git", "init", "-q", str(work)], check=True)
        subprocess.run(["git", "-C", str(work), "add", "-f", "."], check=True)
    assert sorted(submit.upload_files(work)) == sorted(KEPT)
    assert sorted(submit.secret_files(work)) == sorted([*SECRETS, "notes.txt"])
    monkeypatch.chdir(work)
    monkeypatch.setattr(submit, "_connect", lambda _: (_ for _ in ()).throw(UserError("far enough")))
    with pytest.raises(UserError, match="far enough"):
        submit.submit(schema.build(Config, {}), ["train"])
    told = " ".join(capsys.readouterr().err.split())
    assert "not uploaded" in told and all(name in told for name in [*SECRETS, "notes.txt"])


def test_a_token_that_others_can_read_is_named_until_it_is_closed(tmp_path, monkeypatch, capsys) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "disabled" if name == "RAY_AUTH_MODE" else "")
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("f" * 64)
    token.chmod(0o644)
    submit._use_token()
    assert f"chmod 600 {token}" in capsys.readouterr().err.replace("\n", " ")
    token.chmod(0o600)
    submit._use_token()
    assert not capsys.readouterr().err


def test_a_file_that_holds_none_is_uploaded_once_it_is_renamed(tmp_path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    assert not submit.upload_files(tmp_path)
    (tmp_path / "ca.pem").rename(tmp_path / "ca.txt")
    assert list(submit.upload_files(tmp_path)) == ["ca.txt"]


def test_a_folder_that_is_too_large_is_refused_before_anything_is_sent(tree, monkeypatch):
    config = schema.build(Config, {"cluster": {"upload_limit": "1KB"}})
    monkeypatch.setattr(submit, "_connect", lambda _: pytest.fail("it connected"))
    with pytest.raises(UserError, match=r"at most cluster.upload_limit=1KB, found 2 files, 0.0 MB; largest: big"):
        submit.submit(config, ["train"])


@pytest.mark.parametrize(
    "word",
    [
        "tracking.api_key=abc",
        "+data.password=hunter2",
        "x.token=1",
        "data.path=s3://me:hunter2@h/x",
        "+monitor.alerts.a.to=https://hooks.example/T0/B0",
        "data.path=https://h/x?X-Amz-Signature=0123",
        "+data.sources.a.endpoint=http://me:hunter2@h/${oc.env:X}",
    ],
)
def test_a_secret_written_out_is_refused(word):
    with pytest.raises(UserError, match="looks like a secret"):
        submit.check_secrets(["train", word])


def test_a_secret_by_reference_is_passed_on():
    submit.check_secrets(["train", "tracking.api_key=${oc.env:WANDB_API_KEY}", "train.lr=1"])


def test_the_job_gets_absolute_paths_and_its_own_cluster(tree):
    config = schema.build(Config, {"paths": {"runs": "runs", "store": "a b"}, "data": {"path": "big"}})
    words = submit.entrypoint(config, ["train", "+experiment=x", "cluster.address=http://h:1", "paths.runs=runs"])
    assert words.startswith("python -m engine train +experiment=x ")
    assert "cluster.address" not in words and f"paths.runs={tree}/runs" in words and f"data.path={tree}/big" in words
    assert f"{tree}/a b" in words.replace("\\'", "").replace("'\"'\"'", "'")


@pytest.mark.parametrize("metadata", [{"pythonVersion": "3.11.9", "rayVersion": "2.60.0"}, None])
def test_versions_are_those_of_the_cluster_and_not_of_the_protocol(metadata):
    """A cluster without that part of the dashboard tells Ray's version alone."""
    answers = {
        "/api/version": {"version": "4", "ray_version": "2.60.0"},
        "/api/v0/cluster_metadata": {"data": metadata} if metadata else {},
    }

    class Client:
        def get_version(self) -> str:
            return "4"

        def _do_request(self, method: str, path: str) -> Any:
            return SimpleNamespace(json=lambda: answers[path])

    expected = {"ray": "2.60.0"} | ({"python": "3.11.9"} if metadata else {})
    assert submit.cluster_versions(Client()) == expected


def test_a_job_server_that_is_away_for_a_while_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    answers = iter(["one\n", ConnectionError("refused"), RuntimeError("500"), "one\ntwo\n"])

    class Client:
        def get_job_status(self, job: str) -> Any:
            self.log = next(answers, ConnectionResetError())
            if isinstance(self.log, Exception):
                raise self.log
            return SimpleNamespace(is_terminal=lambda: "two" in self.log)

        def get_job_logs(self, job: str) -> str:
            return self.log

    assert submit._follow(Client(), "job-1") == "one\ntwo\n" == capsys.readouterr().out
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"silent for 0.05 s \(ConnectionResetError\).*ray job status job-1"):
        submit._follow(Client(), "job-1")


def test_the_exit_code_is_that_of_the_runs_record(tmp_path):
    config = schema.build(Config, {"name": "x", "paths": {"runs": str(tmp_path)}})
    run = Run.create("train", config, schema.plain(config))
    log = f"some line\n{run.directory}\n"
    assert submit.exit_code(log, "SUCCEEDED") == 1
    run.finish({})
    assert submit.exit_code(log, "FAILED") == 0
    assert submit.exit_code("no directory\n", "SUCCEEDED") == 0 and submit.exit_code("", "FAILED") == 1


def test_commit_and_patch_reach_the_runs_record(tree, tmp_path, monkeypatch):
    for folder in (".git", ".venv", "store", "runs"):
        subprocess.run(["rm", "-r", str(tree / folder)], check=True)
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (tree / "a.py").write_text("changed\n")
    source = submit.record_source(tmp_path / "runs")
    config = schema.build(Config, {"name": "x", "paths": {"runs": str(tmp_path / "runs")}})
    run = Run.create("train", config, schema.plain(config))
    monkeypatch.setenv(submit.SOURCE_VARIABLE, str(source))
    submit.adopt_source(run)
    record = json.loads((run.directory / "run.json").read_text())
    assert len(record["submitted"]["git"]["commit"]) == 40 and record["submitted"]["patch"]
    assert "+changed" in (run.directory / "source.patch").read_text()
    run.finish({})


@pytest.mark.parametrize("config_dir", ["mine", ".", "elsewhere"])
def test_shell_api_and_job_agree_on_where_runs_lie(cli, step, workplace, tmp_path_factory, config_dir):
    """Of a folder of config in the working directory, of that directory itself, and of a folder elsewhere."""
    step(lambda config, run: {})
    folder = tmp_path_factory.mktemp("other") / "conf" if config_dir == "elsewhere" else workplace / config_dir
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / "own.yaml").write_text("# @package _global_\nname: own\n")
    words = ["train", "+experiment=own"]
    place = str(folder) if config_dir == "elsewhere" else config_dir
    by_shell = cli(*words, "--config-dir", place).directory.resolve()
    by_api = engine.run(*words, config_dir=place).directory.resolve()
    assert by_shell.parent == by_api.parent
    composed = compose.compose(words[1:], place)
    given = submit.with_config([*words, "--config-dir", place], workplace, "http://127.0.0.1:8265")
    job = shlex.split(submit.entrypoint(composed.config, given))
    assert f"paths.runs={by_shell.parents[2]}" in job and f"paths.store={by_shell.parents[2].parent}/store" in job
    assert (workplace / job[job.index("--config-dir") + 1]).resolve() == folder.resolve()


def test_a_config_folder_that_is_not_uploaded_is_refused(tmp_path):
    words = ["train", "--config-dir", "/somewhere/mine"]
    with pytest.raises(UserError, match=r"--config-dir must be in the working folder .*, found /somewhere/mine"):
        submit.with_config(words, tmp_path, "http://cluster:8265")
    assert submit.with_config(words, tmp_path, "http://localhost:8265") == words
    inside = ["train", "--config-dir", f"{tmp_path}/mine"]
    assert submit.with_config(inside, tmp_path, "http://cluster:8265") == ["train", "--config-dir", "mine"]
