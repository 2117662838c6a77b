"""The bundle: all that scoring needs of a trained model, in one folder of JSON, Parquet and safetensors.

`model/` of a training run holds: `model.safetensors`, `model.json` (architecture, loss, precision, tile), `spec.json` (data and
feature specification as resolved), `features.json` (fitted encoder), `schema.json` (raw features, their types, and
what a score is for), and
`gate/` (rows with the history they need, and the features and scores that training saw for them). `bundle.json` is written
last: sizes and digests of the rest, checked before anything is parsed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
from torch import nn

from engine.config import schema
from engine.config.tree import Config, DataConfig, FeaturesConfig
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.runtime import digest, registry, storage
from engine.runtime.run import MASK
from engine.training.model import Network, from_architecture

FORMAT = 1
MANIFEST = "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """A bundle read back and verified."""

    directory: Path
    manifest: dict[str, Any]
    model: dict[str, Any]
    data: DataConfig
    features: FeaturesConfig
    encoder: Encoder

    @property
    def digest(self) -> str:
        """Content digest of the model: weights, architecture, specification and fitted state."""
        return str(self.manifest["digest"])

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.directory / "model.safetensors"


def write_bundle(
    directory: Path,
    *,
    spec: dict[str, Any],
    encoder: Encoder,
    model: dict[str, Any],
    weights: bytes,
    raw_schema: pa.Schema,
    score: dict[str, Any],
) -> None:
    """Write everything but the gate and the manifest; `seal` finishes the bundle. `spec` has name, data and features, `score`
    says what a score is for.
    """
    with storage.atomic_path(directory / "model.safetensors") as temporary:
        temporary.write_bytes(weights)
    storage.write_json(directory / "model.json", {"format": FORMAT, **model})
    storage.write_json(directory / "spec.json", {"format": FORMAT, **spec})
    storage.write_json(directory / "features.json", encoder.to_json())
    storage.write_json(
        directory / "schema.json",
        {"format": FORMAT, "features": {field.name: str(field.type) for field in raw_schema}, "score": score},
    )


def seal(directory: Path) -> dict[str, Any]:
    """Write the manifest over all files of the bundle, last; returns it."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    judged = {name: files[name]["sha256"] for name in ("model.safetensors", "model.json", "features.json")}
    spec = storage.read_json(directory / "spec.json")
    # Where the raw files lie is no part of the model, and model.json holds which class its score is for.
    for name in ("path", "positive"):
        spec["data"].pop(name, None)
    manifest = {"format": FORMAT, "digest": digest.of_json([judged, spec]), "files": files}
    storage.write_json(directory / MANIFEST, manifest)
    return manifest


def read_bundle(directory: Path) -> Bundle:
    """Open and verify a bundle.

    Raises UserError when it is not there, is of a newer format, or a file is not the one that was sealed.
    """
    if not (directory / MANIFEST).exists():
        raise UserError(f"{directory} must hold a model bundle ({MANIFEST}), found none: name a finished training run")
    manifest = storage.read_json(directory / MANIFEST)
    if manifest.get("format", 0) > FORMAT:
        raise UserError(
            f"{directory} is of format {manifest['format']}, this engine reads up to {FORMAT}: use a newer engine"
        )
    for name, entry in manifest["files"].items():
        path = storage.inside(directory, *Path(name).parts)
        if not path.is_file() or path.stat().st_size != entry["bytes"] or digest.of_file(path) != entry["sha256"]:
            raise UserError(
                f"{path} is not the file that the bundle was sealed with (digest differs): restore or retrain"
            )
    spec = storage.read_json(directory / "spec.json")
    return Bundle(
        directory,
        manifest,
        storage.read_json(directory / "model.json"),
        schema.build(DataConfig, spec["data"], "data"),
        schema.build(FeaturesConfig, spec["features"], "features"),
        Encoder.from_json(storage.read_json(directory / "features.json")),
    )


def spec_of(bundle: Bundle, config: Config) -> tuple[DataConfig, FeaturesConfig]:
    """The bundle's specification: the raw files lie where the config says, where it says so; what the bundle hides
    because it held a secret is as the config has it.

    Raises UserError where the config does not have it.
    """
    data, features = _unmasked(bundle, config)
    return replace(data, path=config.data.path or data.path), features


def _unmasked(bundle: Bundle, config: Config) -> tuple[DataConfig, FeaturesConfig]:
    kinds: dict[str, type] = {"data": DataConfig, "features": FeaturesConfig}
    plain = {name: schema.plain(getattr(bundle, name)) for name in kinds}
    if MASK not in json.dumps(plain):
        return bundle.data, bundle.features
    filled = {name: _filled(plain[name], schema.plain(getattr(config, name))) for name in kinds}
    data, features = (schema.build(kind, filled[name], name) for name, kind in kinds.items())
    hidden = [name for name, source in data.sources.items() if MASK in f"{source.path} {source.endpoint}"]
    if hidden:
        raise UserError(
            f"the model does not keep where data.sources.{hidden[0]} lies, because that held a secret: add the experiment "
            "or the data it was trained with (+experiment=NAME)"
        )
    return data, features


def _filled(kept: Any, said: Any) -> Any:
    if isinstance(kept, dict) and isinstance(said, dict):
        return {name: _filled(item, said.get(name)) for name, item in kept.items()}
    return said if isinstance(kept, str) and MASK in kept and isinstance(said, str) else kept


def weights_bytes(model: nn.Module) -> bytes:
    """The weights as safetensors bytes: equal weights give equal bytes."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return bytes(safetensors.torch.save(state))


def load_model(bundle: Bundle) -> Network:
    """The model of a verified bundle, ready to predict."""
    model = from_architecture(bundle.model["architecture"])
    model.load_state_dict(safetensors.torch.load_file(bundle.weights))
    model.eval()
    return model


def quantile_of(bundle: Bundle) -> float:
    """The level of a quantile model; bundles older than the key have the median's."""
    return float(bundle.model.get("quantile", 0.5))


def find_model(reference: str, runs: Path, where: str = "score.model") -> Path:
    """The bundle folder that a config key names: a training run, its `model/` folder, or name@alias of the registry.

    Raises UserError.
    """
    if not reference:
        raise UserError(f"{where} must name a training run (its directory) or NAME@champion, found nothing")
    registered = None if Path(reference).exists() else registry.resolve(reference, runs)
    if registered is not None:
        return registered
    path = Path(reference)
    for candidate in (path, path / "model"):
        if (candidate / MANIFEST).exists():
            return candidate
    if path.is_dir():
        raise UserError(f"{reference} holds no finished model: name the directory of a training run that is DONE")
    known = sorted(str(found.parent.parent) for found in runs.glob(f"train/*/*/model/{MANIFEST}"))[-3:]
    hint = f"Newest here: {', '.join(known)}" if known else f"There is none in {runs} yet: run `train` first"
    raise UserError(
        f"{where}: no model {reference!r}; it must be the directory of a training run, or NAME@champion. {hint}"
    )
