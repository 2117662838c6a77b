"""Copies the data and feature specification of a bundle into the config of a command that uses the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.config import nested, plugins, schema
from engine.config.sections.data import DataConfig
from engine.config.sections.training import TargetConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import registry, remote, storage, trust
from engine.training.bundle import Bundle, spec_of
from engine.training.classes import check_positive

# Paths and file formats, and limits of ingest, are not part of the model: the scored files often differ.
PLACES = ("path", "endpoint", "region", "snapshot", "format", "csv", "refused", "unexpected")
LIMITS = ("max_quarantine", "min_rows", "max_rows", "max_row_change", "freshness")


def with_spec_of(config: Config, bundle: Bundle) -> Config:
    """The config with the bundle's data and feature specification; a different one in the config is an error."""
    data, features = spec_of(bundle, config)
    storage.keep_from_others(config.paths.mode, data.sensitive)
    check_positive(config, data, bundle.model)
    said = bool(config.data.columns)
    limits = {name: getattr(config.data, name) for name in LIMITS}
    data = dataclasses.replace(data, **{k: v for k, v in limits.items() if said or v != getattr(DataConfig(), k)})
    if said:
        places = {name: {key: getattr(source, key) for key in PLACES} for name, source in config.data.sources.items()}
        moved = {name: dataclasses.replace(item, **places.get(name, {})) for name, item in data.sources.items()}
        data = dataclasses.replace(data, sources=moved)
        bundle_plain, asked = dataclasses.asdict(data), dataclasses.asdict(config.data)
        bundle_plain["positive"] = asked["positive"]  # compared by meaning, not by notation
        _refuse_difference("data", asked, bundle_plain)
        _refuse_difference("features", dataclasses.asdict(config.features), dataclasses.asdict(features))
    code = tuple(plugin.reference for plugin in bundle.code)
    if not admit(bundle, config, brought := _places(config, data)):
        _check_places(config, brought, bundle)
    train = dataclasses.replace(config.train, targets=targets_of(bundle))
    return dataclasses.replace(config, data=data, features=features, plugins=code, train=train)


def targets_of(bundle: Bundle) -> dict[str, TargetConfig]:
    """The targets of a model beside that of the data, as `train.targets` has them."""
    keys = ("column", "loss", "weight", "metric")
    return {
        item["name"]: schema.build(TargetConfig, {key: item[key] for key in keys if key in item}, "targets")  # type: ignore[literal-required]
        for item in bundle.model.get("targets", [])
    }


def admit(bundle: Bundle, config: Config, places: remote.Places | None = None) -> bool:
    """Let the code that a bundle carries run in this process; whether it needed the trust of the user, for `places` too.

    Raises UserError where neither the store nor the registry of the config knows the code and `trust` does not name it.
    """
    store, unknown = Path(config.paths.store), []
    if bundle.code and not bundle.directory.resolve().is_relative_to(registry.root_of(config.paths.runs).resolve()):
        unknown = [plugin for plugin in bundle.code if not trust.is_recorded(store, plugin.digest)]
    if unknown:
        lines = [f"  {bundle.directory / plugins.FOLDER / plugin.file}, digest {plugin.digest}" for plugin in unknown]
        trust.check(store, [plugin.digest for plugin in unknown], places or {}, config.trust, "\n".join(lines))
    plugins.add(bundle.code)
    return bool(unknown)


def _places(config: Config, data: DataConfig) -> dict[str, list[str | None]]:
    """Remote addresses of a bundle that the config does not name, by key."""
    plain, said = schema.plain(data), schema.plain(config.data)
    mine = remote.own(plain, said)
    return {name: item for name, item in remote.of_data(plain).items() if item not in mine}


def _check_places(config: Config, brought: remote.Places, bundle: Bundle) -> None:
    """Refuse remote addresses of a bundle that this machine's store has not used before."""
    if brought:
        remedy = "Add the experiment or the data that it was trained with (+experiment=NAME), which has the paths of the files. "
        remote.check(Path(config.paths.store), brought, config.trust, f"the model {bundle.directory}", remedy)


def _refuse_difference(section: str, asked: Any, bundled: Any) -> None:
    for path, here, there in nested.differences(asked, bundled, section):
        raise UserError(
            f"{path} is {here!r} here but the model was trained with {there!r}: scoring uses the model's "
            "specification. Drop the override, or train a model with it"
        )
