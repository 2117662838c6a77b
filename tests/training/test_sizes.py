"""Batches, epochs and patience by the number of rows, shards by the work of a batch: a stated rule, recorded, and better on few
rows than large batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import api
from engine.config.compose import compose
from engine.config.sections.training import TrainConfig
from engine.errors import UserError
from engine.runtime.run import Run
from engine.training.schedule import Schedule
from engine.training.sizes import Sizes, settle, sizes_of
from kernels.metrics import roc_auc
from tests.logits import predict_logits
from tests.tiny import overrides, write_tiny


@pytest.mark.parametrize(("rows", "expected"), [
    (1, Sizes(32, 100, 20, 1)), (106, Sizes(32, 100, 20, 8)), (1_800, Sizes(32, 18, 3, 8)), (4_800, Sizes(32, 10, 3, 8)),
    (30_000, Sizes(128, 10, 3, 8)), (57_000, Sizes(256, 10, 3, 8)), (800_000, Sizes(2048, 10, 3, 8)),
    (819_200, Sizes(4096, 10, 3, 8)), (100_000_000, Sizes(4096, 10, 3, 8)),
])  # fmt: skip
def test_the_rule(rows: int, expected: Sizes) -> None:
    assert sizes_of(TrainConfig(), rows) == expected


@given(st.integers(1, 10**9), st.integers(1, 300))
def test_steps_are_many_enough_or_a_bound_says_why_not(rows: int, shards: int) -> None:
    config = TrainConfig(shards=shards)
    found = sizes_of(config, rows)
    steps = Schedule.of(rows, config).epoch_steps
    assert shards <= found.batch_size <= 4096
    assert steps >= 200 or found.batch_size == max(32, shards)
    assert steps * found.epochs >= 1000 or found.epochs == 100
    assert 10 <= found.epochs <= 100 and found.patience == max(3, found.epochs // 5)
    assert sizes_of(config, rows + 1).batch_size >= found.batch_size, "more rows never make smaller batches"


def test_what_is_said_is_taken_and_the_rest_follows_from_it() -> None:
    assert sizes_of(TrainConfig(epochs=50), 10**6) == Sizes(4096, 50, 10, 8)
    assert sizes_of(TrainConfig(batch_size=4096, epochs=10, patience=3), 100) == Sizes(4096, 10, 3, 8)
    assert sizes_of(TrainConfig(batch_size=1000, patience=0), 1000) == Sizes(1000, 100, 0, 8)


@pytest.mark.parametrize(("batch", "work", "shards"), [
    (4096, 140_000, 4),  # a small network: 1,024 rows have enough to do, 512 have not
    (4000, 35_000, 1), (4000, 69_999, 1), (4000, 70_000, 2), (4000, 279_999, 4), (4000, 280_000, 8), (4000, 2**30, 8),
    (512, 1_000_000, 2), (32, 140_000, 1), (32, 35_000_000, 8), (5, 2**40, 4), (1, 2**40, 1),
])  # fmt: skip
def test_a_shard_has_enough_to_do_where_the_batch_has(batch: int, work: int, shards: int) -> None:
    assert sizes_of(TrainConfig(batch_size=batch), 10**6, work).shards == shards
    assert sizes_of(TrainConfig(), batch, work).shards <= shards, "no shard is without rows"
    fixed = TrainConfig(batch_size=batch, shards=min(batch, 6))
    assert sizes_of(fixed, 10**6, work).shards == min(batch, 6), "what is said is taken"


@pytest.mark.parametrize(("word", "message"), [
    ("train.epochs=0", "train.epochs: must be a whole number of at least 1, or auto, found 0"),
    ("train.batch_size=many", "train.batch_size: must be a whole number of at least 1, or auto, found 'many'"),
    ("train.patience=-1", "train.patience: must be a whole number of at least 0, or auto, found -1"),
    ("train.epochs=2.5", "train.epochs: must be a whole number of at least 1, or auto, found"),
    ("train.batch_size=4 train.shards=8", "batch_size must be at least shards=8, found 4"),
    ("train.shards=0", "train.shards: must be a whole number of at least 1, or auto, found 0"),
])  # fmt: skip
def test_what_is_no_number_of_rows_or_epochs_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        compose(word.split())


@pytest.mark.parametrize(("experiment", "expected"), [
    ("flights", (4096, 10, 3, 8)), ("flights_backtest", (4096, 3, 3, 8)), ("taxi", (1024, 8, 3, 8)),
    ("taxi_card", (1024, 8, 3, 8)),
])  # fmt: skip
def test_the_examples_are_pinned(experiment: str, expected: tuple[int, int, int, int]) -> None:
    """Their weights and figures must not follow the rule."""
    train = compose([f"+experiment={experiment}"]).config.train
    assert (train.batch_size, train.epochs, train.patience, train.shards) == expected


def test_a_run_says_and_records_its_sizes_and_keeps_them(tmp_path: Path, new_run: Callable[..., Run]) -> None:
    folder = write_tiny(tmp_path, 900)
    words = overrides(
        folder,
        "train.epochs=auto",
        "train.batch_size=auto",
        "train.shards=auto",
        "features.windows=off",
        "evaluate.bootstrap=0",
    )
    found = api.run("train", *words, config_dir=str(folder / "conf"))
    rows = int(found.metrics["train/rows"])
    expected = sizes_of(TrainConfig(), rows, 1000.0)  # a small network
    assert found.record["sizes"] == asdict(expected) and (expected.batch_size, expected.shards) == (32, 1)
    said = f"batch_size 32, epochs {expected.epochs}, patience {expected.patience}, shards 1 by rule for {rows} rows (auto)"
    assert said in (found.directory / "run.log").read_text()
    assert found.metrics["train/steps"] == -(-rows // 32) * found.metrics["train/epochs"]
    assert "<dt>batch_size</dt><dd>32</dd>" in (found.directory / "report.html").read_text()
    assert found.record["config"]["train"]["epochs"] == "auto", "the config is kept as it was asked"
    # What was recorded counts, whatever the rule is by now.
    config = compose(words, str(folder / "conf")).config
    run = new_run(config)
    recorded = Sizes(64, 2, 1, 4)
    run.note(sizes=asdict(recorded))
    train = settle(config, run, rows, lambda: pytest.fail("nothing is left to count")).train
    assert Sizes(train.batch_size, train.epochs, train.patience, train.shards) == recorded
    run.finish({})


def test_few_rows_learn_what_large_batches_leave_unlearned(
    config: Callable[..., Any], problem: Callable[..., Any], fitted: Callable[..., Any]
) -> None:
    data, valid, test = problem(1500), problem(500, seed=1), problem(2000, seed=2)
    areas = {}
    for name, sizes in {"auto": ("auto", "auto"), "large": (4096, 10)}.items():
        settings = config(train__batch_size=sizes[0], train__epochs=sizes[1], train__lr=0.001, model__hidden=(64, 64))
        result, _ = fitted(settings, data, valid)
        logits = predict_logits(result.model, test.numeric, test.codes, precision="fp32", tile_rows=256, threads=1)
        areas[name] = roc_auc(test.target.astype(np.float64), logits[:, 0].astype(np.float64))
    assert areas["auto"] > areas["large"] + 0.03, areas
