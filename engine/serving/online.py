"""A model and the past in memory: rows in, scores out, with the code of batch scoring."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from engine.config.sections.serving import ServeConfig
from engine.config.tree import Config
from engine.data.dataset import Dataset, row_ids
from engine.features import instants
from engine.features.compute import features_with
from engine.runtime.run import Run
from engine.scoring.inputs import stored_dataset
from engine.scoring.predictor import Predictor, predictor_of
from engine.scoring.worker import finite, refusals
from engine.serving.past import Past
from engine.training.bundle import Bundle, find_model, read_bundle
from engine.training.bundle_spec import with_spec_of
from engine.training.gate import check_gate


@dataclass(frozen=True)
class Answer:
    """What rows are answered: columns of the output [n]; `refused` the reason for rows without a score, or None."""

    columns: pa.Table
    refused: Sequence[str | None]
    bundle: Bundle  # of the model that has answered
    raw: pa.Table  # raw features of all rows
    newest: int | None  # event time of the newest past event

    def rows(self, low: int, high: int) -> Answer:
        """Some of the rows."""
        part = high - low
        return dataclasses.replace(
            self, columns=self.columns.slice(low, part), refused=self.refused[low:high], raw=self.raw.slice(low, part)
        )


@dataclass(frozen=True)
class Online:
    """A predictor and the past that its features read. Only one thread may score at a time."""

    predictor: Predictor
    past: Past
    settings: ServeConfig

    def score(self, rows: pa.Table) -> Answer:
        """Scores of rows in their declared types; the bits of a row do not depend on the others."""
        bundle = self.predictor.bundle
        raw = features_with(
            bundle.data, bundle.features, rows, lambda view: self.past.of(view, rows), self.predictor.threads
        )
        scores = self.predictor.scored(raw).scores
        found = refusals(self.predictor, rows)
        found.add(~finite(scores), "the model gives no finite score")
        if self.settings.max_age is not None and self.past.newest is not None:
            ages = instants.moment_times(rows, bundle.features.decision) - self.past.newest
            found.add(
                ages > self.settings.max_age.microseconds,
                f"the past is older than serve.max_age={self.settings.max_age}",
            )
        reasons = [None if code == 0 else found.reasons[code - 1] for code in found.codes.tolist()]
        columns = pa.table({"row_id": row_ids(rows, bundle.data.ids), **self.predictor.output(scores)})
        return Answer(columns, reasons, bundle, raw, self.past.newest)


def load(config: Config, run: Run, before: Online | None = None) -> Online:
    """The model that `score.model` names now, after a check of its gate, and its past.

    The past of `before` is kept, with the events that were added to it, where both read the same. Raises UserError.
    """
    bundle = read_bundle(find_model(config.score.model, Path(config.paths.runs)))
    config = with_spec_of(config, bundle)
    predictor = predictor_of(bundle, threads=1)
    check_gate(predictor.bundle, predictor.model)
    if before is not None and (before.past.data, before.past.features) == (bundle.data, bundle.features):
        past = before.past
    else:
        past = Past(bundle.data, bundle.features, _dataset(config, run, bundle))
    return Online(predictor, past, config.serve)


def _dataset(config: Config, run: Run, bundle: Bundle) -> Dataset | None:
    """The dataset of past events and side tables; None for a model that reads neither."""
    if not any(view.kind in ("windows", "asof") for view in bundle.features.active_views.values()):
        return None
    found = stored_dataset(config, bundle)
    run.add_used("history", found.digest)
    run.log(f"the past is dataset {found.name} {found.digest[:12]}: {found.rows:,} rows")
    return found
