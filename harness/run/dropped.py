"""Judging calls that drop weights: each under its own mask, recovered in the implementation's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.harness.contract import Implementation, Prepared
from attnbench.harness.oracle.dropout import GeneratorState, recover
from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.oracle.judge import Oracle, build
from attnbench.harness.oracle.reference import judged_rows, probe_rows
from attnbench.harness.problem import Problem

if TYPE_CHECKING:
    import torch

MOST_PAIRS = {"cuda": 1_000_000_000, "cpu": 4_000_000}
"""Score elements judged in full, each a byte of mask and some fp64 work beside the implementation's own memory; beyond,
a sample of rows. The recovery takes seqlen_k / head_dim_v calls whatever the rows are."""
SLOWEST_PROBE_MS = 1500.0
"""Longest that the recovery of one timed call's mask may take by the calls it needs; longer ones are probed once, and
are given no rank. The suite's longest: 128 calls of torch's flash backward at seqlen 8k and head_dim 64, 1430 ms as
they are counted here and some 600 as they are made, since forwards recover the mask of a backward."""


def judged_oracle(
    problem: Problem,
    implementation: Implementation,
    prepared: Prepared,
    inputs: Inputs,
    seed: int,
    state: GeneratorState,
) -> Oracle:
    """What a call on ``inputs`` from ``state`` must answer; leaves the generators in that state."""
    rows = judged_rows(problem, MOST_PAIRS[state.device.type])
    oracle = _under_mask(problem, implementation, prepared, inputs, seed, state, rows, columns=True)
    state.restore()
    return oracle


def probe_oracle(
    problem: Problem,
    implementation: Implementation,
    prepared: Prepared,
    inputs: Inputs,
    seed: int,
    state: GeneratorState,
) -> Oracle:
    """The same of a few rows, without dk and dv; the generators go on from where they were."""
    now = GeneratorState.now(state.device)
    oracle = _under_mask(
        problem, implementation, prepared, inputs, seed, state, probe_rows(problem), columns=False
    )
    now.restore()
    return oracle


def _under_mask(
    problem: Problem,
    implementation: Implementation,
    prepared: Prepared,
    inputs: Inputs,
    seed: int,
    state: GeneratorState,
    rows: torch.Tensor,
    *,
    columns: bool,
) -> Oracle:
    dropout = implementation.dropout_effective(problem.dropout_p)
    kept = recover(problem, prepared.attend, state, dropout, rows)
    return build(problem, inputs, seed, rows, problem.direction != "fwd", columns=columns, kept=kept)


def is_cheap_to_probe(problem: Problem, call_ms: float) -> bool:
    """Whether every round's kept call has its mask recovered, or the first round's alone."""
    return call_ms * -(-problem.seqlen_k // problem.head_dim_v) <= SLOWEST_PROBE_MS
