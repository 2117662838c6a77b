"""Is `model=auto` as good as the usual trees with their library's defaults, on the same raw features?

Flights: trained on January to March 2013, stopped on April, measured on each month from May on; ROC AUC. Taxi, where
ENGINE_SHARED_DATA has its files: the experiment as it is, but for the model; mean absolute error of its test months.
Peers get the features that the engine computed, before its encoding: numbers with NaN, categories as their own type; and at
most 1,000 rounds, stopped after 50 without a gain on the validation rows. Of taxi their loss is the metric, the absolute error.
`mlp` and `tabm` are the engine's own networks with one seed, the TabM smaller than its defaults (SMALL), which two cores cannot
train on 334 encoded columns within an hour. Intervals: 95 %, days drawn together, of ours less theirs.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import engine
from benchmarks.harness import Row, Settings, show
from engine.config.compose import compose
from engine.config.tree import SPLITS
from engine.data.calendar import local_days
from engine.data.make_dataset import ensure_dataset
from engine.features.encode import Encoder
from engine.features.table import ensure_table
from engine.runtime.run import Run
from engine.training.bundle import load_model, read_bundle
from engine.training.examples import Examples
from engine.training.losses import to_scores
from engine.training.splits import find_splits
from engine.training.train import pack
from kernels.metrics import roc_auc

JSON = Path(__file__).parent / "results/quality.json"
TAXI = Path(os.environ.get("ENGINE_SHARED_DATA", "/nowhere")) / "taxi"
ROUNDS, PATIENCE, RESAMPLES = 1000, 50, 200
SMALL = ("model.hidden=[128,128]", "model.members=8", "model.embedding_width=4", "model.bins=16", "train.epochs=4")
FLIGHTS = ("+experiment=flights", "split.test=[2013-05-01,2014-01-01]")
BRIEF = "split.test=[2013-05-01,2013-05-02]"  # while a model is trained, so that April's labels are as old
QUICK = ("evaluate.bootstrap=0", "tracking=off")


@dataclass(frozen=True)
class Part:
    """Rows of a period: features before encoding, encoded, and local day of each."""

    raw: pd.DataFrame
    encoded: Examples
    day: np.ndarray


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = (f"paths.store={folder}/store", f"paths.runs={folder}/runs", f"resources.threads={settings.threads}")
        if settings.wanted("flights_2013_and_networks"):
            found += flights(place, settings)
        if settings.wanted("taxi") and TAXI.exists():
            found += taxi(place, settings)
    return found


def flights(place: tuple[str, ...], settings: Settings) -> list[Row]:
    """Rows of each month against each peer."""
    words = (*FLIGHTS, *place, *QUICK)
    trained = engine.run("train", *words, BRIEF, "model=auto")
    parts = parts_of(words, trained.directory)
    test = parts["test"]
    ours = scores(trained.directory, test)
    others = (
        ("lightgbm", lambda: lightgbm(parts, "binary", settings.threads)),
        ("xgboost", lambda: xgboost(parts, "binary:logistic", settings.threads)),
        ("mlp", lambda: scores(engine.run("train", *words, BRIEF, "model=mlp").directory, test)),
        ("tabm", lambda: scores(engine.run("train", *words, BRIEF, "model=tabm", *SMALL).directory, test)),
    )
    found, months = [], test.day.astype("M8[M]")
    for peer, predict in others if settings.wanted("networks") else others[:2]:
        theirs = predict()
        for month in np.unique(months):
            work = f"flights_{str(month).replace('-', '_')}"
            found.append(compared(work, test, np.flatnonzero(months == month), ours, peer, theirs, area))
            show(found[-1])
    return found


def taxi(place: tuple[str, ...], settings: Settings) -> list[Row]:
    """Rows of the test months together against each peer."""
    words = ("+experiment=taxi", f"data.path={TAXI}", *place, *QUICK)
    trained = engine.run("train", *words, "model=auto")
    parts = parts_of(words, trained.directory)
    test, rows = parts["test"], np.arange(len(parts["test"].day))
    ours = scores(trained.directory, test)
    found = []
    for peer, theirs in (
        ("lightgbm", lightgbm(parts, "l1", settings.threads)),
        ("xgboost", xgboost(parts, "reg:absoluteerror", settings.threads)),
    ):
        found.append(compared("taxi", test, rows, ours, peer, theirs, error))
        show(found[-1])
    return found


def area(target: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc(target, score))


def error(target: np.ndarray, score: np.ndarray) -> float:
    return float(np.abs(target - score).mean())


def compared(
    work: str, test: Part, rows: np.ndarray, ours: np.ndarray, peer: str, theirs: np.ndarray, metric: Any
) -> Row:
    """One row: ratio above 1 where ours is better; the note has the interval of the difference."""
    target = test.encoded.target.astype(np.float64)
    values = [metric(target[rows], score[rows]) for score in (ours, theirs)]
    days, rng = np.unique(test.day[rows]), np.random.default_rng(0)
    of_day = [rows[test.day[rows] == day] for day in days]
    gains = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([of_day[k] for k in rng.integers(0, len(days), len(days))])
        gains.append(metric(target[drawn], ours[drawn]) - metric(target[drawn], theirs[drawn]))
    low, high = np.quantile(gains, [0.025, 0.975])
    ratio = values[0] / values[1] if metric is area else values[1] / values[0]
    digits = 4 if metric is area else 2
    note = f"difference {values[0] - values[1]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    must = 1.0 if peer == "lightgbm" else None
    unit = "ROC AUC" if metric is area else "seconds of mean absolute error"
    return Row("quality", work, len(rows), values[0], peer, ratio, None, unit, values[1], must, note=note)


# ------------------------------------------------------------------------------------------------------------- data


def parts_of(words: tuple[str, ...], directory: Path) -> dict[str, Part]:
    """The labelled rows of each period, with the encoder of a training run."""
    composed = compose(list(words))
    config, bundle = composed.config, read_bundle(directory / "model")
    run = Run.create("evaluate", config, composed.saved)
    try:
        dataset = ensure_dataset(config, run)
        table = ensure_table(config, run, dataset)
        found, classes = {}, tuple(bundle.model["classes"])
        for name, split in find_splits(config, dataset, SPLITS, run).items():
            encoded = pack(config, table, bundle.encoder, split, [classes], run, "float32")
            span = (int(split.rows[0]), int(split.rows[-1]) + 1)
            take = pa.array(split.rows - span[0])
            when = config.data.event_time
            day = local_days(dataset.read([when], rows=span).take(take)[when], config.data.time_zone)
            raw = raw_features(table.read(span).take(take), bundle.encoder, encoded)
            found[name] = Part(raw, encoded, day.astype("M8[D]"))
        return found
    finally:
        run.finish({})


def raw_features(table: pa.Table, encoder: Encoder, encoded: Examples) -> pd.DataFrame:
    """Numbers float64 with NaN, and categories of the training rows as pandas' type; others are one category of their own."""
    columns: dict[str, Any] = {}
    for column in encoder.numeric_:
        columns[column.name] = table[column.name].cast(pa.float64()).to_pandas().to_numpy()
    for k, vocabulary in enumerate(encoder.categorical_):
        codes = pd.Categorical.from_codes(encoded.codes[:, k], categories=range(encoder.cardinalities[k]))
        columns[vocabulary.name] = codes
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------------------------ scores


def scores(directory: Path, part: Part) -> np.ndarray:
    """float64[n] of the model of a training run."""
    bundle = read_bundle(directory / "model")
    model = load_model(bundle)
    logits = model.logits(part.encoded.numeric, part.encoded.codes)
    return np.asarray(to_scores(bundle.loss, logits, model.target), np.float64)


def lightgbm(parts: dict[str, Part], objective: str, threads: int) -> np.ndarray:
    """float64[n] of the test rows."""
    import lightgbm as library

    data = {name: library.Dataset(part.raw, part.encoded.target) for name, part in parts.items() if name != "test"}
    settings = {"objective": objective, "metric": objective_metric(objective), "num_threads": threads, "verbose": -1}
    stop = library.early_stopping(PATIENCE, verbose=False)
    model = library.train(settings, data["train"], ROUNDS, valid_sets=[data["valid"]], callbacks=[stop])
    return np.asarray(model.predict(parts["test"].raw), np.float64)


def objective_metric(objective: str) -> str:
    return "auc" if objective.startswith("binary") else "mae"


def xgboost(parts: dict[str, Part], objective: str, threads: int) -> np.ndarray:
    """float64[n] of the test rows."""
    import xgboost as library

    data = {
        name: library.DMatrix(part.raw, part.encoded.target, enable_categorical=True) for name, part in parts.items()
    }
    settings = {"objective": objective, "eval_metric": objective_metric(objective), "nthread": threads}
    model = library.train(
        settings,
        data["train"],
        ROUNDS,
        evals=[(data["valid"], "valid")],
        early_stopping_rounds=PATIENCE,
        verbose_eval=False,
    )
    return np.asarray(model.predict(data["test"], iteration_range=(0, model.best_iteration + 1)), np.float64)


def markdown(rows: list[Row]) -> str:
    """A line a work: ours, every peer's figure, and the difference from LightGBM."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    lines = [
        "| " + " | ".join(["work", "rows", "`model=auto`", *(f"`{peer}`" for peer in peers), "less `lightgbm`"]) + " |"
    ]
    lines.append("|---" * (len(peers) + 4) + "|")
    for work in dict.fromkeys(row.work for row in rows):
        of = {row.peer: row for row in rows if row.work == work}
        digits = 4 if work != "taxi" else 2
        first = next(iter(of.values()))
        theirs = [f"{of[peer].peer_value:.{digits}f}" if peer in of else "" for peer in peers]
        gain = of["lightgbm"].note.removeprefix("difference ") if "lightgbm" in of else ""
        lines.append(
            "| " + " | ".join([f"`{work}`", f"{first.rows:,}", f"{first.ours:.{digits}f}", *theirs, gain]) + " |"
        )
    return "\n".join(lines)
