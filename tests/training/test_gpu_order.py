"""Order and masks in torch's integers are the numbers of the CPU kernels, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.training.gpu import order as gpu_order
from engine.training.gpu.order import combine64, dropout_mask, mix64, permutation, splitmix64, stream_hash
from kernels import dropout, hashing, order

SIZES = [1, 2, 3, 50, 4095, 4096, 4097, 5000, 10_007, 65_536, 65_537, 1_000_003, 2**31 + 5]
SEEDS = [0, 1, 2**62 + 9, 2**63 - 1]
WORDS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 500)


def as_signed(values):
    return torch.from_numpy(np.asarray(values, np.uint64).view(np.int64))


@pytest.mark.parametrize("n", SIZES)
def test_the_order_is_that_of_the_cpu_kernel(n):
    for seed in SEEDS:
        for epoch in (0, 1, 77):
            for start in (0, n // 3, max(n - 50, 0)):
                stop = min(start + 300, n)
                want = order.permutation(start, stop, n, seed, epoch)
                np.testing.assert_array_equal(permutation(start, stop, n, seed, epoch).numpy(), want)


def test_the_order_of_a_whole_epoch_takes_each_row_once():
    for n in (4096, 5000):
        assert sorted(permutation(0, n, n, 3, 1).tolist()) == list(range(n))


def test_positions_outside_are_refused():
    with pytest.raises(ValueError, match="0 <= start <= stop <= n"):
        permutation(3, 9, 8, 0, 0)


def test_hashes_wrap_as_unsigned_numbers_do():
    plain = hashing.mix64
    mixed = np.array([int(plain(np.uint64(int(x) % 2**64))) % 2**64 for x in WORDS], np.uint64)
    np.testing.assert_array_equal(mix64(torch.from_numpy(WORDS)).numpy(), mixed.view(np.int64))
    split = np.array([int(hashing.splitmix64(np.uint64(int(x) % 2**64))) % 2**64 for x in WORDS], np.uint64)
    np.testing.assert_array_equal(splitmix64(torch.from_numpy(WORDS)).numpy(), split.view(np.int64))
    pair = [int(hashing.combine64(np.uint64(7), np.uint64(int(x) % 2**64))) % 2**64 for x in WORDS]
    np.testing.assert_array_equal(combine64(torch.tensor(7), torch.from_numpy(WORDS)).numpy(), as_signed(pair).numpy())


@pytest.mark.parametrize("width", [1, 3, 4, 17, 256])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_masks_are_those_of_the_cpu_kernel(width, p):
    rows = np.random.default_rng(width).integers(0, 2**40, 33)
    for seed, step, layer in ((0, 0, 0), (5, 7, 2), (2**62, 10**9, 11)):
        want = dropout.dropout_mask(rows, width, seed, step, layer, p, np.empty((33, width), np.float32))
        key = int(combine64(combine64(*torch.tensor([seed, step])), torch.tensor(layer)))
        for given in (key, torch.tensor(key)):
            np.testing.assert_array_equal(dropout_mask(torch.from_numpy(rows), width, given, p).numpy(), want)
        low = dropout_mask(torch.from_numpy(rows), width, key, p, torch.bfloat16)
        assert torch.equal(low, torch.from_numpy(want).to(torch.bfloat16))


def test_a_compiled_mask_computes_no_index_that_32_bits_do_not_hold():
    traced = []

    def keep(graph, inputs):
        traced.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    rows, key, steps = torch.arange(10), torch.tensor(12345), gpu_order.lane_steps(256)
    mask = torch.compile(
        lambda *given: dropout_mask(given[0], 256, given[1], 0.1, torch.float32, given[2]), backend=keep
    )
    assert torch.equal(mask(rows, key, steps), dropout_mask(rows, 256, key, 0.1))
    assert traced and torch.arange not in traced


def test_the_keys_of_rounds_and_layers_are_those_of_the_kernels():
    assert (
        gpu_order.permutation_keys(5000, 3, 2).tolist()
        == as_signed(order._keys(np.uint64(3), np.uint64(2), np.uint64(5000))).tolist()
    )


def test_the_hash_of_a_stream_is_that_of_the_loop():
    ids = np.random.default_rng(1).integers(0, 2**40, 33)
    want = int(hashing.hash_u64(ids ^ (np.arange(100, 133) << 24)).sum())
    found = torch.from_numpy(ids)
    assert int(stream_hash(found, 100)) % 2**64 == want
    padded = torch.cat([found, found[:5]])
    assert int(stream_hash(padded, torch.tensor(100), torch.arange(38) < 33)) % 2**64 == want


@pytest.mark.gpu
@pytest.mark.parametrize("n", SIZES)
def test_order_and_masks_are_the_same_on_a_card(n):
    stop = min(n, 100_000)
    assert torch.equal(permutation(0, stop, n, 9, 1, "cuda").cpu(), permutation(0, stop, n, 9, 1))
    rows = torch.arange(min(n, 1000)) * 7
    assert torch.equal(dropout_mask(rows.cuda(), 256, 12345, 0.1).cpu(), dropout_mask(rows, 256, 12345, 0.1))
