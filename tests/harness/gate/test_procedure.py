"""The procedure on a meter that plays back: what is measured again, what ends it, and what makes a machine unfit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from gate_runs import PROBLEM, failed, timed

from attnbench.harness.gate import procedure
from attnbench.harness.gate.outcome import Answer, GateExit, GateResult
from attnbench.harness.gate.pairs import Role
from attnbench.harness.gate.procedure import BASE, CONTROL, HEAD, GateOptions, Procedure
from attnbench.harness.gate.sides import Side
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Cell, Group, Status

PLAN = GroupPlan(
    "s", "c", "why", PROBLEM.group_key, (PROBLEM, PROBLEM.with_direction("bwd")), ("k",), "normal", 2
)
FACTS = {"id": "cuda:0", "name": "card", "torch": "2.11", "cuda": "13.0"}
Ratio = Callable[[Role, str], float]


class PlayedBack:
    """A Meter whose cells are made up. ratio: time of a role in a direction, over 1 ms."""

    def __init__(self, ratio: Ratio) -> None:
        self.facts = FACTS
        self.asked: list[tuple[str, list[str], list[str]]] = []
        self.failures: dict[
            tuple[str, ...], Status
        ] = {}  # by phase and role, or by phase, role and direction
        self.foreign: list[str] | None = []
        self.throttle = 0
        self._ratio = ratio

    def __call__(self, *_: object) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self, roles: Iterable[Role]) -> None: ...
    def dismiss(self, roles: Iterable[Role]) -> None: ...

    def measure(
        self, plan: GroupPlan, roles: Iterable[Role], run: str, rounds: int, tell: object
    ) -> tuple[list[Cell], Group]:
        roles = list(roles)
        phase = run.partition("/")[2]
        self.asked.append((phase, [str(role) for role in roles], [p.direction for p in plan.problems]))
        cells = [self._cell(phase, role, problem, rounds) for role in roles for problem in plan.problems]
        named = [cell.id for cell in cells]
        group = Group(run, "s", "c", "why", plan.group, "cuda:0", named, 0, foreign=self.foreign)  # type: ignore[arg-type]
        return cells, group

    def _cell(self, phase: str, role: Role, problem: Any, rounds: int) -> Cell:
        place = phase, str(role)
        status = self.failures.get(place) or self.failures.get((*place, problem.direction))
        if status:
            return dataclasses.replace(failed(str(role), status), problem=problem)
        cell = timed(
            str(role),
            self._ratio(role, problem.direction),
            seed=hash(role) % 2**31,
            rounds=max(rounds, 1),
            noise=1e-6,
        )
        assert cell.timing
        bits = [self.throttle] * max(rounds, 1)
        timing = dataclasses.replace(cell.timing, throttle=bits) if rounds else None
        return dataclasses.replace(cell, problem=problem, timing=timing)

    @property
    def phases(self) -> list[tuple[str, int, list[str]]]:
        """Phase, how many processes, directions."""
        return [(phase, len(roles), directions) for phase, roles, directions in self.asked]


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[GateResult, PlayedBack]]:
    def run(
        ratio: Ratio, change: Callable[[PlayedBack], None] = lambda _: None, **options: Any
    ) -> tuple[GateResult, PlayedBack]:
        meter = PlayedBack(ratio)
        change(meter)
        monkeypatch.setattr(procedure, "Meter", meter)
        asked = GateOptions("cuda:0", tmp_path / "out", rounds=8, **options)
        sides = Side(BASE, "base"), Side(HEAD, "head")
        return Procedure([PLAN], ["k"], *sides, asked, lambda _: None).run(), meter

    return run


def noise(role: Role, spread: float) -> float:
    """What a process drew once: its own, whoever asks."""
    return math.exp(np.random.default_rng([ord(c) for c in str(role)]).normal(0, spread))


def head_at(change: float, spread: float = 0.001) -> Ratio:
    return lambda role, _: noise(role, spread) * (change if role.side == HEAD else 1.0)


def test_a_clear_gate_takes_one_look(gate: Any) -> None:
    result, meter = gate(head_at(1.0))
    assert result.exit_code() is GateExit.OK
    assert meter.phases == [
        ("check", 2, ["fwd", "bwd"]), ("calibration", 10, ["fwd", "bwd"]), ("look-1", 10, ["fwd", "bwd"]),
    ]  # fmt: skip
    assert {cell.answer for cell in result.cells} == {Answer.SAME}
    assert all(cell.units == "5 pairs" and cell.detectable for cell in result.cells)


def test_only_what_is_unsure_is_measured_again_by_fresh_processes(gate: Any) -> None:
    """Forward is twice as slow; backward lies at the threshold itself, where no look decides."""
    result, meter = gate(
        lambda role, d: noise(role, 0.001) * ({"fwd": 2.0, "bwd": 1.02}[d] if role.side == HEAD else 1.0)
    )
    assert [phase for phase in meter.phases if phase[0].startswith("look")] == [
        ("look-1", 10, ["fwd", "bwd"]), ("look-2", 10, ["bwd"]), ("look-3", 10, ["bwd"]),
    ]  # fmt: skip
    roles = [role for _, roles, _ in meter.asked for role in roles]
    assert len(set(roles)) == len(roles)
    assert [(cell.answer, cell.units) for cell in result.cells] == [
        (Answer.SLOWER, "5 pairs"), (Answer.UNSURE, "15 pairs")
    ]  # fmt: skip
    assert result.exit_code() is GateExit.REGRESSION


def test_no_look_begins_that_the_budget_would_not_see_end(gate: Any) -> None:
    result, meter = gate(head_at(1.02), budget_s=0.0)
    assert [phase for phase, *_ in meter.phases] == ["check", "calibration", "look-1"]
    assert result.exit_code() is GateExit.UNSURE


def test_calibration_says_what_head_never_gets_to(gate: Any) -> None:
    result, meter = gate(head_at(1.0, spread=0.05))
    assert result.exit_code() is GateExit.UNFIT
    assert [phase for phase, *_ in meter.phases] == ["check", "calibration"]
    assert {cell.reason for cell in result.cells} == {"not timed"}


def test_equal_sides_that_differ_make_the_machine_unfit(gate: Any) -> None:
    result, _ = gate(lambda role, _: noise(role, 0.001) * (1.1 if role.side == CONTROL else 1.0))
    assert result.exit_code() is GateExit.UNFIT
    assert any("two equal sides differ by +10" in line for line in result.unfit)


@pytest.mark.parametrize(
    ("foreign", "throttle", "said"),
    [
        (["4242 python"], 0, "another process is on the GPU: 4242 python"),
        ([], 0x40, "throttled by heat or a fault in 20 of 20 turns"),
    ],
)
def test_a_shared_or_throttled_machine_is_unfit(
    gate: Any, foreign: list[str], throttle: int, said: str
) -> None:
    def change(meter: PlayedBack) -> None:
        meter.foreign, meter.throttle = foreign, throttle

    result, _ = gate(head_at(2.0), change)
    assert result.exit_code() is GateExit.UNFIT
    assert any(line.startswith(said.partition(" in ")[0]) for line in result.unfit)


@pytest.mark.parametrize(("foreign", "throttle"), [(None, 0), ([], 0x04), ([], 0x01)])
def test_an_unknown_neighbour_a_power_cap_and_an_idle_clock_are_no_reason(
    gate: Any, foreign: Any, throttle: int
) -> None:
    def change(meter: PlayedBack) -> None:
        meter.foreign, meter.throttle = foreign, throttle

    result, _ = gate(head_at(1.0), change)
    assert result.exit_code() is GateExit.OK


@pytest.mark.parametrize(
    ("place", "status", "answer", "code"),
    [
        (("check", "k@head.0"), Status.INCORRECT, Answer.WRONG, GateExit.WRONG),
        (("check", "k@head.0"), Status.UNSUPPORTED, Answer.LOST, GateExit.WRONG),
        (("check", "k@base.0"), Status.UNSUPPORTED, Answer.SKIPPED, GateExit.NOTHING),
        (("look-1", "k@head.9"), Status.INCORRECT, Answer.WRONG, GateExit.WRONG),
        (("look-1", "k@head.7"), Status.TIMEOUT, Answer.LOST, GateExit.WRONG),
        (("look-1", "k@base.7"), Status.CRASHED, Answer.SKIPPED, GateExit.NOTHING),
    ],
)
def test_a_process_that_fails_anywhere_decides(
    gate: Any, place: tuple[str, str], status: Status, answer: Answer, code: GateExit
) -> None:
    result, _ = gate(head_at(1.0), lambda meter: meter.failures.update({place: status}))
    assert {cell.answer for cell in result.cells} == {answer}
    assert result.exit_code() is code


def test_a_base_that_fails_on_and_off_is_no_base(gate: Any) -> None:
    result, _ = gate(
        head_at(1.0), lambda m: m.failures.update({("calibration", "k@control.3"): Status.CRASHED})
    )
    assert result.exit_code() is GateExit.UNFIT
    assert "base fails on and off" in result.unfit[0]


def test_a_wrong_cell_ends_the_gate_before_any_other_is_timed(gate: Any) -> None:
    result, meter = gate(
        head_at(1.0), lambda m: m.failures.update({("check", "k@head.0", "bwd"): Status.INCORRECT})
    )
    assert result.exit_code() is GateExit.WRONG
    assert [phase for phase, *_ in meter.phases] == ["check"]
    assert [cell.answer for cell in result.cells] == [Answer.UNSURE, Answer.WRONG]
