"""The registry: one champion whatever happens, the exact artefact, a history that cannot be rewritten unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.__main__ import main
from engine.errors import UserError
from engine.runtime import digest, storage
from engine.runtime.registry import Moved, Registry, resolve, seal_of

FORK = multiprocessing.get_context("fork")


def bundle(folder: Path, content: str) -> Path:
    """A folder that looks like a model bundle."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    (folder / "gate").mkdir()
    (folder / "gate" / "rows").write_text("rows")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest.of_file(folder / name)}
        for name in ("weights", "gate/rows")
    }
    storage.write_json(folder / "bundle.json", {"format": 1, "digest": digest.of_json(content), "files": files})
    return folder


def register(registry: Registry, folder: Path, content: str) -> str:
    made = bundle(folder / content, content)
    return registry.register(
        made, seal_of(made), metric={"name": "roc_auc", "value": 0.7}, train_rows=1, source="x"
    ).digest


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "runs" / "registry", "shop")


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> list[str]:
    """Digests of three versions; the first is champion."""
    found = [register(registry, tmp_path / "models", content) for content in ("a", "b", "c")]
    registry.move("promote", found[0], expected=None, why="first")
    return found


def test_promotions_and_rollbacks_walk_the_champions(registry: Registry, three: list[str]) -> None:
    a, b, c = three
    registry.move("promote", b, expected=a, why="better")
    registry.move("promote", c, expected=b, why="better still")
    assert registry.state().champion == c
    registry.move("rollback", None, expected=c, why="an incident")
    assert registry.state().champion == b
    registry.move("rollback", None, expected=b, why="another")
    assert registry.state().champion == a
    with pytest.raises(UserError, match="no earlier champion"):
        registry.move("rollback", None, expected=a, why="too far")
    history = [(move["action"], move["from"], move["to"], move["why"]) for move in registry.state().moves]
    assert history[1:] == [
        ("promote", a, b, "better"),
        ("promote", b, c, "better still"),
        ("rollback", c, b, "an incident"),
        ("rollback", b, a, "another"),
    ]


def test_a_promoted_challenger_is_no_longer_challenger(registry: Registry, three: list[str]) -> None:
    registry.move("challenge", three[1], expected=three[0], why="trained")
    assert registry.state().challenger == three[1]
    registry.move("promote", three[1], expected=three[0], why="won")
    assert (registry.state().champion, registry.state().challenger) == (three[1], None)


def test_a_move_on_a_champion_that_has_changed_is_refused(registry: Registry, three: list[str]) -> None:
    a, b, c = three
    registry.move("promote", b, expected=a, why="first")
    with pytest.raises(Moved, match="another promotion came first"):
        registry.move("promote", c, expected=a, why="second")
    assert registry.state().champion == b
    assert len(registry.state().moves) == 2


def test_a_move_after_a_move_that_was_not_seen_is_refused(registry: Registry, three: list[str]) -> None:
    registry.move("note", None, expected=three[0], why="begin", after=1)
    with pytest.raises(Moved, match="found 2"):
        registry.move("note", None, expected=three[0], why="begin", after=1)


def _promote_at_once(root: str, to: str, expected: str, barrier: Any, results: Any) -> None:
    registry = Registry(Path(root), "shop")
    registry.state()
    barrier.wait(30)
    try:
        registry.move("promote", to, expected=expected, why="mine")
        results.put(to)
    except Moved:
        results.put(None)


def test_of_promotions_at_the_same_moment_exactly_one_wins(
    registry: Registry, three: list[str], tmp_path: Path
) -> None:
    others = [register(registry, tmp_path / "more", f"m{k}") for k in range(8)]
    barrier, results = FORK.Barrier(8), FORK.Queue()
    root = str(registry.directory.parent)
    processes = [FORK.Process(target=_promote_at_once, args=(root, to, three[0], barrier, results)) for to in others]
    for process in processes:
        process.start()
    won = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    winners = [to for to in won if to is not None]
    assert len(winners) == 1
    assert registry.state().champions == (three[0], winners[0])


def test_the_exclusive_file_alone_stops_a_second_mover(
    registry: Registry, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system ignores locks, the hard link still refuses."""
    import contextlib

    monkeypatch.setattr(Registry, "lock", lambda self: contextlib.nullcontext())
    stale = registry.state()
    registry.move("promote", three[1], expected=three[0], why="quick")
    monkeypatch.setattr(Registry, "state", lambda self: stale)
    with pytest.raises(Moved, match="at the same time"):
        registry.move("promote", three[2], expected=three[0], why="slow")


def _killed(root: str, models: str, victim: str, at: int) -> None:
    """Register and promote, killed before or after the `at`-th call of a function that changes the disk."""
    calls = 0
    module, name = (os, victim)
    real = getattr(module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(*arguments, **options)
        if calls == at - 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(module, name, counted)
    registry = Registry(Path(root), "shop")
    made = Path(models) / "b"
    version = registry.register(
        made, seal_of(made), metric={"name": "roc_auc", "value": None}, train_rows=1, source="x"
    )
    registry.move("promote", version.digest, expected=registry.state().champion, why="killed")


@pytest.mark.parametrize(
    ("victim", "at"),
    [
        ("rename", 1),
        ("rename", 101),
        ("replace", 1),
        ("replace", 101),
        ("link", 1),
        ("link", 101),
        ("fsync", 1),
        ("fsync", 4),
        ("fsync", 7),
    ],
)
def test_a_kill_at_any_write_leaves_one_champion_and_a_rerun_completes(tmp_path: Path, victim: str, at: int) -> None:
    registry = Registry(tmp_path / "registry", "shop")
    first = register(registry, tmp_path / "models", "a")
    registry.move("promote", first, expected=None, why="first")
    second = json.loads((bundle(tmp_path / "models" / "b", "b") / "bundle.json").read_text())["digest"]
    process = FORK.Process(target=_killed, args=(str(tmp_path / "registry"), str(tmp_path / "models"), victim, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    champion = registry.state().champion
    assert champion in (first, second)
    if (victim, at) != ("link", 101):
        assert champion == first
    registry.verify(registry.find("champion"))
    made = tmp_path / "models" / "b"
    version = registry.register(
        made, seal_of(made), metric={"name": "roc_auc", "value": None}, train_rows=1, source="x"
    )
    if champion == first:
        registry.move("promote", version.digest, expected=first, why="again")
    assert registry.state().champion == second
    assert not list((registry.directory / "versions").glob(".*"))


def test_an_artefact_that_was_replaced_after_it_was_judged_is_refused(
    registry: Registry, three: list[str], tmp_path: Path
) -> None:
    a, b, _ = three
    seal = seal_of(tmp_path / "models" / "b")
    forged = bundle(tmp_path / "forged", "b")
    (forged / "weights").write_text("evil")
    with pytest.raises(UserError, match="was replaced"):
        registry.register(forged, seal_of(forged), metric={"name": "roc_auc", "value": None}, train_rows=1, source="x")
    whole = bundle(tmp_path / "other", "other")
    with pytest.raises(UserError, match="not the manifest of the judged artefact"):
        registry.register(whole, seal, metric={"name": "roc_auc", "value": None}, train_rows=1, source="x")
    shutil.rmtree(registry.find(b).model)
    shutil.copytree(whole, registry.directory / "versions" / b / "model")
    with pytest.raises(UserError, match="replaced"):
        registry.move("promote", b, expected=a, why="judged before")
    assert registry.state().champion == a


def test_a_champion_whose_file_changed_does_not_serve(registry: Registry, three: list[str]) -> None:
    model = registry.find("champion").model
    (model / "weights").write_text("b")
    with pytest.raises(UserError, match="digest differs"):
        resolve("shop@champion", registry.directory.parent.parent)


def test_names_resolve_to_the_bundle_and_follow_moves(registry: Registry, three: list[str]) -> None:
    runs = registry.directory.parent.parent
    assert (resolve("shop@champion", runs) or Path()).joinpath("weights").read_text() == "a"
    registry.move("promote", three[1], expected=three[0], why="better")
    assert (resolve("shop@champion", runs) or Path()).joinpath("weights").read_text() == "b"
    registry.move("rollback", None, expected=three[1], why="worse")
    assert (resolve("shop@champion", runs) or Path()).joinpath("weights").read_text() == "a"
    assert (resolve(f"shop@{three[2][:8]}", runs) or Path()).joinpath("weights").read_text() == "c"
    assert resolve("runs/train/shop/x", runs) is None


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("shap@champion", "Did you mean 'shop'"),
        ("shop@challenger", "no challenger: .retrain. or .registry challenge. makes one"),
        ("shop@12", "exactly one version"),
        ("shop@chmpion", "champion"),
    ],
)
def test_a_wrong_reference_names_what_there_is(
    registry: Registry, three: list[str], reference: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(reference, registry.directory.parent.parent)


def test_a_rewritten_or_missing_move_is_noticed(registry: Registry, three: list[str]) -> None:
    registry.move("promote", three[1], expected=three[0], why="better")
    path = registry.directory / "moves" / "000001.json"
    honest = path.read_text()
    path.write_text(honest.replace('"first"', '"never mind"'))
    with pytest.raises(UserError, match="as it was written"):
        registry.state()
    path.unlink()
    with pytest.raises(UserError, match="found number 2 at place 1"):
        registry.state()
    path.write_text(honest)
    assert registry.state().champion == three[1]


@pytest.mark.parametrize("name", ["../shop", "a/b", "", ".hidden", "/etc"])
def test_a_name_cannot_leave_the_registry(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="model's name"):
        Registry(tmp_path, name)


@pytest.mark.parametrize("words", [["registry", "list"], ["retrain"], ["score", "score.model=shop@champion"]])
def test_an_object_store_is_refused_with_the_reason(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "paths.runs=s3://bucket/runs"]) == 1
    error = capsys.readouterr().err
    assert "paths.runs" in error and "s3://bucket/runs" in error
    assert "conditional put" in error and "obstore" in error
    assert list(tmp_path.iterdir()) == []  # nor is a folder made that is called s3:


@pytest.mark.parametrize("runs", ["s3://bucket/runs", Path("s3://bucket/runs")])
def test_from_python_an_object_store_is_refused_too(runs: str | Path) -> None:
    with pytest.raises(UserError, match="conditional put"):
        resolve("shop@champion", runs)
