"""A model with members: scores, weights, files; members are trained as models by themselves, and killed runs go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from scipy.optimize import minimize

from engine.config import schema
from engine.config.sections.training import ModelConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime.records import Damaged
from engine.runtime.run import Run
from engine.training import fitting
from engine.training.blend import SHARES, Blend, equal_shares, mean_of
from engine.training.examples import Examples
from engine.training.fitting import fit_all, member_plans, together
from engine.training.losses import LOSSES, cooled, recorded_loss, to_scores
from engine.training.path_gradients import Typical
from engine.training.read_model import check_part, read_model
from engine.training.target import TargetScale
from engine.training.tensors import Tensors
from engine.training.weighing import STEPS, best_shares, trained_members, without_idle
from tests.training.conftest import CARDINALITIES, make_config, make_problem, open_run

BINARY = LOSSES["binary"]
KEYS: Any = {"cardinalities": CARDINALITIES, "outputs": [1], "dataset_digest": "data", "precision": "fp32"}
MIXED = {
    "net": {"kind": "mlp"},
    "tab": {"kind": "tabm", "hidden": [8], "members": 3},
    "trees": {"kind": "lightgbm", "trees": {"rounds": 5, "leaves": 4}},
}


class Encoder:
    """What training reads of an encoder."""

    numeric_, width, cardinalities = (), 4, CARDINALITIES


def trained(config: Config, run: Run, data: Examples, valid: Examples) -> fitting.Trained:
    return fit_all(run, member_plans(config), Encoder(), {"train": data, "valid": valid}, KEYS)  # type: ignore[arg-type]


def blend_of(config: Config, run: Run, data: Examples, valid: Examples, shares: tuple[float, ...] = ()) -> Blend:
    plans = member_plans(config)
    members = trained_members(plans, trained(config, run, data, valid).models, "fp32")
    return Blend(tuple(members), shares or equal_shares(len(members)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blend, Examples, Run]:
    """A network, a network with members of its own, and trees; two seeds each, where they read one."""
    folder = tmp_path_factory.mktemp("blend")
    config = make_config(folder, model__kind="blend", model__blend={"models": MIXED}, train__seeds=2, train__epochs=1)
    data, run = make_problem(300), open_run(config)
    return blend_of(config, run, data, make_problem(100, seed=1), (0.5, 0.125, 0.0, 0.25, 0.125)), data, run


def stored(blend: Blend, folder: Path) -> tuple[Path, Any]:
    file = folder / "model.safetensors"
    file.write_bytes(blend.weights())
    return file, {"architecture": json.loads(json.dumps(blend.describe())), "precision": "fp32", "tile_rows": 1024}


# ----------------------------------------------------------------------------------------------------------- scores


def test_scores_are_the_weighted_mean_of_the_members_scores_whatever_the_batch(
    mixed: tuple[Blend, Examples, Run],
) -> None:
    blend, data, _ = mixed
    names = [member.name for member in blend.members]
    assert names == ["net_seed_0", "net_seed_1", "tab_seed_0", "tab_seed_1", "trees"]
    whole = blend.to_scores(BINARY, blend.logits(data.numeric, data.codes, threads=2))
    slow = np.zeros(len(data))
    for member, share in zip(blend.members, blend.shares, strict=True):
        model = member.model
        slow += share * to_scores(BINARY, model.logits(data.numeric, data.codes), model.target).astype(np.float64)
    assert whole.dtype == np.float32 and np.array_equal(whole, slow.astype(np.float32))
    for rows in (slice(0, 1), slice(7, 20), slice(299, 300)):
        part = blend.to_scores(BINARY, blend.logits(data.numeric[rows], data.codes[rows]))
        assert part.tobytes() == whole[rows].tobytes()


def test_a_blend_is_read_back_from_one_file_with_the_same_bits(
    mixed: tuple[Blend, Examples, Run], tmp_path: Path
) -> None:
    blend, data, _ = mixed
    file, record = stored(blend, tmp_path)
    check_part(record, "here")
    found = read_model(Tensors.of(file), record, "here")
    assert isinstance(found, Blend) and found.shares == blend.shares and found.weights() == blend.weights()
    assert found.logits(data.numeric, data.codes).tobytes() == blend.logits(data.numeric, data.codes).tobytes()
    kept = without_idle(blend)
    assert len(kept.members) == 4 and "tab_seed_0" not in [member.name for member in kept.members]
    scores = [part.to_scores(BINARY, part.logits(data.numeric, data.codes)) for part in (kept, blend)]
    assert scores[0].tobytes() == scores[1].tobytes()


def test_contributions_are_the_weighted_sum_of_the_members_and_add_up(mixed: tuple[Blend, Examples, Run]) -> None:
    blend, data, _ = mixed
    warm = Blend(
        (
            dataclasses.replace(blend.members[0], record={**blend.members[0].record, "temperature": 2.0}),
            *blend.members[1:],
        ),
        blend.shares,
    )
    numeric, codes, one = data.numeric[:50], data.codes[:50], np.ones((50, 1))
    for found, first in ((blend, 1.0), (warm, 2.0)):
        parts = [member.model.contributions(numeric, codes, one) for member in found.members]
        weights = [share / (first if k == 0 else 1.0) for k, share in enumerate(found.shares)]
        want = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(found.contributions(numeric, codes, one), want, rtol=1e-12)
        away = found.explained(found.logits(numeric, codes))[:, 0] - found.baseline()
        assert np.sqrt(np.mean((away - want.sum(axis=1)) ** 2)) < 0.05 * np.sqrt(np.mean(away**2))
    trees: Any = blend.members[-1].model
    moved = dataclasses.replace(blend.members[-1], model=dataclasses.replace(trees, target=TargetScale(0.0, 9.0)))
    other = Blend((*blend.members[:-1], moved), blend.shares)
    with pytest.raises(UserError, match="targets of other scales"):
        other.baseline()


def test_a_temperature_cools_each_member_and_adds_to_its_own(mixed: tuple[Blend, Examples, Run]) -> None:
    blend, data, _ = mixed
    first = dataclasses.replace(blend.members[0], record={**blend.members[0].record, "temperature": 2.0})
    model, loss = first.model, recorded_loss({"loss": "binary", "temperature": 1.5})
    own = Blend((first,), (1.0,))
    logits = own.logits(data.numeric, data.codes)
    found = own.to_scores(loss, logits)
    assert np.allclose(found, to_scores(cooled(BINARY, 3.0), logits, model.target), atol=1e-7)
    assert not np.allclose(found, own.to_scores(BINARY, logits), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r, t: t.update({SHARES: np.array([0.5, 0.5, 0.5, 0, 0])}), "5 numbers of at least 0 with sum 1"),
        (lambda r, t: t.update({SHARES: np.array([1.5, -0.5, 0, 0, 0])}), "5 numbers of at least 0 with sum 1"),
        (lambda r, t: t.update({SHARES: np.array([np.nan, 1, 0, 0, 0])}), "5 numbers of at least 0 with sum 1"),
        (lambda r, t: t.update({SHARES: np.array([1.0])}), "shares must be 5 numbers"),
        (lambda r, t: t.pop(SHARES), "shares must be 5 numbers, found None"),
        (lambda r, t: t.update({"5/more": np.zeros(2)}), "weights of 5 members, found tensor '5/more'"),
        (lambda r, t: t.pop("0/" + next(n for n in t if n.startswith("0/"))[2:]), "must describe the tensors"),
        (lambda r, t: r["settings"]["members"].pop(), "weights of 4 members"),
        (lambda r, t: r["settings"]["members"].clear(), "members must be 1 to 256, found 0"),
        (lambda r, t: r["settings"].update(members=r["settings"]["members"] * 60), "members must be 1 to 256, found 300"),
        (lambda r, t: r["settings"]["members"][0]["architecture"].update(outputs=2), r"members\[0\]: outputs must be that"),
        (lambda r, t: r["settings"]["members"][1]["architecture"].update(kind="blend"), "must not be a blend itself"),
        (lambda r, t: r["settings"]["members"][1].update(tile_rows=10**9), "tile_rows must be a number from 1"),
        (lambda r, t: r["settings"]["members"][1].update(temperature=0), "temperature must be a number from 0.01"),
        (lambda r, t: r["settings"]["members"][0]["typical"].update(codes=[6, 5]), "typical must be a row as the model reads it"),
        (lambda r, t: r["settings"]["members"][0]["typical"].update(numeric=[]), "typical must be a row as the model reads it"),
        (lambda r, t: r["settings"]["members"][4]["architecture"]["settings"].update(nodes=10**12), "nodes must be a number"),
        (lambda r, t: r.update(settings={}), "must have 'members'"),
    ],
)  # fmt: skip
def test_a_damaged_blend_is_refused(
    mixed: tuple[Blend, Examples, Run], tmp_path: Path, change: Callable[[Any, Any], Any], said: str
) -> None:
    file, record = stored(mixed[0], tmp_path)
    tensors = safetensors.numpy.load_file(file)
    change(record["architecture"], tensors)
    file.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(Damaged, match=said):
        check_part(record, "here")
        read_model(Tensors.of(file), record, "here")


# ---------------------------------------------------------------------------------------------------------- weights


def log_loss(shares: np.ndarray, scores: list[np.ndarray], target: np.ndarray, weight: np.ndarray) -> float:
    mean = sum(share * part for share, part in zip(shares, scores, strict=True))
    return float(np.average(-np.log(np.where(target == 1, mean, 1 - mean)), weights=weight))


@pytest.mark.parametrize("seed", range(4))
def test_weights_have_the_least_log_loss_on_the_simplex(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, count = rng.normal(size=800), 2 + seed % 3
    target = (rng.random(800) < 1 / (1 + np.exp(-truth))).astype(np.float64)
    scores = [1 / (1 + np.exp(-truth * rng.uniform(0.2, 2) - rng.normal(0, 1, 800))) for _ in range(count)]
    weight = rng.uniform(0, 2, 800)
    found = best_shares(scores, target, weight, BINARY)
    bounds, whole = [(0, 1)] * count, {"type": "eq", "fun": lambda x: x.sum() - 1}
    peer = minimize(
        log_loss, np.full(count, 1 / count), (scores, target, weight), bounds=bounds, constraints=whole, tol=1e-12
    )
    assert sum(found) == 1 and min(found) >= 0
    assert np.allclose(found, peer.x, atol=3 / STEPS)
    assert log_loss(np.array(found), scores, target, weight) == pytest.approx(peer.fun, abs=1e-6)


def test_weights_do_not_depend_on_rows_without_a_label_or_weight_and_a_useless_member_gets_none() -> None:
    rng = np.random.default_rng(0)
    good = rng.uniform(0.05, 0.95, 400)
    target = (rng.random(400) < good).astype(np.float64)
    scores = [good, np.full(400, 0.5)]
    assert best_shares(scores, target, None, BINARY) == (1.0, 0.0)
    more = [np.concatenate([part, 1 - target[:50], target[:50]]) for part in scores]
    unknown, idle = np.full(50, np.nan), np.zeros(50)
    weight = np.concatenate([np.ones(400), np.ones(50), idle])
    assert best_shares(more, np.concatenate([target, unknown, target[:50]]), weight, BINARY) == (1.0, 0.0)


def test_numbers_are_weighed_by_the_metric_of_their_loss() -> None:
    rng = np.random.default_rng(1)
    target = rng.normal(10, 3, 500)
    scores = [target + rng.normal(0, 1, 500), target + rng.normal(0, 2, 500)]
    shares = best_shares(scores, target, None, LOSSES["squared"])
    expected = np.linalg.lstsq((scores[0] - scores[1])[:, None], target - scores[1], rcond=None)[0][0]
    assert shares[0] == pytest.approx(expected, abs=2 / STEPS)
    median = best_shares(
        [np.median(target) + np.ones(500), np.full(500, np.median(target))], target, None, LOSSES["quantile"]
    )
    assert median == (0.0, 1.0)
    assert mean_of(scores, shares).shape == (500,)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("keys", "names", "seeds"),
    [
        ({}, [""], [0]),
        ({"train__seeds": 3, "train__seed": 5}, ["seed_15", "seed_16", "seed_17"], [15, 16, 17]),
        ({"train__seeds": [4, 1]}, ["seed_4", "seed_1"], [4, 1]),
        ({"train__seeds": [9]}, [""], [9]),
        ({"model__kind": "blend", "model__blend": {"models": MIXED}}, ["net", "tab", "trees"], [0, 0, 0]),
        ({"model__kind": "blend", "model__blend": {"bundles": ["a", "b"]}}, [], []),
    ],
)
def test_a_run_trains_a_member_for_each_seed_of_each_model(
    config: Callable[..., Config], keys: dict[str, Any], names: list[str], seeds: list[int]
) -> None:
    plans = member_plans(config(**keys))
    assert [plan.name for plan in plans] == names
    assert [plan.config.train.seed for plan in plans] == seeds
    assert all(plan.config.train.seeds == 1 and not plan.config.several for plan in plans)


def test_equal_trees_are_refused_and_those_that_draw_rows_are_not(config: Callable[..., Config]) -> None:
    settings = {"model__kind": "lightgbm", "train__seeds": 2}
    with pytest.raises(UserError, match=r"would grow 2 equal models of model=lightgbm.*row_fraction"):
        member_plans(config(**settings))
    assert len(member_plans(config(**settings, model__trees={"column_fraction": 0.5}))) == 2


@pytest.mark.parametrize(
    ("blend", "said"),
    [
        ({}, "one of the two, found neither"),
        ({"bundles": ["a", "b"], "models": MIXED}, "one of the two, found both"),
        ({"bundles": ["a"]}, "2 to 256 different members, found 1: a$"),
        ({"bundles": ["b", "a", "a"]}, "2 to 256 different members, found a 2 times"),
        ({"models": {"a": {"kind": "mlp"}, "b": {"hidden": [3]}}}, "models.b.kind must be a kind of model by itself, found None"),
        ({"models": {"a": {"kind": "mlp"}, "b": {"kind": "auto"}}}, "must be a kind of model by itself, found 'auto'"),
        ({"models": {"a": {"kind": "mlp"}, "b": {"kind": "mlp", "hiden": [3]}}}, "Did you mean 'model.blend.models.b.hidden'"),
    ],
)  # fmt: skip
def test_a_blend_that_makes_no_sense_is_refused_with_the_key(blend: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        schema.build(ModelConfig, {"kind": "blend", "blend": blend}, "model")


def test_a_member_has_the_bytes_of_the_model_that_is_trained_by_itself(
    config: Callable[..., Config], fitted: Callable[..., Any]
) -> None:
    data, valid = make_problem(300), make_problem(100, seed=1)
    several = config(train__seeds=2, train__seed=3, train__shards=4)
    both = trained(several, open_run(several), data, valid)
    for seed, model in zip((6, 7), both.models, strict=True):
        alone, _ = fitted(config(train__seed=seed, train__shards=4), data, valid)
        assert model.weights() == fitting._finished(alone, Typical.of(data, CARDINALITIES)).weights()
    assert both.metrics["train/steps"] == 2 * alone.metrics["train/steps"]
    assert list(both.histories) == ["seed_6", "seed_7"]


class Killed(BaseException):
    """A process that is gone."""


def test_a_run_that_is_killed_in_its_second_member_goes_on_there_with_the_same_bytes(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, valid = make_problem(300), make_problem(100, seed=1)
    settings = config(train__seeds=3, train__checkpoint_every=2, train__log_every=1)
    whole_run, run = open_run(settings), open_run(settings)
    whole = trained(settings, whole_run, data, valid)
    log, kills = Run.log_metrics, {"seed_1/": 3, "seed_2/": 7}

    def killed(self: Run, step: int, values: Any) -> None:
        log(self, step, values)
        if kills.get(self.series.prefix) == step:
            del kills[self.series.prefix]
            raise Killed

    monkeypatch.setattr(Run, "log_metrics", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            trained(settings, run, data, valid)
    again = trained(settings, run, data, valid)
    assert [model.weights() for model in again.models] == [model.weights() for model in whole.models]
    assert run.record["chain"] == whole_run.record["chain"] and {"order", "loss@1", "loss@10"} <= set(
        run.record["chain"]
    )
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    steps = {
        name: [line["step"] for line in lines if f"{name}/train/loss" in line]
        for name in ("seed_0", "seed_1", "seed_2")
    }
    assert steps["seed_0"] == list(range(1, 11))  # trained once
    assert set(steps["seed_1"]) == set(range(11, 21)) and set(steps["seed_2"]) == set(range(21, 31))
    assert again.metrics["resumed_from_step"] > 0


def test_figures_of_members_are_summed_averaged_or_the_largest() -> None:
    found = together(
        {
            "a": {"train/steps": 3.0, "train/loss": 0.2, "train/peak_memory_bytes": 7.0, "train/rows_per_second": 10.0},
            "b": {"train/steps": 5.0, "train/loss": 0.4, "train/peak_memory_bytes": 9.0, "resumed_from_step": 2.0},
        }
    )
    assert found["train/steps"] == 8 and found["train/loss"] == pytest.approx(0.3)
    assert (
        found["train/peak_memory_bytes"] == 9
        and found["train/rows_per_second"] == 10
        and found["resumed_from_step"] == 2
    )
