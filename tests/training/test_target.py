"""Targets that float32 cannot hold: metrics, scores, gates and files say what scikit-learn says in float64."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as oracle

from engine import __main__ as shell
from engine import api
from engine.config.sections.lifecycle import GateConfig
from engine.errors import UserError
from engine.lifecycle.challenger_gate import Judged, evidence, verdict
from engine.runtime.run import Run
from engine.scoring.worker import Content
from engine.training.gate import check_gate
from engine.training.losses import LOSSES
from engine.training.target import PLAIN, TargetScale, check_spread
from tests import tiny

TARGET = "amount: {type: float64, role: target, known_at: paid_at}"
VALUES = {
    "epoch_seconds": (1.7e9, 3.0, "float64"),
    "cents": (1e12, 50.0, "float64"),
    "tiny": (0.0, 1e-30, "float32"),
}
TEST = "[2020-01-26,2020-01-31]"


@dataclass(frozen=True)
class Trained:
    """A finished training run, its folder, and the targets by row id."""

    folder: Path
    run: Run
    target: dict[str, float]
    kind: str

    def step(self, name: str, *words: str) -> Run:
        """Another step on the same data."""
        return api.run(name, *tiny.overrides(self.folder, *words), config_dir=str(self.folder / "conf"))


def write(folder: Path, center: float, spread: float, rows: int = 1500) -> dict[str, float]:
    """The tiny experiment with a number as its target: center + spread * (what `size` says); the targets by row id."""
    tiny.write_tiny(folder, rows)
    table = pq.read_table(folder / "visits.parquet")
    amount = table["amount"].combine_chunks()
    noise = np.random.default_rng(1).normal(size=rows) / 4
    values = center + spread * (np.log(np.asarray(amount) / 10) + noise)
    amount = pa.array(values, mask=np.asarray(amount.is_null()))
    pq.write_table(table.set_column(table.column_names.index("amount"), "amount", amount), folder / "visits.parquet")
    data = tiny.DATA.replace("amount: {type: float64, role: numeric, known_at: paid_at}", TARGET)
    data = data.replace("bought: {type: bool, role: target", "bought: {type: bool, role: numeric")
    (folder / "conf/data/tiny.yaml").write_text(data)
    experiment = tiny.EXPERIMENT.replace("train: {", "train: {loss: squared, ").replace("epochs: 2", "epochs: 6")
    (folder / "conf/experiment/tiny.yaml").write_text(experiment)
    return {str(visit): value for visit, value in zip(table["visit"].to_pylist(), amount.to_pylist(), strict=True)}


@pytest.fixture(scope="module", params=VALUES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    center, spread, kind = VALUES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    target = write(folder, center, spread)
    run = api.run("train", *tiny.overrides(folder), config_dir=str(folder / "conf"))
    return Trained(folder, run, target, kind)


def errors(target: Any, scores: Any) -> dict[str, float]:
    return {
        "rmse": float(oracle.root_mean_squared_error(target, scores)),
        "mae": float(oracle.mean_absolute_error(target, scores)),
        "pinball": float(oracle.mean_pinball_loss(target, scores)),
        "r2": float(oracle.r2_score(target, scores)),
    }


def test_metrics_scores_files_and_interfaces_agree_with_scikit_learn(trained: Trained, tmp_path: Path) -> None:
    scored = trained.step("score", f"score.model={trained.run.directory}", f"score.between={TEST}")
    table = pa.concat_tables(
        pq.read_table(path) for path in sorted((scored.directory / "predictions").glob("*.parquet"))
    )
    assert str(table["score"].type) == {"float32": "float", "float64": "double"}[trained.kind]
    known = {row: value for row, value in trained.target.items() if value is not None}
    rows = [index for index, row in enumerate(table["row_id"].to_pylist()) if row in known]
    target = np.array([known[table["row_id"][row].as_py()] for row in rows])
    scores = np.asarray(table["score"])[rows].astype(np.float64)
    expected = errors(target, scores)
    assert expected["r2"] > 0.5, "the model has learned"
    found = {name: trained.run.metrics[f"test/{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-6)
    assert trained.run.metrics["test/rmse_low"] < expected["rmse"] < trained.run.metrics["test/rmse_high"]
    assert trained.run.metrics["baseline/test/linear/rmse"] < target.std()
    assert trained.run.metrics["baseline/test/constant/rmse"] == pytest.approx(target.std(), rel=0.1)
    evaluated = trained.step("evaluate", f"evaluate.model={trained.run.directory}")
    assert {name: evaluated.metrics[f"test/{name}"] for name in expected} == found

    manifest = json.loads((scored.directory / "predictions" / "_manifest.json").read_text())
    bundle = json.loads((trained.run.directory / "model" / "schema.json").read_text())
    assert manifest["score_type"] == bundle["score_type"] == trained.kind
    file = tmp_path / "scores.csv"
    trained.step("score", f"score.model={trained.run.directory}", f"score.between={TEST}", f"score.output={file}")
    read = pacsv.read_csv(file, convert_options=pacsv.ConvertOptions(column_types={"score": pa.float64()}))["score"]
    assert np.asarray(read).astype(table["score"].to_numpy().dtype).tobytes() == table["score"].to_numpy().tobytes()
    events = pq.read_table(trained.folder / "visits.parquet")
    again = api.load(trained.run).predict(events)
    by_id = dict(zip(again["row_id"].to_pylist(), again["score"].to_pylist(), strict=True))
    assert [by_id[row] for row in table["row_id"].to_pylist()] == table["score"].to_pylist()


@pytest.mark.parametrize("trained", ["epoch_seconds", "tiny"], indirect=True)
def test_the_best_epoch_is_chosen_by_true_errors(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained.run.directory / "metrics.jsonl").read_text().splitlines()]
    watched = [line["valid/rmse"] for line in lines if "valid/rmse" in line]
    assert len(watched) == 6 and watched[-1] < watched[0]
    assert int(np.argmin(watched)) == trained.run.metrics["train/best_epoch"]
    assert trained.run.metrics["valid/rmse"] == pytest.approx(min(watched), rel=1e-6)


@pytest.mark.parametrize("trained", ["epoch_seconds"], indirect=True)
def test_units_of_another_size_give_the_same_digest_of_scores(trained: Trained) -> None:
    words = (f"score.model={trained.run.directory}", f"score.between={TEST}")
    first, second = (trained.step("score", *words, f"score.unit_rows={rows}") for rows in (1024, 65536))
    assert first.record["chain"]["scores"] == second.record["chain"]["scores"]


def test_the_digest_of_scores_sees_what_float32_does_not() -> None:
    digests = []
    for scores in (np.array([1.7e9, 1.7e9]), np.array([1.7e9, 1.7e9 + 1])):
        content = Content(0, 1024)
        content.add(0, pa.array(["a", "b"]), scores, np.ones(2, bool))
        digests.append(content.tiles)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("trained", ["epoch_seconds", "tiny"], indirect=True)
def test_the_gate_of_a_bundle_measures_differences_in_units_of_the_spread(trained: Trained) -> None:
    predictor = api.load(trained.run)

    def off_by(much: float) -> Any:
        return lambda numeric, codes: predictor.logits(numeric, codes) + much

    assert check_gate(predictor.bundle, predictor.model, logits_of=off_by(1e-5)) > 0
    with pytest.raises(UserError, match="score column 'score' differs"):
        check_gate(predictor.bundle, predictor.model, logits_of=off_by(1e-2))


@pytest.mark.parametrize("trained", ["epoch_seconds"], indirect=True)
def test_monitoring_measures_the_true_error_and_its_band(trained: Trained) -> None:
    run = trained.step(
        "monitor",
        f"monitor.model={trained.run.directory}",
        "monitor.window=[2020-01-26,2020-01-30]",
        "monitor.resamples=60",
    )
    found = json.loads((run.directory / "drift.json").read_text())["performance"]["metrics"]["rmse"]
    assert found["value"] == pytest.approx(trained.run.metrics["test/rmse"], rel=0.2)
    assert 0 < found["band"][0] < found["band"][1]
    assert found["reference"] == pytest.approx(trained.run.metrics["valid/rmse"], rel=0.2)


@pytest.mark.parametrize("trained", ["epoch_seconds"], indirect=True)
def test_the_gate_between_models_compares_true_errors(trained: Trained) -> None:
    runs = f"paths.runs={trained.folder / 'runs'}"
    weak = trained.step(
        "train", "split.train=[2020-01-01,2020-01-03]", "split.valid=[2020-01-03,2020-01-05]", "train.lr=0.0001"
    )
    assert shell.main(["registry", "promote", "tiny", str(weak.directory), runs]) == 0
    run = trained.step(
        "retrain", "retrain.now=2020-01-29", "retrain.triggers=[always]", "retrain.cool_down=0s", "retrain.judge_length=8d",
        "retrain.valid_length=2d", "retrain.gate.min_rows=100", "retrain.gate.min_slice_rows=100",
        "retrain.gate.bootstrap=60", "retrain.gate.confidence=0.6", "split.train=[]", "split.valid=[]", "split.test=[]",
    )  # fmt: skip
    decision = json.loads((run.directory / "decision.json").read_text())
    metric = decision["evidence"]["metric"]
    assert decision["verdict"] == "promoted" and metric["low"] > 0
    assert metric["challenger"] == pytest.approx(trained.run.metrics["test/rmse"], rel=0.3)


def test_the_gate_between_models_sees_a_gain_of_1e_30() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=400) * 1e-30
    better, worse = target + rng.normal(size=400) * 1e-31, rng.normal(size=400) * 1e-30
    days = np.arange(400) // 20
    found = evidence(
        Judged(target, worse, better, {}, days, days), LOSSES["squared"], GateConfig(bootstrap=50, min_rows=100)
    )
    assert found["metric"]["champion"] == pytest.approx(oracle.root_mean_squared_error(target, worse))
    assert found["metric"]["low"] > 0
    verdict_, reasons = verdict(found, GateConfig(min_rows=100))
    assert verdict_ == "promote" and "0.0000" not in reasons[0]


# ----------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("center", "scale", "kind"),
    [
        (12.0, 40.0, "float32"),
        (1970.0, 25.0, "float32"),
        (0.0, 1e-30, "float32"),
        (1.7e9, 3.0, "float64"),
        (1e12, 50.0, "float64"),
        (0.0, 1e-42, "float64"),
        (1e39, 1e38, "float64"),
    ],
)
def test_a_target_is_float64_where_float32_would_move_it(center: float, scale: float, kind: str) -> None:
    target = TargetScale(center, scale)
    assert target.fitting == kind
    values = center + scale * np.random.default_rng(0).normal(size=1000)
    with np.errstate(over="ignore"):
        moved = np.abs(values.astype(np.float32).astype(np.float64) - values).max() / scale
    assert (moved > 1e-4) == (kind == "float64")


def test_standardised_values_come_back_in_the_type_of_the_target() -> None:
    values = 1.7e9 + 3 * np.random.default_rng(0).normal(size=1000)
    target = TargetScale.of(values)
    raw = target.standardised(values)
    assert raw.dtype == np.float32 and abs(raw.std() - 1) < 1e-6
    back = target.in_unit(raw)
    assert back.dtype == np.float64 and np.abs(back - values).max() < 1e-6
    assert PLAIN.in_unit(raw) is raw


def test_a_narrow_target_is_warned_about_and_one_that_64_bits_round_away_is_refused() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert check_spread(12 + 40 * noise, "delay") is None
    assert check_spread(np.full(10, 1e13), "delay") is None, "a constant loses nothing"
    doubt = check_spread(1.7e9 + 3 * noise, "at")
    assert doubt is not None and re.search(r"'at' has a standard deviation of 2\.9\d around 1699999999\.8", doubt)
    with pytest.raises(
        UserError, match=r"'ns' must vary .* 2.93e\+03 around 1.7e\+18 .* these are 256\. Take its difference"
    ):
        check_spread(1.7e18 + 3e3 * noise, "ns")
    with pytest.raises(UserError, match=r"'ns' must vary .* found one value, where these are 256"):
        check_spread(np.full(10, 1.7e18), "ns")
