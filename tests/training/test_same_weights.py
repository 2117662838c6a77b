"""The built-in models train to the weights that earlier versions trained them to, and score their files with the same bits.

Recorded on one kind of processor with one version of torch, on which alone the bits are those; elsewhere the tests are left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from engine.runtime import environment
from engine.training.model import from_architecture
from tests.logits import predict_logits
from tests.training.conftest import packed, weights_of

EARLIER = Path(__file__).parent / "earlier"
SAME = torch.__version__.startswith("2.13.") and "avx512_bf16" in environment.cpu_flags()
pytestmark = pytest.mark.skipif(not SAME, reason="the bits are those of torch 2.13 on a processor with avx512_bf16")

CASES = {
    "mlp": {},
    "deep": {"model__hidden": (40, 24, 70), "model__dropout": 0.35, "train__clip": 0.05},
    "plain": {"model__dropout": 0.0, "train__weight_decay": 0.3},
    "ragged": {"train__shards": 3, "train__batch_size": 50},
    "balanced": {"train__class_weight": "balanced", "train__order": "windowed", "train__window_rows": 130},
    "linear": {"model__kind": "linear"},
    "squared": {"train__loss": "squared"},
    "multiclass": {"train__loss": "multiclass"},
    "skipped": {"train__on_bad_loss": "skip"},
}
TASKS = {"squared": "regression", "multiclass": "multiclass"}
RECORDED = {
    ("mlp", "fp32"): ("1816f397346f359a", "e42dd5b62e2d7d75"),
    ("mlp", "bf16"): ("2a2336c9d7333214", "cef0e6d8c8c759b9"),
    ("deep", "fp32"): ("48f54a65fe94e16d", "84ea44605a339eda"),
    ("deep", "bf16"): ("3a629d6a3958002d", "af97d43756e13412"),
    ("plain", "fp32"): ("d9c1245895aaf855", "18d9a99d6e35ef97"),
    ("plain", "bf16"): ("dc300802cf44821a", "0feb0f12404a629d"),
    ("ragged", "fp32"): ("8144613c8038d122", "db30a4e2dced1f92"),
    ("ragged", "bf16"): ("751118ec23728baa", "0a286b3154fb12d0"),
    ("balanced", "fp32"): ("b98f0fd0e04d8cd4", "68381c07626332ad"),
    ("balanced", "bf16"): ("f8a5c3cdd71d122a", "9b6d1b1a3351ca80"),
    ("linear", "fp32"): ("417ede2966c384de", "038ee5a0cc3b7684"),
    ("linear", "bf16"): ("417ede2966c384de", "038ee5a0cc3b7684"),
    ("squared", "fp32"): ("7f1a4dabe4048882", "259a10979f01d3a6"),
    ("squared", "bf16"): ("c70492d6743ad094", "18b1585d26089bf6"),
    ("multiclass", "fp32"): ("7f5591bb3e2fc70c", "578bd3a1f87db5b0"),
    ("multiclass", "bf16"): ("cf7f317cfcafa54d", "4aa7b70437373773"),
    ("skipped", "fp32"): ("33e546e69882330f", "29659ab1ab4c2843"),
    ("skipped", "bf16"): ("bcadbe439bbda6e8", "3684f92e3c6883e5"),
    ("mlp", "scores"): ["31ebb2aa1cfa77de", "762fab0e74fc2f7b"],
    ("linear", "scores"): ["0fda783a1474a049", "0fda783a1474a049"],
}


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_earlier_versions(problem, config, fitted, name, precision):
    data, valid = (problem(430, seed, TASKS.get(name, "binary")) for seed in (0, 1))
    if name == "ragged":
        data = packed(data.numeric, data.codes, data.target, data.rows, np.random.default_rng(0).random(430))
    if name == "skipped":
        data.numeric[77, 1] = np.nan
    outputs = 3 if name == "multiclass" else 1
    settings = config(**CASES[name], cluster__threads=1 if precision == "fp32" else 2)
    result, _ = fitted(settings, data, valid, outputs=[outputs], precision=precision)
    found = (
        digest(weights_of(result.model)),
        digest([(entry["train_loss"], entry["row_stream"]) for entry in result.history]),
    )
    assert found == RECORDED[name, precision]


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_earlier_models_give_the_scores_that_they_gave(name):
    model = from_architecture(json.loads((EARLIER / f"{name}.json").read_text()))
    model.load_state_dict(safetensors.torch.load_file(EARLIER / f"{name}.safetensors"))
    rng = np.random.default_rng(5)
    numeric = rng.normal(size=(1300, 4)).astype(np.float32)
    codes = np.stack([rng.integers(0, size, 1300) for size in (7, 5)], axis=1).astype(np.int32)
    found = [digest(predict_logits(model, numeric, codes, precision).tobytes()) for precision in ("fp32", "bf16")]
    assert found == RECORDED[name, "scores"]
