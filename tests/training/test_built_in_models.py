"""The built-in networks compute what the published packages compute, train to one set of bytes, and are bounded when read."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch

from engine.config.sections.training import ModelConfig
from engine.runtime import records
from engine.training import kinds
from engine.training.checkpoint import candidates
from engine.training.embeddings import Periodic, PiecewiseLinear, bins_of
from engine.training.finished import FinishedNetwork
from engine.training.model import architecture, build_model, declared, from_architecture
from engine.training.networks import TabM
from engine.training.precision import has_bf16
from tests.logits import predict_logits
from tests.training.conftest import CARDINALITIES, make_config, make_problem, open_run, train, weights_of
from tests.training.test_exchange import together

MODELS = {
    "tabm": {"model__kind": "tabm", "model__embeddings": "ple", "model__bins": 6, "model__members": 3},
    "signs": {"model__kind": "tabm", "model__members": 3},
    "ple": {"model__embeddings": "ple", "model__bins": 6, "model__embedding_width": 4},
    "periodic": {"model__embeddings": "periodic", "model__bins": 5, "model__embedding_width": 4},
    "wide": {"model__kind": "wide_and_deep"},
    "wide ple": {"model__kind": "wide_and_deep", "model__embeddings": "ple", "model__bins": 6},
}

ONE_BIN = pytest.mark.filterwarnings("ignore:The 2-th feature has just two bin edges")


def settled(folder, name, **keys):
    usual = {"train__epochs": 1, "train__batch_size": 40, "train__shards": 4, "train__audit_every": 2}
    return make_config(folder, **{**usual, **MODELS[name], **keys})


def arrays(config, data):
    settings = kinds.settings_of(config.model)
    return kinds.fit_arrays(config.model.kind, settings, data.numeric, data.codes, data.target)


def fitted_on(config, data, valid=None, run=None, **keys):
    return train(config, data, valid, run, fitted=arrays(config, data), **keys)


CASES = [
    pytest.param(
        name, precision, id=f"{name}-{precision}", marks=[] if name in ("tabm", "periodic") else pytest.mark.slow
    )
    for name, precision in itertools.product(MODELS, ["fp32", "bf16"] if has_bf16() else ["fp32"])
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_weights_are_equal_for_threads_workers_and_after_a_stop(tmp_path, name, precision):
    data, valid = make_problem(93), make_problem(40, seed=1)
    settings = settled(tmp_path, name, train__checkpoint_every=1, train__keep_checkpoints=99)
    whole, run = fitted_on(settings, data, valid, precision=precision)
    wanted = weights_of(whole.model)
    assert whole.metrics["train/audits"] == 1 and whole.steps == 3

    two, _ = fitted_on(settled(tmp_path, name, cluster__threads=2), data, valid, precision=precision)
    assert weights_of(two.model) == wanted and two.history == whole.history

    runs = [open_run(settings) for _ in range(2)]
    found = together(
        2, lambda ex: fitted_on(settings, data, valid, runs[ex.rank], exchange=ex, local_workers=2, precision=precision)
    )
    assert all(weights_of(result.model) == wanted for result, _ in found)

    again = open_run(settings)
    shutil.copytree(run.directory / "checkpoints", again.directory / "checkpoints")
    for path in candidates(again.directory / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 1:
            shutil.rmtree(path)
    rest, _ = fitted_on(settings, data, valid, again, precision=precision)
    assert rest.metrics["resumed_from_step"] == 1 and weights_of(rest.model) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_every_part_learns_and_a_row_has_the_score_that_it_has_alone(tmp_path, name):
    data, config = make_problem(93), settled(tmp_path, name)
    result, _ = fitted_on(config, data)
    new = build_model(config.model, 4, CARDINALITIES, 1, config.train.seed, arrays(config, data))
    same = [key for key, value in new.trained.items() if torch.equal(value, result.model.trained[key])]
    assert not same
    whole = predict_logits(result.model, data.numeric, data.codes, "fp32", tile_rows=64, threads=2)
    alone = predict_logits(result.model, data.numeric[70:71], data.codes[70:71], "fp32", tile_rows=64)
    assert alone.tobytes() == whole[70:71].tobytes() and whole.shape[1:] == result.model.output_shape


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_read_again_gives_its_scores_and_needs_nothing_else(tmp_path, name):
    data = make_problem(93)
    result, _ = fitted_on(settled(tmp_path, name), data)
    finished = FinishedNetwork(result.model, "fp32")
    described = finished.describe()
    assert "fitted" not in described and b"fitted:" not in finished.weights()
    again = from_architecture(described)
    again.load_state_dict(result.model.state_dict())
    assert architecture(again) == described
    assert (
        FinishedNetwork(again, "fp32").logits(data.numeric, data.codes) == finished.logits(data.numeric, data.codes)
    ).all()


def test_the_plain_mlp_is_described_as_before():
    described = architecture(build_model(ModelConfig(), 2, [3], 1, 0))
    assert described["settings"] == {"hidden": [256, 256, 256], "dropout": 0.1, "embedding_max": 32}


# ------------------------------------------------------------------------------------------------- published packages


def skewed(rows=500):
    """A number, one of few values, one of two, and one with most rows at zero."""
    rng = np.random.default_rng(3)
    columns = [rng.normal(size=rows), rng.integers(0, 4, rows), rng.integers(0, 2, rows), rng.exponential(size=rows)]
    columns[3][: rows // 2] = 0.0
    return np.stack(columns, 1).astype(np.float32)


@ONE_BIN
def test_piecewise_linear_embeddings_are_the_published_ones():
    published = pytest.importorskip("rtdl_num_embeddings")
    numbers = skewed()
    edges = published.compute_bins(torch.from_numpy(numbers), n_bins=8)
    theirs = published.PiecewiseLinearEmbeddings(edges, 5, activation=False, version="B")
    mine = PiecewiseLinear(4, bins_of(numbers, 8), 8, 5)
    with torch.no_grad():
        for ours, other in ((mine.weight, theirs.linear0.weight), (mine.bias, theirs.linear0.bias)):
            ours.copy_(other)
        steps = torch.randn(4, 8, 5)
        mine.steps.copy_(steps)
        width = theirs.impl.get_max_n_bins()  # that of the column with most bins
        theirs.linear.weight.copy_(torch.cat([steps[:, : width - 1], steps[:, -1:]], 1))
        probe = torch.from_numpy(np.concatenate([numbers, numbers * 3 - 1, [[9.0] * 4, [-9.0] * 4]]).astype("f4"))
        torch.testing.assert_close(mine.embed(probe), theirs(probe), rtol=1e-4, atol=1e-4)


def test_bins_of_a_column_that_is_constant_or_nearly_so_are_finite():
    numbers = np.zeros((100, 3), np.float32)
    numbers[0] = [0.0, 1e-40, 1.0]
    found = bins_of(numbers, 5)
    assert all(np.isfinite(array).all() for array in found.values())
    assert not found["slope"][:2].any() and found["slope"][2].any()
    assert {key: value.shape for key, value in bins_of(numbers[:0], 5).items()} == {
        "slope": (3, 5), "offset": (3, 5), "least": (3,),
    }  # fmt: skip


def test_periodic_embeddings_are_the_published_ones():
    published = pytest.importorskip("rtdl_num_embeddings")
    theirs, mine = published.PeriodicEmbeddings(4, 5, n_frequencies=6, lite=False), Periodic(4, 6, 5)
    with torch.no_grad():
        mine.frequencies.copy_(theirs.periodic.weight)
        mine.weight.copy_(theirs.linear.weight)
        mine.bias.copy_(theirs.linear.bias)
        numbers = torch.from_numpy(skewed())
        torch.testing.assert_close(mine.embed(numbers), theirs(numbers))
        assert mine.frequencies.abs().max() <= 0.03 and mine.frequencies.std() > 0.005


@ONE_BIN
@pytest.mark.parametrize("embeddings", ["none", "ple"])
def test_a_tabm_is_the_published_one(embeddings):
    published = pytest.importorskip("tabm")
    numbers, sizes = skewed(), [2, 3]  # of which an embedding may be one-hot
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, [2, 3], (500, 2)))
    fitted = bins_of(numbers, 8) if embeddings == "ple" else {}
    mine = TabM(
        {"numeric": 4, "cardinalities": sizes, "outputs": 2}, fitted, hidden=(16, 16), members=3, embeddings=embeddings, bins=8,
        embedding_width=5,
    ).eval()  # fmt: skip
    given = None
    if embeddings == "ple":
        rtdl = pytest.importorskip("rtdl_num_embeddings")
        edges = rtdl.compute_bins(torch.from_numpy(numbers), n_bins=8)
        given = rtdl.PiecewiseLinearEmbeddings(edges, 5, activation=False, version="B")
    theirs = published.TabM.make(
        n_num_features=4, cat_cardinalities=sizes, d_out=2, num_embeddings=given, arch_type="tabm-mini", k=3, n_blocks=2,
        d_block=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for table in mine.embeddings:
            table.copy_(torch.eye(len(table)))
        if given is not None:
            mine.numbers.weight.copy_(given.linear0.weight)
            mine.numbers.bias.copy_(given.linear0.bias)  # steps begin at zero in both
        mine.scales.copy_(theirs.backbone.affine.weight)
        for k, block in enumerate(theirs.backbone.blocks):
            mine.weights[k].copy_(block[0].weight)
            mine.biases[k].copy_(block[0].bias)
        mine.weight.copy_(theirs.output.weight)
        mine.bias.copy_(theirs.output.bias[:, None])
        torch.testing.assert_close(mine(torch.from_numpy(numbers), codes), theirs(torch.from_numpy(numbers), codes))


def test_members_begin_with_one_scale_for_a_feature_as_published():
    made = TabM(
        {"numeric": 2, "cardinalities": [9], "outputs": 1}, {}, members=4, embeddings="ple", bins=3, embedding_width=5
    )
    scales = made.scales.detach().numpy()
    parts = np.split(scales, np.cumsum(made.chunks)[:-1], axis=1)
    assert all((part == part[:, :1]).all() for part in parts) and len(np.unique(scales)) == 12
    plain = TabM({"numeric": 2, "cardinalities": [9], "outputs": 1}, {}, members=4)
    assert set(np.unique(plain.scales.detach())) == {-1.0, 1.0}


# ------------------------------------------------------------------------------------------------- hostile records


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tabm", "members", 2**40), ("tabm", "members", 0), ("tabm", "bins", -1), ("ple", "embeddings", "learned"),
        ("ple", "embedding_width", 10**9), ("periodic", "bins", "many"),
    ],
)  # fmt: skip
def test_settings_beyond_the_limits_are_damage(tmp_path, name, key, value):
    made = build_model(settled(tmp_path, name).model, 4, CARDINALITIES, 1, 0)
    described = architecture(made)
    described["settings"] |= {key: value}
    with pytest.raises(records.Damaged, match=key):
        declared(described)


def test_the_largest_that_the_limits_allow_takes_no_memory_before_it_is_refused(tmp_path):
    described = architecture(build_model(settled(tmp_path, "tabm").model, 4, CARDINALITIES, 1, 0))
    described |= {"numeric_width": 2**16}
    described["settings"] |= {"members": 1024, "bins": 4096, "embedding_width": 4096, "hidden": [2**20, 2**20]}
    with pytest.raises(records.Damaged, match="weights"):
        from_architecture(described)
    assert declared(described).widest > 2**30


def test_settings_of_the_config_reach_the_network():
    config = ModelConfig(kind="tabm", embeddings="ple", bins=7, embedding_width=3, members=5, hidden=(11,))
    made = build_model(config, 2, [], 1, 0)
    shapes = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    assert shapes["numbers.steps"] == (2, 7, 3) and shapes["scales"] == (5, 6) and shapes["weights.0"] == (11, 6)
    assert made.output_shape == (5, 1)
    assert dataclasses.replace(config, embeddings="none").members == 5
