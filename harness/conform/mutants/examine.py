"""Puts mutants before suites, in this process: which case of a suite sees a mutant first, if any does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examine import Outcome, examine_here
from attnbench.harness.conform.referee import solve
from attnbench.harness.conform.suite import widest
from attnbench.harness.conform.verdict import FAILURES
from attnbench.harness.contract import Implementation
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.run.calls import device_of


@dataclass(frozen=True)
class Sight:
    """What a list of cases saw of a mutant. case: id of the first that failed, empty if none did; posed: how many
    were posed until then."""

    case: str
    verdict: str
    reason: str
    posed: int

    @property
    def killed(self) -> bool:
        return bool(self.case)


class Bench:
    """Examines on one device, and keeps the right answers for the next mutant."""

    def __init__(self, device: str, cases: Iterable[Case]) -> None:
        """cases: all that may be asked, so that one oracle serves them."""
        self.device = torch.device(device)
        self._asks_most = widest(cases)
        self._oracles: dict[str, Oracle] = {}

    def examine(self, implementation: Implementation, case: Case) -> Outcome:
        """What ``examine_here`` makes of one case."""
        return examine_here(implementation, case, device_of(self.device), self._oracle(case))

    def sees(self, implementation: Implementation, cases: Iterable[Case]) -> Sight:
        """The first of ``cases`` that the implementation fails."""
        posed = 0
        for case in cases:
            posed += 1
            outcome = self.examine(implementation, case)
            if outcome.verdict in FAILURES:
                return Sight(case.id, outcome.verdict, outcome.reason, posed)
        return Sight("", "", "", posed)

    def _oracle(self, case: Case) -> Oracle | None:
        if case.question not in self._asks_most:
            return None
        if case.question not in self._oracles:
            self._oracles[case.question] = solve(self._asks_most[case.question], self.device)
        return self._oracles[case.question]


def of_case(cases: Iterable[Case], name: str) -> list[Case]:
    """Those of the case ``suite/case``, in every variant; LookupError where there is none."""
    found = [case for case in cases if f"{case.suite}/{case.name}" == name]
    if not found:
        raise LookupError(f"no case is named {name}")
    return found
