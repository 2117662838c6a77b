"""The GPU stepper against the CPU stepper, and its step under a tape that stands in for a CUDA graph."""

from __future__ import annotations

import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.training.checkpoint import candidates
from engine.training.gpu import graphs
from engine.training.gpu.graphs import CudaGraphs, Graphed, make_runner
from engine.training.gpu.inputs import StepPlan
from engine.training.gpu.stepper import GpuStepper, device_logits
from engine.training.loop import Trainer, fit
from engine.training.model import build_model
from engine.training.predict import Evaluators
from engine.training.schedule import Schedule
from tests.logits import predict_logits
from tests.training.conftest import packed, weights_of
from tests.training.tape import Broken, CapturedError, Tape, Taped
from tests.training.test_exchange import together

CARDINALITIES = [7, 5]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def trained(new_run):
    """`trained(config, data, valid)`: fit on a device, eagerly on the CPU unless told otherwise."""

    def run_it(config, data, valid=None, run=None, device="cpu", runner="eager", resident=None, **keys):
        run = run or new_run(config)
        settings = {"cardinalities": CARDINALITIES, "outputs": [1], "dataset_digest": "data", "precision": "fp32"}
        gpu = functools.partial(GpuStepper, device=device, runner=runner, resident=resident)
        try:
            return fit(data, valid, config, run, make_stepper=gpu, **{**settings, **keys}), run
        finally:
            run.finish({})

    return run_it


def furthest(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def taped(step):
    return Graphed(step, Taped())


CASES = [
    {},
    {"train__order": "windowed", "train__window_rows": 130},
    {"train__class_weight": "balanced", "model__dropout": 0.0},
    {"train__sampling": "balanced"},
    {"train__clip": 0.0, "train__shards": 3, "train__batch_size": 50},
    {"model__kind": "linear"},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", CASES)
def test_the_device_loop_takes_the_rows_of_the_cpu_loop_and_comes_to_its_weights(
    problem, config, fitted, trained, keys, device
):
    data, valid = problem(430), problem(100, seed=1)
    looser = 1 if device == "cpu" else 10  # a card's exponentials and sums round otherwise, and AdamW enlarges that
    settings = config(train__log_every=4, **keys)
    (want, _), (found, run) = (
        fitted(settings, data, valid),
        trained(settings, data, valid, device=device, runner="graph"),
    )
    for a, b in zip(want.history, found.history, strict=True):
        assert a["row_stream"] == b["row_stream"] and a["rows"] == b["rows"] and a["step"] == b["step"]
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=2e-6 * looser)
        assert b["valid_roc_auc"] == pytest.approx(a["valid_roc_auc"], abs=1e-4 * looser)
    assert furthest(want.model, found.model) < 2e-5 * looser
    assert run.record["device_facts"]["kind"] == device


@pytest.mark.parametrize(("loss", "task", "outputs"), [("squared", "regression", 1), ("multiclass", "multiclass", 3)])
def test_other_losses_and_row_weights_too(problem, config, fitted, trained, loss, task, outputs):
    data = problem(300, task=task)
    weights = np.random.default_rng(0).random(300).astype(np.float32)
    data = packed(data.numeric, data.codes, data.target, data.rows, weights)
    settings = config(train__loss=loss)
    (want, _), (found, _) = (f(settings, data, data, outputs=[outputs]) for f in (fitted, trained))
    assert furthest(want.model, found.model) < 2e-5
    assert found.history[-1]["train_loss"] == pytest.approx(want.history[-1]["train_loss"], rel=1e-5)


def test_bf16_keeps_fp32_master_weights_and_stays_near_the_cpu_loop(problem, config, fitted, trained):
    data, valid = problem(1000), problem(400, seed=1)
    (want, _), (found, _) = (f(config(), data, valid, precision="bf16") for f in (fitted, trained))
    assert all(parameter.dtype == torch.float32 for parameter in found.model.parameters())
    assert any((p.detach() != p.detach().bfloat16().float()).any() for p in found.model.parameters())
    for a, b in zip(want.history, found.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=2e-3) and a["row_stream"] == b["row_stream"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_captured_step_repeats_what_the_eager_step_does(problem, config, trained, precision, resident):
    """The tape replays operations on the same memory without Python, as a CUDA graph does: equal bits mean that all that
    changes from step to step lies in tensors."""
    data = problem(430)
    settings = config(train__log_every=4)
    runs = [trained(settings, data, runner=r, precision=precision, resident=resident)[0] for r in ("eager", taped)]
    assert weights_of(runs[0].model) == weights_of(runs[1].model)
    assert runs[0].history == runs[1].history


def test_rows_streamed_give_the_bits_of_rows_that_are_resident(problem, config, trained):
    data = problem(430)
    one, two = (trained(config(), data, resident=resident)[0] for resident in (True, False))
    assert weights_of(one.model) == weights_of(two.model)


def test_the_tape_refuses_what_a_capture_refuses():
    with pytest.raises(CapturedError, match="back to the host"), Tape():
        torch.ones(3).sum().item()


def test_each_slot_is_captured_once_and_warm_up_changes_nothing(problem, config, trained):
    seen = []

    def runner(step):
        before = step.flat.values.clone()
        device = Taped()
        captured = Graphed(step, device)
        assert torch.equal(before, step.flat.values) and float(step.optimizer.count) == 0.0
        seen.append((device.captures, step.source.slots))
        return captured

    for resident in (True, False):
        trained(config(train__epochs=1), problem(100), runner=runner, resident=resident)
    assert seen == [(1, 1), (2, 2)]


def test_a_capture_that_fails_falls_back_to_the_eager_step_and_says_so(problem, config, trained, monkeypatch):
    data = problem(200)
    want, _ = trained(config(), data)

    def failing(step):
        monkeypatch.setattr(graphs, "CudaGraphs", Broken)
        monkeypatch.setattr(step, "device", torch.device("cuda"))
        runner, name, reason = make_runner(step, "graph")
        monkeypatch.setattr(step, "device", torch.device("cpu"))
        assert name == "eager" and reason == "RuntimeError: operation not permitted when stream is capturing"
        return runner

    found, _ = trained(config(), data, runner=failing)
    assert weights_of(want.model) == weights_of(found.model)


class BrokenGraph:
    """`torch.cuda.graph` of a capture that broke: its end raises too, and leaves its stream current."""

    def __init__(self, graph, pool, stream, capture_error_mode):
        torch.cuda.set_stream("the capture's")

    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_breaks_tells_its_cause_and_leaves_stream_and_allocator_as_they_were(monkeypatch):
    streams, ended = ["before"], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "graph", BrokenGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool), raising=False)

    def call():
        raise ValueError("a value is asked for")

    with pytest.raises(ValueError, match="a value is asked for"):
        CudaGraphs().capture(call)
    assert streams == ["before", "the capture's", "before"] and ended == [(0, (0, 7))]


@pytest.mark.parametrize("order", ["full", "windowed"])
def test_a_run_resumed_at_any_step_equals_the_unbroken_run(problem, config, trained, new_run, order):
    data, valid = problem(10), problem(30, seed=1)
    settings = config(
        train__batch_size=2,
        train__shards=2,
        train__epochs=2,
        train__checkpoint_every=1,
        train__keep_checkpoints=99,
        train__order=order,
        train__window_rows=4,
    )
    whole, run = trained(settings, data, valid)
    for step in range(1, 10):
        again = new_run(settings)
        shutil.copytree(run.directory / "checkpoints", again.directory / "checkpoints")
        for path in candidates(again.directory / "checkpoints"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        result, again = trained(settings, data, valid, again)
        assert result.metrics["resumed_from_step"] == step
        assert weights_of(result.model) == weights_of(whole.model)
        assert result.history == whole.history and again.record["chain"] == run.record["chain"]


def test_a_checkpoint_of_the_cpu_loop_is_not_continued_silently(problem, config, fitted, trained, new_run):
    _, run = fitted(config(), problem(100))
    again = new_run(config())
    shutil.copytree(run.directory / "checkpoints", again.directory / "checkpoints")
    with pytest.raises(UserError, match="has another device"):
        trained(config(), problem(100), run=again)


def poisoned(problem):
    data = problem(200)
    data.numeric[77, 1] = np.nan
    return data, data.rows[77]


def test_a_bad_loss_stops_at_its_step_and_names_a_row(problem, config, trained):
    data, row = poisoned(problem)
    with pytest.raises(UserError, match=rf"the loss at step \d is not finite \(rank 0: dataset rows \[{row}\]\)"):
        trained(config(), data)


def test_after_a_bad_loss_no_later_step_of_the_chunk_changes_a_weight(problem, config, trained, monkeypatch):
    data, _ = poisoned(problem)
    kept = []
    monkeypatch.setattr(Trainer, "_bad_step", lambda self, figures: kept.append(self.stepper.weights.values.clone()))
    trained(config(), data)
    assert torch.isfinite(kept[0]).all()
    assert all(torch.equal(kept[0], values) for values in kept)


def test_a_bad_loss_is_skipped_and_counted_as_on_the_cpu(problem, config, fitted, trained):
    data, _ = poisoned(problem)
    settings = config(train__on_bad_loss="skip")
    (want, _), (found, _) = fitted(settings, data), trained(settings, data)
    assert found.metrics["train/steps_skipped"] == want.metrics["train/steps_skipped"] == 2
    assert furthest(want.model, found.model) < 2e-5


def test_losses_are_logged_at_the_steps_of_the_cpu_loop(problem, config, fitted, trained):
    settings = config(train__log_every=3)
    lines = []
    for f in (fitted, trained):
        _, run = f(settings, problem(430))
        text = (run.directory / "metrics.jsonl").read_text().splitlines()
        lines.append([(line["step"], line["train/loss"]) for line in map(json.loads, text) if "train/loss" in line])
    assert [step for step, _ in lines[0]] == [step for step, _ in lines[1]]
    np.testing.assert_allclose([loss for _, loss in lines[0]], [loss for _, loss in lines[1]], rtol=2e-6)


def test_several_workers_come_to_the_weights_of_one(problem, config, trained, new_run):
    """Workers are threads here, with a barrier for a network."""
    data, valid = problem(430), problem(101, seed=1)
    settings = config(train__epochs=1, train__batch_size=50)
    want, _ = trained(settings, data, valid)
    runs = [new_run(settings) for _ in range(3)]

    def work(exchange):
        return trained(settings, data, valid, runs[exchange.rank], exchange=exchange, local_workers=3)[0]

    for found in together(3, work):
        assert furthest(want.model, found.model) < 2e-5
        assert [entry["row_stream"] for entry in found.history] == [entry["row_stream"] for entry in want.history]
        assert found.history[-1]["valid_roc_auc"] == pytest.approx(want.history[-1]["valid_roc_auc"], abs=1e-4)


def test_workers_cut_a_batch_into_ranges_that_hold_each_row_once(config):
    settings = config().train
    for rows, batch, world in itertools.product((1, 10, 37), (4, 7, 10), (1, 2, 3)):
        batch = min(batch, rows)
        plans = [StepPlan(Schedule(rows, batch, 1, 0, settings, 8), rank, world) for rank in range(world)]
        taken = []
        for plan in plans:
            counts, starts = plan.counts(0, plan.schedule.epoch_steps)
            assert (counts <= plan.local).all()
            taken += [at for count, start in zip(counts, starts, strict=True) for at in range(start, start + count)]
        assert sorted(taken) == list(range(rows))


def test_validation_tiles_on_the_device_give_what_the_cpu_gives(problem, config):
    data = problem(300)
    model = build_model(config().model, 4, CARDINALITIES, 1, 3)
    evaluators = Evaluators.of(model, "fp32")
    found = device_logits(evaluators, data.numeric, data.codes, torch.device("cpu"), tile_rows=128)
    np.testing.assert_allclose(found, predict_logits(model, data.numeric, data.codes, "fp32"), rtol=1e-5, atol=1e-6)
    assert device_logits(evaluators, data.numeric[:0], data.codes[:0], torch.device("cpu")).shape == (0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["graph", "eager"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_card_every_runner_comes_to_the_weights_of_the_cpu(
    problem, config, fitted, trained, runner, resident, precision
):
    data, valid = problem(5000), problem(500, seed=1)
    settings = config(train__batch_size=512, train__log_every=4)
    keys = {"precision": precision}
    want, _ = fitted(settings, data, valid, **keys)
    found, run = trained(settings, data, valid, device="cuda", runner=runner, resident=resident, **keys)
    assert run.record["device_facts"]["runner"] == ("eager" if runner == "eager" else "graph")
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    for a, b in zip(want.history, found.history, strict=True):
        assert a["row_stream"] == b["row_stream"]
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=tolerance)
