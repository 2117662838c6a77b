"""`engine data show NAME`: show a dataset of the store in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from engine.config import units
from engine.config.sections.data import PLACE
from engine.config.tree import Config
from engine.data.dataset import LATEST, Accounting, Dataset, DatasetRecord, newest_dataset
from engine.data.profile import ColumnProfile, ProfileRecord
from engine.errors import UserError, nearest
from engine.runtime import records, storage, terminal

BARS = " ▁▂▃▄▅▆▇█"


def show(config: Config, words: list[str], options: Mapping[str, str]) -> int:
    """Print rows, columns, null rates, histograms, digests and quarantine counts of the newest dataset of a name."""
    dataset = newest(config, words[0] if words else config.data.name)
    profile = records.read(dataset.path("profile.json"), ProfileRecord)
    if "--json" in options:
        text = json.dumps({"manifest": dataset.manifest, "profile": profile}, indent=1, ensure_ascii=False)
    else:
        text = page(dataset, profile)
    terminal.out(text + "\n")
    return 0


def newest(config: Config, name: str) -> Dataset:
    """The dataset that was ingested last under a name. Raises UserError with the known names."""
    root = storage.inside(Path(config.paths.store), "datasets")
    known = sorted(path.name for path in root.iterdir() if (path / LATEST).exists()) if root.is_dir() else []
    if not name or name not in known:
        hint = nearest(name, known) if known else f" {root} is empty: run `ingest` first."
        raise UserError(f"no dataset {name!r} in the store.{hint}")
    found = newest_dataset(storage.inside(root, name))
    assert found is not None
    return found


def page(dataset: Dataset, profile: ProfileRecord) -> str:
    """The text of the page."""
    manifest = dataset.manifest
    first, last = (
        (manifest["parts"][0]["first_time"], manifest["parts"][-1]["last_time"]) if manifest["parts"] else (0, 0)
    )
    zone = manifest["time_zone"]
    times = f"{units.format_instant(first, zone)} to {units.format_instant(last, zone)} ({dataset.event_time}, {zone})"
    columns = sum(item["name"] != PLACE for item in manifest["columns"])
    lines = [
        f"{dataset.name}: {dataset.rows:,} rows, {columns} columns, {len(manifest['parts'])} parts",
        f"  {'without a time, in order of a hash of the ids' if dataset.event_time == PLACE else times}",
        f"  content {dataset.digest}",
        f"  recipe  {dataset.recipe}",
        f"  stored in {dataset.directory}",
        "",
        _columns(manifest, profile),
        *_tables(manifest),
        *_accounting(manifest["accounting"]),
    ]
    return "\n".join(lines)


def _columns(manifest: DatasetRecord, profile: ProfileRecord) -> str:
    rows = []
    for column in manifest["columns"]:
        if column["name"] == PLACE:
            continue
        shown = profile["columns"].get(column["name"], {"nulls": 0, "null_rate": 0.0, "nan": 0})
        facts = [column["name"], column["type"], column["role"], f"{shown['null_rate']:.2%}"]
        rows.append([*facts, column.get("digest", "")[:8], _values(shown, profile)])
    return terminal.table(["column", "type", "role", "nulls", "digest", "values"], rows)


def _values(shown: ColumnProfile, profile: ProfileRecord) -> str:
    if histogram := shown.get("histogram"):
        return f"{shown.get('min')} {_bars(histogram['counts'])} {shown.get('max')}"
    if "top" in shown and "distinct_in_sample" in shown:
        most = ", ".join(
            f"{value} {_share(count / max(profile['sample_rows'], 1))}" for value, count in shown["top"][:4]
        )
        sampled = " in a sample" if profile["sample_rows"] < profile["rows"] else ""
        return f"{shown['distinct_in_sample']} distinct{sampled}: {most}"
    return "(not shown)" if "min" not in shown else ""


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _bars(counts: list[int]) -> str:
    most = max(counts, default=1) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def _tables(manifest: DatasetRecord) -> list[str]:
    lines = [
        f"table {name}: {entry['rows']:,} rows, {len(entry['columns'])} columns, digest {entry['digest'][:8]}"
        for name, entry in manifest["tables"].items()
    ]
    return [*lines, ""] if lines else []


def _accounting(found: Accounting) -> list[str]:
    lines = [
        f"{len(found['files'])} files, {found['rows_in']:,} rows in, {found['quarantined']:,} quarantined, "
        f"{found['refused_files']} files refused"
    ]
    for item in found["files"]:
        if item["refused"]:
            lines.append(f"  refused {item['file']}: {item['refused']}")
    parts = [(item["file"], item) for item in found["files"]] + list(found["results"].items())
    totals: dict[tuple[str, str, str], int] = {}
    for _, part in parts:
        for entry in part["violations"]:
            key = (entry["column"], entry["reason"], entry["policy"])
            totals[key] = totals.get(key, 0) + entry["count"]
    return lines + [
        f"  {column or 'row'} {reason}: {count:,} ({policy})"
        for (column, reason, policy), count in sorted(totals.items())
    ]
