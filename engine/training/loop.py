"""The training loop: the same weights, byte for byte, for any number of threads and workers and after any interruption.

Order, shards and dropout are functions of (dataset digest, seed, step); gradients are added in one fixed tree; clipping
and the optimizer run on one thread. What a step needs is in the checkpoint, so a resumed run takes the same steps.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import digest, environment
from engine.runtime.progress import Progress
from engine.runtime.run import Run
from engine.training.checkpoint import Checkpoint, load_checkpoint, newest_whole, save_checkpoint
from engine.training.evaluate import HIGHER_IS_BETTER, point_metrics, watched_metric
from engine.training.examples import Examples, aligned_empty
from engine.training.exchange import (
    BAD,
    LOSS,
    ROWS,
    STATS_FLOATS,
    STOP,
    STREAM,
    WEIGHT,
    Alone,
    Exchange,
    add_up,
    all_reduce,
    owned,
    slots,
)
from engine.training.flat import AdamW, FlatWeights, learning_rate, scale_and_clip
from engine.training.interrupt import StopFlag
from engine.training.losses import check_targets, class_weights, target_scale, to_scores
from engine.training.model import Network, architecture, build_model
from engine.training.order import RowOrder
from engine.training.predict import TILE_ROWS, predict_logits
from engine.training.shards import Batches, ShardTask, ShardWorkspace
from engine.training.sizes import sizes_of
from engine.training.threads import Team, compute_threads
from engine.training.warm import go_on_from

NAMED_ROWS = 20  # rows named when a loss is bad
REDUCTIONS = {"exact": add_up, "ddp": all_reduce}
STREAM_FACTOR = 0x9E3779B97F4A7C15


@dataclass
class FitResult:
    """A trained model with its best weights, and what was measured on the way."""

    model: Network
    metrics: dict[str, float]
    best_epoch: int
    steps: int
    history: list[dict[str, Any]]
    precision: str
    first_step: float = 0.0  # when the first step was done, seconds since 1970


@dataclass
class State:
    """What a resumed run must know beside tensors; all of it JSON."""

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
    history: list[dict[str, Any]] = field(default_factory=list)
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
    outputs: int,
    dataset_digest: str,
    precision: str,
    exchange: Exchange | None = None,
    local_workers: int = 1,
) -> FitResult:
    """Train a model on `train`, watch `valid`, and return it with the weights of the best epoch (the last without
    `valid`).

    Continues from the newest whole checkpoint in the run's directory, if there is one. `outputs` is 1, or the number of
    classes. Several workers call it together, each with its `exchange`; `local_workers` of them share a machine. Raises
    UserError for targets that the loss cannot take, for a loss that is not finite under train.on_bad_loss=stop, and for
    a checkpoint of another plan.
    """
    if config.train.device == "cuda":
        raise UserError("train.device must be auto or cpu in this loop: fit_on_device trains on GPUs, found 'cuda'")
    check_targets(train.target, train.rows, config.train.loss, outputs)
    _check_memory(train, config)
    with Team(_threads(config, local_workers)) as team, StopFlag(run.directory) as stop:
        trainer = Trainer(train, valid, config, run, exchange or Alone(), team, stop, precision)
        trainer.prepare(cardinalities, outputs, dataset_digest)
        return trainer.run_epochs()


def _threads(config: Config, local_workers: int) -> int:
    """Workers of one machine share its cores, unless the config says how many threads each has."""
    if local_workers == 1 or config.cluster.threads or config.resources.threads:
        return compute_threads(config)
    return max(1, environment.cores() // local_workers)


def _check_memory(train: Examples, config: Config) -> None:
    if config.train.order == "full" and train.nbytes > environment.memory_bytes():
        raise UserError(
            f"train.order=full reads rows all over the training block, which must fit in memory "
            f"({environment.memory_bytes():,} bytes), found {train.nbytes:,}. Use train.order=windowed"
        )


class Trainer:
    """One fit in one worker: buffers, state, and the steps over them."""

    def __init__(
        self,
        train: Examples,
        valid: Examples | None,
        config: Config,
        run: Run,
        exchange: Exchange,
        team: Team,
        stop: StopFlag,
        precision: str,
    ) -> None:
        self.train, self.valid, self.config, self.run_record = train, valid, config, run
        self.exchange, self.team, self.stop, self.precision = exchange, team, stop, precision
        self.metric = watched_metric(config.train.loss, config.train.metric)
        self.sizes = sizes_of(config.train, len(train))
        self.state, self.clock = State(), Clock()
        self.earlier: dict[str, float] = {}  # what the attempts before this one spent, up to the checkpoint
        self.began = time.perf_counter()
        self.checkpoints = run.directory / "checkpoints"
        self.resumed_from: int | None = None
        self.stop_now = False
        self.saved_step = -1

    # ------------------------------------------------------------------------------------------------- set-up

    def prepare(self, cardinalities: Sequence[int], outputs: int, dataset_digest: str) -> None:
        """Build the model, the order and the buffers; load the newest checkpoint."""
        settings = self.config.train
        self.model = build_model(self.config.model, self.train.numeric.shape[1], cardinalities, outputs, settings.seed)
        self.model.target_center, self.model.target_scale = target_scale(self.train.target, settings.loss)
        go_on_from(self.model, self.config)
        self.flat = FlatWeights(self.model, self.precision)
        self.optimizer = AdamW(self.flat.size, settings.weight_decay)
        self.best_weights: Tensor | None = None
        self.dataset_digest = dataset_digest
        self.batches = Batches.plan(len(self.train), settings)
        self.total_steps = self.batches.steps * self.sizes.epochs
        order = RowOrder.of(self.train.target, settings, dataset_digest)
        self.task = ShardTask(
            self.model,
            self.train,
            order,
            self.batches,
            settings,
            class_weights(self.train.target, self.config.train, outputs),
            self.model.target_center,
            self.model.target_scale,
        )
        self.shards = owned(settings.shards, self.exchange.rank, self.exchange.world)
        width = self.flat.size + STATS_FLOATS
        self.rows = torch.from_numpy(
            aligned_empty((slots(settings.shards, self.exchange.world), width), np.float32)
        ).zero_()
        self.spaces = [
            ShardWorkspace(self.model, self.flat, self.train, self.batches.shard_rows, self.rows[place])
            for place in range(len(self.shards))
        ]
        self._resume()
        self._link("order", order.digest(self.train.rows, settings.seed))

    def _link(self, name: str, value: str) -> None:
        self.state.links[name] = value
        self.run_record.link(name, value)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        return {
            "plan": self.run_record.record["plan"],
            "dataset": self.dataset_digest,
            "seeds": {"train": self.config.train.seed},
            "precision": self.precision,
            "architecture": architecture(self.model),
        }

    def _resume(self) -> None:
        found, passed_over = newest_whole(self.checkpoints) if self.exchange.rank == 0 else (None, [])
        for reason in passed_over:
            self.run_record.warn(reason)
        step = int(self.exchange.first([found.step if found else -1])[0])
        if step < 0:
            if passed_over:
                self.run_record.warn("no checkpoint is whole: training starts at step 0")
            return
        self._restore(found or load_checkpoint(self.checkpoints / f"step-{step:010d}"))
        self.run_record.log(f"resumed from step {step} of {self.total_steps}")

    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, value in self._identity().items():
            if checkpoint.manifest.get(name) != value:
                raise UserError(
                    f"a run must continue a checkpoint of its own: {checkpoint.folder} has another {name} "
                    f"({checkpoint.manifest.get(name)} instead of {value}). Start anew with train.resume=never"
                )
        tensors = checkpoint.tensors
        self.flat.values.copy_(tensors["weights"])
        self.flat.refresh()
        self.optimizer.exp_avg.copy_(tensors["exp_avg"])
        self.optimizer.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        self.optimizer.count.copy_(tensors["count"])
        self.best_weights = tensors.get("best_weights")
        self.state = State(**checkpoint.manifest["state"])
        self.earlier = checkpoint.manifest.get("spent", {})
        self.resumed_from = self.saved_step = self.state.step
        for name, value in self.state.links.items():
            self.run_record.link(name, value)

    # ------------------------------------------------------------------------------------------------- running

    def run_epochs(self) -> FitResult:
        """All steps that are left."""
        self.began = time.perf_counter()
        total = len(self.train) * self.sizes.epochs
        done = self._rows_before(self.state.step)
        with self.run_record.progress("train", total, "rows", done) as progress:
            while not self.state.finished:
                self._step(progress)
                if self.state.step % self.batches.steps == 0:
                    self._end_epoch(progress)
                elif self.config.train.checkpoint_every and self.state.step % self.config.train.checkpoint_every == 0:
                    self._save()
                if self.stop_now:
                    self._save()
                    self.stop.clear()
                    raise KeyboardInterrupt(f"stopped at step {self.state.step} of {self.total_steps}; resume to go on")
        return self._result(time.perf_counter() - self.began)

    def _rows_before(self, step: int) -> int:
        epochs, inner = divmod(step, self.batches.steps)
        return epochs * self.batches.n + min(inner * self.batches.batch, self.batches.n)

    def _step(self, progress: Progress) -> None:
        settings, state, step = self.config.train, self.state, self.state.step
        began = time.perf_counter()
        self.team.run(lambda place: self.task.run(self.spaces[place], step, self.shards[place]), len(self.spaces))
        shards_done = time.perf_counter()
        self.rows[0, -STATS_FLOATS:].numpy().view(np.float64)[STOP] = float(self.stop.requested())
        gradient, sums = REDUCTIONS[settings.reduction](self.rows, settings.shards, self.exchange, self.team)
        added = time.perf_counter()
        rate = learning_rate(step, self.total_steps, settings.lr, settings.warmup)
        scale = self.batches.batch / sums[WEIGHT] if sums[WEIGHT] > 0 else 0.0
        norm = scale_and_clip(gradient, scale, settings.clip)
        loss = float(sums[LOSS] / sums[WEIGHT]) if sums[WEIGHT] > 0 else 0.0
        if sums[BAD] or not math.isfinite(norm):
            self._bad_step(step)
        elif sums[WEIGHT] > 0:
            self.optimizer.step(self.flat.values, gradient, rate)
            self.flat.refresh()
            state.loss_sum += float(sums[LOSS])
            state.weight_sum += float(sums[WEIGHT])
        self._count(sums, loss)
        waited = self._time(began, shards_done, added, int(sums[ROWS]))
        self.stop_now = sums[STOP] > 0
        progress.advance(int(sums[ROWS]), f"epoch {step // self.batches.steps + 1}, loss {loss:.4f}")
        if state.step % settings.log_every == 0 or state.step == 1:
            values = {"train/loss": loss, "train/lr": rate, "train/gradient_norm": norm}
            values |= {"train/step_seconds": time.perf_counter() - began, "train/step_input_seconds": waited}
            self.run_record.log_metrics(state.step, {**values, "train/rows_per_second": progress.rate})

    def _count(self, sums: np.ndarray, loss: float) -> None:
        state = self.state
        state.step += 1
        state.rows_seen += int(sums[ROWS])
        seen = int(sums[STREAM : STREAM + 1].view(np.uint64)[0])
        state.stream = (state.stream * STREAM_FACTOR + seen) % 2**64
        if 10 ** round(math.log10(state.step)) == state.step:
            self._link(f"loss@{state.step}", digest.of_bytes(np.array([loss], "<f8")))

    def _time(self, began: float, shards_done: float, added: float, rows: int) -> float:
        """Attribute a step's time; seconds that a thread waited for input."""
        waited = sum(space.input_seconds for space in self.spaces) / max(min(self.team.threads, len(self.spaces)), 1)
        for space in self.spaces:
            space.input_seconds = 0.0
        now = time.perf_counter()
        if not self.clock.steps:
            self.clock.first_step = time.time()
        self.clock.input += waited
        self.clock.compute += shards_done - began - waited + now - added
        self.clock.communication += added - shards_done
        self.clock.trained_rows += rows
        self.clock.steps += 1
        return waited

    def _bad_step(self, step: int) -> None:
        """Every worker comes here together: all skip or all stop."""
        mine = np.concatenate([space.bad_rows for space in self.spaces] or [np.empty(0, np.int64)])[:NAMED_ROWS]
        padded = np.full(NAMED_ROWS, -1, np.int64)
        padded[: len(mine)] = mine
        by_rank = self.exchange.gather(torch.from_numpy(padded)[None])[:, 0].tolist()
        named = {rank: [row for row in rows if row >= 0] for rank, rows in enumerate(by_rank)}
        where = "; ".join(f"rank {rank}: dataset rows {rows}" for rank, rows in named.items() if rows)
        message = f"the loss at step {step} is not finite ({where or 'its gradient overflows'})"
        if self.config.train.on_bad_loss == "stop":
            raise UserError(
                f"{message}. Look at these rows, lower train.lr, or set train.on_bad_loss=skip to go on "
                "without the batch"
            )
        self.state.skipped += 1
        self.run_record.warn(f"{message}; the step is skipped on all workers")

    # ------------------------------------------------------------------------------------------------- epochs

    def _end_epoch(self, progress: Progress) -> None:
        state = self.state
        epoch = state.step // self.batches.steps - 1
        if not state.weight_sum:
            raise UserError(
                f"no step of epoch {epoch + 1} could be used: the loss of every batch was not finite, or all weights are "
                "zero. Look at the rows named in run.log, and lower train.lr"
            )
        began = time.perf_counter()
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": state.step,
            "train_loss": state.loss_sum / state.weight_sum,
            "rows": state.rows_seen,
            "row_stream": f"{state.stream:016x}",
        }
        state.loss_sum = state.weight_sum = 0.0
        state.rows_seen = state.stream = 0
        measured = self._validate()
        self.clock.evaluate += time.perf_counter() - began
        entry |= {f"valid_{name}": value if math.isfinite(value) else None for name, value in measured.items()}
        state.history.append(entry)
        self._judge(epoch, measured)
        state.finished = state.step >= self.total_steps or bool(
            self.sizes.patience and self.valid is not None and state.stale_epochs >= self.sizes.patience
        )
        logged = {
            "train/epoch_loss": entry["train_loss"],
            **{f"valid/{name}": value for name, value in measured.items()},
        }
        # Before the checkpoint: after a kill between the two the line is written again, not lost.
        self.run_record.log_metrics(state.step, logged)
        self._save()
        progress.advance(0, f"epoch {epoch + 1} of {self.sizes.epochs}, " + _described(entry))

    def _validate(self) -> dict[str, float]:
        """Metrics of the validation rows, each scored once by one worker; the figures of rank 0 hold for all."""
        if self.valid is None or not len(self.valid):
            return {}
        scores = self._scores(self.valid)
        settings = self.config.train
        measured = point_metrics(
            self.valid.target, scores, settings.loss, ece_bins=self.config.evaluate.ece_bins, quantile=settings.quantile
        )
        return dict(zip(measured, self.exchange.first(list(measured.values())), strict=True))

    def _scores(self, data: Examples) -> np.ndarray:
        world = self.exchange.world
        tiles = -(-len(data) // TILE_ROWS)
        each = -(-tiles // world) * TILE_ROWS
        start = min(self.exchange.rank * each, len(data))
        stop = min(start + each, len(data))
        part = np.zeros((each, self.model.outputs), np.float32)
        part[: stop - start] = predict_logits(
            self.model, data.numeric[start:stop], data.codes[start:stop], self.precision, team=self.team
        )
        gathered = self.exchange.gather(torch.from_numpy(part)).reshape(world * each, -1)[: len(data)]
        return to_scores(self.config.train.loss, gathered.numpy())

    def _judge(self, epoch: int, measured: dict[str, float]) -> None:
        """Keep the best weights; without validation rows every epoch is the best so far."""
        state = self.state
        value = measured.get(self.metric)
        if value is not None and not math.isfinite(value):
            value = self._instead(measured)
        better = (
            value is None
            or state.best_metric is None
            or (value > state.best_metric if HIGHER_IS_BETTER[self.metric] else value < state.best_metric)
        )
        if better:
            state.best_metric, state.best_epoch, state.stale_epochs = value, epoch, 0
            self.best_weights = self.flat.values.clone()
        else:
            state.stale_epochs += 1

    def _instead(self, measured: dict[str, float]) -> float | None:
        """The log loss stands in for a ranking metric that cannot be computed; higher stays better."""
        stand_in = measured.get("log_loss", float("nan"))
        if not self.state.best_epoch + 1:
            self.run_record.warn(
                f"{self.metric} of the validation rows cannot be computed: log loss is watched instead"
            )
        sign = -1.0 if HIGHER_IS_BETTER[self.metric] else 1.0
        return sign * stand_in if math.isfinite(stand_in) else None

    # ------------------------------------------------------------------------------------------------- closing

    def _save(self) -> None:
        if self.exchange.rank or self.state.step == self.saved_step:
            return
        began = time.perf_counter()
        tensors = {
            "weights": self.flat.values,
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
            "count": self.optimizer.count,
        }
        if self.best_weights is not None:
            tensors["best_weights"] = self.best_weights
        facts = {
            **self._identity(),
            "state": asdict(self.state),
            "spent": self._spent(began - self.began),
            "scheduler": {
                "total_steps": self.total_steps,
                "warmup": self.config.train.warmup,
                "peak": self.config.train.lr,
            },
            "order": {"rule": self.config.train.order, "steps_per_epoch": self.batches.steps},
        }
        save_checkpoint(self.checkpoints, self.state.step, tensors, facts, self.config.train.keep_checkpoints)
        self.saved_step = self.state.step
        self.clock.checkpoint += time.perf_counter() - began

    def _spent(self, seconds: float) -> dict[str, float]:
        """The clock of all attempts together; `seconds` is the time since this one began.

        Steps that a kill made undone, and the checkpoint that is being written, are left out.
        """
        spent = asdict(self.clock) | {"total": seconds}
        return {name: self.earlier.get(name, 0) + value for name, value in spent.items() if name != "first_step"}

    def _peak_memory(self) -> float:
        """Bytes of the largest worker so far; mapped files that were touched count."""
        mine = torch.tensor([[resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0]], dtype=torch.float64)
        return float(self.exchange.gather(mine).max())

    def _result(self, seconds: float) -> FitResult:
        if self.best_weights is not None:
            self.flat.values.copy_(self.best_weights)
            self.flat.refresh()
        spent = self._spent(seconds)
        working = spent["input"] + spent["compute"] + spent["communication"]
        metrics = {
            "train/loss": self.state.history[-1]["train_loss"],
            "train/seconds": spent["total"],
            "train/steps": float(self.state.step),
            "train/epochs": float(len(self.state.history)),
            "train/best_epoch": float(self.state.best_epoch),
            "train/steps_skipped": float(self.state.skipped),
            "train/rows_per_second": spent["trained_rows"] / working if working else 0.0,
            "train/steps_per_second": spent["steps"] / working if working else 0.0,
            **{
                f"train/{part}_seconds": spent[part]
                for part in ("input", "compute", "communication", "checkpoint", "evaluate")
            },
            "train/parameters": float(sum(parameter.numel() for parameter in self.model.parameters())),
            "train/peak_memory_bytes": self._peak_memory(),
        }
        if self.resumed_from is not None:
            metrics["resumed_from_step"] = float(self.resumed_from)
        state = self.state
        return FitResult(
            self.model, metrics, state.best_epoch, state.step, state.history, self.precision, self.clock.first_step
        )


def _described(entry: dict[str, Any]) -> str:
    known = {name.removeprefix("valid_"): value for name, value in entry.items() if name.startswith("valid_")}
    parts = [f"{name} {value:.4f}" for name, value in known.items() if value is not None]
    return ", ".join(parts[:2]) or "no validation rows"
