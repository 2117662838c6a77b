"""The `sweep` step: a search for hyper-parameters whose result is the same whatever finishes first.

Trials are asked for in rounds and told in order, so that the sampler sees the same figures for any number of workers. Each
trial is a training run that is found by its content: a sweep that was killed asks the same questions again, finds the
answers that it had, and goes on. Akiba et al.: Optuna, KDD 2019; Jamieson, Talwalkar: Non-stochastic best arm
identification, AISTATS 2016 (successive halving).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml

from engine.config import schema
from engine.config.nested import Tree
from engine.config.sections.sweep import SweepConfig
from engine.config.sections.training import BOOSTERS
from engine.config.tree import Config
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features.table import ensure_table
from engine.lifecycle import sweep_report
from engine.lifecycle.challenger import check_seeds
from engine.lifecycle.sweep_record import FORMAT, BestRecord, SeedsRecord, State, SweepRecord, TrialRecord
from engine.lifecycle.sweep_space import check_space, grid, optuna, put, sampler_of, suggested, with_values
from engine.lifecycle.trainings import TrainOne, in_process, trained, trained_on_ray
from engine.runtime import digest, storage
from engine.runtime.on_ray import cluster, pool
from engine.runtime.run import Run, load_metrics, load_record, plan_digest
from engine.runtime.tracking import read_points
from engine.training.evaluate import watched_metric
from engine.training.loop import Paused
from engine.training.losses import loss_of
from engine.training.metrics import decimals, find_metric
from engine.training.train import check_trainable

DONE: State = "done"
CUT: State = "cut"
FAILED: State = "failed"


class Result(TypedDict):
    """What training a config came to: its run, its validation and test metric, and the training rows that it took."""

    run: str
    valid: float | None
    test: float | None
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A config to train, to its end or to an epoch (`pause`, 0 = the end)."""

    config: Config
    pause: int = 0

    def item(self) -> Tree:
        """JSON for a worker."""
        return {"config": schema.plain(self.config), "pause": self.pause}


def check_sweepable(config: Config) -> None:
    """Check the config before any work starts. Raises UserError."""
    check_trainable(config)
    if not config.split.valid:
        raise UserError("split.valid must say on which rows trials are compared, found none")
    check_space(config)
    check_seeds(config)
    if config.sweep.rungs and config.several:
        raise UserError(
            f"sweep.rungs pause trials of one model, found model={config.model.kind}, train.seeds={config.train.seeds}: leave "
            "them out, or search for the settings of a member by itself"
        )
    watched_metric(loss_of(config.train), config.sweep.metric, "sweep.metric")
    optuna()


def sweep(config: Config, run: Run) -> dict[str, float]:
    """Search, train the best configs anew with other seeds; write sweep.json, best.yaml and report.html."""
    check_sweepable(config)
    began = time.monotonic()
    settings = config.sweep
    tracking = dataclasses.replace(config.tracking, group=config.tracking.group or run.directory.name)
    plan = dataclasses.replace(in_process(config), sweep=SweepConfig(), tracking=tracking)
    dataset = ensure_dataset(plan, run)
    ensure_table(plan, run, dataset)
    metric = watched_metric(loss_of(config.train), settings.metric, "sweep.metric")
    train = functools.partial(_train, config, run, dataset.digest, metric)
    study, trials = search(plan, settings, find_metric(metric).higher_is_better, train, run)
    seeds = anew(plan, settings, trials, find_metric(metric).sign, train)
    record: SweepRecord = {
        "format": FORMAT,
        "name": config.name,
        "metric": metric,
        "higher_is_better": find_metric(metric).higher_is_better,
        "dataset": dataset.digest,
        "trials": trials,
        "seeds": seeds,
        "best": _best(seeds, trials, find_metric(metric).sign),
        "importance": _importance(study),
        "seconds": time.monotonic() - began,
    }
    storage.write_json(run.path("sweep.json"), storage.finite(record))
    storage.write_bytes(run.path("best.yaml"), _best_yaml(config, record).encode())
    run.add_output("sweep", digest.of_json(_lasting(record)))
    sweep_report.write_report(run, record)
    return _metrics(record, run)


def search(
    plan: Config,
    settings: SweepConfig,
    higher: bool,
    train: Callable[[Sequence[Job]], list[Result | str]],
    run: Run,
) -> tuple[Any, list[TrialRecord]]:
    """(Optuna's study, the trials in order): each round is asked for, trained and told before the next one is asked for."""
    library = optuna()
    study = library.create_study(direction="maximize" if higher else "minimize", sampler=sampler_of(settings))
    wanted = settings.trials
    if settings.sampler == "grid":
        every = grid(settings)[:wanted]
        wanted = len(every)
        for choices in every:
            study.enqueue_trial(choices)
    found: list[TrialRecord] = []
    began = time.monotonic()
    with run.progress("sweep", wanted, "trials") as progress:
        while len(found) < wanted and not (found and _is_spent(settings, found, time.monotonic() - began)):
            asked = [study.ask() for _ in range(min(settings.round, wanted - len(found)))]
            values = [suggested(trial, settings.space, plan) for trial in asked]
            records = _round(plan, settings, values, len(found), higher, train)
            for trial, record in zip(asked, records, strict=True):
                _tell(study, trial, record, settings.rungs)
                run.log(_said(record))
            found += records
            progress.advance(len(records))
    return study, found


def _is_spent(settings: SweepConfig, trials: Sequence[TrialRecord], seconds: float) -> bool:
    """Whether the budget of rows or of seconds is used up."""
    rows = sum(trial["rows"] for trial in trials)
    return bool(settings.rows and rows >= settings.rows) or bool(settings.seconds and seconds >= settings.seconds)


def _round(
    plan: Config,
    settings: SweepConfig,
    values: list[dict[str, Any]],
    first: int,
    higher: bool,
    train: Callable[[Sequence[Job]], list[Result | str]],
) -> list[TrialRecord]:
    """Trials of a round: all are trained to the first rung, the best of them go on to the next, and the last ones to the end."""
    records: list[TrialRecord] = [
        {
            "number": first + place,
            "values": item,
            "state": DONE,
            "value": None,
            "rungs": [],
            "run": None,
            "rows": 0,
            "seconds": 0.0,
        }
        for place, item in enumerate(values)
    ]
    configs: dict[int, Config] = {}
    for place, item in enumerate(values):
        try:
            configs[place] = with_values(plan, item)
        except UserError as error:  # values that are allowed one by one, but not together
            records[place] |= {"state": FAILED, "cause": str(error)}
    running = list(configs)
    for pause in (*settings.rungs, 0):
        results = train([Job(configs[place], pause) for place in running])
        for place, result in zip(running, results, strict=True):
            _note(records[place], result, bool(pause))
        running = [place for place in running if records[place]["state"] == DONE]
        if pause:
            order = sorted(running, key=lambda place: (_worth(records[place]["rungs"][-1], higher), place))
            going = order[: max(1, math.ceil(settings.keep * len(values)))]
            for place in set(running) - set(going):
                records[place]["state"] = CUT
            running = sorted(going)
    return records


def _note(record: TrialRecord, result: Result | str, at_rung: bool) -> None:
    if isinstance(result, str):
        record |= {"state": FAILED, "cause": result}
        return
    record["run"], record["value"], record["rows"] = result["run"], result["valid"], result["rows"]
    record["seconds"] += result["seconds"]
    if at_rung:
        record["rungs"].append(result["valid"])
    elif result["valid"] is None:
        record |= {"state": FAILED, "cause": "its metric cannot be computed on the validation rows"}


def _worth(value: float | None, higher: bool) -> float:
    """What sorts the best first."""
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if higher else value


def _tell(study: Any, trial: Any, record: TrialRecord, rungs: Sequence[int]) -> None:
    states = optuna().trial.TrialState
    for epoch, value in zip(rungs, record["rungs"], strict=False):
        if value is not None and math.isfinite(value):
            trial.report(value, epoch)
    if record["state"] == DONE:
        study.tell(trial, record["value"])
    else:
        study.tell(trial, state=states.PRUNED if record["state"] == CUT else states.FAIL)


def _said(record: TrialRecord) -> str:
    value = "no figure" if record["value"] is None else decimals(record["value"])
    values = ", ".join(f"{name}={text}" for name, text in sweep_report.texts(record["values"]))
    cause = f" ({record['cause']})" if "cause" in record else ""
    return f"trial {record['number']}: {value}, {record['state']}{cause}: {values}"


# ------------------------------------------------------------------------------------------------------ training


def _train(config: Config, run: Run, dataset: str, metric: str, jobs: Sequence[Job]) -> list[Result | str]:
    """The results of jobs in their order, or the cause where one failed; equal configs are trained once."""
    plans = [plan_digest("train", job.config) for job in jobs]
    single = {plan: job for plan, job in zip(plans, jobs, strict=True)}
    on_ray = config.cluster.kind == "ray"
    found = dict(_on_ray(config, run, dataset, metric, single) if on_ray else _here(run, dataset, metric, single))
    return [found[plan] for plan in plans]


def _here(run: Run, dataset: str, metric: str, jobs: dict[str, Job]) -> Iterator[tuple[str, Result | str]]:
    for plan, job in jobs.items():
        try:
            yield plan, result_of(job, dataset, metric, run.hidden)
        except Exception as error:
            if pool.is_hopeless(error):
                raise
            yield plan, cluster.one_line(error)


def _on_ray(
    config: Config, run: Run, dataset: str, metric: str, jobs: dict[str, Job]
) -> Iterator[tuple[str, Result | str]]:
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, workers=config.sweep.parallel))
    work = functools.partial(TrialTraining, dataset, run.hidden, metric)
    items: list[Tree] = [{**job.item(), "plan": plan} for plan, job in jobs.items()]
    for outcome in trained_on_ray(config, run, items, work):
        result: Any = outcome.result
        yield outcome.item["plan"], outcome.cause if result is None else result["error"] or result["result"]


class TrialTraining(TrainOne):
    """Trains one job in a Ray actor."""

    def __init__(self, dataset: str, hidden: tuple[str, ...], metric: str, threads: int) -> None:
        super().__init__(dataset, hidden, threads)
        self.metric = metric

    def __call__(self, item: Tree) -> dict[str, Any]:
        """The result, or the error of a user; a lost worker is tried again by the pool."""
        try:
            return {"result": result_of(Job(self.config(item["config"]), item["pause"]), self.dataset, self.metric, self.hidden),
                    "error": ""}  # fmt: skip
        except UserError as error:
            return {"result": None, "error": str(error)}


def result_of(job: Job, dataset: str, metric: str, hidden: tuple[str, ...]) -> Result:
    """Train a job, or continue it. Raises UserError."""
    began = time.monotonic()
    config = dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, pause_after=job.pause))
    try:
        directory = trained(config, None, dataset, hidden).directory
    except Paused as pause:
        return {
            "run": str(pause.directory),
            "valid": pause.measured.get(metric),
            "test": None,
            "rows": pause.rows,
            "seconds": time.monotonic() - began,
        }
    found = load_metrics(directory)
    valid, passes = found.get(f"valid/{metric}"), found.get("train/epochs") or found.get("train/steps") or 0.0
    if job.pause and not _is_boosted(directory):  # it was finished before, or stopped early: what it had at the rung
        valid, passes = _at_epoch(directory, f"valid/{metric}", job.pause), min(job.pause, passes)
    return {
        "run": str(directory),
        "valid": valid,
        "test": found.get(f"test/{metric}"),
        "rows": int(passes * (found.get("train/rows") or 0.0)),
        "seconds": time.monotonic() - began,
    }


def _is_boosted(directory: Path) -> bool:
    """Whether a run has grown trees, which are never paused."""
    record = load_record(directory)
    chosen = record.get("chosen_model")
    kind = chosen["kind"] if chosen else schema.build(Config, record["config"]).model.kind
    return kind in BOOSTERS


def _at_epoch(directory: Path, name: str, epoch: int) -> float | None:
    """A validation metric after an epoch, or after the last one before it; a line that a kill repeated counts once."""
    measured = {point.step: point.values[name] for point in read_points(directory) if name in point.values}
    values = [measured[step] for step in sorted(measured)]
    return float(values[min(epoch, len(values)) - 1]) if values else None


# ------------------------------------------------------------------------------------------------------ the best


def anew(
    plan: Config,
    settings: SweepConfig,
    trials: Sequence[TrialRecord],
    sign: float,
    train: Callable[[Sequence[Job]], list[Result | str]],
) -> list[SeedsRecord]:
    """The config without the search, and the best trials, each trained with seeds that no trial had."""
    done = sorted(
        (trial for trial in trials if trial["state"] == DONE), key=lambda trial: _worth(trial["value"], sign > 0)
    )
    wanted: list[tuple[int | None, Tree]] = [
        (None, {}),
        *((trial["number"], trial["values"]) for trial in done[: settings.best]),
    ]
    seeds = [plan.train.seed + 1 + place for place in range(settings.seeds)]
    jobs = [Job(with_values(plan, {**values, "train.seed": seed})) for _, values in wanted for seed in seeds]
    results = train(jobs)
    found: list[SeedsRecord] = []
    for place, (number, values) in enumerate(wanted):
        each = results[place * len(seeds) : (place + 1) * len(seeds)]
        own = [item for item in each if not isinstance(item, str) and item["valid"] is not None]
        found.append(
            {
                "number": number,
                "values": values,
                "valid": [float(item["valid"]) for item in own],  # type: ignore[arg-type]
                "test": [float(item["test"]) for item in own if item["test"] is not None],
                "runs": [item["run"] for item in own],
            }
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _best(seeds: Sequence[SeedsRecord], trials: Sequence[TrialRecord], sign: float) -> BestRecord:
    """The config with the best mean of its new seeds on the validation rows, against the config without the search."""
    default, *others = seeds
    usable = [item for item in others if item["valid"]]
    if not usable:
        return {"number": None, "values": {}}
    chosen = max(usable, key=lambda item: sign * _mean(item["valid"]))
    searched = next(trial["value"] for trial in trials if trial["number"] == chosen["number"])
    gain = sign * (_mean(chosen["test"]) - _mean(default["test"]))
    spread = math.sqrt((_spread(chosen["test"]) ** 2 + _spread(default["test"]) ** 2) / 2)
    return {
        "number": chosen["number"],
        "values": chosen["values"],
        "run": chosen["runs"][int(np.argmax([sign * value for value in chosen["valid"]]))],
        "valid": _mean(chosen["valid"]),
        "searched": searched,
        "too_good_by": sign * ((math.nan if searched is None else searched) - _mean(chosen["valid"])),
        "test": _mean(chosen["test"]),
        "test_without_search": _mean(default["test"]),
        "gain": gain,
        "spread_of_seeds": spread,
        "beyond_seeds": bool(gain > 2 * spread),
    }


def _importance(study: Any) -> dict[str, float]:
    """Share of each key in the metric's variance among the better trials (PED-ANOVA, Watanabe et al. 2023); empty of too few."""
    library = optuna()
    done = study.get_trials(deepcopy=False, states=(library.trial.TrialState.COMPLETE,))
    if len(done) < 4:
        return {}
    try:
        found = library.importance.get_param_importances(
            study, evaluator=library.importance.PedAnovaImportanceEvaluator()
        )
    except (ValueError, RuntimeError):  # values that are all equal, or a key that not every trial has
        return {}
    return {name: float(value) for name, value in found.items()}


def _lasting(record: SweepRecord) -> Tree:
    """The record without seconds and places, which differ each time."""
    trials = [
        {name: item for name, item in trial.items() if name not in ("run", "seconds")} for trial in record["trials"]
    ]
    seeds = [{name: item for name, item in entry.items() if name != "runs"} for entry in record["seeds"]]
    best = {name: item for name, item in record["best"].items() if name != "run"}
    kept = {name: item for name, item in record.items() if name != "seconds"}
    return storage.finite({**kept, "trials": trials, "seeds": seeds, "best": best})  # type: ignore[no-any-return]


def _best_yaml(config: Config, record: SweepRecord) -> str:
    """The best values as a part of an experiment."""
    tree: Tree = {}
    put(tree, record["best"]["values"])
    head = (
        "# @package _global_\n"
        f"# The best config of a sweep over {config.name}: put it into an experiment, below its defaults.\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False)


def _metrics(record: SweepRecord, run: Run) -> dict[str, float]:
    best: dict[str, Any] = {**record["best"]}
    metric = record["metric"]
    states = [trial["state"] for trial in record["trials"]]
    found = {f"sweep/{state}": float(states.count(state)) for state in (DONE, CUT, FAILED)}
    if best["number"] is None:
        run.warn("no trial could be finished: sweep.json has the cause of each")
        return found
    said = "more" if best["beyond_seeds"] else "no more"
    run.log(
        f"best: trial {best['number']}, test {metric} {decimals(best['test'])} against {decimals(best['test_without_search'])} "
        f"without the search, {said} than two standard deviations of seeds ({decimals(best['spread_of_seeds'])}); its figure in "
        f"the search was too good by {decimals(best['too_good_by'])}"
    )
    run.log(f"make it the challenger with: python -m engine registry challenge {record['name']} {run.directory}")
    names = ("valid", "test", "test_without_search", "gain", "spread_of_seeds", "too_good_by")
    return found | {f"sweep/best_{name}": float(best[name]) for name in names}
