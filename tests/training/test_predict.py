"""A row's score has the same bits whoever stands beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config.sections.training import ModelConfig
from engine.training.losses import LOSSES, to_scores
from engine.training.model import architecture, build_model, from_architecture
from engine.training.target import PLAIN, TargetScale
from tests.logits import predict_logits


@pytest.fixture
def model():
    """A model with all parts."""
    return build_model(ModelConfig(hidden=(64, 64)), 5, [9, 4], 1, seed=3)


@pytest.fixture
def rows():
    """1,500 rows."""
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(1500, 5)).astype(np.float32)
    return numeric, np.stack([rng.integers(0, 9, 1500), rng.integers(0, 4, 1500)], axis=1).astype(np.int32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [1, 7, 100, 256, 999])
def test_scores_do_not_depend_on_the_split_or_on_threads(model, rows, precision, cut):
    numeric, codes = rows
    whole = predict_logits(model, numeric, codes, precision, tile_rows=256)
    parts = [
        predict_logits(model, numeric[a : a + cut], codes[a : a + cut], precision, tile_rows=256, threads=1 + a % 3)
        for a in range(0, 1500, cut)
        if cut > 50 or a < 200
    ]
    joined = np.concatenate(parts)
    assert joined.tobytes() == whole[: len(joined)].tobytes()
    assert (
        to_scores(LOSSES["binary"], joined[:5], PLAIN).tobytes()
        == to_scores(LOSSES["binary"], whole, PLAIN)[:5].tobytes()
    )


def test_fp32_predictions_are_those_of_the_plain_module(model, rows):
    numeric, codes = rows
    with torch.no_grad():
        plain = model.module(torch.from_numpy(numeric), torch.from_numpy(codes)).numpy()
    np.testing.assert_allclose(predict_logits(model, numeric, codes, "fp32"), plain, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_scores(model, rows):
    numeric, codes = rows
    assert predict_logits(model, numeric[:0], codes[:0], "fp32").shape == (0, 1)


def test_a_model_is_rebuilt_from_its_description(model, rows):
    model.target = TargetScale(5.0, 2.0)
    again = from_architecture(architecture(model))
    again.load_state_dict(model.state_dict())
    assert predict_logits(again, *rows, "fp32").tobytes() == predict_logits(model, *rows, "fp32").tobytes()


@pytest.mark.parametrize("loss", ["binary", "multiclass"])
def test_scores_are_probabilities_even_far_out(loss):
    logits = np.array([[-1e4, 0.0, 3e4], [0.0, 0.0, 0.0], [88.0, -88.0, 0.0]], np.float32)
    scores = to_scores(LOSSES[loss], logits[:, :1] if loss == "binary" else logits, PLAIN)
    assert np.all((scores >= 0) & (scores <= 1))
    if loss == "multiclass":
        np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)
