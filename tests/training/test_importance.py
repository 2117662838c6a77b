"""Permutation importance is what scikit-learn finds, of columns and of whole views, and is in the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LinearRegression

import engine
from engine.features.spec import Feature
from engine.training.examples import Examples
from engine.training.importance import permuted
from engine.training.losses import LOSSES
from tests.tiny import overrides, write_tiny


def column(name: str) -> Any:
    return SimpleNamespace(name=name, outputs=lambda: [name])


def case(rows: int = 1500) -> tuple[Any, Examples, np.ndarray]:
    """Numbers a, b and c with weights 3, 1 and 0 in the target; b and c are features of a view."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 3)).astype(np.float32)
    target = 3 * x[:, 0] + x[:, 1] + random.normal(0, 0.1, rows)
    features = (Feature("a", "numeric", "direct"), Feature("b", "numeric", "view"), Feature("c", "numeric", "view"))
    numbers = [column(name) for name in "abc"]
    encoder = SimpleNamespace(numeric_=numbers, categorical_=[], features=features, numeric_of=["a", "b", "c"])
    return encoder, Examples(x, np.zeros((rows, 0), np.int32), target.astype(np.float32), np.arange(rows)), x


def test_it_is_that_of_scikit_learn() -> None:
    encoder, valid, x = case()
    model = LinearRegression().fit(x, valid.target)
    found = permuted(encoder, lambda numeric, _: model.predict(numeric), valid, LOSSES["squared"], "mae", 20, True)
    peer = permutation_importance(
        model, x, valid.target, scoring="neg_mean_absolute_error", n_repeats=20, random_state=0
    )
    by_name = {item["name"]: item for item in found["groups"]}
    assert list(by_name) == ["a", "view"]
    assert by_name["a"]["loss"] == pytest.approx(peer.importances_mean[0], rel=0.05)
    assert by_name["view"]["loss"] == pytest.approx(peer.importances_mean[1], rel=0.1)
    assert by_name["view"]["features"] == 2
    assert by_name["a"]["low"] < by_name["a"]["loss"] < by_name["a"]["high"]


def test_features_of_a_view_are_shuffled_by_one_order() -> None:
    """Two columns that say the same stay the same under every shuffle."""
    encoder, valid, _ = case()
    valid.numeric[:, 2] = valid.numeric[:, 1]
    seen = []

    def scores(numeric: np.ndarray, _: np.ndarray) -> np.ndarray:
        seen.append(bool((numeric[:, 1] == numeric[:, 2]).all()))
        return numeric[:, 0]

    permuted(encoder, scores, valid, LOSSES["squared"], "mae", 3, True)
    assert all(seen)


def test_too_few_rows_no_shuffles_and_an_undefined_metric_give_nothing() -> None:
    encoder, valid, _ = case(10)
    assert permuted(encoder, lambda numeric, _: numeric[:, 0], valid, LOSSES["squared"], "mae", 3, True) is None
    encoder, valid, _ = case(50)
    assert permuted(encoder, lambda numeric, _: numeric[:, 0], valid, LOSSES["squared"], "mae", 0, True) is None
    assert (
        permuted(encoder, lambda numeric, _: numeric[:, 0] * np.nan, valid, LOSSES["squared"], "mae", 3, True) is None
    )


def test_the_report_and_the_evaluation_have_it(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 900)
    run = engine.run("train", *overrides(folder, "train.epochs=1"), config_dir=str(folder / "conf"))
    found = json.loads((run.directory / "evaluation.json").read_text())["valid"]["importance"]
    assert {item["name"] for item in found["groups"]} == {"shop", "size", "calendar"}
    assert found["metric"] == "roc_auc" and found["shuffles"] == 5
    assert "By permutation" in (run.directory / "report.html").read_text()
