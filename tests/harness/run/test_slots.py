"""Slots: each set of inputs has a seed of its own."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.problem import Problem
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.slots import FEW, MANY, MOST_BYTES_FOR_MANY, slot_count, slot_seed


def plan(*problems: Problem, seed: int = 0) -> GroupPlan:
    return GroupPlan("s", "c", "w", problems[0].group_key, problems, ("a",), "normal", seed)


SMALL = Problem(batch=1, heads=1, seqlen_q=16, head_dim=16)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=4, unique=True))
def test_no_two_slots_share_a_seed(seeds: list[int]) -> None:
    # 99 is the slot of the first call's inputs.
    slots = [*range(MANY), 99]
    drawn = [slot_seed(plan(SMALL, seed=seed), slot) for seed, slot in itertools.product(seeds, slots)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)  # what a torch generator takes


def test_a_seed_is_the_same_in_every_process() -> None:
    assert slot_seed(plan(SMALL, seed=5), 1) == slot_seed(plan(SMALL, seed=5), 1) == 641


def test_large_inputs_have_fewer_slots_and_never_one() -> None:
    # q, k and v are a third of a GiB each: exactly at the limit; dout goes over it.
    at_limit = Problem(
        batch=1, heads=1, seqlen_q=MOST_BYTES_FOR_MANY // 512, head_dim=128, kv_heads=1, seqlen_k=0
    )
    assert at_limit.input_bytes == MOST_BYTES_FOR_MANY // 2
    assert slot_count(plan(SMALL)) == MANY
    assert slot_count(plan(at_limit)) == MANY
    assert slot_count(plan(at_limit, at_limit.with_direction("bwd"))) == MANY
    over = Problem(batch=3, heads=1, seqlen_q=MOST_BYTES_FOR_MANY // 512, head_dim=128, seqlen_k=0)
    assert slot_count(plan(over)) == FEW >= 2


def test_the_direction_with_the_most_inputs_decides() -> None:
    problem = Problem(batch=3, heads=1, seqlen_q=MOST_BYTES_FOR_MANY // 1024, head_dim=128, seqlen_k=0)
    assert slot_count(plan(problem)) == MANY
    assert slot_count(plan(problem, problem.with_direction("bwd"))) == FEW
