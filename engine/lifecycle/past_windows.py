"""Monitors past windows with the `monitor` step; records are stored by content and code."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from engine.config import schema, units
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.challenger import Workshop, spec_config
from engine.lifecycle.observations import observation
from engine.lifecycle.retrain_rules import Observation
from engine.monitoring.drift_record import DriftRecord
from engine.monitoring.monitor import monitor
from engine.runtime import digest, records, seal, storage
from engine.runtime.run import Run
from engine.scoring.predictor import Predictor

FORMAT = 2  # of drift.json


class Watch:
    """Monitors windows of a workshop's data with the models that scored them."""

    def __init__(self, workshop: Workshop, metric: str, cache: Path) -> None:
        self.workshop = workshop
        self.metric = metric
        self.cache = cache

    def window(self, predictor: Predictor, start: int, stop: int) -> Observation:
        """The monitored window [start, stop) against this model's reference, without labels."""
        config = self._config(predictor, start, stop)
        asked = {**schema.plain(config.monitor), "model": predictor.digest}
        recipe = digest.of_json([FORMAT, self.workshop.code, self.workshop.history.dataset.digest, asked])
        path = self.cache / f"{recipe}.json"
        found: DriftRecord | None = None
        with contextlib.suppress(UserError):  # missing or damaged: it is recomputed
            found = seal.read_checked(path, DriftRecord)
        if found is None:
            parent = self.workshop.run
            run = Run.create("monitor", config, schema.plain(config), hidden=parent.hidden)
            run.note(parent=str(parent.directory))
            try:
                run.finish(monitor(config, run))
            except BaseException as error:
                run.fail(error)
                raise
            found = records.read(run.path("drift.json"), DriftRecord)
            storage.write_json(path, seal.checked(found))
        return observation(found, self.metric, self.workshop.history.config.data.time_zone)

    def _config(self, predictor: Predictor, start: int, stop: int) -> Config:
        base = spec_config(self.workshop.history.config, predictor.bundle)
        settings = dataclasses.replace(
            base.monitor,
            model=str(predictor.bundle.directory),
            window=(units.format_instant(start), units.format_instant(stop)),
            run="",
            labels=False,
            alarm_on=("drift",),
            rule="distance",  # the rules of retraining ask how far the data have moved, and each window stands alone
            alerts={},
        )
        return dataclasses.replace(base, monitor=settings)
