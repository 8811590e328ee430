"""Every problem belongs to one family, and a family says what its problems share."""

from __future__ import annotations

import dataclasses

import pytest

from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.harness.publish.families import family_of

PLAIN = Problem(2, 16, 4096, 128, mask=Mask.causal())


@pytest.mark.parametrize(
    "same", [{"seqlen_q": 1024, "seqlen_k": 1024}, {"batch": 7}, {"heads": 32, "kv_heads": 32}]
)
def test_length_batch_and_heads_do_not_matter(same: dict[str, int]) -> None:
    assert family_of(dataclasses.replace(PLAIN, **same)) == family_of(PLAIN)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"direction": "bwd"}, "backward"),
        ({"mask": Mask.full()}, "full"),
        ({"head_dim": 64, "head_dim_v": 64}, "head_dim 64"),
        ({"dtype": "fp16"}, "fp16"),
        ({"seqlen_q": 1}, "decode"),
        ({"seqlen_q": 1000}, "unequal lengths"),
        ({"kv_heads": 4}, "4 heads a kv head"),
        ({"head_dim_v": 64}, "head_dim_v 64"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"layout": "bhsd"}, "bhsd"),
    ],
)
def test_what_matters_makes_another_family_and_is_said(other: dict[str, object], said: str) -> None:
    family = family_of(dataclasses.replace(PLAIN, **other))
    assert family != family_of(PLAIN)
    assert said in family.title
    assert family.key != family_of(PLAIN).key


def test_forward_stands_before_backward_and_full_before_causal() -> None:
    problems = [
        dataclasses.replace(PLAIN, direction=direction, mask=mask)
        for direction in ("bwd", "fwd")
        for mask in (Mask.causal(), Mask.full())
    ]
    ordered = sorted(map(family_of, problems), key=lambda family: family.order)
    assert [(f.direction, f.mask) for f in ordered] == [
        ("fwd", "full"), ("fwd", "causal"), ("bwd", "full"), ("bwd", "causal"),
    ]  # fmt: skip
