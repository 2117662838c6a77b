"""Boosted trees: what do equal bytes cost beside the bare libraries, and how fast are trees scored without them?

Numbers only, two classes, and a tenth as many validation rows, whose ROC AUC both sides compute every round. Seconds are those of
binning and of all rounds: CPU seconds of this process for one machine. Peers:

    train_lightgbm       `lightgbm.train` with its own objective and the same settings
    train_xgboost        `xgboost.train` likewise
    train_xgboost_ray2   Ray Train's XGBoostTrainer on two workers, in turn; of both sides the training function alone, on rows in
                         memory: the median of its seconds by the clock, which waiting for each other is part of
    score_trees          `lightgbm.predict` of the same 500 trees of 64 leaves (`score_trees_120x31`: as early stopping leaves
                         them), raw scores

The ledger of losses is printed with the rows: where our trees are slower to grow, and how far their ROC AUC is from the peer's.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, Settings, compare, show
from engine.config import schema
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training.boosting.fit import fit_trees
from engine.training.boosting.grower import Rows
from engine.training.boosting.on_lightgbm import trees_of
from engine.training.distributed import fit_on_cluster
from engine.training.examples import Examples
from engine.training.loop import FitResult
from kernels.metrics import roc_auc

ROWS, COLUMNS, ROUNDS = 400_000, 100, 50
SCORED = 65_536
BOUND, BOUND_RAY = 1 / 1.15, 1 / 1.25
TREES = {
    "lightgbm": {"leaves": 63, "depth": 0},
    "xgboost": {"leaves": 0, "depth": 6, "l2": 1.0, "min_child": 1.0},
}


def problem(n: int, columns: int = COLUMNS, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    numeric = rng.standard_normal((n, columns), np.float32)
    signal = numeric[:, 0] * numeric[:, 1] + np.sin(2 * numeric[:, 2]) + 0.5 * numeric[:, 3:9].sum(axis=1)
    target = (signal + rng.standard_normal(n) > 0).astype(np.float32)
    return Examples(numeric, np.zeros((n, 0), np.int32), target, np.arange(n))


def make_config(folder: Path, kind: str, threads: int, workers: int = 0) -> Config:
    trees = {"rounds": ROUNDS, "patience": 0, "learning_rate": 0.1, **TREES[kind]}
    values = {
        "name": "benchmark",
        "paths": {"runs": str(folder)},
        "model": {"kind": kind, "trees": trees},
        "cluster": {"threads": threads} | ({"kind": "ray", "workers": workers} if workers else {}),
    }
    return schema.build(Config, values)


KEYS: dict[str, Any] = {"cardinalities": [], "outputs": [1], "dataset_digest": "benchmark", "precision": "fp32"}


def ours(train: Examples, valid: Examples, config: Config, on: Path | None = None) -> FitResult:
    run = Run.create("train", config, schema.plain(config))
    try:
        if on is not None:
            return fit_on_cluster(on / "train", on / "valid", config, run, **KEYS)
        return fit_trees(train, valid, config, run, **KEYS)
    finally:
        run.finish({})


def own_seconds(result: FitResult) -> float:
    return result.metrics["train/seconds"] + result.metrics["train/bins_seconds"]


# --------------------------------------------------------------------------------------------------------- peers


def bare_lightgbm(train: Examples, valid: Examples, threads: int) -> Any:
    import lightgbm

    params = {
        "objective": "binary", "metric": "auc", "num_leaves": 63, "learning_rate": 0.1, "num_threads": threads,
        "verbosity": -1, "force_col_wise": True, "min_sum_hessian_in_leaf": 1e-3,
    }  # fmt: skip
    data = lightgbm.Dataset(train.numeric, train.target)
    judged = lightgbm.Dataset(valid.numeric, valid.target, reference=data)
    return lightgbm.train(params, data, ROUNDS, valid_sets=[judged])


XGBOOST = {"tree_method": "hist", "objective": "binary:logistic", "max_depth": 6, "eta": 0.1, "eval_metric": "auc"}


def bare_xgboost(train: Examples, valid: Examples, threads: int) -> Any:
    import xgboost

    data = xgboost.QuantileDMatrix(train.numeric, train.target, nthread=threads)
    judged = xgboost.QuantileDMatrix(valid.numeric, valid.target, ref=data, nthread=threads)
    params = {**XGBOOST, "nthread": threads}
    return xgboost.train(params, data, ROUNDS, evals=[(judged, "valid")], verbose_eval=False)


def ray_worker(settings: dict[str, Any]) -> None:
    """The training function of Ray's XGBoostTrainer; rank 0 writes its seconds."""
    import ray.train
    import xgboost

    frames = {}
    for name in ("train", "valid"):
        frames[name] = ray.train.get_dataset_shard(name).materialize().to_pandas()
    columns = [f"c{k}" for k in range(settings["columns"])]
    blocks = {name: (frame[columns].to_numpy(np.float32), frame["target"].to_numpy()) for name, frame in frames.items()}
    began = time.perf_counter()
    data = xgboost.QuantileDMatrix(*blocks["train"], nthread=1)
    judged = xgboost.QuantileDMatrix(*blocks["valid"], ref=data, nthread=1)
    xgboost.train({**XGBOOST, "nthread": 1}, data, ROUNDS, evals=[(judged, "valid")], verbose_eval=False)
    seconds = time.perf_counter() - began
    if ray.train.get_context().get_world_rank() == 0:
        Path(settings["out"]).write_text(json.dumps({"seconds": seconds, "rows": len(blocks["train"][0])}))


def ray_xgboost(train: Examples, valid: Examples, folder: Path) -> float:
    """Seconds of the training function on two workers."""
    import pyarrow as pa
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.xgboost import XGBoostTrainer

    tables = {}
    for name, data in (("train", train), ("valid", valid)):
        columns = {f"c{k}": np.ascontiguousarray(data.numeric[:, k]) for k in range(data.numeric.shape[1])}
        tables[name] = pa.table({**columns, "target": data.target})
    ray.init(address="local", num_cpus=6, log_to_driver=False, include_dashboard=False)
    try:
        folder.mkdir()
        out = folder / "recipe.json"
        trainer = XGBoostTrainer(
            ray_worker,
            train_loop_config={"out": str(out), "columns": train.numeric.shape[1]},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(folder / "recipe"), name="recipe"),
            datasets={name: ray.data.from_arrow(table).repartition(4) for name, table in tables.items()},
        )
        trainer.fit()
        return float(json.loads(out.read_text())["seconds"])
    finally:
        ray.shutdown()


# ----------------------------------------------------------------------------------------------------------- run


def run(settings: Settings, copy_bytes_per_second: float) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-boosting-") as name:
        folder = Path(name)
        train, valid = problem(settings.rows(ROWS)), problem(settings.rows(ROWS // 10), seed=1)
        peers: dict[str, Callable[..., Any]] = {"lightgbm": bare_lightgbm, "xgboost": bare_xgboost}
        for kind, peer in peers.items():
            if settings.wanted(f"train_{kind}"):
                rows.append(trained(kind, peer, train, valid, settings, folder))
        if settings.wanted("train_xgboost_ray2"):
            rows.append(on_ray(train, valid, settings, folder))
    for trees, leaves, work, goal in ((500, 64, "score_trees", 2.0), (120, 31, "score_trees_120x31", 1.0)):
        if settings.wanted(work):
            rows += scored(trees, leaves, work, goal, settings, copy_bytes_per_second)
    return rows


def trained(
    kind: str, peer: Callable[..., Any], train: Examples, valid: Examples, settings: Settings, folder: Path
) -> Row:
    """Both sides in turn, in CPU seconds of this process: others that use the machine do not count; the median of each."""
    config = make_config(folder, kind, settings.threads)
    few = train.take(np.arange(2000))
    ours(few, few, config)  # compiles the kernels
    mine, theirs, model, result = [], [], None, None
    for _ in range(max(1, min(settings.repeats, 3))):
        began = time.process_time()
        result = ours(train, valid, config)
        mine.append(time.process_time() - began)
        began = time.process_time()
        model = peer(train, valid, settings.threads)
        theirs.append(time.process_time() - began)
    assert result is not None and model is not None
    spent = {name.split("/")[1]: f"{value:.2f}" for name, value in result.metrics.items() if name.endswith("_seconds")}
    print(f"{kind}: {spent}", file=sys.stderr)
    mine_auc = roc_auc(valid.target, result.model.logits(valid.numeric, valid.codes)[:, 0])  # type: ignore[union-attr]
    their_scores = model.predict(valid.numeric) if kind == "lightgbm" else model.inplace_predict(valid.numeric)
    note = f"ROC AUC {mine_auc:.4f}, theirs {roc_auc(valid.target, their_scores.astype(np.float64)):.4f}"
    speed, other = (len(train) * ROUNDS / statistics.median(seconds) for seconds in (mine, theirs))
    row = Row(
        "boosting", f"train_{kind}", len(train), speed, kind, speed / other, None, "rows x rounds/CPU s", other, BOUND,
        None, len(mine), note,
    )  # fmt: skip
    show(row)
    return row


def on_ray(train: Examples, valid: Examples, settings: Settings, folder: Path) -> Row:
    train.save(folder / "train")
    valid.save(folder / "valid")
    config = make_config(folder, "xgboost", 1, workers=2)
    few = train.take(np.arange(2000))
    ours(few, few, make_config(folder, "xgboost", 1))  # compiles the kernels, whose files the workers load
    mine, theirs = [], []
    for turn in range(max(1, min(settings.repeats, 3))):
        result = ours(train, valid, config, folder)
        spent = {
            name.split("/")[1]: f"{value:.2f}" for name, value in result.metrics.items() if name.endswith("_seconds")
        }
        print(f"xgboost on two workers: {spent}", file=sys.stderr)
        mine.append(own_seconds(result))
        theirs.append(ray_xgboost(train, valid, folder / f"recipe-{turn}"))
    speed, other = (len(train) * ROUNDS / statistics.median(seconds) for seconds in (mine, theirs))
    note = f"ratios of {len(mine)} turns " + ", ".join(f"{b / a:.2f}" for a, b in zip(mine, theirs, strict=True))
    row = Row(
        "boosting", "train_xgboost_ray2", len(train), speed, "ray_xgboost", speed / other, None, "rows x rounds/s", other,
        BOUND_RAY, None, len(mine), note,
    )  # fmt: skip
    show(row)
    return row


def scored(trees: int, leaves: int, work: str, goal: float, settings: Settings, limit: float) -> list[Row]:
    import lightgbm

    columns = 50
    data = problem(20_000, columns)
    params = {
        "objective": "binary",
        "num_leaves": leaves,
        "learning_rate": 0.05,
        "verbosity": -1,
        "num_threads": settings.threads,
    }
    booster = lightgbm.train(params, lightgbm.Dataset(data.numeric, data.target), trees)
    text = booster.model_to_string()
    model = trees_of(text, Rows(data.numeric, data.codes, [], 1))
    rows = problem(settings.rows(SCORED), columns, 2)
    found = model.logits(rows.numeric, rows.codes, settings.threads)[:, 0]
    want = booster.predict(rows.numeric, raw_score=True)
    assert np.array_equal(found, want.astype(np.float32)), "the scores must be the library's"
    return compare(
        "boosting",
        work,
        (len(rows), len(rows), "rows/s"),
        lambda: model.logits(rows.numeric, rows.codes, settings.threads),
        {"lightgbm": (lambda: booster.predict(rows.numeric, raw_score=True, num_threads=settings.threads), goal)},
        settings,
        (4.0 * columns + 4, limit),
    )
