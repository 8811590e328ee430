"""Cases and implementations for tests of conformance, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.examine import Outcome, examine_here
from attnbench.harness.conform.referee import solve
from attnbench.harness.conform.suite import widest
from attnbench.harness.contract import Device, Implementation
from attnbench.harness.oracle.judge import Oracle

Examine = Callable[[Implementation, Case], Outcome]

PLUGINS = Path(__file__).parent / "plugins"
PLANTED = {
    "right": "wrong:right", "last-key": "wrong:last_key", "aborts": "wrong:aborts", "poisoned": "wrong:poisoned",
    "never": "wrong:never", "hangs": "wrong:hangs", "torch-on-the-cpu": "wrong:torch_on_the_cpu",
}  # fmt: skip
SUITE = """
name = "planted"
why = "a small suite for the tests of conformance"
[[case]]
name = "even"
why = "a number of keys that every planted plugin answers rightly"
dtype = "fp32"
batch = 1
heads = 2
head_dim = 8
seqlen_q = 5
seqlen_k = 6
[[case]]
name = "odd"
why = "an odd number of keys, where some of the planted plugins end badly"
dtype = "fp32"
batch = 1
heads = 2
head_dim = 8
seqlen_q = 5
seqlen_k = 7
[[case]]
name = "tail"
why = "one key more than a tile, which one of the planted plugins drops"
dtype = "fp32"
batch = 2
heads = 4
head_dim = 16
seqlen_q = 9
seqlen_k = 128
direction = "fwd_bwd"
"""


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


@pytest.fixture(scope="module")
def suite(register_plugins: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> str:
    register_plugins(PLANTED, PLUGINS)
    path = tmp_path_factory.mktemp("suite") / "planted.toml"
    path.write_text(SUITE)
    return str(path)
