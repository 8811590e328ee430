"""The FlashAttention paper's question, asked of every implementation that can answer: what its algorithm moves.

Each is posed on a modelled two-level memory, its accesses counted while it runs, beside the closed form of the same.
Where running would take long, the closed form stands alone. Exponents of growth come from least squares on logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench.harness import registry
from attnbench.harness.masks import BlockPattern, Mask
from attnbench.harness.problem import DTYPE_BYTES, Direction, Problem
from attnbench.harness.two_level import Accesses, TwoLevelMemory

if TYPE_CHECKING:
    from attnbench.harness.contract import Attend, Implementation

PASSES: tuple[Direction, ...] = ("fwd", "bwd")
AXES = ("seqlen", "head_dim", "memory", "share")
BYTES = 2
"""Of an element, where accesses are made bytes: 16-bit operands, as the kernels compared have."""


@dataclass(frozen=True)
class Point:
    """One pass of one algorithm at one size. share: visible blocks over all. counted: None where it was not run.
    minimum: elements that must move whatever the algorithm: operands once, results once."""

    impl: str
    direction: Direction
    seqlen: int
    head_dim: int
    memory: int
    share: float
    predicted: Accesses
    counted: Accesses | None
    flops: int
    minimum: int

    @property
    def agrees(self) -> bool | None:
        return None if self.counted is None else self.counted == self.predicted

    def to_json(self) -> dict[str, Any]:
        moved = {"predicted": vars(self.predicted), "counted": self.counted and vars(self.counted)}
        return vars(self) | moved

    @property
    def intensity(self) -> float:
        """FLOP a byte moved."""
        return self.flops / (BYTES * self.predicted.total)


@dataclass(frozen=True)
class Exponent:
    """How the accesses of one pass grow with one axis, all else fixed, over ``points`` sizes."""

    impl: str
    direction: Direction
    axis: str
    value: float
    points: int


def with_a_model(names: Iterable[str]) -> list[Implementation]:
    """Of these implementations, those that run on a modelled memory; one that does not load cannot."""
    probe = Problem(1, 1, 1, 1, dtype="fp64")
    found = []
    for name in names:
        try:
            implementation = registry.load(name)
        except registry.PluginError:
            continue
        if implementation.modelled(probe, TwoLevelMemory(4)) is not None:
            found.append(implementation)
    return found


def sweep(
    impls: Sequence[Implementation],
    sizes: Iterable[tuple[int, int, int, float]],
    count_up_to: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Point]:
    """Both passes of every algorithm at (seqlen, head_dim, memory, density); counted up to that sequence length."""
    for seqlen, head_dim, memory, density in sizes:
        tell(f"N {seqlen}, d {head_dim}, M {memory}, density {density:g}")
        problem = _problem(seqlen, head_dim, memory, density)
        for implementation in impls:
            yield from _points(implementation, problem, memory, count=seqlen <= count_up_to)


def _problem(seqlen: int, head_dim: int, memory: int, density: float) -> Problem:
    """One head; a density below 1 hides blocks as large as the one that stays in fast memory, drawn at random."""
    stays, _ = TwoLevelMemory(memory).block_rows(head_dim)
    pattern = BlockPattern("random", stays, stays, density=density) if density < 1 else None
    mask = Mask(blocks=pattern)
    return Problem(1, 1, seqlen, head_dim, dtype="fp64", mask=mask, direction="fwd_bwd")


def _points(implementation: Implementation, problem: Problem, size: int, *, count: bool) -> Iterator[Point]:
    memory = TwoLevelMemory(size)
    modelled = implementation.modelled(problem, memory)
    assert modelled is not None, "with_a_model chose it"
    counted: list[Accesses | None] = [None, None]
    if count:
        counted = [*run(modelled.attend, problem, memory)]
    share = problem.visible_pairs / problem.seqlen_q**2
    for direction, predicted, found in zip(
        PASSES, (modelled.forward, modelled.backward), counted, strict=True
    ):
        posed = problem.with_direction(direction)
        minimum = posed.minimal_bytes // 8  # elements of fp64; the lse's 4 bytes are half of one
        yield Point(
            implementation.name,
            direction,
            problem.seqlen_q,
            problem.head_dim,
            size,
            share,
            predicted,
            found,
            posed.flops,
            minimum,
        )


def bytes_by_algorithm(
    impls: Sequence[Implementation], problem: Problem, fast_bytes: int
) -> dict[str, float]:
    """What each algorithm moves of ``problem`` in its direction, in bytes; fast_bytes: of fast memory, a head."""
    size = DTYPE_BYTES[problem.dtype]
    found = {}
    for implementation in impls:
        modelled = implementation.modelled(problem, TwoLevelMemory(fast_bytes // size))
        assert modelled is not None, "with_a_model chose it"
        passes = {
            "fwd": modelled.forward,
            "bwd": modelled.backward,
            "fwd_bwd": modelled.forward + modelled.backward,
        }
        found[implementation.name] = float(size * passes[problem.direction].total)
    return found


def run(attend: Attend, problem: Problem, memory: TwoLevelMemory) -> tuple[Accesses, Accesses]:
    """What the forward pass moves and what the backward pass does, counted while they run."""
    import torch

    from attnbench.harness.oracle.inputs import make_inputs

    inputs = make_inputs(problem, 0, torch.device("cpu"), dout=True)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    before = memory.moved
    out = attend(*leaves)
    forward = memory.moved - before
    torch.autograd.grad(out, leaves, inputs.dout)
    return forward, memory.moved - before - forward


def exponents(points: Sequence[Point]) -> list[Exponent]:
    """Of each algorithm and pass: the slope of log accesses against log of each axis, over the longest series in which
    that axis alone varies."""
    found = []
    for impl in dict.fromkeys(point.impl for point in points):
        for direction in PASSES:
            own = [point for point in points if (point.impl, point.direction) == (impl, direction)]
            for axis in AXES:
                for series in series_along(own, axis)[-1:]:
                    x, y = np.log([[getattr(p, axis), p.predicted.total] for p in series]).T
                    slope = float(np.polyfit(x, y, 1)[0])
                    found.append(Exponent(impl, direction, axis, slope, len(series)))
    return found


def series_along(points: Iterable[Point], axis: str) -> list[list[Point]]:
    """Points in which ``axis`` alone varies, over three values at least, in its order; the longest series last, and of
    equally long ones that at the longest sequences, where lower terms weigh least. A share below 1 is kept to its own
    axis; a share of 0, where a short sequence has no block to see, has no logarithm."""
    series: dict[tuple[float, ...], dict[float, Point]] = {}
    for point in points:
        if (axis == "share" and point.share) or point.share == 1:
            others = tuple(getattr(point, other) for other in AXES if other != axis)
            series.setdefault(others, {}).setdefault(getattr(point, axis), point)
    found = [[own[value] for value in sorted(own)] for own in series.values() if len(own) >= 3]
    return sorted(found, key=lambda own: (len(own), min(point.seqlen for point in own)))


def verdict(intensity: float, balance: float) -> str:
    """Which of the two takes longer on a device that does ``balance`` FLOP in the time of a byte."""
    return "compute" if intensity > balance else "memory"
