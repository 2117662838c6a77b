"""What training comes to on several cuts of the rows: over periods, over folds, and by chance (`evaluate --protocol`).

forward   train < gap < valid < gap < test, moved back period by period: each model is tested on the period after it.
grouped   folds by a hash of data.group: no group is in two parts.
random    folds by a hash of the ids, whatever belongs together and comes later. It is beside the others, to show
          what a random split would have promised (Kaufman et al.: Leakage in data mining, TKDD 2012).

Each cut is trained on with several seeds. Trainings are those of `train`, kept by content in `<paths.store>/evaluate`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from engine.config import schema, units
from engine.config.sections.training import ANY, AUTO, SplitConfig
from engine.config.timeless import WHY
from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features.table import ensure_table
from engine.lifecycle import protocol_report
from engine.lifecycle.challenger import check_anew, check_seeds
from engine.lifecycle.trainings import Training, TrainOne, in_process, trained, trained_on_ray
from engine.runtime import digest, storage
from engine.runtime.run import Run, load_metrics, plan_digest
from engine.training.evaluate import watched_metric
from engine.training.losses import loss_of
from engine.training.metrics import decimals, find_metric
from engine.training.train import check_trainable

FORMAT = 1
RANDOM, FORWARD, GROUPED = "random", "forward", "grouped"


class Trial(TypedDict):
    """A training of a cut: its fold, seed, run and rows, and the watched metric on its validation and test rows."""

    fold: str
    seed: int
    run: str
    train_rows: int
    test_rows: int
    valid: float | None
    test: float | None


class Summary(TypedDict):
    """A protocol: its trials, the mean over folds of the test metric, and its standard deviations: over folds (of the means of
    their seeds), and over the seeds of a fold.
    """

    kind: str
    trials: list[Trial]
    mean: float | None
    over_folds: float | None
    over_seeds: float | None


class ProtocolRecord(TypedDict):
    """protocol.json; `promised` is how much better random folds look than the protocol."""

    format: int
    name: str
    metric: str
    higher_is_better: bool
    dataset: str
    protocols: list[Summary]
    promised: float | None
    seconds: float


@dataclass(frozen=True)
class Cut:
    """One cut of the rows, and whether rows of a group may be divided by it."""

    protocol: str
    fold: str
    split: SplitConfig
    grouped: bool = True


# -------------------------------------------------------------------------------------------------------------- cuts


def check(config: Config) -> None:
    """Check the config before any work starts. Raises UserError."""
    cuts = cuts_of(config)
    check_anew(config)
    check_seeds(config)
    check_trainable(dataclasses.replace(config, split=cuts[0].split))


def cuts_of(config: Config) -> list[Cut]:
    """The cuts of the protocol, and those of random folds beside it. Raises UserError where there are none."""
    kind, count = config.protocol.kind, config.protocol.folds
    beside = [Cut(RANDOM, fold, split, grouped=False) for fold, split in folds(count)]
    if kind == RANDOM:
        return beside
    if kind == GROUPED:
        if config.data.group is None:
            raise UserError(
                "--protocol grouped needs data.group, the column whose rows belong together, as in data.group=customer; without "
                "one folds by chance are --protocol random"
            )
        return [*(Cut(GROUPED, fold, split) for fold, split in folds(count)), *beside]
    return [*(Cut(FORWARD, fold, split) for fold, split in periods(config)), *beside]


def folds(count: int) -> list[tuple[str, SplitConfig]]:
    """(name, split) of `count` folds of a hash: each is the test of one, and the validation rows of the one before."""
    edges = [f"{100 * (count - back) / count:.10g}%" for back in (2, 1)]
    return [
        (
            f"fold {fold + 1}",
            schema.build(
                SplitConfig,
                {
                    "by": "hash",
                    "turn": f"{100 * fold / count:.10g}%",
                    "train": ["0%", edges[0]] if count > 2 else ["0%", "40%"],
                    "valid": edges if count > 2 else ["40%", "50%"],
                    "test": [edges[1], "100%"],
                },
            ),
        )
        for fold in range(count)
    ]


def periods(config: Config) -> list[tuple[str, SplitConfig]]:
    """(test period, split) of periods as long as split.test, the last of which is split.test itself. Training always begins where
    split.train does. Raises UserError where fewer than two fit.
    """
    found, split, zone = config.periods, config.split, config.data.time_zone
    if not config.data.timed or split.by != "time" or not {"split.train", "split.test"} <= set(found):
        why = (
            WHY
            if not config.data.timed
            else f"found split.by={split.by}, train={list(split.train)}, test={list(split.test)}"
        )
        raise UserError(f"--protocol forward needs periods of the event time in split.train and split.test: {why}")
    if split.known_by not in (AUTO, ANY, None):
        raise UserError(
            f"--protocol forward needs split.known_by=auto, for each period has its own, found {split.known_by}"
        )
    gap = config.protocol.gap.microseconds
    train, valid, test = (found.get(f"split.{name}") for name in ("train", "valid", "test"))
    assert train is not None and test is not None
    ends = [min(train[1], (valid or test)[0] - gap), min(valid[1], test[0] - gap) if valid else 0]
    length = test[1] - test[0]
    cuts = []
    for back in range(config.protocol.folds):
        shift = back * length
        if ends[0] - shift < train[0] + length:
            break

        def text(start: int, stop: int) -> list[str]:
            return [units.format_instant(start, zone), units.format_instant(stop, zone)] if start < stop else []

        parts = {
            "train": text(train[0], ends[0] - shift),
            "valid": text(valid[0] - shift, ends[1] - shift) if valid else [],
            "test": text(test[0] - shift, test[1] - shift),
        }
        known = {"known_by": split.known_by, "ripening": split.ripening}
        cuts.append(
            (f"{parts['test'][0][:10]} to {parts['test'][1][:10]}", schema.build(SplitConfig, {**parts, **known}))
        )
    if len(cuts) < 2:
        raise UserError(
            f"--protocol forward needs split.train to last at least two lengths of split.test ({list(split.test)}), less "
            f"protocol.gap={config.protocol.gap}, so that it can be moved back, found {list(split.train)}"
        )
    return cuts[::-1]


def plan_of(config: Config, cut: Cut, seed: int) -> Config:
    """The config that trains on a cut; without what training does not read, so that it is found by content."""
    aside = {
        name: schema.build(schema.hints(Config)[name], {}, name)
        for name in ("score", "monitor", "retrain", "backtest", "protocol")
    }
    data = config.data if cut.grouped else dataclasses.replace(config.data, group=None)
    settings = dataclasses.replace(config.train, seed=config.train.seed + seed)
    paths = dataclasses.replace(config.paths, runs=str(Path(config.paths.store) / "evaluate"))
    split = dataclasses.replace(cut.split, snapshot=config.split.snapshot)
    return dataclasses.replace(config, data=data, split=split, train=settings, paths=paths, **aside)


# ----------------------------------------------------------------------------------------------------------- measure


def measure(config: Config, run: Run) -> dict[str, float]:
    """Train on every cut with every seed; write protocol.json and report.html. Raises UserError."""
    began = time.monotonic()
    metric = watched_metric(loss_of(config.train), config.train.metric)
    cuts = cuts_of(config)
    jobs = [(cut, seed, plan_of(config, cut, seed)) for cut in cuts for seed in range(config.protocol.seeds)]
    digests = {}
    for cut in {
        cut.grouped: cut for cut in cuts[::-1]
    }.values():  # the chain's links are those of the protocol, the last
        plan = plan_of(config, cut, 0)
        dataset = ensure_dataset(plan, run)
        ensure_table(plan, run, dataset)
        digests[cut.grouped] = dataset.digest
    if config.cluster.kind == "ray":
        ahead(config, run, jobs, digests)
    trials: dict[str, list[Trial]] = {}
    with run.progress("protocol", len(jobs), "models") as progress:
        for cut, seed, plan in jobs:
            found = trained(in_process(plan), run, digests[cut.grouped])
            trials.setdefault(cut.protocol, []).append(trial(cut, config.train.seed + seed, found, metric))
            progress.advance(1)
    summaries = [summary(kind, mine) for kind, mine in trials.items()]
    record: ProtocolRecord = {
        "format": FORMAT,
        "name": config.name,
        "metric": metric,
        "higher_is_better": find_metric(metric).higher_is_better,
        "dataset": digests[cuts[0].grouped],
        "protocols": summaries,
        "promised": promised(summaries, find_metric(metric).sign),
        "seconds": time.monotonic() - began,
    }
    storage.write_json(run.path("protocol.json"), storage.finite(record))
    run.add_output("protocol", digest.of_json(lasting(record)))
    protocol_report.write_report(run, record)
    for item in summaries:
        run.log(words(item, metric))
    return figures(record)


def ahead(config: Config, run: Run, jobs: Sequence[tuple[Cut, int, Config]], digests: dict[bool, str]) -> None:
    """Train in parallel on Ray; `trained` then finds the runs by content."""
    for grouped, dataset in digests.items():
        items = {
            plan_digest("train", plan): schema.plain(in_process(plan))
            for cut, _, plan in jobs
            if cut.grouped == grouped
        }
        work = functools.partial(TrainOne, dataset, run.hidden)
        for outcome in trained_on_ray(config, run, list(items.values()), work):
            if outcome.result is None:
                run.warn(f"a training on a worker failed and is repeated here: {outcome.cause}")


def trial(cut: Cut, seed: int, found: Training, metric: str) -> Trial:
    """What a training came to."""
    metrics = load_metrics(found.directory, refuse=True)
    return {
        "fold": cut.fold,
        "seed": seed,
        "run": str(found.directory),
        "train_rows": int(metrics.get("train/rows") or 0),
        "test_rows": int(metrics.get("test/rows") or 0),
        "valid": metrics.get(f"valid/{metric}"),
        "test": metrics.get(f"test/{metric}"),
    }


def summary(kind: str, trials: list[Trial]) -> Summary:
    """The mean over folds, and both spreads, of the trials whose test metric can be computed."""
    by_fold: dict[str, list[float]] = {}
    for item in trials:
        if item["test"] is not None:
            by_fold.setdefault(item["fold"], []).append(item["test"])
    means = [float(np.mean(values)) for values in by_fold.values()]
    within = [float(np.var(values, ddof=1)) for values in by_fold.values() if len(values) > 1]
    return {
        "kind": kind,
        "trials": trials,
        "mean": float(np.mean(means)) if means else None,
        "over_folds": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "over_seeds": float(np.mean(within) ** 0.5) if within else None,
    }


def promised(summaries: Sequence[Summary], sign: float) -> float | None:
    """How much better random folds look than the protocol; None where they are all there is."""
    means = {item["kind"]: item["mean"] for item in summaries}
    random, other = means.get(RANDOM), next((mean for kind, mean in means.items() if kind != RANDOM), None)
    return None if random is None or other is None else sign * (random - other)


def lasting(record: ProtocolRecord) -> dict[str, Any]:
    """The record without times and places."""
    found = [{**item, "trials": [{**one, "run": ""} for one in item["trials"]]} for item in record["protocols"]]
    return {**record, "protocols": found, "seconds": 0}


def words(item: Summary, metric: str) -> str:
    """One line for a person."""
    spread = [
        f"{decimals(item[key])} {name}"  # type: ignore[literal-required]
        for key, name in (("over_folds", "over folds"), ("over_seeds", "over seeds"))
        if item[key] is not None  # type: ignore[literal-required]
    ]
    mean = "cannot be computed" if item["mean"] is None else decimals(item["mean"])
    return f"{item['kind']}: test {metric} {mean}" + (f", standard deviation {', '.join(spread)}" if spread else "")


def figures(record: ProtocolRecord) -> dict[str, float]:
    """The flat figures of the run: those of the protocol as test/<metric>, those of random folds beside it as random/<metric>."""
    metric, found = record["metric"], {}
    for place, item in enumerate(record["protocols"]):
        prefix = RANDOM if place else "test"
        for key, name in (
            ("mean", metric),
            ("over_folds", f"{metric}_over_folds"),
            ("over_seeds", f"{metric}_over_seeds"),
        ):
            if item[key] is not None:  # type: ignore[literal-required]
                found[f"{prefix}/{name}"] = float(item[key])  # type: ignore[literal-required]
    if record["promised"] is not None:
        found[f"random/{metric}_promised"] = record["promised"]
    return {**found, "protocol/trials": float(sum(len(item["trials"]) for item in record["protocols"]))}
