"""A weight counts everywhere: a row of weight 3 is the row three times, and every metric is scikit-learn's `sample_weight`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import api
from engine.config.sections.lifecycle import GateConfig
from engine.config.sections.training import EvaluateConfig, TrainConfig
from engine.errors import UserError
from engine.lifecycle.challenger_gate import Judged, evidence
from engine.monitoring.estimate import Unlabelled, estimate
from engine.monitoring.performance import Judge, Outcomes, measure
from engine.training import baselines
from engine.training.evaluate import Scored, evaluate_scores, intervals, point_metrics
from engine.training.loss import Loss
from engine.training.losses import class_weights, recorded_loss, target_scale
from tests.tiny import DATA, overrides, visits, write_tiny
from tests.training.conftest import make_problem, packed

oracle = pytest.importorskip("sklearn.metrics")
N, DAYS = 900, 12


def of(loss: str) -> Loss:
    """The loss of a name, at level 0.3 where it has one."""
    return recorded_loss({"loss": loss, "quantile": 0.3})


def drawn(loss: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(target, scores, days, whole weights 0 to 3) with tied scores."""
    rng = np.random.default_rng(seed)
    days, times = np.sort(rng.integers(0, DAYS, N)), rng.integers(0, 4, N)
    if loss == "binary":
        scores = np.round(rng.uniform(0.01, 0.99, N), 2)
        return (rng.random(N) < scores).astype(float), scores, days, times
    if loss == "multiclass":
        scores = rng.dirichlet(np.ones(3), N)
        return np.array([rng.choice(3, p=row) for row in scores]).astype(float), scores, days, times
    scores = rng.normal(5, 1, N)
    return scores + rng.normal(size=N), scores, days, times


NAMES = ("binary", "multiclass", "squared", "quantile")


@pytest.mark.parametrize("loss", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 1e6]))
def test_metrics_are_those_of_scikit_learn_with_sample_weight(loss, seed, scale):
    target, scores, _, times = drawn(loss, seed)
    weight = times * np.random.default_rng(seed + 1).uniform(0.5, 2, N) * scale
    ours = point_metrics(target, scores, of(loss), weight=weight)
    if loss == "binary":
        theirs = {
            "roc_auc": oracle.roc_auc_score(target, scores, sample_weight=weight),
            "average_precision": oracle.average_precision_score(target, scores, sample_weight=weight),
            "log_loss": oracle.log_loss(target, scores, sample_weight=weight),
            "brier": oracle.brier_score_loss(target, scores, sample_weight=weight),
        }
    elif loss == "multiclass":
        theirs = {
            "accuracy": oracle.accuracy_score(target, scores.argmax(axis=1), sample_weight=weight),
            "log_loss": oracle.log_loss(target, scores, sample_weight=weight),
            "macro_auc": oracle.roc_auc_score(target, scores, sample_weight=weight, multi_class="ovr"),
        }
    else:
        theirs = {
            "mae": oracle.mean_absolute_error(target, scores, sample_weight=weight),
            "rmse": oracle.root_mean_squared_error(target, scores, sample_weight=weight),
            "pinball": oracle.mean_pinball_loss(target, scores, sample_weight=weight, alpha=0.3),
        }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-12), name


def test_r2_mape_and_the_figures_of_classes_are_those_of_scikit_learn_too():
    config = EvaluateConfig(bootstrap=0)
    target, scores, days, times = drawn("squared")
    weight = times * 0.7
    flat, _ = evaluate_scores(Scored(target, scores, days, days, weight), of("squared"), config, {})
    assert flat["r2"] == pytest.approx(oracle.r2_score(target, scores, sample_weight=weight), rel=1e-12)
    mape = oracle.mean_absolute_percentage_error(target, scores, sample_weight=weight)
    assert flat["mape"] == pytest.approx(mape, rel=1e-12)
    target, scores, days, times = drawn("multiclass")
    flat, _ = evaluate_scores(Scored(target, scores, days, days, weight), of("multiclass"), config, {})
    found = oracle.precision_recall_fscore_support(target, scores.argmax(axis=1), sample_weight=weight)
    for place, figure in enumerate(("precision", "recall", "f1")):
        assert [flat[f"class/{k}/{figure}"] for k in range(3)] == pytest.approx(list(found[place]), rel=1e-12)


def alike(ours, theirs, path=""):
    """Figures that are equal up to the rounding of sums; numbers of rows do not count."""
    if isinstance(ours, dict):
        assert set(ours) == set(theirs), path
        for name in ours:
            if name not in ("rows", "labelled", "predicted", "number"):
                alike(ours[name], theirs[name], f"{path}/{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            alike(one, other, f"{path}/{place}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-11, abs=1e-12, nan_ok=True), path
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("loss", NAMES)
def test_an_evaluation_with_weights_is_that_of_repeated_rows(loss):
    target, scores, days, times = drawn(loss)
    again = np.repeat(np.arange(N), times)
    side = np.where(np.arange(N) % 3 == 0, "a", "b")
    config = EvaluateConfig(bootstrap=50)
    flat, details = evaluate_scores(
        Scored(target, scores, days, days, times.astype(np.float32)), of(loss), config, {"side": side}
    )
    repeated, more = evaluate_scores(
        Scored(target[again], scores[again], days[again], days[again]),
        of(loss),
        config,
        {"side": side[again]},
    )
    assert len(details["intervals"]) >= 3
    rows = {name: flat.pop(name) for name in list(flat) if name.endswith("rows")}
    repeated = {name: value for name, value in repeated.items() if name not in rows}
    alike(flat, repeated)
    for each in (details, more):  # slices are listed by their number of rows
        each["slices"]["side"].sort(key=lambda part: part["value"])
        for name in ("roc", "pr"):
            each.pop(name, None)
    alike(details, more)


@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_the_gate_with_weights_is_that_of_repeated_rows(loss):
    target, scores, days, times = drawn(loss)
    again = np.repeat(np.arange(N), times)
    other = (
        np.clip(scores + np.random.default_rng(3).normal(0, 0.1, N), 0.01, 0.99) if loss == "binary" else scores + 0.3
    )
    gate = GateConfig(bootstrap=50, min_rows=10, min_slice_rows=10)
    slices = {"side": np.where(np.arange(N) % 3 == 0, "a", "b")}
    ours = evidence(Judged(target, scores, other, slices, days, days, times.astype(float)), of(loss), gate)
    theirs = evidence(
        Judged(target[again], scores[again], other[again], {"side": slices["side"][again]}, days[again], days[again]),
        of(loss),
        gate,
    )
    for each in (ours, theirs):
        each["slices"].sort(key=lambda part: part["value"])
    alike(ours, theirs)
    assert ours["metric"]["low"] is not None and ours["looks"]["days"] == DAYS


@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_monitoring_with_weights_is_that_of_repeated_rows(loss):
    judge = Judge(of(loss), EvaluateConfig(bootstrap=50), 0.05, 0.05, 0.5, 7, 7, 0)
    target, scores, days, times = drawn(loss)
    again = np.repeat(np.arange(N), times)
    past, now = drawn(loss, 1), Outcomes(days, target, scores, {}, weight=times.astype(np.float32))
    reference = Outcomes(past[2], past[0], past[1], {}, weight=np.ones(N, np.float32))
    one = measure(reference, now, judge)
    other = measure(reference, Outcomes(days[again], target[again], scores[again], {}), judge)
    for name, item in one["metrics"].items():  # bands are drawn for the number of rows
        assert item["value"] == pytest.approx(other["metrics"][name]["value"], rel=1e-11), name
        assert item["interval"] == pytest.approx(other["metrics"][name]["interval"], rel=1e-9), name
    for name, item in one["labels"].items():
        assert item["value"] == pytest.approx(other["labels"][name]["value"], rel=1e-11)
    heavy = estimate(now, None, Unlabelled(scores, times.astype(float)), judge, {})["metrics"]
    repeated = Outcomes(days[again], target[again], scores[again], {})
    often = estimate(repeated, None, Unlabelled(scores[again]), judge, {})["metrics"]
    for name, item in heavy.items():
        assert item["value"] == pytest.approx(often[name]["value"], rel=1e-9), name


def test_a_weighted_reference_gives_the_band_of_its_weights():
    judge = Judge(of("squared"), EvaluateConfig(bootstrap=0), 0.05, 0.05, 0.5, 7, 7, 0)
    target, scores, days, _ = drawn("squared")
    wrong = np.arange(N) % 2 == 0
    target = scores + np.where(wrong, 5.0, 0.1)
    one = Outcomes(days, target, scores, {}, weight=np.where(wrong, 0.0, 1.0))
    item = measure(one, one, judge)["metrics"]["mae"]
    assert item["value"] == item["reference"] == pytest.approx(0.1) and item["band"] == pytest.approx([0.1, 0.1])


def test_a_window_whose_weights_are_all_0_has_nothing_to_judge() -> None:
    judge = Judge(of("binary"), EvaluateConfig(bootstrap=0), 0.05, 0.05, 0.5, 7, 7, 0)
    target, scores, days, _ = drawn("binary")
    nothing = Outcomes(days, target, scores, {}, weight=np.zeros(N, np.float32))
    found = measure(nothing, nothing, judge)
    assert found["status"] == "cannot be judged" and "0 rows have a weight above 0" in found["reason"]


def test_scale_class_weights_and_constants_of_training_are_those_of_repeated_rows():
    target, _, _, times = drawn("squared")
    again = np.repeat(target, times).astype(np.float32)
    ours, theirs = (
        target_scale(target.astype(np.float32), of("squared"), times.astype(np.float32)),
        target_scale(again, of("squared")),
    )
    assert (ours.center, ours.scale) == pytest.approx((theirs.center, theirs.scale), rel=1e-12)
    kinds = np.arange(N) % 3
    config = TrainConfig(loss="multiclass", class_weight="balanced")
    assert class_weights(kinds.astype(float), config, 3, times.astype(np.float32)).tolist() == pytest.approx(
        class_weights(np.repeat(kinds, times).astype(float), config, 3).tolist(), rel=1e-6
    )
    numbers = np.zeros((N, 1))
    codes = np.zeros((N, 0))
    one = packed(numbers, codes, target, weight=times)
    for loss in ("squared", "huber"):
        many = packed(numbers[: len(again)].repeat(3, 0)[: len(again)], codes.repeat(3, 0)[: len(again)], again)
        found = [float(baselines._constant(part, of(loss), 1)[0]) for part in (one, many)]
        assert found[0] == pytest.approx(found[1], abs=0.02 if loss == "huber" else 1e-6)


def test_a_step_over_all_rows_is_the_same_for_weights_and_for_repeated_rows(config, fitted):
    """In one batch: how rows are dealt to batches depends on their number, so later steps of small batches differ."""
    data = make_problem(60)
    times = np.arange(60) % 4
    again = np.repeat(np.arange(60), times)
    settings = config(model__dropout=0.0, train__epochs=3, train__batch_size=128, train__class_weight="balanced")
    one, _ = fitted(settings, dataclasses.replace(data, weight=times.astype(np.float32)))
    many, _ = fitted(settings, data.take(again))
    for ours, theirs in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert [entry["train_loss"] for entry in one.history] == pytest.approx(
        [entry["train_loss"] for entry in many.history], rel=1e-5
    )


def test_early_stopping_watches_the_weighted_metric_unless_it_is_told_not_to(config, fitted):
    data, valid = make_problem(300), make_problem(200, seed=1)
    weight = (np.arange(200) % 5).astype(np.float32)
    often, _ = fitted(config(), data, valid.take(np.repeat(np.arange(200), weight.astype(int))))
    valid = dataclasses.replace(valid, weight=weight)
    heavy, _ = fitted(config(), data, valid)
    plain, _ = fitted(config(evaluate__weighted=False), data, valid)
    assert heavy.history[0]["valid_roc_auc"] == pytest.approx(often.history[0]["valid_roc_auc"], rel=1e-9)
    assert plain.history[0]["valid_roc_auc"] != heavy.history[0]["valid_roc_auc"]


def test_a_row_of_weight_0_is_not_there_even_where_its_score_is_not_finite():
    target, scores = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.2, 0.9, np.nan, 0.4])
    weight = np.array([1.0, 2.0, 0.0, 1.0])
    assert point_metrics(target, scores, of("binary"), weight=weight)["roc_auc"] == 1.0
    assert np.isnan(point_metrics(target, scores, of("binary"), weight=np.zeros(4))["roc_auc"])
    nothing = Scored(target, scores, np.arange(4), np.arange(4), np.zeros(4))
    assert intervals(nothing, {"roc_auc": 1.0}, of("binary"), EvaluateConfig()) == {}


WEIGHTED = DATA.replace("bought: bool\ncolumns", "bought: bool\n      worth: float64\ncolumns") + (
    "  worth: {type: float64, role: weight, known_at: prior}\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("weights"), 1500)
    (folder / "conf" / "data" / "tiny.yaml").write_text(WEIGHTED)
    write_worth(folder, np.arange(1500) % 4 * 0.5)
    return folder


def write_worth(folder: Path, worth: np.ndarray) -> None:
    table = visits(len(worth)).sort_by("visit")
    pq.write_table(table.append_column("worth", pa.array(worth, from_pandas=True)), folder / "visits.parquet")


def train(folder: Path, *more: str) -> api.Run:
    words = overrides(folder, "train.epochs=1", "train.resume=never", *more)
    return api.run("train", *words, config_dir=str(folder / "conf"))


def test_training_monitoring_and_the_gate_read_the_weight_column(place: Path) -> None:
    run, plain = train(place), train(place, "evaluate.weighted=false")
    assert run.record["chain"]["weights"] == plain.record["chain"]["weights"]  # one epoch: nothing to stop
    assert run.metrics["test/roc_auc"] != plain.metrics["test/roc_auc"]
    assert run.metrics["test/rows"] == plain.metrics["test/rows"]
    outcomes = pq.read_table(run.directory / "model" / "reference_outcomes.parquet")
    assert set(np.unique(outcomes["weight"])) == {0, 0.5, 1, 1.5}
    found = {}
    for name, more in (("weighted", []), ("plain", ["evaluate.weighted=false"])):
        words = overrides(place, f"monitor.model={run.directory}", "monitor.window=[2020-01-26,2020-01-31]", *more)
        watched = api.run("monitor", *words, "monitor.resamples=50", config_dir=str(place / "conf"))
        found[name] = json.loads((watched.directory / "drift.json").read_text())["performance"]["metrics"]["roc_auc"]
    assert found["weighted"]["value"] == pytest.approx(run.metrics["test/roc_auc"], abs=1e-6)
    assert found["plain"]["value"] == pytest.approx(plain.metrics["test/roc_auc"], abs=1e-6)
    assert found["weighted"]["reference"] != found["plain"]["reference"]


def test_a_negative_weight_is_refused_or_set_aside_at_ingest(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 400)
    (folder / "conf" / "data" / "tiny.yaml").write_text(WEIGHTED)
    write_worth(folder, np.where(np.arange(400) == 100, -1.0, 1.0))
    with pytest.raises(
        UserError, match=r"worth has role weight and must be finite .* found -1 in dataset row \d+\. To set"
    ):
        train(folder)
    strict = WEIGHTED.replace("role: weight,", "role: weight, min: 0, nullable: false, on_violation: quarantine,")
    (folder / "conf" / "data" / "tiny.yaml").write_text(strict)
    api.run("ingest", *overrides(folder), config_dir=str(folder / "conf"))
    totals = [json.loads(path.read_text())["accounting"] for path in folder.glob("store/datasets/tiny/*/manifest.json")]
    assert sorted(total["quarantined"] for total in totals) == [0, 1]
