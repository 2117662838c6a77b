"""`engine lineage PATH|DIGEST`: the runs that led to a file, model or alarm, and the runs that used it.

It reads run directories only: every run records the digests of its inputs (`inputs`, `model`) and of its results
(`chain`, `outputs`); two runs are related where they share a digest, or where one started the other
(`parent`: the trainings of a retrain, the trainings and windows of a backtest, which are in the store).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.runs import directories, status
from engine.runtime import digest, recorded_paths, records, seal, terminal
from engine.runtime.run import RunRecord, as_written, load_record, records_below
from engine.training.bundle import read_manifest

SHORTEST = 8
# Keys of a record that hold digests of other runs' results: a model (by its bundle), scores that a run appended to.
TAKEN_KEYS = ("model", "shadow", "champion", "challenger", "started_from", "appended_to")
# Keys of thresholds: of a monitoring run (its calibration) and of a retrain (its policy).
THRESHOLDS = (
    "lines", "alpha", "realised", "enough", "season", "floors", "psi_floor",
    "triggers", "drift_windows", "performance_drop", "max_age", "min_new_rows", "cool_down", "gate",
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One run with the digests of its inputs and results: name -> hex SHA-256."""

    directory: Path
    record: RunRecord
    took: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def names_of(self, value: str) -> list[str]:
        """The run's name of a digest."""
        return [name for name, known in {**self.took, **self.made}.items() if known == value]


def lineage(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """The command."""
    if len(words) != 1:
        raise UserError(f"lineage takes one path or digest, found {' '.join(words) or 'nothing'}")
    nodes = read_nodes(Path(config.paths.runs))
    found = lineage_of(words[0], nodes)
    terminal.out(json.dumps(found, indent=1) + "\n" if "--json" in options else as_text(found))
    return 0


def read_nodes(runs: Path) -> list[Node]:
    """Every run below a folder, oldest first, and the runs of backtests, which are in the store."""
    found = list(_nodes_below(runs))
    shared = {
        recorded_paths.store_of(node.record) / "backtest" for node in found if node.record["command"] == "backtest"
    }
    more = [node for folder in sorted(shared) for node in _nodes_below(folder)]
    return sorted([*found, *more], key=lambda node: node.directory.name)


def _nodes_below(runs: Path) -> Iterator[Node]:
    for directory, record in records_below(directories(runs)):
        yield node_of(directory.resolve(), record)


def node_of(directory: Path, record: RunRecord) -> Node:
    """One run directory as a node."""
    took = {f"input {name}": value for name, value in record.get("inputs", {}).items()}
    took |= {**record.get("used", {}), **dict(_taken(record))}
    made = {**record.get("chain", {}), **{f"output {name}": value for name, value in record.get("outputs", {}).items()}}
    return Node(directory, record, took, {name: value for name, value in made.items() if isinstance(value, str)})


def _taken(record: RunRecord) -> Iterator[tuple[str, str]]:
    for key in TAKEN_KEYS:
        value = record.get(key)
        if isinstance(value, str) and _is_digest(value, 64):
            yield key, value


def _is_digest(text: str, shortest: int = SHORTEST) -> bool:
    return len(text) >= shortest and all(letter in "0123456789abcdef" for letter in text)


# --------------------------------------------------------------------------------------------------------- the answer


def lineage_of(reference: str, nodes: Sequence[Node]) -> dict[str, Any]:
    """The meaning of a path or digest, the runs before and after it, as JSON. Raises UserError."""
    path = Path(reference)
    if path.exists():
        what, digests, own = _of_path(path.resolve(), nodes)
    elif _is_digest(reference):
        digests = sorted(
            {v for node in nodes for v in (*node.took.values(), *node.made.values()) if v.startswith(reference)}
        )
        if not digests:
            raise UserError(
                f"no run took or made anything with digest {reference}; is paths.runs the folder of your runs?"
            )
        what, own = "digest", []
    else:
        raise UserError(
            f"lineage takes a path that exists or at least {SHORTEST} letters of a hex digest, found {reference!r}"
        )
    makers = own or _makers(digests, nodes)
    # A run counts with all its results; a digest counts alone.
    users = [] if own else [node for node in nodes if node not in makers and _uses(node, set(digests))]
    up = _walk(makers, nodes, _came_from)
    down = _walk(own or users, nodes, _led_to)
    return {
        "of": reference,
        "is": what,
        "digests": {value: sorted({name for node in nodes for name in node.names_of(value)}) for value in digests},
        "made_by": [describe(node) for node in up],
        "used_by": [describe(node) for node in down if node not in up],
    }


def _of_path(path: Path, nodes: Sequence[Node]) -> tuple[str, list[str], list[Node]]:
    """(description, digests, run) of a file or folder."""
    for folder in (path, *path.parents):
        if (folder / "run.json").is_file():
            own = next((node for node in nodes if node.directory == folder), None) or node_of(
                folder, load_record(folder)
            )
            inside = path.relative_to(folder).as_posix()
            return f"{inside} of a {own.record['command']} run" if inside != "." else "run", [], [own]
        if (folder / "manifest.json").is_file():
            manifest = records.read(seal.sealed(folder, "manifest.json", "Run the command that made it again"), Stored)
            if "digest" in manifest:
                return f"{'view' if 'view' in manifest else 'dataset'} in the store", _with_parents(manifest, nodes), []
        if (folder / "bundle.json").is_file():
            return "model", [read_manifest(folder)["digest"]], []
    if path.is_file():
        return "file", [digest.of_file(path)], []
    raise UserError(f"{path} must be a file, a run, a model or an entry of the store")


class Stored(TypedDict, total=False):
    """The part of a manifest.json that lineage reads: of a dataset, a view or a checkpoint."""

    digest: records.Digest
    view: str
    dataset: dict[str, Any] | str


def _with_parents(manifest: Stored, nodes: Sequence[Node]) -> list[str]:
    """The digest of an entry of the store; runs record a view by its dataset: the chain has one link for all views."""
    known = {value for node in nodes for value in node.made.values()}
    own, dataset = str(manifest["digest"]), manifest.get("dataset")
    parent = str(dataset.get("digest", "")) if isinstance(dataset, dict) else ""
    return [value for value in (own, parent) if value and (value == own or own not in known)]


def _makers(digests: Sequence[str], nodes: Sequence[Node]) -> list[Node]:
    """For each digest the first run that made it; later runs found it in the store."""
    found = []
    for value in digests:
        made = [node for node in nodes if value in node.made.values()]
        if made and made[0] not in found:
            found.append(made[0])
    return found


def _uses(node: Node, digests: set[str]) -> bool:
    return bool(digests & {*node.took.values(), *node.made.values()})


def _came_from(node: Node, nodes: Sequence[Node]) -> list[Node]:
    """The runs that made this run's inputs (the first, where several report one), and the run that started it."""
    sources = [other for other in nodes if str(other.directory) == str(parent_of(node))]
    for name, value in {**node.took, **{k: v for k, v in node.made.items() if k in ("dataset", "features")}}.items():
        made = [other for other in nodes if value in other.made.values() and not name.startswith("input ")]
        if made and made[0] is not node and made[0] not in sources and _before(made[0], node):
            sources.append(made[0])
    return sources


def _led_to(node: Node, nodes: Sequence[Node]) -> list[Node]:
    """The runs that used this run's results."""
    return [other for other in nodes if other is not node and node in _came_from(other, nodes)]


def parent_of(node: Node) -> Path | None:
    """The run that started this one."""
    parent = node.record.get("parent")
    return recorded_paths.recorded_path(node.record, parent).resolve() if parent else None


def _before(first: Node, second: Node) -> bool:
    return str(first.record.get("started")) <= str(second.record.get("started"))


def _walk(start: Sequence[Node], nodes: Sequence[Node], follow: Any) -> list[Node]:
    """The nodes reached from `start`, nearest first."""
    found, waiting = list(start), list(start)
    while waiting:
        for node in follow(waiting.pop(0), nodes):
            if node not in found:
                found.append(node)
                waiting.append(node)
    return found


def describe(node: Node) -> dict[str, Any]:
    """Code, data, features, weights and thresholds from a run's record."""
    record, code = node.record, node.record["code"]
    state = code.get("engine_git") or {}
    found: dict[str, Any] = {
        "run": str(node.directory),
        "command": record["command"],
        "status": status(node.directory, record),
        "started": record.get("started"),
        "code": {
            "engine_version": code["engine_version"],
            "engine_digest": code["engine_digest"],
            "commit": state.get("commit"),
            "uncommitted": bool(state.get("dirty")),
        },
        "plan": record.get("plan"),
        "inputs": record.get("inputs", {}),
        "chain": record.get("chain", {}),
        "outputs": record.get("outputs", {}),
        "views": record.get("views", {}),
        "used": {**record.get("used", {}), **dict(_taken(record))},
        **dict(_taken(record)),
    }
    thresholds = _thresholds(node.directory)
    return {
        **found,
        **({"alarms": record["alarms"]} if record.get("alarms") else {}),
        **({"thresholds": thresholds} if thresholds is not None else {}),
    }


def _thresholds(directory: Path) -> Any:
    """Thresholds of a run: alarm line and effect floors of monitoring; triggers and gate of a decision."""
    for name, part in (("drift.json", "calibration"), ("decision.json", "policy")):
        if (directory / name).is_file():
            content = records.read(as_written(directory, name), dict[str, Any]).get(part)
            return (
                {key: content[key] for key in THRESHOLDS if key in content} or None
                if isinstance(content, dict)
                else None
            )
    return None


def as_text(found: Mapping[str, Any]) -> str:
    """The answer as text."""
    lines = [f"{found['of']}: {found['is']}"]
    lines += [
        f"  {value[:16]}  {', '.join(names) or 'not named by any run'}" for value, names in found["digests"].items()
    ]
    for title, entries in (("made by", found["made_by"]), ("used by", found["used_by"])):
        lines += ["", f"{title}:" + ("" if entries else " nothing recorded in these runs")]
        for entry in entries:
            lines += _entry_lines(entry)
    return "\n".join(lines) + "\n"


def _entry_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    code = entry["code"]
    commit = (
        f", commit {code['commit'][:12]}{' with uncommitted changes' if code['uncommitted'] else ''}"
        if code["commit"]
        else ""
    )
    yield f"  {entry['command']}  {entry['run']}  ({entry['status']}, {str(entry['started'])[:19]})"
    yield f"    code      engine {code['engine_version']} {code['engine_digest'][:12]}{commit}"
    for name, value in entry["inputs"].items():
        yield f"    input     {value[:12]}  {name}"
    for name, value in entry["used"].items():
        yield f"    took      {value[:12]}  {name}"
    shown = {name: value for name, value in entry["chain"].items() if not name.startswith("loss@")}
    for name, value in {**shown, **{f"-> {name}": value for name, value in entry["outputs"].items()}}.items():
        yield f"    {name:<9} {value[:12]}"
    for alarm in entry.get("alarms", ()):
        yield f"    alarm     {alarm}"
    for name, value in entry.get("thresholds", {}).items():
        yield f"    threshold {name} = {json.dumps(value)}"
