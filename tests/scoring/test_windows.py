"""A model whose windows go by known time, over a side table, under conditions: the gate and `score.input` compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine.runtime.run import Run
from engine.scoring.predictor import load
from engine.training.gate import check_gate
from tests.features.test_kinds import weather
from tests.features.test_windows import DERIVE, REPORTS, visits_known_late
from tests.scoring.conftest import rows_of
from tests.tiny import overrides, write_tiny

MARCH = ("2020-03-10", "2020-03-20")
WORDS = (
    *REPORTS,
    "features.views.shop={entity: [shop], windows: [6h, 2d], by: known, aggregates: {bought: [mean], amount: [max]}}",
    "split.train=['2020-01-01', '2020-03-01']",
    "split.valid=['2020-03-01', '2020-03-10']",
    "split.test=['2020-03-10', '2020-05-01']",
    DERIVE,
    "train.epochs=1",
)


def train(folder: Path, *more: str) -> Run:
    return engine.run("train", *overrides(folder, *WORDS, *more), config_dir=str(folder / "conf"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = write_tiny(tmp_path_factory.mktemp("late"), 10)
    pq.write_table(visits_known_late(), folder / "visits.parquet")
    pq.write_table(weather(900), folder / "weather.parquet")
    return folder, train(folder).directory


def test_the_gate_computes_what_training_saw(trained: tuple[Path, Path]) -> None:
    predictor = load(trained[1])
    assert check_gate(predictor.bundle, predictor.model) > 150


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_workers_compute_and_train_what_one_process_does(trained: tuple[Path, Path]) -> None:
    folder, model = trained
    more = ("cluster=ray", "cluster.workers=2", f"paths.store={folder / 'apart'}", "train.resume=never")
    chain = train(folder, *more).record["chain"]
    assert chain == json.loads((model / "run.json").read_text())["chain"] and "weights" in chain
    views = {path.parent.name for path in (folder / "apart" / "features").glob("*/*")}
    assert {"big", "reports"} <= views  # computed there, not read from the store of the one process


def test_rows_of_a_file_look_back_on_the_store_as_those_of_the_dataset(trained: tuple[Path, Path]) -> None:
    folder, model = trained
    words = [f"score.model={model}", f"paths.store={folder / 'store'}", f"paths.runs={folder / 'runs'}"]
    whole = rows_of(engine.run("score", *words, f"score.between=[{','.join(MARCH)}]"))
    ids = [int(row) for row in whole["row_id"].to_pylist()]
    table = visits_known_late()
    new = folder / "new.parquet"
    chosen = pc.is_in(table["visit"], pc.cast(whole["row_id"], "int64").combine_chunks())
    pq.write_table(table.filter(chosen).drop_columns(["paid_at", "amount", "bought"]), new)
    some = rows_of(engine.run("score", *words, f"score.input={new}"))
    assert some["row_id"].to_pylist() == whole["row_id"].to_pylist() and len(ids) > 20
    assert some["score"].equals(whole["score"])
