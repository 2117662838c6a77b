"""Reasons of scores: the same bytes for any units, threads and workers, in the user's names, beside scores that do not change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

import engine
from engine.config.compose import compose
from engine.errors import UserError
from engine.features.encode import Encoder, NumericColumn, Vocabulary
from engine.features.spec import Feature
from engine.runtime.run import Run
from engine.scoring import output
from engine.scoring.plan import check_columns
from engine.scoring.predictor import load
from engine.scoring.score import check_reasons
from engine.training.finished import FinishedNetwork
from engine.training.heads import Head
from engine.training.losses import LOSSES, to_scores
from engine.training.reasons import by_feature, describe_margin, largest, names_of, shares_of
from engine.training.target import PLAIN, TargetScale
from tests.scoring.conftest import ROWS, Shop, rows_of
from tests.tiny import overrides, visits

TREES = ("model=lightgbm", "model.trees.rounds=20", "model.trees.leaves=7")
THREE = names_of(3)


@pytest.fixture(scope="module")
def trees(shop: Shop) -> Path:
    return engine.run("train", *overrides(shop.folder, *TREES), config_dir=shop.conf).directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def score(shop: Shop, model: Path, runs: Path, *more: str) -> Run:
    return engine.run("score", *shop.words(f"score.model={model}", *more, runs=runs), config_dir=shop.conf)


@pytest.fixture(scope="module")
def explained(shop: Shop, trees: Path, runs: Path) -> Run:
    return score(shop, trees, runs, "score.reasons=3")


def bits(table: pa.Table, name: str) -> Any:
    return np.asarray(table[name].combine_chunks().fill_null(0)).view(np.int32)


def test_reasons_do_not_depend_on_units_and_threads_and_leave_scores_alone(
    shop: Shop, trees: Path, runs: Path, explained: Run
) -> None:
    other = score(shop, trees, runs, "score.reasons=3", "score.unit_rows=4096", "resources.threads=1")
    plain = score(shop, trees, runs, "score.mode=append")
    table = rows_of(explained)
    assert table.column_names[-7:] == ["model", *THREE] and rows_of(other).equals(table)
    assert other.record["chain"]["reasons"] == explained.record["chain"]["reasons"]
    assert (
        plain.record["chain"]["scores"] == explained.record["chain"]["scores"]
        and "reasons" not in plain.record["chain"]
    )
    assert plain.metrics["score/units_reused"] == 0 and not set(THREE) & set(rows_of(plain).column_names)
    assert 0 < explained.metrics["score/reasons_error"] < 1e-5 and explained.metrics["score/reasons_seconds"] > 0
    more = score(shop, trees, runs, "score.reasons=3", "score.mode=append")
    assert more.metrics["score/units_scored"] == 0 and rows_of(more).equals(table)


def test_reasons_name_features_by_the_size_of_their_contribution(trees: Path, explained: Run) -> None:
    table, predictor = rows_of(explained), load(trees)
    size = [np.abs(np.nan_to_num(np.asarray(table[f"contribution_{place}"], np.float64))) for place in (1, 2, 3)]
    assert (size[0] >= size[1]).all() and (size[1] >= size[2]).all() and size[2].max() > 0
    found = set(table["reason_1"].to_pylist())
    assert {"size"} < found < {feature.name for feature in predictor.bundle.encoder.features}
    manifest = output.read_manifest(output.place_of(None, explained.directory))
    assert manifest is not None and manifest["reasons"] == {"count": 3, "margin": "log odds that bought is 'true'"}
    for predicted, row in zip(table["contribution_1"].to_pylist(), table["reason_1"].to_pylist(), strict=True):
        assert (predicted is None) == (row is None)


def test_predict_gives_the_reasons_of_the_run_alone_and_together(trees: Path, explained: Run) -> None:
    predictor, table = load(trees), rows_of(explained)
    events = visits(ROWS).sort_by("at")
    some = events.slice(3000, 70)
    found = predictor.predict(some, history=events, reasons=3)
    assert found.column_names == ["row_id", "score", "decision", *THREE]
    place = {name: index for index, name in enumerate(table["row_id"].to_pylist())}
    want = table.take(pa.array([place[name] for name in found["row_id"].to_pylist()]))
    for name in THREE:
        assert found[name].to_pylist() == want[name].to_pylist(), name
    alone = predictor.predict(some.slice(7, 1), history=events, reasons=2)
    assert alone.select(names_of(2)).to_pylist() == found.select(names_of(2)).slice(7, 1).to_pylist()


def test_a_file_of_scores_has_the_reasons(shop: Shop, trees: Path, runs: Path, tmp_path: Path) -> None:
    there = tmp_path / "out.csv"
    score(shop, trees, runs, "score.reasons=2", "score.between=[2020-01-29,2020-01-30]", f"score.output={there}")
    found = pacsv.read_csv(there)
    assert found.column_names[-6:] == ["score", "decision", *names_of(2)]
    assert set(found["reason_1"].to_pylist()) < {*"shop size".split(), *found["reason_1"].to_pylist()}


def test_a_column_that_is_passed_through_may_not_have_the_name_of_a_reason(shop: Shop) -> None:
    config = compose(shop.words("score.reasons=2"), shop.conf).config
    check_columns(config)
    columns = {**config.data.columns, "reason_2": config.data.columns["size"]}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, columns=columns))
    for reasons, wrong in ((1, False), (2, True)):
        asked = dataclasses.replace(
            config, score=dataclasses.replace(config.score, columns=("reason_2",), reasons=reasons)
        )
        if wrong:
            with pytest.raises(UserError, match="already has a column 'reason_2'"):
                check_columns(asked)
        else:
            check_columns(asked)


def test_a_network_has_reasons_too_in_any_units(shop: Shop, runs: Path) -> None:
    some = "score.between=[2020-01-26,2020-01-31]"
    found = score(shop, shop.model, runs, "score.reasons=3", some)
    other = score(shop, shop.model, runs, "score.reasons=3", "score.unit_rows=4096", "resources.threads=1", some)
    assert rows_of(other).equals(rows_of(found)) and set(THREE) < set(rows_of(found).column_names)
    assert 0 < found.metrics["score/reasons_error"] < 0.2


def test_a_model_whose_gradients_do_not_explain_it_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, whole = load(shop.model), FinishedNetwork.contributions
    check_reasons(predictor)
    monkeypatch.setattr(FinishedNetwork, "contributions", lambda *given, **keys: 0.5 * whole(*given, **keys))
    with pytest.raises(UserError, match="miss its margin"):
        check_reasons(predictor)

    def placed(*given: Any, **keys: Any) -> Any:
        found = whole(*given, **keys)
        return found * (1 + 1e-6 * np.arange(len(found))[:, None])

    monkeypatch.setattr(FinishedNetwork, "contributions", placed)
    with pytest.raises(UserError, match="depend on its place"):
        check_reasons(predictor)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_actors_give_the_same_reasons(shop: Shop, trees: Path, runs: Path, explained: Run) -> None:
    found = score(shop, trees, runs, "score.reasons=3", "cluster=ray", "cluster.workers=2")
    assert rows_of(found).equals(rows_of(explained))
    assert found.record["chain"]["reasons"] == explained.record["chain"]["reasons"]


# ------------------------------------------------------------------------------------------------------ the parts


def test_what_a_feature_is_encoded_in_is_added_back_to_it() -> None:
    encoder = Encoder(
        (Feature("a", "numeric", ""), Feature("c", "categorical", ""), Feature("b", "numeric", "")),
        (
            NumericColumn("a", "ple", 0.0, 1.0, 0.0, 2.0, True, (0.0, 1.0, 2.0)),
            NumericColumn("b", "standardise", 0.0, 1.0, 0.0, 1.0, False),
        ),
        (Vocabulary("c", ("x",), ()),),
        5.0,
    )
    found = by_feature(encoder, np.array([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert found.tolist() == [[7.0, 16.0, 8.0]]  # of a, c and b: numbers come first in the blocks


def test_the_largest_in_size_come_first_and_nothing_is_no_reason() -> None:
    place, value = largest(np.array([[1.0, -3.0, 0.0, 3.0], [0.0, np.nan, 0.5, -0.0]]), 3)
    assert place.tolist() == [[1, 3, 0], [2, -1, -1]] and value.tolist() == [[-3.0, 3.0, 1.0], [0.5, 0.0, 0.0]]
    place, value = largest(np.array([[2.0]]), 3)
    assert place.tolist() == [[0, -1, -1]]


def test_a_margin_is_what_the_words_say() -> None:
    rng, classes = np.random.default_rng(0), ["a", "b", "c"]
    raw = rng.normal(size=(50, 4)).astype(np.float32)  # the first output is that of another target

    def head(name: str, outputs: int, scale: TargetScale = PLAIN) -> Head:
        return Head(
            "y", "y", LOSSES[name], tuple(classes[: outputs + 1]), scale, slice(1, 1 + outputs), slice(0, outputs)
        )

    def margin(name: str, outputs: int, scale: TargetScale = PLAIN, temperature: float = 1.0) -> tuple[Any, Any]:
        mine = head(name, outputs, scale)
        scores = to_scores(mine.loss, np.ascontiguousarray(raw[:, mine.at]), scale)
        return (raw * shares_of(mine, scores, 4, temperature)).sum(axis=1), scores

    found, scores = margin("binary", 1)
    np.testing.assert_allclose(found, np.log(scores / (1 - scores)), rtol=1e-4, atol=1e-5)
    assert np.allclose(margin("binary", 1, temperature=2.0)[0], found / 2)
    found, scores = margin("multiclass", 3)
    logs = np.log(scores)
    np.testing.assert_allclose(found, logs.max(axis=1) - logs.mean(axis=1), rtol=1e-4, atol=1e-5)
    found, scores = margin("ordinal", 2)
    shift = np.log((1 - scores[:, 0]) / scores[:, 0]) - found
    np.testing.assert_allclose(shift, np.log(2), rtol=1e-4)  # of equal shares
    found, scores = margin("squared", 1, TargetScale(10.0, 4.0))
    np.testing.assert_allclose(found + 10.0, scores, rtol=1e-5)
    found, scores = margin("poisson", 1, TargetScale(0.0, 4.0))
    np.testing.assert_allclose(found + np.log(4.0), np.log(scores), rtol=1e-5, atol=1e-5)
    names = ("binary", "multiclass", "ordinal", "squared", "gamma")
    said = {name: describe_margin(head(name, 1)) for name in names}
    assert len(set(said.values())) == 5 and said["ordinal"] == "log odds that y is above 'a'"
    with pytest.raises(UserError, match=r"score\.reasons must be 0 for a model of train\.loss=quantiles"):
        describe_margin(head("quantiles", 3))
