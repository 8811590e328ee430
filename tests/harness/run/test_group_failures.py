"""What becomes of a cell at every point where its group can fail."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from attnbench.harness.problem import Direction
from attnbench.harness.run.ahead import Ahead
from attnbench.harness.run.crew import MOST_LOSSES
from attnbench.harness.run.draft import OWN_MASK
from attnbench.harness.run.group import GroupRun
from attnbench.harness.run.process import REFEREE, WorkerLost
from attnbench.harness.run.record import Status

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_crew.py"))
CRASH = SCRIPTED["CRASH"]
OUT_OF_MEMORY = SCRIPTED["OUT_OF_MEMORY"]
REFUSED = SCRIPTED["REFUSED"]
Outcome = SCRIPTED["Outcome"]
Script = SCRIPTED["Script"]
conditions = SCRIPTED["conditions"]
execute = SCRIPTED["execute"]
judgement = SCRIPTED["judgement"]
plan = SCRIPTED["plan"]
script = SCRIPTED["script"]
started_crew = SCRIPTED["started_crew"]


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
