"""How much of a question is answered: what all workers can read in no time, and all of it where that is little."""

from __future__ import annotations

import pytest

from attnbench.harness.conform.referee import MOST_BYTES, _most_pairs
from attnbench.harness.conform.suite import select
from attnbench.harness.oracle.reference import judged_rows
from attnbench.harness.problem import Problem
from attnbench.harness.run.referee import MOST_PAIRS

PAST_2_31 = next(case for case in select(["scale"], "cuda", only=["past-2-31-elements["])).problem


@pytest.mark.parametrize("backward", [False, True])
def test_an_oracle_past_2_31_elements_is_a_sample_of_rows(backward: bool) -> None:
    whole = judged_rows(PAST_2_31, MOST_PAIRS["cuda"])
    rows = judged_rows(PAST_2_31, min(MOST_PAIRS["cuda"], _most_pairs(PAST_2_31, backward)))
    row_bytes = PAST_2_31.batch * PAST_2_31.heads * PAST_2_31.head_dim * 4 * (2 if backward else 1)
    assert len(rows) * row_bytes <= MOST_BYTES < len(whole) * row_bytes
    assert len(rows) >= 16
    assert (int(rows[0]), int(rows[-1])) == (0, PAST_2_31.seqlen_q - 1)


@pytest.mark.parametrize(
    "problem", [Problem(0, 2, 8, 16), Problem(1, 2, 5, 16, seqlen_k=0), Problem(2, 8, 4096, 128)]
)
def test_what_is_small_or_nothing_is_answered_whole(problem: Problem) -> None:
    assert len(judged_rows(problem, min(MOST_PAIRS["cuda"], _most_pairs(problem, True)))) == problem.seqlen_q
