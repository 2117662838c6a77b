"""Optimizers, schedules and averaged weights against torch, and the same bytes for threads, workers, stops and chunks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.config.sections.training import OPTIMIZERS, SCHEDULES
from engine.training.cpu_stepper import CpuStepper
from engine.training.flat import FlatWeights
from engine.training.loop import fit
from engine.training.model import build_model
from engine.training.optimizers import AVERAGE, Averaged, Lion, make_optimizer, orthogonalised
from engine.training.schedule import learning_rate
from tests.training.conftest import CARDINALITIES, open_run, weights_of
from tests.training.test_exchange import fit_together

STEPS = 12


def flat_of(config: Any, **keys: Any) -> tuple[FlatWeights, Any]:
    settings = config(**keys)
    flat = FlatWeights(build_model(settings.model, 4, CARDINALITIES, 1, 0), "fp32", settings.train.decay)
    return flat, make_optimizer(flat, settings.train)


def moved(flat: FlatWeights, optimizer: Any, steps: int = STEPS) -> None:
    """Updates by gradients that are a function of the step."""
    for step in range(steps):
        optimizer.step(flat.values, gradient_of(flat, step), 0.01)


def gradient_of(flat: FlatWeights, step: int) -> torch.Tensor:
    found = torch.zeros(flat.size)
    generator = torch.Generator().manual_seed(step)
    for view in flat.views(found):
        view.copy_(torch.randn(view.shape, generator=generator))
    return found


def twin(flat: FlatWeights) -> dict[str, nn.Parameter]:
    """Parameters of their own with the same values."""
    return {name: nn.Parameter(view.clone()) for name, view in zip(flat.names, flat.views(flat.values), strict=True)}


def follow(flat: FlatWeights, theirs: dict[str, nn.Parameter], *optimizers: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        for parameter, view in zip(theirs.values(), flat.views(gradient_of(flat, step)), strict=True):
            parameter.grad = view.clone()
        for optimizer in optimizers:
            optimizer.step()


def close(flat: FlatWeights, theirs: dict[str, nn.Parameter], **tolerance: float) -> None:
    for name, view in zip(flat.names, flat.views(flat.values), strict=True):
        torch.testing.assert_close(view, theirs[name].detach(), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=name)


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_is_torchs_with_the_same_parameter_groups(config, name: str, decay: str) -> None:
    flat, optimizer = flat_of(config, train__optimizer=name, train__decay=decay, train__weight_decay=0.1)
    theirs = twin(flat)
    spared = [parameter for key, parameter in theirs.items() if "embeddings" in key or "biases" in key]
    groups = [{"params": list(theirs.values())}] if decay == "all" else [
        {"params": [p for p in theirs.values() if not any(p is other for other in spared)]},
        {"params": spared, "weight_decay": 0.0},
    ]  # fmt: skip
    made = {"adamw": torch.optim.AdamW, "sgd": lambda given, **more: torch.optim.SGD(given, momentum=0.9, **more)}
    follow(flat, theirs, made[name](groups, lr=0.01, weight_decay=0.1))
    moved(flat, optimizer)
    close(flat, theirs)


def test_lion_is_the_algorithm_of_the_paper(config) -> None:
    flat, optimizer = flat_of(config, train__optimizer="lion", train__weight_decay=0.1)
    values, momentum = flat.values.double().numpy().copy(), np.zeros(flat.size)
    for step in range(STEPS):
        gradient = gradient_of(flat, step).double().numpy()
        values -= 0.01 * (np.sign(0.9 * momentum + 0.1 * gradient) + 0.1 * values)
        momentum = 0.99 * momentum + 0.01 * gradient
    moved(flat, optimizer)
    np.testing.assert_allclose(flat.values.numpy(), values, atol=1e-5)


def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest(config) -> None:
    flat, optimizer = flat_of(config, train__optimizer="muon", train__momentum=0.95, train__weight_decay=0.1)
    hidden = list(flat.matrices())
    assert hidden == ["weights.0", "weights.1"], "the last matrix makes the outputs"
    theirs = twin(flat)
    matrices, rest = [theirs[name] for name in hidden], [p for name, p in theirs.items() if name not in hidden]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    follow(flat, theirs, muon, torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1))
    moved(flat, optimizer)
    for name, ours in zip(flat.names, flat.views(flat.values), strict=True):
        # Torch orthogonalises in bf16, which is off by a per cent or two of an update.
        torch.testing.assert_close(ours, theirs[name].detach(), rtol=0, atol=0.02 if name in hidden else 1e-6, msg=name)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((40, 12), (12, 40), (25, 25)):
        matrix = torch.randn(shape, generator=rng)
        values = torch.linalg.svdvals(orthogonalised(matrix))
        assert 0.5 < values.min() and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(orthogonalised(matrix).flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert not orthogonalised(torch.zeros(3, 4)).isnan().any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_nothing_and_state_continues_where_it_was(config, name: str) -> None:
    keys = {"train__optimizer": name, "train__ema": 0.9, "train__decay": "matrices"}
    flat, optimizer = flat_of(config, **keys)
    moved(flat, optimizer, 3)
    before = copy.deepcopy({"values": flat.values, **optimizer.state()})
    optimizer.step(flat.values, torch.full((flat.size,), torch.nan), torch.tensor(0.01), torch.tensor(1.0))
    for key, tensor in {"values": flat.values, **optimizer.state()}.items():
        assert torch.equal(tensor, before[key]), key
    again, fresh = flat_of(config, **keys)
    again.load({"weights": flat.values})
    fresh.load(optimizer.state())
    for step in range(3, 6):
        optimizer.step(flat.values, gradient_of(flat, step), torch.tensor(0.01), torch.tensor(0.0))
        fresh.step(again.values, gradient_of(flat, step), torch.tensor(0.01), torch.tensor(0.0))
    assert torch.equal(flat.values, again.values)
    assert all(torch.equal(tensor, fresh.state()[key]) for key, tensor in optimizer.state().items())


def test_the_average_is_that_of_the_weights_after_each_update() -> None:
    values = torch.zeros(32)
    averaged = Averaged(Lion(32, [(slice(0, 32), 0.0)]), values, 0.7)
    expected, seen = np.zeros(32), np.zeros(32)
    for step in range(20):
        averaged.step(values, torch.full((32,), 1.0 if step % 3 else -1.0), 0.1)
        seen = values.numpy()
        decay = min(0.7, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * seen
    np.testing.assert_allclose(averaged.state()[AVERAGE].numpy(), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ schedules


def test_a_cycle_is_that_of_torch_and_others_begin_and_end_where_they_say() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=50, pct_start=0.3, cycle_momentum=False
    )
    for step in range(50):
        assert learning_rate("one_cycle", step, 50, 0.3, 0.3) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < 49:
            theirs.step()
    rates = {kind: [learning_rate(kind, step, 10, 2.0, 0.2) for step in range(10)] for kind in SCHEDULES}
    assert rates["constant"] == [1.0] + [2.0] * 9
    assert rates["linear"] == pytest.approx([1.0, 2.0, *(2 * (1 - k / 8) for k in range(8))])
    assert rates["cosine"] == [1.0, 2.0, *(0.5 * 2 * (1 + np.cos(np.pi * k / 8)) for k in range(8))]
    for kind in SCHEDULES:
        for total, warmup in ((1, 0.0), (1, 0.9), (2, 0.5), (7, 0.05)):
            assert all(0 < learning_rate(kind, step, total, 2.0, warmup) <= 2.0 for step in range(total)), (kind, total)


# ------------------------------------------------------------------------------------------------------------- training

CHOICES = [{"train__optimizer": name, "train__decay": "matrices", "train__ema": 0.9} for name in OPTIMIZERS]
CHOICES += [{"train__schedule": kind} for kind in SCHEDULES[1:]]


@pytest.mark.parametrize("keys", CHOICES, ids=lambda keys: "-".join(map(str, keys.values())))
def test_threads_and_stops_change_no_bit(problem, config, fitted, keys: dict[str, Any]) -> None:
    data, valid = problem(300), problem(100, seed=1)
    whole, _ = fitted(config(train__epochs=3, **keys), data, valid)
    plain, _ = fitted(config(train__epochs=3), data, valid)
    assert weights_of(whole.model) != weights_of(plain.model)
    threads, _ = fitted(config(train__epochs=3, cluster__threads=2, **keys), data, valid)
    assert weights_of(whole.model) == weights_of(threads.model) and whole.history == threads.history
    for worker in fit_together(
        2, config(train__epochs=3, **keys), open_run(config(train__epochs=3, **keys)), data, valid
    ):
        assert weights_of(whole.model) == weights_of(worker.model) and whole.history == worker.history
    settings = config(train__epochs=3, train__checkpoint_every=4, **keys)
    run = open_run(settings)
    again = resumed(settings, run, data, valid)
    assert weights_of(whole.model) == weights_of(again.model) and whole.history == again.history


def resumed(settings: Any, run: Any, data: Any, valid: Any) -> Any:
    """A fit that is stopped at its sixth step, and goes on in the same run."""
    facts: dict[str, Any] = {
        "cardinalities": CARDINALITIES,
        "outputs": [1],
        "dataset_digest": "data",
        "precision": "fp32",
    }
    steps = iter(range(1000))

    def make(job: Any) -> Any:
        stepper = CpuStepper(job)
        inner = stepper.run

        def run_once(step: int) -> Any:
            if next(steps) == 6:
                raise KeyboardInterrupt
            return inner(step)

        stepper.run = run_once  # type: ignore[method-assign]
        return stepper

    with pytest.raises(KeyboardInterrupt):
        fit(data, valid, settings, run, make_stepper=make, **facts)
    result = fit(data, valid, settings, run, **facts)
    assert result.metrics["resumed_from_step"] == 5  # the end of the first epoch
    return result


def test_averaged_weights_are_evaluated_and_become_the_model(problem, config, fitted) -> None:
    data, valid = problem(300), problem(200, seed=1)
    plain, _ = fitted(config(train__epochs=4), data, valid)
    slow, _ = fitted(config(train__epochs=4, train__ema=0.99), data, valid)
    assert [entry["train_loss"] for entry in plain.history] == [entry["train_loss"] for entry in slow.history]
    assert plain.history[0]["valid_log_loss"] != slow.history[0]["valid_log_loss"]
    unwatched, _ = fitted(config(train__epochs=4, train__ema=0.99), data)
    assert weights_of(unwatched.model) != weights_of(fitted(config(train__epochs=4), data)[0].model)


@pytest.mark.parametrize("name", ["sgd", "lion", "muon"])
def test_every_optimizer_learns(problem, config, fitted, name: str) -> None:
    data, valid = problem(2000), problem(1000, seed=1)
    rate = {"sgd": 0.3, "lion": 0.003, "muon": 0.02}[name]
    settings = config(train__optimizer=name, train__lr=rate, train__epochs=6, train__ema=0.9)
    result, _ = fitted(settings, data, valid)
    assert result.history[-1]["valid_roc_auc"] > 0.85
