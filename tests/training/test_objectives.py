"""Several targets of one network: masks, weights and gradients, the same bytes for any workers, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.training.gpu.stepper import GpuStepper
from engine.training.loop import fit
from engine.training.losses import LOSSES
from engine.training.objectives import Objective, label_inputs, places, row_losses
from engine.training.target import TargetScale
from tests.training.conftest import make_problem, weights_of
from tests.training.test_exchange import together

LEARNT = {"minutes": {"column": "minutes", "loss": "huber", "weight": 0.5}}
OUTPUTS = {"outputs": [1, 1]}


def two_targets(n: int, seed: int = 0):
    """Rows of a class and a number; every third has no number, every seventh no class, and none lacks both."""
    data = make_problem(n, seed)
    minutes = 30 + 10 * data.numeric[:, 0] + np.random.default_rng(seed).normal(size=n)
    target = np.stack([data.target, minutes], axis=1).astype(np.float32)
    rows = np.arange(n)
    target[(rows % 7 == 0) & (rows % 3 != 0), 0] = np.nan
    target[rows % 3 == 0, 1] = np.nan
    return replace(data, target=target)


def objectives(*weights: float) -> tuple[Objective, ...]:
    scales = TargetScale(), TargetScale(3.0, 2.0), TargetScale()
    losses = LOSSES["binary"], LOSSES["squared"], LOSSES["multiclass"]
    at = places([1, 1, 3])
    fillers = 0.0, 5.0, 0.0
    return tuple(map(Objective, losses, at, scales, weights, [None] * 3, fillers))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.booleans())
def test_losses_and_gradients_are_those_of_each_present_target_alone(seed: int, members: bool) -> None:
    rng = np.random.default_rng(seed)
    n, each = 12, objectives(1.0, 0.25, 3.0)
    target = np.stack([rng.integers(0, 2, n), rng.normal(3, 2, n), rng.integers(0, 3, n)], axis=1).astype(np.float32)
    target[rng.random((n, 3)) < 0.4] = np.nan
    own = rng.random(n).astype(np.float32)
    values, weight = map(torch.from_numpy, label_inputs(each, target, own))
    logits = torch.from_numpy(rng.normal(size=(n, 2, 5) if members else (n, 5)).astype(np.float32)).requires_grad_()
    (found,) = torch.autograd.grad((row_losses(each, logits, values, weight) * weight).sum(), logits)
    expected, total = torch.zeros_like(logits), 0.0
    for row in range(n):
        for k, (item, times) in enumerate(zip(each, (1.0, 0.25, 3.0), strict=True)):
            if np.isnan(target[row, k]):
                continue
            total += float(own[row]) * times
            one = logits[row].detach().reshape(-1, 5)[:, item.at].clone().requires_grad_()
            value = torch.full((len(one),), float(item.scale.standardised(target[row : row + 1, k])[0]))
            loss = item.loss.row_losses(one, value).mean() * own[row].item() * times
            expected[row].view(-1, 5)[:, item.at] += torch.autograd.grad(loss, one)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(weight.sum()) == pytest.approx(total, rel=1e-5)


def test_outputs_of_a_missing_target_have_no_gradient_though_they_are_infinite() -> None:
    each = objectives(1.0, 1.0, 1.0)
    target = np.array([[1, np.nan, 2], [0, 4, np.nan]], np.float32)
    values, weight = map(torch.from_numpy, label_inputs(each, target, None))
    logits = torch.tensor([[0.3, np.inf, 0, 1, 2], [0.1, 0.2, np.nan, np.inf, 0]], requires_grad=True)
    losses = row_losses(each, logits, values, weight)
    (found,) = torch.autograd.grad((losses * weight).sum(), logits)
    assert torch.isfinite(losses).all() and torch.isfinite(found).all()
    assert found[0, 1] == 0 and not found[1, 2:].any() and found[0, 0] != 0 and found[1, 1] != 0


@pytest.mark.parametrize("world", [2, 3])
def test_weights_of_two_targets_are_the_same_for_any_number_of_workers(config, fitted, new_run, world) -> None:
    keys = config(train__targets=LEARNT)
    data, valid = two_targets(500), two_targets(300, 1)
    alone, _ = fitted(keys, data, valid, **OUTPUTS)
    run, facts = new_run(keys), {"dataset_digest": "data", "precision": "fp32", "cardinalities": [7, 5], **OUTPUTS}
    for result in together(world, lambda exchange: fit(data, valid, keys, run, exchange=exchange, **facts)):
        assert weights_of(result.model) == weights_of(alone.model)
        assert [entry["valid_minutes/mae"] for entry in result.history] == [
            entry["valid_minutes/mae"] for entry in alone.history
        ]


def test_the_device_loop_comes_to_the_weights_of_the_cpu_loop(config, fitted, new_run) -> None:
    keys = config(train__targets=LEARNT, train__log_every=4)
    data, valid = two_targets(430), two_targets(100, 1)
    want, _ = fitted(keys, data, valid, **OUTPUTS)
    facts = {"dataset_digest": "data", "precision": "fp32", "cardinalities": [7, 5], **OUTPUTS}
    gpu = functools.partial(GpuStepper, device="cpu", runner="eager")
    found = fit(data, valid, keys, new_run(keys), make_stepper=gpu, **facts)
    for one, other in zip(want.model.parameters(), found.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_every_target_learns_from_its_own_rows(config, fitted) -> None:
    result, _ = fitted(config(train__targets=LEARNT, train__epochs=6), two_targets(900), two_targets(300, 1), **OUTPUTS)
    last = result.history[-1]
    assert last["valid_roc_auc"] > 0.8 and last["valid_minutes/mae"] < 4
    scales = result.model.targets
    assert scales[0] == TargetScale() and scales[1].center == pytest.approx(30, abs=2)


def test_early_stopping_watches_the_main_target(config, fitted) -> None:
    data, valid = two_targets(200), two_targets(100, 1)
    valid.target[:, 0] = np.random.default_rng(2).integers(0, 2, 100)  # no epoch is better but by chance
    result, _ = fitted(config(train__targets=LEARNT, train__epochs=6), data, valid, **OUTPUTS)
    seen = [entry["valid_roc_auc"] for entry in result.history]
    assert result.best_epoch == int(np.argmax(seen)) < len(seen) - 1
    assert result.best_epoch != int(np.argmin([entry["valid_minutes/mae"] for entry in result.history]))


def test_a_wrong_value_of_any_target_is_refused_with_its_row(config, fitted) -> None:
    data = two_targets(60)
    data.target[4, 1] = np.inf
    with pytest.raises(
        UserError, match=r"must be finite .* for train.targets.minutes.loss=huber, found inf in dataset row 23"
    ):
        fitted(config(train__targets=LEARNT), data, **OUTPUTS)
