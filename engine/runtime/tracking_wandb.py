"""The mirror of a run in Weights & Biases.

Offline, a run has one segment below `wandb/`, written at the end from the local log and replaced when the run continues:
two segments of one id would replace each other on the server (wandb#5865). Online, points are sent as checkpoints cover
them, and a resumed run continues after the last row that the server has. W&B drops a point whose step is before its last:
W&B's step is the row, which always rises, and the step is a separate column. W&B's own capture (arguments, git, console,
machine, code) is off: it gets the content of run.json, where secrets are masked. Rows of data (a bundle's gate and samples,
the parts of a dataset) are not uploaded: their artifacts have a reference with a digest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from engine.config import nested, schema
from engine.config.sections.runtime import TrackingConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import recorded_paths, records, storage
from engine.runtime.run import RunRecord, as_written
from engine.runtime.tracking import LAYOUT

LARGEST_UPLOAD = 100 * 10**6  # bytes; a larger model goes by reference
ROWS = ("gate/", "reference_sample.parquet", "reference_outcomes.parquet")  # parts of a bundle that are rows of data
# Long sections that are left out; their effect is in the digests of dataset and features.
MODELLING = ("name", "data", "split", "features", "model", "train", "evaluate")
LEFT_OUT = ("data.sources", "data.columns", "data.tables", "data.rules", "data.query", "features.views", "paths")


class WandbMirror:
    """See `engine.runtime.tracking.Mirror`."""

    def __init__(self, directory: Path, record: RunRecord, options: TrackingConfig) -> None:
        self.directory, self.record, self.options = directory, record, options
        self.folder = directory / "wandb"
        self._run: Any = None
        self._last = -1
        self._unreached = ""

    def open(self) -> int:
        """Online continues after the server's last row; offline the segment is written again from the first row."""
        if self.options.mode == "online":
            try:
                self._init("online")
                self._last = self._last_on_server()
                return self._last
            except Exception as error:
                self._unreached = f"{type(error).__name__}: {' '.join(str(error).split())}"
                sys.stderr.write(f"W&B cannot continue the run ({self._unreached}): the mirror is kept offline\n")
                _import_wandb(self.folder).teardown(exit_code=1)  # it has the id of the run that could not begin
        for segment in self.folder.glob("offline-run-*"):
            shutil.rmtree(segment)
        self._init("offline")
        return -1

    def _last_on_server(self) -> int:
        """The last row that the server has. Raises RuntimeError for a run of an older engine, which counted steps."""
        last = int(self._run.starting_step) - 1
        if last >= 0 and self.record["tracking"].get("layout") != LAYOUT:
            self._run.finish(exit_code=1)
            raise RuntimeError(
                "an older engine, which counted steps, began this run there; `engine track sync` sends it again"
            )
        return last

    def _init(self, mode: str) -> None:
        wandb = _import_wandb(self.folder)
        record, timeout = self.record, self.options.timeout.seconds
        settings = wandb.Settings(
            mode=mode,
            root_dir=str(self.directory),
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            host="",
            program="engine",
            init_timeout=timeout,
            finish_timeout=timeout,
            x_graphql_retry_max=3,
        )
        self._run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            id=str(record["tracking"]["id"]),
            resume="allow" if mode == "online" else None,
            name=f"{record['name']}/{self.directory.name}",
            group=self.options.group or str(record["name"]),
            job_type=str(record["command"]),
            tags=list(self.options.tags) or None,
            config=flat_config(record),
            allow_val_change=True,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, row: int, step: int, time: float, values: Mapping[str, float]) -> None:
        """Metrics by their own `step` axis; W&B's step is the row."""
        if row <= self._last:
            raise RuntimeError(f"row {row} (step {step}) comes after row {self._last}: W&B would drop it")
        self._last = row
        named = {escaped(name): value for name, value in values.items()}
        self._run.log({**named, "step": step, "_timestamp": time}, step=row, commit=True)

    def finish(self, record: RunRecord, metrics: Mapping[str, float | None], done: bool) -> str:
        """Summary, tables, report and artifacts of a finished run; an unfinished run stays open."""
        run, failed = self._run, []
        if done:
            run.summary.update({escaped(name): value for name, value in metrics.items() if value is not None})
            run.summary.update({f"chain/{link}": value for link, value in record["chain"].items()})
            # Tables and artifacts may fail when points do not: the failure is reported, and the run is closed.
            for part in (self._log_shown, self._log_artifacts):
                try:
                    part(record)
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        where = str(Path(run.dir).parent if self.options.mode == "offline" else run.url or Path(run.dir).parent)
        run.finish(exit_code=0 if done else 1)
        # W&B links the log of its own process, which may be older than this run and readable by all.
        (Path(run.dir).parent / "logs" / "debug-core.log").unlink(missing_ok=True)
        if self._unreached:
            raise RuntimeError(
                f"W&B could not be reached ({self._unreached}); the points are in {Path(run.dir).parent}"
            )
        if failed:
            raise RuntimeError(f"the points were sent, but some tables or artifacts were not: {'; '.join(failed)}")
        return where

    def _log_shown(self, _: RunRecord) -> None:
        shown = {**tables(self.directory), **report(self.directory)}
        if shown:
            self._run.log(shown)  # a row after the last

    def _log_artifacts(self, record: RunRecord) -> None:
        for artifact in artifacts(self.directory, record, self.options.rows):
            self._run.log_artifact(artifact)

    def upload(self) -> str:
        """Send the offline segment, which overwrites the server's history of this id from its first line."""
        segments = sorted(self.folder.glob("offline-run-*"))
        if not segments:
            raise UserError(f"{self.folder} must have an offline run to send, but none was found")
        seconds = self.options.timeout.seconds
        command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", "--include-synced", str(segments[-1])]
        try:
            done = subprocess.run(
                command, cwd=self.directory, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"W&B did not accept the run within {seconds:g} s (tracking.timeout); try again later"
            ) from None
        if done.returncode or not list(segments[-1].glob("*.synced")):
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(f"W&B did not accept the run: {said[-1] if said else 'no reason given'}")
        return str(segments[-1])


def escaped(name: str) -> str:
    """A metric's name in W&B, which reserves names with a leading `_` and the axis `step`."""
    return f"metric/{name}" if name.startswith("_") or name == "step" else name


def _import_wandb(folder: Path) -> Any:
    """The library, set to keep its caches with the run instead of in the home folder."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(name, str(folder / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def flat_config(record: RunRecord) -> dict[str, object]:
    """The resolved config with dotted names, as in sweeps, and the identity of code and plan."""
    code = record.get("code") or {}
    facts = {
        "command": record["command"],
        "plan": record.get("plan"),
        "engine_version": code.get("engine_version"),
        "engine_digest": code.get("engine_digest"),
        "commit": (code.get("engine_git") or {}).get("commit"),
    }
    flat = {
        name: value for name, value in _flat(record.get("config") or {}) if _concerns(name, value, record["command"])
    }
    views = (record.get("config") or {}).get("features", {}).get("views") or {}
    return {**flat, "features.views": sorted(views), **{name: value for name, value in facts.items() if value}}


def _concerns(name: str, value: Any, command: str) -> bool:
    """Whether a key is relevant for this command: in sections of other commands only keys that were changed."""
    section = name.partition(".")[0]
    return section in MODELLING or section == command or value != DEFAULTS.get(name, value)


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    for name, value in nested.leaves(values):
        if value != {} and not any(f"{name}.".startswith(f"{section}.") for section in LEFT_OUT):
            yield name, value


DEFAULTS = dict(_flat(schema.plain(Config())))


def artifacts(directory: Path, record: RunRecord, rows: bool = False) -> Iterator[Any]:
    """The bundle of the run, and the manifest of its dataset with the data itself by reference.

    `rows` sends the bundle's rows of data too.
    """
    import wandb

    name = str(record["tracking"]["id"])
    bundle = directory / "model"
    if (bundle / "bundle.json").exists():
        facts = {"digest": record["outputs"].get("model"), "weights": record["chain"].get("weights")}
        artifact = wandb.Artifact(f"model-{name}", "model", metadata=facts)
        files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
        if sum(path.stat().st_size for path in files) > LARGEST_UPLOAD:
            artifact.add_reference(bundle.resolve().as_uri(), checksum=False)
        else:
            for path in files:
                part = path.relative_to(bundle).as_posix()
                storage.inside(bundle, part)  # raises for a link that leads out
                if part.startswith(ROWS) and not rows:
                    artifact.add_reference(path.resolve().as_uri(), part)
                else:
                    artifact.add_file(str(path), part, skip_cache=True, policy="immutable")
        yield artifact
    folder = recorded_paths.dataset_folder(record)
    if folder is not None:
        facts = {"digest": record["chain"].get("dataset"), "inputs": record["chain"].get("inputs")}
        artifact = wandb.Artifact(f"dataset-{folder.parent.name}", "dataset", metadata=facts)
        manifest = records.read(folder / "manifest.json", dict)
        manifest.pop("spec", None)  # it may contain secrets that the config only refers to
        with artifact.new_file("manifest.json") as file:
            json.dump(manifest, file, indent=1)
        artifact.add_reference(folder.resolve().as_uri(), name="parts", checksum=False)
        yield artifact


class Sliced(TypedDict, total=False):
    """The keys of a split in evaluation.json that W&B shows."""

    by_month: list[dict[str, object]]
    slices: dict[str, list[dict[str, object]]]


class Drifted(TypedDict):
    """The keys of drift.json that W&B shows."""

    columns: list[dict[str, object]]


def tables(directory: Path) -> dict[str, object]:
    """Slices of each evaluated split and the drift of each column, as W&B tables."""
    found: dict[str, list[Mapping[str, object]]] = {}
    for name, shape in (("evaluation.json", dict[str, Sliced]), ("drift.json", Drifted)):
        if (directory / name).exists():
            found.update(_rows_of(name.removesuffix(".json"), records.read(as_written(directory, name), shape)))
    return {name: _table(rows) for name, rows in found.items() if rows}


def _rows_of(kind: str, content: Mapping[str, Any]) -> Iterator[tuple[str, list[Mapping[str, object]]]]:
    if kind == "drift":
        yield "drift", [dict(_figures(column)) for column in content.get("columns") or ()]
        return
    for split, details in content.items():
        if isinstance(details, Mapping):
            slices = {"month": details.get("by_month") or [], **(details.get("slices") or {})}
            yield f"{split}_slices", [{"slice": name, **row} for name, rows in slices.items() for row in rows]


def _figures(column: Mapping[str, object], path: str = "") -> Iterator[tuple[str, Any]]:
    """A column of drift.json in one row: `psi` and `psi line` of `statistics: {psi: {value, line}}`."""
    for name, value in column.items():
        where = path if name in ("value", "statistics") else f"{path} {name}".strip()
        if isinstance(value, Mapping):
            yield from _figures(value, where)
        elif not isinstance(value, list):
            yield where, value


def _table(rows: list[Mapping[str, object]]) -> Any:
    import wandb

    names: list[Any] = list(
        dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, (dict, list)))
    )
    return wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows], allow_mixed_types=True)


def report(directory: Path) -> dict[str, object]:
    """`report.html` as the run's page in W&B."""
    import wandb

    if not (directory / "report.html").exists():
        return {}
    text = as_written(directory, "report.html").read_text(encoding="utf-8")
    return {"report": wandb.Html(text, inject=False)}
