"""One small trained model for the tests of scoring, and a short way to score with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

import engine
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests.tiny import overrides, write_tiny

ROWS = 6000


@dataclass(frozen=True)
class Shop:
    """A folder with visits, a store and a trained model."""

    folder: Path
    model: Path

    def words(self, *more: str, runs: Path | None = None) -> list[str]:
        """Overrides of a scoring command; small units, so that there are several."""
        place = [f"paths.runs={runs}"] if runs else []
        return overrides(self.folder, f"score.model={self.model}", "score.unit_rows=1024", *place, *more)

    @property
    def conf(self) -> str:
        """The config folder."""
        return str(self.folder / "conf")


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = write_tiny(tmp_path_factory.mktemp("shop"), ROWS)
    run = engine.run("train", *overrides(folder, "train.epochs=1"), config_dir=str(folder / "conf"))
    return Shop(folder, run.directory)


@pytest.fixture
def score(shop: Shop, tmp_path: Path) -> Callable[..., Run]:
    """`score("score.unit_rows=2048")` in run directories of the test's own."""

    def run(*more: str, runs: Path | None = None) -> Run:
        return engine.run("score", *shop.words(*more, runs=runs or tmp_path / "runs"), config_dir=shop.conf)

    return run


@pytest.fixture(scope="session")
def unbroken(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All rows scored in one go."""
    runs = tmp_path_factory.mktemp("unbroken")
    return engine.run("score", *shop.words("score.columns=[shop,size]", runs=runs), config_dir=shop.conf)


def rows_of(run: Run) -> pa.Table:
    """Predictions in one piece."""
    store = run.record["config"]["paths"]["store"]
    return predictions(run.directory, store=store).unify_dictionaries().combine_chunks()


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
