"""A run directory: exclusive, complete, in order, without secrets, and never pretending to be done."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.config import compose
from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import digest, environment
from engine.runtime import git as git_door
from engine.runtime import run as runs
from engine.runtime.resume import unfinished
from engine.runtime.run import LINKS, Run, RunBusy, load_record, plan_digest

FROZEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(workplace: Path) -> None:
    """Every test starts in a folder of its own."""


def start(*words: str) -> Run:
    composed = compose.compose(words)
    line = ["engine", "train", *composed.overrides]
    return Run.create("train", composed.config, composed.saved, command_line=line, hidden=composed.secrets)


# ------------------------------------------------------------------------------------------------- F1, exclusive


def test_eight_runs_in_the_same_instant_get_eight_directories(monkeypatch) -> None:
    monkeypatch.setattr(runs, "_now", lambda: FROZEN)
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: start(), range(8)))
    names = {run.directory.name for run in opened}
    assert len(names) == 8 and all(name.startswith("20260102T030405-") for name in names)
    for run in opened:
        run.finish({"test/a": 1.0})
    assert all((run.directory / "DONE").exists() for run in opened)


def test_a_directory_that_is_taken_is_not_used_again(monkeypatch) -> None:
    monkeypatch.setattr(runs, "_now", lambda: FROZEN)
    names = iter(["aa", "aa", "aa", "bb"])
    monkeypatch.setattr(runs.random_names, "token_hex", lambda _: next(names))
    assert [start().directory.name[-2:] for _ in range(2)] == ["aa", "bb"]


def test_names_of_runs_in_one_second_sort_by_time(monkeypatch) -> None:
    """What is newest is told by the name, also for runs of a tenth of a second."""
    instants = iter(FROZEN.replace(microsecond=at) for at in (7, 16, 255, 256, 99_999, 700_000, 999_999) for _ in "ab")
    monkeypatch.setattr(runs, "_now", lambda: next(instants))
    names = []
    for _ in range(7):
        run = start()
        names.append(run.directory.name)
        run.finish({})
    assert names == sorted(names)


# ---------------------------------------------------------------------------------------------------- the record


def test_the_record_says_what_ran_on_what_and_when() -> None:
    run = start("train.seed=7", "cluster.workers=2")
    run.add_inputs({"flights.csv": "ab"})
    run.add_output("dataset", "cd")
    run.finish({"test/roc_auc": 0.75})
    record = load_record(run.directory)
    assert record["format"] == runs.FORMAT and record["command"] == "train" and record["name"] == "unnamed"
    assert record["command_line"] == ["engine", "train", "train.seed=7", "cluster.workers=2"]
    assert record["config"] == compose.compose(["train.seed=7", "cluster.workers=2"]).saved
    assert record["plan"] == plan_digest("train", compose.compose(["train.seed=7"]).config)
    assert set(record["code"]) == {"engine_version", "engine_digest", "engine_git", "user_git"}
    assert record["environment"]["packages"]["pyarrow"] and record["environment"]["hardware"]["cores"] >= 1
    assert set(record["environment"]["threads"]) == set(environment.THREAD_VARIABLES)
    assert record["inputs"] == {"flights.csv": "ab"} and record["outputs"] == {"dataset": "cd"}
    assert record["seeds"] == {"train": 7} and record["status"] == "done"
    started, ended = (datetime.datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    assert started.tzinfo is not None and 0 <= (ended - started).total_seconds() < 60 and record["seconds"] >= 0


def test_the_chain_is_kept_in_link_order_whatever_the_order_of_the_calls() -> None:
    run = start()
    for name in ("weights", "loss@100", "inputs", "loss@2", "order", "loss@10", "dataset"):
        run.link(name, "00")
    run.finish({"test/a": 1.0})
    chain = list(load_record(run.directory)["chain"])
    assert chain == ["inputs", "dataset", "order", "loss@2", "loss@10", "loss@100", "weights", "metrics"]
    assert [name.split("@")[0] for name in chain] == sorted(
        (name.split("@")[0] for name in chain), key=[link.rstrip("@") for link in LINKS].index
    )


def test_an_unknown_link_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        start().link("wieghts", "00")


def test_the_metrics_link_is_of_the_judged_metrics_only() -> None:
    def chain(**metrics: float) -> dict[str, str]:
        run = start("train.resume=never")
        run.finish({name.replace("__", "/"): value for name, value in metrics.items()})
        return dict(load_record(run.directory)["chain"])

    first = chain(test__auc=0.75, valid__auc=0.7, train__rows_per_second=100.0)
    assert first == chain(valid__auc=0.7, test__auc=0.75, train__rows_per_second=999.0)
    assert first != chain(test__auc=0.7500000001, valid__auc=0.7)
    assert chain(train__rows_per_second=1.0) == {}
    assert first["metrics"] == digest.of_json({"test/auc": 0.75, "valid/auc": 0.7})


def test_metrics_that_are_not_finite_are_null_and_lines_are_appended() -> None:
    run = start()
    run.log_metrics(1, {"loss": 0.5})
    run.log_metrics(2, {"loss": float("nan")})
    run.finish({"test/a": float("inf"), "test/b": 1})
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, None)] and lines[0]["time"] > 1e9
    assert json.loads((run.directory / "metrics.json").read_text()) == {"test/a": None, "test/b": 1.0}
    assert run.metrics == {"test/a": None, "test/b": 1.0}


def test_done_is_written_last(monkeypatch) -> None:
    run = start()
    monkeypatch.setattr(run, "save", lambda: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        run.finish({})
    assert not (run.directory / "DONE").exists()


def test_a_finished_run_has_no_lock_file_and_no_temporary_files() -> None:
    run = start()
    run.finish({"test/a": 1.0})
    names = {path.name for path in run.directory.iterdir()} - {"engine.patch", "user.patch"}
    assert names == {"run.json", "metrics.json", "run.log", "seal.json", "DONE"}


def test_the_plan_leaves_out_what_must_not_matter_and_nothing_else() -> None:
    def plan(*words: str) -> str:
        return plan_digest("train", compose.compose(words).config)

    immaterial = (
        "cluster=ray", "cluster.workers=4", "tracking=wandb", "paths.runs=elsewhere", "train.resume=never",
        "train.checkpoint_every=7", "score.unit_rows=9", "score.resume=never", "resources.threads=1",
        "train.log_every=1",
    )  # fmt: skip
    assert {plan(word) for word in immaterial} == {plan()}
    material = (
        "train.lr=0.5",
        "model=linear",
        "train.seed=1",
        "train.precision=fp32",
        "name=other",
        "score.mode=append",
    )
    assert len({plan(word) for word in material} | {plan()}) == len(material) + 1
    assert plan_digest("score", Config()) != plan_digest("train", Config())


# -------------------------------------------------------------------------------------------------------- resume


def test_unfinished_finds_the_newest_free_run_of_this_plan(monkeypatch) -> None:
    opened = []
    for second in (1, 3, 2):
        monkeypatch.setattr(runs, "_now", lambda second=second: FROZEN.replace(second=second))
        opened.append(start())
    config = Config()
    assert unfinished("train", config) is None  # all are being worked in
    for run in opened:
        run.fail(RuntimeError("killed"))
    assert unfinished("train", config) == opened[1].directory
    (opened[1].directory / "DONE").touch()
    assert unfinished("train", config) == opened[2].directory
    assert unfinished("score", config) is None
    assert unfinished("train", compose.compose(["train.lr=0.5"]).config) is None


def test_a_directory_without_a_record_is_not_resumed() -> None:
    (Path("runs/train/unnamed") / "20300101T000000-abcdef").mkdir(parents=True)
    assert unfinished("train", Config()) is None


def test_of_eight_that_resume_at_once_one_does() -> None:
    run = start()
    run.fail(RuntimeError("killed"))

    def resume(_: int) -> Run | None:
        try:
            return Run.resume(run.directory)
        except RunBusy:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = [one for one in pool.map(resume, range(8)) if one is not None]
    assert len(found) == 1 and found[0].resumed


def test_a_finished_run_is_not_resumed() -> None:
    run = start()
    run.finish({})
    with pytest.raises(UserError, match="nothing to resume"):
        Run.resume(run.directory)


def test_a_resumed_run_keeps_its_record_and_its_log() -> None:
    run = start()
    run.log("first words")
    run.link("inputs", "00")
    run.fail(KeyboardInterrupt(), "interrupted")
    again = Run.resume(run.directory, command_line=["engine", "train", "cluster.workers=2"])
    again.log("second words")
    again.finish({})
    record = load_record(run.directory)
    assert record["chain"] == {"inputs": "00"} and record["started"] == run.record["started"]
    assert record["resumes"][0]["command_line"] == ["engine", "train", "cluster.workers=2"]
    log = (run.directory / "run.log").read_text()
    assert log.index("first words") < log.index("interrupted") < log.index("second words")


# ------------------------------------------------------------------------------------------------- F3, secrets


def test_no_secret_reaches_the_run_directory_or_the_screen(monkeypatch, tmp_path, capfd) -> None:
    monkeypatch.setenv("ENGINE_TEST_LOGIN", 'from-the "environment"')
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    (conf / "own.yaml").write_text("# @package _global_\ntracking: {entity: '${oc.env:ENGINE_TEST_LOGIN}'}\n")
    url = "s3://user:pass-in-url@bucket/key"
    words = ["+experiment=own", f"+data.sources={{a:{{path:'{url}',columns:{{x:string}}}}}}"]
    composed = compose.compose(words, str(tmp_path / "conf"))
    assert composed.config.tracking.entity == 'from-the "environment"'
    run = Run.create("train", composed.config, composed.saved, command_line=[*words], hidden=composed.secrets)
    run.log(f"logging in as {composed.config.tracking.entity} at {url}")
    run.alarm(f"{composed.config.tracking.entity} is out")
    run.note(login=composed.config.tracking.entity)
    run.fail(RuntimeError(f"{composed.config.tracking.entity} was refused at {url}"))
    text = "".join(path.read_text() for path in run.directory.iterdir()) + "".join(capfd.readouterr())
    assert "***" in text and "logging in as" in text
    for secret in ("from-the", "environment\\", "pass-in-url"):
        assert secret not in text
    assert load_record(run.directory)["config"]["tracking"]["entity"] == "${oc.env:ENGINE_TEST_LOGIN}"


def test_a_secret_in_an_override_is_masked(tmp_path, capfd) -> None:
    word = "++data.sources={a:{path:x.csv,columns:{x:string},csv:{quote:q}}}"
    composed = compose.compose([word])
    run = Run.create("train", composed.config, composed.saved, command_line=["password=S3CR3T"], hidden=("S3CR3T",))
    run.finish({})
    assert "S3CR3T" not in "".join(path.read_text() for path in run.directory.iterdir())


# --------------------------------------------------------------------------------------------------- J3, paths


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "..", ".hidden", "a b", "a#b", "", "a\nb"])
def test_a_name_that_is_no_plain_folder_name_is_refused_before_anything_is_made(name: str) -> None:
    with pytest.raises(UserError, match="name must be"):
        config = Config(name=name)
        Run.create("train", config, {})
    assert not Path("runs").exists()


@pytest.mark.parametrize("part", ["../out", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_path_in_a_run_stays_in_it(part: str) -> None:
    with pytest.raises(UserError, match="must stay inside"):
        start().path(part)


def test_a_link_that_leads_out_is_refused(tmp_path) -> None:
    run = start()
    (run.directory / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="which leads to"):
        run.path("out", "file")
    assert run.path("model", "model.json") == run.directory / "model" / "model.json"


# --------------------------------------------------------------------------------------------------------- code


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_uncommitted_changes_of_the_users_tree_are_kept_beside_the_record(tmp_path, monkeypatch) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    git(tree, "init", "-q")
    (tree / "mine.yaml").write_text("lr: 1\n")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "first")
    monkeypatch.chdir(tree)
    clean = start("paths.runs=../runs", "paths.store=../store")
    assert not (clean.directory / "user.patch").exists()
    (tree / "mine.yaml").write_text("lr: 2\n")
    (tree / "new.yaml").write_text("new\n")
    run = start("paths.runs=../runs", "paths.store=../store", "train.resume=never")
    state = load_record(run.directory)["code"]["user_git"]
    assert state["dirty"] and state["untracked"] == ["new.yaml"] and len(state["commit"]) == 40
    git(tree, "checkout", "mine.yaml")
    git(tree, "apply", str((run.directory / "user.patch").resolve()))
    assert (tree / "mine.yaml").read_text() == "lr: 2\n"


def test_outside_of_git_there_is_no_state(tmp_path) -> None:
    assert environment.git_state(tmp_path) is None and git_door.patch(tmp_path) == ""


def test_the_engine_digest_is_of_the_files_that_make_up_the_engine(tmp_path) -> None:
    for name in ("engine", "kernels", "conf"):
        (tmp_path / name).mkdir()
    (tmp_path / "engine" / "a.py").write_text("1")
    (tmp_path / "conf" / "a.yaml").write_text("1")
    uncached = environment._files_digest.__wrapped__
    first = uncached(tmp_path)
    (tmp_path / "engine" / "notes.txt").write_text("no part of it")
    assert uncached(tmp_path) == first
    (tmp_path / "conf" / "a.yaml").write_text("2")
    assert uncached(tmp_path) != first


def test_thread_variables_are_set_once_and_follow_what_is_there(monkeypatch) -> None:
    for name in environment.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it in its workers
    environment.set_threads()
    assert {os.environ[name] for name in environment.THREAD_VARIABLES} == {"1"}
    environment.set_threads(4)
    assert {os.environ[name] for name in environment.THREAD_VARIABLES} == {"1"}


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch, before: str | None, after: str) -> None:
    for name in environment.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    environment.set_threads()
    assert os.environ["OMP_WAIT_POLICY"] == after
