"""The `backtest` step: replays the past period by period under several retraining policies.

At the start of a period each policy decides on what monitoring had seen by then, and trains, judges and promotes in its own
registry; the champion scores the period; the period is monitored at its end. Policies share work: trainings are reused by plan
and dataset, scores by model and rows, within a backtest and between backtests.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config import schema, units
from engine.config.sections.lifecycle import PolicyConfig, RetrainConfig
from engine.config.timeless import WHY
from engine.config.tree import Config
from engine.data.calendar import day_start, local_days
from engine.errors import UserError
from engine.lifecycle import backtest_report, decide
from engine.lifecycle.backtest_report import BacktestRecord, PeriodRow, PolicyResult
from engine.lifecycle.challenger import (
    History,
    Periods,
    Workshop,
    challenger_config,
    check_anew,
    horizon_of,
    labelled,
    periods_of,
)
from engine.lifecycle.challenger_gate import judged_metric
from engine.lifecycle.past_windows import Watch
from engine.lifecycle.retrain_rules import Observation
from engine.lifecycle.trainings import Training, TrainOne, in_process, trained, trained_on_ray
from engine.lifecycle.version_facts import version_facts
from engine.monitoring.performance import UNJUDGED
from engine.runtime import digest, storage
from engine.runtime.registry import Registry, Version, seal_of
from engine.runtime.run import Run, plan_digest
from engine.training.evaluate import Scored, intervals, point_metrics
from engine.training.losses import loss_of
from engine.training.metrics import decimals, find_metric
from engine.training.train import check_trainable

FORMAT = 1
LATEST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Period:
    """An interval of the event time in microseconds UTC, start included, end excluded."""

    name: str
    start: int
    stop: int


@dataclass
class Bench:
    """State shared by all policies of a backtest."""

    config: Config
    run: Run
    workshop: Workshop
    watch: Watch
    periods: list[Period]
    metric: str
    first: Training  # of the first champion

    @property
    def history(self) -> History:
        """The data."""
        return self.workshop.history


def backtest(config: Config, run: Run) -> dict[str, float]:
    """Replay every policy; write backtest.json and report.html."""
    began = time.monotonic()
    check_replayable(config)
    for leftover in ("registry", "policies"):  # of a killed attempt: its expensive parts are found by content
        shutil.rmtree(run.path(leftover), ignore_errors=True)
    history = History.read(config, run)
    bench = prepare(config, run, history)
    results: list[PolicyResult] = []
    for name, policy in config.backtest.policies.items():
        results.append(replay(bench, name, policy_config(config.retrain, policy)))
        run.log(f"policy {name}: {summary(results[-1])}")
    compare(results, bench.metric)
    record: BacktestRecord = {
        "format": FORMAT,
        "name": config.name,
        "metric": bench.metric,
        "period": config.backtest.period,
        "dataset": history.dataset.digest,
        "first_model": {"run": str(bench.first.directory), "split": schema.plain(first_config(config, history).split)},
        "retrain": schema.plain(config.retrain),
        "seconds": time.monotonic() - began,
        "policies": results,
    }
    storage.write_json(run.path("backtest.json"), record)
    run.add_used("first model", bench.first.record["outputs"]["model"])
    run.add_output("backtest", digest.of_json(record))
    backtest_report.write_report(run, record)
    for line in backtest_report.text_table(record).splitlines():
        run.log(line)
    return {**figures(results), "backtest/seconds": record["seconds"]}


def check_replayable(config: Config) -> None:
    """Check the config before any work starts. Raises UserError."""
    if not config.backtest.policies:
        raise UserError("backtest.policies must name at least one policy")
    if not config.data.timed or config.split.by != "time":
        found = f"split.by={config.split.by}" if config.data.timed else WHY
        raise UserError(
            f"backtest replays the past period by period, which needs an event time and split.by=time, found {found}: `evaluate "
            "--protocol grouped` measures other parts instead"
        )
    if config.backtest.start is None and not config.split.valid:
        raise UserError(
            "backtest.start must be the start of the first scored period; neither it nor split.valid is set"
        )
    placed = config if config.split.train else dataclasses.replace(config, split=first_split_stub(config))
    check_anew(config)
    check_trainable(placed)


def first_split_stub(config: Config) -> Any:
    """A placeholder training period: a backtest derives its own from the data."""
    return dataclasses.replace(config.split, train=("1970-01-01", config.backtest.start or ""), valid=(), test=())


def policy_config(base: RetrainConfig, policy: PolicyConfig) -> RetrainConfig:
    """`retrain` with the overrides of a policy."""
    changes = {name: value for name, value in vars(policy).items() if value is not None and name != "triggers"}
    return dataclasses.replace(base, triggers=policy.triggers, **changes)


# ------------------------------------------------------------------------------------------------------ set-up


def prepare(config: Config, run: Run, history: History) -> Bench:
    """The periods, the first champion, and the trainings that are certainly needed."""
    # Work that backtests share is in the store, where a later backtest finds it.
    shared = dataclasses.replace(config.paths, runs=str(Path(config.paths.store) / "backtest"))
    config = dataclasses.replace(config, paths=shared)
    history = dataclasses.replace(history, config=config)
    periods = make_periods(history)
    workshop = Workshop(history, run, Path(shared.store) / "backtest" / "scores")
    if config.cluster.kind == "ray":
        train_ahead(config, run, history, periods)
        config = in_process(config)
        history = dataclasses.replace(history, config=config)
        workshop = Workshop(history, run, workshop.cache)
    first = trained(first_config(config, history), run, history.dataset.digest)
    metric = judged_metric(loss_of(config.train), config.retrain.gate)
    watch = Watch(workshop, metric, Path(shared.store) / "backtest" / "monitor")
    return Bench(config, run, workshop, watch, periods, metric, first)


def start_of(config: Config) -> int:
    """When the first period begins."""
    return config.instants["backtest.start"] if config.backtest.start else config.periods["split.valid"][0]


def first_config(config: Config, history: History) -> Config:
    """The config of the first champion, trained on all rows that are mature when the first period begins."""
    now = start_of(config)
    horizon = horizon_of(config.retrain, history.event, history.known, now)
    return challenger_config(config, periods_of(config.retrain, int(history.event[0]), now, horizon, None))


def make_periods(history: History) -> list[Period]:
    """Periods with rows from backtest.start to its stop; the last may be shorter. Raises UserError when there is none."""
    length, zone = history.config.backtest.period, history.config.data.time_zone
    start = start_of(history.config)
    stop = history.config.instants.get("backtest.stop", int(history.event[-1]) + 1)
    found: list[Period] = []
    at = start
    # Steps from event to event, so that empty periods, even a century of them, cost nothing: they cannot be measured.
    while (place := int(np.searchsorted(history.event, at, "left"))) < len(history.event):
        event = int(history.event[place])
        if event >= stop:
            break
        at = period_start(event, at, length, zone)
        end = next_month(at, zone) if length == "month" else at + units.Span(length).microseconds
        text = units.format_instant(at, zone)
        found.append(Period(text[:7] if length == "month" else text[:10], at, min(end, stop)))
        at = end
    if not found:
        raise UserError(
            f"backtest.start must be before the end of the data, {units.format_instant(stop, zone)}, found "
            f"{units.format_instant(start, zone)}"
        )
    return found


def period_start(event: int, start: int, period: str, zone: str) -> int:
    """Start of the period that holds the event; `start` is the start of this or an earlier period."""
    if period != "month":
        length = units.Span(period).microseconds
        return start + (event - start) // length * length
    return max(start, month_start(event, zone))


def month_start(instant: int, zone: str, later: int = 0) -> int:
    """The first instant of the local month that holds `instant`, or of one `later`."""
    day = local_days(pa.array([instant], pa.int64()), zone)[0]
    first = (np.datetime64(int(day), "D").astype("datetime64[M]") + later).astype("datetime64[D]")
    return day_start(int(first.astype(np.int64)), zone)


def next_month(instant: int, zone: str) -> int:
    """The first instant of the next local month."""
    return month_start(instant, zone, 1)


def train_ahead(config: Config, run: Run, history: History, periods: list[Period]) -> None:
    """Train in parallel on Ray what unconditional policies will need; most of it serves the other policies too."""
    plans = [first_config(config, history)]
    seen = plans[0].periods["split.train"][1]
    for policy in (policy_config(config.retrain, item) for item in config.backtest.policies.values()):
        if "always" not in policy.triggers:
            continue
        for period in periods[1:]:
            horizon = horizon_of(policy, history.event, history.known, period.start)
            chosen = periods_of(policy, int(history.event[0]), period.start, horizon, seen)
            if not chosen.empty:
                plans.append(challenger_config(config, chosen))
    items = {plan_digest("train", plan): schema.plain(in_process(plan)) for plan in plans}
    work = functools.partial(TrainOne, history.dataset.digest, run.hidden)
    with run.progress("train ahead", len(items), "models") as progress:
        for outcome in trained_on_ray(config, run, list(items.values()), work):
            progress.advance(1)
            if outcome.result is None:
                run.warn(f"a training in advance failed; its policy will train again: {outcome.cause}")


# ------------------------------------------------------------------------------------------------------ replay


def replay(bench: Bench, name: str, policy: RetrainConfig) -> PolicyResult:
    """One policy from the first period to the last."""
    registry = Registry(bench.run.path("registry"), name)
    bundle = bench.first.bundle
    first = registry.register(bundle, seal_of(bundle), **version_facts(bench.first.directory))
    registry.move("promote", first.digest, expected=None, why="the first model")
    observations: list[Observation] = []
    rows: list[PeriodRow] = []
    seconds = bench.first.record["seconds"]
    for place, period in enumerate(bench.periods):
        began, saved = time.monotonic(), 0.0
        row: PeriodRow = {
            "period": period.name,
            "retrained": False,
            "promoted": False,
            "reason": "the first model",
        }
        if place:
            decision, saved = _decide(bench, registry, name, policy, tuple(observations), period)
            row |= _outcome(bench, registry, decision, period)
        champion = registry.find("champion")
        figures, observation = observe(bench, champion, period)
        observations.append(observation)
        row |= {"model": champion.digest, **figures, "alarm": observation.alarm, "causes": list(observation.causes)}
        row["seconds"] = time.monotonic() - began + saved
        seconds += row["seconds"]
        rows.append(row)
    return {
        "name": name,
        "triggers": list(policy.triggers),
        "window": policy.window if policy.window == "expanding" else f"{policy.window} {policy.window_length}",
        "retrains": sum(row["retrained"] for row in rows),
        "promotions": sum(row["promoted"] for row in rows),
        "seconds": seconds,
        "periods": rows,
    }


def _decide(
    bench: Bench, registry: Registry, name: str, policy: RetrainConfig, seen: tuple[Observation, ...], period: Period
) -> tuple[decide.DecisionRecord, float]:
    """(the policy's decision at the start of a period, carried out in its own registry; seconds saved by reuse).

    Every policy that uses a training is charged the seconds that it took when it ran.
    """
    saved = 0.0

    def train(plan: Config) -> Training:
        nonlocal saved
        began = time.monotonic()
        found = trained(plan, bench.run, bench.history.dataset.digest)
        saved += float(found.record["seconds"]) - (time.monotonic() - began)
        return found

    directory = bench.run.path("policies", name, period.name)
    storage.make_folder(directory)
    setting = decide.Setting(
        workshop=bench.workshop,
        registry=registry,
        policy=policy,
        directory=directory,
        identity=f"{name}/{period.name}",
        train=train,
    )
    decision = decide.decide(setting, seen, period.start)
    storage.write_json(directory / "decision.json", decision)
    return decision, saved


def _outcome(bench: Bench, registry: Registry, decision: decide.DecisionRecord, period: Period) -> PeriodRow:
    """The decision in a period's record; a refused challenger is measured on the period that it would have served."""
    row: PeriodRow = {
        "retrained": decision["challenger"] is not None,
        "promoted": decision["verdict"] == decide.PROMOTED,
        "verdict": decision["verdict"],
        "reason": "; ".join(decision["reasons"]),
    }
    challenger = decision["challenger"]
    if challenger is None:
        return row
    evidence = decision["evidence"]
    row |= {
        "challenger": challenger,
        "train_rows": decision["train_rows"],
        "judged": evidence["metric"] if evidence else None,
    }
    if decision["verdict"] == decide.KEPT:
        refused = registry.find(challenger)
        figures, *_ = measured(bench, refused, period)
        row["refused_metric"] = figures["metric"]
    return row


def observe(bench: Bench, champion: Version, period: Period) -> tuple[PeriodRow, Observation]:
    """(final figures of the period, what monitoring knew at its end)."""
    figures, known, labels = measured(bench, champion, period)
    seen = bench.watch.window(bench.workshop.predictor(champion.model), period.start, period.stop)
    quality, text = (UNJUDGED, f"{labels} labels give no figure") if known is None and labels else ("", "")
    return figures, dataclasses.replace(
        seen, model=champion.digest, metric=known, metric_name=bench.metric, quality=quality, quality_text=text
    )


def measured(bench: Bench, version: Version, period: Period) -> tuple[PeriodRow, float | None, int]:
    """(metric with interval on all labels of the period, metric on the labels known at its end, their number)."""
    predictor = bench.workshop.predictor(version.model)
    rows = bench.history.dataset.row_range(period.start, period.stop)
    scores = bench.workshop.scores(predictor, rows)
    classes = tuple(predictor.bundle.model["classes"])
    loss = loss_of(bench.config.train)

    def figures(now: int | None) -> tuple[Scored, dict[str, float]]:
        span = Periods(period.start, period.start, period.start, period.stop, LATEST if now is None else now)
        kind, run = predictor.model.target.kind, bench.workshop.run if now is None else None
        known = labelled(bench.history, span, classes, kind, run).scored(scores)
        return known, point_metrics(known.target, known.scores, loss, weight=known.weight)

    final, values = figures(None)
    ripe, early = figures(period.stop)
    settings = dataclasses.replace(bench.config.evaluate, confidence=bench.config.backtest.confidence)
    low, high = intervals(final, values, loss, settings).get(bench.metric, (None, None))
    value, known = (storage.finite(found[bench.metric]) for found in (values, early))
    return {"metric": value, "low": low, "high": high, "rows": len(final.target)}, known, len(ripe.target)


# --------------------------------------------------------------------------------------------------- comparison


def compare(results: list[PolicyResult], metric: str) -> None:
    """Add each policy's gain over `never`, its loss against `every`, and its share of the gain of `every`."""
    sign = find_metric(metric).sign
    means = {item["name"]: mean_metric(item) for item in results}
    for item in results:
        mean = item["mean_metric"] = means[item["name"]]
        never, every = means.get("never"), means.get("every")
        item["gain_over_never"] = None if mean is None or never is None else sign * (mean - never)
        item["regret_to_every"] = None if mean is None or every is None else sign * (every - mean)
        whole = None if never is None or every is None else sign * (every - never)
        gain = item["gain_over_never"]
        item["share_of_gain"] = gain / whole if gain is not None and whole is not None and whole > 0 else None


def mean_metric(result: PolicyResult) -> float | None:
    """Mean over the periods; None when one of them cannot be computed."""
    values = [row["metric"] for row in result["periods"]]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def summary(result: PolicyResult) -> str:
    """One line."""
    mean = mean_metric(result)
    text = "not computable" if mean is None else decimals(mean)
    return f"mean {text}, {result['retrains']} retrains, {result['promotions']} promotions, {result['seconds']:.0f} s"


def figures(results: list[PolicyResult]) -> dict[str, float]:
    """The metrics of a backtest."""
    found: dict[str, float] = {}
    for item in results:
        for key in ("mean_metric", "retrains", "promotions", "seconds", "regret_to_every", "share_of_gain"):
            if isinstance(value := item.get(key), (int, float)):
                found[f"backtest/{item['name']}_{key}"] = float(value)
    return found
