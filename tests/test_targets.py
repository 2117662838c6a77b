"""Several targets in one model, through every command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine import __main__ as shell
from engine.errors import UserError
from engine.runtime import records
from engine.runtime.run import Run
from engine.scoring.read import predictions
from engine.training import bundle
from engine.training.gate import check_gate
from tests.lifecycle.test_boosted_life import EARLY
from tests.lifecycle.test_retrain import RETRAIN
from tests.test_kinds_of_scores import MORE, through
from tests.tiny import START, H, overrides, visits, write_tiny

DAY = 24 * H
LIKED = ("train.targets.liked.column=liked", "train.targets.liked.loss=binary")
SPENT = ("train.targets.spent.column=amount", "train.targets.spent.loss=squared")


def place(folder: Path, rows: int = 2500) -> Path:
    """The tiny experiment, in which who did not buy has spent no known amount."""
    write_tiny(folder, rows)
    table = visits(rows)
    spent = np.asarray(table["amount"].to_numpy(zero_copy_only=False), float)
    lacking = ~np.asarray(table["bought"].fill_null(False).to_numpy(zero_copy_only=False), bool) | np.isnan(spent)
    column = pa.array(spent, mask=lacking)
    pq.write_table(table.set_column(table.column_names.index("amount"), "amount", column), folder / "visits.parquet")
    return folder


def test_a_class_and_a_number_are_trained_scored_evaluated_and_monitored_together(tmp_path: Path) -> None:
    folder = place(tmp_path)
    trained, scored, drift = through(folder, "binary", *SPENT, "evaluate.interval=0.7")
    both = trained.metrics
    assert both["spent/labels/train/rows"] < both["labels/train/rows"] == both["train/rows"]
    assert both["test/roc_auc"] > 0.6 and 0 < both["spent/test/rmse"] < both["spent/baseline/test/constant/rmse"] * 1.1
    table = predictions(scored.directory)
    named = ["score_bought", "decision_bought", "score_spent", "lower_spent", "upper_spent"]
    assert [name for name in table.column_names if name.endswith(("bought", "spent"))] == named
    assert (np.asarray(table["lower_spent"]) < np.asarray(table["score_spent"])).all()
    assert 0 < np.asarray(table["score_bought"]).min() and np.asarray(table["score_bought"]).max() < 1
    record = drift["targets"]["spent"]  # type: ignore[index]
    assert record["metrics"]["rmse"]["band"][0] < record["metrics"]["rmse"]["band"][1]
    assert record["labelled"] < drift["performance"]["labelled"]  # type: ignore[index]
    assert {"prediction_bought", "prediction_spent"} <= {item["name"] for item in drift["columns"]}  # type: ignore[index]
    page = (trained.directory / "report.html").read_text()
    assert "Target spent" in page and "spent: quality on test rows" in page
    assert json.loads((trained.directory / "evaluation-spent.json").read_text())["test"]["by_prediction"]
    model = engine.load(trained.directory)
    assert model.meaning["targets"]["spent"] == {"target": "amount"} and model.meaning["positive"] == "true"
    assert check_gate(model.bundle, model.model) > 100
    events = visits(2500).take(pa.array(np.arange(40)))
    found = model.predict(events, visits(2500))
    assert [name for name in found.column_names if name != "row_id"] == named


def test_scores_of_the_model_are_those_that_predict_gives(tmp_path: Path) -> None:
    folder = place(tmp_path, 900)
    conf, words = str(folder / "conf"), overrides(folder, "~features.views.shop", "train.epochs=1")
    trained = engine.run("train", *words, *SPENT, config_dir=conf)
    scored = engine.run("score", *words, f"score.model={trained.directory}", config_dir=conf)
    table = predictions(scored.directory)
    found = engine.load(trained.directory).predict(visits(900))
    order = {name: k for k, name in enumerate(found["row_id"].to_pylist())}
    take = pa.array([order[name] for name in table["row_id"].to_pylist()])
    for name in ("score_bought", "decision_bought", "score_spent"):
        assert found[name].take(take).to_pylist() == table[name].to_pylist(), name
    file = tmp_path / "scores.csv"
    engine.run("score", *words, f"score.model={trained.directory}", f"score.output={file}", config_dir=conf)
    assert {"score_bought", "decision_bought", "score_spent"} <= set(
        file.read_text().splitlines()[0].replace('"', "").split(",")
    )


def _first(model: dict, **values: object) -> None:
    model["targets"][0].update(values)


DAMAGE = {
    "a path as a name": (lambda model: _first(model, name="../x"), "names of their own, of letters"),
    "the name of the main target": (lambda model: _first(model, name="bought"), "names of their own, of letters"),
    "a column that is not there": (lambda model: _first(model, column="gone"), "'gone' must be a column of spec.json"),
    "no scale": (lambda model: model["architecture"].pop("other_targets"), "other_targets must be as many as targets"),
    "no target": (lambda model: model.pop("targets"), "outputs must be 1 for its loss and classes, found 2"),
    "another loss": (
        lambda model: _first(model, loss="quantiles"),
        "outputs must be 4 for its loss and classes, found 2",
    ),
    "classes of a number": (lambda model: _first(model, loss="binary"), "classes must be two for loss binary, found 0"),
    "a threshold of a number": (
        lambda model: _first(model, decision={"rule": "f1", "threshold": 0.5}),
        "decision must have a threshold for a loss of two classes",
    ),
    "a weight without bounds": (lambda model: _first(model, weight=1e99), "weight must be"),
}


def test_a_damaged_description_of_targets_is_refused_with_a_sentence(tmp_path: Path) -> None:
    folder = place(tmp_path, 600)
    words = overrides(folder, "~features.views.shop", "train.epochs=1", "evaluate.importance=0", *SPENT)
    model = engine.run("train", *words, config_dir=str(folder / "conf")).directory / "model"
    path = model / "model.json"
    text = path.read_text()
    for name, (change, said) in DAMAGE.items():
        described = json.loads(text)
        change(described)
        path.write_text(json.dumps(described))
        with pytest.raises(records.Damaged, match=re.escape(said)):
            bundle.seal(model)
            read = bundle.read_bundle(model)
            pytest.fail(f"{name}: read as {read.heads}")
    path.write_text(text)
    bundle.seal(model)
    assert [item.name for item in bundle.read_bundle(model).heads.items] == ["bought", "spent"]


NUMBER = "train.targets.spent.column=amount train.targets.spent.loss=squared"
SIZE = "train.targets.spent.column=size train.targets.spent.loss="
REFUSED = {
    "train.targets.bought.column=amount train.targets.bought.loss=squared": "has the name of the data's target",
    "train.targets.spent.column=amounts train.targets.spent.loss=squared": "'amounts', which is not in data.columns",
    "train.targets.spent.column=visit train.targets.spent.loss=squared": "which tells rows apart",
    "train.targets.test.column=amount train.targets.test.loss=squared": "none of baseline",
    "train.targets.spent.column=shop train.targets.spent.loss=squared": "must be a column that is learnt",
    "train.targets.spent.loss=squared": "train.targets.spent.column",
    "train.targets.spent.column=amount train.targets.spent.loss=square": "train.targets.spent.loss must be one of",
    f"{NUMBER} train.targets.spent.metric=auc": "^train.targets.spent.metric must be",
    f"{SIZE}squared train.targets.spent.positive=3": "^train.targets.spent.positive=3 says",
    f"{SIZE}poisson": "^the target must be .* for train.targets.spent.loss=poisson",
    "train.targets.spent.column=paid_at train.targets.spent.loss=squared": "^train.targets.spent.loss=squared learns a number",
    "train.targets.spent.column=amount train.targets.spent.loss=binary": "^train.targets.spent.loss=binary needs two values",
    "train.targets.again.column=bought train.targets.again.loss=binary": "another column than the data's target, 'bought'",
    "train.targets.spent.column=amount train.targets.spent.loss=squared model=lightgbm": "train.targets needs a network",
    "train.targets.spent.column=amount train.targets.spent.loss=squared train.sampling=balanced": "take class_weight",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_several_targets_cannot_be_is_refused_with_a_sentence(tmp_path: Path, words: str) -> None:
    folder = write_tiny(tmp_path, 60)
    with pytest.raises(UserError, match=REFUSED[words]):
        engine.run("train", *overrides(folder, *words.split()), config_dir=str(folder / "conf"))


def test_a_target_without_labels_in_a_period_has_no_figures_of_it_and_messages_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path, 600)
    table = visits(600)
    late = pc.greater_equal(table["at"], pa.scalar(START + 20 * DAY - 12 * H, pa.timestamp("us", tz="UTC")))
    wide = table.append_column("liked", pc.if_else(late, None, pc.if_else(pc.greater(table["size"], 0), "y", "n")))
    pq.write_table(wide, folder / "visits.parquet")
    more = (
        "+data.sources.visits.columns.liked=string",
        "+data.columns.liked={type: string, role: numeric, known_at: paid_at}",
    )
    words = overrides(folder, *more, "~features.views.shop", "train.epochs=1", "evaluate.importance=2", *LIKED)
    done = engine.run("train", *words, "evaluate.calibration=temperature", config_dir=str(folder / "conf"))
    assert not [name for name in done.metrics if name.startswith(("liked/valid/", "liked/baseline/"))]
    assert done.metrics["liked/labels/train/rows"] > 300 and done.metrics["baseline/test/constant/roc_auc"] == 0.5
    assert json.loads((done.directory / "evaluation-liked.json").read_text()) == {}
    warned = capsys.readouterr().err
    assert (
        "train with train.targets.liked.positive=n to turn" in warned and "target liked: no validation rows" in warned
    )
    again = engine.run("evaluate", *words, f"evaluate.model={done.directory}", config_dir=str(folder / "conf"))
    assert not [name for name in again.metrics if name.startswith("liked/valid/")]


def test_a_target_that_is_a_feature_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path, 300)
    more = ("train.targets.big.column=size", "train.targets.big.loss=squared", "~features.views.shop", "train.epochs=1")
    words = overrides(folder, *more, "evaluate.importance=0")
    engine.run("train", *words, config_dir=str(folder / "conf"))
    assert "target big is also the feature size" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tabm", "linear", "wide_and_deep"])
def test_other_networks_have_a_head_for_each_target(tmp_path: Path, kind: str) -> None:
    folder = place(tmp_path)
    shops = ("train.targets.where.column=size", "train.targets.where.loss=quantiles")
    words = overrides(folder, *MORE, f"model={kind}", "model.hidden=[16]", *SPENT, *shops, "train.epochs=4")
    if kind == "linear":
        words.remove("model.hidden=[16]")
    words = [*words, "~features.direct.size"]
    trained = engine.run("train", *words, config_dir=str(folder / "conf"))
    described = json.loads((trained.directory / "model/model.json").read_text())
    assert described["architecture"]["outputs"] == 5 and len(described["targets"]) == 2
    assert trained.metrics["test/roc_auc"] > (0.53 if kind == "linear" else 0.6)
    assert np.isfinite(trained.metrics["where/test/pinball"]) and np.isfinite(trained.metrics["spent/test/rmse"])


@pytest.mark.slow
def test_a_champion_of_two_targets_is_watched_challenged_reproduced_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place(tmp_path, 3000)

    def run(command: str, *words: str) -> Run:
        return engine.run(command, *overrides(folder, *SPENT, *words), config_dir=str(folder / "conf"))

    first = run("train", *EARLY)
    runs = f"paths.runs={folder / 'runs'}"
    assert shell.main(["registry", "promote", "tiny", str(first.directory), runs]) == 0
    scored = run("score", "score.model=tiny@champion", "score.between=[2020-01-26,2020-01-31]")
    small = run(
        "score", f"score.model={first.directory}", "score.between=[2020-01-26,2020-01-31]", "resources.threads=1"
    )
    assert small.record["chain"]["scores"] == scored.record["chain"]["scores"]
    watched = run("monitor", "monitor.model=tiny@champion", f"monitor.run={scored.directory}")
    stored = json.loads((watched.directory / "drift.json").read_text())
    sliced = run("monitor", "monitor.model=tiny@champion", "monitor.window=[2020-01-26,2020-01-31]")
    again = json.loads((sliced.directory / "drift.json").read_text())
    assert stored["targets"] == again["targets"] and stored["performance"] == again["performance"]
    decided = run("retrain", *RETRAIN)
    decision = json.loads((decided.directory / "decision.json").read_text())
    assert decision["verdict"] in ("promoted", "kept") and decision["evidence"]["metric"]["name"] == "roc_auc"
    made = Path(decision["challenger_run"]) / "model/model.json"
    assert [item["name"] for item in json.loads(made.read_text())["targets"]] == ["spent"]
    warm = run("train", *EARLY, f"train.start_from={first.directory}", "train.lr=1e-9")
    assert warm.metrics["spent/valid/rmse"] == pytest.approx(first.metrics["spent/valid/rmse"], rel=1e-3)
    capsys.readouterr()
    assert shell.main(["reproduce", str(first.directory), "--code", "current", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_difference"] is None, found
    assert shell.main(["compare", str(first.directory), str(warm.directory)]) == 0
    assert "spent/valid/rmse" in capsys.readouterr().out
