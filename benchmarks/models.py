"""What does training with equal bytes cost, against a plain loop of torch over the same module?

Seconds of the processor for a step, ours and theirs in turn: gathered shards on threads, hashed dropout and sums in a fixed
order, against whole batches on torch's own threads, with torch's dropout, clipping and fused AdamW. The same module, batch,
threads and precision. `ratio` is their seconds over ours.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import Row, Settings, show
from engine.config import plugins, schema
from engine.config.plugins import Plugin
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training import kinds
from engine.training.cpu_stepper import CpuStepper
from engine.training.examples import Examples
from engine.training.exchange import Alone
from engine.training.interrupt import StopFlag
from engine.training.model import Network, build_model
from engine.training.objectives import objectives_of
from engine.training.order import RowOrder
from engine.training.precision import fast_bf16
from engine.training.probe import probe
from engine.training.schedule import Schedule
from engine.training.sizes import settle
from engine.training.stepper import TrainingJob
from engine.training.threads import Team

JSON = Path(__file__).parent / "results/models.json"
MODULES = Plugin("modules.py", Path(__file__).with_name("_modules.py").read_bytes())
ROWS, NUMBERS, CARDINALITIES = 32_768, 16, [12, 30]
TURNS, STEPS = 9, 4
NO_DROPOUT = {"dropout": 0.0}
PLE = {"embeddings": "ple"}
TABM = {"kind": "tabm", "hidden": (256, 256), "members": 16, **PLE}
# work -> (keys of model, batch, ratio that must be reached)
WORKS: dict[str, tuple[dict[str, Any], int, float | None]] = {
    "mlp": ({}, 4096, 1 / 1.05),
    "mlp_no_dropout": (NO_DROPOUT, 4096, 1 / 1.15),
    "ple": (PLE, 4096, None),
    "tabm": (TABM, 1024, 1.0),
    "fttransformer": ({"kind": "FtTransformer"}, 512, 1 / 1.05),
    "transformer": ({"kind": "Transformer"}, 1024, 1 / 1.05),
    "lstm": ({"kind": "Lstm"}, 1024, None),
}


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    plugins.add([MODULES])
    return [measured(work, settings) for work in WORKS if settings.wanted(work)]


def measured(work: str, settings: Settings) -> Row:
    """One row; both loops warm up with a step."""
    keys, batch, must = WORKS[work]
    data, precision = problem(settings.rows(ROWS)), "bf16" if fast_bf16() else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), keys, batch, settings.threads)
        run = Run.create("train", config, schema.plain(config))
        with Team(settings.threads) as team, StopFlag(run.directory) as stop:
            config = settle(config, run, len(data), functools.partial(model_of, config, data))
            model = model_of(config, data)
            theirs = PlainLoop(model, data, config, precision)
            schedule = Schedule.of(len(data), config.train)
            objectives = objectives_of(config.train, data, [model.outputs], model.targets)
            if model.kind not in kinds.BUILT_IN:
                model.traits = probe(model, data, schedule, objectives, precision, run.warn)
            order = RowOrder.of(data, config.train)
            job = TrainingJob(
                config=config, run=run, train=data, model=model, order=order, schedule=schedule, objectives=objectives,
                dataset_digest="benchmark", precision=precision, exchange=Alone(), team=team, stop=stop,
            )  # fmt: skip
            seconds = in_turn(CpuStepper(job).run, theirs.run)
        run.finish({})
    ours, plain = (statistics.median(item) for item in seconds)
    turns = [b / a for a, b in zip(*seconds, strict=True)]
    note = f"{precision}, batch {batch}; ratios of {TURNS} turns {min(turns):.2f} to {max(turns):.2f}"
    rows, unit = batch * STEPS * TURNS, "rows/CPU s"
    row = Row(
        "models", work, rows, batch * STEPS / ours, "plain_loop", plain / ours, None, unit, batch * STEPS / plain, must
    )
    row = Row(**{**row.__dict__, "note": note, "runs": TURNS})
    show(row)
    return row


def in_turn(ours: Callable[[int], Any], theirs: Callable[[int], Any]) -> tuple[list[float], list[float]]:
    """Seconds of the processor, all threads together, of STEPS steps each, TURNS times after one step to warm up."""
    found: tuple[list[float], list[float]] = ([], [])
    for loop in (ours, theirs):
        loop(0)
    step = 1
    for _ in range(TURNS):
        for loop, times in zip((ours, theirs), found, strict=True):
            began = time.process_time()
            for k in range(STEPS):
                loop(step + k)
            times.append(time.process_time() - began)
        step += STEPS
    return found


def problem(rows: int) -> Examples:
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(rows, NUMBERS)).astype(np.float32)
    codes = np.stack([rng.integers(0, size, rows) for size in CARDINALITIES], 1).astype(np.int32)
    target = (numeric[:, 0] + rng.normal(size=rows) > 0).astype(np.float32)
    return Examples(numeric, codes, target, np.arange(rows))


def config_of(folder: Path, keys: dict[str, Any], batch: int, threads: int) -> Config:
    model = {**keys}
    if "kind" in model and model["kind"] not in kinds.BUILT_IN:
        model["kind"] += f"@{MODULES.digest}"
    values = {
        "name": "benchmark",
        "paths": {"runs": str(folder)},
        "model": model,
        "train": {"epochs": 10, "batch_size": batch, "log_every": 200, "audit_every": 0},
        "cluster": {"threads": threads},
    }
    return schema.build(Config, values)


def model_of(config: Config, data: Examples) -> Network:
    settings = kinds.settings_of(config.model)
    fitted = kinds.fit_arrays(config.model.kind, settings, data.numeric, data.codes, data.target)
    return build_model(config.model, NUMBERS, CARDINALITIES, 1, 0, fitted)


class PlainLoop:
    """What one writes by hand."""

    def __init__(self, model: Network, data: Examples, config: Config, precision: str) -> None:
        self.module = model.build().train()
        self.numeric, self.codes, self.target = (
            torch.from_numpy(item) for item in (data.numeric, data.codes, data.target)
        )
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True
        )
        self.batch, self.clip, self.low = int(train.batch_size), train.clip, precision == "bf16"
        self.order, self.threads = torch.randperm(len(data)), config.cluster.threads or 1

    def run(self, step: int) -> None:
        torch.set_num_threads(self.threads)  # ours computes on threads of its own, each with one of torch's
        try:
            self._step(step)
        finally:
            torch.set_num_threads(1)

    def _step(self, step: int) -> None:
        index = self.order[torch.arange(step * self.batch, (step + 1) * self.batch) % len(self.order)]
        numeric, codes, target = self.numeric[index], self.codes[index], self.target[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            logits = self.module(numeric, codes)[..., 0].float()
        target = target if logits.dim() == 1 else target[:, None].expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
