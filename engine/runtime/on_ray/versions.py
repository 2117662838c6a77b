"""Versions of engine, Python and packages on a node, and their comparison. This code is sent to the nodes, which may have
another engine or none: it imports only the standard library.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

# Packages that affect results; Ray itself rejects another version of Ray.
PACKAGES = ("torch", "numpy", "numba", "llvmlite", "pyarrow", "duckdb", "scipy", "ray", "safetensors")
PARTS = ("engine", "kernels", "conf")
COLUMNS = ("node", "package", "here", "there")


class Versions(TypedDict):
    """What a process would import; None for what is not installed. `digest` is of the engine's files."""

    python: str
    engine: str | None
    digest: str | None
    packages: dict[str, str | None]


class Difference(TypedDict):
    """A version that differs on a node."""

    node: str
    package: str
    here: str
    there: str


class Comparison(TypedDict, total=False):
    """Versions here and on every node, or nothing if they did not answer; `engine_uploaded`: it is uploaded with the job."""

    here: Versions
    nodes: dict[str, Versions]
    differences: list[Difference]
    engine_uploaded: bool


class ClusterRecord(Comparison):
    """`cluster` in run.json."""

    address: str


def here(packages: Sequence[str] = PACKAGES) -> Versions:
    """Versions that this process would import."""
    found: Versions = {"python": platform.python_version(), "engine": None, "digest": None, "packages": {}}
    folders = part_folders()
    if "engine" in folders:
        found["engine"] = _version(folders["engine"] / "__init__.py")
        found["digest"] = digest_of(folders)
    for name in packages:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    return found


def part_folders() -> dict[str, Path]:
    """The folders of the engine that this process would import, by part; empty without one."""
    spec = importlib.util.find_spec("engine")
    if spec is None or spec.origin is None:
        return {}
    return parts_below(Path(spec.origin).resolve().parent.parent)


def parts_below(root: Path) -> dict[str, Path]:
    """The parts of an engine in a folder: `conf` is beside `engine` in the repository, and inside it if installed."""
    inside = root / "engine" / "conf"
    return {
        "engine": root / "engine",
        "kernels": root / "kernels",
        "conf": inside if inside.is_dir() else root / "conf",
    }


def digest_of(folders: Mapping[str, Path]) -> str:
    """SHA-256 over the files of the engine and their names."""
    hasher = hashlib.sha256()
    for name, path in files_of(folders):
        hasher.update(f"{name}\0".encode())
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


def files_of(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """(name, path) of the Python and YAML files of the parts, in order.

    The names are those in the repository, also for an installed engine.
    """
    for part in PARTS:
        for path in sorted(folders[part].rglob("*")):
            name = path.relative_to(folders[part]).as_posix()
            if path.suffix in (".py", ".yaml") and not (part == "engine" and name.startswith("conf/")):
                yield f"{part}/{name}", path


def _version(path: Path) -> str | None:
    """`__version__` of a module, read without importing it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.partition("=")[2].strip().strip("\"'")
    return None


def of_nodes(ray: Any, seconds: float) -> dict[str, Versions]:
    """`here()` of every living node of the cluster that Ray is connected to, by the node's address and the start of its id.

    Raises Ray's error if a node does not answer in time.
    """
    affinity = importlib.import_module(f"{ray.__name__}.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    nodes = sorted((node["NodeManagerAddress"], node["NodeID"]) for node in ray.nodes() if node["Alive"])
    ask = ray.remote(num_cpus=0)(here)
    asked = [ask.options(scheduling_strategy=affinity(name, soft=False)).remote() for _, name in nodes]
    answers = ray.get(asked, timeout=seconds)
    return {f"{address} ({name[:8]})": answer for (address, name), answer in zip(nodes, answers, strict=True)}


# -------------------------------------------------------------------------------------------------- comparing


def differences(mine: Versions, nodes: Mapping[str, Versions]) -> Iterator[Difference]:
    """Each version that differs on a node."""
    for node, theirs in nodes.items():
        pairs = {"python": (mine["python"], theirs["python"]), "engine": (_engine(mine), _engine(theirs))}
        pairs |= {name: (version, theirs["packages"].get(name)) for name, version in mine["packages"].items()}
        for name, (one, other) in pairs.items():
            if one != other:
                lacks = "not installed"
                yield {"node": node, "package": name, "here": one or lacks, "there": other or lacks}


def _engine(facts: Versions) -> str | None:
    return f"{facts['engine']} ({facts['digest'][:12]})" if facts["digest"] else None


def record(mine: Versions, nodes: Mapping[str, Versions]) -> Comparison:
    """The record of versions in run.json: those here, those of every node, and the differences."""
    return {"here": mine, "nodes": dict(nodes), "differences": list(differences(mine, nodes))}


def stops(difference: Difference) -> bool:
    """Whether a difference forbids a start: one of the engine, or of Python's minor version."""
    one, other = difference["here"].split("."), difference["there"].split(".")
    return difference["package"] == "engine" or (difference["package"] == "python" and one[:2] != other[:2])


def table(differences: Sequence[Difference]) -> str:
    """The differences as lines of text."""
    lines = [COLUMNS, *((one["node"], one["package"], one["here"], one["there"]) for one in differences)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
