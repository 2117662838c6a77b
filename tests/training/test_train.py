"""The train step end to end on a small experiment: what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import api
from engine.runtime.run import Run
from engine.training.train import finite_json
from tests.tiny import DATA, overrides, write_tiny


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


def test_rows_without_a_label_are_not_trained_on(trained: Run) -> None:
    assert trained.metrics["train/rows"] < 1500 * 20 / 30


def test_numbers_that_json_lacks_become_null() -> None:
    value = {"a": math.nan, "b": [np.float32(1.5), math.inf], "c": np.int64(3), "d": np.array([1.0, np.nan])}
    assert finite_json(value) == {"a": None, "b": [1.5, None], "c": 3, "d": [1.0, None]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split.train=[]"], "split.train must say which period"),
        (["split.train=[2019-01-01,2019-02-01]"], "split.train .* must hold labelled rows, found 0 rows"),
        (["train.loss=quantile", "train.metric=roc_auc"], "train.metric"),
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
