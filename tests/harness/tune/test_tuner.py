"""A worker's turns for ``bench tune``: each candidate has a pace of its own. The stream is a stand-in's, which a call
holds up for as long as its candidate says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from attnbench.harness.contract import Candidate, Device
from attnbench.harness.measure.timing import FIRST_HOLD_MS, LONGEST_HOLD_MS, Turn, Warm
from attnbench.harness.problem import Problem
from attnbench.harness.run import solver
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.tune import tuner
from attnbench.harness.tune.tuner import Tuner
from attnbench.impls.standard import Standard

PROBLEM = Problem(1, 1, 8, 8, dtype="fp32", direction="bwd")
PLAN = GroupPlan("s", "c", "w", PROBLEM.group_key, (PROBLEM,), ("planted",), "normal", 7)
QUEUEING_MS = (1.0, math.inf, 30.0)
"""Of a turn of each candidate: one for whom any hold will do, one that waits for the stream, one that takes long."""


class Choosing(Standard):
    """Notes which of its candidates is in use."""

    in_use = -1

    def candidates(self, problem: Problem, device: Device) -> Sequence[Candidate]:
        return [Candidate(f"c{i}", {}, {}, lambda i=i: self._using(i)) for i in range(len(QUEUEING_MS))]

    @contextmanager
    def _using(self, index: int) -> Iterator[None]:
        self.in_use = index
        yield
        self.in_use = -1


class Stream:
    """Times nothing: says whether a hold outlasts the queueing of the candidate in use, and what comes of it."""

    def __init__(self, implementation: Choosing) -> None:
        self.implementation = implementation
        self.holds: list[tuple[int, float]] = []
        self.warmed: list[int] = []
        self.take = solver.take_turn

    def take_turn(self, calls: Any, *, hold_ms: float, **rest: Any) -> Turn:
        self.holds.append((self.implementation.in_use, hold_ms))
        queue_ms = QUEUEING_MS[self.implementation.in_use]
        held = queue_ms < hold_ms
        after = 2 * queue_ms if held else 0.0 if hold_ms in (0, LONGEST_HOLD_MS) else LONGEST_HOLD_MS
        return dataclasses.replace(
            self.take(calls, **rest), held=held, next_hold_ms=min(after, LONGEST_HOLD_MS)
        )

    def warm_up(self, *_: Any) -> Warm:
        self.warmed.append(self.implementation.in_use)
        return Warm(1, 0.1, 0.0)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream(Choosing())
    monkeypatch.setattr(solver, "take_turn", made.take_turn)
    for module in (solver, tuner):
        monkeypatch.setattr(module, "warm_up", made.warm_up, raising=False)
    monkeypatch.setattr(Tuner, "_probe", lambda *_: None)
    return made


def turns(stream: Stream, *indices: int) -> list[bool]:
    """Whether the samples of each turn were held, of one worker."""
    worker = Tuner("planted", "cpu")
    worker._implementation = stream.implementation
    return [worker.do_turn_one(PLAN.to_json(), PROBLEM.key, index, ["", ""])["held"] for index in indices]


def test_one_that_cannot_be_held_leaves_the_others_their_holds(stream: Stream) -> None:
    assert turns(stream, 1, 0, 2, 0, 2) == [False, True, True, True, True]
    of_each = [[hold for index, hold in stream.holds if index == own] for own in range(3)]
    assert of_each[0] == [FIRST_HOLD_MS, 2.0]
    assert of_each[1] == [FIRST_HOLD_MS, LONGEST_HOLD_MS]
    assert of_each[2] == [FIRST_HOLD_MS, LONGEST_HOLD_MS, LONGEST_HOLD_MS]


def test_each_is_warmed_up_before_its_first_turn_alone(stream: Stream) -> None:
    turns(stream, 2, 0, 0, 2, 1)
    assert stream.warmed == [2, 0, 1]
