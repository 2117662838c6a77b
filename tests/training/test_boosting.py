"""Boosted trees: the library's own scores, one model for any threads, order of rows and kills, and losses that are met."""

from __future__ import annotations

import importlib
import multiprocessing
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import schema
from engine.config.sections.training import SMOOTHED, TreesConfig
from engine.config.tree import Config
from engine.errors import UserError
from engine.features.encode import Encoder
from engine.runtime import environment
from engine.runtime.on_ray.cluster import first_cause
from engine.runtime.run import Run
from engine.training.boosting import fit as boosting
from engine.training.boosting import memory, on_lightgbm, on_xgboost
from engine.training.boosting.fit import fit_trees, monotone_columns
from engine.training.boosting.gradients import Labels, gradients, row_losses, start
from engine.training.boosting.grower import Rows, check_library, library_errors
from engine.training.evaluate import point_metrics
from engine.training.examples import Examples
from engine.training.loop import FitResult
from engine.training.losses import LOSSES, loss_of, to_scores
from tests.training.conftest import CARDINALITIES, make_config, make_problem, open_run

KINDS = ("lightgbm", "xgboost")
SMALL = {"rounds": 12, "leaves": 7, "min_rows": 5}


def settings(folder: Path, kind: str, trees: dict[str, Any] | None = None, **keys: Any) -> Config:
    found = {**SMALL, **(trees or {})}
    return make_config(folder, model__kind=kind, model__trees=found, **keys)


def grow(
    config: Config, data: Examples, valid: Examples | None = None, run: Run | None = None, **keys: Any
) -> tuple[FitResult, Run]:
    run = run or open_run(config)
    given: dict[str, Any] = {"cardinalities": CARDINALITIES, "outputs": [1], "dataset_digest": "data", **keys}
    try:
        return fit_trees(data, valid, config, run, **given), run
    finally:
        run.finish({})


def figures(result: FitResult, data: Examples, loss: str) -> dict[str, float]:
    scores = to_scores(LOSSES[loss], result.model.logits(data.numeric, data.codes), result.model.target)  # type: ignore[union-attr]
    return point_metrics(data.target, scores, LOSSES[loss])


def weights(result: FitResult) -> bytes:
    return result.model.weights()  # type: ignore[union-attr,operator]


# ----------------------------------------------------------------------------------------- as the library says


def awkward(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows with missing and infinite numbers, and codes that were not in training."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(n, 4)).astype(np.float32)
    numeric[rng.random(numeric.shape) < 0.1] = np.inf
    numeric[rng.random(numeric.shape) < 0.1] = -np.inf
    numeric[rng.random(numeric.shape) < 0.1] = np.nan
    codes = np.stack([rng.integers(0, size + 3, n) for size in CARDINALITIES], axis=1).astype(np.int32)
    return numeric, codes


def booster_of(kind: str, data: Examples, outputs: int) -> tuple[Any, Any]:
    """The library's own model of 15 rounds, and its trees here; some numbers are missing in training."""
    numeric = data.numeric.copy()
    numeric[::7, 2] = np.nan
    rows = Rows(numeric, data.codes, [size + 3 for size in CARDINALITIES], outputs)
    made: Any = on_lightgbm.LightgbmGrower if kind == "lightgbm" else on_xgboost.XgboostGrower
    params: dict[str, Any] = {"min_data_per_group": 5} if kind == "lightgbm" else {"max_cat_to_onehot": 2}
    trees = schema.build(TreesConfig, {**SMALL, "leaves": 12, "params": params})
    grower = made(rows, trees, 0, 1)
    loss = LOSSES["multiclass" if outputs > 1 else "binary"]
    labels = Labels(data.target.astype(float), np.ones(len(data)), loss, schema.build(Config, {}).train, outputs)
    margin, grown = np.zeros((len(data), outputs)), []
    for round_ in range(15):
        grown.append(grower.grow(round_, *gradients(margin, labels)))
        margin = margin + grown[-1].logits(numeric, data.codes)
    return grower._booster, boosting.joined(grown[0], grown[1:])


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_library_within_an_ulp_of_float32(kind: str, outputs: int, n: int) -> None:
    data = make_problem(1500, task="multiclass" if outputs > 1 else "binary")
    booster, trees = booster_of(kind, data, outputs)
    assert (trees.forest.set_of >= 0).any() and (trees.forest.set_of < 0).any()
    numeric, codes = awkward(n)
    if kind == "xgboost":  # which refuses infinities
        numeric = np.clip(numeric, -3e38, 3e38)
    block = np.concatenate([numeric, codes.astype(np.float32)], axis=1)
    if kind == "lightgbm":
        want = booster.predict(block, raw_score=True)
    else:
        xgboost = importlib.import_module("xgboost")
        types = ["float"] * 4 + ["c"] * 2
        want = booster.predict(xgboost.DMatrix(block, feature_types=types, enable_categorical=True), output_margin=True)
    found, want = trees.logits(numeric, codes), np.asarray(want, np.float64).reshape(len(numeric), outputs)
    ulp = np.spacing(np.maximum(np.abs(want), 1e-3).astype(np.float32))
    assert (np.abs(found - want) <= ulp).all()
    assert len(np.unique(found)) > 50


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_contributions_are_those_of_the_library(kind: str, outputs: int) -> None:
    data = make_problem(600, task="multiclass" if outputs > 1 else "binary")
    booster, trees = booster_of(kind, data, outputs)
    numeric, codes = awkward(300)
    if kind == "xgboost":  # which refuses infinities
        numeric = np.clip(numeric, -3e38, 3e38)
    block = np.concatenate([numeric, codes.astype(np.float32)], axis=1)
    if kind == "lightgbm":
        want = booster.predict(block, pred_contrib=True)
    else:
        xgboost = importlib.import_module("xgboost")
        rows = xgboost.DMatrix(block, feature_types=["float"] * 4 + ["c"] * 2, enable_categorical=True)
        want = booster.predict(rows, pred_contribs=True)
    want = np.asarray(want, np.float64).reshape(300, outputs, 7)
    close = {"rtol": 0, "atol": 1e-12 if kind == "lightgbm" else 1e-5}  # XGBoost computes in float32
    assert (np.abs(want[..., :6]).max(axis=(0, 1)) > 0.01).sum() >= 5
    for k in range(outputs):
        share = np.tile(np.eye(outputs)[k], (300, 1))
        np.testing.assert_allclose(trees.contributions(numeric, codes, share), want[:, k, :6], **close)
        np.testing.assert_allclose(trees.baseline()[k], want[0, k, 6], **close)


# ------------------------------------------------------------------------------------------------ the same bytes

SAMPLED = {"row_fraction": 0.7, "column_fraction": 0.6}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "task", "outputs"),
    [("binary", "binary", 1), ("multiclass", "multiclass", 3), ("quantile", "regression", 1)],
)
def test_one_model_for_any_threads_and_order_of_rows(
    tmp_path: Path, kind: str, loss: str, task: str, outputs: int
) -> None:
    data, valid = make_problem(700, 0, task), make_problem(300, 1, task)
    keys = {"train__loss": loss, "train__quantile": 0.8}
    expected, _ = grow(settings(tmp_path, kind, SAMPLED, **keys), data, valid, outputs=[outputs])
    two, _ = grow(settings(tmp_path, kind, SAMPLED, cluster__threads=2, **keys), data, valid, outputs=[outputs])
    turned = data.take(np.random.default_rng(3).permutation(len(data)))
    other, _ = grow(settings(tmp_path, kind, SAMPLED, **keys), turned, valid, outputs=[outputs])
    assert weights(two) == weights(expected)
    assert weights(other) == weights(expected)
    more, _ = grow(settings(tmp_path, kind, SAMPLED, train__seed=1, **keys), data, valid, outputs=[outputs])
    assert weights(more) != weights(expected)  # the sample is another


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["binary", "quantile"])
def test_a_run_that_was_stopped_gives_the_bytes_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, loss: str
) -> None:
    task = "binary" if loss == "binary" else "regression"
    data, valid = make_problem(500, 0, task), make_problem(200, 1, task)
    config = settings(tmp_path, kind, SAMPLED, train__loss=loss, train__checkpoint_every=4)
    expected, whole = grow(config, data, valid)
    run = open_run(config)
    asked = iter([False] * 5 + [True])
    monkeypatch.setattr(boosting.StopFlag, "requested", lambda _self: next(asked, False))
    with pytest.raises(KeyboardInterrupt, match="stopped at round 6 of 12"):
        grow(config, data, valid, run)
    resumed, _ = grow(config, data, valid, run)
    assert resumed.metrics["resumed_from_step"] == 6.0
    assert weights(resumed) == weights(expected) and resumed.history == expected.history
    assert run.record["chain"] == whole.record["chain"]


# -------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "metric", "least"),
    [
        ("binary", "roc_auc", 0.85),
        ("multiclass", "accuracy", 0.72),
        ("squared", "rmse", -40.0),
        ("huber", "mae", -32.0),
    ],
)
def test_every_loss_learns(tmp_path: Path, kind: str, loss: str, metric: str, least: float) -> None:
    task = loss if loss in ("binary", "multiclass") else "regression"
    data, valid = make_problem(1500, 0, task), make_problem(800, 1, task)
    config = settings(tmp_path, kind, {"rounds": 60, "learning_rate": 0.15}, train__loss=loss)
    result, _ = grow(config, data, valid, outputs=[3 if task == "multiclass" else 1])
    value = figures(result, valid, loss)[metric]
    assert (value if least > 0 else -value) > least


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantile_is_met(tmp_path: Path, kind: str) -> None:
    data, valid = make_problem(2000, 0, "regression"), make_problem(2000, 1, "regression")
    config = settings(
        tmp_path, kind, {"rounds": 60, "learning_rate": 0.15}, train__loss="quantile", train__quantile=0.9
    )
    result, _ = grow(config, data, valid)
    model = result.model
    scores = to_scores(LOSSES["quantile"], model.logits(valid.numeric, valid.codes), model.target)  # type: ignore[union-attr]
    assert 0.84 < (valid.target <= scores).mean() < 0.94


PLAIN = [name for name, loss in LOSSES.items() if loss.task != "quantiles" and not loss.ordered]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", PLAIN)
def test_a_gradient_is_the_slope_of_its_loss(name: str, smoothing: float) -> None:
    rng = np.random.default_rng(0)
    config = schema.build(
        Config,
        {
            "train": {"loss": name, "quantile": 0.3, "huber_delta": 0.7}
            | ({"label_smoothing": smoothing} if smoothing and name in SMOOTHED else {})
        },
    ).train
    loss = loss_of(config)
    outputs = 3 if LOSSES[name].task == "multiclass" else 1
    y = rng.normal(size=200) * 2 if loss.number else rng.integers(0, max(outputs, 2), 200)
    labels = Labels(np.abs(y) + 0.1 if loss.unit == "mean" else y.astype(float), np.ones(200), loss, config, outputs)
    margin = rng.normal(size=(200, outputs))
    found, hessian = gradients(margin, labels)
    for k in range(outputs):
        step = np.zeros(outputs)
        step[k] = 1e-6
        slope = (row_losses(margin + step, labels) - row_losses(margin - step, labels)) / 2e-6
        scale = 2.0 if name == "squared" else 1.0  # its gradient is that of half the square
        np.testing.assert_allclose(found[:, k], slope / scale, atol=2e-5 * max(1.0, np.abs(slope).max()))
    assert (hessian > 0).all()
    constant = start(labels)
    around = [row_losses(np.tile(constant + d, (200, 1)), labels).sum() for d in (-1e-2, 0.0, 1e-2)]
    assert outputs > 1 or name in ("huber", "focal") or smoothing or around[1] <= min(around) + 1e-9


@pytest.mark.parametrize("name", ["quantiles", "ordinal"])
def test_a_loss_with_other_outputs_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"one output, or one for each class, found train.loss={name}"):
        grow(settings(tmp_path, "lightgbm", train__loss=name), make_problem(30))


def test_balanced_sampling_is_refused_and_names_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found balanced.*train.class_weight=balanced weights them"):
        grow(settings(tmp_path, "xgboost", train__sampling="balanced"), make_problem(30))


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_classes_weigh_the_rare_one_more(tmp_path: Path, kind: str) -> None:
    data = make_problem(800)
    rare = data.take(np.flatnonzero((data.target == 0) | (np.arange(800) % 8 == 0)))
    plain, _ = grow(settings(tmp_path, kind), rare)
    even, _ = grow(settings(tmp_path, kind, train__class_weight="balanced"), rare)
    means = [item.model.logits(rare.numeric, rare.codes).mean() for item in (plain, even)]  # type: ignore[union-attr]
    assert means[1] > means[0] + 0.5


@pytest.mark.parametrize("name", ["poisson", "gamma", "tweedie"])
def test_a_number_above_zero_is_fitted_by_its_distribution(tmp_path: Path, name: str) -> None:
    data = make_problem(1500)
    mean = np.exp(0.5 + 0.6 * data.numeric[:, 0])
    target = np.random.default_rng(0).gamma(4.0, mean / 4.0)
    counted = Examples(data.numeric, data.codes, target.astype(np.float32), data.rows)
    result, _ = grow(settings(tmp_path, "lightgbm", {"rounds": 80}, train__loss=name), counted)
    model = result.model
    scores = to_scores(LOSSES[name], model.logits(data.numeric, data.codes), model.target)  # type: ignore[union-attr]
    assert (scores > 0).all() and np.corrcoef(np.log(scores), np.log(mean))[0, 1] > 0.9
    assert scores.mean() == pytest.approx(target.mean(), rel=0.05)


def test_sums_of_gradients_are_exact_in_any_order() -> None:
    rng = np.random.default_rng(1)
    weight = np.exp(rng.normal(size=5000) * 4)
    labels = Labels((rng.random(5000) < 0.3).astype(float), weight, LOSSES["binary"], schema.build(Config, {}).train, 1)
    for values in gradients(rng.normal(size=(5000, 1)), labels):
        sums = {float(values[rng.permutation(5000)].astype(np.float64).cumsum()[-1]) for _ in range(20)}
        assert len(sums) == 1


# ------------------------------------------------------------------------------------------------------ settings


def test_early_stopping_keeps_the_best_round(tmp_path: Path) -> None:
    data, valid = make_problem(300), make_problem(300, 1)
    config = settings(
        tmp_path, "lightgbm", {"rounds": 200, "patience": 10, "learning_rate": 0.3}, train__metric="log_loss"
    )
    result, _ = grow(config, data, valid)
    losses = [entry["valid_log_loss"] for entry in result.history]
    assert len(losses) < 200 and len(losses) == int(np.argmin(losses)) + 11
    assert result.metrics["train/trees"] == np.argmin(losses) + 1
    assert figures(result, valid, "binary")["log_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_rises_where_it_must(tmp_path: Path, kind: str) -> None:
    data = make_problem(600)
    config = settings(tmp_path, kind, {"rounds": 40})
    numeric = np.repeat(make_problem(50, 2).numeric, 21, axis=0)
    numeric[:, 0] = np.tile(np.linspace(-3, 3, 21), 50)
    codes = np.zeros((len(numeric), 2), np.int32)

    def steps(monotone: list[int]) -> Any:
        result, _ = grow(config, data, monotone=monotone)
        return np.diff(result.model.logits(numeric, codes).reshape(50, 21), axis=1)  # type: ignore[union-attr]

    assert (steps([0] * 4) < 0).any() and (steps([1, 0, 0, 0]) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_monotone_quantile_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"model.trees.monotone cannot be kept with train.loss=quantile"):
        settings(tmp_path, kind, {"monotone": {"size": 1}}, train__loss="quantile")
    assert settings(tmp_path, "mlp", {"monotone": {"size": 1}}, train__loss="quantile").train.loss == "quantile"


def test_a_tree_of_one_leaf_is_refused() -> None:
    with pytest.raises(UserError, match=r"leaves must be 0, or at least 2 .*found 1"):
        schema.build(TreesConfig, {"leaves": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_start_from_keeps_the_first_trees(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_problem(500)
    first, _ = grow(settings(tmp_path, kind), data)
    monkeypatch.setattr(boosting, "start_bundle", lambda _config: object())
    monkeypatch.setattr(boosting, "load_model", lambda _bundle: first.model)
    longer, _ = grow(settings(tmp_path, kind), data)
    assert longer.metrics["train/trees"] == 24
    assert longer.model.first(12).weights() == weights(first)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=f"needs a model of the same kind: model=.* here, {kind} with 1 there"):
        grow(settings(tmp_path, "xgboost" if kind == "lightgbm" else "lightgbm"), data)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("lightgbm", "num_threads", "use cluster.threads"),
        ("lightgbm", "seed", "use train.seed"),
        ("lightgbm", "subsample", "use model.trees.row_fraction"),
        ("lightgbm", "sub_row", "use model.trees.row_fraction"),
        ("lightgbm", "boosting_type", "leave it out"),
        ("lightgbm", "extra_tree", "leave it out"),
        ("lightgbm", "linear_trees", "leave it out"),
        ("lightgbm", "device", "leave it out"),
        ("lightgbm", "zero_as_missing", "leave it out"),
        ("lightgbm", "max_cat_tresh", "Did you mean 'max_cat_threshold'"),
        ("xgboost", "nthread", "use cluster.threads"),
        ("xgboost", "n_jobs", "use cluster.threads"),
        ("xgboost", "objective", "use train.loss"),
        ("xgboost", "booster", "leave it out"),
        ("xgboost", "random_state", "use train.seed"),
        ("xgboost", "validate_parameters", "leave it out"),
    ],
)
def test_a_parameter_that_is_not_listed_is_refused(kind: str, name: str, said: str) -> None:
    params_of = on_lightgbm._params if kind == "lightgbm" else on_xgboost._params
    trees = schema.build(TreesConfig, {"params": {name: 1}})
    with pytest.raises(
        UserError, match=rf"model.trees.params for model={kind} must be among .*found {name}[:.] ?.*{said}"
    ):
        params_of(trees, Rows(np.zeros((1, 1)), np.zeros((1, 0)), [], 1), 1)


def test_no_listed_parameter_is_another_name_of_one_that_the_engine_sets() -> None:
    names = importlib.import_module("lightgbm").basic._ConfigAliases._get_all_param_aliases()
    ours = on_lightgbm._params(schema.build(TreesConfig, SMALL), Rows(np.zeros((1, 1)), np.zeros((1, 0)), [], 1), 1)
    of_engine = {alias for name in ours for alias in names.get(name, [name])}
    assert on_lightgbm.ALLOWED <= set(names) and not of_engine & on_lightgbm.ALLOWED


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_parameter_is_one_of_the_library(tmp_path: Path, kind: str) -> None:
    allowed = on_lightgbm.ALLOWED if kind == "lightgbm" else on_xgboost.ALLOWED
    for name in sorted(allowed - {"interaction_constraints", "monotone_constraints_method"}):
        with pytest.raises(
            UserError, match=rf"model={kind} cannot grow trees: .*: correct model.trees \(params: {name}\)"
        ):
            grow(settings(tmp_path / name, kind, {"params": {name: "many"}}), make_problem(50))


def test_the_loss_of_a_worker_is_not_taken_for_a_mistake_of_the_user() -> None:
    """Messages as XGBoost 3.2 writes them: after the first the attempt is repeated, the second ends the training."""
    refused = importlib.import_module("xgboost").core.XGBoostError
    lost = "[14:44:11] /workspace/src/collective/result.cc:83: [histogram.h:197]:\n- [allreduce.cc:135]: Ring Allreduce failed."
    with pytest.raises(refused, match="Allreduce failed"), library_errors("xgboost", TreesConfig()):
        raise refused(lost)
    wrong = "[14:44:44] /workspace/src/tree/constraints.cc:37: Failed to parse feature interaction constraint"
    with pytest.raises(UserError, match=r"cannot grow trees: .*Failed to parse.*correct model\.trees") as found:
        with library_errors("xgboost", TreesConfig()):
            raise refused(wrong)
    assert isinstance(found.value.__cause__, refused)
    seen = [{"time": 1.0, "ranks": {"0": f"XGBoostError: {lost}", "1": "its process died"}}]
    assert first_cause(seen) == "rank 1: its process died"  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_trees_that_need_more_memory_than_there_is_are_refused_before_any_is_taken(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = make_problem(500), settings(tmp_path, kind, {"leaves": 2, "bins": 2})
    least = memory.needed(config.model.trees, kind, 500, 6, 1) + data.nbytes
    monkeypatch.setattr(environment, "memory_bytes", lambda: least)
    grow(config, data)
    monkeypatch.setattr(environment, "memory_bytes", lambda: least - 1)
    monkeypatch.setattr(boosting, "LightgbmGrower", lambda *_: pytest.fail("memory was taken"))
    monkeypatch.setattr(boosting, "XgboostGrower", lambda *_: pytest.fail("memory was taken"))
    told = (
        rf"needs {least - data.nbytes:,} bytes of memory for 500 rows of 6 .*, beside {data.nbytes:,} .* {least - 1:,}"
    )
    with pytest.raises(UserError, match=told):
        grow(config, data)
    data.save(tmp_path / "mapped")  # rows in a file take no memory
    with pytest.raises(pytest.fail.Exception, match="memory was taken"):
        grow(config, Examples.open(tmp_path / "mapped"))


def peak_of(kind: str, rows: int, columns: int, outputs: int, folder: Path, answer: Any) -> None:
    """Send the most anonymous memory that growing three trees takes; called in a process of its own."""
    rng = np.random.default_rng(0)
    numeric = rng.standard_normal((rows, columns), np.float32)
    target = (numeric[:, 0] > 0).astype(np.float32) + (numeric[:, 1] > 0) * (outputs > 1)
    data = Examples(numeric, np.zeros((rows, 0), np.int32), target.astype(np.float32), np.arange(rows))
    keys = {"train__loss": "multiclass" if outputs > 1 else "binary"}
    facts = {"outputs": [outputs], "cardinalities": []}
    config = make_config(folder, model__kind=kind, model__trees={"rounds": 3, "leaves": 31}, **keys)
    grow(config, data.take(np.arange(2000)), **facts)  # compiles, and loads the library

    def held() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    peaks, done, before = [0], threading.Event(), held()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    grow(config, data, **facts)
    done.set()
    thread.join()
    answer.put((max(peaks) - before, memory.needed(config.model.trees, kind, rows, columns, outputs)))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(400_000, 10, 1), (400_000, 10, 3), (100_000, 200, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_that_is_said_is_what_is_taken_or_little_more(
    tmp_path: Path, kind: str, rows: int, columns: int, outputs: int
) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak_of, args=(kind, rows, columns, outputs, tmp_path, answer))
    process.start()
    taken, said = answer.get()
    process.join()
    assert taken <= said <= 2.5 * taken, (taken, said)


@pytest.mark.parametrize("columns", [1, 16, 40])
def test_cuts_are_quantiles_of_all_rows_however_many_columns_are_sorted_at_once(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    numeric = rng.choice(np.array([*rng.normal(size=300), 0.0, -0.0, np.inf, -np.inf]), (900, 40)).astype(np.float32)
    numeric[:, 3], numeric[:, 5] = 1.5, rng.integers(0, 3, 900)
    numeric[rng.random(900) < 0.1, 7] = np.nan
    numeric[:, 8] = np.nan
    monkeypatch.setattr(on_xgboost, "columns_at_once", lambda _rows: columns)
    found = on_xgboost.cut_rows(Rows(numeric, np.zeros((900, 0), np.int32), [], 1), 50)
    for index in range(40):
        values = np.sort(numeric[:, index])
        cuts = np.unique(values)
        if len(cuts) > 50:
            cuts = np.unique(values[np.linspace(0, 899, 50).round().astype(np.int64)])
        assert np.array_equal(found[: len(cuts), index], cuts, equal_nan=True)
        assert np.array_equal(found[len(cuts) :, index], np.full(50 - len(cuts), cuts[-1]), equal_nan=True)


def test_rows_that_are_given_in_parts_make_the_same_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = make_problem(900), settings(tmp_path, "xgboost", SAMPLED)
    whole, _ = grow(config, data)
    asked: list[int] = []
    monkeypatch.setattr(on_xgboost, "rows_at_once", lambda columns: asked.append(columns) or 37)
    parts, _ = grow(config, data)
    assert asked and weights(parts) == weights(whole)


def test_monotone_names_features_of_the_encoder() -> None:
    class Column:
        def __init__(self, name: str, outputs: int, missing: bool) -> None:
            self.name, self.missing_, self._count = name, missing, outputs

        def outputs(self) -> list[str]:
            return [self.name] * (self._count + self.missing_)

    encoder: Any = type("E", (), {"numeric_": (Column("size", 3, True), Column("age", 1, False))})()
    assert monotone_columns(encoder, {"size": -1}) == [-1, -1, -1, 0, 0]
    with pytest.raises(UserError, match=r"numeric features, found 'sise'. Did you mean .*size"):
        monotone_columns(encoder, {"sise": 1})
    assert isinstance(Encoder, type)


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"model=no_such_library needs the package no_such_library: pip install"):
        check_library("no_such_library")


def test_no_row_of_any_feature_is_refused(tmp_path: Path, problem: Callable[..., Examples]) -> None:
    data = problem(20)
    bare = Examples(data.numeric[:, :0], data.codes[:, :0], data.target, data.rows)
    with pytest.raises(UserError, match="at least one feature"):
        grow(settings(tmp_path, "lightgbm"), bare, cardinalities=[])
