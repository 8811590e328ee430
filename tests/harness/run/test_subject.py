"""What is timed: when the memory that a sample needs is made ready, and how much of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import subject
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.subject import Subject

PROBLEM = Problem(batch=1, heads=2, seqlen_q=64, head_dim=16, dtype="fp32")
PLAN = GroupPlan("s", "c", "w", PROBLEM.group_key, (PROBLEM,), ("standard",), "normal", 3)


@pytest.mark.parametrize(
    ("direction", "sets", "kept", "reserved"),
    [("fwd", 3, 0.0, 100.0), ("bwd", 1, 70.0, 30.0), ("bwd", 2, 140.0, 60.0), ("bwd", 3, 60.0, 100.0)],
)
def test_what_a_sample_needs_is_reserved_once_its_inputs_are_in_place(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, sets: int, kept: float, reserved: float
) -> None:
    """Of a call that was weighed at 100 MiB; kept: MiB that the sets' forwards left."""
    posed = PROBLEM.with_direction(direction)
    inputs, results = posed.input_bytes / 2**20, posed.minimal_result_bytes / 2**20
    asked: list[float] = []

    def reserve(mib: float, _: Any) -> None:
        asked.append(mib)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(subject, "reserve", reserve)
    monkeypatch.setattr(subject, "held_mib", lambda _: 5.0 + sets * inputs + kept)
    made: dict[int, Any] = dict.fromkeys(range(sets))
    prepared: Any = None
    timed = Subject(PLAN, posed, prepared, torch.device("cuda"), None, held_mib=5.0, made=made)
    timed.reserve()
    assert asked == []  # it was never weighed
    timed.peak_mib = 100.0
    timed.reserve()
    timed.reserve()
    assert asked == pytest.approx([reserved + 2 * results])
