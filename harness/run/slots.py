"""Slots: the sets of fresh inputs that a group's timed calls rotate through.

Slot 0 is the one judged in full; every slot's timed outputs are checked on probe rows. Each slot has a seed of its
own, so that a call that answers from a memory of the last one is caught.
"""

from __future__ import annotations

from attnbench.harness.run.plan import GroupPlan

# Three sets of inputs while they are small; two where they are gigabytes and a worker a implementation holds them.
MANY, FEW = 3, 2
MOST_BYTES_FOR_MANY = 2**30


def slot_count(plan: GroupPlan) -> int:
    largest = max(problem.input_bytes for problem in plan.problems)
    return MANY if largest <= MOST_BYTES_FOR_MANY else FEW


def slot_seed(plan: GroupPlan, slot: int) -> int:
    return plan.seed * 128 + slot
