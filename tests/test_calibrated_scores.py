"""Temperatures and intervals from training to scores, evaluation and monitoring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.errors import UserError
from engine.scoring.read import predictions
from engine.training.losses import recorded_loss
from tests.test_kinds_of_scores import shop, through
from tests.tiny import overrides, write_tiny

FIFTEEN_DAYS = ("split.train=[2020-01-01,2020-01-11]", "split.valid=[2020-01-11,2020-01-26]")


def test_intervals_are_columns_measured_on_the_test_rows_and_watched(tmp_path: Path) -> None:
    trained, scored, drift = through(shop(tmp_path, "float64"), "squared", "evaluate.interval=0.7", *FIFTEEN_DAYS)
    table = predictions(scored.directory)
    scores, lower, upper = (np.asarray(table[name]) for name in ("score", "lower", "upper"))
    assert (lower < scores).all() and (scores < upper).all()
    saved = json.loads((trained.directory / "model/model.json").read_text())
    assert saved["interval"]["level"] == 0.7 and recorded_loss(saved).interval == saved["interval"]
    assert 0 <= trained.metrics["test/interval_error"] < 0.15
    assert trained.metrics["valid/interval_error"] < 0.1
    assert "band" in drift["performance"]["metrics"]["interval_error"]  # type: ignore[index]
    again = engine.load(trained.directory)
    assert again.added == ("lower", "upper")


def test_a_temperature_makes_the_validation_loss_least_and_ranks_as_before(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 1500)
    conf, words = str(folder / "conf"), overrides(folder, "train.epochs=3")
    plain = engine.run("train", *words, config_dir=conf)
    cooled = engine.run("train", *words, "evaluate.calibration=temperature", config_dir=conf)
    saved = json.loads((cooled.directory / "model/model.json").read_text())
    assert saved["temperature"] != 1
    assert cooled.record["chain"]["weights"] == plain.record["chain"]["weights"]
    assert cooled.metrics["valid/log_loss"] < plain.metrics["valid/log_loss"]
    assert cooled.metrics["test/roc_auc"] == pytest.approx(plain.metrics["test/roc_auc"], abs=1e-6)
    scored = engine.run("score", *words, f"score.model={cooled.directory}", config_dir=conf)
    model = engine.load(cooled.directory)
    raw = engine.load(plain.directory)
    other = engine.run("score", *words, f"score.model={plain.directory}", config_dir=conf)
    before, after = (np.asarray(predictions(run.directory)["score"], np.float64) for run in (other, scored))
    power = 1 / saved["temperature"]
    odds = before / (1 - before)
    assert np.allclose(after, odds**power / (1 + odds**power), atol=1e-5)
    assert model.digest != raw.digest


def test_intervals_are_for_numbers_only(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 300)
    with pytest.raises(
        UserError, match=r"evaluate\.interval is for a target that is a number, found train.loss=binary"
    ):
        engine.run("train", *overrides(folder, "evaluate.interval=0.9"), config_dir=str(folder / "conf"))


def test_too_few_days_are_a_warning_and_no_columns(tmp_path: Path) -> None:
    folder = shop(tmp_path, "float64")
    words = overrides(folder, "train.loss=squared", "evaluate.interval=0.95", "train.epochs=1")
    trained = engine.run("train", *words, config_dir=str(folder / "conf"))
    assert "are too few to promise that 95% of later rows" in (trained.directory / "run.log").read_text()
    assert engine.load(trained.directory).added == ()
