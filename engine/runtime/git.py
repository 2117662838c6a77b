"""The one door to git.

`query` asks the tree of the user or of the engine. A repository that only a record names is never asked: its configuration
could name programs. Its objects alone are read, through an empty repository that borrows them (`Objects`).
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
# Nothing that a repository, its attributes or its configuration names may run while it is read.
_QUIET = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_PLAIN_DIFF = ("--no-ext-diff", "--no-textconv")


def commit_id(text: Any) -> str:
    """The text, which must be 40 hex digits. Raises UserError: a commit of a record goes to git as a word."""
    if not isinstance(text, str) or not _COMMIT.fullmatch(text):
        raise UserError(f"a recorded commit must be 40 hex digits, found {str(text)[:80]!r}")
    return text


def query(folder: Path, *words: str) -> str | None:
    """What git says of the tree at `folder`, which the user or the engine chose; None where it fails or is not there."""
    try:
        done = _run([*_QUIET, "-C", str(folder), *words], QUERY_SECONDS, {"GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, UserError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def patch(folder: Path) -> str:
    """`git diff HEAD` of the tree at `folder`, empty when clean or outside git."""
    return query(folder, "diff", *_PLAIN_DIFF, "--binary", "HEAD") or ""


def apply_patch(patch: Path, tree: Path) -> str | None:
    """Apply a patch to a plain folder; returns why it does not apply, None when it did."""
    # The ceiling keeps git from taking a repository further up for the patch's own.
    foreign = {**_NO_CONFIG, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    words = [*_QUIET, "-C", str(tree), "apply", "--whitespace=nowarn", "--", str(patch.resolve())]
    done = _run(words, READ_SECONDS, foreign)
    return (
        (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git apply failed"])[0]
        if done.returncode
        else None
    )


class Objects:
    """Commits and trees of repositories at hand, read without their configuration, hooks or attributes' programs."""

    def __init__(self, roots: Iterable[Path], scratch: Path) -> None:
        self.roots = [root for root in dict.fromkeys(roots) if objects_folder(root) is not None]
        self._repository = scratch / "objects.git"
        words = ["init", "--quiet", "--bare", "--template=", str(self._repository)]
        _run(words, QUERY_SECONDS, _NO_CONFIG, check=True)
        # A list in a file of our own, one folder a line: a path may hold the colon that a variable would split at.
        folders = [str(objects_folder(root)) for root in self.roots]
        (self._repository / "objects" / "info").mkdir(exist_ok=True)
        (self._repository / "objects" / "info" / "alternates").write_text("".join(f"{name}\n" for name in folders))

    def has(self, commit: str) -> bool:
        """Whether a repository at hand holds the commit."""
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
        """Lines of the diff of two commits below `paths`; None where one of them is not at hand."""
        words = ["diff", *_PLAIN_DIFF, "--stat", "--patch", commit_id(first), commit_id(other), "--", *paths]
        done = self._read(*words)
        return done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else None

    def _read(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return _run([*_QUIET, f"--git-dir={self._repository}", *words], READ_SECONDS, _NO_CONFIG)


# Of a foreign repository and its user nothing is read but objects.
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
    # Variables of a hook that called us (GIT_DIR, GIT_INDEX_FILE) would turn git to another repository.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, timeout=seconds, check=check, env={**inherited, **variables}
        )
    except FileNotFoundError:
        raise UserError("git must be installed and on the PATH to read commits, found none") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"git must answer within {seconds} s, and does not: {' '.join(words)}") from None
