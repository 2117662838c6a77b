"""Small learnable problems and runs for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import schema
from engine.config.tree import Config
from engine.runtime.run import Run
from engine.training.examples import Examples
from engine.training.loop import FitResult, fit
from engine.training.model import Network

CARDINALITIES = [7, 5]


def packed(
    numeric: np.ndarray,
    codes: np.ndarray,
    target: np.ndarray,
    rows: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> Examples:
    """Examples from arrays of any numeric type; `rows` defaults to 0 .. n - 1."""
    return Examples(
        numeric.astype(np.float32),
        codes.astype(np.int32),
        target.astype(np.float32),
        np.arange(len(target)) if rows is None else rows.astype(np.int64),
        None if weight is None else weight.astype(np.float32),
    )


def content(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[str, str, tuple[int, ...], bytes], ...]:
    """Name, type, shape and bytes of each array."""
    return tuple((name, array.dtype.str, array.shape, array.tobytes()) for name, array in sorted(arrays.items()))


def weights_of(model: Network) -> tuple[tuple[str, str, tuple[int, ...], bytes], ...]:
    """All parameters to the bit."""
    return content({name: value.detach().numpy() for name, value in model.state_dict().items()})


def make_problem(n: int, seed: int = 0, task: str = "binary") -> Examples:
    """Rows whose target depends on two numbers and a category."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(n, 4))
    codes = np.stack([rng.integers(0, size, n) for size in CARDINALITIES], axis=1)
    signal = 2 * numeric[:, 0] - numeric[:, 1] + np.sin(codes[:, 0])
    if task == "binary":
        target = (rng.random(n) < 1 / (1 + np.exp(-signal))).astype(np.float32)
    elif task == "multiclass":
        target = np.digitize(signal, [-1.0, 1.0]).astype(np.float32)
    else:
        target = 1000 + 50 * signal + rng.normal(size=n)
    return packed(numeric, codes, target, rows=np.arange(n) * 3 + 11)


def make_config(folder: Path, **keys: Any) -> Config:
    """A config from `section__key=value`, small and quick by default."""
    values: dict[str, Any] = {
        "name": "test",
        "paths": {"runs": str(folder / "runs")},
        "model": {"hidden": (16, 8), "dropout": 0.2},
        "train": {"batch_size": 64, "epochs": 2, "lr": 0.01},
        "cluster": {"threads": 1},
    }
    for name, value in keys.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return schema.build(Config, values)


def open_run(config: Config) -> Run:
    """A new run of the config."""
    return Run.create("train", config, schema.plain(config))


def train(
    config: Config, data: Examples, valid: Examples | None = None, run: Run | None = None, **keys: Any
) -> tuple[FitResult, Run]:
    """Fit in a new run, or go on in a given one."""
    run = run or open_run(config)
    settings: dict[str, Any] = {
        "cardinalities": CARDINALITIES,
        "outputs": [1],
        "dataset_digest": "data",
        "precision": "fp32",
    }
    try:
        return fit(data, valid, config, run, **{**settings, **keys}), run
    finally:
        run.finish({})


@pytest.fixture
def problem() -> Callable[..., Examples]:
    """`problem(n, seed, task)`."""
    return make_problem


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """`config(train__epochs=1)`."""
    return lambda **keys: make_config(tmp_path, **keys)


@pytest.fixture
def fitted() -> Callable[..., tuple[FitResult, Run]]:
    """`fitted(config, data, valid)`."""
    return train


@pytest.fixture
def new_run() -> Callable[[Config], Run]:
    """`new_run(config)`."""
    return open_run
