"""A model of the user's own, in a file beside the experiment or in an installed package, goes through every command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch

import engine
from engine import __main__ as shell
from engine.config import plugins
from engine.config.compose import compose
from engine.config.plugins import Plugin
from engine.errors import UserError
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime.run import Run
from engine.scoring.read import predictions
from tests.tiny import overrides, visits, write_tiny

MODEL = '''import numpy as np
import torch
from torch import nn


class Steps(nn.Module):
    """Numbers as steps between quantiles of the training rows, an embedding a category, batch normalisation."""

    @staticmethod
    def fit(numeric, codes, target, settings):
        return {"edges": np.quantile(numeric, [0.25, 0.5, 0.75], axis=0).astype("f4")}

    def __init__(self, shape, fitted, width: int = 8, dropout: float = 0.1):
        super().__init__()
        self.register_buffer("edges", torch.from_numpy(fitted["edges"]))
        self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in shape["cardinalities"])
        inputs = 4 * shape["numeric"] + 4 * len(self.tables)
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        self.output = nn.Linear(width, shape["outputs"])

    def forward(self, numeric, codes):
        steps = (numeric[:, None] > self.edges).float().flatten(1)
        parts = [table(codes[:, k]) for k, table in enumerate(self.tables)]
        return self.output(self.body(torch.cat([numeric, steps, *parts], 1)))
'''
OWN = ("plugins=[models.py]", "model.kind=Steps", "model.settings={width: 6}")
FAST = ("train.epochs=1", "evaluate.bootstrap=0", "features.windows=off", "train.audit_every=2")
TEST = "score.between=[2020-01-26,2020-01-31]"


class Shop(NamedTuple):
    """A workplace with a model of its own, and a run that trained it."""

    folder: Path
    trained: Run

    def run(self, command: str, *more: str) -> Run:
        words = overrides(self.folder, *OWN, *FAST, *more)
        return engine.run(command, *words, config_dir=str(self.folder / "conf"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = write_tiny(tmp_path_factory.mktemp("models"), 600)
    (folder / "conf" / "models.py").write_text(MODEL)
    return Shop(folder, Shop(folder, None).run("train"))  # type: ignore[arg-type]


def test_the_bundle_holds_the_code_what_it_learned_and_its_buffers(shop: Shop) -> None:
    model = shop.trained.directory / "model"
    digest = Plugin("models.py", MODEL.encode()).digest
    assert (model / "code" / "models.py").read_text() == MODEL
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    assert {"fitted:edges", "edges", "body.1.running_mean", "body.1.num_batches_tracked", "output.weight"} <= set(
        tensors
    )
    assert shop.trained.record["config"]["model"]["kind"] == f"Steps@{digest}"
    assert shop.trained.metrics["train/audits"] == 1


def test_score_monitor_and_predict_run_the_model(shop: Shop) -> None:
    words = overrides(shop.folder)[1:]
    scored = engine.run("score", f"score.model={shop.trained.directory}", TEST, *words)
    window = "monitor.window=[2020-01-26,2020-01-31]"
    assert engine.run("monitor", f"monitor.model={shop.trained.directory}", window, *words).metrics
    rows = visits(600).filter(pa.compute.is_in(visits(600)["visit"].cast(pa.string()), predictions(scored)["row_id"]))
    again = engine.load(shop.trained).predict(rows).sort_by("row_id")
    assert again["score"].equals(predictions(scored).sort_by("row_id")["score"])
    assert len(set(again["score"].to_pylist())) > 20


def test_threads_come_to_the_same_model(shop: Shop) -> None:
    other = shop.run("train", "cluster.threads=2", "train.resume=never", "paths.runs=" + str(shop.folder / "other"))
    assert other.record["outputs"] == shop.trained.record["outputs"]
    assert other.record["chain"] == shop.trained.record["chain"]


def test_the_model_from_elsewhere_needs_trust_before_its_code_runs(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_HELD", {})
    run = tmp_path / "brought" / shop.trained.directory.name
    shutil.copytree(shop.trained.directory, run)
    place = (f"data.path={shop.folder}", f"paths.store={tmp_path / 'store'}", f"paths.runs={tmp_path / 'runs'}")
    digest = Plugin("models.py", MODEL.encode()).digest
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"models.py, digest {digest}\n.*add trust={digest}"):
        engine.run("score", f"score.model={run}", TEST, *place)
    with pytest.raises(UserError, match="code must have run with the store"):
        engine.load(run)
    assert not plugins.held()
    assert engine.load(run, trust=digest).predict(visits(50)).num_rows == 50
    assert engine.run("score", f"score.model={run}", TEST, *place, f"trust={digest}").metrics["score/gate_rows"] > 0
    code = run / "model" / "code" / "models.py"
    code.write_text(MODEL.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(UserError, match=r"code/models.py is damaged"):
        engine.run("score", f"score.model={run}", TEST, *place, f"trust={digest}")


def test_what_is_wrong_in_a_config_is_said_at_once(shop: Shop) -> None:
    conf = str(shop.folder / "conf")
    with pytest.raises(UserError, match=r"model.kind must be one of auto, mlp, .* found 'Stepz'. Did you mean 'Steps'"):
        compose(overrides(shop.folder, *OWN, "model.kind=Stepz"), conf)
    with pytest.raises(UserError, match=r"model.settings.widht is no setting of Steps. Did you mean 'width'"):
        shop.run("train", "model.settings={widht: 6}")


def test_other_code_is_the_first_difference_of_two_runs(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop.folder / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "models.py").write_text(MODEL.replace("nn.ReLU()", "nn.GELU()"))
    other = engine.run("train", *overrides(shop.folder, *OWN, *FAST), config_dir=str(tmp_path / "conf"))
    assert shell.main(["compare", str(shop.trained.directory), str(other.directory), "--json"]) == 0
    assert "models.py@" in capsys.readouterr().out
    assert other.record["chain"]["features"] == shop.trained.record["chain"]["features"]
    assert other.record["chain"]["weights"] != shop.trained.record["chain"]["weights"]


@pytest.mark.slow
def test_a_run_reproduces_with_the_code_that_it_had(shop: Shop) -> None:
    (shop.folder / "conf" / "models.py").write_text("class Steps: ...\n")  # edited since
    try:
        found = reproduce_run(shop.trained.directory, Options(code="current", store=shop.folder / "store"))
    finally:
        (shop.folder / "conf" / "models.py").write_text(MODEL)
    assert found["first_difference"] is None and found["promise"] == "equal bits"


@pytest.mark.slow
def test_a_challenger_of_other_code_is_judged_against_the_champion(shop: Shop, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, 600)
    (folder / "conf" / "models.py").write_text(MODEL)
    here = Shop(folder, shop.trained)
    periods = ('split.train=["2020-01-01","2020-01-12"]', 'split.valid=["2020-01-12","2020-01-15"]', "split.test=[]")
    champion = here.run("train", *periods)
    assert shell.main(["registry", "promote", "tiny", str(champion.directory), *overrides(folder)[2:4]]) == 0
    here.run("monitor", "monitor.model=tiny@champion", 'monitor.window=["2020-01-20","2020-01-25"]')
    (folder / "conf" / "models.py").write_text(MODEL.replace("nn.ReLU()", "nn.GELU()"))
    policy = "{triggers: [age], max_age: 1d, valid_length: 3d, judge_length: 6d, maturity: 1d, gate: {min_rows: 20}}"
    run = here.run("retrain", f"retrain={policy}")
    challenger = Run.read(run.record["challenger_run"])
    kinds = [item["config"]["model"]["kind"] for item in (champion.record, challenger)]
    assert kinds[0] != kinds[1] and run.metrics["retrain/started"] == 1
    assert {"retrain/roc_auc_champion", "retrain/roc_auc_challenger"} <= run.metrics.keys()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_workers_train_and_score_with_code_that_they_do_not_have(shop: Shop, tmp_path: Path) -> None:
    ray = ("cluster=ray", "cluster.workers=2")
    spread = shop.run("train", *ray, f"paths.runs={tmp_path / 'runs'}")
    assert spread.record["outputs"] == shop.trained.record["outputs"]
    words = (f"score.model={shop.trained.directory}", "score.between=[2020-01-01,2020-01-31]", "score.unit_rows=1024")
    scored = [engine.run("score", *overrides(shop.folder)[1:], *words, *more) for more in (ray, ())]
    assert predictions(scored[0]).equals(predictions(scored[1]))


def test_a_package_offers_a_model_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip install` leaves it: a module and its metadata on the path."""
    site = tmp_path / "site"
    metadata = site / "my_models-1.2.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "my_models.py").write_text(MODEL)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.2.0\n")
    (metadata / "entry_points.txt").write_text("[engine.models]\nsteps = my_models:Steps\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    plugins.installed.cache_clear()
    try:
        folder = write_tiny(tmp_path / "shop", 300)
        words = (*overrides(folder, *FAST), "model.kind=steps", "model.settings={width: 6}")
        run = engine.run("train", *words, config_dir=str(folder / "conf"))
        bundle = engine.load(run).bundle
        assert bundle.model["architecture"]["package"] == "my-models==1.2.0" and not bundle.code
        scores = engine.load(run).predict(visits(50))["score"].to_numpy()
        assert np.isfinite(scores).all() and len(scores) == 50
        with pytest.raises(UserError, match=r"found 'stepss'. Did you mean 'steps'"):
            compose([*words, "model.kind=stepss"], str(folder / "conf"))
    finally:
        plugins.installed.cache_clear()
        sys.modules.pop("my_models", None)
