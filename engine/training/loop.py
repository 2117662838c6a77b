"""The training loop, on any hardware: on CPUs the same weights, byte for byte, for any number of threads and workers.

Order, shards and dropout are functions of (dataset digest, seed, step). A stepper takes the steps (`cpu_stepper`, `gpu`); the
trainer accounts for them. What a step needs is in the checkpoint, so a resumed run takes the same steps.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import digest, environment, records, storage
from engine.runtime.progress import Progress
from engine.runtime.run import Run
from engine.training.checkpoint import check_identity, newest_checkpoint, save_checkpoint
from engine.training.cpu_stepper import CpuStepper
from engine.training.evaluate import point_metrics, watched_metric
from engine.training.examples import Examples
from engine.training.exchange import Alone, Exchange
from engine.training.gpu.stepper import GpuStepper
from engine.training.interrupt import StopFlag
from engine.training.kinds import BUILT_IN
from engine.training.losses import loss_record, to_scores
from engine.training.metrics import decimals
from engine.training.model import Network, architecture, build_model
from engine.training.networks import Fitted
from engine.training.objectives import check_all, objectives_of, scales_of
from engine.training.order import RowOrder
from engine.training.predict import TILE_ROWS
from engine.training.probe import probe
from engine.training.schedule import Schedule
from engine.training.stepper import MakeStepper, StepFigures, Stepper, StepsTaken, TrainingJob
from engine.training.threads import Team, compute_threads
from engine.training.trees import Trees
from engine.training.warm_start import load_start_weights

STEPPERS: dict[str, MakeStepper] = {"cpu": CpuStepper, "cuda": GpuStepper}
NAMED_ROWS = 20  # rows named when a loss is bad
STREAM_FACTOR = 0x9E3779B97F4A7C15


Epoch = dict[str, Any]  # epoch, step, train_loss, rows, row_stream and valid_<metric>


class FitKeys(TypedDict):
    """Arguments of `fit` that are known where the data is."""

    cardinalities: list[int]
    outputs: list[int]
    dataset_digest: str
    precision: str


@dataclass
class FitResult:
    """A trained model with its best weights, and the figures of its training."""

    model: Network | Trees
    metrics: dict[str, float]
    best_epoch: int
    steps: int
    history: list[Epoch]
    precision: str
    first_step: float = 0.0  # end of the first step, seconds since 1970


class Paused(KeyboardInterrupt):
    """Training has paused after an epoch, at a checkpoint; `measured`: metrics of its validation rows then.

    `rows`: training rows that it has taken until then, counted each epoch.
    """

    def __init__(self, directory: Path, epochs: int, measured: dict[str, float | None], rows: int) -> None:
        super().__init__(
            f"paused after epoch {epochs} (train.pause_after); the same command with another value continues"
        )
        self.directory, self.measured, self.rows = directory, measured, rows


@dataclass
class State:
    """The state of a run that a checkpoint stores in addition to tensors, as JSON."""

    step: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    rows_seen: int = 0
    stream: int = 0
    skipped: int = 0
    best_metric: float | None = None
    best_epoch: int = -1
    stale_epochs: int = 0
    finished: bool = False
    history: list[Epoch] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)


@dataclass
class Clock:
    """Seconds of this attempt by what they were spent on."""

    input: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    checkpoint: float = 0.0
    evaluate: float = 0.0
    trained_rows: int = 0
    steps: int = 0
    first_step: float = 0.0


def fit(  # noqa: PLR0913
    train: Examples,
    valid: Examples | None,
    config: Config,
    run: Run,
    *,
    cardinalities: Sequence[int],
    outputs: Sequence[int],
    dataset_digest: str,
    precision: str,
    fitted: Fitted | None = None,
    exchange: Exchange | None = None,
    local_workers: int = 1,
    make_stepper: MakeStepper | None = None,
) -> FitResult:
    """Train a model on `train`, watch `valid`, and return it, in host memory, with the weights of the best epoch (the last
    without `valid`).

    Continues from the newest whole checkpoint in the run's directory, if there is one. `outputs` of each target is
    1, or the number of classes; `fitted` is what `kinds.fit_arrays` has learned. Several workers call it together, each with
    its `exchange`; `local_workers` of them share a machine. Steps are taken by `make_stepper(job)`, else by the stepper of the
    device that the run has recorded. Raises UserError for targets that the loss cannot take, for a loss that is not finite
    under train.on_bad_loss=stop, for a checkpoint of another plan, and for a plug-in's model that the probe refuses.
    """
    check_all(config.train, train, outputs)
    with Team(_threads(config, local_workers)) as team, StopFlag(run.stops) as stop:
        model = build_model(
            config.model, train.numeric.shape[1], cardinalities, sum(outputs), config.train.seed, fitted
        )
        model.target, *model.others = scales_of(config.train, train)
        load_start_weights(model, config)
        schedule = Schedule.of(len(train), config.train)
        objectives = objectives_of(config.train, train, outputs, model.targets)
        if model.kind not in BUILT_IN:
            model.traits = probe(model, train, schedule, objectives, precision, run.warn)
        job = TrainingJob(
            config=config,
            run=run,
            train=train,
            model=model,
            order=RowOrder.of(train, config.train),
            schedule=schedule,
            objectives=objectives,
            dataset_digest=dataset_digest,
            precision=precision,
            exchange=exchange or Alone(),
            team=team,
            stop=stop,
        )
        stepper = (make_stepper or STEPPERS[run.record.get("device", "cpu")])(job)
        return Trainer(job, stepper, valid).fit()


def _threads(config: Config, local_workers: int) -> int:
    """Threads of a worker: workers of one machine share its cores, unless the config sets the number."""
    if local_workers == 1 or config.cluster.threads or config.resources.threads:
        return compute_threads(config)
    return max(1, environment.cores() // local_workers)


class Trainer:
    """Trains in one worker: accounts for the steps of a stepper, judges epochs, saves and resumes."""

    def __init__(self, job: TrainingJob, stepper: Stepper, valid: Examples | None) -> None:
        self.job, self.stepper, self.valid = job, stepper, valid
        self.config, self.schedule, self.exchange = job.config, job.schedule, job.exchange
        self.loss = job.objectives[0].loss  # of the main target, by which epochs are judged
        self.metric = watched_metric(self.loss, job.config.train.metric)
        self.metrics = self.loss.metrics
        self.state, self.clock = State(), Clock()
        self.best: dict[str, Tensor] = {}  # of the best epoch; empty before one is judged
        self.earlier: dict[str, float] = {}  # seconds of earlier attempts, up to the checkpoint
        self.began = time.perf_counter()
        self.checkpoints = job.run.directory / "checkpoints"
        self.resumed_from: int | None = None
        self.saved_step = -1

    def fit(self) -> FitResult:
        """Resume, and take all remaining steps."""
        self._resume()
        self._link("order", self.job.order.digest(self.job.train.rows, self.config.train.seed))
        if self.state.history:
            self._pause()
        self.began = time.perf_counter()
        total, state = self.schedule.rows_before(self.schedule.steps), self.state
        with self.job.run.progress("train", total, "rows", self.schedule.rows_before(state.step)) as progress:
            while not state.finished:
                taken = self.stepper.run(state.step)
                self._account(taken, progress)
                if state.step % self.schedule.epoch_steps == 0:
                    self._end_epoch(progress)
                    self._pause()
                elif self.config.train.checkpoint_every and state.step % self.config.train.checkpoint_every == 0:
                    self._save()
                if taken.stop:
                    self._save()
                    self.job.stop.clear()
                    raise KeyboardInterrupt(
                        f"stopped at step {state.step} of {self.schedule.steps}; resume to continue"
                    )
        return self._result(time.perf_counter() - self.began)

    def _pause(self) -> None:
        """Raise Paused where training is to pause after this epoch, or was to after an earlier one."""
        after = self.config.train.pause_after
        if after and not self.state.finished and len(self.state.history) >= after:
            then = self.state.history[after - 1]  # not the last: a run may have been killed beyond it
            measured = {name.removeprefix("valid_"): value for name, value in then.items() if name.startswith("valid_")}
            rows = self.schedule.rows_before(after * self.schedule.epoch_steps)
            raise Paused(self.job.run.directory, after, measured, rows)

    def _resume(self) -> None:
        identity = self._identity()
        checkpoint = newest_checkpoint(self.checkpoints, self.job.run, self.exchange)
        if checkpoint is None:
            return
        check_identity(checkpoint, identity)
        self.stepper.weights.load(checkpoint.tensors)
        self.stepper.optimizer.load(checkpoint.tensors)
        self.best = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("best_")}
        where = f"{checkpoint.folder}: state"
        self.state = records.filled(State, [checkpoint.manifest.get("state", {})], where)[0]
        self.earlier = checkpoint.manifest.get("spent", {})
        self.resumed_from = self.saved_step = self.state.step
        for name, value in self.state.links.items():
            self.job.run.link(name, value)
        self.job.run.log(f"resumed from step {self.state.step} of {self.schedule.steps}")

    def _identity(self) -> dict[str, object]:
        """The identity that a checkpoint must share with the run that continues it."""
        return {
            "plan": self.job.run.record["plan"],
            "dataset": self.job.dataset_digest,
            "seeds": {"train": self.config.train.seed},
            "precision": self.job.precision,
            "architecture": architecture(self.job.model),
            **({"loss_version": version} if (version := loss_record(self.config.train).get("loss_version")) else {}),
            **self.stepper.identity,
        }

    # ------------------------------------------------------------------------------------------------- steps

    def _account(self, taken: StepsTaken, progress: Progress) -> None:
        """Add the figures of steps to the state, the clock, the log and the display."""
        state, clock, rows = self.state, self.clock, 0
        for figures in taken.figures:
            self._count(figures)
            rows += figures.rows
        clock.first_step = clock.first_step or time.time()
        clock.input += taken.input
        clock.compute += taken.compute
        clock.communication += taken.communication
        clock.trained_rows += rows
        clock.steps += len(taken.figures)
        last = taken.figures[-1]
        progress.advance(rows, f"epoch {(state.step - 1) // self.schedule.epoch_steps + 1}, loss {last.mean_loss:.4f}")
        if state.step % self.config.train.log_every == 0 or state.step == 1:
            seconds = taken.input + taken.compute + taken.communication
            values = {
                "train/loss": last.mean_loss,
                "train/lr": self.schedule.rate(state.step - 1),
                "train/gradient_norm": last.norm,
                "train/step_seconds": seconds / len(taken.figures),
                "train/step_input_seconds": taken.input / len(taken.figures),
                "train/rows_per_second": progress.rate,
            }
            self.job.run.log_metrics(state.step, values)

    def _count(self, figures: StepFigures) -> None:
        state = self.state
        if figures.bad or not math.isfinite(figures.norm):
            self._bad_step(figures)
        elif figures.weight > 0:
            state.loss_sum += figures.loss
            state.weight_sum += figures.weight
        state.step += 1
        state.rows_seen += figures.rows
        state.stream = (state.stream * STREAM_FACTOR + figures.stream) % 2**64
        if 10 ** round(math.log10(state.step)) == state.step:
            self._link(f"loss@{state.step}", digest.of_bytes(np.array([figures.mean_loss], "<f8")))

    def _link(self, name: str, value: str) -> None:
        self.state.links[name] = value
        self.job.run.link(name, value)

    def _bad_step(self, figures: StepFigures) -> None:
        """Handle a loss that is not finite; collective: all workers skip or all stop."""
        mine = figures.bad_rows[:NAMED_ROWS]
        padded = torch.tensor([mine + [-1] * (NAMED_ROWS - len(mine))])
        by_rank = self.exchange.gather(padded)[:, 0].tolist()
        named = {rank: [row for row in rows if row >= 0] for rank, rows in enumerate(by_rank)}
        where = "; ".join(f"rank {rank}: dataset rows {rows}" for rank, rows in named.items() if rows)
        more = figures.bad - sum(map(len, named.values()))
        if where and more > 0:
            where += f" and {more} more"
        message = f"the loss at step {self.state.step} is not finite ({where or 'its gradient overflows'})"
        if self.config.train.on_bad_loss == "stop":
            raise UserError(
                f"{message}. Look at these rows, lower train.lr, or set train.on_bad_loss=skip to continue "
                "without the batch"
            )
        self.state.skipped += 1
        self.job.run.warn(f"{message}; the step is skipped on all workers")

    # ------------------------------------------------------------------------------------------------- epochs

    def _end_epoch(self, progress: Progress) -> None:
        state = self.state
        epoch = state.step // self.schedule.epoch_steps - 1
        if not state.weight_sum:
            raise UserError(
                f"no step of epoch {epoch + 1} could be used: the loss of every batch was not finite, or all weights are "
                "zero. Look at the rows named in run.log, and lower train.lr"
            )
        began = time.perf_counter()
        entry: Epoch = {
            "epoch": epoch,
            "step": state.step,
            "train_loss": state.loss_sum / state.weight_sum,
            "rows": state.rows_seen,
            "row_stream": f"{state.stream:016x}",
        }
        state.loss_sum = state.weight_sum = 0.0
        state.rows_seen = state.stream = 0
        with self._averaged():
            measured = self._validate()
        self.clock.evaluate += time.perf_counter() - began
        entry |= {f"valid_{name}": storage.finite(value) for name, value in measured.items()}
        state.history.append(entry)
        self._judge(epoch, measured)
        state.finished = state.step >= self.schedule.steps or bool(
            self.schedule.patience and self.valid is not None and state.stale_epochs >= self.schedule.patience
        )
        logged = {
            "train/epoch_loss": entry["train_loss"],
            **{f"valid/{name}": value for name, value in measured.items()},
        }
        # Before the checkpoint, so that after a kill between the two the line is repeated, not lost.
        self.job.run.log_metrics(state.step, logged)
        self._save()
        progress.advance(0, f"epoch {epoch + 1} of {self.schedule.epochs}, " + _described(entry))

    def _validate(self) -> dict[str, float]:
        """Metrics of the validation rows, each scored once by one worker; the figures of rank 0 hold for all."""
        if self.valid is None or not len(self.valid):
            return {}
        logits = self._logits(self.valid)
        measured: dict[str, float] = {}
        target = self.valid.target.reshape(len(self.valid), -1)
        weight = None if self.valid.weight is None else self.valid.weight.reshape(len(self.valid), -1)
        for k, (name, item) in enumerate(zip(("", *self.config.train.targets), self.job.objectives, strict=True)):
            found = point_metrics(
                target[:, k],
                to_scores(item.loss, logits[..., item.at], item.scale),
                item.loss,
                ece_bins=self.config.evaluate.ece_bins,
                weight=weight[:, k % weight.shape[1]] if weight is not None and self.config.evaluate.weighted else None,
            )
            measured |= found if k == 0 else {f"{name}/{metric}": value for metric, value in found.items()}
        return dict(zip(measured, self.exchange.first(list(measured.values())), strict=True))

    def _logits(self, data: Examples) -> np.ndarray:
        """Raw outputs of validation rows, of this worker whole tiles, the same number for every worker."""
        world = self.exchange.world
        tiles = -(-len(data) // TILE_ROWS)
        each = -(-tiles // world) * TILE_ROWS
        start = min(self.exchange.rank * each, len(data))
        stop = min(start + each, len(data))
        part = np.zeros((each, *self.job.model.output_shape), np.float32)
        part[: stop - start] = self.stepper.logits(data.numeric[start:stop], data.codes[start:stop])
        return self.exchange.gather(torch.from_numpy(part)).flatten(0, 1)[: len(data)].numpy()

    def _judge(self, epoch: int, measured: dict[str, float]) -> None:
        """Keep the best weights: without validation rows those of the last epoch; an undefined metric is not better."""
        state, metric = self.state, self.metrics[self.metric]
        value = self._watched(measured)
        gain = None if value is None or state.best_metric is None else metric.sign * (value - state.best_metric)
        if not measured or (value is not None and (gain is None or gain > 0)):
            state.best_metric, state.best_epoch, state.stale_epochs = value, epoch, 0
            with self._averaged():
                self.best = self.stepper.weights.best()
        else:
            state.stale_epochs += 1

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the moving average of the weights in their place, where there is one."""
        if not self.config.train.ema:
            yield
            return
        weights = self.stepper.weights
        kept = {"kept_weights": weights.values.clone()}
        weights.load(self.stepper.optimizer.state(), "average_")
        yield
        weights.load(kept, "kept_")

    def _watched(self, measured: dict[str, float]) -> float | None:
        """The watched metric, or its replacement where it cannot be computed, so that higher is better; None without both."""
        names = [self.metric, *(name for name, metric in self.metrics.items() if metric.stand_in)]
        usable = next((name for name in names if math.isfinite(measured.get(name, math.nan))), None)
        if measured and usable != self.metric and self.state.best_epoch < 0:
            said = (
                f"{self.metrics[usable].label.lower()} is watched instead" if usable else "this epoch is not the best"
            )
            self.job.run.warn(f"{self.metric} of the validation rows cannot be computed: {said}")
        return None if usable is None else self.metrics[self.metric].sign * self.metrics[usable].sign * measured[usable]

    # ------------------------------------------------------------------------------------------------- closing

    def _save(self) -> None:
        if self.exchange.rank or self.state.step == self.saved_step:
            return
        began = time.perf_counter()
        tensors = {**self.stepper.weights.state(), **self.stepper.optimizer.state(), **self.best}
        facts = {
            **self._identity(),
            "state": asdict(self.state),
            "spent": self._spent(began - self.began),
            "scheduler": {
                "kind": self.config.train.schedule,
                "total_steps": self.schedule.steps,
                "warmup": self.config.train.warmup,
                "peak": self.config.train.lr,
            },
            "order": {"rule": self.config.train.order, "steps_per_epoch": self.schedule.epoch_steps},
        }
        save_checkpoint(self.checkpoints, self.state.step, tensors, facts, self.config.train.keep_checkpoints)
        self.saved_step = self.state.step
        self.clock.checkpoint += time.perf_counter() - began

    def _spent(self, seconds: float) -> dict[str, float]:
        """The clock of all attempts; `seconds` is the time since this one began.

        Steps lost to a kill, and the checkpoint that is being written, do not count.
        """
        spent = asdict(self.clock) | {"total": seconds}
        return {name: self.earlier.get(name, 0) + value for name, value in spent.items() if name != "first_step"}

    def _peak_memory(self) -> float:
        """Peak bytes of the largest worker so far, with the pages of mapped files that were read."""
        mine = torch.tensor([[resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0]], dtype=torch.float64)
        return float(self.exchange.gather(mine).max())

    def _result(self, seconds: float) -> FitResult:
        best_epoch = len(self.state.history) - 1  # where no epoch could be judged
        self.stepper.weights.load(self.stepper.optimizer.state(), "average_")
        if self.best:
            self.stepper.weights.load(self.best, "best_")
            best_epoch = self.state.best_epoch
        spent = self._spent(seconds)
        working = spent["input"] + spent["compute"] + spent["communication"]
        metrics = {
            "train/loss": self.state.history[-1]["train_loss"],
            "train/seconds": spent["total"],
            "train/steps": float(self.state.step),
            "train/epochs": float(len(self.state.history)),
            "train/best_epoch": float(best_epoch),
            "train/steps_skipped": float(self.state.skipped),
            "train/rows_per_second": spent["trained_rows"] / working if working else 0.0,
            "train/steps_per_second": spent["steps"] / working if working else 0.0,
            **{
                f"train/{part}_seconds": spent[part]
                for part in ("input", "compute", "communication", "checkpoint", "evaluate")
            },
            "train/parameters": float(sum(parameter.numel() for parameter in self.job.model.parameters())),
            "train/peak_memory_bytes": self._peak_memory(),
            **self.stepper.finish(),
        }
        if self.resumed_from is not None:
            metrics["resumed_from_step"] = float(self.resumed_from)
        state = self.state
        return FitResult(
            self.job.model,
            metrics,
            best_epoch,
            state.step,
            state.history,
            self.job.precision,
            self.clock.first_step,
        )


def _described(entry: Epoch) -> str:
    known = {name.removeprefix("valid_"): value for name, value in entry.items() if name.startswith("valid_")}
    parts = [f"{name} {decimals(value)}" for name, value in known.items() if value is not None]
    return ", ".join(parts[:2]) or "no validation rows"
