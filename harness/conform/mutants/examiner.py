"""What a worker does for mutants: one mutant before some cases a request. Imports torch; served by run/worker.py."""

from __future__ import annotations

import dataclasses

import torch

from attnbench.harness.conform.examiner import one_thread
from attnbench.harness.conform.mutants import catalogue
from attnbench.harness.conform.mutants.examine import Bench, of_case
from attnbench.harness.conform.suite import select
from attnbench.harness.run.channel import Message


class MutantExaminer:
    """Operations are the ``do_`` methods; each takes JSON values and returns a JSON object."""

    def __init__(self, role: str, device: str) -> None:
        one_thread(torch.device(device))
        self._cases = select([], torch.device(device).type)
        self._bench = Bench(device, self._cases)

    def do_hello(self) -> Message:
        return {}

    def do_sees(self, mutant: str, where: str) -> Message:
        """What the cases of a suite, or of one ``suite/case``, see of a mutant: a Sight."""
        named = "/" in where
        cases = of_case(self._cases, where) if named else [c for c in self._cases if c.suite == where]
        planted = catalogue()[mutant]
        # The case that is there for it comes first: most suites end there.
        cases.sort(key=lambda case: f"{case.suite}/{case.name}" != planted.killed_by)
        return dataclasses.asdict(self._bench.sees(planted.implementation(), cases))
