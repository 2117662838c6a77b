"""Fits the model of a run, or one member after the other, in this process or on a cluster.

A member is trained as a model by itself would be, with the same bytes: its checkpoints lie in a folder of its own, its lines
of metrics.jsonl carry its name and continue the steps of the members before it. A member that is done is not trained
again by a run that continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from engine.config.sections.training import BLEND, BOOSTERS, ModelConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.runtime import digest, storage
from engine.runtime.progress import Progress
from engine.runtime.run import Facts, Run, Series
from engine.training import kinds
from engine.training.boosting.fit import fit_trees, monotone_columns
from engine.training.distributed import fit_on_cluster
from engine.training.examples import Examples
from engine.training.finished import FinishedNetwork, Model
from engine.training.loop import Epoch, FitKeys, FitResult, fit
from engine.training.losses import loss_of
from engine.training.model import build_model
from engine.training.networks import Fitted
from engine.training.path_gradients import Typical
from engine.training.sizes import settle
from engine.training.trees import Trees
from engine.training.warm_start import start_arrays

Packed = dict[str, Path]  # folders of the packed rows, by period; empty where training is in this process


@dataclass(frozen=True)
class MemberPlan:
    """A model that a run trains: its name (empty: the only one), the name of its model in a blend, and a config of it alone."""

    name: str
    model: str
    config: Config

    @property
    def boosted(self) -> bool:
        """Whether it is boosted trees."""
        return self.config.model.kind in BOOSTERS


def member_plans(config: Config) -> list[MemberPlan]:
    """The models that a run trains, one for each seed of each model; none where it blends finished ones.

    Trees that no seed changes are grown once in a blend. Raises UserError where such trees are all there is.
    """
    seeds = config.train.every_seed
    if config.model.kind != BLEND:
        if len(seeds) > 1 and not _reads_seed(config.model):
            raise UserError(
                f"train.seeds={config.train.seeds} would grow {len(seeds)} equal models of model={config.model.kind}: let trees "
                "depend on the seed (model.trees.row_fraction=0.8), or leave train.seeds out"
            )
        return [MemberPlan(_name("", seed, seeds), "", _alone(config, config.model, seed)) for seed in seeds]
    return [
        MemberPlan(_name(name, seed, every), name, _alone(config, model, seed))
        for name, model in config.model.blended.items()
        for every in [seeds if _reads_seed(model) else seeds[:1]]
        for seed in every
    ]


def _reads_seed(model: ModelConfig) -> bool:
    trees = model.trees
    return model.kind not in BOOSTERS or min(trees.row_fraction, trees.column_fraction) < 1


def _name(model: str, seed: int, seeds: Sequence[int]) -> str:
    return "_".join([*([model] if model else []), *([f"seed_{seed}"] if len(seeds) > 1 else [])])


def _alone(config: Config, model: ModelConfig, seed: int) -> Config:
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, seed=seed, seeds=1))


class MemberRun(Run):
    """The part of a run that trains one member: its folder has the checkpoints, the rest goes to the run."""

    def __init__(self, run: Run, name: str, steps: int) -> None:
        """`steps`: those of the members before it."""
        self._run, self._name = run, name
        directory = run.path("checkpoints", name)
        storage.make_folder(directory)
        super().__init__(directory, {**run.record, "chain": {}}, run.hidden)
        self.series, self.stops = Series(run.directory, f"{name}/", steps), run.directory

    def _open_log(self) -> Any:
        return self._run._logger

    def save(self) -> None:
        """Nothing: the run writes its record."""

    def log(self, message: str) -> None:
        """One line of the run, with the member's name."""
        self._run.log(f"{self._name}: {message}")

    def warn(self, message: str) -> None:
        """A warning of the run, with the member's name."""
        self._run.warn(f"{self._name}: {message}")

    def note(self, **values: Unpack[Facts]) -> None:
        """Facts of the run; the sizes of a member are its own, by its own rule."""
        self.record.update(values)
        values.pop("sizes", None)
        self._run.note(**values)

    def progress(self, label: str, total: int | None = None, unit: str = "rows", start: int = 0) -> Progress:
        """A display with the member's name."""
        return self._run.progress(f"{label} {self._name}", total, unit, start)


@dataclass(frozen=True)
class Trained:
    """Trained models in the order of their plans, the figures of all, and the history of each by its name."""

    models: list[Model]
    metrics: dict[str, float]
    histories: dict[str, list[Epoch]]


def fit_all(
    run: Run,
    plans: Sequence[MemberPlan],
    encoder: Encoder,
    examples: dict[str, Examples],
    keys: FitKeys,
) -> Trained:
    """Fit every plan, in this process or on a cluster, as its config says."""
    typical = Typical.of(examples["train"], encoder.cardinalities)
    with _packed(run, plans, examples) as packed:
        if len(plans) == 1:
            result = _fit(plans[0], run, encoder, examples, packed, keys)
            return Trained([_finished(result, typical)], result.metrics, {"": result.history})
        results, parts, steps = [], [], 0
        for plan in plans:
            part = MemberRun(run, plan.name, steps)
            result = _fit(plan, part, encoder, examples, packed, keys)
            results.append(result)
            parts.append(part)
            steps += result.steps
    for link in dict.fromkeys(name for part in parts for name in part.record["chain"]):
        run.link(link, digest.of_json([part.record["chain"].get(link) for part in parts]))
    names = [plan.name for plan in plans]
    return Trained(
        [_finished(result, typical) for result in results],
        together({name: result.metrics for name, result in zip(names, results, strict=True)}),
        {name: result.history for name, result in zip(names, results, strict=True)},
    )


def together(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figures of the training of all members: sums; the largest memory; means of losses, rates and best epochs."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for own in metrics.values() for name in own):
        values = [own[name] for own in metrics.values() if name in own]
        if "memory" in name:
            found[name] = max(values)
        elif name.endswith(("loss", "per_second", "best_epoch")):
            found[name] = sum(values) / len(values)
        else:
            found[name] = sum(values)
    return found


def _finished(result: FitResult, typical: Typical) -> Model:
    if isinstance(result.model, Trees):
        return result.model
    return FinishedNetwork(result.model, result.precision, typical=typical)


@contextlib.contextmanager
def _packed(run: Run, plans: Sequence[MemberPlan], examples: dict[str, Examples]) -> Iterator[Packed]:
    """The rows as files, which workers map: no row goes through the object store."""
    if not any(_on_cluster(plan) for plan in plans):
        yield {}
        return
    packed = run.path("packed")
    try:
        folders: Packed = {name: packed / name for name in ("train", "valid") if name in examples}
        for name, folder in folders.items():
            examples[name].save(folder)
        yield folders
    finally:
        shutil.rmtree(packed, ignore_errors=True)


def _on_cluster(plan: MemberPlan) -> bool:
    return plan.config.cluster.kind != "local" and plan.config.model.kind != "lightgbm"


def _fit(
    plan: MemberPlan, run: Run, encoder: Encoder, examples: dict[str, Examples], packed: Packed, keys: FitKeys
) -> FitResult:
    config = plan.config
    monotone = monotone_columns(encoder, config.model.trees.monotone)
    fitted: Fitted = {}
    if not plan.boosted:
        fitted = _fitted_arrays(config, examples["train"])
        shape = encoder.width, encoder.cardinalities, sum(keys["outputs"])
        network = functools.partial(build_model, config.model, *shape, config.train.seed, fitted)
        config = settle(config, run, len(examples["train"]), network)
    if _on_cluster(plan):
        train, valid = packed["train"], packed.get("valid")
        return fit_on_cluster(train, valid, config, run, monotone=monotone, fitted=fitted, **keys)
    if config.cluster.kind != "local":
        run.warn(
            "model=lightgbm grows its trees in this process, where threads share the work: cluster.workers="
            f"{config.cluster.workers} wait. model=xgboost divides the rows among workers"
        )
    if plan.boosted:
        return fit_trees(examples["train"], examples.get("valid"), config, run, monotone=monotone, **keys)
    return fit(examples["train"], examples.get("valid"), config, run, fitted=fitted, **keys)


def _fitted_arrays(config: Config, train: Examples) -> Fitted:
    """What a network learns before its weights: of the model that training continues from, else of the training rows."""
    start = start_arrays(config)
    if start is not None:
        return start
    settings = kinds.settings_of(config.model)
    return kinds.fit_arrays(config.model.kind, settings, train.numeric, train.codes, train.target)


def fit_keys(
    config: Config, encoder: Encoder, dataset_digest: str, classes: Sequence[tuple[str, ...]], precision: str
) -> FitKeys:
    """What training needs to know beside the rows; `classes` of each target."""
    pairs = zip(config.by_target, classes, strict=True)
    return {
        "cardinalities": encoder.cardinalities,
        "outputs": [loss_of(view.train).outputs(len(names)) for view, names in pairs],
        "dataset_digest": dataset_digest,
        "precision": precision,
    }
