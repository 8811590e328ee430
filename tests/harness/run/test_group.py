"""One group: the order of its work, and who shares the device with whom."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attnbench.harness.run import slots
from attnbench.harness.run.ahead import Ahead, FirstCall
from attnbench.harness.run.group import GroupRun
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.record import Energy, Memory, Status
from attnbench.harness.run.room import RESIDENT_SHARE

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_crew.py"))
CRASH = SCRIPTED["CRASH"]
OUT_OF_MEMORY = SCRIPTED["OUT_OF_MEMORY"]
Outcome = SCRIPTED["Outcome"]
Script = SCRIPTED["Script"]
conditions = SCRIPTED["conditions"]
execute = SCRIPTED["execute"]
plan = SCRIPTED["plan"]
script = SCRIPTED["script"]
started_crew = SCRIPTED["started_crew"]


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
