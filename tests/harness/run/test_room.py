"""What fits on the device at once, reckoned from measured peaks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from attnbench.harness.problem import Direction, Problem
from attnbench.harness.run.draft import Draft
from attnbench.harness.run.plan import GroupPlan
from attnbench.harness.run.record import Memory
from attnbench.harness.run.room import MIB, RESIDENT_SHARE, Room


def plan(impls: Sequence[str] = ("a", "b"), direction: Direction = "fwd", **changes: Any) -> GroupPlan:
    """Three slots of 24 MiB each in the forward."""
    shape = {"batch": 4, "heads": 8, "seqlen_q": 1024, "head_dim": 128} | changes
    problem = Problem(**shape, direction=direction)
    return GroupPlan("s", "c", "w", problem.group_key, (problem,), tuple(impls), "normal", 3)


def drafts(posed: GroupPlan, peaks: Mapping[str, float | None]) -> list[Draft]:
    return [
        Draft(impl, posed.problems[0], memory=None if peak is None else Memory(peak, None, 1.0))
        for impl, peak in peaks.items()
    ]


def room(posed: GroupPlan, holds_mib: float | None, mode: str = "hot") -> Room:
    """Of a device that so much may be held on at once."""
    return Room(posed, None if holds_mib is None else holds_mib / RESIDENT_SHARE, mode)


def kept(posed: GroupPlan) -> float:
    """MiB of the results of one call and of the copy that is taken of them."""
    return 2 * posed.problems[0].minimal_result_bytes / MIB


def inputs(posed: GroupPlan) -> float:
    return posed.problems[0].input_bytes / MIB


# ---- between turns ----------------------------------------------------------------------------------------


def test_on_a_cpu_all_stay() -> None:
    posed = plan()
    assert room(posed, None).resident(drafts(posed, {"a": 1e9, "b": 1e9})) == {"a", "b"}


def test_the_lightest_stay_while_the_heaviest_other_fits_beside_them() -> None:
    posed = plan()
    peaks = {"large": 1000.0, "small": 10.0, "middle": 100.0}
    need = {name: 3 * inputs(posed) + peak + kept(posed) for name, peak in peaks.items()}

    def stay(holds_mib: float) -> set[str]:
        return room(posed, holds_mib).resident(drafts(posed, peaks))

    assert stay(sum(need.values()) + 1) == set(peaks)
    assert stay(sum(need.values()) - 1) == {"small"}  # large and middle take their turns one at a time
    assert stay(need["small"] + need["large"] + 1) == {"small"}
    assert stay(need["small"] + need["large"] - 1) == set()


def test_an_unmeasured_workspace_is_taken_for_eight_times_its_inputs() -> None:
    posed = plan()
    unknown, alone = drafts(posed, {"a": None}), 9 * inputs(posed) + kept(posed)
    assert room(posed, alone + 1).resident(unknown) == {"a"}
    assert room(posed, alone - 1).resident(unknown) == set()


# ---- sets of inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sets", "slots"), [(20.0, 3), (19.0, 2), (2.1, 2), (1.9, 1), (0.5, 1)])
@pytest.mark.parametrize(("direction", "mode"), [("bwd", "hot"), ("fwd", "hot+graph")])
def test_where_each_input_keeps_a_graph_a_heavy_call_rotates_through_fewer(
    sets: float, slots: int, direction: Direction, mode: str
) -> None:
    posed = plan(direction=direction)
    (draft,) = drafts(posed, {"a": 500.0})
    weight = inputs(posed) + 500.0
    assert room(posed, sets * weight + kept(posed), mode).slots(draft) == slots


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
def test_a_call_that_keeps_nothing_has_several_inputs_whatever_its_workspace(direction: Direction) -> None:
    posed = plan(direction=direction)
    (draft,) = drafts(posed, {"a": 5000.0})
    alone = inputs(posed) + kept(posed) + 5000.0
    for count in (1, 2, 3):
        assert room(posed, alone + (count - 1) * inputs(posed) + 1).slots(draft) == count


# ---- judged side by side ----------------------------------------------------------------------------------


def prepared(posed: GroupPlan, peaks: Mapping[str, float | None]) -> list[Draft]:
    made = drafts(posed, peaks)
    for draft in made:
        draft.prepared_by = 1
    return made


def test_as_many_are_judged_at_once_as_fit_with_the_oracle_for_each() -> None:
    posed, peaks = plan(), {"a": 1.0, "b": 90.0, "c": 1.0, "d": 1.0}
    each = 2 * (inputs(posed) + 1.0) + 5.0
    assert room(posed, 2 * each).batches(prepared(posed, peaks), 5.0) == [["a"], ["b"], ["c", "d"]]
    assert room(posed, 2 * each - 1).batches(prepared(posed, peaks), 5.0) == [["a"], ["b"], ["c"], ["d"]]
    assert room(posed, math.inf).batches(prepared(posed, peaks), 5.0) == [["a", "b", "c", "d"]]


def test_on_a_cpu_each_is_judged_apart() -> None:
    posed = plan()
    assert room(posed, None).batches(prepared(posed, {"a": 1.0, "b": 1.0}), 0.0) == [["a"], ["b"]]


def test_apart_is_judged_what_did_not_prepare_and_what_drops_weights() -> None:
    peaks = {"a": 1.0, "b": 1.0}
    unready = prepared(plan(), peaks)
    unready[0].prepared_by = None
    assert room(plan(), 1e6).batches(unready, 0.0) == [["a"], ["b"]]
    dropping = plan(dropout_p=0.1)
    assert room(dropping, 1e6).batches(prepared(dropping, peaks), 0.0) == [["a"], ["b"]]
