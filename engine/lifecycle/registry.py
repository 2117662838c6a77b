"""The `registry` commands: list, show, promote, challenge, rollback, diff.

Storage and its guarantees are in `engine.runtime.registry`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from engine.config import nested
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle.sweep_record import best_run, is_sweep
from engine.lifecycle.version_facts import version_facts
from engine.runtime import records, terminal
from engine.runtime.registry import DecisionPart, MoveRecord, Registry, Version, names, root_of, seal_of, short
from engine.scoring.predictor import predictor_of
from engine.training.bundle import ModelRecord, SpecRecord, read_bundle
from engine.training.bundle_spec import admit
from engine.training.gate import check_gate


def list_models(config: Config, words: Sequence[str], options: Mapping[str, str]) -> int:
    """Print a line per model, or per version of the named model."""
    root = root_of(config.paths.runs)
    if words:
        registry = _registry(config, words[0])
        rows = [_version_row(registry, version) for version in registry.versions()]
    else:
        rows = [_model_row(Registry(root, name)) for name in names(root)]
    terminal.rows(rows, "--json" in options, f"no model is registered in {root}")
    return 0


def show(config: Config, words: Sequence[str], options: Mapping[str, str]) -> int:
    """Print the versions and the history of a model, or the record of one version."""
    name, _, version = _one(words, "registry show", "NAME or NAME@VERSION").partition("@")
    registry = _registry(config, name)
    if version:
        found = registry.find(version)
        registry.verify(found)
        terminal.out(json.dumps({**found.facts, "model": str(found.model)}, indent=1) + "\n")
        return 0
    moves = registry.state().moves
    if "--json" in options:
        versions = [_version_row(registry, item) for item in registry.versions()]
        terminal.out(
            json.dumps({"name": name, **_model_row(registry), "versions": versions, "moves": moves}, indent=1) + "\n"
        )
        return 0
    terminal.rows([_version_row(registry, item) for item in registry.versions()], False, "no versions")
    terminal.out("\n")
    terminal.rows([_move_row(move) for move in moves], False, "no moves")
    return 0


def promote(config: Config, words: Sequence[str]) -> int:
    """Make a training run, the best config of a sweep or a registered version the champion."""
    return _move(config, words, "promote", "a RUN, a SWEEP, challenger or DIGEST")


def challenge(config: Config, words: Sequence[str]) -> int:
    """Make a training run, the best config of a sweep or a registered version the challenger, in the champion's shadow."""
    return _move(config, words, "challenge", "a RUN, a SWEEP or DIGEST")


def _move(config: Config, words: Sequence[str], action: Literal["promote", "challenge"], what: str) -> int:
    """Make a version the champion or the challenger, unless it is; the model is loaded and its gate checked first."""
    if len(words) != 2:
        raise UserError(f"registry {action} takes NAME and {what}, found {list(words)}")
    name, reference = words
    registry = Registry(root_of(config.paths.runs), name)
    state = registry.state()
    version = _registered(registry, reference, config)
    role = "champion" if action == "promote" else "challenger"
    for held in dict.fromkeys(("champion", role)):  # the champion cannot challenge itself
        if version.digest == state.alias(held):
            terminal.out(f"{name}: {short(version.digest)} is the {held} already\n")
            return 0
    _check_loads(registry, version, config)
    registry.move(action, version.digest, expected=state.champion, who=config.registry.who, why=config.registry.why)
    terminal.out(f"{name}: {role} {short(state.alias(role))} -> {short(version.digest)}\n")
    return 0


def rollback(config: Config, words: Sequence[str]) -> int:
    """Make the previous champion the champion again; the model is loaded and its gate checked first."""
    name = _one(words, "registry rollback", "NAME")
    registry = _registry(config, name)
    state = registry.state()
    if len(state.champions) > 1:
        _check_loads(registry, registry.find(state.champions[-2]), config)
    move = registry.move("rollback", None, expected=state.champion, who=config.registry.who, why=config.registry.why)
    terminal.out(f"{name}: champion {short(state.champion)} -> {short(move['to'])}\n")
    return 0


def diff(config: Config, words: Sequence[str], options: Mapping[str, str]) -> int:
    """Print the differences between two versions; exit code 2 when there are any."""
    if len(words) != 3:
        raise UserError(f"registry diff takes NAME VERSION VERSION, found {words}")
    registry = _registry(config, words[0])
    first, second = (_description(registry, registry.find(reference)) for reference in words[1:])
    rows = [
        {"key": key, words[1]: first.get(key), words[2]: second.get(key)}
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]
    terminal.rows(rows, "--json" in options, "no difference")
    return 2 if rows else 0


# ------------------------------------------------------------------------------------------------------- pieces


def _registry(config: Config, name: str) -> Registry:
    root = root_of(config.paths.runs)
    if name not in names(root):
        raise UserError(f"{name!r} must be a registered model, found {', '.join(names(root)) or 'none'} in {root}")
    return Registry(root, name)


def _registered(registry: Registry, reference: str, config: Config) -> Version:
    """The named version; a training run, or the best one of a sweep, is registered first, if its code may run here."""
    run = Path(reference)
    if not run.is_dir():
        return registry.find(reference)
    if not (run / "DONE").exists():
        raise UserError(f"{run} must be a finished training run or sweep, but it has no DONE file")
    if is_sweep(run):
        run = best_run(run)
    admit(read_bundle(run / "model"), config)
    return registry.register(run / "model", seal_of(run / "model"), **version_facts(run))


def _check_loads(registry: Registry, version: Version, config: Config) -> None:
    bundle = read_bundle(registry.verify(version))
    admit(bundle, config)
    predictor = predictor_of(bundle)
    check_gate(predictor.bundle, predictor.model)


def _model_row(registry: Registry) -> dict[str, object]:
    state = registry.state()
    return {
        "name": registry.name,
        "champion": state.champion,
        "challenger": state.challenger,
        "versions": len(registry.versions()),
        "moved": state.moves[-1]["time"] if state.moves else None,
    }


def _version_row(registry: Registry, version: Version) -> dict[str, object]:
    state = registry.state()
    metric = version.facts["metric"]
    return {
        "version": version.digest,
        "alias": ", ".join(alias for alias in ("champion", "challenger") if state.alias(alias) == version.digest),
        "registered": version.facts["registered"],
        metric["name"]: metric["value"],
        "train rows": version.facts["train_rows"],
        "source": version.facts["source"],
    }


def _move_row(move: MoveRecord) -> dict[str, object]:
    decision: DecisionPart = move["decision"] or {}
    return {
        "move": move["number"],
        "time": move["time"],
        "action": move["action"],
        "from": move["from"],
        "to": move["to"],
        "who": move["who"],
        "decision": decision.get("id"),
        "why": move["why"],
    }


def _description(registry: Registry, version: Version) -> dict[str, object]:
    """The facts of a version that `diff` compares, by dotted key."""
    model = registry.verify(version)
    facts = {name: version.facts[name] for name in ("digest", "source", "split", "metrics", "train_rows")}
    spec, described = records.read(model / "spec.json", SpecRecord), records.read(model / "model.json", ModelRecord)
    return dict(nested.leaves({**facts, "model": described, "data": spec["data"], "features": spec["features"]}))


def _one(words: Sequence[str], command: str, what: str) -> str:
    if len(words) != 1:
        raise UserError(f"{command} takes one {what}, found {list(words)}")
    return words[0]
