"""The process that knows the right answers, apart from the implementations: none of them can reach its torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examiner import one_thread
from attnbench.harness.oracle.inputs import make_inputs
from attnbench.harness.oracle.judge import Oracle, build
from attnbench.harness.oracle.reference import judged_rows
from attnbench.harness.run import referee
from attnbench.harness.run.channel import Message

if TYPE_CHECKING:
    import torch


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
    rows = judged_rows(problem, referee.MOST_PAIRS[device.type])
    inputs = make_inputs(problem, case.input_seed, device, dout=backward, kind=case.inputs)
    return build(problem, inputs, case.input_seed, rows, backward)
