"""Tiles on a device: the CPU's scores within rounding, whatever the number of rows, slots and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.config import schema
from engine.config.sections.training import ModelConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.scoring.cuda_tiles import DeviceScorer
from engine.scoring.score import device_of
from engine.training.model import Network, build_model
from engine.training.target import TargetScale
from tests.logits import predict_logits
from tests.training.tape import Broken, Taped

SIZES = (7, 5)


@pytest.fixture
def model() -> Network:
    network = build_model(ModelConfig(hidden=(16, 8)), 4, SIZES, 2, 3)
    network.target = TargetScale(5.0, 2.0)
    return network


def blocks(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, n) for size in SIZES], axis=1).astype(np.int32)
    return rng.normal(size=(n, 4)).astype(np.float32), codes


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("slots", [1, 3])
def test_any_number_of_rows_gives_the_scores_of_the_cpu(model: Network, rows: int, slots: int) -> None:
    scorer = DeviceScorer(model, "fp32", "cpu", tile_rows=64, slots=slots)
    numeric, codes = blocks(rows)
    want = predict_logits(model, numeric, codes, "fp32")
    np.testing.assert_allclose(scorer.logits(numeric, codes), want, rtol=1e-5, atol=1e-6)


def test_a_row_has_the_bits_that_it_has_alone(model: Network) -> None:
    scorer = DeviceScorer(model, "bf16", "cpu", tile_rows=64)
    numeric, codes = blocks(300)
    whole = scorer.logits(numeric, codes)
    for row in (0, 63, 64, 299):
        alone = scorer.logits(numeric[row : row + 1], codes[row : row + 1])
        assert alone.tobytes() == whole[row : row + 1].tobytes()


def test_a_captured_forward_pass_repeats_the_eager_one(model: Network) -> None:
    numeric, codes = blocks(300)
    device = Taped()
    captured = DeviceScorer(model, "fp32", "cpu", tile_rows=64, slots=2, graphs=device)
    eager = DeviceScorer(model, "fp32", "cpu", tile_rows=64, slots=2)
    assert device.captures == 2 and not captured.reason
    assert captured.logits(numeric, codes).tobytes() == eager.logits(numeric, codes).tobytes()


def test_a_capture_that_fails_is_told_and_scores_are_the_same(model: Network) -> None:
    numeric, codes = blocks(100)
    scorer = DeviceScorer(model, "fp32", "cpu", tile_rows=64, graphs=Broken())
    assert scorer.reason == "RuntimeError: operation not permitted when stream is capturing"
    eager = DeviceScorer(model, "fp32", "cpu", tile_rows=64)
    assert scorer.logits(numeric, codes).tobytes() == eager.logits(numeric, codes).tobytes()


def test_threads_that_share_a_scorer_get_their_own_rows(model: Network) -> None:
    scorer = DeviceScorer(model, "fp32", "cpu", tile_rows=64)
    parts = [blocks(200, seed) for seed in range(8)]
    want = [scorer.logits(*part).tobytes() for part in parts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda part: scorer.logits(*part).tobytes(), parts)) == want


def test_blocks_on_the_device_are_scored_in_place(model: Network) -> None:
    scorer = DeviceScorer(model, "fp32", "cpu", tile_rows=64)
    numeric, codes = blocks(128)
    out = torch.zeros((128, 2))
    scorer.resident_logits(torch.from_numpy(numeric), torch.from_numpy(codes), out)
    np.testing.assert_allclose(out.numpy(), scorer.logits(numeric, codes), rtol=1e-6)


def test_scoring_on_gpus_is_refused_in_plain_words_where_the_command_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = schema.build(Config, {"cluster": {"gpus_per_worker": 1}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(asked) == "cuda" and device_of(schema.build(Config, {})) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"gpus_per_worker=1 needs an NVIDIA GPU .* found none: torch"):
        device_of(asked)
    assert device_of(schema.build(Config, {})) == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_card_scores_are_those_of_the_cpu(model: Network, precision: str) -> None:
    scorer = DeviceScorer(model, precision, "cuda", tile_rows=1024)
    numeric, codes = blocks(10_000)
    want = predict_logits(model, numeric, codes, precision)
    found = scorer.logits(numeric, codes)
    assert not scorer.reason
    rtol, atol = (1e-4, 1e-4) if precision == "fp32" else (2e-2, 5e-2)
    np.testing.assert_allclose(found, want, rtol=rtol, atol=atol)
    assert scorer.logits(numeric, codes).tobytes() == found.tobytes()
