"""Shadow scoring: the challenger's scores beside the champion's, in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import engine
from engine.__main__ import main
from engine.errors import UserError
from engine.runtime.registry import Registry, seal_of
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests import tiny


def run(command: str, folder: Path, *more: str) -> Run:
    return engine.run(command, *tiny.overrides(folder, *more), config_dir=str(folder / "conf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a champion and a challenger."""
    made = tiny.write_tiny(tmp_path_factory.mktemp("shadow"), rows=1200)
    first, second = (run("train", made, f"train.seed={seed}", "train.epochs=1") for seed in (0, 1))
    assert main(["registry", "promote", "tiny", str(first.directory), f"paths.runs={made / 'runs'}"]) == 0
    registry = Registry(made / "runs" / "registry", "tiny")
    model = second.directory / "model"
    version = registry.register(
        model, seal_of(model), metric={"name": "roc_auc", "value": 0.7}, train_rows=1, source=""
    )
    registry.move("challenge", version.digest, expected=registry.state().champion, why="a test")
    return made


def test_both_models_score_in_one_pass_as_they_would_alone(folder: Path) -> None:
    words = ("score.model=tiny@champion", "score.shadow=tiny@challenger")
    both = run("score", folder, *words, "score.unit_rows=300")
    alone = [run("score", folder, f"score.model=tiny@{alias}") for alias in ("champion", "challenger")]
    table, first, second = predictions(both.directory), *(predictions(item.directory) for item in alone)
    assert table["row_id"].equals(first["row_id"])
    assert np.array_equal(table["score"], first["score"])
    assert np.array_equal(table["shadow_score"], second["score"])
    assert not np.array_equal(table["score"], table["shadow_score"])
    assert set(table["shadow_model"].to_pylist()) == {alone[1].record["model"]} == {both.record["shadow"]}
    assert both.record["chain"]["scores"] == alone[0].record["chain"]["scores"]  # the champion's answer is untouched


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_actors_score_with_both(folder: Path) -> None:
    words = ("score.model=tiny@champion", "score.shadow=tiny@challenger")
    threads, actors = run("score", folder, *words), run("score", folder, *words, "cluster=ray", "cluster.workers=2")
    assert predictions(actors.directory).equals(predictions(threads.directory))


def test_an_append_reuses_units_only_of_the_same_pair(folder: Path) -> None:
    words = ("score.model=tiny@champion", "score.mode=append", "score.columns=[shop]")
    run("score", folder, *words)
    # The same encoding of the same rows: only the model that scores beside is another.
    pairs = [run("score", folder, *words, f"score.shadow=tiny@{alias}") for alias in ("champion", "challenger")]
    again = run("score", folder, *words, "score.shadow=tiny@challenger")
    assert [item.metrics["score/units_reused"] for item in (*pairs, again)] == [0, 0, 1]
    assert predictions(again.directory).equals(predictions(pairs[1].directory))


def test_without_a_challenger_the_champion_scores_alone(folder: Path) -> None:
    """A nightly command names the alias once and for all; a promotion leaves nobody behind it."""
    registry = Registry(folder / "runs" / "registry", "tiny")
    challenger = registry.state().challenger
    registry.move("challenge", None, expected=registry.state().champion, why="a test")
    try:
        found = run("score", folder, "score.model=tiny@champion", "score.shadow=tiny@challenger")
    finally:
        registry.move("challenge", challenger, expected=registry.state().champion, why="a test")
    assert "shadow_score" not in predictions(found.directory).column_names
    assert found.record.get("shadow") is None


def test_a_shadow_of_another_specification_is_refused(folder: Path) -> None:
    other = run("train", folder, "features.direct.size=false", "train.epochs=1")
    with pytest.raises(UserError, match=r"features\.direct\.size"):
        run("score", folder, "score.model=tiny@champion", f"score.shadow={other.directory}")


def test_a_shadow_that_is_not_there_is_refused_by_its_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"score\.shadow"):
        run("score", folder, "score.model=tiny@champion", "score.shadow=nowhere")
