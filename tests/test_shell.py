"""The shell: exit codes, one message per mistake, resume, sweeps, help. Steps without data stand in for real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import engine
from engine import api, commands
from engine.__main__ import headline
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import git
from engine.runtime.run import Run, RunBusy

ROOT = Path(__file__).resolve().parents[1]


def measured(config: Config, run: Run) -> dict[str, float]:
    """A step that succeeds."""
    run.link("inputs", "00")
    metrics = {
        "test/roc_auc": 0.75,
        "test/roc_auc_low": 0.7,
        "test/roc_auc_high": 0.8,
        "test/month/5": 0.7,
        "train/rows": 9.0,
    }
    return metrics | {"valid/lr": config.train.lr}


def mistaken(config: Config, run: Run) -> dict[str, float]:
    raise UserError("the file must exist, found nothing")


def broken(config: Config, run: Run) -> dict[str, float]:
    raise ZeroDivisionError("by zero")


# --------------------------------------------------------------------------------------------------- exit code 0


def test_the_last_line_is_the_run_directory_and_before_it_stand_the_test_metrics(cli, step) -> None:
    step(measured)
    outcome = cli("train", "train.lr=0.5")
    assert outcome.code == 0
    assert (outcome.directory / "DONE").exists()
    assert outcome.directory.parts[:3] == ("runs", "train", "unnamed")
    assert outcome.out.splitlines()[:-1] == ["test/roc_auc  0.75  [0.7, 0.8]"]
    assert json.loads((outcome.directory / "metrics.json").read_text())["valid/lr"] == 0.5


def test_without_test_metrics_all_are_shown() -> None:
    assert headline({"rows": 1.0}) == {"rows": 1.0}
    assert headline({"rows": 1.0, "test/a": 2.0, "test/slice/a": 3.0}) == {"test/a": 2.0}


def test_version_and_help(cli) -> None:
    assert cli("--version").out == f"engine {engine.__version__}\n"
    text = cli("--help").out
    text = " ".join(text.split())
    for name, command in commands.COMMANDS.items():
        assert f"{name} {command.help}" in text


def test_no_command_is_an_error_that_shows_the_help(cli) -> None:
    outcome = cli()
    assert outcome.code == 1 and "commands:" in outcome.err and not outcome.out


def test_help_of_a_command_shows_its_groups_and_keys_and_no_others(cli) -> None:
    text = cli("train", "--help").out
    assert "cluster=" in text and "local | ray" in text and "+experiment=" in text
    assert "train.lr" in text and "peak learning rate" in text and "float, default 0.001" in text
    assert "score.between" not in text and "score.between" in cli("score", "--help").out


def test_cfg_job_prints_the_resolved_config_and_makes_nothing(cli, workplace) -> None:
    outcome = cli("train", "--cfg", "job", "train.lr=0.25")
    assert outcome.code == 0 and "  lr: 0.25\n" in outcome.out
    assert not list(workplace.iterdir())


def test_multirun_runs_every_combination_one_after_the_other(cli, step) -> None:
    seen: list[tuple[int, float]] = []

    def note(config: Config, run: Run) -> dict[str, float]:
        seen.append((config.train.seed, config.train.lr))
        return {}

    step(note)
    outcome = cli("train", "--multirun", "train.seed=0,1", "train.lr=0.1,0.2")
    assert outcome.code == 0
    assert seen == [(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)]
    assert len(set(outcome.out.splitlines())) == 4


def test_a_bad_value_stops_a_multirun_before_it_starts(cli, step, workplace) -> None:
    step(measured)
    outcome = cli("train", "--multirun", "train.lr=0.1,-1")
    assert outcome.code == 1 and "train.lr must be greater than 0" in outcome.err
    assert not list(workplace.iterdir())


def test_config_dir_adds_the_users_own_choices(cli, step, workplace) -> None:
    (workplace / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nname: mine\ntrain: {epochs: 3}\n"
    (workplace / "mine" / "experiment" / "own.yaml").write_text(text)
    step(measured)
    outcome = cli("train", "--config-dir", "mine", "+experiment=own")
    assert outcome.code == 0 and outcome.directory.parent.name == "mine"
    line = next(text for text in cli("train", "--help", "--config-dir=mine").out.splitlines() if "+experiment=" in text)
    assert {"flights", "own"} <= set(line.replace("|", " ").split())


# --------------------------------------------------------------------------------------------------- exit code 1

MISTAKES = {
    "unknown key": (["trian.lr=1"], ["'trian.lr'", "'train.lr'"]),
    "unknown key with plus": (["+trian.lr=1"], ["'trian'", "'train'"]),
    "unknown key in a section": (["+train.lrr=1"], ["'train.lrr'", "'train.lr'"]),
    "unknown group": (["+experimnet=flights"], ["'experimnet'", "'experiment'"]),
    "unknown choice": (["+experiment=flihgts"], ["'flihgts'", "'flights'"]),
    "group without plus": (["experiment=flights"], ["+experiment="]),
    "group with plus": (["+model=linear"], ["model=CHOICE"]),
    "out of bounds": (["train.lr=-1"], ["train.lr must be greater than 0, found -1"]),
    "not a number is out of bounds": (["train.lr=nan"], ["train.lr must be a finite number, found nan"]),
    "wrong type": (
        ["train.epochs=many"],
        ["train.epochs: must be a whole number of at least 1, or auto, found 'many'"],
    ),
    "fraction for a whole number": (["train.log_every=1.5"], ["train.log_every must be a whole number, found 1.5"]),
    "unknown value": (["train.loss=binry"], ["train.loss", "'binry'", "'binary'"]),
    "cross-field": (["train.batch_size=4", "train.shards=8"], ["batch_size must be at least shards=8, found 4"]),
    "several values": (["train.lr=1,2"], ["--multirun"]),
    "no value": (["train.lr"], ["key=value", "'train.lr'"]),
    "no key": (["=1"], ["'=1'"]),
    "Hydra's own keys": (["hydra.run.dir=/tmp/x"], ["hydra.run.dir"]),
    "unknown option": (["--nosuch"], ["--nosuch"]),
    "cfg of what": (["--cfg", "all"], ["--cfg", "job"]),
    "config-dir that is not there": (["--config-dir", "nowhere"], ["nowhere"]),
    "name that leaves the folder": (["name=../../x"], ["name", "../../x"]),
    "run to resume that is not there": (["train.resume=runs/train/x/y"], ["train.resume", "runs/train/x/y"]),
    "circle": (["name='${tracking.project}'", "tracking.project='${name}'"], ["cycle"]),
    "unset variable": (["name='${oc.env:ENGINE_TEST_UNSET}'"], ["name", "ENGINE_TEST_UNSET"]),
}


@pytest.mark.parametrize("words, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_message_and_leaves_nothing(words, named, cli, step, workplace) -> None:
    step(measured)
    outcome = cli("train", *words)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for part in named:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(workplace.iterdir())


def test_an_unknown_command_names_the_nearest(cli) -> None:
    outcome = cli("trian")
    assert outcome == (1, "", "error: unknown command 'trian'. Did you mean 'train'?\n")


def test_an_unknown_second_word_of_a_command_names_the_nearest(cli) -> None:
    outcome = cli("features", "lits", "+experiment=flights")
    assert outcome == (1, "", "error: unknown command 'features lits'. Did you mean 'features list'?\n")


def test_an_override_in_the_place_of_the_command(cli) -> None:
    assert "a command must come first" in cli("train.lr=1").err


def test_the_program_itself_exits_with_one_on_a_mistake(process) -> None:
    outcome = process("train", "trian.lr=1")
    assert outcome == (1, "", "error: unknown config key 'trian.lr'. Did you mean 'train.lr'?\n")
    assert process("--nosuch").code == 1  # where argparse would say 2, which here means alarm


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error_to_speak_of(words, unbuffered, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "engine", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_takes_less_than_half_a_second(process) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        assert process("--help").code == 0
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_a_users_mistake_in_a_step_is_recorded_and_does_not_pretend(cli, step) -> None:
    step(mistaken)
    outcome = cli("train")
    assert outcome == (1, "", "error: the file must exist, found nothing\n")
    (directory,) = Path("runs/train/unnamed").iterdir()
    record = Run.read(directory)
    assert record["status"] == "failed" and record["error"].endswith("the file must exist, found nothing")
    assert not (directory / "DONE").exists() and not (directory / "metrics.json").exists()
    assert "Traceback" not in (directory / "run.log").read_text()


def test_an_unexpected_error_leaves_its_traceback_in_the_log(cli, step) -> None:
    step(broken)
    outcome = cli("train")
    (directory,) = Path("runs/train/unnamed").iterdir()
    assert outcome.code == 1 and outcome.out == ""
    assert "ZeroDivisionError: by zero" in outcome.err and str(directory) in outcome.err
    assert "Traceback" not in outcome.err
    assert "Traceback" in (directory / "run.log").read_text()


# ------------------------------------------------------------------------------------------------- exit code 2, 130


def test_an_alarm_is_exit_code_two_and_a_finished_run(cli, step) -> None:
    def alarm(config: Config, run: Run) -> dict[str, float]:
        run.alarm("psi of distance is 0.4")
        return {"psi": 0.4}

    step(alarm)
    outcome = cli("train")
    assert outcome.code == 2 and "ALARM: psi of distance" in outcome.err
    assert (outcome.directory / "DONE").exists()
    assert Run.read(outcome.directory)["alarms"] == ["psi of distance is 0.4"]


@pytest.mark.parametrize(("alarm", "code"), [(False, 3), (True, 2)])
def test_what_cannot_be_judged_is_exit_code_three_unless_something_else_alarms(cli, step, alarm, code) -> None:
    def blind(config: Config, run: Run) -> dict[str, float]:
        run.cannot_judge("performance: all rows have the same target")
        if alarm:
            run.alarm("psi of distance is 0.4")
        return {}

    step(blind)
    outcome = cli("train")
    assert outcome.code == code and "CANNOT BE JUDGED: performance" in outcome.err
    assert Run.read(outcome.directory)["unjudged"] == ["performance: all rows have the same target"]


PROGRAM = """
import sys, types, time, dataclasses
from pathlib import Path
from engine import commands
from engine.__main__ import main

def wait(config, run):
    run.log(f"resumed={run.resumed}")
    if run.resumed:
        return {"test/steps": 10.0, "resumed_from_step": 4.0}
    Path("ready").touch()
    time.sleep(60)

module = types.ModuleType("waiting"); module.wait = wait; sys.modules["waiting"] = module
commands.COMMANDS["train"] = dataclasses.replace(commands.COMMANDS["train"], target="waiting:wait", check="")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def waiting(workplace: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a program whose step waits until it is stopped; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "train"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(program)
        deadline = time.monotonic() + 30
        while not Path("ready").exists():
            assert time.monotonic() < deadline and program.poll() is None, program.communicate()
            time.sleep(0.02)
        return program

    yield start
    for program in started:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_with_130_and_resumes_in_its_own_directory(number, waiting, cli) -> None:
    program = waiting()
    program.send_signal(number)
    out, err = program.communicate(timeout=20)
    (directory,) = Path("runs/train/unnamed").iterdir()
    assert program.returncode == 130 and out == ""
    assert "interrupted" in err and str(directory) in err and "Traceback" not in err
    assert Run.read(directory)["status"] == "interrupted" and not (directory / "DONE").exists()
    _resume_and_check(directory)


def test_a_killed_run_is_resumed_too(waiting) -> None:
    program = waiting()
    program.kill()
    program.wait()
    (directory,) = Path("runs/train/unnamed").iterdir()
    _resume_and_check(directory)


def _resume_and_check(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str(directory)
    record = Run.read(directory)
    assert record["status"] == "done" and len(record["resumes"]) == 1 and "error" not in record
    assert json.loads((directory / "metrics.json").read_text())["resumed_from_step"] == 4


def test_a_run_that_is_at_work_is_left_alone_by_the_same_command(waiting, cli, step) -> None:
    program = waiting()
    step(measured)
    outcome = cli("train")
    assert outcome.code == 0 and program.poll() is None
    assert len(list(Path("runs/train/unnamed").iterdir())) == 2
    (busy,) = (one for one in Path("runs/train/unnamed").iterdir() if one != outcome.directory)
    with pytest.raises(RunBusy, match="in use by another process"):
        Run.resume(busy)


# ---------------------------------------------------------------------------------------------------------- resume


def test_resume_never_starts_anew_and_another_plan_is_another_run(cli, step) -> None:
    step(broken)
    cli("train")
    step(measured)
    assert Run.read(cli("train", "train.resume=never").directory).get("resumes") is None
    assert Run.read(cli("train", "train.lr=0.5").directory).get("resumes") is None
    resumed = cli("train", "cluster.workers=2", "train.checkpoint_every=5")  # neither belongs to the plan
    assert len(Run.read(resumed.directory)["resumes"]) == 1
    assert Run.read(cli("train").directory).get("resumes") is None  # nothing is left to resume
    assert len(list(Path("runs/train/unnamed").iterdir())) == 4


def test_workers_that_a_local_command_does_not_start_are_told(cli, step) -> None:
    step(measured)
    told = "warning: cluster.workers=4 needs cluster=ray"
    assert told in cli("train", "cluster.workers=4").err
    assert told not in cli("train", "cluster.workers=4", "cluster=ray").err + cli("train").err


def test_resuming_a_named_run_checks_that_it_is_the_same_plan(cli, step) -> None:
    step(broken)
    cli("train")
    (directory,) = Path("runs/train/unnamed").iterdir()
    step(measured)
    outcome = cli("train", "train.lr=0.5", f"train.resume={directory}")
    assert outcome.code == 1 and "these keys differ: train.lr" in outcome.err
    assert cli("train", f"train.resume={directory}").directory == directory
    outcome = cli("train", f"train.resume={directory}")
    assert outcome.code == 1 and "finished" in outcome.err


def test_a_changed_engine_is_said_on_resume(cli, step) -> None:
    step(broken)
    cli("train")
    (directory,) = Path("runs/train/unnamed").iterdir()
    record = json.loads((directory / "run.json").read_text())
    record["code"]["engine_digest"] = "0" * 64
    (directory / "run.json").write_text(json.dumps(record))
    step(measured)
    assert "the engine has changed" in cli("train").err


# ------------------------------------------------------------------------------------------------------------- API


def test_the_api_does_what_the_shell_does(workplace, step) -> None:
    step(measured)
    run = engine.run("train", "train.lr=0.5")
    assert run.metrics["valid/lr"] == 0.5 and (run.directory / "DONE").exists()
    assert run.record["command_line"] == ["engine.run", "train", "train.lr=0.5"]
    with pytest.raises(UserError, match="unknown command"):
        engine.run("trian")
    with pytest.raises(UserError, match=r"train\.lr"):
        engine.run("train", "trian.lr=1")


def test_the_api_raises_what_went_wrong_with_the_run_directory_as_a_note(workplace, step) -> None:
    step(broken)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.run("train")
    assert caught.value.__notes__[0].startswith("run directory: runs/train/unnamed/")


def test_a_missing_package_leaves_no_run_behind(workplace, step, monkeypatch) -> None:
    monkeypatch.setitem(commands.COMMANDS, "train", commands.Command("engine.no_such_room:train", ""))
    with pytest.raises(ModuleNotFoundError):
        api.run("train")
    assert not list(workplace.iterdir())


# ----------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def tiny_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 64 KiB; uncommitted work in this tree, of whatever size, is kept off it."""
    monkeypatch.setattr(git, "patch", lambda root: "")
    folder = workplace / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_at_the_start_is_one_message_and_leaves_nothing(tiny_disk, cli, step) -> None:
    step(measured)
    filler = tiny_disk / "filler"
    try:
        filler.write_bytes(b"x" * 65536)
    except OSError:
        pass
    outcome = cli("train", f"paths.runs={tiny_disk}/runs")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "is full; free some space" in outcome.err and str(tiny_disk) in outcome.err
    assert not list(tiny_disk.glob("runs/train/unnamed/*"))


def test_a_disk_that_fills_during_the_run_is_one_message_and_the_run_is_not_done(tiny_disk, cli, step) -> None:
    def fill(config: Config, run: Run) -> dict[str, float]:
        for number in range(100_000):
            run.log_metrics(number, {"loss": 0.5})
        return {}

    step(fill)
    outcome = cli("train", f"paths.runs={tiny_disk}/runs")
    assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome.err
    assert "is full; free some space" in outcome.err
    (directory,) = tiny_disk.glob("runs/train/unnamed/*")
    assert not (directory / "DONE").exists()
    assert json.loads((directory / "run.json").read_text())["status"] in ("failed", "running")
    assert not list(directory.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------- Makefile


def test_make_help_lists_the_targets() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("train", "test", "test-all", "lint", "bench", "help"):
        assert f"make {target} " in text


def test_installing_brings_the_packages_and_every_config_file(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    script = textwrap.dedent("""
        import setuptools, json, sys
        from setuptools.command.build_py import build_py
        build_py.run = lambda self: None  # ours alone is looked at: it adds the choices
        found = {}
        setuptools.setup = lambda **options: found.update(options)
        exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
        command = found["cmdclass"]["build_py"](setuptools.Distribution(found))
        command.build_lib = sys.argv[1]
        command.run()
        print(json.dumps([found["packages"], found["entry_points"], found["version"]]))
    """)
    assert setuptools
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    packages, entry_points, version = json.loads(done.stdout.splitlines()[-1])
    choices = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("conf/**/*.yaml")}
    assert {
        path.relative_to(tmp_path / "engine").as_posix() for path in tmp_path.glob("engine/conf/**/*.yaml")
    } == choices
    modules = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("engine/**/*.py")}
    assert modules | {"kernels"} <= set(packages) and not any(name.split(".")[0] == "conf" for name in packages)
    assert entry_points == {"console_scripts": ["engine=engine.__main__:main"]} and version == engine.__version__


@pytest.mark.parametrize("place", ["/dev/null/runs", "/proc/nosuch"])
def test_a_place_where_no_folder_can_be_made_is_one_message(cli, step, place) -> None:
    step(measured)
    outcome = cli("train", f"paths.runs={place}")
    assert (
        outcome.code == 1 and "must be a folder that can be created" in outcome.err and "Traceback" not in outcome.err
    )


def test_multirun_of_a_command_that_is_no_step_is_refused(cli) -> None:
    outcome = cli("runs", "--multirun", "train.lr=0.1,0.2")
    assert outcome.code == 1 and "'runs' is not a step" in outcome.err


def test_a_run_whose_tracker_cannot_start_is_recorded_as_failed(cli, step, workplace, monkeypatch) -> None:
    step(measured)
    monkeypatch.setattr("engine.api.tracking.start", lambda *_: (_ for _ in ()).throw(OSError("no tracker")))
    assert cli("train").code == 1
    (record,) = (workplace / "runs").rglob("run.json")
    assert json.loads(record.read_text())["status"] == "failed"


def test_an_unknown_key_is_compared_with_its_own_section(cli) -> None:
    assert "Did you mean 'train.epochs'?" in cli("train", "train.epoch=1").err
    far = cli("train", "train.nosuch=1").err
    assert "Did you mean" not in far and "batch_size" in far
