"""Slots: the sets of fresh inputs that a group's timed calls rotate through.

Slot 0 is the one judged in full; every slot's timed outputs are checked on probe rows. Each slot has a seed of its
own, so that the call before a sample never had its inputs, and these change after every call (``symmetry``).
"""

from __future__ import annotations

from attnbench.harness.run.plan import GroupPlan

# Three sets of inputs while they are small; two where they are gigabytes and a worker a implementation holds them.
MANY, FEW = 3, 2
MOST_BYTES_FOR_MANY = 2**30
# Of a forward: 30 ms at the rate of the fastest card this was written for, a second for a slow implementation.
LONG_FLOPS = 1e13


def slot_count(plan: GroupPlan) -> int:
    largest = max(problem.input_bytes for problem in plan.problems)
    return MANY if largest <= MOST_BYTES_FOR_MANY else FEW


def is_long(plan: GroupPlan) -> bool:
    """Whether each of the group's calls costs so much that none is made twice for one purpose: the call that is weighed
    is the one that is judged, and none is spent on warming up.
    """
    return plan.problems[0].with_direction("fwd").flops >= LONG_FLOPS


def slot_seed(plan: GroupPlan, slot: int) -> int:
    return plan.seed * 128 + slot
