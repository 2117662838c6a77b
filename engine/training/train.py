"""The `train` and `evaluate` steps: from a config to a bundle, its metrics and its report."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.config import schema
from engine.config.plugins import Plugin
from engine.config.sections.data import DataConfig
from engine.config.sections.features import FeaturesConfig
from engine.config.sections.training import BLEND, BOOSTERS
from engine.config.tree import SPLITS, Config
from engine.data.calendar import local_days
from engine.data.dataset import Dataset
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features.encode import Encoder, check_sensitive
from engine.features.spec import feature_list, sensitive_features
from engine.features.table import FeatureTable, ensure_table
from engine.features.vocabulary import group_labels, numbered_labels
from engine.runtime import digest, storage
from engine.runtime.environment import threads_of
from engine.runtime.progress import Laps
from engine.runtime.run import LabelsRecord, Precision, Run
from engine.training import baselines, gate, report
from engine.training.blocks import block_columns, blocks_of
from engine.training.bundle import (
    Bundle,
    ManifestRecord,
    ModelRecord,
    SpecRecord,
    find_model,
    load_model,
    read_bundle,
    seal,
    write_bundle,
)
from engine.training.bundle_spec import with_spec_of
from engine.training.calibration import check_temperature, fit_temperature
from engine.training.choice import choose
from engine.training.classes import (
    KEPT,
    check_target,
    class_names,
    describe_score,
    describe_unknown,
    heads_meaning,
    is_a_guess,
    score_meaning,
    target_values,
    unknown_targets,
)
from engine.training.decision import fit_decision
from engine.training.device import resolve_device
from engine.training.drift_reference import encoded_columns, write_reference
from engine.training.evaluate import Scored, SplitDetails, evaluate_scores, watched_metric
from engine.training.examples import Examples, aligned_empty
from engine.training.finished import Model, typical_of
from engine.training.fitting import MemberPlan, fit_all, fit_keys, member_plans
from engine.training.heads import OtherTarget, Scoring, TargetFacts, alone, facts_of, heads_of, score_columns
from engine.training.importance import permuted
from engine.training.intervals import fit_interval
from engine.training.loop import Epoch
from engine.training.loss import Loss
from engine.training.losses import cooled, loss_of, loss_record, recorded_loss
from engine.training.parts import part_values
from engine.training.precision import resolve_precision
from engine.training.predict import TILE_ROWS
from engine.training.splits import Split, account, find_splits
from engine.training.target import TargetScale, check_spread, of_target
from engine.training.trees import Trees
from engine.training.warm_start import start_bundle, start_encoder
from engine.training.weighing import blended, code_of, of_members, read_members, shared_encoder, without_idle
from engine.training.weights import row_weights

CHUNK_ROWS = 131_072


def train(config: Config, run: Run) -> dict[str, float]:
    """Ingest and features where they are missing, then fit, evaluate, and write the bundle and the report."""
    check_trainable(config)
    timer = Laps()
    dataset = ensure_dataset(config, run)
    timer.lap("ingest")
    table = ensure_table(config, run, dataset)
    timer.lap("features")
    splits = find_splits(config, dataset, SPLITS, run)
    config = choose(config, run, len(splits["train"].rows), len(table.features))
    finished, plans = read_members(config, run), member_plans(config)
    boosted = all(plan.boosted for plan in plans)
    classes = classes_of(config, dataset, splits["train"])
    labels = say_labels(config, run, dataset, splits, classes)
    say_scores(config, run, classes, losses_of(config))
    encoder = _encoder(config, run, table, splits["train"], classes, finished)
    examples: dict[str, Examples] = {}
    for name, split in splits.items():
        if len(split.rows):
            kind = examples["train"].target.dtype.name if examples else None
            examples[name] = pack(config, table, encoder, split, classes, run, kind)
    warn_of_spread(config, run, examples["train"], classes)
    timer.lap("encode")
    device = "cpu" if boosted else resolve_device(config, run.record.get("device"))
    precision = run.record.get("precision") or _precision(config, plans, finished, device)
    run.note(precision=precision, device=device)
    keys = fit_keys(config, encoder, dataset.digest, classes, precision)
    trained = fit_all(run, plans, encoder, examples, keys)
    blend = blended(config, run, plans, trained.models, finished, examples.get("valid"))
    model = trained.models[0] if blend is None else without_idle(blend)
    timer.lap("fit")
    facts: ModelRecord = {
        "architecture": model.describe(),
        "loss": config.train.loss,
        "classes": list(classes[0]),
        "precision": precision,
        **loss_record(config.train),
        "tile_rows": TILE_ROWS,
    }
    if config.train.targets:
        facts["targets"] = other_targets(config, classes)
    facts = {**facts, **typical_of(model)}
    measured = [measure(part, run, dataset, encoder) for part in parts_of(config, model, facts, examples, splits)]
    metrics = named_by_target(measured) | of_members(config, run, blend, examples, measured[0].details)
    timer.lap("evaluate")
    manifest = write_model(config, run, table, encoder, model, facts, splits, code_of(config, finished))
    if isinstance(model, Trees):
        storage.write_json(run.path(report.IMPORTANCE), importance(model, encoder))
    timer.lap("bundle")
    seconds = {f"time/{name}_seconds": value for name, value in timer.seconds.items()}
    metrics |= {**trained.metrics, "train/rows": float(len(splits["train"].rows)), **labels, **seconds}
    run.add_output("model", manifest["digest"])
    write_outcome(config, run, dataset, encoder, measured, metrics, trained.histories)
    return metrics


def _encoder(
    config: Config,
    run: Run,
    table: FeatureTable,
    split: Split,
    classes: Sequence[tuple[str, ...]],
    finished: Sequence[Bundle],
) -> Encoder:
    """The encoder of the finished models, or of the one that training continues from; else fitted on the training rows."""
    start = start_bundle(config)
    if finished:
        encoder = shared_encoder(finished, classes)
    elif start is None:
        encoder = fit_encoder(config, table, split, run)
    else:
        encoder = start_encoder(start, config, classes)
        run.note(started_from=start.digest)
    run.link("fitted", encoder.digest)
    return encoder


def _precision(config: Config, plans: Sequence[MemberPlan], finished: Sequence[Bundle], device: str) -> Precision:
    """bf16 where every network that is trained is computed in it; of finished models the coarser, as the gate compares them."""
    if finished:
        return "bf16" if any(bundle.model["precision"] == "bf16" for bundle in finished) else "fp32"
    networks = [plan.config.model for plan in plans if not plan.boosted]
    found = {resolve_precision(config.train.precision, model, device) for model in networks}
    return "bf16" if found == {"bf16"} else "fp32"


def evaluate(config: Config, run: Run) -> dict[str, float]:
    """Measure a finished model on the validation and test periods of the config."""
    bundle = read_bundle(find_model(config.evaluate.model, Path(config.paths.runs), "evaluate.model"))
    run.note(model=bundle.digest)
    config = with_spec_of(config, bundle)
    dataset = ensure_dataset(config, run)
    table = ensure_table(config, run, dataset)
    splits = find_splits(config, dataset, ("valid", "test"), run)
    if not any(len(split.rows) for split in splits.values()):
        raise UserError("split.valid or split.test must hold labelled rows to measure the model on, found none")
    heads = bundle.heads.items
    classes = tuple(item.classes for item in heads)
    labels = say_labels(config, run, dataset, splits, classes)
    say_scores(config, run, classes, [item.loss for item in heads])
    model = load_model(bundle)
    # An older model's scores may be narrower than its target.
    kind = max(max(item.scale.kind, item.scale.fitting) for item in heads)
    examples = {
        name: pack(config, table, bundle.encoder, split, classes, run, kind)
        for name, split in splits.items()
        if len(split.rows)
    }
    measured = []
    for part in parts_of(config, model, copy.deepcopy(bundle.model), examples, splits):
        found, details = evaluate_splits(part.config, run, dataset, part.model, part.facts, part.examples)
        measured.append(report.Measured(part.name, recorded_loss(part.facts), details, found))
    metrics = {**named_by_target(measured), **labels}
    write_outcome(config, run, dataset, bundle.encoder, measured, metrics, {})
    return metrics


def other_targets(config: Config, classes: Sequence[tuple[str, ...]]) -> list[OtherTarget]:
    """What model.json says of the targets beside the main one before they are measured."""
    pairs = zip(config.train.targets.items(), config.by_target[1:], classes[1:], strict=True)
    return [
        {
            "name": name,
            "column": item.column,
            "weight": item.weight,
            "classes": list(texts),
            **loss_record(view.train),
        }
        for (name, item), view, texts in pairs
    ]


class Part(NamedTuple):
    """One target of a model, as if it were the only one: config, model, facts, and the examples that have the target, of the
    splits with any.
    """

    name: str  # before the names of its figures; empty for the main target
    config: Config
    model: Scoring
    facts: TargetFacts
    examples: dict[str, Examples]

    @property
    def said(self) -> str:
        """What a message about it begins with."""
        return f"target {self.name}: " if self.name else ""


def parts_of(
    config: Config, model: Model, facts: ModelRecord, examples: Mapping[str, Examples], splits: Mapping[str, Split]
) -> Iterator[Part]:
    """Each target, the main one first."""
    scorings = alone(model, heads_of(facts, config.data.target or ""))
    for k, (view, own) in enumerate(zip(config.by_target, facts_of(facts), strict=True)):
        rows = {name: splits[name].by_target[k].rows for name in examples}
        mine = {name: part.of_target(k, rows[name]) for name, part in examples.items() if len(rows[name])}
        yield Part(config.target_names[k] if k else "", view, scorings[k], own, mine)


def measure(part: Part, run: Run, dataset: Dataset, encoder: Encoder) -> report.Measured:
    """Calibrate one target of a new model into its facts, and measure it, against baselines too."""
    config, model, facts, examples = part.config, part.model, part.facts, part.examples
    calibrate(part, run, dataset)
    found, details = evaluate_splits(config, run, dataset, model, facts, examples)
    found |= against_baselines(part, run, found, details)
    explain(config, encoder, model, facts, examples, details)
    return report.Measured(part.name, loss_of(config.train), details, found)


def named_by_target(measured: Sequence[report.Measured]) -> dict[str, float]:
    """The figures of all targets: `test/roc_auc` of the main one, `minutes/test/mae` of another."""
    return {
        f"{part.name}/{key}" if part.name else key: value for part in measured for key, value in part.figures.items()
    }


def check_trainable(config: Config) -> None:
    """Check the config before training starts. Raises UserError."""
    if not config.data.columns:
        raise UserError("no data is configured: add +experiment=NAME or +data=NAME")
    if config.data.target is None:
        raise UserError("data.columns must have one with role target to train on, found none")
    if not config.split.train:
        raise UserError(_without_training_rows(config))
    if config.split.by == "column":
        part_values(config)
    if config.train.targets and config.model.kind in BOOSTERS:
        raise UserError(
            f"train.targets needs a network, which has a head for each target, found model={config.model.kind}: train a model of "
            "trees for each target, or take model=mlp or tabm"
        )
    losses = losses_of(config)
    for name, view, loss in zip(("", *config.train.targets), config.by_target, losses, strict=True):
        with of_target(name):
            watched_metric(loss, view.train.metric)
            check_target(view)
    if config.evaluate.interval is not None and not any(loss.number for loss in losses):
        raise UserError(
            f"evaluate.interval is for a target that is a number, found train.loss={config.train.loss}: leave it out"
        )
    _check_members(config)
    if not (config.features.direct_columns or config.features.calendar or config.features.active_views):
        raise UserError("features must name at least one feature: direct, calendar or views")
    check_sensitive(feature_list(config.data, config.features), sensitive_features(config.data, config.features))


def _without_training_rows(config: Config) -> str:
    if config.split.by != "time":
        example = "[0%, 80%]" if config.split.by == "hash" else "[train]"
        return (
            f"split.train must say what is trained on, as in {example}, where split.valid or split.test is given, found none: "
            "give it too, or none of the three"
        )
    how = "which period is trained on, as in [2013-01-01, 2013-04-01]"
    return f"split.train must say {how if config.data.timed else 'what is trained on: set split.by=hash'}"


def _check_members(config: Config) -> None:
    blend, seeds = config.model.kind == BLEND, config.train.seeds
    if config.model.blend.bundles and len(config.train.every_seed) > 1:
        raise UserError(
            f"train.seeds must be 1 with finished models (model.blend.bundles), found {seeds}: leave it out"
        )
    if blend and config.train.start_from:
        raise UserError(
            "train.start_from continues one model, found model=blend: leave it out, or train a member by itself"
        )
    if config.several and config.train.pause_after:
        raise UserError(f"train.pause_after pauses one model, found model={config.model.kind} with train.seeds={seeds}")
    if config.several and len(config.by_target) > 1:
        raise UserError(
            f"a model with members has one target, found {', '.join(config.target_names)}: leave the others out"
        )
    if blend and not config.split.valid:
        raise UserError("split.valid must say by which rows model=blend weighs its members, found none")


def check_evaluable(config: Config) -> None:
    """Check the config before an evaluation starts. Raises UserError."""
    find_model(config.evaluate.model, Path(config.paths.runs), "evaluate.model")
    if not (config.split.valid or config.split.test):
        raise UserError(
            "split.valid or split.test must say which period the model is measured on: add +experiment=NAME, "
            f"or {'split.test=[2013-05-01,2013-06-01]' if config.data.timed else 'split.by=hash'}"
        )


def fit_encoder(config: Config, table: FeatureTable, split: Split, run: Run) -> Encoder:
    """The encoder fitted on the training rows."""
    return Encoder.fit(
        table.features,
        lambda names: table.take(split.rows, names),
        config.features.encode,
        run.warn,
        sensitive_features(config.data, config.features),
        table.columns_at_once((int(split.rows[0]), int(split.rows[-1]) + 1)),
    )


def pack(
    config: Config,
    table: FeatureTable,
    encoder: Encoder,
    split: Split,
    classes: Sequence[tuple[str, ...]],
    run: Run,
    kind: str | None,
) -> Examples:
    """The packed blocks of a split: encoded features, targets (each with its `classes`) and weight (of the data, times that of
    the split), one row a row that is used.

    `kind` is the type of the targets; None: float32, or float64 where that is needed to hold this split's.
    """
    rows, views = split.rows, config.by_target
    numeric = aligned_empty((len(rows), encoder.width), np.float32)
    codes = aligned_empty((len(rows), len(encoder.cardinalities)), np.int32)
    target = np.empty((len(rows), len(views)))
    weight_column = config.data.weight
    weight = aligned_empty((len(rows),), np.float32) if weight_column else None
    with run.progress(f"encode {split.name}", len(rows)) as progress:
        for low in range(0, len(rows), CHUNK_ROWS):
            part = slice(low, min(low + CHUNK_ROWS, len(rows)))
            numeric[part], codes[part] = encoder.transform(table.take(rows[part]))
            columns = [view.data.target or "" for view in views] + ([weight_column] if weight_column else [])
            values = table.dataset.take(list(dict.fromkeys(columns)), rows[part])
            for k, view in enumerate(views):
                target[part, k] = target_values(values[view.data.target or ""], classes[k])
            if weight is not None:
                weight[part] = row_weights(values[weight_column], rows[part], str(weight_column))
            progress.advance(part.stop - low)
    kind = kind or max("float32" if classes[k] else TargetScale.of(target[:, k]).fitting for k in range(len(views)))
    with np.errstate(over="ignore"):  # a number beyond float32 is refused where the target is checked
        packed = target.astype(kind)
    packed, weight = _as_split(split, packed, weight)
    return Examples(numeric=numeric, codes=codes, target=packed, weight=weight, rows=rows)


def _as_split(
    split: Split, target: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, NDArray[np.float32] | None]:
    """Targets [n, targets] without those that the split does not use, and weights times those of the split; [n] of one target."""
    if len(split.by_target) == 1:
        own = split.weight
        return target[:, 0], own if weight is None else weight if own is None else weight * own
    ripening = np.ones(target.shape, np.float32)
    for k, part in enumerate(split.by_target):
        used = np.searchsorted(split.rows, part.rows)
        target[np.setdiff1d(np.arange(len(target)), used, assume_unique=True), k] = np.nan
        if part.weight is not None:
            ripening[used, k] = part.weight
    if all(part.weight is None for part in split.by_target):
        return target, weight
    return target, ripening if weight is None else ripening * weight[:, None]


def say_labels(
    config: Config, run: Run, dataset: Dataset, splits: dict[str, Split], classes: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """Record the rows of each period, used and not ripe, in run.json; the figures among them as `labels/<period>/<name>`."""
    views = config.by_target
    each = [
        {name: account(view, dataset, split.by_target[k], classes[k]) for name, split in splits.items()}
        for k, view in enumerate(views)
    ]
    run.note(labels=each[0])
    if len(views) > 1:
        run.note(labels_of_targets=dict(zip(config.target_names[1:], each[1:], strict=True)))
    return {
        f"{of}labels/{period}/{name}": float(value)
        for of, found in zip(("", *(f"{name}/" for name in config.target_names[1:])), each, strict=True)
        for period, said in found.items()
        for name, value in said.items()
        if isinstance(value, (int, float))
    }


def classes_of(config: Config, dataset: Dataset, train: Split) -> tuple[tuple[str, ...], ...]:
    """The classes of each target among its training rows."""
    found: list[tuple[str, ...]] = []
    for name, view, split in zip(("", *config.train.targets), config.by_target, train.by_target, strict=True):
        with of_target(name):
            found.append(class_names(view, dataset, split.rows))
    losses = losses_of(config)
    names = score_columns(list(zip(config.target_names, losses, found, strict=True)))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"every target must have score columns of its own, found score_{twice[0]} twice: rename a target"
        )
    return tuple(found)


def losses_of(config: Config) -> list[Loss]:
    """The loss of each target. Raises UserError."""
    found = []
    for name, view in zip(("", *config.train.targets), config.by_target, strict=True):
        with of_target(name):
            found.append(loss_of(view.train))
    return found


def warn_of_spread(config: Config, run: Run, train: Examples, classes: Sequence[tuple[str, ...]]) -> None:
    """Warn of targets that are numbers and vary little beside their size, and of those that are features as well."""
    for name, item in config.train.targets.items():
        if item.column in config.features.direct_columns:
            run.warn(
                f"target {name} is also the feature {item.column}, from which the model reads it: leave it out of features.direct"
            )
    for k, view in enumerate(config.by_target):
        if not classes[k] and (doubt := check_spread(train.labels(k).target, view.data.target or "")):
            run.warn(doubt)


def say_scores(config: Config, run: Run, classes: Sequence[tuple[str, ...]], losses: Sequence[Loss]) -> None:
    """`say_score` of each target."""
    pairs = zip(("", *config.train.targets), config.by_target, classes, losses, strict=True)
    for name, view, names, loss in pairs:
        say_score(view, run, names, loss, name)


def say_score(config: Config, run: Run, classes: tuple[str, ...], loss: Loss, name: str = "") -> None:
    """Log the meaning of a score, and how to change the positive class where only sort order chose it."""
    target = config.data.target or ""
    run.log(f"score: {describe_score(target, classes, loss)}")
    if is_a_guess(config, classes, loss):
        key, of = (f"train.targets.{name}.positive", f" of target {name}") if name else ("data.positive", "")
        run.warn(
            f"{classes[-1]!r} is the positive class{of} because it sorts last: train with {key}={classes[0]} to turn it round, "
            f"or with {key}={classes[-1]} to confirm it"
        )


def evaluate_splits(
    config: Config,
    run: Run,
    dataset: Dataset,
    model: Scoring,
    facts: TargetFacts,
    examples: dict[str, Examples],
) -> tuple[dict[str, float], dict[str, SplitDetails]]:
    """Metrics named `valid/...` and `test/...`, and the details that the report draws.

    A model without a `decision` in its `facts` gets one, fitted on the validation rows.
    """
    metrics: dict[str, float] = {}
    details: dict[str, SplitDetails] = {}
    loss = recorded_loss(facts)
    parts = {name: examples[name] for name in ("valid", "test") if name in examples and len(examples[name].rows)}
    scores = {
        name: scores_of(model, facts, threads_of(config), part.numeric, part.codes) for name, part in parts.items()
    }
    if "decision" not in facts and "valid" in parts:
        valid = parts["valid"]
        weight = valid.weight if config.evaluate.weighted else None
        decision = fit_decision(config.evaluate, loss, valid.target, scores["valid"], weight)
        if decision is not None:
            facts["decision"] = decision
    threshold = facts.get("decision", {}).get("threshold")
    for name, part in parts.items():
        days, blocks, columns = _days_and_blocks(config, dataset, part)
        slices = {
            column: (numbered_labels if config.data.columns[column].sensitive else group_labels)(columns[column])
            for column in config.evaluate.slices
        }
        scored = Scored(
            part.target,
            scores[name],
            days,
            blocks,
            part.weight if config.evaluate.weighted else None,
        )
        found, details[name] = evaluate_scores(
            scored,
            loss,
            config.evaluate,
            slices,
            classes=facts["classes"],
            threshold=threshold,
        )
        if not config.data.timed:
            details[name]["by_month"] = []
        if "decision" in facts:
            details[name]["decision"] = facts["decision"]
        details[name]["score"] = score_meaning(config.data.target or "", facts["classes"], loss)
        found |= count_unknown(config, run, dataset, name, part, details[name])
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return metrics, details


def calibrate(part: Part, run: Run, dataset: Dataset) -> None:
    """Fit on the validation rows what the config asks for, into the facts: the temperature of classes, intervals of a number."""
    config, model, facts, said = part.config, part.model, part.facts, part.said
    settings, valid, loss = config.evaluate, part.examples.get("valid"), recorded_loss(facts)
    cool = settings.calibration == "temperature" and not loss.number and loss.link is not None
    wide = settings.interval is not None and loss.number
    if not cool and not wide:
        return
    if valid is None or not len(valid.rows):
        run.warn(f"{said}no validation rows: scores are not calibrated, and have no intervals")
        return
    weight = valid.weight if settings.weighted else None
    logits = model.logits(valid.numeric, valid.codes, threads_of(config))
    at = functools.partial(_scores_at, model, loss, logits)
    if cool and (temperature := fit_temperature(at, valid.target, weight)) is not None:
        facts["temperature"] = temperature
        run.log(f"{said}temperature {temperature:.4g}, fitted on {len(valid.rows):,} validation rows")
        if doubt := check_temperature(temperature):
            run.warn(f"{said}{doubt}")
    if wide and settings.interval is not None:
        _, blocks, _ = _days_and_blocks(config, dataset, valid)
        interval = fit_interval(settings.interval, valid.target, model.to_scores(loss, logits), blocks, weight)
        if interval is not None:
            facts["interval"] = interval
        else:
            run.warn(
                f"{said}no intervals: {len(np.unique(blocks))} blocks of validation rows (evaluate.block) are too few to promise "
                f"that {settings.interval:.0%} of later rows are within them"
            )


def _scores_at(model: Scoring, loss: Loss, logits: np.ndarray, temperature: float) -> np.ndarray:
    return model.to_scores(cooled(loss, temperature), logits, exact=True)


def explain(
    config: Config,
    encoder: Encoder,
    model: Scoring,
    facts: TargetFacts,
    examples: dict[str, Examples],
    details: dict[str, SplitDetails],
) -> None:
    """Add to the details of the validation rows what the watched metric loses without each column and view."""
    if "valid" not in details:
        return
    loss, settings = recorded_loss(facts), config.evaluate
    metric = watched_metric(loss, config.train.metric)
    score = functools.partial(scores_of, model, facts, threads_of(config))
    found = permuted(encoder, score, examples["valid"], loss, metric, settings.importance, settings.weighted)
    if found is not None:
        details["valid"]["importance"] = found


def _days_and_blocks(config: Config, dataset: Dataset, part: Examples) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Local days [n] and blocks [n] of a split's rows, and its columns for slices."""
    names = dict.fromkeys([config.data.event_time, *config.evaluate.slices, *block_columns(config.evaluate)])
    columns = dataset.take(list(names), part.rows)
    days = local_days(columns[config.data.event_time], config.data.day_zone)
    return days, blocks_of(config.evaluate, days, part.rows, columns), columns


def against_baselines(
    part: Part, run: Run, metrics: Mapping[str, float], details: dict[str, SplitDetails]
) -> dict[str, float]:
    """Metrics of a constant and of a linear model on the same rows: `baseline/<split>/<kind>/<metric>`, also in the details."""
    found = baselines.baselines(part.examples, part.facts, part.config.evaluate)
    metric = watched_metric(recorded_loss(part.facts), part.config.train.metric)
    for split, figures in found.items():
        details[split]["baselines"] = figures
        run.log(part.said + baselines.words(split, metric, metrics[f"{split}/{metric}"], figures))
    return baselines.flat(found)


def count_unknown(
    config: Config, run: Run, dataset: Dataset, split: str, part: Examples, details: SplitDetails
) -> dict[str, float]:
    """Count and warn of labelled rows whose class is unseen in training, which no metric covers; empty without any."""
    target, classes = (
        config.data.target or "",
        details["score"].get("classes") or details["score"].get("positive") or (),
    )
    unknown = unknown_targets(dataset, target, part.rows, part.target, config.data.columns[target].sensitive)
    if not unknown:
        return {}
    details["unknown_targets"] = dict(list(unknown.items())[:KEPT])
    run.warn(describe_unknown(split, target, unknown, len(part.rows), classes))
    return {"rows_of_unknown_target": float(sum(unknown.values()))}


def write_model(
    config: Config,
    run: Run,
    table: FeatureTable,
    encoder: Encoder,
    model: Model,
    facts: ModelRecord,
    splits: dict[str, Split],
    code: Sequence[Plugin],
) -> ManifestRecord:
    """The bundle, gate included; sets the chain's `weights` link."""
    directory = run.path("model")
    shutil.rmtree(directory, ignore_errors=True)  # files of a killed attempt would be sealed in
    weights = model.weights()
    run.link("weights", digest.of_bytes(weights))
    rows, heads = splits["train"].rows, heads_of(facts, config.data.target or "")
    raw_schema = table.read((int(rows[0]), int(rows[0]) + 1)).schema
    data, features = run.masked(schema.plain(config.data)), run.masked(schema.plain(config.features))
    spec: SpecRecord = {"name": config.name, "data": data, "features": features}
    write_bundle(
        directory,
        spec=spec,
        encoder=encoder,
        model=facts,
        weights=weights,
        raw_schema=raw_schema,
        score=heads_meaning(heads),
        code=code,
    )

    def score(numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return heads.scores(model, model.logits(numeric, codes, threads_of(config)))

    write_reference(directory, config, table, encoder, score, heads, splits)
    shown = dataclasses.replace(
        config,
        data=schema.build(DataConfig, data, "data"),
        features=schema.build(FeaturesConfig, features, "features"),
    )
    gate.write_gate(directory / "gate", shown, table, encoder, model, facts, rows)
    return seal(directory)


def scores_of(model: Scoring, facts: TargetFacts, threads: int, numeric: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Scores of encoded rows by a model of one target and its facts in model.json."""
    return model.to_scores(recorded_loss(facts), model.logits(numeric, codes, threads))


def write_outcome(
    config: Config,
    run: Run,
    dataset: Dataset,
    encoder: Encoder,
    measured: Sequence[report.Measured],
    metrics: dict[str, float],
    histories: Mapping[str, list[Epoch]],
) -> None:
    """`evaluation.json` (curves, months and slices of every split; `evaluation-<name>.json` of other targets), `report.html`."""
    for part in measured:
        file = f"evaluation-{part.name}.json" if part.name else "evaluation.json"
        storage.write_json(run.path(file), storage.finite(part.details))
    report.write_report(
        run,
        histories=histories,
        data_summary=data_summary(dataset, run.record["labels"], encoder),
        quarantine=quarantine_summary(dataset),
        config=config,
        measured=measured,
        metrics=metrics,
    )


def quarantine_summary(dataset: Dataset) -> dict[str, int]:
    """Findings of ingest with their row counts, by file or table; empty when there are none."""
    accounting = dataset.manifest["accounting"]
    parts = [(Path(entry["file"]).name, entry) for entry in accounting["files"]] + list(accounting["results"].items())
    counts: dict[str, int] = {}
    for name, entry in parts:
        for found in entry["violations"]:  # two folders may hold files of one name
            text = f"{name}: {found['column'] or 'row'} {found['reason']} ({found['policy']})"
            counts[text] = counts.get(text, 0) + found["count"]
    return counts


def importance(model: Trees, encoder: Encoder) -> dict[str, float]:
    """Share of the gain of all splits that each raw feature has, the largest first."""
    numbers, categories = np.split(model.importance(), [encoder.width])
    found = {
        name: float((categories if categorical else numbers)[columns].sum())
        for name, columns, categorical in encoded_columns(encoder)
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def data_summary(dataset: Dataset, labels: Mapping[str, LabelsRecord], encoder: Encoder) -> report.DataSummary:
    """The data section of the report."""
    return {
        "dataset": dataset.name,
        "digest": dataset.digest,
        "rows": dataset.rows,
        "splits": labels,
        "features": {"numeric": encoder.width, "categorical": len(encoder.cardinalities), "raw": len(encoder.features)},
    }
