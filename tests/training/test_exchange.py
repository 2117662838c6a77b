"""Any number of workers gives the bits of one: workers are threads here, with a barrier for a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.training.checkpoint import candidates
from engine.training.exchange import STATS_FLOATS, STREAM, Alone, add_up, folds_locally, owned
from engine.training.loop import Trainer, fit
from engine.training.threads import Team
from tests.training.conftest import weights_of


class Network:
    """Shared state of a group of threads."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.slots: list = [None] * world


class Member:
    """One thread's exchange."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank, self.world = network, rank, len(network.slots)

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        self.network.slots[self.rank] = block.clone()
        self.network.barrier.wait()
        out = torch.stack(list(self.network.slots))
        self.network.barrier.wait()
        return out

    def sum(self, block: torch.Tensor) -> torch.Tensor:
        return block.copy_(self.gather(block).sum(dim=0))  # in place, as torch.distributed has it

    def first(self, values: Sequence[float]) -> list[float]:
        return self.gather(torch.tensor(list(values), dtype=torch.float64))[0].tolist()


def together(world: int, work: Callable) -> list:
    """work(exchange) on `world` threads; the results, or the errors, in rank order."""
    network, results = Network(world), [None] * world

    def call(rank: int) -> None:
        try:
            results[rank] = work(Member(network, rank))
        except (UserError, ValueError, AssertionError, KeyboardInterrupt) as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.parametrize("shards", [1, 2, 6, 8, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_tree_gives_the_same_bits_for_any_number_of_workers(shards, world):
    rng = np.random.default_rng(shards)
    rows = rng.normal(size=(shards, 40 + STATS_FLOATS)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (shards, 1))
    rows = rows.astype(np.float32)
    statistics = rows[:, 40:].view(np.float64)
    statistics[:] = rng.normal(size=statistics.shape)
    statistics[:, STREAM : STREAM + 1].view(np.uint64)[:] = rng.integers(0, 2**64, (shards, 1), dtype=np.uint64)
    with Team(1) as team:
        gradient, sums = add_up(torch.from_numpy(rows.copy()), shards, Alone(), team)
        expected = gradient.numpy().tobytes(), sums.tobytes()

    def work(exchange):
        mine = owned(shards, exchange.rank, exchange.world)
        block = np.zeros((-(-shards // exchange.world), rows.shape[1]), np.float32)
        block[: len(mine)] = rows[mine]
        with Team(1) as team:
            gradient, sums = add_up(torch.from_numpy(block), shards, exchange, team)
        return gradient.numpy().tobytes(), sums.tobytes()

    assert together(world, work) == [expected] * world


def test_the_lower_levels_stay_inside_a_worker_only_where_the_tree_allows():
    assert [folds_locally(8, world) for world in (1, 2, 3, 4, 8)] == [True, True, False, True, True]
    assert folds_locally(12, 3) and not folds_locally(12, 4) and folds_locally(12, 6)


def fit_together(world: int, config, run, data, valid=None, **keys) -> list:
    settings = {"outputs": [1], "dataset_digest": "data", "precision": "fp32", "cardinalities": [7, 5], **keys}
    return together(world, lambda exchange: fit(data, valid, config, run, exchange=exchange, **settings))


@pytest.mark.parametrize("keys", [{}, {"train__sampling": "balanced"}, {"train__order": "windowed"}])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_weights_and_row_stream_of_any_number_of_workers_are_those_of_one(
    problem, config, fitted, new_run, world, keys
):
    settings = config(train__window_rows=100, **keys)
    data, valid = problem(500), problem(2500, seed=1)
    alone, _ = fitted(settings, data, valid)
    for result in fit_together(world, settings, new_run(settings), data, valid):
        assert weights_of(result.model) == weights_of(alone.model)
        for ours, theirs in zip(result.history, alone.history, strict=True):
            assert ours == theirs


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_stop_seen_by_one_worker_stops_all_after_the_same_step(
    problem, config, new_run, monkeypatch, rank, reduction
):
    """Rank 2 of 3 owns none of the two shards."""
    settings = config(train__shards=2, train__reduction=reduction)
    run = new_run(settings)
    seen: dict[int, int] = {}
    account = Trainer._account

    def counted(trainer, taken, progress):
        account(trainer, taken, progress)
        trainer.job.stop.requested = lambda: trainer.exchange.rank == rank and trainer.state.step >= 3
        seen[trainer.exchange.rank] = trainer.state.step

    monkeypatch.setattr(Trainer, "_account", counted)
    results = fit_together(3, settings, run, problem(500))
    assert all(isinstance(result, KeyboardInterrupt) for result in results)
    assert seen == {0: 4, 1: 4, 2: 4}
    assert [int(path.name[-4:]) for path in candidates(run.directory / "checkpoints")] == [4]


def test_nine_rows_on_two_workers_take_equal_steps_and_use_each_row_once(problem, config, fitted, new_run):
    """Field report C1: batch 1 gives 5 and 4 rows a worker elsewhere; here a step has one batch for all workers."""
    settings = config(train__batch_size=1, train__shards=1)
    alone, _ = fitted(settings, problem(9))
    results = fit_together(2, settings, new_run(settings), problem(9))
    assert [result.steps for result in results] == [18, 18]
    assert {weights_of(result.model) for result in results} == {weights_of(alone.model)}
    assert [entry["rows"] for entry in results[0].history] == [9, 9]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_covers_ten_rows_once_for_any_number_of_workers(problem, config, fitted, new_run, world):
    """Field report C3: the stock sampler draws 12 rows for 3 ranks."""
    data, valid = problem(100), problem(10, seed=1)
    alone, _ = fitted(config(), data, valid)
    for result in fit_together(world, config(), new_run(config()), data, valid):
        assert result.history == alone.history


@pytest.mark.parametrize("kind", ["mixed", "all positive"])
def test_three_rows_on_four_workers_train(problem, config, fitted, new_run, kind):
    """Field report C2: workers without rows take part with empty shards."""
    data = problem(3)
    if kind == "all positive":
        data.target[:] = 1
    settings = config(train__class_weight="balanced")
    alone, _ = fitted(settings, data, data)
    results = fit_together(4, settings, new_run(settings), data, data)
    assert {weights_of(result.model) for result in results} == {weights_of(alone.model)}
    assert [entry["rows"] for entry in results[3].history] == [3, 3]
    assert all(np.isfinite(entry["train_loss"]) for entry in results[0].history)


def test_a_bad_loss_on_one_worker_is_skipped_by_all(problem, config, new_run):
    """Field report C7: NaN in one row, seen by one worker only."""
    data = problem(300)
    data.numeric[120, 0] = np.nan
    settings = config(train__on_bad_loss="skip")
    run = new_run(settings)
    results = fit_together(2, settings, run, data)
    assert [result.metrics["train/steps_skipped"] for result in results] == [2, 2]
    assert len({weights_of(result.model) for result in results}) == 1
    assert all(torch.isfinite(parameter).all() for result in results for parameter in result.model.parameters())
    log = (run.directory / "run.log").read_text()
    assert f"dataset rows [{data.rows[120]}]" in log and "rank " in log


def test_a_bad_loss_on_one_worker_stops_all_and_names_the_rank(problem, config, new_run):
    data = problem(300)
    data.numeric[120, 0] = np.inf
    errors = fit_together(2, config(), new_run(config()), data)
    assert all(isinstance(error, UserError) for error in errors)
    assert str(errors[0]) == str(errors[1]) and f"dataset rows [{data.rows[120]}]" in str(errors[0])


@pytest.mark.parametrize(("world", "shards"), [(2, 8), (3, 2)])
def test_plain_all_reduce_trains_about_the_same(problem, config, fitted, new_run, world, shards):
    """A worker without shards must not add the last step's gradient again."""
    data = problem(500)
    settings = config(train__reduction="ddp", train__shards=shards)
    alone, _ = fitted(config(train__shards=shards), data)
    results = fit_together(world, settings, new_run(settings), data)
    for ours, theirs in zip(results[0].model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert weights_of(results[0].model) == weights_of(results[1].model)
