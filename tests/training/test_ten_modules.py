"""Ten unmodified modules come to one SHA-256 each: on 1 and 2 threads, on 1, 2 and 4 Ray workers, after ten kills; fp32 and bf16.

Takes some minutes: the workers of each number train all of them in turn, and killed processes are forked from one that has
imported torch.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.runtime.on_ray import cluster
from engine.training.checkpoint import newest_whole
from engine.training.distributed import Payload, payload_of, read_outcome, train_worker
from engine.training.precision import has_bf16
from tests.training.conftest import CARDINALITIES, make_problem, open_run
from tests.training.test_distributed import WARNINGS, head, importable  # noqa: F401  (fixtures)
from tests.training.test_modules import KILLED, arrays, digest, fitted_on, killed, settled

pytestmark = [pytest.mark.slow, pytest.mark.ray, *WARNINGS]
TEN = ["Net", "TabM", "Ple", "FtTransformer", "Sequence", "Sequence behind", "Lstm", "Normed", "Odd", "Frozen"]
WORKERS = (1, 2, 4)
KILLS = 10
CASES = [(name, precision) for precision in (("fp32", "bf16") if has_bf16() else ("fp32",)) for name in TEN]
Case = tuple[str, str]


def data():
    """(training, validation): three steps an epoch, the last of fewer rows."""
    return make_problem(93), make_problem(40, seed=1)


def train_in_turn(payloads: list[Payload]) -> None:
    """The function of every worker."""
    for payload in payloads:
        train_worker(payload)


@pytest.fixture(scope="module")
def on_workers(head: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[Case, Path]]]:  # noqa: F811
    """The run directories of the trainings by number of workers and case."""
    found: dict[int, dict[Case, Path]] = {}
    for workers in WORKERS:
        folder = tmp_path_factory.mktemp(f"workers-{workers}")
        for name, part in zip(("train", "valid"), data(), strict=True):
            part.save(folder / name)
        found[workers], payloads = {}, []
        for case in CASES:
            config = settled(
                folder, case[0], **KILLED, cluster__kind="ray", cluster__workers=workers, cluster__address=head
            )
            run = open_run(config)
            facts = {"cardinalities": CARDINALITIES, "outputs": [1], "dataset_digest": "data", "precision": case[1]}
            learned = arrays(config, data()[0])
            payloads.append(payload_of(folder / "train", folder / "valid", config, run, facts, fitted=learned))
            found[workers][case] = run.directory
        with cluster.session(config):
            cluster.run_training(config, run.directory, train_in_turn, payloads, lambda: None)
    yield found


def after_kills(folder: Path, name: str, precision: str) -> object:
    """The result of a training whose process was killed after each of the first steps."""
    folder.mkdir()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.training.test_modules"])
    for step in range(1, KILLS + 1):
        process = forks.Process(target=killed, args=(str(folder), name, precision, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (run,) = folder.glob("runs/train/test/*")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.move(run / "checkpoints", folder / "checkpoints")
        shutil.rmtree(run)
    config = settled(folder, name, **KILLED)
    again = open_run(config)
    shutil.copytree(folder / "checkpoints", again.directory / "checkpoints")
    result, _ = fitted_on(config, *data(), again, precision=precision)
    assert result.metrics["resumed_from_step"] == KILLS
    return result


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_one_digest_for_threads_workers_and_ten_kills(on_workers, tmp_path: Path, name: str, precision: str) -> None:
    config = settled(tmp_path / "one", name, **KILLED)
    whole, run = fitted_on(config, *data(), precision=precision)
    assert whole.steps == 12
    two, _ = fitted_on(settled(tmp_path / "two", name, **KILLED, cluster__threads=2), *data(), precision=precision)
    rest = after_kills(tmp_path / "killed", name, precision)
    for result in (two, rest):
        assert digest(result.model) == digest(whole.model) and result.history == whole.history
    mine, _ = newest_whole(run.directory / "checkpoints")
    for workers in WORKERS:
        directory = on_workers[workers][name, precision]
        outcome, (theirs, _) = read_outcome(directory), newest_whole(directory / "checkpoints")
        assert outcome["history"] == whole.history, workers
        assert theirs.step == mine.step == 12
        assert theirs.tensors.keys() == mine.tensors.keys()
        for key, tensor in mine.tensors.items():
            assert theirs.tensors[key].numpy().tobytes() == tensor.numpy().tobytes(), (workers, key)
