"""Secrets are references: what they stand for is in no file that a command leaves, nor in what a tracker is sent."""

from __future__ import annotations

import json

import pytest

from engine.config.compose import compose
from engine.data.dataset import open_dataset
from engine.errors import UserError
from engine.training.bundle import read_bundle, spec_of
from tests.runtime.fake_wandb import serving
from tests.tiny import overrides, write_tiny

# Put together here: a run keeps the patch of an uncommitted tree, this file included.
TOKEN, PASSWORD = "-".join(("hunter2", "of", "the", "environment")), "-".join(("s3cr3t", "of", "a", "service"))
SECRETS = (
    'data.description="visits of ${oc.env:A_TOKEN}"',
    '+data.sources.visits.endpoint="http://user:${oc.env:A_PASSWORD}@127.0.0.1:1"',
    'features.views.shop.owner="team of ${oc.env:A_TOKEN}"',
    "monitor.alerts.hook.kind=webhook",
    'monitor.alerts.hook.to="http://127.0.0.1:1/${oc.env:A_TOKEN}"',
    "registry.why=${oc.env:A_PASSWORD}",
)


def test_training_scoring_and_monitoring_write_and_send_no_secret(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("A_TOKEN", TOKEN)
    monkeypatch.setenv("A_PASSWORD", PASSWORD)
    write_tiny(workplace, rows=600)
    words = overrides(workplace, "--config-dir", str(workplace / "conf"), "train.epochs=1", "evaluate.bootstrap=0")
    with serving() as fake:
        for name, value in (("API_KEY", "0" * 40), ("BASE_URL", fake.url)):
            monkeypatch.setenv(f"WANDB_{name}", value)
        trained = cli("train", *words, *SECRETS, "tracking=wandb", "tracking.mode=offline")
        assert trained.code == 0, trained.err
        model = trained.directory
        scored = cli("score", *words, *SECRETS, f"score.model={model}")
        assert scored.code == 0, scored.err
        watched = cli("monitor", *words, *SECRETS, f"monitor.model={model}", f"monitor.run={scored.directory}")
        assert watched.code in (0, 2), watched.err
        assert cli("track", "sync", str(model), "tracking.mode=online").code == 0
        sent = fake.everything()
    assert b"wandb-history" in sent
    said = "".join(outcome.out + outcome.err for outcome in (trained, scored, watched))
    for secret in (TOKEN, PASSWORD):
        assert secret.encode() not in sent and secret not in said
        for folder in ("runs", "store"):
            for path in (workplace / folder).rglob("*"):
                assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    monkeypatch.setenv(
        "A_TOKEN", "another"
    )  # what is hidden in the bundle is no difference, and is taken from the config
    assert cli("score", *words, *SECRETS, f"score.model={model}").code == 0


def test_a_bundle_that_hides_where_its_data_lie_asks_for_the_experiment(cli, workplace, monkeypatch) -> None:
    monkeypatch.setenv("A_PASSWORD", PASSWORD)
    write_tiny(workplace, rows=600)
    words = overrides(workplace, "--config-dir", str(workplace / "conf"), "train.epochs=1", "evaluate.bootstrap=0")
    bundle = read_bundle(cli("train", *words, SECRETS[1]).directory / "model")
    assert json.loads((bundle.directory / "spec.json").read_text())["data"]["sources"]["visits"]["endpoint"] == "***"
    dataset = open_dataset(next((workplace / "store" / "datasets" / "tiny").glob("*/manifest.json")).parent)
    assert PASSWORD not in json.dumps(dataset.manifest)
    with pytest.raises(UserError, match=r"data\.sources\.visits lies, because that held a secret"):
        spec_of(bundle, compose(()).config)
    asked = compose(words[:1] + words[1:2] + [SECRETS[1]], str(workplace / "conf")).config
    assert spec_of(bundle, asked)[0].sources["visits"].endpoint == f"http://user:{PASSWORD}@127.0.0.1:1"
