"""Steps, rows and pauses of a run, by hand."""

from __future__ import annotations

import functools

import pytest

from engine.training.cpu_stepper import CpuStepper
from engine.training.schedule import Schedule
from engine.training.stepper import StepsTaken
from tests.training.conftest import weights_of


def test_rows_of_the_steps_add_up_to_the_rows_before_a_step_and_to_all_epochs(config):
    schedule = Schedule.of(150, config(train__epochs=3).train)
    assert schedule.steps == 9 and [schedule.positions(step) for step in range(4)] == [
        (0, 64),
        (64, 128),
        (128, 150),
        (0, 64),
    ]
    for step in range(10):
        assert schedule.rows_before(step) == sum(stop - start for start, stop in map(schedule.positions, range(step)))
    assert schedule.rows_before(9) == 450


def test_a_pause_follows_the_first_step_and_each_that_is_logged_saved_or_ends_an_epoch(config):
    schedule = Schedule.of(64 * 10, config(train__log_every=4, train__checkpoint_every=7).train)
    pauses = [schedule.next_pause(step) for step in range(20)]
    assert sorted(set(pauses)) == [1, 4, 7, 8, 10, 12, 14, 16, 20]
    assert all(pause > step for step, pause in enumerate(pauses))


class InChunks:
    """The CPU stepper with all steps up to the next pause in one call: what a trainer sees of a GPU."""

    def __init__(self, sizes, job):
        self._inner, self._job, self._sizes = CpuStepper(job), job, sizes
        self.weights, self.optimizer, self.identity = self._inner.weights, self._inner.optimizer, {}
        self.logits, self.finish = self._inner.logits, self._inner.finish

    def run(self, step):
        taken = [self._inner.run(at) for at in range(step, self._job.schedule.next_pause(step))]
        self._sizes.append(len(taken))
        figures = [one.figures[0] for one in taken]
        seconds = (sum(one[part] for one in taken) for part in (1, 2, 3))
        return StepsTaken(figures, *seconds, stop=any(one.stop for one in taken))


@pytest.mark.parametrize(
    "keys", [{}, {"train__checkpoint_every": 3}, {"train__epochs": 30, "train__patience": 2, "train__lr": 0.1}]
)
def test_the_trainer_accounts_alike_for_steps_that_come_one_by_one_and_in_chunks(problem, config, fitted, keys):
    data, valid, sizes = problem(430), problem(100, seed=1), []
    settings = config(train__log_every=5, **keys)
    one, run = fitted(settings, data, valid)
    many, again = fitted(settings, data, valid, make_stepper=functools.partial(InChunks, sizes))
    assert sizes[:2] == [1, 2 if "train__checkpoint_every" in keys else 4] and sum(sizes) == one.steps == many.steps
    assert weights_of(one.model) == weights_of(many.model)
    assert one.history == many.history and run.record["chain"] == again.record["chain"]
