"""Multiply-adds of a forward pass: closed forms, and torch's own counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.config.sections.training import ModelConfig
from engine.training.model import build_model
from engine.training.operations import multiply_adds

N = 4


class Called(nn.Module):
    """A part called on the numbers, as rows [n, 6] or as steps [n, 6, 1] or [n, 1, 6]."""

    def __init__(self, part: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.part, self.shape = part, shape

    def forward(self, numeric: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        found = self.part(numeric.view(-1, *self.shape))
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("part", "shape", "expected"), [
    (nn.Linear(6, 5), (6,), 35),  # five biases, of at least one a parameter
    (nn.Linear(6, 5, bias=False), (6,), 30),
    (nn.Sequential(nn.Linear(6, 5, bias=False), nn.Dropout(0.5), nn.Linear(5, 7, bias=False)), (6,), 65),
    (nn.Linear(1, 5), (6, 1), 30),  # a layer over six steps counts six times
    (nn.Conv1d(1, 3, 3, padding=1), (1, 6), 6 * 3 * 3),
    (nn.LSTM(1, 5, 1, batch_first=True), (6, 1), 6 * (4 * 5 * 1 + 4 * 5 * 5)),
    (nn.Embedding(1000, 2), (6,), 2000),  # multiplies nothing: at least one a parameter
])  # fmt: skip
def test_products_convolutions_and_cells_count(part: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    numeric = torch.zeros(N, 6, dtype=torch.int64 if isinstance(part, nn.Embedding) else torch.float32)
    assert multiply_adds(Called(part, shape).train(), numeric, torch.zeros(N, 0)) == expected


def test_a_module_that_raises_has_work_for_any_number_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(ModelConfig(), 3, [5], 1, 0)
    assert network.work > 0
    del network.work
    monkeypatch.setattr(type(network.module), "forward", lambda self, *_: self.missing)
    assert network.work == math.inf


@pytest.mark.slow  # torch's counter imports its compiler
@pytest.mark.parametrize("kind", ["mlp", "linear", "tabm", "wide_and_deep"])
def test_it_is_what_torch_counts(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = build_model(ModelConfig(kind=kind, embeddings="periodic"), 7, [5, 300], 3, 0)
    with FlopCounterMode(display=False) as counter:
        network.build()(*network._trial_rows())
    counted = counter.get_total_flops() / 2 / N
    assert counted > 0
    assert network.work == max(counted, sum(item.numel() for item in network.parameters()))
