"""What goes through Ray and what comes out of it, without starting it: no secret in, the dashboard's metrics out."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import schema
from engine.config.compose import compose
from engine.config.plugins import Plugin
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime.on_ray import cluster, submit
from engine.runtime.run import Run
from engine.training import distributed
from engine.training.examples import Examples
from engine.training.loop import fit
from tests.training.conftest import packed

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
SECRET = "-".join(("hunter2", "of", "the", "environment"))  # put together: a run keeps the patch of a changed tree
WORDS = (
    "tracking.entity=${oc.env:A_TOKEN}",
    'data.description="visits of ${oc.env:A_TOKEN}"',
    "+data.sources.visits={path: x.csv, endpoint: 'http://me:${oc.env:A_TOKEN}@h', columns: {a: {type: string}}}",
    "monitor.alerts.hook.kind=webhook",
    'monitor.alerts.hook.to="http://127.0.0.1:1/${oc.env:A_TOKEN}"',
)


class Stopped(BaseException):
    """Far enough; no error that anybody handles."""


@pytest.fixture
def small() -> Examples:
    """64 rows of two numbers."""
    rng = np.random.default_rng(0)
    return packed(rng.normal(size=(64, 2)), np.zeros((64, 0)), rng.integers(0, 2, 64))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with a secret of the environment in several places."""
    monkeypatch.setenv("A_TOKEN", SECRET)
    composed = compose([*WORDS, "cluster=ray", "cluster.workers=2", f"paths.runs={tmp_path / 'runs'}"])
    assert SECRET in json.dumps(schema.plain(composed.config)) and composed.secrets
    return composed.config


def test_no_secret_goes_into_ray_init_or_to_the_workers(small, config, tmp_path, monkeypatch):
    sent: list[Any] = []

    def init(**keys: Any) -> None:
        sent.append(keys)
        raise Stopped

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Stopped), cluster.session(config):
        pass
    assert sent and "runtime_env" not in sent[0]
    monkeypatch.setattr(cluster, "session", lambda _: contextlib.nullcontext(cluster.Session("", True, ["one"])))
    monkeypatch.setattr(cluster, "run_training", lambda *arguments: sent.append(arguments[3]))
    small.save(tmp_path / "train")
    run = Run.create("train", config, {})
    with pytest.raises(UserError, match="ended without a record"):
        distributed.fit_on_cluster(
            tmp_path / "train", None, config, run, cardinalities=[], outputs=[1], dataset_digest="d", precision="fp32"
        )
    run.finish({})
    assert len(sent) == 2 and schema.build(Config, sent[1]["config"]).train == config.train
    texts = json.dumps(sent, default=lambda item: item.code.decode() if isinstance(item, Plugin) else repr(vars(item)))
    assert SECRET not in texts


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out\nduring startup."), OSError(28, "No space left")]
)
def test_a_local_cluster_that_does_not_start_is_an_error_with_its_cause_and_logs(config, tmp_path, monkeypatch, error):
    logs = tmp_path / "tmp" / "ray" / f"session_2026-01-02_03-04-05_000006_{os.getpid()}" / "logs"

    def init(**_: Any) -> None:
        logs.mkdir(parents=True)
        raise error

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError) as raised, cluster.session(config):
        pass
    said = str(raised.value)
    assert f"{type(error).__name__}: {' '.join(str(error).split())}" in said
    assert f"logs are in {logs}." in said and "cluster=local" in said


def test_no_secret_goes_with_a_submitted_job(config, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "conf.yaml").write_text("token: ${oc.env:A_TOKEN}\n")
    monkeypatch.chdir(tmp_path / "work")
    sent: list[Any] = []

    class Client:
        def submit_job(self, **job: Any) -> str:
            sent.append(job)
            raise Stopped

    monkeypatch.setattr(submit, "_connect", lambda _: (Client(), "http://h:1"))
    monkeypatch.setattr(submit, "cluster_versions", lambda _: {})
    monkeypatch.setattr(submit, "check_nodes", lambda *_, **__: {})  # its job carries no word of the user's
    with pytest.raises(Stopped):
        submit.submit(config, ["train", *WORDS])
    assert set(sent[0]["runtime_env"]["env_vars"]) == {submit.SOURCE_VARIABLE}
    assert SECRET not in json.dumps(sent) and "oc.env:A_TOKEN" in sent[0]["entrypoint"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_the_grafana_dashboard_shows_metrics_that_a_training_exports(small, tmp_path, monkeypatch):
    exported: set[str] = set()

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert tag_keys == ("run",)
            exported.add(f"ray_{name}")

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert np.isfinite(value) and set(tags) == {"run"}

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    settings = schema.build(
        Config,
        {
            "paths": {"runs": str(tmp_path)},
            "model": {"hidden": (4,)},
            "train": {"batch_size": 32, "epochs": 1, "log_every": 1},
        },
    )
    run = Run.create("train", settings, {})
    worker = distributed.WorkerRun(run.directory, {**run.record}, 0)
    fit(small, None, settings, worker, cardinalities=[], outputs=[1], dataset_digest="d", precision="fp32")
    run.finish({})
    dashboard = json.loads((ROOT / "conf" / "grafana" / "training.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"\w+(?=\{)", query)}
    named = {variable["query"] for variable in dashboard["templating"]["list"]}
    assert len(queries) >= 6 and shown <= exported, shown - exported
    assert {
        "ray_engine_train_" + name for name in ("rows_per_second", "loss", "step_seconds", "step_input_seconds")
    } <= shown
    assert named == {"prometheus", "label_values(ray_engine_train_loss, run)"}
    assert all('{run=~"$run"}' in query for query in queries)
