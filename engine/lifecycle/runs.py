"""Finds, lists, filters and sorts run directories, which are the only record of runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config import nested
from engine.config.tree import Config
from engine.data import expressions
from engine.errors import UserError, nearest
from engine.runtime import records, terminal
from engine.runtime.registry import VersionRecord
from engine.runtime.run import RunRecord, load_metrics, records_below
from engine.runtime.terminal import table
from engine.training.bundle import find_model

Summary = dict[str, Any]  # of a run, flat: facts, keys of the config, metrics, digests
FACTS = ("command", "name", "status", "started", "seconds")
HEADLINES = ("test/roc_auc", "test/accuracy", "test/rmse", "valid/roc_auc", "valid/accuracy", "valid/rmse")
# A text or name in quotes, or a word that may be a key without them; not the name of a function.
_WORD = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.])[A-Za-z_][\w./@]*(?![\w./@]|\s*\()""")


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


def summary(directory: Path, record: RunRecord) -> Summary:
    """One flat record of a run: facts, resolved config with dotted names, metrics, and digests as `chain/<link>`."""
    flat: Summary = {"id": directory.name, "directory": str(directory)}
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


def summaries(runs: Path) -> list[Summary]:
    """Summaries of the runs below a folder, without those whose files are damaged."""
    found = []
    for directory, record in records_below(directories(runs)):
        with contextlib.suppress(UserError):  # torn metrics
            found.append(summary(directory, record))
    return found


def sorted_by(found: list[Summary], sort: str, names: Collection[str]) -> list[Summary]:
    """The summaries in the order of a key: `KEY` puts the largest first, `-KEY` the smallest, none the newest.

    Runs that lack the key come last. Raises UserError for a key that no run has.
    """
    key, descending = sort.removeprefix("-") or "started", not sort.startswith("-")
    if sort:
        _check_key("--sort", key, names)
    having = [item for item in found if item.get(key) is not None]
    number = all(isinstance(item[key], (int, float)) for item in having)
    having.sort(key=lambda item: item[key] if number else str(item[key]), reverse=descending)
    return having + [item for item in found if item.get(key) is None]


def satisfying(found: list[Summary], where: str, names: Collection[str]) -> tuple[list[Summary], list[str]]:
    """(runs for which an SQL condition is true, keys that it reads): `test/roc_auc > 0.74 AND command = 'train'`.

    Raises UserError for a key that no run has, and for anything but a condition over one run.
    """
    if not where.strip() or not names:
        return found, []
    sql = _with_quotes(where, names)
    keys = list(expressions.expression_columns(sql, "--where"))
    for key in keys:
        _check_key("--where", key, names, f" A text is written in single quotes: '{key}'.")
    rows = pa.table({key: _column([item.get(key) for item in found]) for key in keys or ["id"]})
    asked = {"holds": (sql, "bool"), "kind": (f"typeof({sql})", "string")}
    holds, kind = expressions.evaluate(asked, rows, "--where").columns
    if kind[0].as_py() != "BOOLEAN":
        raise UserError(f"--where must be a condition such as train.lr < 0.1, found {kind[0].as_py()} from {where!r}")
    return [item for item, keep in zip(found, holds.to_pylist(), strict=True) if keep], keys


def _with_quotes(where: str, names: Collection[str]) -> str:
    """The condition with its keys in double quotes, which SQL needs around a key with a dot or slash."""

    def word(match: re.Match[str]) -> str:
        text = match[0]
        if text[0] not in "'\"" and re.search("[./]", text) and re.split("[./]", text)[0] not in names:
            _check_key("--where", text, names)
        return f'"{text}"' if text in names else text

    if re.search(r"=\s*null\b", where, re.IGNORECASE):
        raise UserError(f"--where must ask for a missing value by IS NULL or IS NOT NULL, found {where!r}")
    return _WORD.sub(word, where)


def _check_key(option: str, name: str, names: Collection[str], advice: str = "") -> None:
    if names and name not in names:
        raise UserError(f"{option} names {name!r}, which no run has.{nearest(name, names)}{advice}")


def _column(values: list[Any]) -> pa.Array:
    """The values of a key; as texts where runs have different types of them."""
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def runs(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """`engine runs [--where CONDITION] [--sort KEY] [--columns KEYS] [--limit N] [--json]`."""
    if words:
        raise UserError(f"runs takes options only, found {words[0]!r}: write --where 'CONDITION'")
    limit = options.get("--limit", "")
    if limit and not limit.isdigit():
        raise UserError(f"--limit must be a number of runs, found {limit!r}")
    found = summaries(Path(config.paths.runs))
    names = {name for item in found for name in item}
    found, keys = satisfying(found, options.get("--where", ""), names)
    sort = options.get("--sort", "")
    found = sorted_by(found, sort, names)[: int(limit) if limit else None]
    asked = [name.strip() for name in options.get("--columns", "").split(",") if name.strip()]
    for name in asked:
        _check_key("--columns", name, names)
    if "--json" in options:
        shown = [{name: item.get(name) for name in ("directory", *asked)} if asked else item for item in found]
        terminal.out(json.dumps(shown) + "\n")
        return 0
    headline = [name for name in HEADLINES if any(name in item for item in found)][:1]
    used = [name for name in (*keys, sort.removeprefix("-"), *asked, *headline) if name]
    columns = list(dict.fromkeys([*FACTS, *used, "directory"]))
    terminal.out(table(columns, [[item.get(name) for name in columns] for item in found]))
    return 0
