"""What a model must beat: a constant and a linear model, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config.sections.training import EvaluateConfig
from engine.training import baselines
from engine.training.examples import Examples
from engine.training.losses import LOSSES, recorded_loss
from tests.training.conftest import packed

linear_model = pytest.importorskip("sklearn.linear_model")
NAMES = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "squared": (), "quantile": ()}


def problem(loss: str, n: int = 3000, seed: int = 0, weighted: bool = False) -> Examples:
    rng = np.random.default_rng(seed)
    numeric, codes = rng.normal(size=(n, 5)), rng.integers(0, 6, (n, 2))
    signal = numeric @ [1.0, -0.5, 0.3, 0.0, 0.0] + np.array([0.0, 0.5, -1.0, 2.0, 0.0, 1.0])[codes[:, 0]]
    if loss == "binary":
        target = (rng.random(n) < 1 / (1 + np.exp(2 - signal))).astype(float)
    elif loss == "multiclass":
        target = np.digitize(signal + rng.normal(size=n), [-0.5, 1.0]).astype(float)
    else:
        target = 100 + 10 * signal + rng.normal(size=n)
    return packed(numeric, codes, target, weight=rng.random(n) + 0.1 if weighted else None)


def dense(part: Examples) -> np.ndarray:
    return np.concatenate([part.numeric, *(part.codes[:, [k]] == np.arange(6) for k in range(2))], axis=1)


def found(loss: str, parts: dict[str, Examples]) -> dict[str, dict[str, dict[str, float]]]:
    facts = {"loss": loss, "classes": NAMES[loss], "quantile": 0.5 if loss != "quantile" else 0.9}
    return baselines.baselines(parts, facts, EvaluateConfig())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_linear_model_of_classes_is_scikit_learn_s(weighted: bool) -> None:
    for loss in ("binary", "multiclass"):
        parts = {"train": problem(loss, weighted=weighted), "test": problem(loss, seed=1)}
        theirs = linear_model.LogisticRegression(C=1.0, max_iter=1000)
        theirs.fit(dense(parts["train"]), parts["train"].target, parts["train"].weight)
        shares = theirs.predict_proba(dense(parts["test"]))
        expected = baselines.point_metrics(
            parts["test"].target, shares if loss == "multiclass" else shares[:, 1], LOSSES[loss]
        )
        mine = found(loss, parts)["test"]["linear"]
        assert mine["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-3)
        watched = "roc_auc" if loss == "binary" else "accuracy"
        assert mine[watched] == pytest.approx(expected[watched], abs=2e-3) and mine[watched] > 0.6


def test_the_linear_model_of_a_number_is_ridge_regression() -> None:
    parts = {"train": problem("squared", weighted=True), "valid": problem("squared", seed=1)}
    theirs = linear_model.Ridge(alpha=1.0)
    theirs.fit(dense(parts["train"]), parts["train"].target, parts["train"].weight)
    error = parts["valid"].target - theirs.predict(dense(parts["valid"]))
    mine = found("squared", parts)
    assert list(mine) == ["valid"]
    assert mine["valid"]["linear"]["rmse"] == pytest.approx(float(np.sqrt(np.mean(error**2))), rel=1e-5)
    assert mine["valid"]["linear"]["rmse"] < mine["valid"]["constant"]["rmse"] / 5


@pytest.mark.parametrize(("loss", "metric"), [
    ("binary", "log_loss"), ("multiclass", "log_loss"), ("squared", "rmse"), ("quantile", "pinball"),
])  # fmt: skip
def test_no_other_constant_is_better_on_the_training_rows(loss: str, metric: str) -> None:
    train = problem(loss)
    best = found(loss, {"train": train, "test": train})["test"]["constant"][metric]
    rng = np.random.default_rng(5)
    for _ in range(20):
        value = (
            rng.dirichlet(np.ones(3 if loss == "multiclass" else 2))
            if NAMES[loss]
            else train.target[[rng.integers(3000)]]
        )
        scores = np.tile(value, (len(train), 1))
        other = baselines.point_metrics(
            train.target,
            scores if loss == "multiclass" else scores[:, -1],
            recorded_loss({"loss": loss, "quantile": 0.9}),
        )
        assert best <= other[metric] + 1e-9


def test_wide_blocks_and_many_classes_are_fitted_on_fewer_rows() -> None:
    train = problem("binary", 500)
    limits = baselines._limits(train)
    assert limits == [6, 6] and baselines._rows(train, limits, 2) == 500
    wide = packed(np.zeros((30_000, 400)), np.zeros((30_000, 0)), np.zeros(30_000))
    assert baselines._rows(wide, [], 2) == 2_000_000_000 // 401**2
    many = packed(np.zeros((30_000, 4)), np.full((30_000, 2), 5_000), np.zeros(30_000))
    assert baselines._limits(many) == [100, 100] and baselines._rows(many, [100, 100], 100) == 4_878


def test_they_are_told_in_one_line_and_kept_apart_from_the_judged_metrics() -> None:
    kinds = {"linear": {"roc_auc": 0.7312}, "constant": {"roc_auc": 0.5}}
    assert (
        baselines.words("test", "roc_auc", 0.77421, kinds) == "test roc_auc: model 0.7742, linear 0.7312, constant 0.5"
    )
    undefined = {"linear": {"roc_auc": float("nan")}, "constant": {"roc_auc": float("nan")}}
    assert baselines.words("test", "roc_auc", float("nan"), undefined) == "test roc_auc: not computable"
    assert baselines.words("test", "roc_auc", 0.75, undefined).endswith("constant not computable")
    assert baselines.flat({"test": kinds}) == {
        "baseline/test/linear/roc_auc": 0.7312, "baseline/test/constant/roc_auc": 0.5,
    }  # fmt: skip
