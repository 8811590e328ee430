"""Changed inputs: one reference answers all of them, no call meets the same ones twice, and the answer shows it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from attnbench.harness.masks import Mask
from attnbench.harness.oracle.inputs import Inputs, make_inputs
from attnbench.harness.oracle.judge import Oracle, build
from attnbench.harness.oracle.reference import probe_rows
from attnbench.harness.problem import DIRECTIONS, Direction, Problem
from attnbench.harness.run.symmetry import Renewed

CPU = torch.device("cpu")
PER_HEAD = "blocks(random,8x8,density=0.5,seed=1,per_head=1)"
PROBLEMS = {
    "plain": Problem(1, 2, 40, 16, dtype="fp32"),
    "one-plane": Problem(2, 1, 40, 8, dtype="fp64", mask=Mask.causal()),
    "grouped": Problem(2, 6, 33, 16, kv_heads=3, dtype="fp32", mask=Mask.causal()),
    "unequal": Problem(3, 2, 20, 16, seqlen_k=50, head_dim_v=8, dtype="bf16", mask=Mask.parse("window(7,3)")),
    "packed": Problem(2, 4, 24, 8, kv_heads=2, dtype="fp16", layout="packed"),
    "bhsd": Problem(2, 2, 24, 8, dtype="fp32", layout="bhsd"),
    "per-head": Problem(2, 4, 32, 8, dtype="fp32", mask=Mask.parse(PER_HEAD)),
}


def drawn(problem: Problem) -> Inputs:
    return make_inputs(problem, 3, CPU, dout=problem.direction != "fwd")


def oracle(problem: Problem, inputs: Inputs) -> Oracle:
    rows = probe_rows(problem, 12)
    return build(problem, inputs, 3, rows, problem.direction != "fwd", columns=False)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_reference_answers_all_of_them(name: str, direction: Direction) -> None:
    problem = PROBLEMS[name].with_direction(direction)
    of_drawn = oracle(problem, drawn(problem))
    renewed = Renewed(problem, drawn(problem), seed=1)
    renewed.draw(2)  # ahead; the third when it is needed
    for _ in range(3):
        renewed.renew()
        expected, got = renewed.symmetry.expected(of_drawn), oracle(problem, renewed.inputs)
        for result in ("out",) if direction == "fwd" else ("out", "dq"):
            want = expected.tensors[result]
            torch.testing.assert_close(got.tensors[result], want, rtol=1e-6, atol=1e-7)
            moved = ~torch.isclose(want, of_drawn.tensors[result], rtol=1e-3, atol=0)
            assert moved.float().mean() > 0.1 or (direction, result) == ("bwd", "out")


def test_all_changes_at_once_are_those_one_after_the_other() -> None:
    problem = PROBLEMS["grouped"].with_direction("fwd_bwd")
    renewed, anew = Renewed(problem, drawn(problem), seed=1), drawn(problem)
    shift = (0, 0)
    while not (shift[0] % problem.batch and shift[1] % problem.kv_heads):
        renewed.renew()
        shift = renewed.symmetry.shift
    renewed.symmetry.change(anew)
    for tensor in dataclasses.fields(Inputs):
        assert torch.equal(getattr(anew, tensor.name), getattr(renewed.inputs, tensor.name))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_comes_twice_and_every_write_is_a_new_version(direction: Direction) -> None:
    problem = PROBLEMS["plain"].with_direction(direction)
    renewed = Renewed(problem, drawn(problem), seed=1)
    changing = ("dout",) if direction == "bwd" else ("q", "k", "v")
    seen = set()
    for _ in range(50):
        renewed.renew()
        tensors = [getattr(renewed.inputs, name) for name in changing]
        seen.add(tuple((tensor._version, tensor.numpy().tobytes()) for tensor in tensors))
    for part in range(len(changing)):
        assert len({entry[part][0] for entry in seen}) == 50
        assert len({entry[part][1] for entry in seen}) == 50


def test_scores_of_a_plane_change_with_it() -> None:
    problem = PROBLEMS["plain"]
    renewed, before = Renewed(problem, drawn(problem), seed=1), drawn(problem)
    kept = 0
    for _ in range(32):
        renewed.renew()
        here, there = (torch.einsum("bihd,bjhd->bhij", x.q, x.k) for x in (renewed.inputs, before))
        kept += torch.allclose(here, there, atol=1e-5)
    assert kept == 16  # two planes, exchanged each time: every other time each is back


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "per-head"])
def test_no_plane_stays_in_its_place(name: str) -> None:
    problem = PROBLEMS[name]
    renewed = Renewed(problem, drawn(problem), seed=1)
    for _ in range(8):
        before = renewed.inputs.q.clone()
        renewed.renew()
        for batch in range(problem.batch):
            for head in range(problem.heads):
                here, there = renewed.inputs.q[batch, :, head].abs(), before[batch, :, head].abs()
                assert not torch.equal(here, there)


def test_changes_drawn_ahead_are_others_and_are_made_in_their_order() -> None:
    problem = PROBLEMS["grouped"]
    renewed = Renewed(problem, drawn(problem), seed=1)
    renewed.draw(3)
    coming = [total for _, total in renewed._coming]
    renewed.draw(2)  # are there already
    for total in coming:
        renewed.renew()
        assert renewed.symmetry is total
    assert len({tuple(total.s.tolist() + total.r.flatten().tolist()) for total in coming}) == 3


def test_a_backward_s_graph_keeps_what_it_saved() -> None:
    problem = PROBLEMS["plain"].with_direction("bwd")
    inputs = drawn(problem)
    renewed, before = Renewed(problem, inputs, seed=1), drawn(problem)
    renewed.renew()
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(inputs, name), getattr(before, name))
    assert inputs.dout is not None
    assert before.dout is not None
    assert not torch.equal(inputs.dout, before.dout)
    assert torch.equal(inputs.dout.abs(), before.dout.abs())


def test_magnitudes_stay_as_they_were_drawn() -> None:
    problem = PROBLEMS["unequal"].with_direction("fwd_bwd")
    inputs, before = drawn(problem), drawn(problem)
    Renewed(problem, inputs, seed=1)
    for tensor in dataclasses.fields(Inputs):
        now, then = (getattr(x, tensor.name).abs().flatten().sort().values for x in (inputs, before))
        assert torch.equal(now, then)
    assert math.isfinite(float(inputs.q.float().sum()))


@pytest.mark.parametrize("problem", [Problem(0, 2, 8, 8, dtype="fp32"), Problem(1, 2, 0, 8, dtype="fp32")])
def test_inputs_without_an_element_are_renewed_too(problem: Problem) -> None:
    Renewed(problem, drawn(problem), seed=1).renew()
