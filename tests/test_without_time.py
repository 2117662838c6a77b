"""The life of a table without any time: from the file to a model, its scores, alarms, and the next model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import engine
from engine import __main__ as shell
from engine.config import timeless
from engine.data.dataset import newest_dataset
from engine.errors import UserError
from engine.monitoring.batch import found_by_id
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests import loans


class Place:
    """A folder with the loans, and a command there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: str, *words: str) -> Run:
        return engine.run(command, *loans.overrides(self.folder, *words), config_dir=str(self.folder / "conf"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(loans.write_loans(tmp_path_factory.mktemp("life")))


@pytest.fixture(scope="module")
def trained(place: Place) -> Run:
    return place.run("train")


@pytest.fixture(scope="module")
def scored(place: Place, trained: Run) -> Run:
    return place.run("score", f"score.model={trained.directory}")


def test_it_is_trained_and_measured_by_parts_of_a_hash(trained: Run) -> None:
    labels: Any = trained.record["labels"]
    assert [labels[name]["used"] for name in labels] == [["0%", "80%"], ["80%", "90%"], ["90%", "100%"]]
    assert sum(labels[name]["rows"] + labels[name]["unlabelled"] for name in labels) == 1200
    assert 0.75 < trained.metrics["test/roc_auc"] < 0.95
    assert trained.metrics["test/roc_auc_low"] < trained.metrics["test/roc_auc"]


def test_scores_have_no_time_and_are_those_of_predict(trained: Run, scored: Run) -> None:
    table = predictions(scored)
    assert table.column_names == ["row_id", "score", "decision", "model"] and len(table) == 1200
    events = loans.loans().drop_columns(["bad", "part"])
    found = engine.load(trained).predict(events)
    assert pc.equal(found["row_id"], events["loan"].cast("string").combine_chunks()).to_pylist() == [True] * 1200
    expected = dict(zip(found["row_id"].to_pylist(), found["score"].to_pylist(), strict=True))
    assert table["score"].to_pylist() == [expected[row] for row in table["row_id"].to_pylist()]


def test_a_file_is_scored_to_a_file(place: Place, trained: Run, tmp_path: Path) -> None:
    batch = loans.write(tmp_path, "batch.csv", loans.loans(50, seed=3, first=5000).drop_columns(["bad", "part"]))
    out = tmp_path / "out.csv"
    place.run("score", f"score.model={trained.directory}", f"score.input={batch}", f"score.output={out}")
    lines = out.read_text().splitlines()
    assert lines[0].split(",")[:3] == ['"row_id"', '"loan"', '"score"'] and len(lines) == 51


# --------------------------------------------------------------------------------------------------------- monitoring


def batch(place: Place, trained: Run, name: str, **of: Any) -> Run:
    """A scoring run of a file without labels."""
    path = loans.write(place.folder, f"{name}.csv", loans.loans(300, **of).drop_columns(["bad", "part"]))
    return place.run("score", f"score.model={trained.directory}", f"score.input={path}")


def drift(place: Place, trained: Run, scoring: Run) -> dict[str, Any]:
    run = place.run("monitor", f"monitor.model={trained.directory}", f"monitor.run={scoring.directory}", *QUICK)
    found: dict[str, Any] = json.loads((run.directory / "drift.json").read_text())
    return found


QUICK = ("monitor.resamples=100",)


def test_a_batch_like_the_reference_is_quiet_and_one_that_moved_alarms(place: Place, trained: Run) -> None:
    calm = drift(place, trained, batch(place, trained, "calm", seed=7, first=10_000))
    assert (calm["verdict"], calm["rule"]["name"], calm["rows"]) == ("quiet", "distance", 300)
    assert calm["performance"]["status"] == "waiting"
    scoring = batch(place, trained, "moved", seed=8, first=20_000, shift=1.5)
    moved = drift(place, trained, scoring)
    assert moved["verdict"] == "alarm" and "income" in moved["headline"]
    assert {item["name"]: item["status"] for item in moved["columns"]}["amount"] == "quiet"
    assert {item["name"] for item in moved["columns"]} == {"country", "amount", "income", "prediction"}
    # The window is the time of the scoring.
    assert moved["window"][0] == scoring.record["started"].replace("Z", "+00:00")
    assert (
        "a batch" not in moved["calibration"]["words"] and "blocks that a hash draws" in moved["calibration"]["words"]
    )


def test_a_scoring_run_without_rows_is_refused_as_that(place: Place, trained: Run) -> None:
    path = loans.write(place.folder, "none.csv", loans.loans(3).drop_columns(["bad", "part"]).slice(0, 0))
    scoring = place.run("score", f"score.model={trained.directory}", f"score.input={path}")
    with pytest.raises(UserError, match=r"monitor\.run must name a scoring run with rows, found none"):
        drift(place, trained, scoring)


def test_rows_are_found_by_id_in_whatever_order_they_are_asked_for(place: Place, trained: Run) -> None:
    dataset = newest_dataset(place.folder / "store" / "datasets" / "loans")
    assert dataset is not None
    wanted = [str(loan) for loan in np.random.default_rng(0).permutation(1200)[:200]]
    wanted[7] = "nobody"
    rows, places = found_by_id(dataset, ["loan"], pa.array(wanted))
    assert (np.diff(rows) > 0).all() and sorted(places) == [place for place in range(200) if place != 7]
    assert dataset.take(["loan"], rows)["loan"].to_pylist() == [int(wanted[at]) for at in places]


@pytest.mark.slow
def test_labels_of_a_batch_are_found_by_id_when_they_come(place: Place, trained: Run, tmp_path: Path) -> None:
    scoring = batch(place, trained, "late", seed=9, first=30_000)
    other = Place(loans.write_loans(tmp_path))
    loans.write(other.folder, "loans-late.csv", loans.loans(300, seed=9, first=30_000).slice(0, 250))
    found = drift(other, trained, scoring)["performance"]
    assert found["status"] == "quiet" and 0.7 < found["metrics"]["roc_auc"]["value"] < 1
    assert 240 / 300 < found["share_labelled"] <= 250 / 300  # every 50th has none at all


# ---------------------------------------------------------------------------------------------------------- registry


@pytest.mark.slow
def test_it_is_retrained_on_a_new_file_and_judged_on_rows_that_no_model_saw(tmp_path: Path) -> None:
    place = Place(loans.write_loans(tmp_path))
    first = place.run("train", "train.epochs=1", "train.lr=0.0001")
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.store={tmp_path / 'store'}"]
    assert shell.main(["registry", "promote", "loans", str(first.directory), *paths]) == 0
    moved = batch(place, first, "moved", seed=8, first=20_000, shift=1.5)
    assert drift(place, first, moved)["verdict"] == "alarm"
    loans.write(tmp_path, "loans-2.csv", loans.loans(3000, seed=11, first=40_000, shift=1.0))
    run = place.run("retrain", "retrain.gate.min_rows=100", "retrain.gate.max_ece_rise=1")
    decision = json.loads((run.directory / "decision.json").read_text())
    assert decision["verdict"] == "promoted", decision["reasons"]
    labels = first.record["labels"]
    seen = sum(labels[name]["rows"] for name in ("train", "valid"))
    assert decision["facts"]["new_rows"] + seen == pytest.approx(0.9 * 0.98 * 4200, rel=0.03)
    assert decision["periods"]["judge"] == 0.9 * timeless.SPACE and decision["periods"]["stop"] == timeless.SPACE
    assert shell.main(["retrain", "--replay", str(run.directory / "decision.json"), *words(place)]) == 0
    again = place.run("retrain", "retrain.gate.min_rows=100", "retrain.triggers=[always]", "retrain.cool_down=0s")
    decision = json.loads((again.directory / "decision.json").read_text())
    assert decision["verdict"] == "held" and "no labelled row is new" in decision["reasons"][0]


def words(place: Place) -> list[str]:
    return ["--config-dir", str(place.folder / "conf"), *loans.overrides(place.folder)]


def test_a_champion_of_other_parts_is_no_champion_to_improve_on(place: Place, trained: Run) -> None:
    paths = [f"paths.runs={place.folder / 'runs'}", f"paths.store={place.folder / 'store'}"]
    assert shell.main(["registry", "promote", "loans", str(trained.directory), *paths]) == 0
    now = "retrain.now=2030-01-01"
    with pytest.raises(UserError, match="the champion must have been trained on the parts of this config"):
        place.run("retrain", now, "split.train=[0%,50%]", "split.valid=[50%,60%]", "split.test=[60%,100%]")
    with pytest.raises(UserError, match=r"retrain\.window=sliding is a time, which the rows of these data do not have"):
        place.run("retrain", now, "retrain.window=sliding")
    with pytest.raises(UserError, match=r"needs split\.by=hash with train and test.*found split\.by=column"):
        place.run("retrain", now, "split={by: column, column: part}")


@pytest.mark.slow
def test_runs_are_reproduced_link_by_link(place: Place, trained: Run, scored: Run, tmp_path: Path) -> None:
    run = place.run("monitor", f"monitor.model={trained.directory}", f"monitor.run={scored.directory}", *QUICK)
    for item in (trained, scored, run):
        assert shell.main(["reproduce", str(item.directory)]) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_on_ray_it_has_the_same_bytes(place: Place, trained: Run, scored: Run) -> None:
    ray = ("cluster=ray", "cluster.workers=2", "train.resume=never", "score.resume=never", "score.unit_rows=400")
    again = place.run("train", *ray)
    assert again.record["chain"] == trained.record["chain"]
    assert place.run("score", f"score.model={again.directory}", *ray).record["chain"] == scored.record["chain"]
