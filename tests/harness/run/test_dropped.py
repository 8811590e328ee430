"""Calls that drop weights are judged, and their timed outputs compared, under the masks that they drew themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.harness import registry
from attnbench.harness.conform.mutants.dropped import BackwardDropsBySeedOfItsOwn, KeptWeightsUnscaled
from attnbench.harness.conform.mutants.plain import Plain, Steps
from attnbench.harness.masks import Mask
from attnbench.harness.problem import DIRECTIONS, Direction, Problem
from attnbench.harness.run.channel import Message
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.solver import Solver
from attnbench.harness.run.worker import Refusal

PROBES = ["", "", ""]
Judge = Callable[[type[Steps], Direction], tuple[Message, Message]]


@pytest.fixture
def judge_and_turn(monkeypatch: pytest.MonkeyPatch) -> Judge:
    def made(steps: type[Steps], direction: Direction) -> tuple[Message, Message]:
        """The replies of a worker whose implementation is made of ``steps``, and of its first turn."""
        monkeypatch.setattr(registry, "load", lambda name: Plain(name, steps))
        problem = Problem(1, 2, 40, 16, dtype="fp32", mask=Mask.causal(), dropout_p=0.2, direction=direction)
        plan = GroupPlan("s", "c", "w", problem.group_key, (problem,), ("plain",), "normal", 5)
        solver = Solver("plain", "cpu")
        solver.do_hello()
        solver.do_prepare(plan.to_json(), problem.key)
        judged = solver.do_judge(problem.key, "")
        turn = solver.do_turn(problem.key, PROBES, samples=3, turn_ms=50.0, mode="cold", keep_memory=True)
        return judged, turn

    return made


def right(reply: Message) -> bool:
    return all(tensor["ok"] for tensor in reply["judgement"]["tensors"].values())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_right_implementation_is_right_under_its_masks(judge_and_turn: Judge, direction: Direction) -> None:
    judged, turn = judge_and_turn(Steps, direction)
    assert right(judged)
    assert right(turn)
    assert judged["judgement"]["rows"] == 40
    assert turn["judgement"]["rows"] == 32


def test_a_backward_with_a_mask_of_its_own_is_wrong(judge_and_turn: Judge) -> None:
    judged, _ = judge_and_turn(BackwardDropsBySeedOfItsOwn, "fwd_bwd")
    wrong = [name for name, tensor in judged["judgement"]["tensors"].items() if not tensor["ok"]]
    assert wrong == ["dq", "dk", "dv"]


def test_what_is_no_mask_is_incorrect(judge_and_turn: Judge) -> None:
    with pytest.raises(Refusal, match=r"neither 0 nor 1\.25"):
        judge_and_turn(KeptWeightsUnscaled, "fwd")


class AnswersFromMemory(Steps):
    """From the ninth call on, which is timed, it answers what it answered first; but for a recovery's zeros."""

    first: torch.Tensor | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = super().attend(q, k, v)
        self.first = out if self.first is None else self.first
        return self.first if self.calls > 8 and q.any() else out


def test_a_timed_call_that_answers_from_memory_is_found_out(judge_and_turn: Judge) -> None:
    judged, turn = judge_and_turn(AnswersFromMemory, "fwd")
    assert right(judged)
    assert not right(turn)
