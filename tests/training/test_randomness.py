"""Dropout of any torch module is a function of seed, step and row; all other randomness is refused by name."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError
from engine.training.randomness import AllKept, ShardMasks, backward_begins, drawn_from, moved, state
from kernels.dropout import bf16_bits, dropout_mask

ROWS = np.arange(6) * 7 + 3
X = torch.linspace(-1, 1, 6 * 8).view(6, 8) + 2


def masks(rows: np.ndarray = ROWS, step: int = 2, shard: int = 0) -> ShardMasks:
    return ShardMasks(rows, 5, step, shard)


def test_dropout_has_the_masks_of_the_kernel_by_call() -> None:
    with drawn_from(masks()):
        found = [F.dropout(X, 0.3), nn.Dropout(0.3)(X)]
    for call, tensor in enumerate(found):
        want = dropout_mask(ROWS, 8, 5, 2, call, 0.3, np.empty((6, 8), np.float32))
        assert tensor.numpy().tobytes() == (X.numpy() * want).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_its_mask_wherever_it_stands(dtype: torch.dtype) -> None:
    order = np.array([4, 0, 5, 2, 1, 3])
    layers = (
        lambda x: F.dropout(x, 0.4),
        lambda x: x * torch.empty_like(x).bernoulli_(0.7),
        lambda x: F.dropout1d(x.view(6, 2, 4), 0.5),
        lambda x: F.alpha_dropout(x, 0.2, True),
        lambda x: F.dropout(x.view(12, 4), 0.4),  # rows times heads
    )
    for layer in layers:
        with drawn_from(masks()):
            whole = layer(X.to(dtype))
        with drawn_from(masks(ROWS[order])):
            mixed = layer(X[order].to(dtype))
        assert torch.equal(whole.view(6, -1)[order], mixed.view(6, -1)) and not torch.equal(
            whole.view(6, 8), X.to(dtype)
        )


def test_a_tensor_without_rows_in_front_has_masks_by_shard() -> None:
    found = []
    for shard in (0, 0, 1):
        with drawn_from(masks(shard=shard)):
            found.append(F.dropout(torch.ones(5, 6, 8), 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert 0.3 < float((found[0] == 0).float().mean()) < 0.7


def test_layers_inside_torch_draw_from_the_masks_too() -> None:
    torch.manual_seed(0)
    lstm, encoder = nn.LSTM(8, 4, 2, dropout=0.5), nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)
    for module, calls in ((lstm, 1), (encoder, 4)):
        kept, before = AllKept(), state()
        with drawn_from(kept):
            module(X.view(6, 1, 8))
        assert kept.calls == calls
        moved(before)


def test_without_masks_torch_is_as_it_was() -> None:
    with drawn_from(masks()):
        pass
    torch.manual_seed(3)
    ours = F.dropout(torch.ones(100), 0.5), torch.rand(3), torch.randperm(5), torch.empty(4).bernoulli_(0.5)
    torch.manual_seed(3)
    again = F.dropout(torch.ones(100), 0.5), torch.rand(3), torch.randperm(5), torch.empty(4).bernoulli_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert set(ours[0].tolist()) == {0.0, 2.0} and len(set(ours[1].tolist())) == 3


def test_another_thread_has_no_masks_and_is_noticed() -> None:
    before, found = state(), []
    with drawn_from(masks()):
        thread = threading.Thread(target=lambda: found.append(torch.rand(2)))
        thread.start()
        thread.join()
    assert len(found) == 1
    with pytest.raises(UserError, match="a thread of its own"):
        moved(before)


REFUSED = {
    "rand": lambda: torch.rand(3),
    "rand of a generator": lambda: torch.rand(3, generator=torch.Generator()),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(0, 4, (3,)),
    "randperm": lambda: torch.randperm(4),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "rrelu": lambda: F.rrelu(X, training=True),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.5)),
    "bernoulli_ of a generator": lambda: torch.empty(3).bernoulli_(0.5, generator=torch.Generator()),
    "multinomial": lambda: torch.multinomial(torch.ones(4), 2),
    "poisson": lambda: torch.poisson(torch.ones(3)),
    "fractional_max_pool": lambda: F.fractional_max_pool2d(torch.ones(1, 1, 8, 8), 2, output_ratio=(0.5, 0.5)),
    "kaiming": lambda: nn.init.kaiming_uniform_(torch.empty(3, 3)),
    "gamma": lambda: torch.distributions.Gamma(1.0, 1.0).sample(),
    "normal": lambda: torch.distributions.Normal(0.0, 1.0).rsample(),
    "random_": lambda: torch.empty(3).random_(),
    "exponential_": lambda: torch.empty(3).exponential_(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_randomness_is_refused_by_name(name: str) -> None:
    with drawn_from(masks()), pytest.raises(UserError, match=r"no randomness but dropout.*aten::\w+"):
        REFUSED[name]()


def test_a_mask_computed_again_in_the_backward_pass_is_refused() -> None:
    with drawn_from(masks()):
        F.dropout(X, 0.1)
        backward_begins()
        with pytest.raises(UserError, match="activation checkpointing"):
            F.dropout(X, 0.1)


@pytest.mark.parametrize("value", [1.0, 1 / 0.9, 1 / 0.65, 3.0000001, 1.00390625, 1.01171875, 65504.0])
def test_bits_of_bf16_are_those_of_torch(value: float) -> None:
    assert int(bf16_bits(np.float32(value))) == int(torch.tensor(value).bfloat16().view(torch.int16))


@pytest.mark.slow
def test_threads_that_begin_together_replace_the_kernels_once() -> None:
    script = """
import sys, threading, torch
from engine.training import randomness
sys.setswitchinterval(1e-6)
barrier, found = threading.Barrier(8), []
def work():
    barrier.wait()
    found.append(randomness.install())
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(set(map(id, found))) == 1, "installed more than once"
del found
assert torch.nn.functional.dropout(torch.ones(64), 0.5, True).shape == (64,)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
