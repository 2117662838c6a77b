"""Unmodified modules of torch train to one set of bytes, whoever computes what, and after any kill; what cannot is refused."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import plugins
from engine.config.plugins import Plugin
from engine.config.sections.training import ModelConfig
from engine.errors import UserError
from engine.training import kinds
from engine.training.audit import Audit
from engine.training.checkpoint import candidates
from engine.training.cpu_stepper import CpuStepper
from engine.training.gpu.graphs import Graphed
from engine.training.gpu.stepper import GpuStepper
from engine.training.losses import LOSSES, to_scores
from engine.training.model import architecture, build_model
from engine.training.objectives import objectives_of
from engine.training.precision import has_bf16
from engine.training.probe import probe
from engine.training.schedule import Schedule
from engine.training.target import PLAIN
from engine.training.threads import Team
from tests.logits import predict_logits
from tests.training.conftest import CARDINALITIES, make_config, make_problem, open_run, train, weights_of
from tests.training.modules import CHANCE, COUPLING
from tests.training.tape import Taped
from tests.training.test_exchange import together

FILE = Plugin("modules.py", Path(__file__).with_name("modules.py").read_bytes())
plugins.add([FILE])
MODULES: dict[str, dict[str, object]] = {
    "Net": {},
    "TabM": {},
    "Members": {},
    "Ple": {"bins": 3},
    "FtTransformer": {},
    "Sequence": {},
    "Sequence behind": {"batch_first": False},
    "Lstm": {},
    "Normed": {},
    "Odd": {},
    "Frozen": {},
}
NEEDS = {"TabM": "tabm", "Ple": "rtdl_num_embeddings", "FtTransformer": "rtdl_revisiting_models"}


def kind(name: str) -> str:
    return f"{name.split()[0]}@{FILE.digest}"


def settled(folder, name, **keys):
    package = NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    usual = {"train__epochs": 1, "train__batch_size": 40, "train__shards": 4, "train__audit_every": 2}
    settings = {"model__kind": kind(name), "model__settings": MODULES.get(name, {})}
    return make_config(folder, **{**usual, **settings, **keys})


def arrays(config, data):
    return kinds.fit_arrays(config.model.kind, config.model.settings, data.numeric, data.codes, data.target)


def fitted_on(config, data, valid=None, run=None, **keys):
    return train(config, data, valid, run, fitted=arrays(config, data), **keys)


def digest(model):
    return hashlib.sha256(repr(weights_of(model)).encode()).hexdigest()[:12]


CASES = [pytest.param(name, "fp32", id=name) for name in MODULES]
CASES += [
    pytest.param(name, "bf16", marks=[] if name in ("Net", "Sequence") else pytest.mark.slow, id=f"{name}-bf16")
    for name in MODULES
    if has_bf16()
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_weights_are_equal_for_threads_workers_and_after_a_stop(tmp_path, name, precision):
    data, valid = make_problem(93), make_problem(40, seed=1)
    settings = settled(tmp_path, name, train__checkpoint_every=1, train__keep_checkpoints=99)
    whole, run = fitted_on(settings, data, valid, precision=precision)
    assert whole.metrics["train/audits"] == 1 and whole.steps == 3
    assert any((a != b).any() for a, b in zip(*_before_and_after(settings, data, whole), strict=True))

    two, _ = fitted_on(settled(tmp_path, name, cluster__threads=2), data, valid, precision=precision)
    assert digest(two.model) == digest(whole.model) and two.history == whole.history

    runs = [open_run(settings) for _ in range(2)]
    found = together(
        2, lambda ex: fitted_on(settings, data, valid, runs[ex.rank], exchange=ex, local_workers=2, precision=precision)
    )
    assert {digest(result.model) for result, _ in found} == {digest(whole.model)}

    again = open_run(settings)
    shutil.copytree(run.directory / "checkpoints", again.directory / "checkpoints")
    for path in candidates(again.directory / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 1:
            shutil.rmtree(path)
    rest, _ = fitted_on(settings, data, valid, again, precision=precision)
    assert rest.metrics["resumed_from_step"] == 1
    assert digest(rest.model) == digest(whole.model) and rest.history == whole.history


def killed(folder: str, name: str, precision: str, step: int) -> None:
    """Train in this process until it is killed after a step; called in a process of its own."""
    run_step = CpuStepper.run

    def dying(self, at):
        taken = run_step(self, at)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return taken

    CpuStepper.run = dying  # type: ignore[method-assign]
    config = settled(Path(folder), name, **KILLED)
    run = open_run(config)
    kept = Path(folder) / "checkpoints"
    if kept.exists():
        shutil.copytree(kept, run.directory / "checkpoints")
    fitted_on(config, make_problem(93), make_problem(40, seed=1), run, precision=precision)


KILLED = {"train__epochs": 4, "train__checkpoint_every": 1, "train__audit_every": 5}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("Normed", "fp32"), ("Sequence", "bf16"), ("TabM", "fp32")])
def test_ten_kills_leave_the_weights_as_they_would_be(tmp_path, name, precision):
    config = settled(tmp_path, name, **KILLED)
    whole, _ = fitted_on(config, make_problem(93), make_problem(40, seed=1), precision=precision)
    folder = tmp_path / "killed"
    folder.mkdir()
    for step in range(1, 11):
        call = (
            f"from tests.training.test_modules import killed; killed({str(folder)!r}, {name!r}, {precision!r}, {step})"
        )
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        (run,) = folder.glob("runs/train/test/*")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.move(run / "checkpoints", folder / "checkpoints")
        shutil.rmtree(run)
    again = open_run(config)
    shutil.copytree(folder / "checkpoints", again.directory / "checkpoints")
    rest, _ = fitted_on(config, make_problem(93), make_problem(40, seed=1), again, precision=precision)
    assert rest.metrics["resumed_from_step"] == 10
    assert digest(rest.model) == digest(whole.model) and rest.history == whole.history


def _before_and_after(config, data, result):
    new = build_model(config.model, 4, CARDINALITIES, 1, config.train.seed, arrays(config, data))
    return [[tensor.detach() for tensor in model.trained.values()] for model in (new, result.model)]


@pytest.mark.parametrize("name", MODULES)
def test_a_row_has_the_score_that_it_has_alone(tmp_path, name):
    data = make_problem(93)
    result, _ = fitted_on(settled(tmp_path, name), data)
    whole = predict_logits(result.model, data.numeric, data.codes, "fp32", tile_rows=64, threads=2)
    alone = predict_logits(result.model, data.numeric[70:71], data.codes[70:71], "fp32", tile_rows=64)
    assert alone.tobytes() == whole[70:71].tobytes() and whole.shape[1:] == result.model.output_shape


# ------------------------------------------------------------------------------------------------------ what is kept


def test_frozen_weights_stay_and_tied_ones_stay_tied(tmp_path):
    data = make_problem(93)
    config = settled(tmp_path, "Frozen", train__weight_decay=0.5)
    result, _ = fitted_on(config, data)
    new = build_model(config.model, 4, CARDINALITIES, 1, 0)
    assert torch.equal(result.model.module.body[0].weight, new.module.body[0].weight)
    assert not torch.equal(result.model.module.output.weight, new.module.output.weight)
    odd, _ = fitted_on(settled(tmp_path, "Odd"), data)
    assert odd.model.module.c.weight is odd.model.module.b.weight and "c.weight" not in odd.model.state_dict()
    assert "frozen" in odd.model.state_dict() and "scale" in odd.model.state_dict()


@pytest.mark.parametrize("n", [40, 37])
def test_running_statistics_are_the_mean_of_the_shards(tmp_path, n):
    """One step, by hand: each shard's statistics of its own rows, averaged; the counter is the first shard's."""
    data = make_problem(n)
    result, _ = fitted_on(settled(tmp_path, "Normed"), data)
    from engine.training.order import RowOrder, order_key

    rows = RowOrder(n, order_key(data, 0)).positions(0, 0, n)
    means = [0.1 * data.numeric[rows[at : at + 10]].mean(0) for at in range(0, n, 10)]
    found = result.model.module.body[0]
    np.testing.assert_allclose(found.running_mean.numpy(), np.mean(means, 0), rtol=1e-5, atol=1e-7)
    assert int(found.num_batches_tracked) == 1 and result.model.traits.couples
    assert result.model.traits.buffers[:2] == ("body.0.running_mean", "body.0.running_var")


def test_a_skipped_step_leaves_buffers_as_they_were(tmp_path):
    data = make_problem(40)
    data.target[:] = data.target  # all of it is one batch
    data.numeric[7, 1] = np.nan
    with pytest.raises(UserError, match="no step of epoch 1 could be used"):
        fitted_on(settled(tmp_path, "Normed", train__on_bad_loss="skip", train__audit_every=0), data)
    clean = make_problem(93)
    clean.numeric[7, 1] = np.nan
    result, _ = fitted_on(settled(tmp_path, "Normed", train__on_bad_loss="skip"), clean)
    assert result.metrics["train/steps_skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    assert int(result.model.module.body[0].num_batches_tracked) == 2


def test_a_shard_of_one_row_is_left_out_where_rows_share_statistics(tmp_path):
    result, _ = fitted_on(settled(tmp_path, "Normed"), make_problem(81))
    assert [entry["rows"] for entry in result.history] == [81]


def test_the_loss_and_the_scores_of_members_are_means(tmp_path):
    from engine.training.members import row_losses

    config = settled(tmp_path, "Members", train__loss="multiclass")
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0])
    each = [torch.nn.functional.cross_entropy(logits[:, m], target.long(), reduction="none") for m in range(3)]
    torch.testing.assert_close(row_losses(LOSSES["multiclass"], logits, target), torch.stack(each).mean(0))
    network = build_model(config.model, 4, CARDINALITIES, 4, 0)
    scores = to_scores(LOSSES["multiclass"], logits.numpy(), network.target)
    np.testing.assert_allclose(scores, torch.softmax(logits, 2).mean(1).numpy(), rtol=1e-6)
    assert network.output_shape == (3, 4)


@pytest.mark.parametrize("name", ["Net", "Members", "Sequence", "Sequence behind", "Frozen", "Normed"])
def test_a_gpu_step_has_the_losses_of_the_cpu_and_can_be_captured(tmp_path, name):
    """On the CPU, eagerly and under a tape."""
    data = make_problem(96)
    config = settled(tmp_path, name, train__batch_size=32)
    want, _ = fitted_on(config, data)
    steps = [functools.partial(GpuStepper, device="cpu", runner=r) for r in ("eager", lambda s: Graphed(s, Taped()))]
    eager, taped = [fitted_on(config, data, make_stepper=step)[0] for step in steps]
    assert digest(eager.model) == digest(taped.model)
    if name not in ("Sequence behind", "Normed"):  # masks by place; statistics of the whole batch
        for a, b in zip(want.history, eager.history, strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
    if name == "Normed":
        assert int(eager.model.module.body[0].num_batches_tracked) == 3


@pytest.mark.parametrize("name", ["Net", "Sequence"])
def test_weight_decay_shrinks_matrices_as_torch_does_it(tmp_path, name):
    """One step without gradient clipping against torch.optim.AdamW with two groups."""
    data = make_problem(40)
    keys = {"train__weight_decay": 0.7, "train__clip": 0.0, "train__warmup": 0.0, "train__lr": 0.1}
    settings = {**MODULES[name], **({"dropout": 0.0} if name == "Net" else {})}
    found = {}
    for rule in ("auto", "matrices", "all"):
        config = settled(tmp_path, name, model__settings=settings, train__decay=rule, **keys)
        found[rule] = fitted_on(config, data)[0].model
    assert digest(found["auto"]) == digest(found["matrices"]) != digest(found["all"])
    start = build_model(config.model, 4, CARDINALITIES, 1, 0)
    assert start.spared("all") == set()
    for key, before in start.trained.items():
        spared = before.dim() < 2 or "tables" in key or "norm" in key
        assert (key in start.spared("auto")) == spared
        before, all_, some = (model.trained[key].detach() for model in (start, found["all"], found["auto"]))
        torch.testing.assert_close(some - all_, before * (0.1 * 0.7 if spared else 0.0), rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "attention": "row's output depends on the others.*first in layer att",
    "zero gate": "row's output depends on the others",
    "centred": "first between the layers of its forward, before b",
    "place": "or on its place",
    "cumsum": "row's output depends on the others",
    "counter": "changes count",
    "buffer counter": "changes seen",
    "noise": r"no randomness but dropout.*aten::normal_",
    "own generator": r"no randomness but dropout.*aten::uniform_",
    "numpy noise": "from the rows and its weights alone.*calls posix.urandom",
    "always dropout": "training=self.training",
    "instance norm": "row's output depends on the others.*first in layer norm",
    "mean": r"must give float32 \[rows, 1\].*found torch.float32 \[\]",
    "flat": r"must give float32 \[rows, 1\].*found torch.float32 \[256\]",
    "checkpoint": "activation checkpointing",
    "error": r"must run on numbers and codes: RuntimeError.*modules.py .*line \d+",
    "hidden list": "more must be a parameter",
    "sparse": "table must have sparse=False",
    "lazy": "must have its shape when it is built",
    "double": "must be float32, found torch.float64",
    "no parameters": "must have parameters that are trained",
    "random attribute": "in parameters or buffers",
    "frozen changes": "changes a.bias",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_promises_do_not_bear_is_refused_before_the_first_step(tmp_path, wrong):
    config = settled(tmp_path, "Bad", model__settings={"kind": wrong})
    with pytest.raises(UserError, match=REFUSED[wrong]):
        fitted_on(config, make_problem(93))
    assert not list(tmp_path.rglob("step-*"))


# What the message names: the kernel of torch, or the call.
DRAWN = {
    "rand": "uniform_", "randn_like": "normal_", "randint": "random_", "randperm": "randperm", "normal": "normal",
    "bernoulli": "bernoulli", "bernoulli_ of a generator": "generator of its own", "multinomial": "multinomial",
    "poisson": "poisson", "exponential_": "exponential_", "geometric_": "geometric_", "cauchy_": "cauchy_",
    "log_normal_": "log_normal_",
    "gumbel_softmax": "exponential_", "rrelu": "rrelu", "Gamma": "_standard_gamma", "Dirichlet": "_sample_dirichlet",
    "Normal": "normal", "binomial": "binomial", "fractional pooling": "uniform_",
    "random": "Random.random", "random.Random": "Random", "numpy.random": "numpy.random", "numpy.default_rng": "urandom",
    "urandom": "urandom", "secrets": "urandom", "uuid": "urandom", "clock": "time.time", "date": "datetime.now",
}  # fmt: skip
NOT_OF_TORCH = tuple(DRAWN)[20:]


@pytest.mark.slow
@pytest.mark.parametrize("only_training", [False, True])
@pytest.mark.parametrize("way", DRAWN)
def test_every_way_to_draw_numbers_is_named_before_the_first_step(tmp_path, way, only_training):
    assert DRAWN.keys() == CHANCE.keys() and len(DRAWN) - len(NOT_OF_TORCH) >= 15
    config = settled(tmp_path, "Wrong", model__settings={"way": way, "training": only_training})
    rule = "calls .*" if way in NOT_OF_TORCH else "no randomness but dropout.*aten::.*"
    with pytest.raises(UserError, match=f"{rule}{DRAWN[way]}"):
        fitted_on(config, make_problem(93))
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("way", COUPLING)
def test_every_way_to_depend_on_other_rows_is_named_before_the_first_step(tmp_path, way):
    config = settled(tmp_path, "Wrong", model__settings={"way": way})
    with pytest.raises(
        UserError, match=r"must score each row alone, but a row's output depends on the (others|number of rows)"
    ):
        fitted_on(config, make_problem(93))
    assert not list(tmp_path.rglob("step-*"))


def test_a_module_with_nothing_wrong_passes_in_little_time(tmp_path):
    config, data = settled(tmp_path, "Bad"), make_problem(93)
    network = build_model(config.model, 4, CARDINALITIES, 1, 0)
    began = time.thread_time()
    with Team(1):
        traits = probe(
            network, data, Schedule.of(93, config.train), objectives_of(config.train, data, [1], [PLAIN]), "fp32"
        )
    assert not traits.couples and traits.buffers == () and time.thread_time() - began < 2


def test_an_audit_notices_a_shard_that_changes(tmp_path, monkeypatch):
    compute = Audit._compute

    def other(self, step, shard):
        compute(self, step, shard)
        self._row[0] += 1

    monkeypatch.setattr(Audit, "_compute", other)
    with pytest.raises(UserError, match="shard 0 of step 1 has another one on another thread"):
        fitted_on(settled(tmp_path, "Net"), make_problem(93))


# ------------------------------------------------------------------------------------------------------- its settings


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"hiden": [4]}, r"model.settings.hiden is no setting of Net. Did you mean 'hidden'"),
        ({"dropout": "much"}, r"model.settings.dropout must be float for Net, found 'much'"),
        ({"hidden": 3}, r"model.kind=Net could not be built: TypeError.*modules.py .*line \d+"),
    ],
)
def test_settings_are_those_of_the_constructor(settings, found):
    with pytest.raises(UserError, match=found):
        build_model(ModelConfig(kind=kind("Net"), settings=settings), 4, CARDINALITIES, 1, 0)


def test_a_kind_that_nobody_offers_is_named():
    with pytest.raises(UserError, match=r"found 'mpl'. Did you mean 'mlp'"):
        build_model(ModelConfig(kind="mpl"), 4, CARDINALITIES, 1, 0)
    with pytest.raises(UserError, match="reads the keys of model"):
        build_model(ModelConfig(settings={"hidden": [4]}), 4, CARDINALITIES, 1, 0)


def test_the_description_has_what_rebuilds_it(tmp_path):
    data = make_problem(93)
    config = settled(tmp_path, "Ple")
    network = build_model(config.model, 4, CARDINALITIES, 1, 0, arrays(config, data))
    described = architecture(network)
    assert described["kind"] == kind("Ple") and described["settings"] == {"bins": 3} and len(described["fitted"]) == 64
