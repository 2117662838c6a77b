"""Contributions of a network's inputs: those of the definition, that add up, with the same bits in any batch."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from engine.config.sections.training import ModelConfig
from engine.errors import UserError
from engine.training import kinds
from engine.training.finished import FinishedNetwork
from engine.training.model import build_model
from engine.training.path_gradients import TIMES, WEIGHTS, Typical
from tests.training.conftest import CARDINALITIES, make_config, make_problem, train
from tests.training.test_modules import MODULES, settled

BUILT_IN = {
    "mlp": {}, "ple": {"kind": "mlp", "embeddings": "ple", "bins": 4}, "periodic": {"kind": "mlp", "embeddings": "periodic"},
    "linear": {}, "tabm": {"members": 3}, "wide_and_deep": {},
}  # fmt: skip


def finished(config: ModelConfig, outputs: int = 2) -> FinishedNetwork:
    """A network that was not trained, whose weights are far from those that it began with."""
    data = make_problem(93)
    fitted = kinds.fit_arrays(config.kind, kinds.settings_of(config), data.numeric, data.codes, data.target)
    network = build_model(config, 4, CARDINALITIES, outputs, 1, fitted)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return FinishedNetwork(network, "fp32", typical=Typical.of(data, CARDINALITIES))


def built_in(name: str, **more: object) -> FinishedNetwork:
    return finished(ModelConfig(**{"kind": name, "hidden": (16, 8), **BUILT_IN[name], **more}))


def rows(n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = make_problem(n, seed=3)
    return data.numeric, data.codes, np.random.default_rng(2).normal(size=(n, 2))


def margins(model: FinishedNetwork, numeric: np.ndarray, codes: np.ndarray, share: np.ndarray) -> np.ndarray:
    """How far the margins are from the baseline."""
    found = model.logits(numeric, codes).astype(np.float64)
    found = found.mean(axis=1) if found.ndim == 3 else found
    return ((found - model.baseline()) * share).sum(axis=1)


def slow(model: FinishedNetwork, x: np.ndarray, c: np.ndarray, share: np.ndarray) -> list[float]:
    """The definition for one row."""
    module, typical = model.network.module, model.typical

    def margin(numeric: torch.Tensor, codes: list[int]) -> torch.Tensor:
        out = module(numeric[None], torch.tensor([codes], dtype=torch.int32))
        return ((out.mean(1) if out.dim() == 3 else out)[0] * torch.tensor(share, dtype=torch.float32)).sum()

    base, row = torch.tensor(typical.numeric), torch.tensor(x)
    found = np.zeros(len(x) + len(c))
    for time, weight in zip(TIMES, WEIGHTS, strict=True):
        point = (base + float(time) * (row - base)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(margin(point, list(c if time > 0.5 else typical.codes)), point)
        found[: len(x)] += weight * ((row - base) * gradient).numpy()
    for order in (range(len(c)), reversed(range(len(c)))):
        codes = list(typical.codes)
        for k in order:
            before = margin((base + row) / 2, codes).detach()
            codes[k] = c[k]
            found[len(x) + k] += (margin((base + row) / 2, codes).detach() - before).item() / 2
    return found


@pytest.mark.parametrize("name", ["mlp", "tabm"])
def test_contributions_are_those_of_the_definition(name: str) -> None:
    model, (numeric, codes, share) = built_in(name), rows(3)
    found = model.contributions(numeric, codes, share)
    want = [slow(model, *row) for row in zip(numeric, codes, share, strict=True)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
    assert (np.abs(found).max(axis=0) > 1e-3).all()


@pytest.mark.parametrize("name", [*BUILT_IN, *MODULES])
def test_a_row_has_the_contributions_that_it_has_alone_and_they_add_up(tmp_path, name: str) -> None:
    model = built_in(name) if name in BUILT_IN else finished(settled(tmp_path, name).model)
    numeric, codes, share = rows()
    whole = model.contributions(numeric, codes, share, threads=2)
    for low, high in ((0, 1), (37, 38), (5, 40)):
        part = model.contributions(numeric[low:high], codes[low:high], share[low:high])
        assert part.tobytes() == whole[low:high].tobytes()
    away = margins(model, numeric, codes, share)
    assert np.abs(away).max() > 0.005
    assert np.sqrt(np.mean((away - whole.sum(axis=1)) ** 2)) < 0.06 * np.sqrt(np.mean(away**2))


def test_of_a_linear_model_they_are_exact() -> None:
    model, (numeric, codes, share) = built_in("linear"), rows()
    module, typical = model.network.module, model.typical
    weight, tables = module.weights[0].detach().numpy(), [table.detach().numpy() for table in module.embeddings]
    numbers = (numeric - typical.numeric)[:, :, None] * weight.T[None]
    changes = [table[codes[:, k]] - table[typical.codes[k]] for k, table in enumerate(tables)]
    want = np.concatenate([numbers, np.stack(changes, axis=1)], axis=1) @ share[:, :, None]
    np.testing.assert_allclose(model.contributions(numeric, codes, share), want[:, :, 0], rtol=0, atol=1e-5)


def test_they_add_up_after_training_and_are_linear_in_the_outputs(tmp_path) -> None:
    data = make_problem(800)
    result, _ = train(make_config(tmp_path, train__epochs=4, model__hidden=(64, 64)), data)
    model = FinishedNetwork(result.model, "fp32", typical=Typical.of(data, CARDINALITIES))
    numeric, codes, _ = rows(300)
    one = np.ones((300, 1))
    found, away = model.contributions(numeric, codes, one), margins(model, numeric, codes, one)
    assert np.sqrt(np.mean((away - found.sum(axis=1)) ** 2)) < 0.02 * np.sqrt(np.mean(away**2))
    assert (
        np.abs(found[:, 0]) > np.abs(found[:, 3])
    ).mean() > 0.8  # the target depends on the one and not on the other
    np.testing.assert_allclose(model.contributions(numeric, codes, -3 * one), -3 * found, rtol=1e-5, atol=1e-5)


def test_a_typical_row_has_medians_and_the_most_frequent_codes() -> None:
    data = make_problem(200)
    data.codes[:90, 0] = 6
    found = Typical.of(data, CARDINALITIES)
    assert found.codes[0] == 6 and found.codes[1] == np.bincount(data.codes[:, 1]).argmax()
    assert found.numeric.tolist() == np.sort(data.numeric, axis=0)[99].tolist()
    again = Typical.read(found.record())
    assert again.numeric.tobytes() == found.numeric.tobytes() and again.codes.tolist() == found.codes.tolist()


def test_a_network_that_cannot_be_explained_says_so() -> None:
    numeric, codes, share = rows(2)
    with pytest.raises(UserError, match="train it again"):
        dataclasses.replace(built_in("mlp"), typical=None).contributions(numeric, codes, share)

    class Closed(nn.Linear):
        def forward(self, numeric, codes):
            with torch.no_grad():
                return super().forward(numeric)

    model = built_in("linear")
    model.network.build = lambda: Closed(4, 2)
    with pytest.raises(UserError, match="no gradients by its numbers"):
        model.contributions(numeric, codes, share)
