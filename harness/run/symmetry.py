"""Changes of attention's inputs whose effect on its answer is known, so that every timed call has inputs of its own.

An implementation that keeps what it computed, by address, by version counter or by a hash of contents, is fast without
attending, and right for as long as the same inputs come back. So they never do. With S and T random signs over the two
head dims, R over the query rows, and a random shift of batches or of key heads (query heads in whole groups):

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
from collections import deque
from dataclasses import dataclass

import torch

from attnbench.harness.oracle.inputs import Inputs
from attnbench.harness.oracle.judge import Oracle
from attnbench.harness.problem import Problem

PLANES = (0, 2)
"""Dimensions of BSHD that number the planes: batch and head."""


@dataclass(frozen=True)
class Symmetry:
    """One change, or several that were made one after the other. s (D,), t (Dv,) and r (Sq, 1, 1) hold 1 and -1, in the
    problem's dtype. shift: of batches and of key heads; group: query heads to a key head.
    """

    s: torch.Tensor
    t: torch.Tensor
    r: torch.Tensor
    shift: tuple[int, int]
    group: int

    @torch.no_grad()
    def change(self, inputs: Inputs, *, dout_alone: bool = False) -> None:
        """Changes the inputs where they lie; dout alone, of a ``bwd`` call, by R alone."""
        if dout_alone:
            assert inputs.dout is not None, "no dout to change"
            _change(inputs.dout, self.r, (0, 0))
            return
        _change(inputs.q, self.s, self._shift(self.group))
        _change(inputs.k, self.s, self.shift)
        _change(inputs.v, self.t, self.shift)
        if inputs.dout is not None:
            _change(inputs.dout, self.t * self.r, self._shift(self.group))

    def expected(self, oracle: Oracle) -> Oracle:
        """What the changed inputs must answer, of what the oracle says of the drawn ones: out and dq alone."""
        found = {}
        for name, sign in (("out", self.t), ("dq", self.s * self.r[oracle.rows.to(self.r.device)])):
            if (drawn := oracle.tensors.get(name)) is not None:
                moved = drawn.roll(self._shift(self.group), PLANES)
                found[name] = moved * sign.to(moved.device, moved.dtype)
        return dataclasses.replace(oracle, tensors=found)

    def _shift(self, group: int) -> tuple[int, int]:
        return self.shift[0], self.shift[1] * group


def _change(x: torch.Tensor, signs: torch.Tensor, shift: tuple[int, int]) -> None:
    """``x.roll(shift, PLANES) * signs`` into x; as with any other write, x counts as another version."""
    # Through a copy where planes move, and in slices: torch.roll finds the source of each element by divisions, in a
    # pass of its own for each dimension.
    moved = [(plane, by % x.shape[plane]) for plane, by in zip(PLANES, shift, strict=True) if x.numel()]
    *first, last = [move for move in moved if move[1]] or [(0, 0)]
    for plane, by in first:
        _shift_planes(x, 1, plane, by)
    _shift_planes(x, signs, *last)


def _shift_planes(x: torch.Tensor, signs: torch.Tensor | int, plane: int, by: int) -> None:
    if not by:
        torch.mul(x, signs, out=x)
        return
    before, rest = x.clone(), x.shape[plane] - by
    torch.mul(before.narrow(plane, 0, rest), signs, out=x.narrow(plane, by, rest))
    torch.mul(before.narrow(plane, rest, by), signs, out=x.narrow(plane, 0, by))


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
        self._coming: deque[tuple[Symmetry, Symmetry]] = deque()  # a change, and what all come to with it
        self.renew()

    def draw(self, count: int) -> None:
        """Has the next ``count`` changes drawn: what is left of each is its few writes, which are soon queued while a
        stream is held.
        """
        missing = count - len(self._coming)
        if missing <= 0:
            return
        so_far = self._coming[-1][1] if self._coming else self.symmetry
        shape, device = (missing, self._count), self.inputs.q.device
        drawn = torch.randint(0, 2, shape, generator=self._generator, device=device)
        signs = (2 * drawn - 1).to(self.inputs.q.dtype)
        if self._problem.direction == "bwd":
            signs[:, : self._problem.head_dim + self._problem.head_dim_v] = 1
        totals = torch.cat([so_far.s, so_far.t, so_far.r.flatten()]) * signs.cumprod(0, dtype=signs.dtype)
        shift = so_far.shift
        for step, total in zip(signs, totals, strict=True):
            by = self._draw_shift()
            shift = shift[0] + by[0], shift[1] + by[1]
            self._coming.append((self._of(step, by), self._of(total, shift)))

    def renew(self) -> None:
        """Changes the inputs into such as no call has had, and so every row of the answer."""
        self.draw(1)
        step, total = self._coming.popleft()
        step.change(self.inputs, dout_alone=self._problem.direction == "bwd")
        self.symmetry = total

    @property
    def _count(self) -> int:
        return self._problem.head_dim + self._problem.head_dim_v + self._problem.seqlen_q

    def _of(self, signs: torch.Tensor, shift: tuple[int, int]) -> Symmetry:
        problem = self._problem
        s, t, r = signs.split([problem.head_dim, problem.head_dim_v, problem.seqlen_q])
        return Symmetry(s, t, r[:, None, None], shift, problem.heads // problem.kv_heads)

    def _draw_shift(self) -> tuple[int, int]:
        """Of batches or of key heads, where there are several: no plane stays in its place. Heads stay where each has a
        mask of its own, and all planes in a ``bwd`` call.
        """
        blocks = self._problem.mask.blocks
        sizes = self._problem.batch, 1 if blocks and blocks.per_head else self._problem.kv_heads
        movable = [dim for dim, size in enumerate(sizes) if size > 1 and self._problem.direction != "bwd"]
        if not movable:
            return 0, 0
        moved = self._random.choice(movable)
        by = self._random.randrange(1, sizes[moved])
        return (by, 0) if moved == 0 else (0, by)
