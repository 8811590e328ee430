"""One group: the order of its work, and what becomes of a cell at every point where it can fail.

The crew is the real one; its workers are scripted and live in this process.
"""

from __future__ import annotations

import itertools
import runpy
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run import crew as crew_module
from attnbench.harness.run import slots
from attnbench.harness.run.ahead import Ahead, FirstCall
from attnbench.harness.run.channel import Message
from attnbench.harness.run.crew import MOST_LOSSES, Crew
from attnbench.harness.run.draft import OWN_MASK
from attnbench.harness.run.group import Conditions, GroupRun
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.record import Cell, Energy, Group, Memory, Status
from attnbench.harness.run.room import RESIDENT_SHARE

STAND_IN = runpy.run_path(str(Path(__file__).parent / "stand_in_worker.py"))
in_a_run, judgement = STAND_IN["in_a_run"], STAND_IN["judgement"]

Outcome = Message | WorkerLost
CRASH = WorkerLost(Status.CRASHED, "planted crash", "its stderr")
OUT_OF_MEMORY = {"ok": False, "status": "OOM", "reason": "planted", "evidence": "", "fatal": False}
REFUSED = {"ok": False, "status": "INCORRECT", "reason": "shape", "evidence": "", "fatal": False}


class Script:
    """What was asked, and what some answers are instead of good ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Message]] = []
        self.pids = itertools.count(100)
        self._planted: dict[tuple[str, str], list[Outcome | None]] = {}

    def plant(self, role: str, operation: str, *outcomes: Outcome | None) -> None:
        """The first answers of ``role`` to ``operation``; None is a good one, and all after them are good."""
        self._planted[role, operation] = list(outcomes)

    def answer(self, role: str, operation: str) -> Outcome:
        planted = self._planted.get((role, operation))
        found = planted.pop(0) if planted else None
        if isinstance(found, WorkerLost):
            return found
        return {"ok": True} | in_a_run(role, operation) | (found or {})

    def order(self, *operations: str) -> list[tuple[str, str]]:
        return [(role, operation) for role, operation, _ in self.asked if operation in operations]

    def count(self, role: str, operation: str) -> int:
        return self.order(operation).count((role, operation))


class ScriptedWorker:
    def __init__(self, script: Script, role: str) -> None:
        self.role, self.pid = role, next(script.pids)
        self._script = script
        self._operation = ""

    def ask(self, operation: str, **arguments: Any) -> None:
        self._operation = operation
        self._script.asked.append((self.role, operation, arguments | {"pid": self.pid}))

    def answer(self, time_limit_s: float) -> Message:
        outcome = self._script.answer(self.role, self._operation)
        if isinstance(outcome, WorkerLost):
            raise outcome
        return outcome

    def ask_to_leave(self) -> None: ...
    def quit(self) -> None: ...


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(crew_module, "Worker", lambda role, device, logs, path: ScriptedWorker(made, role))
    return made


def plan(
    impls: Sequence[str] = ("a", "b"), directions: Sequence[Direction] = ("fwd",), **changes: Any
) -> GroupPlan:
    problem = Problem(**{"batch": 1, "heads": 1, "seqlen_q": 8, "head_dim": 8} | changes)
    problems = tuple(problem.with_direction(direction) for direction in directions)
    return GroupPlan("s", "c", "w", problem.group_key, problems, tuple(impls), "normal", 3)


def conditions(**changes: Any) -> Conditions:
    told: dict[str, Any] = {
        "run": "r", "rounds": 3, "samples": 2, "mode": "cold", "memory": True, "memory_mib": None,
        "scratch": Path(tempfile.gettempdir()) / "attnbench-test-group",
    }  # fmt: skip
    return Conditions(**told | changes)


def started_crew() -> Crew:
    """As the runner hands it to a group: the referee is there."""
    crew = Crew("cpu", Path("logs"), 30.0)
    crew.start_referee()
    return crew


def made(posed: GroupPlan, **changes: Any) -> GroupRun:
    return GroupRun(posed, started_crew(), conditions(**changes), lambda phase: None)


def execute(posed: GroupPlan, **changes: Any) -> tuple[dict[str, Cell], Group]:
    """Cells by ``impl/direction``."""
    cells, group = made(posed, **changes).execute()
    assert group.cells == [cell.id for cell in cells] == posed.cells
    return {f"{cell.impl}/{cell.problem.direction}": cell for cell in cells}, group


# ---- all is well ------------------------------------------------------------------------------------------


def test_every_cell_is_judged_and_timed_in_every_round(script: Script) -> None:
    cells, group = execute(plan(directions=("fwd", "bwd")))
    assert list(cells) == ["a/fwd", "a/bwd", "b/fwd", "b/bwd"]
    for cell in cells.values():
        assert cell.status is Status.OK
        assert cell.timing is not None
        assert (cell.timing.rounds, cell.timing.checked, cell.timing.warmup_calls) == ([[1.0, 2.0]] * 3, 3, 3)
        assert (cell.prepare_ms, cell.first_call_ms, cell.impl_version) == (1.0, 2.0, "1.0")
    for direction in ("fwd", "bwd"):
        assert group.ceilings[direction].gemm_tflops == group.ceilings[direction].copy_gbs == [[1.0]] * 3
        assert [sorted(order) for order in group.order[direction]] == [["a", "b", REFEREE]] * 3
    assert (group.oracle_ms, group.seed) == (1.0, 3)
    assert set(group.phases) == {"start", "prepare", "oracle", "judge", "time fwd", "time bwd"}


def test_rounds_are_taken_in_the_order_recorded_and_the_order_changes(script: Script) -> None:
    _, group = execute(plan(impls=("a", "b", "c", "d")), rounds=8)
    assert script.order("turn", "ceilings") == [
        (name, "ceilings" if name == REFEREE else "turn") for order in group.order["fwd"] for name in order
    ]
    assert len({tuple(order) for order in group.order["fwd"]}) > 3


def test_preparations_and_the_oracle_run_side_by_side_and_come_first(script: Script) -> None:
    execute(plan(directions=("fwd", "bwd")))
    operations = [
        operation for _, operation, _ in script.asked if operation not in {"hello", "release", "weigh"}
    ]
    assert operations[:5] == ["oracle"] + 4 * ["prepare"]
    assert operations[5:9] == 4 * ["judge"]
    assert set(operations[9:]) == {"turn", "ceilings"}


def test_each_is_weighed_alone_the_others_memory_released(script: Script) -> None:
    execute(plan(), memory_mib=1e6)
    asked = script.order("prepare", "weigh", "release", "judge")
    begin = asked.index(("a", "weigh"))
    assert asked[begin - 3 : begin + 4] == [
        ("a", "release"), ("b", "release"), (REFEREE, "release"),
        ("a", "weigh"), ("a", "release"), ("b", "weigh"), ("b", "release"),
    ]  # fmt: skip
    assert {operation for _, operation in asked[:begin]} == {"prepare", "release"}


def test_a_long_call_is_weighed_and_judged_at_once(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "LONG_FLOPS", 1.0)
    script.plant("b", "judge", OUT_OF_MEMORY)
    cells, _ = execute(plan(directions=("fwd", "bwd")), memory_mib=1e6)
    assert [asked.get("weigh") for _, operation, asked in script.asked if operation == "judge"] == [True] * 4
    assert script.order("weigh") == []
    assert cells["a/fwd"].memory == Memory(1.0, None, 1.0)
    assert [cell.status for cell in cells.values()] == [Status.OK, Status.OK, Status.OOM, Status.OK]


def test_what_set_up_keeps_is_told_beside_the_peak(script: Script) -> None:
    script.plant("a", "prepare", {"setup_mib": 7.0})
    cells, _ = execute(plan())
    assert cells["a/fwd"].memory == Memory(1.0, None, 1.0, setup_mib=7.0)
    assert cells["b/fwd"].memory == Memory(1.0, None, 1.0, setup_mib=None)


def judged_side_by_side(script: Script) -> list[set[str]]:
    """Who was judged between two releases."""
    found: list[set[str]] = [set()]
    for role, operation in script.order("judge", "release"):
        if operation == "judge":
            found[-1].add(role)
        elif found[-1]:
            found.append(set())
    return [batch for batch in found if batch]


def test_as_many_are_judged_side_by_side_as_the_memory_holds(script: Script) -> None:
    for name, peak in {"a": 1.0, "b": 90.0, "c": 1.0, "d": 1.0}.items():
        script.plant(name, "weigh", {"peak_mib": peak})
    execute(plan(impls=("a", "b", "c", "d")), memory_mib=100 / RESIDENT_SHARE)
    assert judged_side_by_side(script) == [{"a"}, {"b"}, {"c", "d"}]


def test_with_room_all_are_judged_side_by_side_direction_by_direction(script: Script) -> None:
    execute(plan(directions=("fwd", "bwd")), memory_mib=1e6)
    assert judged_side_by_side(script) == [{"a", "b"}]
    assert script.order("judge") == [("a", "judge"), ("b", "judge")] * 2


def test_one_that_did_not_prepare_among_the_others_is_judged_apart(script: Script) -> None:
    script.plant("b", "prepare", OUT_OF_MEMORY)
    cells, _ = execute(plan(impls=("a", "b", "c")), memory_mib=1e6, memory=False)
    assert judged_side_by_side(script) == [{"a"}, {"b"}, {"c"}]
    assert {cell.status for cell in cells.values()} == {Status.OK}


@pytest.mark.parametrize(
    "outcome", [OUT_OF_MEMORY, WorkerLost(Status.TIMEOUT, "planted", "")], ids=["memory", "time"]
)
def test_what_failed_beside_others_is_judged_again_alone(script: Script, outcome: Outcome) -> None:
    script.plant("a", "judge", outcome)
    cells, _ = execute(plan(), memory_mib=1e6)
    assert {cell.status for cell in cells.values()} == {Status.OK}
    assert judged_side_by_side(script) == [{"a", "b"}, {"a"}]


def test_what_fails_again_alone_has_failed(script: Script) -> None:
    script.plant("a", "judge", OUT_OF_MEMORY, OUT_OF_MEMORY)
    cells, _ = execute(plan(), memory_mib=1e6)
    assert (cells["a/fwd"].status, cells["b/fwd"].status) == (Status.OOM, Status.OK)
    assert script.count("a", "judge") == 2


def test_on_a_cpu_each_is_judged_alone(script: Script) -> None:
    execute(plan(), memory=False)
    asked = script.order("prepare", "judge", "release", "turn")
    begin = asked.index(("a", "judge"))
    assert asked[begin - 3 : begin + 4] == [
        ("a", "release"), ("b", "release"), (REFEREE, "release"),
        ("a", "judge"), ("a", "release"), ("b", "judge"), ("b", "release"),
    ]  # fmt: skip


def test_phases_are_told_as_they_begin(script: Script) -> None:
    told: list[str] = []
    GroupRun(plan(), started_crew(), conditions(), told.append).execute()
    assert told == ["start", "prepare", "oracle", "judge", "time fwd"]


def test_what_was_compiled_ahead_gives_the_set_up_times(script: Script) -> None:
    posed = plan()
    cells, _ = execute(posed, ahead=Ahead({("a", posed.problems[0].key): (70.0, 80.0)}))
    assert (cells["a/fwd"].prepare_ms, cells["a/fwd"].first_call_ms) == (70.0, 80.0)
    assert (cells["b/fwd"].prepare_ms, cells["b/fwd"].first_call_ms) == (1.0, 2.0)


def test_a_first_call_made_ahead_is_not_made_again_but_by_another_worker(script: Script) -> None:
    posed = plan(impls=("a", "b", "c"))
    key, own = posed.problems[0].key, {"a": 101, "b": 999}  # the referee is 100
    ahead = Ahead(
        prepared={(name, key): (70.0, 80.0) for name in own},
        first_calls={(name, key): FirstCall(pid, 7.0) for name, pid in own.items()},
    )
    cells, _ = execute(posed, ahead=ahead)
    asked = {role: told["first_call"] for role, op, told in script.asked if op == "prepare"}
    assert asked == {"a": False, "b": True, "c": True}
    kept = {name: cells[f"{name}/fwd"].memory for name in "abc"}
    assert {name: memory.setup_mib if memory else None for name, memory in kept.items()} == {
        "a": 7.0, "b": None, "c": None,
    }  # fmt: skip


def test_samples_that_could_not_be_held_are_a_warning(script: Script) -> None:
    script.plant("a", "turn", {"held": False, "discarded": 4}, None, {"held": False, "discarded": 4})
    cells, _ = execute(plan())
    assert cells["a/fwd"].status is Status.OK
    assert cells["a/fwd"].timing is not None
    assert cells["a/fwd"].timing.unheld == 8
    assert cells["a/fwd"].warnings[0].startswith("in 2 of 3 rounds the stream could not be held")
    assert cells["b/fwd"].warnings == []


# ---- never started ----------------------------------------------------------------------------------------


def test_an_unavailable_implementation_is_asked_nothing(script: Script) -> None:
    script.plant("a", "hello", {"unavailable": "needs another card"})
    cells, _ = execute(plan(directions=("fwd", "bwd")))
    for direction in ("fwd", "bwd"):
        assert cells[f"a/{direction}"].status is Status.UNAVAILABLE
        assert cells[f"a/{direction}"].reasons == ["needs another card"]
        assert cells[f"b/{direction}"].status is Status.OK
    assert script.order("prepare", "judge", "turn").count(("a", "prepare")) == 0


def test_an_unsupported_problem_is_told_with_its_reasons(script: Script) -> None:
    script.plant("a", "prepare", {"unsupported": ["head_dim 8", "no mask"]})
    cells, _ = execute(plan(directions=("fwd", "bwd")))
    assert cells["a/fwd"].status is Status.UNSUPPORTED
    assert cells["a/fwd"].reasons == ["head_dim 8; no mask"]
    assert cells["a/bwd"].status is Status.OK
    assert script.count("a", "judge") == 1


def test_what_was_declared_unsupported_ahead_needs_no_worker(script: Script) -> None:
    posed = plan(directions=("fwd", "bwd"))
    fwd, bwd = (problem.key for problem in posed.problems)
    declared = {("a", fwd): ["no mask"], ("a", bwd): ["no mask", "no backward"], ("b", bwd): ["no backward"]}
    cells, _ = execute(posed, ahead=Ahead(unsupported=declared))
    refused = {name: cell.reasons for name, cell in cells.items() if cell.status is Status.UNSUPPORTED}
    assert refused == {"a/fwd": ["no mask"], "a/bwd": ["no mask; no backward"], "b/bwd": ["no backward"]}
    assert cells["b/fwd"].status is Status.OK
    assert {role for role, _, _ in script.asked} == {"b", REFEREE}


def test_a_round_without_a_judgement_is_not_counted_as_checked(script: Script) -> None:
    script.plant("a", "turn", {"judgement": None})
    cells, _ = execute(plan(dropout_p=0.1))
    timing = cells["a/fwd"].timing
    assert timing is not None
    assert timing.checked == len(timing.rounds) - 1
    assert cells["a/fwd"].warnings == [OWN_MASK]


# ---- out of memory ----------------------------------------------------------------------------------------


def test_out_of_memory_beside_the_others_is_tried_again_alone(script: Script) -> None:
    script.plant("a", "prepare", OUT_OF_MEMORY)
    cells, _ = execute(plan())
    assert cells["a/fwd"].status is Status.OK
    asked = script.order("prepare", "release", "weigh")
    assert script.count("a", "prepare") == 2
    again = len(asked) - 1 - asked[::-1].index(("a", "prepare"))
    assert {("a", "release"), ("b", "release")} <= set(
        asked[2:again]
    )  # its neighbours' memory was given back
    assert asked[again + 1] == ("a", "weigh")


def test_out_of_memory_alone_is_its_own(script: Script) -> None:
    script.plant("a", "prepare", OUT_OF_MEMORY, OUT_OF_MEMORY)
    cells, _ = execute(plan())
    assert cells["a/fwd"].status is Status.OOM
    assert cells["b/fwd"].status is Status.OK
    assert script.count("a", "prepare") == 2
    assert script.count("a", "judge") == 0


@pytest.mark.parametrize("operation", ["judge", "turn"])
def test_out_of_memory_later_is_not_tried_again(script: Script, operation: str) -> None:
    script.plant("a", operation, OUT_OF_MEMORY)
    cells, _ = execute(plan())
    assert cells["a/fwd"].status is Status.OOM
    assert script.count("a", operation) == 1


# ---- lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status.CRASHED, Status.TIMEOUT])
def test_a_worker_lost_in_preparation_is_tried_again_once_alone(script: Script, status: Status) -> None:
    loss = WorkerLost(status, "planted loss", "its stderr")
    script.plant("a", "prepare", loss)
    script.plant("b", "prepare", loss, loss)
    cells, _ = execute(plan(impls=("a", "b", "c")))
    assert cells["a/fwd"].status is Status.OK
    assert (cells["b/fwd"].status, cells["b/fwd"].reasons) == (status, ["planted loss"])
    assert cells["b/fwd"].evidence == "its stderr"
    assert [script.count(name, "prepare") for name in "abc"] == [2, 2, 1]


def test_what_a_lost_worker_had_prepared_is_prepared_again_in_the_next(script: Script) -> None:
    script.plant("a", "judge", CRASH)
    cells, _ = execute(plan(directions=("fwd", "bwd")))
    assert cells["a/fwd"].status is Status.CRASHED
    assert cells["a/bwd"].status is Status.OK
    prepared = [asked["pid"] for role, op, asked in script.asked if (role, op) == ("a", "prepare")]
    judged = [asked["pid"] for role, op, asked in script.asked if (role, op) == ("a", "judge")]
    assert len(prepared) == 3
    assert prepared[2] == judged[1] != judged[0]
    assert script.count("b", "prepare") == 2


def test_a_worker_lost_while_timed_costs_that_direction_alone(script: Script) -> None:
    script.plant("a", "turn", None, CRASH)
    cells, group = execute(plan(directions=("fwd", "bwd")))
    assert (cells["a/fwd"].status, cells["a/fwd"].timing) == (Status.CRASHED, None)
    assert cells["a/fwd"].judgement is not None  # judged right before
    assert cells["a/bwd"].status is Status.OK
    assert [sorted(order) for order in group.order["fwd"]] == [["a", "b", REFEREE]] * 2 + [["b", REFEREE]]
    turns = [asked["pid"] for role, op, asked in script.asked if (role, op) == ("a", "turn")]
    prepared = [asked["pid"] for role, op, asked in script.asked if (role, op) == ("a", "prepare")]
    assert turns[2] == prepared[-1] != turns[0]


def test_losses_add_up_to_an_absence_with_the_last_of_them(script: Script) -> None:
    script.plant("a", "judge", *[CRASH] * MOST_LOSSES)
    directions: tuple[Direction, ...] = ("fwd", "bwd", "fwd_bwd")
    crew = started_crew()
    first, _ = GroupRun(plan(directions=directions), crew, conditions(), lambda phase: None).execute()
    second, _ = GroupRun(plan(seqlen_q=9), crew, conditions(), lambda phase: None).execute()
    assert [cell.status for cell in first if cell.impl == "a"] == [Status.CRASHED] * 3
    (cell,) = (cell for cell in second if cell.impl == "a")
    assert cell.status is Status.CRASHED
    assert cell.reasons == [f"not started again after {MOST_LOSSES} losses; last: planted crash"]


# ---- wrong ------------------------------------------------------------------------------------------------


def test_what_is_judged_wrong_is_never_timed(script: Script) -> None:
    script.plant("a", "judge", {"judgement": judgement(ok=False)})
    cells, group = execute(plan())
    assert cells["a/fwd"].status is Status.INCORRECT
    assert cells["a/fwd"].reasons[0].startswith("out[0, 1, 0, 2] is 1.5, the oracle says 1;")
    assert cells["a/fwd"].judgement is not None
    assert script.count("a", "turn") == 0
    assert all("a" not in order for order in group.order["fwd"])


def test_a_timed_call_that_is_wrong_throws_all_its_samples_away(script: Script) -> None:
    script.plant("a", "turn", None, {"judgement": judgement(ok=False)})
    cells, _ = execute(plan())
    assert (cells["a/fwd"].status, cells["a/fwd"].timing) == (Status.INCORRECT, None)
    assert cells["a/fwd"].reasons[0].startswith("a timed call: out[0, 1, 0, 2]")
    assert script.count("a", "turn") == 2
    assert script.count("b", "turn") == 3


@pytest.mark.parametrize("operation", ["judge", "turn"])
def test_an_answer_of_the_wrong_form_is_incorrect_without_figures(script: Script, operation: str) -> None:
    script.plant("a", operation, REFUSED)
    cells, _ = execute(plan())
    assert (cells["a/fwd"].status, cells["a/fwd"].reasons) == (Status.INCORRECT, ["shape"])
    assert cells["a/fwd"].judgement is None


# ---- the referee ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [CRASH, OUT_OF_MEMORY], ids=["lost", "failed"])
def test_without_an_oracle_nothing_is_timed_and_all_say_why(script: Script, loss: Outcome) -> None:
    script.plant("b", "prepare", {"unsupported": ["no"]})
    script.plant(REFEREE, "oracle", loss, loss)
    posed, crew = plan(), started_crew()
    cells, group = GroupRun(posed, crew, conditions(), lambda phase: None).execute()
    assert [cell.status for cell in cells] == [Status.ERROR, Status.UNSUPPORTED]
    assert cells[0].reasons[0].startswith("not judged, so not timed: the oracle failed: planted")
    assert script.order("judge", "turn") == []
    assert (group.oracle_ms, group.order) == (None, {})


@pytest.mark.parametrize("loss", [CRASH, OUT_OF_MEMORY], ids=["lost", "failed"])
def test_an_oracle_that_failed_beside_the_preparations_is_asked_again_alone(
    script: Script, loss: Outcome
) -> None:
    script.plant(REFEREE, "oracle", loss)
    cells, group = execute(plan())
    assert {cell.status for cell in cells.values()} == {Status.OK}
    assert script.count(REFEREE, "oracle") == 2
    assert group.oracle_ms == 1.0


def test_a_round_without_its_ceiling_stays_a_round(script: Script) -> None:
    script.plant(REFEREE, "ceilings", None, CRASH)
    cells, group = execute(plan())
    assert {cell.status for cell in cells.values()} == {Status.OK}
    assert group.ceilings["fwd"].gemm_tflops == [[1.0], [], [1.0]]
    assert len(group.order["fwd"]) == 3


# ---- energy -----------------------------------------------------------------------------------------------


def test_joules_are_counted_after_all_timing_one_at_a_time(script: Script) -> None:
    script.plant("a", "energy", {"energy": {"joules": 8.0, "calls": 4, "seconds": 2.0}})
    cells, group = execute(plan(), energy=True)
    assert (cells["a/fwd"].energy, cells["b/fwd"].energy) == (Energy(8.0, 4, 2.0), None)
    assert script.order("turn", "energy")[-2:] == [("a", "energy"), ("b", "energy")]
    assert cells["b/fwd"].warnings == []  # a card that counts none is no failure
    assert "energy" in group.phases


@pytest.mark.parametrize("loss", [CRASH, OUT_OF_MEMORY], ids=["lost", "failed"])
def test_a_time_stays_where_its_energy_fails_and_says_so(script: Script, loss: Outcome) -> None:
    script.plant("a", "energy", loss)
    cells, _ = execute(plan(directions=("fwd", "bwd")), energy=True)
    status, why = ("CRASHED", "planted crash") if isinstance(loss, WorkerLost) else ("OOM", "planted")
    assert cells["a/fwd"].status is Status.OK
    assert cells["a/fwd"].timing is not None
    assert cells["a/fwd"].warnings == [f"its energy was not counted: {status}: {why}"]
    assert all(cells[name].warnings == [] for name in ("a/bwd", "b/fwd", "b/bwd"))
    assert script.count("a", "energy") == 2  # the other direction's is counted all the same


# ---- others on the device ---------------------------------------------------------------------------------


def test_others_are_looked_for_before_the_first_round_and_after_each(script: Script) -> None:
    seen = iter([[], ["7 short"], [], ["9 long"], ["9 long"], [], [], []])
    _, group = execute(plan(directions=("fwd", "bwd")), foreign=lambda: next(seen))
    assert group.foreign == ["7 short", "9 long"]
    assert next(seen, "all were asked for") == "all were asked for"


@pytest.mark.parametrize(("told", "recorded"), [(None, None), ([], [])])
def test_none_seen_and_nothing_told_are_two_things(
    script: Script, told: list[str] | None, recorded: list[str] | None
) -> None:
    _, group = execute(plan(), foreign=lambda: told)
    assert group.foreign == recorded


# ---- who stays on the device ------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory_mib", "stay"), [(100.0, False), (1000.0, True)])
def test_only_those_that_stay_keep_their_memory_between_turns(
    script: Script, memory_mib: float, stay: bool
) -> None:
    small, large = ({"peak_mib": peak} for peak in (1.0, 99.0))
    script.plant("a", "weigh", small)
    script.plant("b", "weigh", large)
    cells, _ = execute(plan(), memory_mib=memory_mib)
    kept = {role: asked["keep_memory"] for role, op, asked in script.asked if op == "turn"}
    assert kept == {"a": stay, "b": stay}
    assert cells["b/fwd"].memory == Memory(99.0, None, 1.0)


def test_those_that_stay_put_their_inputs_in_place_at_once(script: Script) -> None:
    for heavy in "bd":
        script.plant(heavy, "weigh", {"peak_mib": 99.0})
    execute(plan(impls=("a", "b", "c", "d"), directions=("fwd", "bwd")), memory_mib=130.0)
    timed = [(role, op) for role, op, _ in script.asked if op in ("place", "turn")]
    assert timed[:2] == [("a", "place"), ("c", "place")]
    assert Counter(role for role, op in timed if op == "place") == {"a": 2, "c": 2, "b": 1, "d": 1}
    assert timed.count(("b", "turn")) == 6  # of a backward it takes little, and stays


@pytest.mark.parametrize("changes", [{"memory_mib": None}, {"memory_mib": 1e6, "mode": "cold+graph"}])
def test_nothing_is_put_in_place_ahead_on_a_cpu_or_for_graphs(script: Script, changes: Any) -> None:
    execute(plan(), **changes)
    assert script.order("place") == []


@pytest.mark.parametrize("loss", [OUT_OF_MEMORY, WorkerLost(Status.TIMEOUT, "planted", "")])
def test_what_cannot_be_put_in_place_beside_others_is_tried_again_in_its_turn(
    script: Script, loss: Outcome
) -> None:
    script.plant("a", "place", loss)
    script.plant("b", "place", CRASH)
    cells, _ = execute(plan(impls=("a", "b")), memory_mib=1e6)
    assert cells["a/fwd"].status is Status.OK
    assert cells["b/fwd"].status is Status.CRASHED
    assert script.count("b", "turn") == 0
