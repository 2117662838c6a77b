"""The life of a table without any time: from the file to a model, its scores, alarms, and the next model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

import engine
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
