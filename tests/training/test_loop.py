"""The weights are a function of data, config and seed alone; the arithmetic is that of a plain torch loop."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from engine.config.sections.training import ModelConfig, TrainConfig
from engine.errors import UserError
from engine.runtime import environment
from engine.training.checkpoint import candidates
from engine.training.loop import Trainer
from engine.training.losses import LOSSES, to_scores
from engine.training.metrics import METRICS
from engine.training.model import build_model
from engine.training.order import RowOrder, order_key
from engine.training.precision import has_bf16, resolve_precision
from kernels.metrics import roc_auc
from tests.logits import predict_logits
from tests.training.conftest import packed, weights_of

PRECISIONS = ["fp32"] + (["bf16"] if has_bf16() else [])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_byte_equal_for_any_number_of_threads(problem, config, fitted, precision):
    data, valid = problem(1000), problem(300, seed=1)
    found = {
        weights_of(fitted(config(cluster__threads=threads), data, valid, precision=precision)[0].model)
        for threads in (1, 2, 4)
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "key", [{"train__seed": 1}, {"train__lr": 0.02}, {"model__dropout": 0.3}, {"train__clip": 0.01}]
)
def test_weights_change_with_what_should_change_them(problem, config, fitted, key):
    data = problem(300)
    assert weights_of(fitted(config(), data)[0].model) != weights_of(fitted(config(**key), data)[0].model)


def test_the_order_comes_from_the_rows_trained_on_and_not_from_what_else_the_dataset_holds(problem, config, fitted):
    data = problem(300)
    one, _ = fitted(config(), data, dataset_digest="one")
    other, _ = fitted(config(), data, dataset_digest="other")
    assert weights_of(one.model) == weights_of(other.model)
    flipped = packed(data.numeric, data.codes, 1 - data.target, data.rows)
    moved = packed(data.numeric, data.codes, data.target, data.rows + 1)
    keys = {
        order_key(data, 0),
        order_key(data, 1),
        order_key(flipped, 0),
        order_key(moved, 0),
        order_key(problem(299), 0),
    }
    assert len(keys) == 5


def test_no_global_random_state_is_read_or_changed(problem, config, fitted):
    data = problem(200)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = weights_of(fitted(config(), data)[0].model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.manual_seed(2)
    assert weights_of(fitted(config(), data)[0].model) == first


def test_order_differs_by_epoch_repeats_by_seed_and_takes_each_row_once(problem, config, fitted):
    """Field report C4: 22 rows, three epochs."""
    order = RowOrder(22, order_key(problem(22), 0))
    epochs = [order.positions(epoch, 0, 22) for epoch in range(3)]
    assert all(sorted(rows) == list(range(22)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3
    settings = config(train__epochs=3, train__batch_size=8)
    one, _ = fitted(settings, problem(22))
    two, _ = fitted(settings, problem(22))
    streams = [entry["row_stream"] for entry in one.history]
    assert len(set(streams)) == 3 and streams == [entry["row_stream"] for entry in two.history]
    assert [entry["rows"] for entry in one.history] == [22, 22, 22]


@pytest.mark.parametrize("n", [1, 3, 9, 64, 65, 129])
def test_each_row_is_used_once_an_epoch_whatever_the_last_batch(problem, config, fitted, n):
    result, _ = fitted(config(), problem(n))
    assert [entry["rows"] for entry in result.history] == [n, n]
    assert result.steps == 2 * -(-n // 64)


def test_the_loop_is_adamw_with_clipping_warmup_and_cosine_as_torch_does_it(problem, config, fitted):
    """Ragged last batch, sample weights and eight shards against a plain loop over whole batches."""
    data = problem(150)
    data = packed(data.numeric, data.codes, data.target, data.rows, np.random.default_rng(0).uniform(0.5, 2, 150))
    settings = config(model__dropout=0.0, train__epochs=3, train__clip=0.5, train__warmup=0.3)
    result, _run = fitted(settings, data)
    model = build_model(settings.model, 4, [7, 5], 1, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01)
    step, total = 0, 9
    for epoch in range(3):
        rows = RowOrder(150, order_key(data, 0)).positions(epoch, 0, 150)
        for start in range(0, 150, 64):
            index = rows[start : start + 64]
            logits = model.module(torch.from_numpy(data.numeric[index]), torch.from_numpy(data.codes[index]))[:, 0]
            target, weight = torch.from_numpy(data.target[index]), torch.from_numpy(data.weight[index])
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
            loss = (losses * weight).sum() / weight.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            ramp = 3
            cosine = 0.5 * (1 + np.cos(np.pi * (step - ramp) / (total - ramp)))
            optimizer.param_groups[0]["lr"] = 0.01 * ((step + 1) / ramp if step < ramp else cosine)
            optimizer.step()
            step += 1
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_loss_falls_and_the_model_ranks_well_on_a_learnable_problem(problem, config, fitted):
    data, valid = problem(4000), problem(2000, seed=1)
    result, _ = fitted(config(train__epochs=12, train__batch_size=256), data, valid)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0] - 0.05
    scores = to_scores(
        LOSSES["binary"], predict_logits(result.model, valid.numeric, valid.codes, "fp32"), result.model.target
    )
    ideal = roc_auc(valid.target, 2 * valid.numeric[:, 0] - valid.numeric[:, 1] + np.sin(valid.codes[:, 0]))
    assert roc_auc(valid.target, scores) > ideal - 0.02


def test_linear_model_learns_too(problem, config, fitted):
    data, valid = problem(4000), problem(2000, seed=1)
    result, _ = fitted(
        config(model__kind="linear", train__epochs=12, train__batch_size=256, train__lr=0.05), data, valid
    )
    assert result.history[-1]["valid_roc_auc"] > 0.85


@pytest.mark.parametrize("loss", ["squared", "huber", "quantile"])
def test_regression_predicts_in_the_unit_of_the_target(problem, config, fitted, loss):
    data, valid = problem(4000, task="regression"), problem(1000, seed=1, task="regression")
    result, _ = fitted(config(train__loss=loss, train__epochs=12, train__batch_size=256), data, valid)
    values = to_scores(
        LOSSES[loss], predict_logits(result.model, valid.numeric, valid.codes, "fp32"), result.model.target
    )
    error = np.abs(valid.target - values).mean()
    assert error < 0.35 * np.abs(valid.target - valid.target.mean()).mean()
    assert result.history[result.best_epoch]["valid_mae"] == pytest.approx(error, rel=1e-6)


def test_a_quantile_loss_puts_its_share_of_rows_below(problem, config, fitted):
    data = problem(4000, task="regression")
    settings = config(
        train__loss="quantile", train__quantile=0.9, train__epochs=20, train__batch_size=512, model__dropout=0.0
    )
    result, _ = fitted(settings, data)
    values = to_scores(
        LOSSES["quantile"], predict_logits(result.model, data.numeric, data.codes, "fp32"), result.model.target
    )
    assert 0.85 < (data.target < values).mean() < 0.95


def test_multiclass_learns(problem, config, fitted):
    data, valid = problem(4000, task="multiclass"), problem(1000, seed=1, task="multiclass")
    result, _ = fitted(
        config(train__loss="multiclass", train__epochs=12, train__batch_size=256), data, valid, outputs=[3]
    )
    assert result.history[-1]["valid_accuracy"] > 0.85


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_single_class_trains_and_says_that_ranking_cannot_be_judged(problem, config, fitted, target):
    data = problem(100)
    data = packed(data.numeric, data.codes, np.full(100, target), data.rows)
    result, run = fitted(config(train__class_weight="balanced"), data, data)
    assert np.isfinite(result.history[-1]["train_loss"])
    assert "cannot be computed: log loss is watched" in (run.directory / "run.log").read_text()


def test_balanced_class_weights_centre_the_scores(problem, config, fitted):
    data = problem(4000)
    rare = np.flatnonzero((data.target == 0) | (np.arange(4000) % 10 == 0))
    data = data.take(rare)
    plain, _ = fitted(config(train__epochs=4), data)
    balanced, _ = fitted(config(train__epochs=4, train__class_weight="balanced"), data)
    means = [
        to_scores(
            LOSSES["binary"], predict_logits(item.model, data.numeric, data.codes, "fp32"), item.model.target
        ).mean()
        for item in (plain, balanced)
    ]
    assert means[0] == pytest.approx(data.target.mean(), abs=0.03)
    assert means[1] > means[0] + 0.1


def test_training_stops_early_and_keeps_the_best_weights(problem, config, fitted):
    data, valid = problem(60), problem(400, seed=1)
    settings = config(train__epochs=40, train__patience=2, train__lr=0.1, model__dropout=0.0)
    result, _ = fitted(settings, data, valid)
    watched = [entry["valid_roc_auc"] for entry in result.history]
    assert len(watched) < 40 and result.best_epoch == int(np.argmax(watched)) == len(watched) - 3
    scores = to_scores(
        LOSSES["binary"], predict_logits(result.model, valid.numeric, valid.codes, "fp32"), result.model.target
    )
    assert roc_auc(valid.target, scores) == max(watched)


@pytest.mark.parametrize(
    ("figures", "best"), [((0.6, math.nan, 0.5), 0), ((math.nan, 0.5, 0.4), 1), ((math.nan,) * 3, 2)]
)
def test_an_epoch_without_a_figure_is_no_better_one(problem, config, fitted, monkeypatch, figures, best):
    measured = [dict.fromkeys(METRICS["binary"], value) for value in figures]
    monkeypatch.setattr(Trainer, "_validate", lambda trainer: measured[len(trainer.state.history)])
    result, run = fitted(config(train__epochs=3, train__patience=9), problem(200), problem(100, seed=1))
    assert result.best_epoch == best == result.metrics["train/best_epoch"]
    said = "this epoch is not the best" in (run.directory / "run.log").read_text()
    assert said == math.isnan(figures[0])


def test_windowed_order_takes_each_row_once_and_stays_within_windows(problem, config, fitted):
    order = RowOrder(1000, 5, "windowed", 300)
    rows = order.positions(0, 0, 1000)
    assert sorted(rows) == list(range(1000))
    windows = [int(row) // 300 for row in rows]
    assert len([1 for a, b in itertools.pairwise(windows) if a != b]) == 3
    pieces = np.concatenate([order.positions(0, a, min(a + 77, 1000)) for a in range(0, 1000, 77)])
    assert np.array_equal(pieces, rows)
    assert not np.array_equal(rows, order.positions(1, 0, 1000))
    settings = {"train__order": "windowed", "train__window_rows": 100}
    result, _ = fitted(config(**settings), problem(250))
    assert [entry["rows"] for entry in result.history] == [250, 250]


def test_a_balanced_draw_is_half_positives_whoever_draws_which_part():
    """Field report C9: 1000 rows, 10 positives, 1000 draws an epoch."""
    target = (np.arange(1000) % 100 == 7).astype(np.float32)
    data = packed(np.zeros((1000, 1)), np.zeros((1000, 0)), target)
    order = RowOrder.of(data, TrainConfig(sampling="balanced", seed=3))
    epochs = [order.positions(epoch, 0, 1000) for epoch in range(4)]
    low, high = stats.binom(1000, 0.5).interval(0.999)
    for rows in epochs:
        assert low <= target[rows].sum() <= high
    assert len({tuple(rows) for rows in epochs}) == 4
    pieces = np.concatenate([order.positions(0, a, min(a + 77, 1000)) for a in range(0, 1000, 77)])
    assert np.array_equal(pieces, epochs[0])
    again = RowOrder.of(data, TrainConfig(sampling="balanced", seed=4))
    assert not np.array_equal(again.positions(0, 0, 1000), epochs[0])
    for value in (0, 1):  # every row of a class has the same chance
        members = np.flatnonzero(target == value)
        drawn = np.concatenate(epochs)
        counts = np.bincount(np.searchsorted(members, drawn[target[drawn] == value]) * 10 // len(members), minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_balanced_sampling_centres_the_scores_without_weights(problem, config, fitted):
    data = problem(4000)
    data = data.take(np.flatnonzero((data.target == 0) | (np.arange(4000) % 10 == 0)))
    result, _ = fitted(config(train__epochs=4, train__sampling="balanced"), data)
    scores = to_scores(
        LOSSES["binary"], predict_logits(result.model, data.numeric, data.codes, "fp32"), result.model.target
    )
    assert scores.mean() > data.target.mean() + 0.1
    assert [entry["rows"] for entry in result.history] == [len(data)] * 4


@pytest.mark.parametrize("key", [{"loss": "squared"}, {"class_weight": "balanced"}, {"order": "windowed"}])
def test_balanced_sampling_is_refused_where_it_makes_no_sense(key):
    (name, value), *_ = key.items()
    with pytest.raises(UserError, match=rf"sampling=balanced needs .* found {name}={value}"):
        TrainConfig(sampling="balanced", **key)


# ------------------------------------------------------------------------------------------------------ bad rows


def poisoned(problem, row):
    data = problem(200)
    data.numeric[row, 1] = np.nan
    return data


def test_a_bad_loss_stops_the_run_and_names_the_rows(problem, config, fitted):
    data = poisoned(problem, 77)
    with pytest.raises(UserError, match=rf"not finite .*dataset rows \[{data.rows[77]}\]"):
        fitted(config(), data)


def test_a_bad_loss_is_skipped_and_counted(problem, config, fitted):
    data = poisoned(problem, 77)
    result, run = fitted(config(train__on_bad_loss="skip"), data)
    assert result.metrics["train/steps_skipped"] == 2
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())
    assert f"dataset rows [{data.rows[77]}]" in (run.directory / "run.log").read_text()


def test_an_epoch_of_bad_steps_only_is_an_error_and_no_model(problem, config, fitted):
    data = problem(200)
    data.numeric[:, 1] = np.inf
    with pytest.raises(UserError, match="no step of epoch 1 could be used"):
        fitted(config(train__on_bad_loss="skip"), data)


@pytest.mark.parametrize(
    ("value", "loss", "message"),
    [(2.0, "binary", "0 or 1"), (np.nan, "squared", "finite"), (1.5, "multiclass", "a class 0 to 2")],
)
def test_a_target_that_the_loss_cannot_take_is_refused_by_row(problem, config, fitted, value, loss, message):
    data = problem(50)
    data.target[31] = value
    with pytest.raises(UserError, match=rf"{message}.*dataset row {data.rows[31]}"):
        fitted(config(train__loss=loss), data, outputs=[3 if loss == "multiclass" else 1])


def test_a_device_that_is_not_built_is_refused_and_not_ignored(problem, config, fitted):
    with pytest.raises(UserError, match=r"train\.device must be auto or cpu"):
        fitted(config(train__device="cuda"), problem(10))


def test_no_rows_at_all_is_an_error_before_training(problem, config, fitted):
    with pytest.raises(UserError, match="at least one row"):
        fitted(config(), problem(0))


# -------------------------------------------------------------------------------------------------------- resume


def resume_from(run, config, folder: Path, step: int, new_run):
    """A run of the same plan that holds the checkpoints up to a step."""
    again = new_run(config)
    shutil.copytree(run.directory / "checkpoints", again.directory / "checkpoints")
    for path in candidates(again.directory / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return again


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_resumed_at_any_step_equals_the_unbroken_run(problem, config, fitted, new_run, tmp_path, precision):
    """Field report C5: 10 rows, batch 2, 3 epochs; here stopped after every single step."""
    data, valid = problem(10), problem(30, seed=1)
    settings = config(
        train__batch_size=2, train__shards=2, train__epochs=3, train__checkpoint_every=1, train__keep_checkpoints=99
    )
    whole, run = fitted(settings, data, valid, precision=precision)
    for step in range(1, 15):
        again = resume_from(run, settings, tmp_path, step, new_run)
        result, again = fitted(settings, data, valid, again, precision=precision)
        assert result.metrics["resumed_from_step"] == step
        assert weights_of(result.model) == weights_of(whole.model)
        assert [entry["row_stream"] for entry in result.history] == [entry["row_stream"] for entry in whole.history]
        assert [entry["train_loss"] for entry in result.history] == [entry["train_loss"] for entry in whole.history]
        assert again.record["chain"] == run.record["chain"]


def test_a_resumed_run_still_knows_its_best_weights(problem, config, fitted, new_run, tmp_path):
    data, valid = problem(60), problem(400, seed=1)
    keys = {"train__epochs": 40, "train__patience": 3, "train__lr": 0.1, "train__keep_checkpoints": 99}
    settings = config(model__dropout=0.0, **keys)
    whole, run = fitted(settings, data, valid)
    assert whole.best_epoch < len(whole.history) - 2
    result, _ = fitted(settings, data, valid, resume_from(run, settings, tmp_path, whole.best_epoch + 2, new_run))
    assert result.best_epoch == whole.best_epoch and weights_of(result.model) == weights_of(whole.model)


def test_a_finished_fit_is_not_trained_again(problem, config, fitted, new_run, tmp_path):
    data = problem(100)
    whole, run = fitted(config(), data)
    result, _ = fitted(config(), data, None, resume_from(run, config(), tmp_path, 99, new_run))
    assert weights_of(result.model) == weights_of(whole.model)
    for name in ("input", "compute", "communication", "evaluate"):
        assert result.metrics[f"train/{name}_seconds"] == whole.metrics[f"train/{name}_seconds"]
    assert result.first_step == 0


def test_resume_passes_over_a_broken_checkpoint_and_says_so(problem, config, fitted, new_run, tmp_path):
    """Field report C6 a to c: cut off, without its manifest, and with a stray piece beside it."""
    data = problem(200)
    settings = config(train__keep_checkpoints=9, train__checkpoint_every=1)
    whole, run = fitted(settings, data)
    for harm in ("cut", "no manifest", "stray"):
        again = resume_from(run, settings, tmp_path, 5, new_run)
        newest, _before = candidates(again.directory / "checkpoints")[:2]
        state = newest / "state.safetensors"
        if harm == "cut":
            state.write_bytes(state.read_bytes()[:-100])
        elif harm == "no manifest":
            (newest / "manifest.json").unlink()
        else:
            (newest / "rank-1.safetensors").write_bytes(state.read_bytes())
        result, again = fitted(settings, data, None, again)
        log = (again.directory / "run.log").read_text()
        assert result.metrics["resumed_from_step"] == (5 if harm == "stray" else 4)
        assert (newest.name in log and "passed over" in log) == (harm != "stray")
        assert weights_of(result.model) == weights_of(whole.model)


def test_a_checkpoint_of_another_plan_or_precision_is_refused(problem, config, fitted, new_run, tmp_path):
    data = problem(100)
    _, run = fitted(config(), data)
    other = config(train__lr=0.5)
    with pytest.raises(UserError, match="has another plan"):
        fitted(other, data, None, resume_from(run, other, tmp_path, 99, new_run))
    with pytest.raises(UserError, match="has another precision"):
        fitted(config(), data, None, resume_from(run, config(), tmp_path, 99, new_run), precision="bf16")


def test_a_stop_file_leaves_a_checkpoint_from_which_the_run_goes_on(problem, config, fitted, new_run):
    data = problem(300)
    settings = config(train__epochs=4)
    whole, _ = fitted(settings, data)
    run = new_run(settings)
    (run.directory / "stop").write_text("")
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1 of 20"):
        fitted(settings, data, None, run)
    assert not (run.directory / "stop").exists()
    (run.directory / "DONE").unlink()
    result, _ = fitted(settings, data, None, type(run).resume(run.directory))
    assert result.metrics["resumed_from_step"] == 1
    assert weights_of(result.model) == weights_of(whole.model)


def test_a_stop_that_comes_after_the_last_step_is_not_lost(problem, config, fitted, new_run, monkeypatch):
    settings = config(train__epochs=1)
    whole, _ = fitted(settings, problem(100))
    run = new_run(settings)
    result = Trainer._result

    def late(trainer, seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        return result(trainer, seconds)

    monkeypatch.setattr(Trainer, "_result", late)
    with pytest.raises(KeyboardInterrupt, match="stopped after the last step"):
        fitted(settings, problem(100), None, run)
    monkeypatch.undo()
    (run.directory / "DONE").unlink()
    again, _ = fitted(settings, problem(100), None, type(run).resume(run.directory))
    assert again.first_step == 0 and weights_of(again.model) == weights_of(whole.model)


def test_only_the_newest_checkpoints_are_kept(problem, config, fitted):
    _, run = fitted(config(train__epochs=5, train__keep_checkpoints=2), problem(100))
    assert [path.name for path in candidates(run.directory / "checkpoints")] == ["step-0000000010", "step-0000000008"]


def test_loss_links_and_the_order_link_are_set(problem, config, fitted):
    _, run = fitted(config(train__epochs=4), problem(200))
    assert list(run.record["chain"]) == ["order", "loss@1", "loss@10"]


def working(result) -> float:
    """Seconds spent in steps."""
    return sum(result.metrics[f"train/{part}_seconds"] for part in ("input", "compute", "communication"))


def test_a_resumed_run_accounts_for_the_time_of_all_its_attempts(problem, config, fitted, new_run, tmp_path):
    data, valid = problem(600), problem(300, seed=1)
    settings = config(train__epochs=4, train__keep_checkpoints=9)
    _, run = fitted(settings, data, valid)
    again = resume_from(run, settings, tmp_path, 20, new_run)
    earlier = json.loads((candidates(again.directory / "checkpoints")[0] / "manifest.json").read_text())["spent"]
    assert earlier["steps"] == 20 and earlier["trained_rows"] == 1200
    result, _ = fitted(settings, data, valid, again)
    for part in ("input", "compute", "communication", "checkpoint", "evaluate"):
        assert result.metrics[f"train/{part}_seconds"] > earlier[part] > 0
    assert result.metrics["train/seconds"] > earlier["total"] > earlier["compute"]
    assert result.metrics["train/rows_per_second"] == pytest.approx(2400 / working(result))
    assert result.metrics["train/steps_per_second"] == pytest.approx(40 / working(result))


def test_time_is_attributed_and_steps_are_logged(problem, config, fitted):
    result, run = fitted(config(train__log_every=1), problem(200))
    parts = ("input", "compute", "communication", "checkpoint", "evaluate")
    spent = sum(result.metrics[f"train/{part}_seconds"] for part in parts)
    assert 0 < spent <= result.metrics["train/seconds"] * 1.05
    assert result.metrics["train/rows_per_second"] == pytest.approx(400 / working(result))
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))


@pytest.mark.parametrize(
    ("flags", "vendor", "expected"),
    [
        ({"avx512f"}, "AuthenticAMD", "fp32"),
        ({"avx512_bf16"}, "AuthenticAMD", "bf16"),
        ({"avx512_bf16"}, "GenuineIntel", "fp32"),  # measured: 82 against 113 GFLOP/s for tiles of 1,024 x 256 rows
        ({"avx512_bf16", "amx_bf16"}, "GenuineIntel", "bf16"),
    ],
)
def test_auto_takes_bf16_where_it_pays(monkeypatch, flags, vendor, expected) -> None:
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(environment, "cpu_vendor", lambda: vendor)
    assert resolve_precision("auto", ModelConfig(hidden=(256,))) == expected
    assert resolve_precision("auto", ModelConfig(hidden=(16,))) == "fp32"
