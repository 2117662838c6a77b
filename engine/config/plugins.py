"""Plug-ins: Python files beside an experiment, `plugins: [features.py]`, whose functions and classes a config may name.

A file is known by the SHA-256 of its bytes. A resolved config names it with that digest (`features.py@3f2a...`), and so does
every name that the file defines (`double@3f2a...`): plans, views and models change with the code. `add` holds the code in this
process, by digest; it runs when one of its names is used for the first time. Whoever adds it decides that it may run:
the composer for the files of the user's own config, `engine.runtime.trust` for those of a model or a recorded run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import linecache
import re
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import UserError

FOLDER = "code"  # of a run and of a model: holds the files under their names
_PINNED = re.compile(r"(?P<name>[^@]+)@(?P<digest>[0-9a-f]{64})")
_HELD: dict[str, Plugin] = {}
_LOADING = threading.RLock()


@dataclass(frozen=True)
class Plugin:
    """A file of code: its path relative to the config folder, and its bytes."""

    file: str
    code: bytes

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the bytes."""
        return hashlib.sha256(self.code).hexdigest()

    @property
    def reference(self) -> str:
        """The file with its digest, as a resolved config has it."""
        return f"{self.file}@{self.digest}"

    @property
    def defined(self) -> dict[str, ast.stmt]:
        """Public names of the module's top level, with the statement that defines each; imports do not count."""
        found: dict[str, ast.stmt] = {}
        for node in ast.parse(self.code).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        return {name: node for name, node in found.items() if not name.startswith("_")}


def check_file(name: str) -> None:
    """Raise UserError unless a reference names a Python file below the config folder."""
    path = PurePosixPath(split(name)[0])
    if path.is_absolute() or ".." in path.parts or path.suffix != ".py" or "@" in path.name:
        raise UserError(f"must be a Python file in the folder of --config-dir, as in features.py, found {name!r}")


def split(reference: str) -> tuple[str, str | None]:
    """(name, digest) of `name@digest`; the digest is None where there is none."""
    match = _PINNED.fullmatch(reference)
    return (match["name"], match["digest"]) if match else (reference, None)


def read(folder: Path, reference: str) -> Plugin:
    """The file of a reference below a folder. Raises UserError where it is not there, not Python, or not of its digest."""
    check_file(reference)
    name, digest = split(reference)
    path = folder / name
    try:
        plugin = Plugin(name, path.read_bytes())
        tree = ast.parse(plugin.code)
    except OSError as error:
        raise UserError(
            f"plugins: {path} must be a readable file ({error.strerror}): name it as it lies there"
        ) from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"plugins: {path}{line} must be Python: {error}") from None
    if digest not in (None, plugin.digest):
        raise UserError(
            f"plugins: {path} must have the digest {digest}, found {plugin.digest}: another file, or an edited one"
        )
    for module in _imported(tree):
        there = path.parent if not module or _is_in(path.parent, module) else _place_not_installed(module)
        if there is not None:
            raise UserError(
                f"plugins: {path} must not import {module or 'relative to itself'}: a file in {there} is no part of its "
                "digest. Put the code into one file, or into an installed package"
            )
    return plugin


def _imported(tree: ast.Module) -> Iterator[str]:
    """First parts of the names of imported modules; empty for a relative import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name.split(".")[0] for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "" if node.level else (node.module or "").split(".")[0]


def _is_in(folder: Path, module: str) -> bool:
    return (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file()


def _place_not_installed(module: str) -> Path | None:
    """The current folder where a module would be imported from there; None where it is installed or not found.

    Python looks there first in a notebook and with `python -m engine`. The engine itself is in the record of every run.
    """
    here = Path.cwd()
    if module in ("engine", "kernels") or not (_is_in(here, module) or (here / module).is_dir()):
        return None
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # such as of a module that was put into sys.modules by hand
        return None
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
    inside = any(
        Path(place).is_relative_to(here / module) or Path(place) == here / f"{module}.py"
        for place in places
        if place is not None
    )
    return here if inside and not _is_installed_in(here, module) else None


def _is_installed_in(here: Path, module: str) -> bool:
    """Whether the current folder is where an installed package is, as with an editable install: it is found nowhere else."""
    elsewhere = [place for place in sys.path if place and Path(place).resolve() != here.resolve()]
    found = importlib.machinery.PathFinder.find_spec(module, elsewhere)
    return found is None and module in metadata.packages_distributions()


def pinned(reference: str, plugins: Sequence[Plugin]) -> str:
    """The name of a function or class with the digest of the file that defines it; unchanged where no file does.

    Raises UserError where two files define it, and where it has another digest already.
    """
    name, digest = split(reference)
    found = [plugin for plugin in plugins if name in plugin.defined]
    if len(found) > 1:
        raise UserError(
            f"{name!r} must be defined once, found it in {' and '.join(plugin.file for plugin in found)}: rename one"
        )
    if digest is not None and digest not in {plugin.digest for plugin in found}:
        there = f"{found[0].file} has the digest {found[0].digest}" if found else "no file of plugins defines it"
        raise UserError(f"{name!r} must be that of the code with digest {digest}, but {there}")
    return f"{name}@{found[0].digest}" if found else name


@functools.cache
def installed(group: str) -> dict[str, metadata.EntryPoint]:
    """What installed packages offer in an entry point group, by name."""
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


def version_of(name: str, group: str) -> str | None:
    """`entry_version` of what an installed package offers; None where none does."""
    entry = installed(group).get(name)
    return None if entry is None else entry_version(entry)


def entry_version(entry: metadata.EntryPoint) -> str:
    """`package==version:module:object:digest` of an entry point.

    The digest (16 hex digits) is that of the module's file: it changes with the code where the version does not, as with an
    editable install.
    """
    try:
        found = importlib.util.find_spec(entry.value.partition(":")[0])
        code = Path(found.origin).read_bytes() if found is not None and found.origin is not None else b""
    except (ImportError, OSError, ValueError):
        code = b""
    package = f"{entry.dist.name}=={entry.dist.version}:" if entry.dist else ""
    return f"{package}{entry.value}:{hashlib.sha256(code).hexdigest()[:16]}"


def add(plugins: Iterable[Plugin]) -> None:
    """Hold code in this process: from now on it may run."""
    _HELD.update((plugin.digest, plugin) for plugin in plugins)


def held() -> tuple[Plugin, ...]:
    """All code that may run in this process, for a worker that is to run it too."""
    return tuple(_HELD.values())


def named(references: Iterable[str]) -> tuple[Plugin, ...]:
    """The held files of a resolved config's `plugins`."""
    return tuple(of_digest(digest, name) for name, digest in map(split, references) if digest is not None)


def of_digest(digest: str, name: str) -> Plugin:
    """The held code of a digest. Raises UserError where there is none."""
    if digest not in _HELD:
        raise UserError(
            f"the code of {name!r} (digest {digest}) must be among plugins, but is not: name its file there, or use a model "
            "that carries it"
        )
    return _HELD[digest]


def load(reference: str) -> Any:
    """The function or class `name@digest`; the code runs the first time. Raises UserError."""
    name, digest = split(reference)
    plugin = of_digest(digest or "", name)
    with _LOADING:
        module = sys.modules.get(_module_name(plugin)) or _run(plugin)
    if not hasattr(module, name):
        raise UserError(f"plugins: {plugin.file} must define {name!r} when it has run, but has deleted it")
    return getattr(module, name)


def _module_name(plugin: Plugin) -> str:
    return f"engine_plugin_{plugin.digest}"


def _run(plugin: Plugin) -> types.ModuleType:
    module = types.ModuleType(_module_name(plugin))
    module.__file__ = place = f"<{plugin.file} {plugin.digest[:12]}>"
    text = plugin.code.decode("utf-8", "replace")
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)  # for tracebacks
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    try:
        exec(compile(plugin.code, place, "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[module.__name__]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise UserError(
            f"plugins: {plugin.file} must run when it is imported: {type(error).__name__}: {error}"
        ) from None
    return module
