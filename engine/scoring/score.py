"""The `score` step: a trained model scores every row of a period exactly once, also when workers or commands are killed.

Work units go to threads or Ray actors (worker.py), which commit each by its record (units.py). The driver lists the
units that are done, has the rest scored, and then publishes predictions, ledger and profile (publish.py). Rows pass
through the driver only where the output needs other files than the workers' parts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import storage
from engine.runtime.on_ray import cluster, pool
from engine.runtime.registry import NoAlias
from engine.runtime.run import Run, load_record
from engine.scoring import export, output, units
from engine.scoring.inputs import forget
from engine.scoring.plan import ScoringPlan, check_columns, prepare
from engine.scoring.predictor import Predictor, predictor_of, single_threaded
from engine.scoring.publish import publish
from engine.scoring.units import Item, Reply, SetAside, Unit
from engine.scoring.worker import STAGES, Job, UnitScorer, open_scorer, peak_memory
from engine.training.bundle import find_model, read_bundle
from engine.training.bundle_spec import with_spec_of
from engine.training.classes import describe_score
from engine.training.device import has_gpu, why_no_gpu
from engine.training.gate import check_gate
from engine.training.threads import Team, compute_threads

MOST_LOST, LEAST_ERROR = 0.25, 1e-4  # of the largest distance from the baseline, and what rounding may lose


def check_scorable(config: Config) -> None:
    """Check before any work that the model exists, and that a file of scores has a supported format."""
    find_model(config.score.model, Path(config.paths.runs))
    find_shadow(config)
    export.is_file(config.score.output)


def score(config: Config, run: Run) -> dict[str, float]:
    """Check the gate, score the units that are not done, publish. Raises UserError naming units that were set aside."""
    began = time.monotonic()
    bundle = read_bundle(find_model(config.score.model, Path(config.paths.runs)))
    threads, device = compute_threads(config), device_of(config)
    run.note(model=bundle.digest)
    config = with_spec_of(config, bundle)
    predictor = predictor_of(bundle, threads, device)
    model = predictor.bundle.model
    run.log(f"score: {describe_score(config.data.target or '', model['classes'], predictor.bundle.loss)}")
    if predictor.scorer is not None and predictor.scorer.on_cpu:
        run.log(f"score: rows are encoded and counted on the CPU ({predictor.scorer.on_cpu})")
    predictor = with_shadow(config, run, predictor)
    check_columns(config, predictor.columns, predictor.added)
    if config.score.reasons:
        check_reasons(predictor)
        run.log(f"score: contributions of reasons add up to the {predictor.margin}")
    gate_rows = check_predictor(predictor)
    plan = prepare(config, run, predictor)
    export.check_apart(config.score.output, (file["file"] for file in plan.dataset.manifest["accounting"]["files"]))
    tally = score_units(config, run, predictor, plan)
    scored = time.monotonic()
    before = published_files(Path(plan.job.earlier).parent) if plan.job.earlier else set()
    facts = publish(config, run, predictor, plan, sorted(tally.done), tally.failed)
    if plan.job.earlier and not tally.failed:
        tell_appended(run, plan, tally, before)
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
    forget(run)
    return metrics


def check_predictor(predictor: Predictor) -> int:
    """Check the gate on the device that scores; returns the rows checked. Raises UserError."""
    elsewhere = predictor.logits if predictor.device != "cpu" else None
    return check_gate(predictor.bundle, predictor.model, predictor.threads, elsewhere)


def check_reasons(predictor: Predictor) -> None:
    """Check on the gate's rows that reasons do not depend on a row's place, and that contributions add up to margins.

    Raises UserError for a model that cannot be explained.
    """
    scored = predictor.scored(storage.read_parquet(predictor.bundle.directory / "gate" / "features.parquet"))
    numeric, codes, scores = (
        np.ascontiguousarray(part[::-1]) for part in (scored.numeric, scored.codes, scored.scores)
    )
    most = len(predictor.bundle.encoder.features)
    found = predictor.reasons(scored.numeric, scored.codes, scored.scores, most)
    turned = predictor.reasons(numeric, codes, scores, most)
    if not np.array_equal(found.packed(), turned.packed()[::-1]):
        raise UserError(
            "score.reasons must be 0 for this model: the gradients of a row depend on its place among other rows, so that its "
            "reasons would change from run to run"
        )
    if found.error > MOST_LOST * found.distance + LEAST_ERROR:
        raise UserError(
            f"score.reasons must be 0 for this model: the contributions of a training row miss its margin by {found.error:.3g}, "
            f"where margins are up to {found.distance:.3g} from the baseline. A model whose output jumps between two rows (it "
            "rounds, compares or detaches numbers) has no gradients that explain it"
        )


def find_shadow(config: Config) -> Path | None:
    """The bundle of `score.shadow`; None without one, and while there is no challenger. Raises UserError."""
    if config.score.shadow is None:
        return None
    try:
        return find_model(config.score.shadow, Path(config.paths.runs), "score.shadow")
    except NoAlias:
        return None


def with_shadow(config: Config, run: Run, predictor: Predictor) -> Predictor:
    """The predictor with the model of `score.shadow`, if any: rows and features are read once for both.

    Raises UserError where its specification or classes differ from the model's, or its gate fails.
    """
    found = find_shadow(config)
    if found is None:
        if config.score.shadow:
            run.log(f"score.shadow={config.score.shadow} names no model now: there are no shadow scores")
        return predictor
    bundle = read_bundle(found)
    run.note(shadow=bundle.digest)
    with_spec_of(config, bundle)
    shadow = predictor_of(bundle, predictor.threads, predictor.device)
    if shadow.columns != predictor.columns:
        raise UserError(
            f"score.shadow must have the scores of score.model, {list(predictor.columns)}, found "
            f"{list(shadow.columns)}: score with it in another run"
        )
    check_predictor(shadow)
    return dataclasses.replace(predictor, shadow=shadow)


def device_of(config: Config) -> str:
    """The device of the models: a GPU when workers have any.

    Raises UserError where this process, which checks the gate on the device that scores, sees none.
    """
    gpus = config.cluster.gpus_per_worker
    if gpus and not has_gpu():
        raise UserError(
            f"cluster.gpus_per_worker={gpus:g} needs an NVIDIA GPU where the command starts too, for the gate, found none: "
            f"{why_no_gpu()}. Use cluster.gpus_per_worker=0"
        )
    return "cuda" if gpus else "cpu"


Outcome = pool.Outcome[Item, Reply]


@dataclass
class Tally:
    """The outcomes of this attempt's units."""

    skipped: int = 0
    scored: int = 0
    reused: int = 0
    reused_rows: int = 0
    retried: int = 0
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    memory: int = 0
    elapsed: float = 0.0
    startup: float = 0.0
    shutdown: float = 0.0
    done: list[Unit] = field(default_factory=list)
    failed: list[SetAside] = field(default_factory=list)

    def add(self, outcome: Outcome, context: str) -> None:
        """Count one outcome; the record itself stays on disk."""
        unit = units.make_unit(outcome.item["start"], outcome.item["stop"], context)
        self.retried += outcome.tries - 1
        reply = outcome.result
        if reply is None:
            self.failed.append({"start": unit.start, "stop": unit.stop, "tries": outcome.tries, "cause": outcome.cause})
            return
        self.done.append(unit)
        self.scored += not reply["found"] and not reply["reused"]
        self.reused += reply["reused"]
        self.reused_rows += unit.rows if reply["reused"] else 0
        self.skipped += reply["found"]
        self.rows += reply["rows"]
        self.memory = max(self.memory, reply["peak_memory_bytes"])
        for stage, seconds in reply["seconds"].items():
            self.seconds[stage] += seconds

    def metrics(self) -> dict[str, float]:
        """`score/...` numbers; seconds of a stage are added over the workers."""
        return {
            "units_skipped": float(self.skipped),
            "score/units_scored": float(self.scored),
            "score/units_reused": float(self.reused),
            "score/rows_reused": float(self.reused_rows),
            "score/units_retried": float(self.retried),
            "score/units_failed": float(len(self.failed)),
            "score/startup_seconds": self.startup,
            "score/shutdown_seconds": self.shutdown,
            "score/scoring_seconds": self.elapsed,
            "score/rows_per_second": self.rows / max(self.elapsed, 1e-9),
            "score/peak_memory_bytes": float(max(self.memory, peak_memory())),
            **{f"score/{stage}_seconds": seconds for stage, seconds in self.seconds.items()},
        }


def score_units(config: Config, run: Run, predictor: Predictor, plan: ScoringPlan) -> Tally:
    """Score every unit that is left; returns the tally, which includes units done before."""
    tally = Tally(skipped=len(plan.done), done=list(plan.done))
    done_rows = sum(unit.rows for unit in plan.done)
    began = ended = time.monotonic()
    with run.progress("score", plan.stop - plan.start, start=done_rows) as progress:
        for outcome in map(functools.partial(with_record, plan.job), outcomes(config, predictor, plan)):
            if outcome.result is not None and config.cluster.kind == "ray" and not tally.rows:
                # Start-up lasts until the first actor has loaded its model, which is when its first unit began.
                tally.startup = time.monotonic() - began - sum(outcome.result["seconds"].values())
            tally.add(outcome, plan.job.context)
            note = f"{tally.retried} retried, {len(tally.failed)} set aside" if tally.retried or tally.failed else ""
            progress.advance(outcome.item["stop"] - outcome.item["start"], note)
            if outcome.result is None:
                run.warn(f"rows {outcome.item['start']} to {outcome.item['stop']} set aside: {outcome.cause}")
            ended = time.monotonic()
    tally.elapsed = ended - began - tally.startup
    tally.shutdown = time.monotonic() - ended
    return tally


def with_record(job: Job, outcome: Outcome) -> Outcome:
    """The outcome; a unit whose worker died on its last try but after the commit counts as done."""
    unit = units.make_unit(outcome.item["start"], outcome.item["stop"], job.context)
    if outcome.result is not None or (record := units.read_record(Path(job.parts), unit)) is None:
        return outcome
    return dataclasses.replace(outcome, result=units.reply_of(record), cause="")


def outcomes(config: Config, predictor: Predictor, plan: ScoringPlan) -> Iterator[Outcome]:
    """Outcomes of the items left, from threads or from Ray."""
    if not plan.items:
        return
    if config.cluster.kind == "local":
        with Team(1) as team:
            alone = dataclasses.replace(predictor, threads=1, team=team)
            worker = UnitScorer(plan.job, alone, plan.dataset, plan.views)
            threads = compute_threads(config)
            stalled = cluster.stall_seconds(config)
            yield from pool.run_threads(worker, plan.items, threads, config.score.tries, single_threaded, stalled)
        return
    yield from ray_outcomes(config, plan)


def ray_outcomes(config: Config, plan: ScoringPlan) -> Iterator[Outcome]:
    """Outcomes from a pool of Ray actors."""
    parts = Path(plan.job.parts)
    with cluster.session(config) as session:
        cluster.check_shared(session, [parts, Path(config.paths.store)])
        mine, actors = pool.actors_for(config, session.local, config.cluster.gpus_per_worker)
        if (
            len(plan.items) > 2 * config.cluster.workers
        ):  # else an item might wait for a busy actor while another is idle
            actors = dataclasses.replace(actors, ahead=1)
        # A new name, because an actor that outlives its driver for a moment must not count in the next driver's folder.
        marks = parts / f"tries-{uuid.uuid4().hex[:8]}"
        marks.mkdir()
        make = functools.partial(open_scorer, plan.job, mine.resources.threads)
        yield from pool.run_actors(make, plan.items, actors, config.score.tries, marks)


def published_files(directory: Path) -> set[str] | None:
    """SHA-256 of the files of a run's predictions, as its manifest names them; None where they are at a remote address."""
    output_ = load_record(directory).get("predictions", {}).get("output")
    if output_ and "://" in output_:
        return None
    manifest = output.read_manifest(output.place_of(output_, directory))
    return {entry["sha256"] for entry in manifest["files"]} if manifest else set()


def tell_appended(run: Run, plan: ScoringPlan, tally: Tally, before: set[str] | None) -> None:
    """Log the result of `score.mode=append`: rows reused and scored, files kept and new."""
    files = published_files(run.directory)
    compared = (
        "" if files is None or before is None
        else f"; of {len(files)} files {len(files & before)} are unchanged and {len(files - before)} are new"
    )  # fmt: skip
    run.log(
        f"score.mode=append: {tally.reused_rows:,} rows in {tally.reused} units are reused from "
        f"{Path(str(plan.job.earlier)).parent}, {plan.stop - plan.start - tally.reused_rows:,} rows in "
        f"{len(tally.done) - tally.reused} units are new or changed, or share a unit with such rows, and were scored{compared}"
    )


def failed_message(run: Run, tally: Tally) -> str:
    """The error that names the units set aside, with the cause."""
    first = tally.failed[0]
    more = f" and {len(tally.failed) - 1} more" if len(tally.failed) > 1 else ""
    return (
        f"every unit must be scored, but rows {first['start']} to {first['stop']}{more} failed {first['tries']} times: "
        f"{first['cause']}. The other units are done, their rows are in {run.directory}/predictions as incomplete; remove "
        "the cause and run the command again"
    )
