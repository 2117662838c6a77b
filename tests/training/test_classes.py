"""What a target's values are to a loss: which class a score is for, rows of no known class, numbers taken for classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import api
from engine.config import schema
from engine.config.tree import Config
from engine.data.dataset import open_dataset
from engine.errors import UserError
from engine.runtime.run import Run
from engine.scoring import output
from engine.training import classes
from tests.tiny import DATA, START, overrides, visits, write_tiny

FAST = ("train.epochs=1", "evaluate.bootstrap=0", "features.windows=off")
Make = Callable[[pa.Table], pa.Array]


def folder_with(folder: Path, kind: str, make: Make, rows: int = 900) -> Path:
    """The tiny experiment with another target: a column of type `kind` that `make` gives of the visits."""
    table = visits(rows)
    target = make(table)
    pq.write_table(
        table.set_column(table.column_names.index("bought"), "bought", target), write_tiny(folder) / "visits.parquet"
    )
    data = DATA.replace("bought: bool", f"bought: {kind}").replace("bought: {type: bool", f"bought: {{type: {kind}")
    (folder / "conf/data/tiny.yaml").write_text(data)
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [*overrides(folder), *FAST, *more, "--config-dir", str(folder / "conf")]


def outcome(table: pa.Table, yes: str = "legit", no: str = "fraud") -> pa.Array:
    return pc.if_else(table["bought"], yes, no)


def run(command: str, folder: Path, *more: str) -> Run:
    return api.run(command, *overrides(folder, *FAST, *more), config_dir=str(folder / "conf"))


def log(found: Run) -> str:
    return (found.directory / "run.log").read_text()


# --------------------------------------------------------------------------------------- which class a score is for


def test_a_text_target_says_which_class_a_score_is_for_and_can_be_turned_round(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "string", outcome)
    as_sorted = run("train", folder)
    said = "score: probability that bought is 'legit' (and not 'fraud')"
    assert said in log(as_sorted) and "train with data.positive=fraud to turn it round" in log(as_sorted)
    turned = run("train", folder, "data.positive=fraud")  # what it says
    assert "score: probability that bought is 'fraud' (and not 'legit')" in log(turned) and "turn it" not in log(turned)
    rates = [found.metrics["test/positive_rate"] for found in (as_sorted, turned)]
    assert sum(rates) == pytest.approx(1) and rates[0] != rates[1]
    for found, name in ((as_sorted, "legit"), (turned, "fraud")):
        details = json.loads((found.directory / "evaluation.json").read_text())
        assert details["test"]["score"]["positive"] == name
        assert json.loads((found.directory / "model" / "schema.json").read_text())["score"]["positive"] == name
        assert f"the probability that bought is &#39;{name}&#39;" in (found.directory / "report.html").read_text()
    # One dataset: the class that a score is for is no part of it.
    assert as_sorted.record["chain"]["dataset"] == turned.record["chain"]["dataset"]
    assert len(list((folder / "store" / "datasets" / "tiny").glob("*/manifest.json"))) == 1
    scored = run("score", folder, f"score.model={turned.directory}", "data.positive=fraud")
    manifest = output.read_manifest(output.place_of(None, scored.directory))
    assert manifest is not None and manifest["score"] == {"target": "bought", "positive": "fraud", "negative": "legit"}
    assert "score: probability that bought is 'fraud'" in log(scored)
    with pytest.raises(
        UserError, match=r"data.positive=legit, but the model's score is for bought = 'fraud': leave it"
    ):
        run("score", folder, f"score.model={turned.directory}", "data.positive=legit")
    assert run("score", folder, f"score.model={turned.directory}").metrics["score/rows"] == 900


def test_a_truth_value_needs_no_word_and_gives_the_same_weights_with_one(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 600)
    plain, said = run("train", folder), run("train", folder, "data.positive=true")
    assert "turn it round" not in log(plain) and "probability that bought is 'true'" in log(plain)
    for link in ("inputs", "dataset", "features", "fitted", "weights"):
        assert plain.record["chain"][link] == said.record["chain"][link], link
    assert plain.record["outputs"]["model"] == said.record["outputs"]["model"]
    turned = run("train", folder, "data.positive=false")
    assert turned.metrics["test/positive_rate"] == pytest.approx(1 - plain.metrics["test/positive_rate"])


@pytest.mark.parametrize(("words_", "message"), [
    (["data.positive=froud"], "must be one of the values of the target 'bought' in split.train, 'fraud', 'legit', found 'froud'"
     r"\. Did you mean 'fraud'\?"),
    (["data.positive=fraud", "train.loss=multiclass"], r"has no such class: leave it out \(data\.positive=null\)"),
    (["train.loss=squared"], "train.loss=squared learns a number, found the target data.columns.bought of type string: use "
     "train.loss=binary or multiclass"),
])  # fmt: skip
def test_a_class_that_is_not_there_is_refused(tmp_path: Path, words_: list[str], message: str) -> None:
    folder = folder_with(tmp_path, "string", outcome)
    with pytest.raises(UserError, match=message):
        run("train", folder, *words_)


KINDS = {
    "bool": st.booleans(), "int64": st.integers(-(2**40), 2**40), "float64": st.floats(-1e6, 1e6, allow_nan=False),
    "string": st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=5),
}  # fmt: skip


@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_either_value_of_any_target_can_be_the_positive_one(data: st.DataObject, kind: str) -> None:
    """By the text that a class has, and by the way in which a person or YAML writes the value."""
    pair = data.draw(st.lists(KINDS[kind], min_size=2, max_size=2, unique_by=repr))
    texts = classes.as_texts(pa.array(pair)).to_pylist()
    if texts[0] == texts[1]:
        return
    wanted = data.draw(st.sampled_from([0, 1]))
    value = pair[wanted]
    written = [texts[wanted], *([str(value)] if kind != "bool" else [str(value), "on" if value else "off"])]
    settings = {"columns": {"t": {"type": kind, "role": "target"}, "i": {"type": "int64", "role": "id"}}}
    for word in written:
        text = classes.positive_text(word, kind)
        found = classes._positive_last(_config(settings, word), "it", tuple(sorted(texts)))
        assert found[-1] == texts[wanted] == text and set(found) == set(texts)


def _config(data: dict[str, Any], positive: str | None) -> Config:
    columns = {**data["columns"], "at": {"type": "timestamp", "role": "event_time"}}
    source = {"path": "x", "columns": {name: item["type"] for name, item in columns.items()}}
    return schema.build(Config, {"data": {"columns": columns, "sources": {"s": source}, "positive": positive}})


# ------------------------------------------------------------------------------------------ rows of no known class


def late_classes(table: pa.Table) -> pa.Array:
    """Three classes; from 26 January on a fourth, in the test period only."""
    size = np.nan_to_num(table["size"].to_numpy(zero_copy_only=False))
    names = np.array(["low", "mid", "high"], object)[np.digitize(size, [-0.5, 0.5])]
    late = table["at"].cast(pa.int64()).to_numpy() >= START + 25 * 86_400_000_000
    names[late & (np.arange(len(names)) % 4 == 0)] = "brand/new"
    return pa.array(names.tolist(), pa.string())


def test_rows_of_a_class_that_training_never_saw_are_counted_and_said(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "string", late_classes)
    found = run("train", folder, "train.loss=multiclass")
    lost = int(found.metrics["test/rows_of_unknown_target"])
    assert lost > 20 and "valid/rows_of_unknown_target" not in found.metrics
    all_rows = lost + int(found.metrics["test/rows"])
    sentence = (
        f"split.test: {lost:,} of {all_rows:,} labelled rows have a bought that training never saw ('brand/new': {lost}"
    )
    assert sentence in log(found)
    assert json.loads((found.directory / "evaluation.json").read_text())["test"]["unknown_targets"] == {
        "brand/new": lost
    }
    assert "unknown target: brand/new" in (found.directory / "report.html").read_text()
    measured = run("evaluate", folder, f"evaluate.model={found.directory}")
    assert measured.metrics["test/rows_of_unknown_target"] == lost and sentence in log(measured)
    window = "monitor.window=[2020-01-26,2020-01-31]"
    watched = run("monitor", folder, f"monitor.model={found.directory}", window, "monitor.resamples=50")
    record = json.loads((watched.directory / "drift.json").read_text())
    assert record["performance"]["rows_of_unknown_target"] == lost and f"{lost:,} rows have a bought that" in log(
        watched
    )


def test_every_class_has_its_figures(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "string", late_classes)
    found = run("train", folder, "train.loss=multiclass", "train.epochs=3")
    table = json.loads((found.directory / "evaluation.json").read_text())["test"]["classes"]
    assert [row["class"] for row in table] == ["high", "low", "mid"]
    assert sum(row["rows"] for row in table) == found.metrics["test/rows"] == sum(row["predicted"] for row in table)
    right = sum(row["recall"] * row["rows"] for row in table if row["recall"] is not None)
    assert right / found.metrics["test/rows"] == pytest.approx(found.metrics["test/accuracy"])
    assert found.metrics["test/class/high/rows"] == table[0]["rows"]
    assert found.metrics["test/class/high/recall"] == table[0]["recall"]
    page = (found.directory / "report.html").read_text()
    assert "By class" in page and re.search(r'<td class="[^"]*">high</td>', page)


# -------------------------------------------------------------------------------------------- numbers as classes


def amounts(table: pa.Table) -> pa.Array:
    return pa.array(np.exp(np.nan_to_num(table["size"].to_numpy(zero_copy_only=False))))


@pytest.mark.parametrize("loss", ["binary", "multiclass"])
def test_a_number_is_not_taken_for_classes_and_the_advice_works(
    tmp_path: Path, cli: Callable[..., Any], loss: str
) -> None:
    folder = folder_with(tmp_path, "float64", amounts)
    refused = cli("train", *words(folder, f"train.loss={loss}"))
    assert (
        refused.code == 1 and "Take train.loss=squared, huber or quantile for a number; or fewer classes" in refused.err
    )
    assert "multiclass for classes" not in refused.err
    if loss == "multiclass":
        assert "at most train.max_classes=100 classes, found 5" in refused.err and "of them once among 5" in refused.err
    found = cli("train", *words(folder, "train.loss=squared"))
    assert found.code == 0, found.err


def test_few_numbers_may_be_either(tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = folder_with(tmp_path, "int64", lambda table: pa.array(np.arange(table.num_rows) % 5))
    refused = cli("train", *words(folder))
    assert (
        "found 5: '0', '1', '2', '3', '4'. Take train.loss=squared, huber or quantile for a number; or " in refused.err
    )
    assert "or train.loss=multiclass for classes" in refused.err
    for loss in ("multiclass", "huber"):
        assert cli("train", *words(folder, f"train.loss={loss}")).code == 0, loss
    assert (
        "max_classes=4 classes, found 5"
        in cli("train", *words(folder, "train.loss=multiclass", "train.max_classes=4")).err
    )


def test_many_texts_are_capped_and_the_cap_can_be_raised(tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = folder_with(tmp_path, "string", lambda table: pa.array([f"k{k % 120}" for k in range(table.num_rows)]))
    refused = cli("train", *words(folder, "train.loss=multiclass"))
    assert "Take fewer classes made in data.query, or train.max_classes=120, where they are classes" in refused.err
    assert cli("train", *words(folder, "train.loss=multiclass", "train.max_classes=120")).code == 0


def test_one_value_asks_for_another_period(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "string", lambda table: pa.array(["same"] * table.num_rows))
    with pytest.raises(UserError, match=r"must have at least two classes, found 1: 'same'. Take another period"):
        run("train", folder)


def test_sensitive_classes_are_not_named(tmp_path: Path) -> None:
    found = open_dataset(_ingested(folder_with(tmp_path, "string", outcome)))
    rows = np.arange(5, dtype=np.int64)
    assert classes.unknown_targets(found, "bought", rows, np.full(5, np.nan), True) == {"(sensitive)": 5}
    assert sum(classes.unknown_targets(found, "bought", rows, np.full(5, np.nan), False).values()) == 5


def _ingested(folder: Path) -> Path:
    run("ingest", folder)
    return next((folder / "store" / "datasets" / "tiny").glob("*/manifest.json")).parent
