"""Plans a scoring run: its rows, their work units, the units already done, and units reused from an earlier run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa

from engine.config.feature_names import RENAME
from engine.config.names import check_distinct
from engine.config.tree import Config
from engine.data.dataset import Dataset, DatasetRecord
from engine.errors import UserError
from engine.features.store import StoredView
from engine.features.table import ensure_table
from engine.runtime import records, storage
from engine.runtime.run import Run, RunRecord, as_written, load_record
from engine.runtime.seal import Seal
from engine.scoring import export, output, units
from engine.scoring.inputs import read_inputs
from engine.scoring.predictor import Predictor, score_names
from engine.scoring.units import Item, Unit
from engine.scoring.worker import Job
from engine.training.reasons import names_of

FORMAT = 1
NONE_YET = Dataset(Path(), cast(DatasetRecord, {"digest": ""}), Seal({}))


@dataclass(frozen=True)
class ScoringPlan:
    """The rows of a run, the units done, and the units left."""

    job: Job
    dataset: Dataset
    views: dict[str, StoredView]
    start: int
    stop: int
    done: list[Unit]
    items: list[Item]


def prepare(config: Config, run: Run, predictor: Predictor) -> ScoringPlan:
    """Prepare dataset, features and units; unfinished files of an earlier attempt are deleted."""
    inputs = read_inputs(config, run, predictor.bundle, passed_columns(config))
    dataset = inputs.dataset
    stored = config.score.features == "store" and dataset.rows and config.score.input is None
    views = ensure_table(config, run, dataset).views if stored else {}
    asked = config.periods.get("score.between")
    start, stop = dataset.row_range(*asked) if asked else (0, dataset.rows)
    if start == stop:
        where = f"in score.between {list(config.score.between)}" if asked else f"in dataset {dataset.name}"
        run.warn(f"no row is {where}: nothing to score")
    context = units.check_context(run.directory, context_of(config, predictor, dataset, (start, stop), inputs.history))
    parts = run.path("parts")
    parts.mkdir(exist_ok=True)
    done = units.finished(parts, (start, stop), context)
    removed = units.remove_others(parts, done)
    if run.resumed:
        for stale in list(
            run.directory.rglob(".*.tmp")
        ):  # this process holds the run's lock: no other process writes them
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
        rows = sum(unit.rows for unit in done)
        run.log(f"resumed: {len(done)} units with {rows:,} rows are done, {removed} unfinished files removed")
    earlier, known = earlier_parts(config, run, predictor) if config.score.mode == "append" else (None, {})
    left = list(units.gaps((start, stop), [(unit.start, unit.stop) for unit in done]))
    job = Job(
        bundle=str(predictor.bundle.directory.absolute()),
        dataset=str(dataset.directory.absolute()),
        views={name: str(view.directory.absolute()) for name, view in views.items()},
        parts=str(parts.absolute()),
        context=context,
        columns=passed_columns(config),
        profile=config.score.profile and predictor.profile_spec is not None,
        level=config.score.compression_level,
        device=predictor.device,
        earlier=str(earlier) if earlier else None,
        shadow=str(predictor.shadow.bundle.directory.absolute()) if predictor.shadow else None,
        history=str(inputs.history.directory.absolute()) if inputs.history else None,
        reasons=config.score.reasons,
    )
    items = list(plan_items(left, known, config.score.unit_rows, predictor.tile_rows))
    return ScoringPlan(job, dataset, views, start, stop, done, items)


def context_of(
    config: Config, predictor: Predictor, dataset: Dataset, rows: tuple[int, int], history: Dataset | None = None
) -> units.Context:
    """Everything that the bytes of a part depend on, by its name in messages."""
    files = predictor.bundle.manifest["files"]
    return {
        "format": FORMAT,
        "weights": files["model.safetensors"]["sha256"],
        "architecture": files["model.json"]["sha256"],
        "feature state": files["features.json"]["sha256"],
        "model": predictor.digest,
        "shadow": predictor.shadow and predictor.shadow.digest,
        "input": dataset.digest,
        "rows": list(rows),
        "columns": list(passed_columns(config)),
        "compression": config.score.compression_level,
        "profile": config.score.profile and predictor.profile_spec is not None and predictor.profile_spec.digest,
        "device": predictor.device,
        "number of reasons": config.score.reasons or None,
        **({"history": history.digest} if history else {}),
    }


def plan_items(
    left: list[tuple[int, int]], earlier: dict[tuple[int, int], str], unit_rows: int, tile_rows: int
) -> Iterator[Item]:
    """Items for the pool: ranges that an earlier run has completed (with its digest), and the rest as new ranges."""
    edges = {edge for span in left for edge in span}
    known = [
        span
        for span in sorted(earlier)
        if any(low <= span[0] and span[1] <= high for low, high in left)
        # A unit that ended within a tile may have more rows now: digests are of whole tiles.
        and all(edge % tile_rows == 0 or edge in edges for edge in span)
    ]
    for start, stop in known:
        yield {"start": start, "stop": stop, "earlier": earlier[start, stop]}
    rest = itertools.chain.from_iterable(
        units.gaps(span, [one for one in known if span[0] <= one[0] < span[1]]) for span in left
    )
    for start, stop in units.cut(rest, unit_rows, tile_rows):
        yield {"start": start, "stop": stop}


def _finished(directory: Path) -> tuple[units.Context, pa.Table, RunRecord]:
    """Context, units and record of a finished run. Raises UserError where one of them is damaged."""
    ledger = as_written(directory, "ledger.parquet", refuse=True)
    return (
        records.read(as_written(directory, units.CONTEXT, refuse=True), units.Context),
        storage.read_parquet(ledger, ["start", "stop", "digest"]),
        load_record(directory, refuse=True),
    )


def earlier_parts(config: Config, run: Run, predictor: Predictor) -> tuple[Path | None, dict[tuple[int, int], str]]:
    """`parts` folder and units {(start, stop): digest} of the newest finished run that this one may append to; or neither."""
    differs = ""
    for directory in sorted(run.directory.parent.glob("*-*"), reverse=True):
        path = directory / units.CONTEXT
        if directory == run.directory or not (directory / "DONE").exists() or not path.exists():
            continue
        try:
            context, ledger, record = _finished(directory)
        except UserError as error:
            run.warn(f"left out: {error}")
            continue
        asked = context_of(config, predictor, NONE_YET, (0, 0))
        other = [name for name in asked if name not in ("input", "rows") and context.get(name) != asked[name]]
        if other:
            differs = differs or f": the newest, {directory}, has another {', another '.join(other)}"
            continue
        found = {(row["start"], row["stop"]): row["digest"] for row in ledger.to_pylist()}
        run.log(f"appending to {directory}: {len(found)} units")
        run.note(appended_to=record["chain"].get("scores"))
        return (directory / "parts").absolute(), found
    run.log(
        f"nothing to append to: no finished run of this name has the same model and columns{differs}; scoring all rows"
    )
    return None, {}


def check_columns(config: Config, several: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> None:
    """Passed-through columns must be free names in the output, as the event time must; the partition column is passed
    through too. Raises UserError.
    """
    event_time, scores = config.data.event_time, score_names(several)
    own = ["row_id", *scores, *added, *names_of(config.score.reasons), "model"]
    own += [f"shadow_{name}" for name in (*scores, "model") if config.score.shadow]
    for name in passed_columns(config):
        if name in ("score", *own) or name.startswith(("score_", "shadow_")) or name == event_time:
            if name in (*config.score.columns, config.score.partition):
                raise UserError(f"score.columns: the output already has a column {name!r}; leave it out")
            raise UserError(
                f"a file of scores repeats data.columns.{name} and already has a column {name!r}: let score.output be a "
                f"folder, whose files do not repeat it, or rename the column and train the model again. {RENAME.format(name)}"
            )
    named = [
        *((name, "the output of `score`") for name in own),
        (event_time, f"data.columns.{event_time} (role event_time)"),
    ]
    check_distinct(named, f"Rename the event time, and train the model again. {RENAME}")
    if export.is_file(config.score.output):
        export.check_file(config)
    partition = config.score.partition
    if partition is not None and not output.has_text(config.data.columns[partition].type):
        raise UserError(
            f"score.partition must be a column whose values can be in a folder's name, found {partition!r} of type "
            f"{config.data.columns[partition].type}: use another column"
        )


def passed_columns(config: Config) -> tuple[str, ...]:
    """Columns of the dataset that the output repeats."""
    partition = [config.score.partition] if config.score.partition not in (None, config.data.event_time) else []
    needed = export.needed_columns(config) if export.is_file(config.score.output) else []
    return tuple(dict.fromkeys([*config.score.columns, *(name for name in partition if name), *needed]))
