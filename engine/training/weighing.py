"""Makes one model of several: finished models are read, members are weighed, and each is measured by itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import plugins, schema, timeless, units
from engine.config.nested import Tree
from engine.config.plugins import Plugin
from engine.config.tree import Config
from engine.config.units import Share
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.runtime import registry, seal
from engine.runtime.environment import threads_of
from engine.runtime.run import Precision, Run, load_record
from engine.training.blend import Blend, Member, MemberRecord, equal_shares, mean_of
from engine.training.bundle import Bundle, find_model, load_model, read_bundle
from engine.training.bundle_spec import with_spec_of
from engine.training.evaluate import SplitDetails, counted, point_metrics, watched_metric
from engine.training.examples import Examples
from engine.training.finished import Model, typical_of
from engine.training.fitting import MemberPlan
from engine.training.loss import Loss
from engine.training.losses import loss_of, loss_record
from engine.training.metrics import decimals
from engine.training.predict import TILE_ROWS
from engine.training.target import Values
from engine.training.trees import Trees

KEY = "model.blend.bundles"
STEPS = 1024  # a weight is a multiple of this part of 1
LEAST_GAIN = 1e-9  # relative, of a loss, for which a weight moves

Array = NDArray[Any]


# --------------------------------------------------------------------------------------------------- finished models


def read_members(config: Config, run: Run) -> list[Bundle]:
    """The finished models that a blend names, verified; their code may run here.

    Raises UserError where one has other data, features, encoding, classes or loss than the config and the others, is a blend
    itself, has several targets, or was trained on other rows than `split.train`.
    """
    found: list[Bundle] = []
    for place, reference in enumerate(config.model.blend.bundles):
        where = f"{KEY}[{place}]"
        bundle = read_bundle(find_model(reference, Path(config.paths.runs), where))
        with_spec_of(config, bundle)
        _check_member(config, bundle, found[0] if found else bundle, f"{where} ({reference})")
        run.add_used(where, bundle.digest)
        found.append(bundle)
    return found


def _check_member(config: Config, bundle: Bundle, first: Bundle, where: str) -> None:
    if len(bundle.heads.items) > 1:
        names = ", ".join(item.name for item in bundle.heads.items)
        raise UserError(f"{where} has targets {names}; a member has one: train a model of one target")
    if isinstance(load_model(bundle), Blend):
        raise UserError(f"{where} must be a model by itself, found a blend: name its members")
    mine, theirs = loss_record(config.train), {**bundle.model}
    for name in ("loss", "quantile", "quantiles", "tweedie_power"):
        if mine.get(name) != theirs.get(name):
            raise UserError(f"{where} must have the {name} of train ({mine.get(name)}), found {theirs.get(name)}")
    if bundle.model["classes"] != first.model["classes"]:
        raise UserError(f"{where} must have classes {first.model['classes']}, found {bundle.model['classes']}")
    if bundle.encoder.digest != first.encoder.digest:
        raise UserError(
            f"{where} must read the same encoded rows as {KEY}[0]: the same features, fitted on the same rows. Its encoding is "
            "another. Train both with the same split.train, or let one run train them (model.blend.models)"
        )
    _check_rows(config, bundle, where)


def _check_rows(config: Config, bundle: Bundle, where: str) -> None:
    """Refuse a member that was trained on other rows than `split.train`."""
    found = split_of(bundle)
    if found is None:
        raise UserError(
            f"{where} must have the record of the rows that it was trained on, run.json of its run or version.json of the "
            f"registry, found neither in {bundle.directory.parent}: name its run or its version, not a copy of the model"
        )
    mine, zone = schema.plain(config.split), bundle.data.time_zone
    if _rows_named(mine, zone) != _rows_named(found, zone):
        raise UserError(
            f"{where} must be trained on the rows of this run, {_in_words(mine)}, found {_in_words(found)}: its loss on "
            "rows of split.valid that it has seen is too good to weigh it by. Give this run the split of its members"
        )


def split_of(bundle: Bundle) -> Tree | None:
    """The section `split` that a finished model was trained with; None where neither its run nor its entry in the registry is
    beside it.
    """
    run = bundle.directory.parent
    if (run / "run.json").is_file():
        return dict(load_record(run)["config"].get("split", {}))
    if (run / registry.VERSION).is_file():
        return dict(
            seal.read_checked(run / registry.VERSION, registry.VersionRecord, registry.CHECKED).get("split", {})
        )
    return None


def _rows_named(split: Tree, zone: str) -> tuple[object, ...]:
    """What names the training rows of a split, however it is written."""
    by, train = split.get("by", "time"), tuple(split.get("train") or ())
    if by == "hash":
        return by, Share(str(split.get("turn", "0%"))).fraction, timeless.places_of(train)
    if by == "column":
        return by, split.get("column"), tuple(sorted(train))
    return by, units.between(train, zone) if train else None


def _in_words(split: Tree) -> str:
    shown = {"by": "time", "turn": "0%", **split}
    names = ["by", *(["column"] if shown.get("column") else []), *(["turn"] if shown["by"] == "hash" else []), "train"]
    texts = {
        name: value if isinstance(value := shown.get(name), str) else f"[{', '.join(value or ())}]" for name in names
    }
    return " ".join(f"split.{name}={text}" for name, text in texts.items())


def finished_members(bundles: Sequence[Bundle]) -> list[Member]:
    """The models of bundles as members, named by the first digits of their digests."""
    members = []
    for bundle in bundles:
        record: MemberRecord = {
            "name": f"{bundle.model['architecture']['kind'].partition('@')[0]}_{bundle.digest[:6]}",
            "architecture": bundle.model["architecture"],
            "precision": bundle.model["precision"],
            "tile_rows": bundle.model["tile_rows"],
        }
        if "typical" in bundle.model:
            record["typical"] = bundle.model["typical"]
        if "temperature" in bundle.model:
            record["temperature"] = bundle.model["temperature"]
        members.append(Member(load_model(bundle), record))
    return members


def code_of(config: Config, bundles: Sequence[Bundle]) -> list[Plugin]:
    """The plug-ins of the config and those that finished models carry, each once. Raises UserError for two of the same name."""
    found: dict[str, Plugin] = {}
    for plugin in [*plugins.named(config.plugins), *(plugin for bundle in bundles for plugin in bundle.code)]:
        if found.setdefault(plugin.file, plugin).digest != plugin.digest:
            raise UserError(
                f"the members of {KEY} carry different files {plugin.file}: rename one, and train that model again"
            )
    return list(found.values())


# -------------------------------------------------------------------------------------------------------- weights


def trained_members(plans: Sequence[MemberPlan], models: Sequence[Model], precision: Precision) -> list[Member]:
    """Trained models as members."""
    return [
        Member(
            model,
            {
                "name": plan.name,
                "architecture": model.describe(),
                "precision": "fp32" if isinstance(model, Trees) else precision,
                "tile_rows": TILE_ROWS,
                **typical_of(model),
            },
        )
        for plan, model in zip(plans, models, strict=True)
    ]


def blended(
    config: Config,
    run: Run,
    plans: Sequence[MemberPlan],
    models: Sequence[Model],
    bundles: Sequence[Bundle],
    valid: Examples | None,
) -> Blend | None:
    """The trained or the finished models with their weights; None of one trained model.

    Seeds of a model have equal weights, models have weights by their loss on the validation rows. Raises UserError where there
    is something to weigh and no validation row.
    """
    if len(plans) == 1:
        return None
    members = finished_members(bundles) or trained_members(plans, models, run.record["precision"])
    groups = [plan.model for plan in plans] or [member.name for member in members]
    return _weighed(config, run, members, groups, valid)


def _weighed(
    config: Config, run: Run, members: Sequence[Member], groups: Sequence[str], valid: Examples | None
) -> Blend:
    names, blend = list(dict.fromkeys(groups)), Blend(tuple(members), equal_shares(len(members)))
    if len(names) == 1:
        return blend
    if valid is None or not np.isfinite(valid.target).any():
        raise UserError("split.valid must hold labelled rows, by which model=blend weighs its members, found none")
    loss = loss_of(config.train)
    scores = blend.member_scores(loss, blend.logits(valid.numeric, valid.codes, threads_of(config)), exact=True)
    parts = {name: [part for part, group in zip(scores, groups, strict=True) if group == name] for name in names}
    means = [mean_of(part, equal_shares(len(part))) for part in parts.values()]
    weight = valid.weight if config.evaluate.weighted else None
    found = dict(zip(names, best_shares(means, valid.target, weight, loss), strict=True))
    shares = tuple(found[group] / len(parts[group]) for group in groups)
    said = ", ".join(f"{name} {share:.3f}" for name, share in found.items())
    run.log(f"blend: weights {said}, by {len(valid):,} validation rows")
    return Blend(tuple(members), shares)


def best_shares(scores: Sequence[Values], target: Array, weight: Array | None, loss: Loss) -> tuple[float, ...]:
    """The weights, in steps of 1 / STEPS, with the least loss of the mean of scores.

    Shape: scores [n] or [n, k] each, target [n], weight [n] (None: 1 each).

    The loss is the log loss of classes, else the default metric of the loss. From equal weights, weight moves from member to
    member as long as that helps, in steps of a half, a quarter, ...
    """
    metric = loss.metrics["log_loss" if "log_loss" in loss.metrics else loss.metric]
    used = np.isfinite(target) if weight is None else np.isfinite(target) & (weight > 0)
    parts = [np.asarray(part[used], np.float64) for part in scores]
    times = None if weight is None else weight[used]

    def worth(units: Sequence[int]) -> float:
        mean = mean_of(parts, [unit / STEPS for unit in units])
        return metric.sign * metric.point(counted(target[used], mean, times, loss))

    count = len(scores)
    units = [STEPS // count + (place < STEPS % count) for place in range(count)]
    best, step = worth(units), STEPS // 2
    while step:
        moved = False
        for giver, taker in itertools.permutations(range(count), 2):
            if units[giver] < step:
                continue
            tried = list(units)
            tried[giver] -= step
            tried[taker] += step
            found = worth(tried)
            if found > best + LEAST_GAIN * abs(best):
                units, best, moved = tried, found, True
        step = step if moved else step // 2
    return tuple(unit / STEPS for unit in units)


def of_members(
    config: Config,
    run: Run,
    blend: Blend | None,
    examples: dict[str, Examples],
    details: Mapping[str, SplitDetails],
) -> dict[str, float]:
    """Metrics of each member of a blend by itself (`members/<name>/<split>/<metric>`), their mean and standard deviation
    (`members_mean/...`, `members_sd/...`), and the weights; rows for the report go into the details.
    """
    if blend is None:
        return {}
    loss, threads = loss_of(config.train), threads_of(config)
    watched = watched_metric(loss, config.train.metric)
    found = {f"members/{member.name}/share": share for member, share in zip(blend.members, blend.shares, strict=True)}
    for split in details:
        part = examples[split]
        weight = part.weight if config.evaluate.weighted else None
        scores = blend.member_scores(loss, blend.logits(part.numeric, part.codes, threads))
        each = [
            point_metrics(part.target, one, loss, ece_bins=config.evaluate.ece_bins, weight=weight) for one in scores
        ]
        details[split]["members"] = [
            {"name": member.name, "share": share, **own}
            for member, share, own in zip(blend.members, blend.shares, each, strict=True)
        ]
        for member, own in zip(blend.members, each, strict=True):
            found |= {f"members/{member.name}/{split}/{name}": value for name, value in own.items()}
        for name in each[0]:
            values = np.array([own[name] for own in each])
            found[f"members_mean/{split}/{name}"] = float(values.mean())
            if len(values) > 1:
                found[f"members_sd/{split}/{name}"] = float(values.std(ddof=1))
        shown = ", ".join(
            f"{member.name} {decimals(own[watched])}" for member, own in zip(blend.members, each, strict=True)
        )
        run.log(f"{split} {watched} of the members: {shown}")
    return found


def shared_encoder(bundles: Sequence[Bundle], classes: Sequence[tuple[str, ...]]) -> Encoder:
    """The encoder of finished models. Raises UserError where their classes are not those of the training rows."""
    if tuple(bundles[0].model["classes"]) != classes[0]:
        raise UserError(f"{KEY} need models with classes {list(classes[0])}, found {bundles[0].model['classes']}")
    return bundles[0].encoder


def without_idle(blend: Blend) -> Blend:
    """The members with a weight above 0, which are all that a score needs."""
    kept = [(member, share) for member, share in zip(blend.members, blend.shares, strict=True) if share > 0]
    return Blend(tuple(member for member, _ in kept), tuple(share for _, share in kept))
