"""Finds, lists, filters and sorts run directories, which are the only record of runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import nested
from engine.config.tree import Config
from engine.errors import UserError, nearest
from engine.runtime import records, terminal
from engine.runtime.registry import VersionRecord
from engine.runtime.run import RunRecord, load_metrics, records_below
from engine.runtime.terminal import table
from engine.training.bundle import find_model

FACTS = ("command", "name", "status", "started", "seconds")
HEADLINES = ("test/roc_auc", "test/accuracy", "test/rmse", "valid/roc_auc", "valid/accuracy", "valid/rmse")
COMPARISONS = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "!=": lambda a, b: a != b,
    "==": lambda a, b: a == b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    "=": lambda a, b: a == b,
    "~": lambda a, b: str(b) in str(a),
}
_CONDITION = re.compile(r"^\s*([^\s<>=!~]+)\s*(>=|<=|!=|==|=|>|<|~)\s*(.+?)\s*$")


def find_run(reference: str, runs: Path) -> Path:
    """The run directory that a path, an id (the last part of its path) or `name@alias` names. Raises UserError."""
    path = Path(reference)
    if (path / "run.json").is_file():
        return path.resolve()
    if "@" in reference:
        return run_of_model(find_model(reference, runs))
    if path.is_dir():
        raise UserError(f"{reference} must be a run directory, but has no run.json")
    found = [] if "/" in reference else [entry for entry in directories(runs) if entry.name.startswith(reference)]
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise UserError(f"{reference!r} must name one run, found {len(found)}: {', '.join(map(str, found[:5]))}")
    known = nearest(reference, (entry.name for entry in directories(runs))) if "/" not in reference else ""
    raise UserError(f"a run must be named by its directory, but {reference!r} does not exist.{known}")


def run_of_model(model: Path) -> Path:
    """The training run behind a bundle, or behind a registered copy of one. Raises UserError."""
    if (model.parent / "run.json").is_file():
        return model.parent.resolve()
    version = model.parent / "version.json"
    source = Path(records.read(version, VersionRecord).get("source", "")) if version.is_file() else Path()
    if (source / "run.json").is_file():
        return source.resolve()
    raise UserError(f"the training run of {model} was not found: name the run directory itself")


def directories(runs: Path) -> Iterator[Path]:
    """Every run directory below a folder, oldest first."""
    found = [path.parent for path in runs.glob("*/*/*/run.json")]
    yield from sorted(found, key=lambda path: path.name)


def summary(directory: Path, record: RunRecord) -> dict[str, Any]:
    """One flat record of a run: facts, resolved config with dotted names, metrics, and digests as `chain/<link>`."""
    flat: dict[str, Any] = {"id": directory.name, "directory": str(directory)}
    flat.update({name: record.get(name) for name in FACTS})
    flat["status"] = status(directory, record)
    flat["commit"] = ((record.get("code") or {}).get("engine_git") or {}).get("commit")
    flat.update(dict(nested.leaves(record.get("config") or {})))
    flat.update({f"chain/{link}": value for link, value in (record.get("chain") or {}).items()})
    flat.update({f"outputs/{name}": value for name, value in (record.get("outputs") or {}).items()})
    flat.update(load_metrics(directory))
    return flat


def status(directory: Path, record: RunRecord) -> str:
    """The status; `running` only while the recorded process is alive."""
    said = str(record.get("status"))
    if (directory / "DONE").exists() or said != "running":
        return said
    with contextlib.suppress(ProcessLookupError, PermissionError, TypeError):
        os.kill(record["pid"], 0)
        return said
    return "killed"


# ------------------------------------------------------------------------------------------------------- the list


def listing(runs: Path, where: str = "", sort: str = "") -> list[dict[str, Any]]:
    """Summaries of the runs that satisfy `where` (`KEY OP VALUE and ...`), by `sort`.

    `KEY` sorts the largest first, `-KEY` the smallest; without `sort` the newest comes first. Runs that lack the key
    come last. Raises UserError.
    """
    found = []
    for directory, record in records_below(directories(runs)):
        with contextlib.suppress(UserError):  # torn metrics
            found.append(summary(directory, record))
    names = {name for item in found for name in item}
    for name, compare, value in conditions(where):
        if found and name not in names:
            raise UserError(f"--where names {name!r}, which no run has.{nearest(name, names)}")
        found = [item for item in found if _holds(item.get(name), compare, value)]
    return sorted_by(found, sort, names)


def sorted_by(found: list[dict[str, Any]], sort: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """The summaries in the order of a key."""
    key, descending = sort.removeprefix("-") or "started", not sort.startswith("-")
    known = set(names)
    if sort and found and key not in known:
        raise UserError(f"--sort names {key!r}, which no run has.{nearest(key, known)}")
    having = [item for item in found if item.get(key) is not None]
    number = all(isinstance(item[key], (int, float)) for item in having)
    having.sort(key=lambda item: item[key] if number else str(item[key]), reverse=descending)
    return having + [item for item in found if item.get(key) is None]


def conditions(text: str) -> list[tuple[str, str, Any]]:
    """(key, operator, value) of each part of `test/roc_auc > 0.74 and command = train`. Raises UserError."""
    found = []
    for part in re.split(r"\s+and\s+", text.strip()) if text.strip() else []:
        match = _CONDITION.match(part)
        if not match:
            raise UserError(
                f"a condition must be KEY OP VALUE, OP one of {' '.join(COMPARISONS)}, joined by `and`, found {part!r}"
            )
        found.append((match.group(1), match.group(2), _value(match.group(3))))
    return found


def _value(text: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _holds(value: Any, compare: str, wanted: Any) -> bool:
    if value is None:
        return wanted is None and compare in ("=", "==")
    numbers = isinstance(value, (int, float)) and isinstance(wanted, (int, float))
    if not numbers and not isinstance(value, (list, dict)):
        value, wanted = str(value).lower() if isinstance(value, bool) else str(value), _text(wanted)
    return bool(COMPARISONS[compare](value, wanted))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def runs(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`engine runs [--where CONDITION] [--sort KEY] [--columns KEYS] [--limit N] [--json]`."""
    if words:
        raise UserError(f"runs takes options only, found {words[0]!r}: write --where 'KEY OP VALUE'")
    limit = options.get("--limit", "")
    if limit and not limit.isdigit():
        raise UserError(f"--limit must be a number of runs, found {limit!r}")
    found = listing(Path(config.paths.runs), options.get("--where", ""), options.get("--sort", ""))
    found = found[: int(limit)] if limit else found
    asked = [name.strip() for name in options.get("--columns", "").split(",") if name.strip()]
    columns = columns_of(found, asked, options.get("--where", ""), options.get("--sort", ""))
    if "--json" in options:
        shown = [{name: item.get(name) for name in ("directory", *asked)} if asked else item for item in found]
        terminal.out(json.dumps(shown) + "\n")
    else:
        terminal.out(
            table([*columns, "directory"], [[item.get(name) for name in (*columns, "directory")] for item in found])
        )
    return 0


def columns_of(found: Sequence[Mapping[str, Any]], asked: list[str], where: str, sort: str) -> list[str]:
    """The columns of the list: facts, keys of filter and sort, requested keys, and the headline metric."""
    names = {name for item in found for name in item}
    for name in asked:
        if found and name not in names:
            raise UserError(f"--columns names {name!r}, which no run has.{nearest(name, names)}")
    used = [name for name, _, _ in conditions(where)] + [sort.removeprefix("-")]
    headline = [name for name in HEADLINES if name in names][:1]
    return [name for name in dict.fromkeys([*FACTS, *used, *asked, *headline]) if name]
