"""Plans: nothing is dropped but by the user's filters, and every filter that finds nothing says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.run.errors import Exit
from attnbench.harness.run.plan import Filters, GroupPlan, PlanError, make_plan, merge_plans, select_impls
from attnbench.harness.run.suite import Suite, parse_suite

SUITE = parse_suite(
    """
name = "mine"
why = "a test"
[[case]]
name = "long"
why = "first in the file"
batch = 1
heads = 2
head_dim = [64, 128]
seqlen = ["4k", "1k"]
dtype = "bf16"
mask = ["full", "causal"]
direction = ["bwd", "fwd"]
[[case]]
name = "short"
why = "last in the file"
batch = 1
heads = 2
head_dim = 64
seqlen_q = 1
seqlen_k = 512
dtype = "fp16"
dropout_p = 0.1
inputs = "needle"
""",
    "mine.toml",
)
IMPLS = ["sdpa-math", "sdpa-flash", "standard"]


def plan(suite: Suite = SUITE, seed: int = 0, **filters: object) -> list[GroupPlan]:
    return make_plan(suite, IMPLS, seed=seed, only_filters=Filters(**filters))  # type: ignore[arg-type]


def test_every_problem_meets_every_implementation() -> None:
    cells = [cell for group in plan() for cell in group.cells]
    assert sorted(cells) == sorted(f"{impl}/{case.problem.key}" for impl in IMPLS for case in SUITE.cases)


def test_a_group_is_one_problem_in_all_its_directions() -> None:
    for group in plan():
        assert {problem.group_key for problem in group.problems} == {group.group}
    assert [[p.direction for p in group.problems] for group in plan()] == [["fwd"], *[["fwd", "bwd"]] * 8]


def test_a_group_carries_its_case_and_comes_short_before_long() -> None:
    groups = plan()
    assert [group.longest for group in groups] == [512, *[1024] * 4, *[4096] * 4]
    assert (groups[0].case, groups[0].why, groups[0].inputs) == ("short", "last in the file", "needle")
    assert (groups[1].suite, groups[1].case, groups[1].inputs) == ("mine", "long", "normal")
    assert groups[0].problems[0].dropout_p == 0.1


def test_a_group_is_a_json_document() -> None:
    for group in plan():
        assert GroupPlan.from_json(json.loads(json.dumps(group.to_json()))) == group


@pytest.mark.parametrize("field", ["suite", "problems", "impls", "seed"])
def test_a_torn_group_is_named(field: str) -> None:
    data = plan()[0].to_json()
    del data[field]
    with pytest.raises(PlanError, match=f"malformed group in a plan.*{field}"):
        GroupPlan.from_json(data)


def test_seeds_differ_between_groups_and_not_between_runs() -> None:
    seeds = {group.group: group.seed for group in plan()}
    assert len(set(seeds.values())) == len(seeds)
    assert {group.group: group.seed for group in plan(seqlens=(1024,))}.items() <= seeds.items()
    assert not {group.seed for group in plan(seed=1)} & set(seeds.values())


@given(
    dtypes=st.sets(st.sampled_from(["bf16", "fp16"])),
    seqlens=st.sets(st.sampled_from([512, 1024, 4096])),
    head_dims=st.sets(st.sampled_from([64, 128])),
    causal=st.sampled_from([None, True, False]),
    directions=st.sets(st.sampled_from(["fwd", "bwd"])),
)
def test_filters_keep_exactly_what_they_name(
    dtypes: set[str], seqlens: set[int], head_dims: set[int], causal: bool | None, directions: set[str]
) -> None:
    expected = {
        case.problem.key
        for case in SUITE.cases
        if (not dtypes or case.problem.dtype in dtypes)
        and (not seqlens or case.problem.seqlen_k in seqlens)
        and (not head_dims or case.problem.head_dim in head_dims)
        and (causal is None or (case.problem.mask.label == "causal") == causal)
        and (not directions or case.problem.direction in directions)
    }
    filters = Filters(tuple(dtypes), tuple(seqlens), tuple(head_dims), causal, tuple(directions))
    if expected:
        planned = make_plan(SUITE, IMPLS, seed=0, only_filters=filters)
        assert {problem.key for group in planned for problem in group.problems} == expected
    else:
        with pytest.raises(PlanError, match=r"--\w+ .* leaves nothing of suite mine"):
            make_plan(SUITE, IMPLS, seed=0, only_filters=filters)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"dtypes": ("fp32",)}, "--dtype fp32: suite mine has no such case; it has bf16, fp16"),
        ({"seqlens": (1024, 2048)}, "--seqlen 2k: suite mine has no such case; it has 4k, 1k, 512"),
        ({"head_dims": (96,)}, "--headdim 96: suite mine has no such case; it has 64, 128"),
        ({"directions": ("fwd_bwd",)}, "--mode fwd_bwd: suite mine has no such case; it has bwd, fwd"),
        ({"dtypes": ("fp16",), "causal": True},
         "--causal true leaves nothing of suite mine; other filters leave false"),
    ],
)  # fmt: skip
def test_a_filter_that_finds_nothing_says_which_and_what_there_is(
    filters: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(**filters)
    assert str(caught.value) == message
    assert caught.value.exit_code == Exit.USAGE


def test_no_implementation_is_no_plan() -> None:
    with pytest.raises(PlanError, match="no implementation is left"):
        make_plan(SUITE, [], seed=0)


@pytest.mark.parametrize(
    ("only", "skip", "chosen"),
    [
        ([], [], ("sdpa-math", "sdpa-flash", "standard")),
        (["standard", "sdpa-math"], [], ("standard", "sdpa-math")),
        (["sdpa-*"], [], ("sdpa-math", "sdpa-flash")),
        (["sdpa-*", "sdpa-flash"], ["*-math"], ("sdpa-flash",)),
        ([], ["sdpa-*"], ("standard",)),
    ],
)
def test_implementations_are_chosen_by_name_and_glob(
    only: list[str], skip: list[str], chosen: tuple[str, ...]
) -> None:
    assert select_impls(IMPLS, only, skip) == chosen


@pytest.mark.parametrize(
    ("only", "skip", "message"),
    [
        (["sdpa-mth"], [], "--only: unknown implementation 'sdpa-mth'; did you mean sdpa-math"),
        ([], ["standart"], "--skip: unknown implementation 'standart'; did you mean standard"),
        (["x*"], [], "--only: unknown implementation 'x*'; known: sdpa-math, sdpa-flash, standard"),
        (["standard"], ["standard"], "--skip standard leaves no implementation"),
    ],
)
def test_a_choice_that_names_nothing_is_refused(only: list[str], skip: list[str], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        select_impls(IMPLS, only, skip)
    assert message in str(caught.value)


def test_merging_adds_what_is_new_and_leaves_the_rest() -> None:
    recorded = plan(seqlens=(4096,))
    merged = merge_plans(recorded, plan())
    assert merged[: len(recorded)] == recorded
    assert sorted(group.group for group in merged) == sorted(group.group for group in plan())
    assert merge_plans(plan(), recorded) == plan()


def test_merging_refuses_cells_that_would_join_a_planned_group() -> None:
    recorded = plan(directions=("fwd",))
    with pytest.raises(PlanError, match="_bwd would join a group"):
        merge_plans(recorded, plan())


def test_merging_refuses_fewer_cells_of_a_planned_group() -> None:
    """Left as recorded in silence, all of them would be measured though few were asked for."""
    fewer_impls = [dataclasses.replace(group, impls=group.impls[:1]) for group in plan()]
    for fewer in (fewer_impls, plan(directions=("fwd",))):
        narrowed = next(group for group in fewer if group.longest == 4096)
        with pytest.raises(PlanError) as caught:
            merge_plans(plan(), [narrowed])
        assert f"{narrowed.group} is planned already" in str(caught.value)
        assert f"6 cells, not {len(narrowed.cells)}; --resume alone goes on" in str(caught.value)
