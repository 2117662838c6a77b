"""The `retrain` step: decides on the newest monitoring record, carries the decision out, and replays saved decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import decide
from engine.lifecycle.challenger import History, Workshop, check_anew
from engine.lifecycle.observations import newest_record, read_observations, read_record
from engine.lifecycle.retrain_rules import Observation
from engine.lifecycle.trainings import trained
from engine.runtime import digest, storage
from engine.runtime.registry import Registry, root_of
from engine.runtime.run import Run
from engine.training.evaluate import watched_metric
from engine.training.losses import loss_of
from engine.training.warm_start import start_bundle


def retrain(config: Config, run: Run) -> dict[str, float]:
    """Decide, train, judge, promote or keep, and write decision.json.

    `retrain.replay` repeats a saved decision from its own evidence and raises UserError where the outcome differs.
    """
    if config.retrain.replay:
        return _replay(Path(config.retrain.replay), run)
    watched_metric(loss_of(config.train), config.train.metric)
    check_anew(config)
    registry = Registry(root_of(config.paths.runs), config.name)
    if registry.state().champion is None:
        raise UserError(
            f"{config.name!r} has no champion to improve on: `python -m engine registry promote {config.name} RUN` makes a "
            "finished training run the first one"
        )
    if config.retrain.start == "champion":  # refused here where training cannot start from it
        start_bundle(replace(config, train=replace(config.train, start_from=f"{config.name}@champion")))
    observations = read_observations(config)
    history = History.read(config, run)
    now = _now(config, observations)
    setting = decide.Setting(
        workshop=Workshop(history, run),
        registry=registry,
        policy=config.retrain,
        directory=run.directory,
        identity=run.directory.name,
        train=lambda plan: trained(plan, run, history.dataset.digest),
    )
    decision = decide.decide(setting, observations, now)
    decision["monitor"] = str(newest_record(config) or "")
    if decision["monitor"]:
        run.add_used("drift", digest.of_json(read_record(Path(decision["monitor"]))))
    storage.write_json(run.path("decision.json"), decision)
    run.add_output("decision", digest.of_json(decision))
    run.note(verdict=decision["verdict"], champion=decision["champion"], challenger=decision["challenger"])
    if "challenger_run" in decision:
        run.note(challenger_run=decision["challenger_run"])
    for reason in [decision["verdict"], *decision["reasons"]]:
        run.log(reason)
    return figures(decision)


def _now(config: Config, observations: tuple[Observation, ...]) -> int:
    if "retrain.now" in config.instants:
        return config.instants["retrain.now"]
    if not observations:
        raise UserError(
            f"retrain decides at the end of the newest monitored window, found no monitoring run of {config.name!r} in "
            f"{config.paths.runs}: run `monitor` first, or set retrain.now"
        )
    return max(item.stop for item in observations)


def _replay(path: Path, run: Run) -> dict[str, float]:
    saved, differences = decide.replay(path)
    if differences:
        raise UserError(f"{path} gives another decision than it records: " + "; ".join(differences))
    run.log(f"the same verdict: {saved['verdict']} ({'; '.join(saved['reasons'])})")
    run.note(replayed=str(path), verdict=saved["verdict"])
    return figures(saved)


def figures(decision: decide.DecisionRecord) -> dict[str, float]:
    """The metrics of a decision."""
    found = {
        "retrain/started": float(decision["challenger"] is not None),
        "retrain/promoted": float(decision["verdict"] == decide.PROMOTED),
    }
    if evidence := decision["evidence"]:
        for name, part in ((evidence["metric"]["name"], evidence["metric"]), ("cost", evidence.get("cost"))):
            for key in ("champion", "challenger", "gain", "rise", "low", "high"):
                if part and isinstance(value := part.get(key), (int, float)):
                    found[f"retrain/{name}_{key}"] = float(value)
    return found
