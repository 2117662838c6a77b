"""The train step end to end on a small experiment: what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import api
from engine.config.sections.training import TASKS
from engine.errors import UserError
from engine.runtime import digest, storage
from engine.runtime.run import Run
from engine.training.losses import LOSSES
from engine.training.metrics import METRICS
from engine.training.weights import row_weights
from tests.tiny import DATA, overrides, visits, write_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = write_tiny(tmp_path_factory.mktemp("train"), 1500)
    strict = DATA.replace(
        "size: {type: float64, role: numeric, known_at: prior}",
        "size: {type: float64, role: numeric, known_at: prior, max: 2.5}",
    )
    (folder / "conf/data/tiny.yaml").write_text(strict)
    return api.run("train", *overrides(folder, "data.max_quarantine=5%"), config_dir=str(folder / "conf"))


def test_the_outcome_is_kept_as_json_and_as_a_report(trained: Run) -> None:
    outcome = json.loads((trained.directory / "evaluation.json").read_text())
    assert set(outcome) == {"valid", "test"}
    assert [row["value"] for row in outcome["test"]["slices"]["shop"]]
    page = (trained.directory / "report.html").read_text()
    assert "size" in page and "quarantine)" in page, "the report names what was quarantined"
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_metrics_are_named_by_split_and_seconds_by_part(trained: Run) -> None:
    metrics = trained.metrics
    assert 0.5 < metrics["test/roc_auc"] < 1 and metrics["test/roc_auc_low"] < metrics["test/roc_auc_high"]
    assert {"time/ingest_seconds", "time/features_seconds", "time/fit_seconds", "train/rows_per_second"} <= set(metrics)


def test_the_model_stands_beside_a_linear_one_and_a_constant(trained: Run) -> None:
    metrics = trained.metrics
    assert metrics["baseline/test/constant/roc_auc"] == 0.5 < metrics["baseline/test/linear/roc_auc"] < 1
    assert metrics["baseline/valid/linear/log_loss"] < metrics["baseline/valid/constant/log_loss"]
    page = (trained.directory / "report.html").read_text()
    assert "Against baselines" in page and "A linear model of the same encoded rows" in page
    said = (trained.directory / "run.log").read_text()
    assert f"test roc_auc: model {metrics['test/roc_auc']:.4g}, linear " in said
    # They depend on nothing that the chain promises, and are no part of it.
    judged = {name: value for name, value in metrics.items() if name.startswith(("valid/", "test/"))}
    assert trained.record["chain"]["metrics"] == digest.of_json(judged)


def test_rows_without_a_label_are_not_trained_on(trained: Run) -> None:
    assert trained.metrics["train/rows"] < 1500 * 20 / 30


@pytest.mark.parametrize(("weight", "shown"), [(-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_weight_that_is_none_is_refused_by_row(weight: float, shown: str) -> None:
    weights, rows = pa.chunked_array([[0.0, 2.0, weight]]), np.array([3, 5, 17])
    with pytest.raises(UserError, match=rf"columns.w has role weight .* found {shown} in dataset row 17\. To set"):
        row_weights(weights, rows, "w")
    assert row_weights(weights[:2], rows[:2], "w").tolist() == [0, 2]
    assert row_weights(weights, rows, "w", used=np.array([True, True, False])).tolist() == [0, 2, 0]


def test_numbers_that_json_lacks_become_null() -> None:
    value = {"a": math.nan, "b": [np.float32(1.5), math.inf], "c": np.int64(3), "d": np.array([1.0, np.nan])}
    assert storage.finite(value) == {"a": None, "b": [1.5, None], "c": 3, "d": [1.0, None]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split.train=[]"], "split.train must say which period"),
        (["split.train=[2019-01-01,2019-02-01]"], "split.train .* must hold labelled rows, found 0 rows"),
        (
            ["train.loss=quantile", "train.metric=roc_auc"],
            "train.metric must be one that .*=quantile has, found 'roc_auc'",
        ),
        (
            ["features.direct={shop: false, size: false}", "features.windows=off", "~features.calendar.at"],
            "at least one feature",
        ),
    ],
)
def test_a_mistake_gets_one_message(cli: Callable[..., Any], tmp_path: Path, words: list[str], message: str) -> None:
    folder = write_tiny(tmp_path, 200)
    outcome = cli("train", *overrides(folder, *words), "--config-dir", str(folder / "conf"))
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert re.search(message, outcome.err), outcome.err
    late = "labelled rows" in message  # what only the data can tell
    assert late or not (folder / "runs").exists(), "refused before there is a run directory"


def test_a_period_without_labels_is_said_aloud(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 600)
    words = overrides(folder, "split.test=[2021-01-01,2021-02-01]", "train.epochs=1")
    run = api.run("train", *words, config_dir=str(folder / "conf"))
    assert "test/roc_auc" not in run.metrics and "valid/roc_auc" in run.metrics
    assert (
        "split.test ['2021-01-01', '2021-02-01'] must hold labelled rows, found 0"
        in (run.directory / "run.log").read_text()
    )


def test_rows_that_all_lie_within_a_window_of_the_first_one_are_the_reference(tmp_path: Path) -> None:
    """Elsewhere rows whose windows reach back before the data are left out of it: here that would leave none."""
    pq.write_table(visits().sort_by("at").slice(0, 9), write_tiny(tmp_path) / "visits.parquet")
    words = overrides(tmp_path, "split.valid=[]", "split.test=[]", "split.ripening=none", "train.epochs=1")
    run = api.run("train", *words, config_dir=str(tmp_path / "conf"))
    state = json.loads((run.directory / "model" / "reference.json").read_text())
    assert state["predictions_in_sample"] and state["profile"]["rows"] == 9


def test_evaluate_measures_what_train_measured_at_the_level_of_the_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 900)
    data = folder / "conf/data/tiny.yaml"
    data.write_text(
        data.read_text()
        .replace("role: target, known_at: paid_at", "known_at: paid_at")
        .replace("amount: {type: float64, role: numeric", "amount: {type: float64, role: target")
    )
    conf = str(folder / "conf")
    more = ["train.epochs=1", "features.views.shop.aggregates={rows: [count]}"]
    trained = api.run("train", *overrides(folder, "train.loss=quantile", "train.quantile=0.9", *more), config_dir=conf)
    again = api.run("evaluate", *overrides(folder, f"evaluate.model={trained.directory}", *more), config_dir=conf)
    for name in ("test/pinball", "valid/pinball", "test/mae"):
        assert again.metrics[name] == trained.metrics[name], name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "evaluate.model must name a training run"),
        (["evaluate.model=nosuch"], "evaluate.model: no model 'nosuch'.*run `train` first"),
    ],
)
def test_evaluate_says_what_it_needs(cli: Callable[..., Any], workplace: Path, words: list[str], message: str) -> None:
    outcome = cli("evaluate", *words)
    assert outcome.code == 1 and re.search(message, outcome.err) and not (workplace / "runs").exists()


def test_evaluate_without_a_period_is_refused(cli: Callable[..., Any], workplace: Path, trained: Run) -> None:
    outcome = cli("evaluate", f"evaluate.model={trained.directory}")
    assert outcome.code == 1 and "split.valid or split.test must say which period" in outcome.err
    assert not (workplace / "runs").exists()


def test_every_loss_watches_a_metric_of_its_task() -> None:
    assert set(TASKS.values()) == set(METRICS)
    assert all(loss.metric in loss.metrics and TASKS[name] == loss.task for name, loss in LOSSES.items())
