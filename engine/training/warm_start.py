"""Warm start: training that continues from an earlier model's encoding and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config.sections.training import BLEND
from engine.config.tree import Config
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.features.spec import feature_list
from engine.training.bundle import Bundle, find_model, load_model, read_bundle
from engine.training.finished import FinishedNetwork
from engine.training.model import Network
from engine.training.networks import Fitted


def start_bundle(config: Config) -> Bundle | None:
    """The verified bundle that `train.start_from` names; None when training starts from scratch. Raises UserError."""
    if config.train.start_from is None:
        return None
    bundle = read_bundle(find_model(config.train.start_from, Path(config.paths.runs), "train.start_from"))
    if bundle.model["architecture"]["kind"] == BLEND:
        raise UserError("train.start_from continues one model, found a model with members: start from scratch")
    return bundle


def start_encoder(bundle: Bundle, config: Config, classes: Sequence[tuple[str, ...]]) -> Encoder:
    """The encoder of the model that training continues from, without which its weights have no meaning.

    Raises UserError where that model has other features or classes than the config.
    """
    have, want = list(bundle.encoder.features), feature_list(config.data, config.features)
    if [item.name for item in have] != [item.name for item in want]:
        differs = sorted({item.name for item in have} ^ {item.name for item in want}) or ["their order"]
        raise UserError(
            f"train.start_from needs a model with the same features, found a difference in {', '.join(differs[:5])}: "
            "start from scratch"
        )
    found = tuple(item.classes for item in bundle.heads.items)
    if found != tuple(classes):
        want_, have_ = (", ".join(str(list(each)) for each in side) for side in (classes, found))
        raise UserError(f"train.start_from needs a model with classes {want_}, found {have_}: start from scratch")
    return bundle.encoder


def start_arrays(config: Config) -> Fitted | None:
    """What the model that training continues from has learned before its weights; None when training starts from scratch."""
    bundle = start_bundle(config)
    if bundle is None:
        return None
    start = load_model(bundle)
    return start.network.fitted if isinstance(start, FinishedNetwork) else {}


def load_start_weights(model: Network, config: Config) -> None:
    """Copy weights and target scale of `train.start_from` into a new model. Raises UserError when the shapes differ."""
    bundle = start_bundle(config)
    if bundle is None:
        return
    start = load_model(bundle)
    if not isinstance(start, FinishedNetwork):
        raise UserError(
            f"train.start_from needs a model of the same kind: model={model.kind} here, "
            f"{start.describe()['kind']} there; use its model section, or start from scratch"
        )
    weights = start.network.state_dict()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in {**shapes, **weights}:
        found = tuple(weights[name].shape) if name in weights else None
        if shapes.get(name) != found:
            raise UserError(
                f"train.start_from needs a model of the same architecture: {name} is {shapes.get(name)} here, {found} there; "
                "use its model section, or start from scratch"
            )
    model.load_state_dict(weights)
    pairs = zip(start.network.targets, model.targets, strict=True)
    model.target, *model.others = [
        replace(old, kind=max(old.kind, new.kind)) for old, new in pairs
    ]  # float64 if either is
