"""Losses: their formulas against scikit-learn and torch, links that keep order and sum to one, and targets that they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import schema
from engine.config.sections.training import TrainConfig
from engine.errors import UserError
from engine.training.evaluate import point_metrics
from engine.training.loss import Loss, LossSettings
from engine.training.loss_table import TABLE
from engine.training.losses import (
    LOSSES,
    check_targets,
    class_weights,
    loss_of,
    loss_record,
    recorded_loss,
    target_scale,
    to_scores,
)
from engine.training.metrics import Rows
from engine.training.resampling import numbered_blocks
from engine.training.target import PLAIN
from tests.logits import predict_logits
from tests.training.conftest import packed

oracle = pytest.importorskip("sklearn.metrics")
N = 400
ROWS = np.arange(N)


def of(name: str, **settings: Any) -> Loss:
    return TABLE[name](LossSettings(**settings))


def rows_of(loss: Loss, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[n]: the loss of each row, in double precision."""
    return loss.row_losses(torch.from_numpy(outputs), torch.from_numpy(target)).numpy()


def some(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outputs float64[n, 1], targets above 0 float64[n], weights float64[n])."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, 1)), rng.gamma(1.5, 2.0, N), rng.uniform(0.2, 3.0, N)


# ------------------------------------------------------------------------------------------------- numbers by a log link


@pytest.mark.parametrize("name", ["poisson", "gamma", "tweedie"])
def test_a_loss_with_a_log_link_is_half_the_deviance_of_scikit_learn_less_a_term_of_the_target(name: str) -> None:
    outputs, target, weight = some()
    loss = of(name, tweedie_power=1.3)
    power = {"poisson": 1, "gamma": 2, "tweedie": 1.3}[name]
    perfect = np.log(target)[:, None]
    apart = rows_of(loss, outputs, target) - rows_of(loss, perfect, target)
    theirs = oracle.mean_tweedie_deviance(target, np.exp(outputs[:, 0]), sample_weight=weight, power=power)
    assert 2 * np.average(apart, weights=weight) == pytest.approx(theirs, rel=1e-9)
    ours = point_metrics(
        target, np.exp(outputs[:, 0]), recorded_loss({"loss": name, "tweedie_power": 1.3}), weight=weight
    )
    assert ours[f"{name}_deviance"] == pytest.approx(theirs, rel=1e-9)


def test_a_deviance_counts_targets_of_zero_and_has_no_value_for_scores_below_it() -> None:
    target, scores = np.array([0.0, 0, 3, 1]), np.array([0.5, 2, 2, 1])
    for name, power in (("poisson", 1), ("tweedie", 1.5)):
        ours = point_metrics(target, scores, LOSSES[name])[f"{name}_deviance"]
        assert ours == pytest.approx(oracle.mean_tweedie_deviance(target, scores, power=power), rel=1e-9)
        assert np.isnan(point_metrics(target, scores - 0.5, LOSSES[name])[f"{name}_deviance"])


@pytest.mark.parametrize("name", ["poisson", "gamma", "tweedie"])
def test_scores_are_in_the_unit_of_the_target(name: str) -> None:
    _, target, weight = some()
    scale = target_scale(1000 * target.astype(np.float32), LOSSES[name], weight.astype(np.float32))
    assert scale.center == 0 and scale.scale == pytest.approx(1000 * np.average(target, weights=weight), rel=1e-5)
    raw = np.array([[0.0], [1.0], [-2.0]], np.float32)
    assert to_scores(LOSSES[name], raw, scale).tolist() == pytest.approx(
        (scale.scale * np.exp(raw[:, 0])).tolist(), rel=1e-6
    )
    assert target_scale(np.zeros(5, np.float32), LOSSES["poisson"]) == PLAIN


@pytest.mark.parametrize(("name", "wrong", "must"), [
    ("poisson", -1.0, "finite and 0 or more"), ("tweedie", -0.5, "finite and 0 or more"), ("gamma", 0.0, "finite and above 0"),
    ("focal", 0.5, "0 or 1"), ("ordinal", 3.0, "a class 0 to 2"), ("quantiles", np.inf, "finite"), ("gamma", np.nan, "finite"),
])  # fmt: skip
def test_the_first_wrong_target_is_named(name: str, wrong: float, must: str) -> None:
    target = np.ones(5, np.float32)
    check_targets(target, ROWS[:5] * 10, LOSSES[name], LOSSES[name].outputs(3))
    target[3] = wrong
    with pytest.raises(UserError, match=rf"target must be {must}.* for train.loss={name}, found .* in dataset row 30"):
        check_targets(target, ROWS[:5] * 10, LOSSES[name], LOSSES[name].outputs(3))


# ------------------------------------------------------------------------------------------------------------ quantiles


@given(st.data())
def test_quantiles_never_cross_and_are_those_that_the_loss_trains(data: st.DataObject) -> None:
    levels = tuple(sorted(data.draw(st.sets(st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]), min_size=1))))
    loss = of("quantiles", quantiles=levels)
    outputs = np.array(
        data.draw(st.lists(st.lists(st.floats(-200, 200), min_size=len(levels), max_size=len(levels)), min_size=1))
    )
    found = loss.link(outputs)  # type: ignore[misc]
    assert (np.diff(found, axis=1) > 0).all() or np.abs(outputs).max() > 30  # a gap below one rounding is none
    assert (np.diff(found, axis=1) >= 0).all()
    target = np.full(len(outputs), 1.7)
    ours = rows_of(loss, outputs, target)
    theirs = np.mean([
        np.maximum(level * (target - found[:, k]), (level - 1) * (target - found[:, k])) for k, level in enumerate(levels)
    ], axis=0)  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_outputs_of_zero_are_the_quantiles_of_a_normal_target() -> None:
    stats = pytest.importorskip("scipy.stats")
    loss = of("quantiles", quantiles=(0.025, 0.5, 0.8))
    found = loss.link(np.zeros((2, 3)))  # type: ignore[misc]
    np.testing.assert_allclose(found, np.tile(stats.norm.ppf([0.025, 0.5, 0.8]), (2, 1)), atol=1e-12)
    scale = target_scale(np.random.default_rng(0).normal(50, 4, 9000).astype(np.float32), loss)
    np.testing.assert_allclose(to_scores(loss, np.zeros((1, 3), np.float32), scale)[0], found[0] * 4 + 50, atol=0.2)


def test_metrics_of_quantiles_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    levels, target, weight = (0.1, 0.4, 0.95), rng.normal(size=N), rng.uniform(0.1, 2, N)
    scores = np.sort(rng.normal(size=(N, 3)), axis=1)
    ours = point_metrics(target, scores, recorded_loss({"loss": "quantiles", "quantiles": list(levels)}), weight=weight)
    pinball = [
        oracle.mean_pinball_loss(target, scores[:, k], alpha=a, sample_weight=weight) for k, a in enumerate(levels)
    ]
    assert ours["pinball"] == pytest.approx(np.mean(pinball), rel=1e-12)
    assert ours["mae"] == pytest.approx(
        oracle.mean_absolute_error(target, scores[:, 1], sample_weight=weight), rel=1e-12
    )
    inside = np.average((scores[:, 0] <= target) & (target <= scores[:, 2]), weights=weight)
    assert ours["coverage_error"] == pytest.approx(abs(inside - 0.85), rel=1e-9)


# -------------------------------------------------------------------------------------------------------------- ordinal


@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 3.0, 60.0]))
def test_probabilities_of_ordered_classes_are_what_the_loss_trains(classes: int, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    loss = LOSSES["ordinal"]
    outputs = rng.normal(0, size, (50, loss.outputs(classes)))
    shares = loss.link(outputs)  # type: ignore[misc]
    assert shares.shape == (50, classes) and (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)
    target = rng.integers(0, classes, 50)
    found, real = rows_of(loss, outputs, target.astype(float)), shares[np.arange(50), target]
    seen = real > 1e-8  # below, 1 - sigmoid loses digits that the loss keeps
    np.testing.assert_allclose(found[seen], -np.log(real[seen]), rtol=1e-6, atol=1e-7)
    assert np.isfinite(found).all()


def test_outputs_of_zero_are_equal_shares_and_two_ordered_classes_are_a_logistic_model() -> None:
    np.testing.assert_allclose(LOSSES["ordinal"].link(np.zeros((1, 4))), np.full((1, 5), 0.2), atol=1e-12)  # type: ignore[misc]
    outputs, target = some()[0], (some()[1] > 2).astype(float)
    np.testing.assert_allclose(
        rows_of(LOSSES["ordinal"], outputs, target), rows_of(LOSSES["binary"], -outputs, target), rtol=1e-9
    )


def test_metrics_of_ordered_classes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    target, scores, weight = rng.integers(0, 5, N), rng.dirichlet(np.ones(5), N), rng.uniform(0.1, 2, N)
    scores[np.arange(N), target] += 0.3
    chosen = scores.argmax(axis=1)
    ours = point_metrics(target, scores, LOSSES["ordinal"], weight=weight)
    kappa = oracle.cohen_kappa_score(target, chosen, weights="quadratic", sample_weight=weight)
    assert ours["quadratic_kappa"] == pytest.approx(kappa, rel=1e-9)
    distance = oracle.mean_absolute_error(target, chosen, sample_weight=weight)
    assert ours["class_distance"] == pytest.approx(distance, rel=1e-12)
    one = np.eye(5)[np.ones(9, int)]
    assert np.isnan(point_metrics(np.ones(9), one, LOSSES["ordinal"])["quadratic_kappa"])


# -------------------------------------------------------------------------------------------------------------- classes


def test_the_focal_loss_is_the_papers_and_without_gamma_the_binary_one() -> None:
    outputs, target = some()[0] * 5, (some()[1] > 2).astype(float)
    right = np.where(target == 1, 1 / (1 + np.exp(-outputs[:, 0])), 1 / (1 + np.exp(outputs[:, 0])))
    np.testing.assert_allclose(
        rows_of(of("focal", focal_gamma=1.7), outputs, target), -((1 - right) ** 1.7) * np.log(right)
    )
    binary = rows_of(LOSSES["binary"], outputs, target)
    np.testing.assert_allclose(rows_of(of("focal", focal_gamma=0.0), outputs, target), binary, rtol=1e-9)
    far = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    of("focal", focal_gamma=0.5).row_losses(far, torch.tensor([1.0, 1.0])).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all() and far.grad[1] == -1


def test_the_focal_loss_of_classes_is_the_papers_and_of_two_classes_the_binary_one() -> None:
    rng = np.random.default_rng(3)
    outputs, target = rng.normal(0, 3, (N, 4)), rng.integers(0, 4, N).astype(float)
    right = LOSSES["multiclass"].link(outputs)[np.arange(N), target.astype(int)]  # type: ignore[misc]
    ours = rows_of(of("multiclass_focal", focal_gamma=1.7), outputs, target)
    np.testing.assert_allclose(ours, -((1 - right) ** 1.7) * np.log(right), rtol=1e-9)
    plain = rows_of(LOSSES["multiclass"], outputs, target)
    np.testing.assert_allclose(rows_of(of("multiclass_focal", focal_gamma=0.0), outputs, target), plain, rtol=1e-9)
    pair, one = np.stack([np.zeros(N), outputs[:, 0]], axis=1), (target > 1).astype(float)
    np.testing.assert_allclose(
        rows_of(LOSSES["multiclass_focal"], pair, one), rows_of(LOSSES["focal"], outputs[:, :1], one), rtol=1e-9
    )
    far = torch.tensor([[300.0, 0.0, 0.0], [-300.0, 0.0, 0.0]], requires_grad=True)
    of("multiclass_focal", focal_gamma=0.5).row_losses(far, torch.tensor([0.0, 0.0])).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all() and far.grad[1, 0] == -1


def test_label_smoothing_spreads_a_share_of_the_target_over_all_classes() -> None:
    rng = np.random.default_rng(2)
    outputs, target = rng.normal(size=(N, 4)), rng.integers(0, 4, N).astype(float)
    logs = np.log(LOSSES["multiclass"].link(outputs))  # type: ignore[misc]
    wanted = 0.9 * np.eye(4)[target.astype(int)] + 0.1 / 4
    np.testing.assert_allclose(
        rows_of(of("multiclass", label_smoothing=0.1), outputs, target), -(wanted * logs).sum(axis=1)
    )
    two = np.stack([np.zeros(N), outputs[:, 0]], axis=1)
    np.testing.assert_allclose(
        rows_of(of("binary", label_smoothing=0.1), outputs[:, :1], (target > 1).astype(float)),
        rows_of(of("multiclass", label_smoothing=0.1), two, (target > 1).astype(float)),
    )


# ----------------------------------------------------------------------------------------------------------- everywhere


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_score_does_not_depend_on_the_rows_beside_it_and_sums_of_blocks_add_up_to_the_metric(name: str) -> None:
    rng = np.random.default_rng(0)
    loss, classes = LOSSES[name], 2 if LOSSES[name].task == "binary" else 4
    raw = rng.normal(0, 3, (N, loss.outputs(classes))).astype(np.float32)
    target = (
        rng.integers(0, classes, N).astype(np.float32) if not loss.number else rng.gamma(1, 1, N).astype(np.float32)
    )
    scale = target_scale(target, loss)
    scores = to_scores(loss, raw, scale)
    assert (
        scores.shape == ((N, len(loss.columns("abcd"))) if loss.columns("abcd") else (N,))
        and scores.dtype == np.float32
    )
    assert (
        np.concatenate([to_scores(loss, raw[k : k + 1], scale) for k in range(50)]).tobytes() == scores[:50].tobytes()
    )
    weight, blocks = rng.integers(0, 4, N) / 2, np.arange(N) // 40
    rows = Rows(target.astype(float), scores.astype(float), loss.levels, weight=weight, power=loss.power)
    for metric in loss.metrics.values():
        sums = metric.in_blocks(rows, *numbered_blocks(blocks))
        assert sums.whole() == pytest.approx(metric.point(rows), rel=1e-9), metric.name
        assert np.isfinite(sums.whole()) and metric.task == loss.task, metric.name


@pytest.mark.parametrize("name", sorted(TABLE))
def test_gradients_of_a_loss_are_those_of_its_values(name: str) -> None:
    loss = LOSSES[name]
    rng = np.random.default_rng(1)
    outputs = torch.from_numpy(
        rng.normal(size=(6, loss.outputs(4 if loss.task == "multiclass" else 2)))
    ).requires_grad_()
    target = torch.from_numpy(rng.integers(1, 2, 6).astype(float))
    assert torch.autograd.gradcheck(lambda found: loss.row_losses(found, target), outputs)


def test_a_record_of_a_loss_gives_it_back_and_holds_only_what_scores_and_metrics_read() -> None:
    config = TrainConfig(loss="quantiles", quantiles=(0.2, 0.8), quantile=0.3)
    assert loss_record(config) == {"loss": "quantiles", "quantile": 0.3, "quantiles": [0.2, 0.8]}
    assert recorded_loss(loss_record(config)).columns(()) == loss_of(config).columns(()) == ("q20", "q80")
    assert loss_record(TrainConfig()) == {"loss": "binary", "quantile": 0.5}
    assert recorded_loss(loss_record(TrainConfig(loss="tweedie", tweedie_power=1.2))).power == 1.2
    assert recorded_loss({"loss": "squared", "quantile": 0.3}).levels == (0.3,)
    with pytest.raises(UserError, match=r"loss must be one of binary, .*, found 'poison'.* 'poisson'"):
        recorded_loss({"loss": "poison"})


def test_class_weights_of_ordered_classes_count_all_of_them() -> None:
    config, target = TrainConfig(loss="ordinal", class_weight="balanced"), np.array([0.0, 0, 0, 1, 2, 2])
    found = class_weights(target, config, LOSSES["ordinal"].outputs(3))
    assert found is not None and found.tolist() == pytest.approx([6 / 9, 2, 1])
    assert class_weights(target, dataclasses.replace(config, loss="poisson"), 1) is None


@pytest.mark.parametrize(("words", "message"), [
    ({"quantiles": [0.5, 0.1]}, r"quantiles must be rising levels, as in \[0.1, 0.5, 0.9\], found \[0.5, 0.1\]"),
    ({"quantiles": []}, "quantiles must be rising levels"),
    ({"loss": "focal", "label_smoothing": 0.1}, "label_smoothing needs loss=binary or multiclass, found loss=focal"),
    ({"tweedie_power": 2.0}, "tweedie_power must be less than 2"),
    ({"loss": "poisson", "sampling": "balanced"}, "sampling=balanced needs a loss over classes.* found loss=poisson"),
])  # fmt: skip
def test_settings_that_fit_no_loss_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schema.build(TrainConfig, words, "train")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["poisson", "gamma", "tweedie"])
def test_a_model_with_a_log_link_is_right_on_average_and_better_than_the_mean(
    problem, config, fitted, name: str
) -> None:
    data = problem(3000, task="regression")
    mean = np.exp((data.target - 1000) / 100)
    drawn = np.random.default_rng(0).poisson(mean) if name != "gamma" else mean
    data = packed(data.numeric, data.codes, drawn.astype(float), data.rows)
    result, _ = fitted(config(train__loss=name, train__epochs=8, train__batch_size=256), data, data)
    values = to_scores(
        LOSSES[name], predict_logits(result.model, data.numeric, data.codes, "fp32"), result.model.target
    )
    assert values.mean() == pytest.approx(data.target.mean(), rel=0.15)
    name = f"{name}_deviance"
    loss = next(loss for loss in LOSSES.values() if loss.metric == name)
    constant = point_metrics(data.target, np.full(len(data), data.target.mean()), loss)[name]
    assert result.history[result.best_epoch][f"valid_{name}"] < 0.6 * constant


def test_several_quantiles_have_their_shares_of_rows_below(problem, config, fitted) -> None:
    data = problem(3000, task="regression")
    noise = np.random.default_rng(0).exponential(200, 3000)
    data = packed(data.numeric, data.codes, data.target + noise, data.rows)
    settings = config(
        train__loss="quantiles",
        train__quantiles=(0.1, 0.5, 0.9),
        train__epochs=10,
        train__batch_size=256,
        model__dropout=0.0,
    )
    loss = loss_of(settings.train)
    result, _ = fitted(settings, data, data, outputs=[loss.outputs(0)])
    values = to_scores(loss, predict_logits(result.model, data.numeric, data.codes, "fp32"), result.model.target)
    below = (data.target[:, None] < values).mean(axis=0)
    assert np.abs(below - [0.1, 0.5, 0.9]).max() < 0.06, below
    assert result.history[-1]["valid_coverage_error"] < 0.1


def test_ordered_classes_are_learned(problem, config, fitted) -> None:
    data, valid = problem(2000, task="multiclass"), problem(1000, seed=1, task="multiclass")
    result, _ = fitted(
        config(train__loss="ordinal", train__epochs=10, train__batch_size=256),
        data,
        valid,
        outputs=[LOSSES["ordinal"].outputs(3)],
    )
    assert result.history[-1]["valid_quadratic_kappa"] > 0.85
