"""All calls of git.

`query` runs git in the user's or the engine's work tree. Git never runs in a repository that is only named in a record,
because its configuration could name programs to run: its objects are read through an empty repository (`Objects`).
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError

QUERY_SECONDS, READ_SECONDS = 20, 120
_COMMIT = re.compile(r"[0-9a-f]{40}")
# No program named by a repository's attributes or configuration may run while it is read.
_QUIET = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_PLAIN_DIFF = ("--no-ext-diff", "--no-textconv")


def commit_id(text: Any) -> str:
    """The text, which must be 40 hex digits because it becomes an argument of git. Raises UserError."""
    if not isinstance(text, str) or not _COMMIT.fullmatch(text):
        raise UserError(f"a recorded commit must be 40 hex digits, found {str(text)[:80]!r}")
    return text


def query(folder: Path, *words: str) -> str | None:
    """Output of a git command in `folder`, a work tree of the user or the engine; None if it fails or git is missing."""
    try:
        done = _run([*_QUIET, "-C", str(folder), *words], QUERY_SECONDS, {"GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, UserError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def patch(folder: Path) -> str:
    """`git diff HEAD` of the tree at `folder`, empty when clean or outside git."""
    return query(folder, "diff", *_PLAIN_DIFF, "--binary", "HEAD") or ""


def apply_patch(patch: Path, tree: Path) -> str | None:
    """Apply a patch to a plain folder; returns the error, None on success."""
    # The ceiling keeps git from using a repository in a folder above.
    foreign = {**_NO_CONFIG, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    words = [*_QUIET, "-C", str(tree), "apply", "--whitespace=nowarn", "--", str(patch.resolve())]
    done = _run(words, READ_SECONDS, foreign)
    return (
        (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git apply failed"])[0]
        if done.returncode
        else None
    )


class Objects:
    """Commits and trees of local repositories, read without their configuration, hooks or attributes' programs."""

    def __init__(self, roots: Iterable[Path], scratch: Path) -> None:
        self.roots = [root for root in dict.fromkeys(roots) if objects_folder(root) is not None]
        self._repository = scratch / "objects.git"
        words = ["init", "--quiet", "--bare", "--template=", str(self._repository)]
        _run(words, QUERY_SECONDS, _NO_CONFIG, check=True)
        # A file with one folder per line, not an environment variable, which would be split at colons in paths.
        folders = [str(objects_folder(root)) for root in self.roots]
        (self._repository / "objects" / "info").mkdir(exist_ok=True)
        (self._repository / "objects" / "info" / "alternates").write_text("".join(f"{name}\n" for name in folders))

    def has(self, commit: str) -> bool:
        """Whether one of the repositories has the commit."""
        return self._read("cat-file", "-e", f"{commit_id(commit)}^{{commit}}").returncode == 0

    def extract(self, commit: str, folder: Path) -> None:
        """Write the files of a commit below a new folder. Raises UserError."""
        done = self._read("archive", "--format=tar", commit_id(commit))
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise UserError(f"git archive of {commit[:12]} failed: {said}")
        folder.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(folder, filter="data")

    def diff(self, first: str, other: str, paths: Sequence[str]) -> list[str] | None:
        """Lines of the diff of two commits below `paths`; None if one of them was not found."""
        words = ["diff", *_PLAIN_DIFF, "--stat", "--patch", commit_id(first), commit_id(other), "--", *paths]
        done = self._read(*words)
        return done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else None

    def _read(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return _run([*_QUIET, f"--git-dir={self._repository}", *words], READ_SECONDS, _NO_CONFIG)


# Ignore the configuration of the system and of the user.
_NO_CONFIG = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
}


def objects_folder(root: Path) -> Path | None:
    """The folder of a work tree's objects (of a linked work tree: those of its main one); None outside git."""
    place = root / ".git"
    try:
        if place.is_file():
            named = place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
            place = (root / named).resolve()
            common = place / "commondir"
            place = (place / common.read_text(encoding="utf-8").strip()).resolve() if common.is_file() else place
        found = (place / "objects").resolve()
        return found if found.is_dir() and "\n" not in str(found) else None
    except (OSError, UnicodeDecodeError, ValueError):
        return None


def _run(
    words: list[str], seconds: int, variables: dict[str, str], check: bool = False
) -> subprocess.CompletedProcess[bytes]:
    # Variables of a hook that started us (GIT_DIR, GIT_INDEX_FILE) would select another repository.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, timeout=seconds, check=check, env={**inherited, **variables}
        )
    except FileNotFoundError:
        raise UserError("git must be installed and on the PATH to read commits, found none") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"git must answer within {seconds} s, and does not: {' '.join(words)}") from None
