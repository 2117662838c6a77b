"""The `score` step: every row of a period scored once by a trained model, whatever dies on the way.

Work units go to threads or Ray actors (worker.py), which commit each by its record (units.py). The driver lists once
what is done, has the rest scored, and then publishes: predictions, ledger, profile (output.py). No row passes through
the driver, unless other files than the workers' parts are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config import units as spans
from engine.config.tree import Config
from engine.data import ingest
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features import build
from engine.features.profile import Profile
from engine.features.store import StoredView
from engine.runtime import cluster, digest, pool, storage
from engine.runtime.run import Run, load_record
from engine.scoring import output, units
from engine.scoring.output import Place
from engine.scoring.predictor import Predictor, load, single_threaded
from engine.scoring.units import Unit
from engine.scoring.worker import STAGES, Job, UnitScorer, open_scorer, peak_memory
from engine.training.gate import check_gate
from engine.training.threads import Team, compute_threads
from engine.training.train import with_spec_of

FORMAT = 1
RESERVED = ("row_id", "model")


def score(config: Config, run: Run) -> dict[str, float]:
    """Check the gate, score the units that are not done, publish. Raises UserError naming units that were set aside."""
    began = time.monotonic()
    predictor = load(config.score.model, config.paths.runs, compute_threads(config), device_of(config))
    run.note(model=predictor.digest)
    config = with_spec_of(config, predictor.bundle)
    check_columns(config, predictor)
    elsewhere = predictor.logits if predictor.device != "cpu" else None
    gate_rows = check_gate(predictor.bundle, predictor.model, predictor.threads, elsewhere)
    plan = prepare(config, run, predictor)
    tally = score_units(config, run, predictor, plan)
    scored = time.monotonic()
    facts = publish(config, run, predictor, plan, tally)
    metrics = {
        "score/rows_in": float(plan.stop - plan.start),
        "score/gate_rows": float(gate_rows),
        "score/publish_seconds": time.monotonic() - scored,
        "score/seconds": time.monotonic() - began,
        **facts,
        **tally.metrics(),
    }
    if tally.failed:
        raise UserError(failed_message(run, tally))
    return metrics


def device_of(config: Config) -> str:
    """Where models run: on GPUs when workers are given any."""
    return "cuda" if config.cluster.gpus_per_worker else "cpu"


def check_columns(config: Config, predictor: Predictor) -> None:
    """Passed-through columns must be free names in the output; the partition column is passed through too."""
    for name in passed_columns(config):
        if name in RESERVED or name == "score" or name.startswith("score_") or name == config.data.event_time:
            raise UserError(f"score.columns: the output has a column {name!r} of its own; leave it out")
    assert predictor.bundle.data.ids


def passed_columns(config: Config) -> tuple[str, ...]:
    """Columns of the dataset that the output repeats."""
    partition = [config.score.partition] if config.score.partition not in (None, config.data.event_time) else []
    return tuple(dict.fromkeys([*config.score.columns, *(name for name in partition if name)]))


# ----------------------------------------------------------------------------------------------------------- before


@dataclass(frozen=True)
class Plan:
    """The rows of a run, what is done of them, and what is left."""

    job: Job
    dataset: Dataset
    views: dict[str, StoredView]
    start: int
    stop: int
    done: list[Unit]
    items: list[dict[str, Any]]


def prepare(config: Config, run: Run, predictor: Predictor) -> Plan:
    """Dataset, features and units; what an earlier attempt left unfinished is deleted."""
    dataset = ingest.ensure(config, run)
    views = build.ensure(config, run, dataset).views if config.score.features == "store" else {}
    bounds = config.score.between
    start, stop = dataset.row_range(*spans.between(bounds, config.data.time_zone)) if bounds else (0, dataset.rows)
    if start == stop:
        where = f"in score.between {list(bounds)}" if bounds else f"in dataset {dataset.name}"
        run.warn(f"no row lies {where}: nothing to score")
    context = units.check_context(run.directory, context_of(config, predictor, dataset, (start, stop)))
    parts = run.path("parts")
    parts.mkdir(exist_ok=True)
    done = units.finished(parts, (start, stop), context)
    removed = units.remove_others(parts, done)
    if run.resumed:
        for stale in run.directory.rglob(".*.tmp"):  # this process holds the run's lock: nobody is writing them
            stale.unlink(missing_ok=True)
        rows = sum(unit.rows for unit in done)
        run.log(f"resumed: {len(done)} units with {rows:,} rows are done, {removed} unfinished files removed")
    earlier = earlier_parts(config, run, predictor) if config.score.mode == "append" else {}
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
        earlier=str(earlier["parts"]) if earlier else None,
    )
    items = list(plan_items(left, earlier.get("units", {}), config.score.unit_rows, predictor.tile_rows))
    return Plan(job, dataset, views, start, stop, done, items)


def context_of(config: Config, predictor: Predictor, dataset: Dataset, rows: tuple[int, int]) -> dict[str, Any]:
    """Whatever decides the bytes of a part, under the names that a message gives them."""
    files = predictor.bundle.manifest["files"]
    return {
        "format": FORMAT,
        "weights": files["model.safetensors"]["sha256"],
        "architecture": files["model.json"]["sha256"],
        "feature state": files["features.json"]["sha256"],
        "model": predictor.digest,
        "input": dataset.digest,
        "rows": list(rows),
        "columns": list(passed_columns(config)),
        "compression": config.score.compression_level,
        "profile": config.score.profile and predictor.profile_spec is not None and predictor.profile_spec.digest,
        "device": predictor.device,
    }


def plan_items(
    left: list[tuple[int, int]], earlier: dict[tuple[int, int], str], unit_rows: int, tile_rows: int
) -> Iterator[dict[str, Any]]:
    """Items for the pool: ranges that an earlier run has whole (with its digest), and the rest cut anew."""
    edges = {edge for span in left for edge in span}
    known = [
        span
        for span in sorted(earlier)
        if any(low <= span[0] and span[1] <= high for low, high in left)
        # A unit that ends within a tile has gained rows: digests are of whole tiles.
        and all(edge % tile_rows == 0 or edge in edges for edge in span)
    ]
    for start, stop in known:
        yield {"start": start, "stop": stop, "earlier": earlier[start, stop]}
    rest = itertools.chain.from_iterable(
        units.gaps(span, [one for one in known if span[0] <= one[0] < span[1]]) for span in left
    )
    for start, stop in units.cut(rest, unit_rows, tile_rows):
        yield {"start": start, "stop": stop}


def earlier_parts(config: Config, run: Run, predictor: Predictor) -> dict[str, Any]:
    """`parts` folder and units {(start, stop): digest} of the newest finished run that this one may append to."""
    for directory in sorted(run.directory.parent.glob("*-*"), reverse=True):
        path = directory / units.CONTEXT
        if directory == run.directory or not (directory / "DONE").exists() or not path.exists():
            continue
        context = storage.read_json(path)
        asked = context_of(config, predictor, EMPTY, (0, 0))
        if any(context[name] != asked[name] for name in asked if name not in ("input", "rows")):
            continue
        ledger = storage.read_parquet(directory / "ledger.parquet", ["start", "stop", "digest"])
        found = {(row["start"], row["stop"]): row["digest"] for row in ledger.to_pylist()}
        run.log(f"appending to {directory}: {len(found)} units")
        run.note(appended_to=load_record(directory)["chain"].get("scores"))
        return {"parts": (directory / "parts").absolute(), "units": found}
    run.log("nothing to append to: no finished run of this name has the same model and columns; scoring all rows")
    return {}


EMPTY = Dataset(Path(), {"digest": ""})


# ---------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Tally:
    """What the units of this attempt came to."""

    skipped: int = 0
    scored: int = 0
    reused: int = 0
    retried: int = 0
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    memory: int = 0
    elapsed: float = 0.0
    startup: float = 0.0
    done: list[Unit] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: pool.Outcome, context: str) -> None:
        """Count one outcome; the record itself stays on disk."""
        unit = units.make_unit(outcome.item["start"], outcome.item["stop"], context)
        self.retried += outcome.tries - 1
        record = outcome.result
        if record is None:
            self.failed.append({"start": unit.start, "stop": unit.stop, "tries": outcome.tries, "cause": outcome.cause})
            return
        self.done.append(unit)
        self.scored += not record.get("found") and not record["reused"]
        self.reused += record["reused"]
        self.skipped += bool(record.get("found"))
        self.rows += record["rows"]
        self.memory = max(self.memory, record["peak_memory_bytes"])
        for stage, seconds in record["seconds"].items():
            self.seconds[stage] += seconds

    def metrics(self) -> dict[str, float]:
        """`score/...` numbers; seconds of a stage are added over the workers."""
        return {
            "units_skipped": float(self.skipped),
            "score/units_scored": float(self.scored),
            "score/units_reused": float(self.reused),
            "score/units_retried": float(self.retried),
            "score/units_failed": float(len(self.failed)),
            "score/startup_seconds": self.startup,
            "score/scoring_seconds": self.elapsed,
            "score/rows_per_second": self.rows / max(self.elapsed, 1e-9),
            "score/peak_memory_bytes": float(max(self.memory, peak_memory())),
            **{f"score/{stage}_seconds": seconds for stage, seconds in self.seconds.items()},
        }


def score_units(config: Config, run: Run, predictor: Predictor, plan: Plan) -> Tally:
    """Have every unit that is left scored; returns the tally, units done before included."""
    tally = Tally(skipped=len(plan.done), done=list(plan.done))
    done_rows = sum(unit.rows for unit in plan.done)
    began = time.monotonic()
    with run.progress("score", plan.stop - plan.start, start=done_rows) as progress:
        for outcome in outcomes(config, run, predictor, plan):
            if outcome.result is not None and config.cluster.kind == "ray" and not tally.rows:
                # Until the first actor had loaded the model, that is: its first unit began so long before it ended.
                tally.startup = time.monotonic() - began - sum(outcome.result["seconds"].values())
            tally.add(outcome, plan.job.context)
            note = f"{tally.retried} retried, {len(tally.failed)} set aside" if tally.retried or tally.failed else ""
            progress.advance(outcome.item["stop"] - outcome.item["start"], note)
            if outcome.result is None:
                run.warn(f"rows {outcome.item['start']} to {outcome.item['stop']} set aside: {outcome.cause}")
    tally.elapsed = time.monotonic() - began - tally.startup
    return tally


def outcomes(config: Config, run: Run, predictor: Predictor, plan: Plan) -> Iterator[pool.Outcome]:
    """Outcomes of the items left, from threads or from Ray."""
    if not plan.items:
        return
    if config.cluster.kind == "local":
        with Team(1) as team:
            alone = dataclasses.replace(predictor, threads=1, team=team)
            worker = UnitScorer(plan.job, alone, plan.dataset, plan.views)
            threads = compute_threads(config)
            yield from pool.run_threads(worker, plan.items, threads, config.score.tries, single_threaded)
        return
    left = {item["start"]: item for item in plan.items}
    while left:
        try:
            for outcome in ray_outcomes(config, plan, list(left.values())):
                del left[outcome.item["start"]]
                yield outcome
        except pool.NodeLost as lost:
            run.warn(f"{lost}; going on with the nodes that are left")
            # A pool on fewer nodes is better than none.
            config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, min_workers=1))


def ray_outcomes(config: Config, plan: Plan, items: list[dict[str, Any]]) -> Iterator[pool.Outcome]:
    """Outcomes from a pool of Ray actors."""
    parts = Path(plan.job.parts)
    with cluster.session(config) as session:
        cluster.check_shared(session, [parts, Path(config.paths.store)])
        # Cores of this machine are shared out; of another one nothing is known but what the config says.
        here = max(1, compute_threads(config) // config.cluster.workers) if session.local else 1
        threads = config.cluster.threads or here
        actors = pool.Actors(
            config.cluster.workers,
            cpus=1 if session.local else threads,
            gpus=config.cluster.gpus_per_worker,
            patience=cluster.timeout_seconds(config),
        )
        marks = parts / "tries"
        marks.mkdir(exist_ok=True)
        make = functools.partial(open_scorer, plan.job, threads)
        yield from pool.run_actors(make, items, actors, config.score.tries, marks)


# ------------------------------------------------------------------------------------------------------- publishing


def publish(config: Config, run: Run, predictor: Predictor, plan: Plan, tally: Tally) -> dict[str, float]:
    """Ledger, profile, predictions; the manifest last. Returns counts."""
    merged = Merged(predictor)
    parts = run.path("parts")
    ledger: list[dict[str, Any]] = []
    for unit in sorted(tally.done):
        record = units.read_record(parts, unit)
        if record is None:
            raise UserError(f"{units.part_path(parts, unit)} is gone or damaged: run the command again")
        merged.add(record)
        ledger.append({name: record[name] for name in LEDGER})
    check_counts(plan, tally, merged)
    write_refused(run, parts, sorted(tally.done), plan.dataset)
    storage.write_parquet(run.path("ledger.parquet"), ledger_table(ledger, tally.failed))
    if merged.profile is not None:
        storage.write_json(run.path("profile.json"), merged.profile.to_json())
    place = place_of(config, run)
    files = write_predictions(config, run, place, predictor, plan, sorted(tally.done), merged)
    scores = merged.hexdigest()
    manifest = {
        "format": FORMAT,
        "complete": not tally.failed,
        "rows": merged.rows,
        "model": predictor.digest,
        "scores": scores,
        "set_aside": tally.failed,
        "partition": partition_of(config),
        "files": files,
    }
    output.publish(place, manifest)
    if not tally.failed:
        run.link("scores", scores)
        run.add_output("predictions", scores)
        if merged.profile is not None:
            run.add_output("profile", merged.profile.digest)
    return {
        "score/rows": float(merged.rows),
        "score/rows_quarantined": float(merged.quarantined),
        "score/rows_quarantined_at_ingest": float(quarantined_at_ingest(plan.dataset)),
        "score/files": float(len(files)),
        "score/units": float(len(ledger)),
    }


def partition_of(config: Config) -> dict[str, str] | None:
    """The column that folders stand for, with its type."""
    name = config.score.partition
    return None if name is None else {"column": name, "type": config.data.columns[name].type}


def place_of(config: Config, run: Run) -> Place:
    """Where this run's predictions go; noted in run.json, so that `predictions` finds them from anywhere."""
    wanted = config.score
    if wanted.output is not None:
        here = wanted.output if "://" in wanted.output else str(Path(wanted.output).expanduser().absolute())
        run.note(predictions={"output": here, "endpoint": wanted.endpoint, "region": wanted.region})
    return output.place_of(wanted.output, run.directory, wanted.endpoint, wanted.region)


LEDGER = ("start", "stop", "digest", "rows", "quarantined", "input")


class Merged:
    """The records of all units in dataset order, merged: counts, digest of the scores, profile."""

    def __init__(self, predictor: Predictor) -> None:
        self._spec = predictor.profile_spec
        self._hasher = hashlib.sha256()
        self.rows = self.quarantined = self.part_bytes = 0
        self.profile: Profile | None = None

    def add(self, record: dict[str, Any]) -> None:
        """The next unit in dataset order."""
        self.rows += record["rows"]
        self.quarantined += record["quarantined"]
        self.part_bytes += record["part"]["bytes"]
        for tile in record["tiles"]:
            self._hasher.update(bytes.fromhex(tile))
        if self._spec is not None and record["profile"] is not None:
            found = Profile.from_json(record["profile"], self._spec)
            self.profile = found if self.profile is None else self.profile.merge(found)

    def hexdigest(self) -> str:
        """Content digest over row ids and scores in dataset order: the same for any units and workers."""
        return digest.of_json([FORMAT, self.rows, self._hasher.hexdigest()])


def check_counts(plan: Plan, tally: Tally, merged: Merged) -> None:
    """In = scored + quarantined + set aside, and no row twice."""
    aside = sum(unit["stop"] - unit["start"] for unit in tally.failed)
    covered = list(units.gaps((plan.start, plan.stop), [(unit.start, unit.stop) for unit in tally.done]))
    missing = sum(stop - start for start, stop in covered)
    total = merged.rows + merged.quarantined + aside
    if total != plan.stop - plan.start or missing != aside:
        raise AssertionError(f"{plan.stop - plan.start} rows in, {total} out, {missing} in no unit")


def write_refused(run: Run, parts: Path, done: list[Unit], dataset: Dataset) -> None:
    """`quarantine/rows.parquet`: dataset row, id and reason of every row that the model could not take;
    `quarantine/ingest.parquet`: what ingest has set aside before (file, row and reason).
    """
    paths = [path for path in (units.refused_path(parts, unit) for unit in done) if path.exists()]
    if paths:
        storage.write_parquet(
            run.path("quarantine", "rows.parquet"), pa.concat_tables(map(storage.read_parquet, paths))
        )
    if quarantined_at_ingest(dataset):
        storage.link(dataset.directory / "quarantine" / "quarantine.parquet", run.path("quarantine", "ingest.parquet"))


def quarantined_at_ingest(dataset: Dataset) -> int:
    """Rows of the sources (of any time: theirs may be what is wrong) that are not in the dataset."""
    return int(dataset.manifest["accounting"]["quarantined"])


def ledger_table(done: list[dict[str, Any]], failed: list[dict[str, Any]]) -> pa.Table:
    """One row a unit in dataset order: rows, counts, digests, state and cause. No time, run or path."""
    rows = [{**record, "state": "done", "cause": ""} for record in done]
    rows += [
        {
            "start": unit["start"],
            "stop": unit["stop"],
            "rows": 0,
            "quarantined": 0,
            "state": "set aside",
            "cause": unit["cause"],
        }
        for unit in failed
    ]
    schema = pa.schema([
        ("start", pa.int64()), ("stop", pa.int64()), ("digest", pa.string()), ("rows", pa.int64()),
        ("quarantined", pa.int64()), ("input", pa.string()), ("state", pa.string()), ("cause", pa.string()),
    ])  # fmt: skip
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["start"]), schema)


def write_predictions(
    config: Config, run: Run, place: Place, predictor: Predictor, plan: Plan, done: list[Unit], merged: Merged
) -> list[dict[str, Any]]:
    """The output files; a run without any row still leaves one empty file, so that a reader finds the columns."""
    parts = run.path("parts")
    layout = output.layout_of(config.score, merged.rows, merged.part_bytes)
    paths = [units.part_path(parts, unit) for unit in done]
    if not merged.rows:
        empty = parts / "empty.parquet"
        storage.write_parquet(empty, UnitScorer(plan.job, predictor, plan.dataset, plan.views).empty())
        paths, layout = [empty], output.Layout()
    return output.write_files(place, paths, layout, run.path("parts", "rolled"))


def failed_message(run: Run, tally: Tally) -> str:
    """What was set aside and why."""
    first = tally.failed[0]
    more = f" and {len(tally.failed) - 1} more" if len(tally.failed) > 1 else ""
    return (
        f"every unit must be scored, but rows {first['start']} to {first['stop']}{more} failed {first['tries']} times: "
        f"{first['cause']}. The other units are done and published in {run.directory} as incomplete; mend the cause "
        "and run the command again"
    )


def predictions(directory: Path, *, incomplete: bool = False) -> pa.Table:
    """All predictions of a scoring run, in dataset order, as its manifest names them.

    Raises UserError for a run that set units aside, unless `incomplete` rows are asked for.
    """
    wanted = load_record(directory).get("predictions", {})
    place = output.place_of(wanted.get("output"), directory, wanted.get("endpoint"), wanted.get("region"))
    manifest = output.read_manifest(place)
    if manifest is not None and not manifest["complete"] and not incomplete:
        raise UserError(f"{directory} is incomplete: {len(manifest['set_aside'])} units were set aside; run it again")
    return output.read_predictions(place)
