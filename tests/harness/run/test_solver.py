"""What a worker does for one implementation, in this process and on a CPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import slots, solver, subject
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Status
from attnbench.harness.run.referee import Referee
from attnbench.harness.run.solver import Solver
from attnbench.harness.run.worker import Refusal

DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd", "fwd_bwd")


def plan(directions: tuple[Direction, ...] = DIRECTIONS) -> GroupPlan:
    problem = Problem(batch=1, heads=2, seqlen_q=64, head_dim=16, dtype="fp32")
    posed = tuple(problem.with_direction(direction) for direction in directions)
    return GroupPlan("s", "c", "w", problem.group_key, posed, ("standard",), "normal", 3)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("oracle")
    return Referee("cpu").do_oracle(plan().to_json(), str(folder))


@pytest.fixture
def ready() -> Solver:
    """A solver that has prepared every problem of the plan."""
    made = Solver("standard", "cpu")
    assert made.do_hello()["unavailable"] == ""
    for problem in plan().problems:
        assert made.do_prepare(plan().to_json(), problem.key)["unsupported"] == []
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each pass that is made of the implementation: ``fwd`` or ``bwd``."""
    made: list[str] = []
    grad = solver.torch.autograd.grad

    def counting(*arguments: Any, **options: Any) -> Any:
        made.append("bwd")
        return grad(*arguments, **options)

    monkeypatch.setattr(solver.torch.autograd, "grad", counting)
    return made


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("problem", plan().problems, ids=lambda problem: problem.direction)
def test_a_right_answer_is_judged_right_weighed_or_not(
    ready: Solver, oracle: dict[str, Any], problem: Problem, weigh: bool
) -> None:
    reply = ready.do_judge(problem.key, oracle["judged"], weigh=weigh)
    judged = reply["judgement"]["tensors"]
    assert set(judged) == ({"out", "lse"} if problem.direction == "fwd" else {"out", "dq", "dk", "dv"})
    assert all(tensor["ok"] for tensor in judged.values())
    assert ("memory" in reply) == weigh
    if weigh:
        apart = ready.do_weigh(problem.key)
        assert reply["memory"]["minimum_mib"] == apart["minimum_mib"] > 0
        assert reply["memory"]["peak_mib"] == pytest.approx(apart["peak_mib"], rel=0.2)


def test_a_backward_that_is_weighed_is_made_once_and_else_repeated(
    ready: Solver, oracle: dict[str, Any], calls: list[str]
) -> None:
    backward = next(p for p in plan().problems if p.direction == "bwd")
    ready.do_judge(backward.key, oracle["judged"], weigh=True)
    assert calls == ["bwd"]
    ready.do_judge(backward.key, oracle["judged"])
    assert calls == ["bwd"] * 3


@pytest.mark.parametrize(("longest_ms", "warmed"), [(0.0, [False, False]), (1e9, [True, False])])
def test_a_call_that_took_long_when_it_was_weighed_is_not_warmed_up(
    ready: Solver,
    oracle: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    longest_ms: float,
    warmed: list[bool],
) -> None:
    monkeypatch.setattr(solver, "LONGEST_WARMED_MS", longest_ms)
    key = plan().problems[1].key
    ready.do_weigh(key)
    turns = [ready.do_turn(key, oracle["probes"], 2, 1e9, "cold", keep_memory=True) for _ in range(2)]
    assert [bool(turn["warmup_calls"]) for turn in turns] == warmed
    assert all(turn["judgement"]["tensors"]["dq"]["ok"] for turn in turns)


def test_a_preparation_without_its_first_call_makes_none_and_serves_as_well(
    ready: Solver, oracle: dict[str, Any], calls: list[str]
) -> None:
    backward = next(p for p in plan().problems if p.direction == "bwd")
    ready.do_prepare(plan().to_json(), backward.key)
    assert calls == ["bwd"]
    ready.do_prepare(plan().to_json(), backward.key, first_call=False)
    assert calls == ["bwd"]
    assert ready.do_judge(backward.key, oracle["judged"])["judgement"]["tensors"]["dq"]["ok"]


def test_the_call_before_each_hold_of_many_samples_is_of_another_slot_than_they_begin_with(
    ready: Solver, oracle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    take_turn = solver.take_turn

    def noting(calls: Any, **options: Any) -> Any:
        asked.append(options | {"calls": calls})
        return take_turn(calls, **options)

    monkeypatch.setattr(solver, "take_turn", noting)
    key = plan().problems[0].key
    turn = ready.do_turn(key, oracle["probes"], 50, 1e9, "hot", keep_memory=True)
    assert len(turn["ms"]) == 50
    assert all(tensor["ok"] for tensor in turn["judgement"]["tensors"].values())
    (options,) = asked
    holds = range(0, 50, options["at_once"])
    assert len(holds) == 3
    before = options["around"].rewarm.__self__.renewed.renew
    assert before in options["around"].renew
    assert all(options["around"].renew[first] != before for first in holds)


def test_a_turn_puts_no_more_inputs_in_place_than_it_takes_samples_and_one_to_warm_up_on(
    ready: Solver, oracle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = subject.drawn_inputs

    def noting(posed: GroupPlan, problem: Problem, slot: int, device: Any) -> Any:
        drawn.append(slot)
        return draw(posed, problem, slot, device)

    monkeypatch.setattr(subject, "drawn_inputs", noting)
    arguments = {"probes": oracle["probes"], "turn_ms": 1e9, "mode": "cold", "keep_memory": True}
    key = plan().problems[0].key
    for samples, slots_drawn in ((1, [2, 0]), (1, [2, 0, 1]), (5, [2, 0, 1]), (5, [2, 0, 1])):
        assert len(ready.do_turn(key, samples=samples, **arguments)["ms"]) == samples
        assert drawn == slots_drawn
    ready.do_turn(key, samples=1, **arguments | {"keep_memory": False})
    del drawn[:]
    ready.do_turn(key, samples=1, **arguments)
    assert drawn == [0, 1]


@pytest.mark.parametrize("problem", plan().problems, ids=lambda problem: problem.direction)
def test_what_is_put_in_place_is_what_turns_are_timed_on(
    ready: Solver, oracle: dict[str, Any], monkeypatch: pytest.MonkeyPatch, problem: Problem
) -> None:
    ready.do_place(problem.key, oracle["probes"])
    monkeypatch.setattr(subject, "drawn_inputs", None)
    monkeypatch.setattr(solver.Oracle, "load", None)
    turns = [ready.do_turn(problem.key, oracle["probes"], 3, 1e9, "cold", keep_memory=True) for _ in range(2)]
    assert [bool(turn["warmup_calls"]) for turn in turns] == [True, False]
    for turn in turns:
        assert len(turn["ms"]) == 3
        assert all(tensor["ok"] for tensor in turn["judgement"]["tensors"].values())


def test_what_cannot_be_put_in_place_leaves_no_memory_held(
    ready: Solver, oracle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[weakref.ref[torch.Tensor]] = []
    draw, release = subject.drawn_inputs, ready.do_release
    left: list[bool] = []

    def noting(*arguments: Any) -> Any:
        inputs = draw(*arguments)
        drawn.append(weakref.ref(inputs.q))
        return inputs

    def releasing() -> Any:
        reply = release()
        left.append(any(tensor() is not None for tensor in drawn))
        return reply

    def refuse(path: str) -> None:
        raise Refusal(Status.OOM, "planted")

    monkeypatch.setattr(subject, "drawn_inputs", noting)
    monkeypatch.setattr(ready, "do_release", releasing)
    monkeypatch.setattr(ready, "_drawn_probe", refuse)
    with pytest.raises(Refusal, match="planted"):
        ready.do_place(plan().problems[0].key, oracle["probes"])
    assert ready._subject is None
    assert drawn
    assert not left[-1]


def test_a_long_problem_is_one_that_takes_the_fastest_card_tens_of_milliseconds() -> None:
    def long(seqlen: int, direction: Direction) -> bool:
        problem = Problem(1, 16, seqlen, 128, direction=direction)
        return slots.is_long(GroupPlan("s", "c", "w", problem.group_key, (problem,), ("a",), "normal", 3))

    assert not long(32768, "bwd")
    assert long(65536, "fwd")


@pytest.mark.gpu
def test_a_long_call_is_made_once_a_round_and_not_warmed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "LONG_FLOPS", 1.0)
    posed = plan(("fwd", "bwd"))
    answers = Referee("cuda:0").do_oracle(posed.to_json(), str(tmp_path))
    made = Solver("standard", "cuda:0")
    made.do_hello()
    for problem in posed.problems:
        made.do_prepare(posed.to_json(), problem.key)
        reply = made.do_judge(problem.key, answers["judged"], weigh=True)
        assert all(tensor["ok"] for tensor in reply["judgement"]["tensors"].values())
        assert reply["memory"]["peak_mib"] > 0
        made.do_release()
        for keep in (True, True, False, False):
            turn = made.do_turn(problem.key, answers["probes"], 1, 20.0, "cold", keep_memory=keep)
            assert (len(turn["ms"]), turn["warmup_calls"], turn["held"]) == (1, 0, True)
            assert all(tensor["ok"] for tensor in turn["judgement"]["tensors"].values())


def test_a_turn_that_raises_gives_its_memory_back(
    ready: Solver, oracle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []

    def refuse(results: Any, _: Any) -> None:
        held.extend(map(weakref.ref, results))
        raise Refusal(Status.INCORRECT, "planted")

    def release() -> dict[str, Any]:
        alive.append([result() is not None for result in held])
        return given_back()

    alive: list[list[bool]] = []
    given_back = ready.do_release
    monkeypatch.setattr(solver, "refuse_unfinished", refuse)
    monkeypatch.setattr(ready, "do_release", release)
    with pytest.raises(Refusal, match="planted"):
        ready.do_turn(plan().problems[0].key, oracle["probes"], 2, 100.0, "cold", keep_memory=True)
    assert ready._subject is None
    assert held
    assert alive[-1] == [False] * len(held)  # the traceback does not hold them when memory is given back
