"""Model bundles: a folder of JSON, Parquet and safetensors with everything that scoring needs of a trained model.

`model/` of a training run holds: `model.safetensors`, `model.json` (architecture, loss, precision, tile), `spec.json` (data and
feature specification as resolved), `features.json` (fitted encoder), `schema.json` (raw features, their types, and
the meaning of a score), `code/` (the plug-ins, as they were) and
`gate/` (rows with the history they need, and the features and scores that training saw for them). `bundle.json` is written
last: sizes and digests of the rest, checked before anything is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import pyarrow as pa

from engine.config import plugins, schema
from engine.config.nested import Tree
from engine.config.plugins import Plugin
from engine.config.references import check_features
from engine.config.secrecy import MASK
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.sections.training import LOSS_GROUP, TARGET_NAME
from engine.config.tree import Config
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.runtime import digest, records, registry, storage
from engine.runtime import seal as folder_seal
from engine.runtime.records import Format, Within
from engine.runtime.run import Precision
from engine.runtime.seal import FileRecord, Seal
from engine.training.finished import Model
from engine.training.heads import Heads, HeadsRecord, facts_of, heads_of
from engine.training.loss import Loss
from engine.training.losses import LOSSES, recorded_loss
from engine.training.path_gradients import TypicalRecord
from engine.training.read_model import check_part, read_model
from engine.training.tensors import Tensors

FORMAT = 1  # of the files that are part of the model
MANIFEST_FORMAT = 2
CHECKED = 2  # bundle.json checks itself from this format on
MANIFEST = "bundle.json"
JUDGED = ("model.safetensors", "model.json", "features.json")  # with the specification, they are the model


class SpecRecord(TypedDict):
    """spec.json: data and feature specification as resolved; the config's own schema checks both."""

    format: NotRequired[Annotated[int, Format(FORMAT)]]
    name: str
    data: Tree
    features: Tree


class ModelRecord(HeadsRecord):
    """model.json: what scoring needs in addition to weights."""

    format: NotRequired[Annotated[int, Format(FORMAT)]]
    precision: Precision
    tile_rows: Annotated[int, Within(1, 2**20)]
    typical: NotRequired[TypicalRecord]


class ManifestRecord(TypedDict):
    """bundle.json."""

    format: Annotated[int, Format(MANIFEST_FORMAT)]
    digest: records.Digest
    files: dict[str, FileRecord]
    check: NotRequired[records.Digest]


@dataclass(frozen=True)
class Bundle:
    """A bundle read back and verified."""

    directory: Path
    manifest: ManifestRecord
    model: ModelRecord
    data: DataConfig
    features: FeaturesConfig
    encoder: Encoder
    code: tuple[Plugin, ...] = ()  # does not run before `bundle_spec.admit` has held it

    @property
    def digest(self) -> str:
        """Content digest of the model: weights, architecture, specification and fitted state."""
        return str(self.manifest["digest"])

    @cached_property
    def heads(self) -> Heads:
        """The targets of the model; a loss of the user's runs code that the bundle carries.

        Raises Damaged where the model has another number of outputs, or of classes.
        """
        found = heads_of(self.model, self.data.target or "")
        _check_heads(self.model, [item.loss for item in found.items], self.directory / "model.json")
        return found

    @property
    def loss(self) -> Loss:
        """The loss of the main target, with its settings."""
        return self.heads.main.loss

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.directory / "model.safetensors"


def write_bundle(
    directory: Path,
    *,
    spec: SpecRecord,
    encoder: Encoder,
    model: ModelRecord,
    weights: bytes,
    raw_schema: pa.Schema,
    score: Mapping[str, object],
    code: Sequence[Plugin] = (),
) -> None:
    """Write everything but the gate and the manifest; `seal` finishes the bundle. `spec` has name, data and features, `score`
    says what a score is for.
    """
    storage.write_bytes(directory / "model.safetensors", weights)
    for plugin in code:
        storage.write_bytes(storage.inside(directory, plugins.FOLDER, plugin.file), plugin.code)
    storage.write_json(directory / "model.json", {"format": FORMAT} | model)
    storage.write_json(directory / "spec.json", {"format": FORMAT} | spec)
    storage.write_json(directory / "features.json", encoder.to_json())
    storage.write_json(
        directory / "schema.json",
        {
            "format": FORMAT,
            "features": {field.name: str(field.type) for field in raw_schema},
            "score": score,
            "score_type": model["architecture"].get("target_type", "float32"),
        },
    )


def seal(directory: Path) -> ManifestRecord:
    """Write the manifest over all files of the bundle, last; returns it."""
    files: dict[str, FileRecord] = {
        path.relative_to(directory).as_posix(): folder_seal.record_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    body: ManifestRecord = {"format": MANIFEST_FORMAT, "digest": _digest_of(directory, files), "files": files}
    manifest = folder_seal.checked(body)
    storage.write_json(directory / MANIFEST, manifest)
    return manifest


def _digest_of(directory: Path, files: Mapping[str, FileRecord]) -> str:
    """Content digest of the model in a folder: weights, architecture, specification and fitted state."""
    judged = {name: files[name]["sha256"] for name in JUDGED}
    spec = records.read(directory / "spec.json", SpecRecord)
    # The path of the raw files is not part of the model, and the class of its score is in model.json.
    for name in ("path", "positive"):
        spec["data"].pop(name, None)
    return digest.of_json([judged, spec])


def read_manifest(directory: Path) -> ManifestRecord:
    """bundle.json of a folder, checked, and every file compared with it; the model's digest is computed again.

    Raises UserError where there is none or it is of a newer format, Damaged where a file is not the one that was sealed.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(
            f"{directory} must hold a model bundle ({MANIFEST}), which is missing: name a finished training run"
        )
    manifest = folder_seal.read_checked(path, ManifestRecord, CHECKED)
    sealed = Seal(manifest["files"])
    for name in manifest["files"]:
        sealed.check(directory, name, "Restore it, or train again")
    if manifest["digest"] != _digest_of(directory, manifest["files"]):
        raise records.Damaged(f"{path} is damaged: its digest is not that of its files. Restore it, or train again")
    return manifest


def read_bundle(directory: Path) -> Bundle:
    """Open and verify a bundle.

    Raises UserError when it does not exist, is of a newer format, or a file is not the one that was sealed.
    """
    manifest = read_manifest(directory)
    data, features = _read_spec(directory / "spec.json")
    model = records.read(directory / "model.json", ModelRecord)
    encoder = Encoder.read(directory / "features.json")
    _check_model(model, encoder, directory / "model.json")
    _check_targets(model, data, directory / "model.json")
    return Bundle(directory, manifest, model, data, features, encoder, _code_of(directory, manifest))


def _read_spec(path: Path) -> tuple[DataConfig, FeaturesConfig]:
    """The specification, checked as that of an experiment. Raises Damaged."""
    spec = records.read(path, SpecRecord)
    try:
        data = schema.build(DataConfig, spec["data"], "data")
        features = schema.build(FeaturesConfig, spec["features"], "features")
        if not data.columns:
            raise UserError("data.columns must have the columns of the model, found none")
        check_features(data, features)
    except UserError as error:
        raise records.Damaged(f"{path}: {error}") from None
    return data, features


def _code_of(directory: Path, manifest: ManifestRecord) -> tuple[Plugin, ...]:
    """The plug-ins of a bundle. Raises Damaged where a file has changed since the manifest was compared with it."""
    prefix = f"{plugins.FOLDER}/"
    names = [name for name in manifest["files"] if name.startswith(prefix)]
    found = tuple(Plugin(name.removeprefix(prefix), (directory / name).read_bytes()) for name in names)
    for name, plugin in zip(names, found, strict=True):
        if plugin.digest != manifest["files"][name]["sha256"]:
            raise records.Damaged(f"{directory / name} is not the file that was sealed. Restore it, or train again")
    return found


def _check_model(model: ModelRecord, encoder: Encoder, path: Path) -> None:
    """Raise Damaged where model.json fits neither itself nor the encoder, or a tile would not fit in memory."""
    described = model["architecture"]
    losses = []
    for facts in facts_of(model):
        if facts["loss"] in LOSSES:  # the code of another may not run yet
            known = {
                name: value for name, value in facts.items() if name != "metric"
            }  # its code may not run yet either
            losses.append(recorded_loss(known))
        elif plugins.split(facts["loss"])[1] is None and facts["loss"] not in plugins.installed(LOSS_GROUP):
            raise records.Damaged(
                f"{path}: loss must be one of {', '.join(LOSSES)}, or of an installed package (entry point group "
                f"{LOSS_GROUP}), found {facts['loss']!r}"
            )
    if len(losses) == len(facts_of(model)):
        _check_heads(model, losses, path)
    for name, wanted in (
        ("numeric_width", encoder.width),
        ("cardinalities", encoder.cardinalities),
    ):
        if described[name] != wanted:  # type: ignore[literal-required]
            raise records.Damaged(f"{path}: architecture: {name} must be that of features.json and the classes")
    check_part(model, f"{path}: architecture")


def _check_targets(model: ModelRecord, data: DataConfig, path: Path) -> None:
    """Raise Damaged where targets beside the main one have no names of their own, or no columns of the data."""
    others = model.get("targets", [])
    names = [data.target, *(item["name"] for item in others)]
    if len(set(names)) < len(names) or not all(TARGET_NAME.fullmatch(item["name"]) for item in others):
        raise records.Damaged(f"{path}: targets must have names of their own, of letters, digits and underscores")
    for item in others:
        if item["column"] not in data.columns:
            raise records.Damaged(f"{path}: targets: {item['column']!r} must be a column of spec.json")


def _check_heads(model: ModelRecord, losses: Sequence[Loss], path: Path) -> None:
    """Raise Damaged where outputs, classes or decisions of a model are not those of its losses."""
    pairs, found = list(zip(losses, facts_of(model), strict=True)), model["architecture"]["outputs"]
    outputs = sum(loss.outputs(len(facts["classes"])) for loss, facts in pairs)
    if found != outputs:
        raise records.Damaged(
            f"{path}: architecture: outputs must be {outputs} for its loss and classes, found {found}"
        )
    if len(model["architecture"].get("other_targets", [])) != len(losses) - 1:
        raise records.Damaged(f"{path}: architecture: other_targets must be as many as targets")
    for loss, facts in pairs:
        if loss.task == "binary" and len(facts["classes"]) != 2:
            raise records.Damaged(f"{path}: classes must be two for loss {loss.name}, found {len(facts['classes'])}")
        if "decision" in facts and ("threshold" in facts["decision"]) != (loss.task == "binary"):
            raise records.Damaged(f"{path}: decision must have a threshold for a loss of two classes, and for no other")


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


def load_model(bundle: Bundle) -> Model:
    """The model of a verified bundle, ready to predict; model.json is compared with the weights before memory is taken. The code
    of a plug-in's model runs: `bundle_spec.admit` comes first.

    Raises Damaged, and UserError for code that may not run here.
    """
    return read_model(Tensors.of(bundle.weights), bundle.model, f"{bundle.directory / 'model.json'}: architecture")


def find_model(reference: str, runs: Path, where: str = "score.model") -> Path:
    """The bundle folder that a config key names: a training run, its `model/` folder, or name@alias of the registry.

    Raises UserError.
    """
    if not reference:
        raise UserError(f"{where} must name a training run (its directory) or NAME@champion")
    registered = None if Path(reference).exists() else registry.resolve(reference, runs)
    if registered is not None:
        return registered
    path = Path(reference)
    for candidate in (path, path / "model"):
        if (candidate / MANIFEST).exists():
            return candidate
    if path.is_dir():
        raise UserError(
            f"{reference} holds no finished model: name the directory of a finished training run (with DONE)"
        )
    known = sorted(str(found.parent.parent) for found in runs.glob(f"train/*/*/model/{MANIFEST}"))[-3:]
    hint = f"Newest here: {', '.join(known)}" if known else f"There is none in {runs} yet: run `train` first"
    raise UserError(
        f"{where}: no model {reference!r}; it must be the directory of a training run, or NAME@champion. {hint}"
    )
