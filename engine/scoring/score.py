"""The `score` step: every row of a period scored once by a trained model."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa

from engine.config import units
from engine.config.tree import Config
from engine.data import ingest
from engine.data.dataset import row_ids
from engine.errors import UserError
from engine.features import build
from engine.features.build import FeatureTable
from engine.runtime import digest, storage
from engine.runtime.run import Run
from engine.scoring.predictor import Predictor, load, score_columns
from engine.training.gate import check_gate
from engine.training.train import with_spec_of


def score(config: Config, run: Run) -> dict[str, float]:
    """Check the gate, then write `predictions/*.parquet`, one part a work unit of rows."""
    began = time.monotonic()
    predictor = load(config.score.model, config.paths.runs, config.resources.threads)
    run.note(model=predictor.digest)
    config = with_spec_of(config, predictor.bundle)
    gate_rows = check_gate(predictor.bundle, predictor.model)
    dataset = ingest.ensure(config, run)
    table = build.ensure(config, run, dataset)
    bounds = config.score.between
    start, stop = dataset.row_range(*units.between(bounds, config.data.time_zone)) if bounds else (0, dataset.rows)
    if start == stop:
        run.warn(f"no row lies in score.between {list(bounds)}: nothing to score")
    content = digest.TableDigest(_schema(config, predictor, table))
    with run.progress("score", stop - start) as progress:
        for low in range(start, stop, config.score.unit_rows):
            part = score_rows(config, predictor, table, (low, min(low + config.score.unit_rows, stop)))
            storage.write_parquet(run.path("predictions", f"part-{low:012d}.parquet"), part)
            content.update(part)
            progress.advance(part.num_rows)
    if content.rows != stop - start:
        raise UserError(f"every row must be scored once: {stop - start} rows in, {content.rows} out")
    run.link("scores", content.hexdigest())
    run.add_output("predictions", content.hexdigest())
    seconds = time.monotonic() - began
    return {
        "score/rows": float(content.rows),
        "score/gate_rows": float(gate_rows),
        "score/seconds": seconds,
        "score/rows_per_second": content.rows / max(seconds, 1e-9),
    }


def score_rows(config: Config, predictor: Predictor, table: FeatureTable, rows: tuple[int, int]) -> pa.Table:
    """Row ids, event times, passed-through columns, scores and the model's digest of a range of dataset rows."""
    data = config.data
    facts = table.dataset.read(list(dict.fromkeys([*data.ids, data.event_time, *config.score.columns])), rows=rows)
    scores = predictor.scores(table.read(rows))
    columns = {
        "row_id": row_ids(facts, data.ids),
        data.event_time: facts[data.event_time],
        **{name: facts[name] for name in config.score.columns},
        **score_columns(scores, predictor.classes),
        "model": pa.array([predictor.digest] * facts.num_rows, pa.string()).dictionary_encode(),
    }
    return pa.table(columns)


def _schema(config: Config, predictor: Predictor, table: FeatureTable) -> pa.Schema:
    return score_rows(config, predictor, table, (0, 0)).schema


def predictions(run: Path) -> pa.Table:
    """All predictions of a scoring run, in dataset order."""
    parts = sorted((run / "predictions").glob("part-*.parquet"))
    if not parts:
        raise UserError(f"{run} must hold predictions/part-*.parquet, found none")
    return pa.concat_tables([storage.read_parquet(part) for part in parts])
