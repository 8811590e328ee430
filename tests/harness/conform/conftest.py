"""Cases and implementations for tests of conformance, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examine import Outcome, examine_here
from attnbench.harness.conform.referee import solve
from attnbench.harness.conform.suite import widest
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.judge import Oracle

Examine = Callable[[Implementation, Case], Outcome]


@pytest.fixture(scope="session")
def examine_on_cpu() -> Examine:
    """One case, one implementation, here on the CPU; oracles are kept for the session."""
    oracles: dict[str, Oracle] = {}

    def examine(implementation: Implementation, case: Case) -> Outcome:
        key = f"{case.question}_{case.problem.direction}"
        if key not in oracles and widest([case]):
            oracles[key] = solve(case, torch.device("cpu"))
        return examine_here(implementation, case, Device("cpu"), oracles.get(key))

    return examine
