"""What fits on the device at once: who is judged side by side, who keeps its memory between turns, on how many inputs.

All of it is reckoned in MiB from the measured peaks; on a CPU, where nobody knows how much there is, nothing is shared
out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnbench.harness.run.draft import Draft
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.slots import FEW, slot_count

# What is held at once keeps within this share of the device.
RESIDENT_SHARE = 0.8
# And the sets of one implementation within this, or there are few of them: three backwards with materialised scores of
# 33 GB, timed in turn, had ten implementations of 2 GB put their inputs in place again for each turn.
SETS_SHARE = 1 / 8
MIB = 2**20


class Room:
    """The device's memory for the drafts of one group. memory_mib: the device's, None on a CPU. mode: of the timing."""

    def __init__(self, plan: GroupPlan, memory_mib: float | None, mode: str) -> None:
        self._plan, self._total, self._mode = plan, memory_mib, mode

    def batches(self, drafts: Sequence[Draft], oracle_mib: float) -> list[list[str]]:
        """Implementations to judge side by side: in order, as many at a time as the device's memory holds; on a CPU
        one. One that failed to prepare among others is tried again alone.
        """
        batches: list[list[str]] = []
        room = 0.0
        for impl in dict.fromkeys(draft.impl for draft in drafts):
            own = [draft for draft in drafts if draft.impl == impl]
            # A judgement holds inputs, a copy of dout, two sets of gradients and the oracle.
            need = max(map(_weight, own)) * 2 + oracle_mib
            if any(draft.prepared_by is None or draft.problem.dropout_p for draft in own):
                need = math.inf  # a recovered mask and its oracle are larger than what they judge
            if self._total is None or need > room:
                batches.append([])
                room = RESIDENT_SHARE * (self._total or 0.0)
            batches[-1].append(impl)
            room -= need
        return batches

    def slots(self, draft: Draft) -> int:
        """How many sets of inputs the draft's timed calls rotate through: fewer where they would not fit with what is
        kept for each; what ran once, alone, is timed even if only one fits."""
        most, total = slot_count(self._plan), self._total
        if total is None:
            return most
        if most * self._set(draft) > SETS_SHARE * total:
            most = FEW
        return next((n for n in range(most, 1, -1) if self._need(draft, n) <= RESIDENT_SHARE * total), 1)

    def resident(self, drafts: Sequence[Draft]) -> set[str]:
        """Implementations that keep their memory between turns: the lightest, as many as leave room for the heaviest
        of the others to take its turn beside them."""
        total = self._total
        if total is None:
            return {draft.impl for draft in drafts}
        needs = {draft.impl: self._need(draft, self.slots(draft)) for draft in drafts}
        lightest = sorted(needs, key=lambda impl: needs[impl])
        for count in range(len(lightest), 0, -1):
            staying, others = lightest[:count], lightest[count:]
            beside = max((needs[impl] for impl in others), default=0.0)
            if sum(needs[impl] for impl in staying) + beside <= RESIDENT_SHARE * total:
                return set(staying)
        return set()

    def _need(self, draft: Draft, slots: int) -> float:
        """MiB that timing on so many sets of inputs holds: the workspace at least once, the one result that is kept to
        be checked, and the copy of it."""
        return _weight(draft) + (slots - 1) * self._set(draft) + 2 * draft.problem.minimal_result_bytes / MIB

    def _set(self, draft: Draft) -> float:
        """MiB of one more set of inputs, with a workspace where a backward's graph, or a CUDA graph, keeps it."""
        graphs = draft.problem.direction == "bwd" or "graph" in self._mode
        return _weight(draft) if graphs else draft.problem.input_bytes / MIB


def _weight(draft: Draft) -> float:
    """MiB of one set of inputs and the workspace of a call on it."""
    inputs = draft.problem.input_bytes / MIB
    return inputs + (draft.memory.peak_mib if draft.memory and draft.memory.peak_mib else 8 * inputs)
