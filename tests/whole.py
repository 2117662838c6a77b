"""A folder with a store and a run of every step, for trials of what happens to its files."""

from __future__ import annotations

from pathlib import Path

from engine import __main__ as shell
from engine.runtime import remote
from tests.tiny import overrides, write_tiny

WORDS = ("train.epochs=1", "monitor.resamples=50", "monitor.alpha=0.1", "evaluate.bootstrap=0")


class Place:
    """A folder with a store, and runs of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def paths(self) -> list[str]:
        """Words for a command that takes no experiment."""
        return [f"paths.runs={self.folder / 'runs'}", f"paths.store={self.folder / 'store'}"]

    def engine(self, command: str, *words: str) -> int:
        """A command with the experiment; its exit code."""
        return shell.main(
            [*command.split(), "--config-dir", str(self.folder / "conf"), *overrides(self.folder, *WORDS, *words)]
        )

    def newest(self, command: str) -> Path:
        """The newest run directory of a step."""
        return max((self.folder / "runs" / command / "tiny").iterdir())


def make_place(folder: Path) -> Place:
    """Trained, scored, monitored, promoted."""
    place = Place(write_tiny(folder, rows=600))
    assert place.engine("train") == 0
    model = place.newest("train")
    assert place.engine("score", f"score.model={model}") == 0
    assert place.engine("monitor", f"monitor.model={model}", f"monitor.run={place.newest('score')}") in (0, 2, 3)
    assert shell.main(["registry", "promote", "tiny", str(model), *place.paths]) == 0
    remote.record(place.folder / "store", ["s3://bucket/rows", None, None])
    return place
