"""How often workers meet to agree on an end."""

import contextlib

import numpy as np
import pytest

from tf_regtopk.callbacks import sigterm
from tf_regtopk.distribute import collectives
from tf_regtopk.distribute import strategy as strategy_lib


class Workers:
    """Two workers in one thread, each with a clock of its own.

    Args:
        seconds: For each worker the time that one of its steps takes.
    """

    def __init__(self, seconds, monkeypatch):
        self.seconds, self.now, self.current = seconds, [0.0, 0.0], 0
        self.rows, self.num_gathered = {}, 0
        monkeypatch.setattr(
            strategy_lib, "worker_number", lambda _: (self.current, 2)
        )
        monkeypatch.setattr(collectives, "gather_from_workers", self.gather)
        monkeypatch.setattr(
            sigterm.time, "monotonic", lambda: self.now[self.current]
        )
        self.checks = [sigterm.Checks(None) for _ in seconds]

    def gather(self, row, _):
        self.rows[self.current] = row
        if len(self.rows) < len(self.seconds):
            raise InterruptedError
        return np.array([*self.rows.values()])

    def step(self, asked=(), num_steps=1):
        """Returns whether the workers have met, and their common answer."""
        self.rows, answers = {}, {}
        for i, seconds in enumerate(self.seconds):
            self.now[i] += seconds * num_steps
        for i in (0, 1, 0):  # The first waits for the second.
            self.current = i
            checks = self.checks[i]
            before = checks._num_steps
            if i in answers:
                continue
            try:
                answers[i] = checks.after_steps(num_steps, i in asked)
            except InterruptedError:
                checks._num_steps = before
        assert len(set(answers.values())) == 1
        return bool(self.rows), answers[0]

    def end_epoch(self):
        """The workers meet, however many steps there were."""
        self.rows = {}
        for i in (0, 1, 0):
            self.current = i
            with contextlib.suppress(InterruptedError):
                self.checks[i].now(False)
        assert len(self.rows) == 2


def meetings(workers, count):
    """The steps after which the workers have met."""
    return [step for step in range(1, count + 1) if workers.step()[0]]


def test_about_once_a_second(monkeypatch):
    """By the slower worker, and not at once."""
    workers = Workers([0.01, 0.02], monkeypatch)
    assert meetings(workers, 120) == [1, 11, 61, 111]


def test_slow_steps(monkeypatch):
    workers = Workers([3.0, 0.1], monkeypatch)
    assert meetings(workers, 4) == [1, 2, 3, 4]


def test_fast_steps_after_a_slow_one(monkeypatch):
    workers = Workers([20.0, 20.0], monkeypatch)
    assert workers.step() == (True, False)
    workers.seconds = [0.0001] * 2
    assert meetings(workers, 1200) == [1, 11, 111, 1111]


def test_an_answer_is_common(monkeypatch):
    workers = Workers([0.05, 0.05], monkeypatch)
    assert workers.step() == (True, False)
    for _ in range(9):
        assert workers.step(asked=[1]) == (False, False)
    assert workers.step(asked=[1]) == (True, True)


def test_one_worker_does_not_wait(mirrored, monkeypatch):
    def fail(*_):
        raise AssertionError("One worker has nobody to meet.")

    monkeypatch.setattr(collectives, "gather_from_workers", fail)
    checks = sigterm.Checks(mirrored(2))
    for is_asked in (False, True):
        assert checks.after_steps(1, is_asked) is is_asked
        assert checks.now(is_asked) is is_asked


@pytest.mark.parametrize("asked", [(), (0,), (1,)])
def test_at_the_end_of_an_epoch_all_meet(asked, monkeypatch):
    workers = Workers([0.1, 0.1], monkeypatch)
    with pytest.raises(InterruptedError):
        workers.checks[0].now(0 in asked)
    workers.current = 1
    assert workers.checks[1].now(1 in asked) == bool(asked)


@pytest.mark.parametrize("seconds, next_steps", [(2.0, 25), (0.01, 100)])
def test_an_interval_longer_than_an_epoch_shrinks(
    seconds, next_steps, monkeypatch
):
    """And grows only with the steps between two of them."""
    workers = Workers([0.01, 0.01], monkeypatch)
    assert meetings(workers, 11) == [1, 11]
    workers.seconds = [seconds / 50] * 2
    for _ in range(50):
        assert workers.step() == (False, False)
    workers.end_epoch()
    assert meetings(workers, 110)[0] == next_steps
