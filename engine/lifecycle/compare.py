"""`engine compare RUN RUN ...`: compares runs by their directories: code, config, data, environment, metrics, cost."""

from __future__ import annotations

import difflib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from engine.config import nested
from engine.config.sections.training import RESERVED
from engine.config.tree import Config
from engine.data.dataset import MANIFEST, REMEDY, DatasetRecord
from engine.data.profile import ColumnProfile, Histogram, ProfileRecord
from engine.errors import UserError
from engine.lifecycle.restore import Difference, environment_differences
from engine.lifecycle.runs import find_run, status
from engine.lifecycle.sweep_record import compared_runs, is_sweep
from engine.runtime import environment, git, recorded_paths, records, seal, storage, terminal
from engine.runtime.reports import html
from engine.runtime.run import RunRecord, as_written, load_metrics, load_record
from engine.runtime.terminal import cell, table
from engine.runtime.tracking import read_points
from kernels.statistics import js_of

DATA_LINKS = ("inputs", "dataset", "features", "fitted")
DIFF_LINES = 80
WHERE_FILES_GO = ("paths",)
NOTHING = {"metrics": "none measured"}  # text of a part without rows; of the others it is "the same"
# Figures of the machine and the time of the run, not of the model.
COST = ("_seconds", "_per_second", "/seconds", "_bytes")


@dataclass(frozen=True)
class Side:
    """One of the compared runs."""

    directory: Path
    record: RunRecord
    metrics: dict[str, float | None]

    @property
    def label(self) -> str:
        """Its id."""
        return self.directory.name


class DataPart(TypedDict, total=False):
    """How data differs: by name the value of each run; the profile distances of columns from the first run."""

    digests: dict[str, list[Any]]
    inputs: dict[str, list[Any]]
    rows: list[int]
    schema: dict[str, list[Any]]
    columns: list[str]
    profile_distance: list[dict[str, float]]


class MetricRow(TypedDict):
    """A metric of each run, and its difference from the first."""

    metric: str
    values: list[float | None]
    intervals: list[list[float] | None]
    difference: list[float | None]
    intervals_overlap: list[bool | None]


class CostRow(TypedDict):
    """A figure of each run."""

    figure: str
    values: list[float | None]


class Comparison(TypedDict):
    """Everything that differs; where a value is a list, it has an item for each run."""

    runs: list[dict[str, str]]
    config: dict[str, list[Any]]
    code: dict[str, list[Any]]
    data: DataPart
    environment: list[list[Difference]]
    chain: dict[str, list[Any]]
    metrics: list[MetricRow]
    cost: list[CostRow]


def compare(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """The command. A sweep means its best configs, after the config without the search, each with the same seed."""
    found = [find_run(name, Path(config.paths.runs)) for name in words]
    runs = [run for one in found for run in (compared_runs(one) if is_sweep(one) else [one])]
    if len(found) == len(runs) == 1 and is_sweep(found[0]):
        said = f"The search found nothing better than the config without it, {runs[0]}: there are no two runs to compare.\n"
        terminal.out(json.dumps(compare_runs([read_side(runs[0])]), indent=1) + "\n" if "--json" in options else said)
        return 0
    if len(runs) < 2:
        raise UserError(f"compare takes two runs or more, or a sweep, found {len(runs)}")
    compared = compare_runs(sides := [read_side(run) for run in runs])
    if "--html" in options:
        storage.write_text(Path(options["--html"]), as_html(compared, sides))
    terminal.out(json.dumps(compared, indent=1) + "\n" if "--json" in options else as_text(compared))
    return 0


def read_side(directory: Path) -> Side:
    """The record and the metrics of a run."""
    return Side(directory, load_record(directory), load_metrics(directory))


def compare_runs(sides: Sequence[Side]) -> Comparison:
    """Everything that differs, as JSON. The others are compared with the first run."""
    return {
        "runs": [
            {
                "id": side.label,
                "directory": str(side.directory),
                "command": side.record["command"],
                "name": side.record["name"],
                "status": status(side.directory, side.record),
            }
            for side in sides
        ],
        "config": config_differences(sides),
        "code": code_differences(sides),
        "data": data_differences(sides),
        "environment": [
            environment_differences(sides[0].record["environment"], side.record["environment"]) for side in sides[1:]
        ],
        "chain": chain_differences(sides),
        "metrics": metric_rows(sides),
        "cost": cost_rows(sides),
    }


def _differing(maps: Sequence[Mapping[str, object]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for values in maps for name in values)
    rows = {name: [values.get(name) for values in maps] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row[1:])}


def config_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Dotted key -> value in each run, of the keys that differ; paths do not count."""
    found = _differing([dict(nested.leaves(side.record.get("config") or {})) for side in sides])
    return {name: row for name, row in found.items() if name.split(".")[0] not in WHERE_FILES_GO}


def chain_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Link -> digest in each run, of the links that differ."""
    return _differing([side.record.get("chain") or {} for side in sides])


# ------------------------------------------------------------------------------------------------------------- code


def code_differences(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Version, commit and a diff; empty where the digests of the engine's files are equal."""
    codes = [side.record["code"] for side in sides]
    if len({code["engine_digest"] for code in codes}) == 1:
        return {}
    commits = [(code.get("engine_git") or {}).get("commit") for code in codes]
    facts = [
        {"engine_version": code["engine_version"], "engine_digest": code["engine_digest"][:12], "commit": commit}
        for code, commit in zip(codes, commits, strict=True)
    ]
    return {**_differing(facts), "diff": [_diff(sides[0], side) for side in sides[1:]]}


def _diff(first: Side, other: Side) -> list[str]:
    """Lines of `git diff` between the commits where git has both, then of uncommitted changes."""
    states = [side.record["code"].get("engine_git") or {} for side in (first, other)]
    lines: list[str] = []
    commits = [state.get("commit") for state in states]
    if all(commits) and commits[0] != commits[1]:
        lines += _diff_of_commits([str(state.get("root") or ".") for state in states], commits)
    names = [f"uncommitted in {side.label}" for side in (first, other)]
    lines += difflib.unified_diff(_patch(first), _patch(other), names[0], names[1], lineterm="", n=1)
    more = len(lines) - DIFF_LINES
    return lines[:DIFF_LINES] + ([f"... and {more} lines more"] if more > 0 else [])


def _diff_of_commits(roots: Sequence[str], commits: Sequence[Any]) -> list[str]:
    """The diff from the available git trees: those of the runs and of this engine."""
    with tempfile.TemporaryDirectory(prefix="engine-compare-") as scratch:
        objects = git.Objects([*map(Path, roots), environment.engine_root()], Path(scratch))
        lines = objects.diff(git.commit_id(commits[0]), git.commit_id(commits[1]), environment.ENGINE_PACKAGES)
    return lines or [f"commits {commits[0]} and {commits[1]}: no available git tree has both"]


def _patch(side: Side) -> list[str]:
    if not (side.directory / "engine.patch").exists():
        return []
    return as_written(side.directory, "engine.patch").read_text(encoding="utf-8", errors="replace").splitlines()


# ------------------------------------------------------------------------------------------------------------- data


def data_differences(sides: Sequence[Side]) -> DataPart:
    """Inputs, digests, rows, schema and the distance of profiles; empty where the data is the same."""
    links = _differing(
        [{k: v for k, v in (side.record.get("chain") or {}).items() if k in DATA_LINKS} for side in sides]
    )
    if not links:
        return {}
    found: DataPart = {"digests": links}
    inputs = _differing([{Path(name).name: value for name, value in side.record["inputs"].items()} for side in sides])
    if inputs:
        found["inputs"] = inputs
    manifests = [_manifest(side) for side in sides]
    if "dataset" in links and all(manifest is not None for manifest in manifests):
        kept = [manifest for manifest in manifests if manifest is not None]
        found["rows"] = [manifest.get("rows") for manifest in kept]
        schema = _differing([{c["name"]: f"{c['type']} {c['role']}" for c in manifest["columns"]} for manifest in kept])
        found["schema"] = schema
        found["columns"] = sorted(
            _differing([{c["name"]: c["digest"] for c in manifest["columns"]} for manifest in kept])
        )
        found["profile_distance"] = [profile_distances(sides[0], side) for side in sides[1:]]
    return found


def _manifest(side: Side) -> DatasetRecord | None:
    """The manifest of a run's dataset; None where it is missing, with a warning where it is damaged."""
    folder = recorded_paths.dataset_folder(side.record)
    try:
        return records.read(seal.sealed(folder, MANIFEST, REMEDY), DatasetRecord) if folder is not None else None
    except UserError as error:
        terminal.err(f"warning: left out: {error}\n")
        return None


def profile_distances(first: Side, other: Side) -> dict[str, float]:
    """Jensen-Shannon distance (base 2, 0 to 1) per column between the stored profiles, largest first, without zeros."""
    folders = [recorded_paths.dataset_folder(side.record) for side in (first, other)]
    paths = [seal.sealed(folder, "profile.json", REMEDY) for folder in folders if folder is not None]
    profiles = [records.read(path, ProfileRecord)["columns"] for path in paths]
    if len(profiles) != 2:
        return {}
    found = {name: _distance(profiles[0][name], profiles[1][name]) for name in profiles[0] if name in profiles[1]}
    return dict(sorted(((n, d) for n, d in found.items() if d is not None and d > 0), key=lambda item: -item[1]))


def _distance(first: ColumnProfile, other: ColumnProfile) -> float | None:
    histograms = [found for entry in (first, other) if (found := entry.get("histogram"))]
    if len(histograms) == 2:
        edges = sorted({edge for histogram in histograms for edge in histogram["edges"]})
        masses = [_spread_on(histogram, edges) for histogram in histograms]
    elif first.get("top") and other.get("top"):
        values = dict.fromkeys(str(value) for entry in (first, other) for value, _ in entry["top"])
        counts = [{str(value): count for value, count in entry["top"]} for entry in (first, other)]
        masses = [[float(count.get(value, 0)) for value in values] for count in counts]
    else:
        return None
    shares = []
    for entry, mass in zip((first, other), masses, strict=True):
        whole, missing = sum(mass), float(entry.get("null_rate", 0.0))
        shares.append(np.array([*(value / whole * (1 - missing) if whole else 0.0 for value in mass), missing]))
    return float(js_of(*shares))


def _spread_on(histogram: Histogram, edges: Sequence[float]) -> list[float]:
    """Counts on finer common edges; a bin is assumed to be uniform."""
    own, found = histogram["edges"], []
    for low, high in itertools.pairwise(edges):
        mass = 0.0
        for start, stop, count in zip(own[:-1], own[1:], histogram["counts"], strict=True):
            if stop > start:
                mass += count * max(0.0, min(high, stop) - max(low, start)) / (stop - start)
        found.append(mass)
    return found


# ---------------------------------------------------------------------------------------------------------- figures


def metric_rows(sides: Sequence[Side]) -> list[MetricRow]:
    """Judged metrics of each run with interval and difference; slices only where they differ."""
    rows: list[MetricRow] = []
    for name in _judged(sides):
        values = [side.metrics.get(name) for side in sides]
        if name.count("/") > 1 and all(value == values[0] for value in values[1:]):
            continue
        bounds = [_interval(side, name) for side in sides]
        rows.append(
            {
                "metric": name,
                "values": values,
                "intervals": bounds,
                "difference": [_minus(value, values[0]) for value in values[1:]],
                "intervals_overlap": [_overlap(bounds[0], bound) for bound in bounds[1:]],
            }
        )
    return rows


def cost_rows(sides: Sequence[Side]) -> list[CostRow]:
    """Wall time, and the seconds and rates that the step measured."""
    rows: list[CostRow] = [{"figure": "wall seconds", "values": [side.record.get("seconds") for side in sides]}]
    for name in ("train/seconds", "train/rows_per_second", "score/rows_per_second"):
        if any(name in side.metrics for side in sides):
            rows.append({"figure": name, "values": [side.metrics.get(name) for side in sides]})
    return rows


def _judged(sides: Sequence[Side]) -> Iterator[str]:
    names = dict.fromkeys(name for side in sides for name in side.metrics)
    for name in names:
        base = name.removesuffix("_low").removesuffix("_high")
        first, _, rest = name.partition("/")
        own = name if first in RESERVED else rest  # of a target beside the main one, its name comes first
        if (base == name or base not in names) and own.startswith(("valid/", "test/")) and not name.endswith(COST):
            yield name


def _interval(side: Side, name: str) -> list[float] | None:
    low, high = side.metrics.get(f"{name}_low"), side.metrics.get(f"{name}_high")
    return None if low is None or high is None else [low, high]


def _minus(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _overlap(first: list[float] | None, other: list[float] | None) -> bool | None:
    return None if first is None or other is None else first[0] <= other[1] and other[0] <= first[1]


# ----------------------------------------------------------------------------------------------------------- output


def _parts(found: Comparison) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of each part, one value per run."""
    labels = [run["id"] for run in found["runs"]]
    return {
        "config": (["key", *labels], [[name, *row] for name, row in found["config"].items()]),
        "code": (["", *labels], [[name, *row] for name, row in found["code"].items() if name != "diff"]),
        "data": (["", *labels], list(data_lines(found["data"]))),
        "environment": (["", *labels], list(environment_lines(found["environment"]))),
        "metrics": (["metric", *labels, "difference"], [_metric_line(row) for row in found["metrics"]]),
        "cost": (["", *labels], [[row["figure"], *row["values"]] for row in found["cost"]]),
    }


def as_text(found: Comparison) -> str:
    """Tables for a terminal; a part without differences is one line."""
    facts = ["id", "command", "name", "status"]
    texts = [table(["run", *facts[1:]], [[run[name] for name in facts] for run in found["runs"]])]
    for title, (columns, rows) in _parts(found).items():
        nothing = NOTHING.get(title, "the same")
        texts.append(f"{title}\n{table(columns, rows)}" if rows else f"{title}: {nothing}\n")
        if title == "code":
            texts += ["\n".join(lines) + "\n" for lines in found["code"].get("diff", []) if lines]
    return "\n".join(texts)


def data_lines(data: DataPart) -> Iterator[list[Any]]:
    """The data part as rows of a table, one value per run."""
    for name, row in data.get("inputs", {}).items():
        yield [f"input {name}", *(value[:12] if value else None for value in row)]
    for name, row in data.get("digests", {}).items():
        yield [name, *(value[:12] if value else None for value in row)]
    if "rows" in data:
        yield ["rows", *data["rows"]]
    for name, row in data.get("schema", {}).items():
        yield [f"column {name}", *row]
    distances = data.get("profile_distance", [])
    for name in list(dict.fromkeys(name for item in distances for name in item))[:10]:
        yield [f"distance of {name}", 0.0, *(item.get(name, 0.0) for item in distances)]


def environment_lines(environment: Sequence[Sequence[Difference]]) -> Iterator[list[Any]]:
    """Environment differences from the first run, most important first, one value per run."""
    items = sorted(itertools.chain.from_iterable(environment), key=lambda item: -item["weight"])
    for name, first in {item["name"]: item["recorded"] for item in items}.items():
        others = [{item["name"]: item["now"] for item in side} for side in environment]
        yield [name, first, *(side.get(name, first) for side in others)]


def _metric_line(row: MetricRow) -> list[Any]:
    texts = []
    for value, bound in zip(row["values"], row["intervals"], strict=True):
        texts.append(cell(value) + (f" [{bound[0]:.5g}, {bound[1]:.5g}]" if bound else ""))
    signs = ["-" if value is None else f"{value:+.6g}" for value in row["difference"]]
    apart = any(overlap is False for overlap in row["intervals_overlap"])
    return [row["metric"], *texts, ", ".join(signs) + (" (intervals apart)" if apart else "")]


def as_html(found: Comparison, sides: Sequence[Side]) -> str:
    """A self-contained page: differences, metrics, and the curves of all runs in one chart."""
    labels = [side.label for side in sides]
    charts = []
    histories = [read_points(side.directory) for side in sides]
    for name in dict.fromkeys(name for points in histories for point in points for name in point.values):
        if name.endswith(COST):
            continue
        series = [
            html.Series(
                label,
                [p.step for p in points if name in p.values],
                [p.values[name] for p in points if name in p.values],
            )
            for label, points in zip(labels, histories, strict=True)
        ]
        charts.append(html.card(name, html.line_chart(series, x_label="step", y_label=name)))
    sections = {}
    for title, (columns, rows) in _parts(found).items():
        shown = rows if title == "cost" else [[row[0], *map(cell, row[1:])] for row in rows]
        sections[title] = [html.table(columns, shown, empty=NOTHING.get(title, "the same"))]
    sections["code"] += [html.preformatted("\n".join(lines)) for lines in found["code"].get("diff", []) if lines]
    cost = sections.pop("cost")
    sections |= {"curves": [html.row(*charts[at : at + 2]) for at in range(0, len(charts), 2)], "cost": cost}
    body = [html.section(title.capitalize(), *parts) for title, parts in sections.items()]
    return str(html.page("Comparison of runs", " and ".join(labels), body, "from the run directories"))
