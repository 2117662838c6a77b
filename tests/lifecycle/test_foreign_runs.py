"""A run directory that came from elsewhere chooses no program, no package source and no file: code in it needs trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import __main__ as shell
from engine.errors import UserError
from engine.lifecycle import reproduce, restore
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime import environment, trust
from tests.lifecycle.recorded import make_run, sha
from tests.lifecycle.test_reproduce import git, small_repository
from tests.runtime.test_git import trap


def foreign_run(folder: Path, **state: Any) -> tuple[Path, Path]:
    """(run, repository inside it): a run whose record names a repository in its own directory."""
    run = make_run(folder, "evil", chain={"weights": sha("a")})
    root = small_repository(run / "repository")
    record = json.loads((run / "run.json").read_text())
    commit = git(root, "rev-parse", "HEAD").strip()
    record["code"]["engine_git"] = {"root": str(root), "commit": commit, "dirty": False, **state}
    (run / "run.json").write_text(json.dumps(record))
    return run, root


@pytest.mark.parametrize("commit", ["--output=stolen.txt", "HEAD", ["x"], {"a": 1}, "0" * 41])
def test_no_commit_of_a_record_is_a_word_for_git(tmp_path, monkeypatch, capsys, commit) -> None:
    monkeypatch.chdir(tmp_path)
    run, _ = foreign_run(tmp_path, commit=commit)
    other = make_run(tmp_path, "other")
    record = json.loads((other / "run.json").read_text())
    record["code"] |= {"engine_digest": sha("f"), "engine_git": {"root": str(tmp_path), "commit": sha("1")[:40]}}
    (other / "run.json").write_text(json.dumps(record))
    assert shell.main(["compare", str(run), str(other)]) == 1
    said = "commit must be 40 hex digits" if isinstance(commit, str) else "commit must be text"
    assert said in capsys.readouterr().err
    assert shell.main(["reproduce", str(run)]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "stolen.txt").exists()


def test_the_configuration_of_a_repository_in_a_run_directory_runs_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run, root = foreign_run(tmp_path)
    (root / "engine" / "__init__.py").write_text("VALUE = 2\n")
    git(root, "commit", "-q", "-a", "-m", "second")
    record = json.loads((run / "run.json").read_text())
    other = make_run(tmp_path, "other")
    there = json.loads((other / "run.json").read_text())
    there["code"]["engine_git"] = {**record["code"]["engine_git"], "commit": git(root, "rev-parse", "HEAD").strip()}
    there["code"]["engine_digest"] = sha("f")
    (other / "run.json").write_text(json.dumps(there))
    trap(root, tmp_path / "ran")
    assert shell.main(["compare", str(run), str(other)]) == 0
    assert "+VALUE = 2" in capsys.readouterr().out
    assert shell.main(["reproduce", str(run)]) == 1  # it lists the code and asks for trust
    assert "trust=" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_code_that_the_store_has_not_recorded_runs_only_by_its_digest(tmp_path, monkeypatch) -> None:
    run, root = foreign_run(tmp_path, dirty=True)
    (root / "engine" / "__init__.py").write_text("VALUE = 3\n")
    (run / "engine.patch").write_text(git(root, "diff", "HEAD"))
    git(root, "checkout", "-q", "--", ".")
    ran: list[Path] = []
    monkeypatch.setattr(reproduce, "_run", lambda command, code, *_: ran.append(code.root) or "stopped")
    store = tmp_path / "store"
    with pytest.raises(UserError) as refused:
        reproduce_run(run, Options(store=store))
    text = str(refused.value)
    assert "engine/__init__.py" in text and "stored patch" in text and not ran
    digest = text.rpartition("trust=")[2]
    for wrong in (sha("0"), digest[:12], digest.upper()):
        with pytest.raises(UserError, match="trust="):
            reproduce_run(run, Options(store=store, trust=wrong))
    assert not ran
    with pytest.raises(UserError, match="could not be started"):
        reproduce_run(run, Options(store=store, trust=digest))
    trust.record(store, {"engine_digest": digest, "engine_version": "0", "engine_git": None})
    with pytest.raises(UserError, match="could not be started"):
        reproduce_run(run, Options(store=store))
    assert len(ran) == 2


def test_only_what_the_digest_covers_is_copied_to_where_the_rerun_imports_from(tmp_path) -> None:
    root = small_repository(tmp_path / "repository")
    for name in ("sitecustomize.py", "yaml.py", "engine/extra.so", "engine/__init__.pyc", "engine/page.j2"):
        (root / name).write_text("raise SystemExit\n")
    git(root, "add", "-f", ".")
    git(root, "commit", "-q", "-m", "more")
    record = {
        "code": {
            "engine_version": "0",
            "engine_digest": sha("0"),
            "engine_git": {"root": str(root), "commit": git(root, "rev-parse", "HEAD").strip()},
        }
    }
    code = restore.recorded_code(record, tmp_path, tmp_path / "scratch")
    found = sorted(str(path.relative_to(code.root)) for path in code.root.rglob("*") if path.is_file())
    assert found == ["conf/config.yaml", "conf/table.yaml", "engine/__init__.py", "kernels/__init__.py"]
    (root / "engine" / "link.py").symlink_to("/etc/hostname")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "link")
    record["code"]["engine_git"]["commit"] = git(root, "rev-parse", "HEAD").strip()
    with pytest.raises(Exception, match=r"link\.py"):
        restore.recorded_code(record, tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("packages", "python", "found"),
    [
        ({"./RUN/evil": "1"}, "3.12.1", "'./RUN/evil'"),
        ({"torch @ file:///evil": "1"}, "3.12.1", "torch @"),
        ({"torch": "2.0 --index-url=http://127.0.0.1:1"}, "3.12.1", "--index-url"),
        ({"torch": "2.0;python_version<'4'"}, "3.12.1", "python_version"),
        ({"torch": "file:///evil"}, "3.12.1", "file:"),
        ({"torch": ["2"]}, "3.12.1", r"\['2'\]"),
        ({"-r/etc/passwd": "1"}, "3.12.1", "-r/etc"),
        ({"leftpad": "1"}, "3.12.1", "leftpad"),
        ({"torch": "2.13.0"}, "/evil", "evil"),
        ({"torch": "2.13.0"}, 3, "'3'"),
    ],
)
def test_pip_is_given_names_that_runs_record_and_versions_by_their_grammar(
    tmp_path, monkeypatch, packages, python, found
) -> None:
    monkeypatch.setattr(restore.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    with pytest.raises(UserError, match=found):
        restore.build_environment({"environment": {"python": python, "packages": packages}}, tmp_path)


def test_every_recorded_package_of_this_environment_passes_the_grammar() -> None:
    assert [pin.partition("==")[0] for pin in restore.pins(environment.packages())] == list(environment.packages())
    assert list(restore.pins({"torch": "2.13.0+cpu", "numpy": "2.4.0rc1"})) == ["torch==2.13.0+cpu", "numpy==2.4.0rc1"]


def test_a_run_leaves_its_engine_in_the_store_and_a_name_cannot_climb(tmp_path) -> None:
    trust.record(tmp_path, environment.code())
    assert trust.is_recorded(tmp_path, environment.code()["engine_digest"])
    assert not trust.is_recorded(tmp_path, "")
    for digest in ("../../etc/passwd", "/etc/passwd"):
        with pytest.raises(UserError, match="must stay inside"):
            trust.is_recorded(tmp_path, digest)
