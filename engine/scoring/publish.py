"""Finishes a scoring run: merges records in dataset order and writes quarantine, profile, predictions, manifest and ledger."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from engine.config.tree import Config
from engine.data.dataset import Dataset
from engine.errors import UserError
from engine.features.profile import Profile
from engine.runtime import digest, remote, storage
from engine.runtime.run import Run
from engine.scoring import export, output, units
from engine.scoring.output import Place
from engine.scoring.plan import ScoringPlan
from engine.scoring.predictor import Predictor
from engine.scoring.units import SetAside, Unit, UnitRecord
from engine.scoring.worker import UnitScorer

FORMAT = 1  # of the digest of the scores


class LedgerRow(TypedDict):
    """A unit in ledger.parquet: rows, counts, digests, state and cause. No time, run or path."""

    start: int
    stop: int
    digest: str | None
    rows: int
    quarantined: int
    input: str | None
    state: str
    cause: str


def publish(
    config: Config, run: Run, predictor: Predictor, plan: ScoringPlan, done: list[Unit], failed: list[SetAside]
) -> dict[str, float]:
    """Publish the units `done` (in dataset order) beside those that were set aside. Returns counts."""
    merged = Merged(predictor)
    parts = run.path("parts")
    ledger: list[LedgerRow] = []
    scored: dict[Path, str] = {}
    for unit in done:
        record = units.read_record(parts, unit)
        if record is None:
            raise UserError(f"{units.part_path(parts, unit)} is missing or damaged: run the command again")
        merged.add(record)
        ledger.append(
            {
                "start": record["start"],
                "stop": record["stop"],
                "digest": record["digest"],
                "rows": record["rows"],
                "quarantined": record["quarantined"],
                "input": record["input"],
                "state": "done",
                "cause": "",
            }
        )
        scored[units.part_path(parts, unit)] = record["part"]["sha256"]  # read_record has checked it
    check_counts(plan, done, failed, merged)
    write_refused(run, parts, done, plan.dataset)
    if merged.profile is not None:
        storage.write_json(run.path("profile.json"), merged.profile.to_json())
    layout = output.layout_of(config.score, merged.rows, merged.part_bytes)
    if not merged.rows:
        scored, layout = empty_part(run, predictor, plan), output.Layout()
    place = place_of(config, run, whole=not failed)
    scores = merged.hexdigest()
    with place.lock():
        files = output.write_files(place, scored, layout, run.path("parts", "rolled"))
        manifest: output.ManifestRecord = {
            "format": output.FORMAT,
            "complete": not failed,
            "rows": merged.rows,
            "model": predictor.digest,
            "score": predictor.meaning,
            "score_type": predictor.model.target.kind,
            "scores": scores,
            "set_aside": failed,
            "partition": partition_of(config),
            "files": files,
        }
        if config.score.reasons:
            manifest["reasons"] = {"count": config.score.reasons, "margin": predictor.margin}
        output.publish(place, manifest)
    storage.write_parquet(run.path("ledger.parquet"), ledger_table(ledger, failed))
    if export.is_file(config.score.output):
        if not failed:
            write_file(config, run, scored)
    elif config.score.output is not None and not failed:  # leftovers of an attempt that set units aside
        shutil.rmtree(run.path("predictions"), ignore_errors=True)
    units.remove_others(parts, done)
    if not failed:
        run.link("scores", scores)
        if config.score.reasons:
            run.link("reasons", merged.reasons_digest())
        run.add_output("predictions", scores)
        if merged.profile is not None:
            run.add_output("profile", merged.profile.digest)
    more = {"score/reasons_error": merged.error} if config.score.reasons else {}
    return {
        **more,
        "score/rows": float(merged.rows),
        "score/rows_quarantined": float(merged.quarantined),
        "score/rows_quarantined_at_ingest": float(quarantined_at_ingest(plan.dataset)),
        "score/files": float(len(files)),
        "score/units": float(len(ledger)),
    }


def write_file(config: Config, run: Run, parts: Mapping[Path, str]) -> None:
    """`score.output` as one file, made from the parts that were just published."""
    target = str(config.score.output)
    folder, _, name = target.rpartition("/")
    if "://" in target:
        path = run.path("parts", name)
        rows = export.write_file(path, parts, config)
        output.place_of(folder, run.directory, config.score.endpoint, config.score.region).put(path, name)
    else:
        path = Path(target).expanduser().absolute()
        with storage.atomic_path(path) as temporary:
            rows = export.write_file(temporary, parts, config)
    run.add_output("file", digest.of_file(path))
    order = f"{config.data.event_time} and then the ids" if config.data.timed else "a hash of the ids"
    run.log(f"{rows:,} rows written to {target}, in the order of {order}")


def partition_of(config: Config) -> output.Partition | None:
    """The partition column, with its type."""
    name = config.score.partition
    return None if name is None else {"column": name, "type": config.data.columns[name].type}


def place_of(config: Config, run: Run, whole: bool) -> Place:
    """The place of this run's predictions; recorded in run.json, so that `predictions` finds them.

    Incomplete ones stay in the run directory: the contents of `score.output` are replaced completely or not at all.
    """
    wanted = config.score
    if not whole or export.is_file(wanted.output):
        return output.place_of(None, run.directory)
    if wanted.output is not None:
        remote.record(Path(config.paths.store), remote.place(wanted.output, wanted.endpoint, wanted.region))
        here = wanted.output if "://" in wanted.output else str(Path(wanted.output).expanduser().absolute())
        run.note(predictions={"output": here, "endpoint": wanted.endpoint, "region": wanted.region})
    return output.place_of(wanted.output, run.directory, wanted.endpoint, wanted.region)


class Merged:
    """The records of all units in dataset order, merged: counts, digest of the scores, profile."""

    def __init__(self, predictor: Predictor) -> None:
        self._spec = predictor.profile_spec
        self._hasher, self._reasons = hashlib.sha256(), hashlib.sha256()
        self.error = 0.0
        self.rows = self.quarantined = self.part_bytes = 0
        self.profile: Profile | None = None

    def add(self, record: UnitRecord) -> None:
        """The next unit in dataset order."""
        self.rows += record["rows"]
        self.quarantined += record["quarantined"]
        self.part_bytes += record["part"]["bytes"]
        for tile in record["tiles"]:
            self._hasher.update(bytes.fromhex(tile))
        if "reasons" in record:
            self.error = max(self.error, record["reasons"]["error"])
            for tile in record["reasons"]["tiles"]:
                self._reasons.update(bytes.fromhex(tile))
        if self._spec is not None and record["profile"] is not None:
            found = Profile.from_json(record["profile"], self._spec)
            self.profile = found if self.profile is None else self.profile.merge(found)

    def hexdigest(self) -> str:
        """Content digest over row ids and scores in dataset order: the same for any units and workers."""
        return digest.of_json([FORMAT, self.rows, self._hasher.hexdigest()])

    def reasons_digest(self) -> str:
        """The same of row ids and reasons."""
        return digest.of_json([FORMAT, self.rows, self._reasons.hexdigest()])


def check_counts(plan: ScoringPlan, done: list[Unit], failed: list[SetAside], merged: Merged) -> None:
    """Assert that rows in = scored + quarantined + set aside, and that no row counts twice."""
    aside = sum(unit["stop"] - unit["start"] for unit in failed)
    covered = list(units.gaps((plan.start, plan.stop), [(unit.start, unit.stop) for unit in done]))
    missing = sum(stop - start for start, stop in covered)
    total = merged.rows + merged.quarantined + aside
    if total != plan.stop - plan.start or missing != aside:
        raise AssertionError(f"{plan.stop - plan.start} rows in, {total} out, {missing} in no unit")


def write_refused(run: Run, parts: Path, done: list[Unit], dataset: Dataset) -> None:
    """`quarantine/rows.parquet`: dataset row, id and reason of every row that the model could not take;
    `quarantine/ingest.parquet`: rows that ingest set aside (file, row and reason).
    """
    paths = [path for path in (units.refused_path(parts, unit) for unit in done) if path.exists()]
    if paths:
        # One unit in memory at a time: the model may refuse every row.
        with storage.atomic_path(run.path("quarantine", "rows.parquet")) as temporary:
            schema = pq.read_schema(paths[0])
            with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
                for path in paths:
                    writer.write_table(storage.read_parquet(path))
    if quarantined_at_ingest(dataset):
        storage.link(dataset.directory / "quarantine" / "quarantine.parquet", run.path("quarantine", "ingest.parquet"))


def quarantined_at_ingest(dataset: Dataset) -> int:
    """Rows of the sources that are not in the dataset, of any time, because their time itself may be invalid."""
    return int(dataset.manifest["accounting"]["quarantined"])


def ledger_table(done: list[LedgerRow], failed: list[SetAside]) -> pa.Table:
    """One row per unit in dataset order."""
    rows = done + [
        {
            "start": unit["start"],
            "stop": unit["stop"],
            "digest": None,
            "rows": 0,
            "quarantined": 0,
            "input": None,
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


def empty_part(run: Run, predictor: Predictor, plan: ScoringPlan) -> dict[Path, str]:
    """The one part (path -> SHA-256) of a run without any row, so that a reader finds the columns."""
    empty = run.path("parts", "empty.part")
    storage.write_parquet(empty, UnitScorer(plan.job, predictor, plan.dataset, plan.views).empty())
    return {empty: digest.of_file(empty)}
