"""The training loop on a GPU: the same order, masks, checkpoints, epochs and early stopping as the CPU loop, other arithmetic.

Steps are launched in chunks without waiting (`device_step`); the loss of each is read once a chunk. Promised: the same rows at
the same steps as on the CPU (`row_stream` of an epoch is equal), the same masks, a resume that goes on where it stopped, and
losses equal within rounding. Not promised: the CPU's bits, or the same bits for another number of GPUs.

`device="cpu"` runs the same step eagerly: that is how the suite tests it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import digest
from engine.runtime.progress import Progress
from engine.runtime.run import Run
from engine.training.device import Placement, describe_device, prepare_backend
from engine.training.device_step import (
    BAD,
    LOSS,
    NAMED,
    NORM,
    WEIGHT,
    Chunk,
    DeviceStep,
    Plan,
    Resident,
    Rows,
    SideLane,
    Source,
    Streamed,
    make_runner,
    prepare_chunk,
    run_chunk,
)
from engine.training.examples import Examples
from engine.training.exchange import Alone, Exchange
from engine.training.flat import AdamW, FlatWeights, learning_rate
from engine.training.interrupt import StopFlag
from engine.training.loop import STREAM_FACTOR, FitResult, Trainer, _threads
from engine.training.losses import check_targets, class_weights, target_scale, to_scores
from engine.training.model import build_model
from engine.training.order import RowOrder
from engine.training.predict import DEVICE_TILE_ROWS
from engine.training.shards import Batches
from engine.training.threads import Team
from engine.training.warm import go_on_from
from kernels import cuda as twins

CHUNK_ROWS = 1 << 23  # positions of one chunk: 64 MB

Runner = Callable[[int], None]


def fit_on_device(  # noqa: PLR0913
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
    device: str = "cuda",
    runner: str | Callable[[DeviceStep], Runner] = "graph",
    resident: bool | None = None,
) -> FitResult:
    """`engine.training.loop.fit` on a device; the model comes back on the CPU.

    `runner` is graph, compile or eager (see device_step), or a function that makes one; `resident` overrides the memory rule.
    Raises UserError as `fit` does.
    """
    check_targets(train.target, train.rows, config.train.loss, outputs)
    prepare_backend()
    with Team(_threads(config, local_workers)) as team, StopFlag(run.directory) as stop:
        trainer = DeviceTrainer(train, valid, config, run, exchange or Alone(), team, stop, precision)
        trainer.device, trainer.wanted_runner, trainer.wanted_resident = torch.device(device), runner, resident
        trainer.prepare(cardinalities, outputs, dataset_digest)
        return trainer.run_epochs()


class DeviceTrainer(Trainer):
    """A Trainer whose steps run on a device, a chunk at a time."""

    device: torch.device
    wanted_runner: str | Callable[[DeviceStep], Runner] = "graph"
    wanted_resident: bool | None = None

    # ------------------------------------------------------------------------------------------------- set-up

    def prepare(self, cardinalities: Sequence[int], outputs: int, dataset_digest: str) -> None:
        """Build the model, the order and the tables; load the newest checkpoint."""
        settings = self.config.train
        self.model = build_model(self.config.model, self.train.numeric.shape[1], cardinalities, outputs, settings.seed)
        self.model.target_center, self.model.target_scale = target_scale(self.train.target, settings.loss)
        go_on_from(self.model, self.config)
        with self.device:  # what is made here lies there
            self.flat = FlatWeights(self.model, self.precision)
            self.optimizer = AdamW(self.flat.size, settings.weight_decay)
        self.best_weights: Tensor | None = None
        self.dataset_digest = dataset_digest
        self.batches = Batches.plan(len(self.train), settings)
        self.total_steps = self.batches.steps * self.sizes.epochs
        self.order = RowOrder.of(self.train.target, settings, dataset_digest)
        self._staged: tuple[int, Chunk] | None = None
        self.lane = SideLane(self.device)
        self._make_step(outputs)
        self._resume()
        self._link("order", self.order.digest(self.train.rows, settings.seed))

    def _make_step(self, outputs: int) -> None:
        settings, batches, exchange = self.config.train, self.batches, self.exchange
        chunk = max(1, min(settings.log_every, CHUNK_ROWS // batches.batch, batches.steps))
        self.plan = Plan(batches.n, batches.batch, batches.steps, chunk, settings, exchange.rank, exchange.world)
        weights = class_weights(self.train.target, settings, outputs)
        rows = Rows.of(self.train, weights, self.model.target_center, self.model.target_scale)
        placement = Placement.choose(rows.nbytes, self.device)
        low = any(self.flat.low) and not self.model.cardinalities
        kind = torch.bfloat16 if low else torch.float32
        resident = placement.resident if self.wanted_resident is None else self.wanted_resident
        source: Source = (
            Resident(rows, self.plan, self.device, kind)
            if resident
            else Streamed(rows, self.plan, self.device, kind, self.team.threads)
        )
        self.step = DeviceStep(
            self.model,
            self.flat,
            self.optimizer,
            source,
            self.plan,
            reduce=self._sum_over_workers if exchange.world > 1 else None,
        )
        if callable(self.wanted_runner):
            self.runner: Runner = self.wanted_runner(self.step)
            name, reason = "given", ""
        else:
            found, reason = make_runner(self.step, self.wanted_runner)
            self.runner, name = found, found.name
        if reason:
            self.run_record.warn(f"the step could not be captured in a CUDA graph and runs eagerly ({reason})")
        self._record(placement, resident, name)

    def _sum_over_workers(self, gradient: Tensor) -> None:
        """One collective for the whole gradient and the sums behind it: NCCL between GPUs."""
        total = self.exchange.sum(gradient)
        if total is not gradient:
            gradient.copy_(total)

    def _record(self, placement: Placement, resident: bool, runner: str) -> None:
        if self.exchange.rank:
            return
        facts = describe_device(self.device.type)
        facts |= {
            "runner": runner,
            "rows": "resident" if resident else "streamed",
            "fused_masks": self.step.fused_masks,
        }
        self.run_record.note(device_facts=facts)
        self.run_record.log(f"training on {facts['name']} ({runner}); {placement.described()}")
        if self.device.type == "cuda" and twins.fault():
            self.run_record.log(f"order and masks are computed by torch, not by kernels of their own ({twins.fault()})")

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "device": self.device.type}

    # ------------------------------------------------------------------------------------------------- steps

    def _chunk_end(self, step: int) -> int:
        """The next step after which something is read, saved or ended."""
        settings, steps = self.config.train, self.batches.steps
        ends = [step + self.plan.chunk, (step // steps + 1) * steps]
        for every in (settings.log_every, settings.checkpoint_every):
            if every:
                ends.append((step // every + 1) * every)
        return min(ends)

    def _prepare(self, step: int) -> Chunk:
        if self._staged is not None and self._staged[0] == step:
            return self._staged[1]
        end = self._chunk_end(step)
        settings = self.config.train
        rates = [learning_rate(at, self.total_steps, settings.lr, settings.warmup) for at in range(step, end)]
        layers = len(self.model.mask_widths)
        with self.lane:
            return prepare_chunk(self.plan, self.order, step, end - step, rates, layers, self.device)

    def _step(self, progress: Progress) -> None:
        """Run one chunk and read its losses; the next chunk is prepared while this one computes."""
        first, began = self.state.step, time.perf_counter()
        chunk = self._prepare(first)
        prepared = time.perf_counter()
        self.lane.hand_over(chunk)
        run_chunk(self.step, self.runner, chunk)
        following = first + chunk.steps
        self._staged = (following, self._prepare(following)) if following < self.total_steps else None
        records = self.step.records[: chunk.steps].cpu().numpy()
        seen = self._seen(chunk.steps)
        done = time.perf_counter()
        for place, record in enumerate(records):
            self._take(first + place, record, int(seen[place]))
        rows = self._rows_before(self.state.step) - self._rows_before(first)
        self._tell(progress, records[-1], rows, chunk.steps, done - began)
        if not self.clock.steps:
            self.clock.first_step = time.time()
        self.clock.input += prepared - began
        self.clock.compute += done - prepared
        self.clock.trained_rows += rows
        self.clock.steps += chunk.steps
        asked = self.exchange.gather(torch.tensor([[float(self.stop.requested())]]))
        self.stop_now = bool(asked.sum() > 0)

    def _seen(self, steps: int) -> NDArray[np.int64]:
        mine = self.step.seen[:steps].cpu()
        return self.exchange.gather(mine[None]).sum(dim=(0, 1)).numpy()

    def _take(self, step: int, record: NDArray[np.float64], seen: int) -> None:
        """Put one step's figures into the state, as the CPU loop does after each."""
        state = self.state
        weight, bad = record[WEIGHT], record[BAD] > 0 or not math.isfinite(record[NORM])
        loss = float(record[LOSS] / weight) if weight > 0 else 0.0
        if bad:
            self._bad_record(step, record)
        elif weight > 0:
            state.loss_sum += float(record[LOSS])
            state.weight_sum += float(weight)
        state.step += 1
        state.rows_seen += self._rows_before(step + 1) - self._rows_before(step)
        state.stream = (state.stream * STREAM_FACTOR + seen % 2**64) % 2**64
        if 10 ** round(math.log10(state.step)) == state.step:
            self._link(f"loss@{state.step}", digest.of_bytes(np.array([loss], "<f8")))
        if state.step == 1:
            self.run_record.log_metrics(1, {"train/loss": loss, "train/gradient_norm": float(record[NORM])})

    def _bad_record(self, step: int, record: NDArray[np.float64]) -> None:
        named = self.exchange.gather(torch.tensor([[record[NAMED]]], dtype=torch.float64))[:, 0, 0].tolist()
        where = "; ".join(f"rank {rank}: dataset row {row:.0f}" for rank, row in enumerate(named) if row >= 0)
        more = f" and {record[BAD] - 1:.0f} more" if record[BAD] > 1 else ""
        message = f"the loss at step {step} is not finite ({where + more if where else 'its gradient overflows'})"
        if self.config.train.on_bad_loss == "stop":
            raise UserError(
                f"{message}. Look at these rows, lower train.lr, or set train.on_bad_loss=skip to go on "
                "without the batch"
            )
        self.state.skipped += 1
        self.run_record.warn(f"{message}; the step is skipped on all workers")

    def _tell(self, progress: Progress, last: NDArray[np.float64], rows: int, steps: int, seconds: float) -> None:
        state, settings = self.state, self.config.train
        loss = float(last[LOSS] / last[WEIGHT]) if last[WEIGHT] > 0 else 0.0
        progress.advance(rows, f"epoch {(state.step - 1) // self.batches.steps + 1}, loss {loss:.4f}")
        if state.step % settings.log_every == 0:
            rate = learning_rate(state.step - 1, self.total_steps, settings.lr, settings.warmup)
            values = {"train/loss": loss, "train/lr": rate, "train/gradient_norm": float(last[NORM])}
            values |= {"train/step_seconds": seconds / steps, "train/rows_per_second": progress.rate}
            self.run_record.log_metrics(state.step, values)

    # ------------------------------------------------------------------------------------------------- epochs

    def _scores(self, data: Examples) -> np.ndarray:
        world = self.exchange.world
        each = -(-len(data) // world)
        start = min(self.exchange.rank * each, len(data))
        stop = min(start + each, len(data))
        part = np.zeros((each, self.model.outputs), np.float32)
        part[: stop - start] = device_logits(
            self.model, self.flat.tensors(), data.numeric[start:stop], data.codes[start:stop], self.device
        )
        gathered = self.exchange.gather(torch.from_numpy(part)).reshape(world * each, -1)[: len(data)]
        return to_scores(self.config.train.loss, gathered.numpy())

    def _result(self, seconds: float) -> FitResult:
        result = super()._result(seconds)
        if self.device.type == "cuda":
            result.metrics["train/device_memory_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
        for parameter in self.model.parameters():
            parameter.data = parameter.detach().cpu().clone()
        return result


def device_logits(
    model: Any,
    weights: Sequence[Tensor],
    numeric: NDArray[np.float32],
    codes: NDArray[np.int32],
    device: torch.device,
    tile_rows: int = DEVICE_TILE_ROWS,
) -> NDArray[np.float32]:
    """`predict_logits` with weights that lie on a device: tiles of one shape, one copy back at the end."""
    tile_rows = min(tile_rows, max(len(numeric), 1))
    out = torch.empty((-(-len(numeric) // tile_rows) * tile_rows, model.outputs), device=device)
    block = torch.zeros((tile_rows, numeric.shape[1]), device=device)
    keys = torch.zeros((tile_rows, codes.shape[1]), dtype=torch.int32, device=device)
    with torch.inference_mode():
        for start in range(0, len(numeric), tile_rows):
            count = min(tile_rows, len(numeric) - start)
            for buffer, source in ((block, numeric), (keys, codes)):
                buffer[:count].copy_(torch.from_numpy(source[start : start + count]))
                buffer[count:] = 0
            out[start : start + tile_rows] = model.apply_weights(weights, block, keys, None).float()
    logits = out[: len(numeric)].cpu().numpy()
    scale, center = np.float32(model.target_scale), np.float32(model.target_center)
    plain = float(scale) == 1.0 and float(center) == 0.0
    return logits if plain else np.asarray(logits * scale + center, np.float32)
