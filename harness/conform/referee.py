"""The process that knows the right answers, apart from the implementations: none of them can reach its torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examiner import one_thread
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.oracle.judge import Oracle, build
from attnbench.harness.oracle.reference import judged_rows
from attnbench.harness.problem import Problem
from attnbench.harness.run import referee
from attnbench.harness.run.channel import Message

if TYPE_CHECKING:
    import torch

MOST_BYTES = 1 << 30
"""Of an oracle's query rows; beyond, a sample of rows. It goes through a file to every worker: past 2^31 elements whole
rows would be 9 GiB, which take each of a dozen longer to read than its cases take."""


class Referee(referee.Referee):
    """A run's referee that also answers single cases."""

    def __init__(self, role: str, device: str) -> None:
        super().__init__(device)
        one_thread(self._device)

    def do_solve(self, case: Message, path: str) -> Message:
        """Writes the oracle of the case's inputs to ``path``."""
        solve(Case.from_json(case), self._device).save(path)
        self.do_release()
        return {}


def solve(case: Case, device: torch.device) -> Oracle:
    """The right answer to the case's inputs, with gradients where its direction has a backward."""
    problem, backward = case.problem, case.problem.direction != "fwd"
    rows = judged_rows(problem, min(referee.MOST_PAIRS[device.type], _most_pairs(problem, backward)))
    inputs = make_inputs(problem, case.input_seed, device, dout=backward, kind=case.inputs)
    return build(problem, inputs, case.input_seed, rows, backward)


def _most_pairs(problem: Problem, backward: bool) -> int:
    """Score elements of as many query rows as keep out, and dq with a backward, within MOST_BYTES."""
    element = 4 if problem.dtype in ("bf16", "fp16") else 8
    of_a_row = problem.head_dim_v + (problem.head_dim if backward else 0)
    rows = MOST_BYTES // max(1, problem.batch * problem.heads * of_a_row * element)
    return rows * problem.batch * problem.heads * problem.seqlen_k
