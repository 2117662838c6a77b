"""Git reads a foreign repository's objects and obeys nothing that the repository, or a record, says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.runtime import git


def run(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def repository(folder: Path) -> tuple[Path, str, str]:
    """A repository with two commits of engine/a.py."""
    (folder / "engine").mkdir(parents=True)
    run(folder, "init", "-q")
    commits = []
    for number in range(2):
        (folder / "engine" / "a.py").write_text(f"VALUE = {number}\n")
        run(folder, "add", ".")
        run(folder, "commit", "-q", "-m", str(number))
        commits.append(run(folder, "rev-parse", "HEAD"))
    return folder, commits[0], commits[1]


def trap(folder: Path, marker: Path) -> None:
    """Configuration, attributes and hooks that run a program when git is asked almost anything here."""
    program = folder / "trap.sh"
    program.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    program.chmod(0o755)
    for key in (
        "diff.external",
        "core.fsmonitor",
        "core.pager",
        "diff.x.textconv",
        "diff.x.command",
        "tar.tar.command",
    ):
        run(folder, "config", key, str(program))
    run(folder, "config", "filter.x.smudge", str(program))
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "attributes").write_text("*.py diff=x filter=x\n")
    (folder / ".git" / "hooks").mkdir(exist_ok=True)
    for hook in ("post-checkout", "post-index-change", "reference-transaction"):
        (folder / ".git" / "hooks" / hook).write_text(program.read_text())
        (folder / ".git" / "hooks" / hook).chmod(0o755)


def test_objects_are_read_and_no_program_of_the_repository_runs(tmp_path) -> None:
    root, first, second = repository(tmp_path / "foreign")
    marker = tmp_path / "ran"
    trap(root, marker)
    objects = git.Objects([root], tmp_path)
    assert objects.has(first) and not objects.has("0" * 40)
    assert any("VALUE = 1" in line for line in objects.diff(first, second, ["engine"]) or ())
    objects.extract(first, tmp_path / "tree")
    assert (tmp_path / "tree" / "engine" / "a.py").read_text() == "VALUE = 0\n"
    assert not marker.exists()
    subprocess.run(["git", "-C", str(root), "diff", first, second], capture_output=True, check=False)
    assert marker.exists(), "the trap works: plain git in that repository springs it"


def test_a_linked_work_tree_and_a_path_with_a_colon_lend_their_objects(tmp_path) -> None:
    root, first, _ = repository(tmp_path / "with:colon and 'quote'")
    run(root, "worktree", "add", "-q", str(tmp_path / "linked"))
    for number, place in enumerate((root, tmp_path / "linked")):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        assert git.Objects([place], scratch).has(first)


@pytest.mark.parametrize("pointer", ["gitdir: /nowhere\n", "nonsense", "", "gitdir: \0\n", "gitdir: ../../../etc\n"])
def test_a_git_file_that_leads_nowhere_lends_nothing(tmp_path, pointer) -> None:
    (tmp_path / ".git").write_text(pointer)
    assert git.objects_folder(tmp_path) is None
    assert git.Objects([tmp_path], tmp_path).roots == []


@pytest.mark.parametrize(
    "commit", ["--output=/tmp/x", "HEAD", "", None, 7, ["a"], "0" * 39, "0" * 41, "G" * 40, "0" * 40 + "\n", "-" * 40]
)
def test_a_commit_is_forty_hex_digits_before_git_sees_it(tmp_path, commit) -> None:
    objects = git.Objects([], tmp_path)
    for read in (objects.has, lambda c: objects.extract(c, tmp_path / "t"), lambda c: objects.diff(c, c, ["."])):
        with pytest.raises(UserError, match="40 hex digits"):
            read(commit)


def test_variables_of_a_hook_that_called_us_do_not_turn_git_elsewhere(tmp_path, monkeypatch) -> None:
    root, _, second = repository(tmp_path / "own")
    other, _, _ = repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    assert git.query(root, "rev-parse", "HEAD") == f"{second}\n"
    (root / "engine" / "a.py").write_text("VALUE = 9\n")
    assert "+VALUE = 9" in git.patch(root)
    assert os.environ["GIT_DIR"]


def test_the_patch_of_a_tree_is_plain_whatever_its_attributes_say(tmp_path) -> None:
    root, _, _ = repository(tmp_path / "own")
    marker = tmp_path / "ran"
    trap(root, marker)
    (root / "engine" / "a.py").write_text("VALUE = 2\n")
    marker.unlink(missing_ok=True)
    run_filter = run(root, "config", "--unset", "filter.x.smudge")  # a user's own filter is theirs to have
    assert run_filter == "" and "+VALUE = 2" in git.patch(root) and not marker.exists()


def test_a_patch_that_climbs_out_or_does_not_fit_says_so(tmp_path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    climbing = "--- a/x\n+++ b/../../out.py\n@@ -0,0 +1 @@\n+x\n"
    for text in (climbing, "no patch at all", "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-1\n+2\n"):
        (tmp_path / "p.patch").write_text(text)
        assert git.apply_patch(tmp_path / "p.patch", tree)
    assert not list(tmp_path.glob("**/out.py"))


@pytest.mark.parametrize(
    ("program", "said"), [(None, "git must be installed"), ("sleep 30", "git must answer within 1 s")]
)
def test_a_git_that_is_not_there_or_does_not_answer_is_a_sentence(tmp_path, monkeypatch, program, said) -> None:
    root, _, _ = repository(tmp_path / "foreign")
    if program:
        (tmp_path / "git").write_text(f"#!/bin/sh\nexec {program}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(git, "QUERY_SECONDS", 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if program else str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=said):
        git.Objects([root], tmp_path)
    assert git.query(root, "rev-parse", "HEAD") is None
