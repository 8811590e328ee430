"""Accesses counted while the algorithms run, against their closed forms and against the paper's orders of growth."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.harness.two_level import Accesses, TwoLevelMemory
from attnbench.impls import standard, tiled
from attnbench.impls.algorithms import tiles as tiling

ALGORITHMS = [standard.Standard(), tiled.fa1, tiled.fa2]
by_name = pytest.mark.parametrize("impl", ALGORITHMS, ids=lambda impl: impl.name)


def problem_of(rows: int, head_dim: int, *, keys: int = -1, mask: str = "full", **fields: int) -> Problem:
    fields = {"batch": 1, "heads": 1} | fields
    return Problem(
        seqlen_q=rows, seqlen_k=keys, head_dim=head_dim, dtype="fp64", direction="fwd_bwd", mask=Mask.parse(mask),
        **fields,
    )  # fmt: skip


def tensors(problem: Problem) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def counted(impl, problem: Problem, size: int) -> tuple[list[Accesses], list[Accesses], list[torch.Tensor]]:
    """Counted and predicted (forward, backward), and out, dq, dk, dv."""
    memory = TwoLevelMemory(size)
    modelled = impl.modelled(problem, memory)
    *leaves, dout = tensors(problem)
    leaves = [x.requires_grad_() for x in leaves]
    out = modelled.attend(*leaves)
    forward = memory.moved
    grads = torch.autograd.grad(out, leaves, dout)
    return [forward, memory.moved - forward], [modelled.forward, modelled.backward], [out.detach(), *grads]


@by_name
@given(
    rows=st.integers(1, 70),
    keys=st.integers(1, 70),
    head_dim=st.integers(1, 12),
    head_dim_v=st.integers(1, 12),
    size=st.integers(1, 900),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    batch=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_counts_equal_their_closed_form(impl, rows, keys, head_dim, head_dim_v, size, heads, batch) -> None:
    problem = problem_of(
        rows, head_dim, keys=keys, head_dim_v=head_dim_v, heads=heads[0], kv_heads=heads[1], batch=batch
    )
    found, predicted, _ = counted(impl, problem, max(size, head_dim))
    assert found == predicted


@by_name
@pytest.mark.parametrize("mask", ["full", "causal", "window(9,3)", "causal&blocks(butterfly,8x8)"])
def test_what_is_counted_is_attention(impl, mask: str) -> None:
    """The counted run gives the same answers as the dense one, whatever the blocks are."""
    problem = problem_of(50, 8, keys=61, mask=mask, heads=2)
    size = 4 * 8 * 8  # blocks of 8 rows, as the pattern's
    found, predicted, answers = counted(impl, problem, size)
    assert found == predicted
    q, k, v, dout = tensors(problem)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    visible = problem.mask.dense(torch.arange(50), 2, 50, 61)
    s = torch.einsum("bqhd,bkhd->bhqk", *leaves[:2]) * problem.softmax_scale
    p = s.masked_fill(~visible, -1e30).softmax(-1) * visible.any(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", p, leaves[2])
    right = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for answer, wanted in zip(answers, right, strict=True):
        torch.testing.assert_close(answer, wanted, rtol=1e-11, atol=1e-12)


def test_one_access_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(40, 4)
    assert counted(tiled.fa1, problem, 64)[0] == counted(tiled.fa1, problem, 64)[1]

    def blind(self, where):
        return self._at(where).flatten(2, 3)

    monkeypatch.setattr(tiling.Heads, "__getitem__", blind)
    found, predicted, _ = counted(tiled.fa1, problem, 64)
    assert found[0].reads < predicted[0].reads
    assert found[0].writes == predicted[0].writes


@pytest.mark.parametrize("impl", [tiled.fa1, tiled.fa2], ids=lambda impl: impl.name)
def test_hidden_blocks_are_not_accessed(impl) -> None:
    """Block-sparse FlashAttention: the part that grows with N^2 falls to the share of blocks that is seen."""
    size, dense = 4 * 4 * 16, problem_of(256, 4)
    sparse = dataclasses.replace(dense, mask=Mask.parse("blocks(butterfly,16x16)"))
    share = sparse.visible_pairs / dense.visible_pairs
    for found, of_dense in zip(counted(impl, sparse, size)[0], counted(impl, dense, size)[0], strict=True):
        assert share * of_dense.total < found.total < (share + 0.1) * of_dense.total


@pytest.mark.parametrize(
    ("impl", "of_length", "of_memory"), [(ALGORITHMS[0], 2, 0), (tiled.fa1, 2, -1), (tiled.fa2, 2, -1)],
    ids=["standard", "fa1", "fa2"],
)  # fmt: skip
def test_growth_is_the_papers(impl, of_length: float, of_memory: float) -> None:
    """Exponents of the closed forms, which are the counts, between a size and its double, far from the lower terms."""

    def total(rows: int, size: int) -> int:
        modelled = impl.modelled(problem_of(rows, 16), TwoLevelMemory(size))
        return modelled.forward.total

    length, size = 2**18, 2**15
    assert math.log2(total(2 * length, size) / total(length, size)) == pytest.approx(of_length, abs=0.01)
    assert math.log2(total(length, 2 * size) / total(length, size)) == pytest.approx(of_memory, abs=0.02)


class LargestFast(TorchDispatchMode):
    """The most elements, at one time, of tensors that are not whole matrices in slow memory."""

    def __init__(self, slow_from: int) -> None:
        super().__init__()
        self.slow_from, self.held, self.most = slow_from, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        elements, place = storage.nbytes() // 8, storage._cdata
        if place in self.known or elements >= self.slow_from:
            return
        self.known.add(place)
        self.held += elements
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self.forget, place, elements)

    def forget(self, place: int, elements: int) -> None:
        self.known.discard(place)
        self.held -= elements


@by_name
def test_fast_memory_holds_a_few_blocks_however_long_the_sequence(impl) -> None:
    """Nothing is kept uncounted: beside whole matrices, no more than blocks of M elements is ever held."""
    size = 4 * 4 * 4
    for rows in (32, 128):
        problem = problem_of(rows, 4)
        modelled = impl.modelled(problem, TwoLevelMemory(size))
        *leaves, dout = tensors(problem)
        leaves = [x.requires_grad_() for x in leaves]
        with LargestFast(slow_from=rows) as fast:
            torch.autograd.grad(modelled.attend(*leaves), leaves, dout)
        assert size < fast.most <= 3 * size


def test_a_memory_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TwoLevelMemory(0)


def test_blocks_are_the_papers() -> None:
    """Bc = ceil(M / 4d), Br = min(Bc, d)."""
    assert TwoLevelMemory(4096).block_rows(16) == (64, 16)
    assert TwoLevelMemory(1000).block_rows(64) == (4, 4)


def test_tiles_that_cut_across_a_patterns_blocks_are_refused() -> None:
    problem = problem_of(50, 6, mask="blocks(butterfly,8x8)")
    with pytest.raises(ValueError, match="tiles of 6x8 cut across blocks of 8x8"):
        tiled.fa1.modelled(problem, TwoLevelMemory(4 * 6 * 8))
