"""A cell in the making: what its record says of a failed judgement, of turns and of what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Problem
from attnbench.harness.run.crew import Crew
from attnbench.harness.run.draft import Draft, describe
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Judgement, TensorError

PROBLEM = Problem(1, 1, 8, 8)
PLAN = GroupPlan("s", "c", "w", PROBLEM.group_key, (PROBLEM,), ("a",), "normal", 3)
GOOD = TensorError(0.0, 0.0, 1.0, 1.0, ok=True)


def turn(**changes: Any) -> dict[str, Any]:
    unread = dict.fromkeys(("sm_mhz", "power_w", "temperature_c", "throttle"))
    made = {"ms": [1.0], "host_us": None, "held": True, "discarded": 0, "clocks": unread, "warmup_calls": 1}
    return made | {"inputs": 3, "renewed": True, "judgement": {}} | changes


def cell(*turns: dict[str, Any], **changes: Any) -> Cell:
    draft = Draft("a", PROBLEM, judgement=Judgement({"out": GOOD}, 1, 1), turns=list(turns), **changes)
    return draft.cell(PLAN, Crew("cpu", Path("logs"), 1.0), "r", "cold")


def test_a_failed_judgement_in_one_line() -> None:
    bad = TensorError(None, 0.25, 0.1, 0.2, ok=False, first_bad=(0, 7, 1, 3), got=None, want=1.0)
    assert describe(Judgement({"out": GOOD, "dk": bad}, 1, 1)) == (
        "dk[0, 7, 1, 3] is not finite, the oracle says 1; max error not finite (budget 0.1), mean 0.25 (budget 0.2)"
    )


@pytest.mark.parametrize(
    ("told", "recorded"), [([True, True], True), ([True, False], False), ([True, None], None)]
)
def test_inputs_were_renewed_if_they_were_in_every_turn(
    told: list[bool | None], recorded: bool | None
) -> None:
    timing = cell(*(turn(renewed=one) for one in told)).timing
    assert timing is not None
    assert timing.renewed is recorded


def test_energy_that_could_not_be_counted_is_a_warning_on_a_good_time() -> None:
    said = cell(turn(), no_energy="CRASHED: its process died of SIGSEGV")
    assert said.timing is not None
    assert said.warnings == ["its energy was not counted: CRASHED: its process died of SIGSEGV"]
    assert cell(turn()).warnings == []
