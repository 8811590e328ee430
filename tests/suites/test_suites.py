"""The built-in suites: sound on the devices they are for, and holding what they are there to hold."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from attnbench.harness.run.plan import Filters, make_plan
from attnbench.harness.run.suite import DEVICES, Suite, load_suite, read_suite, suite_names

K = 1024


def lengths(suite: Suite) -> set[int]:
    return {max(case.problem.seqlen_q, case.problem.seqlen_k) for case in suite.cases}


def test_the_ten_suites_are_there() -> None:
    names = [
        "block-sparse",
        "decode",
        "dropout",
        "energy",
        "fa1-paper",
        "gqa",
        "long-seq",
        "memory",
        "paper",
        "smoke",
    ]
    assert suite_names() == names


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_says_why_and_plans_its_groups_shortest_first(name: str) -> None:
    suite = read_suite(name)
    assert suite.name == name
    assert all(len(text.split()) >= 8 for text in (suite.why, *(case.why for case in suite.cases)))
    for kind in DEVICES:
        if not (cases := suite.on(kind)):
            continue
        plans = make_plan(load_suite(name, kind), ["a"], seed=0)
        assert sum(len(plan.problems) for plan in plans) == len(cases)
        assert len({plan.group for plan in plans}) == len(plans)
        longest = [plan.longest for plan in plans]
        assert longest == sorted(longest)


@pytest.mark.parametrize("kind", DEVICES)
def test_smoke_holds_each_feature_once_and_little(kind: str) -> None:
    suite = load_suite("smoke", kind)
    problems = [case.problem for case in suite.cases]
    assert len(make_plan(suite, ["a"], seed=0)) <= 6
    assert {p.dtype for p in problems} == {"fp32" if kind == "cpu" else "bf16"}
    assert {p.mask.label for p in problems} == {"full", "causal"}
    assert {p.direction for p in problems} == {"fwd", "bwd"}
    assert any(p.kv_heads < p.heads for p in problems)
    assert any(p.seqlen_q < p.seqlen_k for p in problems)
    assert max(p.seqlen_k for p in problems) <= (512 if kind == "cpu" else 2 * K)


def test_block_sparse_poses_each_density_beside_the_dense_shape() -> None:
    problems = [case.problem for case in load_suite("block-sparse", "cuda").cases]
    shapes = {(p.head_dim, p.direction) for p in problems}
    assert len(shapes) == 4
    for head_dim, direction in shapes:
        masks = [p.mask for p in problems if (p.head_dim, p.direction) == (head_dim, direction)]
        found = {(mask.blocks.name, mask.blocks.density) if mask.blocks else "dense" for mask in masks}
        assert found == {"dense", ("butterfly", 0.25), *(("random", density) for density in (0.5, 0.25, 0.1))}


def test_dropout_poses_every_shape_with_and_without_it() -> None:
    problems = [case.problem for case in load_suite("dropout", "cuda").cases]
    without = {dataclasses.replace(p, dropout_p=0.0).key for p in problems if p.dropout_p == 0.1}
    assert without == {p.key for p in problems if p.dropout_p == 0}


def test_long_seq_holds_16k_tokens_then_one_sequence() -> None:
    suite = load_suite("long-seq", "cuda")
    problems = [case.problem for case in suite.cases]
    assert lengths(suite) == {K << n for n in range(8)}
    assert {p.head_dim for p in problems} == {64, 128, 256}
    assert all(p.heads * p.head_dim == 2048 and p.dtype == "bf16" for p in problems)
    assert all(p.batch == max(1, 16 * K // p.seqlen_q) for p in problems)
    assert len(problems) == 8 * 3 * 2 * 2


def test_long_seq_is_narrowed_by_the_lengths_that_users_type() -> None:
    kept = make_plan(
        load_suite("long-seq", "cuda"), ["a"], seed=0, only_filters=Filters(seqlens=(64 * K, 128 * K))
    )
    assert len(kept) == 2 * 3 * 2


def test_paper_holds_16k_tokens_and_hidden_2048_throughout() -> None:
    problems = [case.problem for case in load_suite("paper", "cuda").cases]
    assert {p.seqlen_q for p in problems} == {512 << n for n in range(6)}
    assert all(p.batch * p.seqlen_q == 16 * K and p.heads * p.head_dim == 2048 for p in problems)


def test_fa1_paper_poses_the_papers_tables_and_asks_for_approximations() -> None:
    suite = load_suite("fa1-paper", "cuda")
    problems = [case.problem for case in suite.cases]
    assert {(p.batch, p.heads, p.head_dim, p.dtype) for p in problems} == {(16, 8, 64, "fp16")}
    assert lengths(suite) == {128 << n for n in range(10)}
    assert {p.direction for p in problems} == {"fwd", "bwd", "fwd_bwd"}
    assert {p.dropout_p for p in problems} == {0.0, 0.1}
    assert [name for name in suite_names() if read_suite(name).approximations] == ["fa1-paper"]


def test_memory_doubles_the_length_with_all_else_fixed() -> None:
    for kind in DEVICES:
        problems = [case.problem for case in load_suite("memory", kind).cases]
        assert {(p.batch, p.direction) for p in problems} == {(1, "fwd_bwd")}
        longest = sorted({p.seqlen_q for p in problems})
        assert all(after == 2 * before for before, after in itertools.pairwise(longest))


def test_gqa_goes_from_equal_heads_to_one() -> None:
    groups = {case.problem.heads // case.problem.kv_heads for case in load_suite("gqa", "cuda").cases}
    assert {1, 32, 7} <= groups


def test_decode_has_few_queries_against_many_keys() -> None:
    problems = [case.problem for case in load_suite("decode", "cuda").cases]
    assert {p.seqlen_q for p in problems} == {1, 4, 16}
    assert {min(p.seqlen_k for p in problems), max(p.seqlen_k for p in problems)} == {K, 128 * K}
    assert {p.direction for p in problems} == {"fwd"}
