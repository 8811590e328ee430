"""Shrinking ends at the smallest case that fails, whatever makes it fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.shrink import shrink
from attnbench.harness.conform.verdict import NOT_ASKED, Finding, Verdict
from attnbench.harness.conform.views import with_views
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem

LARGE = Problem(
    3, 12, 150, 64, kv_heads=4, seqlen_k=200, head_dim_v=32, dtype="fp32", scale=0.3, direction="fwd_bwd",
    mask=Mask.parse("window(17,5)@top_left&blocks(random,32x32,density=0.5,seed=1)"), layout="bhsd",
)  # fmt: skip


def smallest(fails: Callable[[Problem], bool], problem: Problem = LARGE) -> Problem:
    def examine(case: Case) -> Finding:
        failed = fails(case.problem)
        verdict = Verdict.FAIL if failed else Verdict.PASS
        return Finding(case.id, "x", "1", "cpu", verdict, "planted" if failed else "")

    case = Case(problem, "c", "w", inputs="needle", suite="s")
    found, finding = shrink(case, examine(case), examine)
    assert finding.case == found.id
    assert found.inputs == "normal"
    return found.problem


def test_a_case_that_was_not_asked_does_not_fail_alike() -> None:
    case = Case(LARGE, "c", "w", suite="s")
    found = Finding(case.id, "x", "1", "cpu", Verdict.ERROR, "planted")

    def examine(smaller: Case) -> Finding:
        return Finding(
            smaller.id, "x", "1", "cpu", Verdict.ERROR, "its worker does not start", facts=NOT_ASKED
        )

    assert shrink(case, found, examine) == (case, found)


def test_what_always_fails_shrinks_to_one_of_everything() -> None:
    assert smallest(lambda _: True) == Problem(1, 1, 1, 1, dtype="fp32")


@pytest.mark.parametrize(
    ("fails", "kept"),
    [
        (lambda p: p.seqlen_k > 64, {"seqlen_k": 65}),
        (lambda p: p.seqlen_q % 64 == 1 and p.seqlen_q > 64, {"seqlen_q": 65}),
        (lambda p: p.heads != p.kv_heads, {"heads": 2, "kv_heads": 1}),
        (lambda p: p.direction != "fwd", {"direction": "fwd_bwd"}),
        (lambda p: p.head_dim != p.head_dim_v, {"head_dim_v": 32}),
        (lambda p: p.mask.blocks is not None, {"mask": Mask(blocks=LARGE.mask.blocks)}),
        (lambda p: (p.mask.left or 0) > 3, {"mask": Mask.window(4, 0)}),
        (lambda p: p.seqlen_q > p.seqlen_k + 2, {"seqlen_q": 4}),
    ],
)  # fmt: skip
def test_what_it_takes_to_fail_is_kept(fails: Callable[[Problem], bool], kept: dict[str, object]) -> None:
    start = next(problem for problem in (LARGE, dataclasses.replace(LARGE, seqlen_q=257)) if fails(problem))
    found = smallest(fails, start)
    assert {name: getattr(found, name) for name in kept} == kept
    assert fails(found)


def test_a_named_view_is_laid_anew_for_the_smaller_sizes() -> None:
    start = with_views(dataclasses.replace(LARGE, layout="bshd"), "k=transposed,v=sliced")
    found = smallest(lambda p: "k" in dict(p.strides) and p.seqlen_k > 2, start)
    assert found == with_views(Problem(1, 1, 1, 1, seqlen_k=3, dtype="fp32"), "k=transposed")


@given(least=st.tuples(*(st.integers(1, n) for n in (3, 4, 150, 200, 32))))
def test_a_threshold_in_every_size_is_found_exactly(least: tuple[int, ...]) -> None:
    batch, kv_heads, seqlen_q, seqlen_k, head_dim = least

    def fails(p: Problem) -> bool:
        sizes = (p.batch, p.kv_heads, p.seqlen_q, p.seqlen_k, p.head_dim)
        return all(size >= wanted for size, wanted in zip(sizes, least, strict=True))

    found = smallest(fails, dataclasses.replace(LARGE, head_dim_v=64))
    assert found == Problem(batch, kv_heads, seqlen_q, head_dim, seqlen_k=seqlen_k, dtype="fp32")
