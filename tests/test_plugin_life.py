"""Code of a user's own, in a folder and in a package, goes through every command: a model, a loss, a metric and aggregates.

Each life is one test, since each step needs the one before. Two real Ray workers train and score, and another clone of the
engine reproduces.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import engine
from engine import __main__ as shell
from engine.config import plugins
from engine.config.plugins import Plugin
from engine.errors import UserError
from engine.lifecycle import chain
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests.features.test_user_aggregates import CODE as AGGREGATES
from tests.test_model_plugins import MODEL
from tests.tiny import overrides, visits, write_tiny
from tests.training.test_user_losses import CODE as LOSSES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).resolve().parents[1]
CODE = f"{MODEL}\n\n{LOSSES}\n\n{AGGREGATES}"
ASKED = (
    "model.settings={width: 6}", "train.loss=Surprise", "train.metric=right", "train.epochs=1", "evaluate.bootstrap=20",
    "features.views.shop.aggregates={rows: [count], amount: [mean, fading, span]}",
)  # fmt: skip
WORDS = {"folder": ("plugins=[own.py]", "model.kind=Steps", *ASKED), "package": ("model.kind=Steps", *ASKED)}
RAY = ("cluster=ray", "cluster.workers=2")
PERIOD = "score.between=[2020-01-01,2020-01-31]"
ENTRIES = {
    "engine.models": ("Steps",),
    "engine.losses": ("Surprise",),
    "engine.metrics": ("right",),
    "engine.aggregates": ("fading", "span"),
}


class Place:
    """A workplace whose user brings code in a folder or in a package."""

    def __init__(self, way: str, folder: Path, site: Path) -> None:
        self.way, self.folder, self.site = way, write_tiny(folder, 2600), site
        self.write(CODE, "1.0")

    def write(self, code: str, version: str) -> None:
        """Put a version of the code in its place; that of a package as `pip install` leaves it."""
        if self.way == "folder":
            (self.folder / "conf" / "own.py").write_text(code)
            return
        shutil.rmtree(self.site, ignore_errors=True)
        facts = self.site / f"shop_code-{version}.dist-info"
        facts.mkdir(parents=True)
        (self.site / "shop_code.py").write_text(code)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shop-code\nVersion: {version}\n")
        groups = (
            f"[{group}]\n" + "".join(f"{name} = shop_code:{name}\n" for name in names)
            for group, names in ENTRIES.items()
        )
        (facts / "entry_points.txt").write_text("\n".join(groups))
        importlib.invalidate_caches()

    def words(self, *more: str) -> list[str]:
        return [*overrides(self.folder, *WORDS[self.way], *more), "--config-dir", str(self.folder / "conf")]

    def run(self, command: str, *more: str) -> Run:
        *words, _, conf = self.words(*more)
        return engine.run(command, *words, config_dir=conf)

    def shell(self, *words: str, clone: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own, with the engine of a clone."""
        path = os.pathsep.join([str(clone), str(self.site)])
        return subprocess.run(
            [sys.executable, "-P", "-m", "engine", *words],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture(params=["folder", "package"])
def place(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = tmp_path / "site"
    made = Place(request.param, tmp_path / "shop", site)
    if made.way == "package":
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))  # of Ray workers
        monkeypatch.syspath_prepend(site)
    else:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plugins.installed.cache_clear()
    yield made
    plugins.installed.cache_clear()
    sys.modules.pop("shop_code", None)


def test_code_of_a_user_lives_as_the_engines_own(place: Place, tmp_path: Path) -> None:
    trained = place.run("train")
    bundle = engine.load(trained).bundle
    assert [plugin.file for plugin in bundle.code] == (["own.py"] if place.way == "folder" else [])
    assert 0 < trained.metrics["test/right"] < 1 and "test/right_low" in trained.metrics
    named = trained.record["config"]["features"]["views"]["shop"]["aggregates"]["amount"][1]
    assert named == (f"fading@{Plugin('own.py', CODE.encode()).digest}" if place.way == "folder" else "fading")

    spread = place.run("train", *RAY, f"paths.runs={tmp_path / 'on-ray'}", f"paths.store={tmp_path / 'store-of-ray'}")
    assert spread.record["outputs"] == trained.record["outputs"] and spread.record["chain"] == trained.record["chain"]

    plain = overrides(place.folder)[1:]
    ray = (*RAY, "score.features=compute", "score.unit_rows=1024")
    scored = [engine.run("score", f"score.model={trained.directory}", PERIOD, *plain, *more) for more in (ray, ())]
    assert predictions(scored[0]).equals(predictions(scored[1])) and scored[0].metrics["score/units_scored"] > 1
    rows = visits(2600).filter(pc.is_in(visits(2600)["visit"].cast(pa.string()), predictions(scored[0])["row_id"]))
    again = engine.load(trained).predict(rows).sort_by("row_id")
    assert again["score"].equals(predictions(scored[0]).sort_by("row_id")["score"])
    assert shell.main(["features", "audit", *place.words(), "--rows", "30"]) == 0

    judged(place)
    reproduced(place, trained, tmp_path)
    edited(place, trained)
    tampered(place, trained, tmp_path)


def judged(place: Place) -> None:
    """Promoted, monitored, and retrained with a gate on the user's metric."""
    periods = ('split.train=["2020-01-01","2020-01-12"]', 'split.valid=["2020-01-12","2020-01-15"]', "split.test=[]")
    champion = place.run("train", *periods)
    assert shell.main(["registry", "promote", "tiny", str(champion.directory), *overrides(place.folder)[2:4]]) == 0
    seen = place.run("monitor", "monitor.model=tiny@champion", 'monitor.window=["2020-01-20","2020-01-25"]')
    record = json.loads((seen.directory / "drift.json").read_text())
    assert record["performance"]["watched"] == "right" and "right" in record["performance"]["metrics"]
    gate = "gate: {min_rows: 20, metric: right}"
    policy = f"{{triggers: [age], max_age: 1d, valid_length: 3d, judge_length: 6d, maturity: 1d, {gate}}}"
    run = place.run("retrain", f"retrain={policy}")
    assert run.metrics["retrain/started"] == 1
    assert {"retrain/right_champion", "retrain/right_challenger"} <= run.metrics.keys()
    decision = json.loads((run.directory / "decision.json").read_text())
    assert "right" in json.dumps(decision) and decision["verdict"]


def reproduced(place: Place, trained: Run, tmp_path: Path) -> None:
    """By another clone of the engine with another store, which has to be told to trust the folder's code."""
    clone = tmp_path / "clone"
    for name in ("engine", "kernels", "conf"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = [
        "reproduce",
        str(trained.directory),
        "--code",
        "current",
        "--json",
        f"paths.store={tmp_path / 'elsewhere'}",
    ]
    done = place.shell(*words, clone=clone)
    if place.way == "folder":
        digest = Plugin("own.py", CODE.encode()).digest
        assert done.returncode == 1 and f"add trust={digest}" in done.stderr
        done = place.shell(*words, f"trust={digest}", clone=clone)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["first_difference"] is None and found["promise"] == "equal bits"


def edited(place: Place, trained: Run) -> None:
    """The changed code is the first link that differs, by name."""
    place.write(CODE.replace("/ 2 + value", "/ 3 + value"), "1.1")
    try:
        done = place.shell("train", *place.words("train.resume=never"))
        assert done.returncode == 0, done.stderr[-3000:]
        links = chain.compare_chains(trained.directory, Path(done.stdout.split()[-1]), "inputs", exact=True)
        assert chain.first_difference(links) == "plugins"
        detail = next(item["detail"] for item in links if item["link"] == "plugins")
        if place.way == "folder":
            assert detail == "own.py"
            return
        assert "shop-code==1.0" in detail
        again = place.shell("reproduce", str(trained.directory), "--code", "current", *overrides(place.folder)[2:4])
        assert again.returncode == 2 and "plugins" in again.stdout and "shop-code==1.0" in again.stdout
    finally:
        place.write(CODE, "1.0")


def tampered(place: Place, trained: Run, tmp_path: Path) -> None:
    """A bundle with another byte is refused by name."""
    brought = tmp_path / "brought" / trained.directory.name
    shutil.copytree(trained.directory, brought)
    file = brought / "model" / ("code/own.py" if place.way == "folder" else "spec.json")
    file.write_text(file.read_text().replace("/ 2 + value", "/ 3 + value").replace('"fading"', '"span"'))
    with pytest.raises(UserError, match=rf"{file.relative_to(brought / 'model')} is damaged"):
        engine.load(brought)
