"""How far is quality that is estimated before labels are known from what the labels say?

Flights: a model trained as the experiment says, and every week from May to December monitored by `engine monitor`: the mean
absolute difference of the ROC AUC that it estimates without the week's labels and the one that it measures with them.
Shifted: a data set made here, in which the population moves week by week and the meaning of the scores does not. The peer is
NannyML's CBPE on the same scores, fitted on the same validation rows.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

import engine
from benchmarks import peers
from benchmarks.harness import Row, Settings
from engine.config.sections.training import EvaluateConfig
from engine.monitoring.estimate import Unlabelled, estimate
from engine.monitoring.performance import Judge, Outcomes
from engine.scoring.read import predictions
from engine.training.losses import LOSSES

peers.REQUIREMENTS.setdefault("nannyml", ["nannyml>=0.13", "statsmodels"])
JSON = Path(__file__).parent / "results/estimate.json"
GOAL = 0.015
FIRST, LAST = datetime.date(2013, 5, 1), datetime.date(2013, 12, 31)
WEEK = 7
JUDGE = Judge(
    loss=LOSSES["binary"], evaluate=EvaluateConfig(bootstrap=0), alpha=0.05, floor=0.1, min_labelled=0.5, length=WEEK,
    block=WEEK, seed=0,
)  # fmt: skip
NANNYML = """
import json, sys, warnings
warnings.simplefilter("ignore")
import pandas as pd
import nannyml as nml
reference, windows = pd.read_parquet(sys.argv[1] + "/reference.parquet"), pd.read_parquet(sys.argv[1] + "/windows.parquet")
for frame in (reference, windows):  # day 0 is a Monday, so that weeks of NannyML are ours
    frame["at"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["day"], unit="D")
    frame["taken"] = (frame["score"] >= 0.5).astype(int)
cbpe = nml.CBPE(problem_type="classification_binary", y_pred_proba="score", y_pred="taken", y_true="label",
                timestamp_column_name="at", chunk_period="W", metrics=["roc_auc"]).fit(reference)
found = cbpe.estimate(windows.drop(columns="label")).filter(period="analysis").to_df()
print(json.dumps(found[("roc_auc", "value")].tolist()))
"""


def run(settings: Settings, _bandwidth: float) -> list[Row]:
    found: list[Row] = []
    if settings.wanted("auc_week_flights"):
        found += flights()
    if settings.wanted("auc_week_shifted"):
        found += shifted()
    return found


def row(work: str, errors: list[float], peer: str, value: float, note: str) -> Row:
    ours = float(np.mean(np.abs(errors)))
    must = 1.0 if peer == "target" or work == "auc_week_shifted" else None
    ratio = None if np.isnan(value) else value / ours
    return Row("estimate", work, len(errors), ours, peer, ratio, None, "mean error", value, must, note=note)


# ---------------------------------------------------------------------------------------------------------- flights


def flights() -> list[Row]:
    """Weeks of flights, each by a run of `monitor`."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["+experiment=flights", f"paths.store={folder}/store", f"paths.runs={folder}/runs", "tracking=off"]
        model = engine.run("train", *words).directory
        errors = []
        for start in weeks():
            stop = start + datetime.timedelta(days=WEEK)
            window = [f"monitor.model={model}", f"monitor.window=[{start},{stop}]", "monitor.multivariate=false"]
            record = json.loads((engine.run("monitor", *words, *window).directory / "drift.json").read_text())
            errors.append(float(record["estimated"]["metrics"]["roc_auc"]["error"]))
        between = f"score.between=[{FIRST - datetime.timedelta(days=30)},{LAST + datetime.timedelta(days=1)}]"
        scored = engine.run("score", *words, f"score.model={model}", between, "score.columns=[late]").directory
        table = predictions(scored)
    local = table["scheduled"].cast(pa.timestamp("us", tz="America/New_York"))
    days = np.array([(value.date() - FIRST).days for value in local.to_pylist()])
    labels = np.array([np.nan if value is None else float(value) for value in table["late"].to_pylist()])
    note = f"weeks from {FIRST} on, each by its labels of the last 28 days"
    foreign = cbpe(days, labels, np.asarray(table["score"], np.float64), len(errors))
    return [
        row("auc_week_flights", errors, "target", GOAL, note),
        row("auc_week_flights", errors, "nannyml", foreign, f"{note}; CBPE by April's"),
    ]


def weeks() -> list[datetime.date]:
    count = ((LAST - FIRST).days + 1) // WEEK
    return [FIRST + datetime.timedelta(days=WEEK * k) for k in range(count)]


# ---------------------------------------------------------------------------------------------------------- shifted


def shifted() -> list[Row]:
    """Thirty weeks whose population moves; scores are too sure of themselves, as those of networks often are."""
    rng = np.random.default_rng(20)
    rows, before, after = 3_000, 6, 30
    week = np.repeat(np.arange(-before, after), rows)
    centre = np.where(week < 0, 0.0, 1.2 * np.sin(week / 4))
    spread = np.where(week < 0, 1.0, 1.0 + 0.4 * np.cos(week / 7))
    logit = rng.normal(centre - 1.0, spread)
    label = (rng.random(len(week)) < 1 / (1 + np.exp(-logit))).astype(np.float64)
    score = 1 / (1 + np.exp(-1.7 * logit - 0.3))
    past = Outcomes(WEEK * week[week < 0], label[week < 0], score[week < 0], {})
    errors = []
    for at in range(after):
        now = week == at
        found = estimate(past, None, Unlabelled(score[now]), JUDGE, {})["metrics"]["roc_auc"]["value"]
        errors.append(found - roc_auc_score(label[now], score[now]))
    foreign = cbpe(WEEK * week, label, score, after)
    return [
        row("auc_week_shifted", errors, "nannyml", foreign, f"{after} weeks of {rows:,} rows, by {before} weeks before")
    ]


# ------------------------------------------------------------------------------------------------------------- peer


def cbpe(day: np.ndarray, label: np.ndarray, score: np.ndarray, count: int) -> float:
    """Mean absolute error of NannyML's estimates of the weeks from day 0 on, fitted on the days before; NaN without NannyML."""
    known = np.isfinite(label) & (day < WEEK * count)
    day, label, score = day[known], label[known], score[known]
    table = pa.table({"day": day + WEEK * 100, "label": label.astype(np.int64), "score": score})
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table.filter(pa.array(day < 0)), f"{folder}/reference.parquet")
        pq.write_table(table.filter(pa.array(day >= 0)), f"{folder}/windows.parquet")
        try:
            done = subprocess.run(
                [peers.python_of("nannyml"), "-c", NANNYML, folder],
                capture_output=True,
                text=True,
                check=True,
                timeout=900,
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(f"nannyml: {str(getattr(error, 'stderr', '') or error).strip().splitlines()[-1:]}", file=sys.stderr)
            return float("nan")
    found: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == count, (len(found), count)
    real = [roc_auc_score(label[day // WEEK == k], score[day // WEEK == k]) for k in range(count)]
    return float(np.mean(np.abs(np.array(found) - np.array(real))))
