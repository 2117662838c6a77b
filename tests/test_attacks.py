"""Attacks by files that came from elsewhere, against every command that reads them: nothing runs, is reached, or is written.

Rows are attacks, columns are commands. What a command reads is said in READS, for every command of the shell and for each
function of the API: a new command must be added. An attack would write the canary, reach the listener, show what lies
outside, or steer the terminal or a page. Each must end in a sentence, or be ignored.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import __main__ as shell
from engine import commands
from engine.errors import UserError
from engine.lifecycle import reproduce
from engine.runtime import seal
from engine.scoring.read import predictions
from engine.training import bundle
from tests.runtime.test_git import repository, trap
from tests.tiny import alter_delta_log, visits
from tests.whole import Place, make_place

EXPERIMENT = ("ingest", "validate", "features", "features list", "features show", "features latest", "features audit")
EXPERIMENT += ("train", "evaluate", "score", "monitor", "retrain", "backtest")
# Which foreign things a command reads: data (files of sources, tables), store (entries of a store that came along), bundle,
# run (a run directory), registry; and the words that make it read them. {run}, {other}, {scored}, {model} are filled in.
READS: dict[str, dict[str, str]] = {
    "ingest": {"data": ""},
    "validate": {"data": ""},
    "data show": {"store": "tiny"},
    "data gc": {"store": "", "run": ""},
    "features": {"data": "", "store": ""},
    "features list": {"store": "", "run": "", "bundle": ""},
    "features show": {"store": "shop", "run": "shop", "bundle": "shop"},
    "features diff": {"store": "shop {version} {version}"},
    "features gc": {"store": "", "run": ""},
    "features latest": {"data": "shop", "store": "shop"},
    "features audit": {"data": "--rows 5", "store": "--rows 5"},
    "train": {"data": "", "store": "", "bundle": "train.start_from={run}"},
    "evaluate": {"data": "evaluate.model={run}", "bundle": "evaluate.model={run}"},
    "score": {"data": "score.model={run}", "bundle": "score.model={run}", "registry": "score.model=tiny@champion"},
    "serve": {},  # reads by way of `score`, and never ends
    "skew": {},  # reads what `serve` has written, by way of `score`: tests/serving/test_serve.py
    "monitor": {
        "bundle": "monitor.model={run} monitor.run={scored}",
        "run": "monitor.model={run} monitor.run={scored}",
        "data": "monitor.model={run} monitor.window=2020-01",
    },
    "monitor --incidents": {"run": ""},
    "init": {"data": "{place}/visits.parquet --target bought --time at --out {place}/drafted"},
    "sweep": {},  # reads by way of `train`
    "submit": {},  # uploads the user's own folder: tests/runtime/test_submit.py
    "warmup": {},
    "reproduce": {"run": "{run}", "bundle": "{scored}"},
    "verify": {"run": "{place}", "bundle": "{place}", "store": "{place}", "registry": "{place}"},
    "compare": {"run": "{run} {other}", "bundle": "{run} {other}", "store": "{run} {other}"},
    "runs": {"run": "", "registry": ""},
    "ui": {"run": "", "registry": "", "store": "", "bundle": ""},
    "runs gc": {"run": "--older 1s", "registry": "--older 1s"},
    "runs rm": {"run": "{run}"},
    "lineage": {"run": "{run}", "bundle": "{run}/model", "store": "{entry}", "registry": "{run}"},
    "registry list": {"registry": ""},
    "registry show": {"registry": "tiny"},
    "registry promote": {"run": "tiny {other}", "bundle": "tiny {other}", "registry": "tiny {other}"},
    "registry challenge": {"run": "tiny {other}", "bundle": "tiny {other}", "registry": "tiny {other}"},
    "registry rollback": {"registry": "tiny"},
    "registry diff": {"registry": "tiny champion champion"},
    "retrain": {"run": "retrain.triggers=[drift] retrain.now=2020-01-31", "registry": "retrain.now=2020-01-31"},
    "backtest": {"data": "+backtest.policies.never={{}}", "store": "+backtest.policies.never={{}}"},
    "track sync": {"run": "{run}"},
    "engine.load": {"bundle": "", "run": ""},
    "predictions": {"run": ""},
}
API = {"engine.load", "predictions"}
STEERING = "[/red]\x1b]0;owned\x07\x1b[2J</script><script>alert(1)</script>${oc.env:HOME}"


def test_every_command_says_what_it_reads() -> None:
    assert set(READS) == {*commands.COMMANDS, *API}, "a new command says here what of others it reads"
    assert {kind for reads in READS.values() for kind in reads} == {attack.kind for attack in ATTACKS.values()}


@dataclass(frozen=True)
class Cell:
    """A copy of a whole place, what must not be touched beside it, and who must not be called."""

    place: Place
    canary: Path
    outside: Path
    url: str

    @property
    def run(self) -> Path:
        return self.place.newest("train")

    @property
    def scored(self) -> Path:
        return self.place.newest("score")

    @property
    def bomb(self) -> bytes:
        """A pickle that leaves the canary."""
        return pickle.dumps(Bomb(self.canary))

    def entry(self, pattern: str) -> Path:
        return next(self.place.folder.glob(pattern))

    def words(self, text: str) -> list[str]:
        known = {
            "run": self.run, "scored": self.scored, "place": self.place.folder,
            "other": self.run.with_name("20200101T000000-000000"),
            "entry": self.entry("store/datasets/tiny/*/manifest.json").parent,
            "version": self.entry("store/features/shop/*/manifest.json").parent.name,
        }  # fmt: skip
        return [word.format(**known) for word in text.split()]


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


@dataclass(frozen=True)
class Attack:
    """What is planted, and in which kind of thing."""

    kind: str
    plant: Callable[[Cell], None]


ATTACKS: dict[str, Attack] = {}


def attack(name: str, kind: str) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    def put(plant: Callable[[Cell], None]) -> Callable[[Cell], None]:
        ATTACKS[f"{kind}: {name}"] = Attack(kind, plant)
        return plant

    return put


# ------------------------------------------------------------------------------------------------------- in a run


def change_run(cell: Cell, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every run.json and seal it again, as an attacker would."""
    for path in cell.place.folder.glob("runs/*/*/*/run.json"):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
        reseal(path.parent)


def reseal(run: Path) -> None:
    (run / seal.NAME).unlink()
    seal.write(run, leave_out=("run.log", "model", "checkpoints", "parts"))


@attack("a commit that is an option of git", "run")
def _(cell: Cell) -> None:
    change_run(
        cell,
        lambda record: record["code"].update(
            engine_digest="f" * 64, engine_git={"root": ".", "commit": f"--output={cell.canary}", "dirty": False}
        ),
    )


@attack("a repository with programs, and a patch", "run")
def _(cell: Cell) -> None:
    root, _, commit = repository(cell.run / "repository")
    trap(root, cell.canary)
    cell.canary.unlink(missing_ok=True)  # setting the trap may spring it
    (cell.run / "engine.patch").write_text("--- a/x\n+++ b/../../../../canary\n@@ -0,0 +1 @@\n+x\n")
    state = {"root": str(root), "commit": commit, "dirty": True}
    change_run(cell, lambda record: record["code"].update(engine_digest="f" * 64, engine_git=state))


@attack("packages and a Python that are paths", "run")
def _(cell: Cell) -> None:
    environment = {"python": str(cell.canary), "packages": {"./evil": "1", "torch": "2 --index-url=" + cell.url}}
    change_run(cell, lambda record: record["environment"].update(environment))


@attack("paths that lead elsewhere", "run")
def _(cell: Cell) -> None:
    places = {"store": str(cell.outside), "runs": str(cell.outside / "runs")}
    change_run(cell, lambda record: (record["config"]["paths"].update(places), record.update(folder=str(cell.outside))))


@attack("names that climb", "run")
def _(cell: Cell) -> None:
    climb = "../../../outside"

    def change(record: dict[str, Any]) -> None:
        record["config"]["data"]["name"] = climb
        record.update(
            name=climb, views={climb: climb}, model=climb, parent=climb, history=climb, predictions={"output": climb}
        )

    change_run(cell, change)


@attack("places of object stores", "run")
def _(cell: Cell) -> None:
    there = {"path": "s3://evil/x", "endpoint": cell.url, "region": "us-east-1", "columns": {"visit": "int64"}}

    def change(record: dict[str, Any]) -> None:
        record["config"]["data"]["sources"]["visits"].update(there)
        record["predictions"] = {"output": "s3://evil/x", "endpoint": cell.url, "region": "us-east-1"}
        record["tracking"] = {"kind": "wandb", "project": "evil", "entity": "evil", "mode": "offline"}
        record["config"].setdefault("monitor", {})["alerts"] = {"x": {"kind": "command", "to": f"touch {cell.canary}"}}

    change_run(cell, change)


@attack("class names and references", "run")
def _(cell: Cell) -> None:
    evil = {"_target_": "os.system", "_args_": [f"touch {cell.canary}"], "x": "${oc.env:HOME}"}
    change_run(cell, lambda record: (record["config"].update(model=evil, _target_="os.system"), record.update(evil)))


@attack("text that steers", "run")
def _(cell: Cell) -> None:
    for name in ("metrics.json", "metrics.jsonl"):
        path = cell.run / name
        path.write_text(path.read_text().replace("test/", json.dumps(STEERING)[1:-1] + "/", 1))
    change_run(
        cell,
        lambda record: record.update(
            name=STEERING, status=STEERING, error=STEERING, device=STEERING, alarms=[STEERING]
        ),
    )


def linked(*names: str, kind: str) -> None:
    """Files that are links to what lies outside."""
    for name in names:

        @attack(f"{name} is a link that leads out", kind)
        def _(cell: Cell, name: str = name) -> None:
            for path in list(cell.place.folder.glob(LINKED[kind] + name)):
                path.unlink()
                path.symlink_to(cell.outside / "secret.json")


LINKED = {
    "run": "runs/*/*/*/",
    "bundle": "runs/*/*/*/model/",
    "store": "store/*/*/*/",
    "registry": "runs/registry/tiny/",
}
linked(
    "run.json",
    "metrics.json",
    "metrics.jsonl",
    "drift.json",
    "profile.json",
    "predictions/*.parquet",
    "report.html",
    kind="run",
)


# ---------------------------------------------------------------------------------------------------- in a bundle


def bundles(cell: Cell) -> Iterator[Path]:
    yield from cell.place.folder.glob("runs/train/*/*/model")


def change_bundle(cell: Cell, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    for model in bundles(cell):
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))
        bundle.seal(model)


@attack("places of object stores", "bundle")
def _(cell: Cell) -> None:
    there = {"path": "s3://evil/x", "endpoint": cell.url, "region": "us-east-1"}
    change_bundle(cell, "spec.json", lambda spec: spec["data"]["sources"]["visits"].update(there))


@attack("a table whose name climbs", "bundle")
def _(cell: Cell) -> None:
    table = {"query": "SELECT DISTINCT shop FROM visits", "static": True, "columns": {"shop": {"type": "string"}}}
    change_bundle(cell, "spec.json", lambda spec: spec["data"].update(tables={"../../../../outside/x": table}))


@attack("a name that climbs", "bundle")
def _(cell: Cell) -> None:
    change_bundle(
        cell,
        "spec.json",
        lambda spec: (spec.update(name="../../../outside"), spec["data"].update(name="../../../outside")),
    )


@attack("SQL that writes", "bundle")
def _(cell: Cell) -> None:
    table = {"query": f"COPY (SELECT 1) TO '{cell.canary}'", "static": True, "columns": {"shop": {"type": "string"}}}
    change_bundle(cell, "spec.json", lambda spec: spec["data"].update(tables={"x": table}))


for file in ("spec.json", "model.json", "features.json", "reference.json", "profile_spec.json", "gate/state.json"):

    @attack(f"class names in {file}", "bundle")
    def _(cell: Cell, file: str = file) -> None:
        evil = {"_target_": "os.system", "_args_": [f"touch {cell.canary}"], "function": "os:system"}
        change_bundle(
            cell,
            file,
            lambda content: content.update(evil, **{key: evil for key in list(content)[:1] if key != "format"}),
        )


@attack("pickles in the place of every file", "bundle")
def _(cell: Cell) -> None:
    for model in bundles(cell):
        for path in model.rglob("*"):
            if path.suffix in (".safetensors", ".parquet"):
                path.write_bytes(cell.bomb)
        bundle.seal(model)


@attack("a pickle in the metadata of Parquet", "bundle")
def _(cell: Cell) -> None:
    for model in bundles(cell):
        for path in model.rglob("*.parquet"):
            pq.write_table(with_pickle(pq.read_table(path, partitioning=None), cell.bomb), path)
        bundle.seal(model)


def with_pickle(table: pa.Table, payload: bytes) -> pa.Table:
    """The table with fields of the extension type that pyarrow once unpickled."""
    found = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    return table.cast(pa.schema([field.with_metadata(found) for field in table.schema], {b"pandas": payload}))


@attack("text that steers", "bundle")
def _(cell: Cell) -> None:
    change_bundle(cell, "spec.json", lambda spec: spec["data"].update(description=STEERING))
    change_bundle(cell, "features.json", lambda content: _steer(content))


def _steer(content: Any) -> None:
    """A category and an owner of a name that steers."""
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, list) and "shop-1" in value:
            value[value.index("shop-1")] = STEERING
        elif isinstance(value, (dict, list)):
            _steer(value)


@attack("files outside in the manifest", "bundle")
def _(cell: Cell) -> None:
    for model in bundles(cell):
        manifest = json.loads((model / bundle.MANIFEST).read_text())
        del manifest["check"]
        manifest["files"]["../../../../../../outside/secret.json"] = seal.record_of(cell.outside / "secret.json")
        (model / bundle.MANIFEST).write_text(json.dumps(seal.checked(manifest)))


linked("spec.json", "model.safetensors", "reference.parquet", "gate/rows.parquet", kind="bundle")


# ----------------------------------------------------------------------------------------------------- in a store


@attack("parts that lie elsewhere", "store")
def _(cell: Cell) -> None:
    for manifest in cell.place.folder.glob("store/*/*/*/manifest.json"):
        content = json.loads(manifest.read_text())
        for part in content["parts"]:
            part["file"] = "../../../../../outside/secret.parquet"
        manifest.write_text(json.dumps(content))
        (manifest.parent / seal.NAME).unlink()
        seal.write(manifest.parent)


@attack("a newest entry that lies elsewhere", "store")
def _(cell: Cell) -> None:
    path = cell.entry("store/datasets/tiny/latest.json")
    content = json.loads(path.read_text())
    del content["check"]
    path.write_text(json.dumps(seal.checked({**content, "entry": "../../../../outside"})))


@attack("pickles in the place of parts", "store")
def _(cell: Cell) -> None:
    for part in cell.place.folder.glob("store/*/*/*/*.parquet"):
        part.write_bytes(cell.bomb)
        (part.parent / seal.NAME).unlink()
        seal.write(part.parent)


linked("manifest.json", "part-*.parquet", "seal.json", kind="store")


# -------------------------------------------------------------------------------------------------- in a registry


@attack("a version that lies elsewhere", "registry")
def _(cell: Cell) -> None:
    path = cell.entry("runs/registry/tiny/moves/000001.json")
    move = json.loads(path.read_text())
    del move["check"]
    path.write_text(
        json.dumps(seal.checked({**move, "to": "../../../../../outside", "why": STEERING, "who": STEERING}))
    )


@attack("a source that lies elsewhere", "registry")
def _(cell: Cell) -> None:
    path = cell.entry("runs/registry/tiny/versions/*/version.json")
    facts = json.loads(path.read_text())
    del facts["check"]
    path.write_text(json.dumps(seal.checked({**facts, "source": str(cell.outside)})))


linked("moves/*.json", "versions/*/version.json", "versions/*/model/spec.json", kind="registry")


# ------------------------------------------------------------------------------------------------ in data and tables


def source(cell: Cell, **keys: str) -> None:
    """The experiment's source reads the table in `table`; nothing is stored yet."""
    path = cell.place.folder / "conf" / "data" / "tiny.yaml"
    lines = "".join(f"\n    {name}: {value}" for name, value in keys.items())
    path.write_text(path.read_text().replace("\n    path: visits*.parquet", lines))
    shutil.rmtree(cell.place.folder / "store")


def iceberg(cell: Cell) -> Path:
    pytest.importorskip("pyiceberg")
    pytest.importorskip("sqlalchemy")
    from pyiceberg.catalog.sql import SqlCatalog

    folder = cell.place.folder
    catalog = SqlCatalog("c", uri=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/house")
    catalog.create_namespace("n")
    rows = visits(600)
    table = catalog.create_table("n.visits", rows.schema)
    table.append(rows)
    catalog.close()
    found = Path(table.location().removeprefix("file://"))
    source(cell, path=str(found), format="iceberg")
    return found


@attack("classes, servers and catalogs in an Iceberg table", "data")
def _(cell: Cell) -> None:
    evil = {
        "py-io-impl": "evil.Access",
        "py-catalog-impl": "evil.Access",
        "s3.endpoint": cell.url,
        "uri": cell.url,
        "type": "rest",
    }
    for path in (iceberg(cell) / "metadata").glob("*.metadata.json"):
        content = json.loads(path.read_text())
        content["properties"] |= {**evil, "py-location-provider.impl": "evil.Access", "warehouse": "s3://evil/x"}
        path.write_text(json.dumps(content))


@attack("a link in an Iceberg table", "data")
def _(cell: Cell) -> None:
    part = next((iceberg(cell) / "data").glob("*.parquet"))
    part.unlink()
    part.symlink_to(cell.outside / "secret.parquet")


def delta(cell: Cell, alter: Callable[[dict[str, Any]], Any]) -> Path:
    deltalake = pytest.importorskip("deltalake")
    table = cell.place.folder / "table"
    deltalake.write_deltalake(str(table), visits(600))
    alter_delta_log(table, alter)
    source(cell, path="table", format="delta")
    return table


@attack("options in a Delta log", "data")
def _(cell: Cell) -> None:
    options = {"AWS_ENDPOINT_URL": cell.url, "endpoint": cell.url, "delta.logStore.class": "evil.Store"}
    delta(cell, lambda action: action["metaData"].update(configuration=options) if "metaData" in action else None)


@attack("a file elsewhere in a Delta log", "data")
def _(cell: Cell) -> None:
    delta(cell, lambda action: action["add"].update(path="../../outside/secret.parquet") if "add" in action else None)


@attack("a link in a Delta table", "data")
def _(cell: Cell) -> None:
    part = next(delta(cell, lambda _: None).glob("*.parquet"))
    part.unlink()
    part.symlink_to(cell.outside / "secret.parquet")


@attack("a pickle in the metadata of Parquet", "data")
def _(cell: Cell) -> None:
    pq.write_table(with_pickle(visits(600), cell.bomb), cell.place.folder / "visits.parquet")
    source(cell, path="visits*.parquet")


@attack("a pickle in the place of Parquet", "data")
def _(cell: Cell) -> None:
    (cell.place.folder / "visits.parquet").write_bytes(cell.bomb)
    source(cell, path="visits*.parquet")


@attack("text that steers in categories and in the name of a file", "data")
def _(cell: Cell) -> None:
    table = visits(600)
    shops = [STEERING if shop == "shop-1" else shop for shop in table["shop"].to_pylist()]
    table = table.set_column(table.column_names.index("shop"), "shop", pa.array(shops))
    (cell.place.folder / "visits.parquet").unlink()
    pq.write_table(table, cell.place.folder / "visits[-red]\x1b[2J<script>alert(1)<-script>.parquet")
    source(cell, path="visits*.parquet")


# ------------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("whole"))
    run = place.newest("train")
    shutil.copytree(run, run.with_name("20200101T000000-000000"))
    return place


@pytest.fixture
def cell(whole: Place, tmp_path: Path, caller: Any, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A copy of the whole place; credentials that a request would carry; a program that a class name would load."""
    shutil.copytree(whole.folder, tmp_path / "place")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"format": 1, "secret": "hunter2hunter2"}')
    pq.write_table(visits(600), outside / "secret.parquet")
    (tmp_path / "modules").mkdir()
    canary = tmp_path / "canary"
    (tmp_path / "modules" / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path / "place")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(reproduce, "_run", lambda *_: "stopped")  # trusted code is run again: not what is tried here
    return Cell(Place(tmp_path / "place"), canary, outside, caller[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(cell: Cell, command: str, words: list[str]) -> int:
    """Exit code of a command, or of a function of the API: 1 where it raises UserError."""
    if command not in API:
        if command in EXPERIMENT:
            return cell.place.engine(command, *words)
        return shell.main([*command.split(), *words, *([] if command == "verify" else cell.place.paths)])
    try:
        engine.load(cell.run) if command == "engine.load" else predictions(
            cell.scored, store=cell.place.folder / "store"
        )
    except UserError as error:
        shell._say(f"error: {error}")
        return 1
    return 0


COLUMNS = [(command, kind) for command, reads in READS.items() for kind in reads]
NEEDS = {"reproduce": "stopped", "registry rollback": "no earlier champion"}  # how far these come here


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind"), COLUMNS, ids=[f"{command} | {kind}" for command, kind in COLUMNS])
def test_without_an_attack_the_command_does_its_work(cell: Cell, capfd: Any, command: str, kind: str) -> None:
    code = start(cell, command, cell.words(READS[command][kind]))
    said = capfd.readouterr().err
    assert NEEDS[command] in said if command in NEEDS else code in (0, 2, 3), said


EVERY = int(
    os.environ.get("ENGINE_ATTACK_STRIDE", "9")
)  # the default suite tries one cell in nine, of every row and column
CELLS = [(name, command) for name, item in ATTACKS.items() for command, reads in READS.items() if item.kind in reads]


def cells() -> Iterator[Any]:
    for place, (name, command) in enumerate(CELLS):
        marks = [] if place % EVERY == 0 else [pytest.mark.slow]
        yield pytest.param(name, command, id=f"{name} | {command}", marks=marks)


@pytest.mark.parametrize(("name", "command"), list(cells()))
def test_a_foreign_file_runs_reaches_writes_and_shows_nothing(
    cell: Cell, caller: Any, capfd: Any, name: str, command: str
) -> None:
    words = cell.words(READS[command][ATTACKS[name].kind])
    ATTACKS[name].plant(cell)
    before, around = contents(cell.outside), sorted(cell.outside.parent.iterdir())
    capfd.readouterr()
    code = start(cell, command, words)
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert code in (0, 1, 2, 3) and "Traceback" not in text, text[-3000:]
    assert code != 1 or "error: " in shown.err
    assert not cell.canary.exists() and not caller[1]
    assert contents(cell.outside) == before and sorted(cell.outside.parent.iterdir()) == around
    assert "\x1b" not in text and "\x07" not in text and "hunter2" not in text
    for page in cell.place.folder.glob("runs/**/*.html"):
        assert page.is_symlink() or "<script>alert(1)" not in page.read_text(encoding="utf-8")
