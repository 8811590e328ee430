"""Changes of attention's inputs whose effect on its answer is known, so that every timed call has inputs of its own.

An implementation that keeps what it computed, by address, by version counter or by a hash of contents, is fast without
attending, and right for as long as the same inputs come back. So they never do. With S and T random signs over the two
head dims, R over the query rows, and a random shift of batches and of key heads (query heads in whole groups):

    q S, k S          leaves the scores as they are       dq S, dk S
    v T, dout T       leaves dO V^T as it is              out T, dv T
    R dout            multiplies the rows of dS           R dq
    shifted planes    exchanges whole problems            the same shift of every result

A change of sign is exact in floating point. One reference of the inputs as they were drawn therefore judges them all,
by the same budgets; but not dK and dV, whose every element sums over all rows of R dout. The scores of a plane are not
changed but exchanged for another's, so one that has a single plane would not see remembered scores.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch

from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.problem import Problem

PLANES = (0, 2)
"""Dimensions of BSHD that number the planes: batch and head."""


@dataclass(frozen=True)
class Symmetry:
    """One change. s (D,), t (Dv,) and r (Sq, 1, 1) hold 1 and -1, in the problem's dtype. shift: of batches and of key
    heads; group: query heads to a key head.
    """

    s: torch.Tensor
    t: torch.Tensor
    r: torch.Tensor
    shift: tuple[int, int]
    group: int

    def then(self, other: Symmetry) -> Symmetry:
        """The change that both make, one after the other; they commute."""
        shift = self.shift[0] + other.shift[0], self.shift[1] + other.shift[1]
        return Symmetry(self.s * other.s, self.t * other.t, self.r * other.r, shift, self.group)

    @torch.no_grad()
    def change(self, inputs: Inputs, *, dout_alone: bool = False) -> None:
        """Changes the inputs where they lie."""
        if not dout_alone:
            self._change(inputs.q, self.s, self.group)
            self._change(inputs.k, self.s, 1)
            self._change(inputs.v, self.t, 1)
        if inputs.dout is not None:
            self._change(inputs.dout, self.t * self.r, self.group)

    def expected(self, oracle: Oracle) -> Oracle:
        """What the changed inputs must answer, of what the oracle says of the drawn ones: out and dq alone."""
        found = {}
        for name, sign in (("out", self.t), ("dq", self.s * self.r[oracle.rows.to(self.r.device)])):
            if (drawn := oracle.tensors.get(name)) is not None:
                moved = drawn.roll(self._shift(self.group), PLANES)
                found[name] = moved * sign.to(moved.device, moved.dtype)
        return dataclasses.replace(oracle, tensors=found)

    def _change(self, x: torch.Tensor, signs: torch.Tensor, group: int) -> None:
        # Through a copy only where planes move, one for each dimension in which they do; with out=, as with any other
        # write, x counts as another version.
        moved = [(by, plane) for by, plane in zip(self._shift(group), PLANES, strict=True) if by]
        torch.mul(x.roll(*zip(*moved, strict=True)) if moved else x, signs, out=x)

    def _shift(self, group: int) -> tuple[int, int]:
        return self.shift[0], self.shift[1] * group


class Renewed:
    """A set of inputs that is changed again and again, and what the changes since it was drawn come to.

    A ``bwd`` call goes back over a graph that holds q, k and v as they were: dout alone is changed, by R.
    """

    def __init__(self, problem: Problem, inputs: Inputs, seed: int) -> None:
        self.inputs = inputs
        device = inputs.q.device
        self._problem = problem
        self._random = random.Random(seed)
        self._generator = torch.Generator(device).manual_seed(seed)
        self.symmetry = self._of(torch.ones(self._count, dtype=inputs.q.dtype, device=device), (0, 0))
        self.renew()

    def renew(self) -> None:
        """Changes the inputs into such as no call has had, and so every row of the answer."""
        device, dtype = self.inputs.q.device, self.inputs.q.dtype
        drawn = torch.randint(0, 2, (self._count,), generator=self._generator, device=device)
        step = self._of((2 * drawn - 1).to(dtype), self._draw_shift())
        backward_alone = self._problem.direction == "bwd"
        if backward_alone:
            step = dataclasses.replace(step, s=step.s.abs(), t=step.t.abs(), shift=(0, 0))
        step.change(self.inputs, dout_alone=backward_alone)
        self.symmetry = self.symmetry.then(step)

    @property
    def _count(self) -> int:
        return self._problem.head_dim + self._problem.head_dim_v + self._problem.seqlen_q

    def _of(self, signs: torch.Tensor, shift: tuple[int, int]) -> Symmetry:
        problem = self._problem
        s, t, r = signs.split([problem.head_dim, problem.head_dim_v, problem.seqlen_q])
        return Symmetry(s, t, r[:, None, None], shift, problem.heads // problem.kv_heads)

    def _draw_shift(self) -> tuple[int, int]:
        """Heads stay where each has a mask of its own."""
        blocks = self._problem.mask.blocks
        heads = 1 if blocks and blocks.per_head else self._problem.kv_heads
        return self._random.randrange(max(self._problem.batch, 1)), self._random.randrange(heads)
