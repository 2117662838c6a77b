"""`engine validate`: new files against the declared schema, without ingesting them."""

from __future__ import annotations

import dataclasses
import json

from engine.config.sections.data import CsvOptions, DataConfig
from engine.config.tree import Config
from engine.data import quarantine_limit, stage
from engine.data.bounds import Bounds
from engine.data.dataset import FileReport
from engine.data.ingest_plan import make_plan
from engine.data.quarantine import quarantine
from engine.data.stage import Staged
from engine.errors import UserError
from engine.runtime import storage, terminal
from engine.runtime.run import Run

REPORT = "validation.json"


class Report(FileReport):
    """The report of a file, with why ingest would stop at it."""

    problems: list[str]


def validate(config: Config, run: Run) -> dict[str, float]:
    """Read and check every file of the sources; rows are counted, none is stored.

    Writes `validation.json` and, where rows break the schema, `quarantine.parquet` into the run directory.
    Raises UserError when a file is refused, a `fail` rule is broken, or more rows than max_quarantine would be lost.
    """
    plan = make_plan(config, run)
    lenient = _collecting(config.data)
    reports: list[Report] = []
    tallies = []
    with run.progress(f"{config.data.name}: validate") as progress:
        for file in plan.files:
            staged = stage.stage(
                file, lenient, plan.threads, None, progress.advance, keep=False, bounds=Bounds.of(plan.memory)
            )
            tallies.append(staged.tally)
            reports.append({**staged.report(), "problems": _problems(staged, config.data)})
    failed = [report for report in reports if report["problems"]]
    storage.write_json(run.path(REPORT), {"ok": not failed, "files": reports})
    records = quarantine(tallies)
    if records.num_rows:
        storage.write_parquet(run.path("quarantine.parquet"), records)
    terminal.err(table(reports))
    rows = sum(report["rows"] for report in reports)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(reports)} files break the schema: {failed[0]['file']}: {failed[0]['problems'][0]}. "
            f"The whole report is {run.path(REPORT)}"
        )
    return {
        "validate/files": float(len(reports)),
        "validate/rows": float(rows),
        "validate/quarantined": float(sum(report["quarantined"] for report in reports)),
    }


def _collecting(data: DataConfig) -> DataConfig:
    """The same schema with `fail` turned into `quarantine`, so that everything wrong is found, not the first thing only."""
    sources = {}
    for name, source in data.sources.items():
        columns = {
            column: dataclasses.replace(item, on_violation=_soft(item.on_violation))
            for column, item in source.columns.items()
        }
        csv: CsvOptions = dataclasses.replace(source.csv, ragged="quarantine")
        sources[name] = dataclasses.replace(source, columns=columns, csv=csv, refused="skip")
    columns_ = {
        name: dataclasses.replace(item, on_violation=_soft(item.on_violation)) for name, item in data.columns.items()
    }
    rules = {
        name: dataclasses.replace(rule, on_violation=_soft(rule.on_violation)) for name, rule in data.rules.items()
    }
    return dataclasses.replace(data, sources=sources, columns=columns_, rules=rules)


def _soft(policy: str) -> str:
    return "quarantine" if policy == "fail" else policy


def _problems(staged: Staged, data: DataConfig) -> list[str]:
    """Why ingest would stop at this file."""
    if staged.refused:
        return [staged.refused]
    found = [
        f"column {column!r} {reason}: {count:,} rows"
        for (column, reason, _), count in sorted(staged.tally.counts.items())
        if _fails(column, staged, data)
    ]
    excess = quarantine_limit.excess(data, [staged.tally], [staged.file])
    return found + ([excess] if excess else [])


def _fails(column: str, staged: Staged, data: DataConfig) -> bool:
    source = data.sources[staged.file.source]
    policies = [
        holder[column].on_violation for holder in (source.columns, data.columns, data.rules) if column in holder
    ]
    return "fail" in policies or (not column and source.csv.ragged == "fail")


def table(reports: list[Report]) -> str:
    """The report for a person: one line a file, then what is wrong."""
    rows, problems = [], []
    for report in reports:
        notes = [f"{kind} {json.dumps(found, ensure_ascii=False)}" for kind in NOTES if (found := report.get(kind))]
        rows.append([report["file"], report["rows"], report["kept"], report["quarantined"], "; ".join(notes)])
        problems += [f"{report['file']}: {problem}\n" for problem in report["problems"]]
    return terminal.table(["file", "rows", "kept", "bad", "notes"], rows) + "".join(problems)


NOTES = ("missing", "unexpected", "renamed", "reordered", "converted")
